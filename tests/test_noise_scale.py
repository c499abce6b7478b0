"""NoiseScale: the estimate against a model whose noise scale is known, watching for free, and as a policy."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FORMS, adamw, assert_same_bits, bits, built_in, loader, loss_fn, net
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing import event_accumulator
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from hookloop.callbacks import (
    Checkpoint,
    ClipGradients,
    DynamicBatchSize,
    GradientAccumulation,
    MicroBatch,
    NoiseScale,
    Seed,
    TensorBoard,
)
from hookloop.callbacks.noise_scale import two_batch_estimate
from hookloop.loop import Callback, Loop, State

D, SIGMA = 200, 2.0  # parameters, and the spread of a sample's gradient in each


class Still(torch.optim.SGD):
    """Leaves the weights alone, so that the noise scale stays what it is."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        del closure


class Normal:
    """Endless batches x ~ N(mu, sigma^2): with w = 0 a sample's gradient of 0.5 |w - x|^2 is -x, of noise scale `true`."""

    def __init__(self, sizes: list[int], true: float = 16.0, dtype: torch.dtype = torch.float32) -> None:
        self.sizes, self.dtype, self.mu = sizes, dtype, math.sqrt(SIGMA**2 / true)

    def __iter__(self) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(1)
        for size in itertools.cycle(self.sizes):
            yield (self.mu + SIGMA * torch.randn(size, D, generator=generator)).to(self.dtype)


def quadratic(model: Any, batch: Tensor) -> Tensor:
    return 0.5 * ((model.weight - batch) ** 2).sum(1).mean()


def still(dtype: torch.dtype = torch.float32) -> tuple[nn.Linear, Still]:
    model = nn.Linear(D, 1, bias=False).to(dtype)
    with torch.no_grad():
        model.weight.zero_()
    return model, Still(model.parameters(), lr=0.0)


class Micros(Callback):
    """Keeps, for each update, its samples and those of its largest micro-batch."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, int, int, int | None]] = []

    def on_step_end(self, state: State) -> None:
        self.rows.append((state.step - 1, state.update_size, state.micro_size, state.batch_size))


# The pure function

size = st.integers(1, 10**4)


@given(st.floats(1e-6, 1e6), st.floats(1e-6, 1e6), size, size)
@settings(max_examples=300, deadline=None, derandomize=True, database=None)
def test_the_algebra_is_exact(trace: float, square: float, few: int, more: int) -> None:
    """Norms as they are expected to be give back what they were made of."""
    many = few + more
    small, big = square + trace / few, square + trace / many
    found_trace, found_square = two_batch_estimate(small, big, few, many)
    room = 1e-12 * (small + big) / (1 / few - 1 / many)  # what the differences lose
    assert found_trace == pytest.approx(trace, rel=1e-12, abs=room)
    assert found_square == pytest.approx(square, rel=1e-12, abs=1e-12 * (many * big + few * small) / more)


def test_the_algebra_on_tensors_and_by_hand() -> None:
    assert two_batch_estimate(5.0, 3.0, 2, 6) == pytest.approx((6.0, 2.0), rel=1e-15)
    trace, square = two_batch_estimate(torch.tensor(5.0), torch.tensor(3.0), 2.0, 6)
    assert (float(trace), float(square)) == pytest.approx((6.0, 2.0), rel=1e-6)


@pytest.mark.parametrize(("args", "says"), [
    ({"every": 1}, "every must be"), ({"every": 2.0}, "every must be"), ({"every": True}, "every must be"),
    ({"smoothing": 1}, "smoothing must be"), ({"smoothing": -0.1}, "smoothing must be"), ({"smoothing": True}, "smoothing must be"),
    ({"smoothing": math.nan}, "smoothing must be"), ({"smoothing": "0.9"}, "smoothing must be"),
])  # fmt: skip
def test_bad_settings(args: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        NoiseScale(**args)


def test_around_a_loop_of_ones_own_it_says_what_is_missing() -> None:
    model, optimizer = still()
    with Loop(model, optimizer, [NoiseScale()]) as loop:  # noqa: SIM117
        with pytest.raises(ValueError, match=r"NoiseScale needs on_step_start.*leave it out"), loop.updating():
            pass


# The estimate


SHAPES: dict[str, tuple[list[int], list[Any]]] = {
    "one": ([32], []),
    "accumulated": ([8], [lambda: GradientAccumulation(4)]),
    "uneven": ([5, 20, 7], [lambda: GradientAccumulation(3)]),
    "uneven, small last": ([20, 11, 1], [lambda: GradientAccumulation(3)]),
    "cut": ([33], [lambda: MicroBatch(8)]),
    "gathered": ([5], [lambda: DynamicBatchSize(32, 32), lambda: GradientAccumulation(2)]),
    "clipped": ([8], [lambda: GradientAccumulation(4), lambda: ClipGradients(0.01)]),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_scale_of_a_known_model(form: Any, shape: str) -> None:
    sizes, callbacks = SHAPES[shape]
    (model, optimizer), noise = still(), NoiseScale(every=2, smoothing=0.99)
    loop = Loop(model, optimizer, [noise, *(make() for make in callbacks)])
    state = form(loop, quadratic, Normal(sizes), steps=500)
    assert noise.count == 250
    assert float(state.metrics["noise_scale"]) == pytest.approx(16, rel=0.1)
    assert float(noise.means[0] / (1 - 0.99**250)) == pytest.approx(D * SIGMA**2, rel=0.05)
    assert float(noise.means[1] / (1 - 0.99**250)) == pytest.approx(D * SIGMA**2 / 16, rel=0.1)


@pytest.mark.parametrize("true", [64.0, *(pytest.param(true, marks=pytest.mark.slow) for true in (2.0, 256.0))])
def test_the_scale_far_below_and_above_the_batch(true: float) -> None:
    model, optimizer = still()
    state = built_in(Loop(model, optimizer, [NoiseScale(2, 0.995)]), quadratic, Normal([32], true), steps=1600)
    assert float(state.metrics["noise_scale"]) == pytest.approx(true, rel=0.2)


@pytest.mark.parametrize("dtype", [
    torch.float64, torch.bfloat16,
    torch.float16,  # in which the square of such a norm overflows
])  # fmt: skip
def test_the_scale_in_other_types(dtype: torch.dtype) -> None:
    """Gradients of norm 300, which half precision holds well."""
    model, optimizer = still(dtype)

    def loss(model: Any, batch: Tensor) -> Tensor:
        return 30 * 0.5 * ((model.weight - batch) ** 2).float().sum(1).mean()

    state = built_in(Loop(model, optimizer, [NoiseScale(2, 0.98)]), loss, Normal([32], dtype=dtype), steps=500)
    assert float(state.metrics["noise_scale"]) == pytest.approx(16, rel=0.15)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_scaler_changes_nothing_of_it(form: Any, accumulate: int) -> None:
    """Gradients after the first micro-batch still carry the scaler's factor, which is a power of two."""

    def run(scaler: Any) -> list[float]:
        (model, optimizer), seen = still(torch.float64), list[float]()

        class See(Callback):
            def on_step_end(self, state: State) -> None:
                seen.append(float(state.metrics["noise_scale"]))

        callbacks = [NoiseScale(2, 0.9), GradientAccumulation(accumulate), See()]
        form(Loop(model, optimizer, callbacks, scaler=scaler), quadratic, Normal([16], dtype=torch.float64), steps=40)
        return seen

    scaler = torch.amp.GradScaler("cpu", growth_interval=7)  # its factor changes on the way
    plain, scaled = run(None), run(scaler)
    assert scaler.get_scale() > 2.0**16
    assert scaled == pytest.approx(plain, rel=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_scale_with_token_weights(form: Any, accumulate: int) -> None:
    """Each sample holds 1 to 5 tokens, 3 in the mean, whose gradients are alike: in samples the scale is a third."""

    class Tokens:
        def __iter__(self) -> Iterator[Any]:
            generator = torch.Generator().manual_seed(2)
            for x in Normal([60]):
                yield x.view(12, 5, D), torch.randint(1, 6, (12,), generator=generator)

    def mask(batch: Any) -> Tensor:
        return torch.arange(5) < batch[1][:, None]

    def loss(model: Any, batch: Any) -> Tensor:
        each = 0.5 * ((model.weight - batch[0]) ** 2).sum(2)
        return each[mask(batch)].mean()

    model, optimizer = still()
    callbacks = [NoiseScale(2, 0.99), GradientAccumulation(accumulate)]
    loop = Loop(model, optimizer, callbacks, weigh=lambda batch: mask(batch).sum())
    state = form(loop, loss, Tokens(), steps=500)
    assert float(state.metrics["noise_scale"]) == pytest.approx(16 / 3, rel=0.1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scaled", [False, True])
def test_each_measurement_written_out(form: Any, scaled: bool) -> None:
    """Uneven micro-batches: the squares of the two mean gradients, and the averages, computed by hand."""
    batches = list(itertools.islice(Normal([5, 20, 7, 1], dtype=torch.float64), 24))
    (model, optimizer), noise = still(torch.float64), NoiseScale(3, 0.8)
    seen = []

    class See(Callback):
        def on_step_end(self, state: State) -> None:
            seen.append((float(noise.means[0]), float(noise.means[1]), float(state.metrics["noise_scale"])))

    scaler = torch.amp.GradScaler("cpu") if scaled else None
    form(Loop(model, optimizer, [noise, GradientAccumulation(2), See()], scaler=scaler), quadratic, batches, epochs=1)
    trace = square = 0.0
    for step in range(12):
        first, both = batches[2 * step], torch.cat(batches[2 * step : 2 * step + 2])
        if step % 3 == 0:
            found = two_batch_estimate(
                float(first.mean(0).square().sum()), float(both.mean(0).square().sum()), len(first), len(both)
            )
            trace, square = 0.8 * trace + 0.2 * found[0], 0.8 * square + 0.2 * found[1]
        rel = 1e-5 if scaled else 1e-10  # the scaler's own factor is a float32
        assert seen[step] == pytest.approx((trace, square, trace / square), rel=rel)


@pytest.mark.parametrize("form", FORMS)
def test_a_single_micro_batch_is_cut_in_two_at_measured_updates_only(form: Any) -> None:
    (model, optimizer), micros = still(), Micros()
    form(Loop(model, optimizer, [NoiseScale(every=3), micros]), quadratic, Normal([33]), steps=10)
    assert [row[2] for row in micros.rows] == [17 if step % 3 == 0 else 33 for step in range(10)]
    (model, optimizer), micros = still(), Micros()
    callbacks = [NoiseScale(every=3), micros, GradientAccumulation(2), MicroBatch(20)]
    form(Loop(model, optimizer, callbacks), quadratic, Normal([33]), steps=10)
    assert [row[2] for row in micros.rows] == [17] * 10


def test_a_single_sample_is_not_measured() -> None:
    (model, optimizer), noise = still(), NoiseScale(2)
    state = built_in(Loop(model, optimizer, [noise]), quadratic, Normal([1]), steps=9)
    assert (state.step, noise.count) == (9, 0)
    assert "noise_scale" not in state.metrics


# Watching


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seeded", [True, False])
@pytest.mark.parametrize("callbacks", [
    [lambda: GradientAccumulation(2)], [lambda: MicroBatch(5)],
    [lambda: DynamicBatchSize(5, 24, 2), lambda: GradientAccumulation(2), lambda: ClipGradients(0.3)],
])  # fmt: skip
def test_watching_is_free(form: Any, seeded: bool, callbacks: Any) -> None:
    """Updates of two micro-batches at least: dropout, BatchNorm, optimizer, not a bit differs."""

    def run(watching: list[Callback], first: bool) -> tuple[dict[str, Tensor], Any]:
        torch.manual_seed(3)
        seed = [Seed(5)] if seeded else []
        model, others = net(seed=5), [make() for make in callbacks]
        torch.manual_seed(4)
        loop = Loop(model, adamw(model), [*seed, *watching, *others] if first else [*seed, *others, *watching])
        form(loop, loss_fn, loader(48, 8), loader(20), epochs=4)
        return bits(loop), loop.state

    plain, state = run([], True)
    for first in (True, False):
        found, watched = run([NoiseScale(every=2)], first)
        assert_same_bits(plain, found)
        assert "noise_scale" in watched.metrics
        assert (watched.step, watched.total_steps) == (state.step, state.total_steps)


@pytest.mark.parametrize("form", FORMS)
def test_where_it_cuts_the_gradient_is_the_same(form: Any) -> None:
    def run(watching: list[Callback]) -> Tensor:
        model = net(torch.float64, noise=False)
        loop = Loop(model, torch.optim.SGD(model.parameters(), lr=0.1), [Seed(5), *watching])
        form(loop, loss_fn, loader(45, 8, torch.float64), epochs=3)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    plain, watched = run([]), run([NoiseScale(2)])
    assert torch.linalg.norm(plain - watched) <= 1e-12 * torch.linalg.norm(plain)


class Reads(TorchDispatchMode):
    """Counts what brings a number from a tensor to Python."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default):
            self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("policy", [False, True])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_it_reads_nothing_in_a_step(policy: bool, accumulate: int) -> None:
    noise, mode = NoiseScale(every=2, smoothing=0.0), Reads()
    model, optimizer = still()
    shaping = [DynamicBatchSize(8, 64, 2, every=noise) if policy else noise, GradientAccumulation(accumulate)]
    loop = Loop(model, optimizer, shaping)
    with loop:
        for _ in loop.epochs(steps=40):
            for step in loop.steps(Normal([16])):
                with mode:  # everything of a step but its plan, which may read what was measured two updates before
                    for micro in step:
                        with micro:
                            micro.backward(quadratic)
                    loop.update()
    assert mode.count == 0
    assert noise.count == 20
    assert (noise.growths > 0) == policy


@pytest.mark.parametrize("accumulate", [1, 2])
def test_tensors_without_values_go_through(accumulate: int) -> None:
    """They stand for a GPU's: whatever would bring a number to Python raises."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loop = Loop(model, optimizer, [Seed(0), NoiseScale(2), ClipGradients(1.0), GradientAccumulation(accumulate)])
        data = [(torch.randn(4, 6), torch.randint(0, 3, (4,)))] * 8
        state = by_hand_without_reports(loop, data)
        assert state.step == 16 // accumulate
        assert state.metrics["noise_scale"].shape == ()


def by_hand_without_reports(loop: Loop, data: Any) -> State:
    with loop:
        for _ in loop.epochs(2):
            for step in loop.steps(data):
                for micro in step:
                    with micro:
                        micro.backward(lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1]))
                loop.update()
    return loop.state


def test_tensorboard_shows_it(tmp_path: Path) -> None:
    (model, optimizer), seen = still(), dict[int, float]()

    class See(Callback):
        def on_step_end(self, state: State) -> None:
            seen[state.step] = float(state.metrics["noise_scale"])

    callbacks = [TensorBoard(tmp_path, every=5), NoiseScale(2, 0.9), See()]
    built_in(Loop(model, optimizer, callbacks), quadratic, Normal([32]), steps=20)
    events = event_accumulator.EventAccumulator(str(tmp_path), size_guidance={"scalars": 0}).Reload()
    found = {e.step: e.value for e in events.Scalars("train/noise_scale")}
    assert found == {step: pytest.approx(seen[step], rel=1e-6) for step in (1, 5, 10, 15, 20)}


# What goes wrong


BAD = {0, 4, 5, 30, 77}  # tries of an update


class Skips(Callback):
    """Leaves out the updates that are poisoned."""

    def on_before_optimizer_step(self, state: State) -> None:
        if state.step + state.skipped in BAD:
            state.skip("poison")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("skips", ["nothing", "a callback before", "a callback after", "the scaler"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_what_is_not_finite_stays_out_of_the_averages(form: Any, skips: str, value: float, accumulate: int) -> None:
    def loss(model: Any, batch: Tensor) -> Tensor:
        bad = loop.state.step + loop.state.skipped in BAD
        return quadratic(model, batch) * (value if bad else 1)

    (model, optimizer), noise = still(), NoiseScale(2, 0.98)
    callbacks = [*([Skips()] if "before" in skips else []), noise, *([Skips()] if "after" in skips else [])]
    scaler = torch.amp.GradScaler("cpu") if "scaler" in skips else None
    loop = Loop(model, optimizer, [*callbacks, GradientAccumulation(accumulate)], scaler=scaler)
    state = form(loop, loss, Normal([32]), steps=300)
    assert float(state.metrics["noise_scale"]) == pytest.approx(16, rel=0.15)
    assert (state.step, state.skipped) == (300, 0 if skips == "nothing" else 5)


# As a policy


def grow(form: Any, true: float, accumulate: int = 1, every: int = 5, steps: int = 500, initial: int = 2, growth: float = 2,
         more: Any = (), **kwargs: Any) -> tuple[Micros, NoiseScale, State]:  # fmt: skip
    (model, optimizer), noise, micros = still(), NoiseScale(every, 0.95), Micros()
    callbacks = [DynamicBatchSize(initial, 128, growth, every=noise, **kwargs), GradientAccumulation(accumulate), micros, *more]
    state = form(Loop(model, optimizer, callbacks), quadratic, Normal([16], true), steps=steps)
    return micros, noise, state


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize(("true", "end"), [(24.0, 16), (6.0, 4), (1.0, 2), (1000.0, 128)])
def test_it_grows_until_the_noise_is_below_the_next_size(form: Any, accumulate: int, true: float, end: int) -> None:
    micros, noise, state = grow(form, true, accumulate)
    sizes = [row[3] for row in micros.rows]
    changes = [i for i, (a, b) in enumerate(itertools.pairwise(sizes), 1) if a != b]
    assert sizes[-1] == end
    assert sizes == sorted(sizes)
    assert all(i % 5 == 0 for i in changes)
    assert all(b - a >= 5 for a, b in itertools.pairwise(changes))
    assert all(i >= 5 * 20 for i in changes)  # 1 / (1 - 0.95) measurements first
    assert [a for a, b in itertools.pairwise(sizes) if a != b] == [2**i for i in range(1, len(changes) + 1)]
    assert state.total_steps == 500
    assert noise.count == 100


@pytest.mark.parametrize("form", FORMS)
def test_it_is_deterministic(form: Any) -> None:
    (a, noise, _), (b, other, _) = grow(form, 24), grow(form, 24)
    assert a.rows == b.rows
    assert torch.equal(noise.means[0], other.means[0])
    assert torch.equal(noise.means[1], other.means[1])


def test_looking_at_its_state_changes_nothing() -> None:
    class Saves(Callback):
        def on_step_end(self, state: State) -> None:
            copy.deepcopy(noise.state_dict())

    plain, *_ = grow(built_in, 24)
    (model, optimizer), noise, micros = still(), NoiseScale(5, 0.95), Micros()
    callbacks = [DynamicBatchSize(2, 128, 2, every=noise), micros, Saves()]
    built_in(Loop(model, optimizer, callbacks), quadratic, Normal([16], 24), steps=500)
    assert plain.rows == micros.rows


@pytest.mark.parametrize(("initial", "growth", "multiple"), [(2, 1.25, 1), (8, 1.5, 8), (4, 2, 1), (16, 1.3, 16)])
def test_it_grows_where_one_growth_is_less_than_a_multiple(initial: int, growth: float, multiple: int) -> None:
    micros, *_ = grow(built_in, 1000.0, every=2, steps=400, initial=initial, growth=growth, multiple_of=multiple)
    assert micros.rows[-1][3] == 128


def test_a_batch_of_one_sample_grows_or_says_why_not(caplog: pytest.LogCaptureFixture) -> None:
    """An update of one sample can't be cut in two, so it is never measured."""
    try:
        micros, *_ = grow(built_in, 1000.0, every=2, steps=400, initial=1)
    except ValueError as error:
        assert "initial" in str(error)  # noqa: PT017
    else:
        assert micros.rows[-1][3] == 128 or caplog.records


def test_resumed_behind_a_skipped_update_it_measures_what_it_would_have(tmp_path: Path) -> None:
    """An update that was measured and then skipped is not measured again, in the run that goes on from there either."""

    class SkipOnce(Callback):
        def on_before_optimizer_step(self, state: State) -> None:
            if (state.step, state.skipped) == (4, 0):
                state.skip("once")

        def on_epoch_end(self, state: State) -> None:
            state.save("an epoch's end")

    def run(resume: str | None = None) -> tuple[list[int], int, Any]:
        sizes: list[int] = []

        class Watch(Callback):
            def on_step_end(self, state: State) -> None:
                sizes.append(state.update_size)

        (model, optimizer), noise = still(), NoiseScale(2, 0.5)
        kept = Checkpoint(tmp_path / ("a" if resume is None else "b"), every=1, keep=99)
        callbacks = [Seed(0), DynamicBatchSize(6, 48, 1.3, every=noise), SkipOnce(), Watch(), kept]
        loop = Loop(model, optimizer, callbacks, resume=resume)
        built_in(loop, quadratic, [torch.randn(6, D, generator=torch.Generator().manual_seed(i)) for i in range(5)], epochs=4)
        return sizes, noise.count, noise.means

    whole, count, means = run()
    resumed, *measured = run(str(tmp_path / "a" / "step-00000004.2"))  # at the end of the epoch whose last update was skipped
    assert resumed == whole[4:]
    assert measured[0] == count
    assert torch.equal(measured[1], means)


@pytest.mark.parametrize("order", [0, 1])
def test_at_most_one_growth_in_so_many_updates_where_some_are_skipped(order: int) -> None:
    """A skipped try of a measured update is no second measurement."""
    sizes = list[tuple[int, int | None]]()

    class NotYet(Callback):
        def on_before_optimizer_step(self, state: State) -> None:
            sizes.append((state.step, state.batch_size))
            if state.step == 8 and state.skipped < 6:
                state.skip("not yet")

    (model, optimizer), noise = still(), NoiseScale(4, 0.0)
    callbacks: list[Callback] = [DynamicBatchSize(2, 128, 2, every=noise), NotYet()]
    built_in(Loop(model, optimizer, callbacks[:: 1 - 2 * order]), quadratic, Normal([16], 1000), steps=20)
    by_step = dict(sizes)  # the size that was applied
    for step in range(4, 20):
        assert (by_step[step] or 0) <= 2 * (by_step[step - 4] or 0), sizes
