"""The pull between replicas whose weights have few levels: towards the mean of a centre with such weights too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..errors import OptionError

Form = Literal["simple", "corrected", "hard"]


def kick(weights: Tensor, gamma: float, form: Form = "simple", *, levels: int = 2) -> Tensor:
    """Return the force on each replica's latent weights, from the discrete weights of all.

    The centre has discrete weights as the replicas have, and is summed out; what is left of it is its mean ``m``, a
    function of the sum of the replicas. ``simple``: ``m(sum_b W_b) - W_a``; with two levels ``m`` is
    ``tanh(gamma sum_b W_b)``. At a small gamma this pulls all weights towards zero, so that they change their sign
    easily; at a large one it pulls them to the majority: hence gamma is raised during training, which is called
    scoping. ``corrected``: ``m(sum_b W_b) - m(n W_a)``, nothing where all agree. ``hard``: ``simple``, with
    ``m = gamma sum_b W_b`` cut off at -1 and 1.

    Args:
        weights: Discrete weights of all replicas, along the first axis: -1 and 1, or -1, 0 and 1.
        gamma: How close the replicas are tied to the centre, above 0.
        form: ``"simple"``, ``"corrected"`` or ``"hard"``.
        levels: 2 or 3: which centre is summed out.

    Raises:
        OptionError: if an argument cannot be used.

    Source: Baldassi et al. 2016, appendix C; simple, corrected: equations C7, C9. Ours: three levels, by the same sum.

    Example:
        >>> kick(torch.tensor([[1.0], [1.0], [-1.0]]), gamma=0.5).flatten()  # tanh(0.5) is 0.4621
        tensor([-0.5379, -0.5379,  1.4621])
    """
    check_kick("kick", gamma, form)
    total = weights.sum(0)
    if form == "hard":
        return (gamma * total).clamp_(-1, 1) - weights
    n = len(weights)
    mean = _mean_of_centre(total, gamma, n, levels)
    return mean - (_mean_of_centre(n * weights, gamma, n, levels) if form == "corrected" else weights)


def _mean_of_centre(total: Tensor, gamma: float, n: int, levels: int) -> Tensor:
    """Return the mean of a discrete c with probabilities as exp(-gamma/2 sum_b (W_b - c)^2), given the sum of W."""
    if levels == 2:
        return torch.tanh(gamma * total)
    # e^(gamma S c - gamma n c^2 / 2) for c = -1, 0, 1; softmax keeps it finite
    logits = torch.stack([-gamma * total, torch.full_like(total, gamma * n / 2), gamma * total])
    shares = logits.softmax(0)
    return shares[2] - shares[0]


def additive(start: float, step: float) -> Callable[[int], float]:
    """Return a gamma that starts at ``start`` and grows by ``step`` with each epoch (or whatever is counted).

    Raises:
        OptionError: if ``start`` is not above 0, or ``step`` is below 0.

    Example:
        >>> gamma = additive(0.05, 0.001)
        >>> [round(gamma(epoch), 3) for epoch in (0, 10, 100)]
        [0.05, 0.06, 0.15]
    """
    if not (start > 0 and step >= 0):
        raise OptionError(
            f"additive(): found start {start!r} and step {step!r}, expected a start above 0 and a step from 0 on. "
            "Write additive(0.05, 0.001)."
        )
    return lambda count: start + step * count


def check_kick(where: str, gamma: Any, form: Any) -> None:
    """Make sure that gamma and form can be used.

    Raises:
        OptionError: if not.
    """
    if not gamma > 0:
        raise OptionError(f"{where}(): gamma: found {gamma!r}, expected a number above 0. Write gamma=0.05.")
    if form not in get_args(Form):
        raise OptionError(
            f"{where}(): form: found {form!r}, expected 'simple', 'corrected' or 'hard'. Write form='simple'."
        )
