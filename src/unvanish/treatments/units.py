"""Which hidden units stand between two layers: what one layer makes and one other reads, and their weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..errors import TreatmentError
from ..graph import ACTIVATIONS, Node, key, walk
from ..layers import own_parameters
from ..untouched import untouched
from .treatment import Patient

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORM = nn.modules.batchnorm._BatchNorm

# What may stand between two layers: each of its outputs depends on one unit. A mean over units, or a view that mixes
# them, is told by the shapes.
_UNITWISE = frozenset(ACTIVATIONS) | frozenset(
    "CeluBackward0 LogSigmoidBackward0 NativeBatchNormBackward0 CudnnBatchNormBackward0 NativeDropoutBackward0 "
    "MaxPool2DWithIndicesBackward0 MkldnnMaxPool2DBackward0 AvgPool2DBackward0 AdaptiveAvgPool2DBackward0 "
    "MkldnnAdaptiveAvgPool2DBackward0 AdaptiveMaxPool2DBackward0 MeanBackward1 ViewBackward0 UnsafeViewBackward0 "
    "ReshapeAliasBackward0 SqueezeBackward1 UnsqueezeBackward0 MaxPool3DWithIndicesBackward0 AvgPool3DBackward0".split()
)


class Entries:
    """Some rows or columns of a tensor, and what they were."""

    def __init__(self, tensor: Tensor, dim: int, index: Tensor) -> None:
        self.tensor, self.dim, self.index = tensor, dim, index.to(tensor.device)
        self._kept = tensor.detach().index_select(dim, self.index)

    @torch.no_grad()
    def fill(self, value: float) -> None:
        """Set them all to one value."""
        self.tensor.index_fill_(self.dim, self.index, value)

    @torch.no_grad()
    def restore(self) -> None:
        """Bring back what they were."""
        self.tensor.index_copy_(self.dim, self.index, self._kept)


@dataclass(slots=True)
class Pair:
    """A layer that makes units, the one layer that reads them, and the batch norms between these."""

    name: str
    maker: Any
    reader: Any
    norms: tuple[Any, ...]
    loudest: Tensor  # (units,): largest |activation| on the batch
    effect: Tensor  # (units,): the most that a unit adds to an output of the reader
    scale: float  # rms of the reader's outputs

    @property
    def units(self) -> int:
        return len(self.effect)

    def incoming(self, units: Tensor) -> list[Entries]:
        """Return the weights, and the biases if there are any, that make some units."""
        parameters = [p for p in (self.maker.weight, self.maker.bias) if p is not None]
        return [Entries(parameter, 0, units) for parameter in parameters]

    def outgoing(self, units: Tensor) -> Entries:
        """Return the weights that read some units."""
        return Entries(self.reader.weight, 1, self.places(units, self.reader.weight.shape[1]))

    def places(self, units: Tensor, width: int) -> Tensor:
        """Return where some units are among so many entries; after flattening each unit has several."""
        each = width // self.units
        return (units[:, None] * each + torch.arange(each, device=units.device)).flatten()


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
    norms: dict[nn.Module, list[tuple[Node, Node]]] = field(default_factory=dict)  # what computed inputs and outputs
    outputs: list[Tensor] = field(default_factory=list)


def observed(patient: Patient, treatment: str) -> tuple[list[Tensor], list[Pair]]:
    """Run the batch; return the outputs, and the pairs of layers between which units stand.

    Raises:
        TreatmentError: if there is no batch.

    Cost: one forward pass.
    """
    if not patient.inputs:
        raise TreatmentError(
            f"treat(): {treatment!r} looks at activations: found no batch, expected one. Nothing was changed. "
            f"Call treat(model, optimizer, {treatment!r}, inputs=(x,))."
        )
    run = _run(patient)
    users = _users(run.outputs)
    names = {module: name for name, module in patient.model.named_modules()}
    alone = _alone(run, patient.model)
    makers = {run.seen[m][0].made_by: m for m in alone}
    norms = {key(made_by): norm for norm, ((_, made_by), *more) in run.norms.items() if made_by and not more}
    pairs = []
    for reader in alone:
        maker, between = _maker(run.seen[reader][0].read_from, users, makers, norms)
        if maker is not None and _is_plain(run.seen[maker][0].made, run.seen[reader][0].read, maker, reader):
            pairs.append(_pair(names[maker], maker, reader, between, run.seen[reader][0]))
    return [output.detach() for output in run.outputs], pairs


def normed(patient: Patient) -> list[tuple[nn.Module, nn.Module]]:
    """Run the batch; return layers with the batch norm that is the only reader of their output.

    Cost: one forward pass.
    """
    run = _run(patient)
    users = _users(run.outputs)
    makers = {run.seen[m][0].made_by: m for m in _alone(run, patient.model)}
    once = [(calls[0][0], norm) for norm, calls in run.norms.items() if len(calls) == 1]
    return [(makers[key(read)], norm) for read, norm in once if read and users[read] == 1 and key(read) in makers]


def _alone(run: _Run, model: nn.Module) -> list[Any]:
    """Return the layers that were called once and share no parameter."""
    owners = Counter(id(p) for module in model.modules() for _, p in own_parameters(module))
    return [
        module
        for module, seen in run.seen.items()
        if len(seen) == 1
        and isinstance(module.weight, nn.Parameter)  # not computed from others at each call
        and all(owners[id(p)] == 1 for p in module.parameters())
    ]


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

    def see_norm(norm: nn.Module, args: Any, output: Tensor) -> None:
        run.norms.setdefault(norm, []).append((args[0].grad_fn, output.grad_fn))

    hooks = {**dict.fromkeys(_LAYERS, see), _NORM: see_norm}
    with untouched(patient.model), torch.enable_grad():
        for module in patient.model.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.eval()
        handles = [
            module.register_forward_hook(hook)
            for module in patient.model.modules()
            for kind, hook in hooks.items()
            if isinstance(module, kind)
        ]
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


def _maker(
    node: Node, users: Counter[Node], makers: Mapping[int | None, nn.Module], norms: Mapping[int, nn.Module]
) -> tuple[nn.Module | None, tuple[nn.Module, ...]]:
    """Go from a layer's input back to the layer that made it, while nobody else reads what is passed.

    Returns:
        That layer, or None, and the batch norms on the way.
    """
    between: list[nn.Module] = []
    while node is not None and users[node] == 1:
        if key(node) in makers:
            return makers[key(node)], tuple(between)
        if node.name() not in _UNITWISE:
            break
        if key(node) in norms:
            between.append(norms[key(node)])
        node = node.next_functions[0][0]
    return None, ()


def _is_plain(made: torch.Size, read: torch.Size, maker: Any, reader: Any) -> bool:
    """Say whether units are where they were made: in the same dimension, or flattened behind the examples."""
    units = maker.weight.shape[0]
    if getattr(reader, "groups", 1) != 1 or made[0] != read[0]:
        return False
    if isinstance(maker, nn.Linear) is isinstance(reader, nn.Linear):
        return len(made) == len(read) and bool(reader.weight.shape[1] == units)
    is_flattened = isinstance(reader, nn.Linear) and len(read) == 2 and _unit_dim(maker, len(made)) == 1
    return is_flattened and reader.weight.shape[1] % units == 0


def _pair(name: str, maker: Any, reader: Any, norms: tuple[nn.Module, ...], seen: _Seen) -> Pair:
    weight = reader.weight.detach()
    outgoing = weight.abs().amax([d for d in range(weight.dim()) if d != 1])
    units = maker.weight.shape[0]
    effect = (seen.loudest * outgoing).view(units, -1).amax(1)
    return Pair(name, maker, reader, norms, seen.loudest.view(units, -1).amax(1), effect, seen.scale)


def check_outputs(patient: Patient, before: list[Tensor], treatment: str) -> None:
    """Make sure that the batch gives the outputs of before: weights may have uses that no graph of layers shows.

    Raises:
        TreatmentError: if it does not.
    """
    for old, output in zip(before, _run(patient).outputs, strict=True):
        if not torch.allclose(old, output.detach(), rtol=1e-4, atol=1e-4 * float(old.abs().max()), equal_nan=True):
            raise TreatmentError(
                f"treat(): {treatment!r}: found other outputs on the batch without units that do nothing, expected "
                "the same: their weights are used elsewhere too. Nothing was changed."
            )
