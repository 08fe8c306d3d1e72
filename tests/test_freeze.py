"""Frozen means that no training changes a bit, that the mode does not matter, and that thawing undoes it."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.nets import Reader, Tied
from unvanish import LayerError, OptionError, freeze_to, thaw
from unvanish.reuse.freeze import is_frozen, layers_of


class Case(NamedTuple):
    """A network, where it is cut, a batch, and what is minimised."""

    make: Callable[[], nn.Module]
    n: int | str
    batch: Callable[[], Any]
    loss: Callable[[Any], Tensor] = lambda output: output.square().mean()


def rows(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(*shape)


def words(count: int = 12, *shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randint(count, shape or (6, 5))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Dropout(0.3), nn.Linear(9, 5), nn.ReLU(), nn.Linear(5, 3))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.ReLU(inplace=True), nn.Conv2d(5, 4, 3), nn.BatchNorm2d(4),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip


def plain_norm() -> nn.Module:
    """A batch norm without weights: buffers only."""
    return nn.Sequential(nn.Linear(7, 9), nn.BatchNorm1d(9, affine=False), nn.ReLU(), nn.Linear(9, 3))


def norms() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(2, 4, 3), nn.InstanceNorm1d(4, affine=True, track_running_stats=True), nn.GroupNorm(2, 4),
        nn.PReLU(4), nn.Flatten(), nn.LayerNorm(24), nn.Linear(24, 3),
    )  # fmt: skip


def volumes() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(1, 3, 2), nn.BatchNorm3d(3), nn.GELU(), nn.ConvTranspose3d(3, 2, 2), nn.Flatten(), nn.Linear(128, 2)
    )


def spectral() -> nn.Module:
    """Power iteration moves buffers in each forward pass in training mode."""
    normed = nn.utils.parametrizations.spectral_norm(nn.Linear(7, 9))
    return nn.Sequential(normed, nn.ReLU(), nn.utils.parametrizations.weight_norm(nn.Linear(9, 5)), nn.Linear(5, 3))


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Flatten(), nn.Linear(40, 3))


class Residual(nn.Module):
    """Skips over blocks, dropout on channels, and a scale of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.one = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.Dropout2d(0.2))
        self.two = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.scale * self.one(x)
        return self.head((x + self.two(x)).mean((2, 3)))


class Recurrent(nn.Module):
    def __init__(self, kind: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.rnn, self.norm, self.head = kind(4, 6, batch_first=True), nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.rnn(x)[0][:, -1]))


class Siamese(nn.Module):
    """The same trunk sees two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(7, 6), nn.BatchNorm1d(6), nn.Tanh())
        self.head = nn.Bilinear(6, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(x), self.trunk(x.flip(1)))


def transformer(name: str, **sizes: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers as t

        model: nn.Module = getattr(t, name)(
            getattr(t, name.split("For")[0].replace("LMHeadModel", "") + "Config")(**sizes)
        )
        return model

    return make


BERT = {
    "vocab_size": 12, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16,
    "max_position_embeddings": 8, "num_labels": 3,
}  # fmt: skip
VIT = {
    "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 8,
    "patch_size": 4, "num_channels": 2, "num_labels": 3,
}  # fmt: skip
RESNET = {
    "embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "layer_type": "basic", "num_labels": 3,
    "num_channels": 2,
}  # fmt: skip
GPT = {"vocab_size": 12, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 8, "tie_word_embeddings": False}
LLAMA = {
    "vocab_size": 12, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 8,
}  # fmt: skip


def logits(output: Any) -> Tensor:
    return output.logits.square().mean()


CASES = {
    "perceptron": Case(mlp, -1, rows(8, 7)),
    "convolutions": Case(cnn, -1, rows(8, 2, 8, 8)),
    "half of the convolutions": Case(cnn, 1, rows(8, 2, 8, 8)),
    "norm without weights": Case(plain_norm, -1, rows(8, 7)),
    "other norms": Case(norms, -1, rows(8, 2, 8)),
    "volumes": Case(volumes, -1, rows(4, 1, 4, 4, 4)),
    "parametrised": Case(spectral, -1, rows(8, 7)),
    "encoder": Case(encoder, -1, rows(6, 5, 8)),
    "inside the encoder": Case(encoder, "0.layers.1", rows(6, 5, 8)),
    "residual": Case(Residual, -1, rows(6, 2, 6, 6)),
    "residual, half": Case(Residual, "two", rows(6, 2, 6, 6)),
    "rnn": Case(lambda: Recurrent(nn.RNN), -1, rows(6, 5, 4)),
    "gru": Case(lambda: Recurrent(nn.GRU), 1, rows(6, 5, 4)),
    "lstm of words": Case(Reader, 2, words(20)),
    "siamese": Case(Siamese, "head", rows(8, 7)),
    "bert": Case(transformer("BertForSequenceClassification", **BERT), -1, words(12), logits),
    "half of bert": Case(transformer("BertForSequenceClassification", **BERT), "bert.encoder.layer.1", words(), logits),
    "gpt-2": Case(transformer("GPT2LMHeadModel", **GPT), -1, words(), logits),
    "vit": Case(transformer("ViTForImageClassification", **VIT), -1, rows(4, 2, 8, 8), logits),
    "resnet": Case(transformer("ResNetForImageClassification", **RESNET), -1, rows(4, 2, 16, 16), logits),
    "llama": Case(transformer("LlamaForCausalLM", **LLAMA), -1, words(), logits),
}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.01, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1, amsgrad=True),
    "adam with decay": lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.1),
}


def step(model: nn.Module, optimizer: torch.optim.Optimizer, case: Case, *, set_to_none: bool = True) -> None:
    optimizer.zero_grad(set_to_none=set_to_none)
    case.loss(model(case.batch())).backward()
    optimizer.step()


def held_bytes(model: nn.Module) -> dict[str, bytes]:
    """Return the bytes of parameters and buffers of all that is frozen."""
    found: dict[str, bytes] = {}
    for prefix, module in model.named_modules():
        own = dict(module.named_parameters(prefix, recurse=False))
        frozen = {name: p for name, p in own.items() if not p.requires_grad}
        buffers = dict(module.named_buffers(prefix, recurse=False)) if is_frozen(module) else {}
        found |= {name: tensor.detach().numpy().tobytes() for name, tensor in {**frozen, **buffers}.items()}
    return found


def train_frozen(case: Case, make_optimizer: Callable[[Any], torch.optim.Optimizer], steps: int) -> None:
    """Train, freeze, train on, and compare the bytes of what is frozen; the rest must have moved."""
    torch.manual_seed(0)
    model = case.make().train()
    optimizer = make_optimizer(model.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.99**epoch)
    for _ in range(3):  # momentum, running statistics and gradients of every layer
        step(model, optimizer, case)
    freeze_to(model, case.n, optimizer=optimizer)
    before = held_bytes(model)
    learning = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    assert before
    assert learning
    optimizer.step()  # with the gradients of before
    for number in range(steps):
        model.train(number % 5 != 4)
        step(model, optimizer, case, set_to_none=number % 2 == 0)
        schedule.step()
    assert held_bytes(model) == before
    moved = [name for name, p in model.named_parameters() if name in learning and not torch.equal(p, learning[name])]
    assert len(moved) > len(learning) / 2


@pytest.mark.parametrize("name", CASES)
def test_frozen_layers_keep_every_bit(name: str) -> None:
    """After training in train mode, parameters and buffers are the same bytes; what is not frozen has moved."""
    number = list(CASES).index(name)
    train_frozen(CASES[name], list(OPTIMIZERS.values())[number % len(OPTIMIZERS)], steps=12)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", CASES)
def test_frozen_layers_keep_every_bit_for_long(name: str, optimizer: str) -> None:
    """The same for 200 steps and each optimiser."""
    train_frozen(CASES[name], OPTIMIZERS[optimizer], steps=200)


@pytest.mark.parametrize("name", CASES)
def test_the_frozen_part_does_not_know_the_mode(name: str) -> None:
    """Every frozen module gives the same bits in train and in eval mode, and no graph is built for it."""
    torch.manual_seed(0)
    case = CASES[name]
    model = case.make()
    freeze_to(model, case.n)
    tops = [m for path, m in model.named_modules() if is_frozen(m) and not is_frozen(parent(model, path))]
    outputs: list[list[Any]] = [[], []]
    x = case.batch()
    for mode, found in zip((True, False), outputs, strict=True):
        model.train(mode)
        keep: Callable[..., None] = lambda m, a, output, found=found: found.append(output)  # noqa: E731
        handles = [module.register_forward_hook(keep) for module in tops]
        model(x)
        for handle in handles:
            handle.remove()
    flat = [[t for t in torch.utils._pytree.tree_leaves(found) if isinstance(t, Tensor)] for found in outputs]
    assert len(flat[0]) == len(flat[1]) > 0
    # what stands above a learning module sees what that one makes of its dropout: only equal inputs are compared
    assert torch.equal(flat[0][0], flat[1][0])
    assert not flat[0][0].requires_grad


def parent(model: nn.Module, path: str) -> nn.Module:
    return model.get_submodule(path.rpartition(".")[0])


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_training_above_is_training_the_head_alone(optimizer: Callable[[Any], torch.optim.Optimizer]) -> None:
    """With a frozen prefix, the head moves as if it were trained on the outputs of the prefix, bit for bit."""
    torch.manual_seed(0)
    model, x = mlp(), torch.randn(8, 7)
    freeze_to(model, -1)
    head = copy.deepcopy(model[5])
    with torch.no_grad():
        features = copy.deepcopy(model).eval()[:5](x)
    whole, alone = optimizer(model.parameters()), optimizer(head.parameters())
    for _ in range(10):
        for net, data, opt in ((model, x, whole), (head, features, alone)):
            opt.zero_grad()
            net(data).square().mean().backward()
            opt.step()
    assert all(torch.equal(a, b) for a, b in zip(head.parameters(), model[5].parameters(), strict=True))


def test_thawing_is_undoing() -> None:
    """Frozen and thawed, a model trains as one that was never frozen, bit for bit; nothing is left on it."""
    torch.manual_seed(0)
    plain = cnn()
    plain[4].weight.requires_grad_(False)  # the user's own
    plain[1].eval()
    model = copy.deepcopy(plain)
    freeze_to(model, 2)
    thaw(freeze_to(model, -1))
    assert [m.training for m in model.modules()] == [m.training for m in plain.modules()]
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in plain.parameters()]
    assert all("train" not in vars(module) for module in model.modules())
    x = torch.randn(8, 2, 8, 8)
    for net in (plain, model):
        optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.1, momentum=0.9)
        for _ in range(3):
            step(net, optimizer, Case(cnn, -1, lambda: x))
    for name, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_thawing_gives_the_mode_that_was_asked_for() -> None:
    """What was asked of a frozen module by `train` and `eval` holds once it is thawed."""
    model = cnn()
    freeze_to(model, -1)
    model.eval()
    thaw(model)
    assert not any(m.training for m in model.modules())
    freeze_to(model, -1)
    model.train()
    assert not model[1].training
    thaw(model)
    assert all(m.training for m in model.modules())


def test_freezing_less_thaws_what_is_above() -> None:
    """A second call says where the border is now, as if it were the first."""
    model, once = mlp(), mlp()
    freeze_to(model, -1)
    freeze_to(model, 1)
    freeze_to(once, 1)
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in once.parameters()]
    assert [m.training for m in model] == [m.training for m in once] == [False, False, True, True, True, True]


@pytest.mark.parametrize(
    ("n", "frozen"),
    [(0, ""), (1, "01"), (2, "0123 4"), (-1, "01234"), (-2, "01"), (3, "012345"), ("3", "01"), ("5", "01234")],
)
def test_layers_are_counted_by_their_weights(n: int | str, frozen: str) -> None:
    """Activations go with the layer before them; a dropout below what learns stays active."""
    model = mlp()
    freeze_to(model, n)
    assert "".join(str(i) for i, m in enumerate(model) if is_frozen(m)) == frozen.replace(" ", "")


def test_norms_go_with_the_layer_before_them() -> None:
    """Batch norms are no layers of their own; one at the input goes with the lowest."""
    model = cnn()
    freeze_to(model, 1)
    assert [is_frozen(m) for m in model] == [True] * 3 + [False] * 6
    freeze_to(model, -2)
    assert [is_frozen(m) for m in model] == [True] * 3 + [False] * 6
    first = nn.Sequential(nn.LayerNorm((2, 3)), nn.Flatten(), nn.Linear(6, 4), nn.Linear(4, 2))
    freeze_to(first, 1)
    assert [is_frozen(m) for m in first] == [True, True, True, False]


def test_wrappers_are_not_counted() -> None:
    """A module around the model does not change what is counted; names lead to the layers."""
    wrapped = nn.Sequential(nn.Sequential(mlp()))
    assert [name for name, _ in layers_of(wrapped)] == ["0.0.0", "0.0.3", "0.0.5"]
    assert freeze_to(wrapped, -1).layers == ("0.0.0", "0.0.1", "0.0.2", "0.0.3", "0.0.4")


def test_a_model_without_children_is_one_layer() -> None:
    """An LSTM can be frozen whole."""
    lstm = nn.LSTM(3, 4)
    assert freeze_to(lstm, 1).layers == ("LSTM",)
    assert not lstm.train().training
    assert not any(p.requires_grad for p in lstm.parameters())


def test_frozen_models_are_copied_and_pickled() -> None:
    """A copy is as frozen as the original, and on its own."""
    model = cnn()
    freeze_to(model, -1)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert [m.training for m in copied.train()] == [False] * 8 + [True]
        thaw(copied)
        assert all(p.requires_grad for p in copied.parameters())
        assert not model.train()[1].training


def test_no_momentum_survives_the_freezing() -> None:
    """A layer that is thawed starts with an empty state, groups and schedules stay as they were."""
    torch.manual_seed(0)
    case = CASES["convolutions"]
    model = cnn()
    optimizer = torch.optim.SGD(
        [{"params": model[:6].parameters(), "lr": 0.01}, {"params": model[8].parameters()}], 0.1, momentum=0.9
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [0.02, 0.2], total_steps=40)
    layout = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    for border in (0, 1, -1, 1, 0):
        freeze_to(model, border, optimizer=optimizer)
        assert not any(p in optimizer.state for p in model.parameters() if not p.requires_grad)
        for _ in range(3):
            step(model, optimizer, case)
            schedule.step()
    assert layout == [[id(p) for p in group["params"]] for group in optimizer.param_groups]


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_resuming_between_borders_gives_the_same_bits(make: Callable[[Any], torch.optim.Optimizer]) -> None:
    """A run that is saved anywhere in a schedule of freezing and resumed in a new process ends in the same bits."""
    borders = (-1, -1, 1, 1, 0, 0)

    def play(model: nn.Module, optimizer: Any, schedule: Any, start: int, end: int) -> None:
        for number in range(start, end):
            if number == 0 or borders[number] != borders[number - 1] or number == start:
                freeze_to(model, borders[number], optimizer=optimizer)
            torch.manual_seed(number)
            step(model, optimizer, CASES["convolutions"])
            schedule.step()

    def fresh() -> tuple[nn.Module, Any, Any]:
        torch.manual_seed(7)
        model = cnn()
        optimizer = make(model.parameters())
        return model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.9**epoch)

    through = fresh()
    play(*through, 0, 6)
    for stop in range(1, 6):
        first, second = fresh(), fresh()
        play(*first, 0, stop)
        saved = pickle.dumps([part.state_dict() for part in first])
        for part, state in zip(second, pickle.loads(saved), strict=True):
            part.load_state_dict(state)
        play(*second, stop, 6)
        for name, value in through[0].state_dict().items():
            assert torch.equal(second[0].state_dict()[name], value), (stop, name)


def test_a_shared_parameter_cannot_be_on_both_sides() -> None:
    """Tied weights across the border are refused, and nothing is changed."""
    model = Tied()
    with pytest.raises(OptionError, match=r"'embed.weight': found it shared with 'head.weight', which is to learn"):
        freeze_to(model, -1)
    assert all(p.requires_grad for p in model.parameters())
    assert all(m.training and "train" not in vars(m) for m in model.modules())
    layer = nn.Linear(3, 3)
    with pytest.raises(OptionError, match=r"'0.weight': found it shared with '2.weight'"):
        freeze_to(nn.Sequential(layer, nn.Linear(3, 3), layer), 1)
    freeze_to(model, 3)  # both sides frozen


@pytest.mark.parametrize("n", [4, -4, True, 1.5])
def test_numbers_of_layers_that_are_not_there(n: Any) -> None:
    """The message says how many there are."""
    with pytest.raises(OptionError, match=r"expected a whole number from -3 to 3.*Write freeze_to\(model, -1\)"):
        freeze_to(mlp(), n)


def test_words_for_wrong_calls() -> None:
    """Each refusal names what was found and what to write."""
    with pytest.raises(LayerError, match=r"found 'bert.encoder', expected the name of a module, such as '0'"):
        freeze_to(mlp(), "bert.encoder")
    with pytest.raises(OptionError, match=r"model: found Tensor, expected a torch.nn.Module"):
        freeze_to(torch.zeros(2), 1)  # type: ignore[arg-type]
    model = mlp()
    with pytest.raises(OptionError, match="found LBFGS, expected one that leaves alone what has no gradient"):
        freeze_to(model, 1, optimizer=torch.optim.LBFGS(model.parameters()))
    freeze_to(model, -1)
    late = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    with pytest.raises(OptionError, match=r"found no parameter '3.weight', which is thawed"):
        freeze_to(model, 1, optimizer=late)
    assert is_frozen(model[3])


def test_what_happens_without() -> None:
    """Without gradients only, as is often done, batch norms and dropout go on: the control of these tests."""
    torch.manual_seed(0)
    model = cnn()
    model[:6].requires_grad_(False)
    before = model[1].running_mean.clone()
    step(model, torch.optim.SGD(model.parameters(), 0.1), CASES["convolutions"])
    assert not torch.equal(model[1].running_mean, before)
    assert F.mse_loss(model[1].running_mean, before) > 0
