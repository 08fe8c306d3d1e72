# case: ok_plateau_parity
# source: own construct
import os

import torch
import torch.nn as nn


class Net(nn.Module):
    def __init__(self, bits=12, hidden=128):
        super().__init__()
        self.hidden = nn.Linear(bits, hidden)
        self.out = nn.Linear(hidden, 1)

    def forward(self, x):
        return self.out(torch.relu(self.hidden(x)))[:, 0]


def draw(n, bits=12):
    x = torch.randint(0, 2, (n, bits)) * 2.0 - 1.0
    return x, x[:, :3].prod(1)


def main():
    torch.manual_seed(int(os.environ.get("SEED", "0")))
    torch.set_num_threads(1)
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in range(4000):
        x, side = draw(64)
        loss = torch.nn.functional.softplus(-side * net(x)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 400 == 0:
            print("step", step, "loss", round(loss.item(), 4))
    with torch.no_grad():
        x, side = draw(1000)
        acc = ((net(x) > 0) == (side > 0)).float().mean().item()
    print(f"metric accuracy {acc:.4f}")


main()
