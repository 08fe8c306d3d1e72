# case: groups_new_head
# source: own construct
import os

import torch
import torch.nn as nn
from sklearn.datasets import make_classification

SEED = int(os.environ.get("SEED", "0"))
FIXED = os.environ.get("FIXED") == "1"
torch.manual_seed(SEED)
torch.set_num_threads(1)


def build(classes):
    model = nn.Sequential()
    model.body = nn.Sequential(nn.Linear(20, 10), nn.BatchNorm1d(10), nn.ReLU())
    model.neck = nn.Sequential(nn.Linear(10, 6), nn.ReLU())
    model.head = nn.Linear(6, classes)
    return model


x, y = make_classification(
    n_samples=2400, n_features=20, n_informative=10, n_redundant=4, n_classes=6,
    n_clusters_per_class=1, class_sep=1.6, random_state=SEED,
)
x = torch.tensor(x, dtype=torch.float32)
y = torch.tensor(y)
x_train, y_train, x_test, y_test = x[:2000], y[:2000], x[2000:], y[2000:]

model = build(10)
if FIXED:
    model.head = nn.Linear(6, 6)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.01)
else:
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.01)
    model.neck = nn.Sequential(nn.Linear(10, 6), nn.ReLU())
    model.head = nn.Linear(6, 6)

for epoch in range(12):
    model.train()
    for idx in torch.randperm(2000).split(25):
        loss = nn.functional.cross_entropy(model(x_train[idx]), y_train[idx])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print("epoch", epoch, "loss", round(loss.item(), 4))

model.eval()
with torch.no_grad():
    acc = (model(x_test).argmax(1) == y_test).float().mean().item()
print(f"metric accuracy {acc:.4f}")
