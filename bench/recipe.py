"""Run a script with what is often advised without looking: Adam at 1e-3, standardised inputs, He's initialisation.

python bench/recipe.py SCRIPT
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from unvanish.inject import Injection
from unvanish.launch import run_target
from unvanish.treatments import parse_treatment

RATE = 1e-3


class Recipe(torch.optim.Adam):
    """Adam at one rate, whatever else was asked for."""

    def __init__(self, params: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(params, lr=RATE)


def main() -> int:
    for name, kind in list(vars(torch.optim).items()):
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer:
            setattr(torch.optim, name, Recipe)
    injection = Injection([parse_treatment("standardise-inputs"), parse_treatment("he-init")])
    injection.attach()
    return run_target(sys.argv[1], sys.argv[2:], is_module=False).status


if __name__ == "__main__":
    sys.exit(main())
