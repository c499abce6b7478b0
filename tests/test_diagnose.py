"""Diagnose: what it says of runs whose ill is known, and that its curves are those of a loop written by hand."""

from __future__ import annotations

import itertools
import json
import logging
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FORMS, KillAt, Killed, adamw, assert_same_bits, bits, loader, loss_fn, net, same
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hookloop.callbacks import Checkpoint, Diagnose, EarlyStopping, NoiseScale, Seed, TensorBoard, Warmup
from hookloop.callbacks.loss_curve import Interval, Point
from hookloop.callbacks.verdicts import KINDS, REMEDIES, Finding, verdict
from hookloop.loop import Loop, State

CURVES = json.loads((Path(__file__).parent / "data" / "diagnose.json").read_text())
RIGHT = {"healthy": None, "healthy, cosine": None, "healthy, begun trained": None,
         "width 1": "underfitting", "50 samples": "overfitting",
         "rate x 100": "rate_too_high", "rate / 100": "rate_too_low", "batch 2": "noise",
         "rate decayed too early": "plateau"}  # fmt: skip


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", RIGHT)
def test_recorded_runs_are_named_right_at_the_end_and_never_wrong_before(kind: str, seed: int) -> None:
    """Seeds 3 and 4 took no part in choosing the rules."""
    curve = CURVES[kind][seed]
    points = [Point(*point) for point in curve["points"]]
    found = [verdict(points[: i + 1], curve["first"]) for i in range(len(points))]
    said = [None if one is None else one.kind for one in found]
    assert said[-1] == RIGHT[kind]
    assert set(said) <= {None, RIGHT[kind]}


def points(train: list[float], val: list[float] | None = None, **more: Any) -> list[Point]:
    vals: list[Any] = [None] * len(train) if val is None else val
    fixed = {"spread": 0.01, "rate": 0.1, "top": 0.1, **more}
    return [Point(10 * i, t, peak=t, val=v, **fixed) for i, (t, v) in enumerate(zip(train, vals, strict=True), 1)]


LEARNS = [1.0, 0.5, 0.3, 0.21, 0.15, 0.1]
CASES: list[tuple[str | None, list[Point], float, dict[str, Any]]] = [
    (None, [], 2.0, {}),
    (None, points(LEARNS), 2.0, {}),
    (None, points(LEARNS, LEARNS), 2.0, {}),
    ("divergence", points([1.0, math.nan]), 2.0, {}),
    ("divergence", points([math.inf]), 2.0, {}),
    ("divergence", points([1.0], [math.nan]), 2.0, {}),
    ("divergence", points([1.0]), math.nan, {}),
    ("divergence", points([1.0, 0.5, 2.5]), 2.0, {}),
    ("rate_too_high", points([4.0]), 2.0, {}),
    ("rate_too_high", [*points([1.0]), points([1.0])[0]._replace(peak=21.0)], 2.0, {}),
    (None, [points([1.0])[0]._replace(peak=21.0), *points(LEARNS)], 2.0, {}),  # it went well in the end
    ("noise", [*points([0.1] * 4, spread=0.4)[:-1], points([0.1], spread=0.4)[0]._replace(peak=3.0)], 2.0, {}),
    ("noise", [*points([0.1] * 4, spread=0.4)[:-1], points([0.1], spread=0.4)[0]._replace(peak=3.0)], 2.0, {"noise": 50.0}),
    (None, [*points([0.1] * 4, spread=0.4)[:-1], points([0.1], spread=0.4)[0]._replace(peak=3.0)], 2.0, {"noise": 2.0}),
    ("overfitting", points(LEARNS, [1.0, 0.6, 0.6, 0.6, 0.7, 0.8]), 2.0, {}),
    (None, points(LEARNS, [x + 0.01 for x in LEARNS]), 2.0, {}),
    (None, points(LEARNS[:3], [1.0, 0.8, 0.9]), 2.0, {}),
    ("underfitting", points([1.0, 0.82, 0.8, 0.8, 0.8], [1.0, 0.82, 0.8, 0.8, 0.8]), 2.0, {}),
    (None, points([1.0, 0.82, 0.8, 0.8, 0.8]), 2.0, {"target": 0.9}),
    ("underfitting", points([1.0, 0.15, 0.15, 0.15, 0.15]), 2.0, {"target": 0.1}),
    ("plateau", points([2.0, 1.99, 2.0, 1.98, 1.99]), 2.0, {}),
    ("plateau", points([1.5, 1.0])[:2] + points([0.8, 0.79, 0.79, 0.79], rate=0.001), 2.0, {}),
    # what had stopped before the rate went down has another reason
    ("underfitting", points([1.5, 0.82, 0.8, 0.8, 0.8, 0.8]) + points([0.79, 0.79, 0.79, 0.79], rate=0.001), 2.0, {}),
    ("rate_too_low", points([1.9, 1.7, 1.5, 1.3, 1.15]), 2.0, {}),
    ("rate_too_low", points([2.0, 1.98, 1.96, 1.94, 1.92]), 2.0, {}),  # slow, and beyond its noise
    ("plateau", points([2.0, 1.98, 1.96, 1.94, 1.92], spread=0.1), 2.0, {}),
    (None, points([1.0, 0.9, 0.8, 0.7, 0.6]), 2.0, {}),  # it fell fast at first, and still learns
    # a gap that was there from the beginning, by chance a little wider later; and one beside which validation still improves
    (None, points(LEARNS, [x + gap for x, gap in zip(LEARNS, [0.15, 0.15, 0.15, 0.151, 0.15, 0.15], strict=True)]), 2.0, {}),
    (None, points([1.0, 0.5, 0.3, 0.15, 0.05, 0.01], [1.0, 0.55, 0.4, 0.33, 0.29, 0.25]), 2.0, {}),
    ("underfitting", points([1.0, 0.82, 0.8, 0.8, 0.8], [0.9, 0.5, 0.3, 0.15, 0.15]), 2.0, {}),
    (None, points([1.0, 0.82, 0.8, 0.8, 0.8], [0.9, 0.5, 0.3, 0.08, 0.08]), 2.0, {}),  # dropout alone keeps its loss up
    # a net that begins trained: one update's loss was small by chance, and single losses leap among those of each report
    (None, [p._replace(peak=0.6) for p in points([0.06, 0.03, 0.02, 0.01, 0.01, 0.03], spread=0.08)], 0.008, {}),
    ("underfitting", points([0.06, 0.03, 0.02, 0.02, 0.02, 0.02], spread=0.05), 0.008, {"target": 0.01}),
    ("rate_too_high", points([1.4, 1.2, 1.1], spread=0.4), 0.008, {}),
    ("divergence", points([0.06, 0.03, 0.5], spread=0.08), 0.008, {}),
    (None, points([0.5, 0.4, 0.3, 0.25, 0.2]), 0.0, {}),
    (None, points([0.5, 0.4, 0.3, 0.25, 0.2]), 0.0, {"target": 0.1}),
    (None, points([-2.0, -4.0, -6.0, -8.0, -9.0]), -1.0, {"target": -10.0}),
    (None, points([1.0, -4.0, -6.0, -8.0, -9.0]), 2.0, {"target": -10.0}),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(CASES)))
def test_curves_written_by_hand(number: int) -> None:
    kind, given, first, more = CASES[number]
    found = verdict(given, first, **more)
    assert (None if found is None else found.kind) == kind


def test_every_kind_has_a_remedy_and_its_words_hold_the_numbers() -> None:
    assert set(REMEDIES) == set(KINDS) == {kind for kind, *_ in CASES if kind}
    found = str(verdict(points(LEARNS, [1.0, 0.6, 0.6, 0.6, 0.7, 0.8]), 2.0))
    assert found.startswith(
        "overfitting: validation is 0.8 with a training loss of 0.1: the gap grew from 0.133 to 0.547 while"
    )
    assert "Remedy: get more data or augmentation" in found
    assert "the gradient noise scale asks for 50 times the batch" in str(verdict(CASES[12][1], 2.0, noise=50.0))
    assert str(Finding("rate_too_low", "x")).startswith("rate too low: x. Remedy: ")


def test_the_sums_are_those_of_the_losses() -> None:
    torch.manual_seed(0)
    losses = (torch.randn(3000).double() * 0.2 + torch.linspace(5, 1, 3000)).tolist()
    whole = Interval()
    for loss in losses:
        whole.add(loss)
    point = whole.point(7, 0.5, 0.1)
    assert point.train == pytest.approx(statistics.fmean(losses), rel=1e-12)
    assert point.spread == pytest.approx(0.2, rel=0.03)  # the fall from 5 to 1 is no noise
    assert (point.peak, point.step, point.val, point.rate, point.top) == (max(losses), 7, 0.5, 0.1, 0.1)
    assert Interval(last=3.0).count == 0


@pytest.mark.parametrize("form", FORMS)
def test_its_points_are_those_of_a_loop_written_by_hand(form: Any) -> None:
    """150 updates a report: more than are sent at once, and not a multiple of it."""
    diagnose, model = Diagnose(), net(noise=False)
    data = loader(150, 1, shuffle=False)
    loop = Loop(model, torch.optim.SGD(model.parameters(), lr=0.01), [Warmup(200), diagnose])
    form(loop, loss_fn, data, loader(20, 8, shuffle=False), epochs=2)

    other = net(noise=False)
    optimizer, losses = torch.optim.SGD(other.parameters(), lr=0.01), []
    for step, batch in enumerate([*data, *data]):
        optimizer.param_groups[0]["lr"] = 0.01 * min(1.0, (step + 1) / 200)
        optimizer.zero_grad()
        loss = loss_fn(other, batch)["loss"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert diagnose.first == losses[0]
    assert [p.step for p in diagnose.points] == [150, 300]
    for point, part, rate in zip(diagnose.points, (losses[:150], losses[150:]), (0.0075, 0.01), strict=True):
        assert point.train == pytest.approx(statistics.fmean(part), rel=1e-12)
        assert point.peak == max(part)
        assert (point.rate, point.top) == (rate, rate)
    squares = [(b - a) ** 2 for a, b in itertools.pairwise(losses[:150])]
    assert diagnose.points[0].spread == pytest.approx(math.sqrt(statistics.fmean(squares) / 2), rel=1e-12)
    assert diagnose.points[1].val == loop.state.metrics["val_loss"]


def drive(diagnose: Diagnose, train: list[float], val: Any = None, updates: int = 3) -> State:
    """Drive it alone, as a loop would."""
    model = nn.Linear(1, 1)
    state = State(model, torch.optim.SGD(model.parameters(), lr=0.1))
    diagnose.on_fit_start(state)
    for i, loss in enumerate(train):
        for _ in range(updates):
            state.step += 1
            state.metrics["loss"] = torch.tensor(loss)
            diagnose.on_step_end(state)
        state.report({} if val is None else {"val_loss": val[i]})
        diagnose.on_validation_end(state)
    return state


def test_without_a_loop_it_says_so_in_words_and_in_a_curve(caplog: pytest.LogCaptureFixture) -> None:
    diagnose = Diagnose()
    with caplog.at_level(logging.WARNING, "hookloop"):
        state = drive(diagnose, [2.0, 1.9, 1.7, 1.5, 1.3, 1.15], [2.0, 1.9, 1.7, 1.5, 1.3, 1.15])
        diagnose.on_fit_end(state)
    assert diagnose.finding is not None
    assert diagnose.finding.kind == "rate_too_low"
    assert {k: v for k, v in state.metrics.items() if k.startswith("diagnose/") and v} == {"diagnose/rate_too_low": 1}
    assert len([name for name in state.metrics if name.startswith("diagnose/")]) == len(KINDS)
    assert caplog.messages[-2].startswith(
        "step 18: rate too low: the training loss is 1.15 after 2 in the first update, and changes"
    )
    assert caplog.messages[-1].startswith("at the end, step 18: rate too low: ")


def test_a_loss_that_the_program_fills_in_place_is_taken_as_it_was() -> None:
    """As the static output of a CUDA graph of the user's own is."""
    model, diagnose, loss = nn.Linear(1, 1), Diagnose(), torch.zeros(())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Loop(model, optimizer, [diagnose]) as loop:
        for i in range(10):
            loss.fill_(i)
            with loop.updating(loss=loss):
                optimizer.step()
        loop.report({})
    assert (diagnose.first, diagnose.points[0].train, diagnose.points[0].peak) == (0.0, 4.5, 9.0)


def test_it_is_silent_where_nothing_ails(caplog: pytest.LogCaptureFixture) -> None:
    diagnose = Diagnose()
    with caplog.at_level(logging.DEBUG, "hookloop"):
        diagnose.on_fit_end(drive(diagnose, [2.0, *LEARNS], [2.0, *LEARNS]))
    assert (diagnose.finding, caplog.messages) == (None, [])


def test_the_noise_scale_is_taken_where_it_is_reported() -> None:
    for scale, kind in ((8 * 50.0, "noise"), (8 * 2.0, None)):
        model, diagnose = nn.Linear(1, 1), Diagnose()
        state = State(model, torch.optim.SGD(model.parameters(), lr=0.1), update_size=8)
        for step in range(200):
            state.step += 1
            state.metrics |= {"loss": torch.tensor(2.0 if step % 40 in (0, 20) else 0.01), "noise_scale": torch.tensor(scale)}
            diagnose.on_step_end(state)
            if step % 40 == 39:
                state.report({})
                diagnose.on_validation_end(state)
        assert (diagnose.finding.kind if diagnose.finding else None) == kind


def test_a_loss_that_is_not_finite_is_named_where_the_run_breaks_before_a_report(caplog: pytest.LogCaptureFixture) -> None:
    model, diagnose = net(), Diagnose()
    calls = []

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        calls.append(1)
        return loss_fn(model, batch)["loss"] * (math.nan if len(calls) > 3 else 1.0)

    Loop(model, adamw(model), [diagnose]).fit(loss, loader(), steps=5)
    assert diagnose.finding is not None
    assert diagnose.finding.kind == "divergence"
    assert "a loss is not finite: training nan, validation None" in caplog.messages[-1]
    assert caplog.messages[-1].startswith("at the end, step 5: divergence")


@pytest.mark.parametrize("form", FORMS)
def test_killed_at_each_update_and_resumed_it_has_the_same_curves(form: Any, tmp_path: Path) -> None:
    def one(folder: Path, at: int | None) -> Any:
        seed, model, diagnose = Seed(0), net(), Diagnose()
        callbacks = [KillAt(at), diagnose, EarlyStopping(patience=9), Checkpoint(folder, every=1)]
        loop = Loop(model, adamw(model), [seed, *callbacks], resume=folder)
        form(loop, loss_fn, loader(), loader(20, 8, shuffle=False), epochs=2)
        return bits(loop), diagnose.state_dict(), loop.state.metrics

    whole = one(tmp_path / "whole", None)
    for at in range(1, 15, 3 if form is FORMS[0] else 6):
        folder = tmp_path / str(at)
        with pytest.raises(Killed):
            one(folder, at)
        again = one(folder, None)
        assert_same_bits(whole[0], again[0])
        same(whole[1], again[1])
        assert {k: float(v) for k, v in whole[2].items()} == {k: float(v) for k, v in again[2].items()}


def test_resumed_between_an_update_and_its_validation_it_names_the_same(tmp_path: Path) -> None:
    """How large the update was, which the noise scale is held against, is known there too."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(200, 1, generator=generator)
    data = DataLoader(TensorDataset(x, (torch.rand(200, 1, generator=generator) < 0.03).float() * 60 + 0.01), 2)

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        return (batch[1] * (model(batch[0]) - 2).square()).mean()

    def run(resume: Path | None = None) -> Any:
        torch.manual_seed(0)
        model, diagnose = nn.Linear(1, 1), Diagnose(target=0.05)
        callbacks = [Seed(0), diagnose, NoiseScale(every=5), Checkpoint(tmp_path / str(resume), every=50, keep=9)]
        loop = Loop(model, torch.optim.SGD(model.parameters(), lr=1e-4), callbacks, resume=resume)
        state = loop.fit(loss, data, DataLoader(data.dataset, 50), steps=200, validate_every=50)
        return diagnose.finding, state.update_size, state.micro_size

    whole = run()
    assert whole[0].kind == "plateau"
    assert run(tmp_path / "None" / "step-00000200") == whole


def test_around_a_loop_of_ones_own_and_in_tensorboard(tmp_path: Path) -> None:
    model, diagnose = net(noise=False), Diagnose()
    batches = list(loader(24, 8))  # in one order, so that the means of a few are alike
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    with Loop(model, optimizer, [TensorBoard(tmp_path, every=1), diagnose]) as loop:
        for _ in range(6):
            for batch in batches:
                loss = loss_fn(model, batch)["loss"]
                loss.backward()
                with loop.updating(loss=loss.detach(), samples=8):
                    optimizer.step()
                optimizer.zero_grad()
            loop.report({"val_loss": 1.2})
    assert diagnose.finding is not None
    assert diagnose.finding.kind == "plateau"
    events = EventAccumulator(str(tmp_path)).Reload()
    found = {kind: [(event.step, event.value) for event in events.Scalars(f"report/diagnose/{kind}")] for kind in KINDS}
    assert found["divergence"] == [(3 * i, 0.0) for i in range(1, 7)]
    assert found["plateau"] == [(3 * i, float(i >= 4)) for i in range(1, 7)]  # also the last report's, whoever stands first
    blind, optimizer = Diagnose(), adamw(net())
    with Loop(model := net(), adamw(model), [blind]) as loop, pytest.raises(ValueError, match=r"with loop.updating\(loss="):  # noqa: SIM117
        with loop.updating():
            loop.state.optimizer.step()


def test_rates_that_are_tensors_and_no_validation() -> None:
    model, diagnose = net(), Diagnose()
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.25))
    Loop(model, optimizer, [diagnose]).fit(loss_fn, loader(), epochs=2)
    assert [(p.rate, p.top, p.val) for p in diagnose.points] == [(0.25, 0.25, None)] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metric": ""}, "metric must be the name of a validation loss, such as 'val_loss', or None, not ''"),
        ({"metric": 3}, "metric must be the name of a validation loss.*not 3"),
        ({"target": math.nan}, "target must be a finite loss that is good enough, or None, not nan"),
        ({"target": "0.1"}, "target must be a finite loss.*not '0.1'"),
        ({"target": True}, "target must be a finite loss.*not True"),
    ],
)
def test_bad_arguments(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Diagnose(**arguments)


def test_a_metric_that_was_named_must_come() -> None:
    with pytest.raises(KeyError, match=r"Diagnose watches 'val_a_loss', which was not reported; there are: val_loss"):
        drive(Diagnose("val_a_loss"), [1.0], [1.0])
    model = net()
    with pytest.raises(ValueError, match=r"Diagnose watches 'val_loss', but no val_loader is given"):
        Loop(model, adamw(model), [Diagnose("val_loss")]).fit(loss_fn, loader(), epochs=1)
