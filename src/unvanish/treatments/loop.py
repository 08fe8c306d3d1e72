"""Mend what a training loop forgot: clear gradients, train all layers, fit outputs to the loss."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..diagnose.loss_graph import REGRESSION
from ..errors import TreatmentError
from ..graph import key, prediction_and_target, walk
from ..layers import looks_fresh, own_parameters
from ..records import Change
from .treatment import Patient, Steps, Treatment, group_of, owned_by_optimizer


def zero_grad() -> Treatment:
    """Clear the gradients after each step."""

    def apply(patient: Patient) -> Steps:
        def after(owner: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            owner.zero_grad(set_to_none=True)

        handles = [o.register_step_post_hook(after) for o in patient.need_optimizer("zero-grad")]
        try:
            yield Change("zero-grad", "gradients are cleared after each step", preserves_function=True)
        finally:
            for handle in handles:
                handle.remove()

    return Treatment(
        "zero-grad", apply, preserves_function=True, code="optimizer.zero_grad()  # before loss.backward()"
    )


def unfreeze() -> Treatment:
    """Train the layers whose gradients are off although their weights were never learnt."""

    def apply(patient: Patient) -> Steps:
        frozen = [
            (name, p)
            for name, module in patient.model.named_modules()
            if looks_fresh(module)
            for _, p in own_parameters(module)
            if not p.requires_grad and p.is_floating_point()
        ]
        if not frozen:
            raise TreatmentError(
                "treat(): 'unfreeze': found no frozen layer that was never learnt. Nothing was changed."
            )
        parameters = [p for _, p in frozen]
        with owned_by_optimizer(parameters, patient.need_optimizer("unfreeze")):
            for parameter in parameters:
                parameter.requires_grad_(True)
            try:
                names = tuple(dict.fromkeys(name for name, _ in frozen))
                yield Change("unfreeze", f"{len(parameters)} tensors are trained", names, preserves_function=True)
            finally:
                for parameter in parameters:
                    parameter.requires_grad_(False)
                    parameter.grad = None

    return Treatment(
        "unfreeze", apply, preserves_function=True,
        code="for p in model.parameters():\n    p.requires_grad = True  # and give all of them to the optimizer",
    )  # fmt: skip


def add_to_optimizer() -> Treatment:
    """Give the optimiser every layer that runs and gets a gradient, also those that no model lists.

    Modules in a plain list are found while the model runs, so this acts from the second call on.
    """

    def apply(patient: Patient) -> Steps:
        optimizers = patient.need_optimizer("add-to-optimizer")
        met: dict[int, nn.Parameter] = {}
        with ExitStack() as stack:

            def see(module: nn.Module, args: Any) -> None:
                for _, parameter in own_parameters(module):
                    if parameter.requires_grad and torch.is_grad_enabled() and id(parameter) not in met:
                        met[id(parameter)] = parameter
                        if group_of(optimizers, parameter) is None:
                            stack.enter_context(owned_by_optimizer([parameter], optimizers))

            handle = nn.modules.module.register_module_forward_pre_hook(see)
            try:
                for module in patient.model.modules():
                    see(module, ())
                yield Change("add-to-optimizer", "every layer that gets a gradient is trained", preserves_function=True)
            finally:
                handle.remove()

    return Treatment(
        "add-to-optimizer", apply, preserves_function=True,
        code="# keep layers in nn.ModuleList / nn.ModuleDict, and build the optimizer from all parameters, last",
    )  # fmt: skip


class _LastSquash(TorchFunctionMode):
    """Remembers what the last softmax or sigmoid took."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: tuple[Tensor, Tensor] | None = None  # input, output

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in ("softmax", "sigmoid", "sigmoid_", "log_softmax", "tanh") and args and isinstance(args[0], Tensor):
            self.taken = (args[0], result)
        return result


def _around_forward(model: nn.Module, before: Callable[[], Any], after: Callable[[Any, Any], Any]) -> list[Any]:
    """Run ``before`` as the model is called and let ``after`` change its output; nested calls are left alone."""
    stack: list[Any] = []

    def enter(module: nn.Module, args: Any) -> None:
        stack.append(before())

    def leave(module: nn.Module, args: Any, output: Any) -> Any:
        return after(stack.pop(), output)

    return [model.register_forward_pre_hook(enter), model.register_forward_hook(leave, always_call=True)]


def logits_loss() -> Treatment:
    """Give the loss what stands before the network's last softmax, sigmoid or tanh.

    Predictions of a classifier stay as they are: squashed. In regression the network is fitted by what the loss gets,
    so predictions are that too, and the squash is gone also where gradients are off. Which of both it is, a fact
    ``is_regression`` says, or the first loss that is computed from the raw output (mse, l1, huber, or a difference
    that is squared by hand); until then, and with a loss of an unknown kind, predictions are squashed.

    A squash that the network does not end in (the output is scaled afterwards) is left. `torch.nn.BCELoss` takes
    probabilities and refuses logits: with it nothing is to be cured.

    Example:
        >>> import unvanish
        >>> model = nn.Sequential(nn.Linear(1, 1), nn.Sigmoid())
        >>> x, y = torch.ones(4, 1), torch.full((4, 1), 5.0)
        >>> with unvanish.treat(model, None, "logits-loss"):
        ...     nn.functional.mse_loss(model(x), y).backward()
        ...     with torch.no_grad():
        ...         print(torch.equal(model(x), model[0](x)))
        True
    """

    def apply(patient: Patient) -> Steps:
        kind = _KindOfLoss(is_regression=bool(patient.facts.get("is_regression")))

        def before() -> _LastSquash:
            mode = _LastSquash()
            mode.__enter__()  # type: ignore[no-untyped-call]
            return mode

        def after(mode: _LastSquash, output: Any) -> Any:
            mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            if mode.taken is None or output is not mode.taken[1]:
                return output
            raw = mode.taken[0]
            if torch.is_grad_enabled():
                kind.expect(raw)
                return raw
            return raw if kind.is_regression else output

        handles = _around_forward(patient.model, before, after)
        try:
            yield Change("logits-loss", "the loss gets what stands before the last squash")
        finally:
            kind.stop()
            for handle in handles:
                handle.remove()

    return Treatment(
        "logits-loss", apply,
        code="# return the logits from forward(); apply softmax or sigmoid only where you need probabilities",
    )  # fmt: skip


_MAX_RAW = 1000  # outputs that are kept in mind until one is trained on


class _KindOfLoss:
    """Reads once, at the first backward pass from a raw output, whether the loss is one of regression.

    The forward pass cannot know what its output is for; only the graph of the loss says it, and only `backward` is
    given the loss. So that function is wrapped for this one call.
    """

    def __init__(self, *, is_regression: bool) -> None:
        self.is_regression = is_regression
        self._is_settled = is_regression
        self._raw: deque[int] = deque(maxlen=_MAX_RAW)  # keys of the nodes that made raw outputs
        self._undo: Callable[[], None] | None = None

    def expect(self, raw: Tensor) -> None:
        """Look out for a loss that is computed from ``raw``."""
        if self._is_settled or raw.grad_fn is None:
            return
        self._raw.append(key(raw.grad_fn))
        if self._undo is None:
            self._wrap()

    def stop(self) -> None:
        """Stop looking, and take the wrapper off."""
        self._is_settled = True
        if self._undo is not None:
            self._undo()

    def _wrap(self) -> None:
        original = torch.autograd.backward

        @functools.wraps(original)
        def backward(tensors: Any, *args: Any, **kwargs: Any) -> Any:
            if not self._is_settled:
                self._read(tensors)
            return original(tensors, *args, **kwargs)

        def undo() -> None:
            if torch.autograd.backward is backward:  # else someone wrapped it later; ours only passes on by then
                torch.autograd.backward = original

        self._undo = undo
        torch.autograd.backward = backward

    def _read(self, tensors: Any) -> None:
        for tensor in (tensors,) if isinstance(tensors, Tensor) else tensors:
            nodes = [] if tensor.grad_fn is None else walk(tensor.grad_fn)[0]
            if not {key(node) for node in nodes}.isdisjoint(self._raw):
                self.is_regression = prediction_and_target(nodes, ())[2] in REGRESSION
                self.stop()
                return


def match_target_shape() -> Treatment:
    """Drop the last dimension of a single output while training, so that it meets targets of shape (batch,)."""

    def apply(patient: Patient) -> Steps:
        def after(_: None, output: Any) -> Any:
            is_column = isinstance(output, Tensor) and output.dim() == 2 and output.shape[1] == 1
            return output.squeeze(1) if is_column and torch.is_grad_enabled() else output

        handles = _around_forward(patient.model, lambda: None, after)
        try:
            yield Change("match-target-shape", "a column of predictions becomes a vector while training")
        finally:
            for handle in handles:
                handle.remove()

    return Treatment("match-target-shape", apply, code="pred = model(x).squeeze(1)  # the shape of the targets")


SETTLED = 50  # batches after which the input statistics stay as they are


def standardise_inputs() -> Treatment:
    """Subtract the mean and divide by the spread of each feature, as seen in the first batches of training.

    Source: LeCun et al. 1998, Efficient BackProp, section 4.3.
    """

    def apply(patient: Patient) -> Steps:
        state: dict[str, Any] = {"count": 0, "batches": 0}

        def before(module: nn.Module, args: Any) -> Any:
            if not args or not isinstance(args[0], Tensor) or not args[0].is_floating_point() or args[0].dim() < 2:
                return None
            x = args[0]
            if torch.is_grad_enabled() and state["batches"] < SETTLED:
                _update(state, x.detach())
            if not state["count"]:
                return None
            spread = (state["square"] / state["count"]).sqrt()
            scaled = (x - state["mean"].to(x)) / torch.where(spread > 0, spread, torch.ones_like(spread)).to(x)
            return (scaled, *args[1:])

        handle = patient.model.register_forward_pre_hook(before)
        try:
            yield Change("standardise-inputs", "each input feature has mean 0 and spread 1")
        finally:
            handle.remove()

    return Treatment("standardise-inputs", apply, code="x = (x - x_train.mean(0)) / x_train.std(0)")


def _update(state: dict[str, Any], x: Tensor) -> None:
    """Pool mean and squared deviations over batches (Chan, Golub & LeVeque 1983), in float64 on the host."""
    unit_dim = 1 if x.dim() == 4 else x.dim() - 1
    flat = x.double().movedim(unit_dim, -1).reshape(-1, x.shape[unit_dim])
    count, mean = flat.shape[0], flat.mean(0)
    square = ((flat - mean) ** 2).sum(0)
    shape = [1] * x.dim()
    shape[unit_dim] = -1
    mean, square = mean.view(shape), square.view(shape)
    if state["count"]:
        total = state["count"] + count
        delta = mean - state["mean"]
        square = state["square"] + square + delta**2 * state["count"] * count / total
        mean = state["mean"] + delta * count / total
        count = total
    state.update(count=count, mean=mean, square=square, batches=state["batches"] + 1)


def standardise_targets(mean: float | None = None, std: float | None = None) -> Treatment:
    """Let the network learn targets of mean 0 and spread 1, while its outputs keep the user's units.

    The output becomes ``raw * std + mean``; the gradient is divided by ``std**2``, so that the raw network sees that
    of the squared error of standardised targets.

    Source: LeCun et al. 1998, Efficient BackProp, section 4.5.
    """

    def apply(patient: Patient) -> Steps:
        centre = patient.facts.get("target_mean") if mean is None else mean
        spread = patient.facts.get("target_std") if std is None else std
        if centre is None or not spread or spread <= 0:
            raise TreatmentError(
                "treat(): 'standardise-targets': found no mean and spread of the targets, expected both. Nothing was "
                "changed. Call treat(model, optimizer, standardise_targets(y.mean(), y.std()))."
            )

        def after(_: None, output: Any) -> Any:
            if not isinstance(output, Tensor) or not output.is_floating_point():
                return output
            scaled = output * spread + centre
            if scaled.requires_grad:
                scaled.register_hook(lambda grad: grad / spread**2)  # type: ignore[no-untyped-call]
            return scaled

        handles = _around_forward(patient.model, lambda: None, after)
        try:
            yield Change("standardise-targets", f"the network learns (y - {centre:.4g}) / {spread:.4g}")
        finally:
            for handle in handles:
                handle.remove()

    value = "" if mean is None or std is None else f"{mean:g},{std:g}"
    return Treatment(
        "standardise-targets", apply, value,
        code="y = (y - y_train.mean()) / y_train.std()  # and undo it on predictions",
    )  # fmt: skip
