# case: cancer_tanh_stack
# source: own construct
import os

import numpy as np
import torch
import torch.nn as nn
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torch.utils.data import DataLoader, TensorDataset

SEED = int(os.environ.get("SEED", "0"))
FIXED = os.environ.get("FIXED") == "1"


class TanhNet(nn.Module):
    def __init__(self, inputs, width=40, depth=12):
        super().__init__()
        self.first = nn.Linear(inputs, width)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(depth - 1))
        self.last = nn.Linear(width, 1)
        self.apply(self.init)

    @staticmethod
    def init(m):
        if isinstance(m, nn.Linear):
            if FIXED:
                nn.init.xavier_normal_(m.weight, gain=5 / 3)
            else:
                nn.init.normal_(m.weight, std=0.05)
            nn.init.zeros_(m.bias)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        for layer in self.hidden:
            x = torch.tanh(layer(x))
        return self.last(x).squeeze(1)


def main():
    torch.manual_seed(SEED)
    np.random.seed(SEED)
    torch.set_num_threads(1)
    x, y = load_breast_cancer(return_X_y=True)
    x_tr, x_te, y_tr, y_te = train_test_split(x, y, test_size=0.25, random_state=SEED, stratify=y)
    scaler = StandardScaler().fit(x_tr)
    x_tr = torch.tensor(scaler.transform(x_tr), dtype=torch.float32)
    x_te = torch.tensor(scaler.transform(x_te), dtype=torch.float32)
    y_tr = torch.tensor(y_tr, dtype=torch.float32)
    y_te = torch.tensor(y_te, dtype=torch.float32)
    loader = DataLoader(TensorDataset(x_tr, y_tr), batch_size=16, shuffle=True)
    model = TanhNet(x_tr.shape[1])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True)
    loss_fn = nn.BCEWithLogitsLoss()
    for epoch in range(30):
        total = 0.0
        for xb, yb in loader:
            optimizer.zero_grad()
            loss = loss_fn(model(xb), yb)
            loss.backward()
            optimizer.step()
            total += loss.item() * len(xb)
        if epoch % 5 == 0:
            print(f"epoch {epoch} loss {total / len(x_tr):.4f}")
    with torch.no_grad():
        acc = ((model(x_te) > 0).float() == y_te).float().mean().item()
    print(f"metric accuracy {acc:.4f}")


if __name__ == "__main__":
    main()
