# case: ok_sparse_relu
# source: own construct
import os

import torch
import torch.nn as nn
from sklearn.datasets import make_friedman1
from torch.utils.data import DataLoader, TensorDataset


def main():
    seed = int(os.environ.get("SEED", "0"))
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    x, y = make_friedman1(n_samples=2600, noise=0.5, random_state=seed)
    x = torch.tensor((x - 0.5) / 0.289, dtype=torch.float32)
    y = torch.tensor((y - y.mean()) / y.std(), dtype=torch.float32)[:, None]
    loader = DataLoader(TensorDataset(x[:2200], y[:2200]), batch_size=35, shuffle=True)
    net = nn.Sequential(nn.Linear(10, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 1))
    for layer in (net[0], net[2]):
        nn.init.kaiming_normal_(layer.weight)
        nn.init.constant_(layer.bias, -0.6)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.MultiplicativeLR(optimizer, lambda epoch: 0.93)
    loss_fn = nn.MSELoss()
    for epoch in range(25):
        for xb, yb in loader:
            optimizer.zero_grad()
            loss = loss_fn(net(xb), yb)
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 2.0)
            optimizer.step()
        scheduler.step()
        if epoch % 8 == 0:
            print("epoch", epoch, "loss", loss.item())
    with torch.no_grad():
        hidden = net[1](net[0](x[2200:]))
        print("active %.2f" % (hidden > 0).float().mean().item())
        r2 = 1 - loss_fn(net(x[2200:]), y[2200:]) / y[2200:].var()
    print(f"metric r2 {r2.item():.4f}")


main()
