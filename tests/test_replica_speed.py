"""How fast replicas learn, layer by layer and by what; and what the watch sees of them."""

from __future__ import annotations

import logging
import math
import sqlite3
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unvanish
from tests.test_replicas import CASES, OPTIMIZERS, Case, cnn, in_double, mlp, train_together, weights
from unvanish import Coupling, OptionError, RecordError, Recording, Replicas
from unvanish.attend import attend
from unvanish.diagnose.progress import progress
from unvanish.records import MEASURES, SPEEDS, Speeds
from unvanish.replicas import LearningSpeed
from unvanish.report import Ink, report_text
from unvanish.trace import Recorder
from unvanish.watch import Watch


def moved(coupling: Coupling, moves: list[Tensor], every: int = 1) -> Speeds:
    """Return what is measured while an optimiser makes these moves of all weights."""
    with LearningSpeed(coupling, every) as speed, torch.no_grad():
        for move in moves:
            start = 0
            for p in coupling.replicas.parameters():
                size = p[0].numel()
                p += move[:, start : start + size].view_as(p)
                start += size
            coupling.step()
    return speed.speeds


def of_layers(rows: np.ndarray) -> list[np.ndarray]:
    """Return the weights of each layer of the small perceptron, one row a replica."""
    sizes = [7 * 11 + 11, 11 * 5 + 5, 5 * 3 + 3]
    return np.split(rows, np.cumsum(sizes)[:-1], axis=1)


def apart(n: int = 3) -> Replicas:
    torch.manual_seed(0)
    return Replicas(mlp().double(), n=n, init="separate")


# --- what is measured


def test_the_measures_are_their_formulas() -> None:
    """Over pulls that close three steps each, the measures are those of plain NumPy in float64."""
    replicas = apart()
    moves = [torch.randn(3, weights(replicas).shape[1], dtype=torch.float64) for _ in range(6)]
    w = weights(replicas)
    found = moved(Coupling(replicas, 0.2, every=3), moves)
    assert found.layers == ("0", "2", "4")
    assert found.steps.tolist() == [3, 6]
    for number in range(2):
        middle = w + sum(move.numpy() for move in moves[3 * number : 3 * number + 3])
        end = middle + (1 - 0.8**3) * (middle.mean(0) - middle)
        for place, (w0, w1, w2) in enumerate(zip(*map(of_layers, (w, middle, end)), strict=True)):
            size, centre = np.linalg.norm(w0), np.linalg.norm(w0.mean(0))
            expected = {
                "step_ratio": np.linalg.norm(w1 - w0) / size,
                "pull_ratio": np.linalg.norm(w2 - w1) / size,
                "centre_ratio": np.linalg.norm((w2 - w0).mean(0)) / centre,
                "pull_alignment": np.sum((w1 - w0) * (w2 - w1)) / np.linalg.norm(w1 - w0) / np.linalg.norm(w2 - w1),
                "spread_ratio": np.sqrt(((w2 - w2.mean(0)) ** 2).sum(1).mean()) / np.linalg.norm(w2.mean(0)),
            }
            assert expected.keys() == set(SPEEDS)
            for name, value in expected.items():
                assert found.values[name][number, place] == pytest.approx(value, rel=1e-6), name
        w = end


@pytest.mark.parametrize("n", [2, 5])
def test_a_linear_pull_gives_no_learning_speed(n: int) -> None:
    """However strong the pull is, the centre walks as without; the replicas walk a long way, by merging."""
    move = [1e-3 * torch.randn(n, weights(apart(n)).shape[1], dtype=torch.float64)]
    free, tight = (moved(Coupling(apart(n), strength), move).values for strength in (0.0, 1.0))
    np.testing.assert_allclose(tight["centre_ratio"], free["centre_ratio"], rtol=1e-6)
    np.testing.assert_array_equal(tight["step_ratio"], free["step_ratio"])
    assert (tight["pull_ratio"] > 30 * tight["step_ratio"]).all()
    assert (free["pull_ratio"] == 0).all()
    assert np.isnan(free["pull_alignment"]).all()
    np.testing.assert_allclose(tight["spread_ratio"], 0, atol=1e-12)


def test_pulls_are_measured_on_a_schedule() -> None:
    """The first pull is measured, then the next one that is at least ``every`` steps later."""
    moves = [torch.ones(3, 166, dtype=torch.float64)] * 40
    assert moved(Coupling(apart(), 0.1), moves, every=10).steps.tolist() == [1, 11, 21, 31]
    assert moved(Coupling(apart(), 0.1, every=4), moves, every=10).steps.tolist() == [4, 16, 28, 40]
    assert moved(Coupling(apart(), 0.1, every=16), moves, every=10).steps.tolist() == [16, 32]


def test_lost_and_frozen_weights_are_left_out() -> None:
    """Beside a replica that is nan the others are measured as without it; a frozen layer has no speed."""
    moves = [torch.randn(3, 166, dtype=torch.float64) for _ in range(3)]
    with_it, without = apart(), apart()
    for replicas in (with_it, without):
        replicas.stacked[2].requires_grad_(False)
    two = Replicas(without.replica(0), n=2, init=lambda i: without.replica(2 * i))
    with torch.no_grad():
        with_it.stacked[0].weight[1] = math.nan
    rows = [move[[0, 2]] for move in moves]
    for move in (*moves, *rows):
        move[:, 88:148] = 0
    found, expected = moved(Coupling(with_it, 0.3), moves), moved(Coupling(two, 0.3), rows)
    for name in SPEEDS:
        np.testing.assert_allclose(found.values[name], expected.values[name], rtol=1e-6)
        assert np.isnan(found.values[name][:, 1]).all()
        assert np.isfinite(found.values[name][:, [0, 2]]).all()


def test_single_numbers_and_empty_parameters_are_no_obstacle() -> None:
    """A parameter that is one number counts as others do; one without entries has no part in it."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain, self.nothing = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.zeros(0, 3))

    found = moved(Coupling(Replicas(Odd(), n=2), 0.5), [torch.tensor([[1.0], [3.0]])])
    assert found.values["centre_ratio"].item() == pytest.approx(1.0)
    assert found.values["spread_ratio"].item() == pytest.approx(0.125)


@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_large_layers_are_estimated(strength: float) -> None:
    """Of a layer of 90,000 weights a sample is taken, the same of each replica, and the ratios are near the exact."""
    torch.manual_seed(0)
    replicas = Replicas(nn.Linear(300, 300), n=3, init="separate")
    w0 = weights(replicas).astype(np.float64)
    move = 0.01 * torch.randn(3, w0.shape[1]) * torch.linspace(0.1, 3, w0.shape[1])
    found = moved(Coupling(replicas, strength), [move])
    w1, w2 = w0 + move.numpy(), weights(replicas)
    assert found.layers == ("Linear",)
    expected = {
        "step_ratio": np.linalg.norm(w1 - w0) / np.linalg.norm(w0),
        "pull_ratio": np.linalg.norm(w2 - w1) / np.linalg.norm(w0),
        "centre_ratio": np.linalg.norm((w2 - w0).mean(0)) / np.linalg.norm(w0.mean(0)),
    }
    for name, value in expected.items():
        assert found.values[name].item() == pytest.approx(value, rel=0.08), name


def test_measuring_changes_nothing() -> None:
    """Training under measurement gives the same bits, and afterwards nothing is left on the coupling."""
    ended = []
    for is_measured in (False, True):
        torch.manual_seed(0)
        replicas = Replicas(mlp(), n=3, backend="loop")
        coupling = Coupling(replicas, 0.1, every=2)
        speed = LearningSpeed(coupling, every=1)
        with speed if is_measured else torch.enable_grad():
            train_together(replicas, CASES["mlp"], OPTIMIZERS["adamw"], 7, coupling)
        assert coupling.observers == []
        assert speed.speeds.steps.tolist() == ([2, 4, 6] if is_measured else [])
        ended.append(weights(replicas))
    assert np.array_equal(*ended)


def test_measuring_goes_on_when_all_replicas_are_lost() -> None:
    """There is no centre then, so its speeds are unknown; nothing fails."""
    replicas = apart(2)
    coupling = Coupling(replicas, 0.1)
    with LearningSpeed(coupling, every=1) as measured, torch.no_grad():
        coupling.step()
        for parameter in replicas.parameters():
            parameter.fill_(math.nan)
        coupling.step()
        assert coupling.observers != []
    assert measured.speeds.steps.tolist() == [1, 2]
    assert np.isnan(measured.speeds.values["centre_ratio"][1]).all()


def test_a_failure_to_measure_does_not_end_the_training(caplog: pytest.LogCaptureFixture) -> None:
    """What fails in measuring is said once and switched off."""

    def fail(*measured: object) -> None:
        raise RuntimeError("no room")

    replicas = apart()
    coupling = Coupling(replicas, 0.1)
    with caplog.at_level(logging.WARNING, "unvanish"), LearningSpeed(coupling, 1, write=fail):
        for _ in range(3):
            coupling.step()
        assert coupling.observers == []
    assert caplog.messages == ["measuring learning speed stopped, training goes on: RuntimeError: no room"]


# --- the record, and the report


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 0.03, momentum=0.9)


class Watched:
    """Replicas trained under watch on points of two classes, or of whatever case."""

    def __init__(self, replicas: Replicas, case: Case | None = None, steps: int = 30, **options: Any) -> None:
        self.replicas = replicas
        self.coupling = Coupling(replicas, 0.05, every=options.pop("pull_every", 2))
        optimizer = options.pop("optimizer", sgd)(replicas.parameters())
        options = {"folder": None, "coupling": self.coupling, **options}
        with unvanish.watch(replicas, optimizer, **options) as self.run:
            train_together(replicas, case or CASES["mlp"], optimizer, steps, self.coupling)

    @property
    def trace(self) -> unvanish.Trace:
        return self.run.recording().traces[0]


def test_speeds_are_kept_in_the_record(tmp_path: Path) -> None:
    """What is read from the file is what was measured, under the names that the watch gives the layers."""
    torch.manual_seed(0)
    watched = Watched(Replicas(mlp(), n=3), folder=tmp_path)
    read, kept = unvanish.read_recording(watched.run.folder).traces[0].speeds, watched.trace.speeds
    assert read.layers == kept.layers == ("0", "2", "4") == tuple(layer.name for layer in watched.trace.layers)
    assert read.steps.tolist() == kept.steps.tolist() == [2, 12, 22]
    for name in SPEEDS:
        assert np.array_equal(read.values[name], kept.values[name])
        assert np.isfinite(kept.values[name]).all()


def test_the_way_of_the_optimiser_is_the_update_that_the_watch_samples() -> None:
    """With a pull after each step, both say by how much of its size the optimiser moved a layer at that step."""
    torch.manual_seed(0)
    trace = Watched(Replicas(mlp(), n=3), pull_every=1).trace
    sampled = np.isin(trace.steps, trace.speeds.steps - 1)
    assert trace.speeds.steps.tolist() == [1, 11, 21]
    np.testing.assert_allclose(trace.speeds.values["step_ratio"], trace.measures["update_ratio"][sampled], rtol=1e-4)


def test_records_without_speeds_are_read_as_before(tmp_path: Path) -> None:
    """A record from before there were speeds is read; one with others is refused by name; both by its file alone."""
    torch.manual_seed(0)
    file = Watched(Replicas(mlp(), n=2), folder=tmp_path, coupling=None).run.folder / "run.sqlite"
    assert unvanish.read_recording(file).traces[0].speeds is None
    connection = sqlite3.connect(file)
    with connection:
        connection.execute("DROP TABLE speed")
        connection.execute("UPDATE trace SET value = json_remove(value, '$.speeds', '$.speed_layers')")
        connection.execute("UPDATE trace SET value = json_remove(value, '$.layers[0].replicas')")
    read = unvanish.read_recording(file).traces[0]
    assert read.speeds is None
    assert [layer.replicas for layer in read.layers] == [0, 2, 2]
    with connection:
        connection.execute(
            "UPDATE trace SET value = json_set(value, '$.speeds', 'x', '$.speed_layers', json('[\"0\"]'))"
        )
    connection.close()
    with pytest.raises(RecordError, match="written by another version of unvanish"):
        unvanish.read_recording(file)


def test_speeds_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When there are too many, every second one goes, in memory and on disk."""
    monkeypatch.setattr("unvanish.trace.MAX_SAMPLES", 20)
    recorder = Recorder(tmp_path)
    stream = recorder.stream("SGD")
    stream.speed_layers = ("a",)
    for step in range(100):
        recorder.write([], [], [], [(stream, step, np.full((1, len(SPEEDS)), step, dtype=np.float32))])
    recorder.close()
    (read,) = (trace.speeds for trace in unvanish.read_recording(tmp_path).traces)
    assert 10 <= len(read.steps) <= 20
    assert read.steps.tolist() == sorted(stream.speeds)
    assert read.steps[0] == 0
    assert read.values["step_ratio"][:, 0].tolist() == read.steps.tolist()


def test_the_report_shows_speeds() -> None:
    """Text and JSON show the medians of the second half of the pulls; runs without a coupling show nothing of it."""
    torch.manual_seed(0)
    watched = Watched(Replicas(mlp(), n=3))
    findings = watched.run.diagnose()
    text = report_text(findings, Ink(width=100), watched.run.recording())
    head = next(line for line in text.splitlines() if line.startswith("  learning "))
    assert head.split() == ["learning", "centre", "optimiser", "pull", "cosine", "spread"]
    for place, row in enumerate(findings.to_dict()["layers"]):
        for name, values in watched.trace.speeds.values.items():
            assert row["learning_speed"][name] == pytest.approx(np.median(values[1:, place]), rel=1e-6)
    alone = Watched(Replicas(mlp(), n=3), coupling=None).run.diagnose()
    assert "learning_speed" not in alone.to_dict()["layers"][0]
    assert "optimiser " not in report_text(alone, Ink(width=100))


def test_a_watch_that_fails_ends_measuring_too(caplog: pytest.LogCaptureFixture) -> None:
    """A failure inside the watch's guard switches the watch off, not the training."""
    replicas = apart()
    coupling = Coupling(replicas, 0.1)
    optimizer = OPTIMIZERS["sgd"](replicas.parameters())
    with caplog.at_level(logging.WARNING, "unvanish"), unvanish.watch(replicas, optimizer, coupling=coupling) as run:
        replicas.stacked.add_module("late", nn.Linear(1, 1))
        coupling.observers[0]._layers.append(replicas.stacked.late)
        for _ in range(2):
            coupling.step()
    assert "ValueError" in run.recording().run["failure"]
    assert coupling.observers == []


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: LearningSpeed(Coupling(apart()), every=0),
            r"LearningSpeed\(\): every: found 0, expected a whole number",
        ),
        (
            lambda: unvanish.watch(apart(), coupling=Coupling(apart())),
            r"watch\(\): coupling: found Coupling, expected the Coupling of a watched model. Nothing was attached",
        ),
        (lambda: unvanish.watch(apart(), coupling="tight"), r"watch\(\): coupling: found str, expected the Coupling"),
    ],
)
def test_wrong_calls_are_refused(make: Callable[[], object], words: str) -> None:
    """What cannot be used is named, with what was expected."""
    with pytest.raises(OptionError, match=words):
        make()


# --- what the watch sees of replicas


def watched_alone(case: Case, steps: int) -> Recording:
    torch.manual_seed(0)
    model = case.make()
    optimizer = sgd(model.parameters())
    torch.manual_seed(1)
    with unvanish.watch(model, optimizer, folder=None) as run:
        for _ in range(steps):
            x, y = case.batch()
            optimizer.zero_grad()
            case.loss_fn(model(**x) if isinstance(x, dict) else model(x), y).backward()
            optimizer.step()
    return run.recording()


@pytest.mark.parametrize("name", sorted(CASES.keys() - {"gpt2", "one example"}))
def test_one_replica_looks_like_the_plain_model(name: str) -> None:
    """Layers, their facts and all their measures are those of the plain training, for one replica."""
    case = CASES[name]
    (alone,) = watched_alone(case, 12).traces
    torch.manual_seed(0)
    replicas = Replicas(case.make(), n=1)
    torch.manual_seed(1)
    together = Watched(replicas, case, 12, coupling=None).trace
    for one, other in zip(alone.layers, together.layers, strict=True):
        assert {**vars_of(one), "replicas": 1} == vars_of(other)
    for measure in MEASURES:
        np.testing.assert_allclose(together.measures[measure], alone.measures[measure], rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(together.losses, alone.losses, rtol=1e-6)


def vars_of(layer: unvanish.Layer) -> dict[str, Any]:
    return {name: getattr(layer, name) for name in layer.__dataclass_fields__}


def wide(depth: int, activation: type[nn.Module], init: Callable[[Tensor], object] | None = None) -> nn.Module:
    layers: list[nn.Module] = []
    for number in range(depth):
        linear = nn.Linear(16 if number == 0 else 32, 32)
        if init is not None:
            init(linear.weight)
            nn.init.zeros_(linear.bias)
        layers += [linear, activation()]
    return nn.Sequential(*layers, nn.Linear(32, 3))


def clouds(*shape: int) -> Callable[[], tuple[Tensor, Tensor]]:
    """Return batches of three classes that are easy to tell apart."""

    def batch() -> tuple[Tensor, Tensor]:
        y = torch.randint(3, (16,))
        return torch.randn(16, *shape) + 1.5 * (y - 1).view(-1, *[1] * len(shape)), y

    return batch


HEALTHY = {
    "relu": Case(lambda: wide(2, nn.ReLU), clouds(16)),
    "relu, He": Case(lambda: wide(3, nn.ReLU, nn.init.kaiming_normal_), clouds(16)),
    "tanh, deep": Case(lambda: wide(6, nn.Tanh, nn.init.xavier_normal_), clouds(16)),
    "cnn": Case(cnn, clouds(2, 8, 8)),
}


@pytest.mark.parametrize(
    ("backend", "is_shared"),
    [
        ("loop", True),
        ("vmap", False),
        *(pytest.param(*others, marks=pytest.mark.slow) for others in [("loop", False), ("vmap", True)]),
    ],
)
@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_replicas_are_clean(name: str, backend: Any, is_shared: bool) -> None:
    """Replicas that learn get no finding, whether they start equal or not, and stay equal or not."""
    torch.manual_seed(0)
    replicas = Replicas(HEALTHY[name].make(), 3, "shared" if is_shared else "separate", backend=backend)
    watched = Watched(replicas, HEALTHY[name], 50)
    findings = watched.run.diagnose()
    assert findings.verdict == "clean", str(findings)
    assert watched.trace.losses[-10:].mean() < 0.75 * watched.trace.losses[:3].mean()  # it does learn


@pytest.mark.parametrize(("n", "backend"), [(1, "loop"), (3, "loop"), (3, "vmap"), (3, "batched")])
def test_a_deep_sigmoid_net_in_replicas_is_found_vanishing(n: int, backend: Any) -> None:
    """Twelve layers of sigmoids do not learn as replicas either, and the first layers are named for it."""
    torch.manual_seed(0)
    case = Case(lambda: wide(11, nn.Sigmoid), clouds(16))
    watched = Watched(Replicas(case.make(), n, backend=backend), case, 60)
    findings = watched.run.diagnose()
    (finding,) = findings.at_least("critical")
    assert (finding.illness, finding.layer) == ("vanishing-gradient", "0")
    speeds = watched.trace.speeds.values["centre_ratio"]
    assert (np.nanmedian(speeds, axis=0)[:4] < 1e-6).all()
    assert np.nanmedian(speeds, axis=0)[-1] > 1e-3
    (note,) = findings.notes
    assert note.startswith(f"{n} replicas: gradients, weights and updates are those of all together; activations")


@pytest.mark.parametrize("reduce", [torch.sum, torch.mean])
@pytest.mark.parametrize("name", ["mlp", "cnn with batch norm"])
def test_a_watch_sees_the_same_of_replicas_in_every_back_end(name: str, reduce: Any) -> None:
    """Activations, their gradients, targets and the way to the loss are those that the loop shows."""
    case, traces = in_double(CASES[name]), {}
    for backend in ("loop", "batched", "vmap"):
        torch.manual_seed(0)
        replicas = Replicas(case.make(), n=3, backend=backend)  # equal: which one is seen is nothing
        optimizer = sgd(replicas.parameters())
        with unvanish.watch(replicas, optimizer, folder=None) as run:
            for _ in range(25):
                optimizer.zero_grad()
                reduce(replicas.losses(case.loss_fn, *case.batch())).backward()
                optimizer.step()
        (traces[backend],) = run.recording().traces
    expected = traces.pop("loop")
    for found in traces.values():
        ways = [{tuple(op.name for op in way) for way in trace.loss_paths} for trace in (found, expected)]
        assert ways[0] == ways[1]
        assert [layer.activation for layer in found.layers] == [layer.activation for layer in expected.layers]
        for values, others in ((found.measures, expected.measures), (found.scalars, expected.scalars)):
            for measure in others.keys() - {"seconds", "grad_zero_share"}:  # noise may be zero here and not there
                np.testing.assert_allclose(values[measure], others[measure], rtol=1e-5, atol=1e-9, err_msg=measure)


@pytest.mark.parametrize("backend", ["batched", "vmap"])
@pytest.mark.parametrize("name", ["dropout", "cnn with batch norm"])
def test_what_a_watch_is_shown_changes_nothing(name: str, backend: Any) -> None:
    """Weights, statistics, random state and losses are those of replicas that nobody watches, bit for bit."""
    case, ended = CASES[name], []
    for is_watched in (False, True):
        torch.manual_seed(0)
        replicas = Replicas(case.make(), n=3, init="separate", backend=backend)
        optimizer = sgd(replicas.parameters())
        with unvanish.watch(replicas, optimizer, folder=None, every=1) if is_watched else nullcontext():
            train_together(replicas, case, optimizer, 12)
        ended.append([*replicas.state_dict().values(), torch.get_rng_state()])
    for one, other in zip(*ended, strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else str(one) == str(other)


def test_equal_replicas_are_not_taken_for_equal_units() -> None:
    """Replicas on one shared batch stay copies of each other; their units do not."""
    torch.manual_seed(0)
    replicas = Replicas(mlp(), n=3)
    optimizer = OPTIMIZERS["sgd"](replicas.parameters())
    with unvanish.watch(replicas, optimizer, folder=None) as run:
        for _ in range(12):
            optimizer.zero_grad()
            replicas.loss(F.cross_entropy, *CASES["mlp"].batch()).backward()
            optimizer.step()
    layers = run.recording().traces[0].layers
    assert [(layer.name, layer.is_symmetric, layer.fan_in, layer.parameters) for layer in layers] == [
        ("0", False, 7, 88), ("2", False, 11, 60), ("4", False, 5, 18)
    ]  # fmt: skip


def test_optimisers_of_each_replicas_own_parameters_are_watched() -> None:
    """Updates of parameters that lie in the memory of the stacked ones are those of the stacked ones."""
    traces = []
    for is_apart in (False, True):
        torch.manual_seed(0)
        replicas = Replicas(mlp(), n=2)
        parameters = [p for i in range(2) for p in replicas.parameters_of(i)] if is_apart else replicas.parameters()
        traces.append(Watched(replicas, steps=12, optimizer=lambda _, own=parameters: sgd(own)).trace)
    one, other = traces
    assert one.layers == other.layers
    for name in ("update_ratio", "weight_rms", "activation_rms", "log2_flow"):
        assert np.isfinite(other.measures[name][0]).all(), name
        np.testing.assert_allclose(other.measures[name], one.measures[name], rtol=1e-4)
    for name in SPEEDS:
        np.testing.assert_allclose(other.speeds.values[name], one.speeds.values[name], rtol=1e-4)


def test_the_loss_of_replicas_is_read_as_a_sum_of_theirs() -> None:
    """Knowing nothing costs ln 3 a replica: a sum of three is judged against three times as much, a mean against it."""
    torch.manual_seed(0)
    for reduce, times in ((torch.sum, 3), (torch.mean, 1)):
        replicas = Replicas(mlp(), n=3)
        optimizer = sgd(replicas.parameters())
        with unvanish.watch(replicas, optimizer, folder=None) as run:
            for _ in range(12):
                optimizer.zero_grad()
                reduce(replicas.losses(F.cross_entropy, *CASES["mlp"].batch())).backward()
                optimizer.step()
        assert progress(run.recording().traces[0]).baseline == pytest.approx(times * math.log(3))


def test_replicas_are_found_without_being_named() -> None:
    """A watch of everything finds the stacked weights by their optimiser, and sees the layers by their own names."""
    torch.manual_seed(0)
    case = Case(lambda: wide(11, nn.Sigmoid), clouds(16))
    replicas = Replicas(case.make(), n=2)
    watch = Watch()
    watch.attach()
    train_together(replicas, case, sgd, 60)
    watch.close()
    recording = watch.recording()
    (trace,) = recording.traces
    assert [layer.name for layer in trace.layers] == [str(2 * i) for i in range(12)]
    assert all(layer.replicas == 2 and layer.is_optimised for layer in trace.layers)
    assert [finding.illness for finding in unvanish.diagnose(recording)] == ["vanishing-gradient"]


def test_a_script_of_replicas_is_measured_as_it_is(tmp_path: Path) -> None:
    """``unvanish run`` finds the coupling of an unmodified script, and leaves its class as it was."""
    script = tmp_path / "train.py"
    script.write_text(
        "import torch, unvanish\n"
        "torch.manual_seed(0)\n"
        "replicas = unvanish.Replicas(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 1)), n=2)\n"
        "optimizer = torch.optim.SGD(replicas.parameters(), lr=0.01)\n"
        "coupling = unvanish.Coupling(replicas, 0.1)\n"
        "for _ in range(22):\n"
        "    loss = replicas.loss(torch.nn.functional.mse_loss, torch.randn(2, 8, 4), torch.randn(2, 8, 1),\n"
        "                         batches='separate')\n"
        "    optimizer.zero_grad(); loss.backward(); optimizer.step(); coupling.step()\n"
    )
    original = Coupling.__init__
    attended = attend(str(script), [], is_module=False, every=10, parent=tmp_path / "runs")
    assert attended.outcome.status == 0
    assert Coupling.__init__ is original
    (trace,) = unvanish.read_recording(attended.folder).traces
    assert trace.speeds.layers == ("0", "1")
    assert trace.speeds.steps.tolist() == [1, 11, 21]
    assert (trace.speeds.values["centre_ratio"] > 0).all()


def test_replicas_inside_of_a_model_keep_its_names() -> None:
    """A stack that is a part of a model is named as that part."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 3)
            self.body = Replicas(mlp(), n=2)

    pair = Pair()
    optimizer = torch.optim.SGD(pair.parameters(), 0.1)
    with unvanish.watch(pair, optimizer, folder=None) as run:
        for _ in range(3):
            optimizer.zero_grad()
            x, y = CASES["mlp"].batch()
            pair.body.loss(lambda output, y: F.cross_entropy(pair.head(output), y), x, y).backward()
            optimizer.step()
    found = {layer.name: layer.replicas for layer in run.recording().traces[0].layers}
    assert found == {"head": 0, "body.0": 2, "body.2": 2, "body.4": 2}


@pytest.mark.parametrize("backend", ["loop", "vmap"])
def test_watching_replicas_changes_no_bit(backend: Any) -> None:
    """With and without watch and measurement, weights and random numbers end the same."""
    ended = []
    for is_watched in (False, True):
        torch.manual_seed(0)
        replicas = Replicas(CASES["dropout"].make(), n=3, backend=backend)
        coupling = Coupling(replicas, 0.1)
        optimizer = OPTIMIZERS["adamw"](replicas.parameters())
        watch = unvanish.watch(replicas, optimizer, folder=None, coupling=coupling)
        with watch if is_watched else torch.enable_grad():
            train_together(replicas, CASES["dropout"], optimizer, 15, coupling)
        ended.append((weights(replicas), torch.get_rng_state().numpy()))
    for one, other in zip(*ended, strict=True):
        assert np.array_equal(one, other)
