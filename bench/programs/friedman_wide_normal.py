# case: friedman_wide_normal
# source: own construct
import os

import torch
import torch.nn as nn
from sklearn.datasets import make_friedman1
from torch.utils.data import DataLoader, TensorDataset


class Net(nn.Module):
    def __init__(self, fixed):
        super().__init__()
        self.lin1 = nn.Linear(10, 128)
        self.lin2 = nn.Linear(128, 128)
        self.lin3 = nn.Linear(128, 1)
        for lin in (self.lin1, self.lin2, self.lin3):
            if fixed:
                nn.init.kaiming_normal_(lin.weight)
            else:
                nn.init.normal_(lin.weight, 0.0, 1.0)
            nn.init.zeros_(lin.bias)

    def forward(self, x):
        x = self.lin1(x).relu()
        x = self.lin2(x).relu()
        return self.lin3(x)


def main():
    seed = int(os.environ.get("SEED", "0"))
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    x, y = make_friedman1(n_samples=1300, noise=0.3, random_state=seed)
    x = torch.tensor((x - 0.5) * 3.46, dtype=torch.float32)
    y = torch.tensor((y - y.mean()) / y.std(), dtype=torch.float32).unsqueeze(1)
    loader = DataLoader(TensorDataset(x[:1000], y[:1000]), batch_size=50, shuffle=True)
    net = Net(fixed=os.environ.get("FIXED") == "1")
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    criterion = nn.MSELoss()
    for epoch in range(60):
        for xb, yb in loader:
            optimizer.zero_grad()
            loss = criterion(net(xb), yb)
            loss.backward()
            optimizer.step()
        if epoch % 10 == 0:
            print("epoch", epoch, "loss", loss.item())
    net.eval()
    with torch.no_grad():
        r2 = 1 - criterion(net(x[1000:]), y[1000:]) / y[1000:].var(unbiased=False)
    print("metric r2 %.4f" % r2.item())


main()
