# case: ok_lbfgs_moons
# source: own construct
import os

import torch
import torch.nn as nn
from sklearn.datasets import make_moons

seed = int(os.environ.get("SEED", "0"))
torch.manual_seed(seed)
torch.set_num_threads(1)

x, y = make_moons(n_samples=600, noise=0.15, random_state=seed)
x = torch.tensor(x, dtype=torch.float32)
y = torch.tensor(y, dtype=torch.float32)
x_train, y_train, x_test, y_test = x[:400], y[:400], x[400:], y[400:]

model = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))
optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=10, history_size=10)
criterion = nn.BCEWithLogitsLoss()


def closure():
    optimizer.zero_grad()
    loss = criterion(model(x_train).squeeze(1), y_train) + 1e-3 * sum(p.pow(2).sum() for p in model.parameters())
    loss.backward()
    return loss


for step in range(60):
    loss = optimizer.step(closure)
    if step % 10 == 0:
        print("step", step, "loss", loss.item())

with torch.no_grad():
    acc = ((model(x_test).squeeze(1) > 0) == (y_test > 0.5)).float().mean().item()
print("metric accuracy %.4f" % acc)
