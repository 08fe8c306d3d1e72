# case: cancer_bce
# source: own construct
import os

import torch
import torch.nn as nn
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import RobustScaler
from torch.utils.data import DataLoader, TensorDataset


class Diagnoser(nn.Module):
    def __init__(self, probability):
        super().__init__()
        self.fc1 = nn.Linear(30, 32)
        self.fc2 = nn.Linear(32, 16)
        self.fc3 = nn.Linear(16, 1)
        self.drop = nn.Dropout(0.1)
        self.probability = probability

    def forward(self, x):
        x = self.drop(nn.functional.gelu(self.fc1(x)))
        x = nn.functional.gelu(self.fc2(x))
        x = self.fc3(x)
        return torch.sigmoid(x) if self.probability else x


def main():
    seed = int(os.environ.get("SEED", "0"))
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    x, y = load_breast_cancer(return_X_y=True)
    x_train, x_test, y_train, y_test = train_test_split(x, y, test_size=0.3, random_state=seed)
    scaler = RobustScaler()
    x_train = torch.tensor(scaler.fit_transform(x_train), dtype=torch.float32)
    x_test = torch.tensor(scaler.transform(x_test), dtype=torch.float32)
    y_train = torch.tensor(y_train, dtype=torch.float32).view(-1, 1)
    y_test = torch.tensor(y_test, dtype=torch.float32).view(-1, 1)
    loader = DataLoader(TensorDataset(x_train, y_train), batch_size=20, shuffle=True)

    model = Diagnoser(probability=os.environ.get("FIXED") != "1")
    criterion = nn.BCEWithLogitsLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for epoch in range(40):
        model.train()
        for xb, yb in loader:
            optimizer.zero_grad()
            loss = criterion(model(xb), yb)
            loss.backward()
            optimizer.step()
        if (epoch + 1) % 10 == 0:
            model.eval()
            with torch.no_grad():
                val = criterion(model(x_test), y_test)
            print(f"epoch {epoch + 1} train {loss.item():.4f} val {val.item():.4f}")

    model.eval()
    with torch.no_grad():
        predicted = (torch.sigmoid(model(x_test)) > 0.5).float()
        accuracy = (predicted == y_test).float().mean().item()
    print(f"metric accuracy {accuracy:.4f}")


if __name__ == "__main__":
    main()
