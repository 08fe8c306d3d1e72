"""Replicas of one network as an ordinary module: stacked parameters, any optimiser of torch on top."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..errors import OptionError
from .backends import LossFn, call, keep_buffers, one_of
from .choice import Backend, backends, choose
from .stack import anew, check_equal, check_model, mean, named_tensors, stack, unstack
from .stacked import NotUnderstood
from .statistics import estimate_statistics

Batches = Literal["shared", "separate"]
Readout = Literal["centre", "ensemble"]

_LOG = logging.getLogger("unvanish")
_MEASURED: tuple[Backend, ...] = ("batched", "vmap")
_SITUATIONS = ((False, False), (False, True), (True, False), (True, True))  # training, gradients on


class Replicas(nn.Module):
    """Train n copies of a network side by side, each parameter stacked along a leading axis of replicas.

    Uncoupled, n replicas are n separate trainings: bit for bit in the back end ``loop``, to rounding in the others.
    `Coupling` pulls them together.

    Args:
        model: Any module with parameters. It is copied and stays as it is. Tied weights stay tied, frozen ones
            frozen; parameters and buffers are stacked, other tensors and state on modules are shared by all.
        n: Replicas, at least 1.
        init: ``"shared"``: all start as the model. ``"separate"``: the first starts as the model, the others are
            drawn anew by their modules' ``reset_parameters``. A function of i: returns the model to start replica i
            from.
        backend: ``"loop"``: one replica after the other. ``"batched"``: all at once, by products of stacked matrices
            and grouped convolutions. ``"vmap"``: all at once, by `torch.func.vmap`. Where the model does not allow
            them the loop is used: both are tried at the first loss, and the logger ``unvanish`` says if not.
            ``"auto"``: the fastest of the three in a short measurement at the first loss; a later run may choose
            otherwise.

    Raises:
        OptionError: if an argument cannot be used, or the models of ``init`` differ in architecture.

    Example:
        >>> replicas = Replicas(nn.Linear(4, 2), n=3)
        >>> [tuple(p.shape) for p in replicas.parameters()]
        [(3, 2, 4), (3, 2)]
        >>> replicas.loss(nn.functional.mse_loss, torch.zeros(5, 4), torch.zeros(5, 2)).shape
        torch.Size([])
    """

    def __init__(
        self,
        model: nn.Module,
        n: int = 3,
        init: Literal["shared", "separate"] | Callable[[int], nn.Module] = "shared",
        *,
        backend: Backend | Literal["auto"] = "loop",
    ) -> None:
        super().__init__()
        model = check_model(model)
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise OptionError(f"Replicas(): n: found {n!r}, expected a whole number from 1 on. Write n=3.")
        if not (init in ("shared", "separate") or callable(init)):
            raise OptionError(
                f"Replicas(): init: found {init!r}, expected 'shared', 'separate' or a function that returns the model "
                "of replica i. Write init='shared'."
            )
        if backend not in (*get_args(Backend), "auto"):
            raise OptionError(
                f"Replicas(): backend: found {backend!r}, expected 'loop', 'vmap', 'batched' or 'auto'. "
                "Write backend='auto'."
            )
        self.n = n
        self.backend = backend
        self.stacked = stack(_starts(model, n, init))
        self.training = model.training
        self._readout: Readout = "centre" if init == "shared" else "ensemble"
        self._backends = backends()
        self._chosen: dict[tuple[bool, bool], Backend] = {}

    def loss(self, loss_fn: LossFn, x: Any, y: Any = None, *, batches: Batches = "shared") -> Tensor:
        """Return the sum of the replicas' losses: each then gets the gradient it would get alone.

        Args:
            loss_fn: Function of a replica's output and ``y``; returns one number.
            x: A tensor, or a tuple or mapping of arguments to the model.
            y: Whatever ``loss_fn`` compares with.
            batches: ``"shared"``: all replicas see ``x`` and ``y``. ``"separate"``: tensors in ``x`` and ``y`` have a
                leading axis of replicas, and each replica sees its part.
        """
        return self.losses(loss_fn, x, y, batches=batches).sum()

    def losses(self, loss_fn: LossFn, x: Any, y: Any = None, *, batches: Batches = "shared") -> Tensor:
        """Return the loss of each replica; arguments as in `loss`."""
        is_separate = self._check_batches(batches, x, y)
        by = {
            name: partial(compute, self.stacked, self.n, loss_fn, x, y, is_separate=is_separate)
            for name, compute in self._backends.items()
        }
        try:
            return by[self._choice(by)]()
        except NotUnderstood as error:  # other shapes than those of the trial
            _LOG.warning("Replicas: batched cannot run this call (%s). The loop is used for it.", error)
            return by["loop"]()

    def forward(self, x: Any) -> list[Any]:
        """Return the outputs of all replicas on the same ``x``."""
        outputs = []
        for i, tensors in enumerate(one_of(self.stacked, self.n)):
            outputs.append(call(self.stacked, tensors, x))
            keep_buffers(self.stacked, tensors, i)
        return outputs

    def replica(self, i: int) -> nn.Module:
        """Return replica ``i`` as a plain model with weights of its own."""
        self._check_index("replica", i)
        return unstack(self.stacked, lambda tensor: tensor[i])

    def load_replica(self, i: int, source: nn.Module | Mapping[str, Any]) -> None:
        """Give replica ``i`` the weights and buffers of a plain model, or of its ``state_dict()``.

        Raises:
            OptionError: if a tensor is missing, unknown, or of another shape or type. Nothing is changed then.
        """
        self._check_index("load_replica", i)
        to, given = named_tensors(self.stacked), _tensors_of(source)
        if not isinstance(source, nn.Module):  # a state dict is without buffers that are not persistent
            persistent = self.stacked.state_dict().keys()
            to = {name: tensor for name, tensor in to.items() if name in persistent}
        check_equal({name: tensor[i] for name, tensor in to.items()}, given, f"load_replica({i})")
        with torch.no_grad():
            for name, tensor in to.items():
                tensor[i].copy_(given[name])

    def centre(self, loader: Iterable[Any] | None = None) -> nn.Module:
        """Return a plain model with the mean of the replicas' weights.

        Args:
            loader: Batches, of which the inputs (the first part, if there are several) pass through the model to
                estimate the statistics of its batch norms. Without it, buffers are averaged as weights are, which is
                right only for replicas that are close; whole numbers are those of the first replica.
        """
        centre = unstack(self.stacked, lambda tensor: mean(tensor)[0])
        if loader is not None:
            estimate_statistics(centre, loader)
        return centre

    @torch.no_grad()
    def predict(
        self, x: Any, how: Readout | None = None, *, read: Callable[[Any], Tensor] | None = None, loader: Any = None
    ) -> Tensor:
        """Return the prediction of the centre, or the mean of the replicas' predictions, in evaluation mode.

        Args:
            x: As in `loss`.
            how: ``"centre"`` or ``"ensemble"``; by default the centre if all replicas started equal.
            read: What to take from an output, before any mean: ``lambda output: output.softmax(-1)``.
            loader: For the centre's batch norms; see `centre`.

        Raises:
            OptionError: if ``how`` is unknown, or an output is no tensor and ``read`` is missing.
        """
        how = how or self._readout
        if how not in get_args(Readout):
            raise OptionError(f"predict(): how: found {how!r}, expected 'centre' or 'ensemble'. Write how='centre'.")
        if how == "centre":
            centre = self.centre(loader).eval()
            outputs = [call(centre, {}, x)]
        else:
            with _evaluating(self):
                outputs = self(x)
        values = [read(output) if read else output for output in outputs]
        if not isinstance(values[0], Tensor):
            raise OptionError(
                f"predict(): read: found {type(values[0]).__name__}, expected a tensor. "
                "Write read=lambda output: output.logits."
            )
        return mean(torch.stack(values))[0]

    def get_extra_state(self) -> Tensor:
        """Return which back ends were chosen, so that a resumed run computes the same bits."""
        names = ("", *get_args(Backend))
        return torch.tensor([names.index(self._chosen.get(situation, "")) for situation in _SITUATIONS])

    def set_extra_state(self, state: Tensor) -> None:
        """Take back the back ends that were chosen before."""
        names = (None, *get_args(Backend))
        chosen = {key: names[int(code)] for key, code in zip(_SITUATIONS, state, strict=True)}
        self._chosen = {key: name for key, name in chosen.items() if name is not None}

    def extra_repr(self) -> str:
        """Return what is shown beside the name."""
        return f"n={self.n}, backend={self.backend!r}"

    def _choice(self, losses: Mapping[Backend, Callable[[], Tensor]]) -> Backend:
        if self.backend == "loop" or (self.backend == "auto" and self.n == 1):
            return "loop"
        situation = (self.training, torch.is_grad_enabled())
        if situation not in self._chosen:
            candidates = _MEASURED if self.backend == "auto" else (self.backend,)
            self._chosen[situation] = choose(self.stacked, losses, candidates)
        return self._chosen[situation]

    def _check_batches(self, batches: str, x: Any, y: Any) -> bool:
        if batches not in get_args(Batches):
            raise OptionError(
                f"Replicas.loss(): batches: found {batches!r}, expected 'shared' or 'separate'. "
                "Write batches='separate' where x and y have a leading axis of replicas."
            )
        for leaf in tree_leaves((_plain(x), _plain(y))) if batches == "separate" else ():
            if isinstance(leaf, Tensor) and (leaf.dim() == 0 or leaf.shape[0] != self.n):
                raise OptionError(
                    f"Replicas.loss(): batches='separate': found a tensor of shape {tuple(leaf.shape)}, expected "
                    f"{self.n} batches along the first axis. Write torch.stack([x0, x1, ...])."
                )
        return batches == "separate"

    def _check_index(self, where: str, i: int) -> None:
        if isinstance(i, bool) or not isinstance(i, int) or not -self.n <= i < self.n:
            raise OptionError(
                f"{where}(): i: found {i!r}, expected a replica from 0 to {self.n - 1}. Write {where}(0)."
            )


def _starts(model: nn.Module, n: int, init: str | Callable[[int], nn.Module]) -> list[nn.Module]:
    """Return the models that the replicas start from; structure and modes are those of the first."""
    if init == "shared":
        return [model] * n
    if init == "separate":
        return [model, *(anew(model) for _ in range(n - 1))]
    assert callable(init)
    models = [check_model(init(i)) for i in range(n)]
    for i, made in enumerate(models):
        check_equal(named_tensors(model), named_tensors(made), f"Replicas(): init({i})")
    return models


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value


def _tensors_of(source: nn.Module | Mapping[str, Any]) -> dict[str, Tensor]:
    if isinstance(source, nn.Module):
        return named_tensors(source)
    return {name: value for name, value in source.items() if isinstance(value, Tensor)}


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode, and back module by module."""
    modes = [(each, each.training) for each in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for each, mode in modes:
            each.training = mode
