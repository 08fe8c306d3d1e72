"""Start weights at a scale at which signals keep theirs, forwards and backwards."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TreatmentError
from ..records import Change
from .revive import DEAD, revive
from .treatment import Patient, Steps, Treatment, saved_tensors

# Gains that keep E[f(gain * z)**2] = 1 for standard normal z: 1/sqrt(E[f(z)**2]) to first order. torch has none
# for gelu, silu, elu, mish; these were computed by numerical integration (see tests/test_treatments.py).
GAINS = {
    "linear": 1.0,
    "relu": math.sqrt(2.0),
    "leaky_relu": math.sqrt(2.0 / (1 + 0.01**2)),
    "tanh": 5 / 3,
    "sigmoid": 1.0,
    "selu": 1.0,
    "elu": 1.2452,
    "gelu": 1.5335,
    "silu": 1.6765,
    "mish": 1.4868,
}
_MATRICES = (nn.Linear, nn.modules.conv._ConvNd, nn.Bilinear)
_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_TRANSPOSED = nn.modules.conv._ConvTransposeNd

Fill = Callable[[Tensor, int, int], Any]


def initial_fans(module: nn.Module, weight: Tensor) -> tuple[int, int]:
    """Return fan in and fan out; a transposed convolution's weight is stored the other way round.

    Strides count: with stride s a transposed kernel meets each output 1/s as often in each dimension.
    """
    field = math.prod(weight.shape[2:])
    first, second = weight.shape[1] * field, weight.shape[0] * field
    if isinstance(module, _TRANSPOSED):
        groups, strides = module.groups, math.prod(module.stride)
        return max(weight.shape[0] * field // (strides * groups), 1), max(weight.shape[1] * field, 1)
    return first, second


def _weights(model: nn.Module) -> list[tuple[str, nn.Module, nn.Parameter, str]]:
    """Return each weight to start anew: name, module, parameter, role; a shared one once, norms and bare ones never."""
    found, seen = [], set()
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is None or id(parameter) in seen or not parameter.is_floating_point():
                continue
            role = _role(module, key, parameter)
            if role:
                seen.add(id(parameter))
                found.append((f"{name}.{key}".lstrip("."), module, parameter, role))
    return found


def _role(module: nn.Module, key: str, parameter: Tensor) -> str:
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return "recurrent" if key.startswith("weight_hh") else "input" if key.startswith("weight") else "gate-bias"
    if isinstance(module, nn.MultiheadAttention):
        return "matrix" if parameter.dim() == 2 else "bias"
    if isinstance(module, _MATRICES) or type(module).__name__ == "Conv1D":  # transformers' transposed linear
        return "matrix" if parameter.dim() >= 2 else "bias"
    if isinstance(module, _NORMS):
        return "scale" if key == "weight" else "bias"
    return ""


def _start(identifier: str, fill: Fill) -> Callable[[Patient], Steps]:
    def apply(patient: Patient) -> Steps:
        weights = _weights(patient.model)
        if not weights:
            raise TreatmentError(
                f"treat(): {identifier!r}: found no linear, convolutional or recurrent layer in "
                f"{type(patient.model).__name__}, expected at least one. Nothing was changed."
            )
        with saved_tensors(parameter for _, _, parameter, _ in weights):
            with torch.no_grad():
                for _, module, parameter, role in weights:
                    _fill(module, parameter, role, fill)
            names = tuple(name for name, *_ in weights)
            yield Change(identifier, f"{len(weights)} tensors started anew", names, preserves_function=False)

    return apply


def _fill(module: nn.Module, parameter: Tensor, role: str, fill: Fill) -> None:
    if role == "bias":
        parameter.zero_()
    elif role == "gate-bias":
        parameter.zero_()
        if isinstance(module, (nn.LSTM, nn.LSTMCell)):  # an open forget gate: Jozefowicz et al. 2015
            size = int(module.hidden_size)
            parameter[size : 2 * size] = 0.5  # input and recurrent bias add up to 1
    elif role == "scale":
        if parameter.any():  # else a block that starts as the identity (Goyal et al. 2017)
            parameter.fill_(1.0)
    elif role == "recurrent":
        for gate in torch.split(parameter, int(module.hidden_size)):  # type: ignore[arg-type]
            # half of a random rotation is lost at every step of a rectifier, the identity keeps all: Le et al. 2015
            (nn.init.eye_ if _is_rectified(module) else nn.init.orthogonal_)(gate)
    elif role == "input":
        for gate in torch.split(parameter, int(module.hidden_size)):  # type: ignore[arg-type]
            fill(gate, gate.shape[1], gate.shape[0])
    elif parameter.dim() == 2 and type(module).__name__ == "Conv1D":
        fill(parameter, parameter.shape[0], parameter.shape[1])
    else:
        fill(parameter, *initial_fans(module, parameter))


def _is_rectified(module: nn.Module) -> bool:
    return getattr(module, "mode", "") == "RNN_RELU" or getattr(module, "nonlinearity", "") == "relu"


def _normal(std: float) -> Callable[[Tensor], Any]:
    return lambda weight: nn.init.normal_(weight, std=std)


def _initialisation(identifier: str, fill: Fill, value: str, code: str) -> Treatment:
    """Return the treatment that starts all weights anew, or those of dead units only."""
    if value != DEAD:
        return Treatment(identifier, _start(identifier, fill), value, code=code)

    def draw(module: nn.Module) -> Tensor:
        weight = torch.empty_like(module.weight)  # type: ignore[arg-type]
        fill(weight, *initial_fans(module, weight))
        return weight

    code = f"unvanish.treat(model, optimizer, '{identifier}={DEAD}', inputs=(x,)).keep()  # once units have died"
    return Treatment(identifier, revive(identifier, draw), DEAD, preserves_function=True, code=code)


def he_init(nonlinearity: str = "relu") -> Treatment:
    """Normal weights of variance gain**2 / fan in: keeps the forward variance under rectifiers.

    Args:
        nonlinearity: The activation whose gain is used; or ``"dead"``: only units that are dead on a batch start
            anew, with the gain of a ReLU, and the outputs on the batch stay; see `revive`.

    Source: He et al. 2015, equation 10; Sokar et al. 2023 (``"dead"``).

    Example:
        >>> import unvanish
        >>> model = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> with torch.no_grad():
        ...     _ = model[0].weight.copy_(torch.tensor([[3.0], [-1.0]])), model[0].bias.zero_()
        >>> with unvanish.treat(model, None, "he-init=dead", inputs=(torch.ones(4, 1),)) as changes:
        ...     print(next(iter(changes)).what, model[0].weight[0].item(), bool(model[0].weight[1] > 0))
        1 of 1 dead units are awake again 3.0 True
    """
    gain = gain_of(nonlinearity, "he-init", dead="relu")
    return _initialisation(
        "he-init",
        lambda w, fan_in, fan_out: _normal(gain / math.sqrt(max(fan_in, 1)))(w),
        "" if nonlinearity == "relu" else nonlinearity,
        "for m in model.modules():\n    if isinstance(m, (nn.Linear, nn.Conv2d)):\n"
        "        nn.init.kaiming_normal_(m.weight, nonlinearity='relu')\n        nn.init.zeros_(m.bias)",
    )


def xavier_init(nonlinearity: str = "linear") -> Treatment:
    """Uniform weights of variance 2 gain**2 / (fan in + fan out): a compromise of both directions.

    Args:
        nonlinearity: The activation whose gain is used, or ``"dead"``; see `he_init`.

    Source: Glorot & Bengio 2010, equation 16.
    """
    gain = gain_of(nonlinearity, "xavier-init")

    def fill(weight: Tensor, fan_in: int, fan_out: int) -> None:
        bound = gain * math.sqrt(6 / (fan_in + fan_out))
        nn.init.uniform_(weight, -bound, bound)

    return _initialisation(
        "xavier-init",
        fill,
        "" if nonlinearity == "linear" else nonlinearity,
        "for m in model.modules():\n    if isinstance(m, (nn.Linear, nn.Conv2d)):\n"
        "        nn.init.xavier_uniform_(m.weight)\n        nn.init.zeros_(m.bias)",
    )


def lecun_init(units: str = "") -> Treatment:
    """Normal weights of variance 1 / fan in: keeps the forward variance of linear and selu layers.

    Args:
        units: All, or ``"dead"`` ones only; see `he_init`.

    Raises:
        TreatmentError: if it is neither.

    Source: LeCun et al. 1998, equation 16; Klambauer et al. 2017.
    """
    if units not in ("", DEAD):
        raise TreatmentError(
            f"treat(): 'lecun-init': found {units!r}, expected no value or 'dead'. Nothing was changed."
        )
    return _initialisation(
        "lecun-init",
        lambda w, fan_in, fan_out: _normal(1 / math.sqrt(max(fan_in, 1)))(w),
        units,
        "nn.init.kaiming_normal_(m.weight, nonlinearity='linear')",
    )


def orthogonal_init(nonlinearity: str = "linear") -> Treatment:
    """Orthogonal weights: every singular value is the gain.

    Args:
        nonlinearity: The activation whose gain is used, or ``"dead"``: dead units get rows of an orthogonal matrix,
            which are not orthogonal to those that stay; see `he_init`.

    Source: Saxe, McClelland & Ganguli 2014.
    """
    gain = gain_of(nonlinearity, "orthogonal-init")
    return _initialisation(
        "orthogonal-init",
        lambda w, fan_in, fan_out: nn.init.orthogonal_(w, gain),
        "" if nonlinearity == "linear" else nonlinearity,
        "nn.init.orthogonal_(m.weight)",
    )


def gain_of(nonlinearity: str, treatment: str, *, dead: str = "linear") -> float:
    """Return the gain of an activation; where only dead units start anew, that of ``dead``.

    Raises:
        TreatmentError: if it has none here.
    """
    nonlinearity = dead if nonlinearity == DEAD else nonlinearity
    if nonlinearity not in GAINS:
        raise TreatmentError(
            f"treat(): {treatment!r}: found {nonlinearity!r}, expected 'dead' or a nonlinearity: {', '.join(GAINS)}. "
            "Nothing was changed."
        )
    return GAINS[nonlinearity]


LSUV_TOLERANCE, LSUV_ROUNDS = 0.1, 10


def lsuv_init() -> Treatment:
    """Orthogonal weights, then each layer scaled until its output has variance 1 on a batch.

    Source: Mishkin & Matas 2016, algorithm 1.
    """
    return Treatment("lsuv-init", _lsuv, code="unvanish.treat(model, optimizer, 'lsuv-init').keep()")


def _lsuv(patient: Patient) -> Steps:
    if not patient.inputs:
        raise TreatmentError(
            "treat(): 'lsuv-init' scales layers by their outputs: found no batch, expected one. Nothing was changed. "
            "Call treat(model, optimizer, 'lsuv-init', inputs=(x,))."
        )
    layers = [m for m in patient.model.modules() if isinstance(m, _MATRICES)]
    with saved_tensors(p for layer in layers for p in layer.parameters(recurse=False)):
        with torch.no_grad():
            for layer in layers:
                nn.init.orthogonal_(layer.weight)
                if layer.bias is not None:
                    layer.bias.zero_()
            for layer in layers:
                _scale_to_unit_variance(layer, patient)
        names = tuple(name for name, module in patient.model.named_modules() if module in layers)
        yield Change("lsuv-init", f"{len(layers)} layers scaled to unit variance", names, preserves_function=False)


def _scale_to_unit_variance(layer: nn.Module, patient: Patient) -> None:
    outputs: list[Tensor] = []
    handle = layer.register_forward_hook(lambda module, args, output: outputs.append(output))
    modes = [(module, module.training) for module in patient.model.modules()]
    buffers = list(patient.model.buffers())
    try:
        with saved_tensors(buffers), torch.random.fork_rng(devices=[]):
            for _ in range(LSUV_ROUNDS):
                outputs.clear()
                patient.model(*patient.inputs)
                variance = float(outputs[0].float().var()) if outputs else 0.0
                if not variance > 0 or abs(variance - 1) < LSUV_TOLERANCE:
                    break
                layer.weight.div_(math.sqrt(variance))  # type: ignore[operator]
    finally:
        handle.remove()
        for module, mode in modes:
            module.training = mode
