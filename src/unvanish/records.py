"""What travels between the stages: frozen values of plain numbers, no torch.

``watch`` writes a `Recording`, ``diagnose`` reads it and answers with `Findings`, ``report``
draws both. One `Recording` holds one `Trace` per optimiser, because that is the unit that learns:
a GAN has two, a script that trains twice has two.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .version import VERSION

SCHEMA_VERSION = 1

Severity = Literal["critical", "warning", "info"]
Verdict = Literal["clean", "findings", "inconclusive"]
SEVERITIES: tuple[Severity, ...] = ("critical", "warning", "info")

# One column per measure of a layer, one row per sampled step. Dimensionless unless the name says
# otherwise; nan means "not seen at this step".
MEASURES: tuple[str, ...] = (
    "grad_rms",  # of the loss gradient before clipping, loss per weight
    "grad_zero_share",  # share of gradient entries that are exactly 0
    "weight_rms",
    "update_ratio",  # norm of the applied update over norm of the weights
    "alignment",  # cosine between the applied update and the descent direction -gradient
    "log2_gain",  # backward gain of this layer: log2 |dL/d input side| / |dL/d output side|
    "log2_flow",  # running product of the gains from the output down to here, log2
    "delta_norm",  # norm of dL/d(output of this layer) over the batch
    "activation_mean",
    "activation_std",  # over examples and units
    "activation_rms",
    "unit_std",  # rms over units of the spread over examples; 0 = output ignores the input
    "dead_share",  # share of units of the following activation that no example switches on
    "zero_share",  # share of entries of the following activation that are exactly 0
    "saturated_share",  # share of entries of the following activation near its asymptotes
    "nonfinite",  # how many of: output, gradient, weights held nan or inf (0 to 3)
)

# One column per measure of the whole step.
SCALARS: tuple[str, ...] = (
    "loss",
    "lr",
    "batch",  # examples in the first input
    "input_rms",
    "input_std_max",  # largest spread of one input feature over the examples
    "input_std_min",  # smallest spread of a feature that varies at all
    "input_offset",  # largest |mean|/std of a feature that varies
    "output_mean",
    "output_std",
    "output_rms",
    "output_unit_std",  # spread over the examples alone
    "target_mean",
    "target_std",
    "target_min",
    "target_max",
    "error_mean",  # mean(prediction - target), where both are known
    "seconds",  # since the watch began
)


# One column per measure of how coupled replicas learn, one row per measured pull; a way is that from the pull before.
SPEEDS: tuple[str, ...] = (
    "step_ratio",  # way by the optimiser over norm of the weights, all replicas together
    "pull_ratio",  # way by the pull over norm of the weights, all replicas together
    "centre_ratio",  # way of the mean of the replicas over its norm: what is learnt together
    "pull_alignment",  # cosine between the way by the optimiser and the way by the pull
    "spread_ratio",  # root mean square distance of the replicas to their mean, over its norm
)


@dataclass(frozen=True, slots=True)
class Layer:
    """The facts of one layer that do not change from step to step."""

    name: str
    kind: str
    parameters: int
    position: int = 0
    activation: str = ""  # the function that follows: relu, tanh, sigmoid, softmax, ...
    units: int = 0
    fan_in: int = 0
    is_trainable: bool = True  # some parameter requires a gradient
    is_optimised: bool = True  # some parameter belongs to the optimiser of this trace
    is_optimised_elsewhere: bool = False  # ... or to another optimiser of the run
    is_registered: bool = True  # found by named_modules() of its model
    is_fresh: bool = False  # the weights look as the default initialisation left them
    is_symmetric: bool = False  # all units had equal weights, also after the first updates
    is_normalisation: bool = False
    norm_values: int = 0  # values per channel that a batch norm averaged over, in training
    path_depth: int = 0  # parametric layers between here and the loss, along the gradient
    recurrent_radius: float = 0.0  # spectral radius of a plain RNN's recurrent weight
    sequence: int = 0  # time steps a recurrent layer was unrolled over
    replicas: int = 0  # of which the parameters are stacked; the facts are those of one; 0 = an ordinary layer


@dataclass(frozen=True, slots=True)
class Op:
    """One operation between the network and the loss, as autograd recorded it."""

    name: str  # the autograd node without "Backward0": LogSoftmax, MseLoss, Sub, ...
    shape: tuple[int, ...] = ()
    layer: str = ""  # the layer or module that produced it, if known
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Event:
    """A first occurrence: kept whatever the length of the run."""

    step: int
    kind: str
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Speeds:
    """How fast each layer of coupled replicas learns, and by what.

    Args:
        layers: Names of L layers.
        steps: (S,) how many steps had been done at each measured pull.
        values: For every name in `SPEEDS` a (S, L) array.
    """

    layers: tuple[str, ...]
    steps: NDArray[np.int64]
    values: Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Trace:
    """What one optimiser's training looked like.

    Args:
        name: The optimiser, as the report calls it.
        layers: L layers, from input to output.
        steps: (T,) numbers of the sampled steps, counted from 0.
        measures: For every name in `MEASURES` a (T, L) array.
        scalars: For every name in `SCALARS` a (T,) array.
        loss_steps: (S,) steps of ``losses``; every step until the record is full, then a stride.
        losses: (S,) losses of these steps.
        loss_paths: Operations from the loss (first) down to the network (last), one tuple a branch.
        events: First occurrences, by step.
        total_steps: How many steps the optimiser took.
        facts: Further plain facts of the run (optimiser settings, skipped steps, ...).
        speeds: Of coupled replicas, if a coupling was watched.
    """

    name: str
    layers: tuple[Layer, ...]
    steps: NDArray[np.int64]
    measures: Mapping[str, NDArray[np.float32]]
    scalars: Mapping[str, NDArray[np.float64]]
    loss_steps: NDArray[np.int64]
    losses: NDArray[np.float64]
    loss_paths: tuple[tuple[Op, ...], ...] = ()
    events: tuple[Event, ...] = ()
    total_steps: int = 0
    facts: Mapping[str, Any] = field(default_factory=dict)
    speeds: Speeds | None = None

    def layer(self, name: str) -> Layer:
        """Return the layer of that name; KeyError if there is none."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(name)


@dataclass(frozen=True)
class Recording:
    """A whole run: its facts, and one trace per optimiser that stepped."""

    run: Mapping[str, Any]
    traces: tuple[Trace, ...]

    @property
    def steps(self) -> int:
        """Steps of the optimiser that took most."""
        return max((trace.total_steps for trace in self.traces), default=0)


@dataclass(frozen=True, slots=True)
class Change:
    """What a treatment did."""

    treatment: str
    what: str
    layers: tuple[str, ...] = ()
    preserves_function: bool = False  # right after the change the network computes what it did before


@dataclass(frozen=True, slots=True)
class Finding:
    """One illness, with its numbers and its source."""

    illness: str
    severity: Severity
    why: str
    source: str
    layer: str = ""
    layers: tuple[str, ...] = ()
    step: int = 0
    share_of_run: float = 1.0
    evidence: Mapping[str, float] = field(default_factory=dict)
    treatments: tuple[str, ...] = ()
    folded: tuple[str, ...] = ()  # illnesses that follow from this one

    def __str__(self) -> str:
        where = f" in {self.layer!r}" if self.layer else ""
        tries = f"  Try: {', then '.join(self.treatments)}." if self.treatments else ""
        return (
            f"{self.severity}: {self.illness}{where} since step {self.step}. {self.why}{tries}  Source: {self.source}."
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the finding as the JSON document shows it."""
        return {
            "illness": self.illness,
            "severity": self.severity,
            "layer": self.layer,
            "layers": list(self.layers or filter(None, (self.layer,))),
            "step": self.step,
            "share_of_run": round(self.share_of_run, 4),
            "evidence": {name: finite(value) for name, value in self.evidence.items()},
            "why": self.why,
            "treatments": list(self.treatments),
            "source": self.source,
            "explains": list(self.folded),
        }


@dataclass(frozen=True, slots=True)
class Advice:
    """What would make a run cheaper. Nothing is wrong: it changes no verdict."""

    kind: str
    why: str
    code: str  # lines to paste
    source: str  # where it is explained
    layers: tuple[str, ...] = ()
    share_of_step: float = 0.0  # of the time of a step that would be saved
    step: int = 0
    share_of_run: float = 1.0
    evidence: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"advice: {self.why} {self.source}"

    def to_dict(self) -> dict[str, Any]:
        """Return the advice as the JSON document shows it."""
        return {
            "kind": self.kind,
            "layers": list(self.layers),
            "share_of_step": round(self.share_of_step, 4),
            "step": self.step,
            "share_of_run": round(self.share_of_run, 4),
            "evidence": {name: finite(value) for name, value in self.evidence.items()},
            "why": self.why,
            "code": self.code,
            "source": self.source,
        }


@dataclass(frozen=True)
class Findings:
    """The diagnosis of a run: prints, iterates, compares, and turns into JSON.

    Example:
        >>> Findings(run={"steps": 3}, findings=(), layers=(), verdict="inconclusive").verdict
        'inconclusive'
    """

    run: Mapping[str, Any]
    findings: tuple[Finding, ...]
    layers: tuple[Mapping[str, Any], ...]
    verdict: Verdict
    notes: tuple[str, ...] = ()
    advice: tuple[Advice, ...] = ()

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.findings)

    def __len__(self) -> int:
        return len(self.findings)

    def __getitem__(self, index: int) -> Finding:
        return self.findings[index]

    def at_least(self, severity: Severity) -> tuple[Finding, ...]:
        """Return the findings of that severity or worse."""
        worst = SEVERITIES[: SEVERITIES.index(severity) + 1]
        return tuple(finding for finding in self.findings if finding.severity in worst)

    def to_dict(self) -> dict[str, Any]:
        """Return the document of DESIGN: ``run``, ``verdict``, ``findings``, ``layers``, and notes and advice."""
        return {
            "schema_version": SCHEMA_VERSION,
            "unvanish": VERSION,
            "run": {name: finite(value) for name, value in self.run.items()},
            "verdict": self.verdict,
            "findings": [finding.to_dict() for finding in self.findings],
            "layers": [{k: finite(v) for k, v in layer.items()} for layer in self.layers],
            "notes": list(self.notes),
            "advice": [advice.to_dict() for advice in self.advice],
        }

    def __str__(self) -> str:
        clean = {"clean": "clean: nothing is wrong with this run"}.get(self.verdict, self.verdict)
        return "\n".join(map(str, (*(self.findings or (clean,)), *self.advice)))

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"

    def to_json(self, *, indent: int | None = 2) -> str:
        """Return the document as JSON text; nan and inf become null."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)


def finite(value: Any) -> Any:
    """Return ``value`` as JSON may hold it: numpy scalars as Python's, nan and inf as None.

    Example:
        >>> finite(float("nan")) is None, finite([1.0, float("inf")])
        (True, [1.0, None])
    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value
