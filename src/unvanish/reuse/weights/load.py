"""Load a weights file of any framework into a model of torch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import nn

from ...errors import OptionError, WeightsError
from .apply import written
from .attention import split_attention
from .folded import unfolded
from .foreign import Family
from .matching import Wanted, match
from .plan import Plan, make_plan
from .readers import read_weights
from .settings import compare_slopes
from .targets import targets_of
from .verify import verify as prove


def load_weights(
    model: nn.Module,
    file: str | os.PathLike[str],
    *,
    verify: tuple[Any, Any] | None = None,
    names: Mapping[str, str] | None = None,
    keep: Sequence[str] = (),
    leave: Sequence[str] = (),
    lowest: int | None = None,
    epsilon: float | None = None,
    flatten: Literal["channels_first", "channels_last"] = "channels_first",
    folded_batch_norm: Literal["refuse", "identity"] = "refuse",
    layout: Family | None = None,
    part: str = "",
    tolerance: float = 1e-4,
    trust: bool = False,
    apply: bool = True,
) -> Plan:
    """Load weights that another framework wrote, all or nothing, and prove it.

    The kind of each layer in the file and the class of its partner in the model choose how arrays are turned; shapes
    only confirm. Settings that the file tells, such as epsilon, are taken over with the weights; a layer that torch
    computes otherwise is refused. What the file does not tell is a doubt: ``verify`` settles it, or a word such as
    ``epsilon=``, or ``trust=True``.

    Args:
        model: Filled in place. Untouched if anything is wrong.
        file: ``.keras``, ``.weights.h5``, ``.h5``, ``.onnx``, ``.msgpack``, ``.npz``, ``.safetensors`` or ``.pt``, or a
            folder of orbax.
        verify: Inputs as the model takes them, and the outputs that the other framework gave for them; or a dict of
            outputs by layer, of which the last is the output of the model. Without it the load is unproven.
        names: From layers, or whole parts, of the model to those of the file, where neither name nor order pairs them.
        keep: Layers of the model that stay as they are, such as a new head; patterns are allowed.
        leave: Layers of the file that are not used; patterns are allowed.
        lowest: Load only the lowest so many layers of the model, counted as it registered them.
        epsilon: Of the file's normalisations, where the file does not tell it.
        flatten: How the model flattens a map; ``"channels_last"`` if it permutes first, as Keras and Flax do.
        folded_batch_norm: ``"identity"``: where the file has batch norms folded into convolutions, set those of the
            model to do nothing.
        layout: Whose layouts the arrays have, where the file leaves it open.
        part: Of a file with several sets of weights, the one to load.
        tolerance: Allowed in ``verify``, as a share of the largest output.
        trust: Load in spite of doubts.
        apply: False: return the plan, change nothing.

    Returns:
        The plan: print it to see each tensor with its source, its operations and why it matched.

    Raises:
        WeightsError: if the file cannot be read, does not fit, is in doubt, or the proof fails.
        OptionError: if an argument cannot be used.

    Example:
        >>> import numpy, tempfile, torch
        >>> file = f"{tempfile.mkdtemp()}/dense.npz"
        >>> numpy.savez(file, **{"dense/kernel": numpy.ones((3, 2), "f4"), "dense/bias": numpy.zeros(2, "f4")})
        >>> net = nn.Sequential(nn.Linear(3, 2))
        >>> plan = load_weights(net, file)
        >>> [(step.names, step.sources, step.operations) for step in plan.steps]
        [(('0.weight',), ('dense/kernel',), ('transpose',)), (('0.bias',), ('dense/bias',), ())]
    """
    _check(model, verify, lowest, flatten, folded_batch_norm, tolerance)
    foreign = read_weights(file, part=part, layout=layout)
    targets = targets_of(model)
    foreign = split_attention(foreign, targets)
    words = Wanted(names or {}, tuple(keep), tuple(leave), lowest)
    pairs, folded = unfolded(match(targets, foreign, words), is_identity=folded_batch_norm == "identity")
    plan = make_plan(model, foreign, pairs, epsilon=epsilon, is_flatten_kept=flatten == "channels_last")
    plan.faults = (*folded, *plan.faults)
    changes, doubts = compare_slopes(model, foreign.slopes)
    plan.changes, plan.doubts = (*plan.changes, *changes), (*plan.doubts, *doubts)
    if apply:
        is_partial = bool(keep or leave or lowest is not None)
        _check_plan(plan, is_partial=is_partial, is_proven=verify is not None or trust)
        _load(plan, verify, tolerance)
    return plan


def _load(plan: Plan, verify: tuple[Any, Any] | None, tolerance: float) -> None:
    with written(plan):
        if verify is not None:
            plan.verification = prove(plan.model, verify[0], verify[1], plan.partners, tolerance)
            if not plan.verification.is_passed:
                doubts = "".join(f"\n  In doubt: {doubt}." for doubt in plan.doubts)
                raise WeightsError(
                    f"load_weights(): verify: found that {plan.verification}, expected the same outputs. The model "
                    "was not changed. Give outputs={layer: output, ...} to see where they part, or print the plan with "
                    f"apply=False.{doubts}"
                )
    plan.is_loaded = True
    plan.forget()


def problems_of(plan: Plan, *, is_partial: bool, is_proven: bool) -> list[str]:
    """Return why a plan would be refused.

    Args:
        plan: Complete, but not applied.
        is_partial: Layers were left out by a word.
        is_proven: Doubts are settled by a proof, or by a word.
    """
    problems = list(plan.faults)
    if plan.unfilled:
        problems.append(
            f"nothing in the file fills {_some(plan.unfilled)}. Name their partners with names={{...}}, or let them "
            "start anew with keep=[...]"
        )
    if plan.unused and not is_partial:
        problems.append(
            f"nothing in the model takes {_some(plan.unused)}. Name what is not wanted with leave=[...], or load the "
            "first k layers with lowest=k"
        )
    if not plan.steps:
        problems.append("not one tensor matches")
    if plan.doubts and not is_proven and not problems:
        problems += [f"in doubt: {doubt}" for doubt in plan.doubts]
        problems.append("prove it with verify=(inputs, outputs), or load it unproven with trust=True")
    return problems


def _check_plan(plan: Plan, *, is_partial: bool, is_proven: bool) -> None:
    """Refuse a plan that leaves something open."""
    problems = problems_of(plan, is_partial=is_partial, is_proven=is_proven)
    if problems:
        listed = "".join(f"\n  {problem.rstrip('.')}." for problem in problems[:20])
        more = f"\n  and {len(problems) - 20} more." if len(problems) > 20 else ""
        raise WeightsError(
            f"load_weights(): file {plan.foreign.file!r}: found {plan.foreign.form}, "
            f"{len(plan.foreign.layers)} layers, expected the layers of the model. The model was not changed. "
            f"See the plan with apply=False.{listed}{more}"
        )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:6]))
    return f"{shown} and {len(names) - 6} more" if len(names) > 6 else shown


def _check(model: Any, verify: Any, lowest: Any, flatten: str, folded_batch_norm: str, tolerance: float) -> None:
    if not isinstance(model, nn.Module):
        raise OptionError(
            f"load_weights(): model: found {type(model).__name__}, expected an nn.Module. "
            "Write load_weights(model, file)."
        )
    if verify is not None and not (isinstance(verify, tuple) and len(verify) == 2):
        raise OptionError("load_weights(): verify: found no pair, expected (inputs, outputs). Write verify=(x, y).")
    if lowest is not None and (isinstance(lowest, bool) or not isinstance(lowest, int) or lowest < 1):
        raise OptionError(
            f"load_weights(): lowest: found {lowest!r}, expected a whole number from 1 on. Write lowest=3."
        )
    for option, value, choices in (
        ("flatten", flatten, ("channels_first", "channels_last")),
        ("folded_batch_norm", folded_batch_norm, ("refuse", "identity")),
    ):
        if value not in choices:
            raise OptionError(
                f"load_weights(): {option}: found {value!r}, expected {choices[0]!r} or {choices[1]!r}. "
                f"Write {option}={choices[1]!r}."
            )
    if not 0 <= tolerance < float("inf"):
        raise OptionError(f"load_weights(): tolerance: found {tolerance!r}, expected a finite number. Write 1e-4.")
