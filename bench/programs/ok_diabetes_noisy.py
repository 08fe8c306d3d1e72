# case: ok_diabetes_noisy
# source: own construct
import os

import torch
from sklearn.datasets import load_diabetes
from sklearn.model_selection import train_test_split
from torch import nn

SEED = int(os.environ.get("SEED", "0"))
torch.manual_seed(SEED)
torch.set_num_threads(1)

x, y = load_diabetes(return_X_y=True)
x_train, x_test, y_train, y_test = train_test_split(x, y, test_size=0.25, random_state=42)
mean, std = y_train.mean(), y_train.std()
x_train, x_test = (torch.tensor(a * 21.0, dtype=torch.float32) for a in (x_train, x_test))
y_train, y_test = (torch.tensor((a - mean) / std, dtype=torch.float32).unsqueeze(1) for a in (y_train, y_test))

model = nn.Sequential(nn.Linear(10, 16), nn.SiLU(), nn.Dropout(0.1), nn.Linear(16, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-3)
criterion = nn.HuberLoss(delta=1.5)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=15, gamma=0.5)

for epoch in range(60):
    model.train()
    for idx in torch.randperm(len(x_train)).split(32):
        optimizer.zero_grad()
        loss = criterion(model(x_train[idx]), y_train[idx])
        loss.backward()
        optimizer.step()
    scheduler.step()
    model.eval()
    with torch.no_grad():
        val = criterion(model(x_test), y_test).item()
    if epoch % 10 == 0:
        print(f"{epoch:3d} train {loss.item():.4f} val {val:.4f}")

with torch.no_grad():
    r2 = 1 - ((model(x_test) - y_test) ** 2).sum() / ((y_test - y_test.mean()) ** 2).sum()
print(f"metric r2 {r2.item():.4f}")
