"""Faults across ranks, in real processes: what one rank alone wants all do at the same point; what ends one ends all, named.

Rows DD1, DD2, DL17 and RS6 of the fault table are in test_ranks_laws.py, OO10 and OO11 in test_ranks.py.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import many
import pytest
import torch
from helpers import FORMS, Reported, adamw, assert_same_bits, bits, built_in, by_hand, loss_fn, net
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hookloop.callbacks import (
    Checkpoint,
    EarlyStopping,
    GradientAccumulation,
    Metrics,
    MicroBatch,
    NonFinite,
    Preemption,
    Progress,
    Prune,
    Seed,
    TensorBoard,
    Warmup,
)
from hookloop.loop import Callback, Loop, State

BATCHES, EPOCHS, AT = 4, 3, 5  # AT: an update inside the second epoch


def batches(rank: int, count: int = BATCHES, size: int = 8) -> list[Any]:
    generator = torch.Generator().manual_seed(rank)
    return [
        (torch.randn(size, 6, generator=generator), torch.randint(0, 3, (size,), generator=generator)) for _ in range(count)
    ]


def held_out(rank: int) -> list[Any]:
    """A shard of the validation data: the ranks' are of different length."""
    return batches(100 + rank, 1 + 2 * (rank % 2), 5)


def does(hook: str, act: Callable[[State], None] | None, at: int = AT) -> Callback:
    """Return a callback whose only hook acts once."""

    def run(self: Callback, state: State) -> None:
        if act is not None and state.step >= at and not done:
            done.append(True)
            act(state)

    done: list[bool] = []
    return type("Does", (Callback,), {hook: run})()


# -------------------------------------------------------------------------------------------- what one rank alone wants to do

STOPS = ("on_fit_start", "on_epoch_start", "on_step_start", "on_micro_end", "on_before_optimizer_step", "on_step_end",
         "on_validation_end", "on_epoch_end")  # fmt: skip
WANTS: dict[str, tuple[tuple[str, ...], Callable[[State], None]]] = {
    "stop": (STOPS, lambda state: state.stop("enough")),
    "skip": (("on_step_start", "on_micro_end", "on_before_optimizer_step"), lambda state: state.skip("no good")),
    "save": (("on_epoch_start", "on_step_start", "on_step_end", "on_validation_end", "on_epoch_end"),
             lambda state: state.save("mine")),
    "leave": (STOPS[1:], lambda state: state.leave("time is up")),
    "leave at once": (("on_step_end",), lambda state: state.leave("time is up", 0.0)),
    "signal": (("on_step_start", "on_micro_end", "on_step_end", "on_epoch_end"),
               lambda state: os.kill(os.getpid(), signal.SIGTERM)),
}  # fmt: skip


def wants(rank: int, world: int, how: str, folder: str, want: str) -> dict[Any, Any]:
    """Let each rank alone want it, and all at once, in each hook, in one form or the other; return how each run went."""
    found = {}
    hooks, act = WANTS[want]
    for i, hook in enumerate(hooks):
        for form in [FORMS[(i + world // 2) % 2]]:
            for who in (0, world - 1, "all"):
                key = f"{hook}-{form.__name__}-{who}"
                seed, model = Seed(0), many.wrap(net(), how)
                run = Path(folder) / key
                mine = act if who in (rank, "all") else None
                reported = Reported("val_loss")
                callbacks = [seed, does(hook, mine, 0 if hook == "on_fit_start" else AT), reported]
                if want not in ("stop", "skip"):
                    callbacks += [Checkpoint(run, keep=None), Preemption(on_signal="return")]
                loop = Loop(model, adamw(model), callbacks)
                try:
                    form(loop, loss_fn, batches(rank), held_out(rank), epochs=EPOCHS)
                except Exception as error:
                    error.add_note(f"in {key}")
                    raise
                state = loop.state
                names = sorted(path.name for path in run.glob("step-*"))
                reasons = [re.sub(r" \(rank \d\)$", "", reason or "") for reason in (state.stop_reason, state.skip_reason)]
                counts = state.step, state.skipped, state.epoch, *reasons, names, reported.seen
                found[hook, form.__name__, who] = counts, many.everything(model, loop.state.optimizer)
    return found


def numbers(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Leave out running statistics, of which each rank has its own."""
    return {name: value for name, value in found.items() if "running" not in name}


@pytest.mark.parametrize("want", [*WANTS])
def test_es5_sg5_what_one_rank_wants_all_do_at_the_same_update(tmp_path: Path, want: str) -> None:
    """As if all had wanted it: counts, reasons, checkpoints and reports are the same, and the weights."""
    check_wants(tmp_path, want, "ddp", 2)


@pytest.mark.parametrize("want", ["skip", "leave at once"])
def test_es5_sg5_what_one_rank_wants_all_do_under_fsdp2(tmp_path: Path, want: str) -> None:
    check_wants(tmp_path, want, "fsdp", 2)


@pytest.mark.slow
@pytest.mark.parametrize(("how", "world"), [("fsdp", 2), ("ddp", 4), ("fsdp", 4)])
@pytest.mark.parametrize("want", [*WANTS])
def test_es5_sg5_what_one_of_more_ranks_wants_all_do(tmp_path: Path, want: str, how: str, world: int) -> None:
    check_wants(tmp_path, want, how, world)


def check_wants(tmp_path: Path, want: str, how: str, world: int) -> None:
    ranks = many.values(wants, world, how, str(tmp_path), want, limit=60 if world == 2 else 120)
    untouched = (EPOCHS * BATCHES, 0, EPOCHS, "")
    for (hook, form, who), (expected, _) in [item for item in ranks[0].items() if item[0][2] == "all"]:
        shows = len(expected[5]) > EPOCHS - (hook in ("on_validation_end", "on_epoch_end"))  # where one is due anyway
        assert shows if want == "save" else expected[:4] != untouched, (want, hook, form, "the case shows nothing")
        for who in (0, world - 1, "all"):
            for rank in range(world):
                counts, weights = ranks[rank][hook, form, who]
                assert counts == expected, (want, hook, form, f"wanted by {who}, on rank {rank}")
                assert_same_bits(numbers(weights), numbers(ranks[0][hook, form, "all"][1]))


def told_to_end(rank: int, world: int, folder: str, who: int, resume: bool) -> Any:
    """A run that rank `who` alone is told to end, by a signal that is raised again when all is saved."""
    seed, model = Seed(0), many.wrap(net(), "ddp")
    act = lambda state: os.kill(os.getpid(), signal.SIGTERM)
    ends = does("on_step_end", act if rank == who and not resume else None)
    loop = Loop(model, adamw(model), [seed, ends, Checkpoint(folder), Preemption()], resume=folder)
    built_in(loop, loss_fn, batches(rank), held_out(rank), epochs=EPOCHS)
    return loop.state.step, many.everything(model, loop.state.optimizer)


@pytest.mark.parametrize("who", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_sg5_sigterm_to_one_rank_saves_at_the_same_step_and_goes_on_to_the_same_bits(tmp_path: Path, who: int) -> None:
    whole = many.values(told_to_end, 2, str(tmp_path / "whole"), None, True)
    ended = many.run(told_to_end, 2, str(tmp_path / "run"), who, False)
    assert ended[who].code == -signal.SIGTERM, ended[who]
    assert ended[1 - who].value[0] == AT, ended[1 - who]
    assert max(path.name for path in (tmp_path / "run").glob("step-*")) == f"step-{AT:08}"
    for rank, found in enumerate(many.values(told_to_end, 2, str(tmp_path / "run"), who, True)):
        assert found[0] == EPOCHS * BATCHES
        assert_same_bits(found[1], whole[rank][1])


# ------------------------------------------------------------------------------------------------------------- one rank raises


class Bad(list):
    """Data of which one batch can't be read."""

    def __iter__(self) -> Any:
        for i, batch in enumerate(list.__iter__(self)):
            if i == 1:
                raise KeyError("mine")
            yield batch


HOOKS = ("on_setup", "on_fit_start", "on_epoch_start", "on_step_start", "on_micro_end", "on_before_optimizer_step", "on_step_end",
         "on_validation_end", "on_epoch_end", "on_fit_end")  # fmt: skip
PLACES = (*HOOKS, "loss", "backward", "evaluation", "loader", "validation loader", "state_dict", "body", "weigh")


class Unkept(Callback):
    def state_dict(self) -> dict[str, Any]:
        raise KeyError("mine")

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        raise KeyError("mine")


def fails(rank: int, world: int, how: str, where: str, who: int, folder: str) -> None:
    """A run in which one rank raises KeyError at a place."""
    mine, seed, model = rank == who, Seed(0), many.wrap(net(), how)

    def bad(*_: Any) -> None:
        raise KeyError("mine")

    def loss(model: nn.Module, batch: Any) -> Any:
        found = loss_fn(model, batch)
        if mine and where == "backward" and loop.state.step == AT:
            return Backward.apply(found["loss"])
        if mine and where == "evaluation" and not model.training:
            bad()
        if mine and where == "loss" and loop.state.step == AT and model.training:
            bad()
        return found

    callbacks = [seed, Checkpoint(folder)]
    if where in HOOKS:
        callbacks.append(does(where, bad if mine else None, 0 if where in HOOKS[:2] else AT))
    if where == "state_dict":
        callbacks.append(type("Other", (Unkept if mine else Callback,), {})())
    train = Bad(batches(rank)) if mine and where == "loader" else batches(rank)
    val = Bad(batches(rank)) if mine and where == "validation loader" else held_out(rank)
    weigh = (lambda batch: bad() if loop.state.step == AT else 8) if mine and where == "weigh" else lambda batch: 8
    loop = Loop(model, adamw(model), callbacks, weigh=weigh)
    if where != "body":
        built_in(loop, loss, train, val, epochs=EPOCHS)
        return
    with loop:
        for _ in loop.epochs(EPOCHS):
            for step in loop.steps(train):
                for micro in step:
                    with micro:
                        micro.backward(loss)
                if mine and loop.state.step == AT:
                    bad()
                loop.update()


QUICK = [("ddp", where, 1) for where in PLACES] + [("fsdp", "on_step_end", 0), ("ddp", "on_step_end", 0), ("fsdp", "loss", 1)]
ALL = [(how, where, who) for how in many.WRAPS for where in PLACES for who in (0, 1)]


@pytest.mark.parametrize(("how", "where", "who", "world"), [
    *((*case, 2) for case in QUICK),
    *(pytest.param(*case, 2, marks=pytest.mark.slow) for case in ALL if case not in QUICK),
    *(pytest.param(*case, 4, marks=pytest.mark.slow) for case in ALL if case[2]),
])  # fmt: skip
def test_dd3_an_error_of_one_rank_ends_all_named(tmp_path: Path, how: str, where: str, who: int, world: int) -> None:
    """The one that failed says its own error, the others whose it was and what, none later than 30 s."""
    found = many.errors(fails, world, how, where, who, str(tmp_path))
    for rank, error in enumerate(found):
        assert "KeyError: 'mine'" in error, (rank, error)
        if rank == who:
            assert error.startswith("KeyError: 'mine'")
        else:
            assert f"rank {who}" in error, (rank, error)


@pytest.mark.parametrize("who", [0, 1])
def test_dd3_named_where_rank_0_keeps_the_store(tmp_path: Path, who: int) -> None:
    """As in a program that starts its processes itself: the store that ranks meet by ends with rank 0."""
    found = many.errors(fails, 2, "ddp", "on_step_end", who, str(tmp_path), agent=False)
    assert found[who].startswith("KeyError: 'mine'")
    assert f"rank {who} failed: KeyError: 'mine'" in found[1 - who]


def dies(rank: int, world: int, how: str, who: int, by: str, where: str) -> None:
    """A run that one rank leaves by its death: the others wait for it in an exchange of ours or a collective of torch's."""

    def act(state: State) -> None:
        if rank == who:
            os._exit(3) if by == "exit" else os.kill(os.getpid(), 9)

    def loss(model: nn.Module, batch: Any) -> Any:
        if where == "loss" and loop.state.step == 2:
            act(loop.state)
        return loss_fn(model, batch)

    model = many.wrap(net(), how)
    loop = Loop(model, adamw(model), [Seed(0), does("on_before_optimizer_step", act if where != "loss" else None, 2)])
    built_in(loop, loss, batches(rank), epochs=EPOCHS)


@pytest.mark.parametrize(("how", "who", "by", "world"), [
    ("ddp", 1, "exit", 2), ("fsdp", 0, "kill", 2), ("ddp", 3, "kill", 5),
    *(pytest.param(*other, 2, marks=pytest.mark.slow) for other in (("ddp", 0, "kill"), ("fsdp", 1, "exit"))),
    *(pytest.param(how, who, by, world, marks=pytest.mark.slow)
      for how in many.WRAPS for who in (0, 2) for by in ("exit", "kill") for world in (4, 6)),
])  # fmt: skip
@pytest.mark.parametrize("where", ["loss", "update"])
@pytest.mark.parametrize("agent", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_dd2_a_rank_that_dies_is_named(how: str, who: int, by: str, where: str, world: int, agent: bool) -> None:
    """It, and no other: who waits for one that waits for it hears of it as soon.

    Where rank 0 keeps the store and ends, or others wait in a collective of torch's until it does, they name it, and the store.
    """
    named = {f"rank {who} ended, or was killed, without a word"}
    if not agent and (who == 0 or where == "loss"):
        named.add("rank 0 ended, or was killed, without a word, and with it the store that all ranks share")
    for rank, ended in enumerate(many.run(dies, world, how, who, by, where, agent=agent)):
        if rank == who:
            assert ended.code == (3 if by == "exit" else -9)
        else:
            assert ended.error.replace("RankFailed: ", "\n").splitlines()[-1] in named, (rank, ended)
            assert ended.seconds < 10, (rank, ended)


# ---------------------------------------------------------------------------------------------------------------- checkpoints


def full_disk(rank: int, world: int, folder: str, on_failure: str, background: bool) -> Any:
    """Rank 0 may write no file beyond 512 bytes from an update on: the system refuses, as where a disk is full."""

    def fill(state: State) -> None:
        end = time.monotonic() + 10
        while not Path(folder, f"step-{BATCHES:08}").exists() and time.monotonic() < end:  # what is written behind training
            time.sleep(0.01)
        resource.setrlimit(resource.RLIMIT_FSIZE, (512, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    seed, model = Seed(0), many.wrap(net(), "ddp")
    full = does("on_step_end", fill if rank == 0 else None)
    loop = Loop(model, adamw(model), [seed, full, Checkpoint(folder, on_failure=on_failure, background=background)])
    with warnings.catch_warnings(action="ignore"):
        built_in(loop, loss_fn, batches(rank), epochs=EPOCHS)
    return loop.state.step


@pytest.mark.parametrize("background", [False, True])
def test_dd4_a_save_that_fails_on_rank_0_ends_all_or_none(tmp_path: Path, background: bool) -> None:
    first, second = many.errors(full_disk, 2, str(tmp_path / "a"), "stop", background)
    assert first.startswith("OSError"), first
    assert "OSError: [Errno 27] File too large" in second
    assert many.values(full_disk, 2, str(tmp_path / "b"), "warn", background) == [EPOCHS * BATCHES] * 2
    for name in "ab":  # what had been saved before is whole
        assert [path.name for path in (tmp_path / name).glob("step-*")] == [f"step-{BATCHES:08}"]


def goes_on(rank: int, world: int, folder: str, ends: int, apart: bool) -> Any:
    """A run that goes on from what its rank sees of a folder."""
    seed, model, began = Seed(0), many.wrap(net(), "ddp"), list[int]()
    note = does("on_fit_start", lambda state: began.append(state.step), 0)
    place = Path(folder) / str(rank) if apart else Path(folder)
    loop = Loop(model, adamw(model), [seed, note, Checkpoint(place, every=1, keep=None)], resume=place)
    built_in(loop, loss_fn, batches(rank), steps=ends)
    return began, many.everything(model, loop.state.optimizer)


def seen_apart(tmp_path: Path, hidden: str) -> None:
    """Let each rank see a copy of a run's folder, rank 1's without some checkpoints."""
    many.values(goes_on, 2, str(tmp_path / "run"), AT, False)
    for rank in range(2):
        shutil.copytree(tmp_path / "run", tmp_path / "apart" / str(rank))
    for path in (tmp_path / "apart" / "1").glob(hidden):
        shutil.rmtree(path)


def test_dd5_ranks_go_on_from_the_newest_checkpoint_that_all_can_read(tmp_path: Path) -> None:
    seen_apart(tmp_path, f"step-{AT:08}")
    whole = many.values(goes_on, 2, str(tmp_path / "whole"), 9, False)
    for rank, (began, ended) in enumerate(many.values(goes_on, 2, str(tmp_path / "apart"), 9, True)):
        assert began == [AT - 1]
        assert_same_bits(ended, whole[rank][1])


def test_dd5_no_common_checkpoint_is_an_error_and_no_fresh_start(tmp_path: Path) -> None:
    seen_apart(tmp_path, "step-*")
    for error in many.errors(goes_on, 2, str(tmp_path / "apart"), 9, True):
        assert "rank 1" in error
        assert str(tmp_path) in error


def test_dd5_a_checkpoint_that_one_rank_can_not_read_is_passed_over_by_all(tmp_path: Path) -> None:
    seen_apart(tmp_path, "none")
    damaged = tmp_path / "apart" / "1" / f"step-{AT:08}" / "model.pt"
    damaged.write_bytes(damaged.read_bytes()[:-10])
    for began, _ in many.values(goes_on, 2, str(tmp_path / "apart"), 9, True):
        assert began == [AT - 1]


# ----------------------------------------------------------------------------------------------- ranks that are not the same


def differs(rank: int, world: int, how: str, what: str) -> None:
    odd = rank == 1
    seed = Seed(5 if odd and what == "seed" else 4)
    width = 13 if odd and what == "shape" else 12
    model = many.wrap(nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3)), how)
    make = torch.optim.SGD if odd and what == "optimizer" else torch.optim.AdamW
    optimizer = make(model.parameters(), lr=0.25 if odd and what == "rate" else 0.125)
    callbacks: list[Callback] = [seed, Warmup(7 if odd and what == "setting" else 6)]
    callbacks += [] if odd and what == "callback" else [GradientAccumulation(2)]
    loop = Loop(model, optimizer, callbacks)
    built_in(loop, loss_fn, batches(rank), epochs=5 if odd and what == "epochs" else 4)


DIFFERENT = {"seed": ("4", "5"), "shape": ("12", "13"), "optimizer": ("AdamW", "SGD"), "rate": ("0.125", "0.25"),
             "setting": ("Warmup", "6", "7"), "callback": ("GradientAccumulation",), "epochs": ("4", "5")}  # fmt: skip


@pytest.mark.parametrize("what", [*DIFFERENT])
def test_dd6_named_where_ranks_differ(what: str) -> None:
    """Both values, on both ranks, before the first update."""
    for error in many.errors(differs, 2, "fsdp" if what == "shape" else "ddp", what):
        assert error.startswith("ValueError"), error
        assert all(value in error for value in DIFFERENT[what]), error


def alone(rank: int, world: int, how: str) -> Any:
    seed, model = Seed(0), net()
    if how != "plain":
        model = many.wrap(model, how)
    loop = Loop(model, adamw(model), [seed])
    built_in(loop, loss_fn, batches(0), epochs=2)
    return many.everything(model, loop.state.optimizer)


def test_dd8_one_process_under_torchrun_or_without_it() -> None:
    """One rank with a process group, wrapped or not, or without one: the bits of a plain program."""
    torch.manual_seed(0)
    seed, model = Seed(0), net()
    loop = Loop(model, adamw(model), [seed])
    built_in(loop, loss_fn, batches(0), epochs=2)
    for how, group in (("plain", True), ("plain", False), ("ddp", True), ("fsdp", True)):
        (found,) = many.values(alone, 1, how, group=group)
        assert_same_bits({**found}, bits(loop))


def test_dd8_several_processes_without_a_process_group_train_apart() -> None:
    assert all(many.values(alone, 2, "plain", group=False))


# ------------------------------------------------------------------------------------------- decisions on all ranks' numbers


class Own(Callback):
    """Keeps what this rank's own share of the validation gives, by plain torch."""

    def __init__(self, data: list[Any]) -> None:
        self.data, self.seen = data, list[float]()

    def on_validation_end(self, state: State) -> None:
        model, was = state.model, state.model.training
        plain = model.module if isinstance(model, DistributedDataParallel) else model
        with torch.no_grad():
            self.seen.append(float(sum(loss_fn(plain.eval(), batch)["loss"] for batch in self.data) / len(self.data)))
        model.train(was)


def disagree(rank: int, world: int) -> Any:
    """Rank 0 validates on what it trains on, rank 1 on noise, so that the one improves and the other gets worse."""
    data = batches(rank, 4)
    val = batches(0, 4) if rank == 0 else batches(77, 2, 6)
    found = []
    for form in FORMS:
        torch.manual_seed(0)
        own, reported, model = Own(val), Reported("val_loss"), many.wrap(net(noise=False), "ddp")
        loop = Loop(model, adamw(model, 5e-2), [Seed(0), own, reported, EarlyStopping("val_loss", patience=2)])
        form(loop, loss_fn, data, val, epochs=30)
        found.append((loop.state.epoch, loop.state.step, loop.state.stop_reason, reported.seen, own.seen))
    return found


def stops_at(losses: list[float], patience: int = 2) -> int:
    """Return the report at which a rank of its own would have stopped."""
    best, since = float("inf"), 0
    for i, loss in enumerate(losses, 1):
        best, since = (loss, 0) if loss < best else (best, since + 1)
        if since == patience:
            return i
    return len(losses) + 1


def test_es5_ranks_that_would_disagree_stop_at_the_same_step() -> None:
    first, second = many.values(disagree, 2)
    for a, b in zip(first, second, strict=True):
        assert a[:4] == b[:4]
        assert a[2] is not None
        assert len({stops_at(a[4]), stops_at(b[4])}) == 2, "the case shows nothing: alone both would have stopped there"
        weights = 32, 12  # samples
        both = [(x * weights[0] + y * weights[1]) / sum(weights) for x, y in zip(a[4], b[4], strict=True)]
        assert a[3] == pytest.approx(both, rel=1e-5)
        assert stops_at(a[3]) == len(a[3])


def reports(rank: int, world: int) -> Any:
    """What a program reports itself is the ranks' mean, and decided on as such."""
    model, seen = many.wrap(net(), "ddp"), Reported("mine")
    loop = Loop(model, adamw(model), [Seed(0), seen, EarlyStopping("mine", patience=1)])
    with loop:
        for epoch in loop.epochs(10):
            for step in loop.steps(batches(rank)):
                for micro in step:
                    with micro:
                        micro.backward(loss_fn)
                loop.update()
            loop.report({"mine": -epoch if rank == 0 else 3.0 * max(epoch, 1)})
    return loop.state.step, seen.seen


def test_es5_what_a_program_reports_is_averaged() -> None:
    first, second = many.values(reports, 2)
    assert first == second == (3 * BATCHES, [1.5, 1.0, 2.0])


def measured(rank: int, world: int) -> Any:
    from torchmetrics.classification import MulticlassAccuracy

    model, seen = many.wrap(net(), "ddp"), Reported("val_acc")
    loop = Loop(model, adamw(model), [Seed(0), Metrics({"acc": MulticlassAccuracy(3, average="micro")}), seen])
    built_in(loop, loss_fn, batches(rank), held_out(rank), epochs=2)
    x, y = (torch.cat(part) for part in zip(*[batch for r in range(world) for batch in held_out(r)], strict=True))
    with torch.no_grad():
        return seen.seen, float((model.module.eval()(x).argmax(1) == y).float().mean()), many.weights(model)


def test_metrics_are_those_of_all_ranks_samples() -> None:
    first, second = many.values(measured, 2)
    assert first[0] == second[0]
    assert first[0][-1] == pytest.approx(first[1], abs=1e-6)


class Told:
    """A trial that finds the run hopeless at a report."""

    def __init__(self, at: int | None) -> None:
        self.at, self.reports = at, 0

    def report(self, value: float, step: int) -> None:
        self.reports += 1

    def should_prune(self) -> bool:
        return self.reports == self.at


def pruned(rank: int, world: int, who: int) -> Any:
    model, prune = many.wrap(net(), "ddp"), Prune(Told(2 if rank == who else None))
    loop = Loop(model, adamw(model), [Seed(0), prune])
    built_in(loop, loss_fn, batches(rank), held_out(rank), epochs=EPOCHS)
    return loop.state.step, loop.state.stop_reason, prune.pruned


def prunes(rank: int, world: int) -> Any:
    return [pruned(rank, world, who) for who in range(world)]


def test_hp4_a_trial_pruned_on_one_rank_ends_on_all_at_the_same_step() -> None:
    first, second = many.values(prunes, 2)
    assert first == second
    for step, reason, was in first[:1]:  # rank 0's trial is the one that counts, whoever else holds one
        assert step == 2 * BATCHES
        assert reason.startswith("pruned")
        assert was


# --------------------------------------------------------------------------------------------------------- what is not finite


def spoils(rank: int, world: int, how: str, action: str, what: str) -> Any:
    """One batch, of rank 1, all or none of them, gives NaN: in its inputs, or in the loss alone, with fine gradients."""
    found = {}
    for form in FORMS:
        for who in (1, "all", None):
            mine, seed, model = who in (rank, "all"), Seed(0), many.wrap(net(), how)
            data = batches(rank)
            if mine and what == "input":
                data[1][0][0, 0] = float("nan")

            def loss(model: nn.Module, batch: Any, mine: bool = mine, data: Any = data) -> Any:
                found = loss_fn(model, batch)
                if mine and what == "loss" and batch[0] is data[1][0]:
                    found["loss"] = found["loss"] + float("nan")
                return found

            loop = Loop(model, adamw(model), [seed, NonFinite(action)])
            try:
                form(loop, loss, data, epochs=2)
            except Exception as error:
                error.add_note(f"in {form.__name__}, {who}")
                raise
            found[form.__name__, who] = loop.state.step, loop.state.skipped, many.everything(model, loop.state.optimizer)
    return found


@pytest.mark.parametrize(("how", "action", "what"), [
    ("ddp", "skip", "loss"), ("ddp", "skip", "input"), ("fsdp", "skip", "input"), ("ddp", "rollback", "loss"),
    pytest.param("fsdp", "skip", "loss", marks=pytest.mark.slow),
    pytest.param("fsdp", "rollback", "loss", marks=pytest.mark.slow),
])  # fmt: skip
def test_st3_nan_on_one_rank_is_one_decision(how: str, action: str, what: str) -> None:
    """As if all ranks had met it; the update is left out by all, and nothing of it stays."""
    ranks = many.values(spoils, 2, how, action, what)
    for form in {form for form, _ in ranks[0]}:
        for found in ranks:
            step, skipped, weights = found[form, 1]
            assert (step, skipped) == (2 * BATCHES - 2, 2), form
            assert (step, skipped) == found[form, "all"][:2]
            assert all(torch.isfinite(value).all() for value in weights.values()), form
            assert_same_bits(numbers(weights), numbers(ranks[0][form, 1][2]))
            if action == "skip":
                assert_same_bits(numbers(weights), numbers(found[form, "all"][2]))
            assert not torch.equal(weights["0.weight"], found[form, None][2]["0.weight"])


@pytest.mark.parametrize("what", ["loss", "input"])
@pytest.mark.parametrize("how", many.WRAPS)
def test_st3_nan_on_one_rank_stops_all(how: str, what: str) -> None:
    found = many.errors(spoils, 2, how, "stop", what)
    assert "FloatingPointError: not finite in update 2" in found[1]
    assert "FloatingPointError" in found[0]


class Poisons(nn.Linear):
    """Gives one weight a gradient that is NaN, while the loss stays fine."""

    bad = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = super().forward(x)
        return found + 0 * torch.sqrt(self.weight[0, 0] * 0) if self.bad else found


def spoils_a_shard(rank: int, world: int, what: str) -> Any:
    """One weight, which lies on rank 0, has a bad gradient in update 3: no other rank holds anything that is not finite."""
    torch.manual_seed(0)
    layer = Poisons(6, 12)
    model = many.wrap(nn.Sequential(layer, nn.ReLU(), nn.Linear(12, 3)), "fsdp")
    spoils = lambda self, state: setattr(layer, "bad", state.step == 2 and not state.skipped)
    spoil = type("Spoil", (Callback,), {"on_step_start": spoils})()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if what == "scaler" else None
    guard = [] if scaler else [NonFinite(what)]
    loop = Loop(model, adamw(model), [Seed(0), spoil, *guard], scaler=scaler)
    built_in(loop, loss_fn, batches(rank), epochs=2)
    return loop.state.step, loop.state.skipped, scaler and scaler.get_scale(), many.weights(model)


@pytest.mark.parametrize("what", ["skip", "rollback", "scaler"])
def test_st3_nan_in_one_ranks_shard_is_one_decision(what: str) -> None:
    first, second = many.values(spoils_a_shard, 2, what)
    assert first[:3] == second[:3]
    assert first[:2] == (2 * BATCHES - 1, 1)
    assert_same_bits(first[3], second[3])
    assert all(torch.isfinite(value).all() for value in first[3].values())


def test_st3_nan_in_one_ranks_shard_stops_all() -> None:
    found = many.errors(spoils_a_shard, 2, "stop")
    assert all("FloatingPointError: not finite in update 3" in error for error in found)
    assert "0.weight" in found[0]
    assert "another rank" in found[1] or "rank 0" in found[1]


# ----------------------------------------------------------------------------------------- ranks that go their separate ways


def parts_ways(rank: int, world: int, how: str, what: str) -> None:
    """Rank 1's program does something else than rank 0's."""
    model, odd = many.wrap(net(noise=False), how), rank == 1
    loop = Loop(model, adamw(model), [Seed(0)])
    with loop:
        for _ in loop.epochs(2):
            for step in loop.steps(batches(rank)):
                for micro in step:
                    with micro:
                        micro.backward(loss_fn)
                loop.update()
                if odd and loop.state.step == 2 and what == "breaks":
                    break
                if odd and loop.state.step == 2 and what == "evaluates":
                    loop.evaluate(loss_fn, held_out(rank))
                if odd and loop.state.step == 2 and what == "returns":
                    return
            if odd or what != "reports":
                loop.report({"mine": 1.0, "other": 2.0} if odd and what == "other metrics" else {"mine": 1.0})


@pytest.mark.parametrize(("how", "what"), [
    *(("ddp", what) for what in ("breaks", "evaluates", "returns", "reports", "other metrics")), ("fsdp", "evaluates"),
    pytest.param("fsdp", "breaks", marks=pytest.mark.slow), pytest.param("fsdp", "returns", marks=pytest.mark.slow),
])  # fmt: skip
def test_dd3_programs_that_part_are_told_where(how: str, what: str) -> None:
    """No rank waits for what the others never do, and each is told what both are at."""
    for error in many.errors(parts_ways, 2, how, what):
        assert ("'other'" if what == "other metrics" else "different points" if what != "returns" else "rank 1") in error


def empty(rank: int, world: int, how: str, what: str) -> Any:
    model, reported = many.wrap(net(noise=False), how), Reported("val_loss")
    loop = Loop(model, adamw(model), [Seed(0), reported])
    train = [] if rank == 1 and what == "training" else batches(rank)
    built_in(loop, loss_fn, train, [] if rank == 1 else held_out(3), epochs=2)
    return reported.seen, loop.state.step


@pytest.mark.parametrize("how", many.WRAPS)
def test_dd1_a_rank_without_validation_data_ends_all(how: str) -> None:
    for error in many.errors(empty, 2, how, "validation"):
        assert "the val loader gave 0 batches" in error


def test_dd1_a_rank_without_any_data_ends_all() -> None:
    for error in many.errors(empty, 2, "ddp", "training"):
        assert "rank 1" in error or "0 batches" in error or "no data" in error


def begins(rank: int, world: int, how: str) -> Any:
    """The program as the README shows it: Seed, then the model."""
    seed = Seed(0)
    model: Any = nn.Sequential(nn.Linear(6, 12), nn.Dropout(0.5), nn.Linear(12, 3))
    if how != "plain":
        model = many.wrap(model, how)
    before, drawn = many.weights(model), list[Any]()
    loop = Loop(model, adamw(model), [seed])

    def loss(model: nn.Module, batch: Any) -> Any:
        drawn.append(torch.rand(3))
        return loss_fn(model, batch)

    built_in(loop, loss, batches(rank, 3), epochs=1)
    return before, torch.stack(drawn)


@pytest.mark.parametrize("how", many.WRAPS)
def test_seed_gives_all_ranks_one_model_and_each_its_own_noise(how: str) -> None:
    """The model that one process builds; no draw of one rank is another's."""
    alone = many.values(begins, 1, "plain", group=False)[0]
    ranks = many.values(begins, 2, how)
    for before, _ in ranks:
        assert_same_bits(before, alone[0])
    assert not (ranks[0][1][:, None] == ranks[1][1]).any()


# ------------------------------------------------------------------------------------------------------- models and wrappers


class Spare(nn.Module):
    """A net of which a part takes no part in the forward, or another one in each."""

    def __init__(self, alternates: bool = False) -> None:
        super().__init__()
        self.body, self.extra, self.other = nn.Linear(6, 3), nn.Linear(6, 3), nn.Linear(6, 3)
        self.alternates, self.count = alternates, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        if self.alternates:
            return self.body(x) + (self.extra if self.count % 2 else self.other)(x)
        return self.body(x) + self.other(x)


def unused(rank: int, world: int, how: str, kind: str) -> Any:
    torch.manual_seed(0)
    kwargs = {"find_unused_parameters": True} if kind != "plain" and how == "ddp" else {}
    model = many.wrap(Spare(kind == "alternates"), how, **kwargs)
    loop = Loop(model, adamw(model), [Seed(0), GradientAccumulation(2)] if kind == "alternates" else [Seed(0)])
    built_in(loop, loss_fn, batches(rank), epochs=2)
    return loop.state.step


def test_st9_a_parameter_that_takes_no_part_under_ddp_is_named() -> None:
    for error in many.errors(unused, 2, "ddp", "plain"):
        assert "extra.weight" in error
        assert "extra.bias" in error
        assert "other" not in error.replace("another", "").replace("others", "").replace("other rank", "")
        assert "find_unused_parameters" in error


def test_st9_nothing_is_said_where_ddp_looks_for_it() -> None:
    assert many.values(unused, 2, "ddp", "looked for") == [2 * BATCHES] * 2
    assert many.values(unused, 2, "fsdp", "plain") == [2 * BATCHES] * 2


def alternating(rank: int, world: int) -> Any:
    """A step whose two micro-batches use different parts, and the same written out in one process."""
    torch.manual_seed(0)
    x, y = torch.randn(world, 2, 4, 6), torch.randint(0, 3, (world, 2, 4))
    ranks, alone = Spare(True), Spare(True)
    alone.load_state_dict(ranks.state_dict())
    model = many.wrap(ranks, "ddp", find_unused_parameters=True)
    loop = Loop(model, torch.optim.SGD(model.parameters(), 0.1), [GradientAccumulation(2)])
    built_in(loop, loss_fn, [(x[rank, i], y[rank, i]) for i in range(2)], steps=1)
    for r in range(world):
        for i in range(2):
            (loss_fn(alone, (x[r, i], y[r, i]))["loss"] / (2 * world)).backward()
    torch.optim.SGD(alone.parameters(), 0.1).step()
    return [p.detach() for p in ranks.parameters()], [p.detach() for p in alone.parameters()]


def test_micro_batches_may_use_different_parameters_under_find_unused_parameters() -> None:
    """DDP keeps count of what any micro-batch used, so the average is exact."""
    for found, expected in many.values(alternating, 2):
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)


def refused(rank: int, world: int, kind: str) -> None:
    model: Any = net(noise=False)
    if kind == "thawed behind DDP":  # which knows nothing of what was frozen when it was built, so that no rank would share it
        model[0].weight.requires_grad_(False)
        model = many.wrap(model, "ddp")
        thaw = does("on_epoch_start", lambda state: model.module[0].weight.requires_grad_(), 1)
        built_in(Loop(model, adamw(model), [Seed(0), thaw]), loss_fn, batches(rank), epochs=3)
        return
    if kind == "FSDP1":
        from torch.distributed.fsdp import FullyShardedDataParallel

        model = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
    optimizer = adamw(model)
    if kind == "sharded after the optimizer":
        model = many.wrap(model, "fsdp")
    if kind == "sharded after the Loop":
        loop = Loop(model, optimizer, [Seed(0)])
        many.wrap(model, "fsdp")
        built_in(loop, loss_fn, batches(rank), epochs=1)
        return
    built_in(Loop(model, optimizer, [Seed(0)]), loss_fn, batches(rank), epochs=1)


@pytest.mark.parametrize(("kind", "words"), [
    ("not wrapped", ("DistributedDataParallel", "fully_shard", "2 ranks")),
    ("FSDP1", ("FSDP1", "fully_shard")),
    ("sharded after the optimizer", ("AdamW", "fully_shard")),
    ("sharded after the Loop", ("fully_shard",)),
    ("thawed behind DDP", ("0.weight", "DistributedDataParallel")),
])  # fmt: skip
def test_refused_by_what_would_have_to_change(kind: str, words: tuple[str, ...]) -> None:
    for error in many.errors(refused, 2, kind):
        assert error.startswith(("ValueError", "TypeError")), error
        assert all(word in error for word in words), error


# ------------------------------------------------------------------------------------------------------------- out of memory


class OutOfMemory(torch.autograd.Function):
    """Runs out of memory on its way back, where some layers have their gradients already."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        raise torch.OutOfMemoryError("CUDA out of memory (made up)")


class Fails(nn.Module):
    """Lets a backward fail between two layers."""

    bad = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return OutOfMemory.apply(x) if self.bad else x


def runs_out(rank: int, world: int, who: int, at: int, micro: int | None) -> Any:
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(6, 12), Fails(), nn.Linear(12, 3))
    model = many.wrap(inner, "fsdp")
    fail = does("on_step_start", (lambda state: setattr(Fails, "bad", True)) if rank == who else None, at)
    size = [MicroBatch("auto")] if micro is None else [MicroBatch(micro)]
    loop = Loop(model, adamw(model), [Seed(0), fail, *size])
    built_in(loop, loss_fn, batches(rank), epochs=EPOCHS)
    return loop.state.step


@pytest.mark.parametrize("micro", [None, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("at", [0, 2])
def test_oo12_out_of_memory_in_a_backward_under_fsdp2_is_not_redone(at: int, micro: int | None) -> None:
    """FSDP2 would go on with the gradients of some layers dropped, so that all ranks end, and say why."""
    first, second = many.errors(runs_out, 2, 1, at, micro)
    assert "OutOfMemoryError" in second
    assert "checkpoint" in second
    assert "rank 1" in first
    assert "OutOfMemoryError" in first


# ------------------------------------------------------------------------------------------------------------ what is shown


def shown(rank: int, world: int, folder: str) -> int:
    model = many.wrap(net(), "ddp")
    loop = Loop(model, adamw(model), [Seed(0), TensorBoard(folder), Progress(every=1)])
    by_hand(loop, loss_fn, batches(rank), held_out(rank), epochs=2)
    return loop.state.step


def test_curves_and_progress_come_from_rank_0_alone(tmp_path: Path) -> None:
    first, second = many.run(shown, 2, str(tmp_path))
    assert first.value == second.value == 2 * BATCHES, (first, second)
    assert "epoch 2" in first.said
    assert second.said == ""
    assert len(list(tmp_path.rglob("events.*"))) == 1
