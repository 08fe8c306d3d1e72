"""The example computes what it says: the first experiment as written, and its parts measured."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

PATH = Path(__file__).parents[1] / "examples" / "seed_experiment.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    """The example as a module."""
    spec = importlib.util.spec_from_file_location("seed_experiment", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["seed_experiment"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_gradients_are_those_of_autograd(example: ModuleType) -> None:
    """The gradients of the first code, written by hand, are the derivatives of its cost."""
    draw = np.random.default_rng(0)
    x, y = draw.standard_normal((7, 5)), draw.standard_normal((7, 2))
    weights = [draw.standard_normal((5, 4)), draw.standard_normal((4, 2))]
    cost, grads = example.cost_and_grads(weights, x, y)
    first, second = (torch.tensor(w, requires_grad=True) for w in weights)
    expected = ((torch.tensor(x) @ first).relu() @ second - torch.tensor(y)).square().sum()
    expected.backward()
    assert cost == pytest.approx(expected.item(), rel=1e-12)
    for found, w in zip(grads, (first, second), strict=True):
        np.testing.assert_allclose(found, w.grad.numpy(), rtol=1e-12, atol=1e-12)


def test_as_written_follows_the_first_code_step_by_step(example: ModuleType) -> None:
    """Three steps by the formula: copy 2 is pulled to a mean that copy 1 moved, signs cancel in what is plotted."""
    size = example.Size(rows=6, inputs=5, hidden=4, outputs=2, steps=3, lr=1e-3)
    found = example.as_written(size, seed=4, strength=0.7)
    draw = np.random.default_rng(4)
    x, y = example.draw_rows(size, draw)
    rows = [example.pick(size, draw), example.pick(size, draw)]
    one, two = example.draw_weights(size, draw), example.draw_weights(size, draw)
    for step in range(3):
        cost, grads = example.cost_and_grads(one, x[rows[0]], y[rows[0]])
        _, others = example.cost_and_grads(two, x[rows[1]], y[rows[1]])
        assert found["cost"][step] == pytest.approx(cost, rel=1e-12)
        for layer in range(2):
            new = one[layer] - 1e-3 * grads[layer] + 0.7 * np.tanh((two[layer] - one[layer]) / 2)
            assert found[f"update {layer + 1}"][step] == pytest.approx(np.abs(new - one[layer]).mean(), rel=1e-12)
            two[layer] = two[layer] - 1e-3 * others[layer] + 0.7 * np.tanh((new - two[layer]) / 2)
            one[layer] = new
            mixed = 1e-3 * grads[layer] - 0.7 * np.tanh((two[layer] - new) / 2)
            assert found[f"plotted {layer + 1}"][step] == pytest.approx(abs(mixed.mean()), rel=1e-10)


def test_a_pull_of_two_copies_moves_no_centre(example: ModuleType) -> None:
    """With two copies tanh is odd in their gap: at step 0 optimiser and centre move as without the pull."""
    size = example.Size(inputs=50, hidden=9, steps=2)
    plain, rule, *_ = (example.measured(size, 1, way) for way in example.ways(2))
    for layer in (1, 2):
        assert rule[f"optimiser {layer}"][0] == plain[f"optimiser {layer}"][0]
        assert rule[f"centre {layer}"][0] == pytest.approx(plain[f"centre {layer}"][0], rel=1e-12)
        assert plain[f"coupling {layer}"][0] == 0
        assert rule[f"coupling {layer}"][0] > 0.1


def test_controls_start_and_learn_as_they_are_called(example: ModuleType) -> None:
    """The small start has 1 / sqrt n of the scale; n batches in one step cost the mean of their costs."""
    size = example.Size(inputs=50, hidden=9, steps=1, lr=0.0)
    _, _, union, small, small_long, long = (example.measured(size, 2, way) for way in example.ways(4))
    assert small["rms 1"][0] == pytest.approx(union["rms 1"][0] / 2, rel=1e-12)
    assert small_long["rms 1"][0] == pytest.approx(long["rms 1"][0] / 2, rel=1e-12)
    draw = np.random.default_rng(2)
    x, y = example.draw_rows(size, draw)
    picks = [example.pick(size, draw) for _ in range(4)]
    weights = example.draw_weights(size, draw)
    expected = np.mean([example.cost_and_grads(weights, x[rows], y[rows])[0] for rows in picks])
    assert union["cost"][0] == pytest.approx(expected, rel=1e-12)


def test_equal_gradients(example: ModuleType) -> None:
    """Whatever is trained, all ways but the bare single ones take the gradient of n batches for each step seen."""
    for way in example.ways(5):
        assert way.n * way.union * way.times == 5


def test_the_example_runs_from_end_to_end(
    example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At a tenth of the width it prints the tables, draws both pictures, and writes its numbers."""
    example.main(["--small", "--seeds", "2", "--out", str(tmp_path), "--json", str(tmp_path / "all.json")])
    printed = capsys.readouterr().out
    assert "what was plotted, layer 1" in printed
    assert "one, 2 batches, start / sqrt 2" in printed
    for name in ("first-figure.png", "first-figure-measured.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    tables = json.loads((tmp_path / "all.json").read_text())["tables"]
    assert tables["as written"]["cost"]["step 0"] == [1.0, 0.0]
    assert tables["2 copies"]["ratios"]["centre, layer 1"]["step 0"][0] == pytest.approx(1.0, rel=1e-9)
