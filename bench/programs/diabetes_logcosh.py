# case: diabetes_logcosh
# source: own construct
import os

import torch
import torch.nn as nn
from sklearn.datasets import load_diabetes

SEED = int(os.environ.get("SEED", "0"))
torch.manual_seed(SEED)
torch.set_num_threads(1)

x, y = load_diabetes(return_X_y=True)
x = torch.tensor(x, dtype=torch.float32) * 20
y = torch.tensor(y, dtype=torch.float32)
y = ((y - y.mean()) / y.std()).unsqueeze(1)
perm = torch.randperm(len(x))
train, test = perm[:352], perm[352:]


class Scorer(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(10, 24)
        self.score = nn.Linear(24, 1)

    def forward(self, x):
        score = self.score(torch.nn.functional.celu(self.hidden(x)))
        return score if os.environ.get("FIXED") == "1" else score.squeeze()


def log_cosh(pred, target):
    diff = pred - target
    return (torch.nn.functional.softplus(2 * diff) - diff - 0.6931).mean()


model = Scorer()
optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
for epoch in range(60):
    for idx in train[torch.randperm(len(train))].split(16):
        loss = log_cosh(model(x[idx]), y[idx])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if epoch % 10 == 0:
        print("epoch", epoch, "loss", loss.item())

with torch.no_grad():
    pred = model(x[test]).reshape(-1, 1)
    r2 = 1 - ((pred - y[test]) ** 2).mean() / y[test].var(unbiased=False)
print("metric r2 %.4f" % r2.item())
