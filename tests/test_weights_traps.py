"""Ways in which foreign weights fit by their shapes and are wrong: caught, taken over or refused with the reason."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import nn

from tests.test_weights_golden import GOLDEN
from tests.weights_nets import KERAS, ONNX, First, in_this_process, onnx_cnn  # noqa: F401 - a fixture
from unvanish import WeightsError, load_weights

pytestmark = pytest.mark.usefixtures("in_this_process")


def state(model: nn.Module) -> list[tuple[str, bytes]]:
    return [(name, tensor.numpy().tobytes()) for name, tensor in model.state_dict().items()]


def refused(model: nn.Module, file: Path, words: str, **options: Any) -> None:
    """Assert that a load is refused in these words, and the model stays bit for bit."""
    before = state(model)
    settings = [(m.eps, m.momentum) for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    with pytest.raises(WeightsError, match=words):
        load_weights(model, file, **options)
    assert state(model) == before
    assert settings == [(m.eps, m.momentum) for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


def proof(name: str, *, channels: bool = True) -> tuple[torch.Tensor, np.ndarray]:
    arrays = np.load(GOLDEN / f"{name}.npz")
    x = np.moveaxis(arrays["x"], -1, 1).copy() if channels and arrays["x"].ndim > 2 else arrays["x"]
    return torch.from_numpy(x), arrays["y"]


def save_npz(folder: Path, **arrays: np.ndarray) -> Path:
    np.savez(folder / "w.npz", **{name.replace("__", "/"): array.astype("f4") for name, array in arrays.items()})
    return folder / "w.npz"


@pytest.mark.parametrize(
    ("name", "model", "words"),
    [
        ("depthwise", nn.Conv2d(3, 6, 3), "DepthwiseConv, expected one that a Conv2d|nothing in the file fills"),
        (
            "conv2d_same",
            nn.Conv2d(2, 3, 3, stride=2, padding=1),
            r"padding of \(\(0, 1\), \(0, 1\)\).*another function",
        ),
        ("conv2d_same", nn.Conv2d(2, 3, 3, stride=2), r"Put nn.ZeroPad2d\(\(0, 1, 0, 1\)\) in front"),
        ("conv2d_same", nn.Conv2d(2, 3, 3, stride=1, padding=1), r"found stride=\(2, 2\) in the file"),
        ("conv2d", nn.Conv2d(3, 3, 3, padding=1), "padding of .* another function of the same shapes"),
        ("conv2d", nn.Conv2d(3, 3, 3, dilation=2), r"found dilation=\(1, 1\) in the file, expected \(2, 2\)"),
        ("conv2d_groups", nn.Conv2d(4, 4, 3), "found groups=2 in the file, expected 1"),
        ("conv2d_transpose_odd", nn.ConvTranspose2d(3, 2, 3, 2, 1, 1), r"cropped by \(\(0, 1\), \(0, 1\)\).*Build it"),
        ("gru_before", First(nn.GRU(4, 4, batch_first=True)), "reset_after=False, expected reset_after=True"),
        ("lstm", First(nn.LSTM(4, 4, bidirectional=True)), "found one direction in the file, expected two"),
        ("lstm", First(nn.LSTM(4, 4, bias=False)), "found a bias in the file, expected none"),
        ("rnn", First(nn.RNN(4, 4, nonlinearity="relu")), "activation='tanh', expected 'relu'"),
        ("attention", nn.MultiheadAttention(8, 4), "found 2 heads in the file, expected 4. All shapes would fit"),
        ("group_norm", nn.GroupNorm(4, 4), "found 2 groups, expected 4"),
        ("dense", nn.Linear(4, 4, bias=False), "found 'bias' in the file, expected none"),
        ("dense", nn.Conv2d(4, 4, 1), "nothing in the file fills 'weight'"),
        ("batch_norm", nn.InstanceNorm2d(3, affine=True, track_running_stats=True), "nothing in the file fills"),
    ],
)
def test_another_function_of_the_same_shapes_is_refused(name: str, model: nn.Module, words: str) -> None:
    """What Keras says of a layer is compared with the module, and the reason of a refusal is given."""
    refused(model, GOLDEN / f"keras_{name}.keras", f"(?s){words}")


def test_epsilon_that_the_file_does_not_tell_is_asked_for() -> None:
    """Weights alone: the default of Keras is a hundred times that of torch; one word or a proof settles it."""
    file = GOLDEN / "keras_net_cnn.weights.h5"
    refused(
        KERAS["net_cnn"].build(), file, "does not tell epsilon; keras has 0.001 by default, the BatchNorm2d has 1e-05"
    )
    model = KERAS["net_cnn"].build()
    load_weights(model, file, epsilon=1e-3)
    assert [module.eps for module in model.modules() if isinstance(module, nn.BatchNorm2d)] == [1e-3, 1e-3]
    # one of the two was trained with 0.01, which a proof finds out
    refused(KERAS["net_cnn"].build(), file, "outputs differ", epsilon=1e-3, verify=proof("keras_net_cnn"))


def test_epsilon_and_momentum_that_the_file_tells_are_taken_over() -> None:
    """Keras weighs the old mean by its momentum, torch the new batch."""
    model = KERAS["net_cnn"].build()
    plan = load_weights(model, GOLDEN / "keras_net_cnn.keras")
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert [(norm.eps, norm.momentum) for norm in norms] == [(1e-3, pytest.approx(0.01)), (0.01, pytest.approx(0.1))]
    assert "2.eps: 1e-05 → 0.001" in map(str, plan.changes)


def test_a_missing_gain_is_one_and_never_the_next_array() -> None:
    """Batch norm without gamma: with a configuration gamma is 1; three numbered arrays alone are refused."""
    model = nn.BatchNorm1d(4)
    load_weights(model, GOLDEN / "keras_batch_norm_unscaled.keras")
    assert model.weight.tolist() == [1.0] * 4
    words = "three arrays, expected two or four: one of gamma and beta is missing"
    refused(nn.BatchNorm1d(4, eps=1e-3), GOLDEN / "keras_batch_norm_unscaled.weights.h5", words)


def test_the_order_of_a_flattened_map_decides() -> None:
    """Read without the order of the axes every shape fits, and a proof refuses it; with it the proof holds."""
    file = GOLDEN / "keras_flatten.keras"
    x, y = proof("keras_flatten")
    model = KERAS["flatten"].build()
    refused(model, file, "outputs differ", flatten="channels_last", verify=(x, y))
    load_weights(model, file, verify=(x, y), tolerance=1e-5)

    class LikeKeras(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(60, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x.movedim(1, -1).flatten(1))

    load_weights(LikeKeras(), file, flatten="channels_last", verify=(x, y), tolerance=1e-5)


def test_without_a_configuration_the_model_tells_what_was_flattened() -> None:
    """Weights alone: a layer whose inputs are a multiple of the channels in front of it follows them flattened."""
    model = KERAS["net_cnn"].build()
    plan = load_weights(model, GOLDEN / "keras_net_cnn.weights.h5", trust=True)
    (step,) = (step for step in plan.steps if step.names == ("8.weight",))
    assert step.operations == ("reshape(6, 4, 6)", "permute(2, 1, 0)", "reshape(6, 24)")


def test_the_slope_of_leaky_relu_is_taken_over() -> None:
    """Keras has 0.3 by default, torch 0.01."""
    model = KERAS["leaky_relu"].build()
    load_weights(model, GOLDEN / "keras_leaky_relu.keras", verify=proof("keras_leaky_relu"))
    assert model[1].negative_slope == pytest.approx(0.3)
    bare = nn.Sequential(nn.Linear(4, 4))
    refused(bare, GOLDEN / "keras_leaky_relu.keras", r"1 LeakyReLU of slopes \[0\.3.*\], the model 0")


@pytest.mark.parametrize("name", ["net_cnn", "net_cnn_dynamo"])
def test_a_folded_batch_norm_is_refused_or_made_idle(name: str) -> None:
    """Both exporters fold; one keeps the name of the kernel, so that by name it would load and act twice."""
    file = GOLDEN / f"onnx_{name}.onnx"
    refused(onnx_cnn(), file, "'1': found no batch norm behind .* It was folded", trust=True)
    model = onnx_cnn()
    load_weights(
        model, file, folded_batch_norm="identity", verify=proof("onnx_net_cnn", channels=False), tolerance=1e-5
    )
    norm = model[1].eval()
    x = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(norm(x) - norm.bias[:, None, None], x, atol=1e-6, rtol=1e-6)


def gru_model(folder: Path, *, linear_before_reset: int) -> Path:
    rng = np.random.default_rng(0)
    arrays = {"W": (1, 12, 4), "R": (1, 12, 4), "B": (1, 24)}
    initialisers = [numpy_helper.from_array(rng.normal(size=s).astype("f4"), n) for n, s in arrays.items()]
    node = helper.make_node("GRU", ["x", "W", "R", "B"], ["y"], hidden_size=4, linear_before_reset=linear_before_reset)
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, [5, 2, 4])
    made = helper.make_tensor_value_info("y", TensorProto.FLOAT, [5, 1, 2, 4])
    graph = helper.make_graph([node], "g", [given], [made], initialisers)
    onnx.save(helper.make_model(graph), folder / "gru.onnx")
    return folder / "gru.onnx"


def test_onnx_gru_is_torchs_only_with_linear_before_reset(tmp_path: Path) -> None:
    """The default of ONNX is the other form: refused. The same form gives what the reference evaluator computes."""
    refused(nn.GRU(4, 4), gru_model(tmp_path, linear_before_reset=0), "linear_before_reset=0, expected linear_before")
    file = gru_model(tmp_path, linear_before_reset=1)
    x = np.random.default_rng(1).normal(size=(5, 2, 4)).astype("f4")
    (y,) = ReferenceEvaluator(str(file)).run(None, {"x": x})
    load_weights(First(nn.GRU(4, 4)), file, verify=(x, y[:, 0]), tolerance=1e-5)


def test_onnx_products_in_either_orientation(tmp_path: Path) -> None:
    """Gemm as it stands and transposed, MatMul with an Add: square kernels, held to the reference evaluator."""
    rng = np.random.default_rng(0)
    arrays = {"A": (4, 4), "a": (4,), "B": (4, 4), "b": (4,), "C": (4, 4), "c": (4,)}
    initialisers = [numpy_helper.from_array(rng.normal(size=s).astype("f4"), n) for n, s in arrays.items()]
    nodes = [
        helper.make_node("Gemm", ["x", "A", "a"], ["h"], transB=0),
        helper.make_node("Gemm", ["h", "B", "b"], ["k"], transB=1),
        helper.make_node("MatMul", ["k", "C"], ["m"]),
        helper.make_node("Add", ["m", "c"], ["y"]),
    ]
    given, made = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, 4]) for n in "xy")
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", [given], [made], initialisers)), tmp_path / "p.onnx")
    x = rng.normal(size=(2, 4)).astype("f4")
    (y,) = ReferenceEvaluator(str(tmp_path / "p.onnx")).run(None, {"x": x})
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    load_weights(model, tmp_path / "p.onnx", verify=(x, y), tolerance=1e-5)


def test_keras_and_flax_share_names_but_not_the_layout_of_transposed_convolutions(tmp_path: Path) -> None:
    """Names alone leave it open, and both fit where channels are equal: a word is asked for, and they differ."""
    file = save_npz(tmp_path, up__kernel=np.random.default_rng(0).normal(size=(3, 3, 2, 2)), up__bias=np.zeros(2))
    model = nn.Sequential(nn.ConvTranspose2d(2, 2, 3))
    refused(model, file, "Write layout='keras' or layout='flax'")
    load_weights(model, file, layout="keras")
    keras = model[0].weight.detach().clone()
    load_weights(model, file, layout="flax")
    torch.testing.assert_close(model[0].weight.detach(), keras.transpose(0, 1).flip(2, 3))


def test_numbers_in_names_are_sorted_by_size(tmp_path: Path) -> None:
    """dense_10 comes after dense_2, although it does not in the alphabet."""
    kernels = {f"dense_{n}__kernel": np.full((2, 2), n) for n in (1, 10, 2)}
    model = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(3)))
    load_weights(model, save_npz(tmp_path, **kernels), layout="keras")
    assert [int(layer.weight[0, 0]) for layer in model] == [1, 2, 10]


def test_names_in_no_order_are_asked_for(tmp_path: Path) -> None:
    """Two kernels of one shape under names that tell no order, and that the model does not have: nothing is guessed."""
    file = save_npz(tmp_path, left__kernel=np.ones((2, 2)), right__kernel=np.zeros((2, 2)))
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    refused(model, file, re.escape("Name their partners with names={...}"))
    load_weights(model, file, names={"0": "right", "1": "left"})
    assert model[0].weight.sum() == 0


def test_equal_shapes_in_another_order_are_in_doubt() -> None:
    """The file's order is known and not the model's: layers of one shape may be swapped, which is said."""

    class Swapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.LayerNorm(8), nn.LayerNorm(8), nn.Linear(8, 16)
            self.d, self.e = nn.Linear(16, 8), nn.Linear(8, 3)
            self.f, self.g = nn.Embedding(11, 8), nn.MultiheadAttention(8, 2)

    refused(Swapped(), GOLDEN / "keras_net_transformer.keras", "'norm1' and 'norm2' have the same shapes. Name them")


def test_the_exporter_that_does_not_fold_needs_no_word() -> None:
    """A graph with its batch norms loads into the net with them, by the kinds of its nodes."""
    plan = load_weights(ONNX["net_cnn_whole"].build(), GOLDEN / "onnx_net_cnn_whole.onnx")
    assert {step.names[0] for step in plan.steps} >= {"1.running_var", "4.running_var"}


def test_a_net_with_channels_first_is_in_doubt(tmp_path: Path) -> None:
    """Keras with channels first flattens as torch does: said, because rows would be reordered for nothing."""
    with zipfile.ZipFile(GOLDEN / "keras_conv2d.keras") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members["config.json"] = members["config.json"].replace(b"channels_last", b"channels_first")
    with zipfile.ZipFile(tmp_path / "first.keras", "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    refused(KERAS["conv2d"].build(), tmp_path / "first.keras", "the file's net has channels first")


@pytest.mark.parametrize("name", ["keras_attention.keras", "keras_attention.h5", "flax_attention.msgpack"])
def test_attention_into_four_linear_layers_is_in_doubt_until_proven(name: str) -> None:
    """A model with layers of its own for query, key, value and output: heads and order are settled by a proof."""

    class Attention(nn.Module):
        def __init__(self, heads: int) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
            self.heads = heads

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = (part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
            return self.o(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    file, (x, y) = GOLDEN / name, proof(name.split(".")[0], channels=False)
    (holder,) = {layer.name for layer in load_weights(nn.MultiheadAttention(8, 2), file, apply=False).foreign.layers}
    said = {"q": "query", "k": "key", "v": "value", "o": "output"}
    words = {ours: f"{holder}/{theirs}".strip("/") for ours, theirs in said.items()}
    refused(Attention(2), file, "attention has 2 heads, which an nn.Linear does not tell", names=words)
    refused(Attention(4), file, "outputs differ", names=words, verify=(x, y))
    refused(Attention(2), file, "outputs differ", names={**words, "q": words["k"], "k": words["q"]}, verify=(x, y))
    load_weights(Attention(2), file, names=words, verify=(x, y), tolerance=1e-5)
