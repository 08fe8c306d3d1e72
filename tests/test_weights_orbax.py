"""Folders of orbax: the same arrays in each of its stores; and folders made to harm, refused as hostile files are."""

from __future__ import annotations

import json
import os
import resource
import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from tests.test_weights_golden import GOLDEN
from tests.test_weights_hostile import MANY, SECRET, attempt, refuse
from unvanish import WeightsError, load_weights
from unvanish.reuse.weights.readers import apart, read_weights
from unvanish.reuse.weights.readers.guard import MOST_ENTRIES

WHOLE = GOLDEN / "flax_net_cnn.orbax"
ZARRAY = {
    "zarr_format": 2, "shape": [4, 4], "chunks": [4, 4], "dtype": "<f4", "order": "C", "compressor": None,
    "filters": None, "fill_value": None, "dimension_separator": ".",
}  # fmt: skip
ONES = np.ones((4, 4), "f4").tobytes()
EVIL: dict[str, tuple[str, Callable[[Path], None]]] = {}


def listed(*names: Sequence[str], **told: Any) -> str:
    """Return what `_METADATA` says of arrays."""
    tree = {
        str(tuple(keys)): {
            "key_metadata": [{"key": key, "key_type": 2} for key in keys],
            "value_metadata": {"value_type": "jax.Array", "skip_deserialize": False},
        }
        for keys in names
    }
    return json.dumps({"tree_metadata": tree, "store_array_data_equal_to_fill_value": True, **told})


def stored(path: Path, content: str | bytes = ONES, file: str = "0.0", **zarray: Any) -> None:
    """Write a folder of one kernel; its description may lie."""
    inner = path / "Dense_0.kernel"
    inner.mkdir(parents=True)
    (path / "_METADATA").write_text(listed(["Dense_0", "kernel"]))
    (inner / ".zarray").write_text(json.dumps({**ZARRAY, **zarray}))
    (inner / file).write_bytes(content if isinstance(content, bytes) else content.encode())


def evil(words: str) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    """Add a folder to the table: what its refusal says, and what makes it."""

    def add(make: Callable[[Path], None]) -> Callable[[Path], None]:
        EVIL[make.__name__] = (words, make)
        return make

    return add


@evil("found no '_METADATA' in it")
def nothing(path: Path) -> None:
    path.mkdir()


@evil("damaged content .*JSON")
def no_json(path: Path) -> None:
    stored(path)
    (path / "_METADATA").write_bytes(bytes(range(256)))


@evil("damaged content .*JSON")
def cut_json(path: Path) -> None:
    stored(path)
    (path / "_METADATA").write_text(listed(["Dense_0", "kernel"])[:-20])


@evil("damaged content .*Recursion")
def deep_json(path: Path) -> None:
    stored(path)
    (path / "_METADATA").write_text("[" * 200_000)


@evil("damaged content")
def another_json(path: Path) -> None:
    stored(path)
    (path / "_METADATA").write_text('{"tree_metadata": [1, 2]}')


@evil("nested too deeply")
def deep_names(path: Path) -> None:
    stored(path)
    (path / "_METADATA").write_text(listed(["a"] * 100))


@evil("too many entries")
def many_names(path: Path) -> None:
    stored(path)
    (path / "_METADATA").write_text(listed(*([str(number)] for number in range(MANY))))


@evil("too many entries")
def many_files(path: Path) -> None:
    stored(path)
    for number in range(MOST_ENTRIES):
        os.mknod(path / str(number))


@evil("two entries named 'kernel'")
def twice(path: Path) -> None:
    stored(path)
    entry = json.loads(listed(["Dense_0", "kernel"]))
    entry["tree_metadata"]["again"] = next(iter(entry["tree_metadata"].values()))
    (path / "_METADATA").write_text(json.dumps(entry))


def named(path: Path, name: str) -> None:
    """Name an array that lies beside the folder, and would be read there."""
    stored(path)
    stored(path.parent / "beside")
    (path / "_METADATA").write_text(listed([name]))


@evil("an array named '../beside/Dense_0.kernel', expected a name without a path")
def parent(path: Path) -> None:
    named(path, "../beside/Dense_0.kernel")


@evil("an array named 'a/../../beside/Dense_0.kernel'")
def parent_inside(path: Path) -> None:
    named(path, "a/../../beside/Dense_0.kernel")


@evil("an array named '/.*beside/Dense_0.kernel'")
def absolute(path: Path) -> None:
    named(path, f"{path.parent.absolute()}/beside/Dense_0.kernel")


@evil("an array named")
def backslashes(path: Path) -> None:
    named(path, "..\\beside\\Dense_0.kernel")


@evil("'0.0', a link or a device, expected files")
def linked_chunk(path: Path) -> None:
    stored(path)
    (path.parent / "secret.txt").write_bytes(SECRET[:64])
    (path / "Dense_0.kernel" / "0.0").unlink()
    (path / "Dense_0.kernel" / "0.0").symlink_to(path.parent / "secret.txt")


@evil("'Dense_0.kernel', a link or a device")
def linked_folder(path: Path) -> None:
    stored(path)
    (path / "Dense_0.kernel").rename(path.parent / "elsewhere")
    (path / "Dense_0.kernel").symlink_to(path.parent / "elsewhere")


@evil("'0.0', a link or a device")
def pipe(path: Path) -> None:
    """Reading it would wait for ever."""
    stored(path)
    (path / "Dense_0.kernel" / "0.0").unlink()
    os.mkfifo(path / "Dense_0.kernel" / "0.0")


@evil("declare far more than the file stores")
def unstored(path: Path) -> None:
    stored(path, shape=[1 << 20, 1 << 20])


@evil("declare far more than the file stores")
def unstored_zarr3(path: Path) -> None:
    stored(path, "", "c")
    (path / "_METADATA").write_text(listed(["Dense_0", "kernel"], use_zarr3=True))
    grid = {"name": "regular", "configuration": {"chunk_shape": [1 << 20, 1 << 20]}}
    told = {
        "zarr_format": 3, "node_type": "array", "shape": [1 << 20, 1 << 20], "data_type": "float32",
        "chunk_grid": grid, "chunk_key_encoding": {"name": "default"}, "fill_value": 0,
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
    }  # fmt: skip
    (path / "Dense_0.kernel" / "zarr.json").write_text(json.dumps(told))


@evil("declare far more than the file stores")
def large_chunk(path: Path) -> None:
    """The library makes room for a whole chunk, or ends its process: a few numbers of it are enough."""
    stored(path, chunks=[1 << 16, 1 << 16])


@evil("too many entries")
def many_chunks(path: Path) -> None:
    stored(path, shape=[500, 500], chunks=[1, 1])


@evil("damaged content")
def bomb(path: Path) -> None:
    stored(path, zlib.compress(bytes(1 << 28)), compressor={"id": "zlib", "level": 1})


@evil("damaged content")
def short_chunk(path: Path) -> None:
    stored(path, ONES[:-4])


@evil("damaged content")
def lost_chunk(path: Path) -> None:
    """Where the folder says that zeros are stored, what is missing is no zeros."""
    stored(path, file="1.1")


@evil("damaged content")
def deep_zarray(path: Path) -> None:
    stored(path)
    (path / "Dense_0.kernel" / ".zarray").write_text('{"shape":' * 200_000)


@evil("damaged content")
def negative(path: Path) -> None:
    stored(path, shape=[-4, 4])


@evil("damaged content")
def objects(path: Path) -> None:
    stored(path, dtype="|O")


@evil("damaged content")
def complex_numbers(path: Path) -> None:
    stored(path, ONES + ONES, dtype="<c8")


@evil("damaged content .*Error reading Byte range")
def another_place(path: Path) -> None:
    """The list of a database says in which files its data lies: here, beside the folder."""
    shutil.copytree(WHOLE, path)
    shutil.copytree(WHOLE, path.parent / "beside")
    base = tensorstore.KvStore.open({"driver": "file", "path": f"{path.absolute()}/"}).result()
    manifest = tensorstore.ocdbt.dump(base).result()
    root = manifest["versions"][0]["root"]
    root["location"] = root["location"].replace("btreenode::", "btreenode:../beside/:")
    (path / "manifest.ocdbt").write_bytes(tensorstore.ocdbt.undump_manifest(manifest))


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in ("many_files", "many_names") else n for n in EVIL]
)
def test_a_hostile_folder_is_refused(name: str, tmp_path: Path) -> None:
    """Refused by name; neither this process nor the one that reads takes much time or memory."""
    words, make = EVIL[name]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    refuse("x.orbax", make, words, tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_maxrss <= max(before.ru_maxrss, 1_000_000)  # kilobytes
    assert after.ru_utime - before.ru_utime < 10


def test_a_plain_folder_of_that_kind_loads(tmp_path: Path) -> None:
    """What the hostile ones are made of is right; they are refused for what was done to it."""
    stored(tmp_path / "x.orbax")
    model = nn.Linear(4, 4, bias=False)
    load_weights(model, tmp_path / "x.orbax", trust=True)
    assert torch.equal(model.weight, torch.ones(4, 4))


def test_a_library_that_ends_its_process_is_a_damaged_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were chunks not counted, one too large for the memory would end the process that reads it, and no other."""
    monkeypatch.setattr(apart, "limits", lambda budget: {"entries": 100, "size": 1 << 36, "levels": 4})
    monkeypatch.setattr(apart, "_SECONDS", 1)
    stored(tmp_path / "x.orbax", chunks=[1 << 17, 1 << 17])
    with pytest.raises(WeightsError, match=r"the library for orbax did not finish|Not enough data"):
        load_weights(nn.Linear(4, 4), tmp_path / "x.orbax", trust=True)


@pytest.mark.parametrize("file", ["_METADATA", "manifest.ocdbt", "d/*"])
def test_flipped_or_missing_bytes_never_tear_a_load(file: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A folder with bytes changed or cut off is refused with nothing changed, or loads whole."""
    folder = tmp_path_factory.mktemp("flipped")
    (place,) = (path.relative_to(WHOLE) for path in WHOLE.glob(file))
    content = (WHOLE / place).read_bytes()
    where = st.integers(0, len(content) - 1)

    @settings(max_examples=5, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.tuples(where, st.integers(0, 255)), max_size=4), st.one_of(st.just(len(content)), where))
    def flip(changes: list[tuple[int, int]], end: int) -> None:
        damaged = bytearray(content)
        for index, value in changes:
            damaged[index] = value
        attempt(WHOLE.name, lambda path: (path / place).write_bytes(damaged[:end]), folder)

    flip()


def written(path: Path, arrays: Mapping[str, Any], store: str, driver: str) -> None:
    """Write arrays as orbax does."""
    path.mkdir()
    places = [name.split(".") for name in arrays]
    (path / "_METADATA").write_text(listed(*places, use_zarr3=driver == "zarr3"))
    for name, array in arrays.items():
        base = {"driver": "file", "path": f"{path}/"}
        place = {"driver": "file", "path": f"{path}/{name}/"}
        kvstore = {"driver": "ocdbt", "base": base, "path": f"{name}/"} if store == "ocdbt" else place
        told = {"driver": driver, "kvstore": kvstore, "store_data_equal_to_fill_value": True}
        opened = tensorstore.open(told, create=True, dtype=array.dtype, shape=array.shape)
        opened.result().write(array).result()


@pytest.mark.parametrize("store", ["ocdbt", "file"])
@pytest.mark.parametrize("driver", ["zarr", "zarr3"])
def test_every_store_of_orbax_gives_the_same_arrays(store: str, driver: str, tmp_path: Path) -> None:
    """In a database or as files, zarr 2 or 3: arrays of every type bit for bit, also zeros, and a single number.

    The order of the names is not that of the tree; haiku's names have slashes.
    """
    rng = np.random.default_rng(0)
    arrays = {
        "params.Dense_0.kernel": rng.normal(size=(5, 3)).astype("f4"),
        "params.b.mlp/~/linear_0.w": rng.normal(size=(3, 2)),
        "params.Dense_0.bias": np.zeros(3, "f4"),
        "params.Dense_1.kernel": rng.normal(size=(2, 7)).astype(tensorstore.bfloat16.numpy_dtype),
        "params.counts.steps": np.array(3, "i4"),
        "opt_state.0.mu": rng.normal(size=4).astype("f2"),
    }
    written(tmp_path / "x", arrays, store, driver)
    foreign = read_weights(tmp_path / "x")
    read = {
        layer.place(role).replace("/", "."): array for layer in foreign.layers for role, array in layer.arrays.items()
    }
    wanted = {name.removeprefix("params.").replace("/", "."): array for name, array in arrays.items()}
    del wanted["opt_state.0.mu"]  # beside parameters, the state of an optimiser
    assert read.keys() == wanted.keys()
    for name, array in wanted.items():
        assert tuple(read[name].shape) == array.shape
        assert read[name].view(torch.uint8 if array.ndim else read[name].dtype).numpy().tobytes() == array.tobytes(), (
            name
        )


def test_what_an_older_orbax_left_out_is_zeros(tmp_path: Path) -> None:
    """Without the mark that zeros are stored, an array that is not there is one of zeros."""
    stored(tmp_path / "x.orbax", file="1.1")
    (tmp_path / "x.orbax" / "_METADATA").write_text(
        listed(["Dense_0", "kernel"], store_array_data_equal_to_fill_value=False)
    )
    model = nn.Linear(4, 4, bias=False)
    load_weights(model, tmp_path / "x.orbax", trust=True)
    assert not model.weight.any()


def test_the_folder_around_that_of_the_weights_will_do(tmp_path: Path) -> None:
    """A step of orbax's manager holds one folder of weights among others; texts in them are not arrays."""
    stored(tmp_path / "7" / "default")
    metadata = json.loads(listed(["Dense_0", "kernel"], ["name"]))
    metadata["tree_metadata"]["('name',)"]["value_metadata"]["value_type"] = "string"
    (tmp_path / "7" / "default" / "_METADATA").write_text(json.dumps(metadata))
    (tmp_path / "7" / "metrics").mkdir()
    (layer,) = read_weights(tmp_path / "7" / ".." / "7").layers
    assert layer.arrays["kernel"].sum() == 16
