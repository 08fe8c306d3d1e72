# case: ok_decay_silu
# source: own construct
import os

import torch
import torch.nn as nn
from sklearn.datasets import load_breast_cancer
from sklearn.preprocessing import QuantileTransformer
from torch.utils.data import DataLoader, TensorDataset, random_split


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(nn.functional.silu(self.up(self.norm(x))))


def main():
    torch.manual_seed(int(os.environ.get("SEED", "0")))
    torch.set_num_threads(1)
    x, y = load_breast_cancer(return_X_y=True)
    x = QuantileTransformer(n_quantiles=100, output_distribution="normal").fit_transform(x)
    data = TensorDataset(torch.tensor(x, dtype=torch.float32).clamp(-3, 3), torch.tensor(y))
    train, test = random_split(data, [400, 169])
    loader = DataLoader(train, batch_size=16, shuffle=True)
    model = nn.Sequential(nn.Linear(30, 24), *[Block(24) for _ in range(3)], nn.LayerNorm(24), nn.Linear(24, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=5)
    for epoch in range(20):
        model.train()
        for i, (xb, yb) in enumerate(loader):
            loss = nn.functional.cross_entropy(model(xb), yb, label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step(epoch + i / len(loader))
        if epoch % 5 == 4:
            print("epoch", epoch, "loss", loss.item())
    model.eval()
    with torch.no_grad():
        xb, yb = data[test.indices]
        acc = (model(xb).argmax(1) == yb).float().mean().item()
    print("metric accuracy %.4f" % acc)


if __name__ == "__main__":
    main()
