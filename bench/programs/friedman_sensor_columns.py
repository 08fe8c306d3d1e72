# case: friedman_sensor_columns
# source: own construct
import os

import torch
import torch.nn as nn
from sklearn.datasets import make_friedman2
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from torch.utils.data import DataLoader, TensorDataset


def build():
    return nn.Sequential(
        nn.Linear(4, 64), nn.Tanh(),
        nn.Linear(64, 32), nn.Tanh(),
        nn.Linear(32, 1),
    )


def main():
    seed = int(os.environ.get("SEED", "0"))
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    x, y = make_friedman2(n_samples=1500, noise=30.0, random_state=seed)
    prepare = make_pipeline(StandardScaler() if os.environ.get("FIXED") == "1" else FunctionTransformer())
    x = torch.as_tensor(prepare.fit_transform(x), dtype=torch.float32)
    y = torch.as_tensor((y - y.mean()) / y.std(), dtype=torch.float32).unsqueeze(-1)
    loader = DataLoader(TensorDataset(x[:1200], y[:1200]), batch_size=40, shuffle=True)
    model = build()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 15, 0.5)
    for epoch in range(40):
        for xb, yb in loader:
            loss = nn.functional.mse_loss(model(xb), yb)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scheduler.step()
        if epoch % 8 == 0:
            print("epoch", epoch, "loss", loss.item())
    with torch.no_grad():
        r2 = 1 - nn.functional.mse_loss(model(x[1200:]), y[1200:]) / y[1200:].var()
    print("metric r2 %.4f" % r2.item())


main()
