# case: ok_rare_class
# source: own construct
import os

import torch
import torch.nn as nn
from sklearn.datasets import make_classification
from sklearn.metrics import roc_auc_score
from torch.utils.data import DataLoader, TensorDataset


def main():
    seed = int(os.environ.get("SEED", "0"))
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    x, y = make_classification(
        n_samples=4000, n_features=16, n_informative=8, weights=[0.95], flip_y=0.01, class_sep=1.2, random_state=seed
    )
    x = torch.tensor(x, dtype=torch.float32)
    y = torch.tensor(y, dtype=torch.float32)
    train = TensorDataset(x[:3000], y[:3000])
    loader = DataLoader(train, batch_size=64, shuffle=True)

    model = nn.Sequential(
        nn.Linear(16, 64), nn.ReLU(), nn.Dropout(0.2),
        nn.Linear(64, 32), nn.ReLU(),
        nn.Linear(32, 1), nn.Flatten(0),
    )
    criterion = nn.BCEWithLogitsLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-4)
    for epoch in range(25):
        model.train()
        seen = 0.0
        for xb, yb in loader:
            optimizer.zero_grad()
            loss = criterion(model(xb), yb)
            loss.backward()
            optimizer.step()
            seen += loss.item() * len(xb)
        if epoch % 5 == 0:
            print("epoch", epoch, "loss", round(seen / 3000, 4))
    model.eval()
    with torch.no_grad():
        auc = roc_auc_score(y[3000:].numpy(), model(x[3000:]).numpy())
    print(f"metric auc {auc:.4f}")


if __name__ == "__main__":
    main()
