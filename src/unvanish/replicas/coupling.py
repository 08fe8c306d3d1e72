"""What pulls replicas together, outside of their optimiser."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import OptionError
from .binary import latent_levels
from .forces import FORCES, OWN_CENTRE, Memory, finite_replicas
from .forces import Force as Force
from .kicks import Form
from .precautions import (
    Losses,
    MovementCheck,
    start_apart,
    warn_of_deep_starts,
    warn_of_nothing_to_do,
)
from .replicas import Replicas
from .restart import clear_states, restart
from .schedules import Automatic, Strength, check_strength
from .scoping import Scoping
from .settings import check_kicks, check_settings
from .stack import mean, unstack
from .statistics import estimate_statistics


class Observer(Protocol):
    """What looks at the weights right before and after each pull."""

    def before_pull(self, step: int) -> None:
        """See the weights as the optimiser left them, after so many steps."""

    def after_pull(self, step: int) -> None:
        """See the weights as the pull left them."""


class Coupling:
    """Pull replicas towards each other after each step of the optimiser.

    With s the strength, and c the mean of all replicas before any of them moves:

    ``elastic``: ``W_a += s (c - W_a)``. The centre does not move by it. ``tanh``: ``W_a += s L tanh((c - W_a) / L)``,
    the elastic pull for gaps far below L and at most ``s L`` for one replica that is far away; it moves the centre
    of three or more. ``leader``: c is the replica with the lowest loss since the last pull. ``centre``: c has
    weights of its own; each replica in turn does ``W_a -= s (W_a - c)``, and c takes up what it gave. ``outer``: c
    has weights of its own, which an optimiser moves by the gradient c minus the mean; then ``W_a += s (c - W_a)``.
    ``binary``: the latent weights of binary layers get s times the `kick` of their discrete weights; all other
    parameters the elastic pull.

    The pull is no gradient: it is not scaled by the learning rate, so as that falls, the pull gains on it. Frozen
    parameters and buffers are not pulled. A replica that holds nan or infinity neither pulls nor is pulled: see `lost`
    and `reset`.

    Args:
        replicas: What to couple.
        strength: s, the share of the gap that is closed in one step, from 0 (none) to 1 (all become c); or a function
            of the number of steps done that returns it; or `Automatic`.
        every: Pull at each such step only.
        force: One of the above, or None.
        scale: L, the gap at which ``tanh`` levels off, in units of the weights.
        outer: For ``outer``: returns an optimiser of the tensors of the centre.
        gamma: For ``binary``: see `kick`; a number, or a function of the number of steps done such as `additive`.
        form: For ``binary``: see `kick`.
        compound: Pull by what the skipped steps add up to: with a constant strength ``1 - (1 - s)**every``. For the
            elastic force this is what those pulls would have done in a row. False: by the strength as it is.

    Raises:
        OptionError: if an argument cannot be used.

    Source: elastic and centre: Zhang, Choromanska & LeCun 2015; to couple replicas for wide minima: Baldassi et al.
    2016, of whom ``binary`` is; leader: Teng et al. 2019; outer: Douillard et al. 2023.  Ours: compounding.

    Example:
        >>> replicas = Replicas(torch.nn.Linear(1, 1, bias=False), n=2)
        >>> with torch.no_grad():
        ...     replicas.stacked.weight[:] = torch.tensor([[[0.0]], [[2.0]]])
        >>> Coupling(replicas, strength=0.25).step()
        >>> replicas.stacked.weight.flatten().tolist()
        [0.25, 1.75]
    """

    def __init__(
        self,
        replicas: Replicas,
        strength: Strength = 0.01,
        every: int = 1,
        force: Force | None = "elastic",
        *,
        scale: float = 1.0,
        outer: Callable[[list[Tensor]], torch.optim.Optimizer] | None = None,
        gamma: float | Callable[[int], float] = 0.05,
        form: Form = "simple",
        compound: bool = True,
    ) -> None:
        check_settings(replicas, strength, every, force, scale, outer)
        check_kicks(replicas, force, gamma, form)
        self.replicas = replicas
        self._parameters = dict(replicas.stacked.named_parameters())  # held, as an optimiser holds them
        self.every = every
        self.force = force
        self.gamma = gamma
        self.compound = compound
        self.observers: list[Observer] = []
        self._memory = _memory(replicas, force, scale, outer)
        self._memory.form = form
        self._lost = Losses()
        self._steps = 0
        self._gathered = 0.0  # of the gap, by the steps since the last pull
        apart = start_apart(replicas.stacked)
        self._scoping = Scoping(strength, every=every, compound=compound, weights=self._trained(), started_apart=apart)
        if replicas.n == 1 and force is not None and force not in OWN_CENTRE:
            warn_of_nothing_to_do()
        if force is not None:
            warn_of_deep_starts(replicas.stacked)
        self._movement = MovementCheck(replicas.stacked)

    @property
    def strength(self) -> Strength:
        """The share of the gap that is closed in one step, or what says it; another may be set."""
        return self._scoping.strength

    @strength.setter
    def strength(self, strength: Strength) -> None:
        if not callable(strength) and not isinstance(strength, Automatic):
            check_strength(strength)
        self._scoping.strength = strength

    @property
    def lost(self) -> dict[int, int]:
        """The replicas that hold nan or infinity, each with the step at which that was seen."""
        return dict(self._lost.since)

    def step(self, losses: Tensor | None = None) -> None:
        """Count a step, and pull if it is time. Call it after the step of the optimiser.

        Args:
            losses: Of the replicas at this step, from `Replicas.losses`; the leader is chosen by them.

        Raises:
            OptionError: if losses are missing, or the optimiser does not move the replicas.
        """
        self._movement.look()
        self._note_losses(losses)
        is_due = (self._steps + 1) % self.every == 0
        strength = self._scoping.at(self._steps, is_due=is_due, survey=lambda: self._survey()[::2])
        self._gathered = self._gathered + strength * (1 - self._gathered) if self.compound else strength
        self._steps += 1
        if is_due:
            for observer in self.observers:
                observer.before_pull(self._steps)
            self.pull(self._gathered)
            for observer in self.observers:
                observer.after_pull(self._steps)
            self._gathered = 0.0
            self._memory.losses = []
        self._movement.note()

    @torch.no_grad()
    def pull(self, strength: float) -> None:
        """Pull now, by a strength of your own, and count nothing."""
        strength = check_strength(strength)
        if strength == 0 or self.force is None:
            return
        weights, means, rows = self._survey()
        if not rows:
            return
        memory = self._memory
        memory.gamma = self.gamma(self._steps) if callable(self.gamma) else self.gamma
        if len(rows) == self.replicas.n:
            memory.rows, memory.means = rows, means
            FORCES[self.force](weights, strength, memory)
        else:
            finite = {name: each[rows] for name, each in weights.items()}
            memory.rows, memory.means = rows, {name: each.mean(0, keepdim=True) for name, each in finite.items()}
            FORCES[self.force](finite, strength, memory)
            for name, each in weights.items():
                each[rows] = finite[name]
        memory.means = {}

    def centre(self, loader: Iterable[Any] | None = None) -> nn.Module:
        """Return a plain model with the weights that the replicas are pulled to, or their mean.

        It differs from `Replicas.centre` where the force has a centre of its own, and where a replica is lost.

        Args:
            loader: As in `Replicas.centre`.
        """
        rows = self._alive() or list(range(self.replicas.n))
        model = unstack(self.replicas.stacked, lambda tensor: mean(tensor[rows])[0])
        with torch.no_grad():
            for name, tensor in self._memory.centre.items():
                model.get_parameter(name).copy_(tensor)
        if loader is not None:
            estimate_statistics(model, loader)
        return model

    @torch.no_grad()
    def reset(self, i: int, *optimizers: torch.optim.Optimizer) -> None:
        """Start replica ``i`` again from the centre of the others, its part of optimisers' states cleared.

        Args:
            i: A replica, lost or not.
            optimizers: Those that train the replicas.

        Raises:
            OptionError: if there is no such replica, or no finite weights to start it from.
        """
        self.replicas.replica(i)  # an index that is wrong is refused there
        i %= self.replicas.n
        others = [row for row in self._alive() if row != i]
        if not others and not self._memory.centre:
            raise OptionError(
                f"Coupling.reset(): i: found no finite weights but those of replica {i}, expected others to start it "
                f"from. Write replicas.load_replica({i}, model)."
            )
        restart(self.replicas.stacked, i, others, self._memory.centre)
        clear_states(self.replicas.stacked, i, optimizers)
        self._lost.since.pop(i, None)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        memory = self._memory
        return {
            "force": self.force,
            "steps": self._steps,
            "gathered": self._gathered,
            **self._scoping.state_dict(),
            "lost": self.lost,
            "losses": list(memory.losses),
            "centre": {name: tensor.detach().clone() for name, tensor in memory.centre.items()},
            "outer": None if memory.outer is None else memory.outer.state_dict(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the state was taken.

        Raises:
            OptionError: if it was taken from another force.
        """
        if state["force"] != self.force:
            raise OptionError(
                f"Coupling.load_state_dict(): force: found {state['force']!r}, expected {self.force!r} as here. "
                f"Write Coupling(replicas, force={state['force']!r})."
            )
        memory = self._memory
        self._steps, self._gathered = state["steps"], state["gathered"]
        self._scoping.load_state_dict(state)
        self._lost.since = dict(state["lost"])
        memory.losses = list(state["losses"])
        for name, tensor in state["centre"].items():
            memory.centre[name].copy_(tensor)
        if memory.outer is not None:
            memory.outer.load_state_dict(state["outer"])
        self._movement.note()

    def __repr__(self) -> str:
        scale = self._memory.scale
        return f"Coupling(strength={self.strength!r}, every={self.every}, force={self.force!r}, scale={scale})"

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self._parameters.items() if p.requires_grad}

    @torch.no_grad()
    def _survey(self) -> tuple[dict[str, nn.Parameter], dict[str, Tensor], list[int]]:
        """Return the weights, their means, and which replicas are finite; note the others."""
        weights = self._trained()
        means = {name: each.mean(0, keepdim=True) for name, each in weights.items()}
        rows = finite_replicas(weights, self.replicas.n, means)
        self._lost.note(rows, self.replicas.n, self._steps)
        return weights, means, rows

    def _alive(self) -> list[int]:
        return self._survey()[2]

    def _note_losses(self, losses: Tensor | None) -> None:
        if self.force != "leader":
            return
        if losses is None or losses.shape != (self.replicas.n,):
            found = "none" if losses is None else f"a tensor of shape {tuple(losses.shape)}"
            raise OptionError(
                f"Coupling.step(): losses: found {found}, expected one loss for each of {self.replicas.n} "
                "replicas: the leader is chosen by them. Write losses = replicas.losses(...); losses.sum().backward(); "
                "coupling.step(losses)."
            )
        new = losses.detach().tolist()
        self._memory.losses = [a + b for a, b in zip(self._memory.losses or [0.0] * len(new), new, strict=True)]


def _memory(
    replicas: Replicas, force: Force | None, scale: float, outer: Callable[[list[Tensor]], torch.optim.Optimizer] | None
) -> Memory:
    memory = Memory(scale)
    if force in OWN_CENTRE:
        memory.centre = {name: mean(p.detach())[0].clone() for name, p in replicas.stacked.named_parameters()}
    if force == "binary":
        memory.levels = latent_levels(replicas.stacked)
    if outer is not None:
        memory.outer = outer(list(memory.centre.values()))
    return memory
