"""Many copies of one network, trained side by side, and what pulls them together."""

from __future__ import annotations

from .coupling import Coupling as Coupling
from .coupling import exponential as exponential
from .replicas import Replicas as Replicas

__all__ = ["Coupling", "Replicas", "exponential"]
