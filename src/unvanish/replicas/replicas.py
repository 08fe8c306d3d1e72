"""Replicas of one network as an ordinary module: stacked parameters, any optimiser of torch on top."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..errors import OptionError
from ..shown import show, unseen
from .apart import Apart, check_optimizer, clip_norms_
from .arguments import Batches, check_arguments, check_batches, check_index
from .backends import LossFn, call, first_alone, keep_buffers, one_of
from .choice import Backend, backends, choose, draws
from .loader import ReplicaLoader
from .stack import check_equal, check_model, mean, named_tensors, stack, starts, unstack
from .stacked import NotUnderstood
from .statistics import estimate_statistics
from .streams import Streams

Readout = Literal["centre", "ensemble"]

_LOG = logging.getLogger("unvanish")
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
            otherwise and differ in rounding. After ``torch.use_deterministic_algorithms(True)`` it is the loop.
        seeds: One whole number a replica: each then draws its own random numbers in the forward pass (dropout), those
            of a plain training after ``torch.manual_seed(seed)``, however many replicas there are. By default all
            draw from the one generator of torch in turns; with ``"auto"`` seeds are drawn from it at the first loss
            if the model draws random numbers, so that they do not depend on what is fastest.

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
        backend: Backend | Literal["auto"] = "auto",
        seeds: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        model = check_model(model)
        check_arguments(n, init, backend, seeds)
        self.n = n
        self.backend = backend
        self.stacked = stack(starts(model, n, init))
        self.training = model.training
        self._backends = backends()
        self._streams = None if seeds is None else Streams(seeds, self._device())
        self._apart: Apart | None = None
        self._told: set[str] = set()  # what was logged once
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
        is_separate = check_batches(self.n, batches, x, y)

        def run(name: Backend) -> Tensor:
            compute = self._backends[name]
            return compute(self.stacked, self.n, loss_fn, x, y, is_separate=is_separate, streams=self._streams)

        def run_first() -> tuple[Tensor, list[Tensor]]:
            return first_alone(self.stacked, loss_fn, x, y, is_separate=is_separate, streams=self._streams)

        name = self._choice(run)
        if name == "loop":
            return run(name)
        try:
            with unseen():
                losses = run(name)
            if losses.requires_grad:
                show(run_first, losses)
            return losses
        except NotUnderstood as error:  # other shapes than those of the trial, or hooks that came since
            if str(error) not in self._told:
                self._told.add(str(error))
                _LOG.warning("Replicas: batched cannot run this call (%s). The loop is used for it.", error)
            return run("loop")

    def forward(self, x: Any) -> list[Any]:
        """Return the outputs of all replicas on the same ``x``."""
        outputs = []
        for i, tensors in enumerate(one_of(self.stacked, self.n)):
            with self._streams.of(i) if self._streams else nullcontext():
                outputs.append(call(self.stacked, tensors, x))
            keep_buffers(self.stacked, tensors, i)
        return outputs

    def loader(self, data: Any, *, batch_size: int | None = None, seed: int = 0) -> ReplicaLoader:
        """Return a loader that gives each replica the rows of a data set, or of a `DataLoader`, in an order of its own.

        See `ReplicaLoader`; its batches are for ``batches="separate"``.
        """
        return ReplicaLoader(data, self.n, batch_size=batch_size, seed=seed)

    def parameters_of(self, i: int) -> list[nn.Parameter]:
        """Return the parameters of replica ``i``, with the shapes of the model, for an optimiser of their own.

        They share memory with the stacked ones. With groups of them each replica has a learning rate of its own, and
        optimisers that work on norms or on matrices treat each replica as they would alone. From the first call on,
        gradients are found on these parameters and not on ``replicas.parameters()``; give an optimiser those of all
        replicas.

        Example:
            >>> replicas = Replicas(nn.Linear(4, 2), n=2)
            >>> groups = [{"params": replicas.parameters_of(i), "lr": lr} for i, lr in enumerate((0.1, 0.01))]
            >>> optimizer = torch.optim.Adafactor(groups)
        """
        check_index("parameters_of", i, self.n)
        if self._apart is None:
            self._apart = Apart(self.stacked, self.n)
        return self._apart.of(i)

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Clip the gradients of each replica by their norm; return the norms before, one a replica.

        ``torch.nn.utils.clip_grad_norm_`` of all parameters would clip the replicas together.

        Raises:
            OptionError: if ``max_norm`` is no number above 0.
        """
        if not max_norm > 0:
            raise OptionError(
                f"clip_grad_norm_(): max_norm: found {max_norm!r}, expected a number above 0. "
                "Write replicas.clip_grad_norm_(1.0)."
            )
        if self._apart is not None:
            clip = nn.utils.clip_grad_norm_
            return torch.stack([clip(self._apart.of(i), max_norm, norm_type) for i in range(self.n)])
        grads = [p.grad for p in self.stacked.parameters() if p.grad is not None]
        return clip_norms_(grads, max_norm, norm_type) if grads else torch.zeros(self.n)

    def check(self, optimizer: torch.optim.Optimizer) -> None:
        """Make sure that an optimiser trains these replicas, and each as it would alone.

        Raises:
            OptionError: if it holds none or only some of their parameters, those that get no gradients since
                `parameters_of`, or mixes replicas because it sees one stacked tensor.
        """
        check_optimizer(self.stacked, self._apart, self.n, optimizer)

    def replica(self, i: int) -> nn.Module:
        """Return replica ``i`` as a plain model with weights of its own."""
        check_index("replica", i, self.n)
        return unstack(self.stacked, lambda tensor: tensor[i])

    def load_replica(self, i: int, source: nn.Module | Mapping[str, Any]) -> None:
        """Give replica ``i`` the weights and buffers of a plain model, or of its ``state_dict()``.

        Raises:
            OptionError: if a tensor is missing, unknown, or of another shape or type. Nothing is changed then.
        """
        check_index("load_replica", i, self.n)
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
        self, x: Any, how: Readout = "ensemble", *, read: Callable[[Any], Tensor] | None = None, loader: Any = None
    ) -> Tensor:
        """Return the mean of the replicas' predictions, or the prediction of their centre, in evaluation mode.

        Args:
            x: As in `loss`.
            how: ``"ensemble"``: the better readout, or as good, wherever we measured. ``"centre"``: one network, n
                times cheaper; of replicas that started apart it is in general no good network.
            read: What to take from an output, before any mean: ``lambda output: output.softmax(-1)``.
            loader: For the centre's batch norms; see `centre`.

        Raises:
            OptionError: if ``how`` is unknown, or an output is no tensor and ``read`` is missing.
        """
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

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of all replicas."""
        super().zero_grad(set_to_none)
        for parameter in self._apart.all() if self._apart else ():
            parameter.grad = None

    def get_extra_state(self) -> dict[str, Tensor]:
        """Return which back ends were chosen, so that a resumed run computes the same bits, and the random states."""
        names = ("", *get_args(Backend))
        chosen = torch.tensor([names.index(self._chosen.get(situation, "")) for situation in _SITUATIONS])
        return {"chosen": chosen, **(self._streams.state_dict() if self._streams else {})}

    def set_extra_state(self, state: dict[str, Tensor]) -> None:
        """Take back what was chosen before, and the random states."""
        names = (None, *get_args(Backend))
        chosen = {key: names[int(code)] for key, code in zip(_SITUATIONS, state["chosen"], strict=True)}
        self._chosen = {key: name for key, name in chosen.items() if name is not None}
        states = {name: tensor for name, tensor in state.items() if name != "chosen"}
        if states and self._streams is None:  # they were drawn at the first loss
            self._streams = Streams(range(self.n), self._device())
        if self._streams:
            self._streams.load_state_dict(states)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_apart": None}  # a copy has memory of its own

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Replicas:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._streams is not None:
            self._streams.move(self._device())
        if self._apart is not None:
            self._apart.follow()
        return self

    def extra_repr(self) -> str:
        """Return what is shown beside the name."""
        return f"n={self.n}, backend={self.backend!r}"

    def _choice(self, losses: Callable[[Backend], Tensor]) -> Backend:
        is_auto = self.backend == "auto"
        if self.backend == "loop" or (is_auto and (self.n == 1 or torch.are_deterministic_algorithms_enabled())):
            return "loop"
        situation = (self.training, torch.is_grad_enabled())
        if situation not in self._chosen:
            if is_auto and self._streams is None and draws(self.stacked, losses):
                self._streams = Streams(torch.randint(2**62, (self.n,)).tolist(), self._device())
            candidates: list[Backend] = ["batched", "vmap"] if self.backend == "auto" else [self.backend]
            if self._streams:
                candidates, losses = ["batched"], self._streams.again(losses)
            self._chosen[situation] = choose(self.stacked, losses, candidates, measure=is_auto)
        return self._chosen[situation]

    def _device(self) -> torch.device:
        return next(self.stacked.parameters()).device


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
