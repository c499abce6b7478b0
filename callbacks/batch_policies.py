"""When a batch grows: the policies that `DynamicBatchSize(every=...)` takes, beside `NoiseScale`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..loop.checks import whole
from ..loop.goal import Goal, Tracker
from ..loop.state import State

Grow = Callable[[int], int]


def at(table: Mapping[int, int], position: int) -> int | None:
    """Return the value of the last key that is not beyond `position`, None before the first."""
    return next((table[key] for key in sorted(table, reverse=True) if key <= position), None)


class Policy:
    """Decides the batch size of the next update; may define hooks, which run as its callback's. Raises nothing itself."""

    measured = False
    watches: tuple[str, ...] = ()
    table: Mapping[int, int] | None = None

    def size(self, state: State, grow: Grow) -> int:
        """Return the size now; `grow(k)` is the size after k growths, between the bounds."""
        raise NotImplementedError(f"{type(self).__name__} must define size(self, state, grow)")

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""


class Epochs(Policy):
    """Grows the batch every so many epochs, or gives it the sizes of a table `{epoch: size}`, each from that epoch on.

    Raises ValueError for numbers that can't be.
    """

    unit = "epoch"

    def __init__(self, every: int | Mapping[int, int]) -> None:
        if isinstance(every, Mapping):
            for position, size in every.items():
                whole(f"a table's {self.unit}", position, 0, none=False)
                whole(f"the size from {self.unit} {position} on", size, 1, none=False)
            if not every:
                raise ValueError(f"every is an empty table; give {{{self.unit}: size}}, such as {{0: 32, 6: 128}}")
            self.table = dict(every)
        else:
            whole("every", every, 1, none=False)
        self.every = every

    def position(self, state: State) -> int:
        """Return where training stands, in this policy's unit."""
        return state.epoch

    def size(self, state: State, grow: Grow) -> int:
        """Return the size at this position."""
        if isinstance(self.every, int):
            return grow(self.position(state) // self.every)
        return at(self.every, self.position(state)) or grow(0)


class Steps(Epochs):
    """Grows the batch every so many updates, or gives it the sizes of a table `{step: size}`, each from that update on.

    Raises ValueError for numbers that can't be.
    """

    unit = "step"

    def position(self, state: State) -> int:
        """Return the updates applied."""
        return state.step


class Plateau(Policy):
    """Grows the batch each time a metric has brought no improvement for its Goal's patience.

    Raises KeyError where a report lacks the metric. (Smith et al. 2018, https://arxiv.org/abs/1711.00489)
    """

    measured = True

    def __init__(self, goal: str | Goal) -> None:
        self.tracker, self.growths = Tracker(Goal.of(goal)), 0
        self.watches = (self.tracker.goal.metric,)

    def size(self, state: State, grow: Grow) -> int:
        """Return the size after the growths so far."""
        return grow(self.growths)

    def on_validation_end(self, state: State) -> None:
        """Grow where the metric stopped improving."""
        self.tracker.update(self.tracker.goal.read(state, "DynamicBatchSize"))
        if self.tracker.exhausted:
            self.growths, self.tracker.bad = self.growths + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """Return growths and the watched metric's state."""
        return {"growths": self.growths, **self.tracker.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        self.growths = state["growths"]
        self.tracker.load_state_dict(state)
