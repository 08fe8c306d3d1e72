"""Replicas beside their matched controls: same data, same order, same number of gradient evaluations."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import OptionError
from .backends import LossFn
from .comparison import Comparison, Row
from .controls import STANDARD_METHODS, Job, MakeOptimizer, Method

Data = tuple[Tensor, Tensor]
MakeData = Callable[[int], Data]
OnRun = Callable[[dict[str, Any]], None]

_TUNING = 100_000  # the seeds that choose learning rates start so far from those that are reported
_ROWS = 1000  # predicted at once


def compare(
    make_model: Callable[[], nn.Module],
    loss_fn: LossFn,
    train_data: Data | MakeData,
    test_data: Data | MakeData,
    *,
    n: int = 3,
    steps: int = 1200,
    batch: int = 32,
    seeds: int = 10,
    seed: int = 0,
    rates: Sequence[float] = (0.1, 0.03, 0.01, 0.003),
    tuning_seeds: int = 2,
    held_out: float = 0.25,
    methods: Iterable[Method] = STANDARD_METHODS,
    optimizer: MakeOptimizer | None = None,
    read: Callable[[Any], Tensor] | None = None,
    score: Callable[[Tensor, Tensor], float] | None = None,
    on_run: OnRun | None = None,
    progress: bool = True,
) -> Comparison:
    """Train replicas and their matched controls at equal cost, and return the table of what they came to.

    For a seed all methods start from the same drawn networks and see the same batches in the same order, and each
    spends ``steps`` gradients of ``batch`` examples: n replicas make ``steps / n`` steps, and so does one network on
    batches n times as large. The learning rate of each method is the one with the best score on held-out rows of the
    training data, over seeds that are not reported. The test data are used for nothing but the table.

    Args:
        make_model: Returns a new model, drawn from torch's random numbers.
        loss_fn: Function of an output and targets; returns the mean over the batch.
        train_data: Inputs and targets, one example a row; or a function of a seed that returns them.
        test_data: As ``train_data``.
        n: Replicas, at least 2.
        steps: Gradients of a batch that each training may take; a multiple of n and of 2.
        batch: Examples in a batch.
        seeds: How many seeds are reported.
        seed: The first of them.
        rates: Learning rates to choose from.
        tuning_seeds: Seeds to choose them by.
        held_out: The share of the training rows that they are chosen on.
        methods: What is trained: ``(*STANDARD_METHODS, coupled("shared", strength=0.1))`` adds one.
        optimizer: Makes an optimiser from parameters and a learning rate; by default SGD with momentum 0.9. The rate
            falls to zero on a cosine.
        read: What is taken from an output, before any mean over networks; by default the softmax if targets are whole
            numbers, else the output itself.
        score: Function of predictions and targets, higher is better; by default the accuracy in % if targets are
            whole numbers, else the explained share of the variance in %.
        on_run: Called after each training with its method, seed, lr, is_tuning, scores by readout, and seconds.
        progress: Say on standard error what each method came to, when it is done.

    Raises:
        OptionError: if an argument cannot be used.

    Cost: ``rates * tuning_seeds + seeds`` trainings for each method, more if its readouts want different rates.

    Example:
        >>> def data(seed):
        ...     x = torch.randn(64, 5, generator=torch.Generator().manual_seed(seed))
        ...     return x, x[:, :2].sum(1, keepdim=True)
        >>> result = compare(
        ...     lambda: nn.Linear(5, 1), nn.functional.mse_loss, data, lambda seed: data(-seed),
        ...     steps=24, batch=8, seeds=2, rates=(0.1, 0.03), progress=False,
        ... )
        >>> {row.evaluations for row in result.rows}
        {192}
        >>> result["replicas, shared, elastic 0.01, centre"].against
        'one network, batch x n'
    """
    _check_counts(n=n, steps=steps, batch=batch, seeds=seeds, tuning_seeds=tuning_seeds)
    _check_choices(rates, held_out)
    methods = _check_methods(methods)
    train, test = _as_function(train_data), _as_function(test_data)
    with torch.random.fork_rng():
        _check_make_model(make_model)
        _check_data(test(seed), "test_data")
        is_classes = not _check_data(train(seed), "train_data")[1].is_floating_point()
    read = read or (_softmax if is_classes else _itself)
    score = score or (accuracy_percent if is_classes else explained_percent)
    setting = _Setting(make_model, loss_fn, train, test, n, steps, batch, held_out, optimizer or _momentum, read, score)
    rows: list[Row] = []
    for number, method in enumerate(methods, 1):
        found = _rows(setting, method, sorted(rates), range(seed, seed + seeds), tuning_seeds, on_run or _ignore)
        rows += found
        if progress:
            means = "; ".join(f"{row.name}: {row.mean:.2f} at lr {row.lr:g}" for row in found)
            print(f"compare: {number} of {len(methods)}: {means}", file=sys.stderr, flush=True)
    settings = {
        "n": n, "steps": steps, "batch": batch, "seeds": seeds, "seed": seed, "rates": sorted(rates),
        "tuning_seeds": tuning_seeds, "held_out": held_out, "score": getattr(score, "__name__", "score").strip("_"),
        "torch": torch.__version__,
    }  # fmt: skip
    return Comparison(tuple(rows), settings)


def accuracy_percent(predictions: Tensor, targets: Tensor) -> float:
    """Return the share of rows whose largest prediction is at their target, in %."""
    return 100 * float((predictions.argmax(-1) == targets).double().mean())


def explained_percent(predictions: Tensor, targets: Tensor) -> float:
    """Return the share of the variance of targets that predictions explain, in %: 0 for their mean, 100 if exact."""
    wrong = (predictions - targets).double().square().mean()
    return 100 * float(1 - wrong / targets.double().var(correction=0))


@dataclass(frozen=True)
class _Setting:
    """What is the same for all methods."""

    make_model: Callable[[], nn.Module]
    loss_fn: LossFn
    train_data: MakeData
    test_data: MakeData
    n: int
    steps: int
    batch: int
    held_out: float
    optimizer: MakeOptimizer
    read: Callable[[Any], Tensor]
    score: Callable[[Tensor, Tensor], float]

    def run(self, method: Method, seed: int, lr: float, *, is_tuning: bool) -> dict[str, float]:
        """Train by one method, and return the score of each of its readouts: a function of the arguments alone."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            x, y = self.train_data(seed)
            order = torch.Generator().manual_seed(seed)
            if is_tuning:
                rows = torch.randperm(len(x), generator=order)
                kept = len(x) - max(int(self.held_out * len(x)), 1)
                (x, test_x), (y, test_y) = ((part[rows[:kept]], part[rows[kept:]]) for part in (x, y))
            else:
                test_x, test_y = self.test_data(seed)
            torch.manual_seed(seed)
            starts = tuple(self.make_model() for _ in range(self.n))
            batches = _batches(len(x), self.steps, self.batch, order)
            job = Job(starts, self.loss_fn, x, y, batches, self.optimizer, lr, self.read)
            predictions = {
                readout: torch.cat([predict(part) for part in torch.split(test_x, _ROWS)])
                for readout, predict in method.fit(job).items()
            }
        return {
            readout: self.score(found, test_y) if found.isfinite().all() else math.nan
            for readout, found in predictions.items()
        }


def _rows(
    setting: _Setting, method: Method, rates: list[float], seeds: Sequence[int], tuning_seeds: int, on_run: OnRun
) -> list[Row]:
    """Choose the learning rate of each readout, train with it on all seeds, and return a row for each readout."""

    def run(seed: int, lr: float, is_tuning: bool) -> tuple[dict[str, float], float]:
        start = time.perf_counter()
        scores = setting.run(method, seed, lr, is_tuning=is_tuning)
        seconds = time.perf_counter() - start
        on_run(
            {
                "method": method.name,
                "seed": seed,
                "lr": lr,
                "is_tuning": is_tuning,
                "scores": scores,
                "seconds": seconds,
            }
        )
        return scores, seconds

    tuning = {lr: [run(seeds[0] + _TUNING + i, lr, True)[0] for i in range(tuning_seeds)] for lr in rates}
    best = {readout: max(rates, key=lambda lr: _worth(readout, tuning[lr])) for readout in tuning[rates[0]][0]}
    runs = {lr: [run(seed, lr, False) for seed in seeds] for lr in sorted(set(best.values()))}
    return [
        Row(
            name=f"{method.name}, {readout}" if readout else method.name,
            against=method.against.get(readout),
            lr=lr,
            at_edge=lr in (rates[0], rates[-1]),
            evaluations=setting.steps * setting.batch,
            scores=tuple(scores[readout] for scores, _ in runs[lr]),
            seconds=statistics.fmean(seconds for _, seconds in runs[lr]),
        )
        for readout, lr in best.items()
    ]


def _worth(readout: str, results: list[dict[str, float]]) -> float:
    """Return the mean score of a readout; a training that left the finite numbers is worse than any."""
    mean = statistics.fmean(scores[readout] for scores in results)
    return mean if math.isfinite(mean) else -math.inf


def _batches(rows: int, steps: int, batch: int, order: torch.Generator) -> Tensor:
    """Return numbers of rows, (steps, batch): one random order of all rows after the other, cut into batches."""
    epochs = -(-steps * batch // rows)
    drawn = torch.cat([torch.randperm(rows, generator=order) for _ in range(epochs)])
    return drawn[: steps * batch].view(steps, batch)


def _momentum(parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr, momentum=0.9)


def _softmax(output: Any) -> Tensor:
    return torch.softmax(output, -1)


def _itself(output: Any) -> Tensor:
    found: Tensor = output
    return found


def _ignore(_run: dict[str, Any]) -> None:
    pass


def _check_counts(**counts: int) -> None:
    least = {"n": 2}
    for name, value in counts.items():
        low = least.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise OptionError(
                f"compare(): {name}: found {value!r}, expected a whole number from {low} on. Write {name}={low + 1}."
            )
    multiple = math.lcm(counts["n"], 2)  # n replicas make a step of n gradients, SAM one of two
    if counts["steps"] % multiple:
        raise OptionError(
            f"compare(): steps: found {counts['steps']}, expected a multiple of {multiple}, so that all methods spend "
            f"the same number of gradients. Write steps={-(-counts['steps'] // multiple) * multiple}."
        )


def _check_choices(rates: Sequence[float], held_out: float) -> None:
    if not rates or not all(0 < lr < math.inf for lr in rates) or len(set(rates)) < len(rates):
        raise OptionError(
            f"compare(): rates: found {rates!r}, expected different learning rates above 0. Write rates=(0.1, 0.03)."
        )
    if not 0 < held_out < 1:
        raise OptionError(
            f"compare(): held_out: found {held_out!r}, expected a share of the training rows between 0 and 1. "
            "Write held_out=0.25."
        )


def _check_methods(methods: Iterable[Method]) -> tuple[Method, ...]:
    methods = tuple(methods)
    names = [method.name for method in methods]
    if not methods or len(set(names)) < len(names):
        raise OptionError(
            f"compare(): methods: found {names!r}, expected at least one, each with a name of its own. "
            "Write methods=STANDARD_METHODS."
        )
    return methods


def _check_make_model(make_model: Any) -> None:
    if isinstance(make_model, nn.Module) or not callable(make_model):
        found = type(make_model).__name__
    else:
        made = make_model()
        if isinstance(made, nn.Module):
            return
        found = f"a function that returns {type(made).__name__}"
    raise OptionError(
        f"compare(): make_model: found {found}, expected a function that returns a new model at each call. "
        "Write make_model=lambda: nn.Linear(4, 2)."
    )


def _as_function(data: Data | MakeData) -> MakeData:
    return data if callable(data) else lambda seed: data


def _check_data(data: Any, name: str) -> Data:
    is_pair = isinstance(data, (tuple, list)) and len(data) == 2 and all(isinstance(part, Tensor) for part in data)
    if not is_pair or data[0].dim() == 0 or data[0].shape[:1] != data[1].shape[:1] or len(data[0]) < 2:
        parts = data if isinstance(data, (tuple, list)) else [data]
        shapes = ", ".join(
            str(tuple(part.shape)) if isinstance(part, Tensor) else type(part).__name__ for part in parts
        )
        raise OptionError(
            f"compare(): {name}: found {shapes}, expected two tensors (inputs, targets) with one example a row, at "
            f"least two. Write {name}=(x, y)."
        )
    return data[0], data[1]
