"""Pretrain the hidden layers of a network on its inputs, before or while it is trained."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import OptionError, TreatmentError
from ..layers import is_layer
from ..records import Change
from ..reuse.pretrain import pretrain
from ..untouched import same_random_state, untouched
from .treatment import Patient, Steps, Treatment, forgotten, saved_tensors

ROWS = 1000  # inputs to pretrain on
BRIEF = {"epochs": 20, "batch_size": 20}  # for so few rows: some 900 steps a layer
_LOG = logging.getLogger("unvanish")
_CODE = "unvanish.pretrain(model, x_train, method={!r})  # before the first step"
# what may turn the output of one layer into the input of the next; the first that does is taken
_ACTIVATIONS = (
    nn.Sigmoid, nn.Tanh, nn.ReLU, nn.GELU, nn.SiLU, nn.ELU, nn.SELU, nn.LeakyReLU, nn.Mish, nn.Softplus, nn.ReLU6,
    nn.Hardtanh,
)  # fmt: skip


def greedy_pretraining(method: str = "", rows: float = ROWS) -> Treatment:
    """Pretrain the hidden linear layers one after the other, on inputs alone, and let the training go on from there.

    Which layers those are, and with which activations, is told by one forward pass: the lowest layers that run, each
    reading an activation of what the one before it computed. The last one is left alone.

    Inputs are those that are given; where these are fewer than ``rows``, those of the training, from its first batches
    on. Until so many were seen the training is as it was; then, before a forward pass, the layers are pretrained, and
    optimisers forget what they remember of them.

    Args:
        method: ``"rbm"`` or ``"autoencoder"``; by default the first if all activations are sigmoids.
        rows: How many inputs to pretrain on.

    Raises:
        TreatmentError: if a value is none of these.

    Cost: some 900 steps of each layer alone; for twelve layers of 48 units and 1000 rows 2 s of a core.

    Source: Hinton, Osindero & Teh 2006; Bengio et al. 2007; Vincent et al. 2008; see `pretrain`.

    Example:
        >>> import unvanish
        >>> model = nn.Sequential(nn.Linear(8, 4), nn.Sigmoid(), nn.Linear(4, 1))
        >>> with unvanish.treat(model, None, "greedy-pretraining=rbm,100", inputs=(torch.rand(100, 8),)) as changes:
        ...     print(next(iter(changes)).what)
        1 layer pretrained (rbm) on 100 rows
    """
    if method not in ("", "rbm", "autoencoder") or not isinstance(rows, (int, float)) or rows < 2:
        raise TreatmentError(
            f"treat(): 'greedy-pretraining': found {method!r} and {rows!r}, expected 'rbm' or 'autoencoder', and a "
            "number of rows. Nothing was changed. Write 'greedy-pretraining=autoencoder,1000'."
        )

    def apply(patient: Patient) -> Steps:
        chain = _chain(patient)
        chosen = method or ("rbm" if all(type(a) is nn.Sigmoid for a in chain.activations) else "autoencoder")
        work = _Work(patient, chain, chosen, int(rows))
        count = len(chain.layers)
        layers = f"{count} layer{'s' if count > 1 else ''}"
        with saved_tensors(work.parameters), ExitStack() as undo:
            if len(chain.inputs) >= rows:
                undo.enter_context(forgotten(patient.optimizers, work.parameters))
                work.pretrain(chain.inputs)
                what = f"{layers} pretrained ({chosen}) on {len(chain.inputs)} rows"
            else:
                undo.callback(work.wait(undo))
                what = f"{layers} to be pretrained ({chosen}) once {rows:.0f} rows were seen"
            yield Change("greedy-pretraining", what, chain.names, preserves_function=False)

    value = method if rows == ROWS else f"{method},{rows:g}"
    return Treatment("greedy-pretraining", apply, value, code=_CODE.format(method or "rbm"))


@dataclass
class _Chain:
    """The lowest layers of a model that are pretrained, and what the first of them reads."""

    names: tuple[str, ...]
    layers: list[nn.Linear]
    activations: list[nn.Module]
    inputs: Tensor


class _Work:
    """The pretraining of a chain, now or once enough inputs were seen."""

    def __init__(self, patient: Patient, chain: _Chain, method: str, rows: int) -> None:
        self.patient, self.chain, self.method, self.rows = patient, chain, method, rows
        self.parameters = [p for layer in chain.layers for p in layer.parameters()]
        self._seen: list[Tensor] = []

    def pretrain(self, rows: Tensor) -> None:
        """Pretrain on rows of the first layer's inputs.

        Raises:
            TreatmentError: if that cannot be done.
        """
        pairs = zip(self.chain.layers, self.chain.activations, strict=True)
        modules = copy.deepcopy([module for pair in pairs for module in pair])
        try:
            with torch.autocast(rows.device.type, enabled=False):
                pretrain(modules, rows, self.method, **BRIEF, tell=_LOG.info)  # type: ignore[arg-type]  # checked
        except OptionError as error:
            words = str(error).removeprefix("pretrain(): ")
            raise TreatmentError(f"treat(): 'greedy-pretraining': {words}") from error
        learnt = (p for module in modules for p in module.parameters())
        for parameter, new in zip(self.parameters, learnt, strict=True):
            parameter.data.copy_(new)  # not seen by autograd: a backward pass may be due through the old weights

    def wait(self, undo: ExitStack) -> Callable[[], None]:
        """Collect what the first layer reads while the model learns, and pretrain when it is enough."""

        def before(layer: nn.Module, args: tuple[Any, ...]) -> None:
            if not torch.is_grad_enabled() or not self.patient.model.training:
                return
            self._seen.append(_as_rows(args[0]))
            if sum(map(len, self._seen)) < self.rows:
                return
            handle.remove()
            try:
                with same_random_state([self.patient.model]):
                    self.pretrain(torch.cat(self._seen)[: self.rows])
                undo.enter_context(forgotten(self.patient.optimizers, self.parameters))
            except TreatmentError as error:  # a training is not ended by its treatment
                _LOG.warning("%s", error)
            self._seen.clear()

        handle = self.chain.layers[0].register_forward_pre_hook(before)
        return handle.remove


def _as_rows(inputs: Tensor) -> Tensor:
    return inputs.detach().flatten(0, -2).clone()


def _chain(patient: Patient) -> _Chain:
    """Run the batch; return the lowest linear layers of which each next layer reads an activation.

    Raises:
        TreatmentError: if there is no batch, or no such layer.
    """
    if not patient.inputs:
        raise TreatmentError(
            "treat(): 'greedy-pretraining' learns from inputs: found none, expected some. Nothing was changed. "
            "Call treat(model, optimizer, 'greedy-pretraining', inputs=(x_train,))."
        )
    calls = _calls(patient)
    names: list[str] = []
    layers: list[nn.Linear] = []
    activations: list[nn.Module] = []
    for (name, layer, _, output), (_, reader, read, _) in pairwise(calls):
        if type(layer) is not nn.Linear or type(reader) is not nn.Linear or layer in layers:
            break
        activation = next((a for a in (kind() for kind in _ACTIVATIONS) if _gives(a, output, read)), None)
        if activation is None:
            break
        names.append(name)
        layers.append(layer)
        activations.append(activation)
    if not any(layer.weight.requires_grad for layer in layers):
        first = type(calls[0][1]).__name__ if calls else "none"
        raise TreatmentError(
            f"treat(): 'greedy-pretraining': found {first} as the lowest layer and no trained linear layer whose "
            "activation another one reads, expected at least one at the bottom of the network. Nothing was changed."
        )
    return _Chain(tuple(names), layers, activations, _as_rows(calls[0][2]))


def _calls(patient: Patient) -> list[tuple[str, nn.Module, Tensor, Tensor]]:
    """Run the batch without dropout; return each call of a layer with what it read and computed, in order."""
    calls: list[tuple[str, nn.Module, Tensor, Tensor]] = []
    names = {module: name for name, module in patient.model.named_modules()}

    def note(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
            calls.append((names[layer], layer, args[0].detach().clone(), output.detach().clone()))

    with untouched(patient.model), torch.no_grad():
        for module in patient.model.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.eval()
        handles = [m.register_forward_hook(note) for m in patient.model.modules() if is_layer(m)]
        try:
            patient.model(*patient.inputs)
        finally:
            for handle in handles:
                handle.remove()
    return calls


def _gives(activation: nn.Module, output: Tensor, read: Tensor) -> bool:
    """Say whether what the next layer read is the activation of this output."""
    return output.shape == read.shape and torch.allclose(activation(output), read, rtol=1e-3, atol=1e-5)
