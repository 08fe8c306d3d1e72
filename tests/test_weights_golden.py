"""Files that the frameworks wrote give the outputs that the frameworks computed, and come back byte for byte."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.weights_nets import FLAX, KERAS, ONNX, Case, in_this_process  # noqa: F401 - a fixture
from unvanish.reuse.weights import load_weights

pytestmark = pytest.mark.usefixtures("in_this_process")
GOLDEN = Path(__file__).parent / "golden" / "files"
NETS = {"keras": KERAS, "keras2": KERAS, "flax": FLAX, "onnx": ONNX}
REFUSED = {"keras_batch_norm_unscaled.weights.h5", "keras_gru_before.keras"}
TRAINED_WITH = {"2": 1e-3, "6": 0.01, "0.1": 1e-3}  # epsilon of the batch norms, where the file does not tell it


def files() -> list[Path]:
    return [path for path in sorted(GOLDEN.iterdir()) if path.suffix != ".npz" and path.name not in REFUSED]


def case_of(path: Path) -> tuple[Case, Path]:
    """Return the net of a file, and its inputs and outputs."""
    family, _, name = path.name.split(".")[0].partition("_")
    name = name.removesuffix("_weights")
    stem = name.removesuffix("_dynamo").removesuffix("_whole")
    return NETS[family][name], GOLDEN / f"{family}_{stem}.npz"


def inputs_of(case: Case, x: np.ndarray) -> Tensor:
    return torch.from_numpy(np.moveaxis(x, -1, 1).copy() if case.channels and x.ndim > 2 else x)


def build(case: Case, path: Path) -> nn.Module:
    """Build the net; with the epsilon of its source where the file has none."""
    torch.manual_seed(0)
    model = case.build()
    if path.name.endswith("weights.h5"):
        for name, module in model.named_modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps = TRAINED_WITH[name]
    return model


@pytest.mark.parametrize("path", files(), ids=lambda path: path.name)
def test_outputs_are_those_of_the_framework_and_the_way_back_gives_the_file(path: Path) -> None:
    """Each layer kind within 1e-5, each whole net within 1e-4 of the largest output; converted back bit for bit."""
    case, numbers = case_of(path)
    arrays = np.load(numbers)
    model = build(case, path)
    tolerance = 1e-4 if "net" in path.name else 1e-5
    plan = load_weights(
        model, path, verify=(inputs_of(case, arrays["x"]), arrays["y"]), tolerance=tolerance, **case.options
    )
    assert plan.is_loaded
    assert plan.verification.is_passed
    with torch.no_grad():  # once more without the code that verifies
        output = model.eval()(inputs_of(case, arrays["x"])).numpy()
    wanted = arrays["y"] if arrays["y"].shape == output.shape else np.moveaxis(arrays["y"], -1, 1)
    assert np.abs(output - wanted).max() <= tolerance * np.abs(wanted).max()
    there_and_back = plan.reverse()
    stored = {layer.place(role): array for layer in plan.foreign.layers for role, array in layer.arrays.items()}
    assert there_and_back.keys() == stored.keys() - set(plan.unused)
    for name, array in there_and_back.items():
        assert array.dtype == stored[name].dtype, name
        assert array.shape == stored[name].shape, name
        assert array.numpy().tobytes() == stored[name].contiguous().numpy().tobytes(), name


def test_layers_are_compared_one_by_one() -> None:
    """Outputs of layers of the framework, which hold their activations, agree with those of the model."""
    case, numbers = case_of(GOLDEN / "keras_net_cnn.keras")
    arrays = np.load(numbers)
    names = [name for name in arrays if name.startswith("at_")]
    assert len(names) == 6
    outputs = {name.removeprefix("at_"): arrays[name] for name in names}
    model = case.build()
    plan = load_weights(model, GOLDEN / "keras_net_cnn.keras", verify=(inputs_of(case, arrays["x"]), outputs))
    assert plan.verification.first == ""
    assert max(plan.verification.layers.values()) < 1e-5
    assert plan.verification.layers.keys() == outputs.keys()


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    ("framework", "modules"),
    [("keras", ("keras", "jax")), ("flax", ("flax", "orbax")), ("keras2", ("tf_keras",)), ("onnx", ("onnxscript",))],
)
def test_frameworks_write_the_same_anew(framework: str, modules: tuple[str, ...], tmp_path: Path) -> None:
    """The script that wrote the golden files writes files that load with the same proof."""
    if missing := [
        name for name in modules if importlib.util.find_spec(name) is None
    ]:  # importing one starts a back end
        pytest.skip(f"needs {', '.join(missing)}")
    script = GOLDEN.parent / "write.py"
    subprocess.run([sys.executable, str(script), str(tmp_path), framework], check=True, timeout=1400)
    written = [path for path in sorted(tmp_path.iterdir()) if path.suffix != ".npz" and path.name not in REFUSED]
    assert {path.name for path in written} >= {p.name for p in files() if p.name.startswith(f"{framework}_")}
    for path in written:
        case, numbers = case_of(path)
        arrays = np.load(tmp_path / numbers.name)
        load_weights(build(case, path), path, verify=(inputs_of(case, arrays["x"]), arrays["y"]), **case.options)
