# case: friedman_mse_dataset
# source: own construct
import os

import torch
import torch.nn as nn
import torch.nn.functional as F
from sklearn.datasets import make_friedman2
from sklearn.preprocessing import StandardScaler
from torch.utils.data import DataLoader, Dataset

SEED = int(os.environ.get("SEED", "0"))
FIXED = os.environ.get("FIXED") == "1"


class Table(Dataset):
    def __init__(self, x, y):
        self.x = torch.tensor(x, dtype=torch.float32)
        self.y = torch.tensor(y, dtype=torch.float32)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], self.y[i]


class Regressor(nn.Module):
    def __init__(self):
        super().__init__()
        self.l1 = nn.Linear(4, 80)
        self.l2 = nn.Linear(80, 40)
        self.l3 = nn.Linear(40, 1)

    def forward(self, x):
        return self.l3(F.softplus(self.l2(F.softplus(self.l1(x)))))


def main():
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    x, y = make_friedman2(n_samples=1000, noise=20.0, random_state=SEED)
    x = StandardScaler().fit_transform(x)
    y = (y - y.mean()) / y.std()
    train, test = Table(x[:800], y[:800]), Table(x[800:], y[800:])
    loader = DataLoader(train, batch_size=32, shuffle=True)
    model = Regressor()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for epoch in range(30):
        running = 0.0
        for xb, yb in loader:
            pred = model(xb)
            if FIXED:
                pred = pred.squeeze(1)
            loss = F.mse_loss(pred, yb)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            running += loss.item()
        if epoch % 5 == 0:
            print(f"epoch {epoch} loss {running / len(loader):.4f}")
    model.eval()
    with torch.no_grad():
        pred = model(test.x).flatten()
        r2 = 1 - ((pred - test.y) ** 2).sum() / ((test.y - test.y.mean()) ** 2).sum()
    print("metric r2 %.4f" % r2.item())


if __name__ == "__main__":
    main()
