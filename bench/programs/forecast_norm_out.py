# case: forecast_norm_out
# source: own construct
import os

import numpy as np
import torch
import torch.nn as nn
from torch.utils.data import DataLoader, TensorDataset


class Forecaster(nn.Module):
    def __init__(self, hidden=24):
        super().__init__()
        self.lstm = nn.LSTM(1, hidden, batch_first=True)
        self.fc = nn.Linear(hidden, 1)
        self.norm = nn.LayerNorm(hidden if os.environ.get("FIXED") == "1" else 1)
        self.norm_first = os.environ.get("FIXED") == "1"

    def forward(self, x):
        h, _ = self.lstm(x)
        h = h[:, -1]
        if self.norm_first:
            return self.fc(self.norm(h))
        return self.norm(self.fc(h))


def main():
    seed = int(os.environ.get("SEED", "0"))
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    rng = np.random.default_rng(seed)
    t = np.arange(1300)
    series = np.sin(2 * np.pi * t / 23) + 0.6 * np.sin(2 * np.pi * t / 7.3) + 0.1 * rng.standard_normal(1300)
    window = 16
    x = np.stack([series[i:i + window] for i in range(len(series) - window)])[:, :, None]
    y = series[window:, None]
    x, y = torch.tensor(x, dtype=torch.float32), torch.tensor(y, dtype=torch.float32)
    loader = DataLoader(TensorDataset(x[:1000], y[:1000]), batch_size=40, shuffle=True)
    model = Forecaster()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    loss_fn = nn.MSELoss()
    for epoch in range(15):
        for xb, yb in loader:
            optimizer.zero_grad()
            loss = loss_fn(model(xb), yb)
            loss.backward()
            optimizer.step()
        print("epoch", epoch, "loss", loss.item())
    model.eval()
    with torch.no_grad():
        r2 = 1 - loss_fn(model(x[1000:]), y[1000:]) / y[1000:].var()
    print(f"metric r2 {r2.item():.4f}")


main()
