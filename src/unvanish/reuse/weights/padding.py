"""Padding: no weight, but another function of the same shapes.

Source: the padding that 'same' stands for, as TensorFlow and Keras compute it: as many outputs as inputs divided by
the stride, rounded up; what is odd goes behind.  Held by `tests/test_weights_golden.py`.
"""

from __future__ import annotations

from typing import Any

from .foreign import Family, ForeignLayer
from .targets import CONV, CONV_TRANSPOSE, Target

Pads = tuple[tuple[int, int], ...]  # in front and behind, for each axis


def check_padding(source: ForeignLayer, target: Target, family: Family) -> tuple[list[str], list[str]]:
    """Compare the padding of a convolution; return faults and doubts."""
    module: Any = target.module
    if isinstance(module, CONV_TRANSPOSE):
        return _check_transpose(source, module)
    if not isinstance(module, CONV):
        return [], []
    told = source.settings.get("padding")
    ours = _ours(module)
    if told is None:
        if family == "onnx" or max(module.stride) == 1 or not any(map(any, ours)):
            return [], []
        doubt = (
            f"the file does not tell the padding; 'same' with stride {max(module.stride)} pads behind more than in "
            f"front where sizes are even, the {target.kind} pads {ours}"
        )
        return [], [doubt]
    theirs = _theirs(source, module, told)
    if theirs is None:
        return [], [f"the file says padding={told!r}, and not for which size; the {target.kind} pads {ours}"]
    if ours == theirs:
        return [], []
    if not any(map(any, ours)):
        doubt = (
            f"the file pads {theirs} in front and behind, the {target.kind} nothing. Put {_pad_module(theirs)} in "
            "front of it, if the model does not"
        )
        return [], [doubt]
    fault = (
        f"found a padding of {theirs} in front and behind, expected {ours}: another function of the same shapes. Build "
        f"it with {_advice(theirs)}"
    )
    return [fault], []


def same_padding(size: int, kernel: int, stride: int, dilation: int) -> tuple[int, int]:
    """Return how 'same' pads an axis.

    Example:
        >>> same_padding(8, kernel=3, stride=2, dilation=1), same_padding(7, kernel=3, stride=2, dilation=1)
        ((0, 1), (1, 1))
    """
    outputs = -(-size // stride)
    total = max((outputs - 1) * stride + dilation * (kernel - 1) + 1 - size, 0)
    return total // 2, total - total // 2


def _ours(module: Any) -> Pads:
    if module.padding == "valid":
        return ((0, 0),) * len(module.kernel_size)
    if module.padding == "same":
        sizes = zip(module.kernel_size, module.dilation, strict=True)
        return tuple(same_padding(1 << 20, kernel, 1, dilation) for kernel, dilation in sizes)
    return tuple((pad, pad) for pad in module.padding)


def _theirs(source: ForeignLayer, module: Any, told: Any) -> Pads | None:
    """Return how the file's layer pads; None if that depends on a size that is not told."""
    kernel, stride, dilation = module.kernel_size, module.stride, module.dilation
    space = len(kernel)
    before = source.settings.get("padded")  # a layer of padding in front of it
    if isinstance(told, (list, tuple)):  # ONNX: all fronts, then all ends
        return tuple((told[axis], told[axis + space]) for axis in range(space)) if len(told) == 2 * space else None
    if told == "causal":
        return ((dilation[0] * (kernel[0] - 1), 0),)
    if told == "same":
        shape = source.settings.get("shape", ())
        sizes = shape[:-1] if len(shape) == space + 1 else (None,) * space
        if source.settings.get("data_format") == "channels_first":
            sizes = shape[1:] if len(shape) == space + 1 else sizes
        found: list[tuple[int, int]] = []
        for axis, size in enumerate(sizes):
            if not isinstance(size, int) and stride[axis] > 1:
                return None
            number = size if isinstance(size, int) else 1 << 20
            found.append(same_padding(number, kernel[axis], stride[axis], dilation[axis]))
        return tuple(found)
    if isinstance(before, int):
        return ((before, before),) * space
    if isinstance(before, list) and len(before) == space:
        return tuple((pad, pad) if isinstance(pad, int) else (int(pad[0]), int(pad[1])) for pad in before)
    if isinstance(before, list) and space == 1 and len(before) == 2:
        return ((int(before[0]), int(before[1])),)
    return ((0, 0),) * space


def _check_transpose(source: ForeignLayer, module: Any) -> tuple[list[str], list[str]]:
    told = source.settings.get("padding")
    ours = tuple((pad, pad - extra) for pad, extra in zip(module.padding, module.output_padding, strict=True))
    if told is None:
        if not any(map(any, ours)):
            return [], []
        return [], [f"the file does not tell how the transposed convolution crops; the module crops {ours}"]
    if isinstance(told, (list, tuple)):
        space = len(ours)
        added = source.settings.get("output_padding") or (0,) * space
        theirs: Pads = tuple((told[axis], told[axis + space] - added[axis]) for axis in range(space))
    else:
        sizes = zip(module.kernel_size, module.stride, module.dilation, strict=True)
        theirs = tuple(_keras_crop(told, dilation * (kernel - 1) + 1, stride) for kernel, stride, dilation in sizes)
    if ours == theirs:
        return [], []
    front, extra = tuple(pad for pad, _ in theirs), tuple(pad - end for pad, end in theirs)
    if min(extra) >= 0:
        advice = f"Build it with padding={front}, output_padding={extra}"
    elif any(map(any, ours)):
        advice = "Build it with padding=0, and crop its output"
    else:
        return [], [
            f"the file crops its output by {theirs} in front and behind, the module by nothing. Crop it, if not done"
        ]
    return [f"found an output cropped by {theirs} in front and behind, expected {ours}: another function. {advice}"], []


def _keras_crop(told: Any, kernel: int, stride: int) -> tuple[int, int]:
    """Return what Keras cuts off the full output, ``(size - 1) * stride + kernel``; below 0 it adds."""
    if told == "same":
        total = kernel - stride
        front = max(total, 0) // 2
        return front, total - front
    return 0, min(kernel - stride, 0)


def _pad_module(pads: Pads) -> str:
    numbers = ", ".join(str(pad) for pair in reversed(pads) for pad in pair)
    return f"nn.ZeroPad{len(pads)}d(({numbers}))"


def _advice(pads: Pads) -> str:
    if all(front == behind for front, behind in pads):
        return f"padding={tuple(front for front, _ in pads)}"
    return f"padding=0, and {_pad_module(pads)} in front of it"
