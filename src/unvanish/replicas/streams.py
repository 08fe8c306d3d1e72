"""A stream of random numbers for each replica, so that none depends on how many there are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Streams:
    """Random states of n replicas, each started as ``torch.manual_seed`` starts a training alone.

    Args:
        seeds: One whole number a replica.
        device: Where the replicas compute. The generators of the processor and of this device are kept.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self.seeds = list(seeds)
        self.device = device
        self.states = [self._fresh(seed) for seed in self.seeds]

    def move(self, device: torch.device) -> None:
        """Draw on another device from now on, where the streams start anew."""
        if device != self.device:
            self.device = device
            self.states = [[kept[0], *self._fresh(s)[1:]] for kept, s in zip(self.states, self.seeds, strict=True)]

    @contextmanager
    def of(self, i: int) -> Iterator[None]:
        """Draw the numbers of replica ``i`` inside; outside all goes on as if nothing had been drawn."""
        with self._apart():
            self._set(self.states[i])
            try:
                yield
            finally:
                self.states[i] = self._now()

    @contextmanager
    def aside(self, i: int) -> Iterator[None]:
        """Draw what replica ``i`` draws next, and leave its stream where it is."""
        before = self.states[i]
        try:
            with self.of(i):
                yield
        finally:
            self.states[i] = before

    def kept(self, shape: torch.Size, p: float, like: Tensor) -> Tensor:
        """Return what dropout multiplies each replica's tensor with, drawn from its stream."""
        masks = []
        for i in range(len(self.states)):
            with self.of(i):
                masks.append(like.new_empty(shape).bernoulli_(1 - p))
        return torch.stack(masks).div_(1 - p)  # (n, *shape)

    def again(self, compute: Callable[[T], Tensor]) -> Callable[[T], Tensor]:
        """Return a function that draws the same numbers each time, and leaves the streams where they were."""

        def drawing_again(value: T) -> Tensor:
            before = list(self.states)
            try:
                return compute(value)
            finally:
                self.states = before

        return drawing_again

    def state_dict(self) -> dict[str, Tensor]:
        """Return the random states; a resumed run draws on from them."""
        return {f"{i}.{j}": state for i, states in enumerate(self.states) for j, state in enumerate(states)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take back random states."""
        for i, states in enumerate(self.states):
            self.states[i] = [state[f"{i}.{j}"] for j in range(len(states))]

    def _fresh(self, seed: int) -> list[Tensor]:
        with self._apart():
            torch.manual_seed(seed)
            return self._now()

    @contextmanager
    def _apart(self) -> Iterator[None]:
        outside = self._now()
        try:
            yield
        finally:
            self._set(outside)

    def _now(self) -> list[Tensor]:
        states = [torch.get_rng_state()]
        return [*states, torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else states

    def _set(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        if len(states) > 1:
            torch.cuda.set_rng_state(states[1], self.device)
