"""Pretrain the layers of a network one after the other, each on the features of the one below."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import OptionError
from ...untouched import same_random_state
from .rbm import Visible
from .result import Learnt, Pretraining
from .rows import Scale, gather
from .settings import Learner, Method, Settings, kind_of
from .stages import Stage, stages_of

EXAMPLES = 10  # held-out inputs that are restored, for the picture
_TELL_EVERY = 10.0  # seconds
_CHUNK = 1024  # rows that pass a layer at once
_GAIN = 1e-3  # an epoch is better if it leaves this share less unexplained
_BETWEEN_0_AND_1 = (nn.Sigmoid, nn.Hardsigmoid)


def to_stderr(line: str) -> None:
    """Write a line to standard error."""
    sys.stderr.write(f"{line}\n")


def pretrain(
    model: nn.Module | Sequence[nn.Module],
    data: Any,
    method: Method = "rbm",
    *,
    layers: int | None = None,
    epochs: int = 50,
    batch_size: int = 32,
    lr: float | None = None,
    visible: Visible | None = None,
    k: int = 1,
    persistent: bool = False,
    corruption: float = 0.25,
    tied: bool = True,
    held_out: float = 0.1,
    patience: int = 5,
    tell: Callable[[str], object] = to_stderr,
) -> Pretraining:
    """Let the layers learn to describe the data, one after the other and without labels; then train as usual.

    Each layer starts anew and learns from the features of the layer below it: as a restricted Boltzmann machine with
    that layer, or as the encoder of a denoising autoencoder. Weights and biases are written in place, all at the end,
    so optimisers that hold them still do. Nothing else changes: not the layers above, no mode, no gradient. Frozen
    layers are left as they are and read through.

    Args:
        model: An `nn.Sequential`, whose last layer is the head and is left alone; or a list of modules that run one
            after the other, and all learn. Linear layers with their activations; for autoencoders also `nn.Conv2d`,
            with pooling between them.
        data: Inputs as the model takes them: a tensor, a `Dataset` or a `DataLoader`; of a tuple the first. All rows
            are held in memory, and so are the features of one layer.
        method: ``"rbm"`` needs a sigmoid after each layer.
        layers: How many layers learn, from the lowest.
        epochs: For each layer, at most.
        batch_size: Rows in a step.
        lr: Learning rate; by default 0.1 for binary, 0.01 for Gaussian machines (with momentum), a fifth of that for
            persistent chains, 0.003 for autoencoders (Adam).
        visible: What the inputs are: ``"bernoulli"``, between 0 and 1, or ``"gaussian"``, any numbers, which are
            standardised (the layer takes that over, so the model still reads them as they are). By default the first
            if all are between 0 and 1. For the layers above it is told by the activation.
        k: Steps of Gibbs sampling for a gradient. For machines, as is ``persistent``.
        persistent: The chains go on from step to step, instead of starting at the data.
        corruption: For autoencoders: share of the entries of each row that are set to 0. Only while a layer learns.
        tied: For autoencoders: the decoder has the weights of the layer.
        held_out: Share of the rows that nothing learns from; early stopping is by them.
        patience: Stop a layer after so many epochs in which they were not restored better.
        tell: Gets a line about each layer, and one each ten seconds in between.

    Returns:
        What each layer came to; prints as a table, and draws what each can restore.

    Raises:
        OptionError: if an argument cannot be used, or a layer came to nan. Nothing is changed then.

    Cost: for each layer and epoch about one pass of that layer forwards and backwards over the data.

    Source: Hinton, Osindero & Teh 2006; Hinton & Salakhutdinov 2006; Bengio et al. 2007; Vincent et al. 2008.  Ours:
    standardising within the weights, and early stopping by the share of variance that is not restored. For a machine
    that is a substitute: its likelihood cannot be computed.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> x = (torch.rand(200, 1) > 0.5).float().repeat(1, 8)  # eight pixels that are one
        >>> model = nn.Sequential(nn.Linear(8, 4), nn.Sigmoid(), nn.Linear(4, 2))
        >>> done = pretrain(model, x, "rbm", tell=lambda line: None)
        >>> [layer.name for layer in done.layers], done.layers[0].unexplained[-1] < 0.01
        (['0'], True)
    """
    settings = Settings(method, epochs, batch_size, lr, k, persistent, corruption, tied, patience, tell)
    settings.check(visible, held_out)
    stages = stages_of(model, layers, method)
    with torch.no_grad(), _evaluating(stages):
        with same_random_state([]):  # a loader draws; what is learnt is not to depend on how rows came in
            rows = gather(data)
        kind = kind_of(rows, visible)
        _check_fit(stages[0], rows[:1])
        work = _Work(rows, kind, held_out, settings)
        learnt = tuple(work.learn(stage) for stage in stages)
        for stage, weight, bias in work.written:
            stage.layer.weight.copy_(weight)
            if stage.layer.bias is not None:
                stage.layer.bias.copy_(bias)
    return Pretraining(method, learnt, work.examples)


class _Work:
    """The features that the layers have reached, and what was learnt on the way; the model stays as it is."""

    def __init__(self, rows: Tensor, visible: Visible, held_out: float, settings: Settings) -> None:
        self.settings, self.visible, self.features = settings, visible, rows
        order = torch.randperm(len(rows))
        count = min(max(round(held_out * len(rows)), 1), len(rows) - 1) if held_out else 0
        self.learning = order[count:]
        self.judging = order[:count] if count else order
        self.examples = rows[self.judging[:EXAMPLES].to(rows.device)].clone()
        self.written: list[tuple[Stage, Tensor, Tensor]] = []
        self._back: list[Callable[[Tensor], Tensor]] = []  # from features of a layer to those below it, lowest first
        self._can_go_back = True

    def learn(self, stage: Stage) -> Learnt:
        """Let a layer learn from the features below it, and go on to its own."""
        began, below = time.monotonic(), self.features
        weight, bias = stage.layer.weight, stage.layer.bias
        dtype = torch.promote_types(weight.dtype, torch.float32)
        inputs = _in_chunks(stage.read, below).to(weight.device, dtype)
        done = Learnt(stage.name, "")
        if stage.is_frozen:
            self._can_go_back = False
            weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        else:
            done, learner, scale = self._train(stage, inputs)
            weight, bias = scale.into(learner.tensors[0], learner.tensors[1])
            self.written.append((stage, weight, bias))
            self._note_way_back(learner, scale, inputs, below)
        self.features = _in_chunks(lambda rows: stage.respond(rows, weight, bias), inputs)
        self.visible = "bernoulli" if isinstance(stage.activation, _BETWEEN_0_AND_1) else "gaussian"
        done = replace(done, seconds=time.monotonic() - began, restored=self._restored())
        self.settings.tell(f"pretrain(): {done}")
        return done

    def _train(self, stage: Stage, inputs: Tensor) -> tuple[Learnt, Learner, Scale]:
        """Train until the held-out rows are not restored better, and take the best epoch."""
        settings = self.settings
        rows, unseen = (_as_rows(stage, inputs[part.to(inputs.device)]) for part in (self.learning, self.judging))
        scale = Scale.of(rows, stage.layer, self.visible)
        rows, unseen = scale.apply(rows), scale.apply(unseen)
        learner = settings.learner(stage, rows, self.visible)
        shares, best, kept = [_unexplained(learner, unseen)], 0, [tensor.clone() for tensor in learner.tensors]
        told = time.monotonic()
        for epoch in range(settings.epochs):
            for chosen in torch.split(torch.randperm(len(rows)).to(rows.device), settings.batch_size):
                learner.step(rows[chosen], epoch)
            shares.append(_unexplained(learner, unseen))
            if not math.isfinite(shares[-1]):
                raise _diverged(stage, epoch, settings.lr)
            if shares[-1] < shares[best] * (1 - _GAIN):
                best, kept = epoch + 1, [tensor.clone() for tensor in learner.tensors]
            elif min(shares) < 1 and epoch + 1 - best >= settings.patience:
                break
            if time.monotonic() - told > _TELL_EVERY:
                told = time.monotonic()
                settings.tell(f"pretrain(): layer {stage.name!r}: epoch {epoch + 1}, {shares[-1]:.1%} unexplained")
        for tensor, copy in zip(learner.tensors, kept, strict=True):
            tensor.copy_(copy)
        gap = learner.gap(rows[: len(unseen)], unseen)
        return Learnt(stage.name, self.visible, tuple(shares), gap, best), learner, scale

    def _note_way_back(self, learner: Learner, scale: Scale, inputs: Tensor, below: Tensor) -> None:
        """Remember how features of this layer are turned into those below it; pooling cannot be turned back."""
        self._can_go_back &= inputs[0].numel() == below[0].numel()
        like, shape = inputs[:EXAMPLES], below.shape[1:]
        self._back.append(lambda hidden: scale.undo(learner.decode(hidden, like)).reshape(-1, *shape))

    def _restored(self) -> Tensor | None:
        """Return the examples as they are restored from the features that were reached."""
        if not self._can_go_back:
            return None
        restored = self.features[self.judging[:EXAMPLES].to(self.features.device)]
        for step in reversed(self._back):
            restored = step(restored)
        return restored


def _unexplained(learner: Learner, rows: Tensor) -> float:
    """Return the share of the variance of rows that is not restored."""
    error = variance = 0.0
    mean = rows.mean(0)
    for part in torch.split(rows, _CHUNK):
        error += float((learner.reconstruct(part) - part).square().sum())
        variance += float((part - mean).square().sum())
    return error / variance if variance > 0 else error


def _in_chunks(function: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    return torch.cat([function(part) for part in torch.split(rows, _CHUNK)])


def _as_rows(stage: Stage, inputs: Tensor) -> Tensor:
    """Return one example a row; a linear layer reads the last dimension, whatever stands before it."""
    return inputs.flatten(0, -2) if isinstance(stage.layer, nn.Linear) else inputs


@contextmanager
def _evaluating(stages: tuple[Stage, ...]) -> Iterator[None]:
    """Let modules without weights compute as in evaluation, and put their modes back."""
    modules = [module for stage in stages for part in (*stage.before, stage.activation) for module in part.modules()]
    modes = [module.training for module in modules]
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


def _check_fit(stage: Stage, row: Tensor) -> None:
    """Make sure that the lowest layer can read the data."""
    layer = stage.layer
    try:
        inputs = stage.read(row).to(layer.weight.device, layer.weight.dtype)
        stage.project(inputs, layer.weight, layer.bias)
    except RuntimeError as error:
        raise OptionError(
            f"pretrain(): data: found rows of shape {tuple(row.shape[1:])}, expected what layer {stage.name!r} reads "
            f"({error}). Nothing was changed. Hand over inputs as the model takes them."
        ) from error


def _diverged(stage: Stage, epoch: int, lr: float | None) -> OptionError:
    return OptionError(
        f"pretrain(): lr: found {lr or 'the default'} with which layer {stage.name!r} came to nan or infinity in epoch "
        f"{epoch + 1}, expected a rate at which it learns. Nothing was changed. Divide it by 10."
    )
