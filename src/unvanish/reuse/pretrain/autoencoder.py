"""Denoising autoencoders: a layer learns features from which the rows can be told although part of them is hidden."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .rbm import Visible
from .stages import Stage

RATE = 0.003
_BETAS, _EPS = (0.9, 0.999), 1e-8


class Autoencoder:
    """Trains a stage to restore rows of which a share is set to 0.

    ``loss = -log p(x | decode(activation(W x' + c)))`` with x' the row with hidden entries; the decoder is W
    transposed and a bias b, with a sigmoid and cross entropy for rows between 0 and 1, else linear with squared
    errors.

    Args:
        stage: Layer and activation.
        rows: What it will see.
        visible: ``"bernoulli"`` for rows between 0 and 1.
        lr: Learning rate of Adam; None: `RATE`.
        corruption: Share of the entries that are hidden.
        is_tied: The decoder has the weights of the layer; else its own.
        has_bias: Hidden units have a bias.

    Source: Vincent et al. 2008; start: Glorot & Bengio 2010; steps: Kingma & Ba 2015.
    """

    def __init__(
        self, stage: Stage, rows: Tensor, visible: Visible, *,
        lr: float | None = None, corruption: float = 0.25, is_tied: bool = True, has_bias: bool = True,
    ) -> None:  # fmt: skip
        self.stage, self.visible, self.corruption, self.has_bias = stage, visible, corruption, has_bias
        self.lr = RATE if lr is None else lr
        weight = torch.empty(stage.layer.weight.shape, dtype=rows.dtype, device=rows.device)
        torch.nn.init.xavier_uniform_(weight)
        dims = [0, *range(2, rows.dim())]
        mean = rows.mean(dims)  # of each visible unit or channel
        if visible == "bernoulli":
            share = mean.clamp(0.01, 0.99)
            mean = (share / (1 - share)).log()
        own = () if is_tied else (weight.clone(),)
        self.tensors = (weight, torch.zeros_like(weight.flatten(1)[:, 0]), mean, *own)
        self._steps = 0
        self._moments = [(torch.zeros_like(tensor), torch.zeros_like(tensor)) for tensor in self.tensors]

    def step(self, rows: Tensor, epoch: int) -> None:
        """Take one step of Adam on a batch.

        Written out: an optimiser of torch would be met by whatever watches the optimisers of the training.
        """
        with torch.enable_grad():
            leaves = [tensor.detach().requires_grad_() for tensor in self.tensors]
            kept = torch.rand_like(rows) >= self.corruption
            loss = self.loss(rows * kept, rows, leaves)
            slopes = torch.autograd.grad(loss, leaves)
        self._steps += 1
        first, second = (1 - beta**self._steps for beta in _BETAS)
        for place, (tensor, slope, (mean, square)) in enumerate(zip(self.tensors, slopes, self._moments, strict=True)):
            if place == 1 and not self.has_bias:
                continue
            mean.lerp_(slope, 1 - _BETAS[0])
            square.mul_(_BETAS[1]).addcmul_(slope, slope, value=1 - _BETAS[1])
            tensor.addcdiv_(mean, (square / second).sqrt_().add_(_EPS), value=-self.lr / first)

    def loss(self, given: Tensor, wanted: Tensor, tensors: list[Tensor]) -> Tensor:
        """Return the loss of restoring rows from what is given, as a mean over rows."""
        outputs = self._decode(self._encode(given, tensors), wanted, tensors)
        if self.visible == "bernoulli":
            return F.binary_cross_entropy_with_logits(outputs, wanted, reduction="sum") / len(wanted)
        return (outputs - wanted).square().sum() / (2 * len(wanted))

    def reconstruct(self, rows: Tensor) -> Tensor:
        """Return what is restored from the whole rows."""
        return self.decode(self._encode(rows, [*self.tensors]), rows)

    def decode(self, hidden: Tensor, like: Tensor) -> Tensor:
        """Return what is restored from features."""
        outputs = self._decode(hidden, like, [*self.tensors])
        return torch.sigmoid(outputs) if self.visible == "bernoulli" else outputs

    def gap(self, seen: Tensor, held_out: Tensor) -> float:
        """Return nan: an autoencoder has no free energy."""
        return math.nan

    def _encode(self, rows: Tensor, tensors: list[Tensor]) -> Tensor:
        return self.stage.respond(rows, tensors[0], tensors[1])

    def _decode(self, hidden: Tensor, like: Tensor, tensors: list[Tensor]) -> Tensor:
        return self.stage.project_back(hidden, tensors[3] if len(tensors) > 3 else tensors[0], like, tensors[2])
