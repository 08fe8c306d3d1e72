"""One trial in a process of its own: a script, some treatments, so many steps, one seed.

    python -m unvanish.trial SPEC.json

reads what to do, runs the script under watch with the treatments injected, and writes what came of it beside the
specification. The parent never runs a line of the user's code.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .attend import attend
from .scratch import Guard, inside

EVERY = 10


@dataclass(frozen=True)
class Spec:
    """What one trial does.

    ``folder``: where its record and result go. ``kept_folders``: the user's, which it must not write to.
    """

    target: str
    arguments: list[str]
    is_module: bool
    folder: str
    treatments: list[str] = field(default_factory=list)
    facts: dict[str, float] = field(default_factory=dict)
    max_steps: int = 0
    seed_offset: int = 0
    kept_folders: list[str] = field(default_factory=list)

    @property
    def file(self) -> Path:
        return Path(self.folder) / "trial.json"

    @property
    def result(self) -> Path:
        return Path(self.folder) / "result.json"

    @property
    def mirror(self) -> Path:
        return Path(self.folder) / "mirror"

    def write(self) -> None:
        """Write the specification into its folder."""
        Path(self.folder).mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps(asdict(self)))


class Printed:
    """Notes how much was printed when, so that a shorter trial can be compared with a longer one."""

    def __init__(self) -> None:
        self._steps: dict[int, int] = {}
        self.at: list[tuple[int, int]] = []

    def attach(self) -> None:
        """Begin to count steps, until the process ends."""
        from torch.optim.optimizer import register_optimizer_step_post_hook

        register_optimizer_step_post_hook(self._count)

    def _count(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        steps = self._steps[id(optimizer)] = self._steps.get(id(optimizer), 0) + 1
        if not self.at or steps > self.at[-1][0]:
            printed = os.lseek(1, 0, os.SEEK_CUR)
            if self.at and self.at[-1][1] == printed:
                self.at.pop()  # nothing new: the last step with so much is kept
            self.at.append((steps, printed))


def main(arguments: list[str]) -> int:
    """Run the trial that a file specifies; the exit status is the script's."""
    spec = Spec(**json.loads(Path(arguments[0]).read_text()))
    _end_with_parent()
    guard = Guard(map(Path, spec.kept_folders), Path(spec.folder))
    guard.attach()
    printed = Printed()
    injections: list[Any] = []

    def inject() -> None:
        from .inject import Injection
        from .treatments import parse_treatment

        _guard_saving(guard)
        printed.attach()
        treatments = [parse_treatment(text) for text in spec.treatments]
        injection = Injection(treatments, facts=spec.facts, max_steps=spec.max_steps, seed_offset=spec.seed_offset)
        injection.attach()
        injections.append(injection)

    target = spec.target if spec.is_module else str(inside(spec.mirror, Path(spec.target)))
    attended = attend(
        target, spec.arguments, is_module=spec.is_module, every=EVERY, parent=Path(spec.folder), also=inject
    )
    document = {
        "status": attended.outcome.status,
        "error": attended.outcome.message or str(attended.recording.run.get("failure", "")),
        "record": str(attended.folder or ""),
        "applied": [name for injection in injections for name in injection.applied],
        "refused": [text for injection in injections for text in injection.refused],
        "printed_at": printed.at,
    }
    spec.result.write_text(json.dumps(document))
    return attended.outcome.status


def _guard_saving(guard: Guard) -> None:
    """Let the guard see `torch.save`, which opens files by itself."""
    import torch

    original = torch.save

    @functools.wraps(original)
    def save(obj: object, f: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(f, (str, os.PathLike)):
            guard.before_writing(os.fspath(f))
        original(obj, f, *args, **kwargs)

    torch.save = save


def _end_with_parent() -> None:
    """End this process soon after the one that started it, however that ended."""
    parent = os.getppid()

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=look, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
