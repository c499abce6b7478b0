"""Warmup: small rates for the first updates."""

from __future__ import annotations

import math
from typing import Any

from ..loop.callback import Callback
from ..loop.state import State

SHAPES = ("linear", "cosine", "exponential")


def warmup_factor(update: int, steps: int, start: float | None = None, shape: str = "linear") -> float:
    """Return the rate's factor at update `update` (from 0): from `start` (None: 1/steps at the first) up to 1."""
    if update >= steps:
        return 1.0
    if start is None:
        # the first update already moves: (t + 1) / steps runs from 1/steps to 1 in one step less
        if shape == "linear":
            return (update + 1) / steps
        first, part = 1 / steps, update / (steps - 1) if steps > 1 else 1.0
    else:
        first, part = start, update / steps
    if shape == "linear":
        return first + (1 - first) * part
    if shape == "cosine":
        return first + (1 - first) * (1 - math.cos(math.pi * part)) / 2
    return math.exp(math.log(first) * (1 - part))


class Warmup(Callback):
    """Multiplies every group's rate by a factor that rises to 1 over the first `steps` applied updates.

    `start=None`: update t (from 0) uses (t + 1) / steps, never 0. `start=s`: s + (1 - s) * t / steps, which is torch's
    `LinearLR(start_factor=s, total_iters=steps)` and, with s = 0, the Hugging Face rule. `shape`: "linear", "cosine"
    or "exponential" between the same ends. `steps` below 1 is a share of `state.total_steps`; 0 is no warmup.
    It is a factor for each update, so any scheduler beside it is undisturbed, and a skipped update consumes none.
    Raises TypeError or ValueError for bad settings. (Goyal et al. 2017, https://arxiv.org/abs/1706.02677)
    """

    planned = True

    def __init__(self, steps: float, start: float | None = None, shape: str = "linear") -> None:
        whole = isinstance(steps, int) and not isinstance(steps, bool)
        if not whole and not (isinstance(steps, float) and 0 < steps < 1):
            raise ValueError(f"steps must be a whole number of updates, or a share above 0 and below 1, not {steps!r}")
        if steps < 0:
            raise ValueError(f"steps must be at least 0, not {steps!r}")
        if start is not None and (isinstance(start, bool) or not isinstance(start, int | float) or not 0 <= start <= 1):
            raise ValueError(f"start must be a factor from 0 to 1, or None, not {start!r}")
        if shape not in SHAPES:
            raise ValueError(f"shape must be one of {', '.join(SHAPES)}, not {shape!r}")
        if shape == "exponential" and start == 0:
            raise ValueError("an exponential can't rise from start=0; give a small start, such as 0.001, or start=None")
        self.steps, self.start, self.shape = steps, start, shape
        self._resolved: int | None = steps if whole else None  # type: ignore[assignment]

    def on_fit_start(self, state: State) -> None:
        """Turn a share into updates."""
        if self._resolved is None:
            if state.total_steps is None:
                raise ValueError(f"Warmup({self.steps}) is a share of the run, whose length is not known: give a whole "
                                 "number of updates, or steps= to fit or epochs, where one of them runs it")  # fmt: skip
            self._resolved = math.ceil(self.steps * state.total_steps)

    def on_before_optimizer_step(self, state: State) -> None:
        """Scale this update's rates."""
        steps = self._resolved
        if steps is None:
            raise RuntimeError(f"Warmup({self.steps}) is a share: run its on_fit_start first")
        if state.step < steps and (factor := warmup_factor(state.step, steps, self.start, self.shape)) != 1.0:
            state.scale_rate(factor)

    def state_dict(self) -> dict[str, Any]:
        """Return the length in updates, so that a longer run continued from here keeps it."""
        return {"steps": self._resolved}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep a share's length; a whole number is the argument's."""
        if not isinstance(self.steps, int):
            self._resolved = state["steps"]
