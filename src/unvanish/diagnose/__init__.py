"""From a recording to findings: one pure function an illness, no torch.

    recording -> for each trace: progress -> rules -> findings -> ranked, symptoms folded under causes

Add an illness: write ``rule(trace)`` that yields findings, and put it in the tuple:
``diagnose(recording, rules=(*DEFAULT_RULES, mine))``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from ..records import Finding, Findings, Recording, Trace, Verdict
from .advice import advice
from .course import constant_output, oscillating_loss, overfitting, slow_convergence, stagnation
from .data import constant_targets, unlearnable_labels, unscaled_inputs, unscaled_targets
from .gradient_flow import (
    dead_units,
    exploding_gradient,
    non_finite,
    poor_initialisation,
    saturated_activations,
    vanishing_gradient,
)
from .progress import MIN_STEPS
from .ranking import rank
from .summary import layer_rows, notes
from .updates import learning_rate_too_high, learning_rate_too_low, weights_collapsing, weights_exploding
from .wiring import (
    batch_norm_small_batch,
    broadcast_loss,
    frozen_parameters,
    gradient_ascent,
    missing_zero_grad,
    output_loss_mismatch,
    symmetric_units,
)

Rule = Callable[[Trace], Iterable[Finding]]

DEFAULT_RULES: tuple[Rule, ...] = (
    broadcast_loss,
    gradient_ascent,
    missing_zero_grad,
    output_loss_mismatch,
    constant_targets,
    frozen_parameters,
    batch_norm_small_batch,
    symmetric_units,
    unscaled_inputs,
    unscaled_targets,
    poor_initialisation,
    learning_rate_too_high,
    exploding_gradient,
    weights_collapsing,
    weights_exploding,
    dead_units,
    saturated_activations,
    vanishing_gradient,
    non_finite,
    learning_rate_too_low,
    unlearnable_labels,
    overfitting,
    constant_output,
    oscillating_loss,
    slow_convergence,
    stagnation,
)


def without(rules: Iterable[Rule], *unwanted: Rule) -> tuple[Rule, ...]:
    """Return the rules less some: the way to silence a finding.

    Example:
        >>> len(without(DEFAULT_RULES, stagnation)) == len(DEFAULT_RULES) - 1
        True
    """
    return tuple(rule for rule in rules if rule not in unwanted)


def diagnose(recording: Recording, *, rules: Iterable[Rule] = DEFAULT_RULES) -> Findings:
    """Say what is wrong with a run: a pure function of its record.

    Args:
        recording: From `read_recording`, or a watched run's ``recording()``.
        rules: Each takes the `Trace` of one optimiser and yields findings.

    Returns:
        The findings, likeliest root cause first; the verdict is ``inconclusive`` if too few steps were seen and
        nothing was found.
    """
    rules = tuple(rules)
    with np.errstate(all="ignore"):  # overflowing records are just what is looked for
        findings = rank(finding for trace in recording.traces for rule in rules for finding in rule(trace))
        rows = layer_rows(recording, findings)
    run = {**recording.run, "steps": recording.steps}
    advised = tuple(item for trace in recording.traces for item in advice(trace))
    return Findings(run, findings, rows, _verdict(recording, findings), notes(recording), advised)


def _verdict(recording: Recording, findings: tuple[Finding, ...]) -> Verdict:
    if any(finding.severity != "info" for finding in findings):
        return "findings"
    return "clean" if recording.steps >= MIN_STEPS else "inconclusive"
