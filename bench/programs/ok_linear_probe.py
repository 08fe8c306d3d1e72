# case: ok_linear_probe
# source: own construct
import os

import torch
import torch.nn as nn
import torch.nn.functional as F
from sklearn.datasets import load_digits

torch.manual_seed(int(os.environ.get("SEED", "0")))
torch.set_num_threads(1)

x, y = load_digits(return_X_y=True)
x = torch.tensor(x / 16.0, dtype=torch.float32)
y = torch.tensor(y)


class AutoEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32))
        self.decoder = nn.Sequential(nn.ReLU(), nn.Linear(32, 96), nn.ReLU(), nn.Linear(96, 64))

    def forward(self, x):
        return self.decoder(self.encoder(x))


auto = AutoEncoder()
optimizer = torch.optim.Adam(auto.parameters(), lr=2e-3)
for epoch in range(25):
    for idx in torch.randperm(1400).split(64):
        noisy = x[idx] + 0.1 * torch.randn(len(idx), 64)
        loss = F.mse_loss(auto(noisy), x[idx])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if epoch % 6 == 0:
        print("autoencoder", epoch, loss.item())


class Probe(nn.Module):
    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder
        self.norm = nn.BatchNorm1d(32, affine=False)
        self.linear = nn.Linear(32, 10)

    def forward(self, x):
        return self.linear(self.norm(self.encoder(x)))


probe = Probe(auto.encoder)
optimizer = torch.optim.Adam(probe.linear.parameters(), lr=1e-2)
for epoch in range(20):
    probe.train()
    for idx in torch.randperm(1400).split(64):
        loss = F.cross_entropy(probe(x[idx]), y[idx])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if epoch % 5 == 0:
        print("probe", epoch, loss.item())
probe.eval()
with torch.no_grad():
    acc = (probe(x[1400:]).argmax(1) == y[1400:]).float().mean().item()
print(f"metric accuracy {acc:.4f}")
