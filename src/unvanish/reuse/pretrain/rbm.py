"""Restricted Boltzmann machines: energies, conditionals, gradients of the likelihood, and learning by contrast."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Visible = Literal["bernoulli", "gaussian"]

MOMENTUM, FIRST_MOMENTUM, FIRST_EPOCHS = 0.9, 0.5, 5
WEIGHT_DECAY = 1e-4
START = 0.01  # standard deviation of the first weights
RATES = {"bernoulli": 0.1, "gaussian": 0.01}
PERSISTENT_RATES = {"bernoulli": 0.02, "gaussian": 0.002}  # a chain has to follow the weights


@dataclass
class Rbm:
    """A restricted Boltzmann machine: binary hidden units h, and visible units v that are binary or Gaussian.

    ``p(v, h) = exp(-E(v, h)) / Z`` with ``E = -b.v - c.h - h.Wv`` for binary v, and
    ``E = |v - b|**2 / 2 - c.h - h.Wv`` for Gaussian v of variance 1.

    Args:
        weight: W, (hidden, visible), as `nn.Linear` has it.
        hidden_bias: c, (hidden,).
        visible_bias: b, (visible,).
        visible: Kind of the visible units.

    Source: Hinton 2002; Hinton & Salakhutdinov 2006 (Gaussian units).

    Example:
        >>> rbm = Rbm(torch.zeros(2, 3), torch.zeros(2), torch.zeros(3))
        >>> rbm.hidden(torch.ones(1, 3))
        tensor([[0.5000, 0.5000]])
    """

    weight: Tensor
    hidden_bias: Tensor
    visible_bias: Tensor
    visible: Visible = "bernoulli"

    def hidden(self, v: Tensor) -> Tensor:
        """Return the probabilities of the hidden units: ``p(h = 1 | v)``."""
        return torch.sigmoid(F.linear(v, self.weight, self.hidden_bias))

    def mean_visible(self, h: Tensor) -> Tensor:
        """Return the mean of the visible units: ``E(v | h)``."""
        mean = F.linear(h, self.weight.t(), self.visible_bias)
        return torch.sigmoid(mean) if self.visible == "bernoulli" else mean

    def sample_visible(self, h: Tensor) -> Tensor:
        """Draw visible units: from ``p(v | h)``."""
        mean = self.mean_visible(h)
        return draw_bits(mean) if self.visible == "bernoulli" else mean + torch.randn_like(mean)

    def free_energy(self, v: Tensor) -> Tensor:
        """Return ``F(v) = -log sum_h exp(-E(v, h))``, a number a row; ``p(v) = exp(-F(v)) / Z``."""
        rest = F.softplus(F.linear(v, self.weight, self.hidden_bias)).sum(1)
        if self.visible == "bernoulli":
            return -v @ self.visible_bias - rest
        return (v - self.visible_bias).square().sum(1) / 2 - rest

    def gibbs(self, v: Tensor, k: int) -> Tensor:
        """Draw hidden and visible units in turn, k times."""
        for _ in range(k):
            v = self.sample_visible(draw_bits(self.hidden(v)))
        return v

    def gradient(self, seen: Tensor, dreamt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradient of the mean log likelihood of rows, for weight, hidden and visible bias.

        It is exact if ``dreamt`` is drawn from the machine itself: the gradient of the mean free energy of what is
        dreamt minus that of what is seen.

        Source: Hinton 2002, equation 5.
        """
        weight, hidden, visible = self._statistics(seen)
        for total, part in zip((weight, hidden, visible), self._statistics(dreamt), strict=True):
            total.sub_(part)
        return weight, hidden, visible

    def _statistics(self, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the mean of minus the derivatives of the free energy."""
        h = self.hidden(v)
        centre = self.visible_bias if self.visible == "gaussian" else 0.0
        return h.t() @ v / len(v), h.mean(0), (v - centre).mean(0)

    def pseudo_likelihood(self, v: Tensor, bits: Tensor) -> Tensor:
        """Return ``log p(v_i | all others)`` for binary v, with i a bit for each row.

        Its mean over random bits, times their number, is the pseudo-likelihood.
        """
        flipped = v.clone()
        rows = torch.arange(len(v), device=v.device)
        flipped[rows, bits] = 1 - flipped[rows, bits]
        return F.logsigmoid(self.free_energy(flipped) - self.free_energy(v))


def draw_bits(chances: Tensor) -> Tensor:
    """Return bits that are 1 with these chances; 0 for nan, which `torch.bernoulli` would not survive on a GPU."""
    return (torch.rand_like(chances) < chances).to(chances.dtype)


class RbmLearner:
    """Trains a machine by contrastive divergence, with momentum.

    Rows of bits are held against bits that the machine draws: so the mean step goes to the gradient of the likelihood
    as k grows. Rows of chances, such as the features of a layer below, and Gaussian rows are held against the means
    that the machine restores in the last step of the chain: they vary less than samples do, and held against samples
    the weights would shrink to 0. Persistent chains are samples; there bits are drawn from chances.

    Args:
        rows: What it will see; the visible bias starts from their mean.
        hidden: Number of hidden units.
        visible: Kind of the visible units.
        lr: Learning rate; None: `RATES`, or `PERSISTENT_RATES`.
        k: Steps of the chain.
        is_persistent: The chain goes on where it was, instead of starting at the rows of the batch.
        has_bias: Hidden units have a bias.

    Source: Hinton 2002 (contrastive divergence); Tieleman 2008 (persistent chains); Hinton 2012 (start, momentum,
    weight decay, sampled hidden units, probabilities in the statistics, means of visible units).  Ours: when which.
    """

    def __init__(
        self, rows: Tensor, hidden: int, visible: Visible, *,
        lr: float | None = None, k: int = 1, is_persistent: bool = False, has_bias: bool = True,
    ) -> None:  # fmt: skip
        mean = rows.mean(0)
        if visible == "bernoulli":
            share = mean.clamp(START, 1 - START)
            mean = (share / (1 - share)).log()
        weight = START * torch.randn(hidden, rows.shape[1], dtype=rows.dtype, device=rows.device)
        self.rbm = Rbm(weight, torch.zeros_like(weight[:, 0]), mean, visible)
        self.lr = (PERSISTENT_RATES if is_persistent else RATES)[visible] if lr is None else lr
        self.are_bits = visible == "bernoulli" and bool(((rows == 0) | (rows == 1)).all())
        self.k, self.is_persistent, self.has_bias = k, is_persistent, has_bias
        self._speeds = [torch.zeros_like(tensor) for tensor in self.tensors]
        self._chain: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return weight, hidden bias and visible bias, which learn in place."""
        return self.rbm.weight, self.rbm.hidden_bias, self.rbm.visible_bias

    def step(self, rows: Tensor, epoch: int) -> None:
        """Take one step on a batch."""
        if self.is_persistent and self.rbm.visible == "bernoulli":
            rows = draw_bits(rows)
        gradient = self.rbm.gradient(rows, self._dream(rows))
        gradient[0].sub_(self.rbm.weight, alpha=WEIGHT_DECAY)
        if not self.has_bias:
            gradient[1].zero_()
        momentum = FIRST_MOMENTUM if epoch < FIRST_EPOCHS else MOMENTUM
        for tensor, speed, slope in zip(self.tensors, self._speeds, gradient, strict=True):
            speed.mul_(momentum).add_(slope, alpha=self.lr)
            tensor.add_(speed)

    def _dream(self, rows: Tensor) -> Tensor:
        if self.is_persistent:
            self._chain = self.rbm.gibbs(rows if self._chain is None else self._chain, self.k)
            return self._chain
        if self.are_bits:
            return self.rbm.gibbs(rows, self.k)
        last = self.rbm.gibbs(rows, self.k - 1)
        return self.rbm.mean_visible(draw_bits(self.rbm.hidden(last)))

    def reconstruct(self, rows: Tensor) -> Tensor:
        """Return the visible means for the hidden probabilities of rows."""
        return self.rbm.mean_visible(self.rbm.hidden(rows))

    def decode(self, hidden: Tensor, like: Tensor) -> Tensor:
        """Return the visible means for hidden probabilities."""
        return self.rbm.mean_visible(hidden)

    def gap(self, seen: Tensor, held_out: Tensor) -> float:
        """Return how much higher the free energy of held-out rows is, in nats: it grows as rows are learnt by heart.

        Source: Hinton 2012, section 6.
        """
        found = float(self.rbm.free_energy(held_out).mean() - self.rbm.free_energy(seen).mean())
        return found if math.isfinite(found) else math.nan
