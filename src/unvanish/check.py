"""Look at a model before it trains: one forward and one backward pass on one batch."""

from __future__ import annotations

from .records import Findings


def check(*arguments: object) -> Findings:
    """Return what is wrong with a model before it trains."""
    raise NotImplementedError
