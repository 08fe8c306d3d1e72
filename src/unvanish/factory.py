"""Load what a command names: `file.py:factory` or `pkg.mod:factory`."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from .errors import TargetError

_FORMS = "expected a model, (model, loss_fn, batch), or (model, loss_fn, batch, optimizer)"


class Built(NamedTuple):
    """What a factory made; the arguments of `check`."""

    model: Any
    loss_fn: Any = None
    batch: Any = None
    optimizer: Any = None


def load_factory(target: str, *, command: str = "check") -> Callable[[], Any]:
    """Import the file or module of a target and return its factory.

    Only the command line may name code to import. What the import itself raises is passed on.

    Args:
        target: FILE.py:FACTORY or PKG.MOD:FACTORY.
        command: Named in errors.

    Raises:
        TargetError: if the file, module or factory cannot be found.
    """
    place, _, name = target.rpartition(":")
    if not place or not name:
        raise TargetError(
            f"{command}: target {target!r}: found no factory in it, expected FILE.py:FACTORY or PKG.MOD:FACTORY. "
            f"Write for example: {target.rstrip(':') or 'model.py'}:build"
        )
    load = _load_file if place.endswith(".py") or os.sep in place else _load_module
    module = load(place, command)
    factory: Any = module
    for part in name.split("."):
        factory = getattr(factory, part, None)
    if not callable(factory):
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        near = difflib.get_close_matches(name, names, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        found = "nothing of that name" if factory is None else type(factory).__name__
        raise TargetError(
            f"{command}: factory {name!r} in {place!r}: found {found}, expected a function without arguments that "
            f"returns a model.{hint}"
        )
    return factory  # type: ignore[no-any-return]


def build(factory: Callable[[], Any], *, command: str = "check") -> Built:
    """Call a factory and return its parts; what it raises is passed on.

    Raises:
        TargetError: if it returns another form.
    """
    made = factory()
    if isinstance(made, tuple) and len(made) in (3, 4):
        return Built(*made)
    if isinstance(made, (tuple, list, dict, type(None), str, int, float)):
        found = f"{type(made).__name__} of {len(made)}" if isinstance(made, (tuple, list, dict)) else repr(made)
        raise TargetError(f"{command}: the factory: found {found}, {_FORMS}. Return one of these.")
    return Built(made)


def _load_file(path: str, command: str) -> ModuleType:
    if not Path(path).is_file():
        raise TargetError(
            f"{command}: file {path!r}: found no such file, expected a Python file. "
            f"The working directory is {os.getcwd()!r}."
        )
    sys.path.insert(0, os.path.dirname(os.path.realpath(path)))
    name = Path(path).stem
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise TargetError(f"{command}: file {path!r}: found no Python in it, expected a Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(name, module)  # pickling and dataclasses look it up
    spec.loader.exec_module(module)
    return module


def _load_module(name: str, command: str) -> ModuleType:
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # something that the module itself imports is missing
        raise TargetError(
            f"{command}: module {name!r}: found nothing of that name, expected an importable module. "
            f"For a file write: path/to/{name.split('.')[-1]}.py:factory"
        ) from error
