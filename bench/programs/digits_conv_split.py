# case: digits_conv_split
# source: own construct
import os

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

SEED = int(os.environ.get("SEED", "0"))


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 10, 3)
        self.bn = nn.BatchNorm2d(10)
        self.fc = nn.Linear(10 * 9, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.bn(self.conv(x))), 2)
        return self.fc(x.flatten(1))


def prepare(fixed):
    rng = np.random.RandomState(SEED)
    digits = load_digits()
    order = rng.permutation(len(digits.images))
    images = digits.images[order]
    labels = digits.target[order] if fixed else digits.target[rng.permutation(len(digits.target))]
    images = torch.tensor(images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(labels)
    # the true labels, for the final score
    truth = torch.tensor(digits.target[order])
    return images[:1300], labels[:1300], images[1300:], truth[1300:]


def main():
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    x_train, y_train, x_test, y_test = prepare(os.environ.get("FIXED") == "1")
    loader = DataLoader(TensorDataset(x_train, y_train), batch_size=64, shuffle=True)
    model = ConvNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=15)
    for epoch in range(15):
        model.train()
        for xb, yb in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(xb), yb)
            loss.backward()
            optimizer.step()
        scheduler.step()
        print("epoch", epoch, "loss", round(loss.item(), 4))
    model.eval()
    with torch.no_grad():
        acc = (model(x_test).argmax(1) == y_test).float().mean().item()
    print("metric accuracy %.4f" % acc)


if __name__ == "__main__":
    main()
