"""MicroBatch("auto"): the size that it predicts, tried on models of a device's memory and clock."""

from __future__ import annotations

import logging
import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import built_in
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hookloop.callbacks import Checkpoint, DynamicBatchSize, MicroBatch
from hookloop.loop import Callback, Loop, State
from hookloop.loop.sizes import largest

Bytes = Callable[[Any], float]


class Fake:
    """A device's memory and clock: a batch takes `took(batch)` beyond `base`, and more than `total` is an error."""

    def __init__(
        self, took: Bytes, total: float, base: float = 0.0, rate: Callable[[int], float] = lambda n: n / (n + 20)
    ) -> None:
        self.took, self.total, self.base, self.rate = took, total, base, rate
        self.high, self.clock, self.errors, self.full, self.behind = base, 0.0, 0, 0, 0

    def capacity(self) -> float:
        return self.total

    def allocated(self) -> float:
        return self.base

    def reset(self) -> None:
        self.high = self.base

    def peak(self) -> float:
        return self.high

    def retries(self) -> int:
        return self.full

    def mark(self) -> float:
        return self.clock

    def seconds(self, start: float, end: float) -> float | None:
        """`behind` times it has not come so far yet, as a device that nobody waits for."""
        if self.behind:
            self.behind -= 1
            return None
        return end - start

    def run(self, batch: Any) -> None:
        need = self.base + self.took(batch)
        if need > self.total:
            self.errors += 1
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate room for {len(batch)} samples")
        self.high = max(self.high, need)
        self.clock += len(batch) / self.rate(len(batch))


class Watch(Callback):
    """Notes what each update planned and used; `act(step)` runs before an update, to move the memory."""

    def __init__(self, own: MicroBatch, act: Callable[[int], Any] = lambda step: None) -> None:
        self.own, self.act, self.samples = own, act, list[int]()
        self.planned: list[int] = []
        self.tried: list[int] = []  # at every forward, also one that failed; a size again only after another
        self.ran: list[int] = []
        self.settled: list[bool] = []

    def on_step_start(self, state: State) -> None:
        self.act(state.step)

    def on_step_end(self, state: State) -> None:
        assert state.micro_batch_size is not None
        self.planned.append(state.micro_batch_size)
        self.ran.append(state.micro_size)
        self.settled.append(self.own.settled)
        self.samples.append(state.samples - sum(self.samples))


def train(
    memory: Fake, data: Any, steps: int, act: Any = lambda step: None, more: Any = (), own: Any = None, **given: Any
) -> Watch:
    """Train `steps` updates of the batches in `data` (a number: each of so many samples) and return what was seen."""
    own = own or MicroBatch("auto", memory=memory, **{"target": "memory", **given})
    watch, model = Watch(own, act), nn.Linear(1, 1)
    loop = Loop(model, torch.optim.SGD(model.parameters(), lr=0.0), [watch, own, *more])

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        if watch.tried[-1:] != [loop.state.micro_batch_size]:
            watch.tried.append(loop.state.micro_batch_size or 0)
        memory.run(batch)
        return model(batch[:, :1]).mean()

    data = [torch.zeros(data, 1)] * steps if isinstance(data, int) else data
    state = built_in(loop, loss, data, steps=steps)
    sizes = [len(batch) for batch in data]
    assert watch.samples == [sizes[i % len(sizes)] for i in range(len(watch.samples))]  # no update's batch ever changed
    assert state.samples == sum(watch.samples)
    assert state.step == steps
    return watch


def best(peak: Callable[[int], float], room: float, batch: int, multiple_of: int = 16) -> int:
    """The largest size that fits into `room`, a multiple where it is that large."""
    n = max((n for n in range(1, batch + 1) if peak(n) <= room), default=1)
    return n // multiple_of * multiple_of if n >= multiple_of else n


def linear(a: float, b: float) -> Bytes:
    return lambda batch: a + b * len(batch)


def check_linear(a: float, b: float, fits: float, batch: int, multiple_of: int, base: float) -> None:
    """Train where `fits` samples fit under the headroom; see that it is filled, at once and without an error."""
    total = (base + a + b * fits) / 0.9
    memory = Fake(linear(a, b), total, base)
    seen = train(memory, batch, 14, multiple_of=multiple_of)
    assert memory.errors == 0
    assert all(seen.settled[10:])  # decided within 10 updates
    room = 0.9 * total - base
    low, high = (best(lambda n: a + b * n, room * (1 + e), batch, multiple_of) for e in (-1e-9, 1e-9))
    assert a + b * seen.ran[-1] <= room * (1 + 1e-9)
    if a + b * batch <= room * (1 - 1e-9) and batch == low:
        assert seen.ran[-1] == batch
    else:  # planned beyond what a batch cut in two would show: the same cuts
        assert 0.95 * low <= min(seen.planned[-1], batch)
        assert seen.planned[-1] <= high or high == batch // multiple_of * multiple_of


LINEAR: dict[str, Any] = {
    "a": st.floats(0, 5000), "b": st.floats(0.01, 50), "multiple_of": st.sampled_from([1, 8, 16, 64]),
    "base": st.sampled_from([0.0, 300.0]),
}  # fmt: skip


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(fits=st.floats(2.3, 300), batch=st.sampled_from([3, 7, 48, 96, 100, 150]), **LINEAR)
def test_linear_memory_is_filled_without_an_error(**drawn: Any) -> None:
    check_linear(**drawn)


@pytest.mark.slow
@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(fits=st.floats(2.3, 2000), batch=st.integers(3, 1024), **LINEAR)
def test_linear_memory_is_filled_without_an_error_long(**drawn: Any) -> None:
    check_linear(**drawn)


@pytest.mark.parametrize("base", [0.0, 250.0])
def test_what_the_optimizer_takes_after_the_first_update_is_no_peak_of_the_step(base: float) -> None:
    memory = Fake(linear(100, 1), 1000, base)

    def act(step: int) -> None:
        memory.base = base + (150 if step else 0)  # AdamW's moments

    seen = train(memory, 2048, 20, act)
    assert memory.errors == 0
    assert seen.planned[-1] == pytest.approx((900 - base - 150 - 100) // 16 * 16, rel=0.05)
    assert base + 150 + 100 + seen.planned[-1] <= 900


def test_gradients_that_the_first_update_makes_do_not_stand_for_its_samples() -> None:
    """They weigh more than all else: a search that believed in the first measurement would stay at one sample."""
    memory = Fake(lambda batch: (700 if memory.base == 0 else 0) + 5 * len(batch), 1000)
    seen = train(memory, 256, 20, lambda step: setattr(memory, "base", 700 if step else 0))
    assert memory.errors == 0
    assert seen.planned[-1] == 32


@pytest.mark.parametrize("stair", [5, 20, 50, 64])
@pytest.mark.parametrize("a", [0, 100, 900])
def test_stepwise_memory(stair: int, a: int) -> None:
    peak = lambda n: a + math.ceil(n / stair) * stair
    memory = Fake(lambda batch: peak(len(batch)), 2000)
    seen = train(memory, 2048, 14)
    assert memory.errors == 0
    want = best(peak, 1800, 2048)
    assert seen.planned[-1] == pytest.approx(want, rel=0.05)
    assert peak(seen.ran[-1]) <= 1800


@pytest.mark.parametrize("noise", [0.005, 0.01])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_noisy_memory(noise: float, seed: int) -> None:
    drawn = random.Random(seed)
    memory = Fake(lambda batch: (100 + len(batch)) * (1 + drawn.gauss(0, noise)), 2000)
    seen = train(memory, 2048, 60)
    want = best(lambda n: 100 + n, 1800, 2048)
    assert memory.errors == 0
    assert 0.95 * want <= min(seen.planned[9:]) <= max(seen.planned[9:]) <= want


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_sequence_length_drawn_for_each_batch(seed: int) -> None:
    """The longest there is decides; what it takes to learn of it is an error or two, no storm."""
    drawn = random.Random(seed)
    data = [torch.zeros(2048, drawn.choice([16, 32, 48, 64])) for _ in range(160)]
    memory = Fake(lambda batch: 100 + len(batch) * batch.shape[1] / 64, 1000)
    seen = train(memory, data, 160)
    want = best(lambda n: 100 + n, 900, 4096)
    assert memory.errors <= 3
    assert 0.95 * want <= seen.planned[-1] <= want


def test_oo9_free_memory_that_moves() -> None:
    """Taken from outside and given back: each time within 5% of the largest that fits then; one error tells, no storm."""
    memory = Fake(linear(100, 1), 1000)

    def act(step: int) -> None:
        memory.total = 600 if 60 <= step < 140 else 1000

    seen = train(memory, 1024, 220, act)
    for step, want in ((59, 800), (139, 432), (219, 800)):
        assert 0.95 * want <= seen.planned[step] <= want
    assert max(seen.ran[62:140]) + 100 <= 600
    assert memory.errors <= 1


@pytest.mark.parametrize("slope", [-1, 1])
def test_memory_that_moves_slowly_is_followed_without_an_error(slope: int) -> None:
    memory = Fake(linear(100, 1), 1000)

    def act(step: int) -> None:
        memory.total = 1000 + slope * step

    seen = train(memory, 2048, 160, act)
    assert memory.errors == 0
    assert seen.planned[-1] == pytest.approx(0.9 * (1000 + slope * 159) - 100, rel=0.05)


def test_a_short_last_batch_does_not_end_the_search() -> None:
    memory = Fake(linear(100, 1), 1000)
    data = [torch.zeros(n, 1) for n in (2048, 2048, 5)]
    seen = train(memory, data, 40)
    assert memory.errors == 0
    assert seen.planned[-1] == 800


def test_batches_that_grow() -> None:
    """DynamicBatchSize beside it: the whole of a small batch, later the largest cut of a large one."""
    memory = Fake(linear(100, 1), 1000)
    own, model = MicroBatch("auto", memory=memory, target="memory"), nn.Linear(1, 1)
    watch = Watch(own)
    loop = Loop(model, torch.optim.SGD(model.parameters(), lr=0.0), [watch, own, DynamicBatchSize(64, 2048, every={2: 2048})])

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        memory.run(batch)
        return model(batch).mean()

    built_in(loop, loss, [torch.zeros(2048, 1)], steps=120)
    assert watch.samples == [64] * 64 + [2048] * 56
    assert watch.ran[63] == 64
    assert watch.planned[-1] == 800
    assert memory.errors == 0


@pytest.mark.parametrize("fits", [4, 800])
@pytest.mark.parametrize("batch", [1, 2])
def test_tiny_batches_settle(batch: int, fits: int) -> None:
    """Nothing is left to find where the whole batch runs: no size changes any more."""
    seen = train(Fake(linear(0, 1), fits / 0.9), batch, 40)
    assert len(set(seen.planned[10:])) == 1
    assert all(seen.settled[10:])


@pytest.mark.parametrize("late", [0, 3])
def test_throughput_stops_where_a_doubling_gains_too_little(late: int) -> None:
    """Samples/s n/(n + 20): 256 to 512 gains 3.8%, to 1024 1.9%. A clock that is read late only delays."""
    memory = Fake(linear(0, 1), 1e6)
    memory.behind = late
    seen = train(memory, 2048, 13, target="throughput")
    assert seen.tried == [2, 16, 32, 64, 128, 256, 512, 1024]
    assert seen.settled[9 + late]
    assert memory.errors == 0


@pytest.mark.parametrize("slow", [2, 3, 4])
def test_throughput_is_not_misled_by_one_slow_update(slow: int) -> None:
    """A size that seems to gain too little is timed a second time."""
    memory = Fake(linear(0, 1), 1e6)

    def act(step: int) -> None:
        memory.rate = lambda n: n / (n + 20) / (3 if step == slow else 1)

    seen = train(memory, 2048, 16, act, target="throughput")
    assert seen.planned[-1] == 1024


def test_throughput_goes_back_where_the_larger_size_is_slower() -> None:
    memory = Fake(linear(0, 1), 1e6, rate=lambda n: n if n <= 64 else 60)
    seen = train(memory, 1024, 24, target="throughput")
    assert seen.planned[-1] == 64
    assert max(seen.planned) == 128


def test_throughput_grows_to_what_fits_where_it_goes_on_gaining() -> None:
    memory = Fake(linear(100, 1), 1000, rate=lambda n: n)
    seen = train(memory, 2048, 24, target="throughput")
    assert seen.planned[-1] == 800
    assert all(seen.settled[10:])
    assert memory.errors == 0


def test_an_allocator_that_had_to_retry_is_pressure() -> None:
    """It fitted, but only once the allocator gave back what it kept: a smaller size is used, and stays."""

    class Presses(Fake):
        def run(self, batch: Any) -> None:
            super().run(batch)
            self.full += len(batch) > 600

    memory = Presses(linear(100, 1), 1000)
    seen = train(memory, 2048, 64)
    assert max(seen.ran) == 683  # 2048 in 3, of at most 800
    assert memory.errors == 0
    assert set(seen.ran[32:]) == {512}


def changes_logged(caplog: pytest.LogCaptureFixture) -> list[int]:
    """The new size that each line of the log tells."""
    found = [re.search(r"micro-batches of (\d+) samples|memory; (\d+) from here on", r.getMessage()) for r in caplog.records]
    return [int(match[1] or match[2]) for match in found if match]


def test_oo8_a_storm_of_errors(caplog: pytest.LogCaptureFixture) -> None:
    """Every third step runs out of memory once: one retry each, every change of the size is logged once, none grows in it."""
    caplog.set_level(logging.INFO, "hookloop")
    step, struck = 0, list[int]()

    def act(now: int) -> None:
        nonlocal step
        step = now

    class Storms(Fake):
        def run(self, batch: Any) -> None:
            if 12 <= step < 30 and step % 3 == 2 and step not in struck:
                struck.append(step)
                self.errors += 1
                raise torch.OutOfMemoryError("CUDA out of memory")
            super().run(batch)

    memory = Storms(linear(1, 1), 100000)
    seen = train(memory, 512, 60, act)
    assert struck == [14, 17, 20, 23, 26, 29]
    assert memory.errors == 6
    assert seen.tried == changes_logged(caplog)
    assert seen.ran[13] == 512
    assert seen.planned[13:30] == sorted(seen.planned[13:30], reverse=True)
    assert seen.planned[-1] <= 2 * seen.planned[29]  # nothing tells yet that the storm is over for good


def test_oo9_a_size_that_failed_is_not_gone_back_to_at_once(caplog: pytest.LogCaptureFixture) -> None:
    """A neighbour takes memory for one update and gives it back: each such failure holds growth back for longer."""
    caplog.set_level(logging.INFO, "hookloop")
    memory = Fake(linear(100, 1), 1000)

    def act(step: int) -> None:
        memory.total = 500 if step in (50, 90) else 1000

    seen = train(memory, 1024, 160, act)
    assert memory.errors == 2
    assert seen.tried == changes_logged(caplog)
    waits = [next(i for i in range(step, 160) if seen.planned[i] > seen.planned[step]) - step for step in (50, 90)]
    assert 2 < waits[0] < waits[1]
    assert all(100 + ran <= 900 for ran in seen.ran)


@pytest.mark.parametrize("target", ["memory", "throughput"])
@pytest.mark.parametrize("stop", [1, 2, 3, 5, 9])
def test_a_resumed_search_goes_on_to_the_same_sizes(tmp_path: Path, target: str, stop: int) -> None:
    def part(steps: int, resume: Any) -> Watch:
        own, model = MicroBatch("auto", memory=Fake(linear(20, 1), 400), target=target), nn.Linear(1, 1)
        watch = Watch(own)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        loop = Loop(model, optimizer, [watch, own, *([Checkpoint(resume)] if resume else [])], resume=resume)

        def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
            own.memory.run(batch)
            return model(batch).mean()

        built_in(loop, loss, [torch.zeros(512, 1)] * 20, steps=steps)
        assert own.memory.errors == 0
        return watch

    through, first, second = part(20, None), part(stop, tmp_path), part(20, tmp_path)
    assert first.planned == through.planned[:stop]
    assert second.planned[-1] == through.planned[-1]
    assert second.settled[-1]
    if target == "memory":
        assert second.planned == through.planned[stop:]
    else:  # the time of the last update before the end was not told yet
        assert second.planned[1:] == through.planned[stop:19]


@pytest.mark.parametrize(("name", "given"), [
    ("headroom", {"headroom": 0}), ("headroom", {"headroom": 1.5}), ("headroom", {"headroom": True}),
    ("headroom", {"headroom": "most"}), ("headroom", {"headroom": math.nan}), ("multiple_of", {"multiple_of": 0}),
    ("multiple_of", {"multiple_of": 1.5}), ("multiple_of", {"multiple_of": True}), ("multiple_of", {"multiple_of": None}),
    ("target", {"target": "x"}), ("target", {"target": None}), ("on_step_oom", {"on_step_oom": "x"}),
    ("on_step_oom", {"on_step_oom": True}), ("size", {"size": 0}), ("size", {"size": "Auto"}),
    ("headroom", {"size": 8, "headroom": 0.5}), ("multiple_of", {"size": 8, "multiple_of": 8}),
    ("target", {"size": 8, "target": "memory"}), ("memory", {"size": 8, "memory": Fake(linear(0, 1), 1)}),
])  # fmt: skip
def test_bad_arguments_are_named(name: str, given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        MicroBatch(**{"size": "auto", **given})


def test_the_whole_of_memory_may_be_asked_for() -> None:
    memory = Fake(linear(100, 1), 1000)
    assert train(memory, 2048, 20, headroom=1).planned[-1] == 896
    assert memory.errors == 0


@pytest.mark.parametrize("took", [[(1, 950.0), (2, 950.0)], [(2, 100.0), (16, 90.0)], [(2, 0.0), (16, 0.0)]])
@pytest.mark.parametrize("room", [900.0, 50.0, 0.0, -10.0])
def test_sizes_that_take_the_same(took: list[tuple[int, float]], room: float) -> None:
    """A flat or falling line tells no slope; the size found is still one that is no larger where there is no room."""
    found = largest(took, room)
    assert found >= 1
    if room < min(t for _, t in took):
        assert found < max(n for n, _ in took)
