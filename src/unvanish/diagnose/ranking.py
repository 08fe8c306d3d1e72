"""Which finding comes first: root causes before what follows from them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from ..records import SEVERITIES, Finding

# From the wiring over the data and the start to the dynamics and, last, what merely shows.
ORDER: tuple[str, ...] = (
    "broadcast-loss",
    "gradient-ascent",
    "missing-zero-grad",
    "output-loss-mismatch",
    "constant-targets",
    "frozen-parameters",
    "batch-norm-small-batch",
    "unscaled-inputs",
    "unscaled-targets",
    "poor-initialisation",
    "weights-collapsing",
    "learning-rate-too-high",
    "exploding-gradient",
    "weights-exploding",
    "dead-units",
    "saturated-activations",
    "vanishing-gradient",
    "non-finite",
    "learning-rate-too-low",
    "unlearnable-labels",
    "overfitting",
    "constant-output",
    "oscillating-loss",
    "slow-convergence",
    "stagnation",
)
ALMOST_ALL = 0.9  # of the units; by chance a unit is off with probability 1/2
_SYMPTOMS = frozenset(("constant-output", "oscillating-loss", "slow-convergence", "stagnation", "unlearnable-labels"))


def rank(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Return findings with the likeliest root cause first, symptoms folded under it."""
    ordered = sorted(findings, key=_place)
    if not ordered:
        return ()
    kept: list[Finding] = []
    for finding in ordered:
        if kept and _follows(finding, kept[0]):
            others = dict.fromkeys((*kept[0].folded, finding.illness))  # two players may have the same
            kept[0] = replace(
                kept[0],
                folded=tuple(illness for illness in others if illness != kept[0].illness),
                layers=tuple(dict.fromkeys((*kept[0].layers, *finding.layers))),
                evidence={**kept[0].evidence, **{f"{finding.illness}.{k}": v for k, v in finding.evidence.items()}},
            )
        elif all(finding.illness != other.illness for other in kept):
            kept.append(finding)
    return tuple(kept)


def _place(finding: Finding) -> tuple[int, float]:
    return SEVERITIES.index(finding.severity), _order(finding)


def _order(finding: Finding) -> float:
    """Return the place in the chain of causes; a forbidden argument and the data come before what they spoil."""
    if finding.illness == "non-finite" and "smallest_input" in finding.evidence:
        return ORDER.index("poor-initialisation") - 0.5
    if finding.illness == "dead-units" and _is_of_one_direction(finding):
        return ORDER.index("vanishing-gradient") + 0.5
    if finding.illness == "oscillating-loss" and "targets_between_batches" in finding.evidence:
        return ORDER.index("constant-targets") + 0.5  # the order of the data
    return ORDER.index(finding.illness) if finding.illness in ORDER else len(ORDER)


def _is_of_one_direction(finding: Finding) -> bool:
    """Say whether units are off because a deep net maps all inputs onto one direction: half of them, from the start."""
    evidence = finding.evidence
    return evidence.get("dead_share_start", 0.0) >= 0.5 and evidence.get("dead_share", 1.0) < ALMOST_ALL


def _follows(finding: Finding, cause: Finding) -> bool:
    """Say whether a finding is explained by a cause that is at least as severe."""
    if finding.illness in _SYMPTOMS and cause.illness not in _SYMPTOMS:
        return True
    return finding.illness in ORDER and cause.illness in ORDER
