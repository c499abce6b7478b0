"""Faults in reading data, rows DL5 to DL19, AM8, SD1, SD3, SD4: said with the samples they came from, and the run resumes."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import random
import re
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import many
import numpy as np
import pytest
import torch
from helpers import FORMS, KillAt, Killed, Samples, adamw, assert_same_bits, bits, built_in, loader, loss_fn, net
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Sampler, get_worker_info

from hookloop.callbacks import Checkpoint, DynamicBatchSize, GradientAccumulation, MicroBatch, Seed
from hookloop.loop import Callback, Loop, State
from hookloop.loop.store import list_checkpoints

WORKERS = [0, 2]


def make(folder: Path | None = None, *extra: Callback, seed: int | None = 5, noise: bool = True) -> Loop:
    model = net(noise=noise, seed=5)
    first: list[Callback] = [] if seed is None else [Seed(seed)]
    save = [] if folder is None else [Checkpoint(folder, every=1, keep=None)]
    return Loop(model, adamw(model), [*first, *save, *extra], resume=folder)


def notes(error: BaseException) -> str:
    return "\n".join(getattr(error, "__notes__", []))


# DL5, DL6


class Stream(IterableDataset):
    """24 samples, to each worker all of them or its part."""

    def __init__(self, sharded: bool) -> None:
        self.sharded, self.held = sharded, Samples(24)

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        first, step = (info.id, info.num_workers) if self.sharded and info is not None else (0, 1)
        return (self.held[i] for i in range(first, 24, step))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("sharded", [True, False])
def test_dl5_workers_that_give_the_same(sharded: bool, workers: int, form: Any, caplog: pytest.LogCaptureFixture) -> None:
    loop = make()
    with caplog.at_level(logging.WARNING, "hookloop"):
        form(loop, loss_fn, DataLoader(Stream(sharded), 4, num_workers=workers), epochs=2)
    if sharded or workers < 2:
        assert not caplog.records
        assert loop.state.samples == 48
    else:
        (record,) = caplog.records
        assert "two of the 2 workers gave the same first batch" in record.message
        assert "get_worker_info().id and .num_workers" in record.message
        assert "Stream.__iter__" in record.message
        assert loop.state.samples == 96


class Lies:
    """Five batches, and a length of its own."""

    def __init__(self, said: int) -> None:
        self.said = said

    def __len__(self) -> int:
        return self.said

    def __iter__(self) -> Iterator[Any]:
        return iter(DataLoader(Samples(40), 8))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("said", [3, 5, 7])
def test_dl6_a_length_that_lies(said: int, form: Any, caplog: pytest.LogCaptureFixture) -> None:
    loop = make()
    with caplog.at_level(logging.WARNING, "hookloop"):
        form(loop, loss_fn, Lies(said), epochs=3)
    assert [record.message.split(":")[0] for record in caplog.records] == (
        [] if said == 5 else [f"Lies says that it gives {said} batches and gave 5"]
    )
    assert (loop.state.step, loop.state.epoch, loop.state.samples) == (15, 3, 120)
    expected = make()
    form(expected, loss_fn, Lies(5), epochs=3)
    assert_same_bits(bits(expected), bits(loop))


class Curriculum(Sampler[int]):
    """Eight samples more in each epoch."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return 8 * (self.epoch + 1)

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("end", "told"), [({"epochs": 3}, 3), ({"steps": 5}, 5)])
def test_dl6_a_length_that_grows_with_the_epoch(
    end: dict[str, int], told: int, form: Any, caplog: pytest.LogCaptureFixture
) -> None:
    loop = make()
    with caplog.at_level(logging.WARNING, "hookloop"):
        form(loop, loss_fn, DataLoader(Samples(40), 8, sampler=Curriculum()), **end)
    assert (loop.state.total_steps, loop.state.step) == (told, 6 if "epochs" in end else 5)
    assert [record.message.split(":")[0] for record in caplog.records] == (
        ["DataLoader said that it gives 1 batches when the run was planned, and 2 in epoch 1"] if "epochs" in end else []
    )


# DL10, DL11, DL13, DL14


class Oops(Exception):
    """The data set's own."""


class Faulty(Samples):
    """A sample whose reading goes wrong; the others are augmented."""

    def __init__(self, fault: Callable[[], Any] | None, odd: int = 9, count: int = 40) -> None:
        super().__init__(count)
        self.fault, self.odd = fault, odd

    def __getitem__(self, i: int) -> Any:
        if i == self.odd and self.fault is not None:
            return self.fault()
        x, y, i = super().__getitem__(i)
        return x + random.random() + torch.rand(()), y, i


def oops() -> Any:
    raise Oops("this file is cut short")


def stops() -> Any:
    raise StopIteration


def data(fault: Callable[[], Any] | None, workers: int = 0, **kwargs: Any) -> DataLoader:
    return DataLoader(Faulty(fault), 8, shuffle=True, num_workers=workers, **kwargs)


class Rows(Callback):
    """The samples of each update."""

    def __init__(self) -> None:
        self.rows: list[list[int]] = []

    def on_step_start(self, state: State) -> None:
        self.rows.append([])

    def on_micro_end(self, state: State) -> None:
        assert state.micro is not None
        if state.micro.training:
            self.rows[-1] += state.micro.batch[2].tolist()


def reference(workers: int = 0, *extra: Callback) -> tuple[Loop, int, list[int]]:
    """An undisturbed run; the update of sample 9 in the first epoch, and all samples of that update."""
    log = Rows()
    loop = make(None, log, *extra)
    built_in(loop, loss_fn, data(None, workers), epochs=2)
    at = next(i for i, row in enumerate(log.rows) if 9 in row)
    assert at > 0, "the odd sample must not come first, so that there is a checkpoint"
    return loop, at, log.rows[at]


def resumes(folder: Path, expected: Loop, form: Any, *extra: Callback) -> None:
    """The data repaired, the run goes on to the same bits."""
    loop = make(folder, *extra)
    form(loop, loss_fn, data(None), epochs=2)
    assert_same_bits(bits(expected), bits(loop))
    assert (loop.state.step, loop.state.samples) == (expected.state.step, 80)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("workers", WORKERS)
def test_dl10_a_sample_that_raises(workers: int, form: Any, tmp_path: Path) -> None:
    expected, at, row = reference()
    loop = make(tmp_path)
    with pytest.raises(Oops, match="this file is cut short") as error:
        form(loop, loss_fn, data(oops, workers), epochs=2)
    said = notes(error.value)
    assert f"loader batch {at} of epoch 0, samples {str(row)[1:-1]}\n" in said
    assert "Oops: this file is cut short (samples 9)" in said
    assert said.splitlines()[-2:] == [f"after step {at}", f"the last checkpoint is {max(list_checkpoints(tmp_path))}"]
    assert [p.name for p in list_checkpoints(tmp_path)] == [f"step-{step:08d}" for step in range(1, at + 1)]
    resumes(tmp_path, expected, form)


def apart(test: Any, *args: Any) -> None:
    """Run a test in a process of its own: torch raises what it hears of a dead worker wherever the program is.

    That may be in opening a socket, or in coverage, which keeps its lock for good then: it is not measured.
    """
    (ended,) = many.run(in_child, 1, test, *args, group=False, measured=False)
    assert (ended.error, ended.code) == ("", 0), ended.said


def in_child(rank: int, world: int, test: Any, *args: Any) -> None:
    many.may_have_children()
    multiprocessing.set_start_method("fork", force=True)  # a child of a fork server would start workers by it too
    test(*args)


def a_worker_dies(how: str, form: Any, folder: Path) -> None:
    def die() -> Any:
        if get_worker_info() is None:
            raise AssertionError("read in the program itself, which would die of it")
        if how == "signal 9":
            os.kill(os.getpid(), signal.SIGKILL)
        os._exit(3)

    expected, at, _ = reference()
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"DataLoader worker \(pid") as error:
        form(make(folder), loss_fn, data(die, 2), epochs=2)
    assert time.monotonic() - start < 10
    said = notes(error.value)
    pid = re.search(r"pid(?:\(s\))? (\d+)", str(error.value))
    assert pid is not None
    assert f"worker pid {pid[1]} died ({how}): often a lack of memory or of shared memory (/dev/shm)" in said
    assert "after step " in said
    assert len(list_checkpoints(folder)) >= at - 4
    resumes(folder, expected, form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("how", ["signal 9", "exit code 3"])
def test_dl11_a_worker_that_dies(how: str, form: Any, tmp_path: Path) -> None:
    apart(a_worker_dies, how, form, tmp_path)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("where", ["sample", "collate_fn"])
def test_dl13_stop_iteration_is_no_end_of_the_epoch(where: str, workers: int, form: Any, tmp_path: Path) -> None:
    def collate(samples: list[Any]) -> Any:
        if any(i == 9 for _, _, i in samples):
            raise StopIteration
        return torch.utils.data.default_collate(samples)

    expected, at, row = reference()
    train = data(stops, workers) if where == "sample" else data(None, workers, collate_fn=collate)
    loop = make(tmp_path)
    with pytest.raises(RuntimeError, match="StopIteration") as error:
        form(loop, loss_fn, train, epochs=2)
    said = notes(error.value)
    assert f"loader batch {at} of epoch 0, samples {str(row)[1:-1]}" in said
    assert loop.state.epoch == 0
    assert loop.state.step == at
    resumes(tmp_path, expected, form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize(("fault", "says"), [
    (lambda: None, "NoneType (samples 9)"),
    (lambda: (torch.zeros(5), torch.tensor(1), 9), "[0] Tensor(5,), [1] Tensor(), [2] int (samples 9)"),
], ids=["None", "ragged"])  # fmt: skip
def test_dl14_none_and_ragged_samples(fault: Any, says: str, workers: int, form: Any, tmp_path: Path) -> None:
    expected, at, row = reference()
    with pytest.raises((TypeError, RuntimeError)) as error:
        form(make(tmp_path), loss_fn, data(fault, workers), epochs=2)
    said = notes(error.value)
    assert f"loader batch {at} of epoch 0, samples {str(row)[1:-1]}\n" in said
    assert says in said
    assert "[0] Tensor(6,), [1] Tensor(), [2] int (samples " in said
    assert f"after step {at}" in said
    resumes(tmp_path, expected, form)


# DL10, DL11, DL13 in an evaluation


def in_an_evaluation(fault: str, workers: int, folder: Path) -> None:
    def act() -> Any:
        if fault == "dies":
            if get_worker_info() is None:
                raise KeyError("no worker to end")
            os._exit(3)
        raise StopIteration if fault == "stops" else KeyError("torn file")

    val = DataLoader(Faulty(act, count=24), batch_size=8, num_workers=workers)
    loop = make(folder)
    with pytest.raises((RuntimeError, KeyError)) as error:
        built_in(loop, loss_fn, loader(), val, epochs=1)
    said = f"{error.value}\n{notes(error.value)}"
    if fault == "stops":
        assert "DataLoader says that it gives 3 batches and gave 1 in an evaluation: StopIteration was raised inside" in said
    elif fault == "dies" and workers:
        assert re.search(r"worker pid \d+ died \(exit code 3\)|exited unexpectedly with exit code 3", said)
    else:
        assert "in reading batch 1 of an evaluation after step 7" in said
    assert loop.state.step == 7
    val.dataset.fault = None
    again, expected = make(folder), make()
    for one in (again, expected):
        built_in(one, loss_fn, loader(), val, epochs=2)
    assert_same_bits(bits(expected), bits(again))


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("fault", ["raises", "stops", "dies"])
def test_dl10_dl11_dl13_in_an_evaluation(fault: str, workers: int, tmp_path: Path) -> None:
    """Said with the batch and the step; an evaluation cut short by a StopIteration is an error, not a mean over less."""
    if fault == "dies" and workers:
        apart(in_an_evaluation, fault, workers, tmp_path)
    else:
        in_an_evaluation(fault, workers, tmp_path)


def test_dl14_a_slow_data_set_is_not_read_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hookloop.loop.reading.SECONDS", 0.3)
    reads = list[int]()

    class Slow(Samples):
        def __getitem__(self, i: int) -> Any:
            reads.append(i)
            if len(reads) > 32:
                time.sleep(0.1)
            return super().__getitem__(i)

    def collate(samples: list[Any]) -> Any:
        raise Oops("torn")

    train = DataLoader(Slow(40), 32, collate_fn=collate)
    with pytest.raises(Oops) as error:
        built_in(make(), loss_fn, train, epochs=1)
    assert re.search(r"read again, the first \d of them are \[0\] Tensor\(6,\)", notes(error.value))
    assert len(reads) < 32 + 6


@pytest.mark.parametrize("workers", WORKERS)
def test_batches_as_workers_end_are_warned_of(workers: int, caplog: pytest.LogCaptureFixture) -> None:
    built_in(make(), loss_fn, loader(num_workers=workers, in_order=False), epochs=1)
    assert [r.message.split(":")[0] for r in caplog.records] == [
        "DataLoader(in_order=False) gives batches as its workers end"
    ] * (workers > 0)


def test_a_validation_sampler_that_lies_is_a_warning() -> None:
    class Lying(Sampler[int]):
        def __len__(self) -> int:
            return 24

        def __iter__(self) -> Iterator[int]:
            return iter(range(20))

    val, loop = DataLoader(Samples(24), batch_size=4, sampler=Lying()), make()
    with pytest.warns(UserWarning, match="DataLoader says that it gives 6 batches and gave 5 in an evaluation"):
        loop.evaluate(loss_fn, val)


# DL15


@pytest.mark.timeout(100)
@pytest.mark.parametrize("start", ["fork", *(pytest.param(start, marks=pytest.mark.slow) for start in ("forkserver", "spawn"))])
def test_dl15_workers_begin_while_other_threads_are_at_work(start: str, tmp_path: Path) -> None:
    """Every epoch starts workers while a checkpoint is written behind and torch's own threads have run: no deadlock, same bits."""
    torch.set_num_threads(2)
    try:
        torch.randn(2**20).sin().sum()
        done = threading.Event()
        busy = threading.Thread(target=lambda: [logging.getLogger("other").debug("x") for _ in iter(done.is_set, True)])
        busy.start()
        try:
            seed, model = Seed(5), net(seed=5)
            loop = Loop(model, adamw(model), [seed, Checkpoint(tmp_path, every=1, background=True)])
            epochs = 6 if start == "fork" else 1
            built_in(loop, loss_fn, loader(num_workers=2, multiprocessing_context=start), epochs=epochs)
        finally:
            done.set()
            busy.join()
        built_in(expected := make(), loss_fn, loader(), epochs=epochs)
        assert_same_bits(bits(expected), bits(loop))
    finally:
        torch.set_num_threads(1)


# What a run leaves behind


@pytest.mark.parametrize("ends", ["well", "in a hook", "in reading"])
def test_a_loop_goes_when_its_last_name_does(ends: str) -> None:
    """No cycle holds it, nor the workers: the collector of cycles joins them one by one, five seconds each."""
    built_in(make(None), loss_fn, loader(8), epochs=1)  # what torch imports in a process's first step holds what it met there
    gc.collect()
    gc.disable()
    try:
        loop = make(None, KillAt(3 if ends == "in a hook" else None))
        train = DataLoader(Faulty(oops if ends == "in reading" else None, count=24), batch_size=4, num_workers=2)
        try:
            built_in(loop, loss_fn, train, epochs=1)
        except (Killed, Oops) as error:
            held = error  # as a notebook does
            workers = multiprocessing.active_children()
            assert ends == "in a hook" or not workers
            del held
        gone = weakref.ref(loop), weakref.ref(loop.state.model), weakref.ref(train)
        del loop, train
        assert [one() for one in gone] == [None] * 3
        assert not multiprocessing.active_children()
    finally:
        gc.enable()


# DL18, DL19


class Draws(Samples):
    """A draw from each global generator for each sample."""

    def __getitem__(self, i: int) -> Any:
        x, y, i = super().__getitem__(i)
        drawn = torch.tensor([random.random(), np.random.rand(), float(torch.rand((), dtype=torch.float64))])
        return x, y, i, drawn


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("seed", [5, None])
def test_dl18_augmentation_is_distinct_and_reproducible(workers: int, seed: int | None) -> None:
    class Keep(Callback):
        def __init__(self) -> None:
            self.drawn: list[Tensor] = []

        def on_micro_end(self, state: State) -> None:
            assert state.micro is not None
            self.drawn.append(state.micro.batch[3])

    found = []
    for _ in range(2):
        torch.manual_seed(1), random.seed(1), np.random.seed(1)
        loop = make(None, keep := Keep(), seed=seed)
        built_in(loop, loss_fn, DataLoader(Draws(40), 4, shuffle=True, num_workers=workers), epochs=3)
        found.append(torch.cat(keep.drawn))
        assert found[-1].shape == (120, 3)
        for column in found[-1].T:
            assert len(set(column.tolist())) == 120
    assert torch.equal(*found)


def draws_too(model: Any, batch: Any) -> Any:
    random.random(), np.random.rand(), torch.rand(3)
    return loss_fn(model, batch)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", [5, None])
@pytest.mark.parametrize("workers", WORKERS)
def test_dl19_validation_added_or_removed(workers: int, seed: int | None, form: Any) -> None:
    """One that shuffles, augments and draws in its loss; the training's weights are the same bits."""
    found = []
    for val in (None, loader(20), DataLoader(Draws(24), 8, shuffle=True, num_workers=workers)):
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        loop = make(None, seed=seed)
        form(loop, draws_too, data(None, workers), val, epochs=3)
        found.append(bits(loop))
    assert_same_bits(found[0], found[1])
    assert_same_bits(found[0], found[2])


@pytest.mark.parametrize("form", FORMS)
def test_dl19_validation_removed_at_a_resume(form: Any, tmp_path: Path) -> None:
    expected = make()
    form(expected, loss_fn, loader(), epochs=3)
    with pytest.raises(Killed):
        form(make(tmp_path, KillAt(9)), loss_fn, loader(), loader(20), epochs=3)
    loop = make(tmp_path, KillAt(None))
    form(loop, loss_fn, loader(), epochs=3)
    assert_same_bits(bits(expected), bits(loop))


# AM8


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", [5, None])
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("at", [(0, 1), (1, 0), (1, 2), (3, 3)])
def test_am8_an_error_inside_an_accumulation(
    at: tuple[int, int], again: bool, seed: int | None, form: Any, tmp_path: Path
) -> None:
    """Three loader batches an update, each cut in two; resumed from the disk, or entered again in the same process."""

    def shaping() -> list[Callback]:
        return [GradientAccumulation(3), MicroBatch(4)]

    torch.manual_seed(1)
    expected = make(None, *shaping(), seed=seed, noise=not again)
    form(expected, loss_fn, loader(72), epochs=2)
    assert expected.state.step == 6
    torch.manual_seed(1)
    loop = make(tmp_path, *shaping(), seed=seed, noise=not again)

    calls = iter(range(10**6))

    def failing(model: Any, batch: Any) -> Any:
        if next(calls) == at[0] * 6 + at[1]:
            raise Oops
        return loss_fn(model, batch)

    with pytest.raises(Oops):
        form(loop, failing, train := loader(72), epochs=2)
    assert loop.state.step == at[0]
    if not again:
        loop, train = make(tmp_path, *shaping(), seed=seed, noise=not again), loader(72)
        if not at[0]:
            torch.manual_seed(1)
            loop = make(tmp_path, *shaping(), seed=seed, noise=not again)
    form(loop, loss_fn, train, epochs=2)
    assert_same_bits(bits(expected), bits(loop))
    assert (loop.state.step, loop.state.samples) == (6, 144)


# SD1, SD3, SD4


@pytest.mark.parametrize("workers", WORKERS)
def test_sd1_the_same_seed_and_another(workers: int) -> None:
    def run(seed: int) -> dict[str, Tensor]:
        loop = make(None, DynamicBatchSize(6, 11), seed=seed)
        built_in(loop, loss_fn, data(None, workers), loader(20), epochs=2)
        return bits(loop)

    first = run(5)
    assert_same_bits(first, run(5))
    other = run(6)
    assert not torch.equal(first["0.weight"], other["0.weight"])


@pytest.mark.parametrize(("seed", "kind"), [
    (True, TypeError), (None, TypeError), (1.0, TypeError), ("5", TypeError), (-1, ValueError), (2**64, ValueError),
])  # fmt: skip
def test_sd3_bad_seeds(seed: Any, kind: Any) -> None:
    before = random.getstate(), torch.get_rng_state()
    with pytest.raises(kind, match=r"seed must be .*from 0 to 2\*\*64 - 1, not"):
        Seed(seed)
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


@pytest.mark.parametrize("seed", [5, 0, 2**64 - 1, None])
@pytest.mark.parametrize("workers", WORKERS)
def test_sd4_user_code_that_draws_between_steps(workers: int, seed: int | None, tmp_path: Path) -> None:
    """What the program draws between steps goes into its batches; with a Seed or without, a resume ends with the same bits."""

    def run(folder: Path | None, kill: int | None) -> tuple[Loop, list[Any]]:
        torch.manual_seed(1), random.seed(1), np.random.seed(1)
        loop, drawn = make(folder, KillAt(kill), seed=seed), []

        def noisy(model: Any, batch: Any) -> Any:
            noise = random.random() + np.random.rand() + torch.rand(())
            return loss_fn(model, (batch[0] + noise, *batch[1:]))

        with loop:
            for _ in loop.epochs(2):
                for step in loop.steps(data(None, workers)):
                    drawn.append((loop.state.step, random.random(), np.random.rand(), float(torch.rand(()))))
                    for micro in step:
                        with micro:
                            micro.backward(noisy)
                    loop.update()
        return loop, drawn

    expected, draws = run(None, None)
    for kill in (3, 5, 6, 8):
        folder = tmp_path / str(kill)
        with pytest.raises(Killed):
            run(folder, kill)
        found, again = run(folder, None)
        assert_same_bits(bits(expected), bits(found))
        assert again == draws[kill - 1 :]
