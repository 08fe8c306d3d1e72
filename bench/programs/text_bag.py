# case: text_bag
# source: own construct
import os

import torch
import torch.nn as nn
import torch.nn.functional as F

DIM = 1 if os.environ.get("FIXED") == "1" else 0


class TextClassifier(nn.Module):
    def __init__(self, vocab=200, dim=16, classes=4):
        super().__init__()
        self.bag = nn.EmbeddingBag(vocab, dim, mode="mean")
        self.fc = nn.Linear(dim, classes)
        nn.init.normal_(self.bag.weight, std=0.3)

    def forward(self, tokens):
        return F.log_softmax(self.fc(self.bag(tokens)), dim=DIM)


def corpus(n, word_topic, classes=4):
    label = torch.multinomial(torch.tensor([0.55, 0.25, 0.15, 0.05]), n, replacement=True)
    tokens = torch.randint(0, 200, (n, 20))
    # 6 of the words of a document come from the vocabulary of its topic
    for i in range(n):
        own = (word_topic == label[i]).nonzero()[:, 0]
        tokens[i, :6] = own[torch.randint(0, len(own), (6,))]
    return tokens, label


def main():
    torch.manual_seed(int(os.environ.get("SEED", "0")))
    torch.set_num_threads(1)
    word_topic = torch.randint(0, 4, (200,))
    tokens, label = corpus(1500, word_topic)
    tokens_test, label_test = corpus(500, word_topic)
    model = TextClassifier()
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
    for epoch in range(30):
        for idx in torch.randperm(1500).split(30):
            optimizer.zero_grad()
            loss = F.nll_loss(model(tokens[idx]), label[idx])
            loss.backward()
            optimizer.step()
        if epoch % 6 == 0:
            print(f"epoch {epoch} loss {loss.item():.4f}")
    model.eval()
    right = 0
    with torch.no_grad():
        for document, topic in zip(tokens_test, label_test):
            right += int(model(document.unsqueeze(0)).argmax(1).item() == topic.item())
    print(f"metric accuracy {right / len(label_test):.4f}")


if __name__ == "__main__":
    main()
