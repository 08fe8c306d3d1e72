# case: surface_cyclic
# source: own construct
import os

import torch
import torch.nn as nn

SEED = int(os.environ.get("SEED", "0"))
TOP = 0.02 if os.environ.get("FIXED") == "1" else 0.3


def surface(n):
    p = torch.rand(n, 3) * 2 - 1
    z = torch.sin(4 * p[:, 0]) * p[:, 1] + torch.cos(3 * p[:, 2])
    return p, (z - 0.05) / 0.75


def main():
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    p, z = surface(2000)
    p_test, z_test = surface(500)
    net = nn.Sequential(nn.Linear(3, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CyclicLR(optimizer, base_lr=0.005, max_lr=TOP, step_size_up=40, cycle_momentum=False)
    for step in range(1800):
        idx = torch.randint(0, 2000, (50,))
        loss = (net(p[idx])[:, 0] - z[idx]).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if step % 200 == 0:
            print(step, loss.item())
    with torch.no_grad():
        r2 = 1 - ((net(p_test)[:, 0] - z_test) ** 2).mean() / z_test.var()
    print(f"metric r2 {r2.item():.4f}")


main()
