# case: logfreq_relu
# source: own construct
import os

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

SEED = int(os.environ.get("SEED", "0"))
LOW = -0.2 if os.environ.get("FIXED") == "1" else 0.0

torch.manual_seed(SEED)
torch.set_num_threads(1)

# 5 topics, each a distribution over 40 words; the features are the log frequencies of a document
topics = torch.distributions.Dirichlet(torch.full((40,), 0.7)).sample((5,))
topics = 0.55 * topics.mean(0) + 0.45 * topics
label = torch.randint(0, 5, (2500,))
counts = torch.distributions.Multinomial(60, topics).sample((2500,))
counts = counts[torch.arange(2500), label]
features = torch.log((counts + 0.5) / (counts + 0.5).sum(1, keepdim=True))

train_set, test_set = random_split(TensorDataset(features, label), [2000, 500])
train_loader = DataLoader(train_set, batch_size=50, shuffle=True)
test_loader = DataLoader(test_set, batch_size=250)

model = nn.Sequential()
model.add_module("hidden", nn.Linear(40, 64))
model.add_module("act", nn.ReLU())
model.add_module("hidden2", nn.Linear(64, 32))
model.add_module("act2", nn.ReLU())
model.add_module("out", nn.Linear(32, 5))
nn.init.uniform_(model.hidden.weight, LOW, 0.2)

optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-3)
criterion = nn.CrossEntropyLoss()
for epoch in range(1, 16):
    model.train()
    for features_batch, label_batch in train_loader:
        optimizer.zero_grad(set_to_none=False)
        loss = criterion(model(features_batch), label_batch)
        loss.backward()
        optimizer.step()
    model.eval()
    hits = 0
    with torch.no_grad():
        for features_batch, label_batch in test_loader:
            hits += (model(features_batch).argmax(1) == label_batch).sum().item()
    print(f"epoch {epoch} train loss {loss.item():.3f} test accuracy {hits / 500:.3f}")

print(f"metric accuracy {hits / 500:.4f}")
