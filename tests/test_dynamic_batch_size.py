"""DynamicBatchSize: sizes to the sample, one pass an epoch, rates that follow."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FORMS, adamw, assert_same_bits, bits, built_in, loader, loss_fn, net
from hypothesis import given, settings
from hypothesis import strategies as st

from hookloop.callbacks import Checkpoint, DynamicBatchSize, GradientAccumulation, Seed, Warmup
from hookloop.callbacks.dynamic_batch_size import grown
from hookloop.loop import Callback, Goal, Loop, State


@given(st.integers(1, 50), st.integers(0, 500), st.floats(1.01, 4), st.integers(0, 30), st.integers(1, 16))
@settings(max_examples=200, deadline=None)
def test_sizes(initial: int, more: int, growth: float, k: int, m: int) -> None:
    """The unrounded product is what grows."""
    size = grown(initial, initial + more, growth, k, m)
    assert size == max(initial, min(initial + more, math.floor(initial * growth**k / m) * m))
    assert initial <= size <= initial + more


def test_a_power_beyond_any_float() -> None:
    assert grown(8, 512, 2.0, 10**6) == 512
    assert [grown(8, 512, 1.5, k) for k in range(11)] == [8, 12, 18, 27, 40, 60, 91, 136, 205, 307, 461]
    assert [grown(8, 64, 1.5, k, 8) for k in range(6)] == [8, 8, 16, 24, 40, 56]


class Sizes(Callback):
    def __init__(self) -> None:
        self.rows: list[Any] = []

    def on_micro_end(self, state: State) -> None:
        if state.micro.training:
            self.rows.append((state.epoch, state.step, state.micro.size))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("loader_batch", [1, 7, 8, 64])
def test_honoured_to_the_sample_with_accumulation(form: Any, loader_batch: int) -> None:
    model, sizes = net(noise=False), Sizes()
    callbacks = [GradientAccumulation(2), DynamicBatchSize(4, 9, growth=1.5), sizes]
    state = form(Loop(model, adamw(model), callbacks), loss_fn, loader(53, loader_batch), epochs=4)
    for epoch, size in enumerate((4, 6, 9, 9)):
        found = [n for e, _, n in sizes.rows if e == epoch]
        assert found == [size] * (53 // size) + [53 % size] * (53 % size > 0)
    assert state.step == state.total_steps == sum(math.ceil(53 / (2 * size)) for size in (4, 6, 9, 9))


@pytest.mark.parametrize(("scale", "factors"), [("none", [1, 1, 1]), ("linear", [1, 1.5, 2.25]), ("sqrt", [1, 1.5**0.5, 1.5])])
def test_rates_follow(scale: Any, factors: list[float]) -> None:
    model = net()
    state = State(model, torch.optim.SGD(model.parameters(), lr=0.25))
    callback = DynamicBatchSize(8, 18, scale_lr=scale)
    for epoch, factor in enumerate(factors):
        state.epoch = epoch
        callback.on_step_start(state)
        callback.on_before_optimizer_step(state)
        before = state.apply_rates()
        assert state.rates == [0.25 * factor]
        state.restore_rates(before)
        assert state.optimizer.param_groups[0]["lr"] == 0.25


def test_grows_when_a_metric_stops_improving(tmp_path: Path) -> None:
    values = [5.0, 4.0, 4.0, 4.0, 4.0, 4.0, 3.0, 3.5]

    class Report(Callback):
        def on_micro_end(self, state: State) -> None:
            if not state.micro.training:
                state.log("score", values[state.epoch])

    def run(folder: Path, *ends: int) -> Any:
        for end in ends:
            seed, model, sizes = Seed(0), net(seed=0), Sizes()
            growing = DynamicBatchSize(4, 30, growth=2, every=Goal("val_score", patience=2))
            loop = Loop(model, adamw(model), [seed, growing, Report(), sizes, Checkpoint(folder)], resume=folder)
            state = built_in(loop, loss_fn, loader(42), loader(), epochs=end)
        return loop, state, sizes

    loop, state, sizes = run(tmp_path / "a", 8)
    assert [max(n for e, _, n in sizes.rows if e == epoch) for epoch in range(8)] == [4, 4, 4, 4, 8, 8, 16, 16]
    assert state.total_steps is None
    assert_same_bits(bits(loop), bits(run(tmp_path / "b", 1, 3, 4, 5, 8)[0]))


def test_growth_by_a_metric_gives_no_length_to_take_a_share_of() -> None:
    model = net()
    loop = Loop(model, adamw(model), [DynamicBatchSize(4, 30, every=Goal("val_loss")), Warmup(0.1)])
    with pytest.raises(ValueError, match=r"Warmup\(0.1\) is a share .* or steps= to fit"):
        built_in(loop, loss_fn, loader(), loader(), epochs=2)
    model = net()
    loop = Loop(model, adamw(model), [DynamicBatchSize(4, 30, every=Goal("val_loss")), Warmup(0.1)])
    assert built_in(loop, loss_fn, loader(), loader(), steps=20).total_steps == 20


@pytest.mark.parametrize(("args", "says"), [
    ((0, 8), "initial must be"), ((8, 4), "maximum must be at least initial"), ((8.0, 16), "initial must be"),
    ((8, 16, 1.0), "growth must be"), ((8, 16, math.inf), "growth must be"), ((8, 16, 2, 0), "every must be"),
    ((8, 16, 2, "epoch"), "every must be"), ((8, 16, 2, 1, 0), "multiple_of must be"),
    ((8, 16, 2, 1, 1, "square"), "scale_lr must be"),
])  # fmt: skip
def test_bad_arguments(args: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        DynamicBatchSize(*args)
