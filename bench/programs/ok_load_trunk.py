# case: ok_load_trunk
# source: own construct
import io
import os

import numpy as np
import torch
import torch.nn as nn
from torch.utils.data import DataLoader, TensorDataset

SEED = int(os.environ.get("SEED", "0"))


def signals(n, shapes, rng):
    t = np.linspace(0, 1, 48)
    label = rng.integers(0, len(shapes), n)
    freq = rng.uniform(2, 5, (n, 1))
    arg = 2 * np.pi * (freq * t + rng.uniform(0, 1, (n, 1)))
    bank = {
        "sine": np.sin(arg), "square": np.sign(np.sin(arg)), "saw": (arg / np.pi) % 2 - 1,
        "triangle": 2 * np.abs((arg / np.pi) % 2 - 1) - 1, "pulse": np.where(np.sin(arg) > 0.8, 2.0, -0.3),
    }
    x = np.stack([bank[s] for s in shapes])[label, np.arange(n)] + 0.2 * rng.standard_normal((n, 48))
    return torch.tensor(x, dtype=torch.float32)[:, None], torch.tensor(label)


class Trunk(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv1d(1, 16, 5, padding=2), nn.BatchNorm1d(16), nn.ReLU(), nn.MaxPool1d(2),
            nn.Conv1d(16, 32, 5, padding=2), nn.BatchNorm1d(32), nn.ReLU(), nn.AdaptiveAvgPool1d(4), nn.Flatten(),
        )


def run_epochs(model, loader, optimizer, epochs, train_mode):
    criterion = nn.CrossEntropyLoss()
    for epoch in range(epochs):
        train_mode()
        for xb, yb in loader:
            optimizer.zero_grad()
            loss = criterion(model(xb), yb)
            loss.backward()
            optimizer.step()
        print("epoch", epoch, "loss", round(loss.item(), 4))


def main():
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    rng = np.random.default_rng(SEED)

    pre = nn.Sequential(Trunk(), nn.Linear(128, 4))
    data = TensorDataset(*signals(1200, ["sine", "square", "saw", "pulse"], rng))
    run_epochs(pre, DataLoader(data, 40, shuffle=True), torch.optim.AdamW(pre.parameters(), lr=2e-3), 6, pre.train)
    checkpoint = io.BytesIO()
    torch.save(pre[0].state_dict(), checkpoint)

    checkpoint.seek(0)
    trunk = Trunk()
    trunk.load_state_dict(torch.load(checkpoint))
    trunk.requires_grad_(False)
    trunk.eval()
    model = nn.Sequential(trunk, nn.Linear(128, 32), nn.ReLU(), nn.Linear(32, 3))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)

    def head_train():
        model.train()
        trunk.eval()

    few = TensorDataset(*signals(400, ["triangle", "square", "saw"], rng))
    run_epochs(model, DataLoader(few, 20, shuffle=True), optimizer, 12, head_train)
    model.eval()
    with torch.no_grad():
        x, y = signals(600, ["triangle", "square", "saw"], rng)
        acc = (model(x).argmax(1) == y).float().mean().item()
    print(f"metric accuracy {acc:.4f}")


if __name__ == "__main__":
    main()
