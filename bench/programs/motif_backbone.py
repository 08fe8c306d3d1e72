# case: motif_backbone
# source: own construct
import os

import torch
import torch.nn as nn
import torch.nn.functional as F

SEED = int(os.environ.get("SEED", "0"))


class MotifNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv1d(4, 16, 6), nn.ReLU(),
            nn.Conv1d(16, 8, 3), nn.ReLU(),
        )
        self.classifier = nn.Linear(8, 3)

    def forward(self, x):
        return self.classifier(self.backbone(x).amax(2))


def sequences(n, motifs):
    seq = torch.randint(0, 4, (n, 40))
    label = torch.randint(0, len(motifs), (n,))
    start = torch.randint(0, 34, (n,))
    for i in range(n):
        seq[i, start[i]:start[i] + 6] = motifs[label[i]]
    return F.one_hot(seq, 4).float().transpose(1, 2), label


def main():
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    motifs = torch.tensor([[0, 1, 2, 3, 0, 1], [3, 3, 1, 0, 2, 2], [1, 0, 0, 2, 3, 1]])
    x, y = sequences(2400, motifs)
    x_test, y_test = sequences(500, motifs)
    model = MotifNet()
    if os.environ.get("FIXED") != "1":
        for p in model.backbone.parameters():
            p.requires_grad_(False)
    optimizer = torch.optim.Adam(filter(lambda p: p.requires_grad, model.parameters()), lr=5e-3)
    for epoch in range(15):
        model.train()
        for idx in torch.randperm(2400).split(50):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x[idx]), y[idx])
            loss.backward()
            optimizer.step()
        print("epoch", epoch, "loss", round(loss.item(), 4))
    model.eval()
    with torch.no_grad():
        acc = (model(x_test).argmax(1) == y_test).float().mean().item()
    print(f"metric accuracy {acc:.4f}")


main()
