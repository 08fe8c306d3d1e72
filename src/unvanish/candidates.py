"""Which treatments are worth a trial, for what was found.

An order of trials, not of advice: what a trial does not confirm is not recommended.
"""

from __future__ import annotations

from collections.abc import Mapping

from .records import Finding, Findings

Combination = tuple[str, ...]  # treatments that are applied together, in this order

# Strongest evidence first. Sources: the treatments' own (see their docstrings).
FOR_ILLNESS: Mapping[str, tuple[Combination, ...]] = {
    "broadcast-loss": (("match-target-shape",),),
    "missing-zero-grad": (("zero-grad",),),
    "output-loss-mismatch": (("logits-loss",),),
    "gradient-ascent": (("descend",),),
    "frozen-parameters": (("add-to-optimizer",), ("unfreeze",), ("zero-grad",)),
    # A small batch is noisy, too: the rate that suits it is lower (Goyal et al. 2017).
    "batch-norm-small-batch": (("layer-norm",), ("layer-norm", "lower-lr=0.3"), ("layer-norm", "lower-lr=0.1")),
    "unscaled-inputs": (("standardise-inputs",), ("batch-norm",), ("standardise-inputs", "raise-lr=10")),
    "unscaled-targets": (("standardise-targets",), ("raise-lr=10",), ("standardise-targets", "he-init")),
    "poor-initialisation": (("he-init",), ("lsuv-init",), ("batch-norm",), ("he-init", "batch-norm")),
    "learning-rate-too-high": (
        ("lower-lr=0.1",),
        ("lower-lr=0.01",),
        ("lower-lr=0.03",),
        ("clip-norm=1",),
        ("warm-up",),
    ),
    "exploding-gradient": (
        ("orthogonal-init", "clip-norm=1"),
        ("clip-norm=1",),
        ("orthogonal-init",),
        ("lower-lr=0.1",),
        ("adaptive-clip",),
        ("he-init", "batch-norm"),
    ),
    "weights-collapsing": (("weight-decay=0.0001",),),
    "weights-exploding": (("lower-lr=0.1",), ("clip-norm=1",), ("lower-lr=0.01",)),
    "dead-units": (("he-init",), ("leaky-relu",), ("lower-lr=0.1",), ("batch-norm",), ("he-init", "leaky-relu")),
    "saturated-activations": (("standardise-inputs",), ("xavier-init",), ("batch-norm",), ("lower-lr=0.1",)),
    "vanishing-gradient": (
        ("relu", "he-init"),
        ("batch-norm",),
        ("leaky-relu", "he-init"),
        ("orthogonal-init",),
        ("skip-connections",),
        ("normalise-layers",),
        ("greedy-pretraining",),
    ),
    "non-finite": (
        ("lower-lr=0.1",),
        ("safe-math",),
        ("adaptive-clip",),
        ("clip-norm=1",),
        ("safe-math", "clip-norm=1"),
        ("lower-lr=0.1", "clip-norm=1"),
    ),
    "learning-rate-too-low": (("raise-lr=10",), ("raise-lr=100",), ("raise-lr=hold",)),
    "constant-output": (("he-init",), ("batch-norm",), ("lower-lr=0.1",)),
    "oscillating-loss": (("lower-lr=0.1",), ("warm-up",), ("clip-norm=1",)),
    "slow-convergence": (("raise-lr=10",), ("batch-norm",), ("he-init",)),
    "stagnation": (
        ("raise-lr=10",),
        ("raise-lr=100",),
        ("batch-norm",),
        ("he-init",),
        ("lower-lr=0.1",),
        ("orthogonal-init", "clip-norm=1"),
    ),
    "overfitting": (("early-stopping",), ("weight-decay=0.1",), ("dropout=0.5",), ("early-stopping", "dropout=0.5")),
    "unlearnable-labels": (("raise-lr=10",), ("lower-lr=0.1",)),
}
# Of the script; mended first, whatever else.
MISTAKES = ("broadcast-loss", "missing-zero-grad", "output-loss-mismatch", "gradient-ascent")
MAX_CANDIDATES = 8


def candidates(findings: Findings, *, most: int = MAX_CANDIDATES) -> tuple[Combination, ...]:
    """Return what to try: for the first finding first, then for the others and for what follows from them.

    A mistake in the script is mended in all of them: another treatment may hide it, and is no substitute.
    """
    illnesses = [finding.illness for finding in findings if finding.severity != "info"]
    folded = [illness for finding in findings for illness in finding.folded]
    mended = mending(findings)
    found: dict[Combination, None] = {mended: None} if mended else {}
    for illness in (*illnesses, *folded):
        for combination in FOR_ILLNESS.get(illness, ()):
            found.setdefault(combined(mended, combination))
    return tuple(found)[:most]


def mending(findings: Findings) -> Combination:
    """Return what mends the mistakes that were found in the script; nothing if there are none."""
    mistakes = [finding for finding in findings if finding.severity != "info" and is_mistake(finding)]
    repairs = [FOR_ILLNESS[f.illness][0] if f.illness in MISTAKES else f.treatments for f in mistakes]
    return tuple(dict.fromkeys(treatment for repair in repairs for treatment in repair))


def is_mistake(finding: Finding) -> bool:
    """Say whether a finding is of the script's text: also log(0) and its like, which any rate may come to."""
    return finding.illness in MISTAKES or finding.treatments == ("safe-math",)


def combined(first: Combination, second: Combination) -> Combination:
    """Return both together; what the second repeats or contradicts is left out.

    Example:
        >>> combined(("he-init", "lower-lr=0.1"), ("lower-lr=0.01", "clip-norm=1"))
        ('he-init', 'lower-lr=0.1', 'clip-norm=1')
    """
    kinds = {_kind(treatment) for treatment in first}
    return (*first, *(treatment for treatment in second if _kind(treatment) not in kinds))


def _kind(treatment: str) -> str:
    identifier = treatment.partition("=")[0]
    if identifier.endswith("-init"):
        return "init"
    if identifier in ("lower-lr", "raise-lr"):
        return "rate"
    return identifier


def with_values(combination: Combination, facts: Mapping[str, float]) -> Combination:
    """Write what the untreated run found into the treatments that need it: they then work without it.

    Example:
        >>> with_values(("standardise-targets",), {"target_mean": 23.5, "target_std": 7.8})
        ('standardise-targets=23.5,7.8',)
    """
    if "target_std" not in facts:
        return combination
    values = f"standardise-targets={facts['target_mean']:.6g},{facts['target_std']:.6g}"
    return tuple(values if treatment == "standardise-targets" else treatment for treatment in combination)
