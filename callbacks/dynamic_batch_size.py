"""DynamicBatchSize: batches that grow while training goes on."""

from __future__ import annotations

import math
from typing import Any

from ..loop.callback import Callback
from ..loop.goal import Goal, Tracker
from ..loop.state import State

RATES = {"none": lambda ratio: 1.0, "linear": lambda ratio: ratio, "sqrt": math.sqrt}


def grown(initial: int, maximum: int, growth: float, k: int, multiple_of: int = 1) -> int:
    """Return the batch size after k growths: floor(initial * growth**k / m) * m, from `initial` up to `maximum`."""
    if k * math.log(growth) > math.log(maximum + multiple_of) - math.log(initial) + 1:
        return maximum  # far beyond, where a float's power would overflow
    product = math.floor(initial * growth**k / multiple_of) * multiple_of
    return max(initial, min(maximum, product))


class DynamicBatchSize(Callback):
    """Grows the batch size by a factor every so many epochs, or when a metric stops improving, up to `maximum` samples.

    The size is honoured to the sample whatever the loader's own batch is, and each sample is still used once an epoch.
    `every`: epochs between two growths, or a `Goal`: one growth each time its patience is used up. The unrounded
    product grows; sizes are its multiples of `multiple_of`. With `GradientAccumulation(n)` an update holds n such
    batches. `scale_lr`: the rate's factor for a batch grown r times: "none" 1, "linear" r, "sqrt" its root. Sizes are
    per rank. Raises ValueError for bad settings. (Smith et al. 2018, https://arxiv.org/abs/1711.00489)
    """

    owns = ("batch_size",)

    def __init__(self, initial: int, maximum: int, growth: float = 1.5, every: int | Goal = 1, multiple_of: int = 1,
                 scale_lr: str = "none") -> None:  # fmt: skip
        for name, value in (("initial", initial), ("maximum", maximum), ("multiple_of", multiple_of)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number of samples, at least 1, not {value!r}")
        if maximum < initial:
            raise ValueError(f"maximum must be at least initial, {initial}, not {maximum}")
        if isinstance(growth, bool) or not isinstance(growth, int | float) or not 1 < growth < math.inf:
            raise ValueError(f"growth must be a factor above 1, not {growth!r}")
        if not isinstance(every, Goal) and (not isinstance(every, int) or isinstance(every, bool) or every < 1):
            raise ValueError(f"every must be a number of epochs, at least 1, or a Goal, not {every!r}")
        if not isinstance(scale_lr, str) or scale_lr not in RATES:
            raise ValueError(f"scale_lr must be one of {', '.join(RATES)}, not {scale_lr!r}")
        self.initial, self.maximum, self.growth, self.multiple_of = initial, maximum, growth, multiple_of
        self.every, self.rate, self.growths = every, RATES[scale_lr], 0
        self.tracker = Tracker(every) if isinstance(every, Goal) else None
        self.measured = self.tracker is not None
        self.watches = () if self.tracker is None else (self.tracker.goal.metric,)

    def size(self, state: State) -> int:
        """Return the batch size now."""
        k = self.growths if isinstance(self.every, Goal) else state.epoch // self.every
        return grown(self.initial, self.maximum, self.growth, k, self.multiple_of)

    def on_step_start(self, state: State) -> None:
        """Plan the next update."""
        state.batch_size = self.size(state)

    def on_before_optimizer_step(self, state: State) -> None:
        """Scale this update's rate with the batch."""
        if (factor := self.rate(self.size(state) / self.initial)) != 1.0:
            state.scale_rate(factor)

    def on_validation_end(self, state: State) -> None:
        """Grow where the metric stopped improving."""
        if self.tracker is not None:
            self.tracker.update(self.tracker.goal.read(state, "DynamicBatchSize"))
            if self.tracker.exhausted:
                self.growths, self.tracker.bad = self.growths + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """Return growths and the watched metric's state; by epochs there is nothing to keep."""
        return {} if self.tracker is None else {"growths": self.growths, **self.tracker.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        if self.tracker is not None:
            self.growths = state["growths"]
            self.tracker.load_state_dict(state)
