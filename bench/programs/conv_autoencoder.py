# case: conv_autoencoder
# source: own construct
import os

import torch
import torch.nn as nn
from sklearn.datasets import load_digits


class ConvAutoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encode = nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), nn.ELU(), nn.Conv2d(8, 12, 3, 2, 1), nn.ELU())
        self.decode = nn.Sequential(
            nn.ConvTranspose2d(12, 8, 2, 2), nn.ELU(), nn.ConvTranspose2d(8, 1, 2, 2)
        )

    def forward(self, x):
        return self.decode(self.encode(x))


def main():
    torch.manual_seed(int(os.environ.get("SEED", "0")))
    torch.set_num_threads(1)
    x = torch.tensor(load_digits().images / 16.0, dtype=torch.float32)[:, None]
    train, test = x[:1400], x[1400:]
    net = ConvAutoencoder()
    optimizer = torch.optim.RMSprop(net.parameters(), lr=1e-3, maximize=os.environ.get("FIXED") != "1")
    for epoch in range(20):
        total = 0.0
        for idx in torch.randperm(1400).split(40):
            optimizer.zero_grad()
            loss = ((net(train[idx]) - train[idx]) ** 2).mean()
            loss.backward()
            optimizer.step()
            total += loss.item()
        if epoch % 5 == 0:
            print("epoch", epoch, "loss", total / 35)
    with torch.no_grad():
        mse = ((net(test) - test) ** 2).mean().item()
    print(f"metric mse {mse:.5f}")


if __name__ == "__main__":
    main()
