# case: copy_first_rnn
# source: own construct
import os

import torch
import torch.nn as nn

FIXED = os.environ.get("FIXED") == "1"


class FirstSymbol(nn.Module):
    """Reads a sequence of noisy one-hot symbols and names the first one."""

    def __init__(self, symbols=6, hidden=40):
        super().__init__()
        self.cell = nn.RNNCell(symbols, hidden, nonlinearity="relu")
        self.readout = nn.Linear(hidden, symbols)
        scale = 1.0 if FIXED else 1.6
        nn.init.orthogonal_(self.cell.weight_hh, gain=scale)
        if FIXED:
            nn.init.eye_(self.cell.weight_hh)
        nn.init.zeros_(self.cell.bias_hh)
        nn.init.zeros_(self.cell.bias_ih)

    def forward(self, x):
        h = x.new_zeros(x.shape[0], self.cell.hidden_size)
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h)
        return self.readout(h)


def batch(n, length=30, symbols=6):
    first = torch.randint(0, symbols, (n,))
    x = 0.1 * torch.randn(n, length, symbols)
    x[torch.arange(n), 0, first] += 1.0
    return x, first


def main():
    torch.manual_seed(int(os.environ.get("SEED", "0")))
    torch.set_num_threads(1)
    model = FirstSymbol()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    loss_fn = nn.CrossEntropyLoss()
    for step in range(400):
        x, target = batch(32)
        optimizer.zero_grad()
        loss = loss_fn(model(x), target)
        loss.backward()
        if FIXED:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 80 == 0:
            print("step", step, "loss", loss.item())
    with torch.no_grad():
        x, target = batch(600)
        acc = (model(x).argmax(1) == target).float().mean().item()
    print(f"metric accuracy {acc:.4f}")


main()
