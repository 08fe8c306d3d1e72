"""The documents are true: their code runs, their commands end as stated, their numbers are the code's."""

from __future__ import annotations

import ast
import doctest
import importlib
import json
import math
import os
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import unvanish
from tests.test_layout import ORDER as STAGES
from tests.traces import make_trace
from unvanish.diagnose.ranking import ORDER
from unvanish.report.remedies import REMEDIES
from unvanish.treatments import TREATMENTS

ROOT = Path(__file__).parents[1]
DIAGNOSE = ROOT / "src/unvanish/diagnose"
PAGES = [ROOT / "README.md", ROOT / "ARCHITECTURE.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
_AUTHORS = r"([A-Z][\w-]+)((?:, [A-Z]\w+)*(?: & [A-Z]\w+)?(?: et al\.)?) ((?:18|19|20)\d\d)\b"


class Block(NamedTuple):
    language: str
    marks: str
    text: str
    line: int


def blocks(page: Path) -> Iterator[Block]:
    """Yield the fenced blocks of a page."""
    pattern = re.compile(r"^```(\w*)[ ]*([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    text = page.read_text(encoding="utf-8")
    for match in pattern.finditer(text):
        yield Block(match[1], match[2], match[3], text.count("\n", 0, match.start()) + 2)


def prose(page: Path) -> str:
    """Return a page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def table_rows(page: Path) -> list[list[str]]:
    """Return the cells of all rows of all tables of a page."""
    lines = prose(page).splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]


@pytest.fixture
def page_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory; one thread, because the examples are small."""
    monkeypatch.chdir(tmp_path)
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)
    torch.set_rng_state(state)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_examples_run(page: Path, page_folder: Path) -> None:
    """Python blocks run in order in one namespace; marked console blocks end with the status they state.

    A python block that begins with `# name.py` is also saved under that name, for the commands.
    """
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page):
        if block.language == "python":
            script = re.match(r"# (\w+\.py)\n", block.text)
            if script:
                Path(script[1]).write_text(block.text, encoding="utf-8")
            code = "\n" * (block.line - 1) + block.text  # tracebacks then show the line of the page
            exec(compile(code, str(page), "exec"), namespace)
        elif block.language == "console" and (status := re.search(r"exit=(\d+)", block.marks)):
            run_commands(block, int(status[1]))


def run_commands(block: Block, status: int) -> None:
    """Run the commands of a console block; the last must end with the stated status."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "FORCE_COLOR", "NO_COLOR")}
    environment["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), environment.get("PATH", "")))
    environment |= {"OMP_NUM_THREADS": "1", "COLUMNS": "80", "PYTHONIOENCODING": "utf-8"}
    commands = [line[2:] for line in block.text.splitlines() if line.startswith("$ ")]
    shown = "\n".join(line for line in block.text.splitlines() if not line.startswith("$ "))
    assert commands, f"line {block.line}: a marked block without a command"
    for command in commands:
        done = subprocess.run(
            command, shell=True, capture_output=True, text=True, encoding="utf-8", env=environment, timeout=200
        )
    assert done.returncode == status, f"line {block.line}: {commands[-1]}\n{done.stdout}\n{done.stderr}"
    for illness in ORDER:
        if illness in shown:
            assert illness in done.stdout, f"line {block.line}: {illness} is shown, but was not found"


def test_commands_are_those_of_the_program() -> None:
    """Every command in a console block exists, and every command has its row in docs/command-line.md."""
    from typer.main import get_command

    from unvanish.cli import app

    known = set(getattr(get_command(app), "commands", {}))
    for page in PAGES:
        for block in blocks(page):
            for command in re.findall(r"^\$ unvanish (\w+)", block.text, re.MULTILINE):
                assert command in known, f"{page.name}, line {block.line}: {command}"
    rows = " ".join(row[0] for row in table_rows(ROOT / "docs/command-line.md"))
    for command in known:
        assert f"`unvanish {command}" in rows, command


def modules_with_examples() -> Iterator[str]:
    for found in pkgutil.walk_packages(unvanish.__path__, "unvanish."):
        path = ROOT / "src" / Path(*found.name.split("."))
        file = path / "__init__.py" if found.ispkg else path.with_suffix(".py")
        if ">>>" in file.read_text(encoding="utf-8"):
            yield found.name


@pytest.mark.parametrize("name", list(modules_with_examples()))
def test_docstring_examples(name: str, page_folder: Path) -> None:
    """The examples in the docstrings of a module give what they show."""
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS, report=True)
    assert result.attempted > 0
    assert result.failed == 0


def slug(heading: str) -> str:
    """Return the anchor of a heading as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page: Path) -> None:
    """Every relative link and picture names a file that exists, and every anchor a heading."""
    text = prose(page)
    for target in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text):
        if re.match(r"\w+:", target):
            continue
        file, _, anchor = target.partition("#")
        to = (page.parent / file).resolve() if file else page
        assert to.exists(), f"{page.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", prose(to), re.MULTILINE)
            assert anchor in map(slug, headings), f"{page.name}: {target}"


def test_every_illness_has_a_row() -> None:
    """The tables of docs/diagnose.md list each illness once, with rule, origin and severity."""
    rows = [row for row in table_rows(ROOT / "docs/diagnose.md") if len(row) == 5 and row[0].startswith("`")]
    named = [row[0].strip("`") for row in rows]
    assert sorted(named) == sorted(ORDER)
    for row in rows:
        assert all(row[:4]), row[0]
        assert set(re.findall(r"critical|warning|info", row[3])), row[0]


def test_treatments_in_the_table_are_those_of_the_rules() -> None:
    """A treatment that docs/diagnose.md names for an illness occurs in the code of the rules."""
    code = "".join(path.read_text(encoding="utf-8") for path in DIAGNOSE.glob("*.py"))
    for row in table_rows(ROOT / "docs/diagnose.md"):
        if len(row) == 5 and row[0].startswith("`"):
            for treatment in re.findall(r"[a-z][a-z-]+", row[4]):
                assert f'"{treatment}"' in code, f"{row[0]}: {treatment}"


def test_every_treatment_has_a_row() -> None:
    """The table of docs/treatments.md lists each treatment once, with the value that it has and what it keeps."""
    rows = [row for row in table_rows(ROOT / "docs/treatments.md") if len(row) == 5 and row[0].startswith("`")]
    assert sorted(row[0].strip("`") for row in rows) == sorted(TREATMENTS)
    for row in rows:
        treatment = TREATMENTS[row[0].strip("`")]()
        assert row[1], row[0]
        assert row[3].split(";")[0].split(",")[0] == ("yes" if treatment.preserves_function else "no"), row[0]
        value = treatment.value or "none"
        assert value == "none" or f"[{value}]" in row[2], row[0]
        assert treatment.id.split("=")[0] in REMEDIES, row[0]


def thresholds() -> dict[str, float]:
    """Return the public numeric constants of the rules."""
    found = {}
    for path in sorted(DIAGNOSE.glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                name = node.targets[0].id
                if name.isupper() and not name.startswith("_"):
                    try:
                        value = ast.literal_eval(node.value)
                    except ValueError:
                        continue
                    if isinstance(value, (int, float)):
                        found[name] = float(value)
    return found


def test_thresholds_are_those_of_the_code() -> None:
    """The table of thresholds in docs/diagnose.md has every constant of the rules, with its value."""
    rows = [row for row in table_rows(ROOT / "docs/diagnose.md") if re.fullmatch(r"`[A-Z_]+`", row[0])]
    stated = {row[0].strip("`"): float(row[1]) for row in rows}
    known = thresholds()
    assert stated.keys() == known.keys()
    for name, value in known.items():
        assert math.isclose(stated[name], value), f"{name}: {stated[name]} is stated, {value} is used"


def cited_by_rules() -> set[tuple[str, str]]:
    """Return first author and year of the works in the sources of all findings."""
    found = set()
    for path in DIAGNOSE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Finding":
                named = [keyword.value for keyword in node.keywords if keyword.arg == "source"]
                for source in (*node.args[3:4], *named):
                    found |= authors(ast.unparse(source))
    return found


def authors(text: str) -> set[tuple[str, str]]:
    return {(match[1], match[3]) for match in re.finditer(_AUTHORS, text)}


def listed_sources() -> list[str]:
    text = (ROOT / "docs/sources.md").read_text(encoding="utf-8")
    return re.findall(r"^- \*\*(.+?)\.\*\*", text, re.MULTILINE)


def test_every_cited_work_is_listed() -> None:
    """Each author and year that a rule or a page cites has an entry in docs/sources.md."""
    listed = listed_sources()
    cited = cited_by_rules()
    assert len(cited) > 10
    for page in PAGES:
        cited |= authors(prose(page)) if page.name in ("diagnose.md", "treatments.md") else set()
    for author, year in cited:
        assert any(entry.startswith(author) and entry.endswith(year) for entry in listed), f"{author} {year}"


def test_every_listed_work_is_cited() -> None:
    """docs/sources.md holds no work that neither the code nor a page cites."""
    files = [*(ROOT / "src").rglob("*.py"), *(page for page in PAGES if page.name != "sources.md")]
    text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    for entry in listed_sources():
        first, year = re.match(r"([\w-]+)", entry), re.search(r"\d{4}$", entry)
        assert first is not None
        wanted = rf"{first[1]}.{{0,60}}{year[0]}" if year else re.escape(entry)
        assert re.search(wanted, text), entry


def test_json_example_has_the_keys_of_the_document() -> None:
    """The JSON example of docs/command-line.md has exactly the keys that the program writes."""
    (block,) = (block for block in blocks(ROOT / "docs/command-line.md") if block.language == "json")
    shown = json.loads(block.text)
    # a loss that does not fall, and gradients that do not arrive
    trace = make_trace(1.0, measures={"log2_flow": -30.0, "log2_gain": -10.0})
    real = unvanish.diagnose(unvanish.Recording({}, (trace,))).to_dict()
    assert shown.keys() == real.keys()
    for part in ("findings", "layers"):
        assert shown[part][0].keys() == real[part][0].keys(), part


def test_architecture_lists_the_modules_in_their_order() -> None:
    """ARCHITECTURE.md has under 120 lines and lists every module, none above one that it may import."""
    assert len((ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8").splitlines()) < 120
    listed = [row[0].strip("`/") for row in table_rows(ROOT / "ARCHITECTURE.md") if re.fullmatch(r"`\w+/?`", row[0])]
    stages = {name: number for number, names in enumerate(STAGES) for name in names}
    there = {found.name.split(".")[1] for found in pkgutil.iter_modules(unvanish.__path__, "unvanish.")}
    assert there & stages.keys() <= set(listed)  # test_layout asks for the others
    assert [stages[name] for name in listed] == sorted(stages[name] for name in listed)


def test_inner_modules_are_named_in_the_architecture() -> None:
    """ARCHITECTURE.md names each module inside diagnose/, treatments/ and report/."""
    text = prose(ROOT / "ARCHITECTURE.md")
    for folder in ("diagnose", "treatments", "report"):
        for file in (ROOT / "src/unvanish" / folder).glob("*.py"):
            assert f"`{file.stem}`" in text, f"{folder}/{file.name}"
