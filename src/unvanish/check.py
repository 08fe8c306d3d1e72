"""Look at a model before it trains: one forward and one backward pass on one batch."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .diagnose import DEFAULT_RULES, Rule, diagnose
from .errors import OptionError
from .records import Finding, Findings, Recording, Trace
from .untouched import untouched
from .watch import Watch

FAINT = -13.3  # log2 of 1e-4: the share of the output's gradient that reaches a layer, as in the diagnosis
LOUD = 10.0  # log2 of 1,000
EXAMPLES = 32
_TARGETS = ("target", "targets", "label", "labels", "y")
_SIDES = (32, 28, 64, 224)  # of images, in the order they are tried

LossFn = Callable[[Any, Any], Tensor]


def flow_at_start(trace: Trace) -> Iterator[Finding]:
    """The gradient shrinks or grows by orders of magnitude between the output and a layer, before any step."""
    if len(trace.steps) != 1:
        return
    flow = trace.measures["log2_flow"][0]
    layers = [i for i, layer in enumerate(trace.layers) if layer.is_trainable and math.isfinite(flow[i])]
    # from the input on without a gap: a side branch, such as the queries of attention, may start faint
    faint = list(takewhile(lambda i: flow[i] < FAINT, layers))
    loud = list(takewhile(lambda i: flow[i] > LOUD, layers))
    for illness, places, limit, tries in (
        ("vanishing-gradient", faint, "less than 1e-4", ("he-init", "batch-norm")),
        ("exploding-gradient", loud, "more than 1,000 times", ("xavier-init",)),
    ):
        if places:
            worst = max(places, key=lambda i: abs(flow[i]))
            yield Finding(
                illness,
                "warning",
                f"{len(places)} of {len(layers)} layers get {limit} of the gradient at the output; "
                f"{trace.layers[worst].name!r} gets 2**{flow[worst]:.0f} of it, before the first step.",
                "Glorot & Bengio 2010, section 4.2; threshold: AutoTrainer 2021",
                layer=trace.layers[worst].name,
                layers=tuple(trace.layers[i].name for i in places),
                evidence={"log2_flow": float(flow[worst])},
                treatments=tries,
            )


CHECK_RULES: tuple[Rule, ...] = (*DEFAULT_RULES, flow_at_start)


def check(
    model: nn.Module,
    loss_fn: LossFn | None = None,
    batch: Any = None,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    rules: Iterable[Rule] = CHECK_RULES,
) -> Findings:
    """Return what is wrong with a model before it trains.

    One forward and one backward pass are measured. Weights, buffers, gradients, modes and random state are
    afterwards as they were.

    Args:
        model: Is looked at in training mode, unless parts of it are in evaluation mode.
        loss_fn: Called as ``loss_fn(output, target)``; None where the model returns its loss, alone, in a
            tuple, or as ``.loss``. Without any loss the gradients are those of a random projection.
        batch: ``(inputs, target)``, the inputs alone, or a dict; None makes a guess from the first layer.
        optimizer: Says which parameters it holds; takes no step.
        rules: Each takes a `Trace` and yields findings.

    Raises:
        OptionError: if an argument has the wrong form, or no batch can be guessed.

    Example:
        >>> torch.manual_seed(0) and None
        >>> deep = nn.Sequential(*[m for _ in range(12) for m in (nn.Linear(16, 16), nn.Sigmoid())])
        >>> check(deep, nn.MSELoss(), (torch.randn(8, 16), torch.rand(8, 16)))[0].illness
        'vanishing-gradient'
    """
    _refuse_wrong_forms(model, loss_fn, optimizer)
    if any(map(is_lazy, model.parameters())):
        model = _made_real(model, loss_fn, batch)
    others = [loss_fn] if isinstance(loss_fn, nn.Module) else []
    with untouched(model, *others), torch.enable_grad():
        if not any(module.training for module in model.modules()):
            model.train()
        pass_ = _Pass(model, loss_fn, batch)
        recording = pass_.recording(optimizer)
    findings = diagnose(recording, rules=rules)
    verdict = "clean" if findings.verdict == "inconclusive" else findings.verdict
    return replace(findings, verdict=verdict, notes=(*pass_.notes, *findings.notes))


def _made_real(model: nn.Module, loss_fn: LossFn | None, batch: Any) -> nn.Module:
    """Return a copy with all its weights: a lazy layer cannot become lazy again, so it must not see the batch."""
    model = copy.deepcopy(model)
    with torch.random.fork_rng(devices=()), torch.no_grad():
        _Pass(model, loss_fn, batch).forward()
    return model


def _refuse_wrong_forms(model: Any, loss_fn: Any, optimizer: Any) -> None:
    if not isinstance(model, nn.Module) or next(model.parameters(), None) is None:
        found = type(model).__name__ + (" without parameters" if isinstance(model, nn.Module) else "")
        raise OptionError(
            f"check(): model: found {found}, expected a torch.nn.Module with parameters. "
            "Call check(model, loss_fn, (inputs, target))."
        )
    if loss_fn is not None and not callable(loss_fn):
        raise OptionError(
            f"check(): loss_fn: found {type(loss_fn).__name__}, expected a function of (output, target). "
            "Call check(model, loss_fn, (inputs, target))."
        )
    if optimizer is not None and not hasattr(optimizer, "param_groups"):
        raise OptionError(
            f"check(): optimizer: found {type(optimizer).__name__}, expected a torch.optim.Optimizer or None."
        )


class _NoStep(torch.optim.Optimizer):
    """Takes no step: it only tells the watch that one could be taken now."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Leave everything as it is."""


class _Pass:
    """One forward and one backward pass under watch."""

    def __init__(self, model: nn.Module, loss_fn: LossFn | None, batch: Any) -> None:
        self.model, self.loss_fn = model, loss_fn
        self.notes: list[str] = []
        self.has_loss = True
        if batch is None:
            self.inputs, self.target, self.has_target = self._guess(), None, False
        else:
            self.inputs, self.target, self.has_target = _split(batch, has_loss_fn=loss_fn is not None)
        if loss_fn is not None and not self.has_target:
            raise OptionError(
                "check(): batch: found inputs without a target, expected (inputs, target), because loss_fn "
                "compares the two. Call check(model, loss_fn, (inputs, target)), or leave loss_fn out."
            )

    def recording(self, optimizer: torch.optim.Optimizer | None) -> Recording:
        """Return what one pass leaves, without what only a step could show."""
        groups = [{"params": list(self.model.parameters())}] if optimizer is None else optimizer.param_groups
        silent = _NoStep([dict(group) for group in groups])
        watch = Watch([self.model], [silent], every=1)
        watch.attach()
        try:
            loss = self._loss()
            if loss.requires_grad:
                loss.backward()  # type: ignore[no-untyped-call]
            else:
                self.notes.append("The loss depends on no trainable parameter: there is no gradient to look at.")
            silent.step()
        finally:
            watch.close()
        recording = watch.recording()
        name = "no optimizer" if optimizer is None else type(optimizer).__name__
        traces = tuple(self._before_training(trace, name) for trace in recording.traces)
        return Recording({**recording.run, "kind": "check", "script": type(self.model).__name__, "steps": 0}, traces)

    def _before_training(self, trace: Trace, name: str) -> Trace:
        """Blank what only a step could show."""
        nothing = np.full_like(trace.measures["update_ratio"], np.nan)
        measures = {**trace.measures, "update_ratio": nothing, "alignment": nothing}
        facts = {**trace.facts, "optimizer": name}
        paths = trace.loss_paths if self.has_loss else ()
        return replace(trace, name=name, measures=measures, facts=facts, loss_paths=paths, total_steps=0)

    def _loss(self) -> Tensor:
        output = self.forward()
        if self.loss_fn is not None:
            return self.loss_fn(output, self.target)
        loss = _loss_in(output)
        if loss is not None:
            return loss
        self.has_loss = False
        self.notes.append("No loss was given: the gradients are those of a random projection of the output.")
        values = [value for value in _tensors(output) if value.is_floating_point()]
        if not values:
            raise OptionError(
                f"check(): the model returned {type(output).__name__} without a floating-point tensor, expected "
                "one. Call check(model, loss_fn, (inputs, target))."
            )
        return torch.stack([(value.float() * torch.randn_like(value.float())).mean() for value in values]).sum()

    def forward(self) -> Any:
        """Return what the model makes of the batch."""
        inputs = self.inputs
        if isinstance(inputs, Mapping):
            return self.model(**inputs)
        arguments = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
        if self.loss_fn is None and self.has_target and _takes_target(self.model, len(arguments)):
            arguments = (*arguments, self.target)
        return self.model(*arguments)

    def _guess(self) -> Any:
        """Return inputs that the first layer would take and that pass through the whole model."""
        for inputs, words in _guesses(self.model):
            try:
                with torch.no_grad():
                    self.model(inputs)
            except Exception:
                continue
            self.notes.append(f"No batch was given: {words} were used, a guess from the first layer.")
            return inputs
        raise OptionError(
            f"check(): batch: found None, and no guess for {type(self.model).__name__} passes through the model. "
            "Call check(model, loss_fn, (inputs, target))."
        )


def _split(batch: Any, *, has_loss_fn: bool) -> tuple[Any, Any, bool]:
    """Return inputs, target, and whether there is a target."""
    if isinstance(batch, Mapping):
        key = next((name for name in _TARGETS if name in batch), None)
        if key is None or not has_loss_fn:
            return batch, None, False
        rest = {name: value for name, value in batch.items() if name != key}
        only = next(iter(rest.values()), None) if len(rest) == 1 else None
        is_positional = only is not None and next(iter(rest)) in ("x", "input", "inputs")
        return (only if is_positional else rest), batch[key], True
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0], batch[1], True
    if isinstance(batch, Tensor):
        return batch, None, False
    found = f"{type(batch).__name__} of {len(batch)}" if isinstance(batch, (tuple, list)) else type(batch).__name__
    raise OptionError(
        f"check(): batch: found {found}, expected (inputs, target), a tensor of inputs, or a dict. "
        "Several inputs go into a tuple: check(model, loss_fn, ((first, second), target))."
    )


def _takes_target(model: nn.Module, count: int) -> bool:
    """Say whether the parameter after ``count`` inputs of ``forward`` is a target, or must be given."""
    parameters = list(inspect.signature(model.forward).parameters.values())
    if len(parameters) <= count or parameters[count].kind not in (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
    ):
        return False
    return parameters[count].name in _TARGETS or parameters[count].default is inspect.Parameter.empty


def _loss_in(output: Any) -> Tensor | None:
    """Return the loss that a model handed out by itself: alone, as ``.loss``, by key, or in a tuple."""
    candidates = [output, getattr(output, "loss", None)]
    if isinstance(output, Mapping):
        candidates.append(output.get("loss"))
    elif isinstance(output, (tuple, list)):
        candidates.extend(output)
    for value in candidates:
        if isinstance(value, Tensor) and value.numel() == 1 and value.is_floating_point():
            return value.reshape(())
    return None


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    items = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    return [tensor for item in items for tensor in _tensors(item)]


def _guesses(model: nn.Module) -> Iterator[tuple[Tensor, str]]:
    """Yield inputs that would fit the first layer, and what they are in words."""
    parameter = next(model.parameters())
    options: dict[str, Any] = {"device": parameter.device}
    if parameter.is_floating_point():
        options["dtype"] = parameter.dtype
    for module in model.modules():
        if any(map(is_lazy, module.parameters(recurse=False))):
            return
        if isinstance(module, nn.Embedding):
            ids = torch.randint(module.num_embeddings, (EXAMPLES, 16), device=parameter.device)
            yield ids, f"{EXAMPLES} random sequences of 16 ids"
        elif isinstance(module, nn.modules.conv._ConvNd):
            dims = len(module.kernel_size)
            for side in (128,) if dims == 1 else _SIDES if dims == 2 else (16, 32):
                shape = (EXAMPLES, module.in_channels, *[side] * dims)
                yield torch.randn(shape, **options), "random inputs of shape " + " x ".join(map(str, shape))
        elif isinstance(module, (nn.Linear, nn.RNNBase)):
            width = module.in_features if isinstance(module, nn.Linear) else module.input_size
            shape = (EXAMPLES, width) if isinstance(module, nn.Linear) else (16, EXAMPLES, width)
            yield torch.randn(shape, **options), "random inputs of shape " + " x ".join(map(str, shape))
        else:
            continue
        return
