"""What the signal does on its way through the layers, forwards and backwards."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ..records import Finding, Layer, Severity, Trace
from .progress import HAMPERED, MIN_STEPS, Progress, progress
from .reading import (
    always,
    at_start,
    column,
    first_step,
    is_hidden,
    late,
    median_of,
    names,
    running_layers,
    share_of_run,
    throughout,
    trained_layers,
)

VANISHED = -13.3  # log2 of 1e-4: the share of the output's gradient that reaches a layer
SQUASHED = -6.0  # log2 of (1/4)**3: three sigmoids, whose slope is 1/4 at most
EXPLODED = 10.0  # log2 of 1,000
SPIKE = 100.0  # largest gradient over the median one
MANY_DEAD = 0.5
SATURATED = 0.5
LARGE_SCALE = 4.0  # times 1/sqrt(fan in): three layers of it multiply the signal by 64
SMALL_SCALE = 0.25
HIGH_INITIAL_LOSS = 2.0  # times the loss of a constant answer
_DEAD_KINDS = frozenset(("relu", "relu6", "gelu", "silu", "mish", "softplus", "hardswish"))
_SATURATING = frozenset(("tanh", "sigmoid", "hardtanh", "hardsigmoid"))


def _severity(learned: Progress) -> Severity:
    return "critical" if learned.is_poor else "warning"


def vanishing_gradient(trace: Trace) -> Iterator[Finding]:
    """The product of backward gains leaves nothing for the first layers, and nothing is learnt."""
    learned, layers = progress(trace), trained_layers(trace)
    if not layers or not (learned.is_poor or _is_cut_off(trace, layers)):
        return
    flow = np.minimum(at_start(trace, "log2_flow"), throughout(trace, "log2_flow"))
    limit = VANISHED
    if learned.has_failed and _is_sigmoid_net(trace) and not (flow[layers] < VANISHED).any():
        limit = SQUASHED
    faint = [place for place in layers if flow[place] < limit]
    if not faint:
        return
    first, share = faint[0], "1e-4" if limit == VANISHED else "1/64"
    rms = throughout(trace, "grad_rms")[first]
    gain = median_of(throughout(trace, "log2_gain")[layers])
    lost = column(trace, "log2_flow", first) < limit
    how = (
        f"gets 2**{flow[first]:.0f} of it (rms {rms:.2g}), because each layer passes back {2**gain:.2g} of what it "
        "receives."
        if rms > 0
        else "gets exactly 0: on the way back lies a function without slope."
    )
    yield Finding(
        "vanishing-gradient",
        _severity(learned),
        f"{len(faint)} of {len(layers)} layers get less than {share} of the gradient at the output; "
        f"{trace.layers[first].name!r} {how}",
        "Hochreiter 1991; Glorot & Bengio 2010, section 4.2; threshold: AutoTrainer 2021 with its accuracy gate",
        layer=trace.layers[first].name,
        layers=names(trace, faint),
        step=first_step(trace, lost),
        share_of_run=share_of_run(lost, column(trace, "log2_flow", first)),
        evidence={"log2_flow": float(flow[first]), "grad_rms": float(rms), "log2_gain": gain},
        treatments=("he-init", "batch-norm", "skip-connections", "leaky-relu"),
    )


def _is_cut_off(trace: Trace, layers: list[int]) -> bool:
    """Say whether all hidden layers got a gradient of exactly 0 at every sample, and what follows them did not."""
    hidden = [place for place in layers if is_hidden(trace.layers[place])]
    grads = trace.measures["grad_rms"]
    others = grads[:, [place for place in layers if place not in hidden]]
    is_long = trace.total_steps >= MIN_STEPS
    return (
        is_long and bool(hidden) and bool(always(grads[:, hidden], grads[:, hidden] == 0).all() and (others > 0).any())
    )


def _is_sigmoid_net(trace: Trace) -> bool:
    """Say whether at least three layers, and no others that are hidden, end in a sigmoid."""
    kinds = [layer.activation for layer in trace.layers if layer.activation and is_hidden(layer)]
    return kinds.count("sigmoid") >= 3 and set(kinds) == {"sigmoid"}


def exploding_gradient(trace: Trace) -> Iterator[Finding]:
    """The gradient grows on its way down, through time, or in sudden spikes."""
    learned, layers = progress(trace), trained_layers(trace)
    if not layers or trace.total_steps < 5:
        return
    for place in layers:
        finding = _exploding_in_time(trace, place, learned)
        if finding is not None:
            yield finding
            return
    flow = at_start(trace, "log2_flow")
    loud = [place for place in layers if flow[place] > EXPLODED]
    if loud and learned.is_poor:
        place = max(loud, key=lambda p: float(flow[p]))
        yield Finding(
            "exploding-gradient",
            "critical",
            f"At the start {trace.layers[place].name!r} gets 2**{flow[place]:.0f} times the gradient at the output: "
            "each layer amplifies it on the way down.",
            "Pascanu, Mikolov & Bengio 2013, section 2; Glorot & Bengio 2010, section 4.2",
            layer=trace.layers[place].name,
            layers=names(trace, loud),
            evidence={"log2_flow": float(flow[place])},
            treatments=("clip-norm", "he-init", "layer-norm"),
        )
        return
    yield from _spikes(trace, layers, learned)


def _exploding_in_time(trace: Trace, place: int, learned: Progress) -> Finding | None:
    """A plain recurrent layer whose recurrent weight amplifies at every time step."""
    layer = trace.layers[place]
    growth = layer.sequence * math.log2(max(layer.recurrent_radius, 1e-9))
    peak = learned.start / learned.baseline if learned.baseline > 0 else 1.0
    if layer.recurrent_radius <= 1.0 or growth < math.log2(SPIKE) or not (learned.is_poor or peak > SPIKE):
        return None
    return Finding(
        "exploding-gradient",
        _severity(learned),
        f"The recurrent weight of {layer.name!r} has a spectral radius of {layer.recurrent_radius:.3g}: over "
        f"{layer.sequence} time steps signals and gradients grow by up to 2**{growth:.0f}.",
        "Pascanu, Mikolov & Bengio 2013, section 2.1: radius**T",
        layer=layer.name,
        layers=(layer.name,),
        evidence={"spectral_radius": layer.recurrent_radius, "time_steps": layer.sequence, "log2_growth": growth},
        treatments=("clip-norm", "orthogonal-init", "lower-lr"),
    )


def _spikes(trace: Trace, layers: list[int], learned: Progress) -> Iterator[Finding]:
    """Gradients far above their usual size, while the loss suffers."""
    total = np.sqrt(np.nansum(trace.measures["grad_rms"][:, layers].astype(float) ** 2, axis=1))
    total = total[np.isfinite(total)]
    if len(total) < 10 or not np.median(total) > 0:
        return
    spike = float(total.max() / np.median(total))
    if spike < SPIKE or not (learned.is_poor and (learned.peak > 10 or not learned.is_finite)):
        return
    place = layers[int(np.nanargmax(np.nanmax(trace.measures["grad_rms"][:, layers], axis=0)))]
    yield Finding(
        "exploding-gradient",
        "critical",
        f"The gradient jumped to {spike:.3g} times its median, and the loss to {learned.peak:.3g} times the baseline.",
        "Pascanu, Mikolov & Bengio 2013, section 2.3 (cliffs)",
        layer=trace.layers[place].name,
        layers=(trace.layers[place].name,),
        evidence={"spike_ratio": spike, "loss_peak": learned.peak},
        treatments=("clip-norm", "lower-lr"),
    )


def non_finite(trace: Trace) -> Iterator[Finding]:
    """A nan or inf in loss, gradient, weights or outputs."""
    event = next((event for event in trace.events if event.kind == "non-finite-loss"), None)
    bad_losses = ~np.isfinite(trace.losses)
    bad: NDArray[np.bool_] = np.asarray(np.nan_to_num(trace.measures["nonfinite"], nan=0.0) > 0)
    bad_samples: NDArray[np.bool_] = np.asarray(bad.any(axis=1))
    if event is None and not bad_losses.any() and not bad.any():
        return
    steps = [int(trace.loss_steps[bad_losses][0])] if bad_losses.any() else []
    steps += [event.step] if event is not None else []
    rows = np.flatnonzero(bad_samples)
    steps += [int(trace.steps[rows[0]])] if len(rows) else []
    step = min(steps)
    if int(trace.facts.get("skipped_steps", 0)) and not bad_losses.any() and event is None:
        return  # mixed precision found it and left the step out
    details = dict(event.details) if event is not None else {}
    layer, operation = str(details.get("layer", "")), str(details.get("op", ""))
    if not layer and len(rows):
        layer = trace.layers[int(np.flatnonzero(bad[rows[0]])[0])].name
    smallest = details.get("smallest_input")
    where = f" Operation {operation}" if operation else ""
    where += f" got {smallest:.3g}" if isinstance(smallest, (int, float)) and smallest <= 0 else ""
    is_lasting = bool(bad_losses.sum() > 0.01 * len(bad_losses)) or bool(bad_samples[-1:].any())
    yield Finding(
        "non-finite",
        "critical" if is_lasting else "warning",
        f"The loss or a tensor is nan or inf since step {step}.{where + '.' if where else ''} "
        f"{int(bad_losses.sum())} of {len(bad_losses)} losses are not finite.",
        "exact; IEEE 754: nan reaches every weight with the next update",
        layer=layer,
        layers=tuple(name for name in (layer,) if name),
        step=step,
        share_of_run=max(float(part.mean()) if len(part) else 0.0 for part in (bad_losses, bad_samples)),
        evidence={
            "bad_losses": int(bad_losses.sum()),
            **({"smallest_input": float(smallest)} if isinstance(smallest, (int, float)) else {}),
        },
        treatments=("lower-lr", "clip-norm") if operation in ("", "weights") else _remedy_of(operation),
    )


# What exp and powers make infinite was too large before them.
_WITH_AN_EDGE = frozenset("Log Log2 Log10 Log1P Sqrt Rsqrt Div Reciprocal Acos Asin".split())


def _remedy_of(operation: str) -> tuple[str, ...]:
    """Return what helps an operation that made the first number that is not finite."""
    return ("safe-math",) if operation in _WITH_AN_EDGE else ()


def dead_units(trace: Trace) -> Iterator[Finding]:
    """Units of a rectifier that no example switches on: they get no gradient and stay dead."""
    learned = progress(trace)
    layers = [
        place
        for place in running_layers(trace)
        if trace.layers[place].activation in _DEAD_KINDS and (is_hidden(trace.layers[place]) or learned.is_blind)
    ]
    if not layers or not learned.is_poor:
        return
    share = trace.measures["dead_share"]
    # dead in every batch: the smallest share seen is the best bound from samples
    half = share[len(share) // 2 :, layers]
    lowest = np.where(np.isfinite(half), half, np.inf).min(axis=0, initial=np.inf)
    worst = [place for place, value in zip(layers, lowest, strict=True) if MANY_DEAD <= value <= 1]
    if not worst:
        return
    first = max(worst, key=lambda place: float(lowest[layers.index(place)]))
    value = float(lowest[layers.index(first)])
    at_once = float(at_start(trace, "dead_share")[first])
    is_dead = column(trace, "dead_share", first) >= MANY_DEAD
    began = "from initialisation on" if at_once >= MANY_DEAD else f"since step {first_step(trace, is_dead)}"
    yield Finding(
        "dead-units",
        "critical",
        f"{value:.0%} of the units of {trace.layers[first].name!r} are switched on by no example, {began}: a "
        "rectifier passes no gradient there, so they cannot come back.",
        "Glorot, Bordes & Bengio 2011; SageMaker Debugger's DeadRelu (50 %) with a gate on the loss",
        layer=trace.layers[first].name,
        layers=names(trace, worst),
        step=first_step(trace, is_dead),
        share_of_run=share_of_run(is_dead, column(trace, "dead_share", first)),
        evidence={"dead_share": value, "dead_share_start": at_once, "remaining": learned.remaining},
        treatments=("leaky-relu", "he-init", "lower-lr", "batch-norm"),
    )


def saturated_activations(trace: Trace) -> Iterator[Finding]:
    """Sigmoid or tanh units pinned to an end of their range, where the slope is near zero."""
    learned = progress(trace)
    layers = [
        place
        for place in running_layers(trace)
        if trace.layers[place].activation in _SATURATING and is_hidden(trace.layers[place])
    ]
    if not layers or not (learned.is_poor or learned.remaining > HAMPERED):
        return
    start, end = at_start(trace, "saturated_share"), late(trace, "saturated_share")
    worst = [p for p in layers if start[p] > SATURATED or (learned.is_poor and end[p] > SATURATED)]
    if not worst:
        return
    first = worst[0]
    pinned = column(trace, "saturated_share", first) > SATURATED
    yield Finding(
        "saturated-activations",
        _severity(learned),
        f"{max(start[first], end[first]):.0%} of the activations of {trace.layers[first].name!r} "
        f"({trace.layers[first].activation}) lie where its slope is under 5 % of the largest "
        f"({start[first]:.0%} at the start): almost no gradient passes.",
        "Glorot & Bengio 2010, section 3; slope bound: derivative of the function",
        layer=trace.layers[first].name,
        layers=names(trace, worst),
        step=first_step(trace, pinned),
        share_of_run=share_of_run(pinned, column(trace, "saturated_share", first)),
        evidence={"saturated_share": float(end[first]), "saturated_share_start": float(start[first])},
        treatments=("standardise-inputs", "xavier-init", "batch-norm"),
    )


def poor_initialisation(trace: Trace) -> Iterator[Finding]:
    """Weights that start far from the scale at which signals keep their size, and a run that suffers for it."""
    learned, layers = progress(trace), trained_layers(trace)
    if len(layers) < 2 or trace.total_steps < 5:
        return
    scale = weight_scale(trace)
    large = [place for place in layers if scale[place] > LARGE_SCALE]
    small = [place for place in layers if scale[place] < SMALL_SCALE and is_hidden(trace.layers[place])]
    first = float(np.median(trace.losses[:3])) if len(trace.losses) else math.nan
    peak = first / learned.baseline if learned.baseline > 0 else 1.0
    if large and (learned.is_poor or peak > HIGH_INITIAL_LOSS):
        place = max(large, key=lambda p: float(scale[p]))
        start = f"the first losses are {peak:.3g} times that of a constant answer" if peak > 1 else "signals overflow"
        word = "large"
    elif small and learned.is_poor:
        place = min(small, key=lambda p: float(scale[p]))
        start, word = "what tells inputs apart shrinks from layer to layer, forwards and backwards", "small"
    else:
        return
    yield Finding(
        "poor-initialisation",
        _severity(learned),
        f"The weights of {len(large or small)} of {len(layers)} layers start too {word}: {trace.layers[place].name!r} "
        f"at {scale[place]:.2g} times 1/sqrt(fan in) (0.6 to 1.7 keeps the scale), so {start}.",
        "He et al. 2015, section 2.2; Glorot & Bengio 2010, section 4.2; TheDeepChecker 2022 (variance against both)",
        layer=trace.layers[place].name,
        layers=names(trace, large or small),
        evidence={"weight_scale": float(scale[place]), "initial_loss_ratio": peak, "remaining": learned.remaining},
        treatments=("he-init", "lsuv-init", "batch-norm"),
    )


def weight_scale(trace: Trace) -> NDArray[np.float64]:
    """Return each layer's first weights relative to 1/sqrt(fan in); nan where that says nothing. (L,).

    Usual initialisations give 0.58 (torch's default), 1 (LeCun, Glorot, orthogonal), 1.41 (He) or 1.67 (tanh).
    """
    fan_in = np.array([layer.fan_in if _has_scale(layer) else 0 for layer in trace.layers], dtype=float)
    weights = trace.measures["weight_rms"][:1].astype(np.float64)  # before the first update
    first = weights[0] if len(weights) else np.full(len(fan_in), np.nan)
    return np.where(fan_in > 0, first * np.sqrt(fan_in), np.nan)


def _has_scale(layer: Layer) -> bool:
    return any(kind in layer.kind for kind in ("Linear", "Conv", "RNN", "LSTM", "GRU"))
