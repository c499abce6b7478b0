"""EarlyStopping alone, by tables of exact stops, and in both forms."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FORMS, adamw, assert_same_bits, bits, built_in, loader, loss_fn, net

from hookloop.callbacks import Checkpoint, EarlyStopping, Seed
from hookloop.loop import Callback, Goal, Loop, State

NAN, INF = math.nan, math.inf


def stop_at(values: list[float], every_epoch: bool = True, **kwargs: Any) -> int | None:
    """The report (from 1) after which the run is stopped, driven without a loop."""
    model = net()
    state, callback = State(model, adamw(model)), EarlyStopping("score", **kwargs)
    callback.on_fit_start(state)
    for count, value in enumerate(values, 1):
        state.metrics["score"] = value
        callback.on_validation_end(state)
        if every_epoch:
            state.epoch += 1
            callback.on_epoch_end(state)
        if state.stop_reason is not None:
            return count
    return None


@pytest.mark.parametrize(("values", "kwargs", "expected"), [
    ([3, 2, 1, 1, 1, 1], {"patience": 3}, 6),
    ([3, 3, 3, 3], {"patience": 3}, 4),
    ([3, 3], {"patience": 0}, 2),
    ([3, 3], {"patience": 1}, 2),
    ([3, 2, 1], {"patience": 1}, None),
    ([1, 2, 3], {"patience": 1, "mode": "max"}, None),
    ([1, 2, 3], {"patience": 1, "mode": "min"}, 2),
    ([1.0, 0.95, 0.9, 0.85], {"patience": 3, "min_delta": 0.1}, None),  # 0.85 is more than 0.1 better than 1.0
    ([1.0, 0.95, 0.91, 0.90], {"patience": 3, "min_delta": 0.1}, 4),  # exactly min_delta is not more
    ([100.0, 99.5, 99.2, 98.9], {"patience": 3, "min_delta": 0.01, "relative": True}, None),
    ([100.0, 99.5, 99.2, 99.1], {"patience": 3, "min_delta": 0.01, "relative": True}, 4),
    ([-100.0, -100.5, -101.5], {"patience": 2, "min_delta": 0.01, "relative": True}, None),
    ([-100.0, -100.5, -100.9], {"patience": 2, "min_delta": 0.01, "relative": True}, 3),
    ([-1.0, -1.5, -1.2], {"patience": 1, "min_delta": 0.1, "relative": True}, 3),
    ([3, 4, 5, 2, 4, 5], {"patience": 2, "min_epochs": 4}, 6),  # the improvement came: no stop was latched
    ([3, 4, 5, 6, 7], {"patience": 2, "min_epochs": 4}, 4),
    ([3, 4, 5, 6, 7], {"patience": 2, "min_epochs": 9}, None),
])  # fmt: skip
def test_es4_exact_stops(values: Any, kwargs: Any, expected: int | None) -> None:
    assert stop_at(values, **kwargs) == expected


@pytest.mark.parametrize(("values", "nan", "expected"), [
    ([NAN, 1, 2], "stop", 1), ([1, INF], "stop", 2), ([1, -INF], "stop", 2), ([3, 2, NAN], "stop", 3),
    ([NAN, NAN, NAN, 1], "ignore", 3), ([NAN, NAN, 1, NAN, NAN], "ignore", None), ([1, -INF, 1, 1], "ignore", 4),
    ([1, NAN, 0.5, INF, NAN, NAN], "ignore", 6),
])  # fmt: skip
def test_es2_values_that_are_not_finite(values: Any, nan: str, expected: int | None) -> None:
    assert stop_at(values, patience=3, nan=nan) == expected


def test_es2_never_becomes_the_best() -> None:
    model = net()
    state, callback = State(model, adamw(model)), EarlyStopping("score", nan="ignore")
    for value in (NAN, -INF, INF):
        state.metrics["score"] = value
        callback.on_validation_end(state)
    assert callback.tracker.best is None
    assert state.metrics["early_stopping"] == 3
    assert state.stop_reason is not None
    assert "no finite value" in state.stop_reason


def test_es1_missing_metric_lists_those_there_are() -> None:
    model = net()
    loop = Loop(model, adamw(model), [EarlyStopping("val_acuracy")])
    with pytest.raises(KeyError, match=r"'val_acuracy', which was not reported; there are: .*val_accuracy, val_loss"):
        built_in(loop, loss_fn, loader(), loader(), epochs=1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("metric", "near"), [("loss", "val_loss"), ("accuracy", "val_accuracy")])
def test_es1_what_the_last_update_gave_was_not_reported(form: Any, metric: str, near: str) -> None:
    """The number of one training batch is no metric, but what a callback logs under any name is."""

    class Logs(Callback):
        def on_step_end(self, state: State) -> None:
            state.log(metric, 1.0)
            state.log("mine", 2.0)

    text = rf"'{metric}', which was not reported; there are: (early_stopping, )?val_accuracy, val_loss; the closest is '{near}'"
    loop = Loop(model := net(), adamw(model), [EarlyStopping(metric)])
    with pytest.raises(KeyError, match=text):
        form(loop, loss_fn, loader(), loader(), epochs=2)
    assert loop.state.epoch == 0
    for watched in (metric, "mine"):
        loop = Loop(model := net(), adamw(model), [Logs(), EarlyStopping(watched, patience=2)])
        assert form(loop, loss_fn, loader(), loader(), epochs=9).epoch == 3
    loop = Loop(model := net(), adamw(model), [early := EarlyStopping(metric)])
    with loop:
        for _ in loop.epochs(1):
            for step in loop.steps(loader()):
                for micro in step:
                    with micro:
                        micro.backward(loss_fn)
                loop.update()
            loop.report({metric: 3.0})
    assert early.tracker.best == 3.0


@pytest.mark.parametrize(("value", "ok"), [
    (torch.tensor(1.0), True), (torch.tensor([1.0]), True), (1, True), (True, True), (torch.ones(2), False), ("low", False),
    (None, False),
])  # fmt: skip
def test_es3_kinds_of_values(value: Any, ok: bool) -> None:
    model = net()
    state, callback = State(model, adamw(model)), EarlyStopping("score")
    state.metrics["score"] = value
    if ok:
        callback.on_validation_end(state)
        assert callback.tracker.best == 1.0
    else:
        with pytest.raises(TypeError, match="'score' must be one number"):
            callback.on_validation_end(state)


class Scores(Callback):
    """Reports scores of its own beside the validation loss."""

    def __init__(self, values: list[float]) -> None:
        self.values = values
        self.weights: list[Any] = []

    def on_micro_end(self, state: State) -> None:
        if not state.micro.training and state.micro.number == 0:
            self.weights.append(copy.deepcopy(state.model.state_dict()))
            state.log("score", self.values[len(self.weights) - 1])


@pytest.mark.parametrize("form", FORMS)
def test_stops_and_restores_the_best(form: Any) -> None:
    model, scores = net(), Scores([3.0, 1.0, 2.0, 2.0, 0.0])
    loop = Loop(model, adamw(model), [scores, EarlyStopping("val_score", patience=2, restore_best=True)])
    state = form(loop, loss_fn, loader(), loader(), epochs=9)
    assert state.epoch == 4
    assert state.stop_reason == "val_score did not improve in 2 reports (best 1)"
    assert_same_bits(model.state_dict(), scores.weights[1])


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, None])
def test_best_comes_back_on_every_way_out(error: Any) -> None:
    model, scores = net(), Scores([3.0, 1.0, 2.0, 2.0])

    def failing(m: Any, batch: Any) -> Any:
        if error is not None and m.training and loop.state.epoch == 3:
            raise error
        return loss_fn(m, batch)

    loop = Loop(model, adamw(model), [EarlyStopping("val_score", restore_best=True, patience=9), scores])
    if error is None:
        built_in(loop, failing, loader(), loader(), epochs=4)
    else:
        with pytest.raises(error):
            built_in(loop, failing, loader(), loader(), epochs=9)
    assert_same_bits(model.state_dict(), scores.weights[1])


def test_entered_again_goes_on_from_the_last_weights() -> None:
    def run(parts: list[int]) -> Any:
        seed, model = Seed(1), net(seed=1)
        loop = Loop(model, adamw(model), [seed, EarlyStopping(patience=99, restore_best=True)])
        for epochs in parts:
            built_in(loop, loss_fn, loader(), loader(), epochs=epochs)
        return {k: v.clone() for k, v in model.state_dict().items()}

    assert_same_bits(run([6]), run([2, 5, 6]))


def test_around_a_loop_of_ones_own_it_does_so_before_the_first_forward() -> None:
    """Which comes before any hook: its gradient is that of the last weights, not of the best."""
    scores = [1.0, *([2.0] * 8)]  # the first epoch's weights stay the best

    def run(parts: list[int]) -> Any:
        model = net(noise=False)
        loop = Loop(model, adamw(model), [EarlyStopping("score", patience=99, restore_best=True)])
        given, batches = iter(scores), list(loader(shuffle=False))
        for epochs in parts:
            with loop:
                for _ in range(epochs):
                    for batch in batches:
                        loss_fn(model, batch)["loss"].backward()
                        with loop.updating():
                            loop.state.optimizer.step()
                        loop.state.optimizer.zero_grad()
                    loop.report({"score": next(given)})
        with loop:  # and out again: the best, as before
            pass
        return bits(loop)

    assert_same_bits(run([4]), run([2, 2]))


def test_extra_state_is_that_of_the_best_report_too(tmp_path: Path) -> None:
    class Counts(torch.nn.Linear):
        def __init__(self) -> None:
            super().__init__(6, 3)
            self.extra = {"calls": 0}

        def forward(self, x: Any) -> Any:
            self.extra["calls"] += self.training
            return super().forward(x)

        def get_extra_state(self) -> Any:  # a live one, which goes on changing
            return self.extra

        def set_extra_state(self, extra: Any) -> None:
            self.extra = extra

    def make() -> Loop:
        model, scores = Counts(), Scores([1.0, 2.0, 3.0, 4.0])
        return Loop(model, adamw(model), [EarlyStopping("val_score", patience=9, restore_best=True), Checkpoint(tmp_path), scores],
                    resume=tmp_path)  # fmt: skip

    loop = make()
    for epochs in (3, 4):  # 7 updates each
        built_in(loop, loss_fn, loader(), loader(), epochs=epochs)
        assert loop.state.model.extra == {"calls": 7}
        loop.state.model.extra["calls"] += 100  # used on after training, which neither the best nor the last is to meet
    assert torch.load(f"{loop.state.saved}/model.pt", weights_only=True)["_extra_state"] == {"calls": 28}
    assert built_in(make(), loss_fn, loader(), loader(), epochs=6).model.extra == {"calls": 7}


def test_a_run_that_met_nan_goes_on_only_where_nan_is_ignored(tmp_path: Path) -> None:
    def make(nan: str) -> Loop:
        model = net()
        return Loop(model, adamw(model), [Checkpoint(tmp_path), EarlyStopping("val_score", 9, nan=nan), Scores([1.0, NAN, 0.5])],
                    resume=tmp_path)  # fmt: skip

    stops, goes_on = make("stop"), make("ignore")
    for loop in (stops, stops, make("stop")):
        state = built_in(loop, loss_fn, loader(), loader(), epochs=4)
        assert (state.epoch, state.stop_reason) == (2, "val_score is nan at step 14")
    assert (built_in(goes_on, loss_fn, loader(), loader(), epochs=4).epoch, goes_on.state.stop_reason) == (4, None)
    assert built_in(make("stop"), loss_fn, loader(), loader(), epochs=5).epoch == 5


def test_a_stopped_run_stays_stopped_when_resumed(tmp_path: Path) -> None:
    def run() -> State:
        model = net()
        loop = Loop(model, adamw(model), [Checkpoint(tmp_path), EarlyStopping("val_score", patience=1), Scores([1.0, 2.0] * 9)],
                    resume=tmp_path)  # fmt: skip
        return built_in(loop, loss_fn, loader(), loader(), epochs=9)

    first, second = run(), run()
    assert first.step == second.step
    assert first.epoch == second.epoch == 2
    assert first.stop_reason == second.stop_reason == "val_score did not improve in 1 reports (best 1)"


def test_the_training_loss_beside_a_val_loader_is_warned_of_before_a_sample_is_read() -> None:
    class Reports(Callback):
        def on_step_end(self, state: State) -> None:
            state.log("train_loss", lambda: 1.0)

    for own, epochs in ((), 0), ((Reports(),), 2):
        model, train = net(), loader()
        loop = Loop(model, adamw(model), [EarlyStopping("train_loss", patience=1), *own])
        with pytest.warns(UserWarning, match="EarlyStopping watches 'train_loss', which fit reports only without a val_loader"):
            state = built_in(loop, loss_fn, train, loader(), epochs=epochs)
        assert len(train.dataset.read) == (100 if own else 0)
        assert state.stop_reason == ("train_loss did not improve in 1 reports (best 1)" if own else None)
    model = net()
    assert built_in(Loop(model, adamw(model), [EarlyStopping("train_loss")]), loss_fn, loader(), epochs=1).epoch == 1


def test_two_that_would_restore_their_own_best_weights_are_refused() -> None:
    model = net()
    first, second, third = (EarlyStopping(m, restore_best=r).named(m) for m, r in (("a", True), ("b", True), ("c", False)))
    with pytest.raises(ValueError, match="EarlyStopping and EarlyStopping both own restored weights; keep one of them"):
        Loop(model, adamw(model), [first, second])
    Loop(model, adamw(model), [third, first])


@pytest.mark.parametrize(("kwargs", "says"), [
    ({"metric": ""}, "metric must be"), ({"patience": -1}, "patience must be"), ({"patience": 1.5}, "patience must be"),
    ({"mode": "lower"}, "mode must be"), ({"min_delta": -1.0}, "min_delta must be"), ({"min_delta": NAN}, "min_delta must be"),
    ({"min_epochs": -1}, "min_epochs must be"), ({"min_epochs": True}, "min_epochs must be"), ({"nan": "skip"}, "nan must be"),
    ({"metric": Goal("x"), "patience": 5}, "metric is a Goal"),
])  # fmt: skip
def test_bad_arguments(kwargs: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        EarlyStopping(**kwargs)
