"""Statistics of batch norms for weights that never trained: those of a mean of models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import OptionError


@torch.no_grad()
def estimate_statistics(model: nn.Module, loader: Iterable[Any]) -> None:
    """Set the running statistics of all batch norms to their mean over the batches of a loader.

    All other modules are in evaluation mode meanwhile; modes are put back.

    Raises:
        OptionError: if there are batch norms and the loader has no batches.

    Source: Wu & Johnson 2021, section 3.1, by the mean over batches of equal size.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return
    modes = [(module, module.training) for module in model.modules()]
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean of all batches
        norm.train()
    is_empty = True
    try:
        for batch in loader:
            is_empty = False
            if isinstance(batch, Mapping):
                model(**batch)
            else:
                model(batch[0] if isinstance(batch, (tuple, list)) else batch)
    finally:
        for module, mode in modes:
            module.training = mode
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    if is_empty:
        raise OptionError(
            "centre(): loader: found no batches, expected some to estimate batch norms from. "
            "Call centre(train_loader), or centre() for averaged statistics."
        )
