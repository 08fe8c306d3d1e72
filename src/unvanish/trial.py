"""One trial in a process of its own: a script, some treatments, so many steps, one seed.

    python -m unvanish.trial SPEC.json

reads what to do, runs the script under watch with the treatments injected, and writes what came of it beside the
specification. The parent never runs a line of the user's code.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .attend import attend

EVERY = 10


@dataclass(frozen=True)
class Spec:
    """What one trial does."""

    target: str
    arguments: list[str]
    is_module: bool
    folder: str
    treatments: list[str] = field(default_factory=list)
    facts: dict[str, float] = field(default_factory=dict)
    max_steps: int = 0
    seed_offset: int = 0

    @property
    def file(self) -> Path:
        return Path(self.folder) / "trial.json"

    @property
    def result(self) -> Path:
        return Path(self.folder) / "result.json"

    def write(self) -> None:
        """Write the specification into its folder."""
        Path(self.folder).mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps(asdict(self)))


def main(arguments: list[str]) -> int:
    """Run the trial that a file specifies; the exit status is the script's."""
    spec = Spec(**json.loads(Path(arguments[0]).read_text()))
    injections: list[Any] = []

    def inject() -> None:
        from .inject import Injection
        from .treatments import parse_treatment

        treatments = [parse_treatment(text) for text in spec.treatments]
        injection = Injection(treatments, facts=spec.facts, max_steps=spec.max_steps, seed_offset=spec.seed_offset)
        injection.attach()
        injections.append(injection)

    attended = attend(
        spec.target, spec.arguments, is_module=spec.is_module, every=EVERY, parent=Path(spec.folder), also=inject
    )
    document = {
        "status": attended.outcome.status,
        "error": attended.outcome.message or str(attended.recording.run.get("failure", "")),
        "record": str(attended.folder or ""),
        "applied": [name for injection in injections for name in injection.applied],
        "refused": [text for injection in injections for text in injection.refused],
    }
    spec.result.write_text(json.dumps(document))
    return attended.outcome.status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
