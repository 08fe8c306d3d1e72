"""One step of a rule: which arrays of a layer become which of its tensors, and how."""

from __future__ import annotations

from dataclasses import dataclass

from ...errors import WeightsError
from .foreign import ForeignLayer
from .operations import Operation
from .targets import Target


@dataclass(frozen=True)
class Move:
    """Which arrays become which tensors.

    Args:
        sources: Roles in the layer of the file; none: the tensors are constants.
        targets: Names in the module.
        operations: Between the two, in order.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    operations: tuple[Operation, ...]


def refuse(source: ForeignLayer, target: Target, what: str, advice: str) -> WeightsError:
    """Return the error that a pair of layers cannot be loaded, in its four parts."""
    return WeightsError(f"load_weights(): {target.name!r} from {source.name!r}: {what}. {advice}")
