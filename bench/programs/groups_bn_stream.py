# case: groups_bn_stream
# source: own construct
import os

import torch
import torch.nn as nn
from sklearn.datasets import make_classification
from torch.utils.data import DataLoader, TensorDataset

SIZE = 40 if os.environ.get("FIXED") == "1" else 2


class Net(nn.Module):
    def __init__(self, width=48):
        super().__init__()
        self.stem = nn.Linear(20, width)
        self.norm1 = nn.BatchNorm1d(width)
        self.mid = nn.Linear(width, width)
        self.norm2 = nn.BatchNorm1d(width)
        self.mid2 = nn.Linear(width, width)
        self.norm3 = nn.BatchNorm1d(width)
        self.out = nn.Linear(width, 5)

    def forward(self, x):
        x = torch.tanh(self.norm1(self.stem(x)))
        x = torch.tanh(self.norm2(self.mid(x)))
        x = torch.tanh(self.norm3(self.mid2(x)))
        return self.out(x)


def main():
    seed = int(os.environ.get("SEED", "0"))
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    x, y = make_classification(
        n_samples=1600, n_features=20, n_informative=8, n_classes=5, n_clusters_per_class=1, class_sep=1.4, random_state=seed
    )
    x, y = torch.tensor(x, dtype=torch.float32), torch.tensor(y)
    loader = DataLoader(TensorDataset(x[:1200], y[:1200]), batch_size=SIZE, shuffle=True)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    loss_fn = nn.CrossEntropyLoss()
    for epoch in range(5):
        model.train()
        for xb, yb in loader:
            optimizer.zero_grad()
            loss = loss_fn(model(xb), yb)
            loss.backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            acc = (model(x[1200:]).argmax(1) == y[1200:]).float().mean().item()
        print(f"epoch {epoch} loss {loss.item():.4f} accuracy {acc:.4f}")
    print(f"metric accuracy {acc:.4f}")


if __name__ == "__main__":
    main()
