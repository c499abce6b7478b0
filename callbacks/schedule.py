"""Schedule: the rates follow a scheduler of torch."""

import copy
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..loop.callback import Callback
from ..loop.goal import Goal
from ..loop.groups import put
from ..loop.schedulers import check_follows, check_kind, check_length, check_same, rates, settings, told
from ..loop.state import State
from ..loop.store import reduced
from .schedules import named

Build = Callable[[Optimizer, int | None], LRScheduler]


class Schedule(Callback):
    """Steps a torch scheduler after each applied update, at each epoch's end, or with a metric that it watches.

    `scheduler`: one built on this optimizer, or a function `(optimizer, total_steps) -> scheduler`, called at the start, when
    groups are split and the length is known (else None), and for the updates left where another optimizer takes over; or one
    of the names in schedules.py ("linear", "cosine", "wsd", ...) with its options. `on`: "step", "epoch", or for a plateau
    and only for it a metric: its name (lower is better) or `Goal(metric, mode)`. Warmup and other factors don't disturb it.
    A resumed run goes on with the checkpoint's scheduler, and warns of other settings in the program's. Raises TypeError or
    ValueError for what doesn't fit together, as a function that gives other values than in that run.
    """

    owns, planned = ("optimizer's rates",), True

    def __init__(self, scheduler: LRScheduler | Build | str, on: str | Goal = "step", **options: Any) -> None:
        built, by_name = isinstance(scheduler, LRScheduler), isinstance(scheduler, str) or bool(options)
        if inspect.isclass(scheduler) or not (built or callable(scheduler) or isinstance(scheduler, str)):
            raise TypeError("scheduler must be a torch scheduler, or a function such as lambda optimizer, total_steps: "
                            f"CosineAnnealingLR(optimizer, total_steps), or a name as 'cosine', not {scheduler!r}")  # fmt: skip
        if not isinstance(on, str | Goal) or (isinstance(on, Goal) and on != Goal(on.metric, on.mode)):
            raise ValueError("on must be 'step', 'epoch', a metric's name, or a Goal of metric and mode alone (the "
                             f"patience is ReduceLROnPlateau's), not {on!r}")  # fmt: skip
        self.on = on if on in ("step", "epoch") else Goal.of(on)
        hooks = {Schedule.on_step_end: "step", Schedule.on_epoch_end: "epoch", Schedule.on_validation_end: "metric"}
        used = "metric" if isinstance(self.on, Goal) else self.on
        self.idle_hooks = tuple([hook for hook, when in hooks.items() if when != used])
        self._function: Any = named(scheduler, self.on, options) if by_name else None if built else scheduler
        self.scheduler: Any = check_kind(scheduler, self.on) if built else None
        self._settings = settings(self.scheduler) if built else {}
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
        _ = self.scheduler is None or check_kind(self.scheduler, self.on, state.optimizer)
        self._first = rates(state.optimizer)
        state.accepts = [*state.accepts, lambda new: check_follows(self._function, new, state)]
        state.exchanged = [*state.exchanged, self._anew]

    def _anew(self, state: State) -> None:
        self._first, self._since, self._saved = rates(state.optimizer), state.step, {}
        built, self.scheduler = self.scheduler, None
        if built is not None:
            self.on_fit_start(state)

    def on_fit_start(self, state: State) -> None:
        """Build the scheduler, once, and continue where a saved one stood."""
        left = None if state.total_steps is None else max(state.total_steps - self._since, 1)
        if self.scheduler is not None:
            check_length(self._settings, self._length, left)
            return
        groups, self._length = state.optimizer.param_groups, left
        restored = [reduced({k: v for k, v in g.items() if k != "params"}) for g in groups] if self._saved else []
        for group in groups[: len(restored)]:  # building starts a schedule at the rates there are, and sets them
            put(group, {"lr": (self._first | state.layer_rates).get(group["params"][0], group["lr"])})
        self.scheduler = check_kind(told(self._length, self._function, state.optimizer, left), self.on, state.optimizer)
        self._settings = settings(self.scheduler)
        self.load_state_dict(self._saved)
        for group, kept in zip(groups, restored, strict=False):
            put(group, kept)

    def on_step_end(self, state: State) -> None:
        """Step the scheduler, where it goes by updates."""
        if self.on == "step":
            told(self._length, self.scheduler.step)

    def on_validation_end(self, state: State) -> None:
        """Step it, where it goes by a metric."""
        if isinstance(self.on, Goal):
            told(self._length, self.scheduler.step, self.on.read(state, "Schedule"))

    def on_epoch_end(self, state: State) -> None:
        """Step it, where it goes by epochs."""
        if self.on == "epoch":
            told(self._length, self.scheduler.step)

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
            check_same(type(self.scheduler).__name__, self._settings, state)
            self._settings = state["settings"]
            self.scheduler.load_state_dict(copy.deepcopy(state["state"]))
            self.scheduler.optimizer._opt_called = True  # torch warns of a step before any update; those restored count
