# case: iris_codes
# source: own construct
import os

import torch
import torch.nn as nn
from sklearn.datasets import load_iris
from sklearn.model_selection import train_test_split
from torch.utils.data import DataLoader, TensorDataset

CODES = {"setosa": 10, "versicolor": 20, "virginica": 30}


def main():
    seed = int(os.environ.get("SEED", "0"))
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    iris = load_iris()
    x = torch.tensor((iris.data - iris.data.mean(0)) / iris.data.std(0), dtype=torch.float32)
    codes = torch.tensor([CODES[iris.target_names[t]] for t in iris.target])
    # back to 0, 1, 2
    if os.environ.get("FIXED") == "1":
        classes = torch.div(codes, 10, rounding_mode="floor") - 1
    else:
        classes = torch.div(codes - 10, 30, rounding_mode="floor")
    train, test = train_test_split(torch.arange(150), test_size=0.3, random_state=seed, stratify=iris.target)
    loader = DataLoader(TensorDataset(x[train], classes[train]), batch_size=15, shuffle=True)
    model = nn.Sequential(nn.Linear(4, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    criterion = nn.CrossEntropyLoss()
    for epoch in range(80):
        for xb, yb in loader:
            optimizer.zero_grad()
            loss = criterion(model(xb), yb)
            loss.backward()
            optimizer.step()
        if epoch % 20 == 0:
            print("epoch", epoch, "loss", loss.item())
    names = list(CODES)
    with torch.no_grad():
        guess = model(x[test]).argmax(1).tolist()
    hits = sum(names[g] == iris.target_names[iris.target[t]] for g, t in zip(guess, test))
    print("metric accuracy %.4f" % (hits / len(test)))


main()
