"""Prune: what a trial is told, and how a run ends that it finds hopeless."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FORMS, adamw, assert_same_bits, bits, loader, loss_fn, net

from hookloop.callbacks import Checkpoint, Prune, Seed
from hookloop.callbacks.prune import MetricMissing
from hookloop.loop import Loop, State

optuna = pytest.importorskip("optuna")


class Told:
    """A trial that finds the run hopeless at one report."""

    def __init__(self, at: int) -> None:
        self.at, self.reports = at, list[tuple[int, float]]()

    def report(self, value: float, step: int) -> None:
        self.reports.append((step, value))

    def should_prune(self) -> bool:
        return len(self.reports) == self.at


def test_driven_without_a_loop() -> None:
    model = net()
    state, trial = State(model, adamw(model)), Told(3)
    prune = Prune(trial, "val_acc")
    for i, value in enumerate((0.5, 0.25, 0.75)):
        assert state.stop_reason is None
        state.step = 10 * (i + 1)
        state.report({"val_acc": torch.tensor(value), "val_loss": 1.0})
        prune.on_validation_end(state)
    assert trial.reports == [(0, 0.5), (1, 0.25), (2, 0.75)]
    assert prune.scores == {10: 0.5, 20: 0.25, 30: 0.75}
    assert prune.pruned
    assert state.stop_reason == "pruned: val_acc is 0.75 at report 3, where other trials were better"


@pytest.mark.parametrize("form", FORMS)
def test_until_then_it_changes_nothing(form: Any) -> None:
    found = []
    for end, more in ((2, []), (5, [Prune(Told(2))])):
        seed, model = Seed(0), net()
        loop = Loop(model, adamw(model), [seed, *more])
        form(loop, loss_fn, loader(), loader(20, shuffle=False), epochs=end)
        found.append(bits(loop))
    assert_same_bits(*found)


def test_a_resumed_run_goes_on_counting(tmp_path: Path) -> None:
    for epochs, expected in ((2, [0, 1]), (4, [2, 3])):
        trial = Told(9)
        seed, model = Seed(0), net()
        loop = Loop(model, adamw(model), [seed, prune := Prune(trial), Checkpoint(tmp_path)], resume=tmp_path)
        loop.fit(loss_fn, loader(), loader(20, shuffle=False), epochs=epochs)
        assert [step for step, _ in trial.reports] == expected
    assert len(prune.scores) == 4


def test_a_verdict_holds_for_a_run_that_is_resumed_or_entered_again(tmp_path: Path) -> None:
    """What is killed between its last checkpoint and the study's record of it does not train on as if nothing was said."""
    for again in range(2):
        seed, model = Seed(0), net()
        loop = Loop(model, adamw(model), [seed, prune := Prune(Told(2)), Checkpoint(tmp_path)], resume=tmp_path)
        for _ in range(2):
            state = loop.fit(loss_fn, loader(), loader(20, shuffle=False), epochs=5)
            assert prune.pruned
            assert state.epoch == 2
            assert state.stop_reason is not None
            assert state.stop_reason.startswith("pruned: val_loss is 1.")
            assert state.stop_reason.endswith(" at report 2, where other trials were better")
        assert len(prune.trial.reports) == 2 * (not again)


def test_in_a_study_of_ones_own() -> None:
    def objective(trial: Any) -> float:
        seed, model = Seed(0), net()
        prune = Prune(trial)
        optimizer = torch.optim.SGD(model.parameters(), lr=[0.01, 0.02, 0.03, 0.04, 0.05, 50.0][trial.number])
        state = Loop(model, optimizer, [seed, prune]).fit(loss_fn, loader(), loader(20, shuffle=False), epochs=3)
        if prune.pruned:
            raise optuna.TrialPruned()
        return float(state.metrics["val_loss"])

    study = optuna.create_study(pruner=optuna.pruners.MedianPruner())
    study.optimize(objective, n_trials=6)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 5 + ["PRUNED"]


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match="trial must be one of Optuna's, with report and should_prune, not 3"):
        Prune(3)
    with pytest.raises(TypeError, match="trial must be one of Optuna's"):
        Prune(optuna.trial.Trial)
    with pytest.raises(ValueError, match="metric must be the name of a metric, such as 'val_loss', not ''"):
        Prune(Told(1), "")
    model = net()
    loop = Loop(model, adamw(model), [Prune(Told(1), "val_f1")])
    with pytest.raises(
        MetricMissing, match="Prune watches 'val_f1', which was not reported; there are: val_accuracy, val_loss"
    ):
        loop.fit(loss_fn, loader(), loader(20, shuffle=False), epochs=1)
