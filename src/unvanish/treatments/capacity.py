"""Limit how many units a hidden layer has, without changing a shape."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..errors import TreatmentError
from ..graph import ACTIVATIONS, Node, key, walk
from ..layers import own_parameters
from ..records import Change
from ..untouched import untouched
from .treatment import Patient, Steps, Treatment

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
IDLE = 2.0**-20  # of the next layer's output: a few roundings of float32

# What may stand between two layers: each of its outputs depends on one unit. A mean over units, or a view that mixes
# them, is told by the shapes.
_UNITWISE = frozenset(ACTIVATIONS) | frozenset(
    "CeluBackward0 LogSigmoidBackward0 NativeBatchNormBackward0 CudnnBatchNormBackward0 NativeDropoutBackward0 "
    "MaxPool2DWithIndicesBackward0 MkldnnMaxPool2DBackward0 AvgPool2DBackward0 AdaptiveAvgPool2DBackward0 "
    "MkldnnAdaptiveAvgPool2DBackward0 AdaptiveMaxPool2DBackward0 MeanBackward1 ViewBackward0 UnsafeViewBackward0 "
    "ReshapeAliasBackward0 SqueezeBackward1 UnsqueezeBackward0 MaxPool3DWithIndicesBackward0 AvgPool3DBackward0".split()
)


def limit_units(share: float | None = None) -> Treatment:
    """Silence hidden units: those that do nothing on the batch, or all but a ``share`` of each layer.

    A unit is silent when its weights, those that make it and those that read it, are zero, and are zero again after
    each step of the optimiser. Nothing changes its shape, so the optimiser, its state and a checkpoint still fit;
    that also means that nothing becomes faster. Where you build the network, make the layers narrower instead.

    Without a value the units go that are dead on the batch (zero for every example), and idle ones, which move no
    output of the next layer by more than a rounding; the outputs on this batch stay, which is checked before anything
    is kept. On other data a unit may have been awake. A layer that is dead as a whole is left: it needs a new start.

    With a value the units with the largest effect stay, max |activation| * max |outgoing weight|, and the function
    changes.

    Only units that one layer makes and one other reads are touched, linear or convolutional, with activations,
    norms, dropout, pooling and flattening between them; a skip connection has two readers.

    Args:
        share: Share of the units of each such layer that stays, rounded up. In (0, 1); None: see above.

    Raises:
        TreatmentError: if ``share`` is not in (0, 1).

    Cost: two forward passes; at each step the silent weights are written once.

    Source: Hu et al. 2016, section 3 (units whose activations are zero are redundant). Ours: the bound for idle
    units, the order by effect, and the masked form.

    Example:
        >>> import unvanish
        >>> model = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> with torch.no_grad():
        ...     _ = model[0].weight.copy_(torch.tensor([[1.0], [-1.0]])), model[0].bias.zero_()
        >>> with unvanish.treat(model, None, "limit-units", inputs=(torch.ones(4, 1),)) as changes:
        ...     print(next(iter(changes)).what, model[0].weight.tolist())
        1 of 2 hidden units are silent [[1.0], [0.0]]
    """
    if share is not None and not (isinstance(share, (int, float)) and 0 < share < 1):
        raise TreatmentError(
            f"treat(): 'limit-units': found {share!r}, expected a share of the units in (0, 1). Nothing was changed. "
            "Without a value only units that do nothing are silenced."
        )

    def apply(patient: Patient) -> Steps:
        if not patient.inputs:
            raise TreatmentError(
                "treat(): 'limit-units' looks at activations: found no batch, expected one. Nothing was changed. "
                "Call treat(model, optimizer, 'limit-units', inputs=(x,))."
            )
        before, pairs = _observed(patient)
        silent = [_Silenced(pair, _chosen(pair, share)) for pair in pairs]
        silent = [one for one in silent if len(one.units)]
        if not silent:
            raise TreatmentError(_nothing_to_do(len(pairs)))
        with _held_at_zero(silent, patient.optimizers):
            if share is None:
                _check_outputs(patient, before)
            count, of = sum(len(one.units) for one in silent), sum(pair.units for pair in pairs)
            names = tuple(one.pair.name for one in silent)
            yield Change("limit-units", f"{count} of {of} hidden units are silent", names, share is None)

    return Treatment(
        "limit-units", apply, "" if share is None else f"{share:g}", preserves_function=share is None,
        code="# build the hidden layers narrower: nn.Linear(a, b) with a smaller b, and the next with as many inputs",
    )  # fmt: skip


@dataclass(slots=True)
class _Pair:
    """A layer that makes units, and the one layer that reads them."""

    name: str
    maker: Any
    reader: Any
    effect: Tensor  # (units,): the most that a unit adds to an output of the reader
    scale: float  # rms of the reader's outputs

    @property
    def units(self) -> int:
        return len(self.effect)


def _chosen(pair: _Pair, share: float | None) -> Tensor:
    """Return the numbers of the units to silence."""
    if share is not None:
        return pair.effect.argsort(descending=True)[math.ceil(share * pair.units) :]
    idle = (pair.effect <= IDLE * pair.scale).nonzero().flatten()
    return idle if len(idle) < pair.units else idle[:0]


def _nothing_to_do(pairs: int) -> str:
    if not pairs:
        return (
            "treat(): 'limit-units': found no linear or convolutional layer whose units one other such layer reads, "
            "with activations, norms or pooling between them, expected at least one. Nothing was changed."
        )
    return (
        f"treat(): 'limit-units': found no unit to silence in {pairs} hidden layer{'s' if pairs > 1 else ''}, expected "
        "one that is dead or idle on the batch. Nothing was changed. Name a share that stays: 'limit-units=0.5'."
    )


class _Silenced:
    """The weights of some units: zero, and later what they were."""

    def __init__(self, pair: _Pair, units: Tensor) -> None:
        self.pair, self.units = pair, units
        width = pair.reader.weight.shape[1] // pair.units  # inputs of the reader for each unit, after flattening
        columns = (units[:, None] * width + torch.arange(width, device=units.device)).flatten()
        self._parts = [(pair.maker.weight, 0, units), (pair.reader.weight, 1, columns)]
        if pair.maker.bias is not None:
            self._parts.append((pair.maker.bias, 0, units))
        self._kept = [tensor.detach().index_select(dim, index) for tensor, dim, index in self._parts]

    @torch.no_grad()
    def silence(self) -> None:
        """Set the weights to zero."""
        for tensor, dim, index in self._parts:
            tensor.index_fill_(dim, index, 0)

    @torch.no_grad()
    def restore(self) -> None:
        """Bring the weights back."""
        for (tensor, dim, index), kept in zip(self._parts, self._kept, strict=True):
            tensor.index_copy_(dim, index, kept)


@contextmanager
def _held_at_zero(silent: list[_Silenced], optimizers: tuple[torch.optim.Optimizer, ...]) -> Iterator[None]:
    """Silence units until the end; momentum and decay would wake them at a step."""

    def after(*_: Any) -> None:
        for one in silent:
            one.silence()

    after()
    handles = [optimizer.register_step_post_hook(after) for optimizer in optimizers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for one in silent:
            one.restore()


@dataclass(slots=True)
class _Seen:
    """What one call of a layer showed."""

    read: torch.Size
    read_from: Node  # what computed the input
    loudest: Tensor  # (inputs,): largest |input| over examples and positions
    made: torch.Size
    made_by: int | None  # key of the node that computed the output
    scale: float  # rms of the output


@dataclass(slots=True)
class _Run:
    """One forward pass."""

    seen: dict[nn.Module, list[_Seen]] = field(default_factory=dict)
    outputs: list[Tensor] = field(default_factory=list)


def _observed(patient: Patient) -> tuple[list[Tensor], list[_Pair]]:
    """Run the batch; return the outputs, and the pairs of layers between which units stand."""
    run = _run(patient)
    users = _users(run.outputs)
    names = {module: name for name, module in patient.model.named_modules()}
    owners = Counter(id(p) for module in patient.model.modules() for _, p in own_parameters(module))
    alone = [m for m, seen in run.seen.items() if len(seen) == 1 and all(owners[id(p)] == 1 for p in m.parameters())]
    makers = {run.seen[m][0].made_by: m for m in alone}
    pairs = []
    for reader in alone:
        maker = _maker(run.seen[reader][0].read_from, users, makers)
        if maker is not None and _is_plain(run.seen[maker][0].made, run.seen[reader][0].read, maker, reader):
            pairs.append(_pair(names[maker], maker, reader, run.seen[reader][0]))
    return [output.detach() for output in run.outputs], pairs


def _run(patient: Patient) -> _Run:
    """Run the batch in the model's own mode without dropout; the model stays as it is."""
    run = _Run()

    def see(layer: nn.Module, args: Any, output: Tensor) -> None:
        x, dim = args[0], _unit_dim(layer, args[0].dim())
        loudest = x.detach().abs().amax([d for d in range(x.dim()) if d != dim])
        made_by = None if output.grad_fn is None else key(output.grad_fn)
        scale = float(output.detach().square().mean().sqrt())
        seen = _Seen(x.shape, x.grad_fn, loudest, output.shape, made_by, scale)
        run.seen.setdefault(layer, []).append(seen)

    layers = [module for module in patient.model.modules() if isinstance(module, _LAYERS)]
    with untouched(patient.model), torch.enable_grad():
        for module in patient.model.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.eval()
        handles = [layer.register_forward_hook(see) for layer in layers]
        try:
            output = patient.model(*patient.inputs)
        finally:
            for handle in handles:
                handle.remove()
    run.outputs = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    return run


def _unit_dim(layer: nn.Module, dims: int) -> int:
    """Return the dimension of units: the last of a linear layer, the channels of a convolution."""
    return dims - 1 if isinstance(layer, nn.Linear) else dims - len(layer.kernel_size) - 1  # type: ignore[arg-type]


def _users(outputs: list[Tensor]) -> Counter[Node]:
    """Count who reads each node of the graph; being an output counts."""
    roots = list(dict.fromkeys(output.grad_fn for output in outputs if output.grad_fn is not None))
    nodes = dict.fromkeys(node for root in roots for node in walk(root)[0])
    return Counter(roots) + Counter(child for node in nodes for child, _ in node.next_functions if child is not None)


def _maker(node: Node, users: Counter[Node], makers: Mapping[int | None, nn.Module]) -> nn.Module | None:
    """Go from a layer's input back to the layer that made it, while nobody else reads what is passed."""
    while node is not None and users[node] == 1:
        if key(node) in makers:
            return makers[key(node)]
        if node.name() not in _UNITWISE:
            return None
        node = node.next_functions[0][0]
    return None


def _is_plain(made: torch.Size, read: torch.Size, maker: Any, reader: Any) -> bool:
    """Say whether units are where they were made: in the same dimension, or flattened behind the examples."""
    units = maker.weight.shape[0]
    if getattr(reader, "groups", 1) != 1 or made[0] != read[0]:
        return False
    if isinstance(maker, nn.Linear) is isinstance(reader, nn.Linear):
        return len(made) == len(read) and bool(reader.weight.shape[1] == units)
    is_flattened = isinstance(reader, nn.Linear) and len(read) == 2 and _unit_dim(maker, len(made)) == 1
    return is_flattened and reader.weight.shape[1] % units == 0


def _pair(name: str, maker: Any, reader: Any, seen: _Seen) -> _Pair:
    weight = reader.weight.detach()
    outgoing = weight.abs().amax([d for d in range(weight.dim()) if d != 1])
    effect = (seen.loudest * outgoing).view(maker.weight.shape[0], -1).amax(1)
    return _Pair(name, maker, reader, effect, seen.scale)


def _check_outputs(patient: Patient, before: list[Tensor]) -> None:
    """Make sure that the batch gives the outputs of before: weights may have uses that no graph of layers shows."""
    for old, output in zip(before, _run(patient).outputs, strict=True):
        if not torch.allclose(old, output.detach(), rtol=1e-4, atol=1e-4 * float(old.abs().max()), equal_nan=True):
            raise TreatmentError(
                "treat(): 'limit-units': found other outputs on the batch without units that do nothing, expected the "
                "same: their weights are used elsewhere too. Nothing was changed."
            )
