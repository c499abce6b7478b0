"""Where two runs part: Fingerprint's digests, `compare` on real event files, and its command line."""

from __future__ import annotations

import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from helpers import FORMS, KillAt, Killed, Samples, adamw, assert_same_bits, bits, built_in, loader, loss_fn, net
from torch.utils.data import DataLoader

from hookloop.callbacks import (
    Checkpoint,
    ClipGradients,
    Fingerprint,
    GradientAccumulation,
    MicroBatch,
    Progress,
    Seed,
    TensorBoard,
    Warmup,
)
from hookloop.callbacks.fingerprint import KINDS
from hookloop.loop import Callback, Loop, State, digest
from hookloop.loop.__main__ import main
from hookloop.loop.study import compare

STEPS = 14
SAME = f"the same in all {STEPS} updates compared, 1 to {STEPS}; what the last made of the weights is not compared"
CPU = torch.device("cpu")


class At(Callback):
    """Does something at one hook of one update, the `step`-th of the run."""

    def __init__(self, step: int, hook: str, act: Callable[[State], Any]) -> None:
        def come_by(state: State) -> None:
            if state.step + 1 == step:
                act(state)

        setattr(self, hook, come_by)


def run(folder: Path | None, *more: Callback, form: Any = built_in, every: int = 1, train: Any = None, seed: int = 1,
        resume: Path | None = None) -> Loop:  # fmt: skip
    first = Seed(seed)
    model = net(seed=5)
    board = [] if folder is None else [TensorBoard(folder, every=every), Fingerprint(every)]
    loop = Loop(model, adamw(model), [first, *board, *more], resume=resume)
    form(loop, loss_fn, train or loader(), loader(20, 8), epochs=2)
    return loop


def shift(state: State) -> None:
    with torch.no_grad():
        next(state.model.parameters()).view(-1)[3] += 1e-7


def turn_gradient(state: State) -> None:
    one = state.grads[2].view(-1)[1]
    one.copy_(torch.nextafter(one, torch.tensor(torch.inf)))


def draw_at(state: State, step: int) -> None:
    """Have one number more drawn in the forward of an update, before its dropout."""

    def come_by(model: Any, given: Any) -> None:
        if model.training and state.step + 1 == step:
            torch.rand(1)

    state.model.register_forward_pre_hook(come_by)


class Odd(Samples):
    """One sample a bit off, in the second epoch's reading only: `at` counts reads."""

    def __init__(self, count: int, at: int) -> None:
        super().__init__(count)
        self.at = at

    def __getitem__(self, i: int) -> Any:
        x, y, i = super().__getitem__(i)
        return (torch.nextafter(x, x + 1) if len(self.read) == self.at else x), y, i


def moved(state: State) -> None:
    for held in state.optimizer.state.values():
        held["exp_avg_sq"].view(-1)[0] *= 1 + 1e-6


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("step", [2, 7, 8, STEPS])
@pytest.mark.parametrize("kind", KINDS)
def test_the_update_and_the_kind_are_given(kind: str, step: int, form: Any, tmp_path: Path) -> None:
    """Two runs made to differ in one thing at a known update: that update, and that thing first."""
    acts: dict[str, tuple[str, Callable[[State], Any]]] = {
        "weights": ("on_step_start", shift), "optimizer": ("on_step_start", moved),
        "rng": ("on_setup", lambda state: draw_at(state, step)), "gradients": ("on_before_optimizer_step", turn_gradient),
    }  # fmt: skip
    run(tmp_path / "a", form=form)
    if kind == "data":
        reads = 50 * (step > 7) + 8 * ((step - 1) % 7) + 2
        run(tmp_path / "b", form=form, train=DataLoader(Odd(50, reads), 8, shuffle=True))
    else:
        hook, act = acts[kind]
        loop_callbacks: list[Callback] = [At(1 if kind == "rng" else step, hook, act)]
        run_first(tmp_path / "b", loop_callbacks, form)
    found = compare(tmp_path / "a", tmp_path / "b")
    assert (found.step, found.kinds[0]) == (step, kind)
    assert found.steps == list(range(1, STEPS + 1))
    assert f"part at update {step}, first in {kind}: " in str(found)


def run_first(folder: Path, before: list[Callback], form: Any) -> None:
    """As `run`, but what disturbs stands before what looks."""
    first = Seed(1)
    model = net(seed=5)
    loop = Loop(model, adamw(model), [first, *before, TensorBoard(folder, every=1), Fingerprint(1)])
    form(loop, loss_fn, loader(), loader(20, 8), epochs=2)


@pytest.mark.parametrize("form", FORMS)
def test_the_same_run_is_the_same(form: Any, tmp_path: Path) -> None:
    run(tmp_path / "a", form=form)
    run(tmp_path / "b", form=form)
    found = compare(tmp_path / "a", tmp_path / "b")
    assert (found.step, found.kinds) == (None, ())
    assert str(found) == SAME


def test_another_seed_parts_at_the_first_update_in_data(tmp_path: Path) -> None:
    run(tmp_path / "a")
    run(tmp_path / "b", seed=2)
    found = compare(tmp_path / "a", tmp_path / "b")
    assert (found.step, found.kinds) == (1, ("data", "rng", "gradients"))


def test_a_rate_parts_in_the_weights_of_the_next_update(tmp_path: Path) -> None:
    run(tmp_path / "a")
    run(tmp_path / "b", Warmup(3))
    found = compare(tmp_path / "a", tmp_path / "b")
    assert (found.step, found.kinds[0]) == (2, "weights")
    assert "optimizer" not in found.kinds


def test_the_same_batch_in_other_cuts_is_the_same_data(tmp_path: Path) -> None:
    train = loader(48)
    run(tmp_path / "a", GradientAccumulation(2), train=train)
    run(tmp_path / "b", GradientAccumulation(2), MicroBatch(3), train=train)
    found = compare(tmp_path / "a", tmp_path / "b")
    assert found.step == 1
    assert {"data", "weights", "optimizer"}.isdisjoint(found.kinds)


@pytest.mark.parametrize("every", [3, 5])
def test_what_is_not_logged_is_said(every: int, tmp_path: Path) -> None:
    run(tmp_path / "a", every=every)
    run(tmp_path / "b", At(7, "on_step_end", shift), every=every)
    found = compare(tmp_path / "a", tmp_path / "b")
    last = 6 if every == 3 else 5
    assert found.steps == [1, *range(every, STEPS + 1, every)]
    assert found.step == last + every
    assert (found.cause, found.kinds[0]) == (None, "weights")
    assert str(found).startswith(f"part between updates {last} and {last + every}, in one that was not logged, so what parted "
                                 "first isn't known; to find out run both again with Fingerprint(every=1), TensorBoard(every=1), "
                                 f"up to update {last + every}\ndiffer there: weights")  # fmt: skip


@pytest.mark.parametrize("kill", [3, 8, 11])
def test_a_resumed_run_has_the_same_fingerprints(kill: int, tmp_path: Path) -> None:
    run(tmp_path / "a")
    with pytest.raises(Killed):
        run(tmp_path / "b", Checkpoint(tmp_path / "b", every=2), KillAt(kill), resume=tmp_path / "b")
    run(tmp_path / "b", Checkpoint(tmp_path / "b", every=2), KillAt(None), resume=tmp_path / "b")
    found = compare(tmp_path / "a", tmp_path / "b")
    assert (found.step, found.steps) == (None, list(range(1, STEPS + 1)))


def test_watching_is_free(tmp_path: Path) -> None:
    """It changes no weight, stands anywhere in the list, and is not shown where it was not taken."""
    expected = run(None)
    for order in range(4):
        callbacks = [TensorBoard(tmp_path / str(order), every=2), Fingerprint(2), ClipGradients(1e9), Progress()]
        random.Random(order).shuffle(callbacks)
        first = Seed(1)
        model = net(seed=5)
        built_in(loop := Loop(model, adamw(model), [*callbacks, first]), loss_fn, loader(), loader(20, 8), epochs=2)
        assert_same_bits(bits(expected), bits(loop))
        assert compare(tmp_path / str(order), tmp_path / "0").step is None
    seen = dict[int, set[str]]()
    look = At(0, "on_step_end", print)
    look.on_step_end = lambda state: seen.update({state.step: {n for n in state.metrics if n.startswith("fing")}})  # type: ignore[method-assign]
    run(tmp_path / "x", look, every=4)
    assert {step for step, names in seen.items() if names} == {1, 4, 8, 12}
    assert all(len(names) == len(KINDS) for names in seen.values() if names)


class NoRead(torch.utils._python_dispatch.TorchDispatchMode):
    """Fails where a tensor's value would be read by the host."""

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        assert "_local_scalar_dense" not in str(function), "a tensor was read"
        return function(*arguments, **(keywords or {}))


def test_no_tensor_is_read(tmp_path: Path) -> None:
    model = net(seed=5)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    state = State(model, optimizer)
    Fingerprint(1).on_setup(state)
    loss_fn(model, next(iter(loader())))["loss"].backward()
    optimizer.step()
    with NoRead():
        for act in (*state.before, *state.checks):
            act(state)
    assert {n for n in state.metrics if n.startswith("fing")} == {f"fingerprint/{k}" for k in KINDS if k != "data"}


def test_around_a_loop_of_ones_own(tmp_path: Path) -> None:
    def around(folder: Path, odd: int) -> None:
        seed = Seed(1)
        model = net(seed=5)
        optimizer = adamw(model)
        loop = Loop(model, optimizer, [seed, TensorBoard(folder, every=1), Fingerprint(1)])
        with loop:
            for i, batch in enumerate(loader(40, shuffle=False), 1):
                loss = loss_fn(model, batch)["loss"] * (1 + 1e-6 * (i == odd))
                loss.backward()
                with loop.updating(loss=loss):
                    optimizer.step()
                optimizer.zero_grad()

    around(tmp_path / "a", 0)
    around(tmp_path / "b", 4)
    found = compare(tmp_path / "a", tmp_path / "b")
    assert (found.step, found.kinds) == (4, ("gradients",))
    assert "first in gradients: the gradients, or the data, which were not logged: another loss, clipping" in str(found)
    assert str(found).endswith("not compared: data, which neither run logged")
    run(tmp_path / "c")
    assert "not compared: data, which only the first run logged" in str(compare(tmp_path / "c", tmp_path / "a"))


def test_buffers_around_a_loop_are_those_before_the_forward(tmp_path: Path) -> None:
    """One sample differs at the 4th update: BatchNorm's statistics, which the forward moves, do not part there."""
    for name, by in (("a", 0.0), ("b", 1.0)):
        seed = Seed(1)
        model = net(seed=5)
        optimizer = adamw(model)
        with Loop(model, optimizer, [seed, TensorBoard(tmp_path / name, every=1), Fingerprint(1)]) as loop:
            for i, (x, y, _) in enumerate(loader(48, shuffle=False), 1):
                x[2, 1] += by * (i == 4)
                loss = torch.nn.functional.cross_entropy(model(x), y)
                loss.backward()
                with loop.updating(loss=loss, samples=len(x)):
                    optimizer.step()
                optimizer.zero_grad()
    found = compare(tmp_path / "a", tmp_path / "b")
    assert (found.step, found.kinds) == (4, ("gradients",))


def test_what_an_observer_draws_is_no_cause(tmp_path: Path) -> None:
    """With Seed it moves nothing; a difference in the data is found behind it."""
    draws = At(0, "on_setup", print)
    draws.on_micro_end = lambda state: torch.rand(1)  # type: ignore[method-assign]
    run(tmp_path / "a")
    run_first(tmp_path / "b", [draws], built_in)
    same = compare(tmp_path / "a", tmp_path / "b")
    assert (same.step, same.drew) == (None, 1)
    assert "the random generators were apart from update 1 on, which alone changed nothing" in str(same)
    run(tmp_path / "c", train=DataLoader(Odd(50, 50 + 10), 8, shuffle=True))
    apart = compare(tmp_path / "c", tmp_path / "b")
    assert (apart.step, apart.kinds[0], apart.kinds[-1], apart.drew) == (9, "data", "rng", 1)


@pytest.mark.parametrize("odd", [1, 2])
def test_a_draw_in_any_micro_batch_counts(odd: int, tmp_path: Path) -> None:
    """In the first too, behind which Seed seeds anew."""
    run(tmp_path / "a", GradientAccumulation(2))
    seen: list[int] = []

    def come_by(model: Any, given: Any) -> None:
        seen.append(model.training)
        if sum(seen) == 4 + odd and model.training:
            torch.rand(1)

    hooked = At(1, "on_setup", lambda state: state.model.register_forward_pre_hook(come_by))
    run(tmp_path / "b", GradientAccumulation(2), hooked)
    found = compare(tmp_path / "a", tmp_path / "b")
    assert (found.step, found.kinds[0]) == (3, "rng")


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("step", [4, STEPS])
def test_gradients_are_those_that_the_optimizer_gets(step: int, before: bool, tmp_path: Path) -> None:
    """Halved in one run, in place or by a factor, before Fingerprint's place in the list or behind it; also at the last."""
    halve = At(step, "on_before_optimizer_step", lambda state: state.scale_gradients(0.5))
    run(tmp_path / "a")
    if before:
        run_first(tmp_path / "b", [halve], built_in)
    else:
        run(tmp_path / "b", halve)
    run(tmp_path / "c", ClipGradients(1e-3))
    found = compare(tmp_path / "a", tmp_path / "b")
    assert (found.step, found.kinds) == (step, ("gradients",))
    assert "clipping" in str(found)
    assert compare(tmp_path / "a", tmp_path / "c").kinds == ("gradients",)


def test_parameters_of_the_optimizer_alone_count(tmp_path: Path) -> None:
    for name, value in (("a", 1.0), ("b", 1.1)):
        seed = Seed(1)
        model, scale = net(seed=5), torch.nn.Parameter(torch.full((3,), value))
        loop = Loop(model, torch.optim.AdamW([*model.parameters(), scale]),
                    [seed, TensorBoard(tmp_path / name, every=1), Fingerprint(1)])  # fmt: skip
        built_in(loop, lambda m, b, s=scale: torch.nn.functional.cross_entropy(m(b[0]) * s, b[1]), loader(), epochs=1)
    found = compare(tmp_path / "a", tmp_path / "b")
    assert (found.step, found.kinds[0]) == (1, "weights")
    assert "they began apart" in str(found)


# the digests


def of(batch: Any, size: int = 8, start: int = 0) -> int:
    return int(digest.of_batch(batch, size, start, CPU))


@pytest.mark.filterwarnings("ignore")  # what torch says of its own prototypes
def test_samples_of_any_length_are_cut_alike() -> None:
    """Also where one is longer than what is hashed at a time."""
    for x in (torch.randn(8, 3, 224, 224), torch.randn(4, digest.CHUNK + 3), torch.randn(8, 6).relu().to_sparse()):
        n = x.shape[0]
        parts = [x.narrow_copy(0, a, b - a) for a, b in ((0, 1), (1, n))]
        assert of(x, n) == digest.signed(of(parts[0], 1) + of(parts[1], n - 1, 1))
    for layout in (torch.sparse_csr, torch.sparse_csc):
        x = torch.randn(8, 6).relu()
        cuts = [of(x[a:b].to_sparse(layout=layout), b - a, a) for a, b in ((0, 3), (3, 8))]
        assert of(x.to_sparse(layout=layout)) == digest.signed(sum(cuts))
    for layout in (torch.strided, torch.jagged):
        samples = [torch.randn(1 + i % 3, 4) for i in range(8)]
        cuts = [of(torch.nested.nested_tensor(samples[a:b], layout=layout), b - a, a) for a, b in ((0, 3), (3, 8))]
        assert of(torch.nested.nested_tensor(samples, layout=layout)) == digest.signed(sum(cuts))


def test_shapes_types_and_what_is_not_there_count() -> None:
    x = torch.arange(48)
    ones = torch.ones(8, dtype=torch.bool)
    for a, b in ((x.view(8, 6), x.view(8, 2, 3)), (x.view(8, 6), torch.nn.functional.pad(x.view(8, 6), (0, 4))),
                 (x[:8], x[:8].int()), (ones, ones.to(torch.uint8)), (torch.zeros(8, 3), torch.zeros(8, 4)),
                 ({"x": x, "e": torch.empty(0)}, {"x": x, "e": None}), ({"x": x, "e": []}, {"x": x, "e": {}}),
                 ([1, 0, 0, 1, 5, 5, 5, 5], [0, 1, 1, 0, 5, 5, 5, 5]),
                 (torch.tensor([1, 0, 0, 1, 5, 5, 5, 5]), torch.tensor([0, 1, 1, 0, 5, 5, 5, 5]))):  # fmt: skip
        assert of(a) != of(b)
    for a, b in (([None, x], [torch.zeros(3), x]), ([None, x], [x, None]), ([x], [x, torch.zeros(2)])):
        assert int(digest.whole(a, CPU)) != int(digest.whole(b, CPU))


def test_what_belongs_to_no_sample_counts_in_every_cut() -> None:
    x = torch.randn(8, 6)
    for scale in (torch.tensor(2.0), 2.0, "warm", {"t": [torch.ones(7), None]}):
        batch = {"x": x, "scale": scale}
        cuts = [of({"x": x[a:b], "scale": scale}, b - a, a) for a, b in ((0, 3), (3, 8))]
        assert of(batch) == digest.signed(sum(cuts))
        other = of({"x": x[3:], "scale": 3.0}, 5, 3)
        assert other != cuts[1]


def test_lists_of_targets_are_one_a_sample() -> None:
    """Detection's: the same samples in batches of four, or twice two."""
    targets = [{"boxes": torch.randn(3 + i % 2, 4), "name": f"n{i}"} for i in range(4)]
    images = torch.randn(4, 6)
    whole = of((images, targets), 4)
    assert whole == digest.signed(of((images[:2], targets[:2]), 2) + of((images[2:], targets[2:]), 2, 2))
    assert whole != of((images, [*targets[:3], {**targets[3], "boxes": targets[3]["boxes"] + 1}]), 4)


class Pair(NamedTuple):
    x: Any
    y: Any


class Attributes(dict[str, Any]):
    """A dict that raises KeyError for what it has no attribute of."""

    __getattr__ = dict.__getitem__


def odd_kinds() -> dict[str, Callable[[int], Any]]:
    """Batches of eight, each another for another number."""

    def one(k: int) -> torch.Tensor:
        return torch.arange(24.0).view(8, 3) + torch.eye(8, 3) * k

    def quantized(k: int) -> torch.Tensor:
        return torch.quantize_per_channel(one(k), torch.ones(3), torch.zeros(3, dtype=torch.int64), 1, torch.qint8)

    nested = torch.nested.nested_tensor
    return {
        "list of arrays": lambda k: [np.full(3 + i % 2, i + k) for i in range(8)],
        "packed": lambda k: torch.nn.utils.rnn.pack_sequence([one(k)[: 4 - i] for i in range(3)]),
        "objects": lambda k: np.array([np.arange(i + k) for i in range(8)], dtype=object),
        "text": lambda k: np.array([f"a{k}"] * 8), "structured": lambda k: np.array([(1, k)] * 8, dtype="i4,f4"),
        "dates": lambda k: np.array([f"2020-01-0{k + 1}"] * 8, dtype="M8[D]"),
        "masked": lambda k: np.ma.masked_array(np.ones(8), np.arange(8) == k),
        "long": lambda k: np.full(8, k, dtype=np.longdouble), "raw": lambda k: np.full(8, k, dtype=np.int64).view("V8"),
        "nested dicts": lambda k: {"a": ({"b": [k]}, Pair(one(0), {"k": range(k)}))},
        "attributes": lambda k: Attributes(x=one(k)), "list of attributes": lambda k: [Attributes(k=i + k) for i in range(8)],
        "sets": lambda k: {"a": {f"s{k}", "t"}}, "path": lambda k: Path(f"a{k}"), "huge": lambda k: 10**5000 + k,
        "csr": lambda k: one(k).to_sparse_csr(), "csc": lambda k: one(k).to_sparse_csc(),
        "bsr": lambda k: one(k).to_sparse_bsr((2, 3)), "hybrid": lambda k: one(k).to_sparse(1),
        "quantized": lambda k: torch.quantize_per_tensor(one(k), 1.0, 0, torch.qint8), "by channel": quantized,
        "scale": lambda k: torch.quantize_per_tensor(torch.zeros(8), 1.0 + k, 0, torch.qint8),
        "nested": lambda k: nested([one(k), one(0)[:2]]), "jagged": lambda k: nested([one(k), one(0)[:2]], layout=torch.jagged),
        "mkldnn": lambda k: one(k).to_mkldnn(), "meta": lambda k: torch.empty(8, 3 + k, device="meta"),
        "lazy": lambda k: torch.nn.UninitializedParameter(dtype=(torch.float32, torch.float64)[k]),
        "scalar": lambda k: torch.tensor(k), "sparse scalar": lambda k: torch.tensor(1.0 + k).to_sparse(),
        "no samples": lambda k: torch.empty(0, 3 + k), "float8": lambda k: one(k).to(torch.float8_e4m3fn),
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", odd_kinds())
def test_any_kind_of_thing_is_hashed_by_content(name: str) -> None:
    make = odd_kinds()[name]
    for digest_of in (of, lambda x: int(digest.whole([x], CPU))):
        assert digest_of(make(0)) == digest_of(make(0))
        assert digest_of(make(0)) != digest_of(make(1))


@pytest.mark.filterwarnings("ignore")
def test_a_run_with_odd_buffers_and_batches(tmp_path: Path) -> None:
    """Kinds that train without Fingerprint train with it, and two such runs are the same."""
    for name in "ab":
        seed = Seed(1)
        model = net(seed=5)
        for i, kind in enumerate(("csr", "quantized", "by channel", "nested", "jagged", "mkldnn", "meta", "float8")):
            model.register_buffer(f"odd{i}", odd_kinds()[kind](0), persistent=False)
        data = [(x, y, {"odd": odd_kinds()["quantized"](0)}) for x, y, _ in loader(24)]
        loop = Loop(model, adamw(model), [seed, TensorBoard(tmp_path / name, every=1), Fingerprint(1)])
        built_in(loop, loss_fn, data, epochs=1)
    assert compare(tmp_path / "a", tmp_path / "b").step is None


def test_values_that_change_alike_do_not_cancel() -> None:
    """A checksum that is linear, as CRC-32, let one pair in nine of these through."""
    for i in range(500):
        a, b = [{"w": i}] * 8, [{"w": i + 1}] * 8
        assert of(a) != of(b)
        assert of([("s", i)] * 8) != of([("s", i + 1)] * 8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8,
                                   torch.bool, torch.complex64])  # fmt: skip
def test_any_bit_and_any_place_counts(dtype: torch.dtype) -> None:
    """Over 2,000 single flipped bits and swaps all digests differ, in 24 bits but for the few that chance makes equal."""
    x = (torch.randn(3, 37, generator=torch.Generator().manual_seed(0)) * 50).to(dtype)
    seen, raw = [digest.whole([x], CPU)], x.contiguous().view(torch.uint8).view(-1) if dtype != torch.bool else x.view(-1)
    for place in range(raw.numel()):
        for bit in range(8) if dtype != torch.bool else [0]:
            y = x.clone()
            flat = y.view(torch.uint8).view(-1) if dtype != torch.bool else y.view(-1)
            flat[place] = flat[place] ^ (1 << bit) if dtype != torch.bool else ~flat[place]
            seen.append(digest.whole([y], CPU))
    assert len({int(one) for one in seen}) == len(seen)
    short = {float(digest.short(one)) for one in seen}
    assert len(short) >= len(seen) - 5 * len(seen) ** 2 / 2**25 - 1
    assert all(value == float(torch.tensor(value, dtype=torch.float32)) and 0 <= value < 2**24 for value in short)


def test_places_shapes_and_lists_count() -> None:
    x, y = torch.randn(5, 4), torch.randn(5, 4)
    same = [int(digest.whole(one, CPU)) for one in ([x, y], [x.clone(), y.t().contiguous().t()], [x, y.view(4, 5).view(5, 4)])]
    assert len(set(same)) == 1
    swapped = x.clone()
    swapped[[0, 1]] = x[[1, 0]]
    other = [int(digest.whole(one, CPU)) for one in ([y, x], [x], [x, y, y], [swapped, y], [x, y.t()])]
    assert len({same[0], *other}) == 6
    big = torch.randn(3 * digest.CHUNK + 5)
    assert int(digest.whole([big], CPU)) != int(digest.whole([big.roll(digest.CHUNK)], CPU))
    sparse = torch.tensor([[0.0, 2.0], [0.0, 0.0]]).to_sparse()
    assert int(digest.whole([sparse], CPU)) != int(digest.whole([sparse * 2], CPU))


def test_a_batch_is_the_sum_of_its_cuts_and_no_other_order() -> None:
    x, y = torch.randn(12, 3, 4), torch.arange(12)
    whole = digest.of_batch({"x": x, "y": y}, 12, 0, CPU)
    for cuts in ([5, 7], [1] * 12, [4, 4, 4]):
        found, start = torch.zeros((), dtype=torch.int64), 0
        for size in cuts:
            found += digest.of_batch({"x": x[start : start + size], "y": y[start : start + size]}, size, start, CPU)
            start += size
        assert int(found) == int(whole)
    turned = torch.cat([x[1:], x[:1]])
    for other in ({"x": turned, "y": y}, {"x": x, "y": y.roll(1)}, {"x": x, "y": y + 1}, {"x": x, "y": y, "z": "a"}):
        assert int(digest.of_batch(other, 12, 0, CPU)) != int(whole)


@pytest.mark.parametrize("kind", ["text", "bytes", "numbers", "numpy", "nested lists", "sparse", "jagged", "mixed"])
def test_batches_of_other_things_than_tensors(kind: str) -> None:
    """Another value or order is another digest; where the entries are samples, cuts add up."""
    made: dict[str, Callable[[list[int]], Any]] = {
        "text": lambda ns: [f"a{n}" for n in ns], "bytes": lambda ns: [bytes([n]) for n in ns],
        "numbers": lambda ns: [n / 7 for n in ns], "numpy": lambda ns: np.array(ns, dtype=np.uint16),
        "nested lists": lambda ns: {"x": [torch.tensor(ns), [str(n) for n in ns]]},
        "sparse": lambda ns: torch.diag(torch.tensor(ns, dtype=torch.float32)).to_sparse(),
        "jagged": lambda ns: torch.nested.nested_tensor([torch.full((n + 1,), float(n)) for n in ns], layout=torch.jagged),
        "mixed": lambda ns: {"words": [f"a{n}" for n in ns], "x": torch.tensor(ns), "scale": 3},
    }  # fmt: skip
    numbers = [3, 1, 4, 0, 5, 2]
    whole = digest.of_batch(made[kind](numbers), 6, 0, CPU)
    assert int(digest.of_batch(made[kind](list(numbers)), 6, 0, CPU)) == int(whole)
    others = [[1, 3, 4, 0, 5, 2], [3, 1, 4, 0, 5, 6], numbers[::-1]]
    assert len({int(whole), *(int(digest.of_batch(made[kind](other), 6, 0, CPU)) for other in others)}) == 4
    if kind not in ("sparse", "jagged"):  # which can't be cut either
        cuts = [digest.of_batch(made[kind](numbers[a:b]), b - a, a, CPU) for a, b in ((0, 2), (2, 3), (3, 6))]
        assert int(sum(cuts)) == int(whole)


def test_objects_are_no_difference_from_run_to_run() -> None:
    """Their address, which `repr` shows, is another in each process."""
    assert int(digest.of_batch([object(), 1], 2, 0, CPU)) == int(digest.of_batch([object(), 1], 2, 0, CPU))


def test_an_update_that_was_left_out_leaves_no_digest(tmp_path: Path) -> None:
    """The third try is skipped: what is logged for update 3 is of the try that was applied."""

    class Skip(Callback):
        def on_before_optimizer_step(self, state: State) -> None:
            if state.step + state.skipped == 2:
                state.skip("asked")

    one = list(loader(48, shuffle=False))
    run(tmp_path / "a", Skip(), train=one)
    first = Seed(1)
    model = net(noise=False, seed=5)
    del first
    for name, data, more in (("b", one, [Skip()]), ("c", one[:2] + one[3:], [])):
        model = net(noise=False, seed=5)
        loop = Loop(model, adamw(model), [Seed(1), TensorBoard(tmp_path / name, every=1), Fingerprint(1), *more])
        built_in(loop, loss_fn, data, epochs=1)
    found = compare(tmp_path / "b", tmp_path / "c")
    assert found.step is None or found.kinds[0] == "rng", str(found)
    assert found.steps == list(range(1, 6))


# the command line


def command(*arguments: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hookloop.loop", *map(str, arguments)], capture_output=True, text=True, check=False
    )


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path / "a")
    run(tmp_path / "b")
    run_first(tmp_path / "c", [At(9, "on_step_start", shift)], built_in)
    (tmp_path / "empty").mkdir()
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert capsys.readouterr().out.strip() == SAME
    apart, wrong = command("compare", tmp_path / "a", tmp_path / "c"), command("compare", tmp_path / "a", tmp_path / "empty")
    assert apart.returncode == 1
    assert apart.stdout.startswith("part at update 9, first in weights: ")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "holds no fingerprints; train with Fingerprint()" in wrong.stderr
    assert "Traceback" not in wrong.stderr
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "no")]) == 2
    shown, said = capsys.readouterr()
    assert shown == ""
    assert "is no folder" in said


@pytest.mark.parametrize("what", ["flipped", "cut", "garbage", "nowhere"])
def test_a_damaged_file_is_named(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And not read as what stands before the damage."""
    run(tmp_path / "a")
    run(tmp_path / "b")
    [path] = (tmp_path / "b").iterdir()
    data = path.read_bytes()
    at = len(data) // 3
    changed = {
        "flipped": data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :],
        "cut": data[: len(data) // 2],
        "garbage": b"hello" * 99,
    }
    if what == "nowhere":
        path.unlink()
        path.symlink_to("/nowhere")
    else:
        path.write_bytes(changed[what])
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 2
    shown, said = capsys.readouterr()
    assert shown == ""
    assert str(path) in said
    if what in ("flipped", "cut"):
        size = int(re.search(r"truncate -s (\d+) ", said)[1])  # type: ignore[index]
        path.write_bytes(data[:size])
        shorter = compare(tmp_path / "a", tmp_path / "b")
        assert shorter.step is None
        assert shorter.steps == list(range(1, len(shorter.steps) + 1))
        assert 0 < len(shorter.steps) < STEPS
        assert f"the first run logged 14 updates, up to 14, the second {len(shorter.steps)} updates" in str(shorter)


def test_without_tensorboard(tmp_path: Path) -> None:
    code = ("import sys; sys.modules['tensorboard'] = None; from hookloop.loop.__main__ import main; "
            f"sys.exit(main(['compare', {str(tmp_path)!r}, {str(tmp_path)!r}]))")  # fmt: skip
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 2
    assert "pip install tensorboard" in found.stderr
    assert "Traceback" not in found.stderr


def test_the_same_in_a_part_says_of_how_many(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder, every in (("a", 5), ("b", 7), ("c", 5)):
        run(tmp_path / folder, every=every)
    for other, said in (("b", "the same in the 1 update compared, of 14, 1 to 1;"),
                        ("c", "the same in the 3 updates compared, of 14, 1 to 10;")):  # fmt: skip
        assert main(["compare", str(tmp_path / "a"), str(tmp_path / other)]) == 0
        assert capsys.readouterr().out.startswith(said)
    saved = tmp_path / "saved"
    for end in (14, 9):  # goes on from the 7th, so that what was written beyond 9 is no part of the run
        first, model = Seed(1), net(seed=5)
        loop = Loop(model, adamw(model), [first, TensorBoard(tmp_path / "d", every=5), Fingerprint(5),
                                          Checkpoint(saved, every=7)], resume=saved)  # fmt: skip
        built_in(loop, loss_fn, loader(), loader(20, 8), steps=end)
        for last in saved.glob("step-00000014*"):
            shutil.rmtree(last)
    assert str(compare(tmp_path / "d", tmp_path / "d")).startswith("the same in the 2 updates compared, of 9, 1 to 5;")


def test_runs_logged_at_other_intervals(tmp_path: Path) -> None:
    run(tmp_path / "a", every=2)
    run(tmp_path / "b", every=5)
    found = str(compare(tmp_path / "a", tmp_path / "b"))
    assert found.endswith("the first run logged 8 updates, up to 14, the second 3 updates, up to 10; 2 are common, so they are "
                          "compared up to update 10")  # fmt: skip


def test_runs_with_no_update_in_common(tmp_path: Path) -> None:
    run(tmp_path / "a", every=2)
    loop_folder = tmp_path / "b"
    first = Seed(1)
    model = net(seed=5)
    built_in(Loop(model, adamw(model), [first, TensorBoard(loop_folder, every=5), Fingerprint(5)]), loss_fn, loader(), steps=5)
    assert compare(tmp_path / "a", loop_folder).steps == [1]


@pytest.mark.parametrize("every", [0, -1, 1.5, True, None, "1"])
def test_bad_arguments(every: Any) -> None:
    with pytest.raises(ValueError, match="every must be a whole number, at least 1"):
        Fingerprint(every)
