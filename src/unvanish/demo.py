"""A network that does not learn, and what becomes of it: on real data that ships with scikit-learn."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from rich.text import Text
from torch import Tensor, nn

from .diagnose import diagnose
from .errors import TargetError
from .output import Output, nearby
from .records import Findings, Recording
from .report import RunView, compare_text, report_text
from .session import watch

EPOCHS = 15


class Digits(NamedTuple):
    """Handwritten digits: 1,400 to learn from, 397 to test with."""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor


class Result(NamedTuple):
    """One watched training."""

    name: str
    recording: Recording
    findings: Findings
    accuracy: float
    folder: Path | None


def load_digits() -> Digits:
    """Return the digits, 8 x 8 pixels between 0 and 1.

    Raises:
        TargetError: if scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise TargetError(
            "demo: found no scikit-learn, expected it for its handwritten digits. "
            "Install it: pip install 'unvanish[demo]'"
        ) from error
    data = load()
    x = torch.tensor(data.data / 16, dtype=torch.float32)
    y = torch.tensor(data.target)
    return Digits(x[:1400], y[:1400], x[1400:], y[1400:])


def sigmoid_network() -> nn.Sequential:
    """Return twelve sigmoid layers, as one may write them."""
    layers: list[nn.Module] = []
    width = 64
    for _ in range(12):
        layers += [nn.Linear(width, 48), nn.Sigmoid()]
        width = 48
    return nn.Sequential(*layers, nn.Linear(width, 10))


def relu_network() -> nn.Sequential:
    """Return the same network after the remedy: ReLU, and He's initialisation."""
    layers: list[nn.Module] = []
    width = 64
    for _ in range(12):
        linear = nn.Linear(width, 48)
        nn.init.kaiming_normal_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.ReLU()]
        width = 48
    return nn.Sequential(*layers, nn.Linear(width, 10))


def train(
    name: str, network: Callable[[], nn.Sequential], digits: Digits, folder: Path | None, output: Output
) -> Result:
    """Train in the plain way, under watch; the test accuracy is measured at the end."""
    torch.manual_seed(0)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    loss_fn = nn.CrossEntropyLoss()

    with watch(model, optimizer, folder=folder) as run:
        for epoch in range(EPOCHS):
            for chosen in torch.split(torch.randperm(len(digits.x_train)), 32):
                loss = loss_fn(model(digits.x_train[chosen]), digits.y_train[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            _progress(output, name, epoch + 1, loss.item())

    with torch.no_grad():
        answers = model(digits.x_test).argmax(1)
    accuracy = (answers == digits.y_test).float().mean().item()
    recording = run.recording()
    named = Recording({**recording.run, "script": f"demo: {name}"}, recording.traces)
    return Result(name, named, diagnose(named), accuracy, run.folder)


def demonstrate(output: Output, folder: Path | None) -> None:
    """Train the sick network and the remedied one, and show what the watch says of both.

    Args:
        output: Where the reports go.
        folder: The records are kept in new folders of this one; None keeps none.
    """
    digits = load_digits()
    output.say("Training a 12-layer sigmoid network on handwritten digits, under watch ...")
    sick = train("sigmoid", sigmoid_network, digits, folder, output)
    ink = output.ink()
    if not output.quiet:
        output.stream.write(report_text(sick.findings, ink, sick.recording) + "\n")
        output.stream.flush()
    output.say("Training it again after the first remedy: ReLU and He's initialisation ...")
    well = train("relu-he", relu_network, digits, folder, output)
    if not output.quiet:
        runs = [RunView(r.name, r.recording, r.findings, {"accuracy": f"{r.accuracy:.0%}"}) for r in (sick, well)]
        output.stream.write(compare_text(runs, ink) + "\n")
    output.stream.write(ink.render(_verdict(sick, well)))
    output.stream.flush()
    for result in (sick, well):
        if result.folder is not None:
            output.say(f"record: {nearby(result.folder)}")


def _verdict(sick: Result, well: Result) -> Text:
    """Say in one line what was wrong and whether the remedy helped."""
    found = ", ".join(finding.illness for finding in sick.findings.at_least("warning")) or "nothing"
    left = ", ".join(finding.illness for finding in well.findings.at_least("warning")) or "nothing"
    has_helped = well.accuracy > sick.accuracy + 0.1
    words = f"test accuracy {sick.accuracy:.0%} → {well.accuracy:.0%}; found before: {found}; after: {left}"
    return Text(f"{'✔' if has_helped else '✖'} {words}", style="bold green" if has_helped else "bold red")


def _progress(output: Output, name: str, epoch: int, loss: float) -> None:
    """Show the epochs, on one line of a terminal and not at all elsewhere."""
    if sys.stderr.isatty() and not output.quiet:
        end = "\n" if epoch == EPOCHS else ""
        print(f"\r{name}: epoch {epoch} of {EPOCHS}, loss {loss:.4f} ", end=end, file=sys.stderr, flush=True)
