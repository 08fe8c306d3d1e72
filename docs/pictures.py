"""Make the pictures of the documents: real runs, as a terminal shows them.

Run it with `make pictures`, or `python docs/pictures.py [FOLDER]`. It trains the two scripts of
docs/command-line.md in a temporary folder; numbers of time differ from run to run, everything else does not.
"""

from __future__ import annotations

import html
import io
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

DOCS = Path(__file__).parent
WIDTH = 92
THEME = TerminalTheme(
    (24, 26, 31),
    (214, 218, 224),
    [
        (24, 26, 31), (242, 107, 107), (126, 199, 134), (229, 192, 106),
        (97, 160, 240), (198, 140, 224), (86, 190, 200), (214, 218, 224),
    ],
    [
        (120, 126, 136), (255, 128, 128), (150, 220, 158), (245, 210, 130),
        (130, 180, 255), (215, 160, 240), (110, 210, 220), (255, 255, 255),
    ],
)  # fmt: skip
# rich's frame around a terminal, without the fonts that it loads from another site
FRAME = """\
<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{
    font-family: "Fira Code", "DejaVu Sans Mono", Menlo, Consolas, monospace;
    font-size: {char_height}px; line-height: {line_height}px; font-variant-east-asian: full-width;
}}
.{unique_id}-title {{ font-size: 16px; font-family: arial, sans-serif; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal">
  <rect x="0" y="0" width="{terminal_width}" height="{terminal_height}" />
</clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""


def scripts() -> dict[str, str]:
    """Return the scripts that docs/command-line.md shows, by name."""
    text = (DOCS / "command-line.md").read_text(encoding="utf-8")
    found = re.findall(r"^```python\n(# (\w+\.py)\n.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return {name: code for code, name in found}


def terminal_output(command: str, folder: Path) -> str:
    """Run a command as in a terminal with colours; what it prints, after its prompt."""
    environment = os.environ | {
        "FORCE_COLOR": "1",
        "COLUMNS": str(WIDTH),
        "PYTHONIOENCODING": "utf-8",
        "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", ""))),
    }
    environment.pop("NO_COLOR", None)
    done = subprocess.run(command, shell=True, cwd=folder, env=environment, capture_output=True, encoding="utf-8")
    if done.returncode not in (0, 1):
        raise SystemExit(f"{command}: ended with {done.returncode}\n{done.stderr}")
    return done.stdout


def draw(command: str, output: str, file: Path) -> None:
    """Draw a command and its output as a terminal window."""
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, highlight=False)
    console.print(Text.assemble(("$ ", "bold green"), (command, "bold")))
    console.print(Text.from_ansi(output.rstrip("\n")), soft_wrap=True)
    svg = console.export_svg(title="", theme=THEME, code_format=FRAME, unique_id=file.stem)
    file.write_text(_TEXT.sub(_without_outer_spaces, svg), encoding="utf-8")
    print(file)


_TEXT = re.compile(r'(<text class="[^"]*" )x="([\d.]+)" (y="[\d.]+" )textLength="([\d.]+)"([^>]*)>([^<]*)</text>')


def _without_outer_spaces(match: re.Match[str]) -> str:
    """Place a text by its first letter: some viewers drop the spaces before it."""
    head, x, y, length, tail, text = match.groups()
    cells = len(html.unescape(text))
    start = cells - len(html.unescape(text).lstrip("\xa0"))
    cell = float(length) / cells
    kept = text.removeprefix("&#160;" * start)
    left = len(html.unescape(kept))
    return f'{head}x="{float(x) + start * cell:.1f}" {y}textLength="{left * cell:.1f}"{tail}>{kept}</text>'


def main(images: Path) -> None:
    """Make all pictures."""
    images.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for script, code in scripts().items():
            (folder / script).write_text(code, encoding="utf-8")
        for script in ("train.py", "fixed.py"):
            command = f"unvanish run {script}"
            draw(command, terminal_output(command, folder), images / f"run-{Path(script).stem}.svg")
        for number, record in enumerate(sorted((folder / "runs").iterdir())):
            record.rename(record.with_name(("sick", "healthy")[number]))
        command = "unvanish compare runs/sick runs/healthy"
        draw(command, terminal_output(command, folder), images / "compare.svg")
        draw_cure(folder, images / "cure.svg")
    draw_landscapes(images)


def draw_cure(folder: Path, file: Path) -> None:
    """Draw the search for a cure of the sick script."""
    command = "unvanish cure train.py"
    draw(command, terminal_output(command, folder), file)


def draw_landscapes(images: Path) -> None:
    """Draw how replicas lie to each other, by how they were trained."""
    script = DOCS.parent / "bench" / "landscape.py"
    subprocess.run([sys.executable, str(script), "--seeds", "1", "--draw", str(images)], check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS / "images")
