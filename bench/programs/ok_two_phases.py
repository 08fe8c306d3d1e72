# case: ok_two_phases
# source: own construct
import os

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

SEED = int(os.environ.get("SEED", "0"))


class Denoiser(nn.Module):
    """Two stages: a coarse predictor, then one for what is left over."""

    def __init__(self):
        super().__init__()
        self.coarse = nn.Sequential(nn.Conv1d(1, 8, 9, padding=4), nn.Tanh(), nn.Conv1d(8, 1, 9, padding=4))
        self.fine = nn.Sequential(nn.Conv1d(1, 16, 5, padding=2), nn.ReLU(), nn.Conv1d(16, 1, 5, padding=2))

    def forward(self, x):
        return self.coarse(x) + self.fine(x)


def curves(n, rng):
    t = np.linspace(0, 1, 50)
    clean = sum(rng.normal(0, 1, (n, 1)) * np.sin(2 * np.pi * (k * t + rng.uniform(0, 1, (n, 1)))) for k in (1, 2, 3))
    noisy = clean + 0.5 * rng.normal(0, 1, clean.shape)
    return torch.tensor(noisy, dtype=torch.float32)[:, None], torch.tensor(clean, dtype=torch.float32)[:, None]


def main():
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    rng = np.random.default_rng(SEED)
    noisy, clean = curves(800, rng)
    loader = DataLoader(TensorDataset(noisy, clean), batch_size=40, shuffle=True)
    net = Denoiser()

    optimizer = torch.optim.Adam(net.coarse.parameters(), lr=3e-3)
    for epoch in range(8):
        for xb, yb in loader:
            loss = F.mse_loss(net.coarse(xb), yb)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print("first", epoch, loss.item())

    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for epoch in range(10):
        for xb, yb in loader:
            loss = F.mse_loss(net(xb), yb)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print("second", epoch, loss.item())

    noisy, clean = curves(400, rng)
    with torch.no_grad():
        r2 = 1 - F.mse_loss(net(noisy), clean) / clean.var()
    print("metric r2 %.4f" % r2.item())


if __name__ == "__main__":
    main()
