"""SwitchOptimizer: another optimizer takes over in the middle of a run."""

import logging
from typing import Any

from torch.optim import Optimizer

from ..loop.callback import Callback
from ..loop.checks import whole
from ..loop.exchange import Build, check_given, check_unscheduled, exchange, successor
from ..loop.goal import Goal, Tracker
from ..loop.schedulers import rates
from ..loop.state import State
from .batch_policies import Epochs, Steps
from .swats import ProjectedRate, sgd_rate

log = logging.getLogger("hookloop")


class SwitchOptimizer(Callback):
    """Trains on with another optimizer from a step, an epoch or a plateau on, or when the projected SGD rate has settled.

    `to(groups)` builds it on the groups that it is given (parameters, and their decays where these were set by group); the
    ratios of the groups' rates stay. `at`: updates applied, `Epochs(3)`, a metric's name or `Goal`, or None. `rate`: a
    number; None for that of `to`; "swats" for that of SGD steps whose projection is the steps now taken, averaged with the
    first optimizer's last beta (0.999 if it has none), times 1 - momentum. Then `at=None` waits until the average is within
    `tolerance` of an update's own (a difference of rates, the paper's; noisy gradients may never meet it), looked at every
    `every` updates with a delay of `every` - 1, so that nothing waits for the device; a copy of the weights is held so long.
    A `Schedule` given as a function is built anew for the updates left; Warmup goes on. The first optimizer's state is let
    go, the new one is `loop.state.optimizer`. Raises TypeError or ValueError, at construction or the start, for what can't
    take over, or be taken over. (SWATS: Keskar and Socher 2017, https://arxiv.org/abs/1712.07628)
    """

    owns, planned = ("optimizer",), True
    optional = ("on_step_start",)

    def __init__(self, to: Build, at: int | Epochs | str | Goal | None = None, rate: float | str | None = None, *,
                 tolerance: float = 1e-9, every: int = 10) -> None:  # fmt: skip
        check_given(to, rate, waits=at is None)
        if not isinstance(at, Epochs | str | Goal):
            whole("at", at, 1)
        elif isinstance(at, Epochs) and not isinstance(at.every, int):
            raise ValueError(f"at must be one position, such as {type(at).__name__}(3), not the table {at.every!r}")
        self.to, self.at, self.rate = to, Steps(at) if isinstance(at, int) else at, rate
        self.tracker = Tracker(Goal.of(at)) if isinstance(at, str | Goal) else None
        self.projected = ProjectedRate(tolerance, every) if rate == "swats" else None
        self.measured, self.switched, self.used = bool(self.tracker or self.projected), False, 0.0  # the rate handed over
        self._state: State | None = None
        self._rates: dict[Any, Any] = {}  # as the program gave them
        self._first: Optimizer | None = None  # to go back to, until a restore is done
        self.watches = () if self.tracker is None else (self.tracker.goal.metric,)
        self.idle_hooks = () if self.tracker else (SwitchOptimizer.on_validation_end,)
        self.idle_hooks += () if self.projected else (SwitchOptimizer.on_before_optimizer_step, SwitchOptimizer.on_step_end)

    def on_setup(self, state: State) -> None:
        """Refuse a scheduler of the first optimizer, which would go on to schedule nothing."""
        check_unscheduled(state.optimizer)
        self._state, self._rates = state, rates(state.optimizer)

    def on_fit_start(self, state: State) -> None:
        """Build the other optimizer once, to tell now what would fail later."""
        self._first = None
        _ = self.switched or self._successor(state, 1.0)
        state.log("switched", int(self.switched))

    def _successor(self, state: State, projected: float) -> Optimizer:
        return successor(state, self.to, sgd_rate(projected) if isinstance(self.rate, str) else self.rate, self._rates)

    def on_before_optimizer_step(self, state: State) -> None:
        """Have the weights at hand that the rate is projected from."""
        if self.projected is not None:
            self.projected.keep(state)

    def on_step_end(self, state: State) -> None:
        """Project the step taken."""
        if self.projected is not None:
            self.projected.measure(state)

    def on_validation_end(self, state: State) -> None:
        """Take the report in."""
        if self.tracker is not None and not self.switched:
            self.tracker.update(self.tracker.goal.read(state, "SwitchOptimizer"))

    def on_step_start(self, state: State) -> None:
        """Switch where it is time: between two updates, when every callback has seen the last."""
        if not self.switched and self._due(state):
            self._switch(state, 0.0 if self.projected is None else self.projected.end(state, first=self.at is None))
            log.info("%s takes over after update %d, at the rates %s", type(state.optimizer).__name__, state.step, state.rates)

    def _due(self, state: State) -> bool:
        if self.tracker is not None:
            return self.tracker.exhausted
        if isinstance(self.at, Epochs):
            return self.at.size(state, lambda growths: growths) > 0
        return self.projected is not None and self.projected.look(state) > 0

    def _switch(self, state: State, projected: float) -> None:
        new, self._first, self.switched, self.used = self._successor(state, projected), state.optimizer, True, projected
        exchange(state, new)
        state.log("switched", 1)

    def state_dict(self) -> dict[str, Any]:
        """Return whether and at which rate it switched, and what it has seen until then."""
        return {"switched": self.switched, "rate": self.used, "tracker": self.tracker and self.tracker.state_dict(),
                "projected": self.projected and self.projected.state_dict()}  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back, and the optimizer with it; raises ValueError for a switch that waited for something else."""
        for mine, kept in ((self.tracker, state["tracker"]), (self.projected, state["projected"])):
            if (mine is None) != (kept is None):
                raise ValueError("at= or rate= is not of the kind that the checkpoint's run switched by; give the same")
            if mine is not None:
                mine.load_state_dict(kept)
        if state["switched"] and not self.switched:
            if self._state is None:
                raise RuntimeError("SwitchOptimizer.load_state_dict of a run that had switched runs after on_setup")
            self._switch(self._state, state["rate"])
        elif self.switched and not state["switched"] and self._state is not None and self._first is not None:
            self.switched = False  # what a restore began was refused
            exchange(self._state, self._first)
