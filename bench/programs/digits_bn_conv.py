# case: digits_bn_conv
# source: own construct
import os

import torch
import torch.nn as nn
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

SHIFT = 0.0 if os.environ.get("FIXED") == "1" else -5.0


def conv_block(cin, cout):
    conv = nn.Conv2d(cin, cout, 3, padding=1, bias=False)
    bn = nn.BatchNorm2d(cout)
    nn.init.constant_(bn.bias, SHIFT)
    return nn.Sequential(conv, bn, nn.ReLU())


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.b1 = conv_block(1, 12)
        self.b2 = conv_block(12, 24)
        self.pool = nn.MaxPool2d(2)
        self.fc = nn.Linear(24 * 4, 10)

    def forward(self, x):
        x = self.pool(self.b1(x))
        x = self.pool(self.b2(x))
        return self.fc(torch.flatten(x, 1))


class Trainer:
    def __init__(self):
        self.net = Net()
        self.optim = torch.optim.SGD(self.net.parameters(), lr=0.02, momentum=0.9)
        self.loss = nn.CrossEntropyLoss(label_smoothing=0.05)

    def epoch(self, loader):
        self.net.train()
        total = 0.0
        for images, labels in loader:
            self.optim.zero_grad()
            loss = self.loss(self.net(images), labels)
            loss.backward()
            self.optim.step()
            total += loss.item()
        return total / len(loader)

    @torch.no_grad()
    def accuracy(self, images, labels):
        self.net.eval()
        return (self.net(images).argmax(1) == labels).float().mean().item()


if __name__ == "__main__":
    torch.manual_seed(int(os.environ.get("SEED", "0")))
    torch.set_num_threads(1)
    digits = load_digits()
    images = torch.tensor(digits.images / 16.0, dtype=torch.float32).unsqueeze(1)
    labels = torch.tensor(digits.target)
    loader = DataLoader(TensorDataset(images[:1400], labels[:1400]), batch_size=56, shuffle=True)
    trainer = Trainer()
    for e in range(8):
        print(e, trainer.epoch(loader), trainer.accuracy(images[1400:], labels[1400:]))
    print("metric accuracy %.4f" % trainer.accuracy(images[1400:], labels[1400:]))
