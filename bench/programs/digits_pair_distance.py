# case: digits_pair_distance
# source: own construct
import os

import torch
import torch.nn as nn
from sklearn.datasets import load_digits

SEED = int(os.environ.get("SEED", "0"))
EPS = 1e-8 if os.environ.get("FIXED") == "1" else 0.0


class Encoder(nn.Module):
    def __init__(self, dim=8):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        )
        self.project = nn.Linear(64, dim)

    def forward(self, x):
        return self.project(self.features(x).flatten(1))


def distance(a, b):
    return torch.sqrt(((a - b) ** 2).sum(1) + EPS)


def contrastive(d, same, margin=2.0):
    return (same * d ** 2 + (1 - same) * torch.clamp(margin - d, min=0) ** 2).mean()


def draw_pairs(labels, n):
    left = torch.randint(0, len(labels), (n,))
    right = torch.randint(0, len(labels), (n,))
    # half of the pairs from the same class
    for i in range(0, n, 2):
        pool = (labels == labels[left[i]]).nonzero()[:, 0]
        right[i] = pool[torch.randint(0, len(pool), (1,))]
    return left, right


def main():
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    x, y = load_digits(return_X_y=True)
    x = torch.tensor(x / 16.0, dtype=torch.float32).reshape(-1, 1, 8, 8)
    y = torch.tensor(y)
    x_tr, y_tr, x_te, y_te = x[:1300], y[:1300], x[1300:], y[1300:]
    encoder = Encoder()
    optimizer = torch.optim.Adam(encoder.parameters(), lr=2e-3)
    for step in range(500):
        i, j = draw_pairs(y_tr, 64)
        d = distance(encoder(x_tr[i]), encoder(x_tr[j]))
        loss = contrastive(d, (y_tr[i] == y_tr[j]).float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            print("step", step, "loss", loss.item())
    encoder.eval()
    with torch.no_grad():
        bank, query = encoder(x_tr), encoder(x_te)
        nearest = torch.cdist(query, bank).argmin(1)
        acc = (y_tr[nearest] == y_te).float().mean().item()
    print(f"metric accuracy {acc:.4f}")


if __name__ == "__main__":
    main()
