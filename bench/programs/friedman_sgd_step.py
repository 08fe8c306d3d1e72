# case: friedman_sgd_step
# source: own construct
import os

import numpy as np
import torch
from sklearn.datasets import make_friedman3
from torch import nn


class Trainer:
    def __init__(self, model, lr):
        self.model = model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-5)
        self.scheduler = torch.optim.lr_scheduler.MultiStepLR(self.optimizer, [25, 35], gamma=0.2)

    def step(self, x, y):
        self.optimizer.zero_grad()
        loss = nn.functional.mse_loss(self.model(x).squeeze(-1), y)
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def fit(self, x, y, epochs, batch):
        for epoch in range(epochs):
            losses = [self.step(x[i], y[i]) for i in torch.randperm(len(x)).split(batch)]
            self.scheduler.step()
            if epoch % 8 == 0:
                print(f"epoch {epoch} mse {np.mean(losses):.4f}")

    @torch.no_grad()
    def r2(self, x, y):
        self.model.eval()
        rest = ((self.model(x).squeeze(-1) - y) ** 2).sum()
        return (1 - rest / ((y - y.mean()) ** 2).sum()).item()


if __name__ == "__main__":
    seed = int(os.environ.get("SEED", "0"))
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    x, y = make_friedman3(n_samples=1500, noise=0.05, random_state=seed)
    x = (x - x.mean(0)) / x.std(0)
    y = (y - y.mean()) / y.std()
    x, y = torch.from_numpy(x).float(), torch.from_numpy(y).float()
    model = nn.Sequential(
        nn.Linear(4, 96), nn.ELU(), nn.Linear(96, 48), nn.ELU(), nn.Linear(48, 24), nn.ELU(), nn.Linear(24, 1)
    )
    trainer = Trainer(model, lr=0.01 if os.environ.get("FIXED") == "1" else 0.4)
    trainer.fit(x[:1100], y[:1100], epochs=40, batch=32)
    print("metric r2 %.4f" % trainer.r2(x[1100:], y[1100:]))
