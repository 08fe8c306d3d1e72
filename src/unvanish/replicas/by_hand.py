"""All replicas in one pass, operation by operation: matrix products in batches, convolutions in groups.

The network is traced once by `torch.fx`, and each of its operations is done by the rule for all replicas in `rules`.
Far fewer operations are called than by the loop, and less is in their way than under ``vmap``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from .losses import LossFn, losses_of
from .rules import BY_FUNCTION, BY_METHOD, BY_MODULE, FRESH, Rule, relu_in_place
from .stacked import NotUnderstood, Stacked, Where
from .streams import Streams

Environment = dict[fx.Node, Any]
Step = Callable[[Where, Environment], Any]


class Plan:
    """What a network does, as steps for all replicas at once.

    What its Python code decides, and reads from plain attributes, is written down once, when the plan is made.

    Args:
        stacked: The stacked model, in the modes in which it will run.
        given: Names of the arguments that a call gives.

    Raises:
        NotUnderstood: if the network cannot be traced, or an operation has no rule.
    """

    def __init__(self, stacked: nn.Module, given: set[str]) -> None:
        self.inputs: list[fx.Node] = []
        self.steps: list[tuple[fx.Node, Step]] = []
        self.result: Any = None
        for node in _trace(stacked, given).nodes:
            if node.op == "placeholder":
                self.inputs.append(node)
            elif node.op == "output":
                self.result = node.args[0]
            elif node.users or node.op != "call_function":  # tracing checks default arguments by calls of no use
                self.steps.append((node, _step(stacked, node)))

    def __call__(self, at: Where, arguments: Mapping[str, Any]) -> Any:
        """Return the output of the network, in which tensors that differ between replicas are `Stacked`."""
        values: Environment = {}
        for node in self.inputs:
            values[node] = arguments.get(str(node.target), node.args[0] if node.args else None)
        for node, step in self.steps:
            values[node] = step(at, values)
        return map_arg(self.result, values.__getitem__)


class Batched:
    """The back end ``batched``: plans for the ways in which the model was called, made when they are needed.

    A copy starts without plans and makes its own.
    """

    def __init__(self) -> None:
        self._signature: inspect.Signature | None = None
        self._modules: list[nn.Module] = []
        self._plans: dict[tuple[Any, ...], Plan] = {}

    def __call__(
        self,
        stacked: nn.Module,
        n: int,
        loss_fn: LossFn,
        x: Any,
        y: Any,
        *,
        is_separate: bool,
        streams: Streams | None = None,
    ) -> Tensor:
        """Return the loss of each replica.

        Raises:
            NotUnderstood: if the network does what has no rule.
        """
        if self._signature is None:
            self._signature = inspect.signature(stacked.forward)
            self._modules = list(stacked.modules())
        arguments = _arguments(self._signature, x)
        if is_separate:
            arguments = {name: _separate(value, n) for name, value in arguments.items()}
        key = (tuple([module.training for module in self._modules]), *arguments)
        if key not in self._plans:
            self._plans[key] = Plan(stacked, set(arguments))
        outputs = self._plans[key](Where(n, streams), arguments)
        return losses_of(loss_fn, outputs, y, n, is_separate=is_separate)

    def __getstate__(self) -> dict[str, Any]:
        return {"_signature": None, "_modules": [], "_plans": {}}


def _arguments(signature: inspect.Signature, x: Any) -> dict[str, Any]:
    """Return the arguments of a call by their names."""
    first = next(iter(signature.parameters.values()), None)
    if isinstance(x, Tensor) and first is not None and first.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD:
        return {first.name: x}  # what nearly all are called with, and `bind` is slow
    if isinstance(x, Mapping):
        bound = signature.bind(**x)
    else:
        bound = signature.bind(*x) if isinstance(x, (tuple, list)) else signature.bind(x)
    for name in bound.arguments:
        if signature.parameters[name].kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
            raise NotUnderstood(f"forward(*{name})")
    return bound.arguments


def _separate(value: Any, n: int) -> Any:
    if not isinstance(value, Tensor):
        raise NotUnderstood(f"an argument that is {type(value).__name__}")
    return Stacked(value, n)


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True  # a buffer whose shape is read must look like that of one replica

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) in BY_MODULE or super().is_leaf_module(m, module_qualified_name)


def _trace(stacked: nn.Module, given: set[str]) -> fx.Graph:
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(stacked.forward).parameters.items()
        if name not in given and parameter.default is not inspect.Parameter.empty
    }
    if type(stacked) in BY_MODULE:  # a layer alone would be taken apart
        return _Tracer().trace(nn.Sequential(stacked))
    before = set(vars(stacked))
    try:
        return _Tracer().trace(stacked, defaults)
    except Exception as error:  # whatever Python code finds when its tensors are only names
        raise NotUnderstood(_first_line(error)) from error
    finally:
        for name in set(vars(stacked)) - before:  # tensors that the code made on its way
            delattr(stacked, name)


def _step(stacked: nn.Module, node: fx.Node) -> Step:
    if node.op == "get_attr":
        return _read(stacked, str(node.target))
    if node.op == "call_module":
        module = _module_of(stacked, node)
        is_last = type(module) is nn.ReLU and _is_only_use_of_fresh(stacked, node)
        return _apply_module(module, node, relu_in_place if is_last else BY_MODULE.get(type(module)))
    rule = (BY_FUNCTION if node.op == "call_function" else BY_METHOD).get(node.target)  # type: ignore[arg-type]
    if rule is None:
        raise NotUnderstood(str(getattr(node.target, "__name__", node.target)))
    return _apply(rule, node)


def _apply(rule: Rule, node: fx.Node) -> Step:
    def step(at: Where, values: Environment) -> Any:
        return rule(at, *map_arg(node.args, values.__getitem__), **map_arg(node.kwargs, values.__getitem__))

    return step


def _module_of(stacked: nn.Module, node: fx.Node) -> nn.Module:
    return stacked if type(stacked) in BY_MODULE else stacked.get_submodule(str(node.target))


def _is_only_use_of_fresh(stacked: nn.Module, node: fx.Node) -> bool:
    """Say whether a layer's input is memory that was made for it and that nobody else reads, the backward pass too."""
    source = node.args[0] if node.args else None
    return (
        isinstance(source, fx.Node)
        and source.op == "call_module"
        and len(source.users) == 1
        and isinstance(_module_of(stacked, source), FRESH)
    )


def _apply_module(module: nn.Module, node: fx.Node, rule: Rule | None) -> Step:
    if rule is None:
        raise NotUnderstood(type(module).__name__)
    if len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node):
        raise NotUnderstood(f"{type(module).__name__} with more than one argument")
    source = node.args[0]

    def step(at: Where, values: Environment) -> Any:
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            raise NotUnderstood(f"hooks on {type(module).__name__}")  # now, because they come and go
        return rule(at, module, values[source])

    return step


def _read(stacked: nn.Module, name: str) -> Step:
    owner, _, last = name.rpartition(".")
    module = stacked.get_submodule(owner)
    if last not in module._parameters and last not in module._buffers:
        raise NotUnderstood(f"the tensor {name!r}, which is neither a parameter nor a buffer")
    return lambda at, _: Stacked(getattr(module, last), at.n)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0]}"
