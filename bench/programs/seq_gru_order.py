# case: seq_gru_order
# source: own construct
import os

import torch
import torch.nn as nn

SEED = int(os.environ.get("SEED", "0"))
LR = 3e-3 if os.environ.get("FIXED") == "1" else 0.5


class OrderNet(nn.Module):
    """Which of the two marker tokens comes first?"""

    def __init__(self, vocab=10, emb=12, hidden=32):
        super().__init__()
        self.embed = nn.Embedding(vocab, emb)
        self.gru = nn.GRU(emb, hidden, num_layers=2, batch_first=True)
        self.fc = nn.Linear(hidden, 2)

    def forward(self, tokens):
        _, h = self.gru(self.embed(tokens))
        return self.fc(h[-1])


def batch(n, length=20):
    tokens = torch.randint(2, 10, (n, length))
    pos = torch.rand(n, length).topk(2, dim=1).indices
    tokens[torch.arange(n), pos[:, 0]] = 0
    tokens[torch.arange(n), pos[:, 1]] = 1
    return tokens, (pos[:, 0] < pos[:, 1]).long()


def main():
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    model = OrderNet()
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    for step in range(500):
        tokens, label = batch(48)
        logits = model(tokens)
        loss = criterion(logits, label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step}: loss={loss.item():.4f}")
    model.eval()
    with torch.no_grad():
        tokens, label = batch(1000)
        acc = (model(tokens).argmax(1) == label).float().mean().item()
    print(f"metric accuracy {acc:.4f}")


if __name__ == "__main__":
    main()
