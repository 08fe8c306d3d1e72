"""Read a weights file of any of the known formats, without running anything that it names.

Every reader counts entries and bytes against a budget before it takes them, so that a hostile file is refused in
bounded time and memory. A format is told by the first bytes of the file; only ONNX and msgpack, which have no mark,
by the end of its name.

Source: CVE-2025-9905 (Keras): loading a model, rather than its arrays, runs what its file names.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from pathlib import Path

from ....errors import UnvanishError, WeightsError
from ..foreign import Family, Foreign
from .guard import Budget, extra, refused
from .zipped import entries_of

Reader = Callable[[Path, Budget, str, Family | None], Foreign]


def read_weights(file: str | os.PathLike[str], *, part: str = "", layout: Family | None = None) -> Foreign:
    """Return the layers of a weights file.

    Args:
        file: ``.keras``, ``.weights.h5``, ``.h5``, ``.onnx``, ``.msgpack``, ``.npz``, ``.safetensors``, ``.pt``, or a
            folder that orbax wrote.
        part: Of a file that holds several sets of weights: the name of the one to read, such as ``model``.
        layout: Whose layouts the arrays have, where names alone leave it open.

    Raises:
        WeightsError: if the file is of no known format, damaged, or asks for more than it may.
    """
    path = Path(file)
    try:
        if not path.exists():
            raise refused(path, "no such file", "a weights file", "Check the path")
        return _reader_of(path, Budget.of(path))(path, Budget.of(path), part, layout)
    except UnvanishError:
        raise
    except RecursionError as error:
        raise refused(path, "parts nested too deeply", "a few levels", "Save it anew") from error
    except MemoryError as error:
        raise refused(path, "more than the memory holds", "what fits into it", "Save it in parts") from error
    except Exception as error:  # parsers of foreign formats raise whatever they meet
        reason = f"{type(error).__name__}: {error}"[:300]
        raise refused(
            path, f"damaged content ({reason})", "a file as its framework writes it", "Save it anew"
        ) from error


def _reader_of(path: Path, budget: Budget) -> Reader:
    from .loose import read_npz, read_safetensors, read_torch

    if path.is_dir():
        from .orbax import read_orbax

        return read_orbax
    with path.open("rb") as opened:
        start = opened.read(16)
    if start.startswith(b"\x89HDF\r\n\x1a\n"):
        extra("h5py", "keras", path)
        return _read_hdf5
    if start.startswith(b"PK\x03\x04"):
        budget.entries(entries_of(path))
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        if "config.json" in names or "model.weights.h5" in names:
            extra("h5py", "keras", path)
            from .keras3 import read_keras

            return read_keras
        return read_torch if any(name.endswith("data.pkl") for name in names) else read_npz
    if path.suffix == ".onnx":
        from .onnx_graph import read_onnx

        return read_onnx
    if path.suffix in (".msgpack", ".flax"):
        from .flax_tree import read_msgpack

        return read_msgpack
    if start[8:9] == b"{":
        return read_safetensors
    if path.suffix in (".pt", ".pth", ".bin", ".ckpt") and start.startswith(b"\x80"):
        return read_torch
    raise refused(
        path,
        "no format known here",
        ".keras, .h5, .weights.h5, .onnx, .msgpack, .npz, .safetensors or .pt",
        "A checkpoint of TensorFlow can be saved as .npz with TensorFlow",
    )


def _read_hdf5(path: Path, budget: Budget, part: str, layout: Family | None) -> Foreign:
    """Read either form of Keras's files."""
    from .apart import read_tree
    from .keras3 import read_weights_h5
    from .keras_legacy import is_legacy, read_h5

    tree = read_tree("hdf5", path, budget)
    return read_h5(path, tree) if is_legacy(tree) else read_weights_h5(path, tree)


__all__ = ["Family", "WeightsError", "read_weights"]
