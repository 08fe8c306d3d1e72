# case: ok_warmup_gru
# source: own construct
import os

import torch
import torch.nn as nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

torch.manual_seed(int(os.environ.get("SEED", "0")))
torch.set_num_threads(1)

TEXT = (
    "the quick brown fox jumps over the lazy dog while the small grey cat sleeps in the warm sun and "
    "nobody in the old house hears the rain that falls on the roof all night long until the morning comes "
) * 12
chars = sorted(set(TEXT))
code = torch.tensor([chars.index(c) for c in TEXT])


class CharModel(nn.Module):
    def __init__(self, vocab, emb=16, hidden=64):
        super().__init__()
        self.embed = nn.Embedding(vocab, emb)
        self.rnn = nn.GRU(emb, hidden, batch_first=True)
        self.decode = nn.Linear(hidden, vocab)

    def forward(self, tokens, state=None):
        h, state = self.rnn(self.embed(tokens), state)
        return self.decode(h), state


model = CharModel(len(chars))
optimizer = torch.optim.AdamW(model.parameters(), lr=8e-3)
steps = 220
scheduler = SequentialLR(
    optimizer, [LinearLR(optimizer, 0.01, 1.0, 30), CosineAnnealingLR(optimizer, steps - 30)], milestones=[30]
)
loss_fn = nn.CrossEntropyLoss()
for step in range(steps):
    start = torch.randint(0, len(code) - 41, (16,))
    window = torch.stack([code[s:s + 41] for s in start.tolist()])
    logits, _ = model(window[:, :-1])
    loss = loss_fn(logits.transpose(1, 2), window[:, 1:])
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    scheduler.step()
    if step % 50 == 0:
        print(f"step {step} loss {loss.item():.3f}")

model.eval()
with torch.no_grad():
    logits, _ = model(code[None, :400])
    acc = (logits[0, :-1].argmax(1) == code[1:400]).float().mean().item()
print(f"metric accuracy {acc:.4f}")
