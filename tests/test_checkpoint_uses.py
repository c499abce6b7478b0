"""What users do with checkpoints and signals in their first week."""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import hashlib
import json
import logging
import os
import pickle
import shutil
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import adamw, assert_same_bits, bits, built_in, loader, loss_fn, net, same
from test_preemption import History, Server, Told, newest
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader

from hookloop.callbacks import Checkpoint, EarlyStopping, Preemption, Schedule, Seed
from hookloop.loop import Callback, Goal, Loop, State
from hookloop.loop.store import Damaged, list_checkpoints, manifest, step_of

TERM, USR1, INT = signal.SIGTERM, signal.SIGUSR1, signal.SIGINT
processes = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and POSIX signals")

# --------------------------------------------------------------------------------------------------------------- shared


def data(dtype: torch.dtype = torch.float32) -> DataLoader:
    return loader(56, 8, dtype, shuffle=False)


def val() -> DataLoader:
    return loader(20, 8, shuffle=False)


def save_run(folder: Path, *callbacks: Callback, steps: int = 3, model: Any = None, optimizer: Any = None,
             keep: int | None = 3, every: int | None = None) -> Loop:  # fmt: skip
    """Train for some updates, the last of which is saved."""
    model = net(noise=False) if model is None else model
    save = Checkpoint(folder, every=every, keep=keep)
    loop = Loop(model, adamw(model) if optimizer is None else optimizer, [*callbacks, save])
    built_in(loop, loss_fn, data(), steps=steps)
    return loop


def resuming(place: str | Path, *callbacks: Callback, model: Any = None, optimizer: Any = None, strict: bool = True) -> Loop:
    model = net(noise=False, seed=8) if model is None else model
    return Loop(model, adamw(model) if optimizer is None else optimizer, callbacks, resume=place, strict=strict)


def enter(loop: Loop) -> Loop:
    with loop:
        pass
    return loop


def model_file(checkpoint: Path) -> Any:
    return torch.load(checkpoint / "model.pt", weights_only=True)


def names(folder: Path) -> list[str]:
    return [p.name for p in list_checkpoints(folder)]


def hand(loop: Loop, report: Callable[[], None], *, epochs: int, train: Any = None, after: Any = None) -> State:
    """A hand-written loop that reports by itself after each epoch's steps."""
    with loop:
        for _ in loop.epochs(epochs):
            for step in loop.steps(train or data()):
                for micro in step:
                    with micro:
                        micro.backward(loss_fn)
                loop.update()
            if after is not None:
                after()
            report()
    return loop.state


def around(loop: Loop, count: int, body: Callable[[int], None]) -> None:
    """A loop of the user's own; `body` runs after each update."""
    with loop:
        for number, batch in zip(range(1, count + 1), data(), strict=False):
            loss_fn(loop.state.model, batch)["loss"].backward()
            with loop.updating(samples=8):
                loop.state.optimizer.step()
            loop.state.optimizer.zero_grad()
            body(number)


def rewrite(checkpoint: Path, **changes: Any) -> None:
    """Have a manifest say what the files are now, and what else is given, under a digest of its own that is right."""
    path = checkpoint / manifest.NAME
    content = json.loads(path.read_text())
    del content["sha256"]
    content["files"] = {name: manifest.entry(checkpoint / name) for name in content["files"]}
    content |= changes
    own = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    path.write_text(json.dumps({**content, "sha256": own}, indent=1) + "\n")


def said(caplog: pytest.LogCaptureFixture, text: str) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "hookloop" and r.levelno >= logging.WARNING
            and text in r.getMessage()]  # fmt: skip


class At(Callback):
    """Does something at the end of one step."""

    def __init__(self, step: int, act: Callable[[State], Any]) -> None:
        self.step, self.act = step, act

    def on_step_end(self, state: State) -> None:
        if state.step == self.step:
            self.act(state)


# -------------------------------------------------------------------------------------- checkpoints under another name


@pytest.mark.parametrize("how", ["renamed", "copied", "link", "link to the folder"])
@pytest.mark.parametrize("inside", [False, True], ids=["folder", "file in it"])
def test_a_checkpoint_under_another_name_is_resumed(how: str, inside: bool, tmp_path: Path) -> None:
    save_run(tmp_path / "runs")
    source, place = list_checkpoints(tmp_path / "runs")[-1], tmp_path / "mine" / "final model"
    place.parent.mkdir()
    wanted = model_file(source)
    if how == "renamed":
        source.rename(place)
    elif how == "copied":
        shutil.copytree(source, place)
    else:
        place.symlink_to(source if how == "link" else source.parent)
    named = place / source.name if how == "link to the folder" else place
    loop = enter(resuming(named / "model.pt" if inside else named))
    assert (loop.state.step, loop.state.samples) == (3, 24)
    assert_same_bits(wanted, dict(loop.state.model.state_dict()))


@pytest.mark.parametrize("along", [False, True], ids=["left behind", "copied along"])
def test_a_copy_needs_the_file_beside_it(along: bool, tmp_path: Path) -> None:
    first = EarlyStopping("train_loss", restore_best=True)
    save_run(tmp_path / "runs", first, steps=7)
    source, place = list_checkpoints(tmp_path / "runs")[-1], tmp_path / "mine" / "final"
    shutil.copytree(source, place)
    (beside,) = (tmp_path / "runs").glob("weights-*.pt")
    stop = EarlyStopping("train_loss", restore_best=True)
    loop = resuming(place, stop, Checkpoint(tmp_path / "new"))
    if along:
        shutil.copy(beside, place.parent)
        assert enter(loop).state.step == 7
        assert stop.tracker.best == first.tracker.best is not None
    else:
        with pytest.raises(Damaged, match=rf"{beside.name} is missing"):
            enter(loop)


def test_a_link_finds_the_file_beside_its_target(tmp_path: Path) -> None:
    save_run(tmp_path / "runs", EarlyStopping("train_loss", restore_best=True), steps=7)
    (tmp_path / "latest").symlink_to(list_checkpoints(tmp_path / "runs")[-1])
    loop = enter(resuming(tmp_path / "latest", EarlyStopping("train_loss", restore_best=True), Checkpoint(tmp_path / "new")))
    assert loop.state.step == 7


@pytest.mark.parametrize("there", [False, True], ids=["no folder", "an empty one"])
def test_a_folder_without_checkpoints_says_that_the_start_is_fresh(there: bool, tmp_path: Path,
                                                                   caplog: pytest.LogCaptureFixture) -> None:  # fmt: skip
    if there:
        (tmp_path / "runs").mkdir()
    assert enter(resuming(tmp_path / "runs")).state.step == 0
    (line,) = said(caplog, "holds no checkpoint yet: a fresh start")
    assert str(tmp_path / "runs") in line


# --------------------------------------------------------------------------------------------- two that write checkpoints


def test_two_checkpoints_each_keep_their_own_best(tmp_path: Path) -> None:
    low = Checkpoint(tmp_path / "loss", keep=1, best="loss")
    high = Checkpoint(tmp_path / "acc", keep=1, best=Goal("acc", mode="max")).named("acc")
    model = net(noise=False)
    loop = Loop(model, adamw(model), [low, high])
    reports = iter([{"loss": a, "acc": b} for a, b in zip([1, 0.9, 0.95, 0.8, 1.1], [0.5, 0.4, 0.9, 0.1, 0.2], strict=True)])
    hand(loop, lambda: loop.report(next(reports)), epochs=5, train=loader(16, 8, shuffle=False))
    assert loop.state.step == 10
    assert names(tmp_path / "loss") == ["step-00000008", "step-00000010"]
    assert names(tmp_path / "acc") == ["step-00000006", "step-00000010"]
    assert low.best == tmp_path / "loss" / "step-00000008"
    assert high.best == tmp_path / "acc" / "step-00000006"


def test_a_folder_of_another_runs_checkpoints_is_refused(tmp_path: Path) -> None:
    save_run(tmp_path / "a", steps=3)
    save_run(tmp_path / "b", steps=5)
    kept = {path: path.read_bytes() for path in tmp_path.glob("*/*/*")}
    with pytest.raises(ValueError, match=rf"{tmp_path / 'a'}' holds step-00000003 of another run: give an empty folder"):
        built_in(resuming(tmp_path / "b", Checkpoint(tmp_path / "a")), loss_fn, data(), steps=7)
    assert kept == {path: path.read_bytes() for path in tmp_path.glob("*/*/*")}


@pytest.mark.parametrize("how", ["itself", "link", "copy", "its second", "its second without a word of the run"])
def test_a_folder_of_the_same_runs_checkpoints_is_gone_on_with(how: str, tmp_path: Path) -> None:
    model = net(noise=False)
    loop = Loop(model, adamw(model), [Checkpoint(tmp_path / "a"), Checkpoint(tmp_path / "second").named("second")])
    built_in(loop, loss_fn, data(), steps=3)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    place = tmp_path / {"itself": "a", "link": "link", "copy": "copy"}.get(how, "second")
    if how.endswith("run"):  # as before there was one
        path = place / "step-00000003" / manifest.NAME
        about = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("sha256", "run")}
        path.write_text(manifest._text(about))
    for steps in (5, 7):
        built_in(resuming(tmp_path / "a" if steps == 5 else place, Checkpoint(place)), loss_fn, data(), steps=steps)
    assert names(place) == ["step-00000003", "step-00000005", "step-00000007"]


@pytest.mark.parametrize("spelled", ["runs", "runs/../runs", "link"])
def test_two_checkpoints_on_one_folder_are_refused(spelled: str, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "runs")
    model = net(noise=False)
    loop = Loop(model, adamw(model), [Checkpoint(tmp_path / "runs"), Checkpoint(tmp_path / spelled).named("second")])
    before = bits(loop)
    with pytest.raises(ValueError, match=rf"{tmp_path}/{spelled}.*another Checkpoint"):
        built_in(loop, loss_fn, data(), steps=2)
    assert_same_bits(before, bits(loop))
    assert names(tmp_path / "runs") == []
    assert save_run(tmp_path / "runs").state.step == 3  # nobody writes there any more


def test_two_loops_at_once_on_one_folder_are_refused(tmp_path: Path) -> None:
    model = net(noise=False)
    loop = Loop(model, adamw(model), [Checkpoint(tmp_path, every=1)])  # around one's own loop, it must say when

    def other(step: int) -> None:
        if step == 2:
            with pytest.raises(ValueError, match=rf"{tmp_path}.*another Checkpoint"):
                save_run(tmp_path)
            with pytest.raises(ValueError, match=rf"{tmp_path}.*another Checkpoint"):
                built_in(resuming(tmp_path, Checkpoint(tmp_path)), loss_fn, data(), steps=6)

    around(loop, 4, other)
    assert names(tmp_path) == ["step-00000002", "step-00000003", "step-00000004"]
    again = enter(Loop(model, adamw(model), [Checkpoint(tmp_path, every=100)], resume=tmp_path))
    assert again.state.step == 4
    around(again, 2, lambda step: None)
    assert names(tmp_path)[-1] == "step-00000006"


# ---------------------------------------------------------------------------------------------------- around one's own loop


@pytest.mark.parametrize("noise", [False, True], ids=["plain", "batch norm"])
def test_around_the_best_is_what_was_validated(noise: bool, tmp_path: Path) -> None:
    model, losses, seen = net(noise=noise), iter([3.0, 1.0, 2.0]), {}
    save = Checkpoint(tmp_path, every=100, keep=None, best="val_loss")
    loop = Loop(model, adamw(model), [save])

    def report(step: int) -> None:
        if step % 2 == 0:
            seen[step] = {name: value.clone() for name, value in model.state_dict().items()}
            loop.report({"val_loss": next(losses)})

    around(loop, 7, report)
    assert names(tmp_path) == ["step-00000002", "step-00000004", "step-00000007"]
    assert save.best is not None
    assert step_of(save.best) == 4
    for step in (2, 4):
        assert_same_bits(seen[step], dict(model_file(tmp_path / f"step-{step:08d}")))


def test_around_a_report_after_the_last_update_is_saved_as_it_was(tmp_path: Path) -> None:
    model = net()
    save = Checkpoint(tmp_path, every=100, best="val_loss")
    loop = Loop(model, adamw(model), [save])
    around(loop, 3, lambda step: loop.report({"val_loss": 1.0}) if step == 3 else None)
    assert save.best == tmp_path / "step-00000003"
    assert_same_bits(dict(model.state_dict()), dict(model_file(save.best)))


# ----------------------------------------------------------------------------------------------- resuming with a change


@pytest.mark.parametrize(("goal", "here"), [
    (Goal("val_accuracy", mode="max"), r"'val_accuracy' \(max\)"), (Goal("val_loss", mode="max"), r"'val_loss' \(max\)"),
])  # fmt: skip
@pytest.mark.parametrize("who", ["EarlyStopping", "Checkpoint"])
def test_another_metric_is_not_compared_with_the_old_one(who: str, goal: Goal, here: str, tmp_path: Path) -> None:
    def made(goal: Goal, folder: Path) -> list[Any]:
        stop = [EarlyStopping(goal)] if who == "EarlyStopping" else []
        return [*stop, Checkpoint(folder, best=None if stop else goal)]

    model = net(noise=False)
    loop = Loop(model, adamw(model), made(Goal("val_loss"), tmp_path / "a"))
    hand(loop, lambda: loop.report({"val_loss": 2.0 - loop.state.epoch, "val_accuracy": 0.5}), epochs=2)
    changed = made(goal, tmp_path / "b")
    loop = resuming(tmp_path / "a", *changed)
    before = bits(loop)
    with pytest.raises(ValueError, match=rf"{who}.*{here} here and 'val_loss' \(min\) in the checkpoint"):
        enter(loop)
    assert_same_bits(before, bits(loop))
    changed = made(goal, tmp_path / "b")
    loop = resuming(tmp_path / "a", *changed, strict=False)
    with pytest.warns(UserWarning, match=rf"{who}.*{here} here and 'val_loss' \(min\)"):
        enter(loop)
    assert loop.state.step == 14
    assert (changed[0].tracker.best, changed[0].tracker.bad) == (None, 0)
    hand(loop, lambda: loop.report({"val_loss": 7.0, "val_accuracy": 0.1}), epochs=3)
    assert changed[0].tracker.best == (7.0 if goal.metric == "val_loss" else 0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("steps", [7, 3], ids=["at an epoch's end", "within an epoch"])
def test_another_dtype_is_told_and_trains_on(steps: int, dtype: torch.dtype, tmp_path: Path) -> None:
    wanted = save_run(tmp_path / "a", steps=steps).state.model.state_dict()
    loop = resuming(tmp_path / "a", Checkpoint(tmp_path / "b"), model=net(dtype, noise=False, seed=8))
    before = bits(loop)
    with pytest.raises(ValueError, match=rf"0\.weight is {dtype} here and torch\.float32 in the checkpoint"):
        enter(loop)
    assert_same_bits(before, bits(loop))
    model = net(dtype, noise=False, seed=8)
    loop = resuming(tmp_path / "a", Checkpoint(tmp_path / "b"), model=model, strict=False)
    with pytest.warns(UserWarning, match=rf"2\.bias is {dtype} here"):
        enter(loop)
    assert_same_bits({n: x.to(dtype) for n, x in wanted.items()}, dict(model.state_dict()))
    state = built_in(loop, loss_fn, data(dtype), steps=10)
    assert state.step == 10
    for p in model.parameters():
        assert p.dtype == dtype
        assert state.optimizer.state[p]["step"] == 10
        assert p.isfinite().all()
    assert enter(resuming(tmp_path / "b", Checkpoint(tmp_path / "b"), model=net(dtype, noise=False))).state.step == 10


def deeper() -> nn.Sequential:
    torch.manual_seed(8)
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3), nn.Linear(3, 3))


def halved() -> Schedule:
    return Schedule(lambda optimizer, steps: lr_scheduler.StepLR(optimizer, 1, 0.5))


def test_one_more_layer_goes_on_at_the_rate_of_the_schedule(tmp_path: Path) -> None:
    save_run(tmp_path / "a", halved())
    with pytest.raises(ValueError, match=r"3\.weight is missing in the checkpoint"):
        enter(resuming(tmp_path / "a", halved(), model=deeper()))
    loop = resuming(tmp_path / "a", halved(), model=deeper(), strict=False)
    rates = []
    with pytest.warns(UserWarning, match=r"3\.weight is missing in the checkpoint"):
        enter(loop)
    assert [group["lr"] for group in loop.state.optimizer.param_groups] == [1e-2 / 8]
    for steps in (4, 5):
        built_in(loop, loss_fn, data(), steps=steps)
        rates.append(loop.state.optimizer.param_groups[0]["lr"])
    assert rates == [1e-2 / 16, 1e-2 / 32]


def test_one_more_layer_goes_on_at_the_rate_of_a_plateau(tmp_path: Path) -> None:
    def plateau() -> Schedule:
        return Schedule(lambda optimizer, steps: lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0), "score")

    model = net(noise=False)
    loop = Loop(model, adamw(model), [plateau(), Checkpoint(tmp_path)])
    hand(loop, lambda: loop.report({"score": 1.0}), epochs=3)
    assert model is loop.state.model
    assert loop.state.optimizer.param_groups[0]["lr"] == 1e-2 / 4
    loop = resuming(tmp_path, plateau(), Checkpoint(tmp_path), model=deeper(), strict=False)
    with pytest.warns(UserWarning, match=r"3\.bias is missing"):
        hand(loop, lambda: loop.report({"score": 1.0}), epochs=4)
    assert loop.state.optimizer.param_groups[0]["lr"] == 1e-2 / 8


def test_groups_take_the_settings_of_those_they_share_most_with(tmp_path: Path) -> None:
    """A group put in front moves the others' places; each still goes on at its own rate."""

    def groups(model: nn.Sequential) -> torch.optim.Optimizer:
        each = [{"params": list(layer.parameters()), "lr": 10.0**-i} for i, layer in enumerate(model) if i in (0, 2)]
        new = [{"params": list(model[3].parameters()), "lr": 0.5}] if len(model) > 3 else []
        return torch.optim.AdamW([*new, *each])

    model = net(noise=False)
    save_run(tmp_path, At(3, lambda state: [group.update(lr=group["lr"] / 4) for group in state.optimizer.param_groups]),
             model=model, optimizer=groups(model))  # fmt: skip
    model = deeper()
    loop = resuming(tmp_path, model=model, optimizer=groups(model), strict=False)
    with pytest.warns(UserWarning, match="parameter groups"):
        enter(loop)
    assert [group["lr"] for group in loop.state.optimizer.param_groups] == [0.5, 1 / 4, 1e-2 / 4]


class Picky(Callback):
    """Counts steps; with `refuses` it reads an entry that was never saved."""

    def __init__(self, refuses: bool) -> None:
        self.refuses, self.count = refuses, 0

    def on_step_end(self, state: State) -> None:
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["of another version" if self.refuses and state["count"] else "count"]


@pytest.mark.parametrize("strict", [True, False])
def test_what_callbacks_refuse_is_told_at_once_and_changes_nothing(strict: bool, tmp_path: Path) -> None:
    model = net(noise=False)
    loop = Loop(model, adamw(model), [EarlyStopping("score"), halved(), Seed(5), Picky(False), Checkpoint(tmp_path / "a")])
    hand(loop, lambda: loop.report({"score": 1.0}), epochs=2)
    stop, picky, seed, model = EarlyStopping("score"), Picky(True), Seed(6), net(noise=False, seed=8)
    optimizer = adamw(model)
    schedule = Schedule(lr_scheduler.ExponentialLR(optimizer, 0.5))
    loop = resuming(tmp_path / "a", stop, schedule, seed, picky, Checkpoint(tmp_path / "b"), model=model, optimizer=optimizer,
                    strict=strict)  # fmt: skip
    before, settings = bits(loop), [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    followed = None if schedule.scheduler is None else dict(schedule.scheduler.state_dict())
    with contextlib.ExitStack() as stack:
        caught: Any = stack.enter_context(pytest.raises(ValueError) if strict else pytest.warns(UserWarning))  # noqa: PT011,PT030
        hand(loop, lambda: loop.report({"score": 1.0}), epochs=3)
    text = str(caught.value) if strict else "\n".join(str(one.message) for one in caught)
    assert "Schedule does not take its state" in text
    assert "a StepLR" in text
    assert "Seed does not take its state" in text
    assert "Seed(5), not Seed(6)" in text
    assert "Picky does not take its state: KeyError" in text
    assert "EarlyStopping" not in text
    if strict:
        assert_same_bits(before, bits(loop))
        same(settings, [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups])
        assert loop.state.step == loop.state.epoch == 0
        assert (stop.tracker.best, stop.tracker.bad, picky.count) == (None, 0, 0)
        assert followed == (None if schedule.scheduler is None else dict(schedule.scheduler.state_dict()))
    else:
        assert loop.state.step == 21
        assert (stop.tracker.best, stop.tracker.bad, picky.count) == (1.0, 2, 7)
        assert type(schedule.scheduler).__name__ == "ExponentialLR"


@pytest.mark.parametrize("strict", [True, False])
def test_another_kind_of_scheduler_by_a_function_is_told_when_it_is_built(strict: bool, tmp_path: Path) -> None:
    save_run(tmp_path, halved())
    made = Schedule(lambda optimizer, steps: lr_scheduler.ExponentialLR(optimizer, 0.5))
    told: Any = pytest.raises(ValueError, match="holds a StepLR, scheduler is a ExponentialLR")
    if not strict:
        told = pytest.warns(UserWarning, match="holds a StepLR, scheduler is a ExponentialLR.*strict=False allows it")
    with told:
        built_in(resuming(tmp_path, made, Checkpoint(tmp_path / "b"), strict=strict), loss_fn, data(), steps=4)


def cosine(length: int) -> Schedule:
    return Schedule(lambda optimizer, steps: lr_scheduler.CosineAnnealingLR(optimizer, length))


def test_a_scheduler_of_other_settings_is_told(tmp_path: Path) -> None:
    save_run(tmp_path, cosine(14))
    with pytest.warns(UserWarning, match=r"CosineAnnealingLR.*checkpoint's T_max 14 \(not 42\)"):
        built_in(resuming(tmp_path, cosine(42), Checkpoint(tmp_path / "b")), loss_fn, data(), steps=4)
    model = net(noise=False)
    optimizer = adamw(model)
    built = Schedule(lr_scheduler.CosineAnnealingLR(optimizer, 42))
    with pytest.warns(UserWarning, match=r"CosineAnnealingLR.*checkpoint's T_max 14 \(not 42\)"):
        enter(resuming(tmp_path, built, Checkpoint(tmp_path / "c"), model=model, optimizer=optimizer))
    built_in(resuming(tmp_path, cosine(14), Checkpoint(tmp_path)), loss_fn, data(), steps=5)  # the same: no warning


@pytest.mark.parametrize("length", [14, 42])
def test_a_schedulers_settings_are_told_as_they_are_also_at_the_second_resume(length: int, tmp_path: Path) -> None:
    """The checkpoint's T_max of 14 stood at the first resume with 42, so it is what the second goes on with."""
    save_run(tmp_path / "a", cosine(14))
    with pytest.warns(UserWarning, match=r"T_max 14 \(not 42\)"):
        built_in(resuming(tmp_path / "a", cosine(42), Checkpoint(tmp_path / "b")), loss_fn, data(), steps=4)
    again = cosine(length)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        built_in(resuming(tmp_path / "b", again, Checkpoint(tmp_path / "b")), loss_fn, data(), steps=5)
    assert again.scheduler.T_max == 14
    assert [str(one.message).partition("checkpoint's ")[2] for one in caught] == (["T_max 14 (not 42)"] if length == 42 else [])


@pytest.mark.parametrize(("kind", "before", "after"), [
    (torch.optim.AdamW, {}, {"amsgrad": True}), (torch.optim.RMSprop, {}, {"centered": True, "momentum": 0.9}),
    (torch.optim.RMSprop, {}, {"momentum": 0.9}), (torch.optim.SGD, {}, {"momentum": 0.9}),
    (torch.optim.AdamW, {"amsgrad": True}, {}), (torch.optim.RMSprop, {"centered": True, "momentum": 0.9}, {}),
])  # fmt: skip
def test_an_optimizer_that_keeps_other_state_begins_it_anew(kind: Any, before: Any, after: Any, tmp_path: Path) -> None:
    model = net(noise=False)
    save_run(tmp_path, model=model, optimizer=kind(model.parameters(), lr=1e-3, **before))
    option, model = next(iter({**before, **after})), net(noise=False)
    with pytest.raises(ValueError, match=rf"{option} of parameter group 0"):
        enter(resuming(tmp_path, model=model, optimizer=kind(model.parameters(), lr=1e-3, **after)))
    model = net(noise=False)
    loop = resuming(tmp_path, Checkpoint(tmp_path), model=model, optimizer=kind(model.parameters(), lr=1e-3, **after),
                    strict=False)  # fmt: skip
    with pytest.warns(UserWarning, match=rf"{option} of parameter group 0"):
        assert built_in(loop, loss_fn, data(), steps=5).step == 5
    for name, value in after.items():
        assert loop.state.optimizer.param_groups[0][name] == value


def test_adagrad_takes_one_more_layer(tmp_path: Path) -> None:
    model = net(noise=False)
    save_run(tmp_path, model=model, optimizer=torch.optim.Adagrad(model.parameters()))
    old = torch.load(list_checkpoints(tmp_path)[-1] / "state.pt", weights_only=True)["optimizer"]["state"]
    model = deeper()
    loop = resuming(tmp_path, Checkpoint(tmp_path), model=model, optimizer=torch.optim.Adagrad(model.parameters()),
                    strict=False)  # fmt: skip
    with pytest.warns(UserWarning, match=r"3\.weight is missing"):
        enter(loop)
    held = loop.state.optimizer.state
    assert torch.equal(held[model[0].weight]["sum"], old["0.weight"]["sum"])
    assert not held[model[3].weight]["sum"].any()
    assert built_in(loop, loss_fn, data(), steps=5).step == 5
    assert [float(held[model[i].weight]["step"]) for i in (0, 3)] == [5.0, 2.0]


# ------------------------------------------------------------------------------------------------- leaving, by one's own hand


@pytest.mark.parametrize("at", [4, 7, 11, 14])
def test_by_hand_nothing_is_reported_when_leaving(at: int, tmp_path: Path) -> None:
    """Within an epoch (steps 4 and 11) and at its last step; the resumed run makes up for the report."""

    def made(folder: Path | None, *more: Callback) -> tuple[Loop, EarlyStopping, History]:
        seed, model, stop, history = Seed(4), net(), EarlyStopping("val_loss", patience=9), History()
        save = [] if folder is None else [Checkpoint(folder)]
        return Loop(model, adamw(model), [seed, stop, history, *save, *more], resume=folder), stop, history

    def run(loop: Loop) -> State:
        return hand(loop, lambda: loop.report(loop.evaluate(loss_fn, val())), epochs=3)

    whole, counted, reported = made(None)
    run(whole)
    cut, _, early = made(tmp_path / "a", At(at, lambda state: state.leave("x")))
    state = run(cut)
    assert (state.step, state.stop_reason) == (at, "x")
    assert early.seen == [seen for seen in reported.seen if seen[0] < at]
    assert newest(tmp_path / "a") == at
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    again, stop, history = made(tmp_path / "b")
    assert run(again).step == 21
    assert history.seen == reported.seen
    assert (stop.tracker.best, stop.tracker.bad) == (counted.tracker.best, counted.tracker.bad)
    assert_same_bits(bits(whole), bits(again))
    entered = run(cut)  # and so does the same Loop, entered again
    assert entered.stop_reason is None
    assert_same_bits(bits(whole), bits(cut))


@pytest.mark.parametrize("at", [3, 7])
def test_by_hand_the_checkpoint_is_there_when_the_steps_end(at: int, tmp_path: Path) -> None:
    model, found = net(noise=False), list[list[str]]()
    loop = Loop(model, adamw(model), [Checkpoint(tmp_path), At(at, lambda state: state.leave("x"))])
    hand(loop, lambda: None, epochs=2, after=lambda: found.append(names(tmp_path)))
    assert found == [[f"step-{at:08d}"]]
    assert names(tmp_path) == found[0]  # written once
    assert newest(tmp_path) == at


# --------------------------------------------------------------------------------------------------------- saves that fail


class Arm(Callback):
    """Says when an epoch ends, before its save."""

    def __init__(self, epoch: int, act: Callable[[], None]) -> None:
        self.epoch, self.act = epoch, act

    def on_epoch_end(self, state: State) -> None:
        if state.epoch == self.epoch:
            self.act()


@pytest.mark.parametrize("background", [True, False], ids=["background", "foreground"])
def test_a_last_save_that_failed_is_tried_again(background: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, armed = os.write, list[int]()

    def full(handle: int, text: Any) -> int:
        if armed:
            armed.clear()
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(handle, text)

    def arm() -> None:
        for thread in threading.enumerate():  # the save of the first epoch is there
            if thread.name == "hookloop checkpoint":
                thread.join()
        armed.append(1)

    monkeypatch.setattr(os, "write", full)
    model = net(noise=False)
    loop = Loop(model, adamw(model), [Arm(2, arm), Checkpoint(tmp_path, background=background)])
    with pytest.warns(UserWarning, match="Checkpoint failed to save.*disk full"):
        built_in(loop, loss_fn, data(), epochs=2)
    assert not armed
    assert names(tmp_path) == ["step-00000007", "step-00000014"]
    assert newest(tmp_path) == 14
    assert_same_bits(dict(model.state_dict()), dict(model_file(tmp_path / "step-00000014")))


@pytest.mark.parametrize("background", [True, False], ids=["background", "foreground"])
@pytest.mark.parametrize("last", [3.0, 6.0])
def test_a_best_whose_save_failed_is_not_the_best(last: float, background: bool, tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    real, armed = os.write, list[int]()

    def full(handle: int, text: Any) -> int:
        if armed:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(handle, text)

    monkeypatch.setattr(os, "write", full)
    save, model = Checkpoint(tmp_path, best="score", background=background), net(noise=False)
    loop = Loop(model, adamw(model), [save])
    reports = iter([5.0, 1.0, last, 4.0])

    def report() -> None:
        for thread in threading.enumerate():
            if thread.name == "hookloop checkpoint":
                thread.join()
        armed[:] = [1] * (loop.state.epoch == 1)
        loop.report({"score": next(reports)})

    with pytest.warns(UserWarning, match="Checkpoint failed to save.*disk full"):
        hand(loop, report, epochs=4, train=loader(16, 8, shuffle=False))
    best = 6 if last == 3 else 8
    assert save.best == tmp_path / f"step-{best:08d}"
    assert save.tracker.best == min(last, 4.0)
    again = Checkpoint(tmp_path, best="score")
    enter(resuming(tmp_path, again))
    assert (again.best, again.tracker.best) == (save.best, min(last, 4.0))


@pytest.mark.parametrize("background", [True, False], ids=["background", "foreground"])
def test_a_best_that_is_tried_again_at_the_end_is_the_best(background: bool, tmp_path: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    real, armed = os.write, list[int]()

    def full(handle: int, text: Any) -> int:
        if armed:
            armed.clear()
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(handle, text)

    monkeypatch.setattr(os, "write", full)
    save, model = Checkpoint(tmp_path, best="score", background=background), net(noise=False)
    loop = Loop(model, adamw(model), [save, Arm(1, lambda: armed.append(1))])
    with pytest.warns(UserWarning, match="Checkpoint failed to save.*disk full"):
        hand(loop, lambda: loop.report({"score": 1.0}), epochs=1, train=loader(16, 8, shuffle=False))
    assert save.best == tmp_path / "step-00000002"


@pytest.mark.parametrize("when", ["setup", "resume"])
def test_a_loop_put_right_and_entered_again_saves_once(when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_run(tmp_path / "old")
    model = net(noise=False)
    loop = Loop(model, adamw(model), [Checkpoint(tmp_path / "new", every=1, keep=None)],
                resume=tmp_path / "moved" / "step-00000003" if when == "resume" else tmp_path / "old")  # fmt: skip
    if when == "resume":
        with pytest.raises(FileNotFoundError, match="no such checkpoint"):
            built_in(loop, loss_fn, data(), steps=6)
        (tmp_path / "old").rename(tmp_path / "moved")
    else:
        with monkeypatch.context() as patch:
            patch.setattr(torch, "load", lambda *args, **kwargs: [][0])
            with pytest.raises(RuntimeError, match="no checkpoint can be read"):
                built_in(loop, loss_fn, data(), steps=6)
    assert built_in(loop, loss_fn, data(), steps=6).step == 6
    assert names(tmp_path / "new") == ["step-00000004", "step-00000005", "step-00000006"]


# ------------------------------------------------------------------------------------------------- checkpoints that are odd


def test_memory_that_ran_out_is_no_damaged_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_run(tmp_path, every=1)

    def out(*args: Any, **kwargs: Any) -> Any:
        raise MemoryError("of the test")

    loop = resuming(tmp_path, Checkpoint(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", out)
        with pytest.raises(MemoryError, match="of the test"):
            enter(loop)
    assert enter(loop).state.step == 3
    assert names(tmp_path) == ["step-00000001", "step-00000002", "step-00000003"]


@pytest.mark.parametrize("name", ["manifest.json", "model.pt", "state.pt"])
def test_a_checkpoint_pruned_while_it_is_read_gives_way_to_the_newer(name: str, tmp_path: Path,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Deleted by a run that writes, just before one of its files is opened (for its digest, or to be loaded)."""
    save_run(tmp_path / "runs", every=1)
    old, new = tmp_path / "runs" / "step-00000002", tmp_path / "runs" / "step-00000003"
    new.rename(tmp_path / "to come")
    read, load = manifest.read, torch.load

    def pruned(place: Path) -> None:
        if old.is_dir() and place == old / name:
            (tmp_path / "to come").rename(new)
            shutil.rmtree(old)

    def reading(checkpoint: Path, *args: Any) -> Any:
        pruned(checkpoint / manifest.NAME)
        return read(checkpoint, *args)

    def loading(path: Path, **kwargs: Any) -> Any:
        pruned(Path(path))
        return load(path, **kwargs)

    monkeypatch.setattr(manifest, "read", reading)
    monkeypatch.setattr(torch, "load", loading)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert enter(resuming(tmp_path / "runs")).state.step == 3
    assert not old.exists()


class Evil:
    """Unpickled, it would leave a file behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("kind", ["code in the model", "code in the state", "no file of torch's", "another's state"])
def test_a_newest_checkpoint_that_cannot_be_read_is_put_aside(kind: str, tmp_path: Path,
                                                              caplog: pytest.LogCaptureFixture) -> None:  # fmt: skip
    mark, folder = tmp_path / "evil", tmp_path / "runs"
    save_run(tmp_path / "whole", steps=6, every=1, keep=None)
    save_run(folder, every=1, keep=None)
    bad = folder / "step-00000003"
    if kind.startswith("code"):
        torch.save({"x": Evil(mark)}, bad / ("model.pt" if kind == "code in the model" else "state.pt"))
    elif kind == "no file of torch's":
        (bad / "model.pt").write_bytes(pickle.dumps([1, 2], 2) * 100)
    else:
        torch.save([1, 2], bad / "state.pt")
    rewrite(bad)
    with pytest.warns(UserWarning, match=r"resumed from .*step-00000002, since a newer one can't be read"):
        built_in(loop := resuming(folder, Checkpoint(folder, every=1, keep=None)), loss_fn, data(), steps=6)
    assert not mark.exists()
    assert loop.state.step == 6
    # the name of the one put aside is not given twice
    assert names(folder) == [f"step-{step:08d}{'.2' if step == 3 else ''}" for step in range(1, 7)]
    assert (folder / "unreadable-step-00000003").is_dir()
    (line,) = said(caplog, "renamed")
    assert str(bad) in line
    assert newest(folder) == 6
    assert_same_bits(model_file(tmp_path / "whole" / "step-00000006"), model_file(folder / "step-00000006"))


def test_a_checkpoint_of_a_later_version_is_an_error_by_name(tmp_path: Path) -> None:
    save_run(tmp_path, every=1)
    rewrite(tmp_path / "step-00000003", format=2, hookloop="9.0")
    there = sorted(p.name for p in tmp_path.iterdir())
    loops = [resuming(place, Checkpoint(tmp_path)) for place in (tmp_path, *(tmp_path / f"step-0000000{n}" for n in (3, 2)))]
    for loop in loops:
        before = bits(loop)
        with pytest.raises(ValueError, match=r"step-00000003.*format 2 \(hookloop 9\.0\)"):
            built_in(loop, loss_fn, data(), steps=6)
        assert sorted(p.name for p in tmp_path.iterdir()) == there
        if loop is not loops[-1]:
            assert_same_bits(before, bits(loop))


def test_a_fresh_run_puts_no_checkpoint_of_a_later_version_aside(tmp_path: Path) -> None:
    save_run(tmp_path)
    rewrite(tmp_path / "step-00000003", format=2)
    with pytest.raises(ValueError, match=r"step-00000003.*format 2"):
        save_run(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000003"]


def test_what_others_put_into_the_folder_stays(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "nested" / "runs"
    save_run(folder, every=1, keep=1)
    (folder / ".download.part" / "inner").mkdir(parents=True)
    (folder / ".download.part" / "inner" / "x").write_text("x")
    (folder / ".mydata.part").write_text("mine")
    (folder / ".step-00000009.part").mkdir()  # ours: cut off by a kill
    built_in(resuming(folder, Checkpoint(folder, every=1, keep=1)), loss_fn, data(), steps=6)
    assert (folder / ".download.part" / "inner" / "x").read_text() == "x"
    assert (folder / ".mydata.part").read_text() == "mine"
    assert sorted(p.name for p in folder.iterdir()) == [".download.part", ".mydata.part", "step-00000006"]


# ------------------------------------------------------------------------------------- tensors, layers and rates, otherwise


@pytest.mark.parametrize("named", [True, False], ids=["named", "by place"])
def test_named_tensors_outside_the_model_are_matched_by_name(named: bool, tmp_path: Path) -> None:
    class Run:
        def __init__(self, order: str, folder: Path | None) -> None:
            self.model = net(noise=False)
            self.own = {name: torch.full((3,), start, requires_grad=True) for name, start in (("a", 1.0), ("b", -2.0))}
            held: Any = [*self.model.named_parameters(), *((name, self.own[name]) for name in order)]
            optimizer = torch.optim.AdamW(held if named else [p for _, p in held], lr=1e-2)
            save = [] if folder is None else [Checkpoint(folder)]
            self.loop = Loop(self.model, optimizer, save, resume=folder)

        def loss(self, model: nn.Module, batch: Any) -> Any:
            logits = model(batch[0]) * self.own["a"] + self.own["b"]
            return nn.functional.cross_entropy(logits, batch[1])

        def fit(self, steps: int) -> dict[str, torch.Tensor]:
            built_in(self.loop, self.loss, data(), steps=steps)
            found = {**self.own, **dict(self.model.named_parameters())}
            return {f"{n}.{k}": v.clone() for n, p in found.items()
                    for k, v in (("value", p.detach()), *self.loop.state.optimizer.state[p].items())}  # fmt: skip

    whole = Run("ab", None).fit(6)
    Run("ab", tmp_path).fit(3)
    assert_same_bits(whole, Run("ba" if named else "ab", tmp_path).fit(6))


class Tied(nn.Module):
    """Two layers of one weight, registered in either order."""

    def __init__(self, order: str) -> None:
        super().__init__()
        torch.manual_seed(3)
        weight = nn.Parameter(torch.randn(6, 6) / 3)
        out = nn.Linear(6, 3)
        for name in order:
            layer: nn.Linear = nn.Linear(6, 6, bias=False) if name in "ab" else out
            if name in "ab":
                layer.weight = weight
            setattr(self, name, layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out_layer(torch.relu(self.a(torch.tanh(self.b(x)))))

    @property
    def out_layer(self) -> nn.Module:
        return self.get_submodule("c")


@pytest.mark.parametrize("order", ["bac", "cba", "acb"])
def test_tied_weights_registered_in_another_order_resume_exactly(order: str, tmp_path: Path) -> None:
    model = Tied("abc")
    whole = save_run(tmp_path / "whole", model=model, optimizer=adamw(model), steps=6)
    model = Tied("abc")
    save_run(tmp_path / "cut", model=model, optimizer=adamw(model))
    model = Tied(order)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    loop = resuming(tmp_path / "cut", Checkpoint(tmp_path / "cut"), model=model)
    built_in(loop, loss_fn, data(), steps=6)
    assert model.get_submodule("a").weight is model.get_submodule("b").weight
    wanted, found = dict(whole.state.model.named_parameters()), dict(model.named_parameters(remove_duplicate=False))
    for name, p in wanted.items():
        assert torch.equal(p, found[name]), name
        same(dict(whole.state.optimizer.state[p]), dict(loop.state.optimizer.state[found[name]]), name)


def test_a_rate_of_numpys_saves_and_resumes(tmp_path: Path) -> None:
    rate: Any = np.float64(1e-2)
    model = net(noise=False)
    save_run(tmp_path / "a", halved(), model=model, optimizer=adamw(model, rate))
    whole = save_run(tmp_path / "whole", halved(), steps=6)
    for lr in (rate, 1e-2):
        model = net(noise=False, seed=8)
        loop = resuming(tmp_path / "a", halved(), Checkpoint(tmp_path / f"b {lr!r}"), model=model, optimizer=adamw(model, lr))
        built_in(loop, loss_fn, data(), steps=6)
        assert_same_bits(bits(whole), bits(loop))


@pytest.mark.parametrize("forth", [True, False], ids=["to a tensor", "from a tensor"])
def test_a_rate_that_became_a_tensor_is_no_misfit(forth: bool, tmp_path: Path) -> None:
    def rate(tensor: bool) -> Any:
        return torch.tensor(0.01) if tensor else 0.01

    model = net(noise=False)
    save_run(tmp_path, model=model, optimizer=adamw(model, rate(not forth)))
    model = net(noise=False, seed=8)
    loop = resuming(tmp_path, Checkpoint(tmp_path), model=model, optimizer=adamw(model, rate(forth)))
    assert built_in(loop, loss_fn, data(), steps=6).step == 6
    assert float(loop.state.optimizer.param_groups[0]["lr"]) == pytest.approx(0.01, rel=1e-6)
    assert isinstance(loop.state.optimizer.param_groups[0]["lr"], torch.Tensor) is forth


def test_a_new_loop_on_the_same_optimizer_resumes_after_a_schedule(tmp_path: Path) -> None:
    """As in a notebook, where model and optimizer outlive the cell that trained them."""
    whole = save_run(tmp_path / "whole", halved(), steps=6)
    loop = save_run(tmp_path / "a", halved())
    assert loop.state.optimizer.param_groups[0]["lr"] == 1e-2 / 8
    again = Loop(loop.state.model, loop.state.optimizer, [halved(), Checkpoint(tmp_path / "a")], resume=tmp_path / "a")
    built_in(again, loss_fn, data(), steps=6)
    assert again.state.optimizer.param_groups[0]["lr"] == 1e-2 / 64
    assert_same_bits(bits(whole), bits(again))


@pytest.mark.parametrize("background", [False, True], ids=["foreground", "background"])
def test_a_relative_folder_stays_where_the_run_began(background: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "first")
    model = net(noise=False)
    save = Checkpoint("runs", every=1, keep=None, background=background)
    loop = Loop(model, adamw(model), [At(2, lambda state: os.chdir(tmp_path / "second")), save])
    built_in(loop, loss_fn, data(), steps=4)
    assert Path.cwd() == tmp_path / "second"
    assert names(tmp_path / "first" / "runs") == [f"step-{step:08d}" for step in range(1, 5)]
    assert list((tmp_path / "second").iterdir()) == []


def test_an_optimizer_of_the_same_name_from_elsewhere_is_another_kind(tmp_path: Path) -> None:
    save_run(tmp_path)
    other: Any = type("AdamW", (torch.optim.AdamW,), {"__module__": "elsewhere.optim"})
    model = net(noise=False)
    loop = resuming(tmp_path, model=model, optimizer=other(model.parameters(), lr=1e-2))
    with pytest.raises(ValueError, match=r"the optimizer is elsewhere\.AdamW here and AdamW in the checkpoint"):
        enter(loop)


@pytest.mark.parametrize("number", [10**400, -(10**400), 2**1024], ids=["large", "negative", "just too large"])
def test_an_integer_beyond_all_floats_is_refused_where_it_is_logged(number: int) -> None:
    model = net()
    state = State(model, adamw(model))
    with pytest.raises(OverflowError, match=r"log\('x'\)"):
        state.log("x", number)
    assert "x" not in state.metrics
    state.log("x", 10**300)


# ------------------------------------------------------------------------------- what runs in a process of its own: signals


def chained(folder: str, what: str, number: int, runs: int = 1) -> None:
    """A library's handler set inside `with loop`, which calls the one that it found."""

    class Library(Callback):
        def on_fit_start(self, state: State) -> None:
            before: Any = signal.getsignal(number)

            def handler(number: int, frame: Any) -> None:
                Told.say("library")
                before(number, frame)

            signal.signal(number, handler)

    callbacks: list[Callback] = [Library()]
    if what == "during":
        callbacks.append(At(3, lambda state: os.kill(os.getpid(), number)))
    for run in range(runs):
        model = net(noise=False)
        loop = Loop(model, adamw(model), [*(callbacks if run == 0 else ()), Checkpoint(Path(folder) / str(run)), Preemption()])
        loop.fit(loss_fn, data(), epochs=1)
        Told.say(f"returned {loop.state.step}")
    try:
        os.kill(os.getpid(), number)
        time.sleep(1)
    except KeyboardInterrupt:
        Told.say("interrupted")
        raise
    Told.say("still here")


def dumping(folder: str) -> None:
    """`faulthandler.register`, as a cluster's users have it, from before the run."""
    faulthandler.register(USR1)
    model = net(noise=False)
    loop = Loop(model, adamw(model), [At(3, lambda state: os.kill(os.getpid(), USR1)), Checkpoint(folder), Preemption()])
    loop.fit(loss_fn, data(), epochs=1)
    Told.say(f"returned {loop.state.step} {loop.state.stop_reason}")
    os.kill(os.getpid(), USR1)
    Told.say("alive")


def forks(folder: str, end: str) -> None:
    """A child of a process that trains, which itself trains; the parent's run goes on."""

    def train_too() -> None:
        model = net(noise=False)
        act = lambda state: os.kill(os.getpid(), TERM) if end == "during" else None
        loop = Loop(model, adamw(model), [At(2, act), Checkpoint(Path(folder) / "child"), Preemption()])
        loop.fit(loss_fn, data(), epochs=1)
        os.kill(os.getpid(), TERM)
        time.sleep(1)

    def fork(state: State) -> None:
        if not (pid := os.fork()):
            try:
                train_too()
            except BaseException as error:
                print(repr(error), file=sys.stderr, flush=True)
            finally:
                os._exit(9)
        Told.say(f"child {os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}")

    model = net(noise=False)
    loop = Loop(model, adamw(model), [At(3, fork), Checkpoint(Path(folder) / "parent"), Preemption()])
    loop.fit(loss_fn, data(), epochs=1)
    Told.say(f"returned {loop.state.step} {loop.state.stop_reason}")


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"), Path(__file__).stem)
    yield server
    server.close()


@pytest.fixture
def server(started: Server) -> Iterator[Server]:
    yield started
    started.stop()


@processes
@pytest.mark.parametrize("runs", [1, 2])
@pytest.mark.parametrize("number", [TERM, INT])
def test_a_librarys_handler_that_calls_ours_still_ends_the_program_after_the_run(number: int, runs: int, server: Server,
                                                                                 tmp_path: Path) -> None:  # fmt: skip
    run = server.start(chained, folder=tmp_path, what="after", number=number, runs=runs)
    for _ in range(runs):
        run.expect("returned 7")
    run.expect("library")
    if number == INT:
        run.expect("interrupted")
        assert run.wait() == 1, run.text
        assert "RecursionError" not in run.text
        assert "KeyboardInterrupt" in run.text
    else:
        assert run.wait() == -TERM, run.text


@processes
def test_a_librarys_handler_that_calls_ours_lets_a_signal_save(server: Server, tmp_path: Path) -> None:
    run = server.start(chained, folder=tmp_path, what="during", number=TERM)
    run.expect("library")
    run.expect("library")  # raised again at the end
    assert run.wait() == -TERM, run.text
    assert newest(tmp_path / "0") == 3


@processes
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells of handlers outside Python")
def test_faulthandler_keeps_its_signal(server: Server, tmp_path: Path) -> None:
    run = server.start(dumping, folder=tmp_path)
    run.expect("returned 7 None")
    run.expect("alive")
    assert run.wait() == 0, run.text
    assert run.text.count("SIGUSR1 is handled outside Python") == 1
    assert run.text.count("(most recent call first)") == 2
    assert newest(tmp_path) == 7


@processes
@pytest.mark.parametrize("end", ["during", "after"])
def test_a_forked_child_that_trains_saves_and_ends_as_asked(end: str, server: Server, tmp_path: Path) -> None:
    run = server.start(forks, folder=tmp_path, end=end)
    run.expect(f"child {-TERM}")
    run.expect("returned 7 None")
    assert run.wait() == 0, run.text
    assert newest(tmp_path / "child") == (2 if end == "during" else 7)
    assert newest(tmp_path / "parent") == 7
