"""EarlyStopping: training ends when a metric no longer gets better."""

from __future__ import annotations

import copy
import functools
import math
import warnings
from typing import Any

import torch

from ..loop.callback import Callback
from ..loop.checks import flag
from ..loop.goal import Goal, Tracker
from ..loop.state import State
from ..loop.store import Named


class EarlyStopping(Callback):
    """Stops training at the `patience`-th report in a row without an improvement of `metric` (0 acts as 1).

    An improvement is larger than `min_delta` (with `relative`, than that share of the best value's size, so it works for
    negative metrics too); only an improvement moves the best value. `min_epochs`: no stop before so many epochs, but an
    improvement until then starts the count anew. `restore_best`: the model leaves training, by any way, with the weights and
    buffers of its best report (one callback in a list may do so); entered again, it goes on from its last. `nan`: "stop" at a
    value that is not finite (a run that is entered again or resumed stays ended, until `nan` is "ignore"), or "ignore" it as
    one that is no improvement. The reason is in `state.stop_reason`, the count in `state.metrics["early_stopping"]`
    (TensorBoard's `train/early_stopping`). Raises ValueError for bad settings, KeyError for a metric that was not reported.
    """

    beside = ("weights",)

    def __init__(self, metric: str | Goal = "val_loss", patience: int = 3, min_delta: float = 0.0, mode: str = "min",
                 relative: bool = False, min_epochs: int = 0, restore_best: bool = False, nan: str = "stop") -> None:  # fmt: skip
        if isinstance(metric, Goal) and (patience, min_delta, mode, relative) != (3, 0.0, "min", False):
            raise ValueError("metric is a Goal, which says patience, min_delta, mode and relative itself; give them there")
        goal = metric if isinstance(metric, Goal) else Goal(metric, mode, patience, min_delta, relative)
        if not isinstance(min_epochs, int) or isinstance(min_epochs, bool) or min_epochs < 0:
            raise ValueError(f"min_epochs must be a whole number of epochs, at least 0, not {min_epochs!r}")
        flag("restore_best", restore_best)
        if nan not in ("stop", "ignore"):
            raise ValueError(f"nan must be 'stop' or 'ignore', not {nan!r}")
        self.tracker, self.min_epochs, self.restore_best, self.nan = Tracker(goal), min_epochs, restore_best, nan
        self.watches, self.owns = (goal.metric,), ("restored weights",) if restore_best else ()
        self.optional = () if min_epochs else ("on_epoch_end",)
        self._best: dict[str, Any] | None = None
        self._last: tuple[dict[str, Any], torch.nn.Module | None] | None = None  # of training, and what was validated
        self._broken: str | None = None

    def on_setup(self, state: State) -> None:
        """Have a restored run's verdict stand before its data are asked for."""
        state.at_enter.append(functools.partial(self._enter, state))

    def _enter(self, state: State) -> None:
        """Say again what a restored or finished run had decided."""
        self._go_on(state)
        named = Named(state.model, state.optimizer)
        if self._best is not None and (amiss := named.model_misfits(self._best)):  # resumed with strict=False
            self._best = None
            warnings.warn(
                f"EarlyStopping lets go of its best weights, which do not fit: {'; '.join(amiss.values())}", stacklevel=2
            )
        self._broken = self._broken if self.nan == "stop" else None
        if self.tracker.best is not None:
            state.log("early_stopping", self.tracker.bad)
        self._decide(state)

    def on_validation_end(self, state: State) -> None:
        """Take the report in."""
        value = self.tracker.goal.read(state, "EarlyStopping")
        if not math.isfinite(value) and self.nan == "stop":
            self._broken = f"{self.tracker.goal.metric} is {value} at step {state.step}"
        if self.tracker.update(value) and self.restore_best:
            self._best = copy_of(state, state.eval_model)
        state.log("early_stopping", self.tracker.bad)
        self._decide(state)

    def on_epoch_end(self, state: State) -> None:
        """Stop late where `min_epochs` held it up."""
        self._decide(state)

    def _decide(self, state: State) -> None:
        goal, best = self.tracker.goal, self.tracker.best
        if self._broken is not None:
            state.stop(self._broken)
        elif self.tracker.exhausted and state.epoch >= self.min_epochs:
            best_text = "no finite value" if best is None else f"best {best:.6g}"
            state.stop(f"{goal.metric} did not improve in {self.tracker.bad} reports ({best_text})")

    def on_fit_end(self, state: State) -> None:
        """Leave with the best weights."""
        state.at_enter.append(functools.partial(self._enter, state))
        if self.restore_best and self._best is not None and self._last is None:
            self._last, state.eval_model = (copy_of(state), state.eval_model), None  # the best is what is evaluated now
            Named(state.model, state.optimizer).load_model(self._best)

    def _go_on(self, state: State) -> None:
        """Train on from the last weights."""
        if self._last is not None:
            weights, state.eval_model = self._last
            Named(state.model, state.optimizer).load_model(weights)
            self._last = None

    def state_dict(self) -> dict[str, Any]:
        """Return best value, count, best weights."""
        return {**self.tracker.state_dict(), "weights": self._best, "broken": self._broken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        self.tracker.load_state_dict(state)
        self._best, self._broken = state["weights"], state["broken"]


def copy_of(state: State, model: torch.nn.Module | None = None) -> dict[str, Any]:
    """Return a copy of weights and buffers in host memory, by the names of the bare model; of `model` where it was validated."""
    found = Named(model or state.model, state.optimizer).model_state()
    return {k: v.detach().to("cpu", copy=True) if isinstance(v, torch.Tensor) else copy.deepcopy(v) for k, v in found.items()}
