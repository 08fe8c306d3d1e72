# case: ok_single_rows
# source: own construct
import os

import torch
import torch.nn as nn
from sklearn.datasets import load_iris
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler


def main():
    seed = int(os.environ.get("SEED", "0"))
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    x, y = load_iris(return_X_y=True)
    x_tr, x_te, y_tr, y_te = train_test_split(x, y, test_size=0.3, random_state=0, stratify=y)
    scaler = StandardScaler().fit(x_tr)
    x_tr = torch.tensor(scaler.transform(x_tr), dtype=torch.float32)
    x_te = torch.tensor(scaler.transform(x_te), dtype=torch.float32)
    y_tr, y_te = torch.tensor(y_tr), torch.tensor(y_te)
    model = nn.Sequential(nn.Linear(4, 12), nn.Sigmoid(), nn.Linear(12, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    criterion = nn.MultiMarginLoss()
    for epoch in range(22):
        for i in torch.randperm(len(x_tr)):
            optimizer.zero_grad()
            loss = criterion(model(x_tr[i:i + 1]), y_tr[i:i + 1])
            loss.backward()
            optimizer.step()
        if epoch % 8 == 0:
            with torch.no_grad():
                print("epoch", epoch, "loss", criterion(model(x_tr), y_tr).item())
    with torch.no_grad():
        acc = (model(x_te).argmax(1) == y_te).float().mean().item()
    print("metric accuracy %.4f" % acc)


main()
