"""Layers whose weights have two or three levels, with real latent weights behind them."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import OptionError

Levels = Literal[2, 3]

_THRESHOLD = 0.7  # of the mean absolute weight; Li et al. 2016


def signs(latent: Tensor) -> Tensor:
    """Return 1 where a number is at least zero, and -1 where it is not.

    Example:
        >>> signs(torch.tensor([-0.5, 0.0, 2.0]))
        tensor([-1.,  1.,  1.])
    """
    return torch.copysign(torch.ones_like(latent), latent + 0.0)  # adding zero turns -0.0 into 0.0


def ternary(latent: Tensor) -> Tensor:
    """Return the sign of the weights that are large in their output, and zero for the others.

    Large: above 0.7 times the mean absolute weight of the output, which is the first axis.

    Source: Li et al. 2016, for a layer as a whole. Ours: each output by its own mean.

    Example:
        >>> ternary(torch.tensor([[-0.5, 0.1, 0.6]]))
        tensor([[-1.,  0.,  1.]])
    """
    threshold = _THRESHOLD * _mean_of_output(latent.abs())
    return torch.where(latent.abs() > threshold, signs(latent), 0.0)


def discrete(latent: Tensor, levels: Levels) -> Tensor:
    """Return the discrete weights of latent ones, without a gradient of use: by `signs` or by `ternary`."""
    return signs(latent) if levels == 2 else ternary(latent)


def discretise(latent: Tensor, levels: Levels = 2, *, is_scaled: bool = False) -> Tensor:
    """Return the discrete weights of latent ones, with a gradient as if they were the latent ones.

    Args:
        latent: Real weights; the first axis is that of the outputs.
        levels: 2: -1 and 1. 3: -1, 0 and 1.
        is_scaled: Multiply the weights of an output by the mean absolute latent weight of those that are not zero.

    Source: the gradient: Courbariaux et al. 2015; scales: Rastegari et al. 2016 for two levels, Li et al. 2016 for
    three.

    Example:
        >>> latent = torch.tensor([[-0.5, 0.1, 0.6]], requires_grad=True)
        >>> discretise(latent).tolist()
        [[-1.0, 1.0, 1.0]]
        >>> (discretise(latent) * torch.tensor([3.0, 4.0, 5.0])).sum().backward()
        >>> latent.grad.tolist()
        [[3.0, 4.0, 5.0]]
    """
    with torch.no_grad():
        values = discrete(latent, levels)
    straight = values + (latent - latent.detach())  # exactly the values: what is added is zero
    if not is_scaled:
        return straight
    taken = values.abs()
    scale = _mean_of_output(latent.abs() * taken) / _mean_of_output(taken).clamp(min=torch.finfo(latent.dtype).tiny)
    return scale * straight


class BinaryLinear(nn.Linear):
    """A linear layer with weights of two or three levels; its parameter ``weight`` holds the latent ones.

    Train it as any layer. The gradient reaches the latent weights as if they were the discrete ones, so those that
    have long been pushed one way grow without any effect: call `clip_latent_` after each step of the optimiser.

    Args:
        in_features: As in `torch.nn.Linear`.
        out_features: As in `torch.nn.Linear`.
        bias: As in `torch.nn.Linear`; it stays real.
        levels: 2: weights -1 and 1. 3: -1, 0 and 1.
        is_scaled: Give each output a scale, the mean absolute latent weight. Without, outputs are large: a batch norm
            should follow.
        device: As in `torch.nn.Linear`.
        dtype: As in `torch.nn.Linear`.

    Raises:
        OptionError: if ``levels`` is neither 2 nor 3.

    Source: as of `discretise`.

    Example:
        >>> layer = BinaryLinear(3, 1, bias=False)
        >>> with torch.no_grad():
        ...     layer.weight[:] = torch.tensor([[0.3, -0.1, 0.2]])
        >>> layer(torch.tensor([10.0, 1.0, 100.0])).tolist()
        [109.0]
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        levels: Levels = 2,
        is_scaled: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.levels = _check_levels("BinaryLinear", levels)
        self.is_scaled = is_scaled

    def forward(self, x: Tensor) -> Tensor:
        """Return what a linear layer with the discrete weights returns."""
        return F.linear(x, discretise(self.weight, self.levels, is_scaled=self.is_scaled), self.bias)

    def extra_repr(self) -> str:
        """Return what is shown beside the name."""
        return f"{super().extra_repr()}, levels={self.levels}, is_scaled={self.is_scaled}"


class BinaryConv2d(nn.Conv2d):
    """A convolution of images with weights of two or three levels; see `BinaryLinear`.

    Args:
        *args: As in `torch.nn.Conv2d`.
        levels: 2: weights -1 and 1. 3: -1, 0 and 1.
        is_scaled: Give each output channel a scale, the mean absolute latent weight.
        **kwargs: As in `torch.nn.Conv2d`.

    Raises:
        OptionError: if ``levels`` is neither 2 nor 3.

    Source: as of `discretise`.

    Example:
        >>> BinaryConv2d(3, 8, kernel_size=3, padding=1)(torch.zeros(1, 3, 5, 5)).shape
        torch.Size([1, 8, 5, 5])
    """

    def __init__(self, *args: Any, levels: Levels = 2, is_scaled: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.levels = _check_levels("BinaryConv2d", levels)
        self.is_scaled = is_scaled

    def forward(self, x: Tensor) -> Tensor:
        """Return what a convolution with the discrete weights returns."""
        weights = discretise(self.weight, self.levels, is_scaled=self.is_scaled)
        return self._conv_forward(x, weights, self.bias)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        """Return what is shown beside the name."""
        plain = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{plain}, levels={self.levels}, is_scaled={self.is_scaled}"


def binary_layers(model: nn.Module) -> dict[str, BinaryLinear | BinaryConv2d]:
    """Return the layers of a model that have discrete weights, by name; a layer that is shared appears once."""
    return {name: each for name, each in model.named_modules() if isinstance(each, (BinaryLinear, BinaryConv2d))}


def latent_levels(model: nn.Module) -> dict[str, Levels]:
    """Return the names of all latent weights of a model, as parameters are named, with their levels."""
    return {f"{name}.weight".removeprefix("."): layer.levels for name, layer in binary_layers(model).items()}


@torch.no_grad()
def clip_latent_(model: nn.Module, limit: float = 1.0) -> None:
    """Cut the latent weights of all binary layers off at ``limit``, so that they can come back. Call it after a step.

    Source: Courbariaux et al. 2015, section 2.4.

    Raises:
        OptionError: if the limit is not above 0.

    Example:
        >>> layer = BinaryLinear(1, 1)
        >>> _ = nn.init.constant_(layer.weight, -7.0)
        >>> clip_latent_(layer)
        >>> layer.weight.item()
        -1.0
    """
    if not limit > 0:
        raise OptionError(f"clip_latent_(): limit: found {limit!r}, expected a number above 0. Write limit=1.0.")
    for layer in binary_layers(model).values():
        layer.weight.clamp_(-limit, limit)


def _mean_of_output(values: Tensor) -> Tensor:
    """Return the mean over all axes but the first, which are kept."""
    return values.flatten(1).mean(1).view(-1, *[1] * (values.dim() - 1))


def _check_levels(where: str, levels: Any) -> Levels:
    if levels not in (2, 3):
        raise OptionError(f"{where}(): levels: found {levels!r}, expected 2 or 3. Write levels=2.")
    return levels  # type: ignore[no-any-return]
