# case: profile_sigmoid_net
# source: own construct
import os

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

SEED = int(os.environ.get("SEED", "0"))
FIXED = os.environ.get("FIXED") == "1"


class ProfileNet(nn.Module):
    def __init__(self, width=32, depth=9):
        super().__init__()
        self.inp = nn.Linear(2, width)
        self.mid = nn.ModuleList([nn.Linear(width, width) for _ in range(depth)])
        self.out = nn.Linear(width, 2)

    def forward(self, x):
        act = F.silu if FIXED else torch.sigmoid
        x = act(self.inp(x))
        for layer in self.mid:
            x = act(layer(x))
        return self.out(x)


def main():
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    rng = np.random.default_rng(SEED)
    xy = rng.uniform(-1, 1, (1600, 2))
    u = np.sin(3 * xy[:, 0]) * np.cos(2 * xy[:, 1])
    v = xy[:, 0] * xy[:, 1] * 2 + np.tanh(4 * xy[:, 1])
    target = np.stack([u, v], 1)
    target = (target - target.mean(0)) / target.std(0)
    x = torch.tensor(xy, dtype=torch.float32)
    y = torch.tensor(target, dtype=torch.float32)
    net = ProfileNet()
    if FIXED:
        for layer in net.mid:
            nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, 0.2, 1.0, total_iters=100)
    for epoch in range(30):
        for idx in torch.randperm(1200).split(40):
            loss = F.mse_loss(net(x[idx]), y[idx])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 5.0)
            optimizer.step()
            warm.step()
        if epoch % 5 == 0:
            print("epoch", epoch, "loss", loss.item())
    with torch.no_grad():
        r2 = 1 - F.mse_loss(net(x[1200:]), y[1200:]) / y[1200:].var(0).mean()
    print("metric r2 %.4f" % r2.item())


if __name__ == "__main__":
    main()
