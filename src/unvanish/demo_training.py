"""Train a 12-layer sigmoid network on scikit-learn's handwritten digits. It does not learn."""

import torch
from sklearn.datasets import load_digits
from torch import nn

torch.set_num_threads(1)
torch.manual_seed(0)
digits = load_digits()
x = torch.tensor(digits.data / 16, dtype=torch.float32)  # (1797, 64), between 0 and 1
y = torch.tensor(digits.target)
x_train, y_train, x_test, y_test = x[:1400], y[:1400], x[1400:], y[1400:]

layers: list[nn.Module] = []
for width in [64] + [48] * 11:
    layers += [nn.Linear(width, 48), nn.Sigmoid()]
model = nn.Sequential(*layers, nn.Linear(48, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
loss_fn = nn.CrossEntropyLoss()

for epoch in range(15):
    for chosen in torch.split(torch.randperm(len(x_train)), 32):
        loss = loss_fn(model(x_train[chosen]), y_train[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"epoch {epoch + 1} loss {loss.item():.4f}", flush=True)

model.eval()
with torch.no_grad():
    answers = model(x_test).argmax(1)
print(f"test accuracy {(answers == y_test).float().mean().item():.4f}")
