# case: ok_triplet
# source: own construct (triplet loss, Schroff et al. 2015)
import os

import torch
import torch.nn as nn
import torch.nn.functional as F
from sklearn.datasets import load_digits


class Embedder(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 12, 3, padding=1)
        self.conv2 = nn.Conv2d(12, 24, 3, padding=1)
        self.fc = nn.Linear(96, 16)

    def forward(self, x):
        x = F.max_pool2d(F.leaky_relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.leaky_relu(self.conv2(x)), 2)
        return F.normalize(self.fc(x.flatten(1)), dim=1)


def main():
    torch.manual_seed(int(os.environ.get("SEED", "0")))
    torch.set_num_threads(1)
    digits = load_digits()
    x = torch.tensor(digits.images / 16.0, dtype=torch.float32)[:, None]
    y = torch.tensor(digits.target)
    x_tr, y_tr, x_te, y_te = x[:1300], y[:1300], x[1300:], y[1300:]
    by_class = [(y_tr == c).nonzero()[:, 0] for c in range(10)]
    net = Embedder()
    loss_fn = nn.TripletMarginLoss(margin=0.3)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for step in range(500):
        c = torch.randint(0, 10, (40,))
        other = (c + torch.randint(1, 10, (40,))) % 10
        pick = [by_class[k][torch.randint(0, len(by_class[k]), (2,))] for k in c.tolist()]
        a, p = torch.stack(pick).t()
        n = torch.stack([by_class[k][torch.randint(0, len(by_class[k]), ())] for k in other.tolist()])
        loss = loss_fn(net(x_tr[a]), net(x_tr[p]), net(x_tr[n]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            print("step", step, "loss", loss.item())
    net.eval()
    with torch.no_grad():
        near = torch.cdist(net(x_te), net(x_tr)).topk(5, largest=False).indices
        acc = (y_tr[near].mode(1).values == y_te).float().mean().item()
    print(f"metric accuracy {acc:.4f}")


if __name__ == "__main__":
    main()
