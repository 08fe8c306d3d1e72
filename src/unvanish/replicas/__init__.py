"""Many copies of one network, trained side by side, and what pulls them together."""

from __future__ import annotations

from .compare import compare as compare
from .comparison import Comparison as Comparison
from .controls import STANDARD_METHODS as STANDARD_METHODS
from .controls import Method as Method
from .controls import coupled as coupled
from .coupling import Coupling as Coupling
from .replicas import Replicas as Replicas
from .schedules import Automatic as Automatic
from .schedules import exponential as exponential

__all__ = [
    "STANDARD_METHODS",
    "Automatic",
    "Comparison",
    "Coupling",
    "Method",
    "Replicas",
    "compare",
    "coupled",
    "exponential",
]
