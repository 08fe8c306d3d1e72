# case: ok_two_heads
# source: own construct
import os

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(int(os.environ.get("SEED", "0")))
torch.set_num_threads(1)


class Shared(nn.Module):
    """Class of a signal and its frequency from one trunk."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv1d(1, 12, 7, stride=2, padding=3), nn.GELU(),
            nn.Conv1d(12, 24, 5, stride=2, padding=2), nn.GELU(),
            nn.Flatten(), nn.Linear(24 * 12, 48), nn.GELU(),
        )
        self.kind = nn.Linear(48, 2)
        self.freq = nn.Linear(48, 1)


def signals(n):
    t = torch.linspace(0, 1, 48)
    kind = torch.randint(0, 2, (n,))
    freq = torch.rand(n) * 3 + 2
    arg = 6.2832 * (freq[:, None] * t + torch.rand(n, 1))
    wave = torch.where(kind[:, None] == 1, arg.sin().sign(), arg.sin())
    return (wave + 0.1 * torch.randn(n, 48))[:, None], kind, freq


x, kind, freq = signals(2400)
centred = (freq - 3.5) / 0.866
loader = DataLoader(TensorDataset(x[:2000], kind[:2000], centred[:2000]), batch_size=40, shuffle=True)
net = Shared()
optimizer = torch.optim.Adam(
    [{"params": net.trunk.parameters(), "lr": 1e-3}, {"params": net.kind.parameters(), "lr": 2e-3}, {"params": net.freq.parameters(), "lr": 2e-3}]
)
for epoch in range(15):
    for xb, kb, fb in loader:
        h = net.trunk(xb)
        loss = F.cross_entropy(net.kind(h), kb) + F.mse_loss(net.freq(h).squeeze(1), fb)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if epoch % 3 == 0:
        print("epoch", epoch, "loss", loss.item())
with torch.no_grad():
    h = net.trunk(x[2000:])
    acc = (net.kind(h).argmax(1) == kind[2000:]).float().mean().item()
    r2 = 1 - ((net.freq(h).squeeze(1) - centred[2000:]) ** 2).mean() / centred[2000:].var()
print("accuracy %.4f" % acc)
print("metric r2 %.4f" % r2.item())
