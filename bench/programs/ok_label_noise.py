# case: ok_label_noise
# source: own construct
import os

import torch
import torch.nn as nn
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.optim.lr_scheduler import OneCycleLR

torch.manual_seed(int(os.environ.get("SEED", "0")))
torch.set_num_threads(1)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1)
        self.norm1 = nn.GroupNorm(4, 16)
        self.norm2 = nn.GroupNorm(4, 16)
        self.fc = nn.Linear(64, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.norm1(self.conv1(x))), 2)
        x = F.max_pool2d(F.relu(self.norm2(self.conv2(x))), 2)
        return self.fc(x.flatten(1))


digits = load_digits()
x = torch.tensor(digits.images / 8.0 - 1.0, dtype=torch.float32).unsqueeze(1)
y = torch.tensor(digits.target)
# crowd labels: one in five is wrong
wrong = torch.rand(len(y)) < 0.2
crowd = torch.where(wrong, (y + torch.randint(1, 10, y.shape)) % 10, y)

net = Net()
optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.01)
epochs, batch = 8, 32
scheduler = OneCycleLR(optimizer, max_lr=6e-3, epochs=epochs, steps_per_epoch=-(-1400 // batch))
for epoch in range(epochs):
    net.train()
    for idx in torch.randperm(1400).split(batch):
        loss = F.cross_entropy(net(x[idx]), crowd[idx])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    print("epoch", epoch, "loss", loss.item())
net.eval()
with torch.no_grad():
    acc = (net(x[1400:]).argmax(1) == y[1400:]).float().mean().item()
print(f"metric accuracy {acc:.4f}")
