"""Watch a PyTorch training layer by layer, and learn what is wrong with it.

`diagnose` and what it needs work on a machine without torch; the names that touch a model are loaded
when they are first used.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

from .diagnose import DEFAULT_RULES as DEFAULT_RULES
from .diagnose import diagnose as diagnose
from .diagnose import without as without
from .errors import LayerError as LayerError
from .errors import OptionError as OptionError
from .errors import RecordError as RecordError
from .errors import StaleCacheError as StaleCacheError
from .errors import TargetError as TargetError
from .errors import TreatmentError as TreatmentError
from .errors import UnvanishError as UnvanishError
from .errors import WeightsError as WeightsError
from .records import Finding as Finding
from .records import Findings as Findings
from .records import Layer as Layer
from .records import Recording as Recording
from .records import Trace as Trace
from .trace import read_recording as read_recording
from .version import VERSION as __version__

if TYPE_CHECKING:
    from .check import check as check
    from .replicas import Coupling as Coupling
    from .replicas import Replicas as Replicas
    from .replicas.landscape import landscape as landscape
    from .reuse.cache import cache_features as cache_features
    from .reuse.freeze import freeze_to as freeze_to
    from .reuse.freeze import thaw as thaw
    from .reuse.pretrain import pretrain as pretrain
    from .reuse.weights import load_weights as load_weights
    from .session import Run as Run
    from .session import watch as watch
    from .treat import Changes as Changes
    from .treat import treat as treat
    from .treatments import EarlyStopping as EarlyStopping

_NEEDS_TORCH = {
    "watch": "session",
    "Run": "session",
    "check": "check",
    "EarlyStopping": "treatments",
    "treat": "treat",
    "Changes": "treat",
    "Replicas": "replicas",
    "Coupling": "replicas",
    "landscape": "replicas.landscape",
    "cache_features": "reuse.cache",
    "freeze_to": "reuse.freeze",
    "thaw": "reuse.freeze",
    "pretrain": "reuse.pretrain",
    "load_weights": "reuse.weights",
}

__all__ = [
    "DEFAULT_RULES",
    "Changes",
    "Coupling",
    "EarlyStopping",
    "Finding",
    "Findings",
    "Layer",
    "LayerError",
    "OptionError",
    "RecordError",
    "Recording",
    "Replicas",
    "Run",
    "StaleCacheError",
    "TargetError",
    "Trace",
    "TreatmentError",
    "UnvanishError",
    "WeightsError",
    "__version__",
    "cache_features",
    "check",
    "diagnose",
    "freeze_to",
    "landscape",
    "load_weights",
    "pretrain",
    "read_recording",
    "thaw",
    "treat",
    "watch",
    "without",
]


def __getattr__(name: str) -> Any:
    if name in _NEEDS_TORCH:
        value = getattr(importlib.import_module(f".{_NEEDS_TORCH[name]}", __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _Face(types.ModuleType):
    """The package, where `watch` and `check` stay functions although modules have these names too."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _NEEDS_TORCH and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Face
