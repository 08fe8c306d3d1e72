"""Who is who in a watched run: modules, their names, and the facts of each layer."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from .layers import (
    clean_name,
    fan,
    first_replica,
    has_equal_units,
    is_batch_norm,
    is_layer,
    is_normalisation,
    looks_fresh,
    named_modules,
    own_parameters,
    recurrent_radius,
    unregistered_name,
)
from .records import Layer

MAX_LAYERS = 1024

_CHANNELS_FIRST = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.GroupNorm,
)


@dataclass(eq=False)
class Member:
    """One layer under watch; the module itself is not kept alive."""

    reference: weakref.ref[nn.Module]
    name: str
    number: int
    root: int
    is_registered: bool = True
    position: int = -1  # order of the first call; -1 = never called
    activation: str = ""
    units: int = 0
    norm_values: int = 0
    path_depth: int = 0
    sequence: int = 0
    started_equal: bool = False
    updates: int = 0
    unit_dim: int = -1  # the dimension of the output that runs over units
    replicas: int = 0  # of which the parameters are stacked
    twin: int = -1  # the layer that shares all its parameters and was met before; -1 = none
    parameters: frozenset[int] = field(default_factory=frozenset)  # ids

    @property
    def module(self) -> nn.Module | None:
        """The module, as long as the training holds it."""
        return self.reference()

    @property
    def plain(self) -> nn.Module | None:
        """The module, or what it is to its first replica if it is stacked."""
        module = self.reference()
        return first_replica(module) if module is not None and self.replicas else module

    @property
    def is_trainable(self) -> bool:
        """Say whether some parameter of the layer requires a gradient."""
        module = self.reference()
        return module is not None and any(p.requires_grad for _, p in own_parameters(module))


class Roster:
    """The layers met so far, by module.

    Args:
        models: Watch only these, and what runs inside of them; empty: every model that runs.
    """

    def __init__(self, models: Sequence[nn.Module] = ()) -> None:
        self.models = tuple(models)
        self.members: list[Member] = []
        self.by_name: dict[str, Member] = {}
        self.names: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
        self.has_gone = False  # a layer was freed; `release` makes room
        self.version = 0  # changes with the members
        self.left_out = 0
        self._by_module: weakref.WeakKeyDictionary[nn.Module, Member] = weakref.WeakKeyDictionary()
        self._root_of: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
        self._roots: Counter[str] = Counter()
        self._calls = 0

    def member(self, module: nn.Module) -> Member | None:
        """Return the layer of that module, if it is one."""
        return self._by_module.get(module)

    def knows(self, module: nn.Module) -> bool:
        """Say whether the module has a name here."""
        return module in self.names

    def root_of(self, module: nn.Module) -> int:
        """Return the number of the model that the module belongs to; -1 if unknown."""
        return self._root_of.get(module, -1)

    def enter(self, model: nn.Module) -> list[Member]:
        """Name a model and all it holds; return its layers that are new."""
        number, prefix = self._roots.total(), ""
        label = type(model).__name__
        known = next((module for module in model.modules() if module in self.names), None)
        if known is not None and all(m in self.names for m in model.modules() if is_layer(m)):
            self.names[model] = label  # a new wrapper, or a view, of what is known
            self._root_of[model] = self._root_of[known]
            return []
        if self.models and model in self.models:
            prefix = "" if len(self.models) == 1 else f"{label}{self.models.index(model)}."
        elif self._roots:
            same = self._roots[label]
            prefix = f"{label}-{same + 1}." if same else f"{label}."
        self._roots[label] += 1
        new = []
        for name, module, replicas in named_modules(model):
            full = clean_name(prefix + name) if name else prefix.rstrip(".")
            if module not in self.names:
                self.names[module] = full
                self._root_of[module] = number
                if is_layer(module):
                    new += self._add(module, full or type(module).__name__, number, replicas=replicas)
        return new

    def adopt(self, module: nn.Module, owners: Sequence[nn.Module]) -> list[Member]:
        """Name a module that runs inside of ``owners`` but that no model lists; return it as new layer."""
        named = [(self.names.get(owner, ""), owner) for owner in owners]
        root = self._root_of.get(owners[0], 0) if owners else 0
        found = unregistered_name(module, named)
        name = found or f"{type(module).__name__}@{len(self.members)}"
        self.names[module] = name
        self._root_of[module] = root
        return self._add(module, name, root, is_registered=False) if is_layer(module) else []

    def _add(
        self, module: nn.Module, name: str, root: int, *, is_registered: bool = True, replicas: int = 0
    ) -> list[Member]:
        if len(self.members) == MAX_LAYERS:
            self.left_out += 1
            return []
        while name in self.by_name:
            name += "'"
        member = Member(weakref.ref(module), name, len(self.members), root, is_registered, replicas=replicas)
        member.reference = weakref.ref(module, lambda _: self._note_gone(member))
        member.unit_dim = 1 if isinstance(module, _CHANNELS_FIRST) else -1
        member.parameters = frozenset(id(p) for _, p in own_parameters(module))
        member.started_equal = _quietly(has_equal_units, member.plain or module)
        self.members.append(member)
        self.by_name[name] = member
        self._by_module[module] = member
        self.version += 1
        return [member]

    def _note_gone(self, member: Member) -> None:
        """Forget the parameters of a freed layer: their ids may come again."""
        member.parameters = frozenset()
        self.has_gone = True

    def release(self) -> None:
        """Take out the layers that were freed; those that stay get new numbers."""
        self.has_gone = False
        self.version += 1
        for member in self.members:
            member.number = -1
        self.members = [member for member in self.members if member.module is not None]
        for number, member in enumerate(self.members):
            member.number = number
        self.by_name = {member.name: member for member in self.members}

    def called(self, member: Member, output: Tensor, first_input: Tensor | None) -> None:
        """Note the facts that only a call shows; the first call decides."""
        if member.position >= 0:
            return
        member.position = self._calls
        self._calls += 1
        dim, module = member.unit_dim, member.module
        member.units = output.shape[dim] if output.dim() > 1 else 1
        if module is not None and is_batch_norm(module) and module.training and first_input is not None:
            member.norm_values = first_input.numel() // max(first_input.shape[1], 1)
        if isinstance(module, nn.RNNBase) and first_input is not None and first_input.dim() > 1:
            member.sequence = first_input.shape[1 if module.batch_first else 0]

    def owned(self, optimizers: Iterable[torch.optim.Optimizer]) -> frozenset[int]:
        """Return the ids of all parameters of some optimisers, and of the stacked ones in whose memory they lie."""
        parameters = [p for o in optimizers for group in o.param_groups for p in group["params"]]
        layers = [module for member in self.members if member.replicas and (module := member.module) is not None]
        places = {p.untyped_storage().data_ptr() for p in parameters} if layers else set()
        stacked = (p for layer in layers for _, p in own_parameters(layer))
        return frozenset(map(id, parameters)) | {id(p) for p in stacked if p.untyped_storage().data_ptr() in places}

    def layers(
        self, members: Sequence[Member], known: Sequence[Layer], owned: frozenset[int], elsewhere: frozenset[int]
    ) -> tuple[Layer, ...]:
        """Return the facts of some layers, as one optimiser sees them.

        Args:
            members: These layers.
            known: What was returned before, in the same order: holds on for layers that were freed.
            owned: Ids of the parameters of this optimiser.
            elsewhere: Ids of the parameters of the run's other optimisers.
        """
        return tuple(
            self._facts(member, plain, owned, elsewhere)
            if (plain := member.plain) is not None
            else replace(known[place], path_depth=member.path_depth, activation=member.activation)
            for place, member in enumerate(members)
            if member.module is not None or place < len(known)
        )

    def _position(self, member: Member) -> int:
        """Return the order of the first call; replicas that are computed all at once train without one to be seen."""
        is_unseen = all(other.position < 0 for other in self.members if other.root == member.root)
        return member.number if is_unseen and member.replicas and member.updates else member.position

    def _facts(self, member: Member, module: nn.Module, owned: frozenset[int], elsewhere: frozenset[int]) -> Layer:
        parameters = [p for _, p in own_parameters(module)]
        trainable = any(p.requires_grad for p in parameters)
        weight = max((p for p in parameters if p.dim() >= 2), key=lambda p: p.numel(), default=None)
        # switching gradients off is a decision, leaving a layer out of the optimiser seldom is one
        least = 24 if trainable else 256
        is_owned = bool(member.parameters & owned)
        is_elsewhere = bool(member.parameters & elsewhere)
        return Layer(
            name=member.name,
            kind=type(module).__name__,
            parameters=sum(_numel(p) for p in parameters),
            position=self._position(member),
            activation=member.activation,
            units=member.units,
            fan_in=0 if weight is None else fan(weight)[0],
            is_trainable=trainable,
            is_optimised=is_owned,
            is_optimised_elsewhere=is_elsewhere,
            is_registered=member.is_registered,
            is_fresh=member.updates == 0 and _quietly(partial(looks_fresh, least=least), module),
            is_symmetric=member.started_equal and member.updates >= 3 and _quietly(has_equal_units, module),
            is_normalisation=is_normalisation(module),
            norm_values=member.norm_values,
            path_depth=member.path_depth,
            recurrent_radius=_quietly(recurrent_radius, module) or 0.0,
            sequence=member.sequence,
            replicas=member.replicas,
        )


def _numel(parameter: Tensor) -> int:
    return 0 if isinstance(parameter, nn.parameter.UninitializedParameter) else parameter.numel()


def _quietly(question, module: nn.Module):  # type: ignore[no-untyped-def]
    """Ask about the weights of a module; no for weights that cannot be read (lazy, meta, sharded)."""
    try:
        with torch.no_grad():
            return question(module)
    except (RuntimeError, NotImplementedError, ValueError, TypeError):
        return False
