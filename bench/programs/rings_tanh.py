# case: rings_tanh
# source: own construct
import os

import torch
import torch.nn as nn
from sklearn.datasets import make_gaussian_quantiles

SEED = int(os.environ.get("SEED", "0"))
torch.manual_seed(SEED)
torch.set_num_threads(1)

x, y = make_gaussian_quantiles(n_samples=1500, n_features=6, n_classes=3, random_state=SEED)
x = torch.tensor(x, dtype=torch.float32)
y = torch.tensor(y)

model = nn.Sequential()
width = 6
for i in range(5):
    model.add_module(f"dense{i}", nn.Linear(width, 50))
    model.add_module(f"tanh{i}", nn.Tanh())
    width = 50
model.add_module("logits", nn.Linear(width, 3))
for module in model:
    if isinstance(module, nn.Linear):
        if os.environ.get("FIXED") == "1":
            nn.init.xavier_uniform_(module.weight)
        else:
            nn.init.normal_(module.weight)
        nn.init.zeros_(module.bias)

optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 25)
for epoch in range(25):
    for idx in torch.randperm(1000).split(25):
        loss = nn.functional.cross_entropy(model(x[idx]), y[idx])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    scheduler.step()
    if epoch % 5 == 0:
        print("epoch", epoch, "loss", loss.item())

with torch.no_grad():
    acc = (model(x[1000:]).argmax(1) == y[1000:]).float().mean().item()
print(f"metric accuracy {acc:.4f}")
