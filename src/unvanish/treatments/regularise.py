"""Hold the network back: decay, dropout, stopping in time, fewer units."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TreatmentError
from ..layers import is_normalisation
from ..records import Change
from .gradients import _positive
from .treatment import Patient, Steps, Treatment


def weight_decay(strength: float = 1e-4, *, decoupled: bool = True) -> Treatment:
    """Shrink weight matrices, never biases and norms; the decay that a script sets is replaced.

    Coupled: the gradient of C = E + strength/2 * sum w**2 is added. Decoupled: w -= lr * strength * w, beside it.

    Source: Krogh & Hertz 1991 (coupled); Loshchilov & Hutter 2019 (decoupled).
    """
    if not (math.isfinite(strength) and strength >= 0):
        raise TreatmentError(
            f"treat(): 'weight-decay': found {strength!r}, expected a number >= 0. Nothing was changed."
        )

    def apply(patient: Patient) -> Steps:
        exempt = {id(p) for m in patient.model.modules() if is_normalisation(m) for p in m.parameters(recurse=False)}
        undo, handles = [], []
        for optimizer in patient.need_optimizer("weight-decay"):
            for group in optimizer.param_groups:
                if "weight_decay" in group:
                    undo.append((group, group["weight_decay"]))
                    group["weight_decay"] = 0.0 if isinstance(group["weight_decay"], float) else 0

            def before(owner: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
                for group in owner.param_groups:
                    _decay(group, strength, exempt, decoupled=decoupled)

            handles.append(optimizer.register_step_pre_hook(before))
        try:
            yield Change("weight-decay", f"weight matrices decay by {strength:g}", preserves_function=True)
        finally:
            for handle in handles:
                handle.remove()
            for group, value in undo:
                group["weight_decay"] = value

    return Treatment(
        "weight-decay", apply, f"{strength:g}", preserves_function=True,
        code=f"matrices = [p for p in model.parameters() if p.dim() > 1]\n"
        f"others = [p for p in model.parameters() if p.dim() <= 1]\n"
        f"optimizer = torch.optim.AdamW([{{'params': matrices, 'weight_decay': {strength:g}}}, "
        "{'params': others, 'weight_decay': 0.0}])",
    )  # fmt: skip


@torch.no_grad()
def _decay(group: dict[str, Any], strength: float, exempt: set[int], *, decoupled: bool) -> None:
    for parameter in group["params"]:
        if parameter.dim() < 2 or id(parameter) in exempt or parameter.grad is None:
            continue
        if decoupled:
            parameter.mul_(1 - float(group["lr"]) * strength)
        else:
            parameter.grad.add_(parameter, alpha=strength)


def dropout(share: float = 0.2) -> Treatment:
    """Set a share of each hidden layer's outputs to zero while training, and scale the rest up.

    Source: Srivastava et al. 2014.
    """
    if not 0 < share < 1:
        raise TreatmentError(f"treat(): 'dropout': found {share!r}, expected a share in (0, 1). Nothing was changed.")

    def apply(patient: Patient) -> Steps:
        layers = [
            (n, m) for n, m in patient.model.named_modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))
        ]
        if len(layers) < 2:
            raise TreatmentError(
                "treat(): 'dropout': found no hidden layer, expected at least one. Nothing was changed."
            )

        def drop(layer: nn.Module, args: Any, output: Tensor) -> Tensor:
            return nn.functional.dropout(output, share, layer.training)

        handles = [layer.register_forward_hook(drop) for _, layer in layers[:-1]]
        try:
            yield Change("dropout", f"{share:.0%} of hidden outputs are dropped", tuple(n for n, _ in layers[:-1]))
        finally:
            for handle in handles:
                handle.remove()

    return Treatment("dropout", apply, f"{share:g}", code=f"nn.Dropout({share:g})  # after each hidden activation")


class EarlyStopping:
    """Keeps the weights of the best evaluation; ``step(loss)`` says when to stop, ``restore()`` brings them back.

    Args:
        model: Whose parameters and buffers are kept.
        patience: Evaluations without improvement before it says stop. >= 1

    Source: Prechelt 1998.

    Example:
        >>> model = nn.Linear(1, 1)
        >>> stopping = EarlyStopping(model, patience=2)
        >>> [stopping.step(loss) for loss in (1.0, 0.5, 0.6, 0.7)]
        [False, False, False, True]
    """

    def __init__(self, model: nn.Module, *, patience: int = 5) -> None:
        _positive(patience, "early-stopping")
        self.model, self.patience = model, patience
        self.best, self.waited = math.inf, 0
        self._kept: dict[str, Tensor] = {}

    def step(self, loss: float) -> bool:
        """Note an evaluation; True when it is time to stop. A loss that is not finite is never the best."""
        if loss < self.best:
            self.best, self.waited = loss, 0
            self._kept = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        else:
            self.waited += 1
        return self.waited >= self.patience

    def restore(self) -> None:
        """Bring the best weights back, in place."""
        if self._kept:
            with torch.no_grad():
                for name, value in self.model.state_dict().items():
                    value.copy_(self._kept[name])


def early_stopping(patience: int = 5) -> Treatment:
    """Keep the weights of the best held-out loss a criterion module computes, and end with them.

    When it is time to stop, the best weights come back and further steps change nothing, so that what a script
    measures after its loop is measured on them.
    """

    def apply(patient: Patient) -> Steps:
        stopping = EarlyStopping(patient.model, patience=patience)
        values: list[float] = []
        has_stopped = [False]

        def see(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(module, nn.modules.loss._Loss) and not torch.is_grad_enabled():
                values.append(float(output))

        def settle(*_: Any) -> None:
            if values and not has_stopped[0]:
                has_stopped[0] = stopping.step(sum(values) / len(values))
            values.clear()

        def hold(*_: Any) -> None:
            if has_stopped[0]:
                stopping.restore()

        handles: list[Any] = [nn.modules.module.register_module_forward_hook(see)]
        for optimizer in patient.optimizers:
            handles += [optimizer.register_step_pre_hook(settle), optimizer.register_step_post_hook(hold)]
        try:
            yield Change("early-stopping", "the best weights of the held-out loss are kept", preserves_function=True)
        finally:
            for handle in handles:
                handle.remove()
            settle()
            stopping.restore()

    return Treatment(
        "early-stopping", apply, f"{patience}", preserves_function=True,
        code=f"stopping = unvanish.EarlyStopping(model, patience={patience})\n"
        "if stopping.step(validation_loss): stopping.restore(); break",
    )  # fmt: skip
