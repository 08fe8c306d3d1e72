"""From a recording to findings: one pure function an illness, no torch.

    recording -> for each trace: facts -> rules -> findings -> ranked, symptoms folded under causes

Add an illness: write ``rule(trace) -> Finding | None`` and put it in the tuple:
``diagnose(recording, rules=(*DEFAULT_RULES, mine))``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ..records import Finding, Findings, Recording, Trace

Rule = Callable[[Trace], Iterable[Finding]]
DEFAULT_RULES: tuple[Rule, ...] = ()


def without(rules: Iterable[Rule], *unwanted: Rule) -> tuple[Rule, ...]:
    """Return the rules less some: the way to silence a finding.

    Example:
        >>> without((sorted, reversed), sorted) == (reversed,)
        True
    """
    return tuple(rule for rule in rules if rule not in unwanted)


def diagnose(recording: Recording, *, rules: Iterable[Rule] = DEFAULT_RULES) -> Findings:
    """Say what is wrong with a run."""
    findings = tuple(finding for trace in recording.traces for rule in rules for finding in rule(trace))
    return Findings(dict(recording.run), findings, (), "findings" if findings else "clean")
