"""What those that sample a step see: passes that no module hook sees are shown to them, trials are hidden."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol
from weakref import WeakSet

from torch import Tensor

Pass = Callable[[], tuple[Tensor, Sequence[Tensor]]]  # the loss, and the tensors that its gradient is wanted for


class Viewer(Protocol):
    """What samples a step."""

    is_paused: bool  # whether it looks away

    def look(self, compute: Pass, losses: Tensor) -> None:
        """See a forward and a backward pass that are computed for it alone, in the place of that of ``losses``."""


VIEWERS: WeakSet[Viewer] = WeakSet()  # those that sample the step that runs


def show(compute: Pass, losses: Tensor) -> None:
    """Let all that sample this step see a pass; of a step that nobody samples nothing is computed.

    Args:
        compute: Computes the pass, with gradients on, and leaves no trace.
        losses: What was computed unseen, in whose place the loss of the pass stands.
    """
    for viewer in list(VIEWERS):
        viewer.look(compute, losses)


@contextmanager
def unseen() -> Iterator[None]:
    """Hide the calls of modules inside from all that sample this step: they are no training."""
    viewers = list(VIEWERS)
    for viewer in viewers:
        viewer.is_paused = True
    try:
        yield
    finally:
        for viewer in viewers:
            viewer.is_paused = False
