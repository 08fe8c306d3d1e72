# case: few_rows_wide_net
# source: own construct
import os

import torch
import torch.nn as nn
from sklearn.datasets import make_classification

SEED = int(os.environ.get("SEED", "0"))
FIXED = os.environ.get("FIXED") == "1"


def evaluate(model, criterion, x, y):
    model.eval()
    with torch.no_grad():
        total = 0.0
        for xb, yb in zip(x.split(100), y.split(100)):
            total += criterion(model(xb), yb).item() * len(xb)
    model.train()
    return total / len(x)


def main():
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    x, y = make_classification(
        n_samples=700, n_features=40, n_informative=5, n_redundant=0, n_clusters_per_class=1,
        flip_y=0.1, class_sep=1.5, random_state=SEED
    )
    x, y = torch.tensor(x, dtype=torch.float32), torch.tensor(y)
    x_train, y_train = x[:200], y[:200]
    x_val, y_val = x[200:400], y[200:400]
    x_test, y_test = x[400:], y[400:]

    hidden = 16 if FIXED else 256
    model = nn.Sequential(
        nn.Linear(40, hidden), nn.ReLU(), nn.Dropout(0.5 if FIXED else 0.0),
        nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 2),
    )
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1 if FIXED else 0.0)
    best, patience = float("inf"), 0
    for epoch in range(80):
        for idx in torch.randperm(len(x_train)).split(20):
            optimizer.zero_grad()
            loss = criterion(model(x_train[idx]), y_train[idx])
            loss.backward()
            optimizer.step()
        val = evaluate(model, criterion, x_val, y_val)
        if epoch % 10 == 0:
            print(f"epoch {epoch} train {loss.item():.4f} val {val:.4f}")
        if val < best - 1e-3:
            best, patience = val, 0
        else:
            patience += 1
        if FIXED and patience >= 8:
            break
    print(f"metric logloss {evaluate(model, criterion, x_test, y_test):.4f}")


if __name__ == "__main__":
    main()
