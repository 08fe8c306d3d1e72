# case: ok_quantiles
# source: own construct (quantile regression, Koenker & Bassett 1978)
import os

import numpy as np
import torch
from torch import nn

SEED = int(os.environ.get("SEED", "0"))
LEVELS = torch.tensor([0.1, 0.5, 0.9])


def pinball(pred, target):
    diff = target - pred
    return torch.max(LEVELS * diff, (LEVELS - 1) * diff).mean()


def sample(n, rng):
    x = rng.uniform(-2, 2, (n, 2))
    centre = np.sin(2 * x[:, 0]) + 0.5 * x[:, 1]
    spread = 0.15 + 0.25 * np.abs(x[:, 0])
    y = centre + spread * rng.standard_normal(n)
    as_tensor = lambda a: torch.tensor(a, dtype=torch.float32)
    return as_tensor(x), as_tensor(y)[:, None], as_tensor(centre)


def main():
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    rng = np.random.default_rng(SEED)
    x, y, _ = sample(2500, rng)
    x_test, y_test, centre = sample(1000, rng)
    model = nn.Sequential(nn.Linear(2, 48), nn.Mish(), nn.Linear(48, 48), nn.Mish(), nn.Linear(48, 3))
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-3, momentum=0.5)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1500)
    for step in range(1500):
        idx = torch.randint(0, 2500, (64,))
        loss = pinball(model(x[idx]), y[idx])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_value_(model.parameters(), 0.5)
        optimizer.step()
        schedule.step()
        if step % 300 == 0:
            print(step, loss.item())
    with torch.no_grad():
        q = model(x_test)
        r2 = 1 - ((q[:, 1] - centre) ** 2).mean() / centre.var()
        inside = ((y_test[:, 0] > q[:, 0]) & (y_test[:, 0] < q[:, 2])).float().mean()
    print("coverage %.3f" % inside.item())
    print("metric r2 %.4f" % r2.item())


if __name__ == "__main__":
    main()
