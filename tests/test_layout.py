"""Data goes one way: what a module may import, and where torch is never loaded."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "unvanish"

# A module imports only what stands in a line above it.
ORDER = (
    ("version", "errors", "wraps", "mixed_precision"),
    ("records",),
    ("terrain",),
    ("layers", "measures", "graph", "held_out"),
    ("roster", "staging", "recomputed", "shown", "untouched"),
    ("assemble", "capture"),
    ("trace",),
    ("players",),
    ("watch",),
    ("diagnose",),
    ("reuse",),
    ("treatments",),
    ("treat", "inject", "candidates"),
    ("replicas",),
    ("report",),
    ("launch",),
    ("attend", "scratch"),
    ("trial",),
    ("forks",),
    ("levels", "paired"),
    ("cure",),
    ("processes",),
    ("check", "session"),
    ("output", "factory"),
    ("patch", "progress"),
    ("remedy", "weights"),
    ("demo", "demo_training"),
    ("cli",),
    ("__main__",),
)
NEVER_TORCH = (
    "version",
    "errors",
    "records",
    "terrain",
    "trace",
    "diagnose",
    "report",
    "launch",
    "attend",
    "cli",
    "__init__",
    "__main__",
)


def stage_of(file: Path) -> str:
    """Return the module or folder that a file belongs to."""
    return file.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(file: Path) -> list[tuple[str, bool]]:
    """Return what a file imports, as dotted absolute names, and whether it happens when it is loaded."""
    tree = ast.parse(file.read_text())
    package = ("unvanish", *file.relative_to(SOURCE).parts[:-1])
    found: list[tuple[str, bool]] = []

    def visit(node: ast.AST, is_loaded: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found.extend((name.name, is_loaded) for name in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = ".".join(package[: len(package) - child.level + 1]) if child.level else ""
                name = ".".join(filter(None, (base, child.module)))
                if child.module:
                    found.append((name, is_loaded))
                else:
                    found.extend((f"{name}.{item.name}", is_loaded) for item in child.names)
            else:
                is_type_only = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)
                is_function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))
                visit(child, is_loaded and not is_type_only and not is_function)

    visit(tree, True)
    return found


FILES = sorted(file for file in SOURCE.rglob("*.py") if stage_of(file) != "__init__")


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_imports_point_one_way(file: Path) -> None:
    """A module imports only modules of earlier stages, and never the package root."""
    place = {name: number for number, line in enumerate(ORDER) for name in line}
    here = stage_of(file)
    assert here in place, f"{here} has no place in ORDER"
    for name, _ in imports(file):
        if name.split(".")[0] != "unvanish":
            continue
        there = [*name.split("."), ""][1]
        assert there, f"{here} imports the package root"
        assert there == here or place[there] < place[here], f"{here} imports {there}"


@pytest.mark.parametrize("file", sorted(SOURCE.rglob("*.py")), ids=lambda file: str(file.relative_to(SOURCE)))
def test_torch_is_loaded_only_where_models_are(file: Path) -> None:
    """What reads records, and what a command line starts with, imports torch at most inside a function."""
    if stage_of(file) in NEVER_TORCH:
        loaded = [name for name, is_loaded in imports(file) if is_loaded]
        assert not [name for name in loaded if name.split(".")[0] == "torch"]


def test_diagnosing_needs_no_torch() -> None:
    """Reading, diagnosing and reporting a record leave torch out of the process."""
    code = (
        "import sys, unvanish, unvanish.cli, unvanish.diagnose, unvanish.trace, unvanish.report\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
