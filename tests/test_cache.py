"""Training from cached features is training without a cache; whatever is done to a cache, no wrong row is served."""

from __future__ import annotations

import copy
import errno
import itertools
import json
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from tests.test_freeze import CASES, Case, Residual, cnn, mlp
from unvanish import OptionError, StaleCacheError, cache_features, freeze_to
from unvanish.reuse.cache import store
from unvanish.reuse.cache.fill import to_stderr

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01),
}


def quiet(line: str) -> None:
    """Say nothing."""


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many shards from few rows."""
    monkeypatch.setattr(store, "SHARD_BYTES", 200)
    monkeypatch.setattr(store, "MOST_SHARDS", 7)


def data(count: int = 50, width: int = 7, classes: int = 3) -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    return TensorDataset(
        torch.randn(count, width, generator=generator), torch.randint(classes, (count,), generator=generator)
    )


def pictures(count: int = 50) -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    return TensorDataset(torch.randn(count, 2, 8, 8, generator=generator), torch.arange(count) % 3)


def frozen_mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = mlp()
    freeze_to(model, -1)
    return model


def truth(model: nn.Sequential, dataset: TensorDataset, batch_size: int = 8) -> Tensor:
    """Compute the features of a frozen `mlp` with no help."""
    trunk = copy.deepcopy(model[:5]).eval()
    with torch.no_grad():
        return torch.cat([trunk(x) for x in dataset.tensors[0].split(batch_size)])


def wide() -> nn.Sequential:
    """Widths whose products have the same bits wherever a row stands in a batch."""
    return nn.Sequential(
        nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, 16), nn.ReLU(),
        nn.Linear(16, 3),
    )  # fmt: skip


def wide_data() -> TensorDataset:
    return data(width=16)


def all_rows(features: Any) -> tuple[Tensor, Tensor]:
    x, y = features[list(range(len(features)))]
    return x, y


# The same training ------------------------------------------------------------------------------------


def train(step: Callable[[Any], Tensor], loader: Any, optimizer: torch.optim.Optimizer, epochs: int) -> None:
    for _ in range(epochs):
        for batch in loader:
            optimizer.zero_grad()
            step(batch).backward()
            optimizer.step()


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize(
    ("make", "n", "samples"),
    [
        (wide, -1, wide_data),
        (wide, 2, wide_data),
        (cnn, -1, pictures),
        (cnn, "4", pictures),
        (cnn, 1, pictures),
        (Residual, 1, pictures),
    ],
    ids=["mlp", "mlp with dropout above", "cnn", "cnn with norm above", "cnn, early cut", "skips over the cut"],
)
def test_training_from_the_cache_is_training_without(
    make: Callable[[], nn.Module], n: int | str, samples: Callable[[], TensorDataset], optimizer: Any, tmp_path: Path
) -> None:
    """The same shuffles, dropout and updates: every weight and buffer is equal, bit for bit."""
    dataset = samples()
    torch.manual_seed(1)
    plain = make().train()
    freeze_to(plain, n)
    cached = copy.deepcopy(plain)
    features = cache_features(cached, dataset, tmp_path, batch_size=10, tell=quiet)
    torch.manual_seed(2)
    loader = DataLoader(dataset, 10, shuffle=True)
    train(lambda b: F.cross_entropy(plain(b[0]), b[1]), loader, optimizer(plain.parameters()), 3)
    torch.manual_seed(2)
    head = features.head.train()
    loader = features.loader(10, shuffle=True)
    train(lambda b: F.cross_entropy(head(b[0]), b[1]), loader, optimizer(cached.parameters()), 3)
    for name, value in plain.state_dict().items():
        assert torch.equal(cached.state_dict()[name], value), name
    assert not torch.equal(cached.state_dict()[name], make().state_dict()[name])


class Skipping(nn.Module):
    """Two frozen outputs, the input itself, its sign, and a detached part cross the border."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.deep = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.up, self.out = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4 + 4 + 4 + 2, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.down(x))
        b = F.relu_(self.deep(F.max_pool2d(a, 2)))
        up = F.interpolate(self.up(b), scale_factor=2)
        return self.out(torch.cat([a.detach(), up, (a > 0.1).float(), x], 1)).mean((1, 2, 3))


class Gated(nn.Module):
    """A branch that learns is computed before the frozen one; whole numbers choose what is used."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.trunk, self.head = nn.Linear(7, 2), nn.Linear(7, 6), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(x).softmax(-1)
        halves = self.trunk(x).tanh().unflatten(-1, (2, 3))
        best = halves.argmax(-1).float()
        return self.head((gate.unsqueeze(-1) * halves).sum(1)) + best.sum(1, keepdim=True)


def frozen_by_hand(model: nn.Module, *names: str) -> nn.Module:
    for name in names:
        model.get_submodule(name).requires_grad_(False)
    return model


GRAPHS = {
    **{name: (case, ()) for name, case in CASES.items()},
    "skips": (Case(Skipping, 2, lambda: torch.randn(8, 2, 8, 8)), ()),
    "a branch that learns": (Case(Gated, 0, lambda: torch.randn(8, 7)), ("trunk",)),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_the_cut_is_found_in_any_graph(name: str, tmp_path: Path) -> None:
    """Left out of a model in training mode, its frozen layers are not missed."""
    case, names = GRAPHS[name]
    torch.manual_seed(0)
    model = frozen_by_hand(case.make(), *names).train()
    if not names:
        freeze_to(model, case.n)
    x = case.batch()
    features = cache_features(model, TensorDataset(x), tmp_path, batch_size=len(x), tell=quiet)
    (stored,) = features[list(range(len(x)))]
    torch.manual_seed(3)
    whole = case.loss(copy.deepcopy(model)(x))
    torch.manual_seed(3)
    part = case.loss(features.head(stored))
    torch.testing.assert_close(part, whole)
    part.backward()
    assert all((p.grad is not None) <= p.requires_grad for p in model.parameters())
    assert any(p.grad is not None for p in model.parameters())


def test_what_crosses_the_border(tmp_path: Path) -> None:
    """Exactly the outputs that the rest uses are stored: the topmost of a chain, all ends of skips, the input."""
    from unvanish.reuse.cache.find import find_cut

    expected = {
        "convolutions": ("7",),
        "skips": ("(inputs)", "down", "deep"),
        "siamese": ("trunk", "trunk"),
        "llama": ("model",),
    }
    for name, names in expected.items():
        case, _ = GRAPHS[name]
        model = case.make()
        freeze_to(model, case.n)
        assert find_cut(model, case.batch()).names == names


def test_marks_follow_the_data() -> None:
    """Through views, changes in place, whole numbers and `item()`; not through shapes."""
    from unvanish.reuse.cache.flow import Flow

    flow, a, b = Flow(), torch.ones(4), torch.zeros(4)
    flow.mark(a, {"a"})
    flow.mark(b, {"b"})
    with flow:
        whole = torch.zeros(2, 2)
        whole[0].add_(a[:2].detach())
        shaped = torch.ones(a.shape)
        taken = (b > 0).sum().item()
    assert flow.marks(whole) == {"a"}
    assert flow.marks(shaped) == set()
    assert flow.leaked == {"b"}
    assert taken == 0


def test_a_compiled_model_and_a_trunk_of_its_own(tmp_path: Path) -> None:
    """What `torch.compile` returned has the model inside; a model that is frozen whole gives its output."""
    model = frozen_mlp()
    compiled = torch.compile(model, backend="eager")
    x, _ = all_rows(cache_features(compiled, data(), tmp_path / "1", batch_size=8, tell=quiet))  # type: ignore[arg-type]
    assert torch.equal(x, truth(model, data()))
    whole = copy.deepcopy(model)[:5]
    freeze_to(whole, 2)
    y, _ = all_rows(cache_features(whole, data(), tmp_path / "2", batch_size=8, tell=quiet))
    assert torch.equal(x, y)


def test_the_model_and_the_random_state_are_left_alone(tmp_path: Path) -> None:
    """Computing features changes no weight, buffer, gradient, mode, hook or random state."""
    model = cnn()
    freeze_to(model, 1)
    F.cross_entropy(model(torch.randn(8, 2, 8, 8)), torch.zeros(8, dtype=torch.int64)).backward()
    before = copy.deepcopy(model)
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tobytes()
    features = cache_features(model, pictures(), tmp_path, tell=quiet)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
    for grad, parameter in zip(grads, model.parameters(), strict=True):
        assert grad is parameter.grad is None or torch.equal(grad, parameter.grad)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), before.buffers(), strict=True))
    assert modes == [m.training for m in model.modules()]
    assert not any("forward" in vars(m) or m._forward_hooks for m in model.modules())
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tobytes()
    assert torch.equal(state[0], after[0])
    assert state[1:] == after[1:]
    features.head(torch.randn(4, 5, 6, 6))
    assert not any("forward" in vars(m) for m in model.modules())


# The data set and its loader --------------------------------------------------------------------------


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("drop_last", [False, True])
def test_the_loader_gives_the_batches_of_an_ordinary_one(*, shuffle: bool, drop_last: bool, tmp_path: Path) -> None:
    """From one seed: the same rows in the same order as a `DataLoader` over the samples, epoch by epoch."""
    model, dataset = frozen_mlp(), data()
    features = cache_features(model, dataset, tmp_path, tell=quiet)
    number = TensorDataset(torch.arange(50), dataset.tensors[1])
    for seeded in (False, True):
        orders = []
        for build in (
            lambda **o: DataLoader(number, 8, **o),
            lambda **o: features.loader(8, **o),
            lambda **o: DataLoader(features, 8, **o),
        ):
            torch.manual_seed(4)
            generator = torch.Generator().manual_seed(9) if seeded else None
            loader = build(shuffle=shuffle, drop_last=drop_last, generator=generator)
            orders.append([y for _ in range(2) for _, y in loader])
        for one, other, plain in zip(*orders, strict=True):
            assert torch.equal(one, other)
            assert torch.equal(one, plain)


def test_rows_come_by_the_number_of_the_sample(tmp_path: Path) -> None:
    """One row, several, negative numbers, a tensor of numbers; a row is a copy, and nothing is beyond the end."""
    model, dataset = frozen_mlp(), data()
    features = cache_features(model, dataset, tmp_path, batch_size=8, tell=quiet)
    expected = truth(model, dataset)
    for row in (0, 7, 8, 49, -1):
        assert torch.equal(features[row][0], expected[row])
        assert features[row][1] == dataset[row][1]
    rows = torch.tensor([49, 3, 3, 20])
    assert torch.equal(features[rows][0], expected[rows])
    features[rows][0].zero_()
    assert torch.equal(features[rows][0], expected[rows])
    with pytest.raises(IndexError, match="row 50 of 50"):
        features[50]
    assert len(features) == 50
    assert "Features(50 rows of (5,) in" in repr(features)


def test_workers_read_the_same_rows(tmp_path: Path) -> None:
    """Rows survive pickling without their content, and processes of a loader read them anew."""
    features = cache_features(frozen_mlp(), data(), tmp_path, tell=quiet)
    assert len(pickle.dumps(features)) < 5_000 + len(json.dumps(json.loads((tmp_path / "manifest.json").read_text())))
    copied = pickle.loads(pickle.dumps(features))
    assert all(map(torch.equal, all_rows(copied), all_rows(features)))
    for one, other in zip(features.loader(8), features.loader(8, num_workers=2), strict=True):
        assert all(map(torch.equal, one, other))


def test_workers_may_read_the_samples(tmp_path: Path) -> None:
    """Processes that read samples change nothing in the rows, nor in what is compared on opening."""
    features = cache_features(frozen_mlp(), data(), tmp_path, batch_size=8, tell=quiet)
    subset = torch.utils.data.Subset(data(), range(50))  # is read one by one
    again = cache_features(frozen_mlp(), subset, tmp_path, batch_size=8, workers=2, tell=quiet)
    assert again.manifest.build == features.manifest.build
    fresh = cache_features(frozen_mlp(), subset, tmp_path / "fresh", batch_size=8, workers=2, tell=quiet)
    assert all(map(torch.equal, all_rows(fresh), all_rows(features)))


class Mapped(Dataset[Any]):
    """Samples that are dicts, as tokenisers give them."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, row: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(row)
        length = 1 + row % 5
        return {
            "input_ids": torch.randint(12, (5,), generator=generator),
            "attention_mask": (torch.arange(5) < length).long(),
            "labels": row % 3,
        }


def test_samples_that_are_dicts_and_masks_that_pass_the_border(tmp_path: Path) -> None:
    """A mask that upper layers need is stored with the features, and the loss is that of the whole model."""
    torch.manual_seed(0)
    case = CASES["half of bert"]
    model = case.make().eval()
    freeze_to(model, case.n)
    with pytest.raises(OptionError, match=r"expected the keys that the model takes, of \['attention_mask'"):
        cache_features(model, Mapped(), tmp_path, tell=quiet)
    features = cache_features(
        model, Mapped(), tmp_path, inputs=["input_ids", "attention_mask"], batch_size=5, tell=quiet
    )
    for batch, sample in zip(features.loader(5), DataLoader(Mapped(), 5), strict=True):
        assert torch.equal(batch["labels"], sample.pop("labels"))
        torch.testing.assert_close(features.head(batch["features"]).logits, model(**sample).logits)
    wrong = sample["attention_mask"].flip(0)
    assert not torch.allclose(model(sample["input_ids"], wrong).logits, model(**sample).logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_stored_with_fewer_digits(dtype: torch.dtype, tmp_path: Path) -> None:
    """Rows are the features rounded to the type, given out in the type of the model."""
    model, dataset = frozen_mlp(), data()
    features = cache_features(model, dataset, tmp_path, batch_size=8, dtype=dtype, tell=quiet)
    assert torch.equal(all_rows(features)[0], truth(model, dataset).to(dtype).float())
    again = cache_features(model, dataset, tmp_path, batch_size=8, dtype=dtype, tell=quiet)
    assert torch.equal(all_rows(again)[0], all_rows(features)[0])
    with pytest.raises(StaleCacheError, match=r"dtype: found \['torch.float32'"):
        cache_features(model, dataset, tmp_path, tell=quiet)


def test_numbers_beyond_the_range_of_a_type(tmp_path: Path) -> None:
    """What float16 cannot hold is refused, not stored as infinity."""
    model = frozen_mlp()
    with torch.no_grad():
        model[3].weight.mul_(1e6)
    with pytest.raises(OptionError, match=r"found features up to .*, expected at most 6.55e\+04 for torch.float16"):
        cache_features(model, data(), tmp_path, dtype=torch.float16, tell=quiet)
    assert not list(tmp_path.glob("*.npy*"))


def test_models_in_bfloat16(tmp_path: Path) -> None:
    """A type that numpy does not know is stored bit for bit."""
    model = frozen_mlp().bfloat16()
    dataset = TensorDataset(data().tensors[0].bfloat16())
    (x,) = cache_features(model, dataset, tmp_path, batch_size=8, tell=quiet)[list(range(50))]
    assert x.dtype == torch.bfloat16
    assert torch.equal(x, truth(model, dataset))


def test_rows_in_few_digits_are_computed_again_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16, a fifth more is not rounding."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5), Doubling(), nn.Linear(5, 3)).bfloat16()
    freeze_to(model, -1)
    dataset = TensorDataset(data().tensors[0].bfloat16())
    cache_features(model, dataset, tmp_path, tell=quiet)
    cache_features(model, dataset, tmp_path, batch_size=3, tell=quiet)
    monkeypatch.setattr(Doubling, "forward", lambda self, x: 2.4 * x)
    with pytest.raises(StaleCacheError, match="found other features when it was computed again"):
        cache_features(model, dataset, tmp_path, tell=quiet)


# What changed is noticed ------------------------------------------------------------------------------


def scale_weight(model: nn.Sequential) -> None:
    model[0].weight.data[3, 1] *= 1.000001


def flip_buffer(model: nn.Sequential) -> None:
    model[1].running_mean[2] += 1e-7


def other_eps(model: nn.Sequential) -> None:
    model[1].eps *= 1.001


def other_slope(model: nn.Sequential) -> None:
    model[2].negative_slope = 0.3


def other_stride(model: nn.Sequential) -> None:
    model[0].padding_mode = "reflect"


def other_kind(model: nn.Sequential) -> None:
    model[2] = nn.ReLU()


def normed() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.LeakyReLU(0.2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 3),
    )  # fmt: skip
    freeze_to(model, -1)
    return model


@pytest.mark.parametrize(
    ("change", "layer"),
    [
        (scale_weight, "0"),
        (flip_buffer, "1"),
        (other_eps, "1"),
        (other_slope, "2"),
        (other_stride, "0"),
        (other_kind, "2"),
    ],
)
def test_a_changed_layer_is_named(change: Callable[[Any], None], layer: str, tmp_path: Path) -> None:
    """One weight, one buffer, one setting: the cache is refused, the layer is named, and the files stay."""
    cache_features(normed(), pictures(), tmp_path, tell=quiet)
    files = {path.name: path.read_bytes() for path in tmp_path.glob("*.npy")}
    model = normed()
    change(model)
    with pytest.raises(StaleCacheError, match=rf"layer '{layer}': found \w{{16}}, expected \w{{16}}.*rebuild=True"):
        cache_features(model, pictures(), tmp_path, tell=quiet)
    assert files == {path.name: path.read_bytes() for path in tmp_path.glob("*.npy")}
    features = cache_features(model, pictures(), tmp_path, rebuild=True, batch_size=50, tell=quiet)
    with torch.no_grad():
        assert torch.equal(all_rows(features)[0], copy.deepcopy(model[:5]).eval()(pictures().tensors[0]))


class Scaled(nn.Linear):
    """Has a setting that its repr does not show, too small a change for rows that are computed again."""

    scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * super().forward(x)


def test_a_setting_of_a_module_of_ones_own_is_noticed(tmp_path: Path) -> None:
    """Plain attributes of modules are part of the key."""
    model = nn.Sequential(Scaled(7, 5), nn.Linear(5, 3))
    freeze_to(model, -1)
    model[0].scale = 2.0
    cache_features(model, data(), tmp_path, tell=quiet)
    model[0].scale = 2.0 + 1e-6
    with pytest.raises(StaleCacheError, match="layer '0'"):
        cache_features(model, data(), tmp_path, tell=quiet)


def test_another_cut_is_noticed(tmp_path: Path) -> None:
    """Freezing less is another cache."""
    model = frozen_mlp()
    cache_features(model, data(), tmp_path, tell=quiet)
    freeze_to(model, 1)
    with pytest.raises(StaleCacheError, match="The cache was not used"):
        cache_features(model, data(), tmp_path, tell=quiet)


def test_training_the_head_does_not_make_a_cache_stale(tmp_path: Path) -> None:
    """Weights, buffers and modes above the cut do not count."""
    model = cnn()
    freeze_to(model, 1)
    features = cache_features(model, pictures(), tmp_path, tell=quiet)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    train(lambda b: F.cross_entropy(features.head(b[0]), b[1]), features.loader(10), optimizer, 1)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.npy")}
    cache_features(model.eval(), pictures(), tmp_path, tell=quiet)
    assert before == {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.npy")}


def change_sample(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    x[31, 4] += 1e-6
    return x, y


def change_label(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    y[31] = (y[31] + 1) % 3
    return x, y


def change_order(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    order = [*range(30), 31, 30, *range(32, 50)]
    return x[order], y[order]


@pytest.mark.parametrize("change", [change_sample, change_label, change_order])
def test_changed_data_is_noticed(change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], tmp_path: Path) -> None:
    """One number of one sample, one label, two samples that change places."""
    cache_features(frozen_mlp(), data(), tmp_path, tell=quiet)
    other = TensorDataset(*change(*(tensor.clone() for tensor in data().tensors)))
    with pytest.raises(StaleCacheError, match=r"dataset: found other samples among rows \d+ to \d+"):
        cache_features(frozen_mlp(), other, tmp_path, tell=quiet)


def test_more_or_other_samples_are_noticed(tmp_path: Path) -> None:
    """Length, type and name of the data are in the key."""
    cache_features(frozen_mlp(), data(), tmp_path, fingerprint="v1", tell=quiet)
    with pytest.raises(StaleCacheError, match="samples: found 49, expected 50"):
        cache_features(frozen_mlp(), torch.utils.data.Subset(data(), range(49)), tmp_path, fingerprint="v1", tell=quiet)
    with pytest.raises(StaleCacheError, match="fingerprint: found v2, expected v1"):
        cache_features(frozen_mlp(), data(), tmp_path, fingerprint="v2", tell=quiet)
    with pytest.raises(StaleCacheError, match="fingerprint: found None, expected v1"):
        cache_features(frozen_mlp(), data(), tmp_path, tell=quiet)
    with pytest.raises(StaleCacheError, match="precision"), torch.autocast("cpu", dtype=torch.bfloat16):
        cache_features(frozen_mlp(), data(), tmp_path, fingerprint="v1", tell=quiet)


class Counted(Dataset[Any]):
    """Counts how often samples are read; a transform comes after."""

    def __init__(self, transform: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        self.samples, self.transform, self.reads = data(200), transform, 0

    def __len__(self) -> int:
        return 200

    def __getitem__(self, row: int) -> Any:
        self.reads += 1
        x, y = self.samples[row]
        return self.transform(x), y


def test_a_changed_transform_is_noticed_even_under_a_name(tmp_path: Path) -> None:
    """A fingerprint saves reading all samples, but rows that are computed again do not agree with another transform."""
    named, first, second = ({"fingerprint": "v1"}, Counted(), Counted())
    cache_features(frozen_mlp(), first, tmp_path, **named, tell=quiet)
    cache_features(frozen_mlp(), second, tmp_path, **named, tell=quiet)
    assert second.reads < 100 < 200 < first.reads
    with pytest.raises(StaleCacheError, match=r"row \d+: found other features when it was computed again"):
        cache_features(frozen_mlp(), Counted(lambda x: 2 * x), tmp_path, **named, tell=quiet)
    cache_features(frozen_mlp(), Counted(), tmp_path / "2", tell=quiet)
    with pytest.raises(StaleCacheError, match="dataset: found other samples among rows 0 to"):
        cache_features(frozen_mlp(), Counted(lambda x: 2 * x), tmp_path / "2", tell=quiet)


class Doubling(nn.Module):
    """What it does is in its code only."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def test_changed_code_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are computed again see what no digest sees."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5), Doubling(), nn.Linear(5, 3))
    freeze_to(model, -1)
    cache_features(model, data(), tmp_path, tell=quiet)
    monkeypatch.setattr(Doubling, "forward", lambda self, x: 2.001 * x)
    with pytest.raises(StaleCacheError, match="found other features when it was computed again"):
        cache_features(model, data(), tmp_path, tell=quiet)


# What is random is noticed ----------------------------------------------------------------------------


class Augmented(Dataset[Any]):
    """Adds what a function draws."""

    def __init__(self, draw: Callable[[], Any]) -> None:
        self.samples, self.draw = data(20), draw

    def __len__(self) -> int:
        return 20

    def __getitem__(self, row: int) -> Any:
        x, y = self.samples[row]
        return x + self.draw(), y


def rarely() -> float:
    """Draw each time, change something one time in ten thousand."""
    return float(torch.rand(()) < 1e-4)


DRAWS = {
    "torch": lambda: torch.randn(7),
    "numpy": lambda: torch.from_numpy(np.random.standard_normal(7)).float(),
    "python": random.random,
    "rarely": rarely,
}


@pytest.mark.parametrize("name", DRAWS)
def test_random_augmentation_is_refused(name: str, tmp_path: Path) -> None:
    """Two reads that differ, or one that draws random numbers, even if they change nothing this time."""
    found = "random numbers drawn" if name == "rarely" else "two reads of it that differ"
    with pytest.raises(OptionError, match=rf"dataset: row 0: found {found}.*Write views=8"):
        cache_features(frozen_mlp(), Augmented(DRAWS[name]), tmp_path, tell=quiet)


@pytest.mark.parametrize("name", DRAWS)
def test_views_are_fixed_draws(name: str, tmp_path: Path) -> None:
    """K draws of each sample, differing between views, the same when opened again."""
    model, dataset = frozen_mlp(), Augmented(DRAWS[name])
    features = cache_features(model, dataset, tmp_path, views=3, tell=quiet)
    x, y = all_rows(features)
    assert len(features) == 60
    assert torch.equal(y, data(20).tensors[1].repeat(3))
    if name != "rarely":
        views = x.view(3, 20, -1)
        assert not torch.equal(views[0], views[1])
    again = cache_features(model, Augmented(DRAWS[name]), tmp_path, views=3, tell=quiet)
    assert torch.equal(all_rows(again)[0], x)
    with pytest.raises(StaleCacheError, match="views: found 2, expected 3"):
        cache_features(model, dataset, tmp_path, views=2, tell=quiet)


def test_a_generator_of_its_own_cannot_be_fixed(tmp_path: Path) -> None:
    """Draws that no seed reaches are refused with views too."""
    generator = torch.Generator()
    dataset = Augmented(lambda: torch.randn(7, generator=generator))
    with pytest.raises(OptionError, match="found two draws of row 0 that differ although"):
        cache_features(frozen_mlp(), dataset, tmp_path, views=3, tell=quiet)


class Noise(nn.Module):
    """Random in evaluation mode too, as augmentation layers are."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


def test_random_layers_are_refused(tmp_path: Path) -> None:
    """Random numbers below the frozen layers, and layers that are frozen in their weights only."""
    noisy = nn.Sequential(Noise(), nn.Linear(7, 5), nn.Linear(5, 3))
    freeze_to(noisy, -1)
    with pytest.raises(OptionError, match="layer '0': found random numbers below every frozen layer"):
        cache_features(noisy, data(), tmp_path, tell=quiet)
    halfway = nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    halfway[:2].requires_grad_(False)
    with pytest.raises(OptionError, match=r"layer '1': found other outputs in training mode than in evaluation mode"):
        cache_features(halfway.eval(), data(), tmp_path, tell=quiet)
    mixing = nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5, track_running_stats=False), nn.Linear(5, 3))
    freeze_to(mixing, -1)
    with pytest.raises(OptionError, match="found an output that depends on the other rows of the batch"):
        cache_features(mixing, data(), tmp_path, tell=quiet)


def test_nothing_to_cache(tmp_path: Path) -> None:
    """Each refusal names what was found and what to write."""
    for trunk, dataset, options, match in (
        (mlp(), data(), {}, r"found no frozen layer at the input of Sequential.*freeze_to\(model, -1\)"),
        (nn.ReLU(), data(), {}, "trunk: found ReLU, expected a module with frozen parameters"),
        (frozen_mlp(), DataLoader(data()), {}, "dataset: found DataLoader, expected samples that are read by number"),
        (frozen_mlp(), [], {}, "dataset: found list"),
        (frozen_mlp(), data(), {"views": 0}, "views: found 0, expected a whole number from 1 on"),
        (frozen_mlp(), data(), {"batch_size": 2.0}, "batch_size: found 2.0"),
        (frozen_mlp(), data(), {"dtype": torch.int8}, "dtype: found torch.int8, expected a floating type"),
        (frozen_mlp(), [(torch.randn(7), "a"), (torch.randn(7), "b")], {}, "dataset: found str in a batch"),
        (frozen_mlp(), data(), {"max_bytes": 100}, "max_bytes: found 100, expected at least the 1,400 bytes"),
    ):
        with pytest.raises(OptionError, match=match):
            cache_features(trunk, dataset, tmp_path / "new", tell=quiet, **options)  # type: ignore[arg-type]
        assert not list(tmp_path.rglob("*.npy"))


# What is damaged is computed again --------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a cache."""
    folder = tmp_path_factory.mktemp("written")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "SHARD_BYTES", 200)
        cache_features(frozen_mlp(), data(), folder, batch_size=8, tell=quiet)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(chooser=st.data())
def test_no_damage_reaches_a_row(written: dict[str, bytes], chooser: Any, tmp_path_factory: Any) -> None:
    """A flipped bit, a cut, a lost or an empty file anywhere: every row is what it was."""
    folder = tmp_path_factory.mktemp("damaged")
    name = chooser.draw(st.sampled_from(sorted(name for name in written if name != ".lock")))
    content = bytearray(written[name])
    kind = chooser.draw(st.sampled_from(["flip", "cut", "lost", "longer"]))
    place = chooser.draw(st.integers(0, len(content) - 1))
    if kind == "flip":
        content[place] ^= 1 << chooser.draw(st.integers(0, 7))
    elif kind == "cut":
        del content[place:]
    elif kind == "longer":
        content += b"\0"
    for other, text in written.items():
        (folder / other).write_bytes(bytes(content) if other == name else text)
    if kind == "lost":
        (folder / name).unlink()
    features = cache_features(frozen_mlp(), data(), folder, batch_size=8, tell=quiet)
    x, y = all_rows(features)
    assert torch.equal(x, truth(frozen_mlp(), data()))
    assert torch.equal(y, data().tensors[1])
    assert {path.name for path in folder.glob("*.npy*")} == {
        n for s in features.manifest.shards.values() for n in s.files
    }


def test_only_what_is_damaged_is_computed_again(written: dict[str, bytes], tmp_path: Path) -> None:
    """The other shards stay, and the user is told."""
    for name, content in written.items():
        (tmp_path / name).write_bytes(content)
    victim = sorted(tmp_path.glob("*.0.npy"))[2]
    victim.write_bytes(victim.read_bytes()[:-1])
    times = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.npy")}
    said: list[str] = []
    cache_features(frozen_mlp(), data(), tmp_path, batch_size=8, tell=said.append)
    changed = {path.name for path in tmp_path.glob("*.npy") if path.stat().st_mtime_ns != times[path.name]}
    assert changed == {victim.name, victim.name.replace(".0.npy", ".1.npy")}
    assert "1 damaged shards of" in said[0]


@pytest.mark.parametrize("other", [1, 3, 7, 64])
def test_another_size_of_batch_reads_and_mends_the_same_cache(other: int, written: Any, tmp_path: Path) -> None:
    """Shards and batches need not fit: content is compared, and a lost shard is computed again."""
    for name, content in written.items():
        (tmp_path / name).write_bytes(content)
    sorted(tmp_path.glob("*.0.npy"))[1].unlink()
    features = cache_features(frozen_mlp(), data(), tmp_path, batch_size=other, tell=quiet)
    torch.testing.assert_close(all_rows(features)[0], truth(frozen_mlp(), data()))
    assert features.manifest.shard_rows == 8


def test_a_refused_rebuild_leaves_the_old_cache(written: Any, tmp_path: Path) -> None:
    """Room is looked for before anything is removed."""
    for name, content in written.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(OptionError, match="max_bytes: found 10"):
        cache_features(frozen_mlp(), data(), tmp_path, rebuild=True, max_bytes=10, tell=quiet)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == written


def test_size_is_said_before_writing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By default on standard error: rows, bytes to be written, free space; nothing on standard output."""
    seen: list[int] = []

    def tell(line: str) -> None:
        seen.append(len(list(tmp_path.glob("*.npy"))))
        to_stderr(line)

    cache_features(frozen_mlp(), data(50_0), tmp_path, tell=tell)
    streams = capsys.readouterr()
    assert streams.out == ""
    assert "500 rows, 0.0 MB to be written" in streams.err
    assert seen[0] == 0


def test_no_room_is_told_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Free space is looked at first."""
    monkeypatch.setattr("unvanish.reuse.cache.fill.shutil.disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(OptionError, match=r"found 1,000 bytes of free space, expected 1,400. Nothing was written"):
        cache_features(frozen_mlp(), data(), tmp_path, tell=quiet)


def test_a_full_disk_costs_the_shard_at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is the system's; what was finished stays, nothing torn is left, and the next call goes on."""
    write, written = store.ShardWriter._write, itertools.count()

    def fails(self: Any, place: int, content: Any) -> None:
        if next(written) == 17:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, place, content)

    monkeypatch.setattr(store.ShardWriter, "_write", fails)
    with pytest.raises(OSError, match="No space left on device"):
        cache_features(frozen_mlp(), data(), tmp_path, batch_size=8, tell=quiet)
    assert not list(tmp_path.glob("*.new"))
    finished = store.load_manifest(tmp_path)
    assert finished is not None
    assert finished.shards
    assert finished.missing
    features = cache_features(frozen_mlp(), data(), tmp_path, batch_size=8, tell=quiet)
    assert torch.equal(all_rows(features)[0], truth(frozen_mlp(), data()))
    assert features.manifest.build == finished.build


def test_a_module_that_is_used_twice_in_a_chain(tmp_path: Path) -> None:
    """A sequence may call one module below and above the cut; the head calls it too."""
    torch.manual_seed(0)
    act = nn.Tanh()
    model = nn.Sequential(nn.Linear(5, 8), act, nn.Linear(8, 8), act, nn.Linear(8, 8), act, nn.Linear(8, 3))
    features = cache_features(freeze_to(model, -3), data(20, 5), tmp_path, batch_size=20, tell=quiet)
    x, _ = data(20, 5)[:]
    torch.testing.assert_close(features.head(features[list(range(20))][0]), model(x))
