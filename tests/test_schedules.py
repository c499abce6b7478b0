"""Schedules by name: the formulas to the bit, beside torch and Hugging Face; killed anywhere, in any order and form."""

from __future__ import annotations

import itertools
import logging
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FORMS, KillAt, Killed, Reported, adamw, assert_same_bits, bits, built_in, loader, loss_fn, net
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler as lrs

from hookloop.callbacks import (
    Checkpoint,
    DynamicBatchSize,
    GradientAccumulation,
    Schedule,
    Seed,
    TensorBoard,
    Warmup,
    WeightDecay,
)
from hookloop.callbacks.rate_curves import CURVES
from hookloop.callbacks.schedules import ALLOWED, TORCHS
from hookloop.loop import Callback, Goal, Loop, State

N = 14
NAMES: dict[str, dict[str, Any]] = {
    "linear": {"end": 0.1}, "cosine": {"end": 0.1, "after": 3}, "polynomial": {"power": 2, "after": 0.2},
    "cosine_restarts": {"cycles": 3, "growth": 2}, "wsd": {"decay": 0.4, "shape": "sqrt"},
    "inverse_sqrt": {"after": 3}, "one_cycle": {"pct_start": 0.4},
}  # fmt: skip


class Rates(Callback):
    def __init__(self) -> None:
        self.seen: list[list[float]] = []

    def on_step_end(self, state: Any) -> None:
        self.seen.append([float(r) for r in state.rates])


def two_groups(*rates: Any) -> State:
    model = nn.ParameterList([nn.Parameter(torch.ones(2)) for _ in rates])
    groups = [{"params": [p], "lr": r} for p, r in zip(model, rates, strict=True)]
    return State(model, torch.optim.SGD(groups, lr=1.0, momentum=0.9), total_steps=N)


def drive(name: str, updates: int, state: State | None = None, **options: Any) -> list[list[float]]:
    """What each update uses, without a loop."""
    state, seen = state or two_groups(0.1), []
    schedule = Schedule(name, **options)
    schedule.on_setup(state)
    schedule.on_fit_start(state)
    for state.step in range(1, updates + 1):
        seen.append([float(g["lr"]) for g in state.optimizer.param_groups])
        state.optimizer.step()
        schedule.on_step_end(state)
    return seen


def of_torch(build: Any, updates: int, lr: float = 0.1) -> list[list[float]]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr, momentum=0.9)
    scheduler, seen = build(optimizer), []
    for _ in range(updates):
        seen.append([optimizer.param_groups[0]["lr"]])
        optimizer.step()
        scheduler.step()
    return seen


def test_every_name_is_tested_here() -> None:
    assert NAMES.keys() | {"plateau"} == CURVES.keys() | TORCHS.keys()


FORMULAS: list[tuple[str, dict[str, Any], Any]] = [
    ("linear", {}, lambda t: (N - t) / N),
    ("linear", {"end": 0.1}, lambda t: 0.1 + 0.9 * ((N - t) / N)),
    ("cosine", {}, lambda t: (1 + math.cos(math.pi * (t / N))) / 2),
    ("cosine", {"end": 0.25}, lambda t: 0.25 + 0.75 * (1 + math.cos(math.pi * (t / N))) / 2),
    ("cosine", {"after": 4}, lambda t: 1.0 if t < 4 else (1 + math.cos(math.pi * ((t - 4) / 10))) / 2),
    ("cosine", {"after": 0.25}, lambda t: 1.0 if t < 4 else (1 + math.cos(math.pi * ((t - 4) / 10))) / 2),
    ("cosine", {"steps": 7}, lambda t: 0.0 if t > 7 else (1 + math.cos(math.pi * (t / 7))) / 2),
    ("polynomial", {"power": 2}, lambda t: ((N - t) / N) ** 2),
    ("wsd", {}, lambda t: 1.0 if t < 11 else (N - t) / 3),
    ("wsd", {"decay": 4, "end": 0.5}, lambda t: 1.0 if t < 10 else 0.5 + 0.5 * ((N - t) / 4)),
    ("wsd", {"decay": 4, "shape": "sqrt"}, lambda t: 1.0 if t < 10 else 1 - math.sqrt((t - 10) / 4)),
    ("wsd", {"decay": 4, "shape": "cosine"}, lambda t: 1.0 if t < 10 else (1 + math.cos(math.pi * ((t - 10) / 4))) / 2),
    ("inverse_sqrt", {"after": 3}, lambda t: 1.0 if t < 3 else 1 / math.sqrt(t / 3)),
    ("inverse_sqrt", {"timescale": 5}, lambda t: 1 / math.sqrt((t + 5) / 5)),
    ("cosine_restarts", {"cycles": 2}, lambda t: (1 + math.cos(math.pi * ((t % 7) / 7))) / 2),
    ("cosine_restarts", {"cycles": 3, "growth": 2},
     lambda t: (1 + math.cos(math.pi * (t / 2 if t < 2 else (t - 2) / 4 if t < 6 else (t - 6) / 8))) / 2),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "formula"), FORMULAS)
def test_the_formula_to_the_bit_for_each_group(name: str, options: Any, formula: Any) -> None:
    assert drive(name, N, two_groups(0.1, 0.02), **options) == [[0.1 * formula(t), 0.02 * formula(t)] for t in range(N)]


@pytest.mark.parametrize("steps", [1, 5, 60])
@pytest.mark.parametrize("end", [0.0, 0.1])
def test_they_are_torchs_curves(steps: int, end: float) -> None:
    pairs: list[tuple[str, dict[str, Any], Any]] = [
        ("linear", {"end": end}, lambda o: lrs.LinearLR(o, 1.0, end, steps)),
        ("cosine", {"end": end}, lambda o: lrs.CosineAnnealingLR(o, steps, 0.1 * end)),
        ("polynomial", {"power": 1.7}, lambda o: lrs.PolynomialLR(o, steps, 1.7)),
        ("cosine_restarts", {"end": end, "cycles": 1}, lambda o: lrs.CosineAnnealingWarmRestarts(o, steps, eta_min=0.1 * end)),
    ]
    if steps == 60:
        pairs += [
            ("cosine_restarts", {"cycles": 4}, lambda o: lrs.CosineAnnealingWarmRestarts(o, 15)),
            ("cosine_restarts", {"cycles": 4, "growth": 2}, lambda o: lrs.CosineAnnealingWarmRestarts(o, 4, 2)),
            ("wsd", {"decay": 10, "end": end}, lambda o: lrs.SequentialLR(
                o, [lrs.ConstantLR(o, 1.0), lrs.LinearLR(o, 1.0, end, 10)], [50])),
        ]  # fmt: skip
    for name, options, build in pairs:
        found = [r for (r,) in drive(name, steps, **options, steps=steps)]
        assert found == pytest.approx([r for (r,) in of_torch(build, steps)], rel=1e-12, abs=1e-16), name
    options = {"pct_start": 0.4, "div_factor": 10.0, "anneal_strategy": "linear"}
    found = drive("one_cycle", steps, steps=steps, **options)
    assert found == of_torch(lambda o: lrs.OneCycleLR(o, 0.1, total_steps=steps, **options), steps)


@pytest.mark.parametrize("name", ["linear", "cosine", "polynomial", "inverse_sqrt", "cosine_restarts", "wsd"])
def test_beside_warmup_it_is_hugging_faces_schedule_to_the_bit(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    optimization, w, n = transformers.optimization, 5, 21
    options, theirs = {
        "linear": ({"after": w}, lambda o: optimization.get_linear_schedule_with_warmup(o, w, n)),
        "cosine": ({"after": w}, lambda o: optimization.get_cosine_schedule_with_warmup(o, w, n)),
        "polynomial": ({"after": w}, lambda o: optimization.get_polynomial_decay_schedule_with_warmup(o, w, n, lr_end=0.0)),
        "inverse_sqrt": ({"after": w}, lambda o: optimization.get_inverse_sqrt_schedule(o, w)),
        "cosine_restarts": ({"after": w, "cycles": 2},
                            lambda o: optimization.get_cosine_with_hard_restarts_schedule_with_warmup(o, w, n, 2)),
        "wsd": ({"decay": 6}, lambda o: optimization.get_wsd_schedule(o, w, 6, num_stable_steps=n - w - 6, decay_type="linear")),
    }[name]  # fmt: skip
    model, rates = net(), Rates()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    built_in(Loop(model, optimizer, [rates, Schedule(name, **options), Warmup(w, start=0)]), loss_fn, loader(50, 8), epochs=3)
    expected = of_torch(theirs, n, 0.3)
    if name in ("cosine_restarts", "polynomial", "wsd"):  # they round elsewhere
        assert [r for (r,) in rates.seen] == pytest.approx([r for (r,) in expected], rel=1e-12, abs=1e-16)
    else:
        assert rates.seen == expected


@given(st.sampled_from(list(CURVES)), st.integers(1, 300), st.integers(0, 320), st.floats(0, 1), st.data())
@settings(max_examples=200, deadline=None)
def test_every_curve_starts_at_1_ends_at_its_end_and_stays_between(
    name: str, steps: int, after: int, end: float, data: Any
) -> None:
    given: dict[str, Any] = {"after": after, "end": end, "steps": steps}
    if name == "wsd":
        given = {"end": end, "steps": steps, "decay": data.draw(st.integers(1, steps)),
                 "shape": data.draw(st.sampled_from(["linear", "cosine", "sqrt"]))}  # fmt: skip
    elif name == "inverse_sqrt":
        given, end = {"after": after, "timescale": data.draw(st.integers(1, 400))}, 0.0
    elif name == "cosine_restarts":
        given |= {"cycles": data.draw(st.integers(1, 9)), "growth": data.draw(st.floats(1, 3))}
    factors = [CURVES[name](t, **given) for t in range(max(steps, after) + 5)]
    assert factors[0] == 1.0
    assert all(end - 1e-12 <= f <= 1.0 for f in factors)
    if name != "inverse_sqrt":
        assert factors[-1] == pytest.approx(end, abs=1e-12)
    if name != "cosine_restarts":
        assert all(a >= b - 1e-15 for a, b in itertools.pairwise(factors))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NAMES)
def test_the_weights_of_a_loop_written_out_by_hand(form: Any, name: str) -> None:
    model = net(noise=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    loop = Loop(model, optimizer, [Schedule(name, **NAMES[name])])
    form(loop, loss_fn, loader(56, 8, shuffle=False), epochs=2)
    other = net(noise=False)
    optimizer, state = torch.optim.AdamW(other.parameters(), lr=0.1), two_groups(0.1)
    used = drive(name, N, state, **NAMES[name])
    if name == "one_cycle":
        scheduler: Any = lrs.OneCycleLR(optimizer, 0.1, total_steps=N, **NAMES[name])
    for t, batch in enumerate(itertools.chain(*[loader(56, 8, shuffle=False)] * 2)):
        if name != "one_cycle":
            optimizer.param_groups[0]["lr"] = used[t][0]
        assert optimizer.param_groups[0]["lr"] == used[t][0]
        optimizer.zero_grad()
        loss_fn(other, batch)["loss"].backward()
        optimizer.step()
        if name == "one_cycle":
            scheduler.step()
    assert all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))


@pytest.mark.parametrize("name", NAMES)
def test_killed_at_each_update_it_ends_with_the_same_bits(name: str, tmp_path: Any) -> None:
    def run(folder: Any, kill: int | None) -> Any:
        seed, model = Seed(0), net()
        callbacks = [Schedule(name, **NAMES[name]), Warmup(4), WeightDecay(), KillAt(kill), Checkpoint(folder, every=1)]
        loop = Loop(model, adamw(model, 0.1), [seed, *callbacks], resume=folder)
        loop.fit(loss_fn, loader(50, 8), epochs=1)
        return bits(loop), [g["lr"] for g in loop.state.optimizer.param_groups]

    whole, last = run(tmp_path / "whole", None)
    for kill in range(1, 8):
        with pytest.raises(Killed):
            run(tmp_path / "cut", kill)
    found, again = run(tmp_path / "cut", None)
    assert_same_bits(found, whole)
    assert again == last


def test_any_order_gives_the_same_bits() -> None:
    def run(order: Any) -> Any:
        seed, model = Seed(0), net()
        callbacks = [Schedule("cosine", end=0.1, after=0.2), Warmup(0.2), GradientAccumulation(2), WeightDecay({"0": 0.3})]
        loop = Loop(model, adamw(model), [seed, *(callbacks[i] for i in order)])
        loop.fit(loss_fn, loader(50, 8), epochs=2)
        return bits(loop)

    first, *others = [run(order) for order in itertools.permutations(range(4))]
    for other in others:
        assert_same_bits(other, first)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("shape", "end", "steps"),
    [(list, {"epochs": 2}, 14), (lambda: [GradientAccumulation(3)], {"epochs": 2}, 6), (list, {"epochs": 9, "steps": 5}, 5),
     (lambda: [DynamicBatchSize(4, 20, every=1, growth=2)], {"epochs": 3}, 13 + 7 + 4)],
)  # fmt: skip
def test_the_horizon_is_the_runs_updates(form: Any, shape: Any, end: Any, steps: int) -> None:
    model, rates = net(), Rates()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    state = form(Loop(model, optimizer, [rates, Schedule("linear"), *shape()]), loss_fn, loader(50, 8), **end)
    assert state.step == steps
    assert rates.seen == [[(steps - t) / steps] for t in range(steps)]
    assert optimizer.param_groups[0]["lr"] == 0.0


def test_a_rate_that_is_a_tensor_is_filled() -> None:
    for name in NAMES:
        state = two_groups(torch.tensor(0.1))
        held = state.optimizer.param_groups[0]["lr"]
        seen = drive(name, N, state, **NAMES[name])
        assert state.optimizer.param_groups[0]["lr"] is held
        assert [r for (r,) in seen] == pytest.approx([r for (r,) in drive(name, N, **NAMES[name])], rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("on", ["val_loss", Goal("val_accuracy", mode="max")])
def test_plateau_follows_a_metric(form: Any, on: Any) -> None:
    model, values, rates = net(), Reported(Goal.of(on).metric), Rates()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = Schedule("plateau", on=on, factor=0.5, patience=0, threshold=0.2)
    loop = Loop(model, optimizer, [rates, schedule, values])
    form(loop, loss_fn, loader(20, 8), loader(16, 8, shuffle=False), epochs=6)
    other = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler, used = lrs.ReduceLROnPlateau(other, Goal.of(on).mode, 0.5, patience=0, threshold=0.2), []
    for value in values.seen:
        used += [[other.param_groups[0]["lr"]]] * 3
        scheduler.step(value)
    assert rates.seen == used
    assert used[-1] < used[0]


def saved_by(name: str, total: int = N, **options: Any) -> tuple[Schedule, State]:
    state = two_groups(0.1)
    state.total_steps = total
    schedule = Schedule(name, **options)
    schedule.on_setup(state)
    schedule.on_fit_start(state)
    return schedule, state


def test_a_resumed_run_keeps_the_checkpoints_settings_and_says_so() -> None:
    saved = saved_by("cosine", end=0.1)[0].state_dict()
    longer, state = saved_by("cosine", 99, end=0.2)
    with pytest.warns(UserWarning, match=r"LambdaLR goes on with the checkpoint's end 0.1 \(not 0.2\), steps 14 \(not 99\)"):
        longer.load_state_dict(saved)
    for _ in range(7):
        state.optimizer.step()
        longer.on_step_end(state)
    assert state.optimizer.param_groups[0]["lr"] == 0.1 * (0.1 + 0.9 * (1 + math.cos(math.pi * 0.5)) / 2)
    with pytest.raises(ValueError, match=r"the checkpoint's LambdaLR has curve \['cosine'\] \(not \['linear'\]\)"):
        saved_by("linear")[0].load_state_dict(saved)
    with pytest.raises(ValueError, match=r"shape \['sqrt'\] \(not \['linear'\]\)"):
        saved_by("wsd")[0].load_state_dict(saved_by("wsd", shape="sqrt")[0].state_dict())
    with pytest.raises(ValueError, match="holds a LambdaLR, scheduler is a OneCycle;"):
        saved_by("one_cycle")[0].load_state_dict(saved)


@pytest.mark.parametrize("name", ["linear", "one_cycle"])
def test_another_schedule_than_the_checkpoints_is_an_error_or_begins_anew(name: str, tmp_path: Path) -> None:
    """At the program's rate, for the updates that are left; a schedule that is new to a resumed run does so too."""
    alone = Rates()
    model = net()
    Loop(model, adamw(model), [alone, Schedule(name)]).fit(loss_fn, loader(50, 10), epochs=1)  # as many as are left

    def run(*callbacks: Callback, **given: Any) -> list[Any]:
        model, rates = net(), Rates()
        Loop(model, adamw(model), [rates, *callbacks], **given).fit(loss_fn, loader(50, 10), epochs=2)
        return rates.seen

    run(Schedule("cosine"), Checkpoint(tmp_path, every=4, keep=9))
    last = str(tmp_path / "step-00000005")
    with pytest.raises(ValueError, match=r"Schedule does not take its state: the checkpoint.*Loop\(\.\.\., strict=False\)"):
        run(Schedule(name), resume=last)
    with pytest.warns(UserWarning, match="Schedule does not take its state: the checkpoint.*strict=False allows it"):
        assert run(Schedule(name), resume=last, strict=False)[-5:] == alone.seen


class Stream:
    def __iter__(self) -> Any:
        return iter(loader(50, 8))


def test_a_length_that_is_not_known() -> None:
    def run(train: Any, *callbacks: Any, **end: Any) -> int:
        model = net()
        return Loop(model, adamw(model), list(callbacks)).fit(loss_fn, train, **end).step

    for name in ("linear", "cosine", "polynomial", "cosine_restarts", "wsd", "one_cycle"):
        with pytest.raises(
            ValueError, match=rf"Schedule\('{name}'\) goes over the whole run.*its own steps=.*or steps= to fit or epochs"
        ):
            run(Stream(), Schedule(name), epochs=1)
        assert run(Stream(), Schedule(name), steps=4) == 4
        assert run(Stream(), Schedule(name, steps=9), epochs=1) == 7
        model = net()  # around a loop of one's own no other steps= is there to give
        around = Loop(model, adamw(model), [Schedule(name)])
        with pytest.raises(ValueError, match=r"its own steps= .*give it a number of its own"), around, around.updating():
            pass
    assert run(Stream(), Schedule("inverse_sqrt", after=2), epochs=1) == 7
    with pytest.raises(ValueError, match="goes over the whole run"):
        run(Stream(), Schedule("inverse_sqrt", after=0.1), epochs=1)


def test_around_a_loop_of_your_own() -> None:
    model, rates = net(noise=False), Rates()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with Loop(model, optimizer, [Schedule("linear", steps=7), rates]) as loop:
        for batch in loader(50, 8):
            loss_fn(model, batch)["loss"].backward()
            with loop.updating():
                optimizer.step()
            optimizer.zero_grad()
    assert rates.seen == [[(7 - t) / 7] for t in range(7)]


def test_settings_that_leave_nothing_are_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "hookloop"):
        assert drive("cosine", 3, after=14) == [[0.1]] * 3
        assert drive("wsd", 3, decay=20) == drive("linear", 3)
        drive("cosine", 3, after=13)
        assert drive("cosine_restarts", 14, cycles=12, after=2) == [[0.1]] * 14  # each over before it falls
        for options in ({"cycles": 11, "after": 2}, {"cycles": 12, "after": 2, "growth": 2}):
            assert min(drive("cosine_restarts", 14, **options))[0] < 0.1
    cosine, wsd, restarts = caplog.messages
    assert (
        cosine == "Schedule('cosine') with {'after': 14, 'end': 0.0, 'steps': 14}: the run has 14 updates, so rates stay flat"
    )
    assert wsd == "Schedule('wsd', decay=20): the run has 14 updates, and all of them decay"
    assert re.match(
        r"Schedule\('cosine_restarts'\) with .*'cycles': 12.*: the run has 14 updates, so rates stay flat", restarts
    )


def test_tensorboard_shows_the_rates(tmp_path: Any) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = net()
    callbacks = [Schedule("cosine", end=0.1), Warmup(3), TensorBoard(tmp_path, every=1)]
    Loop(model, adamw(model, 0.5), callbacks).fit(loss_fn, loader(50, 8), epochs=1)
    events = EventAccumulator(str(tmp_path)).Reload()
    found = [e.value for e in events.Scalars("rate/group0")]
    curve = [0.5 * CURVES["cosine"](t, 7, end=0.1) * min(1.0, (t + 1) / 3) for t in range(7)]
    assert found == pytest.approx(curve, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cosin", {}, "no schedule is named 'cosin'; the closest is 'cosine', and there are linear, cosine, polynomial, "),
        ("one-cycle", {}, "the closest is 'one_cycle'"),
        ("", {}, "no schedule is named ''; the closest is"),
        ("cosine", {"ends": 0.1}, "'cosine' has no option 'ends'; it has steps, after, end$"),
        ("wsd", {"after": 3}, "'wsd' has no option 'after'; it has steps, decay, end, shape$"),
        ("one_cycle", {"max_lr": 1.0}, "'one_cycle' has no option 'max_lr'; it has pct_start, .*, three_phase, steps$"),
        ("plateau", {"on": "val_loss", "mode": "max"}, "'plateau' has no option 'mode'; it has factor, patience"),
        ("cosine", {"end": 1.5}, "end must be a share, from 0 to 1, not 1.5"),
        ("cosine", {"end": math.nan}, "end must be .* not nan"),
        ("linear", {"end": "0.1"}, "end must be .* not '0.1'"),
        ("linear", {"end": True}, "end must be .* not True"),
        ("cosine", {"after": 1.0}, "after must be a whole number of updates, or a share of them, not 1.0"),
        ("cosine", {"after": -1}, "after must be .* not -1"),
        ("wsd", {"decay": 0}, "decay must be .* not 0"),
        ("wsd", {"shape": "cubic"}, "shape must be 'linear', 'cosine' or 'sqrt', not 'cubic'"),
        ("polynomial", {"power": 0}, "power must be a number above 0, not 0"),
        ("cosine_restarts", {"cycles": 2.0}, "cycles must be a whole number, at least 1, not 2.0"),
        ("cosine_restarts", {"growth": 0.5}, "growth must be a number, at least 1, not 0.5"),
        ("cosine", {"steps": 0}, "steps must be a whole number of updates, or None for those of the run, not 0"),
        ("one_cycle", {"steps": 1.5}, "steps must be .* not 1.5"),
        ("inverse_sqrt", {}, "inverse_sqrt needs after=, the updates of the warmup beside it, or timescale="),
        ("inverse_sqrt", {"timescale": -1}, "timescale must be a number of updates above 0, or None for after, not -1"),
        ("one_cycle", {"pct_start": 3.0}, "pct_start must be a share, from 0 to 1, not 3.0"),
        ("one_cycle", {"div_factor": 0}, "div_factor must be a number above 0, not 0"),
        ("one_cycle", {"pct_start": "0.3"}, "pct_start must be .* not '0.3'"),
        ("plateau", {"on": "val_loss", "factor": 2.0}, "factor must be a number above 0 and below 1, not 2.0"),
        ("plateau", {"on": "val_loss", "factor": math.nan}, "factor must be .* not nan"),
        ("plateau", {"on": "val_loss", "patience": "5"}, "patience must be a whole number, at least 0, not '5'"),
        ("plateau", {"on": "val_loss", "cooldown": -1}, "cooldown must be .* not -1"),
        ("plateau", {"on": "val_loss", "threshold": math.nan}, "threshold must be a finite number, at least 0, not nan"),
        ("plateau", {"on": "val_loss", "eps": "0"}, "eps must be .* not '0'"),
        ("plateau", {"on": "val_loss", "min_lr": "1e-5"}, "min_lr must be a finite rate, at least 0, or one for each group, not"),
        ("plateau", {"on": "val_loss", "min_lr": math.nan}, "min_lr must be .* not nan"),
        ("plateau", {"on": "val_loss", "min_lr": [0.1, -1.0]}, r"min_lr must be .* not \[0.1, -1.0\]"),
        ("plateau", {"on": "val_loss", "threshold_mode": "relative"}, "threshold_mode must be 'rel' or 'abs', not 'relative'"),
        ("one_cycle", {"base_momentum": math.nan}, "base_momentum must be a number from 0 to 1, or one for each, not nan"),
        ("one_cycle", {"max_momentum": -1}, "max_momentum must be .* not -1"),
        ("one_cycle", {"base_momentum": [0.8, True]}, r"base_momentum must be .* not \[0.8, True\]"),
        ("one_cycle", {"cycle_momentum": "no"}, "cycle_momentum must be True or False, not 'no'"),
        ("one_cycle", {"three_phase": 1}, "three_phase must be True or False, not 1"),
        ("one_cycle", {"anneal_strategy": "cosine", "base_momentum": [0.8]}, "anneal_strategy must be 'cos' or 'linear', not 'cos"),
        ("plateau", {}, "on='step' doesn't fit 'plateau', which follows a metric: on='val_loss'$"),
        ("cosine", {"on": "epoch"}, "on='epoch' doesn't fit 'cosine', which goes by updates; leave on= out"),
        ("cosine", {"on": "val_loss"}, "on=Goal.* doesn't fit 'cosine'"),
        (lambda o, n: lrs.StepLR(o, 1), {"end": 0.1}, "Schedule takes end beside a name only"),
    ],
)  # fmt: skip
def test_bad_arguments(name: Any, options: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        Schedule(name, **options)


def test_every_option_of_a_curve_is_checked() -> None:
    import inspect

    options = {p for curve in CURVES.values() for p in inspect.signature(curve).parameters} - {"t"}
    for kind, own in TORCHS.values():
        options |= inspect.signature(kind).parameters.keys() - {*own}
    assert options <= ALLOWED.keys()


def test_one_cycle_over_one_update_names_the_share() -> None:
    with pytest.raises(ValueError, match=r"one_cycle: pct_start=0.1 is 1 of 10 updates, over which nothing can rise"):
        drive("one_cycle", 1, pct_start=0.1, steps=10)
    assert drive("one_cycle", 1, steps=1)[0][0] > 0


@pytest.mark.parametrize("name", ["one_cycle", "linear", "wsd"])
def test_beyond_its_length_a_curve_stays_at_its_end_and_a_longer_run_is_told(name: str, tmp_path: Any) -> None:
    def run(epochs: int, resume: Any = None) -> Any:
        model, rates = net(), Rates()
        own = [Schedule(name), rates, Checkpoint(tmp_path)]
        loop = Loop(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), own, resume=resume)
        loop.fit(loss_fn, loader(56, 8), epochs=epochs)
        return loop, rates

    loop, rates = run(2)
    with pytest.warns(UserWarning, match="Schedule goes on with a length of 14 updates, and the run has 21 now"):
        loop.fit(loss_fn, loader(56, 8), epochs=3)
    assert rates.seen[14:] == [rates.seen[13] if name == "one_cycle" else [0.0]] * 7
    loop.fit(loss_fn, loader(56, 8), epochs=2)  # over already: its length stands
    with pytest.warns(UserWarning, match="goes on with the checkpoint's"):
        longer, _ = run(4, tmp_path)
    assert longer.state.step == 28
    momentum = longer.state.optimizer.param_groups[0]["momentum"]
    assert momentum == pytest.approx(0.95 if name == "one_cycle" else 0.9)
