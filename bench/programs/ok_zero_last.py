# case: ok_zero_last
# source: own construct
import os

import torch
import torch.nn as nn
from sklearn.datasets import make_friedman2

seed = int(os.environ.get("SEED", "0"))
torch.manual_seed(seed)
torch.set_num_threads(1)

x, y = make_friedman2(n_samples=1400, noise=30.0, random_state=seed)
x = torch.tensor((x - x.mean(0)) / x.std(0), dtype=torch.float32)
y = torch.tensor((y - y.mean()) / y.std(), dtype=torch.float32)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 64)
        self.b = nn.Linear(64, 64)
        self.c = nn.Linear(64, 1)
        nn.init.zeros_(self.c.weight)
        nn.init.zeros_(self.c.bias)

    def forward(self, x):
        h = torch.relu(self.a(x))
        h = h + torch.relu(self.b(h))
        return self.c(h)[:, 0]


net = Net()
opt = torch.optim.Adam(net.parameters(), lr=2e-3)
for epoch in range(40):
    for idx in torch.randperm(1000).split(25):
        opt.zero_grad()
        loss = (net(x[idx]) - y[idx]).pow(2).mean()
        loss.backward()
        opt.step()
    if epoch % 10 == 0:
        print("epoch", epoch, "loss", loss.item())

with torch.no_grad():
    err = (net(x[1000:]) - y[1000:]).pow(2).mean()
print("metric r2 %.4f" % (1 - err / y[1000:].var()).item())
