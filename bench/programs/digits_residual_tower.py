# case: digits_residual_tower
# source: own construct
import os

import torch
import torch.nn as nn
import torch.nn.functional as F
from sklearn.datasets import load_digits

torch.manual_seed(int(os.environ.get("SEED", "0")))
torch.set_num_threads(1)
FIXED = os.environ.get("FIXED") == "1"


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        for conv in (self.conv1, self.conv2):
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            nn.init.zeros_(conv.bias)
        if FIXED:
            nn.init.zeros_(self.conv2.weight)

    def forward(self, x):
        return x + self.conv2(F.relu(self.conv1(x)))


class Tower(nn.Module):
    def __init__(self, blocks=14, channels=8):
        super().__init__()
        self.stem = nn.Conv2d(1, channels, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(*[Block(channels) for _ in range(blocks)])
        self.fc = nn.Linear(channels, 10)

    def forward(self, x):
        x = self.blocks(F.relu(self.stem(x)))
        return self.fc(F.relu(x).amax((2, 3)))


images, labels = load_digits(return_X_y=True)
images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
labels = torch.tensor(labels)
order = torch.randperm(len(images))
train, test = order[:1200], order[1200:]

net = Tower()
opt = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
for epoch in range(10):
    net.train()
    for idx in train[torch.randperm(len(train))].split(50):
        loss = F.cross_entropy(net(images[idx]), labels[idx])
        opt.zero_grad()
        loss.backward()
        opt.step()
    print(f"epoch {epoch:2d}  loss {loss.item():.4g}")

net.eval()
with torch.no_grad():
    correct = (net(images[test]).argmax(1) == labels[test]).float().mean()
print("metric accuracy %.4f" % correct)
