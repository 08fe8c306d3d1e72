# case: digits_nll
# source: own construct
import os

import torch
import torch.nn as nn
from sklearn.datasets import load_digits
from sklearn.preprocessing import MinMaxScaler
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(int(os.environ.get("SEED", "0")))
torch.set_num_threads(1)

x, y = load_digits(return_X_y=True)
x = torch.tensor(MinMaxScaler().fit_transform(x), dtype=torch.float32)
y = torch.tensor(y)
loader = DataLoader(TensorDataset(x[:1400], y[:1400]), batch_size=32, shuffle=True)

layers = [nn.Linear(64, 80), nn.Hardswish(), nn.Linear(80, 40), nn.Hardswish(), nn.Linear(40, 10)]
if os.environ.get("FIXED") == "1":
    layers.append(nn.LogSoftmax(dim=1))
model = nn.Sequential(*layers)
criterion = nn.NLLLoss()
optimizer = torch.optim.NAdam(model.parameters(), lr=1e-3)

for epoch in range(12):
    running = 0.0
    for xb, yb in loader:
        optimizer.zero_grad()
        loss = criterion(model(xb), yb)
        loss.backward()
        optimizer.step()
        running += loss.item()
    print("epoch", epoch, "loss", running / len(loader))

model.eval()
with torch.no_grad():
    acc = (model(x[1400:]).argmax(1) == y[1400:]).float().mean().item()
print(f"metric accuracy {acc:.4f}")
