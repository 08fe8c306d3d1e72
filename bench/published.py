"""Do published facts about training show with the treatments here, at a size that fits one core?

    python bench/published.py [--seeds 5] [--only ID,ID] [--json FILE]

Each experiment trains the same net on the same batches twice a seed: treated, and its control. Only the treatments
differ. `shown` counts the seeds in which the pair shows what was published, by a rule that is the same for all seeds.
Standard output is the table of docs/published.md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import unvanish

Sample = Callable[[torch.Generator], tuple[Tensor, Tensor]]
LEARNT, AT_CHANCE = 0.5, 0.25  # accuracies; chance is 0.1 on digits and 0.25 in four classes


class Outcome(NamedTuple):
    """One training: the number that is compared, and the first finding of its watch ('' if there is none)."""

    value: float
    finding: str


@dataclass(frozen=True)
class Experiment:
    """One published fact, and the pair of trainings that shows it or does not.

    ``run(seed, treatments)`` makes one training. ``shows(treated, control)`` says whether a pair of values is what
    was published.
    """

    id: str
    fact: str
    source: str
    setting: str
    run: Callable[[int, tuple[str, ...]], Outcome]
    shows: Callable[[float, float], bool]
    treated: tuple[str, ...]
    control: tuple[str, ...] = ()
    always: tuple[str, ...] = ()  # applied to both


# Data -------------------------------------------------------------------------------------------------------------


class Digits(NamedTuple):
    """Handwritten digits, the last 397 to test with."""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor


@cache
def digits() -> Digits:
    """Return scikit-learn's digits with mean 0 and variance 1 over all training pixels."""
    data = load_digits()
    x, y = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
    x = (x - x[:1400].mean()) / x[:1400].std()
    return Digits(x[:1400], y[:1400], x[1400:], y[1400:])


def some_digits(count: int) -> Sample:
    """Return a sampler of training digits, with replacement."""

    def sample(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(digits().x_train), (count,), generator=generator)
        return digits().x_train[rows], digits().y_train[rows]

    return sample


def temporal_order(count: int, length: int) -> Sample:
    """Return a sampler of the temporal order problem of Pascanu et al. 2013, section 4.1.1.

    Two of the symbols A and B stand among distractors; the class is which two, and in which order.
    """

    def sample(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        def draw(low: int, high: int, *shape: int) -> Tensor:
            return torch.randint(low, high, shape or (count,), generator=generator)

        symbols, rows = draw(2, 6, count, length), torch.arange(count)
        first, second = draw(0, 2), draw(0, 2)
        symbols[rows, draw(length // 10, length // 5)] = first
        symbols[rows, draw(length // 2, length * 6 // 10)] = second
        return F.one_hot(symbols, 6).float(), 2 * first + second

    return sample


# Nets -------------------------------------------------------------------------------------------------------------


class Maxout(nn.Module):
    """The larger of each two neighbours."""

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, 2)).amax(-1)


def perceptron(layers: int, width: int, activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    """Return a net of so many linear layers, the last one included."""
    pieces = 2 if activation is Maxout else 1
    inner = [
        module
        for a, b in pairwise([64, *[width] * (layers - 1)])
        for module in (nn.Linear(a, pieces * b), activation())
    ]
    return nn.Sequential(*inner, nn.Linear(width, 10))


def standard_sigmoid(layers: int, width: int) -> nn.Sequential:
    """Return a sigmoid net that starts as in Glorot & Bengio 2010, equation 1: uniform weights, biases 0."""
    model = perceptron(layers, width, nn.Sigmoid)
    for module in model:
        if isinstance(module, nn.Linear):
            bound = 1 / math.sqrt(module.in_features)
            nn.init.uniform_(module.weight, -bound, bound)
            nn.init.zeros_(module.bias)
    return model


class Recurrent(nn.Module):
    """A plain tanh net that reads symbols and answers at the end; its recurrent matrix has spectral radius 0.95."""

    def __init__(self, width: int = 50) -> None:
        super().__init__()
        self.rnn, self.head = nn.RNN(6, width, batch_first=True), nn.Linear(width, 4)
        with torch.no_grad():
            recurrent = self.rnn.weight_hh_l0.normal_()
            recurrent.mul_(0.95 / torch.linalg.eigvals(recurrent).abs().max())
            self.rnn.weight_ih_l0.normal_(std=0.1)
            self.rnn.bias_ih_l0.zero_()
            self.rnn.bias_hh_l0.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


def with_biases(value: float, layers: int) -> nn.Sequential:
    """Return a ReLU net after He's initialisation whose hidden biases have one value."""
    model = perceptron(layers, 64)
    with unvanish.treat(model, None, "he-init") as changes:
        changes.keep()
    for module in list(model)[:-1]:
        if isinstance(module, nn.Linear):
            nn.init.constant_(module.bias, value)
    return model


def after_large_steps(rate: float, steps: int, then: int = 0) -> nn.Sequential:
    """Return a ReLU net after He's initialisation, a few steps of far too high a rate, and then some at 0.1."""
    model = perceptron(3, 64)
    with unvanish.treat(model, None, "he-init") as changes:
        changes.keep()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    generator = torch.Generator().manual_seed(0)
    descend(model, optimizer, some_digits(64), steps, generator)
    optimizer.param_groups[0]["lr"] = 0.1
    descend(model, optimizer, some_digits(64), then, generator)
    return model


# Measures ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def accuracy(model: nn.Module, held_out: tuple[Tensor, Tensor] | None = None) -> float:
    """Return the share of right answers on what was not trained on; 0 if the weights are not finite."""
    if not all(bool(parameter.isfinite().all()) for parameter in model.parameters()):
        return 0.0
    x, y = held_out or (digits().x_test, digits().y_test)
    model.eval()
    share = (model(x).argmax(1) == y).float().mean().item()
    model.train()
    return share


@torch.no_grad()
def top_activation(model: nn.Sequential) -> float:
    """Return where the last hidden layer's mean activation lies between the ends of its range, 0 and 1."""
    outputs: list[Tensor] = []
    handle = model[-2].register_forward_hook(lambda module, args, output: outputs.append(output))
    model(digits().x_test)
    handle.remove()
    is_symmetric = bool((outputs[0] < 0).any())  # tanh, not sigmoid
    mean = outputs[0].mean().item()
    return (mean + 1) / 2 if is_symmetric else mean


@torch.no_grad()
def variance_error(model: nn.Sequential) -> float:
    """Return how far the variance of a linear layer's output is from 1, at most, on the first 256 digits."""
    x, worst = digits().x_train[:256], 0.0
    for module in model:
        x = module(x)
        if isinstance(module, nn.Linear):
            worst = max(worst, abs(x.var().item() - 1))
    return worst


# Trainings --------------------------------------------------------------------------------------------------------


def descend(
    model: nn.Module, optimizer: torch.optim.Optimizer, sample: Sample, steps: int, generator: torch.Generator
) -> None:
    """Train in the plain way."""
    for _ in range(steps):
        inputs, classes = sample(generator)
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), classes).backward()
        optimizer.step()


def train(
    seed: int,
    treatments: tuple[str, ...],
    *,
    net: Callable[[], Any],
    rate: float,
    steps: int,
    sample: Sample | None = None,
    measure: Callable[[Any], float] = accuracy,
) -> Outcome:
    """Train with plain SGD under watch; initial weights and batches depend on the seed only."""
    torch.manual_seed(seed)
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    generator = torch.Generator().manual_seed(seed)
    inputs = (digits().x_train[:256],)
    with unvanish.treat(model, optimizer, *treatments, inputs=inputs):
        with unvanish.watch(model, optimizer, folder=None) as run:
            descend(model, optimizer, sample or some_digits(64), steps, generator)
        findings = [finding.illness for finding in run.diagnose() if finding.severity != "info"] if steps else []
        return Outcome(measure(model), findings[0] if findings else "")


def steps_to_learn(
    seed: int, treatments: tuple[str, ...], *, net: Callable[[], Any], rate: float, limit: int
) -> Outcome:
    """Train as `train` does until half of the answers are right, looking every 100 steps."""
    torch.manual_seed(seed)
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    generator = torch.Generator().manual_seed(seed)
    steps = 0
    with unvanish.treat(model, optimizer, *treatments):
        while steps < limit and accuracy(model) < LEARNT:
            descend(model, optimizer, some_digits(64), 100, generator)
            steps += 100
    return Outcome(steps, "")


def order(seed: int, treatments: tuple[str, ...], *, length: int, rate: float) -> Outcome:
    """Train a recurrent net on the temporal order problem."""
    held_out = temporal_order(1000, length)(torch.Generator().manual_seed(1000 + seed))
    sample, measure = temporal_order(20, length), partial(accuracy, held_out=held_out)
    return train(seed, treatments, net=Recurrent, rate=rate, steps=2000, sample=sample, measure=measure)


def learns_only_treated(treated: float, control: float) -> bool:
    return treated >= LEARNT and control <= AT_CHANCE


def learns_only_clipped(treated: float, control: float) -> bool:
    return treated >= 0.99 and control < 0.9  # the paper counts a run as solved at 99 %


# The facts --------------------------------------------------------------------------------------------------------

HE = "He et al. 2015, section 2.2"
GLOROT = "Glorot & Bengio 2010, section 3.1"
IOFFE = "Ioffe & Szegedy 2015, section 4.2"
MISHKIN = "Mishkin & Matas 2016, abstract"

EXPERIMENTS = (
    Experiment(
        "he-30",
        "A ReLU net of 30 layers learns with He's initialisation and stalls with Xavier's",
        HE,
        "30 layers of 64, rate 0.01, 800 steps; accuracy",
        partial(train, net=partial(perceptron, 30, 64), rate=0.01, steps=800),
        learns_only_treated,
        ("he-init",),
        ("xavier-init",),
    ),
    Experiment(
        "he-30-long",
        "Xavier's stalls for good",
        HE,
        "as above, 2500 steps; accuracy",
        partial(train, net=partial(perceptron, 30, 64), rate=0.01, steps=2500),
        learns_only_treated,
        ("he-init",),
        ("xavier-init",),
    ),
    Experiment(
        "he-22",
        "At 22 layers both learn, with He's initialisation sooner",
        HE,
        "22 layers of 64, rate 0.01; steps to accuracy 0.5, at most 4000",
        partial(steps_to_learn, net=partial(perceptron, 22, 64), rate=0.01, limit=4000),
        lambda treated, control: treated < control < 4000,
        ("he-init",),
        ("xavier-init",),
    ),
    Experiment(
        "glorot-top",
        "The last hidden layer of a deep sigmoid net soon saturates at 0; that of a tanh net does not",
        GLOROT,
        "4 hidden layers of 100, rate 0.1, batch 10, 3000 steps; mean activation of the last one, in its range",
        partial(
            train,
            net=partial(standard_sigmoid, 5, 100),
            rate=0.1,
            steps=3000,
            sample=some_digits(10),
            measure=top_activation,
        ),
        lambda treated, control: 0.35 < treated < 0.65 and control < 0.15,
        ("tanh",),
    ),
    Experiment(
        "glorot-learns",
        "Meanwhile the sigmoid net does not learn",
        GLOROT,
        "as above; accuracy",
        partial(train, net=partial(standard_sigmoid, 5, 100), rate=0.1, steps=3000, sample=some_digits(10)),
        learns_only_treated,
        ("tanh",),
    ),
    *(
        Experiment(
            f"pascanu-{length}-{rate}",
            fact,
            "Pascanu et al. 2013, section 4.1.1",
            f"temporal order in {length} symbols, 50 tanh units, rate {rate}, batch 20, 2000 steps; accuracy",
            partial(order, length=length, rate=rate),
            learns_only_clipped,
            ("clip-norm=1.0",),
        )
        for length, rate, fact in (
            (30, 0.1, "With its gradient norm clipped, a plain recurrent net learns what it does not learn without"),
            (20, 0.1, "The same in shorter sequences"),
            (20, 0.03, "The same in shorter sequences, at a lower rate"),
        )
    ),
    Experiment(
        "ioffe-x30",
        "With batch normalisation a net trains at 30 times the rate; the plain net's weights overflow",
        IOFFE,
        "8 ReLU layers of 64, both from He's initialisation, rate 3, 300 steps; accuracy",
        partial(train, net=partial(perceptron, 8, 64), rate=3.0, steps=300),
        lambda treated, control: treated >= LEARNT and control == 0,
        ("batch-norm",),
        always=("he-init",),
    ),
    Experiment(
        "ioffe-x1",
        "At a thirtieth of that rate both train",
        IOFFE,
        "as above, rate 0.1; accuracy",
        partial(train, net=partial(perceptron, 8, 64), rate=0.1, steps=300),
        lambda treated, control: min(treated, control) >= LEARNT,
        ("batch-norm",),
        always=("he-init",),
    ),
    Experiment(
        "ioffe-sigmoid",
        "With batch normalisation a deep sigmoid net trains; without, it stays at chance",
        IOFFE,
        "8 sigmoid layers of 64, both from Xavier's initialisation, rate 1, 300 steps; accuracy",
        partial(train, net=partial(perceptron, 8, 64, nn.Sigmoid), rate=1.0, steps=300),
        learns_only_treated,
        ("batch-norm",),
        always=("xavier-init",),
    ),
    Experiment(
        "lsuv-variance",
        "After LSUV each layer's output has variance 1 on the batch, to a tolerance of 0.1",
        "Mishkin & Matas 2016, algorithm 1",
        "24 maxout layers of 64, not trained; largest distance of a layer's variance from 1",
        partial(train, net=partial(perceptron, 24, 64, Maxout), rate=0.01, steps=0, measure=variance_error),
        lambda treated, control: treated < 0.1 < control,
        ("lsuv-init",),
    ),
    *(
        Experiment(
            f"lsuv-{name.lower()}",
            f"LSUV lets very deep nets learn: {name}",
            MISHKIN,
            f"24 {name} layers of 64, rate 0.01, 400 steps, control as torch starts it; accuracy",
            partial(train, net=partial(perceptron, 24, 64, activation), rate=0.01, steps=400),
            learns_only_treated,
            ("lsuv-init",),
        )
        for name, activation in (("ReLU", nn.ReLU), ("tanh", nn.Tanh), ("maxout", Maxout))
    ),
    *(
        Experiment(
            f"dead-{where}-{name.replace('=', '-')}",
            f"{fact}; {title} brings them back",
            source,
            f"{setting}; accuracy",
            partial(train, net=net, rate=0.1, steps=3000),
            learns_only_treated,
            (name,),
        )
        for where, fact, setting, net in (
            ("one", "The units of a dead ReLU layer stay dead",
             "1 hidden layer of 64, biases -10, rate 0.1, 3000 steps", partial(with_biases, -10.0, 2)),
            ("two", "The units of two dead ReLU layers in a row stay dead",
             "2 hidden layers of 64, biases -5, rate 0.1, 3000 steps", partial(with_biases, -5.0, 3)),
            ("step", "ReLUs killed by two steps of far too high a rate stay dead",
             "2 hidden layers of 64, 2 steps at rate 10, then rate 0.1, 3000 steps",
             partial(after_large_steps, 10.0, 2)),
        )
        for name, title, source in (
            ("leaky-relu", "a leaky ReLU", "Maas et al. 2013, section 2"),
            ("elu", "an ELU", "Clevert et al. 2016, section 3"),
            ("he-init=dead", "a new start of the dead ones alone", "Sokar et al. 2023"),
        )
    ),
    *(
        Experiment(
            f"dead-later-{name.replace('=', '-')}",
            f"Ten steps after such steps {title} brings them back",
            source,
            "2 hidden layers of 64, 2 steps at rate 10, 10 at rate 0.1, then treated, 3000 steps; accuracy",
            partial(train, net=partial(after_large_steps, 10.0, 2, 10), rate=0.1, steps=3000),
            learns_only_treated,
            (name,),
        )
        for name, title, source in (
            ("he-init=dead", "a new start of the dead ones alone", "Sokar et al. 2023"),
            ("he-init", "a new start of all weights", "He et al. 2015, section 2.2"),
        )
    ),
)  # fmt: skip


# The table --------------------------------------------------------------------------------------------------------


def measure(experiment: Experiment, seeds: int) -> dict[str, Any]:
    """Run the pairs of an experiment and return its row."""
    begin = time.perf_counter()
    pairs = [
        tuple(experiment.run(seed, experiment.always + chosen) for chosen in (experiment.treated, experiment.control))
        for seed in range(seeds)
    ]
    treated, control = ([outcome.value for outcome in side] for side in zip(*pairs, strict=True))
    return {
        "id": experiment.id,
        "fact": experiment.fact,
        "source": experiment.source,
        "setting": experiment.setting,
        "treatments": {"both": experiment.always, "treated": experiment.treated, "control": experiment.control},
        "treated": treated,
        "control": control,
        "shown": sum(map(experiment.shows, treated, control)),
        "seeds": seeds,
        "findings": {
            "treated": Counter(outcome.finding for outcome, _ in pairs),
            "control": Counter(outcome.finding for _, outcome in pairs),
        },
        "seconds": round(time.perf_counter() - begin, 1),
    }


def cells(experiment: Experiment) -> list[str]:
    """Return the cells of a row that do not depend on the measurement."""
    return [f"`{experiment.id}`", experiment.fact, experiment.source, experiment.setting]


def line(experiment: Experiment, row: dict[str, Any]) -> str:
    """Return a row of the table in Markdown."""

    def side(name: str, treatments: tuple[str, ...]) -> str:
        values = row[name]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        places = 0 if max(values) > 10 else 2
        label = ", ".join(treatments) or "untreated"
        return f"{label}: {statistics.fmean(values):.{places}f} ± {spread:.{places}f}"

    def found(name: str) -> str:
        counts = Counter({illness: count for illness, count in row["findings"][name].items() if illness})
        return "; ".join(f"{illness} ({count})" for illness, count in counts.most_common()) or "-"

    measured = [side("treated", experiment.treated), side("control", experiment.control)]
    shown = f"{row['shown']} of {row['seeds']}"
    return "| " + " | ".join([*cells(experiment), *measured, shown, found("treated"), found("control")]) + " |"


HEAD = (
    "| id | fact | source | what was run | treated | control | shown | found in treated runs | found in controls |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def circumstances() -> dict[str, Any]:
    """Return what the figures depend on."""
    command, here = ["git", "rev-parse", "HEAD"], Path(__file__).parent
    git = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "unvanish": unvanish.__version__}
    machine = {"system": platform.platform(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    return {"commit": git.stdout.strip(), "machine": machine, "versions": versions}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", default="", metavar="ID,ID")
    parser.add_argument("--json", type=Path, metavar="FILE")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    wanted = set(chosen.only.split(",")) if chosen.only else {experiment.id for experiment in EXPERIMENTS}
    unknown = wanted - {experiment.id for experiment in EXPERIMENTS}
    if chosen.seeds < 1 or unknown:
        parser.error(f"found seeds {chosen.seeds} and ids {sorted(unknown)}, expected at least 1 seed and known ids")
    rows = []
    print(HEAD, flush=True)
    for experiment in EXPERIMENTS:
        if experiment.id in wanted:
            rows.append(measure(experiment, chosen.seeds))
            print(line(experiment, rows[-1]), flush=True)
            print(f"{experiment.id}: {rows[-1]['seconds']:.0f} s", file=sys.stderr)
    if chosen.json:
        chosen.json.write_text(json.dumps({"rows": rows, **circumstances()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
