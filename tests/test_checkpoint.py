"""Checkpoint and `resume=`: whole or not at all, and continued to the same bits from every step."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import shutil
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import FORMS, Samples, adamw, assert_same_bits, bits, built_in, by_hand, loader, loss_fn, net, same
from torch import nn
from torch.utils.data import DataLoader

from hookloop.callbacks import (
    Checkpoint,
    ClipGradients,
    DynamicBatchSize,
    EarlyStopping,
    GradientAccumulation,
    MicroBatch,
    NonFinite,
    Seed,
    Warmup,
)
from hookloop.loop import Callback, Goal, Loop, State
from hookloop.loop.store import list_checkpoints


class Killed(BaseException):
    pass


class KillAt(Callback):
    """Ends the process' run without a word, as a kill would, at a step's end or inside a later hook."""

    def __init__(self, step: int | None, hook: str = "on_step_end") -> None:
        self.step = step
        setattr(self, hook, self._kill)

    def _kill(self, state: State) -> None:
        if state.step == self.step:
            raise Killed


class Augmented(Samples):
    """Draws from every global generator for each sample."""

    def __getitem__(self, i: int) -> Any:
        x, y, i = super().__getitem__(i)
        return x + random.random() + float(np.random.rand()) + torch.rand(()), y, i


def make(folder: Path | None, kill: int | None = None, hook: str = "on_step_end", seeded: bool = True, every: int = 1,
         extra: Any = ()) -> Loop:  # fmt: skip
    seed = [Seed(5)] if seeded else []
    model = net(seed=5)
    shaping = [Warmup(0.5), GradientAccumulation({0: 1, 1: 2}), DynamicBatchSize(6, 11), ClipGradients(0.3), MicroBatch(4),
               EarlyStopping("val_loss", patience=9, restore_best=True)]  # fmt: skip
    save = [] if folder is None else [Checkpoint(folder, every=every, keep=None, best="val_loss")]
    return Loop(model, adamw(model), [*save, *seed, *shaping, KillAt(kill, hook), *extra], resume=folder)


def data(workers: int = 0, augmented: bool = False, **kwargs: Any) -> tuple[DataLoader, DataLoader]:
    kind = Augmented if augmented else Samples
    extra = {"num_workers": workers, **kwargs}
    return DataLoader(kind(50), 8, shuffle=True, **extra), DataLoader(Samples(20), 8)


def final(form: Any, folder: Path | None, kills: Any, hook: str = "on_step_end", **kwargs: Any) -> tuple[Any, Any]:
    for kill in [*kills, None]:
        loop = make(folder, kill, hook, kwargs.get("seeded", True))
        torch.manual_seed(0)
        train, val = data(**{k: v for k, v in kwargs.items() if k != "seeded"})
        try:
            form(loop, loss_fn, train, val, epochs=3)
        except Killed:
            continue
        return bits(loop), (loop.state.step, loop.state.samples, loop.state.epoch, loop.state.metrics["val_loss"])
    raise AssertionError


@pytest.mark.parametrize("form", [FORMS[0], *(pytest.param(form, marks=pytest.mark.slow) for form in FORMS[1:])])
def test_rs1_every_step_is_a_resume_point(form: Any, tmp_path: Path) -> None:
    """Killed after any step, before any save of the next: weights, optimizer, counts and metrics are the same bits."""
    expected = final(form, None, [])
    for step in range(1, expected[1][0] + 1):
        found = final(form, tmp_path / str(step), [step])
        assert_same_bits(expected[0], found[0])
        assert expected[1] == found[1]


@pytest.mark.parametrize(
    "hook", ["on_step_start", "on_before_optimizer_step", "on_validation_end", "on_epoch_end", "on_micro_end"]
)
def test_killed_in_any_hook(hook: str, tmp_path: Path) -> None:
    class Reports(Callback):
        def on_validation_end(self, state: State) -> None:
            ends.append(state.step)

    ends: list[int] = []
    built_in(make(None, extra=[Reports()]), loss_fn, *data(), epochs=3)
    assert len(ends) == 3
    expected = final(built_in, None, [])
    for step in (0, 4, 9, 13) if hook not in ("on_validation_end", "on_epoch_end") else ends:
        found = final(built_in, tmp_path / str(step), [step], hook)
        assert_same_bits(expected[0], found[0])
        assert expected[1] == found[1]


def test_rs2_resumed_many_times(tmp_path: Path) -> None:
    expected = final(by_hand, None, [])
    assert_same_bits(expected[0], final(by_hand, tmp_path, range(1, expected[1][0], 2))[0])


@pytest.mark.parametrize("workers", [{"workers": 2}, {"workers": 2, "persistent_workers": True}])
def test_resumes_with_workers_and_random_augmentation(workers: Any, tmp_path: Path) -> None:
    expected = final(built_in, None, [], augmented=True)
    for step in (3, 8, 12):
        assert_same_bits(expected[0], final(built_in, tmp_path / str(step), [step], augmented=True, **workers)[0])


def test_resumes_without_seed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    expected = final(built_in, None, [], seeded=False)
    assert_same_bits(expected[0], final(built_in, tmp_path, [3, 8, 12], seeded=False)[0])


def test_skipped_data_is_not_read_again(tmp_path: Path) -> None:
    loop, train = make(tmp_path, kill=5), data()[0]
    with pytest.raises(Killed):
        built_in(loop, loss_fn, train, data()[1], epochs=1)
    assert loop.state.samples == 30  # the save of step 5 was never made: step 4 stands, with 24 samples in 3 loader batches
    again = data()[0]
    built_in(make(tmp_path), loss_fn, again, data()[1], epochs=1)
    assert len(again.dataset.read) == 50 - 24
    assert not set(train.dataset.read[:24]) & set(again.dataset.read)


@pytest.mark.parametrize("first", [True, False])
def test_what_is_saved_does_not_depend_on_the_list(first: bool, tmp_path: Path) -> None:
    loop = make(tmp_path / "a")
    built_in(loop, loss_fn, *data(), epochs=2)
    other = make(tmp_path / "b")
    order = other.callbacks[::-1] if first else (*other.callbacks[3:], *other.callbacks[:3])
    for callback in order:
        del callback._loop
    other = Loop(other.state.model, other.state.optimizer, order, resume=tmp_path / "b")
    built_in(other, loss_fn, *data(), epochs=2)
    pairs = list(zip(list_checkpoints(tmp_path / "a"), list_checkpoints(tmp_path / "b"), strict=True))
    assert len(pairs) > 5
    for a, b in pairs:
        assert a.name == b.name
        for file in ("model.pt", "state.pt"):
            same(torch.load(a / file, weights_only=True), torch.load(b / file, weights_only=True), file)


def test_model_file_is_plain(tmp_path: Path) -> None:
    loop = make(tmp_path)
    built_in(loop, loss_fn, *data(), epochs=1)
    plain = torch.load(list_checkpoints(tmp_path)[-1] / "model.pt", weights_only=True)
    fresh = net()
    fresh.load_state_dict(plain)
    assert plain.keys() == fresh.state_dict().keys()


def test_keep_and_best(tmp_path: Path) -> None:
    model, values = net(), iter([3.0, 1.0, 2.0, 2.5, 2.2, 2.1])
    save = Checkpoint(tmp_path, keep=2, best=Goal("score"))
    loop = Loop(model, adamw(model), [save])
    steps = []
    with loop:
        for _ in loop.epochs(6):
            for step in loop.steps(loader()):
                for micro in step:
                    with micro:
                        micro.backward(loss_fn)
                loop.update()
            steps.append(loop.state.step)
            loop.report({"score": next(values)})
    assert save.best is not None
    assert save.best.name == f"step-{steps[1]:08d}"
    assert [p.name for p in list_checkpoints(tmp_path)] == [f"step-{s:08d}" for s in (steps[1], steps[4], steps[5])]


def steps_in(folder: Path) -> list[int]:
    return [int(p.name[5:13]) for p in list_checkpoints(folder)]


class Scored(Callback):
    """Reports a score that is best at the 2nd epoch, asks for a save at one update."""

    def on_step_end(self, state: State) -> None:
        if state.step == 5:
            state.save("mine")

    def on_validation_end(self, state: State) -> None:
        state.metrics["score"] = [3.0, 1.0, 2.0][state.epoch]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("background", [False, True])
def test_each_of_two_keeps_its_own_intervals_and_best(background: bool, form: Any, tmp_path: Path) -> None:
    often = Checkpoint(tmp_path / "often", every=1, keep=2, background=background)
    rare = Checkpoint(tmp_path / "rare", every=4, keep=None, best=Goal("score"), background=background).named("rare")
    slow = Checkpoint(tmp_path / "slow", every=timedelta(days=1), keep=None).named("slow")
    model = net()
    form(Loop(model, adamw(model), [Scored(), rare, often, slow]), loss_fn, loader(24), epochs=3)  # of 3 updates each
    assert [p.name for p in list_checkpoints(often.folder)] == [
        "step-00000009",
        "step-00000009.2",
    ]  # the update's and the epoch's
    assert steps_in(rare.folder) == [3, 4, 5, 6, 8, 9]
    assert steps_in(slow.folder) == [3, 5, 6, 9]
    assert rare.best == rare.folder / "step-00000006"
    assert often.best is slow.best is None


@pytest.mark.parametrize("form", FORMS)
def test_the_end_is_written_by_each_that_does_not_have_it(form: Any, tmp_path: Path) -> None:
    often, rare = Checkpoint(tmp_path / "often", every=1, keep=None), Checkpoint(tmp_path / "rare", every=10).named("rare")
    model = net()
    loop = Loop(model, adamw(model), [often, rare])
    form(loop, loss_fn, loader(), steps=4)
    assert (steps_in(often.folder), steps_in(rare.folder)) == ([1, 2, 3, 4], [4])
    form(loop, loss_fn, loader(), steps=4)  # entered again, nothing is new
    assert (steps_in(often.folder), steps_in(rare.folder)) == ([1, 2, 3, 4], [4])
    model = net()
    more = [Checkpoint(rare.folder, every=10), Checkpoint(tmp_path / "new", every=5).named("rare")]
    loop = Loop(model, adamw(model), more, resume=rare.folder)
    form(loop, loss_fn, loader(), steps=4)
    form(loop, loss_fn, loader(), steps=5)
    assert (steps_in(rare.folder), steps_in(tmp_path / "new")) == ([4, 5], [5])


def test_every_timedelta_and_the_end(tmp_path: Path) -> None:
    model = net()
    loop = Loop(model, adamw(model), [Checkpoint(tmp_path / "a", every=timedelta(microseconds=1), keep=None)])
    built_in(loop, loss_fn, loader(), steps=3)
    assert [p.name for p in list_checkpoints(tmp_path / "a")] == [f"step-{s:08d}" for s in (1, 2, 3)]
    model = net()
    built_in(Loop(model, adamw(model), [Checkpoint(tmp_path / "b")]), loss_fn, loader(), steps=3)
    assert [p.name for p in list_checkpoints(tmp_path / "b")] == ["step-00000003"]


def test_resume_of_a_finished_run_and_a_longer_one(tmp_path: Path) -> None:
    short = make(tmp_path)
    built_in(short, loss_fn, *data(), epochs=2)
    again = make(tmp_path)
    built_in(again, loss_fn, *data(), epochs=2)
    assert again.state.step == short.state.step
    assert_same_bits(bits(short), bits(again))


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path) -> None:
    expected = final(built_in, tmp_path / "whole", [])
    with pytest.raises(Killed):
        built_in(make(tmp_path / "cut", 9), loss_fn, *data(), epochs=3)
    newest = list_checkpoints(tmp_path / "cut")[-1]
    (newest / "state.pt").write_bytes((newest / "state.pt").read_bytes()[:200])
    with pytest.warns(UserWarning, match=newest.name):
        found = final(built_in, tmp_path / "cut", [])
    assert_same_bits(expected[0], found[0])
    assert (tmp_path / "cut" / f"unreadable-{newest.name}").exists()


def test_all_damaged_is_an_error(tmp_path: Path) -> None:
    built_in(make(tmp_path), loss_fn, *data(), epochs=1)
    for one in list_checkpoints(tmp_path):
        (one / "model.pt").write_bytes(b"")
    with pytest.raises(RuntimeError, match="none is a reason to start afresh"):
        built_in(make(tmp_path), loss_fn, *data(), epochs=2)


def test_half_written_is_never_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever call of a save is the last, the folder holds whole checkpoints alone."""
    built_in(make(tmp_path), loss_fn, *data(), steps=2)
    before = [p.name for p in list_checkpoints(tmp_path)]
    for call in ("fsync", "rename"):
        for count in range(4):
            left = itertools.count()
            real = getattr(os, call)

            def dying(*args: Any, left: Any = left, count: int = count, real: Any = real) -> Any:
                if next(left) == count:
                    raise Killed
                return real(*args)

            with monkeypatch.context() as patch:
                patch.setattr(os, call, dying)
                with contextlib.suppress(Killed):
                    built_in(make(tmp_path, every=3), loss_fn, *data(), steps=3)
            assert [p.name for p in list_checkpoints(tmp_path)][: len(before)] == before
            final_loop = make(tmp_path, every=99)
            built_in(final_loop, loss_fn, *data(), steps=2)
            for later in list_checkpoints(tmp_path)[len(before) :]:
                shutil.rmtree(later)


def test_callback_state_must_be_plain(tmp_path: Path) -> None:
    class Odd(Callback):
        def state_dict(self) -> dict[str, Any]:
            return {"where": {"path": Path("x")}}

        def load_state_dict(self, state: dict[str, Any]) -> None: ...

    model = net()
    loop = Loop(model, adamw(model), [Checkpoint(tmp_path), Odd()])
    with pytest.raises(TypeError, match=r"\['callbacks'\]\['Odd'\]\['where'\]\['path'\] is a pathlib"):
        built_in(loop, loss_fn, loader(), epochs=1)


def test_resume_refusals(tmp_path: Path) -> None:
    built_in(make(tmp_path), loss_fn, *data(), steps=3)
    model = net(seed=5)
    with pytest.raises(ValueError, match=r"Warmup has state in the checkpoint and is not in callbacks \(Checkpoint\)"):
        built_in(Loop(model, adamw(model), [Checkpoint(tmp_path)], resume=tmp_path), loss_fn, *data(), steps=4)
    with pytest.raises(ValueError, match=r"beyond this run's step 0"):
        built_in(Loop(model, adamw(model), [Checkpoint(tmp_path)]), loss_fn, *data(), steps=4)
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        built_in(Loop(model, adamw(model), resume=tmp_path / "step-00000099"), loss_fn, *data(), steps=4)
    with pytest.raises(ValueError, match=r"data set holds 51 samples here and 50"):
        built_in(make(tmp_path), loss_fn, DataLoader(Samples(51), 8, shuffle=True), data()[1], steps=4)
    with pytest.warns(UserWarning, match="no state of Counting"):
        built_in(make(tmp_path, extra=[Counting()]), loss_fn, *data(), steps=4)


class Counting(Callback):
    def state_dict(self) -> dict[str, Any]:
        return {"count": 1}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    model = net()
    with pytest.raises(OSError, match="file"):
        built_in(Loop(model, adamw(model), [Checkpoint(tmp_path / "file" / "x")]), loss_fn, loader(), steps=1)


@pytest.mark.parametrize(("kwargs", "says"), [
    ({"every": 0}, "every .*must be"), ({"every": -3}, "every .*must be"), ({"every": True}, "every .*must be"),
    ({"every": 1.5}, "whole number"), ({"every": timedelta(0)}, "every .*must be"), ({"keep": 0}, "keep .*must be"),
    ({"keep": True}, "keep .*must be"),
])  # fmt: skip
def test_bad_arguments(kwargs: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=says):
        Checkpoint(tmp_path, **kwargs)


def test_scaler_is_saved(tmp_path: Path) -> None:
    def once(kill: int | None) -> Any:
        model = net()
        loop = Loop(model, adamw(model), [Checkpoint(tmp_path, every=1), KillAt(kill)], resume=tmp_path,
                    scaler=torch.amp.GradScaler("cpu", growth_interval=2))  # fmt: skip
        with contextlib.suppress(Killed):
            built_in(loop, loss_fn, loader(), steps=5)
        return loop.state.scaler.get_scale()

    first = once(3)
    assert once(None) == 4 * 65536.0 != first
    model = net()
    with pytest.raises(ValueError, match="made with scaler="):
        built_in(Loop(model, adamw(model), [Checkpoint(tmp_path), KillAt(None)], resume=tmp_path), loss_fn, loader(), steps=9)


def test_no_warning_where_nothing_is_wrong(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        built_in(make(tmp_path), loss_fn, *data(), epochs=1)
        built_in(make(tmp_path), loss_fn, *data(), epochs=2)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("background", [True, False])
def test_st5_an_error_names_the_last_checkpoint(background: bool, form: Any, tmp_path: Path) -> None:
    """In the run that wrote it, and in one that resumed from it and wrote none; before the first there is nothing to name."""

    def run(every: int) -> list[str]:
        def odd(model: Any, batch: Any) -> Any:
            found = loss_fn(model, batch)
            return {**found, "loss": found["loss"] * (float("nan") if loop.state.step == 5 else 1.0)}

        seed, model = Seed(5), net(seed=5)
        callbacks = [seed, NonFinite(), Checkpoint(tmp_path, every=every, background=background)]
        loop = Loop(model, adamw(model), callbacks, resume=tmp_path)
        with pytest.raises(FloatingPointError, match="not finite in update 6: the loss, ") as error:
            form(loop, odd, loader(), epochs=2)
        return [note for note in getattr(error.value, "__notes__", []) if "checkpoint" in note]

    assert run(100) == []
    assert run(2) == [f"the last checkpoint is {tmp_path / 'step-00000004'}"]
    assert run(100) == [f"the last checkpoint is {tmp_path / 'step-00000004'}"]


class Counts(nn.Module):
    """Holds, and uses, buffers that its state dict leaves out."""

    def __init__(self, given: float = 0.0) -> None:
        super().__init__()
        self.net = net()
        self.register_buffer("seen", torch.zeros(()), persistent=False)
        self.register_buffer("wide", torch.zeros(1).expand(3), persistent=False)
        self.register_buffer("given", torch.tensor(given), persistent=False)

    def forward(self, x: torch.Tensor) -> Any:
        self.seen += 1
        return self.net(x) * (1 + 0.1 * self.seen) + self.wide


def test_buffers_that_the_state_dict_leaves_out_go_on_too(tmp_path: Path) -> None:
    def run(kill: int | None, unused: float = 0.0, **given: Any) -> Loop:
        torch.manual_seed(1)
        model = Counts(unused)
        loop = Loop(model, adamw(model), [Seed(0), Checkpoint(tmp_path / str(given), every=1), KillAt(kill)], **given)
        loop.fit(loss_fn, loader(), epochs=2)
        return loop

    expected = run(None)
    with pytest.raises(Killed):
        run(8, strict=True)
    resumed = run(None, 5.0, strict=True, resume=tmp_path / str({"strict": True}))
    assert_same_bits(bits(expected), bits(resumed))
    assert resumed.state.model.seen == 14
    assert resumed.state.model.given == 5.0  # which nothing but the program ever set


class Remembers(nn.Module):
    """Holds what its forward makes in buffers that its state dict leaves out: from nothing, longer in each, and let go."""

    def __init__(self, holds: bool = True) -> None:
        super().__init__()
        self.net = net()
        for name, first in (("last", None), ("past", torch.zeros(1)), ("once", torch.ones(2))):
            if holds:
                self.register_buffer(name, first, persistent=False)
        self.holds = holds

    def forward(self, x: torch.Tensor) -> Any:
        if not self.holds:
            return self.net(x)
        made = self.net(x) + self.past.sum() + (0 if self.last is None else self.last) + (0 if self.once is None else 1)
        if self.training:
            self.last, self.past, self.once = made.detach().mean(0), torch.cat([self.past, made.detach().mean().view(1)]), None
        return made


def test_buffers_that_a_forward_fills_replaces_or_lets_go_go_on_too(tmp_path: Path) -> None:
    def run(kill: int | None, wrap: Any = lambda model: model, **given: Any) -> Loop:
        torch.manual_seed(1)
        model = wrap(Remembers())
        loop = Loop(model, adamw(model), [Seed(0), Checkpoint(tmp_path / "runs", every=1), KillAt(kill)], **given)
        loop.fit(loss_fn, loader(), epochs=2)
        return loop

    expected = run(None)
    shutil.rmtree(tmp_path / "runs")
    with pytest.raises(Killed):
        run(8, nn.DataParallel)
    resumed = run(None, resume=tmp_path / "runs")
    assert_same_bits(bits(expected), bits(resumed))
    assert_same_bits(dict(expected.state.model.named_buffers()), dict(resumed.state.model.named_buffers()))
    assert (len(resumed.state.model.past), resumed.state.model.once) == (15, None)
    model = Remembers(holds=False)
    with pytest.warns(UserWarning, match=r"buffers that the model has no place for.*: last, past$"):
        Loop(model, adamw(model), [Seed(0)], resume=tmp_path / "runs").__enter__()
