"""A metric that is watched: when it got better, and when it stopped getting better."""

from __future__ import annotations

import math
import numbers
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .checks import say

if TYPE_CHECKING:
    from .state import State


@dataclass(frozen=True)
class Goal:
    """The metric that a callback watches, and what counts as an improvement of it.

    An improvement is larger than `min_delta` (with `relative`, larger than that share of the best value's size);
    `patience` is how many reports without one are borne: the next thing happens at the `patience`-th (0 acts as 1).
    Values that are not finite never improve. Raises ValueError for bad settings.
    """

    metric: str
    mode: str = "min"
    patience: int = 3
    min_delta: float = 0.0
    relative: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.metric, str) or not self.metric:
            raise ValueError(f"metric must be the name of a metric, such as 'val_loss', not {self.metric!r}")
        if self.mode not in ("min", "max"):
            raise ValueError(f"mode must be 'min' or 'max', not {self.mode!r}")
        if not isinstance(self.patience, int) or isinstance(self.patience, bool) or self.patience < 0:
            raise ValueError(f"patience must be a whole number of reports, at least 0, not {self.patience!r}")
        if not isinstance(self.relative, bool):
            raise TypeError(f"relative must be True or False (min_delta= is the share), not {self.relative!r}")
        if (
            isinstance(self.min_delta, bool)
            or not isinstance(self.min_delta, int | float)
            or not 0 <= self.min_delta < math.inf
        ):
            raise ValueError(f"min_delta must be finite and at least 0 (mode= gives direction), not {self.min_delta!r}")

    @classmethod
    def of(cls, value: str | Goal) -> Goal:
        """Take a name for a Goal with the defaults."""
        return value if isinstance(value, Goal) else cls(value)

    def read(self, state: State, who: str) -> float:
        """Return the metric from `state.metrics`; raises KeyError that lists the metrics there are.

        What the last update's own outputs gave, of one batch, is none of them.
        """
        there = sorted(state.metrics.keys() - (state.of_update - state.reported))
        if self.metric not in there:
            near = get_close_matches(self.metric, there, 1)
            raise KeyError(f"{who} watches {self.metric!r}, which was not reported; there are: {', '.join(there) or 'none'}"
                           f"{f'; the closest is {near[0]!r}' if near else ''}")  # fmt: skip
        return number(self.metric, state.metrics[self.metric])

    def better(self, value: float, best: float | None) -> bool:
        """Tell whether `value` improves on `best`."""
        if not math.isfinite(value) or best is None:
            return math.isfinite(value)
        margin = self.min_delta * abs(best) if self.relative else self.min_delta
        return value < best - margin if self.mode == "min" else value > best + margin


def number(name: str, value: Any) -> float:
    """Return a metric as a float; raises TypeError for what is no single number."""
    if isinstance(value, Tensor):
        if value.numel() == 1 and not value.is_complex():
            return float(value.detach())
    elif isinstance(value, numbers.Real) or (getattr(value, "shape", None) == () and hasattr(value, "__float__")):
        return float(value)
    shape = f" of shape {tuple(value.shape)}" if hasattr(value, "shape") else ""
    raise TypeError(f"metric {name!r} must be one number, not {type(value).__name__}{shape}: {value!r:.60}")


def plain(value: Any) -> Any:
    """Return a number of another kind, such as NumPy's, as one of Python's; anything else as it is."""
    if type(value) in (float, int, bool) or isinstance(value, Tensor) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def logged(values: Mapping[str, Any], taken: Collection[str], whose: str, prefix: str = "") -> dict[str, float]:
    """Return what was logged as floats, functions called, of which one may give names of its own to several.

    An error in one names the metric. Raises ValueError for a name that another has, or that is `taken`: `whose` says by what.
    """
    found: dict[str, float] = {}
    for name, value in values.items():
        if callable(value):
            try:
                value = value()
            except Exception as error:
                say(error, f"in computing the logged metric {name!r}")
                raise
        for one, given in value.items() if isinstance(value, Mapping) else [(name, value)]:
            if not isinstance(one, str):
                raise TypeError(f"the function logged as {name!r} must map names to numbers; {one!r} is no name")
            if one in taken or one in found:
                both = "callbacks, such as Metrics, log two metrics that they name so"
                if one in taken:
                    both = f"{whose.format(one)}, and a callback, such as Metrics, logs what it names so"
                raise ValueError(f"{prefix + one!r} is given twice: {both}: rename one of them")
            found[one] = number(f"{prefix}{one}", given)
    return found


class Tracker:
    """The best value of a Goal so far and the reports since; only an improvement moves the best."""

    def __init__(self, goal: Goal) -> None:
        self.goal, self.bad = goal, 0
        self.best: float | None = None
        self.before: tuple[float | None, int] | None = None  # the last improvement, while no save holds it

    def update(self, value: float) -> bool:
        """Take one report; return whether it was an improvement."""
        if better := self.goal.better(value, self.best):
            self.before = self.best, self.bad
        self.best, self.bad = (value, 0) if better else (self.best, self.bad + 1)
        return better

    def unsaved(self, same: bool) -> bool:
        """Return whether the last improvement is still to be saved; where the weights are no longer the `same`, it was none."""
        if self.before is not None and not same:
            (self.best, self.bad), self.before = self.before, None
        return self.before is not None

    @property
    def exhausted(self) -> bool:
        """Whether `patience` reports in a row brought no improvement."""
        return self.bad >= max(1, self.goal.patience)

    def state_dict(self) -> dict[str, Any]:
        """Return best value and count."""
        return {"best": self.best, "bad": self.bad, "goal": [self.goal.metric, self.goal.mode]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back best value and count; raises ValueError for those of another metric."""
        if state["goal"] != [self.goal.metric, self.goal.mode]:
            raise ValueError(f"it watches {self.goal.metric!r} ({self.goal.mode}) here and {state['goal'][0]!r} "
                             f"({state['goal'][1]}) in the checkpoint")  # fmt: skip
        self.best, self.bad, self.before = state["best"], state["bad"], None
