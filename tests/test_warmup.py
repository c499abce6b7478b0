"""Warmup: the rate of each of the first updates, beside what torch and Hugging Face do."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from helpers import FORMS, adamw, loader, loss_fn, net
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hookloop.callbacks import ClipGradients, Seed, Warmup
from hookloop.callbacks.warmup import SHAPES, warmup_factor
from hookloop.loop import Callback, Loop, State

few = settings(max_examples=100, deadline=None)


def one(lr: Any = 0.1, *more: Any) -> State:
    """A State with a group a rate, and no loop."""
    model = nn.ParameterList([nn.Parameter(torch.ones(2)) for _ in (lr, *more)])
    groups = [{"params": [p], "lr": r} for p, r in zip(model, (lr, *more), strict=True)]
    return State(model, torch.optim.SGD(groups, lr=1.0))


def drive(warmup: Warmup, state: State, updates: int) -> list[list[float]]:
    """Drive it alone, as a loop would; return what each update used, and check that rates come back to the bit."""
    warmup.on_setup(state)
    warmup.on_fit_start(state)
    seen = []
    for _ in range(updates):
        rates = [g["lr"] for g in state.optimizer.param_groups]
        values = [float(r) for r in rates]
        warmup.on_before_optimizer_step(state)
        before = state.apply_rates()
        state.optimizer.step()
        seen.append([float(g["lr"]) for g in state.optimizer.param_groups])
        state.restore_rates(before)
        assert [float(g["lr"]) for g in state.optimizer.param_groups] == values
        assert all(g["lr"] is r for g, r in zip(state.optimizer.param_groups, rates, strict=True) if torch.is_tensor(r))
        state.step += 1
    return seen


def test_the_default_uses_a_growing_share_and_never_0() -> None:
    assert drive(Warmup(4), one(1.0), 6) == [[0.25], [0.5], [0.75], [1.0], [1.0], [1.0]]


def test_every_group_by_the_same_factor() -> None:
    assert drive(Warmup(4), one(0.1, 0.02), 5) == [[0.1 * f, 0.02 * f] for f in (0.25, 0.5, 0.75, 1.0, 1.0)]


@pytest.mark.parametrize("start", [0.001, 0.1, 1 / 3, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 7, 20])
def test_with_a_start_it_is_torchs_linear(start: float, steps: int) -> None:
    other = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler, expected = torch.optim.lr_scheduler.LinearLR(other, start, 1.0, steps), []
    for _ in range(steps + 4):
        expected.append(pytest.approx([other.param_groups[0]["lr"]], rel=1e-12))
        other.step()
        scheduler.step()
    assert drive(Warmup(steps, start=start), one(0.3), steps + 4) == expected


@pytest.mark.parametrize("steps", [1, 2, 7, 20])
def test_from_0_it_is_hugging_faces_rule(steps: int) -> None:
    transformers = pytest.importorskip("transformers")
    other = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler, expected = transformers.get_constant_schedule_with_warmup(other, steps), []
    for _ in range(steps + 4):
        expected.append([other.param_groups[0]["lr"]])
        other.step()
        scheduler.step()
    assert drive(Warmup(steps, start=0), one(0.3), steps + 4) == expected


@given(st.integers(1, 400), st.sampled_from([None, 0.0, 1e-6, 0.3, 1.0]), st.sampled_from(SHAPES))
@few
def test_every_shape_rises_between_the_same_ends(steps: int, start: float | None, shape: str) -> None:
    if shape == "exponential" and start == 0.0:
        return
    factors = [warmup_factor(t, steps, start, shape) for t in range(steps + 3)]
    assert factors[0] == (pytest.approx(1 / steps if start is None else start, rel=1e-12))
    assert all(a <= b for a, b in itertools.pairwise(factors))
    assert all(0 <= f <= 1 for f in factors)
    full = steps - 1 if start is None else steps  # the update from which the rate is the base rate
    assert factors[full:] == [1.0] * len(factors[full:])
    if start != 1.0:
        assert all(f < 1 for f in factors[:full])


def test_the_shapes_in_the_middle() -> None:
    assert warmup_factor(5, 10, 0.2, "linear") == pytest.approx(0.6)
    assert warmup_factor(5, 10, 0.2, "cosine") == pytest.approx(0.6)
    assert warmup_factor(2, 8, 0.0, "cosine") == pytest.approx((1 - math.cos(math.pi / 4)) / 2)
    assert warmup_factor(5, 10, 0.01, "exponential") == pytest.approx(0.1)
    assert warmup_factor(5, 11, None, "exponential") == pytest.approx(math.sqrt(1 / 11))


@pytest.mark.parametrize("rate", [0.1, 1e-3, 3e-4, 0.7])
@pytest.mark.parametrize("shape", SHAPES)
def test_op10_the_base_rate_comes_back_to_the_bit(rate: float, shape: str) -> None:
    for lr in (rate, torch.tensor(rate)):
        state = one(lr)
        seen = drive(Warmup(7, start=0.01, shape=shape), state, 9)
        assert seen[7:] == [[float(lr)]] * 2
        assert seen[6] < [float(lr)]


def test_op10_longer_than_the_run() -> None:
    model = net()
    warmup = Warmup(1000)
    state = Loop(model, adamw(model, 1.0), [warmup]).fit(loss_fn, loader(50, 8), epochs=1)
    assert state.rates == [7 / 1000]
    assert state.optimizer.param_groups[0]["lr"] == 1.0


def test_op10_zero_is_no_warmup() -> None:
    for shape in SHAPES:
        state = one(0.3)
        assert drive(Warmup(0, shape=shape), state, 3) == [[0.3]] * 3
    assert drive(Warmup(0, start=0.5), one(0.3), 2) == [[0.3]] * 2
    assert drive(Warmup(1), one(0.3), 2) == [[0.3]] * 2
    assert drive(Warmup(1, start=0.5), one(0.3), 2) == [[0.15], [0.3]]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("share", "updates"), [(0.5, 7), (0.1, 2), (0.001, 1), (0.999, 14)])
def test_op10_a_share_of_the_run(form: Any, share: float, updates: int) -> None:
    class Rates(Callback):
        def on_step_end(self, state: Any) -> None:
            seen.append(state.rates[0])

    seen: list[float] = []
    model = net()
    form(Loop(model, adamw(model, 1.0), [Warmup(share), Rates()]), loss_fn, loader(50, 8), epochs=2)
    assert seen == [min(1.0, (t + 1) / updates) for t in range(14)]


def test_op10_a_share_of_a_run_without_known_length_names_steps() -> None:
    class Stream:
        def __iter__(self) -> Any:
            return iter(loader(50, 8))

    def loop() -> Loop:
        model = net()
        return Loop(model, adamw(model), [Warmup(0.5)])

    with pytest.raises(ValueError, match=r"Warmup\(0.5\) is a share of the run.*number of updates, or steps= to fit or epochs"):
        loop().fit(loss_fn, Stream(), epochs=1)
    assert loop().fit(loss_fn, Stream(), steps=4).step == 4
    with pytest.raises(RuntimeError, match=r"Warmup\(0.5\) is a share: run its on_fit_start first"):
        Warmup(0.5).on_before_optimizer_step(one())
    with pytest.raises(ValueError, match="give a whole number of updates, or"), loop() as around, around.updating():
        pass


@pytest.mark.parametrize("form", [*FORMS, "around"])
def test_a_skipped_update_consumes_none(form: Any) -> None:
    class Watch(Callback):
        def on_before_optimizer_step(self, state: Any) -> None:
            if (state.step + state.skipped) % 3 != 2:
                state.skip("two of three")

        def on_step_end(self, state: Any) -> None:
            seen.append(state.rates[0])

    seen: list[float] = []
    model = net()
    optimizer = adamw(model, 1.0)
    loop = Loop(model, optimizer, [Watch(), Warmup(4)])
    if form == "around":
        with loop:
            for batch in loader(96, 8):
                loss_fn(model, batch)["loss"].backward()
                with loop.updating():
                    optimizer.step()
                optimizer.zero_grad()
    else:
        form(loop, loss_fn, loader(96, 8), epochs=1)
    assert (loop.state.step, loop.state.skipped) == (4, 8)
    assert seen == [0.25, 0.5, 0.75, 1.0]
    assert optimizer.param_groups[0]["lr"] == 1.0


def test_beside_others_it_is_a_factor() -> None:
    class Half(Callback):
        def on_before_optimizer_step(self, state: Any) -> None:
            state.scale_rate(0.5)

    model = net()
    optimizer = adamw(model, 1.0)
    state = Loop(model, optimizer, [Half(), ClipGradients(1.0), Warmup(10)]).fit(loss_fn, loader(50, 8), steps=4)
    assert state.rates == [0.5 * 0.4]
    assert optimizer.param_groups[0]["lr"] == 1.0


def test_an_error_in_the_update_leaves_the_base_rate() -> None:
    model = net()
    optimizer = adamw(model, 1.0)

    def broken() -> None:
        with Loop(model, optimizer, [Warmup(10)]) as loop, loop.updating():
            assert optimizer.param_groups[0]["lr"] == 0.1
            raise RuntimeError("the optimizer's own")

    with pytest.raises(RuntimeError, match="the optimizer's own"):
        broken()
    assert optimizer.param_groups[0]["lr"] == 1.0


def test_a_resumed_share_keeps_its_length() -> None:
    first = Warmup(0.5)
    assert first.state_dict() == {"steps": None}
    state = one(1.0)
    state.total_steps = 8
    first.on_fit_start(state)
    saved = first.state_dict()
    assert saved == {"steps": 4}
    again, longer = Warmup(0.5), one(1.0)
    again.load_state_dict(saved)
    longer.total_steps = 100
    assert drive(again, longer, 5) == [[0.25], [0.5], [0.75], [1.0], [1.0]]
    counted = Warmup(2)  # a whole number is what the program says now
    counted.load_state_dict(saved)
    assert drive(counted, one(1.0), 3) == [[0.5], [1.0], [1.0]]


def test_a_run_continued_inside_the_warmup_goes_on_in_it() -> None:
    def run(*ends: int) -> Any:
        seed, model = Seed(0), net()
        loop = Loop(model, adamw(model), [seed, Warmup(10)])
        train = loader(50, 8)
        for end in ends:
            loop.fit(loss_fn, train, epochs=end)
        return [p.detach() for p in model.parameters()]

    assert all(map(torch.equal, run(2), run(1, 2)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": -1}, "steps must be at least 0, not -1"),
        ({"steps": 1.0}, "steps must be a whole number of updates, or a share above 0 and below 1, not 1.0"),
        ({"steps": 2.5}, "not 2.5"),
        ({"steps": 0.0}, "not 0.0"),
        ({"steps": -0.5}, "not -0.5"),
        ({"steps": math.nan}, "not nan"),
        ({"steps": True}, "not True"),
        ({"steps": "10"}, "not '10'"),
        ({"steps": None}, "not None"),
        ({"steps": 5, "start": -0.1}, "start must be a factor from 0 to 1, or None, not -0.1"),
        ({"steps": 5, "start": 1.1}, "start must be a factor"),
        ({"steps": 5, "start": math.nan}, "start must be a factor"),
        ({"steps": 5, "start": "0"}, "start must be a factor"),
        ({"steps": 5, "shape": "cubic"}, "shape must be one of linear, cosine, exponential, not 'cubic'"),
        ({"steps": 5, "shape": None}, "shape must be one of"),
        (
            {"steps": 5, "start": 0, "shape": "exponential"},
            "an exponential can't rise from start=0; give a small start",
        ),
        ({"steps": 5, "start": 0.0, "shape": "exponential"}, "an exponential can't rise from start=0"),
    ],
)
def test_bad_arguments(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Warmup(**arguments)
