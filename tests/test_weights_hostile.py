"""Files made to harm: refused within seconds and little memory, nothing run, nothing followed, the model untouched."""

from __future__ import annotations

import functools
import io
import pickle
import resource
import shutil
import struct
import time
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import h5py
import msgpack
import numpy as np
import onnx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from torch import nn

from tests.test_weights_golden import GOLDEN, build, case_of
from unvanish import WeightsError, load_weights
from unvanish.reuse.weights.readers import apart
from unvanish.reuse.weights.readers.guard import MOST_ENTRIES

MANY = 300_000
SECRET = b"not for others!!" * 8
EVIL: dict[str, tuple[str, Callable[[Path], None]]] = {}
WORDS: dict[str, str] = {}


def evil(name: str, words: str) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    """Add a file to the table: what makes it, and what its refusal says."""

    def add(make: Callable[[Path], None]) -> Callable[[Path], None]:
        EVIL[f"{make.__name__}-{name}"] = (name, make)
        WORDS[f"{make.__name__}-{name}"] = words
        return make

    return add


class Bomb:
    """Leaves a mark when it is unpickled."""

    mark = ""

    def __reduce__(self) -> Any:
        return (open, (self.mark, "w"))


def dense_h5(path: Path) -> tuple[h5py.File, h5py.Group]:
    file = h5py.File(path, "w")
    return file, file.create_group("layers/dense/vars")


@evil("x.weights.h5", "entry '0' that links elsewhere .ExternalLink")
def external_link(path: Path) -> None:
    with h5py.File(path.parent / "other.h5", "w") as other:
        other["secret"] = np.ones((4, 4), "f4")
    file, held = dense_h5(path)
    held["0"] = h5py.ExternalLink("other.h5", "/secret")
    file.close()


@evil("x.weights.h5", "entry '0' that links elsewhere .SoftLink")
def soft_link(path: Path) -> None:
    file, held = dense_h5(path)
    held["0"] = h5py.SoftLink("/elsewhere")
    file.close()


@evil("x.weights.h5", "with its data in another file")
def external_storage(path: Path) -> None:
    (path.parent / "secret.txt").write_bytes(SECRET)
    file, held = dense_h5(path)
    held.create_dataset("0", (4, 4), "f4", external=[("secret.txt", 0, 64)])
    file.close()


@evil("x.weights.h5", "view of other files")
def virtual_dataset(path: Path) -> None:
    with h5py.File(path.parent / "other.h5", "w") as other:
        other["secret"] = np.ones((4, 4), "f4")
    layout = h5py.VirtualLayout((4, 4), "f4")
    layout[:] = h5py.VirtualSource("other.h5", "secret", (4, 4))
    file, held = dense_h5(path)
    held.create_virtual_dataset("0", layout)
    file.close()


@evil("x.weights.h5", "declares 68,719,476,736 bytes and stores none")
def unstored_h5(path: Path) -> None:
    file, held = dense_h5(path)
    held.create_dataset("0", (1 << 17, 1 << 17), "f4", chunks=(64, 64))
    file.close()


@evil("x.weights.h5", "declare far more than the file stores")
def partly_stored_h5(path: Path) -> None:
    file, held = dense_h5(path)
    held.create_dataset("0", (1 << 17, 1 << 17), "f4", chunks=(64, 64))[:64, :64] = 1
    file.close()


@evil("x.weights.h5", "declare far more than the file stores")
def zeros_h5(path: Path) -> None:
    file, held = dense_h5(path)
    held.create_dataset("0", data=np.zeros((4096, 4096), "f4"), compression="gzip", chunks=(512, 512))
    file.close()


@evil("x.weights.h5", "damaged content .*[Rr]ead")
def wrong_sum_h5(path: Path) -> None:
    """The array fails its checksum when it is read, after all has been said of it."""
    file, held = dense_h5(path)
    numbers = np.arange(16, dtype="f4").reshape(4, 4)
    held.create_dataset("0", data=numbers, fletcher32=True, chunks=(4, 4))
    file.close()
    path.write_bytes(path.read_bytes().replace(numbers.tobytes(), numbers[::-1].tobytes()[:-1] + b"x"))


@evil("x.weights.h5", "nested too deeply|met twice")
def circle_h5(path: Path) -> None:
    file, held = dense_h5(path)
    held.parent["vars_again"] = held.parent
    file["layers/loop"] = file["layers"]
    file.close()


@evil("x.weights.h5", "nested too deeply")
def deep_h5(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file.create_group("/".join(["a"] * 900) + "/vars")["0"] = np.ones(3)


@evil("x.weights.h5", "of type object")
def texts_h5(path: Path) -> None:
    file, held = dense_h5(path)
    held.create_dataset("0", data=["a", "b"], dtype=h5py.string_dtype())
    file.close()


@evil("x.weights.h5", "too many entries")
def many_h5(path: Path) -> None:
    with h5py.File(path, "w", libver="latest") as file:
        held = file.create_group("layers/dense/vars")
        held["0"] = np.ones(1)
        for number in range(1, MOST_ENTRIES + 2):
            held.id.links.create_hard(str(number).encode(), held.id, b"0")


@evil("x.h5", "no entry 'gone'")
def names_nothing_h5(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = ["gone"]


@evil("x.h5", "no entry|links elsewhere|declare")
def path_h5(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file.create_group("dense").attrs["weight_names"] = ["../../../../etc/passwd"]
        file.attrs["layer_names"] = ["dense"]


def zipped(path: Path, **members: bytes) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name.replace("__", "."), content)


@evil("x.keras", "declare far more than the file stores")
def bomb_keras(path: Path) -> None:
    zipped(path, config__json=b" " * (1 << 26), model_weights_h5=b"")


@evil("x.keras", "nested too deeply|no member|damaged")
def deep_json_keras(path: Path) -> None:
    zipped(path, config__json=b"[" * 200_000, model__weights__h5=b"")


@evil("x.keras", "damaged content|no member 'config.json'")
def no_config_keras(path: Path) -> None:
    zipped(path, model__weights__h5=b"")


@evil("x.npz", "too many entries")
def many_npz(path: Path) -> None:
    header = b"PK\x03\x04" + bytes(26)
    row = struct.pack("<4s6H3L5H2L", b"PK\x01\x02", 20, 20, *([0] * 7), 6, *([0] * 6))
    rows = b"".join(row + b"%06x" % number for number in range(MANY))
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, MANY & 0xFFFF, MANY & 0xFFFF, len(rows), len(header), 0)
    path.write_bytes(header + rows + end)


@evil("x.npz", "of type object")
def pickle_npz(path: Path) -> None:
    Bomb.mark = str(path.parent / "ran")
    np.savez(path, kernel=np.array([Bomb()], dtype=object))


@evil("x.npz", "whose size is not the declared one")
def unstored_npz(path: Path) -> None:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "<f4", "fortran_order": False, "shape": (1 << 40,)})
    zipped(path, kernel__npy=stream.getvalue())


@evil("x.npz", "declare far more than the file stores")
def bomb_npz(path: Path) -> None:
    zipped(path, kernel__npy=bytes(1 << 26))


@evil("x.pt", "only running its code could read")
def pickle_pt(path: Path) -> None:
    Bomb.mark = str(path.parent / "ran")
    path.write_bytes(pickle.dumps(Bomb()))


@evil("x.pt", "only running its code could read")
def zipped_pickle_pt(path: Path) -> None:
    Bomb.mark = str(path.parent / "ran")
    torch.save({"weight": torch.ones(4, 4), "more": Bomb()}, path)


@evil("x.pt", "that shows more numbers than are stored")
def expanded_pt(path: Path) -> None:
    torch.save({"weight": torch.ones(1).expand(1 << 17, 1 << 17)}, path)


@evil("x.pt", "expected a plain tensor")
def sparse_pt(path: Path) -> None:
    torch.save({"weight": torch.eye(4).to_sparse()}, path)


@evil("x.pt", "found a list, expected a state dict")
def list_pt(path: Path) -> None:
    torch.save([torch.ones(4, 4)], path)


@evil("x.safetensors", "too many entries")
def many_safetensors(path: Path) -> None:
    safetensors_with(path, (f"a{number}" for number in range(MANY)))


def safetensors_with(path: Path, names: Iterable[str]) -> None:
    entry = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    header = ("{" + ",".join(f'"{name}":{entry}' for name in names) + "}").encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)


@evil("x.safetensors", "not one tensor matches")
def prefixes_safetensors(path: Path) -> None:
    safetensors_with(path, (f"a{number}.b.weight" for number in range(20_000)))  # pairs of them are too many


@evil("x.safetensors", "not one tensor matches")
def attentions_safetensors(path: Path) -> None:
    safetensors_with(path, (f"a{number}/query/kernel" for number in range(20_000)))  # pairs of them are too many


@evil("x.safetensors", "damaged content")
def outside_safetensors(path: Path) -> None:
    header = b'{"weight":{"dtype":"F32","shape":[4,4],"data_offsets":[0,6400]}}'
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))


@evil("x.safetensors", "damaged content|no format known")
def long_header_safetensors(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 1 << 60) + b"{" + bytes(64))


@evil("x.msgpack", "too many entries|exceeds max_map_len")
def many_msgpack(path: Path) -> None:
    path.write_bytes(msgpack.packb({str(number): 0 for number in range(MANY)}))


@evil("x.msgpack", "too many entries")
def many_lists_msgpack(path: Path) -> None:
    path.write_bytes(msgpack.packb({str(number): [0] * 1000 for number in range(300)}))


@evil("x.msgpack", "damaged content|nested too deeply")
def deep_msgpack(path: Path) -> None:
    path.write_bytes(b"\x81\xa1a" * 100_000 + b"\xc0")


@evil("x.msgpack", "whose size is not the declared one")
def unstored_msgpack(path: Path) -> None:
    array = msgpack.packb(((1 << 20, 1 << 20), "float32", b"1234"))
    path.write_bytes(msgpack.packb({"Dense_0": {"kernel": msgpack.ExtType(1, array)}}))


@evil("x.msgpack", "an array of type 'O'")
def objects_msgpack(path: Path) -> None:
    array = msgpack.packb(((1,), "O", b"12345678"))
    path.write_bytes(msgpack.packb({"Dense_0": {"kernel": msgpack.ExtType(1, array)}}))


@evil("x.msgpack", "extension of code 9")
def code_msgpack(path: Path) -> None:
    path.write_bytes(msgpack.packb({"Dense_0": {"kernel": msgpack.ExtType(9, b"")}}))


@evil("x.msgpack", "damaged content")
def long_msgpack(path: Path) -> None:
    path.write_bytes(b"\x81\xa1a\xc9\xff\xff\xff\xff\x01" + bytes(64))


def onnx_with(path: Path, tensor: Any, count: int = 1) -> None:
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 4])
    made = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 4])
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])] * count
    path.write_bytes(helper.make_model(helper.make_graph(nodes, "g", [given], [made], [tensor])).SerializeToString())


def outer_tensor(location: str, **told: str) -> Any:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4, 4], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, **told}.items():
        tensor.external_data.append(onnx.StringStringEntryProto(key=key, value=value))
    return tensor


@evil("x.onnx", "declare far more than the file stores")
def unstored_onnx(path: Path) -> None:
    onnx_with(path, TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1 << 36], raw_data=b"1234"))


@evil("x.onnx", "that declares 1,024 numbers and stores fewer")
def short_onnx(path: Path) -> None:
    onnx_with(path, TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1 << 10], raw_data=b"1234"))


@evil("x.onnx", "expected sizes from 0 on")
def negative_onnx(path: Path) -> None:
    onnx_with(path, TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[-4, -4], raw_data=bytes(64)))


@evil("x.onnx", "expected a plain file in the same folder")
def parent_onnx(path: Path) -> None:
    (path.parent.parent / "secret.txt").write_bytes(SECRET)
    onnx_with(path, outer_tensor("../secret.txt"))


@evil("x.onnx", "expected a plain file in the same folder")
def absolute_onnx(path: Path) -> None:
    onnx_with(path, outer_tensor("/etc/passwd"))


@evil("x.onnx", "expected a plain file in the same folder")
def linked_onnx(path: Path) -> None:
    (path.parent.parent / "secret.txt").write_bytes(SECRET)
    (path.parent / "link").symlink_to("../secret.txt")
    onnx_with(path, outer_tensor("link"))


@evil("x.onnx", "data outside of 'd.bin'")
def outside_onnx(path: Path) -> None:
    (path.parent / "d.bin").write_bytes(bytes(64))
    onnx_with(path, outer_tensor("d.bin", offset="4"))


@evil("x.onnx", "too many entries")
def many_onnx(path: Path) -> None:
    onnx_with(path, TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1], raw_data=bytes(4)), MANY)


@evil("x.onnx", "damaged content")
def noise_onnx(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 8)


@evil("x.bin", "no format known here")
def unknown_bin(path: Path) -> None:
    path.write_bytes(b"what is this" * 10)


@evil("x.h5", "no format known here")
def empty_h5(path: Path) -> None:
    path.write_bytes(b"")


@evil("gone.keras", "no such file")
def gone_keras(path: Path) -> None:
    """Make nothing."""


LONG = ("many_h5-x.weights.h5", "prefixes_safetensors-x.safetensors", "attentions_safetensors-x.safetensors")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in LONG else n for n in EVIL])
def test_a_hostile_file_is_refused(name: str, tmp_path: Path) -> None:
    """Refused by name within 20 s of computing and 300 MB; the model, the folder and other files stay as they are."""
    file, make = EVIL[name]
    refuse(file, make, WORDS[name], tmp_path)


def refuse(file: str, make: Callable[[Path], None], words: str, outer: Path) -> None:
    """Make a file, and see it refused."""
    folder = outer / "inner"
    folder.mkdir()
    make(folder / file)
    before = sorted(path for path in outer.rglob("*"))
    model = nn.Sequential(nn.Linear(4, 4))
    kept = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    memory, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(WeightsError, match=words) as raised:
        load_weights(model, folder / file, trust=True)
    assert time.process_time() - start < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 300_000  # kilobytes
    assert "not for others" not in str(raised.value)
    assert sorted(path for path in outer.rglob("*")) == before
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, kept[key])


def test_a_byte_that_makes_the_library_loop_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One byte of this file is enough; the process that parses it is ended, and the file refused."""
    monkeypatch.setattr(apart, "_SECONDS", 1)
    damaged = bytearray((GOLDEN / "keras_dense.weights.h5").read_bytes())
    damaged[2128] = 80
    (tmp_path / "x.weights.h5").write_bytes(damaged)
    with pytest.raises(WeightsError, match="the library for hdf5 did not finish"):
        load_weights(nn.Linear(4, 4), tmp_path / "x.weights.h5")


def test_names_with_paths_are_names(tmp_path: Path) -> None:
    """A name that looks like a path, or commands a terminal, is shown as text and never used as a path."""
    zipped(tmp_path / "x.npz", **{"../../evil/kernel__npy": _npy(np.ones((4, 4), "f4"))})
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    plan = load_weights(model, tmp_path / "x.npz")
    assert model[0].weight.sum() == 16
    assert "evil/kernel" in str(plan)
    assert list(tmp_path.rglob("*")) == [tmp_path / "x.npz"]
    zipped(tmp_path / "y.npz", **{"\x1b[31m/kernel__npy": _npy(np.ones((4, 4), "f4"))})
    assert "\x1b" not in str(load_weights(model, tmp_path / "y.npz"))


def _npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


DAMAGED = [
    "keras_net_cnn.keras",
    "keras_dense.weights.h5",
    "keras_gru.h5",
    "flax_net_cnn.msgpack",
    "onnx_net_cnn_whole.onnx",
]


def attempt(name: str, damage: Callable[[Path], Any], folder: Path) -> None:
    """Load a damaged copy: it is refused and nothing is changed, or it loads as a whole."""
    case, _ = case_of(GOLDEN / name)
    path = folder / name
    if (GOLDEN / name).is_dir():
        shutil.copytree(GOLDEN / name, path, dirs_exist_ok=True)
    damage(path)
    model = build(case, path)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    start = time.process_time()
    try:
        load_weights(model, path, trust=True, **case.options)
    except WeightsError:
        for key, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[key]), key
    assert time.process_time() - start < 20


@pytest.mark.parametrize("name", DAMAGED)
def test_a_truncated_file_is_refused(name: str, tmp_path: Path) -> None:
    """Whatever of its end is missing."""
    content = (GOLDEN / name).read_bytes()
    for share in (0.02, 0.3, 0.7, 0.99):
        attempt(name, functools.partial(Path.write_bytes, data=content[: int(len(content) * share)]), tmp_path)


@pytest.mark.parametrize("name", DAMAGED)
def test_flipped_bytes_never_tear_a_load(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """With bytes changed anywhere a file is refused with nothing changed, or loads whole; nothing else is raised."""
    content = (GOLDEN / name).read_bytes()
    folder = tmp_path_factory.mktemp("flipped")
    place = st.one_of(st.integers(0, min(2000, len(content) - 1)), st.integers(0, len(content) - 1))

    examples = 6 if ".h5" in name or ".keras" in name else 40  # a process of its own for each

    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.tuples(place, st.integers(0, 255)), min_size=1, max_size=8))
    def flip(changes: list[tuple[int, int]]) -> None:
        damaged = bytearray(content)
        for where, value in changes:
            damaged[where] = value
        attempt(name, lambda path: path.write_bytes(damaged), folder)

    flip()
