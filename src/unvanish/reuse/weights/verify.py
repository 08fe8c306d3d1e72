"""The proof of a load: the same inputs, the same outputs, or the first layer where they part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import OptionError
from ...untouched import untouched


@dataclass(frozen=True)
class Verification:
    """What came of a proof.

    Args:
        error: The largest difference of an output.
        relative: That, as a share of the largest number among the outputs expected.
        tolerance: Allowed for ``relative``.
        first: The first layer that differs, if outputs of layers were given; empty if none does.
        layers: The relative error of each layer that was given.
    """

    error: float
    relative: float
    tolerance: float
    first: str = ""
    layers: dict[str, float] = field(default_factory=dict)

    @property
    def is_passed(self) -> bool:
        """Whether the outputs are the same."""
        return self.relative <= self.tolerance  # nan is no proof

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "error": self.error,
            "relative": self.relative,
            "tolerance": self.tolerance,
            "first_difference": self.first,
            "layers": self.layers,
        }

    def __str__(self) -> str:
        share = f"{self.relative:.1e} of the largest"
        words = f"outputs differ by at most {self.error:.1e} ({share}), allowed {self.tolerance:g}"
        if self.first:
            words += f"; the first layer that differs: {self.first!r}, by {self.layers[self.first]:.1e}"
        return words


def verify(model: nn.Module, inputs: Any, expected: Any, partners: Mapping[str, str], tolerance: float) -> Verification:
    """Compute the outputs of a model in evaluation mode, and compare them; the model stays as it is.

    Args:
        model: After the load.
        inputs: A tensor or array, or a tuple or dict of arguments.
        expected: The output; or a dict by layer, of the file or of the model, whose last entry is the output.
        partners: From layers of the file to those of the model.
        tolerance: Allowed as a share of the largest number expected.

    Raises:
        OptionError: if a layer is named that was not called.
    """
    outputs = dict(expected) if isinstance(expected, Mapping) else {"": expected}
    with untouched(model), torch.no_grad():
        model.eval()
        calls = _Calls(model if len(outputs) > 1 else nn.Identity())  # all activations of a large net are many
        with calls:
            output = _call(model, inputs)
    errors = {name: _layer_error(calls, partners, name, value) for name, value in list(outputs.items())[:-1]}
    last, wanted = list(outputs.items())[-1]
    error, relative = _difference(_first(output), _tensor(wanted))
    first = next((name for name, (_, share) in errors.items() if not share <= tolerance), "")
    if last and not first and not relative <= tolerance:
        first = last
    layers = {name: share for name, (_, share) in errors.items()} | ({last: relative} if last else {})
    return Verification(error, relative, tolerance, first, layers)


class _Calls:
    """The outputs of all modules in the order in which they were computed."""

    def __init__(self, model: nn.Module) -> None:
        self.names = {module: name for name, module in model.named_modules()}
        self.outputs: list[tuple[nn.Module, Any, Any]] = []
        self._handles: list[Any] = []

    def __enter__(self) -> None:
        for module in self.names:
            self._handles.append(module.register_forward_hook(self._keep))

    def _keep(self, module: nn.Module, arguments: Any, output: Any) -> None:
        # an activation in place may overwrite both
        self.outputs.append((module, _copy(arguments), _copy(output)))

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def after(self, name: str) -> list[Tensor]:
        """Return what a layer gave, and what was made of it before the next layer with weights took it.

        The layers of a file often hold their activation; those of torch do not.
        """
        called = [number for number, (module, *_) in enumerate(self.outputs) if self.names[module] == name]
        found: list[Tensor] = []
        for number in called[:1]:
            found.append(_first(self.outputs[number][2]))
            for module, arguments, output in self.outputs[number + 1 :]:
                if any(True for _ in module.parameters()):
                    found += [_first(arguments)] if arguments else []
                    break
                found.append(_first(output))
        return [tensor for tensor in found if isinstance(tensor, Tensor)]


def _layer_error(calls: _Calls, partners: Mapping[str, str], name: str, value: Any) -> tuple[float, float]:
    module = partners.get(name, name)
    given = calls.after(module)
    if not given:
        raise OptionError(
            f"load_weights(): verify: found outputs of {name!r}, expected a layer of the file or of the model that is "
            "called. Leave it out."
        )
    return min((_difference(tensor, _tensor(value)) for tensor in given), key=lambda pair: _sortable(pair[1]))


def _sortable(number: float) -> float:
    return number if number == number else float("inf")


def _difference(ours: Tensor, theirs: Tensor) -> tuple[float, float]:
    """Return the largest difference, and its share of the largest number; channels may stand last in theirs."""
    ours = ours.detach().cpu().double()
    theirs = theirs.double()
    readings = [theirs] if theirs.shape == ours.shape else []
    if theirs.dim() > 2:
        moved = theirs.movedim(-1, 1)
        readings += [moved] if moved.shape == ours.shape else []
    if not readings:
        if theirs.numel() != ours.numel():
            return float("inf"), float("inf")
        readings = [theirs.reshape(ours.shape)]
    scale = max(float(theirs.abs().max()) if theirs.numel() else 0.0, 1e-30)
    error = min((float((ours - reading).abs().max()) if ours.numel() else 0.0 for reading in readings), key=_sortable)
    return error, error / scale


def _call(model: nn.Module, inputs: Any) -> Any:
    reference = next(model.parameters(), None)

    def placed(value: Any) -> Any:
        tensor = _tensor(value)
        if reference is None:
            return tensor
        dtype = reference.dtype if tensor.is_floating_point() else tensor.dtype
        return tensor.to(device=reference.device, dtype=dtype)

    if isinstance(inputs, Mapping):
        return model(**{name: placed(value) for name, value in inputs.items()})
    if isinstance(inputs, (tuple, list)):
        return model(*map(placed, inputs))
    return model(placed(inputs))


def _tensor(value: Any) -> Tensor:
    return value.detach().cpu() if isinstance(value, Tensor) else torch.tensor(value)


def _first(value: Any) -> Any:
    """Return the first tensor of an output."""
    while isinstance(value, (tuple, list, Mapping)) and value:
        value = next(iter(value.values())) if isinstance(value, Mapping) else value[0]
    return value


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, (tuple, list)):
        return tuple(map(_copy, value))
    return value
