"""DecaySchedule: weight decay that changes while training."""

import math
import warnings
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

from ..loop.callback import Callback
from ..loop.checks import whole
from ..loop.graph import Graphs
from ..loop.groups import check_decays, check_readable
from ..loop.schedulers import rates
from ..loop.state import State

SHAPES = ("linear", "cosine", "rate")


def decay_factor(update: int, steps: int, start: float, end: float, shape: str = "linear") -> float:
    """Return the factor at update `update` (from 0) of `steps`: from `start` at the first to `end` at the last and after."""
    part = progress(update, steps)
    if shape == "cosine":
        part = (1 - math.cos(math.pi * part)) / 2
    return start * (1 - part) + end * part


def progress(update: int, steps: int) -> float:
    """Return how far an update is: 0 for the first, 1 for the last and after."""
    return min(1.0, update / max(1, steps - 1))


class DecaySchedule(Callback):
    """Multiplies every group's weight decay, for each update, by a factor that changes over the run.

    `schedule`: "linear" or "cosine" from the factor `start` at the first update to `end` at the last; a function of
    progress, 0 to 1, that returns the factor; or "rate": the rate that the update uses over the rate that its group began
    with (`max_lr` of OneCycleLR and CyclicLR), warmup included; that of the new optimizer where one takes over. torch's
    optimizers, AdamW too, multiply decay by the rate anyway, so "rate" makes it fall with the rate's square, as AdamC does.
    `steps`: the length in updates, by default the run's; a run continued from a checkpoint keeps its length. The decay is put
    back after each update, so what `WeightDecay` gave stands. Refused beside CUDAGraph, which would record each value anew; a
    compiled `optimizer.step` compiles anew for each. Raises TypeError or ValueError for bad settings and where nothing decays.
    (Defazio 2025, https://arxiv.org/abs/2506.02285; from 0.04 up to 0.4 by cosine: Caron et al. 2021,
    https://arxiv.org/abs/2104.14294)
    """

    planned = True

    def __init__(self, schedule: str | Callable[[float], float], start: float = 1.0, end: float = 0.0,
                 steps: int | None = None) -> None:  # fmt: skip
        known = isinstance(schedule, str) and schedule in SHAPES
        if not known and (isinstance(schedule, str | type) or not callable(schedule)):
            raise ValueError(f"schedule must be one of {', '.join(map(repr, SHAPES))}, or a function of progress from 0 to 1, "
                             f"not {schedule!r}")  # fmt: skip
        tries = {f"schedule({x:g})": schedule(x) for x in (0.0, 0.5, 1.0)} if callable(schedule) else {}
        for name, value in {"start": start, "end": end, **tries}.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ValueError(f"{name} must be a finite factor, at least 0, not {value!r}")
        if schedule not in ("linear", "cosine") and (start, end) != (1.0, 0.0):
            raise ValueError("start and end are for 'linear' and 'cosine'; a function or 'rate' says all values itself")
        whole("steps", steps, 1)
        if schedule == "rate" and steps is not None:
            raise ValueError(f"'rate' follows the rate, so steps={steps} says nothing; leave it out")
        self.schedule, self.start, self.end, self.steps = schedule, start, end, steps
        self._resolved, self._first, self._exchanged = steps, dict[Any, Any](), False

    def on_setup(self, state: State) -> None:
        """Keep the rates that the program gave, from before a restore."""
        check_decays(state.optimizer)
        self._first = rates(state.optimizer)
        state.accepts, state.exchanged = [*state.accepts, self._follows], [*state.exchanged, self._anew]

    def _anew(self, state: State) -> None:
        self._first, self._exchanged = rates(state.optimizer), True

    def _follows(self, optimizer: Optimizer) -> None:
        if self.schedule == "rate":
            check_readable(optimizer)

    def on_fit_start(self, state: State) -> None:
        """Learn the run's length, and refuse what can't work."""
        if isinstance(state.runner, Graphs):
            raise ValueError("DecaySchedule changes the decay in each update, which CUDAGraph would record anew; leave one out")
        # an optimizer that took over may decay nothing, as SGD does by default
        if not self._exchanged and not any(group.get("weight_decay") for group in state.optimizer.param_groups):
            raise ValueError("every group's weight_decay is 0, so DecaySchedule changes nothing; give the optimizer a decay, or "
                             "add WeightDecay")  # fmt: skip
        self._follows(state.optimizer)
        if self._resolved is None and self.schedule != "rate":
            if state.total_steps is None:
                raise ValueError(f"DecaySchedule({self.schedule!r}) spans the run, whose length is not known: give it steps= of "
                                 "its own, or steps= to fit or epochs, where one of them runs it")  # fmt: skip
            self._resolved = state.total_steps
        elif self._resolved and self.steps is None and state.total_steps not in (None, self._resolved):
            warnings.warn(f"DecaySchedule goes on with a length of {self._resolved} updates, and the run has {state.total_steps} "
                          "now", stacklevel=2)  # fmt: skip

    def on_before_optimizer_step(self, state: State) -> None:
        """Scale this update's decays."""
        if self.schedule == "rate":
            for group in state.optimizer.param_groups:
                first = self._first.get(next(iter(group["params"]), None), group["lr"])
                if first := group.get("max_lr", group.get("initial_lr", first)):
                    state.scale_decay(lambda rate, first=first: rate / first, group)  # type: ignore[misc]
            return
        if self._resolved is None:
            raise RuntimeError(f"DecaySchedule({self.schedule!r}) spans the run: run its on_fit_start first, or give steps=")
        at, shape = (state.step, self._resolved), self.schedule
        state.scale_decay(shape(progress(*at)) if callable(shape) else decay_factor(*at, self.start, self.end, shape))

    def state_dict(self) -> dict[str, Any]:
        """Return the length in updates, so that a longer run continued from here keeps it."""
        return {"steps": self._resolved}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep the length; one given as `steps` is the argument's."""
        if self.steps is None:
            self._resolved = state["steps"]
