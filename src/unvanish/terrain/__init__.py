"""How the minima of replicas lie to each other, in numbers: what `unvanish.landscape` returns; no torch."""

from __future__ import annotations

from .record import FILE_NAME as FILE_NAME
from .record import Curvature as Curvature
from .record import Energy as Energy
from .record import Entropy as Entropy
from .record import Landscape as Landscape
from .record import LayerRow as LayerRow
from .record import Path as Path
from .record import Place as Place
from .record import read_landscape as read_landscape

__all__ = [
    "FILE_NAME",
    "Curvature",
    "Energy",
    "Entropy",
    "Landscape",
    "LayerRow",
    "Path",
    "Place",
    "read_landscape",
]
