"""Runs resumed under other circumstances, rows RS2 to RS14: the same bits where they can be, else an error or one warning."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import logging
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    FORMS,
    KillAt,
    Killed,
    Samples,
    adamw,
    assert_same_bits,
    bits,
    built_in,
    loader,
    loss_fn,
    net,
    stateful_loader,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LambdaLR,
    MultiplicativeLR,
    MultiStepLR,
    OneCycleLR,
    SequentialLR,
    StepLR,
)
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    WeightedRandomSampler,
    get_worker_info,
)

from hookloop.callbacks import (
    Checkpoint,
    DynamicBatchSize,
    EarlyStopping,
    GradientAccumulation,
    MicroBatch,
    Schedule,
    Seed,
    Steps,
    TensorBoard,
)
from hookloop.loop import Callback, Goal, Loop, State
from hookloop.loop.store import list_checkpoints, manifest

Bits = dict[str, Tensor]


class Log(Callback):
    """Keeps, by the update's number, the samples it used and its rates; what is done again takes the place of the first."""

    def __init__(self) -> None:
        self.samples: dict[int, list[int]] = {}
        self.sizes: dict[int, list[int]] = {}
        self.losses: dict[int, float] = {}
        self.rates: dict[int, list[float]] = {}

    def on_step_start(self, state: State) -> None:
        self.samples[state.step], self.sizes[state.step] = [], []

    def on_micro_end(self, state: State) -> None:
        if state.micro is not None and state.micro.training:
            self.samples[state.step] += state.micro.batch[2].tolist()
            self.sizes[state.step].append(state.micro.size)

    def on_step_end(self, state: State) -> None:
        self.rates[state.step - 1] = [float(rate) for rate in state.rates]
        self.losses[state.step - 1] = float(state.metrics["loss"])


def make(folder: Path | None, *extra: Callback, kill: int | None = None, seed: int | None = 5, every: int | None = 1,
         noise: bool = True, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Loop:  # fmt: skip
    model = net(dtype, noise=noise, seed=5)
    first: list[Callback] = [] if seed is None else [Seed(seed)]
    save = [] if folder is None else [Checkpoint(folder, every=every, keep=None)]
    return Loop(model, adamw(model), [*first, *save, *extra, KillAt(kill)], **{"resume": folder, **kwargs})


def killed(folder: Path, step: int, train: Any, *extra: Callback, form: Any = built_in, epochs: int = 2, **kwargs: Any) -> Loop:
    """A run ended at a step's end, before its save: the step before it is on the disk."""
    loop = make(folder, *extra, kill=step, **kwargs)
    with pytest.raises(Killed):
        form(loop, loss_fn, train, epochs=epochs)
    return loop


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def resign(checkpoint: Path, **about: Any) -> None:
    old = json.loads((checkpoint / manifest.NAME).read_text())
    names = {path.name: manifest.entry(path) for path in sorted(checkpoint.glob("*.pt"))}
    about = {"device": old["device"], "seconds": old["seconds"], **about}
    (checkpoint / manifest.NAME).write_text(manifest.render(old["step"], old["reasons"], names, old["beside"], about))


# RS2


@pytest.mark.parametrize("form", FORMS)
def test_rs2_ten_resumes_in_one_epoch(form: Any, tmp_path: Path) -> None:
    """Killed after every second update of one epoch: nothing is read twice but what the last update, unsaved, had used."""
    expected, read = make(None, DynamicBatchSize(3, 3)), list[int]()
    form(expected, loss_fn, loader(66), epochs=1)
    for kill in [*range(2, 22, 2), None]:
        train, loop = loader(66), make(tmp_path, DynamicBatchSize(3, 3), kill=kill)
        try:
            form(loop, loss_fn, train, epochs=1)
        except Killed:
            assert loop.state.step == kill
        read += train.dataset.read
    assert_same_bits(bits(expected), bits(loop))
    assert (loop.state.step, loop.state.samples, sorted(set(read))) == (22, 66, list(range(66)))
    assert len(read) <= 66 + 10 * 8  # of a loader batch of 8, what the killed update had begun


# RS3


class Augmented(Samples):
    """Draws from every global generator for each sample."""

    def __getitem__(self, i: int) -> Any:
        x, y, i = super().__getitem__(i)
        return x + random.random() + float(np.random.rand()) + torch.rand(()), y, i


def augmented(**kwargs: Any) -> DataLoader:
    return DataLoader(Augmented(40), 8, shuffle=True, **kwargs)


NONE: dict[str, Any] = {}
TWO = {"num_workers": 2}
CHANGES: dict[str, list[dict[str, Any]]] = {
    "0, 2, 1": [NONE, TWO, {"num_workers": 1}],
    "2, 0, 2": [TWO, NONE, TWO],
    "persistent on and off": [{**TWO, "persistent_workers": True}, TWO, {**TWO, "persistent_workers": True}],
    "prefetch": [{**TWO, "prefetch_factor": 1}, {**TWO, "prefetch_factor": 4}, {"num_workers": 1, "prefetch_factor": 7}],
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("seed", [5, None])
def test_rs3_workers_change(change: str, seed: int | None, tmp_path: Path) -> None:
    """Killed inside an epoch, at its end and inside the next; without a Seed, all legs have workers, whose noise is seeded too."""
    legs = CHANGES[change]
    if seed is None:
        legs = [leg or {"num_workers": 1} for leg in legs]
    torch.manual_seed(1)
    expected = make(None, seed=seed)
    built_in(expected, loss_fn, augmented(num_workers=0 if seed else 1), epochs=3)
    for leg, kill in zip(legs, (4, 6, None), strict=True):
        torch.manual_seed(1)
        loop = make(tmp_path, kill=kill, seed=seed)
        try:
            built_in(loop, loss_fn, augmented(**leg), epochs=3)
        except Killed:
            assert kill is not None
    assert loop.state.step == 15
    assert_same_bits(bits(expected), bits(loop))


def test_rs3_fork_and_spawn(tmp_path: Path) -> None:
    expected = make(None)
    built_in(expected, loss_fn, augmented(), epochs=2)
    workers = {"num_workers": 1, "persistent_workers": True}
    killed(tmp_path, 3, augmented(**workers, multiprocessing_context="fork"))
    killed(tmp_path, 4, augmented(**workers, multiprocessing_context="spawn"))
    loop = make(tmp_path)
    built_in(loop, loss_fn, augmented(**workers, multiprocessing_context="fork"), epochs=2)
    assert_same_bits(bits(expected), bits(loop))


class Stream(IterableDataset):
    """48 samples, each worker's own part, with a position that can be saved; counts what is read."""

    def __init__(self) -> None:
        self.held, self.read, self.at = Samples(48), list[int](), 0

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        mine = range(first, 48, step)
        while self.at < len(mine):
            i = mine[self.at]
            self.at += 1
            self.read.append(i)
            yield self.held[i]
        self.at = 0

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


def stateful(workers: int = 0) -> tuple[Any, Stream]:
    data = Stream()
    return stateful_loader(data, 8, num_workers=workers), data


@pytest.mark.parametrize("shape", ["plain", "accumulated", "cut"])
@pytest.mark.parametrize("workers", [0, 2])
def test_rs3_a_stateful_loader(workers: int, shape: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Resumed at steps inside an epoch, at its last and at the next's first: same bits, and only what is unused is read."""
    shaping: Callable[[], list[Callback]] = {
        "plain": list, "accumulated": lambda: [GradientAccumulation(2)], "cut": lambda: [DynamicBatchSize(6, 6)],
    }[shape]  # fmt: skip
    expected, log = make(None, *shaping()), Log()
    with caplog.at_level(logging.WARNING, "hookloop"):
        built_in(make(None, *shaping(), log), loss_fn, stateful(workers)[0], epochs=2)
        built_in(expected, loss_fn, stateful(workers)[0], epochs=2)
        per = expected.state.step // 2
        for kill in range(2, expected.state.step + 1) if workers == 0 else (3, per + 1, per + 2):
            folder = tmp_path / str(kill)
            killed(folder, kill, stateful(workers)[0], *shaping())
            assert list_checkpoints(folder)[-1].name.startswith(f"step-{kill - 1:08d}")
            (train, data), loop = stateful(workers), make(folder, *shaping(), log2 := Log())
            built_in(loop, loss_fn, train, epochs=2)
            assert_same_bits(bits(expected), bits(loop))
            assert log2.samples == {step: rows for step, rows in log.samples.items() if step >= kill - 1}
            if workers == 0:
                stand = kill - 1
                used = {i for step in range(stand // per * per, stand) for i in log.samples[step]}
                epoch = 48 if stand < per else 0  # the second is read in whole, if the run stands in the first
                rest = len(data.read) - epoch
                assert not used & set(data.read[: len(data.read) - epoch]), kill
                assert rest <= 48 - len(used), kill
    assert not [r for r in caplog.records if "read again" in r.message]


@pytest.mark.parametrize("workers", [0, 2])
def test_rs3_a_stateful_loader_entered_again(workers: int) -> None:
    """In the same process: stopped at each step, an epoch's last too, and fitted on."""
    expected = make(None)
    built_in(expected, loss_fn, stateful(workers)[0], epochs=2)
    per = expected.state.step // 2
    for at in (1, per - 1, per, per + 1):
        (train, data), loop = stateful(workers), make(None)
        built_in(loop, loss_fn, train, steps=at)
        assert loop.state.step == at
        built_in(loop, loss_fn, train, epochs=2)
        assert loop.state.step == 2 * per, at
        assert_same_bits(bits(expected), bits(loop))
        assert workers or len(data.read) == 96


class Bare:
    """An iterable of batches that can't be told where to go on."""

    def __init__(self) -> None:
        self.given: list[int] = []

    def __iter__(self) -> Iterator[Any]:
        for number, batch in enumerate(DataLoader(Samples(40), 8)):
            self.given.append(number)
            yield batch


def test_rs3_a_stateful_loader_that_draws_its_order_with_the_first_batch(tmp_path: Path) -> None:
    torchdata_nodes = pytest.importorskip("torchdata.nodes")

    def nodes() -> Any:
        held = torchdata_nodes.MapStyleWrapper(Samples(48), RandomSampler(range(48)))
        return torchdata_nodes.Loader(
            torchdata_nodes.Mapper(torchdata_nodes.Batcher(held, 8), torch.utils.data.default_collate)
        )

    built_in(expected := make(tmp_path, log := Log()), loss_fn, nodes(), epochs=2)
    assert expected.state.step == 12
    for place in list_checkpoints(tmp_path):
        built_in(loop := make(None, log2 := Log(), resume=place), loss_fn, nodes(), epochs=2)
        assert_same_bits(bits(expected), bits(loop))
        assert log2.samples == {step: rows for step, rows in log.samples.items() if step >= int(place.name[5:13])}
    for at in (5, 6, 7, 11):  # entered again in one process
        train = nodes()
        (loop := make(None)).fit(loss_fn, train, steps=at)
        loop.fit(loss_fn, train, epochs=2)
        assert_same_bits(bits(expected), bits(loop))


class Placed(IterableDataset):
    """An order by the epoch that it is told, which it keeps in its state."""

    def __init__(self) -> None:
        self.held, self.epoch, self.at = Samples(28), 0, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        order = torch.randperm(28, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        while self.at < 28:
            self.at += 1
            yield self.held[order[self.at - 1]]
        self.at = 0

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.at = state["epoch"], state["at"]


class OwnOrder:
    """A loader that draws its order from a generator of its own, and is told the epoch for another purpose."""

    def __init__(self) -> None:
        self.held, self.drawn, self.at, self.shift = Samples(28), torch.Generator().manual_seed(3), 0, 0.0
        self.order: list[int] | None = None

    def set_epoch(self, epoch: int) -> None:
        self.shift = 0.1 * epoch

    def __iter__(self) -> Iterator[Any]:
        self.order = self.order or torch.randperm(28, generator=self.drawn).tolist()
        while self.at < 28:
            self.at += 4
            x, y, index = torch.utils.data.default_collate([self.held[i] for i in self.order[self.at - 4 : self.at]])
            yield x + self.shift, y, index
        self.order, self.at = None, 0

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self.drawn.get_state(), "order": self.order, "at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.drawn.set_state(state["drawn"])
        self.order, self.at = state["order"], state["at"]


def placed() -> Any:
    return stateful_loader(Placed(), 4)


class Rewinds:
    """A loader that begins anew in `iter`, unless it was just told where to go on, and not behind its last batch."""

    def __init__(self) -> None:
        self.batches, self.at, self.told = list(DataLoader(Samples(28), 4)), 0, False

    def __iter__(self) -> Iterator[Any]:
        self.at, self.told = self.at if self.told else 0, False
        while self.at < len(self.batches):
            self.at += 1
            yield self.batches[self.at - 1]

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at, self.told = state["at"], True


class Corpus(IterableDataset):
    """Read on over epochs, 28 samples in each, and told the epoch for another purpose."""

    def __init__(self) -> None:
        self.held, self.epoch, self.at = Samples(70), 0, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        while True:
            self.at += 1
            yield self.held[(self.at - 1) % 70]
            if self.at % 28 == 0:
                return

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


class InnerTold(OwnOrder):
    def __init__(self) -> None:
        super().__init__()
        self.dataset = Corpus()


def read_on() -> Any:
    return stateful_loader(Corpus(), 4)


@pytest.mark.parametrize("build", [read_on, placed, OwnOrder, InnerTold, Rewinds])
def test_rs3_a_stateful_loader_that_is_told_the_epoch(build: Any, tmp_path: Path) -> None:
    """Seven batches, two an update: the last of an epoch finds its end, so that its checkpoint says so."""
    built_in(expected := make(tmp_path, GradientAccumulation(2), log := Log()), loss_fn, build(), epochs=2)
    for place in list_checkpoints(tmp_path):
        built_in(loop := make(None, GradientAccumulation(2), log2 := Log(), resume=place), loss_fn, build(), epochs=2)
        assert_same_bits(bits(expected), bits(loop))
        assert log2.samples == {step: rows for step, rows in log.samples.items() if step >= int(place.name[5:13])}


def test_rs3_a_stateful_loader_is_not_evaluated_on_inside_its_epoch() -> None:
    train, _ = stateful()
    with pytest.raises(ValueError, match=r"training loader can't be evaluated on while .* its own state_dict says"):
        make(None).fit(loss_fn, train, train, epochs=2, validate_every=2)

    class Before(Callback):
        def on_epoch_start(self, state: State) -> None:
            found.append(run.evaluate(loss_fn, train)["val_loss"])

    train, found = stateful()[0], list[float]()
    run = make(None, Before())
    loop = run.fit(loss_fn, train, train, epochs=2)  # before it begins, and at its end, it may
    assert len(found) == 2
    assert (loop.step, "val_loss" in loop.metrics) == (12, True)


class Seating:
    """A loader that says where it stands, and begins anew once it has given all."""

    def __init__(self) -> None:
        self.at, self.batches = 0, list(DataLoader(Samples(40), 4))

    def __iter__(self) -> Iterator[Any]:
        while self.at < len(self.batches):
            self.at += 1
            yield self.batches[self.at - 1]
        self.at = 0

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


@pytest.mark.parametrize("again", [False, True])
def test_rs3_a_stateful_loader_whose_evaluation_is_broken_off(again: bool, tmp_path: Path) -> None:
    """At an epoch's end: what the loader then says of its place is the evaluation's, and no concern of training's."""

    def leaving(model: Any, batch: Any) -> Any:
        if not model.training and loop.state.epoch == 0 and batch[2][0] >= 20:
            loop.state.leave("enough")
        return loss_fn(model, batch)

    (expected := make(None, log := Log())).fit(loss_fn, train := Seating(), train, epochs=2)  # type: ignore[arg-type]
    (loop := make(tmp_path)).fit(leaving, train := Seating(), train, epochs=2)  # type: ignore[arg-type]
    assert (loop.state.step, loop.state.reported_at, train.at) == (10, -1, 7)
    if not again:
        loop, train = make(tmp_path, log2 := Log()), Seating()
    loop.fit(loss_fn, train, train, epochs=2)  # type: ignore[arg-type]
    assert_same_bits(bits(expected), bits(loop))
    assert again or log2.samples == {step: rows for step, rows in log.samples.items() if step >= 10}


@pytest.mark.parametrize("seed", [5, None])
@pytest.mark.parametrize("hook", ["on_setup", "on_fit_start", "on_epoch_start", "on_step_start", "on_before_optimizer_step",
                                  "on_step_end", "on_validation_end", "on_epoch_end", "body"])  # fmt: skip
def test_sd4_what_draws_outside_of_a_step(hook: str, seed: int | None, tmp_path: Path) -> None:
    """In any hook, or in the epoch's body before its data are asked for: each checkpoint goes on to the same bits."""

    class Draws(Callback):
        pass

    def build(folder: Path | None, resume: Path | None = None) -> Loop:
        torch.manual_seed(0)
        draws = Draws()
        setattr(draws, hook if hook != "body" else "extra", lambda state: (torch.rand(()), None)[1])
        loop = make(folder, draws, seed=seed, resume=resume)
        if resume is not None:
            torch.manual_seed(1)
        return loop

    def run(loop: Loop) -> Loop:
        if hook != "body":
            loop.fit(loss_fn, loader(20), loader(8), epochs=2, validate_every=2)
            return loop
        with loop:
            for _ in loop.epochs(2):
                torch.rand(())
                for one in loop.steps(iter(loader(20))):
                    for micro in one:
                        with micro:
                            micro.backward(loss_fn)
                    loop.update()
        return loop

    expected = run(build(tmp_path))
    for place in list_checkpoints(tmp_path) if hook != "body" else list_checkpoints(tmp_path)[3:4]:  # an iterator begins anew
        assert_same_bits(bits(expected), bits(run(build(None, place))))


@pytest.mark.parametrize("seed", [5, None])
def test_rs3_a_hook_that_draws_where_an_epoch_begins(seed: int | None, tmp_path: Path) -> None:
    """Inside an epoch its draws move no stream of training's; with a seed what it draws is the same too, as an order of data."""

    class Draws(Callback):
        def on_epoch_start(self, state: State) -> None:
            drawn[state.epoch] = (random.random(), float(torch.rand(())))

    drawn: dict[int, Any] = {}
    torch.manual_seed(0)
    expected = make(None, Draws(), seed=seed)
    built_in(expected, loss_fn, loader(), epochs=2)
    whole = {**drawn}
    for kill in (3, 9):
        torch.manual_seed(0)
        killed(tmp_path / str(kill), kill, loader(), Draws(), seed=seed)
        torch.manual_seed(1)
        drawn.clear()
        built_in(loop := make(tmp_path / str(kill), Draws(), seed=seed), loss_fn, loader(), epochs=2)
        assert_same_bits(bits(expected), bits(loop))
        assert seed is None or drawn == {epoch: whole[epoch] for epoch in range(kill > 8, 2)}


def test_rs3_a_plain_iterable_is_read_forward(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected, train = make(None), Bare()
    built_in(expected, loss_fn, Bare(), epochs=2)
    killed(tmp_path, 9, Bare())
    loop = make(tmp_path)
    with caplog.at_level(logging.WARNING, "hookloop"):
        built_in(loop, loss_fn, train, epochs=2)
    assert_same_bits(bits(expected), bits(loop))
    assert train.given == [0, 1, 2, 3, 4]
    (record,) = (one for one in caplog.records if "fresh start" not in one.message)
    # step 8 stands: three batches of the second epoch are used
    assert record.message.startswith("Bare can't be told where to go on, so its first 3 batches are read again and left out")


class Shifted(DataLoader):
    """One whose `__iter__` is a generator, and which draws for each batch."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        scale = torch.rand(())
        for x, y, i in super().__iter__():
            yield x * scale + torch.rand(()) + random.random(), y, i


class Repeat:
    """A batch sampler without an end."""

    def __init__(self, inner: Any) -> None:
        self.sampler = inner

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield from self.sampler


class Infinite(DataLoader):
    """YOLOv5's loader, with one iterator for all epochs."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        object.__setattr__(self, "batch_sampler", Repeat(self.batch_sampler))
        self.iterator = super().__iter__()

    def __len__(self) -> int:
        return len(self.batch_sampler.sampler)  # type: ignore[union-attr]

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        for _ in range(len(self)):
            yield next(self.iterator)


@pytest.mark.parametrize("seed", [5, None])
@pytest.mark.parametrize("workers", [{}, {"num_workers": 1}, {"num_workers": 1, "persistent_workers": True}])
def test_rs3_a_loader_whose_iter_is_a_generator(workers: dict[str, Any], seed: int | None, tmp_path: Path) -> None:
    """What it draws itself hangs on the batch too; what was used is not read again."""

    def run(kill: int | None, folder: Path | None = tmp_path) -> tuple[Loop, list[int], dict[int, list[int]]]:
        torch.manual_seed(1)
        train, log = Shifted(Augmented(40), 8, shuffle=True, **workers), Log()
        loop = make(folder, log, kill=kill, seed=seed)
        with contextlib.suppress(Killed):
            built_in(loop, loss_fn, train, epochs=2)
        return loop, train.dataset.read, log.samples

    expected, _, samples = run(None, None)
    run(4), run(8)
    loop, read, rest = run(None)
    assert_same_bits(bits(expected), bits(loop))
    assert rest == {step: samples[step] for step in range(7, 10)}
    assert all(sorted(i for n in range(5) for i in samples[epoch + n]) == list(range(40)) for epoch in (0, 5))
    assert workers or read == [i for rows in rest.values() for i in rows]


@pytest.mark.parametrize("seed", [5, None])
def test_rs3_a_loader_with_an_iterator_of_its_own(seed: int | None, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its order is not ours: it is read forward, which is said, and each sample comes once."""

    def run(kill: int | None, folder: Path | None = tmp_path) -> tuple[Loop, dict[int, list[int]]]:
        torch.manual_seed(1)
        loop = make(folder, log := Log(), kill=kill, seed=seed)
        with contextlib.suppress(Killed):
            built_in(loop, loss_fn, Infinite(Augmented(40), 8, shuffle=True), epochs=2)
        return loop, log.samples

    expected, samples = run(None, None)
    run(4), run(8)
    caplog.clear()
    loop, rest = run(None)
    assert_same_bits(bits(expected), bits(loop))
    assert rest == {step: samples[step] for step in range(7, 10)}
    assert all(sorted(i for n in range(5) for i in samples[epoch + n]) == list(range(40)) for epoch in (0, 5))
    assert [r.message[:77] for r in caplog.records if "fresh" not in r.message] == [
        "Infinite can't be told where to go on, so its first 2 batches are read again "
    ]


class Halves(DataLoader):
    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        for batch in super().__iter__():
            yield tuple(x[:4] for x in batch)
            yield tuple(x[4:] for x in batch)

    def __len__(self) -> int:
        return 2 * super().__len__()


def test_rs3_a_loader_that_gives_other_batches_than_its_sampler_drew(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "hookloop"):
        built_in(make(None), loss_fn, Halves(Augmented(40), 8, shuffle=True), epochs=2)
    (record,) = caplog.records
    assert record.message.startswith("Halves gave 10 batches where its sampler drew 5, so that a run resumed inside an epoch")


class Lazy(Sampler[int]):
    """A sampler that draws as it goes."""

    def __len__(self) -> int:
        return 40

    def __iter__(self) -> Iterator[int]:
        for start in range(0, 40, 4):
            part = (start + torch.randperm(4)).tolist()
            random.shuffle(part)
            yield from (part if np.random.rand() < 0.5 else part[::-1])


@pytest.mark.parametrize("seed", [5, None])
@pytest.mark.parametrize("workers", [0, 1])
def test_rs3_a_sampler_that_draws_as_it_goes(workers: int, seed: int | None, tmp_path: Path) -> None:
    def run(kill: int | None, folder: Path | None = tmp_path) -> tuple[Loop, dict[int, list[int]]]:
        torch.manual_seed(1), random.seed(1), np.random.seed(1)
        loop = make(folder, log := Log(), kill=kill, seed=seed)
        with contextlib.suppress(Killed):
            built_in(loop, loss_fn, DataLoader(Augmented(40), 8, sampler=Lazy(), num_workers=workers), epochs=2)
        return loop, log.samples

    expected, samples = run(None, None)
    run(3), run(9)
    loop, rest = run(None)
    assert_same_bits(bits(expected), bits(loop))
    assert rest == {step: samples[step] for step in (8, 9)}


def test_rs4_another_loader_batch_beside_a_sampler_that_draws_as_it_goes(tmp_path: Path) -> None:
    """What it gives hangs on no batch, so the updates are made of the same samples."""

    def run(size: int, kill: int | None, folder: Path | None = tmp_path) -> dict[int, list[int]]:
        loop = make(folder, DynamicBatchSize(8, 8), log := Log(), kill=kill)
        with contextlib.suppress(Killed):
            built_in(loop, loss_fn, DataLoader(Samples(40), size, sampler=Lazy()), epochs=2)
        return log.samples

    expected = run(8, None, None)
    run(8, 4)
    assert run(5, None) == {step: expected[step] for step in range(3, 10)}


class Shards(IterableDataset):
    """64 samples, to each worker its part, augmented."""

    def __init__(self) -> None:
        self.held = Augmented(64)

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        for i in range(first, len(self.held), step):
            yield self.held[i]


class Noisy(Stream):
    """The same, augmented."""

    def __init__(self) -> None:
        super().__init__()
        self.held = Augmented(48)


class Lists(Sampler[Any]):
    """Batches of indices of another kind than a list, or single ones."""

    def __init__(self, kind: Callable[[list[int]], Any], size: int = 8) -> None:
        self.kind, self.size = kind, size

    def __len__(self) -> int:
        return 64 // self.size

    def __iter__(self) -> Iterator[Any]:
        order = torch.randperm(64).tolist()
        for i in range(0, 64, self.size):
            yield self.kind(order[i : i + self.size])


class ByName(Augmented):
    """Whole batches by a tuple."""

    def __getitem__(self, key: Any) -> Any:
        assert type(key) is tuple
        x, y, i = zip(*map(super().__getitem__, key), strict=True)
        return torch.stack(x), torch.stack(y), torch.tensor(i)


def plus_noise(samples: list[Any]) -> Any:
    x, *rest = torch.utils.data.default_collate(samples)
    return [x + torch.rand(()), *rest]


LOADERS: dict[str, Callable[..., Any]] = {
    "batches as tensors": lambda **k: DataLoader(Augmented(64), batch_sampler=Lists(torch.tensor), **k),
    "batches as arrays": lambda **k: DataLoader(Augmented(64), batch_sampler=Lists(np.array), **k),
    "batches as tuples": lambda **k: DataLoader(Augmented(64), batch_sampler=Lists(tuple), **k),
    "one tuple at a time": lambda **k: DataLoader(ByName(64), None, sampler=Lists(tuple), **k),
    "noise in collate_fn": lambda **k: DataLoader(Augmented(64), 8, shuffle=True, collate_fn=plus_noise, **k),
    "a sampler that draws late": lambda **k: DataLoader(
        Augmented(64), 8, sampler=RandomSampler(range(64), replacement=True, generator=torch.Generator()), **k
    ),
    "iterable": lambda **k: DataLoader(Shards(), 8, **k),
    "stateful": lambda **k: stateful_loader(Augmented(64), 8, shuffle=True, **k),
    "stateful iterable": lambda **k: stateful_loader(Shards(), 8, **k),
    "stateful iterable with state": lambda **k: stateful_loader(Noisy(), 8, **k),
}


@pytest.mark.parametrize("seed", [5, None])
@pytest.mark.parametrize("workers", [{}, {"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}],
                         ids=["0", "2", "2 persistent"])  # fmt: skip
@pytest.mark.parametrize("kind", LOADERS)
def test_rs3_augmented_whatever_the_loader(kind: str, workers: dict[str, Any], seed: int | None, tmp_path: Path) -> None:
    """Killed inside an epoch and at its end: the same bits, whoever draws the noise."""
    if kind == "stateful iterable with state" and "persistent_workers" in workers:
        pytest.skip("torchdata's own limit: a data set there does not begin anew after an epoch that was gone back into")
    train = begun(LOADERS[kind], workers)
    built_in(expected := make(None, seed=seed), loss_fn, train, epochs=3)
    for kill in (4, 9):
        train = begun(LOADERS[kind], workers)
        killed(tmp_path / str(kill), kill, train, seed=seed, epochs=3)
        loop = make(tmp_path / str(kill), seed=seed)
        built_in(loop, loss_fn, LOADERS[kind](**workers), epochs=3)
        assert_same_bits(bits(expected), bits(loop))


def begun(build: Callable[..., Any], workers: dict[str, Any]) -> Any:
    """A loader, made by a program that seeds all by itself."""
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    return build(**workers)


@pytest.mark.parametrize("kind", ["iterable", "stateful iterable"])
def test_rs3_an_iterable_with_other_workers_is_an_error_inside_an_epoch(kind: str, tmp_path: Path) -> None:
    """Each has its part: another number of them would give some samples twice and others never."""
    killed(tmp_path, 4, LOADERS[kind](num_workers=2))
    with pytest.raises(ValueError, match=r"an IterableDataset, which gives each worker its part, has 0 workers here and 2 in"):
        built_in(make(tmp_path), loss_fn, LOADERS[kind](), epochs=2)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("every", [None, 3])
def test_rs3_generators_that_loaders_were_given(every: int | None, shared: bool, tmp_path: Path) -> None:
    """Validation on a subset drawn by a generator of its own, or of the training loader's, is the same after a resume."""

    def run(folder: Path | None, kill: int | None = None) -> tuple[Loop, dict[int, float]]:
        seen: dict[int, float] = {}
        own = torch.Generator().manual_seed(3)
        other = own if shared else torch.Generator().manual_seed(4)
        train = DataLoader(Samples(64), 8, sampler=RandomSampler(range(64), replacement=True, generator=own))
        val = DataLoader(Samples(64), 8, sampler=RandomSampler(range(64), num_samples=16, generator=other))
        loop = make(folder, Reports(seen), kill=kill)
        with contextlib.suppress(Killed):
            loop.fit(loss_fn, train, val, epochs=3, validate_every=every)
        return loop, seen

    expected, seen = run(None)
    assert len(set(seen.values())) == len(seen) >= 3
    for kill in (4, 9, 10, 17):
        before = run(tmp_path / str(kill), kill)[1]
        loop, after = run(tmp_path / str(kill))
        assert_same_bits(bits(expected), bits(loop))
        assert {**before, **after} == seen


class Reports(Callback):
    def __init__(self, seen: dict[int, float]) -> None:
        self.seen = seen

    def on_validation_end(self, state: State) -> None:
        self.seen[state.step] = state.metrics["val_loss"]


# RS4, RS5


@pytest.mark.parametrize(("here", "said"), [
    (lambda: DataLoader(Samples(40), batch_sampler=BatchSampler(SequentialSampler(range(40)), 16, False)),
     "an update holds 16 samples here and 8"),
    (lambda: DataLoader(Samples(40), 8), None),
    (lambda: DataLoader(Samples(40), 8, shuffle=True), "the sampler is torch.RandomSampler here and torch.SequentialSampler"),
    (lambda: DataLoader(Samples(40), 8, sampler=range(32)), "the sampler gives 32 samples here and 40"),
])  # fmt: skip
@pytest.mark.parametrize("kill", [3, 6, 8])
def test_rs4_rs7_what_else_may_not_change(here: Any, said: str | None, kill: int, tmp_path: Path) -> None:
    there = DataLoader(Samples(40), batch_sampler=BatchSampler(SequentialSampler(range(40)), 8, False))
    killed(tmp_path, kill, there)
    if said is None:
        built_in(make(tmp_path), loss_fn, here(), epochs=2)
    else:
        with pytest.raises(ValueError, match=f"{said} in the checkpoint's run.*strict=False"):
            built_in(make(tmp_path), loss_fn, here(), epochs=2)


def test_rs7_a_list_of_batches(tmp_path: Path) -> None:
    batches = list(loader(40, shuffle=False))
    killed(tmp_path, 3, batches)
    with pytest.raises(ValueError, match=r"the loader gives 4 batches here and 5 in the checkpoint's run.*strict=False"):
        built_in(make(tmp_path), loss_fn, batches[:4], epochs=2)


def test_rs4_an_iterable_cut_otherwise(tmp_path: Path) -> None:
    """Read in this process, the samples of an update stay the same; by workers, who give batches in turn, they would not."""
    built_in(expected := make(None, GradientAccumulation(4), noise=False), loss_fn, DataLoader(Plain(), 8), epochs=2)
    for kill in (2, 3):
        killed(tmp_path / str(kill), kill, DataLoader(Plain(), 8), GradientAccumulation(4), noise=False)
        loop = make(tmp_path / str(kill), GradientAccumulation(2), log := Log(), noise=False)
        built_in(loop, loss_fn, DataLoader(Plain(), 16), epochs=2)
        assert loop.state.step == expected.state.step == 4
        assert [log.samples[step] for step in (2, 3)] == [list(range(32)), list(range(32, 64))]
        for name, value in bits(expected).items():
            torch.testing.assert_close(bits(loop)[name], value, rtol=1e-4, atol=1e-6)
    killed(tmp_path / "w", 2, DataLoader(Plain(), 8, num_workers=2), GradientAccumulation(4))
    with pytest.raises(ValueError, match=r"the loader's batch size is 16 here and 8 in the checkpoint's run"):
        built_in(make(tmp_path / "w", GradientAccumulation(2)), loss_fn, DataLoader(Plain(), 16, num_workers=2), epochs=2)


class Plain(Shards):
    def __init__(self, count: int = 64) -> None:
        self.held = Samples(count)


@pytest.mark.parametrize("size", [3, 16])
def test_rs4_a_sampler_that_draws_more_than_there_is(size: int, tmp_path: Path) -> None:
    def drawn(size: int) -> DataLoader:
        return DataLoader(Samples(20), size, sampler=WeightedRandomSampler(torch.ones(20), 90))

    built_in(expected := make(None, DynamicBatchSize(6, 6)), loss_fn, drawn(8), epochs=2)
    for kill in (3, 9, 14, 17):
        killed(tmp_path / str(kill), kill, drawn(8), DynamicBatchSize(6, 6))
        built_in(loop := make(tmp_path / str(kill), DynamicBatchSize(6, 6)), loss_fn, drawn(size), epochs=2)
        assert_same_bits(bits(expected), bits(loop))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [1, 5, 8, 64])
def test_rs4_another_loader_batch_beside_dynamic_batch_size(size: int, form: Any, tmp_path: Path) -> None:
    """The update's size is the callback's, so the loader's own changes nothing."""
    expected, shaping = make(None, DynamicBatchSize(6, 11)), lambda: DynamicBatchSize(6, 11)
    form(expected, loss_fn, loader(), epochs=3)
    for kill in (2, 4, 9, 10, 11):
        folder = tmp_path / str(kill)
        killed(folder, kill, loader(), shaping(), form=form, epochs=3)
        loop = make(folder, shaping())
        form(loop, loss_fn, loader(batch_size=size), epochs=3)
        assert_same_bits(bits(expected), bits(loop))
        assert (loop.state.step, loop.state.samples) == (expected.state.step, 150)


@pytest.mark.parametrize("size", [4, 5, 7, 16])
@pytest.mark.parametrize("kind", ["map-style", "iterable"])
def test_rs4_another_loader_batch_where_all_of_the_epoch_was_used(kind: str, size: int, tmp_path: Path) -> None:
    """Killed in the validation behind an epoch's last update: nothing is left, so no update of no samples may follow."""
    data: Any = Samples(17) if kind == "map-style" else Plain(17)

    class Dies(Callback):
        def on_validation_end(self, state: State) -> None:
            if state.epoch == 0:
                raise Killed

    def run(size: int, folder: Path | None, *own: Callback) -> Loop:
        loop = make(folder, DynamicBatchSize(3, 3), *own)
        built_in(loop, loss_fn, DataLoader(data, size), list(DataLoader(Samples(8), 8)), epochs=2)
        return loop

    expected = run(6, None)
    with pytest.raises(Killed):
        run(6, tmp_path, Dies())
    loop = run(size, tmp_path)
    assert_same_bits(bits(expected), bits(loop))
    assert (loop.state.step, loop.state.skipped, loop.state.samples) == (12, 0, 34)


def test_rs4_another_loader_batch_that_drops_other_samples(tmp_path: Path) -> None:
    def cut(size: int) -> DataLoader[Any]:
        return DataLoader(Samples(17), size, drop_last=True)

    killed(tmp_path / "a", 3, cut(4), DynamicBatchSize(4, 4))
    with pytest.raises(ValueError, match=r"drop_last=True.* batches of 6 holds 12 samples here, and 16, of batches of 4, in"):
        built_in(make(tmp_path / "a", DynamicBatchSize(4, 4)), loss_fn, cut(6), epochs=2)
    built_in(loop := make(tmp_path / "a", DynamicBatchSize(4, 4)), loss_fn, cut(8), epochs=2)
    assert loop.state.samples == 32
    killed(tmp_path / "b", 5, cut(4), DynamicBatchSize(4, 4))  # at an epoch's start
    with pytest.raises(ValueError, match=r"drop_last=True.* batches of 6 holds 12 samples here, and 16, of batches of 4, in"):
        built_in(make(tmp_path / "b", DynamicBatchSize(4, 4)), loss_fn, cut(6), epochs=2)


def test_rs4_a_program_that_brings_each_epoch_a_loader_of_another_batch_size(tmp_path: Path) -> None:
    def run(folder: Path | None, end: int | None = None) -> Loop:
        loop, shown = make(folder), list[Any]()
        with loop:
            for epoch in loop.epochs(3):
                for step in loop.steps(loader(batch_size=(10, 5, 25)[epoch])):
                    for micro in step:
                        with micro:
                            micro.backward(loss_fn)
                    loop.update()
                    shown.append(loop.state.loader.batch_size)
                    if loop.state.step == end:
                        return loop
        assert end is not None or shown == ([10] * 5 + [5] * 10 + [25] * 2)[-len(shown) :]
        return loop

    expected = run(None)
    assert expected.state.step == 17
    for end in (2, 5, 9, 16):
        run(tmp_path / str(end), end)
        assert_same_bits(bits(run(tmp_path / str(end))), bits(expected))


SIZES: dict[str, tuple[Callable[[], list[Callback]], Callable[[], list[Callback]], int, int]] = {
    "loader": (list, list, 8, 9),
    "accumulation": (lambda: [GradientAccumulation(2)], lambda: [GradientAccumulation(3)], 16, 24),
    "dynamic": (lambda: [DynamicBatchSize(6, 20, every=9)], lambda: [DynamicBatchSize(7, 20, every=9)], 6, 7),
    "dynamic, accumulated": (
        lambda: [DynamicBatchSize(5, 5), GradientAccumulation(2)], lambda: [DynamicBatchSize(5, 5), GradientAccumulation(1)], 10, 5,
    ),
    "a table": (lambda: [DynamicBatchSize(8, 20, every=Steps({0: 8}))], lambda: [DynamicBatchSize(8, 20, every=Steps({0: 10}))],
                8, 10),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("at", [2, 4])
@pytest.mark.parametrize("kind", SIZES)
def test_rs4_another_update_size_is_an_error(kind: str, at: int, form: Any, tmp_path: Path) -> None:
    before, after, there, here = SIZES[kind]
    killed(tmp_path, at, loader(96), *before(), form=form, noise=False)
    kept = files(tmp_path)
    train = loader(96, 9 if kind == "loader" else 8)
    with pytest.raises(ValueError, match=rf"\b{here}\b.* here and \b{there}\b in the checkpoint's run") as error:
        form(make(tmp_path, *after(), noise=False), loss_fn, train, epochs=2)
    assert "strict=False" in str(error.value)
    assert files(tmp_path) == kept
    log = Log()
    loop = make(tmp_path, *after(), log, noise=False, strict=False)
    with pytest.warns(UserWarning, match=rf"\b{here}\b.* here and \b{there}\b in the checkpoint's run") as caught:
        form(loop, loss_fn, train, epochs=2)
    assert len(caught) == 1
    # a loader's batch that the checkpoint's run had used in part gives what is left of it first
    assert len(log.samples[at - 1]) == (here - 8 * (at - 1) % 9 if kind == "loader" else here)
    assert len(log.samples[at]) == here
    assert loop.state.samples == 192
    assert len({i for step, rows in log.samples.items() for i in rows}) == 96


@pytest.mark.parametrize("form", FORMS)
def test_rs4_a_bigger_loader_batch_and_less_accumulation(form: Any, tmp_path: Path) -> None:
    """8 samples x 2 is 16 x 1: the same samples in each update, and the same weights to rounding."""
    kwargs: dict[str, Any] = {"noise": False, "dtype": torch.float64}

    def data(size: int) -> DataLoader:
        return loader(72, size, torch.float64)

    log = Log()
    expected = make(None, GradientAccumulation(2), log, **kwargs)
    form(expected, loss_fn, data(8), epochs=2)
    for kill in (2, 4, 5, 6, 7):
        folder, mine = tmp_path / str(kill), Log()
        killed(folder, kill, data(8), GradientAccumulation(2), form=form, **kwargs)
        loop = make(folder, GradientAccumulation(1), mine, **kwargs)
        form(loop, loss_fn, data(16), epochs=2)
        assert mine.samples == {step: rows for step, rows in log.samples.items() if step >= kill - 1}
        for name, value in bits(expected).items():
            torch.testing.assert_close(bits(loop)[name], value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes", [(4, 3), (2, 8), (8, 1)])
def test_rs5_another_micro_batch(sizes: tuple[int, int], form: Any, tmp_path: Path) -> None:
    log, mine, kwargs = Log(), Log(), {"noise": False, "dtype": torch.float64}
    form(make(None, MicroBatch(sizes[0]), log, **kwargs), loss_fn, loader(dtype=torch.float64), epochs=2)
    killed(tmp_path, 5, loader(dtype=torch.float64), MicroBatch(sizes[0]), form=form, **kwargs)
    form(make(tmp_path, MicroBatch(sizes[1]), mine, **kwargs), loss_fn, loader(dtype=torch.float64), epochs=2)
    assert mine.samples == {step: rows for step, rows in log.samples.items() if step >= 4}
    assert mine.sizes[4] != log.sizes[4]
    assert mine.losses == pytest.approx({step: loss for step, loss in log.losses.items() if step >= 4}, rel=1e-6)


# RS7, RS8


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("count", "kill"), [(41, 3), (39, 3), (41, 8), (41, 6), (39, 6), (41, 7)])
def test_rs7_another_length(count: int, kill: int, form: Any, tmp_path: Path) -> None:
    killed(tmp_path, kill, loader(40), form=form, noise=False)
    kept = files(tmp_path)
    said = f"the data set holds {count} samples here and 40 in the checkpoint's run"
    if form is not built_in and kill == 6:  # an epoch's end stands, and the next may bring a loader of its own
        assert form(make(tmp_path, noise=False), loss_fn, loader(count), epochs=2).samples == 40 + count
        return
    with pytest.raises(ValueError, match=f"{said}.*strict=False"):
        form(make(tmp_path, noise=False), loss_fn, loader(count), epochs=2)
    assert files(tmp_path) == kept
    loop = make(tmp_path, noise=False, strict=False)
    with pytest.warns(UserWarning, match=said) as caught:
        form(loop, loss_fn, loader(count), epochs=2)
    assert len(caught) == 1
    assert loop.state.samples == (2 * count if kill == 3 else 40 + count)
    assert loop.state.epoch == 2


def test_rs7_another_sampler(tmp_path: Path) -> None:
    def drawn(count: int) -> DataLoader:
        return DataLoader(Samples(40), 8, sampler=WeightedRandomSampler(torch.ones(40), count))

    killed(tmp_path, 3, drawn(64))
    with pytest.raises(ValueError, match=r"the sampler gives 72 samples here and 64 in the checkpoint's run.*strict=False"):
        built_in(make(tmp_path), loss_fn, drawn(72), epochs=2)


SHARDS = (40, 34, 44)


@pytest.mark.parametrize("kill", [3, 6, 7, 11, 16])
def test_rs7_a_run_whose_epochs_differ(kill: int, tmp_path: Path) -> None:
    """A loader for each epoch, as with shards: only `fit` is told that one is for all of them."""

    def run(loop: Loop) -> Loop:
        with contextlib.suppress(Killed), loop:
            for epoch in loop.epochs(3):
                for step in loop.steps(loader(SHARDS[epoch])):
                    for micro in step:
                        with micro:
                            micro.backward(loss_fn)
                    loop.update()
                loop.report({"x": 0.0})
        return loop

    run(make(tmp_path, kill=kill))
    assert_same_bits(bits(run(make(None))), bits(run(make(tmp_path))))


@pytest.mark.parametrize("form", FORMS)
def test_rs8_another_seed(form: Any, tmp_path: Path) -> None:
    killed(tmp_path, 3, loader(40), form=form)
    kept, loop = files(tmp_path), make(tmp_path, seed=6)
    before = bits(loop)
    with pytest.raises(ValueError, match=r"Seed\(5\).*Seed\(6\)|seed is 6 here and 5") as error:
        form(loop, loss_fn, loader(40), epochs=2)
    assert "strict=False" in str(error.value)
    assert_same_bits(before, bits(loop))
    assert (loop.state.step, loop.state.samples, loop.state.epoch) == (0, 0, 0)
    assert files(tmp_path) == kept
    fresh, log = Log(), Log()
    form(make(None, fresh, seed=6), loss_fn, loader(40), epochs=2)
    loop = make(tmp_path, log, seed=6, strict=False)
    with pytest.warns(UserWarning, match=r"the seed is 6 here and 5 in the checkpoint") as caught:
        form(loop, loss_fn, loader(40), epochs=2)
    assert len(caught) == 1
    assert loop.state.step == 10
    assert {step: rows for step, rows in fresh.samples.items() if step >= 2} == log.samples  # the program's seed's order
    assert loop.seed == 6


# RS9, RS10


@pytest.mark.parametrize("form", FORMS)
def test_rs9_a_finished_run(form: Any, tmp_path: Path) -> None:
    """Nothing is changed, on the disk either; with more epochs it goes on as one long run does."""
    expected, first = make(None, DynamicBatchSize(6, 11)), make(tmp_path, DynamicBatchSize(6, 11), every=None)
    form(expected, loss_fn, loader(), loader(20), epochs=4)
    form(first, loss_fn, loader(), loader(20), epochs=2)
    kept, train = files(tmp_path), loader()
    for _ in range(2):
        again = make(tmp_path, DynamicBatchSize(6, 11), every=None)
        form(again, loss_fn, train, loader(20), epochs=2)
        assert_same_bits(bits(first), bits(again))
        assert (again.state.step, again.state.epoch, again.state.samples) == (first.state.step, 2, 100)
        assert again.state.metrics["val_loss"] == first.state.metrics["val_loss"]
        assert not train.dataset.read
        assert files(tmp_path) == kept
    longer = make(tmp_path, DynamicBatchSize(6, 11), every=None)
    form(longer, loss_fn, loader(), loader(20), epochs=4)
    assert_same_bits(bits(expected), bits(longer))
    assert (longer.state.step, longer.state.samples) == (expected.state.step, 200)
    assert longer.state.metrics["val_loss"] == expected.state.metrics["val_loss"]


@pytest.mark.parametrize("form", FORMS)
def test_rs9_a_run_finished_by_steps(form: Any, tmp_path: Path) -> None:
    expected, first = make(None), make(tmp_path, every=None)
    form(expected, loss_fn, loader(), steps=12)
    form(first, loss_fn, loader(), steps=5)
    longer = make(tmp_path, every=None)
    form(longer, loss_fn, loader(), steps=12)
    assert_same_bits(bits(expected), bits(longer))


def test_rs9_a_run_finished_by_steps_reads_nothing_more(tmp_path: Path) -> None:
    """Neither forward to where it stands nor a batch of it, and the program's own body has no turn."""

    class Endless:
        read = 0

        def __iter__(self) -> Iterator[Any]:
            for batch in itertools.cycle(list(DataLoader(Samples(40), 8))):
                self.read += 1
                yield batch

    for expected in ((20, [(0, 20)]), (0, [])):
        seen, train = list[Any](), Endless()
        with (loop := make(tmp_path)):
            for epoch in loop.epochs(steps=20):
                for step in loop.steps(train):
                    for micro in step:
                        with micro:
                            micro.backward(loss_fn)
                    loop.update()
                seen.append((epoch, loop.state.step))
        assert (max(train.read - 1, 0), seen) == expected  # a batch is read ahead


@pytest.mark.parametrize("form", FORMS)
def test_rs9_a_run_that_stopped_early_reads_nothing_more(form: Any, tmp_path: Path) -> None:
    class Epochs(Callback):
        def on_epoch_start(self, state: State) -> None:
            begun.append(state.epoch)

    begun, kept = list[int](), list[Any]()
    for _ in range(2):
        loop = make(tmp_path, EarlyStopping(patience=1, min_delta=9.0), Epochs(), every=None)
        form(loop, loss_fn, train := loader(), loader(20), epochs=9)
        kept.append([loop.state.step, loop.state.stop_reason, files(tmp_path)])
        assert bool(train.dataset.read) == (len(kept) == 1)
    assert begun == [0, 1]
    assert kept[0] == kept[1]


def dies_in_validation(step: int) -> Any:
    def loss(model: Any, batch: Any) -> Any:
        if not model.training and loss.loop.state.step == step:  # type: ignore[attr-defined]
            raise Killed
        return loss_fn(model, batch)

    return loss


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("end", [{"steps": 14}, {"epochs": 2, "steps": 14}, {"epochs": 2}])
def test_rs9_the_validation_behind_the_last_update_is_made_up_for(
    end: dict[str, int], again: bool, form: Any, tmp_path: Path
) -> None:
    """Killed inside it, and resumed or entered again: the epoch is counted, its metrics decide, and then it is over."""

    def build(folder: Path | None) -> Loop:
        return make(folder, EarlyStopping("val_loss", patience=9, restore_best=True), Marks())

    class Marks(Callback):
        def on_epoch_end(self, state: State) -> None:
            ends.append((state.epoch, state.step))

    ends: list[Any] = []
    form(expected := build(None), loss_fn, loader(), loader(20), **end)
    assert ends == [(1, 7), (2, 14)]
    loss = dies_in_validation(14)
    loss.loop = loop = build(tmp_path)
    with pytest.raises(Killed):
        form(loop, loss, loader(), loader(20), **end)
    for _ in range(2):
        loop = loop if again else build(tmp_path)
        form(loop, loss_fn, loader(), loader(20), **end)
        assert (loop.state.step, loop.state.epoch, loop.state.reported_at) == (14, 2, 14)
        assert loop.state.metrics["val_loss"] == expected.state.metrics["val_loss"]
        assert_same_bits(bits(expected), bits(loop))
    assert ends == [(1, 7), (2, 14), (1, 7), (2, 14)]


@pytest.mark.parametrize("form", FORMS)
def test_rs9_the_validation_behind_the_last_update_of_data_without_a_length(form: Any, tmp_path: Path) -> None:
    expected, train = make(None), lambda: DataLoader(Plain(48), 8)
    form(expected, loss_fn, train(), loader(20), steps=12)
    loss = dies_in_validation(12)
    loss.loop = loop = make(tmp_path)
    with pytest.raises(Killed):
        form(loop, loss, train(), loader(20), steps=12)
    for _ in range(2):
        form(loop := make(tmp_path), loss_fn, train(), loader(20), steps=12)
        assert (loop.state.step, loop.state.epoch, loop.state.reported_at) == (12, 2, 12)
        assert_same_bits(bits(expected), bits(loop))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("end", [{"steps": 14}, {"epochs": 3, "steps": 14}])
def test_rs9_the_validation_behind_the_last_update_that_was_left_in_it(end: dict[str, int], form: Any, tmp_path: Path) -> None:
    """Asked to leave in the very update that ends an epoch and the run, it reads no further: started again, it does."""

    class Leaves(Callback):
        def on_before_optimizer_step(self, state: State) -> None:
            if state.step == 13:
                state.leave("enough")

    form(expected := make(None), loss_fn, loader(), loader(20), **end)
    form(loop := make(tmp_path, Leaves(), every=None), loss_fn, loader(), loader(20), **end)
    assert (loop.state.step, loop.state.epoch, loop.state.reported_at) == (14, 1, 7)
    for _ in range(2):
        form(loop := make(tmp_path, every=None), loss_fn, loader(), loader(20), **end)
        assert (loop.state.step, loop.state.epoch, loop.state.reported_at) == (14, 2, 14)
        assert_same_bits(bits(expected), bits(loop))


def test_rs3_by_hand_a_loader_of_each_epochs_own_whose_length_hangs_on_it(tmp_path: Path) -> None:
    class Buckets:
        epoch = 0

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __iter__(self) -> Iterator[list[int]]:
            order = torch.randperm(40, generator=torch.Generator().manual_seed(self.epoch)).tolist()
            return iter([order[i : i + 4 + self.epoch] for i in range(0, 40, 4 + self.epoch)])

        def __len__(self) -> int:
            return sum(1 for _ in self)

    def run(loop: Loop) -> Loop:
        with contextlib.suppress(Killed), loop:
            for _ in loop.epochs(3, steps=24):
                for one in loop.steps(DataLoader(Samples(40), batch_sampler=Buckets())):  # type: ignore[arg-type]
                    for micro in one:
                        with micro:
                            micro.backward(loss_fn)
                    loop.update()
        return loop

    expected = run(make(None, log := Log()))
    for kill in (4, 12, 18):
        assert run(make(tmp_path / str(kill), kill=kill)).state.step == kill
        loop = run(make(tmp_path / str(kill), log2 := Log()))
        assert_same_bits(bits(expected), bits(loop))
        assert log2.samples == {step: rows for step, rows in log.samples.items() if step >= kill - 1}


@pytest.mark.parametrize("every", [1, 100])
def test_rs9_around_a_loop_of_ones_own_a_stopped_run_trains_no_more(every: int, tmp_path: Path) -> None:
    """What callbacks made of the last report is saved, and a program that asks first makes no further update."""
    data, kept = list(loader(24, 8)), list[Any]()
    for _ in range(3):
        made = 0
        with (loop := make(tmp_path, EarlyStopping("score", patience=2, restore_best=True), every=every)):
            for batch in data * 9:
                if loop.stopped:
                    break
                loss_fn(loop.state.model, batch)["loss"].backward()
                with loop.updating(samples=8):
                    loop.state.optimizer.step()
                loop.state.optimizer.zero_grad()
                made += 1
                if loop.state.step % 3 == 0:
                    loop.report({"score": [5.0, 4.0, 3.0][min(loop.state.step // 3, 3) - 1]})
        kept.append([made, loop.state.step, loop.state.stop_reason, bits(loop), files(tmp_path)])
    assert [one[:2] for one in kept] == [[15, 15], [0, 15], [0, 15]]
    assert "did not improve" in kept[0][2]
    for one in kept[1:]:
        assert one[2] == kept[0][2]
        assert_same_bits(one[3], kept[0][3])
        assert one[4] == kept[0][4]


@pytest.mark.parametrize("end", ["epochs", "early"])
def test_rs9_a_finished_run_reports_again_what_its_program_reports_behind_the_loop(end: str, tmp_path: Path) -> None:
    found = []
    for _ in range(2):
        stop = EarlyStopping(patience=1, min_delta=9.0)
        with (loop := make(tmp_path, *([stop] if end == "early" else []), every=None)):
            for _ in loop.epochs(3):
                for one in loop.steps(loader()):
                    for micro in one:
                        with micro:
                            micro.backward(loss_fn)
                    loop.update()
                loop.validate(loss_fn, loader(20))
            test = loop.evaluate(loss_fn, loader(12))
            loop.report({"test_loss": test["val_loss"], "val_loss": 1.0})
        found.append((loop.state.step, loop.state.metrics["test_loss"], files(tmp_path)))
    assert found[0] == found[1]


def test_rs9_around_a_loop_of_ones_own_a_stopped_run_may_come_by_its_report(tmp_path: Path) -> None:
    found = []
    for _ in range(2):
        with (loop := make(tmp_path, EarlyStopping("score", patience=1))):
            for epoch in range(5):
                for batch in loader(24, 8):
                    if loop.stopped:
                        break
                    loss_fn(loop.state.model, batch)["loss"].backward()
                    with loop.updating(samples=8):
                        loop.state.optimizer.step()
                    loop.state.optimizer.zero_grad()
                loop.report({"score": float(epoch)})
                if loop.stopped:
                    break
        found.append((loop.state.step, loop.state.stop_reason, files(tmp_path)))
    assert found[0] == found[1]
    assert found[0][0] == 6


def test_rs9_a_finished_run_that_reports_again_tells_no_callback_that_heard_no_start(tmp_path: Path) -> None:
    heard: list[int] = []

    class Hears(Callback):
        def on_fit_start(self, state: State) -> None:
            self.started = True

        def on_validation_end(self, state: State) -> None:
            assert self.started
            heard.append(state.step)

    for _ in range(2):
        with (loop := make(tmp_path, Hears(), Schedule("plateau", on="val_loss"))):
            for _ in loop.epochs(2):
                for one in loop.steps(loader()):
                    for micro in one:
                        with micro:
                            micro.backward(loss_fn)
                    loop.update()
                loop.validate(loss_fn, loader(20))
            loop.validate(loss_fn, loader(12))
    assert heard == [7, 14, 14]
    assert "val_loss" in loop.state.metrics


@pytest.mark.parametrize("kill", [1, 4, 5])
def test_rs9_two_loops_in_one_body_of_which_the_last_is_given_both_models(kill: int, tmp_path: Path) -> None:
    """A GAN as the README has it, killed behind both updates; the generator's backward changes spectral norm's buffers."""
    noise, data = torch.randn(16, 2, 8, 2), list(torch.randn(4, 8, 4))

    def run(folder: Path | None, kill: int | None = None) -> dict[str, Tensor]:
        torch.manual_seed(0)
        gan = nn.ModuleDict({"g": nn.Linear(2, 4), "d": spectral_norm(nn.Linear(4, 1))})
        loops = []
        for key, model in (("d", gan["d"]), ("g", gan)):
            own = {} if folder is None else {"callbacks": [Checkpoint(folder / key, every=1)], "resume": folder / key}
            loops.append(Loop(model, torch.optim.AdamW(gan[key].parameters(), lr=0.1), **own))
        d, g = loops
        with contextlib.suppress(Killed), d, g:
            for _ in zip(d.epochs(2), g.epochs(2), strict=True):
                for of_d, of_g in zip(d.steps(data), g.steps(data), strict=True):
                    z = noise[d.state.step]
                    for micro in of_d:
                        with micro:
                            micro.backward((gan["d"](gan["g"](z[0]).detach()) - gan["d"](micro.batch)).mean())
                    d.update()
                    for micro in of_g:
                        with micro:
                            micro.backward(-gan["d"](gan["g"](z[1])).mean())
                    g.update()
                    if g.state.step == kill:
                        raise Killed
        return gan.state_dict()

    run(tmp_path, kill)
    assert_same_bits(run(tmp_path), run(None))


@pytest.mark.parametrize("step", [2, 4, 6, 8])
def test_rs9_a_validation_inside_an_epoch_is_made_up_for_by_hand(step: int, tmp_path: Path) -> None:
    """As the README shows it, and `fit(validate_every=)` does it: a batch size that hangs on the metric is the same."""

    def build(folder: Path | None, loss: Any = loss_fn, every: bool = False) -> tuple[Loop, Log]:
        loop = make(folder, DynamicBatchSize(8, 24, every=Goal("val_loss", patience=0, min_delta=9.0)), log := Log(), every=1)
        if every:
            loop.fit(loss, loader(), loader(20), epochs=2, validate_every=2)
            return loop, log

        def validate_if_due() -> None:
            if loop.state.step % 2 == 0 and loop.state.step != max(loop.state.reported_at, 0):
                loop.validate(loss, val_loader)

        train_loader, val_loader = loader(), loader(20)
        if loss is not loss_fn:
            loss.loop = loop
        with loop:
            for _ in loop.epochs(2):
                loop.begin(train_loader)
                validate_if_due()
                for one in loop.steps(train_loader):
                    for micro in one:
                        with micro:
                            micro.backward(loss)
                    loop.update()
                    validate_if_due()
        return loop, log

    (expected, whole), (same, _) = build(None), build(None, every=True)
    assert_same_bits(bits(expected), bits(same))
    assert expected.state.step == 9
    with pytest.raises(Killed):
        build(tmp_path, dies_in_validation(step))
    loop, log = build(tmp_path)
    assert_same_bits(bits(expected), bits(loop))
    assert log.samples == {s: rows for s, rows in whole.samples.items() if s >= step}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("there", ["absent", "deep", "empty"])
def test_rs10_the_first_start(there: str, form: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / ("a/b/c" if there == "deep" else "a")
    if there == "empty":
        folder.mkdir()
    expected, loop = make(None), make(folder)
    form(expected, loss_fn, loader(), epochs=1)
    with caplog.at_level(logging.INFO, "hookloop"):
        form(loop, loss_fn, loader(), epochs=1)
    assert [r.message for r in caplog.records] == [f"{folder} holds no checkpoint yet: a fresh start"]
    assert_same_bits(bits(expected), bits(loop))
    assert len(list_checkpoints(folder)) >= 7


# RS11

BUILDS: dict[str, Callable[[Any, Any], Any]] = {
    "cosine": lambda optimizer, total: CosineAnnealingLR(optimizer, 14),
    "steps": lambda optimizer, total: StepLR(optimizer, 3, 0.7),
    "lambda": lambda optimizer, total: LambdaLR(optimizer, lambda step: 1 / (1 + step / 3)),
    "one cycle": lambda optimizer, total: OneCycleLR(optimizer, 0.1, total_steps=15, cycle_momentum=False),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("function", [True, False])
@pytest.mark.parametrize("kind", BUILDS)
def test_rs11_schedulers(kind: str, function: bool, form: Any, tmp_path: Path) -> None:
    """Built before the Loop on the optimizer, or by a function: the rates are the same step by step."""

    def scheduled(folder: Path | None, kill: int | None, log: Log) -> Loop:
        model = net(seed=5)
        optimizer, save = adamw(model), [] if folder is None else [Checkpoint(folder, every=1)]
        schedule = Schedule(BUILDS[kind] if function else BUILDS[kind](optimizer, None))
        loop = Loop(model, optimizer, [Seed(5), schedule, *save, log, KillAt(kill)], resume=folder)
        try:
            form(loop, loss_fn, loader(), epochs=2)
        except Killed:
            assert kill is not None
        return loop

    log, mine = Log(), dict[int, list[float]]()
    expected = scheduled(None, None, log)
    assert len({rates[0] for rates in log.rates.values()}) >= 5
    for kill in (2, 5, 7, 9, None):
        loop = scheduled(tmp_path, kill, part := Log())
        assert not {step: (rates, mine[step]) for step, rates in part.rates.items() if mine.setdefault(step, rates) != rates}
    assert mine == log.rates
    assert list(mine) == list(range(14))
    assert_same_bits(bits(expected), bits(loop))


def halved(step: int) -> float:
    return 0.5**step


CHANGED: dict[str, tuple[Any, Any]] = {
    "lambda": (lambda o: LambdaLR(o, lambda step: 0.9**step), lambda o: LambdaLR(o, lambda step: 0.8**step)),
    "closure": (lambda o: decayed(o, 10), lambda o: decayed(o, 20)),
    "function": (lambda o: LambdaLR(o, halved), lambda o: LambdaLR(o, lambda step: 0.5 ** (2 * step))),
    "partial": (lambda o: LambdaLR(o, functools.partial(linear, total=100)),
                lambda o: LambdaLR(o, functools.partial(linear, total=30))),
    "a power beyond its range": (lambda o: LambdaLR(o, lambda step: np.power(1 - step / 50, 0.9)),
                                 lambda o: LambdaLR(o, lambda step: np.power(1 - step / 50, 0.8))),
    "multiplicative": (lambda o: MultiplicativeLR(o, lambda step: 0.9), lambda o: MultiplicativeLR(o, lambda step: 0.8)),
    "inside another": (lambda o: after(o, 0.9), lambda o: after(o, 0.8)),
    "defined to 9": (lambda o: LambdaLR(o, lambda step: [1.0] * 8 + [0.5] * 12 if step < 0 else ([1.0] * 20)[step]),
                     lambda o: LambdaLR(o, lambda step: ([1.0] + [0.9] * 19)[step])),
}  # fmt: skip


def linear(step: int, total: int) -> float:
    return max(0.0, 1 - step / total)


def decayed(optimizer: Any, total: int) -> LambdaLR:
    return LambdaLR(optimizer, lambda step: 1 - step / (2 * total))


def after(optimizer: Any, factor: float) -> SequentialLR:
    parts = [StepLR(optimizer, 3), LambdaLR(optimizer, lambda step: factor**step)]
    return SequentialLR(optimizer, parts, [3])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("function", [True, False])
@pytest.mark.parametrize("kind", CHANGED)
def test_rs11_a_changed_function_is_an_error(kind: str, function: bool, form: Any, tmp_path: Path) -> None:
    """No function can be saved: the same goes on to the same bits, another is named with both values; nothing is written."""

    def run(which: int, folder: Path | None, kill: int | None = None) -> Loop:
        model = net(seed=5)
        optimizer, save = adamw(model), [] if folder is None else [Checkpoint(folder, every=1)]
        build = CHANGED[kind][which]
        schedule = Schedule(lambda o, _: build(o)) if function else Schedule(build(optimizer))
        loop = Loop(model, optimizer, [Seed(5), *save, schedule, KillAt(kill)], resume=folder)
        form(loop, loss_fn, loader(), epochs=2)
        return loop

    with pytest.raises(Killed):
        run(0, tmp_path, 5)
    kept = files(tmp_path)
    with pytest.raises(ValueError, match=r"lr_lambdas at 0, 1, 10, 100, 1000.*\[\[.*\(not \[\[.*a function can't be saved"):
        run(1, tmp_path)
    assert files(tmp_path) == kept
    assert_same_bits(bits(run(0, None)), bits(run(0, tmp_path)))


def test_rs11_milestones(tmp_path: Path) -> None:
    """Those of MultiStepLR torch keeps as what is no plain data, so they must be the same; others go on as they were."""

    def run(build: Callable[[Any], Any], kill: int | None = None) -> Loop:
        model = net(seed=5)
        optimizer = adamw(model)
        loop = Loop(model, optimizer, [Seed(5), Checkpoint(tmp_path, every=1), Schedule(build(optimizer)), KillAt(kill)],
                    resume=tmp_path)  # fmt: skip
        built_in(loop, loss_fn, loader(), epochs=2)
        return loop

    with pytest.raises(Killed):
        run(lambda o: MultiStepLR(o, [6, 9]), 5)
    with pytest.raises(ValueError, match=r"the checkpoint's MultiStepLR has milestones \[6, 9\] \(not \[8\]\)"):
        run(lambda o: MultiStepLR(o, [8]))
    assert run(lambda o: MultiStepLR(o, [6, 9])).state.step == 14
    shutil.rmtree(tmp_path)
    with pytest.raises(Killed):
        run(lambda o: SequentialLR(o, [StepLR(o, 3), StepLR(o, 2)], [5]), 4)
    with pytest.warns(UserWarning, match=r"SequentialLR goes on with the checkpoint's milestones '\[5\]' \(not '\[9\]'\)"):
        run(lambda o: SequentialLR(o, [StepLR(o, 3), StepLR(o, 2)], [9]))


# RS12, RS13


@pytest.mark.parametrize("made_by", [[str(torch.__version__), "cuda"], ["1.13.1", "cpu"], ["1.13.1", "mps"]])
def test_rs12_rs13_another_device_or_version(made_by: list[str], tmp_path: Path) -> None:
    """One warning that names both; here nothing else differs, so even the bits are the same."""
    expected = make(None)
    built_in(expected, loss_fn, loader(), epochs=2)
    killed(tmp_path, 5, loader())
    newest = list_checkpoints(tmp_path)[-1]
    was = json.loads((newest / manifest.NAME).read_text())
    assert [was["torch"], was["device"]] == [str(torch.__version__), "cpu"]
    resign(newest, torch=made_by[0], device=made_by[1])
    loop = make(tmp_path)
    with pytest.warns(UserWarning, match="not to the same bits") as caught:
        built_in(loop, loss_fn, loader(), epochs=2)
    assert len(caught) == 1
    text = str(caught[0].message)
    assert f"made by torch {made_by[0]} on {made_by[1]}" in text
    assert f"this is torch {torch.__version__} on cpu" in text
    assert_same_bits(bits(expected), bits(loop))


def test_rs12_other_generators(tmp_path: Path) -> None:
    """A checkpoint of a device with a generator of its own: what there is here is restored."""
    torch.manual_seed(1)
    expected = make(None, seed=None)
    built_in(expected, loss_fn, loader(), epochs=2)
    torch.manual_seed(1)
    killed(tmp_path, 5, loader(), seed=None)
    newest = list_checkpoints(tmp_path)[-1]
    content = torch.load(newest / "state.pt", weights_only=True)
    content["rng"]["torch"].append(torch.zeros(16, dtype=torch.uint8))
    torch.save(content, newest / "state.pt")
    resign(newest, device="cuda")
    loop = make(tmp_path, seed=None)
    with pytest.warns(UserWarning, match="on cuda, and this is"):
        built_in(loop, loss_fn, loader(), epochs=2)
    assert_same_bits(bits(expected), bits(loop))


# RS14


def reported(loop: Loop, scores: list[float]) -> Loop:
    """Two updates, then a score, for each of them."""
    try:
        with loop:
            for epoch in loop.epochs(len(scores)):
                for step in loop.steps(loader(16)):
                    for micro in step:
                        with micro:
                            micro.backward(loss_fn)
                    loop.update()
                if loop.state.reported_at != loop.state.step:
                    loop.report({"score": scores[epoch]})
    except Killed:
        pass
    return loop


def test_rs14_patience_and_the_best_are_kept(tmp_path: Path) -> None:
    """Resumed between any two reports: it stops where an undisturbed run does, and the best checkpoint is the same."""
    scores = [5.0, 3.0, 4.0, 3.5, 2.0, 2.5, 2.4, 2.3, 1.0]

    def build(folder: Path, kill: int | None = None) -> tuple[Loop, EarlyStopping, Checkpoint]:
        model = net(seed=5)
        early, save = EarlyStopping(Goal("score", patience=3), restore_best=True), Checkpoint(folder, 1, best=Goal("score"))
        return Loop(model, adamw(model), [Seed(5), early, save, KillAt(kill)], resume=folder), early, save

    whole, early, save = build(tmp_path / "whole")
    reported(whole, scores)
    assert whole.state.step == 16
    assert save.best is not None
    assert save.best.name.startswith("step-00000010")
    for kill in range(2, 17, 3):  # before a report, and after one
        reported(build(tmp_path / str(kill), kill)[0], scores)
        found, mine, kept = build(tmp_path / str(kill))
        reported(found, scores)
        assert (found.state.step, found.state.stop_reason) == (16, whole.state.stop_reason)
        assert mine.state_dict().keys() == early.state_dict().keys()
        assert mine.tracker.state_dict() == early.tracker.state_dict()
        assert_same_bits(bits(whole), bits(found))
        assert kept.tracker is not None
        assert save.tracker is not None
        assert kept.tracker.state_dict() == save.tracker.state_dict()
        assert kept.best is not None
        assert kept.best.name == save.best.name


@pytest.mark.parametrize("form", FORMS)
def test_rs14_time_and_curves_go_on(form: Any, tmp_path: Path) -> None:
    """The seconds trained are those of all runs to their last save; each point of a curve is there once."""

    def run(kill: int | None) -> tuple[float, float]:
        loop, start = make(tmp_path, TensorBoard(tmp_path, every=1), kill=kill), time.monotonic()
        with contextlib.suppress(Killed):
            form(loop, loss_fn, loader(), epochs=2)
        return time.monotonic() - start, loop.state.seconds

    spent = 0.0
    for kill in (4, 8, 12, None):
        before = spent
        took, seconds = run(kill)
        newest = json.loads((list_checkpoints(tmp_path)[-1] / manifest.NAME).read_text())
        spent = newest["seconds"]
        assert before < spent <= seconds <= before + took
    reader = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0})
    reader.Reload()
    points = reader.Scalars("speed/seconds")
    assert [point.step for point in points] == list(range(1, 15))
    assert all(a.value < b.value for a, b in itertools.pairwise(points))
    again = make(tmp_path, TensorBoard(tmp_path))
    with again:
        assert again.state.seconds >= spent
    stands = again.state.seconds
    time.sleep(0.01)
    assert again.state.seconds == stands


def tight(model: nn.Module, batch: Any) -> Any:
    """Memory for 3 samples in training and 5 in validation."""
    if len(batch[0]) > (3 if model.training else 5):
        raise torch.OutOfMemoryError("out of memory")
    return loss_fn(model, batch)


@pytest.mark.parametrize("form", FORMS)
def test_rs14_the_micro_batch_found_is_kept(form: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """No size that ran out of memory is tried again, in training or validation."""
    expected, log = make(None, MicroBatch("auto")), Log()
    form(expected, tight, loader(40), loader(20), epochs=2)
    with pytest.raises(Killed):
        form(make(tmp_path, MicroBatch("auto"), kill=7), tight, loader(40), loader(20), epochs=2)
    caplog.clear()
    micro = MicroBatch("auto")
    loop = make(tmp_path, micro, log)
    with caplog.at_level(logging.WARNING, "hookloop"):
        form(loop, tight, loader(40), loader(20), epochs=2)
    assert not caplog.records
    assert (micro.train, micro.evaluation) == (2, 4)
    assert {max(sizes) for sizes in log.sizes.values()} == {2}
    assert_same_bits(bits(expected), bits(loop))
