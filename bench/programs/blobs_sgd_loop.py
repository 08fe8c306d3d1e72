# case: blobs_sgd_loop
# source: own construct
import os

import torch
import torch.nn as nn
from sklearn.datasets import make_classification
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(int(os.environ.get("SEED", "0")))
torch.set_num_threads(1)

x, y = make_classification(
    n_samples=2000, n_features=24, n_informative=12, n_classes=4, class_sep=1.5, random_state=int(os.environ.get("SEED", "0"))
)
x, y = torch.tensor(x, dtype=torch.float32), torch.tensor(y)
loader = DataLoader(TensorDataset(x[:1600], y[:1600]), batch_size=32, shuffle=True)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(24, 64), nn.BatchNorm1d(64), nn.LeakyReLU(), nn.Linear(64, 64), nn.LeakyReLU(), nn.Linear(64, 4)
        )

    def forward(self, x):
        return self.net(x)


model = Net()
optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
loss_fn = nn.CrossEntropyLoss()
fixed = os.environ.get("FIXED") == "1"
optimizer.zero_grad()
for epoch in range(20):
    model.train()
    for xb, yb in loader:
        loss = loss_fn(model(xb), yb)
        loss.backward()
        optimizer.step()
        if fixed:
            optimizer.zero_grad()
    if epoch % 4 == 0:
        print("epoch", epoch, "loss", loss.item())

model.eval()
with torch.no_grad():
    acc = (model(x[1600:]).argmax(1) == y[1600:]).float().mean().item()
print("metric accuracy %.4f" % acc)
