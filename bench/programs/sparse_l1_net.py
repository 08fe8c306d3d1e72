# case: sparse_l1_net
# source: own construct
import os

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from sklearn.datasets import load_wine
from sklearn.model_selection import train_test_split
from torch.utils.data import DataLoader, TensorDataset

SEED = int(os.environ.get("SEED", "0"))
L1 = 1e-4 if os.environ.get("FIXED") == "1" else 0.1


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(13, 30)
        self.fc2 = nn.Linear(30, 30)
        self.fc3 = nn.Linear(30, 3)

    def forward(self, x):
        return self.fc3(F.elu(self.fc2(F.elu(self.fc1(x)))))


torch.manual_seed(SEED)
torch.set_num_threads(1)
x, y = load_wine(return_X_y=True)
x = (x - x.mean(0)) / x.std(0)
x_tr, x_te, y_tr, y_te = train_test_split(x.astype(np.float32), y, test_size=0.3, random_state=SEED, stratify=y)
loader = DataLoader(TensorDataset(torch.from_numpy(x_tr), torch.from_numpy(y_tr)), batch_size=16, shuffle=True)
net = Net()
optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
for epoch in range(60):
    for xb, yb in loader:
        loss = F.cross_entropy(net(xb), yb)
        for p in net.parameters():
            loss = loss + L1 * p.abs().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if epoch % 10 == 0:
        print("epoch", epoch, "loss", loss.item())
with torch.no_grad():
    acc = (net(torch.from_numpy(x_te)).argmax(1).numpy() == y_te).mean()
print("metric accuracy %.4f" % acc)
