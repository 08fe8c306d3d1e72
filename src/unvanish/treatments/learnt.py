"""Start from what is learnt already: layers that were pretrained on the inputs, or the weights of another training."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import OptionError, TreatmentError
from ..layers import clean_name, is_layer
from ..records import Change
from ..reuse.pretrain import pretrain
from ..untouched import same_random_state, untouched
from .treatment import Patient, Steps, Treatment, saved_tensors

ROWS = 1000  # inputs to pretrain on
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
        modules = [m for pair in zip(self.chain.layers, self.chain.activations, strict=True) for m in pair]
        log = logging.getLogger("unvanish")
        try:
            with torch.autocast(rows.device.type, enabled=False):
                pretrain(modules, rows.float(), self.method, tell=log.info)  # type: ignore[arg-type]  # checked
        except OptionError as error:
            words = str(error).removeprefix("pretrain(): ")
            raise TreatmentError(f"treat(): 'greedy-pretraining': {words}") from error

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
                logging.getLogger("unvanish").warning("%s", error)
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
    chain = _Chain((), [], [], torch.empty(0))
    for (name, layer, inputs, output), (_, reader, read, _) in pairwise(calls):
        if type(layer) is not nn.Linear or type(reader) is not nn.Linear or layer in chain.layers:
            break
        activation = next((a for a in (kind() for kind in _ACTIVATIONS) if _gives(a, output, read)), None)
        if activation is None:
            break
        if not chain.layers:
            chain.inputs = _as_rows(inputs)
        chain = _Chain((*chain.names, name), [*chain.layers, layer], [*chain.activations, activation], chain.inputs)
    if not any(layer.weight.requires_grad for layer in chain.layers):
        first = type(calls[0][1]).__name__ if calls else "none"
        raise TreatmentError(
            f"treat(): 'greedy-pretraining': found {first} as the lowest layer and no trained linear layer whose "
            "activation another one reads, expected at least one at the bottom of the network. Nothing was changed."
        )
    return chain


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


def transfer(*file: str) -> Treatment:
    """Fill the lowest layers with the weights of another training, by name.

    From the first layer on, each is filled whose parameters and buffers are all in the file, with their names and
    shapes; at the first that is not it ends. So a new head stays as it is, and nothing above a changed layer is taken.

    Args:
        file: ``.safetensors``, or what ``torch.save(model.state_dict(), file)`` wrote. Others are for
            `load_weights`.

    Source: Yosinski et al. 2014.

    Example:
        >>> import tempfile, unvanish
        >>> old = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 9))
        >>> new = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> file = f"{tempfile.mkdtemp()}/old.pt"
        >>> torch.save(old.state_dict(), file)
        >>> with unvanish.treat(new, None, f"transfer={file}") as changes:
        ...     print(next(iter(changes)).what)
        1 of 2 layers filled from old.pt, up to '0'
    """
    path = ",".join(str(part) for part in file)

    def apply(patient: Patient) -> Steps:
        given, layers = _read(path), _tensors_of_layers(patient.model)
        filled: list[tuple[Tensor, Tensor]] = []
        names: list[str] = []
        problem = ""
        for name, wanted in layers:
            problem = next(filter(None, (_problem(key, tensor, given) for key, tensor in wanted.items())), "")
            if problem:
                break
            filled += [(tensor, given[key]) for key, tensor in wanted.items()]
            names.append(name)
        if not filled:
            raise TreatmentError(
                f"treat(): 'transfer': file {path!r}: found {problem or 'no layer to fill'}, expected the weights "
                "of at least the lowest layer, by name. Nothing was changed. For other names or frameworks use "
                "unvanish.load_weights."
            )
        tensors = [tensor for tensor, _ in filled]
        with saved_tensors(tensors), forgotten(patient.optimizers, tensors):
            with torch.no_grad():
                for tensor, source in filled:
                    tensor.copy_(source)
            what = f"{len(names)} of {len(layers)} layers filled from {Path(path).name}, up to {names[-1]!r}"
            yield Change("transfer", what, tuple(names), preserves_function=False)

    code = f"model.load_state_dict(torch.load({path!r}, weights_only=True), strict=False)  # all but the head"
    return Treatment("transfer", apply, path, code=code)


def _tensors_of_layers(model: nn.Module) -> list[tuple[str, dict[str, Tensor]]]:
    """Return each module that has weights or states of its own, with those by the names that a file has."""
    found = []
    for name, module in model.named_modules():
        states = {k: b for k, b in module._buffers.items() if k not in module._non_persistent_buffers_set}
        own = {**module._parameters, **states}.items()
        tensors = {clean_name(f"{name}.{key}").lstrip("."): tensor for key, tensor in own if tensor is not None}
        if tensors:
            found.append((clean_name(name), tensors))
    return found


def _problem(key: str, tensor: Tensor, given: dict[str, Tensor]) -> str:
    """Say why a tensor cannot be filled; empty if it can."""
    if key not in given:
        return f"no {key!r}"
    if given[key].shape != tensor.shape:
        return f"{key!r} of shape {tuple(given[key].shape)} where {tuple(tensor.shape)} is needed"
    return ""


def _read(path: str) -> dict[str, Tensor]:
    """Return the tensors of a file by name, without running anything that it names.

    Raises:
        TreatmentError: if it is no such file.
    """
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file

            found: Any = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # parsers raise whatever they meet
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
        raise TreatmentError(
            f"treat(): 'transfer': file {path!r}: found {reason}, expected a file of weights, .safetensors or .pt. "
            "Nothing was changed. Write transfer=old.pt, saved by torch.save(model.state_dict(), 'old.pt')."
        ) from error
    for key in ("state_dict", "model", "model_state_dict"):  # a checkpoint that holds more than weights
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    tensors = found.items() if isinstance(found, dict) else ()
    return {clean_name(str(key)): value for key, value in tensors if isinstance(value, Tensor)}


@contextmanager
def forgotten(optimizers: Iterable[torch.optim.Optimizer], tensors: Iterable[Tensor]) -> Iterator[None]:
    """Let optimisers forget what they remember of tensors whose values are new; leaving brings it back."""
    kept = []
    for optimizer in optimizers:
        for tensor in tensors:
            if tensor in optimizer.state:
                kept.append((optimizer, tensor, optimizer.state.pop(tensor)))
    try:
        yield
    finally:
        for optimizer, tensor, memory in kept:
            optimizer.state[tensor] = memory
