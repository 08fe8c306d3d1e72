# case: waves_conv1d
# source: own construct
import os

import numpy as np
import torch
import torch.nn as nn
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import DataLoader, TensorDataset

seed = int(os.environ.get("SEED", "0"))
rng = np.random.RandomState(seed)
torch.manual_seed(seed)
torch.set_num_threads(1)
GAMMA = 0.99 if os.environ.get("FIXED") == "1" else 0.8


def waves(n):
    t = np.linspace(0, 1, 64)
    label = rng.randint(0, 3, n)
    freq = rng.uniform(3, 6, (n, 1))
    phase = rng.uniform(0, 2 * np.pi, (n, 1))
    arg = 2 * np.pi * freq * t + phase
    sine, square, saw = np.sin(arg), np.sign(np.sin(arg)), 2 * ((arg / 2 / np.pi) % 1) - 1
    x = np.stack([sine, square, saw])[label, np.arange(n)]
    x = x + 0.25 * rng.randn(n, 64)
    return torch.tensor(x, dtype=torch.float32).unsqueeze(1), torch.tensor(label)


train = TensorDataset(*waves(900))
x_test, y_test = waves(500)
loader = DataLoader(train, batch_size=30, shuffle=True)

model = nn.Sequential(
    nn.Conv1d(1, 16, 7, padding=3), nn.LeakyReLU(0.1), nn.MaxPool1d(2),
    nn.Conv1d(16, 24, 5, padding=2), nn.LeakyReLU(0.1), nn.MaxPool1d(2),
    nn.Conv1d(24, 24, 3, padding=1), nn.LeakyReLU(0.1), nn.AdaptiveAvgPool1d(1),
    nn.Flatten(), nn.Linear(24, 3),
)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
scheduler = ExponentialLR(optimizer, gamma=GAMMA)
criterion = nn.CrossEntropyLoss()

for epoch in range(12):
    model.train()
    total = 0.0
    for xb, yb in loader:
        optimizer.zero_grad()
        loss = criterion(model(xb), yb)
        loss.backward()
        optimizer.step()
        scheduler.step()
        total += loss.item()
    print("epoch", epoch, "loss", total / len(loader))

model.eval()
with torch.no_grad():
    accuracy = (model(x_test).argmax(1) == y_test).float().mean().item()
print("metric accuracy %.4f" % accuracy)
