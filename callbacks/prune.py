"""Prune: a trial of a search ends early where others at the same point were better."""

from __future__ import annotations

import warnings
from typing import Any

from ..loop.callback import Callback
from ..loop.goal import number
from ..loop.ranks import rank_and_world
from ..loop.state import State


class MetricMissing(KeyError):
    """A metric that is watched was not reported."""


class Prune(Callback):
    """Ends training, at a report, where an Optuna trial's pruner finds `metric` hopeless beside other trials' at that report.

    The trial is told every value under the report's number, from 0, so that trials of other batch sizes compare; a resumed
    run goes on counting. `pruned` says whether it ended training: the run ends as by EarlyStopping, files closed, the last
    checkpoint whole. In a study of your own raise `optuna.TrialPruned()` then. Raises TypeError for what is no trial, KeyError
    for a metric that was not reported. Of several ranks the first has the trial, the others give None, and all stop at the same
    report. (Median rule: Golovin et al. 2017; successive halving: Jamieson and Talwalkar 2016,
    https://arxiv.org/abs/1502.07943; hyperband: Li et al. 2018, https://arxiv.org/abs/1603.06560)
    """

    def __init__(self, trial: Any, metric: str = "val_loss") -> None:
        elsewhere = trial is None and rank_and_world()[0] > 0
        if not elsewhere and (
            isinstance(trial, type) or not all(callable(getattr(trial, name, None)) for name in ("report", "should_prune"))
        ):
            raise TypeError(f"trial must be one of Optuna's, with report and should_prune, not {trial!r:.60}")
        if not isinstance(metric, str) or not metric:
            raise ValueError(f"metric must be the name of a metric, such as 'val_loss', not {metric!r}")
        self.trial, self.metric, self.watches = trial, metric, (metric,)
        self.reports, self.pruned = 0, False
        self.scores: dict[int, float] = {}  # by update

    def on_fit_start(self, state: State) -> None:
        """Say again what a restored or finished run was told."""
        self._decide(state)

    def on_validation_end(self, state: State) -> None:
        """Report, and ask."""
        if self.metric not in state.reported:
            raise MetricMissing(
                f"Prune watches {self.metric!r}, which was not reported; there are: {', '.join(sorted(state.reported))}"
            )
        self.scores[state.step] = value = number(self.metric, state.metrics[self.metric])
        if self.trial is not None:
            with warnings.catch_warnings(action="ignore"):  # one that is taken up again reports what it reported before
                self.trial.report(value, self.reports)
            self.pruned = self.pruned or bool(self.trial.should_prune())
        self.reports += 1
        self.pruned = any(row[0] for row in state.ranks.agree("prunes", self.pruned))
        self._decide(state)

    def _decide(self, state: State) -> None:
        if self.pruned:
            value = list(self.scores.values())[-1]
            state.stop(f"pruned: {self.metric} is {value:.6g} at report {self.reports}, where other trials were better")

    def state_dict(self) -> dict[str, Any]:
        """Return what was reported."""
        return {"reports": self.reports, "scores": self.scores, "pruned": self.pruned}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        self.reports, self.scores, self.pruned = state["reports"], dict(state["scores"]), state["pruned"]
