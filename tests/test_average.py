"""Average: the formulas, what is validated and restored with it, and where it stands after a kill."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FORMS, KillAt, Killed, adamw, assert_same_bits, bits, built_in, loader, loss_fn, net
from torch import nn

from hookloop.callbacks import Average, Checkpoint, EarlyStopping, GradientAccumulation, MicroBatch, NonFinite, Seed
from hookloop.loop import Callback, Loop, State


class Weights(Callback):
    """All weights and buffers after each update."""

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_step_end(self, state: State) -> None:
        self.seen.append({k: v.clone() for k, v in state.model.state_dict().items()})


def run(form: Any, *own: Callback, **kwargs: Any) -> Loop:
    first = Seed(3)
    model = net(seed=5)
    loop = Loop(model, adamw(model), [first, *own], **kwargs)
    form(loop, loss_fn, loader(40, 8), loader(16, 8, shuffle=False), epochs=4)
    return loop


def close(average: Average, expected: dict[str, torch.Tensor]) -> None:
    assert average.model is not None
    for name, x in average.model.state_dict().items():
        assert torch.allclose(x.double(), expected[name].double(), rtol=1e-5, atol=1e-7), name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("start", "every"), [(0, 1), (5, 1), (0.5, 1), (3, 4)])
def test_the_mean_of_all_since(start: float, every: int, form: Any) -> None:
    average, weights = Average("swa", start=start, every=every), Weights()
    run(form, average, weights)
    first = int(start * 20) if isinstance(start, float) else start
    taken = weights.seen[first + every - 1 :: every]
    assert average.count == len(taken)
    expected = {name: sum(one[name].double() for one in taken) / len(taken) if x.is_floating_point() else taken[-1][name]
                for name, x in taken[0].items()}  # fmt: skip
    close(average, expected)


@pytest.mark.parametrize("form", FORMS)
def test_the_exponential_mean(form: Any) -> None:
    average, weights = Average(decay=0.9, start=2, every=3), Weights()
    run(form, average, weights)
    taken = weights.seen[4::3]
    expected = {k: v.double() for k, v in taken[0].items()}
    for one in taken[1:]:
        expected = {k: 0.9 * v + 0.1 * one[k].double() if one[k].is_floating_point() else one[k] for k, v in expected.items()}
    close(average, expected)


def test_training_is_left_alone_in_any_order() -> None:
    expected = run(built_in)
    models = []
    for order in itertools.permutations(range(3)):
        average = Average(decay=0.5)
        own: list[Callback] = [average, NonFinite("skip"), GradientAccumulation(1)]
        found = run(built_in, *(own[i] for i in order))
        assert_same_bits(bits(expected), bits(found))
        models.append(average.model.state_dict())  # type: ignore[union-attr]
        assert_same_bits(models[0], models[-1])


@pytest.mark.parametrize("form", FORMS)
def test_validation_is_of_the_average(form: Any) -> None:
    average = Average(decay=0.5)
    loop = run(form, average)
    assert loop.state.eval_model is average.model
    assert loop.evaluate(loss_fn, loader(16, 8, shuffle=False))["val_loss"] == loop.state.metrics["val_loss"]
    loop.state.eval_model = None
    assert loop.evaluate(loss_fn, loader(16, 8, shuffle=False))["val_loss"] != loop.state.metrics["val_loss"]


def test_before_the_first_the_weights_themselves_are_validated() -> None:
    expected, found = run(built_in), run(built_in, average := Average(start=100))
    assert average.model is None
    assert expected.state.metrics["val_loss"] == found.state.metrics["val_loss"]


def test_early_stopping_leaves_with_what_was_validated() -> None:
    reports: list[float] = []

    class Reports(Callback):
        def on_validation_end(self, state: State) -> None:
            reports.append(state.metrics["val_loss"])

    loop = run(built_in, Average(decay=0.9), EarlyStopping("val_loss", patience=9, restore_best=True), Reports())
    loop.state.eval_model = None
    assert loop.evaluate(loss_fn, loader(16, 8, shuffle=False))["val_loss"] == min(reports)


@pytest.mark.parametrize("form", FORMS)
def test_statistics_of_the_average_are_measured(form: Any) -> None:
    """Each time with the update's last micro-batch, as torch's BatchNorm does with its momentum."""
    average, weights, batches = Average("swa", batch_norm="measure"), Weights(), []

    class Keep(Callback):
        def on_micro_end(self, state: State) -> None:
            if state.micro.training and state.micro.number == 1:
                batches.append(state.micro.batch[0].clone())

    run(form, average, weights, Keep(), MicroBatch(4))
    hand = net(seed=5)
    hand.load_state_dict(weights.seen[0])
    hand.eval()
    for count, (one, batch) in enumerate(zip(weights.seen, batches, strict=True)):
        with torch.no_grad():
            for p, (name, _) in zip(hand.parameters(), hand.named_parameters(), strict=True):
                p.copy_(p + (one[name] - p) / (count + 1) if count else one[name])
            hand[1].train()
            hand(batch)
            hand[1].eval()
    close(average, hand.state_dict())


@pytest.mark.parametrize("batch_norm", ["average", "measure"])
@pytest.mark.parametrize("kill", [1, 4, 11, 19])
def test_killed_and_resumed_it_is_the_same_average(kill: int, batch_norm: str, tmp_path: Path) -> None:
    def go(folder: Path, at: int | None) -> tuple[Loop, Average]:
        average = Average("swa", start=0.2, every=2, batch_norm=batch_norm)
        return run(
            built_in, average, Checkpoint(folder, every=1), KillAt(at), EarlyStopping(patience=9), resume=folder
        ), average

    (expected, one), folder = go(tmp_path / "a", None), tmp_path / "b"
    with pytest.raises(Killed):
        go(folder, kill)
    found, other = go(folder, None)
    assert_same_bits(bits(expected), bits(found))
    assert_same_bits(dict(one.model.state_dict()), dict(other.model.state_dict()))  # type: ignore[union-attr]
    assert expected.state.metrics["val_loss"] == found.state.metrics["val_loss"]
    assert one.count == other.count


def test_around_a_loop_and_without_one() -> None:
    model = net(seed=5)
    average = Average(decay=0.5)
    loop = Loop(model, adamw(model), [average])
    with loop:
        for batch in loader(40, 8):
            loss_fn(model, batch)["loss"].backward()
            with loop.updating():
                loop.state.optimizer.step()
            loop.state.optimizer.zero_grad()
    assert average.count == 5
    state, alone = State(model, adamw(model)), Average("swa")
    alone.on_fit_start(state)
    for step in range(3):
        state.step = step + 1
        alone.on_step_end(state)
    assert alone.count == 3


@pytest.mark.parametrize("bad", [{"kind": "mean"}, {"decay": 0}, {"decay": 1.5}, {"decay": True}, {"every": 0}, {"start": -1},
                                 {"start": 1.5}, {"batch_norm": "refresh"}])  # fmt: skip
def test_bad_arguments(bad: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError), match=next(iter(bad))):
        Average(**bad)


def test_what_can_not_be_told() -> None:
    model = nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3))
    data = [{"x": torch.randn(8, 6)}] * 3
    loop = Loop(model, adamw(model), [Average(batch_norm="measure")])
    with pytest.raises(ValueError, match=r"can't tell what of a dict the model takes: give forward=fn\(model, batch\)"):
        loop.fit(lambda m, b: m(b["x"]).square().mean(), data, epochs=1)
    model = net()
    with pytest.raises(ValueError, match=r"start=0\.5 is a share of the run, whose length is not known"):
        Loop(model, adamw(model), [Average(start=0.5)]).fit(loss_fn, iter(list(loader())), epochs=1)
