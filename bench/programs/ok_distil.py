# case: ok_distil
# source: own construct (knowledge distillation, Hinton et al. 2015)
import os

import torch
import torch.nn as nn
import torch.nn.functional as F
from sklearn.datasets import make_classification

SEED = int(os.environ.get("SEED", "0"))


def accuracy(model, x, y):
    model.eval()
    with torch.no_grad():
        hit = (model(x).argmax(1) == y).float().mean().item()
    model.train()
    return hit


def main():
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    x, y = make_classification(
        n_samples=2000, n_features=16, n_informative=10, n_classes=5, n_clusters_per_class=2, class_sep=2.5, random_state=SEED
    )
    x, y = torch.tensor(x, dtype=torch.float32), torch.tensor(y)
    x_tr, y_tr, x_te, y_te = x[:1500], y[:1500], x[1500:], y[1500:]

    teacher = nn.Sequential(nn.Linear(16, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 5))
    optimizer = torch.optim.Adam(teacher.parameters(), lr=2e-3)
    for epoch in range(12):
        for idx in torch.randperm(1500).split(50):
            loss = F.cross_entropy(teacher(x_tr[idx]), y_tr[idx])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    print("teacher", accuracy(teacher, x_te, y_te))

    teacher.eval()
    student = nn.Sequential(nn.Linear(16, 20), nn.ReLU(), nn.Linear(20, 5))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9)
    temperature = 3.0
    for epoch in range(25):
        for idx in torch.randperm(1500).split(50):
            with torch.no_grad():
                soft = F.softmax(teacher(x_tr[idx]) / temperature, dim=1)
            logits = student(x_tr[idx])
            kd = F.kl_div(F.log_softmax(logits / temperature, dim=1), soft, reduction="batchmean") * temperature ** 2
            loss = 0.7 * kd + 0.3 * F.cross_entropy(logits, y_tr[idx])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if epoch % 5 == 0:
            print("student", epoch, loss.item())
    print(f"metric accuracy {accuracy(student, x_te, y_te):.4f}")


main()
