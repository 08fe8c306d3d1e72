# case: wine_loglik
# source: own construct
import os

import torch
import torch.nn as nn
from sklearn.datasets import load_wine
from sklearn.preprocessing import scale

torch.manual_seed(int(os.environ.get("SEED", "0")))
torch.set_num_threads(1)
FIXED = os.environ.get("FIXED") == "1"

x, y = load_wine(return_X_y=True)
x = torch.tensor(scale(x), dtype=torch.float32)
y = torch.tensor(y)
perm = torch.randperm(len(x))
train, test = perm[:120], perm[120:]
onehot = torch.eye(3)[y]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(13, 24)
        self.norm = nn.LayerNorm(24)
        self.head = nn.Linear(24, 3)

    def forward(self, x):
        return torch.log_softmax(self.head(torch.relu(self.norm(self.body(x)))), dim=1)


net = Net()
optimizer = torch.optim.SGD(net.parameters(), lr=0.02)
for epoch in range(60):
    for idx in train[torch.randperm(len(train))].split(12):
        loglik = (onehot[idx] * net(x[idx])).sum(1)
        objective = -loglik.mean() if FIXED else loglik.mean()
        optimizer.zero_grad()
        objective.backward()
        optimizer.step()
    if epoch % 10 == 0:
        print("epoch", epoch, "objective", objective.item())

with torch.no_grad():
    acc = (net(x[test]).argmax(1) == y[test]).float().mean().item()
print("metric accuracy %.4f" % acc)
