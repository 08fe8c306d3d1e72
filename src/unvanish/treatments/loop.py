"""Mend what is wrong with a training loop: clear gradients, descend, train all layers, fit outputs to the loss."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import TreatmentError
from ..layers import looks_fresh, own_parameters
from ..records import Change
from .treatment import Patient, Steps, Treatment, around_forward, group_of, owned_by_optimizer


def zero_grad() -> Treatment:
    """Clear the gradients after each step, and at no other time: wherever the loop does it, or does not.

    Example:
        >>> import unvanish
        >>> model = nn.Linear(1, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        >>> before = model.bias.item()
        >>> with unvanish.treat(model, optimizer, "zero-grad"):
        ...     model(torch.ones(1, 1)).sum().backward()
        ...     optimizer.zero_grad()  # too early
        ...     optimizer.step()
        >>> round(before - model.bias.item(), 6)
        1.0
    """

    def apply(patient: Patient) -> Steps:
        optimizers = patient.need_optimizer("zero-grad")
        clear = [type(optimizer).zero_grad for optimizer in optimizers]

        def after(owner: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            clear[optimizers.index(owner)](owner, set_to_none=True)

        original = nn.Module.zero_grad

        def of_others(module: nn.Module, set_to_none: bool = True) -> None:
            if module is not patient.model:
                original(module, set_to_none)

        with ExitStack() as stack:
            for optimizer in optimizers:
                stack.callback(optimizer.register_step_post_hook(after).remove)
                stack.enter_context(_replaced(optimizer, "zero_grad", _nothing))
            # not on the model itself: it would be saved with it
            stack.enter_context(_replaced(nn.Module, "zero_grad", of_others))
            yield Change("zero-grad", "gradients are cleared after each step", preserves_function=True)

    return Treatment(
        "zero-grad", apply, preserves_function=True, code="optimizer.zero_grad()  # before loss.backward()"
    )


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Stand for a method whose calls are to be ignored."""


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Give an object or class another attribute of this name, and put its own back."""
    has_own, own = name in vars(owner), vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if has_own:
            setattr(owner, name, own)
        else:
            delattr(owner, name)


def descend() -> Treatment:
    """Minimise what is maximised: switch off ``maximize`` of the optimisers or, where it is off, negate the loss.

    Raises:
        TreatmentError: on applying it, if there is no optimiser.

    Source: Cauchy 1847 (descent goes against the gradient).

    Example:
        >>> import unvanish
        >>> model = nn.Linear(1, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> x, y = torch.ones(1, 1), torch.zeros(1, 1)
        >>> before = nn.functional.mse_loss(model(x), y).item()
        >>> with unvanish.treat(model, optimizer, "descend"):
        ...     (-nn.functional.mse_loss(model(x), y)).backward()
        ...     optimizer.step()
        >>> nn.functional.mse_loss(model(x), y).item() < before
        True
    """

    def apply(patient: Patient) -> Steps:
        groups = [g for o in patient.need_optimizer("descend") for g in o.param_groups if g.get("maximize")]
        original = torch.autograd.backward
        for group in groups:
            group["maximize"] = False
        if not groups and not hasattr(original, "descends"):  # once, however many models are treated
            torch.autograd.backward = _of_negated(original)
        try:
            yield Change("descend", "the loss is minimised, no longer maximised", preserves_function=True)
        finally:
            torch.autograd.backward = original
            for group in groups:
                group["maximize"] = True

    return Treatment(
        "descend", apply, preserves_function=True,
        code="loss = -loss  # before loss.backward(); or take maximize=True from the optimizer",
    )  # fmt: skip


def _of_negated(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def backward(tensors: Any, *args: Any, **kwargs: Any) -> None:
        is_loss = isinstance(tensors, Tensor) and tensors.numel() == 1
        original(-tensors if is_loss else tensors, *args, **kwargs)

    backward.descends = True  # type: ignore[attr-defined]
    return backward


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


_SQUASHES = frozenset(("softmax", "sigmoid", "sigmoid_", "log_softmax", "tanh", "relu", "relu_"))


class _LastSquash(TorchFunctionMode):
    """Remembers what the last softmax, sigmoid, tanh or ReLU took."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: tuple[Tensor, Tensor] | None = None  # input, output

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in _SQUASHES and args and isinstance(args[0], Tensor):
            self.taken = (args[0], result)
        return result


def of_log_probabilities(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Make `nll_loss` normalise an input whose probabilities do not sum to one over the classes."""

    @functools.wraps(original)
    def nll_loss(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: A002 (the name is torch's)
        classes = 0 if input.dim() == 1 else 1
        total = input.detach().logsumexp(classes)
        if not torch.allclose(total, torch.zeros_like(total), atol=1e-3):
            return original(nn.functional.log_softmax(input, classes), *args, **kwargs)
        return original(input, *args, **kwargs)

    return nll_loss


def logits_loss() -> Treatment:
    """Let the network return what stands before its last softmax, sigmoid, tanh or ReLU: for loss and predictions.

    As when the squash is taken out of ``forward``: ``argmax`` of logits is that of probabilities, a loss "with logits"
    judges held-out data rightly, and a threshold of 0.5 on a probability has to become 0 on a logit.

    A squash that the network does not end in (the output is scaled afterwards) is left. `torch.nn.BCELoss` takes
    probabilities and refuses logits: with it nothing is to be cured. `nll_loss` takes log-probabilities: where its
    input's do not sum to one over the classes, it gets their `log_softmax`.

    Example:
        >>> import unvanish
        >>> model = nn.Sequential(nn.Linear(1, 1), nn.Sigmoid())
        >>> x = torch.ones(4, 1)
        >>> with unvanish.treat(model, None, "logits-loss"):
        ...     print(torch.equal(model(x), model[0](x)))
        True
    """

    def apply(patient: Patient) -> Steps:
        def before() -> _LastSquash:
            mode = _LastSquash()
            mode.__enter__()  # type: ignore[no-untyped-call]
            return mode

        def after(mode: _LastSquash, output: Any) -> Any:
            mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            if mode.taken is None or output is not mode.taken[1]:
                return output
            return mode.taken[0]

        handles = around_forward(patient.model, before, after)
        original, nn.functional.nll_loss = nn.functional.nll_loss, of_log_probabilities(nn.functional.nll_loss)
        try:
            yield Change("logits-loss", "the network returns what stands before its last squash")
        finally:
            nn.functional.nll_loss = original
            for handle in handles:
                handle.remove()

    return Treatment(
        "logits-loss", apply,
        code="# return the logits from forward(); apply softmax or sigmoid only where you need probabilities",
    )  # fmt: skip


def match_target_shape() -> Treatment:
    """Turn a column of predictions into a vector while training, or a vector into a column: what targets are not yet.

    For a loss whose prediction and target were broadcast against each other: one is (batch, 1), the other (batch,).
    """

    def apply(patient: Patient) -> Steps:
        def after(_: None, output: Any) -> Any:
            if not isinstance(output, Tensor) or not torch.is_grad_enabled():
                return output
            if output.dim() == 1:
                return output.unsqueeze(1)
            return output.squeeze(1) if output.dim() == 2 and output.shape[1] == 1 else output

        handles = around_forward(patient.model, lambda: None, after)
        try:
            yield Change(
                "match-target-shape", "a column of predictions becomes a vector while training, a vector a column"
            )
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

        handles = around_forward(patient.model, lambda: None, after)
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
