# case: ok_mean_teacher
# source: own construct (mean teacher, Tarvainen & Valpola 2017)
import copy
import os

import torch
import torch.nn as nn
import torch.nn.functional as F
from sklearn.datasets import load_digits


class Student(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(64, 128)
        self.b = nn.Linear(128, 128)
        self.c = nn.Linear(128, 10)

    def forward(self, x):
        return self.c(F.relu(self.b(F.relu(self.a(x)))))


def main():
    torch.manual_seed(int(os.environ.get("SEED", "0")))
    torch.set_num_threads(1)
    x, y = load_digits(return_X_y=True)
    x = torch.tensor(x / 16.0, dtype=torch.float32)
    y = torch.tensor(y)
    labelled, unlabelled = x[:500], x[:1400]
    student = Student()
    teacher = copy.deepcopy(student)
    for p in teacher.parameters():
        p.requires_grad_(False)
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-3)
    steps = 700
    for step in range(steps):
        i = torch.randint(0, 500, (32,))
        j = torch.randint(0, 1400, (64,))
        supervised = F.cross_entropy(student(labelled[i] + 0.1 * torch.randn(32, 64)), y[i])
        with torch.no_grad():
            aim = teacher(unlabelled[j] + 0.1 * torch.randn(64, 64)).softmax(1)
        guess = student(unlabelled[j] + 0.1 * torch.randn(64, 64)).softmax(1)
        consistency = F.mse_loss(guess, aim)
        loss = supervised + 5.0 * min(1.0, step / 300) * consistency
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for p, q in zip(teacher.parameters(), student.parameters()):
                p.lerp_(q, 0.02)
        if step % 100 == 0:
            print(step, supervised.item(), consistency.item())
    with torch.no_grad():
        acc = (teacher(x[1400:]).argmax(1) == y[1400:]).float().mean().item()
    print(f"metric accuracy {acc:.4f}")


if __name__ == "__main__":
    main()
