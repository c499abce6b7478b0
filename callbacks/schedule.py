"""Schedule: the rates follow a scheduler of torch."""

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..loop import schedulers
from ..loop.callback import Callback
from ..loop.checks import refuse
from ..loop.goal import Goal
from ..loop.state import State
from ..loop.store import reduced
from .schedules import named

Build = Callable[[Optimizer, int | None], LRScheduler]


class Schedule(Callback):
    """Steps a torch scheduler after each applied update, at each epoch's end, or with a metric that it watches.

    `scheduler`: one built on this optimizer, or a function `(optimizer, total_steps) -> scheduler`, called at the start, when
    groups are split and the length is known (else None), and for the updates left where another optimizer takes over; or one
    of the names in schedules.py ("linear", "cosine", "wsd", ...) with its options. `on`: "step", "epoch", or for a plateau
    and only for it a metric: its name (lower is better) or `Goal(metric, mode)`. A resumed run goes on with the checkpoint's
    scheduler, and warns of other settings in the program's. Raises TypeError or ValueError for what doesn't fit, as another
    kind or function than in that run: with `Loop(strict=False)` it begins anew, at the program's rates, for the updates left.
    """

    owns, planned = ("optimizer's rates",), True

    def __init__(self, scheduler: LRScheduler | Build | str, on: str | Goal = "step", **options: Any) -> None:
        schedulers.check_given(scheduler, on)
        built, by_name = isinstance(scheduler, LRScheduler), isinstance(scheduler, str) or bool(options)
        self.on = on if on in ("step", "epoch") else Goal.of(on)
        hooks = {Schedule.on_step_end: "step", Schedule.on_epoch_end: "epoch", Schedule.on_validation_end: "metric"}
        used = "metric" if isinstance(self.on, Goal) else self.on
        self.idle_hooks = tuple([hook for hook, when in hooks.items() if when != used])
        self._function: Any = named(scheduler, self.on, options) if by_name else None if built else scheduler
        self.scheduler: Any = schedulers.check_kind(scheduler, self.on) if built else None
        self._settings = schedulers.settings(self.scheduler) if built else {}
        self._saved, self._first, self._since = dict[str, Any](), dict[Tensor, Any](), 0  # the update that it was built before
        self._length: int | None = 0  # that it was built for

    def __getstate__(self) -> Any:
        state = super().__getstate__()
        if self._function is None or self.scheduler is None or not isinstance(state, dict):
            return state
        fresh: dict[str, Any] = {"scheduler": None, "_settings": {}, "_saved": {}, "_first": {}, "_since": 0, "_length": 0}
        return {**state, **fresh}  # what was built stays with its optimizer, and a copy builds its own

    def on_setup(self, state: State) -> None:
        """Keep the rates from before a restore, to build the scheduler on."""
        _ = self.scheduler is None or schedulers.check_kind(self.scheduler, self.on, state.optimizer)
        self._first = schedulers.rates(state.optimizer)
        state.accepts = [*state.accepts, lambda new: schedulers.check_follows(self._function, new, state)]
        state.exchanged = [*state.exchanged, self._anew]

    def _anew(self, state: State) -> None:
        self._first, self._saved = schedulers.rates(state.optimizer), {}
        built, self.scheduler = self.scheduler, None
        if built is not None:
            self.on_fit_start(state)

    def on_fit_start(self, state: State) -> None:
        """Build the scheduler, once, and continue where a saved one stood."""
        if self.scheduler is not None:
            schedulers.check_length(self._settings, self._length, schedulers.length(state, self._since))
            return
        if self._saved:
            restored = [schedulers.plain(group) for group in state.optimizer.param_groups]
            self._build(state, self._since, self._first | state.layer_rates)
            try:
                self.load_state_dict(self._saved)
                schedulers.put_all(state.optimizer, restored)
                return
            except ValueError as error:
                refuse(f"Schedule does not take its state: {error}", state.strict)
        self._build(state, state.step, self._first | state.layer_rates if self._saved else {})

    def _build(self, state: State, since: int, first: dict[Tensor, Any]) -> None:
        self._since, self._length = since, schedulers.length(state, since)
        built = schedulers.build(self._function, state, since, first)
        self.scheduler = schedulers.check_kind(built, self.on, state.optimizer)
        self._settings = schedulers.settings(self.scheduler)

    def on_step_end(self, state: State) -> None:
        """Step the scheduler, where it goes by updates."""
        if self.on == "step":
            schedulers.step(self.scheduler, self._length)

    def on_validation_end(self, state: State) -> None:
        """Step it, where it goes by a metric."""
        if isinstance(self.on, Goal):
            schedulers.step(self.scheduler, self._length, self.on.read(state, "Schedule"))

    def on_epoch_end(self, state: State) -> None:
        """Step it, where it goes by epochs."""
        if self.on == "epoch":
            schedulers.step(self.scheduler, self._length)

    def state_dict(self) -> dict[str, Any]:
        """Return the scheduler's state, as far as it is plain data."""
        if self.scheduler is None:
            return self._saved or {"kind": None}
        return {"kind": type(self.scheduler).__name__, "state": reduced(self.scheduler.state_dict()),
                "settings": self._settings, "since": self._since}  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back, once there is a scheduler; raises ValueError for another kind of scheduler."""
        self._saved, self._since = state if state.get("kind") else {}, state.get("since", self._since)
        if self._saved and self.scheduler is not None:
            schedulers.check_same(type(self.scheduler).__name__, self._settings, state)
            self._settings = state["settings"]
            self.scheduler.load_state_dict(copy.deepcopy(state["state"]))
            self.scheduler.optimizer._opt_called = True  # torch warns of a step before any update; those restored count
