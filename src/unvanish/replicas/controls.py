"""Ways to train that are compared at equal cost: replicas, and what may explain a gain of theirs.

Each way gets the same `Job` and uses each of its batches for one gradient, whatever it makes of them. So all ways cost
the same number of gradient evaluations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, update_bn

from .backends import LossFn
from .coupling import Coupling
from .forces import Force
from .replicas import Replicas
from .schedules import Strength

MakeOptimizer = Callable[[Iterable[nn.Parameter], float], torch.optim.Optimizer]
Predict = Callable[[Tensor], Tensor]

_ONE = "one network"
_UNION = "one network, batch x n"
_UNION_FROM_MEAN = "one network, batch x n, start / sqrt n"
_INDEPENDENT = "n independent networks"

_SWA_SHARE = 0.25  # of the steps, the last ones: Izmailov et al. 2018 average over the last quarter of the budget


@dataclass(frozen=True)
class Job:
    """One training to be done: where it starts, what it sees in which order, and how large its steps are.

    Args:
        starts: n models, drawn one after the other; a single network starts as the first. They may be changed.
        loss_fn: Function of an output and targets; returns the mean over the batch.
        x: Inputs, one a row.
        y: Targets, one a row.
        batches: Numbers of rows, (steps, batch): each row of this table is the cost of one gradient.
        optimizer: Makes an optimiser from parameters and a learning rate.
        lr: The learning rate, from which it falls to zero on a cosine.
        read: What a prediction is: taken from an output before any mean over networks.
    """

    starts: tuple[nn.Module, ...]
    loss_fn: LossFn
    x: Tensor
    y: Tensor
    batches: Tensor
    optimizer: MakeOptimizer
    lr: float
    read: Callable[[Any], Tensor]

    @property
    def rounds(self) -> Tensor:
        """The batches dealt to n replicas in turn: (steps / n, n, batch)."""
        return self.batches.view(-1, len(self.starts), self.batches.shape[1])

    def inputs(self) -> list[Tensor]:
        """Return the inputs once through, to estimate batch norms from."""
        return list(torch.split(self.x, self.batches.shape[1]))


@dataclass(frozen=True)
class Method:
    """A named way to train.

    Args:
        name: What it is called in the table.
        fit: Function of a `Job`: trains, and returns functions from inputs to predictions, by the name of the readout.
        against: For a readout the row of the table that is its matched control.
    """

    name: str
    fit: Callable[[Job], Mapping[str, Predict]]
    against: Mapping[str, str] = field(default_factory=dict)


def coupled(
    init: Literal["shared", "separate"],
    strength: Strength = 0.01,
    every: int = 1,
    force: Force | None = "elastic",
    *,
    name: str | None = None,
) -> Method:
    """Return coupled replicas as a `Method`, with the controls that match their start.

    Args:
        init: As in `Replicas`; separate starts are drawn by the ``make_model`` of `compare`.
        strength: As in `Coupling`.
        every: As in `Coupling`.
        force: As in `Coupling`.
        name: What it is called; by default what it is.

    Example:
        >>> method = coupled("separate", strength=1.0, force="tanh")
        >>> method.name, method.against["centre"]
        ('replicas, separate, tanh 1', 'one network, batch x n, start / sqrt n')
    """
    if name is None:
        amount = f"{strength:g}" if isinstance(strength, (int, float)) else "by schedule"
        pull = "uncoupled" if force is None else f"{force} {amount}" + (f" every {every}" if every > 1 else "")
        name = f"replicas, {init}, {pull}"
    controls = (_UNION, _UNION) if init == "shared" else (_UNION_FROM_MEAN, _INDEPENDENT)
    fit = partial(train_replicas, init=init, strength=strength, every=every, force=force)
    return Method(name, fit, dict(zip(("centre", "ensemble"), controls, strict=True)))


def train_one(job: Job, *, is_union: bool = False, start: Literal["first", "mean"] = "first") -> dict[str, Predict]:
    """Train one network, on single batches or on the union of those of n replicas.

    A start at the mean of n drawn networks has their initial scale, divided by the root of n.
    """
    model = job.starts[0] if start == "first" else Replicas(job.starts[0], len(job.starts), _start(job)).centre()
    batches = job.rounds.flatten(1) if is_union else job.batches
    _train(job, model.parameters(), batches, _plain_gradient(model, job.loss_fn))
    return {"": _predictor(model, job)}


def train_replicas(
    job: Job,
    *,
    init: Literal["shared", "separate"],
    strength: Strength = 0.0,
    every: int = 1,
    force: Force | None = "elastic",
    readouts: tuple[Literal["centre", "ensemble"], ...] = ("centre", "ensemble"),
) -> dict[str, Predict]:
    """Train n replicas, each on its share of the batches."""
    start: Any = _start(job) if init == "separate" else "shared"
    replicas = Replicas(job.starts[0], len(job.starts), start, backend="loop")  # so that a table comes out the same
    coupling = Coupling(replicas, strength, every, force)

    def gradient(x: Tensor, y: Tensor) -> None:
        replicas.loss(job.loss_fn, x, y, batches="separate").backward()  # type: ignore[no-untyped-call]

    _train(job, replicas.parameters(), job.rounds, gradient, after=lambda step: coupling.step())
    predict: dict[str, Predict] = {
        "centre": _predictor(replicas.centre(job.inputs()), job),
        "ensemble": partial(replicas.predict, how="ensemble", read=job.read),
    }
    return {how if len(readouts) > 1 else "": predict[how] for how in readouts}


def train_swa(job: Job) -> dict[str, Predict]:
    """Train one network at a constant rate, and take the mean of its weights over the last quarter of the steps.

    Source: Izmailov et al. 2018, algorithm 1, with a constant rate; its mean by ``torch.optim.swa_utils``.
    """
    model = job.starts[0]
    average = AveragedModel(model)
    first = len(job.batches) - max(int(_SWA_SHARE * len(job.batches)), 1)

    def after(step: int) -> None:
        if step >= first:
            average.update_parameters(model)

    gradient = _plain_gradient(model, job.loss_fn)
    _train(job, model.parameters(), job.batches, gradient, after=after, schedule=lambda done: 1.0)
    update_bn(job.inputs(), average)
    return {"": _predictor(average, job)}


def train_sam(job: Job, *, rho: float = 0.05) -> dict[str, Predict]:
    """Train one network by sharpness-aware minimisation, in half the steps: each costs two gradients.

    Source: Foret et al. 2021, with their radius ``rho`` for images.
    """
    model = job.starts[0]
    batches = job.batches[: len(job.batches) // 2]
    _train(job, model.parameters(), batches, sharpness_aware_gradient(model, job.loss_fn, rho))
    return {"": _predictor(model, job)}


def sharpness_aware_gradient(model: nn.Module, loss_fn: LossFn, rho: float) -> Callable[[Tensor, Tensor], None]:
    """Return a function of a batch that leaves the gradient at ``w + rho g / |g|`` in ``.grad``, and w as it was.

    Batch norms keep the statistics of the first of the two passes.

    Source: Foret et al. 2021, algorithm 1, equations 2 and 3.
    """
    plain = _plain_gradient(model, loss_fn)

    def gradient(x: Tensor, y: Tensor) -> None:
        plain(x, y)
        weights = [p for p in model.parameters() if p.grad is not None]
        before = [(tensor, tensor.detach().clone()) for tensor in (*weights, *model.buffers())]
        grads = [p.grad for p in weights if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(grad) for grad in grads]))
        with torch.no_grad():
            for p, grad in zip(weights, grads, strict=True):
                p.add_(grad * (rho / norm.clamp_min(torch.finfo(norm.dtype).tiny)))
                p.grad = None
        plain(x, y)
        with torch.no_grad():
            for tensor, value in before:
                tensor.copy_(value)

    return gradient


def _plain_gradient(model: nn.Module, loss_fn: LossFn) -> Callable[[Tensor, Tensor], None]:
    def gradient(x: Tensor, y: Tensor) -> None:
        loss_fn(model(x), y).backward()  # type: ignore[no-untyped-call]

    return gradient


def _cosine(done: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * done))


def _train(
    job: Job,
    parameters: Iterable[nn.Parameter],
    batches: Tensor,
    gradient: Callable[[Tensor, Tensor], None],
    after: Callable[[int], None] = lambda step: None,
    schedule: Callable[[float], float] = _cosine,
) -> None:
    """Make one step of the optimiser for each entry of ``batches``."""
    optimizer = job.optimizer(parameters, job.lr)
    rates = LambdaLR(optimizer, lambda step: schedule(step / len(batches)))
    for step, rows in enumerate(batches):
        optimizer.zero_grad()
        gradient(job.x[rows], job.y[rows])
        optimizer.step()
        after(step)
        rates.step()


def _start(job: Job) -> Callable[[int], nn.Module]:
    return lambda i: job.starts[i]


def _predictor(model: nn.Module, job: Job) -> Predict:
    @torch.no_grad()
    def predict(x: Tensor) -> Tensor:
        return job.read(model.eval()(x))

    return predict


STANDARD_METHODS = (
    Method(_ONE, train_one),
    Method(_UNION, partial(train_one, is_union=True), {"": _ONE}),
    Method(_UNION_FROM_MEAN, partial(train_one, is_union=True, start="mean"), {"": _UNION}),
    Method(_INDEPENDENT, partial(train_replicas, init="separate", force=None, readouts=("ensemble",)), {"": _ONE}),
    Method("SWA", train_swa, {"": _ONE}),
    Method("SAM", train_sam, {"": _ONE}),
    coupled("shared", force=None),
    coupled("shared"),
    coupled("shared", strength=1.0, force="tanh"),
    coupled("separate", strength=1.0, force="tanh"),
)
"""What `compare` trains by itself. The rule of tanh at strength 1 is the one that this project grew from."""
