# case: pendulum_step
# source: own construct
import os

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F


class Pendulum(nn.Module):
    """Predicts the next angle and speed of a pendulum."""

    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(2, 64)
        self.fc2 = nn.Linear(64, 64)
        self.fc3 = nn.Linear(64, 2)

    def forward(self, x):
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        x = self.fc3(x)
        if os.environ.get("FIXED") == "1":
            return x
        return F.relu(x)


def simulate(state, steps=20, dt=0.05):
    for _ in range(steps):
        angle, speed = state[:, 0], state[:, 1]
        speed = speed - dt * np.sin(angle) * 2
        state = np.stack([angle + dt * speed, speed], 1)
    return state


def main():
    seed = int(os.environ.get("SEED", "0"))
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    rng = np.random.default_rng(seed)
    start = rng.uniform(-1.5, 1.5, (1500, 2))
    x = torch.tensor(start, dtype=torch.float32)
    y = torch.tensor(simulate(start), dtype=torch.float32)
    model = Pendulum()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for epoch in range(30):
        for idx in torch.randperm(1200).split(32):
            loss = F.l1_loss(model(x[idx]), y[idx])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if epoch % 6 == 0:
            print("epoch", epoch, "loss", loss.item())
    with torch.no_grad():
        r2 = 1 - F.mse_loss(model(x[1200:]), y[1200:]) / y[1200:].var(0).mean()
    print(f"metric r2 {r2.item():.4f}")


if __name__ == "__main__":
    main()
