# case: digits_temperature
# source: own construct
import os

import torch
import torch.nn as nn
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(int(os.environ.get("SEED", "0")))
torch.set_num_threads(1)
FIXED = os.environ.get("FIXED") == "1"
TEMPERATURE = 0.01


class Prototypes(nn.Module):
    """Similarity to one learnt prototype per class."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 24))
        self.prototypes = nn.Parameter(torch.randn(10, 24))

    def forward(self, x):
        return self.embed(x) @ self.prototypes.t() / TEMPERATURE


def cross_entropy(scores, onehot):
    if FIXED:
        return -(onehot * torch.log_softmax(scores, 1)).sum(1).mean()
    p = torch.exp(scores) / torch.exp(scores).sum(1, keepdim=True)
    return -(onehot * torch.log(p)).sum(1).mean()


x, y = load_digits(return_X_y=True)
x = torch.tensor(x / 16.0, dtype=torch.float32)
y = torch.tensor(y)
onehot = nn.functional.one_hot(y, 10).float()
loader = DataLoader(TensorDataset(x[:1400], onehot[:1400]), batch_size=35, shuffle=True)

model = Prototypes()
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
for epoch in range(15):
    for xb, tb in loader:
        loss = cross_entropy(model(xb), tb)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print("epoch", epoch, "loss", round(loss.item(), 4))

with torch.no_grad():
    accuracy = (model(x[1400:]).argmax(1) == y[1400:]).float().mean().item()
print(f"metric accuracy {accuracy:.4f}")
