# case: ok_sum_accumulate
# source: own construct
import os

import torch
import torch.nn as nn
from sklearn.datasets import load_wine
from sklearn.preprocessing import StandardScaler
from torch.utils.data import DataLoader, TensorDataset


def main():
    torch.manual_seed(int(os.environ.get("SEED", "0")))
    torch.set_num_threads(1)
    x, y = load_wine(return_X_y=True)
    x = torch.tensor(StandardScaler().fit_transform(x), dtype=torch.float32)
    y = torch.tensor(y)
    order = torch.randperm(len(y))
    train, test = order[:128], order[128:]
    loader = DataLoader(TensorDataset(x[train], y[train]), batch_size=4, shuffle=True)
    model = nn.Sequential(nn.Linear(13, 32), nn.Tanh(), nn.Dropout(0.2), nn.Linear(32, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    accumulate = 4
    for epoch in range(50):
        model.train()
        optimizer.zero_grad()
        for i, (xb, yb) in enumerate(loader, 1):
            loss = nn.functional.cross_entropy(model(xb), yb)
            loss.backward()
            if i % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
        if epoch % 10 == 0:
            print("epoch", epoch, "loss", loss.item())
    model.eval()
    with torch.no_grad():
        acc = (model(x[test]).argmax(1) == y[test]).float().mean().item()
    print("metric accuracy %.4f" % acc)


main()
