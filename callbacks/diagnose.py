"""Diagnose: what ails a run, in words."""

from __future__ import annotations

import functools
import logging
import math
import weakref
from typing import Any

import torch

from ..loop.callback import Callback
from ..loop.goal import number
from ..loop.host import HostCopy
from ..loop.state import State
from .loss_curve import Interval, Point
from .verdicts import KINDS, Finding, verdict

CHUNK = 64  # losses copied at once, so that a step costs a list's append
log = logging.getLogger("hookloop")


class Diagnose(Callback):
    """Says in words what ails training, at each report and at the end, with the numbers it goes by and the remedy; or nothing.

    It goes by each update's loss and the report's `metric` (None: "val_loss" where that is reported, else training alone).
    `target`: the training loss that is good enough (None: a tenth of the first update's; name one where that is none, as for a
    language model, or for a net that begins trained: its losses spread by more than the first, and only the first two kinds are
    told). The words go to the log `hookloop`; `finding` holds the last, `state.metrics["diagnose/<kind>"]` is 1 for it
    (TensorBoard's `report/diagnose/<kind>`), one of divergence, rate_too_high, noise, overfitting, plateau, rate_too_low,
    underfitting; all but the first two need four reports, at even distances, the last three a loss above 0. Losses are waited
    for at reports, saves and the end. Raises ValueError for bad settings or no losses, KeyError for a missing metric.
    (Ng 2018, Machine Learning Yearning; Smith 2018, arXiv:1803.09820; Bengio 2012, arXiv:1206.5533; Karpathy 2019, A Recipe)
    """

    of_rank = True

    def __init__(self, metric: str | None = None, target: float | None = None) -> None:
        if metric is not None and (not isinstance(metric, str) or not metric):
            raise ValueError(f"metric must be the name of a validation loss, such as 'val_loss', or None, not {metric!r}")
        good = isinstance(target, int | float) and not isinstance(target, bool) and math.isfinite(target)
        if target is not None and not good:
            raise ValueError(f"target must be a finite loss that is good enough, or None, not {target!r}")
        self.metric, self.target, self.watches = metric, target, () if metric is None else (metric,)
        self.first: float | None = None
        self.finding: Finding | None = None
        self.points, self._now, self._losses, self._host = list[Point](), Interval(), list[Any](), HostCopy()

    def on_fit_start(self, state: State) -> None:
        """Have the next report hold every kind's number, so that each callback sees this report's verdict in it."""
        for kind in KINDS:
            state.log(f"diagnose/{kind}", functools.partial(self._is, kind, weakref.ref(state)))

    def _is(self, kind: str, state: Any) -> int:
        self._report(state())
        return int(self.finding is not None and self.finding.kind == kind)

    def on_step_end(self, state: State) -> None:
        """Take the update's loss in, where it lies."""
        self._now.top = max([self._now.top, *(r for r in state.rates if isinstance(r, float))])  # of tensors: at reports alone
        if (loss := state.metrics.get("loss")) is None:
            raise ValueError("Diagnose goes by the loss of each update: with loop.updating(loss=loss.detach())")
        self._losses.append(loss)
        if len(self._losses) >= CHUNK:
            self._take()

    def _take(self, all: bool = False) -> None:
        if self._losses:
            found = torch.stack([torch.as_tensor(loss).detach().float() for loss in self._losses])
            self._host.put(None, {"losses": found}, most_dims=1)
            self._losses = []
        for _, arrived in self._host.take(all):
            for loss in arrived["losses"]:
                self.first = loss if self.first is None else self.first
                self._now.add(loss)

    def _judge(self, state: State, val: float | None) -> Point:
        point = self._now.point(state.step, val, max((float(rate) for rate in state.rates if rate is not None), default=0.0))
        scale, size = state.metrics.get("noise_scale"), state.update_size * state.world
        noise = None if scale is None or not size else number("noise_scale", scale) / size
        self.finding = verdict([*self.points, point], self.first or 0.0, self.target, noise)
        return point

    def on_validation_end(self, state: State) -> None:
        """Judge the run up to this report, unless that was done when its numbers were computed."""
        self._report(state)
        self.on_fit_start(state)

    def _report(self, state: State) -> None:
        self._take(all=True)
        name = self.metric or "val_loss"
        if self.metric is not None and name not in state.reported:
            raise KeyError(f"Diagnose watches {name!r}, which was not reported; there are: {', '.join(sorted(state.reported))}")
        if self._now.count:  # not where it is reported again, with no update in between
            self.points.append(self._judge(state, number(name, state.metrics[name]) if name in state.reported else None))
            self._now = Interval(last=self._now.last)
            self._say(f"step {state.step}")

    def on_fit_end(self, state: State) -> None:
        """Say how it ended, also where a loss that is not finite ended it before a report."""
        self._take(all=True)
        if self._now.count and not math.isfinite(self._now.total):
            self._judge(state, None)
        self._say(f"at the end, step {state.step}")

    def _say(self, where: str) -> None:
        if self.finding is not None:
            log.warning("%s: %s", where, self.finding)

    def state_dict(self) -> dict[str, Any]:
        """Return the curves, once all losses are here."""
        self._take(all=True)
        return {"first": self.first, "points": [list(point) for point in self.points], "now": vars(self._now).copy(),
                "finding": None if self.finding is None else list(self.finding)}  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        self.first, self.points, self._now = state["first"], [Point(*p) for p in state["points"]], Interval(**state["now"])
        self.finding = None if state["finding"] is None else Finding(*state["finding"])
