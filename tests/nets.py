"""Small trainings with known structure, shared by the tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unvanish.watch import Watch


@dataclass
class Training:
    """What a training leaves behind."""

    models: list[nn.Module]
    optimizers: list[torch.optim.Optimizer]
    losses: list[Tensor] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)


@contextmanager
def watching(*arguments: Any, **options: Any) -> Iterator[Watch]:
    """Watch what happens in the block; in memory unless a folder is given."""
    watch = Watch(*arguments, **options)
    watch.attach()
    try:
        yield watch
    finally:
        watch.close()


def chain(gain: float, depth: int, width: int = 6) -> nn.Sequential:
    """Return a linear chain whose every layer multiplies the gradient by ``gain``."""
    layers = [nn.Linear(width, width, bias=False) for _ in range(depth)]
    for layer in layers:
        nn.init.eye_(layer.weight)
        with torch.no_grad():
            layer.weight.mul_(gain)
    return nn.Sequential(*layers)


def descend(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    inputs: Tensor,
    targets: Tensor,
    steps: int,
    loss_fn: Callable[[Tensor, Tensor], Tensor] = F.mse_loss,
) -> list[float]:
    """Train in the plain way and return the losses."""
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_fn(model(inputs), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# Each of these trains from a fixed seed and says what became of it. ------------------------------------


def _supervised(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    shape: tuple[int, ...],
    classes: int,
    steps: int,
    call: nn.Module | None = None,
) -> Training:
    training = Training([model], [optimizer])
    for _ in range(steps):
        x, y = torch.randn(16, *shape), torch.randint(classes, (16,))
        optimizer.zero_grad()
        loss = F.cross_entropy((call or model)(x), y)
        loss.backward()
        optimizer.step()
        training.losses.append(loss.detach())
    return training


def mlp(steps: int) -> Training:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))
    return _supervised(model, torch.optim.AdamW(model.parameters()), (8,), 3, steps)


def cnn(steps: int) -> Training:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8),
        nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip
    model[4].eval()  # one batch norm stays as it is
    return _supervised(model, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), (3, 8, 8), 4, steps)


class Reader(nn.Module):
    """A recurrent classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.rnn, self.head = nn.Embedding(20, 8), nn.LSTM(8, 8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.rnn(self.embed(tokens))[0][:, -1])


def lstm(steps: int) -> Training:
    model = Reader()
    training = Training([model], [torch.optim.RMSprop(model.parameters())])
    for _ in range(steps):
        tokens, y = torch.randint(20, (8, 6)), torch.randint(3, (8,))
        training.optimizers[0].zero_grad()
        loss = F.cross_entropy(model(tokens), y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        training.optimizers[0].step()
        training.losses.append(loss.detach())
    return training


class Generator(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))


class Critic(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(2, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))


def gan(steps: int) -> Training:
    maker, critic = Generator(), Critic()
    to_maker, to_critic = torch.optim.Adam(maker.parameters()), torch.optim.Adam(critic.parameters())
    training = Training([maker, critic], [to_critic, to_maker])
    one, zero = torch.ones(16, 1), torch.zeros(16, 1)
    for _ in range(steps):
        real, fake = torch.randn(16, 2) + 3, maker(torch.randn(16, 4))
        to_critic.zero_grad()
        critic_loss = F.binary_cross_entropy_with_logits(critic(real), one)
        critic_loss = critic_loss + F.binary_cross_entropy_with_logits(critic(fake.detach()), zero)
        critic_loss.backward()
        to_critic.step()
        to_maker.zero_grad()
        maker_loss = F.binary_cross_entropy_with_logits(critic(fake), one)
        maker_loss.backward()
        to_maker.step()
        training.losses += [critic_loss.detach(), maker_loss.detach()]
    return training


class Tied(nn.Module):
    """Input and output embedding share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(12, 8), nn.Linear(8, 8), nn.Linear(8, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.embed(tokens))))


def tied(steps: int) -> Training:
    model = Tied()
    training = Training([model], [torch.optim.SGD(model.parameters(), 0.1, nesterov=True, momentum=0.5)])
    for _ in range(steps):
        tokens = torch.randint(12, (10,))
        training.optimizers[0].zero_grad(set_to_none=False)
        loss = F.cross_entropy(model(tokens), tokens.roll(1))
        loss.backward()
        training.optimizers[0].step()
        training.losses.append(loss.detach())
    return training


def lbfgs(steps: int) -> Training:
    model = nn.Sequential(nn.Linear(3, 8), nn.Sigmoid(), nn.Linear(8, 1))
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=4)
    training = Training([model], [optimizer])
    x = torch.randn(32, 3)
    y = x.sum(1, keepdim=True).sin()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        training.losses.append(loss.detach())
        return loss

    for _ in range(steps):
        optimizer.step(closure)
    return training


class Checkpointed(nn.Module):
    """Two blocks whose activations are computed again in the backward pass."""

    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.first = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Dropout(0.3))
        self.second = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh())
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in (self.first, self.second):
            x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x)


def checkpointed(steps: int, *, reentrant: bool = False) -> Training:
    model = Checkpointed(reentrant=reentrant)
    training = Training([model], [torch.optim.SGD(model.parameters(), 0.1)])
    for _ in range(steps):
        x, y = torch.randn(16, 8, requires_grad=True), torch.randint(3, (16,))
        training.optimizers[0].zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        training.optimizers[0].step()
        training.losses.append(loss.detach())
    return training


def checkpointed_reentrant(steps: int) -> Training:
    return checkpointed(steps, reentrant=True)


def amp(steps: int) -> Training:
    """Mixed precision with a loss scale; one step overflows and is left out."""
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=4)
    training = Training([model], [optimizer])
    for step in range(steps):
        x, y = torch.randn(16, 8), torch.randint(3, (16,))
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        if step == 5:
            loss = loss * torch.tensor(float("inf"))
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        training.losses.append(loss.detach())
    training.extra["scaler"] = scaler.state_dict()
    return training


def compiled(steps: int) -> Training:
    torch.compiler.reset()
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    optimizer = torch.optim.Adam(model.parameters())
    return _supervised(model, optimizer, (8,), 3, steps, call=torch.compile(model, backend="aot_eager"))


def compiled_in_place(steps: int) -> Training:
    torch.compiler.reset()
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    model.compile(backend="aot_eager")
    return _supervised(model, torch.optim.Adam(model.parameters()), (8,), 3, steps)


def _transformer(model: nn.Module, steps: int, batch: Callable[[], dict[str, Tensor]]) -> Training:
    model.train()
    training = Training([model], [torch.optim.AdamW(model.parameters(), 1e-3)])
    for _ in range(steps):
        training.optimizers[0].zero_grad()
        loss = model(**batch()).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        training.optimizers[0].step()
        training.losses.append(loss.detach())
    return training


def _tokens() -> dict[str, Tensor]:
    tokens = torch.randint(5, 50, (4, 7))
    return {"input_ids": tokens, "labels": tokens}


def _pictures() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(4, 3, 16, 16), "labels": torch.randint(3, (4,))}


def bert(steps: int) -> Training:
    import transformers as t

    config = t.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    batch = lambda: {"input_ids": torch.randint(5, 50, (4, 7)), "labels": torch.randint(3, (4,))}  # noqa: E731
    return _transformer(t.BertForSequenceClassification(config), steps, batch)


def gpt2(steps: int) -> Training:
    import transformers as t

    config = t.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0)
    return _transformer(t.GPT2LMHeadModel(config), steps, _tokens)


def vit(steps: int) -> Training:
    import transformers as t

    config = t.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16,
        patch_size=4, num_labels=3,
    )  # fmt: skip
    return _transformer(t.ViTForImageClassification(config), steps, _pictures)


def resnet(steps: int) -> Training:
    import transformers as t

    config = t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3)
    return _transformer(t.ResNetForImageClassification(config), steps, _pictures)


def t5(steps: int) -> Training:
    import transformers as t

    config = t.T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)
    return _transformer(t.T5ForConditionalGeneration(config), steps, _tokens)


def llama(steps: int) -> Training:
    import transformers as t

    config = t.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16,
    )  # fmt: skip
    return _transformer(t.LlamaForCausalLM(config), steps, _tokens)


NETS: dict[str, Callable[[int], Training]] = {
    f.__name__: f
    for f in (
        mlp, cnn, lstm, gan, tied, lbfgs, checkpointed, checkpointed_reentrant, amp, compiled,
        compiled_in_place, bert, gpt2, vit, resnet, t5, llama,
    )
}  # fmt: skip
