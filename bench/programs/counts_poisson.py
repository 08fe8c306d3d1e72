# case: counts_poisson
# source: own construct
import os

import numpy as np
import torch
import torch.nn as nn
from torch.utils.data import DataLoader, TensorDataset

seed = int(os.environ.get("SEED", "0"))


class RateNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(8, 48)
        self.fc2 = nn.Linear(48, 1)

    def forward(self, x):
        return self.fc2(torch.tanh(self.fc1(x))).squeeze(-1)


def main():
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    rng = np.random.RandomState(seed)
    x = rng.randn(1600, 8)
    rate = np.exp(2.0 + 0.5 * x[:, 0] - 0.5 * x[:, 1] + 0.4 * np.sin(2 * x[:, 2]))
    count = rng.poisson(rate)
    x = torch.tensor(x, dtype=torch.float32)
    count = torch.tensor(count, dtype=torch.float32)
    truth = torch.tensor(np.log(rate), dtype=torch.float32)
    loader = DataLoader(TensorDataset(x[:1200], count[:1200]), batch_size=32, shuffle=True)
    model = RateNet()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for epoch in range(40):
        for xb, cb in loader:
            lograte = model(xb)
            if os.environ.get("FIXED") == "1":
                deviance = 2 * (torch.xlogy(cb, cb) - cb * lograte - cb + lograte.exp())
            else:
                deviance = 2 * (cb * torch.log(cb / lograte.exp()) - cb + lograte.exp())
            loss = deviance.mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if epoch % 8 == 0:
            print("epoch", epoch, "deviance", loss.item())
    with torch.no_grad():
        pred = model(x[1200:])
        r2 = 1 - ((pred - truth[1200:]) ** 2).sum() / ((truth[1200:] - truth[1200:].mean()) ** 2).sum()
    print("metric r2 %.4f" % r2.item())


if __name__ == "__main__":
    main()
