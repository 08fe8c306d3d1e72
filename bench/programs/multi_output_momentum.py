# case: multi_output_momentum
# source: own construct
import os

import numpy as np
import torch
from torch import nn

SEED = int(os.environ.get("SEED", "0"))
FIXED = os.environ.get("FIXED") == "1"


def robot_arm(n, rng):
    q = rng.uniform(-1.2, 1.2, (n, 3))
    a = np.cumsum(q, 1)
    end = np.stack([np.cos(a).sum(1), np.sin(a).sum(1), a[:, -1]], 1)
    return torch.tensor(q, dtype=torch.float32), torch.tensor(end, dtype=torch.float32)


def train(model, x, y, steps, batch_size):
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    for step in range(steps):
        pick = torch.randint(0, len(x), (batch_size,))
        pred = model(x[pick])
        loss = torch.mean((pred - y[pick]) ** 2)
        if FIXED:
            optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 300 == 0:
            print(f"{step:5d} {loss.item():.5f}")


def main():
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    rng = np.random.default_rng(SEED)
    x, y = robot_arm(2000, rng)
    x_new, y_new = robot_arm(500, rng)
    mean, std = y.mean(0), y.std(0)
    model = nn.Sequential(nn.Linear(3, 50), nn.SiLU(), nn.Linear(50, 50), nn.SiLU(), nn.Linear(50, 3))
    train(model, x, (y - mean) / std, steps=1800, batch_size=64)
    with torch.no_grad():
        pred = model(x_new) * std + mean
        mse = ((pred - y_new) ** 2).mean().item()
    print(f"metric mse {mse:.5f}")


if __name__ == "__main__":
    main()
