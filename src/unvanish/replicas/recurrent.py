"""LSTM, GRU and plain recurrences for all replicas at once: one product of stacked matrices for each step in time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .stacked import NotUnderstood, Stacked, Where, for_each

State = tuple[Tensor, ...]  # each (n, batch, hidden)
Step = Callable[[Tensor, Tensor, State], State]  # what comes from the input, and from the state, to the next state


def recurrence(at: Where, module: nn.RNNBase, x: Any) -> tuple[Any, ...]:
    """Return the outputs at all times and the last states, as the module does."""
    x = for_each(x, at.n)
    if len(x.shape) != 3:
        raise NotUnderstood("a recurrent layer without a batch")
    if getattr(module, "proj_size", 0):
        raise NotUnderstood("a projected recurrence")
    rows = x.front().transpose(1, 2) if module.batch_first else x.front()  # (n, time, batch, inputs)
    last: list[State] = []
    for layer in range(module.num_layers):
        if layer:
            rows = _dropout(at, rows, module.dropout if module.training else 0.0)
        ways = [_one_way(module, f"_l{layer}", rows)]
        if module.bidirectional:
            backward, state = _one_way(module, f"_l{layer}_reverse", rows.flip(1))
            ways.append((backward.flip(1), state))
        rows = torch.cat([output for output, _ in ways], -1) if len(ways) > 1 else ways[0][0]
        last += [state for _, state in ways]
    output = Stacked(rows.transpose(1, 2) if module.batch_first else rows, at.n)
    states = tuple(Stacked(torch.stack(parts, 1), at.n) for parts in zip(*last, strict=True))  # (n, layers, batch, ...)
    return output, states if len(states) > 1 else states[0]


def _one_way(module: nn.RNNBase, suffix: str, rows: Tensor) -> tuple[Tensor, State]:
    """Run one layer in one direction; return the outputs ``(n, time, batch, hidden)`` and the last state."""
    weight, bias = (_parameters(module, kind, suffix) for kind in ("weight", "bias"))
    n, time, batch, _ = rows.shape
    from_input = torch.unflatten(_times(rows.flatten(1, 2), weight[0], bias[0]), 1, (time, batch))
    step, states = _STEPS[module.mode]
    state: State = (rows.new_zeros(n, batch, module.hidden_size),) * states
    outputs = []
    for now in from_input.unbind(1):
        state = step(now, _times(state[0], weight[1], bias[1]), state)
        outputs.append(state[0])
    return torch.stack(outputs, 1), state


def _parameters(module: nn.RNNBase, kind: str, suffix: str) -> Sequence[Tensor | None]:
    return [getattr(module, f"{kind}_{part}{suffix}", None) for part in ("ih", "hh")]


def _times(rows: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    assert weight is not None
    turned = weight.transpose(1, 2)
    return torch.bmm(rows, turned) if bias is None else torch.baddbmm(bias.unsqueeze(1), rows, turned)


def _dropout(at: Where, rows: Tensor, p: float) -> Tensor:
    if not p:
        return rows
    return F.dropout(rows, p) if at.streams is None else rows * at.streams.kept(rows.shape[1:], p, like=rows)


def _lstm(now: Tensor, before: Tensor, state: State) -> State:
    gates, cell, out = (now + before).tensor_split((2 * state[1].shape[-1], 3 * state[1].shape[-1]), -1)
    enter, keep = gates.sigmoid().chunk(2, -1)
    kept = keep * state[1] + enter * cell.tanh()
    return out.sigmoid() * kept.tanh(), kept


def _gru(now: Tensor, before: Tensor, state: State) -> State:
    width = 2 * state[0].shape[-1]
    reset, update = (now[..., :width] + before[..., :width]).sigmoid().chunk(2, -1)
    new = (now[..., width:] + reset * before[..., width:]).tanh()
    return (new + update * (state[0] - new),)


_STEPS: dict[str, tuple[Step, int]] = {
    "LSTM": (_lstm, 2),
    "GRU": (_gru, 1),
    "RNN_TANH": (lambda now, before, state: ((now + before).tanh(),), 1),
    "RNN_RELU": (lambda now, before, state: ((now + before).relu(),), 1),
}
