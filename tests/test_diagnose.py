"""Each rule on traces whose truth is known because they were made so."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.traces import CROSS_ENTROPY_PATH, MSE_PATH, layers, make_trace, with_layer
from unvanish import DEFAULT_RULES, Recording, diagnose, without
from unvanish.diagnose.course import constant_output
from unvanish.diagnose.progress import progress
from unvanish.diagnose.wiring import missing_zero_grad
from unvanish.records import SEVERITIES, Event, Findings, Op, Trace

FLAT = 1.0  # a loss that stays at that of a constant answer: the variance of the targets


def findings_of(*traces: Trace) -> Findings:
    return diagnose(Recording({}, traces))


def illnesses(*traces: Trace) -> list[str]:
    return [finding.illness for finding in findings_of(*traces)]


def test_a_healthy_run_is_clean() -> None:
    """A run that learns, with gradients and updates of usual size, gets no finding."""
    assert findings_of(make_trace()).verdict == "clean"
    assert illnesses(make_trace()) == []


def test_too_few_steps_are_inconclusive() -> None:
    """Nothing is said about a run of a few steps unless a rule has an exact fact."""
    assert findings_of(make_trace(steps=5, samples=5)).verdict == "inconclusive"
    assert findings_of().verdict == "inconclusive"


@pytest.mark.parametrize(
    ("kind", "end"), [("to zero loss", 1e-12), ("cosine to zero", 0.02), ("noisy target", 0.5), ("slow but sure", 0.3)]
)
def test_finished_learning_is_not_an_illness(kind: str, end: float) -> None:
    """Vanished gradients and updates after success, at whatever level, raise nothing."""
    falling = np.concatenate([np.geomspace(1.0, end, 200), np.full(200, end)])
    decline = np.geomspace(1.0, 1e-9, 40)[:, None]
    trace = make_trace(
        falling,
        measures={"grad_rms": 1e-2 * decline, "update_ratio": 1e-3 * decline, "delta_norm": decline},
        scalars={"lr": 1e-3 * decline[:, 0]},
    )
    assert illnesses(trace) == [], kind


def test_steps_that_change_nothing_are_not_small_steps() -> None:
    """Gradients and a rate, but no change at all: nothing is trained. A rate of 1e-9 or 0 is another matter."""
    still = {"update_ratio": 0.0, "grad_rms": 0.01, "weight_rms": 0.1, "delta_norm": 0.0}
    in_place = make_trace(FLAT, measures=still, scalars={"lr": 0.1})
    (found,) = [finding for finding in findings_of(in_place) if finding.severity == "critical"]
    assert found.illness == "frozen-parameters"
    assert found.treatments == ("zero-grad",)
    assert "frozen-parameters" not in illnesses(make_trace(FLAT, measures=still, scalars={"lr": 1e-9}))
    assert "frozen-parameters" not in illnesses(make_trace(FLAT, measures=still, scalars={"lr": 0.0}))


SICK = {
    "missing-zero-grad": make_trace(FLAT, facts={"uncleared_steps": 399}),
    "broadcast-loss": make_trace(
        FLAT, loss_paths=((Op("Mean"), Op("Pow", (32, 32)), Op("Sub", (32, 32), "", {"constant_inputs": 1}),
                           Op("Addmm", (32, 1), "out")),)
    ),
    "gradient-ascent": make_trace(
        -np.geomspace(1, 1e6, 400), loss_paths=((Op("Neg"), *MSE_PATH),), measures={"alignment": 0.5}
    ),
    "output-loss-mismatch": make_trace(
        math.log(10) * 0.9,
        facts={"loss_kind": "nll"},
        loss_paths=((*CROSS_ENTROPY_PATH[:2], Op("Softmax", (32, 10), "soft", {"dim": 1}), CROSS_ENTROPY_PATH[2]),),
    ),
    "constant-targets": make_trace(scalars={"target_std": 0.0, "target_min": 3.0, "target_max": 3.0}),
    "frozen-parameters": make_trace(FLAT, chain=with_layer(layers(), 0, is_optimised=False, is_fresh=True)),
    "batch-norm-small-batch": make_trace(
        0.6, chain=with_layer(layers(), 1, kind="BatchNorm1d", norm_values=2, is_normalisation=True)
    ),
    "unscaled-inputs": make_trace(FLAT, scalars={"input_rms": 900.0, "input_std_max": 900.0}),
    "unscaled-targets": make_trace(
        5e4, scalars={"target_mean": 235.0, "target_std": 78.0, "output_rms": 0.2, "error_mean": -235.0}
    ),
    "poor-initialisation": make_trace(FLAT, chain=with_layer(layers(), 0, is_symmetric=True)),
    "learning-rate-too-high": make_trace(np.geomspace(1, 50, 400), measures={"update_ratio": 0.6}),
    "weights-collapsing": make_trace(
        FLAT, measures={"weight_rms": np.geomspace(0.1, 1e-8, 40)[:, None]}, facts={"weight_decay": 1.0}
    ),
    "weights-exploding": make_trace(5.0, measures={"weight_rms": np.geomspace(0.1, 100, 40)[:, None]}),
    "dead-units": make_trace(FLAT, measures={"dead_share": [1.0, 0.2, 0.0]}),
    "saturated-activations": make_trace(FLAT, chain=layers("tanh"), measures={"saturated_share": [0.9, 0.8, 0.0]}),
    "vanishing-gradient": make_trace(FLAT, measures={"log2_flow": [-34.0, -17.0, 0.0], "log2_gain": -17.0}),
    "exploding-gradient": make_trace(FLAT, measures={"log2_flow": [20.0, 10.0, 0.0]}),
    "non-finite": make_trace(
        np.where(np.arange(400) < 100, 0.5, np.nan),
        events=(Event(100, "non-finite-loss", {"op": "Log", "layer": "log", "smallest_input": 0.0}),),
    ),
    "learning-rate-too-low": make_trace(np.linspace(1.0, 0.7, 400), measures={"update_ratio": 2e-5}),
    "unlearnable-labels": make_trace(np.linspace(1.2, 0.8, 400)),
    "constant-output": make_trace(FLAT, scalars={"output_unit_std": 1e-6}),
    "overfitting": make_trace(events=tuple(
        Event(40 * i, "validation-loss", {"loss": value}) for i, value in enumerate((1.0, 0.6, 0.5, 0.6, 1.2, 1.5, 1.8))
    )),
    "oscillating-loss": make_trace(
        np.tile([0.1, 6.0, 0.3], 134)[:400] + 0.8
    ),
    "slow-convergence": make_trace(np.concatenate([np.linspace(1.0, 0.95, 300), np.linspace(0.95, 0.6, 100)])),
    "stagnation": make_trace(FLAT, measures={"update_ratio": 5e-5}),
}  # fmt: skip


@pytest.mark.parametrize("illness", SICK)
def test_each_illness_is_named_first(illness: str) -> None:
    """A run with one planted fault gets that fault as its first finding, with numbers and a source."""
    found = findings_of(SICK[illness])
    assert found.verdict == "findings"
    assert found[0].illness == illness, str(found)
    assert found[0].severity in SEVERITIES[:2]
    assert found[0].evidence
    assert found[0].source
    assert found[0].why.endswith((".", "?")), found[0].why
    assert 0 <= found[0].share_of_run <= 1


def test_every_illness_has_a_rule_and_a_rank() -> None:
    """The illnesses that the product names are those that rules can find."""
    from unvanish.diagnose.ranking import ORDER

    assert set(ORDER) == set(SICK)


@pytest.mark.parametrize("illness", ["dead-units", "vanishing-gradient", "learning-rate-too-low", "stagnation"])
def test_findings_survive_the_scale_of_the_loss(illness: str) -> None:
    """Targets in other units change no verdict: the loss is judged by what a constant answer would get."""
    trace = SICK[illness]
    scalars = {**trace.scalars, "target_std": 0.1 * trace.scalars["target_std"]}
    assert illnesses(replace(trace, losses=0.01 * trace.losses, scalars=scalars))[0] == illness


def test_symptoms_are_folded_under_their_cause() -> None:
    """What follows from the first finding is told with it, not beside it."""
    trace = make_trace(FLAT, facts={"uncleared_steps": 399}, scalars={"output_unit_std": 1e-6})
    found = findings_of(trace)
    assert len(found) == 1
    assert found[0].illness == "missing-zero-grad"
    assert {"constant-output", "stagnation"} <= set(found[0].folded)
    assert "constant-output.output_unit_std" in found[0].evidence


def test_rules_can_be_left_out_and_added() -> None:
    """The tuple of rules is the way to silence a finding and to add one's own."""
    trace = make_trace(FLAT, facts={"uncleared_steps": 399}, scalars={"output_unit_std": 1e-6})
    found = diagnose(Recording({}, (trace,)), rules=without(DEFAULT_RULES, missing_zero_grad))
    assert found[0].illness == "constant-output"
    assert [f.illness for f in diagnose(Recording({}, (trace,)), rules=(constant_output,))] == ["constant-output"]


def test_two_players_are_not_judged_by_their_losses() -> None:
    """The loss of one side of a game says nothing about success."""
    game = {"takeovers": 399}
    generator = make_trace(np.linspace(0.7, 1.5, 400), facts=game, measures={"update_ratio": 1e-2})
    critic = make_trace(-np.geomspace(1, 100, 400), facts=game)
    assert illnesses(generator, critic) == []


@pytest.mark.parametrize("place", [0, 1])
def test_a_deliberately_frozen_trunk_is_not_forgotten(place: int) -> None:
    """Frozen layers with learnt weights, and layers that another optimiser trains, are left alone."""
    learnt = with_layer(layers(), place, is_trainable=False, is_optimised=False, is_fresh=False)
    elsewhere = with_layer(layers(), place, is_optimised=False, is_optimised_elsewhere=True, is_fresh=True)
    assert illnesses(make_trace(chain=learnt)) == illnesses(make_trace(chain=elsewhere)) == []


def test_vanishing_needs_the_loss_to_suffer() -> None:
    """A small gradient at the first layer of a net that learns is no illness."""
    flow = {"log2_flow": [-34.0, -17.0, 0.0]}
    assert illnesses(make_trace(measures=flow)) == []
    assert illnesses(make_trace(FLAT, measures=flow))[0] == "vanishing-gradient"


def test_three_sigmoids_starve_the_first_layer() -> None:
    """Where nothing is learnt, (1/4)**3 of the gradient is little enough; three ReLU layers are not blamed for it."""
    names = ("first", "second", "third", "fourth", "out")
    flow = {"log2_flow": [-8.0, -6.5, -4.0, -2.0, 0.0]}
    sigmoids = layers("sigmoid", names)
    assert illnesses(make_trace(FLAT, measures=flow, chain=sigmoids))[0] == "vanishing-gradient"
    assert "vanishing-gradient" not in illnesses(make_trace(FLAT, measures=flow, chain=layers("relu", names)))
    assert illnesses(make_trace(measures=flow, chain=sigmoids)) == []


def test_units_of_one_direction_are_no_cause() -> None:
    """Half of the units dead from the start follow from a gradient that vanishes; units that all die come before it."""
    flow = {"log2_flow": [-34.0, -17.0, 0.0]}
    assert illnesses(make_trace(FLAT, measures={**flow, "dead_share": [0.6, 0.5, 0.0]}))[0] == "vanishing-gradient"
    assert illnesses(make_trace(FLAT, measures={**flow, "dead_share": [1.0, 0.5, 0.0]}))[0] == "dead-units"


def test_initialisation_is_blamed_only_for_its_scale() -> None:
    """A vanishing gradient under usual weights is not the initialisation's fault; under tiny weights it is."""
    flow = {"log2_flow": [-34.0, -17.0, 0.0]}
    assert illnesses(make_trace(FLAT, measures={**flow, "weight_rms": 1 / math.sqrt(10)})) == ["vanishing-gradient"]
    assert illnesses(make_trace(FLAT, measures={**flow, "weight_rms": 0.01})) == ["poor-initialisation"]


def test_a_loss_of_unknown_floor_is_not_called_poor() -> None:
    """Half of a sum of reconstruction and divergence may be all there is to learn."""
    dead = {"dead_share": [0.7, 0.2, 0.0]}
    two_terms = ((Op("Add"), *MSE_PATH), (Op("Add"), Op("Mul"), Op("Addmm", (32, 1), "out")))
    falling = np.linspace(1.0, 0.6, 400)
    assert illnesses(make_trace(falling, measures=dead, loss_paths=two_terms)) == []
    assert illnesses(make_trace(falling, measures=dead))[0] == "dead-units"


BY_HAND = {
    "facts": {"loss_kind": ""},
    "loss_paths": ((Op("Neg"), Op("Mean"), Op("Log"), Op("Softmax", (32, 10), "", {"dim": 1}), CROSS_ENTROPY_PATH[2]),),
}
# inputs differ, outputs do not, and no gradient comes back
BLIND: dict[str, dict[str, Any]] = {
    "measures": {
        "dead_share": [1.0, 1.0, 0.0],
        "unit_std": [1.0, 0.0, 0.0],
        "grad_rms": [0.0, 0.0, 1e-2],
        "log2_flow": [-300.0, -300.0, 0.0],
        "log2_gain": np.nan,
    },
    "scalars": {"output_unit_std": 0.0},
}
ALIVE_AGAIN = np.where(np.arange(40)[:, None] < 25, [[1e-90, 1e-90, 1e-2]], 1e-2)


@settings(deadline=None, max_examples=30)
@given(scale=st.floats(1e-3, 1e3), offset=st.floats(-100, 100), share=st.floats(1e-3, 0.99))
def test_a_net_that_ignores_its_input_learns_nothing_whatever_its_loss(
    scale: float, offset: float, share: float
) -> None:
    """Units dead throughout, one answer for all: critical for a loss of any scale, sign and fall."""
    losses = scale * np.geomspace(1.0, share, 400) + offset
    (found,) = [found for found in findings_of(make_trace(losses, **BLIND, **BY_HAND)) if found.severity == "critical"]
    assert found.illness == "dead-units"
    assert found.layers[:2] == ("first", "middle")
    assert "constant-output" in found.folded


def test_what_two_players_share_is_folded_once() -> None:
    """A critic that is dead starves the generator too: each illness is told once, though the losses judge neither."""
    game = {**BY_HAND, "facts": {"loss_kind": "", "takeovers": 399}}
    (found,) = findings_of(make_trace(0.5, **BLIND, **game), make_trace(0.5, **BLIND, **game))
    assert found.illness == "dead-units"
    assert len({found.illness, *found.folded}) == 1 + len(found.folded) > 1


def test_a_known_loss_does_not_hide_that_the_input_is_ignored() -> None:
    """Of classes of which one is nearly all, the constant answer has a tenth of ln K, and still nothing is learnt."""
    losses = np.append(np.geomspace(2.3, 0.23, 50), np.full(350, 0.23))
    cross_entropy = {"facts": {"loss_kind": "nll"}, "loss_paths": (CROSS_ENTROPY_PATH,)}
    seeing = {**BLIND["measures"], "unit_std": 1.0}
    assert findings_of(make_trace(losses, measures=seeing, **cross_entropy)).at_least("critical") == ()
    assert illnesses(make_trace(losses, **BLIND, **cross_entropy))[0] == "dead-units"


@pytest.mark.parametrize(
    ("why", "changed"),
    [
        ("half of the units live", {"measures": {"dead_share": [0.5, 0.5, 0.0], "unit_std": 1.0}}),
        ("a branch is dead, the output varies", {"measures": {"unit_std": 1.0}, "scalars": {}}),
        ("a head of constant answers beside one that learns", {"measures": {"grad_rms": [1e-2, 0.0, 1e-2],
                                                                            "log2_flow": 0.0}}),
        ("one example a batch", {"scalars": {"output_unit_std": 0.0, "batch": 1.0}}),
        ("the inputs are all the same", {"measures": {"unit_std": 0.0}}),
        ("dead at first, alive later", {"measures": {"grad_rms": ALIVE_AGAIN, "log2_flow": np.log2(ALIVE_AGAIN)}}),
        ("all is learnt, a constant term is left", {"measures": {"unit_std": 1.0, "grad_rms": 0.0}, "scalars": {}}),
        ("layers that nobody saw", {"measures": {"unit_std": np.nan}}),
    ],
)  # fmt: skip
def test_what_only_looks_like_ignoring_the_input(why: str, changed: dict[str, dict[str, Any]]) -> None:
    """Constant outputs, dead layers and zero gradients have good reasons; only all of them together count."""
    parts = {name: {**(BLIND[name] if values else {}), **values} for name, values in {**BLIND, **changed}.items()}
    falling = np.linspace(1.0, 0.6, 400)
    assert findings_of(make_trace(falling, **parts, **BY_HAND)).at_least("critical") == (), why


def test_a_fit_without_rest_ignores_nothing() -> None:
    """After a fit to a loss of exactly 0 no gradient is left, and an answer may be one for all: 0."""
    fitted = {**BLIND["measures"], "grad_rms": 0.0, "dead_share": [0.1, 0.1, 1.0]}
    losses = np.append(np.linspace(1.0, 0.1, 300), np.zeros(100))
    assert illnesses(make_trace(losses, measures=fitted, scalars=BLIND["scalars"], **BY_HAND)) == []


def test_a_rectifier_at_the_output_may_die_too() -> None:
    """An output of 0 for all, without gradient, is a dead unit, and no rate is too low for it."""
    chain = with_layer(layers(), 2, activation="relu")
    still = {"grad_rms": 0.0, "update_ratio": 0.0, "log2_flow": np.nan, "log2_gain": np.nan, "delta_norm": 0.0}
    dead = make_trace(
        0.18, chain=chain, measures={**still, "dead_share": [0.1, 0.1, 1.0]}, scalars=BLIND["scalars"], **BY_HAND
    )
    (found,) = [found for found in findings_of(dead) if found.severity == "critical"]
    assert (found.illness, found.layer) == ("dead-units", "out")
    assert "learning-rate-too-low" not in found.folded


def test_saturation_through_and_through_needs_no_scale() -> None:
    """Sigmoids pinned at one end, from which one answer follows: critical although the loss of unknown scale fell."""
    measures = {**BLIND["measures"], "dead_share": 0.0, "saturated_share": [1.0, 1.0, 0.0]}
    falling = np.linspace(1.0, 0.6, 400)
    pinned = make_trace(falling, chain=layers("sigmoid"), measures=measures, scalars=BLIND["scalars"], **BY_HAND)
    assert findings_of(pinned)[0].illness == "saturated-activations"
    assert findings_of(pinned)[0].severity == "critical"


def test_hidden_layers_cut_off_from_the_loss_are_named() -> None:
    """A gradient of exactly 0 at every hidden layer and sample is told of any loss; at one layer, or at first, not."""
    falling = np.linspace(1.0, 0.6, 400)
    cut = {"grad_rms": [0.0, 0.0, 1e-2], "log2_flow": [-300.0, -300.0, 0.0]}
    (found,) = findings_of(make_trace(falling, measures=cut, **BY_HAND))
    assert (found.illness, found.severity) == ("vanishing-gradient", "warning")
    assert found.layers == ("first", "middle")
    assert "exactly 0" in found.why
    assert illnesses(make_trace(falling, measures={**cut, "grad_rms": [0.0, 1e-2, 1e-2]}, **BY_HAND)) == []
    start = np.where(np.arange(40)[:, None] < 1, [[0.0, 0.0, 1e-2]], 1e-2)
    assert illnesses(make_trace(falling, measures={**cut, "grad_rms": start}, **BY_HAND)) == []


@pytest.mark.parametrize("idle", [{"dead_share": [1.0, 0.1, 0.0]}, {"grad_rms": [1e-2, 0.0, 1e-2]}])
def test_a_branch_that_is_off_is_not_badly_initialised(idle: dict[str, list[float]]) -> None:
    """Equal units that had no part in a run that learns are no illness of it; in a run that does not, they are."""
    equal = with_layer(layers(), 1, is_symmetric=True)
    assert illnesses(make_trace(chain=equal, measures=idle)) == []
    assert illnesses(make_trace(chain=equal)) == ["poor-initialisation"]
    assert illnesses(make_trace(FLAT, chain=equal, measures=idle))[0] == "poor-initialisation"


def sorted_by_class(losses: Any, *, mean: Any = None, std: float = 0.0, batch: float = 32.0, **rest: Any) -> Trace:
    """Return a cross-entropy of ten classes whose batches hold one class each, in turn."""
    each = np.arange(40) % 10 if mean is None else mean
    targets = {"target_mean": each, "target_std": std, "batch": batch}
    kind = {"facts": {"loss_kind": "nll"}, "loss_paths": (CROSS_ENTROPY_PATH,), **rest}
    return make_trace(losses, scalars=targets, **kind)


SAW_TOOTH = np.tile(np.geomspace(2.5, 0.02, 40), 10)  # a jump with each class, nothing left of it at its end


def test_batches_in_the_order_of_their_classes_are_named_before_what_they_spoil() -> None:
    """One class a batch and a loss that jumps: the data are not shuffled, whatever died of it."""
    (found,) = findings_of(sorted_by_class(SAW_TOOTH))
    assert (found.illness, found.severity) == ("oscillating-loss", "warning")
    assert found.evidence["targets_between_batches"] == pytest.approx(1.0)
    assert found.evidence["remaining_late"] == pytest.approx(SAW_TOOTH.mean() / math.log(10))
    assert "Shuffle" in found.why
    each_epoch = np.where(np.arange(40) < 10, np.arange(40) % 3, 5)  # looked at once an epoch: always the same class
    assert illnesses(sorted_by_class(SAW_TOOTH, mean=each_epoch)) == ["oscillating-loss"]
    (worse,) = findings_of(sorted_by_class(3.0, measures={"dead_share": [1.0, 0.2, 0.0]}))
    assert (worse.illness, worse.severity) == ("oscillating-loss", "critical")
    assert "dead-units" in worse.folded


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), batch=st.integers(8, 64), rare=st.floats(0.01, 0.5), seen=st.integers(4, 20))
def test_shuffled_batches_are_mixed(seed: int, batch: int, rare: float, seen: int) -> None:
    """Batches drawn by chance, of whatever imbalance, leave 1 / batch of the variance between them, and no finding."""
    drawn = np.random.default_rng(seed).random((40, batch)) < rare
    drawn[0, 0] = True  # one at least
    mean = np.where(np.arange(40) < 20 + seen, drawn.mean(axis=1), np.nan)
    trace = sorted_by_class(SAW_TOOTH, mean=mean, batch=float(batch))
    trace = replace(trace, scalars={**trace.scalars, "target_std": drawn.std(axis=1)})
    assert illnesses(trace) == []


@pytest.mark.parametrize(
    ("why", "trace"),
    [
        ("learnt all the same", sorted_by_class(np.append(np.full(40, 2.5), 0.1 * SAW_TOOTH[:360]))),
        ("batches of two hold one class by chance", sorted_by_class(SAW_TOOTH, batch=2.0)),
        ("two terms", sorted_by_class(SAW_TOOTH, loss_paths=(CROSS_ENTROPY_PATH, MSE_PATH))),
        ("a series, in its order", sorted_by_class(SAW_TOOTH, facts={"loss_kind": "mse"}, loss_paths=(MSE_PATH,))),
        (
            "two phases, each mixed",
            replace(
                sorted_by_class(SAW_TOOTH, mean=np.repeat([2.0, 7.0], [25, 15]), std=1.4),
                steps=np.append(np.arange(10), np.linspace(10, 399, 30, dtype=np.int64)),  # dense at first, as they are
            ),
        ),
        ("all batches alike", sorted_by_class(SAW_TOOTH, mean=4.5, std=2.9)),
    ],
)
def test_an_order_that_harms_nothing_is_no_illness(why: str, trace: Trace) -> None:
    """Only a plain classification in batches of one class that is left unlearnt is blamed on its order."""
    assert "oscillating-loss" not in illnesses(trace), why


def test_a_zero_initialised_last_layer_is_healthy() -> None:
    """Equal rows in the last layer break symmetry by themselves."""
    assert illnesses(make_trace(chain=with_layer(layers(), 2, is_symmetric=True))) == []


@pytest.mark.parametrize(
    ("path", "is_wrong"),
    [
        (CROSS_ENTROPY_PATH, False),
        ((Op("NllLoss"), Op("Addmm", (32, 10), "out")), True),
        ((Op("NllLoss"), Op("Log", (32, 10)), Op("Softmax", (32, 10), "", {"dim": 1}), CROSS_ENTROPY_PATH[2]), False),
        ((Op("BinaryCrossEntropyWithLogits"), Op("Addmm", (32, 1), "out")), False),
        ((Op("BinaryCrossEntropyWithLogits"), Op("Sigmoid", (32, 1), "s"), Op("Addmm", (32, 1), "out")), True),
        ((Op("NllLoss"), Op("LogSoftmax", (32, 10), "", {"dim": 0}), CROSS_ENTROPY_PATH[2]), True),
        ((Op("NllLoss"), Op("LogSoftmax", (32, 1), "", {"dim": 1}), Op("Addmm", (32, 1), "out")), True),
        ((Op("NllLoss"), Op("LogSoftmax", (32, 9, 10), "", {"dim": 2}), CROSS_ENTROPY_PATH[2]), False),
        ((Op("Neg"), Op("Mean"), Op("Mul"), Op("Log"), Op("Clamp"), Op("Addmm", (32, 1), "out")), True),
        ((Op("Neg"), Op("Mean"), Op("Log"), Op("Sum"), Op("Exp"), Op("Addmm", (32, 1), "out")), False),
        ((Op("KlDiv"), Op("LogSoftmax", (32, 10), "", {"dim": 1}), CROSS_ENTROPY_PATH[2]), False),
        ((Op("KlDiv"), Op("Softmax", (32, 10), "", {"dim": 1}), CROSS_ENTROPY_PATH[2]), True),
    ],
)  # fmt: skip
def test_what_may_stand_before_a_loss(path: tuple[Op, ...], is_wrong: bool) -> None:
    """Probabilities, logits and log-probabilities are told apart by the operations that made them."""
    trace = make_trace(2.2, facts={"loss_kind": "nll"}, loss_paths=(path,))
    assert ("output-loss-mismatch" in illnesses(trace)) == is_wrong


@pytest.mark.parametrize(("last", "lowest", "is_wrong"), [("Sigmoid", -1.0, True), ("Sigmoid", 0.0, False),
                                                          ("Tanh", -1.0, False), ("Relu", -2.0, True)])  # fmt: skip
def test_an_output_range_that_misses_the_targets(last: str, lowest: float, is_wrong: bool) -> None:
    """A last activation is wrong exactly when targets lie beyond what it can give."""
    path = (Op("MseLoss"), Op(last, (32, 1), "last"), Op("Addmm", (32, 1), "out"))
    trace = make_trace(0.3, loss_paths=(path,), scalars={"target_min": lowest, "target_max": 1.0, "target_std": 0.5})
    assert ("output-loss-mismatch" in illnesses(trace)) == is_wrong


@pytest.mark.parametrize(
    ("above", "below", "is_wrong"),
    [
        (Op("Sub", (32, 32), "", {"constant_inputs": 1}), (32, 1), True),
        (Op("Sub", (32, 32), "", {"constant_inputs": 1}), (32,), True),
        (Op("Expand", (32, 32)), (32, 1), True),
        (Op("Sub", (32, 32), "", {"constant_inputs": 0}), (32, 1), False),  # all pairs of predictions
        (Op("Sub", (32, 5), "", {"constant_inputs": 1}), (32, 5), False),
        (Op("Sub", (32, 5), "", {"constant_inputs": 1}), (32, 1), False),  # quantiles of one prediction
    ],
)
def test_broadcasting_is_told_from_pairs(above: Op, below: tuple[int, ...], is_wrong: bool) -> None:
    """Only a line of predictions that a target blew up to a square of the batch is called broadcast."""
    trace = make_trace(FLAT, loss_paths=((Op("Mean"), above, Op("Addmm", below, "out")),))
    assert ("broadcast-loss" in illnesses(trace)) == is_wrong


def test_progress_knows_the_constant_answer() -> None:
    """The baseline is the variance of the target for squared error, ln K for K classes, ln 2 for two."""
    assert progress(make_trace(1.0, scalars={"target_std": 3.0})).baseline == pytest.approx(1.0)  # far below 9
    assert progress(make_trace(9.0, scalars={"target_std": 3.0})).remaining == pytest.approx(1.0)
    classes = make_trace(2.0, facts={"loss_kind": "nll"}, loss_paths=(CROSS_ENTROPY_PATH,))
    assert progress(classes).remaining == pytest.approx(2.0 / math.log(10))
    binary = make_trace(0.35, facts={"loss_kind": "bce-with-logits"})
    assert progress(binary).remaining == pytest.approx(0.35 / math.log(2))


@settings(deadline=None, max_examples=60)
@given(
    losses=st.lists(
        st.one_of(st.floats(-1e30, 1e30), st.sampled_from([0.0, math.inf, -math.inf, math.nan])),
        min_size=0,
        max_size=60,
    ),
    level=st.sampled_from([0.0, 1e-30, 1.0, 1e30, math.nan, math.inf]),
    samples=st.integers(0, 12),
)
def test_no_record_makes_a_rule_fail(losses: list[float], level: float, samples: int) -> None:
    """Whatever numbers a record holds, the diagnosis answers, and its document is valid JSON."""
    measures = dict.fromkeys(make_trace().measures, level)
    scalars = dict.fromkeys(make_trace().scalars, level)
    trace = make_trace(losses or 0.0, steps=len(losses), samples=min(samples, len(losses)), measures=measures,
                       scalars=scalars)  # fmt: skip
    found = findings_of(trace)
    assert isinstance(found.to_json(), str)
    assert str(found)


def test_the_same_record_gives_the_same_findings() -> None:
    """Diagnosing is a pure function: it neither changes its input nor remembers anything."""
    for trace in SICK.values():
        before = {name: values.copy() for name, values in trace.measures.items()}
        assert findings_of(trace).to_json() == findings_of(trace).to_json()
        for name, values in before.items():
            np.testing.assert_array_equal(values, trace.measures[name])
