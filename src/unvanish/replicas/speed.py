"""How fast each layer of coupled replicas learns, told apart by what moves it."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..errors import OptionError
from ..layers import is_layer, named_modules, own_parameters
from ..measures import parameter_sample_layout
from ..records import SPEEDS, Speeds
from .coupling import Coupling
from .stack import mean

Write = Callable[[list[nn.Module], int, NDArray[np.float32]], None]
Guard = Callable[[Callable[..., None]], Callable[..., None]]
_LOG = logging.getLogger("unvanish")


class LearningSpeed:
    """Measure, layer by layer, what the optimiser and what the pull did to coupled replicas; used in a ``with``.

    From one pull to the next a replica goes first by the optimiser, then by the pull. In norms over all replicas and
    parameters of a layer, each relative to the weights: ``step_ratio`` and ``pull_ratio`` are the lengths of the two
    ways, ``pull_alignment`` is the cosine between them, ``centre_ratio`` the way of the mean of the replicas relative
    to the mean, ``spread_ratio`` the root mean square distance to it. Only ``centre_ratio`` is learning that the
    replicas share: the pull is mostly merging. Nothing about the training changes.

    Args:
        coupling: The coupling of the replicas.
        every: Measure each so many steps, at the next pull; >= 1.
        write: Gets each measurement, instead of `speeds`: layers, steps done, and (layers, `SPEEDS`).
        guard: Wraps what is done at a pull, so that its failure does not end the training.

    Raises:
        OptionError: if ``every`` is no whole number >= 1.

    Cost: at each measured pull some twenty passes over 1024 evenly spread weights of each parameter and replica, and
    one transfer. Parameters up to that size are measured whole; of larger ones the ratios are estimates, good to a few
    per cent.

    Source: Ours: a pull sums to nothing over the replicas, so a single replica's movement shows no learning.

    Example:
        >>> from .replicas import Replicas
        >>> replicas = Replicas(nn.Linear(1, 1, bias=False), n=2)
        >>> weight = replicas.stacked.weight
        >>> with torch.no_grad():
        ...     weight[:] = torch.tensor([[[2.0]], [[2.0]]])
        >>> coupling = Coupling(replicas, strength=0.5)
        >>> with LearningSpeed(coupling, every=1) as speed, torch.no_grad():
        ...     weight += torch.tensor([[[1.0]], [[3.0]]])  # the optimiser: 3 and 5; then the pull: 3.5 and 4.5
        ...     coupling.step()
        >>> {name: round(float(values[0, 0]), 4) for name, values in speed.speeds.values.items()}
        {'step_ratio': 1.118, 'pull_ratio': 0.25, 'centre_ratio': 1.0, 'pull_alignment': -0.4472, 'spread_ratio': 0.125}
    """

    def __init__(
        self, coupling: Coupling, every: int = 10, *, write: Write | None = None, guard: Guard | None = None
    ) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise OptionError(f"LearningSpeed(): every: found {every!r}, expected a whole number >= 1. Try every=10.")
        self._coupling = coupling
        self._every = every
        self._write = write or self._keep
        guard = guard or self._own_guard
        self.before_pull, self.after_pull = guard(self._before), guard(self._after)
        named = [(name, module) for name, module, _ in named_modules(coupling.replicas) if is_layer(module)]
        self._names = tuple(name or type(module).__name__ for name, module in named)
        self._layers = [module for _, module in named]
        self._rows: dict[int, NDArray[np.float32]] = {}
        self._start: list[list[_Sample]] | None = None  # of each layer, right after the pull before
        self._middle: list[list[_Sample]] | None = None  # right before the pull
        self._measured = -every  # after which step

    def __enter__(self) -> LearningSpeed:
        self._start = self._weights()
        self._coupling.observers.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()

    @property
    def speeds(self) -> Speeds:
        """What was measured."""
        rows = np.array(list(self._rows.values()), dtype=np.float32).reshape(-1, len(self._layers), len(SPEEDS))
        steps = np.array(list(self._rows), dtype=np.int64)
        return Speeds(self._names, steps, {name: rows[:, :, i] for i, name in enumerate(SPEEDS)})

    def _before(self, step: int) -> None:
        if self._start is not None:
            self._middle = self._weights()

    def _after(self, step: int) -> None:
        rows = [i for i in range(self._coupling.replicas.n) if i not in self._coupling.lost]
        if self._start is not None and self._middle is not None:
            parts = zip(self._start, self._middle, self._weights(), strict=True)
            sums = torch.stack([_sums(*layer, rows) for layer in parts])  # (layers, 8)
            self._write(self._layers, step, _ratios(sums.cpu().numpy()))
            self._measured = step
        is_next = step + self._coupling.every - self._measured >= self._every
        self._start, self._middle = self._weights() if is_next else None, None

    def _weights(self) -> list[list[_Sample]]:
        """Return samples of the trained weights of each layer."""
        return [
            [_sample(p.detach()) for _, p in own_parameters(layer) if p.requires_grad and p.numel()]
            for layer in self._layers
        ]

    def _keep(self, layers: list[nn.Module], step: int, rows: NDArray[np.float32]) -> None:
        self._rows[step] = rows

    def _leave(self) -> None:
        self._start = self._middle = None
        if self in self._coupling.observers:
            self._coupling.observers.remove(self)

    def _own_guard(self, callback: Callable[..., None]) -> Callable[..., None]:
        """Switch measuring off if it fails, and say so; the training goes on."""

        @functools.wraps(callback)
        def guarded(*args: Any) -> None:
            try:
                callback(*args)
            except Exception as error:
                self._leave()
                _LOG.warning("measuring learning speed stopped, training goes on: %s: %s", type(error).__name__, error)

        return guarded


class _Sample(NamedTuple):
    """Some weights of a parameter, the same of each replica, and for how many each stands."""

    values: Tensor  # (replicas, weights)
    stands_for: float


def _sample(stacked: Tensor) -> _Sample:
    """Copy evenly spread weights of a stacked parameter, all of them if they are few."""
    size = stacked[0].numel()
    sizes, strides, count = parameter_sample_layout(size, stacked.shape[-1])
    values = stacked.contiguous().as_strided((len(stacked), *sizes), (size, *strides)).flatten(1)
    values = values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
    return _Sample(values.clone(), size / count)


def _sums(start: list[_Sample], middle: list[_Sample], end: list[_Sample], rows: list[int]) -> Tensor:
    """Return the sums of squares and the product that the measures of one layer are made of, over finite replicas."""
    total = torch.zeros(8, dtype=torch.float64, device=start[0].values.device if start else None)
    for samples in zip(start, middle, end, strict=True):
        w0, w1, w2 = (sample.values[rows] for sample in samples)
        by_step, by_pull = w1 - w0, w2 - w1
        c0, c2 = mean(w0), mean(w2)
        pairs = [(w0, w0), (by_step, by_step), (by_pull, by_pull), (by_step, by_pull)]
        pairs += [(c0, c0), (c2 - c0, c2 - c0), (w2 - c2, w2 - c2), (c2, c2)]
        sums = torch.stack([torch.dot(one.flatten(), other.flatten()) for one, other in pairs])
        total += samples[0].stands_for * sums
    total[6] /= max(len(rows), 1)
    return total


def _ratios(sums: NDArray[np.float64]) -> NDArray[np.float32]:
    """Return the measures of each layer; nan where there is nothing to divide by."""
    weights, step, pull, product, centre, centre_way, spread, centre_now = sums.T
    with np.errstate(all="ignore"):
        ratios = (
            np.sqrt(step / weights),
            np.sqrt(pull / weights),
            np.sqrt(centre_way / centre),
            product / np.sqrt(step * pull),
            np.sqrt(spread / centre_now),
        )
    table = np.stack(ratios, axis=1)  # in the order of SPEEDS
    return np.where(np.isfinite(table), table, np.nan).astype(np.float32)
