# case: glyphs_probabilities
# source: own construct
import os

import torch
import torch.nn as nn
from torch.utils.data import DataLoader, TensorDataset

FIXED = os.environ.get("FIXED") == "1"


class GlyphNet(nn.Module):
    def __init__(self, classes=26):
        super().__init__()
        self.conv = nn.Conv2d(1, 16, 3)
        self.fc1 = nn.Linear(16 * 36, 64)
        self.fc2 = nn.Linear(64, classes)
        self.probs = nn.Softmax(dim=1)

    def forward(self, x):
        x = torch.relu(self.conv(x)).flatten(1)
        x = self.fc2(torch.relu(self.fc1(x)))
        return x if FIXED else self.probs(x)


def main():
    torch.manual_seed(int(os.environ.get("SEED", "0")))
    torch.set_num_threads(1)
    glyphs = (torch.rand(26, 1, 8, 8) < 0.35).float()
    label = torch.randint(0, 26, (2600,))
    x = glyphs[label] + 0.4 * torch.randn(2600, 1, 8, 8)
    loader = DataLoader(TensorDataset(x[:2000], label[:2000]), batch_size=50, shuffle=True)
    model = GlyphNet()
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for epoch in range(6):
        model.train()
        for xb, yb in loader:
            optimizer.zero_grad()
            loss = criterion(model(xb), yb)
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch} loss {loss.item():.4f}")
    model.eval()
    with torch.no_grad():
        acc = (model(x[2000:]).argmax(1) == label[2000:]).float().mean().item()
    print(f"metric accuracy {acc:.4f}")


if __name__ == "__main__":
    main()
