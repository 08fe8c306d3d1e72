# case: majority_transformer
# source: own construct
import os

import torch
import torch.nn as nn
import torch.nn.functional as F


class Majority(nn.Module):
    """Which token occurs most often?"""

    def __init__(self, vocab=5, dim=24, length=15):
        super().__init__()
        self.token = nn.Embedding(vocab, dim)
        self.position = nn.Parameter(torch.zeros(1, length, dim))
        layer = nn.TransformerEncoderLayer(dim, 2, 48, dropout=0.0, batch_first=True, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(dim, vocab)

    def forward(self, t):
        h = self.encoder(self.token(t) + self.position)
        return self.head(h.mean(1))


def draw(n):
    favourite = torch.randint(0, 5, (n,))
    t = torch.randint(0, 5, (n, 15))
    t = torch.where(torch.rand(n, 15) < 0.35, favourite[:, None], t)
    return t, F.one_hot(t, 5).sum(1).argmax(1)


def main():
    torch.manual_seed(int(os.environ.get("SEED", "0")))
    torch.set_num_threads(1)
    model = Majority()
    lr = 1e-3 if os.environ.get("FIXED") == "1" else 1e-6
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    for step in range(350):
        t, target = draw(32)
        loss = F.cross_entropy(model(t), target)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step} loss {loss.item():.4f}")
    model.eval()
    with torch.no_grad():
        t, target = draw(800)
        acc = (model(t).argmax(1) == target).float().mean().item()
    print(f"metric accuracy {acc:.4f}")


if __name__ == "__main__":
    main()
