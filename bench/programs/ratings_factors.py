# case: ratings_factors
# source: own construct
import os

import torch
import torch.nn as nn
from torch.utils.data import DataLoader, TensorDataset

SEED = int(os.environ.get("SEED", "0"))
torch.manual_seed(SEED)
torch.set_num_threads(1)


class Factors(nn.Module):
    """Rating of a user for an item from learnt factors."""

    def __init__(self, users, items, dim=6):
        super().__init__()
        self.user = nn.Embedding(users, dim)
        self.item = nn.Embedding(items, dim)
        self.bias = nn.Parameter(torch.zeros(1))
        nn.init.normal_(self.user.weight, std=0.3)
        nn.init.normal_(self.item.weight, std=0.3)

    def forward(self, u, i):
        return (self.user(u) * self.item(i)).sum(1) + self.bias


users, items = 60, 50
true_u, true_i = torch.randn(users, 3), torch.randn(items, 3)
pairs = torch.cartesian_prod(torch.arange(users), torch.arange(items))[torch.randperm(users * items)]
rating = (true_u[pairs[:, 0]] * true_i[pairs[:, 1]]).sum(1) / 3 ** 0.5 + 0.1 * torch.randn(len(pairs))
train = TensorDataset(pairs[:2400], rating[:2400])
loader = DataLoader(train, batch_size=48, shuffle=True)

model = Factors(users, items)
if os.environ.get("FIXED") == "1":
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.2)
else:
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.01)
for epoch in range(25):
    for pair, r in loader:
        loss = nn.functional.mse_loss(model(pair[:, 0], pair[:, 1]), r)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if epoch % 5 == 0:
        print("epoch", epoch, "loss", loss.item())

with torch.no_grad():
    pred = model(pairs[2400:, 0], pairs[2400:, 1])
    r2 = 1 - ((pred - rating[2400:]) ** 2).mean() / rating[2400:].var()
print(f"metric r2 {r2.item():.4f}")
