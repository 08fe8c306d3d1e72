"""What a weights file holds, whatever its format: layers with their kind, their arrays and what is said of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

Family = Literal["keras", "flax", "onnx", "torch"]


@dataclass(frozen=True)
class ForeignLayer:
    """One layer of a file.

    Args:
        name: As the file has it, parts separated by ``/``.
        kind: What it is called here, whatever its framework calls it: ``Dense``, ``Conv``, ``BatchNorm``... Where the
            file does not tell: ``Kernel``, ``Norm`` or ``Recurrent``, and the layer of the model decides among those
            that this can be; ``Raw``: arrays that are paired by their names alone.
        arrays: By role: ``kernel``, ``bias``, ``gamma``...
        settings: What the file says beside the arrays, such as ``epsilon`` or ``strides``; empty if nothing.
    """

    name: str
    kind: str
    arrays: Mapping[str, Tensor]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def place(self, role: str) -> str:
        """Return the name of an array for the plan."""
        return f"{self.name}/{role}" if self.name else role


@dataclass(frozen=True)
class Foreign:
    """The content of a file.

    Args:
        file: Its name.
        form: Its format in words.
        family: Whose layouts its arrays have.
        layers: With arrays, in the order of the file.
        is_ordered: The order is that in which the layers were made or compute; else only names tell an order.
        is_kind_ordered: So it is among layers of one kind in one holder, and not between kinds.
        slopes: Of the LeakyReLU layers, in order, where the file tells them.
        notes: What the reader has to say.
    """

    file: str
    form: str
    family: Family
    layers: tuple[ForeignLayer, ...]
    is_ordered: bool = False
    is_kind_ordered: bool = False
    slopes: tuple[float, ...] = ()
    notes: tuple[str, ...] = ()
