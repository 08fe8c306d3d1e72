"""What a load does beside converting: all or nothing, parts, names, ties, dtypes, proof, the plan that can be read."""

from __future__ import annotations

import json
import sys
import tomllib
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import unvanish
from tests.test_weights_golden import GOLDEN, case_of, inputs_of
from tests.weights_nets import KERAS, cnn, in_this_process, onnx_cnn  # noqa: F401 - a fixture
from unvanish import OptionError, WeightsError, load_weights
from unvanish.reuse.weights import operations as ops
from unvanish.untouched import untouched

pytestmark = pytest.mark.usefixtures("in_this_process")
CNN = GOLDEN / "keras_net_cnn.keras"


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.BatchNorm1d(3), nn.Linear(3, 2))


def saved(model: nn.Module, file: Path, prefix: str = "") -> Path:
    """Save a state dict as `.pt` or `.safetensors`."""
    state = {prefix + name: tensor.clone() for name, tensor in model.state_dict().items()}
    if file.suffix == ".safetensors":
        save_file(state, file)
    else:
        torch.save(state, file)
    return file


def assert_equal(one: nn.Module, other: nn.Module) -> None:
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "model.", "module._orig_mod.", "net.encoder."])
def test_names_behind_any_prefix(ending: str, prefix: str, tmp_path: Path) -> None:
    """What DDP, torch.compile and holders of a model put before all names is taken off."""
    source, model = net(), net()
    load_weights(model, saved(source, tmp_path / f"w.{ending}", prefix))
    assert_equal(model, source)


def test_a_wrapped_or_held_model_takes_plain_names(tmp_path: Path) -> None:
    """The prefix may stand in the model instead: a wrapper's is known, a holder's is said."""
    source = net()
    file = saved(source, tmp_path / "w.pt")
    wrapped = nn.DataParallel(net())
    load_weights(wrapped, file)
    assert_equal(wrapped.module, source)
    held = nn.ModuleDict({"model": net()})
    load_weights(held, file, names={"model": ""})
    assert_equal(held["model"], source)


def test_a_wrong_name_that_fits_nothing_is_an_error(tmp_path: Path) -> None:
    """Loading nothing is never a success."""
    file = saved(nn.ModuleDict({"a": nn.Linear(2, 2)}), tmp_path / "w.pt")
    model = nn.ModuleDict({"b": nn.Linear(2, 2)})
    with pytest.raises(WeightsError, match="not one tensor matches"):
        load_weights(model, file)
    with pytest.raises(WeightsError, match="not one tensor matches"):
        load_weights(model, file, keep=["b"])
    load_weights(model, file, names={"b": "a"})


def test_a_size_mismatch_changes_nothing(tmp_path: Path) -> None:
    """The loader of torch overwrites the layers in front of the one that does not fit; here none is."""
    file = saved(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 5)), tmp_path / "w.pt")
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(WeightsError, match=r"'1' from '1': found \(5, 3\) for weight .*keep=\['1'\]"):
        load_weights(model, file)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_a_new_head_of_another_size() -> None:
    """Layers that are kept stay bit for bit, all others are those of the file."""
    model = cnn()
    model[10] = nn.Linear(6, 3)
    head = model[10].weight.detach().clone()
    with pytest.raises(WeightsError, match=r"keep=\['10'\]"):
        load_weights(model, CNN)
    plan = load_weights(model, CNN, keep=["10"])
    whole = cnn()
    load_weights(whole, CNN)
    assert torch.equal(model[10].weight, head)
    assert torch.equal(model[8].weight, whole[8].weight)
    assert plan.kept == ("10.weight", "10.bias")
    assert plan.unused == ("fc2/kernel", "fc2/bias")


def test_the_lowest_layers_alone() -> None:
    """The first k layers of the model are loaded, also into a model that ends there; the rest stays as it is."""
    whole, part = cnn(), cnn()
    load_weights(whole, CNN)
    before = part[6].running_var.clone(), part[8].weight.detach().clone()
    plan = load_weights(part, CNN, lowest=3)
    assert [name for step in plan.steps for name in step.names if name.endswith("weight")] == [
        "0.weight",
        "2.weight",
        "4.weight",
    ]
    assert torch.equal(part[4].weight, whole[4].weight)
    assert torch.equal(part[6].running_var, before[0])
    assert torch.equal(part[8].weight, before[1])
    trunk = cnn()[:5]
    load_weights(trunk, CNN, lowest=3)
    assert torch.equal(trunk[4].weight, whole[4].weight)


def test_layers_of_the_file_that_are_not_wanted() -> None:
    """A trunk takes what it has; the rest of the file is an error until it is left by name."""
    trunk = cnn()[:7]
    with pytest.raises(WeightsError, match="nothing in the model takes 'fc1/kernel'"):
        load_weights(trunk, CNN)
    plan = load_weights(trunk, CNN, leave=["fc*"])
    assert len(plan.unused) == 4


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    """One tensor under two names: filled once where the file has it once, and equal twice where it has it twice."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Embedding(5, 3)
            self.head = nn.Linear(3, 5, bias=False)
            self.head.weight = self.tokens.weight

    table = np.random.default_rng(0).normal(size=(5, 3)).astype("f4")
    model = Tied()
    np.savez(tmp_path / "once.npz", **{"tokens/embeddings": table})
    load_weights(model, tmp_path / "once.npz")
    assert model.head.weight is model.tokens.weight
    assert torch.equal(model.tokens.weight, torch.from_numpy(table))
    np.savez(tmp_path / "twice.npz", **{"tokens/embeddings": table + 1, "head/kernel": (table + 1).T})
    load_weights(model, tmp_path / "twice.npz")
    assert torch.equal(model.head.weight, torch.from_numpy(table + 1))
    np.savez(tmp_path / "other.npz", **{"tokens/embeddings": table, "head/kernel": table.T + 1})
    with pytest.raises(WeightsError, match="the model ties the two"):
        load_weights(model, tmp_path / "other.npz")


def test_a_number_beyond_the_dtype_is_refused(tmp_path: Path) -> None:
    """A million is infinite in half precision: refused; what fits is rounded, and the plan says so."""
    np.savez(tmp_path / "w.npz", **{"fc/kernel": np.full((2, 2), 1e6, "f4")})
    model = nn.ModuleDict({"fc": nn.Linear(2, 2, bias=False).half()})
    with pytest.raises(WeightsError, match=r"found 1e\+06, expected at most 65504"):
        load_weights(model, tmp_path / "w.npz")
    np.savez(tmp_path / "w.npz", **{"fc/kernel": np.full((2, 2), 1 / 3, "f8")})
    plan = load_weights(model, tmp_path / "w.npz")
    assert plan.steps[0].operations == ("transpose", "float64 → float16")
    assert model["fc"].weight[0, 0] == torch.tensor(1 / 3).half()
    np.savez(tmp_path / "w.npz", **{"fc/kernel": np.ones((2, 2), "i4")})
    with pytest.raises(WeightsError, match=r"found int32, expected float16. Quantised"):
        load_weights(model, tmp_path / "w.npz")


def test_numbers_that_are_not_finite_are_in_doubt(tmp_path: Path) -> None:
    """A nan in a file is said before it is loaded."""
    np.savez(tmp_path / "w.npz", **{"fc/kernel": np.full((2, 2), np.nan, "f4")})
    with pytest.raises(WeightsError, match="gets values that are not finite"):
        load_weights(nn.ModuleDict({"fc": nn.Linear(2, 2, bias=False)}), tmp_path / "w.npz")


def test_bfloat16_of_keras_comes_bit_for_bit(tmp_path: Path) -> None:
    """Keras marks it by an attribute; the bits are those of the file."""
    bits = np.arange(16256, 16272, dtype=np.uint16).reshape(4, 4)  # from 1 on
    with h5py.File(tmp_path / "x.weights.h5", "w") as file:
        entry = file.create_dataset("layers/dense/vars/0", data=bits.view("V2"))
        entry.attrs["dtype"] = "bfloat16"
    model = nn.Sequential(nn.Linear(4, 4, bias=False).bfloat16())
    plan = load_weights(model, tmp_path / "x.weights.h5")
    assert model[0].weight.T.contiguous().view(torch.int16).tolist() == bits.tolist()
    assert plan.steps[0].dtype == "bfloat16"


def test_a_plan_is_read_before_it_runs() -> None:
    """Without `apply` nothing changes; text and document name each tensor, its source, operations and reason."""
    model = cnn()
    with untouched(model):
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        plan = load_weights(model, CNN, apply=False, keep=["10"])
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name])
    text = str(plan)
    assert "a plan; nothing is changed yet" in text
    for words in ("8.weight", "fc1/kernel [24, 6]", "reshape(6, 4, 6)", "same order: layer 5 of both", "unverified"):
        assert words in text
    document = json.loads(json.dumps(plan.to_dict()))
    assert [row["tensor"] for row in document["tensors"]][:2] == ["0.weight", "0.bias"]
    first = document["tensors"][0]
    assert (first["sources"], first["operations"]) == (["conv1/kernel"], ["permute(3, 2, 0, 1)"])
    assert document["kept"] == ["10.weight", "10.bias"]
    assert document["verified"] is None
    assert not document["is_loaded"]


def test_a_proof_that_fails_names_the_first_layer_and_changes_nothing() -> None:
    """With outputs of layers a wrong one is found where it is: here the second batch norm has another epsilon."""
    case, numbers = case_of(CNN)
    arrays = np.load(numbers)
    outputs = {name.removeprefix("at_"): arrays[name] for name in arrays if name.startswith("at_")}
    x = inputs_of(case, arrays["x"])
    model = cnn()
    model[6].eps = 1e-3  # it was trained with 0.01, which weights alone do not tell
    model[2].eps = 1e-3
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(WeightsError, match="the first layer that differs: 'bn2'"):
        load_weights(model, GOLDEN / "keras_net_cnn.weights.h5", names=_layer_names(), verify=(x, outputs))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    model[6].eps = 0.01
    plan = load_weights(model, GOLDEN / "keras_net_cnn.weights.h5", names=_layer_names(), verify=(x, outputs))
    assert plan.verification.first == ""


def _layer_names() -> dict[str, str]:
    return dict(zip(("0", "2", "4", "6", "8", "10"), ("conv1", "bn1", "conv2", "bn2", "fc1", "fc2"), strict=True))


def test_a_proof_leaves_no_trace() -> None:
    """Modes, gradients, hooks and random state are as before; batch norms keep the statistics of the file."""
    case, numbers = case_of(CNN)
    arrays = np.load(numbers)
    model = cnn().train()
    model[2].eval()
    modes = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    load_weights(model, CNN, verify=(inputs_of(case, arrays["x"]), arrays["y"]))
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert int(model[2].num_batches_tracked) == 0


def test_an_error_while_the_proof_runs_restores_the_model() -> None:
    """Also what the model itself raises leaves it bit for bit as it was, settings included."""
    model = cnn()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"size|shape|input"):
        load_weights(model, CNN, verify=(torch.zeros(2, 7, 3, 3), torch.zeros(1)))
    assert model[6].eps == 1e-5
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_settings_that_were_taken_over_are_given_back_when_the_proof_fails() -> None:
    """Epsilon is written with the weights, and undone with them."""
    case, numbers = case_of(CNN)
    arrays = np.load(numbers)
    model = cnn()
    with pytest.raises(WeightsError, match="outputs differ"):
        load_weights(model, CNN, verify=(inputs_of(case, arrays["x"]), arrays["y"] + 1))
    assert (model[2].eps, model[2].momentum) == (1e-5, 0.1)


def test_a_checkpoint_with_several_parts_asks_which(tmp_path: Path) -> None:
    """Weights beside the state of an optimiser are found; two sets of weights need a word."""
    source, model = net(), net()
    state = OrderedDict(source.state_dict())
    optimizer = torch.optim.Adam(source.parameters()).state_dict()
    torch.save({"model_state_dict": state, "optimizer": optimizer, "epoch": 3}, tmp_path / "w.pt")
    load_weights(model, tmp_path / "w.pt")
    assert_equal(model, source)
    torch.save({"online": state, "ema": net().state_dict()}, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match=r"found the parts \['online', 'ema'\]"):
        load_weights(model, tmp_path / "w.pt")
    load_weights(model, tmp_path / "w.pt", part="online")


def test_recurrent_layers_and_attention_of_torch_come_by_name(tmp_path: Path) -> None:
    """Stacked levels and the inner projection of attention belong to one layer each."""

    def build() -> nn.Module:
        return nn.ModuleDict({"a": nn.LSTM(3, 4, 2, bidirectional=True), "b": nn.TransformerEncoderLayer(4, 2, 8)})

    source, model = build(), build()
    load_weights(model, saved(source, tmp_path / "w.safetensors"))
    assert_equal(model, source)


def test_flax_written_as_safetensors_loads(tmp_path: Path) -> None:
    """The advice for users of jax: names joined by points, kernels as Flax has them."""
    rng = np.random.default_rng(0)
    kernel = torch.from_numpy(rng.normal(size=(3, 3, 2, 4)).astype("f4"))
    save_file({"params.Conv_0.kernel": kernel, "params.Conv_0.bias": torch.zeros(4)}, tmp_path / "w.safetensors")
    model = nn.Sequential(nn.Conv2d(2, 4, 3))
    load_weights(model, tmp_path / "w.safetensors")
    assert torch.equal(model[0].weight, kernel.permute(3, 2, 0, 1))


def test_a_file_of_before_keras_3_6_is_paired_by_class_and_order(tmp_path: Path) -> None:
    """Without the names in its groups a `.keras` file is paired with its configuration by classes in their order."""
    import io

    with zipfile.ZipFile(CNN) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    stream = io.BytesIO(members["model.weights.h5"])
    with h5py.File(stream, "r+") as file:
        file.visititems(lambda _, entry: entry.attrs.clear() if isinstance(entry, h5py.Group) else None)
    members["model.weights.h5"] = stream.getvalue()
    with zipfile.ZipFile(tmp_path / "old.keras", "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    old, new = cnn(), cnn()
    load_weights(old, tmp_path / "old.keras")
    load_weights(new, CNN)
    assert_equal(old, new)


def test_external_data_of_onnx_is_read_beside_it(tmp_path: Path) -> None:
    """Large graphs keep their arrays in a second file of the same folder."""
    import onnx

    graph = onnx.load(GOLDEN / "onnx_net_cnn_whole.onnx")
    onnx.save(graph, tmp_path / "w.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    one, other = onnx_cnn(), onnx_cnn()
    load_weights(one, tmp_path / "w.onnx")
    load_weights(other, GOLDEN / "onnx_net_cnn_whole.onnx")
    assert_equal(one, other)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lowest": 0}, "lowest: found 0"),
        ({"flatten": "rows"}, "flatten: found 'rows'"),
        ({"tolerance": -1.0}, "tolerance: found -1"),
        ({"verify": 3}, "verify: found no pair"),
    ],
)
def test_an_option_that_cannot_be_used(options: dict[str, Any], words: str) -> None:
    """The call is wrong: said before anything is read."""
    with pytest.raises(OptionError, match=words):
        load_weights(cnn(), "nowhere.keras", **options)
    with pytest.raises(OptionError, match="model: found str"):
        load_weights("model", "nowhere.keras")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"keep": ["11"]}, "keep: found '11', expected a layer of the model. It has '0', '2'"),
        ({"leave": ["fc3"]}, "leave: found 'fc3', expected a layer of the file. Did you mean 'fc"),
        ({"names": {"0": "conv3"}}, r"names\['0'\]: found 'conv3', expected a layer of the file. Did you mean 'conv"),
        ({"names": {"zero": "conv1"}}, "names: found 'zero', expected a layer of the model"),
    ],
)
def test_a_name_that_is_not_there(options: dict[str, Any], words: str) -> None:
    """A misspelt layer is an error with a suggestion, not a silent no."""
    with pytest.raises(WeightsError, match=words):
        load_weights(cnn(), CNN, **options)


def test_the_way_back_carries_what_training_changed(tmp_path: Path) -> None:
    """Weights changed in torch are given in the layout of the file: loading those gives the changed model."""
    model = KERAS["dense"].build()
    plan = load_weights(model, GOLDEN / "keras_dense.keras")
    with torch.no_grad():
        model.weight.add_(1)
    arrays = {name: array.numpy() for name, array in plan.reverse().items()}
    np.savez(tmp_path / "w.npz", **arrays)
    again = KERAS["dense"].build()
    load_weights(again, tmp_path / "w.npz")
    assert_equal(again, model)


@given(st.data())
def test_every_operation_is_undone(data: st.DataObject) -> None:
    """Back after forward gives the same bytes, for tensors of any shape that the operation takes."""
    blocks = data.draw(st.integers(1, 4))
    shape = (blocks * data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3)))
    axes = tuple(data.draw(st.permutations(range(3))))
    tensors = [
        torch.randn(shape, generator=torch.Generator().manual_seed(n)) for n in range(data.draw(st.integers(1, 3)))
    ]
    many: tuple[ops.Operation, ...] = (
        ops.Permute(axes),
        ops.Reshape(shape, (shape[0] * shape[1], shape[2])),
        ops.Flip((0, 2)),
        ops.Gates(tuple(data.draw(st.permutations(range(blocks))))),
        ops.Join((shape[0],) * len(tensors)),
        ops.Fill(0.5, (2,), is_first=data.draw(st.booleans())),
    )
    for operation in many:
        there = operation.forward(list(tensors))
        for one, other in zip(operation.back(there), tensors, strict=True):
            assert one.shape == other.shape
            assert torch.equal(one, other), operation
    for operation in (ops.Unstack(), ops.Split((1, shape[0] - 1))):
        (back,) = operation.back(operation.forward(tensors[:1]))
        assert torch.equal(back, tensors[0])


def test_the_way_back_refuses_what_has_no_place() -> None:
    """A constant that training changed has no place in the file: said, not dropped."""
    model = nn.BatchNorm1d(4)
    plan = load_weights(model, GOLDEN / "keras_batch_norm_bare.keras")
    assert set(plan.reverse()) == {"batch_normalization/mean", "batch_normalization/variance"}
    with torch.no_grad():
        model.weight.add_(1)
    with pytest.raises(WeightsError, match="found values other than 1"):
        plan.reverse()


def test_the_face_is_this_function() -> None:
    """`unvanish.load_weights` is the function of the documents."""
    assert unvanish.load_weights is load_weights


def test_weights_alone_are_paired_by_the_order_of_their_class(tmp_path: Path) -> None:
    """Keras numbers the layers of a class in their order; the names that the user gave them tell none."""
    with h5py.File(tmp_path / "x.weights.h5", "w") as file:
        for number, (key, label) in enumerate((("dense", "z"), ("dense_1", "a"), ("dense_10", "c"), ("dense_2", "b"))):
            held = file.create_group(f"layers/{key}/vars")
            held.attrs["name"] = label
            held["0"] = np.full((2, 2), number, "f4")
    model = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(4)))
    load_weights(model, tmp_path / "x.weights.h5")
    assert [int(layer.weight[0, 0]) for layer in model] == [0, 1, 3, 2]


def test_activations_that_a_framework_holds_in_its_layer_are_allowed_for(tmp_path: Path) -> None:
    """Outputs of a layer may be those behind its activation, also where no other layer follows."""
    rng = np.random.default_rng(0)
    kernel, x = rng.normal(size=(4, 3)).astype("f4"), rng.normal(size=(5, 4)).astype("f4")
    np.savez(tmp_path / "w.npz", **{"dense/kernel": kernel})
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.ReLU())
    y = np.maximum(x @ kernel, 0)
    plan = load_weights(model, tmp_path / "w.npz", verify=(x, {"dense": y, "output": y}))
    assert plan.verification.first == ""
    with pytest.raises(WeightsError, match="the first layer that differs: 'dense'"):
        load_weights(model, tmp_path / "w.npz", verify=(x, {"dense": y + 1, "output": y + 1}))


@pytest.mark.parametrize(
    ("name", "module", "extra"),
    [
        ("keras_dense.keras", "h5py", "keras"),
        ("keras_dense.weights.h5", "h5py", "keras"),
        ("flax_dense.msgpack", "msgpack", "flax"),
        ("flax_net_cnn.orbax", "tensorstore", "orbax"),
        ("onnx_linear.onnx", "onnx", "onnx"),
    ],
)
def test_what_a_format_needs_is_named(name: str, module: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the package that reads a format is not installed, the error says which extra brings it."""
    declared = tomllib.loads((GOLDEN.parents[2] / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert any(line.startswith(module) for line in declared[extra])
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(WeightsError, match=rf"found no '{module}' to read it with.*pip install 'unvanish\[{extra}\]'"):
        load_weights(nn.Linear(4, 4), GOLDEN / name)
