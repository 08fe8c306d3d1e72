# case: energy_total
# source: own construct
import os

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

SEED = int(os.environ.get("SEED", "0"))
FIXED = os.environ.get("FIXED") == "1"


class Series(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv1d(1, 8, 5, padding=2), nn.ReLU(), nn.Conv1d(8, 8, 5, padding=2), nn.ReLU())
        self.out = nn.Linear(8 * 24, 1)

    def forward(self, x):
        return self.out(self.conv(x).flatten(1))


def main():
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    rng = np.random.default_rng(SEED)
    # daily household use over 24 hours -> the yearly total in Wh
    base = rng.gamma(4.0, 0.25, (1500, 1)) * (1 + 0.6 * np.sin(np.linspace(0, 6.28, 24) + rng.uniform(0, 6.28, (1500, 1))))
    x = base + 0.1 * rng.standard_normal((1500, 24))
    total = 365.0 * 1000.0 * (base.mean(1) ** 1.5 + 0.2 * base.max(1))
    if FIXED:
        total = (total - total.mean()) / total.std()
    x = torch.tensor((x - x.mean()) / x.std(), dtype=torch.float32).unsqueeze(1)
    y = torch.tensor(total, dtype=torch.float32).unsqueeze(1)
    loader = DataLoader(TensorDataset(x[:1200], y[:1200]), batch_size=60, shuffle=True)
    model = Series()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    criterion = nn.MSELoss()
    for epoch in range(30):
        for xb, yb in loader:
            optimizer.zero_grad()
            loss = criterion(model(xb), yb)
            loss.backward()
            optimizer.step()
        if epoch % 5 == 0:
            print("epoch", epoch, "loss", loss.item())
    with torch.no_grad():
        r2 = 1 - criterion(model(x[1200:]), y[1200:]) / y[1200:].var()
    print(f"metric r2 {r2.item():.4f}")


if __name__ == "__main__":
    main()
