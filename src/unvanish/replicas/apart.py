"""The parameters of each replica alone, for optimisers that must not see all replicas as one tensor."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..errors import OptionError


class Apart:
    """Parameters of each replica, with the shapes of the model, in the memory of the stacked ones.

    Each backward pass leaves its gradients here, and none on the stacked parameters. An optimiser of these does to
    each replica what it would do alone.

    Args:
        stacked: The stacked model.
        n: Replicas.
    """

    def __init__(self, stacked: nn.Module, n: int) -> None:
        self._stacked = list(stacked.parameters())
        self._slices = [[_slice(p, i) for i in range(n)] for p in self._stacked]
        for parameter, slices in zip(self._stacked, self._slices, strict=True):
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(_hand_on(slices))  # type: ignore[no-untyped-call]

    def of(self, i: int) -> list[nn.Parameter]:
        """Return the parameters of replica ``i``."""
        return [slices[i] for slices in self._slices]

    def all(self) -> list[nn.Parameter]:
        """Return the parameters of all replicas."""
        return [one for slices in self._slices for one in slices]

    @torch.no_grad()
    def follow(self) -> None:
        """Share memory again, after the stacked parameters were moved to another device or precision."""
        for parameter, slices in zip(self._stacked, self._slices, strict=True):
            for one, part in zip(slices, parameter.unbind(0), strict=True):
                one.data = part.detach()


def clip_norms_(grads: list[Tensor], max_norm: float, norm_type: float) -> Tensor:
    """Scale the stacked gradients of each replica down to a norm of their own; return the norms before, ``(n,)``."""
    each = [torch.linalg.vector_norm(grad.flatten(1), norm_type, dim=1) for grad in grads]
    norms: Tensor = torch.linalg.vector_norm(torch.stack(each), norm_type, dim=0)
    factors = (max_norm / (norms + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_ does for one model
    for grad in grads:
        grad.mul_(factors.view(-1, *[1] * (grad.dim() - 1)))
    return norms


def check_optimizer(stacked: nn.Module, apart: Apart | None, n: int, optimizer: torch.optim.Optimizer) -> None:
    """Make sure that an optimiser holds the parameters that get gradients, and treats replicas as if alone.

    Raises:
        OptionError: if not.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    own = list(stacked.parameters()) if apart is None else apart.all()
    wanted = [p for p in own if p.requires_grad]
    found = sum(id(p) in held for p in wanted)
    if found < len(wanted):
        write = "replicas.parameters()"
        if apart is not None:
            write = f"[p for i in range({n}) for p in replicas.parameters_of(i)]"
        raise OptionError(
            f"Replicas.check(): optimizer: found {found} of the {len(wanted)} parameters that get gradients, expected "
            f"all. What it does not hold does not train. Write {type(optimizer).__name__}({write}, ...)."
        )
    if apart is None and n > 1 and mixes_replicas(optimizer):
        raise OptionError(
            f"Replicas.check(): optimizer: found {type(optimizer).__name__}, which moves stacked replicas otherwise "
            "than each alone, expected one that works element by element. Give it the parameters of each replica: "
            f"{type(optimizer).__name__}([p for i in range({n}) for p in replicas.parameters_of(i)], ...)."
        )


def mixes_replicas(optimizer: torch.optim.Optimizer) -> bool:
    """Say whether such an optimiser treats n stacked tensors otherwise than each alone; tried on small tensors.

    False also for one that cannot be tried: whose constructor asks for more than its groups hold.
    """
    starts = torch.linspace(-1, 1, 60, dtype=torch.float64).reshape(3, 4, 5).sin()
    with torch.random.fork_rng(devices=[]):
        try:
            together = _moved(optimizer, starts)
            alone = torch.stack([_moved(optimizer, start) for start in starts])
        except Exception:  # whatever its constructor or its step needs
            return False
    return not torch.allclose(together, alone, rtol=1e-6, atol=1e-9)


def _moved(optimizer: torch.optim.Optimizer, start: Tensor) -> Tensor:
    """Return where three steps of an optimiser of the same type and options lead on a bowl."""
    torch.manual_seed(0)
    weights = start.clone().requires_grad_()
    options = {name: value for name, value in optimizer.param_groups[0].items() if name in optimizer.defaults}
    own = type(optimizer)([weights], **{**options, **({"lr": 0.1} if "lr" in options else {})})

    def closure() -> float:
        weights.grad = weights.detach() ** 3 + weights.detach()
        return float((weights.detach() ** 4 / 4 + weights.detach() ** 2 / 2).sum())

    for _ in range(3):
        closure()
        own.step(closure)
    return weights.detach()


def _slice(parameter: nn.Parameter, i: int) -> nn.Parameter:
    return nn.Parameter(parameter.detach()[i], requires_grad=parameter.requires_grad)


def _hand_on(slices: list[nn.Parameter]) -> Callable[[Tensor], None]:
    def hand_on(stacked: Tensor) -> None:
        assert stacked.grad is not None
        for one, grad in zip(slices, stacked.grad.unbind(0), strict=True):
            one.grad = grad if one.grad is None else one.grad + grad
        stacked.grad = None

    return hand_on
