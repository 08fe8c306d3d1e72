# case: penalised_net
# source: own construct
import os

import torch
import torch.nn as nn
from sklearn.datasets import make_regression


def main():
    seed = int(os.environ.get("SEED", "0"))
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    x, y = make_regression(n_samples=900, n_features=15, n_informative=10, noise=10.0, random_state=seed)
    x = torch.tensor(x, dtype=torch.float32)
    y = torch.tensor((y - y.mean()) / y.std(), dtype=torch.float32).view(-1, 1)
    x_train, y_train, x_test, y_test = x[:600], y[:600], x[600:], y[600:]

    model = nn.Sequential(nn.Linear(15, 40), nn.Tanh(), nn.Linear(40, 20), nn.Tanh(), nn.Linear(20, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    strength = 5e-3
    for epoch in range(70):
        for idx in torch.randperm(600).split(30):
            error = ((model(x_train[idx]) - y_train[idx]) ** 2).mean()
            penalty = sum((p ** 2).sum() for p in model.parameters())
            if os.environ.get("FIXED") == "1":
                loss = error + strength * penalty
            else:
                loss = error - strength * penalty
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if epoch % 10 == 0:
            print(f"epoch {epoch} error {error.item():.4f}")
    model.eval()
    with torch.no_grad():
        r2 = 1 - ((model(x_test) - y_test) ** 2).sum() / ((y_test - y_test.mean()) ** 2).sum()
    print(f"metric r2 {r2.item():.4f}")


main()
