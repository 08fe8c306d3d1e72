"""Freeze the lowest layers of a model so that no training changes a bit of them, and thaw them again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..errors import LayerError, OptionError
from ..layers import is_normalisation

_DROPPING = (nn.modules.dropout._DropoutNd,)


@dataclass(frozen=True)
class Trunk:
    """The frozen part of a model.

    Args:
        model: The whole model, frozen part and the rest.
        layers: Names of the frozen modules, lowest first; what is inside of them is frozen too.
    """

    model: nn.Module
    layers: tuple[str, ...]

    def __repr__(self) -> str:
        weights = [(p.requires_grad, p.numel()) for p in self.model.parameters()]
        frozen, learning = (sum(size for learns, size in weights if learns is side) for side in (False, True))
        return f"Trunk({', '.join(self.layers) or 'nothing'}: {frozen:,} weights frozen, {learning:,} learning)"


def freeze_to(model: nn.Module, n: int | str, *, optimizer: torch.optim.Optimizer | None = None) -> Trunk:
    """Freeze the layers below the n-th, and let those from there on learn.

    Parameters *and buffers* of the frozen part keep every bit, whatever the optimiser and its decay; the part is in
    evaluation mode and stays there when ``model.train()`` is called, so dropout is off in it, batch norms use what
    they have learnt and do not learn, and the output is the same in both modes. No graph is built for it.

    Layers are the children of the model that have weight matrices, in the order in which the model lists them; in a
    model around another, those of the inner one. What has none (norms, activations, pooling) goes with the layer
    before it, except a dropout at the upper end, which stays with what learns. Parameters that belong to the model
    itself and to no child (a class token, positions) freeze with the lowest layer.

    Args:
        model: May have frozen parameters already. They stay so, and `thaw` leaves them to their owner.
        n: How many layers are frozen; below 0 from the top, so -1 lets only the last one learn. Or the name of the
            lowest module that learns, such as ``"bert.encoder.layer.6"``. What an earlier call has frozen above is
            thawed.
        optimizer: If given, it forgets the momentum of what is frozen now. Its groups stay as they are, frozen
            parameters included (an optimiser leaves alone what has no gradient), so schedulers and saved states fit.

    Returns:
        What is frozen, for `cache_features`.

    Raises:
        OptionError: if there are fewer layers, if a parameter is shared by both parts, or for an optimiser that moves
            what has no gradient (LBFGS) or lacks a parameter that is thawed. Nothing is changed then.
        LayerError: if there is no module of that name.

    Source: the counting is fastai's ``freeze_to``; that a frozen batch norm is in inference mode is the contract of
    Keras (layers with ``trainable = False``).

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
        >>> freeze_to(model, -1)
        Trunk(0, 1, 2: 24 weights frozen, 10 learning)
        >>> _ = model.train()
        >>> [module.training for module in model]
        [False, False, False, True]
        >>> thaw(model)
        >>> model[1].training, model[1].weight.requires_grad
        (True, True)
    """
    if not isinstance(model, nn.Module):
        raise OptionError(
            f"freeze_to(): model: found {type(model).__name__}, expected a torch.nn.Module. Call freeze_to(model, -1)."
        )
    parts, holders = _split(model, n)
    frozen = [module for _, part in parts for module in part.modules()]
    owners = [holder for holder in holders if parts and next(holder.parameters(recurse=False), None) is not None]
    to_freeze = {p for module in (*frozen, *owners) for p in module.parameters(recurse=False)}
    _refuse_shared(model, [name for name, _ in parts], {*owners}, to_freeze)
    if optimizer is not None:
        _check_optimizer(optimizer, model, to_freeze)
    newly = [p for p in to_freeze if p.requires_grad]
    thaw(model)
    for module in owners:
        _freeze(module, holds_mode=False)
    for module in frozen:
        _freeze(module, holds_mode=True)
    if optimizer is not None and not isinstance(optimizer, torch.optim.Adagrad):  # whose sum is no momentum
        for parameter in newly:
            optimizer.state.pop(parameter, None)
    return Trunk(model, tuple(name or type(model).__name__ for name, _ in parts))


def thaw(model: nn.Module | Trunk) -> None:
    """Let everything learn again that `freeze_to` has frozen.

    Each module takes the mode that it would have by now, had it not been frozen.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        >>> thaw(freeze_to(model, 1))
        >>> all(parameter.requires_grad for parameter in model.parameters())
        True
    """
    root = model.model if isinstance(model, Trunk) else model
    for _, module, stays in _held(root):
        for name in stays.learning:
            module.get_parameter(name).requires_grad_(True)
        del module.__dict__["train"]
        module.training = stays.asked


def is_frozen(module: nn.Module) -> bool:
    """Say whether `freeze_to` holds this very module, with its mode."""
    stays = module.__dict__.get("train")
    return isinstance(stays, _StaysFrozen) and stays.holds_mode


def layers_of(model: nn.Module) -> list[tuple[str, list[nn.Module]]]:
    """Return the layers that `freeze_to` counts, lowest first: the name of each, and the modules that belong to it.

    Example:
        >>> model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        >>> [(name, len(modules)) for name, modules in layers_of(model)]
        [('1', 3), ('3', 1)]
    """
    prefix, holder, _ = _holder(model)
    layers: list[tuple[str, list[nn.Module]]] = []
    before: list[nn.Module] = []
    for name, child in holder.named_children():
        if _is_layer(child):
            layers.append((prefix + name, [*before, child]))
            before = []
        else:
            (layers[-1][1] if layers else before).append(child)
    return layers


class _StaysFrozen:
    """Stands in for the method ``train`` of a frozen module, so that no call of it ends the freezing.

    An attribute of the module and no closure: it is copied and pickled with the module.
    """

    def __init__(self, module: nn.Module, *, holds_mode: bool) -> None:
        self.module = module
        self.holds_mode = holds_mode  # not for the owner of both parts: its parameters are frozen, its mode is not
        self.asked = module.training
        self.learning = [name for name, p in module.named_parameters(recurse=False) if p.requires_grad]

    def __call__(self, mode: bool = True) -> nn.Module:
        type(self.module).train(self.module, mode)
        self.asked = self.module.training
        self.hold()
        return self.module

    def hold(self) -> None:
        if self.holds_mode:
            self.module.training = False


def _freeze(module: nn.Module, *, holds_mode: bool) -> None:
    stays = _StaysFrozen(module, holds_mode=holds_mode)
    module.__dict__["train"] = stays
    stays.hold()
    for parameter in module.parameters(recurse=False):
        parameter.requires_grad_(False)
        parameter.grad = None  # an optimiser would go on with it, and with its momentum


def _held(model: nn.Module) -> list[tuple[str, nn.Module, _StaysFrozen]]:
    found = ((name, module, module.__dict__.get("train")) for name, module in model.named_modules())
    return [(name, module, stays) for name, module, stays in found if isinstance(stays, _StaysFrozen)]


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _is_layer(module: nn.Module) -> bool:
    return not is_normalisation(module) and any(p.dim() > 1 for p in module.parameters())


def _holder(model: nn.Module) -> tuple[str, nn.Module, list[nn.Module]]:
    """Go down through wrappers to the module whose children are the layers; with its name and the way to it."""
    prefix, holder, way = "", model, [model]
    while True:
        inner = [(name, child) for name, child in holder.named_children() if _has_parameters(child)]
        if len(inner) != 1 or not any(_is_layer(child) for child in inner[0][1].children()):
            return prefix, holder, way
        prefix, holder = f"{prefix}{inner[0][0]}.", inner[0][1]
        way.append(holder)


def _split(model: nn.Module, n: int | str) -> tuple[list[tuple[str, nn.Module]], list[nn.Module]]:
    """Return the modules to freeze with their names, and the modules that hold both parts."""
    if isinstance(n, str):
        return _split_at_name(model, n)
    prefix, holder, way = _holder(model)
    children = list(holder.named_children())
    places = [place for place, (_, child) in enumerate(children) if _is_layer(child)]
    total = max(len(places), 1)  # a model without children, such as an LSTM, is one layer
    if isinstance(n, bool) or not isinstance(n, int) or not -total <= n <= total:
        raise OptionError(
            f"freeze_to(): n: found {n!r}, expected a whole number from {-total} to {total}, the number of layers of "
            f"{type(model).__name__}, or the name of the lowest module that learns. Nothing was changed. "
            f"Write freeze_to(model, {-1 if total > 1 else 1})."
        )
    count = n + total if n < 0 else n
    if count == total:
        return [("", model)], []
    if count == 0:
        return [], []
    above = range(places[count - 1] + 1, places[count])
    end = next((place for place in above if _drops(children[place][1])), places[count])
    return [(prefix + name, child) for name, child in children[:end]], way


def _split_at_name(model: nn.Module, first: str) -> tuple[list[tuple[str, nn.Module]], list[nn.Module]]:
    parts: list[tuple[str, nn.Module]] = []
    holder, prefix, way = model, "", []
    for step in first.split("."):
        children = dict(holder.named_children())
        if step not in children:
            raise LayerError(
                f"freeze_to(): n: found {first!r}, expected the name of a module, such as {prefix}"
                f"{next(iter(children), '')!r}. Nothing was changed. dict(model.named_modules()) has them all."
            )
        way.append(holder)
        below = list(children)[: list(children).index(step)]
        parts += [(prefix + name, children[name]) for name in below]
        holder, prefix = children[step], f"{prefix}{step}."
    while parts and _drops(parts[-1][1]):
        parts.pop()
    return parts, way


def _drops(module: nn.Module) -> bool:
    """Say whether a module without parameters is there to drop something at random."""
    return not _has_parameters(module) and any(
        isinstance(m, _DROPPING) or type(m).__name__ in ("DropPath", "StochasticDepth") for m in module.modules()
    )


def _refuse_shared(model: nn.Module, parts: list[str], owners: set[nn.Module], to_freeze: set[nn.Parameter]) -> None:
    """Make sure that no parameter belongs to both parts; a module may be in the model under several names."""
    sides: dict[bool, dict[nn.Parameter, str]] = {True: {}, False: {}}
    for path, module in model.named_modules(remove_duplicate=False):
        is_below = module in owners or any(path == part or path.startswith(f"{part}.") or not part for part in parts)
        for name, parameter in module.named_parameters(path, recurse=False, remove_duplicate=False):
            sides[is_below].setdefault(parameter, name)
    for parameter, name in sides[False].items():
        if parameter in to_freeze:
            raise OptionError(
                f"freeze_to(): parameter {sides[True][parameter]!r}: found it shared with {name!r}, which is to learn, "
                "expected each parameter on one side. Nothing was changed. Freeze both or none with another n, "
                f"or give {name!r} a copy of its own."
            )


def _check_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, to_freeze: set[nn.Parameter]) -> None:
    if isinstance(optimizer, torch.optim.LBFGS):
        raise OptionError(
            "freeze_to(): optimizer: found LBFGS, expected one that leaves alone what has no gradient. Nothing was "
            "changed. Freeze first, then write LBFGS([p for p in model.parameters() if p.requires_grad])."
        )
    known = {p for group in optimizer.param_groups for p in group["params"]}
    for path, module, stays in _held(model):
        for name in stays.learning:
            parameter = module.get_parameter(name)
            if parameter not in to_freeze and parameter not in known:
                raise OptionError(
                    f"freeze_to(): optimizer: found no parameter {f'{path}.{name}'!r}, which is thawed, expected all "
                    "that learns. Nothing was changed. Make the optimiser with model.parameters() before anything is "
                    "frozen: schedulers count its groups when they are made."
                )
