"""Metrics: torchmetrics, fed and reset at the right times."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..loop.callback import Callback
from ..loop.checks import flag
from ..loop.state import State
from .metric_parts import counts, fed, held, joined, put_back
from .metric_values import check_values, values

if TYPE_CHECKING:
    from torchmetrics import Metric, MetricCollection


class Metrics(Callback):
    """Reports torchmetrics of what `loss_fn` returns as "preds" and "target", over validation, without touching training.

    `metrics`: a Metric, a MetricCollection, or names to Metrics; reported as `val_<name>`, one that computes several numbers
    as `val_<name>_<key>` (`val_<key>` where the key begins with the name), a row of them as `val_<name>_0` and so on.
    `training=True` also keeps a copy over each training epoch (`train_<name>`), fed once a step's update is applied; its
    `update` is work in the step, and some metrics wait for the device there. Computed across ranks by torchmetrics itself.
    What one keeps beyond its reset, as MinMaxMetric does, begins anew in a resumed run. Raises TypeError for what is no
    Metric or computes no numbers (a matrix, a tuple; at the first report where it shows only then), KeyError where `loss_fn`
    returned no "preds" or "target".
    """

    of_rank = True

    def __init__(self, metrics: Metric | MetricCollection | Mapping[str, Metric], training: bool = False) -> None:
        from torchmetrics import Metric, MetricCollection

        if isinstance(metrics, Metric):
            metrics = {type(metrics).__name__.removeprefix("Multiclass").removeprefix("Binary").lower(): metrics}
        named = dict(metrics.items()) if isinstance(metrics, MetricCollection | Mapping) else {}
        for name, metric in named.items():
            if not isinstance(name, str) or not isinstance(metric, Metric):
                raise TypeError(f"metrics[{name!r}] must be a torchmetrics.Metric, not {type(metric).__name__}")
            check_values(name, metric)
        if not named:
            raise TypeError(f"metrics must be a Metric, a MetricCollection or names to Metrics, not {metrics!r}")
        flag("training", training)
        self.validation: dict[str, Any] = {name: metric.clone() for name, metric in named.items()}
        self.training: dict[str, Any] = {name: metric.clone() for name, metric in named.items()} if training else {}
        self.optional = () if training else ("on_step_end", "on_epoch_end")
        self._given = {name: counts(metric) for name, metric in self.training.items()}
        self._seen, self._of = list[tuple[Any, Any]](), -1  # of which try of an update

    def on_setup(self, state: State) -> None:
        """Put the metrics on the model's device."""
        for metric in (*self.validation.values(), *self.training.values()):
            metric.to(state.device)

    def on_fit_start(self, state: State) -> None:
        """Have a restored epoch's values reported."""
        for name, metric in self.training.items():
            if fed(metric, self._given[name]):
                state.log(f"train_{name}", functools.partial(values, "train_", name, metric))

    def on_micro_end(self, state: State) -> None:
        """Feed validation's; keep training's until the update is applied, since a step may be redone or skipped."""
        micro = state.micro
        if micro is None or (micro.training and not self.training):
            return
        if missing := [name for name in ("preds", "target") if name not in micro.outputs]:
            raise KeyError(f"Metrics needs loss_fn to return {' and '.join(map(repr, missing))} beside 'loss'; it returned "
                           f"{', '.join(micro.outputs)}")  # fmt: skip
        pair = micro.outputs["preds"], micro.outputs["target"]
        if micro.training:
            self._seen, self._of = [*(self._seen if micro.number else ()), pair], state.step + state.skipped
            return
        for name, metric in self.validation.items():
            if micro.number == 0:
                metric.reset()
                state.log(name, functools.partial(values, "", name, metric))
            metric.update(*pair)

    def on_step_end(self, state: State) -> None:
        """Feed training's."""
        for name, metric in self.training.items():
            for pair in self._seen if self._of + 1 == state.step + state.skipped else ():  # else this rank took no part
                metric.update(*pair)
            state.log(f"train_{name}", functools.partial(values, "train_", name, metric))
        self._seen = []

    def on_epoch_end(self, state: State) -> None:
        """Begin a new epoch."""
        for metric in self.training.values():
            metric.reset()

    def state_dict(self) -> dict[str, Any]:
        """Return what training's metrics hold of the epoch."""
        return {name: held(metric, self._given[name]) for name, metric in self.training.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back; raises ValueError for a metric that is missing here, or made of others."""
        for name, saved in state.items():
            if (metric := self.training.get(name)) is None:
                raise ValueError(f"the checkpoint holds the training metric {name!r}; give it, with training=True")
            put_back(repr(name), metric, saved, self._given[name])

    def joined(self, states: list[dict[str, Any]], first: bool) -> dict[str, Any]:
        """Return what training's metrics hold of all ranks, for the first; the others begin with nothing."""
        saved = {name: [state[name] for state in states if name in state] for name in self.training}
        return {name: joined(repr(name), self.training[name], each, first) for name, each in saved.items() if each}
