# case: column_experts
# source: own construct
import os

import torch
import torch.nn as nn
import torch.nn.functional as F
from sklearn.datasets import make_regression


class Experts(nn.Module):
    """One small tower for each group of columns, mixed by a linear layer."""

    def __init__(self, groups, as_module):
        super().__init__()
        self.groups = groups
        towers = {name: nn.Sequential(nn.Linear(len(cols), 3), nn.Tanh()) for name, cols in groups.items()}
        self.towers = nn.ModuleDict(towers) if as_module else towers
        self.mix = nn.Linear(3 * len(groups), 1)

    def forward(self, x):
        parts = [self.towers[name](x[:, cols]) for name, cols in self.groups.items()]
        return self.mix(torch.cat(parts, 1))


def main():
    seed = int(os.environ.get("SEED", "0"))
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    x, y = make_regression(n_samples=1500, n_features=30, n_informative=24, noise=5.0, random_state=seed)
    x = torch.tensor(x, dtype=torch.float32)
    y = torch.tensor((y - y.mean()) / y.std(), dtype=torch.float32)[:, None]
    groups = {"a": list(range(10)), "b": list(range(10, 20)), "c": list(range(20, 30))}
    model = Experts(groups, as_module=os.environ.get("FIXED") == "1")
    optimizer = torch.optim.RMSprop(model.parameters(), lr=2e-3)
    for epoch in range(40):
        for idx in torch.randperm(1200).split(40):
            optimizer.zero_grad()
            loss = F.smooth_l1_loss(model(x[idx]), y[idx])
            loss.backward()
            optimizer.step()
        if epoch % 10 == 0:
            print("epoch", epoch, "loss", loss.item())
    with torch.no_grad():
        pred = model(x[1200:])
        r2 = 1 - ((pred - y[1200:]) ** 2).mean() / y[1200:].var()
    print(f"metric r2 {r2.item():.4f}")


main()
