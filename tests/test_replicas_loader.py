"""Loading for replicas: each sees each row once an epoch, in an order of its own, and goes on where it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, TensorDataset, WeightedRandomSampler

from unvanish import OptionError, Replicas
from unvanish.replicas import ReplicaLoader


class Rows(Dataset[dict[str, Any]]):
    """Rows of several kinds, fetched one by one."""

    def __init__(self, count: int = 11) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"row": row, "image": torch.full((2, 2), float(row)), "name": f"row {row}"}


def numbers(count: int) -> TensorDataset:
    return TensorDataset(torch.arange(count), torch.arange(count).float()[:, None])


def epoch(loader: ReplicaLoader) -> Tensor:
    """Return the rows that each replica sees in the next epoch."""
    return torch.cat([batch["row"] if isinstance(batch, dict) else batch[0] for batch in loader], 1)


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 5), st.booleans(), st.integers(0, 2**40))
def test_each_replica_sees_each_row_once(count: int, batch_size: int, n: int, drop_last: bool, seed: int) -> None:
    """In each epoch; without a last small batch no row comes twice, and as many are left out as do not fill one."""
    loader = ReplicaLoader(numbers(count), n, batch_size=batch_size, seed=seed, drop_last=drop_last)
    for _ in range(2):
        batches = list(loader)
        assert len(batches) == len(loader)
        seen = torch.cat([x for x, _ in batches], 1) if batches else torch.empty(n, 0)
        assert seen.shape[1] == (count - count % batch_size if drop_last else count)
        for rows in seen.tolist():
            assert len(set(rows)) == len(rows)
        assert all(torch.equal(x.float(), y.squeeze(2)) for x, y in batches)


def test_orders_differ_and_do_not_depend_on_others() -> None:
    """Between replicas, epochs and seeds; not by the number of replicas, nor by what else is drawn, nor drawing it."""
    state = torch.get_rng_state()
    few, many = (ReplicaLoader(numbers(30), n, batch_size=7, seed=3) for n in (2, 4))
    first, second = epoch(few), epoch(few)
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(3)
    assert torch.equal(epoch(many)[:2], first)
    other = epoch(ReplicaLoader(numbers(30), 2, batch_size=7, seed=4))
    orders = [*first.tolist(), *second.tolist(), *other.tolist()]
    assert len({tuple(order) for order in orders}) == 6


@pytest.mark.parametrize("workers", [0, 2])
def test_options_of_a_loader_are_kept(workers: int) -> None:
    """Rows, collate function, batch size and workers are the loader's; what is no tensor becomes a list."""
    inner = DataLoader(Rows(), batch_size=4, shuffle=True, num_workers=workers, persistent_workers=workers > 0)
    loader = ReplicaLoader(inner, 3)
    for _ in range(2):
        batches = list(loader)
        assert [tuple(batch["image"].shape) for batch in batches] == [(3, 4, 2, 2), (3, 4, 2, 2), (3, 3, 2, 2)]
        for batch in batches:
            assert torch.equal(batch["image"][..., 0, 0], batch["row"].float())
            names = [[f"row {row}" for row in rows] for rows in batch["row"].T.tolist()]
            assert batch["name"] == names
    doubled = DataLoader(Rows(), batch_size=4, collate_fn=lambda rows: 2 * torch.tensor([row["row"] for row in rows]))
    assert sorted(torch.cat(list(ReplicaLoader(doubled, 2)), 1)[1].tolist()) == list(range(0, 22, 2))
    assert len(ReplicaLoader(DataLoader(Rows(), batch_size=4, drop_last=True), 2)) == 2


def test_tensors_are_indexed_as_they_are_collated() -> None:
    """The short way for tensors gives what the long way gives."""

    class Slow(TensorDataset):
        pass

    tensors = torch.randn(10, 3), torch.randint(5, (10,))
    for one, other in zip(
        *(ReplicaLoader(kind(*tensors), 2, batch_size=4) for kind in (TensorDataset, Slow)), strict=True
    ):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("data", [numbers(11), Rows(), DataLoader(Rows(), batch_size=3, num_workers=1)])
@pytest.mark.parametrize("stop", [0, 2, 4])
def test_a_resumed_loader_goes_on(data: Any, stop: int) -> None:
    """Stopped after any batch and resumed in a fresh loader, the run sees the rows of the whole run."""

    def rows(batch: Any) -> Any:
        return (batch["row"] if isinstance(batch, dict) else batch[0]).tolist()

    def batches(loader: ReplicaLoader) -> Iterator[Any]:
        for _ in range(2):
            yield from loader

    whole = [rows(batch) for batch in batches(ReplicaLoader(data, 2, batch_size=3, seed=9))]
    loader = ReplicaLoader(data, 2, batch_size=3, seed=9)
    seen = []
    running = batches(loader)
    for _ in range(stop):
        seen.append(rows(next(running)))
    state = loader.state_dict()
    assert state == {"seed": 9, "epoch": 0, "step": stop}
    again = ReplicaLoader(data, 2, batch_size=3)
    again.load_state_dict(state)
    seen += [rows(batch) for batch in batches(again)]
    assert seen == whole
    assert again.state_dict() == {"seed": 9, "epoch": 2, "step": 0}


def test_an_epoch_that_is_broken_off_is_not_repeated() -> None:
    """Taking a few batches of each epoch sees new orders each time, as with a plain loader."""
    loader = ReplicaLoader(numbers(30), 2, batch_size=5)
    first = [next(iter(loader))[0].tolist() for _ in range(4)]
    assert len({str(batch) for batch in first}) == 4
    assert loader.state_dict()["epoch"] == 3


def test_training_from_a_loader_is_separate_trainings() -> None:
    """Replicas that train from their loader are plain models that go through its orders, bit for bit."""
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(20, 5), torch.randn(20, 1))
    models = [nn.Linear(5, 1) for _ in range(3)]
    replicas = Replicas(models[0], n=3, init=models.__getitem__, backend="loop")
    loader = replicas.loader(data, batch_size=8, seed=1)
    optimizer = torch.optim.SGD(replicas.parameters(), 0.1)
    orders = []
    for _ in range(2):
        orders.append([loader.order(i) for i in range(3)])
        for x, y in loader:
            optimizer.zero_grad()
            replicas.loss(F.mse_loss, x, y, batches="separate").backward()
            optimizer.step()
    for i, model in enumerate(models):
        own = torch.optim.SGD(model.parameters(), 0.1)
        for order in orders:
            for rows in order[i].split(8):
                own.zero_grad()
                F.mse_loss(model(data.tensors[0][rows]), data.tensors[1][rows]).backward()
                own.step()
        assert torch.equal(replicas.replica(i).weight, model.weight)


class Endless(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ReplicaLoader(numbers(4), 2), r"batch_size: found None, expected a whole number from 1 on"),
        (lambda: ReplicaLoader(numbers(4), 2, batch_size=0), r"batch_size: found 0, expected a whole number"),
        (
            lambda: ReplicaLoader(numbers(4), 2, batch_size=2, seed=-1),
            r"seed: found -1, expected a whole number from 0",
        ),
        (lambda: ReplicaLoader(Endless(), 2, batch_size=2), r"data: found Endless, expected a data set with a length"),
        (lambda: ReplicaLoader(DataLoader(Endless()), 2), r"data: found Endless, expected a data set with a length"),
        (
            lambda: ReplicaLoader(DataLoader(numbers(4), sampler=WeightedRandomSampler([1.0] * 4, 4)), 2),
            r"data: found a loader that samples by WeightedRandomSampler, expected one that gives each row once",
        ),
        (
            lambda: ReplicaLoader(DataLoader(numbers(4), sampler=RandomSampler(range(4), replacement=True)), 2),
            r"data: found a loader that samples by RandomSampler, expected",
        ),
        (
            lambda: ReplicaLoader(DataLoader(numbers(4), batch_sampler=[[0, 1], [2, 3]]), 2),
            r"data: found a loader that samples by list, expected",
        ),
    ],
)
def test_wrong_data_is_refused(make: Callable[[], object], words: str) -> None:
    """What cannot be sampled for each replica is named."""
    with pytest.raises(OptionError, match=r"ReplicaLoader\(\): " + words):
        make()


def test_unequal_batches_are_refused() -> None:
    """Rows of different lengths, padded within each replica only, do not stack."""
    inner = DataLoader(list(range(6)), batch_size=1, collate_fn=lambda rows: torch.zeros(1, rows[0]))
    with pytest.raises(OptionError, match=r"data: found batches of shapes \[.*\] at one step, expected one shape"):
        list(ReplicaLoader(inner, 2))
