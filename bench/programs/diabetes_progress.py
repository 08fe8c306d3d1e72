# case: diabetes_progress
# source: own construct
import os

import torch
from sklearn.datasets import load_diabetes
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

SEED = int(os.environ.get("SEED", "0"))
torch.manual_seed(SEED)
torch.set_num_threads(1)

x, y = load_diabetes(return_X_y=True)
x = torch.tensor(x / x.std(0), dtype=torch.float32)
y = torch.tensor(y, dtype=torch.float32).reshape(-1, 1)
if os.environ.get("FIXED") == "1":
    y = (y - y.mean()) / y.std()
order = torch.randperm(len(x))
train, test = order[:340], order[340:]
loader = DataLoader(TensorDataset(x[train], y[train]), batch_size=20, shuffle=True)

net = nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 1))
opt = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.05)
loss_function = nn.MSELoss()
for epoch in range(50):
    for xb, yb in loader:
        loss = loss_function(net(xb), yb)
        opt.zero_grad()
        loss.backward()
        opt.step()
    if epoch % 10 == 9:
        with torch.no_grad():
            print("epoch", epoch + 1, "train", loss.item(), "test", loss_function(net(x[test]), y[test]).item())

with torch.no_grad():
    r2 = 1 - loss_function(net(x[test]), y[test]) / y[test].var(unbiased=False)
print(f"metric r2 {r2.item():.4f}")
