# case: cancer_raw_sgd
# source: own construct
import os

import torch
import torch.nn as nn
from sklearn.datasets import load_breast_cancer
from sklearn.preprocessing import StandardScaler

torch.manual_seed(int(os.environ.get("SEED", "0")))
torch.set_num_threads(1)

data = load_breast_cancer()
features = data.data
if os.environ.get("FIXED") == "1":
    features = StandardScaler().fit_transform(features)
x = torch.tensor(features, dtype=torch.float32)
y = torch.tensor(data.target)
order = torch.randperm(len(x))
x, y = x[order], y[order]
x_train, y_train, x_val, y_val = x[:400], y[:400], x[400:], y[400:]

model = nn.Sequential(
    nn.Linear(30, 64),
    nn.ReLU(),
    nn.Linear(64, 64),
    nn.ReLU(),
    nn.Linear(64, 2),
)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
loss_fn = nn.CrossEntropyLoss()

for epoch in range(40):
    model.train()
    for idx in torch.randperm(400).split(16):
        optimizer.zero_grad()
        out = model(x_train[idx])
        loss = loss_fn(out, y_train[idx])
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        acc = (model(x_val).argmax(1) == y_val).float().mean().item()
    if epoch % 5 == 0:
        print(f"epoch {epoch} loss {loss.item():.4f} val {acc:.4f}")

print(f"metric accuracy {acc:.4f}")
