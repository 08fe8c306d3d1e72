# case: shapes_conv_init
# source: own construct
import os

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F


def make_shapes(n, rng):
    images = rng.normal(0, 0.35, (n, 12, 12))
    labels = rng.integers(0, 4, n)
    for img, label in zip(images, labels):
        r, c = rng.integers(0, 7, 2)
        if label == 0:
            img[r + 2, c:c + 5] += 1
        elif label == 1:
            img[r:r + 5, c + 2] += 1
        elif label == 2:
            img[range(r, r + 5), range(c, c + 5)] += 1
        else:
            img[range(r, r + 5), range(c + 4, c - 1, -1)] += 1
    return torch.tensor(images, dtype=torch.float32)[:, None], torch.tensor(labels)


class ShapeNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.c1 = nn.Conv2d(1, 12, 5, padding=2)
        self.c2 = nn.Conv2d(12, 16, 3, padding=1)
        self.fc = nn.Linear(16, 4)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.c1(x)), 2)
        x = F.relu(self.c2(x))
        return self.fc(F.adaptive_max_pool2d(x, 1)[:, :, 0, 0])


def init_weights(net):
    for p in net.parameters():
        if p.dim() > 1:
            nn.init.constant_(p, 0.05)
        else:
            nn.init.zeros_(p)


def main():
    seed = int(os.environ.get("SEED", "0"))
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    rng = np.random.default_rng(seed)
    x_train, y_train = make_shapes(1200, rng)
    x_test, y_test = make_shapes(400, rng)
    net = ShapeNet()
    if os.environ.get("FIXED") != "1":
        init_weights(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=5e-3, weight_decay=1e-4)
    for epoch in range(14):
        losses = []
        for idx in torch.randperm(len(x_train)).split(40):
            loss = F.cross_entropy(net(x_train[idx]), y_train[idx])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        print("epoch %d loss %.4f" % (epoch, np.mean(losses)))
    net.eval()
    with torch.no_grad():
        acc = (net(x_test).argmax(1) == y_test).float().mean().item()
    print("metric accuracy %.4f" % acc)


main()
