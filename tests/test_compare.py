"""Where two runs part: Fingerprint's digests, `compare` on real event files, and its command line."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
from hookloop.loop.study import compare

STEPS = 14
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
def test_the_update_and_the_kind_are_named(kind: str, step: int, form: Any, tmp_path: Path) -> None:
    """Two runs made to differ in one thing at a known update: that update, and that thing first."""
    acts: dict[str, tuple[str, Callable[[State], Any]]] = {
        "weights": ("on_step_start", shift), "optimizer": ("on_step_start", moved),
        "rng": ("on_before_optimizer_step", lambda state: torch.rand(1)), "gradients": ("on_before_optimizer_step", turn_gradient),
    }  # fmt: skip
    run(tmp_path / "a", form=form)
    if kind == "data":
        reads = 50 * (step > 7) + 8 * ((step - 1) % 7) + 2
        run(tmp_path / "b", form=form, train=DataLoader(Odd(50, reads), 8, shuffle=True))
    else:
        hook, act = acts[kind]
        loop_callbacks: list[Callback] = [At(step, hook, act)]
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
    assert str(found) == f"the same in all {STEPS} updates compared, 1 to {STEPS}"


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
    assert f"part at update {last + every} (the same until update {last}; none between was logged), first in weights" in str(
        found
    )


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
    state, fingerprint = State(model, optimizer), Fingerprint(1)
    loss_fn(model, next(iter(loader())))["loss"].backward()
    optimizer.step()
    with NoRead():
        fingerprint.on_step_start(state)
        fingerprint.on_before_optimizer_step(state)
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


# the digests


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
    assert int(digest.whole([], CPU)) == 0
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


def test_the_command(tmp_path: Path) -> None:
    run(tmp_path / "a")
    run(tmp_path / "b")
    run_first(tmp_path / "c", [At(9, "on_step_start", shift)], built_in)
    (tmp_path / "empty").mkdir()
    same, apart = command("compare", tmp_path / "a", tmp_path / "b"), command("compare", tmp_path / "a", tmp_path / "c")
    assert (same.returncode, same.stdout.strip()) == (0, f"the same in all {STEPS} updates compared, 1 to {STEPS}")
    assert apart.returncode == 1
    assert apart.stdout.startswith("part at update 9, first in weights: ")
    for folder, says in (
        (tmp_path / "empty", "holds no fingerprints; train with Fingerprint()"),
        (tmp_path / "no", "is no folder"),
    ):
        wrong = command("compare", tmp_path / "a", folder)
        assert (wrong.returncode, wrong.stdout) == (2, "")
        assert says in wrong.stderr
        assert "Traceback" not in wrong.stderr


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
