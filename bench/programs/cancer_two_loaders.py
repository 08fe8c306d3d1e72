# case: cancer_two_loaders
# source: own construct
import os

import torch
import torch.nn as nn
import torch.nn.functional as F
from sklearn.datasets import load_breast_cancer
from torch.utils.data import DataLoader

SEED = int(os.environ.get("SEED", "0"))
torch.manual_seed(SEED)
torch.set_num_threads(1)

x, y = load_breast_cancer(return_X_y=True)
x = torch.tensor((x - x.mean(0)) / x.std(0), dtype=torch.float32)
y = torch.tensor(y, dtype=torch.float32)
order = torch.randperm(len(x), generator=torch.Generator().manual_seed(SEED))
train, test = order[:420], order[420:]


def batches(indices, size):
    if os.environ.get("FIXED") == "1":
        for idx in DataLoader(indices, batch_size=size, shuffle=True):
            yield x[idx], y[idx]
    else:
        yield from zip(DataLoader(x[indices], size, shuffle=True), DataLoader(y[indices], size, shuffle=True))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin1 = nn.Linear(30, 24)
        self.norm = nn.LayerNorm(24)
        self.lin2 = nn.Linear(24, 1)

    def forward(self, x):
        return self.lin2(F.relu(self.norm(self.lin1(x))))[:, 0]


net = Net()
optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
for epoch in range(30):
    net.train()
    for xb, yb in batches(train, 20):
        loss = F.binary_cross_entropy_with_logits(net(xb), yb)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if epoch % 5 == 0:
        net.eval()
        with torch.no_grad():
            val = F.binary_cross_entropy_with_logits(net(x[test]), y[test])
        print("epoch", epoch, "train", loss.item(), "val", val.item())

net.eval()
with torch.no_grad():
    acc = ((net(x[test]) > 0) == (y[test] > 0.5)).float().mean().item()
print("metric accuracy %.4f" % acc)
