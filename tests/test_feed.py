"""What a step reads from the user's loader: order, position, counts, and the loader as it was."""

from __future__ import annotations

import copy
import itertools
import multiprocessing
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import FORMS, Samples, adamw, assert_same_bits, bits, built_in, by_hand, loss_fn, net, stateful_loader
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
    default_collate,
    get_worker_info,
)

from hookloop.callbacks import Checkpoint, GradientAccumulation, Seed, Warmup
from hookloop.loop import Callback, Loop, State
from hookloop.loop.order import extent


class Plan(Callback):
    """Sets batch size, accumulation and micro-batch size from the state."""

    owns = ("batch_size", "accumulate", "micro_batch_size")

    def __init__(self, batch: Any = None, accumulate: int = 1, micro: int | None = None) -> None:
        self.batch = batch if callable(batch) else lambda state: batch
        self.accumulate, self.micro = accumulate, micro

    def on_step_start(self, state: Any) -> None:
        state.batch_size, state.accumulate, state.micro_batch_size = self.batch(state), self.accumulate, self.micro


class Seen(Callback):
    """Positions by epoch and step as the batches hold them; checks that `state.micro.index` says the same."""

    def __init__(self, known: bool = True) -> None:
        self.known, self.epochs, self.extra = known, dict[int, list[list[int]]](), list[Tensor]()

    def on_step_start(self, state: Any) -> None:
        self.epochs.setdefault(state.epoch, []).append([])

    def on_micro_end(self, state: Any) -> None:
        if state.micro.training:
            found = state.micro.batch[2].tolist()
            assert state.micro.index == (found if self.known else None)
            self.epochs[state.epoch][-1] += found
            self.extra += state.micro.batch[3:4]

    def __getitem__(self, epoch: int) -> list[int]:
        return [i for step in self.epochs[epoch] for i in step]


class Gradients(Callback):
    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def on_before_optimizer_step(self, state: Any) -> None:
        self.seen.append(torch.cat([g.flatten() for g in state.grads]))


class StopAt(Callback):
    """Asks to stop at each of these steps."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps

    def on_step_end(self, state: Any) -> None:
        if state.step in self.steps:
            state.stop(f"at {state.step}")


def make(*callbacks: Callback, **kwargs: Any) -> Loop:
    model = net(noise=False)
    return Loop(model, adamw(model), callbacks, **kwargs)


def read(train: Any, epochs: int = 2, seed: int | None = 5, known: bool = True, form: Any = built_in,
         plan: Plan | None = None) -> Seen:  # fmt: skip
    """Train and return what was read."""
    seen = Seen(known)
    form(make(*([] if seed is None else [Seed(seed)]), *([plan] if plan else []), seen), loss_fn, train, epochs=epochs)
    return seen


# Samplers of every kind


class Shuffled:
    """A batch sampler of the user's own, which draws from torch's global generator."""

    def __init__(self, count: int, size: int) -> None:
        self.count, self.size = count, size

    def __len__(self) -> int:
        return -(-self.count // self.size)

    def __iter__(self) -> Iterator[list[int]]:
        return iter([part.tolist() for part in torch.randperm(self.count).split(self.size)])


class FromPython(Shuffled):
    """One that draws from Python's and NumPy's generators."""

    def __iter__(self) -> Iterator[list[int]]:
        order = list(range(self.count))
        random.shuffle(order)
        np.random.shuffle(order)
        return iter([order[i : i + self.size] for i in range(0, self.count, self.size)])


class Buckets(Shuffled):
    """One that draws each bucket's order when the bucket comes, from every generator."""

    def __iter__(self) -> Iterator[list[int]]:
        for bucket in torch.arange(self.count).split(2 * self.size):
            mine = bucket[torch.randperm(len(bucket))].tolist()
            random.shuffle(mine)
            np.random.shuffle(mine)
            yield from (mine[i : i + self.size] for i in range(0, len(mine), self.size))


class Lazy(RandomSampler):
    """One of torch's, which goes on in a way of its own."""

    def __iter__(self) -> Iterator[int]:
        left = list(range(len(self)))
        while left:
            yield left.pop(int(torch.randint(len(left), ())))


class ByEpoch(torch.utils.data.Sampler[int]):
    """A sampler that is told the epoch."""

    def __init__(self, count: int) -> None:
        self.count, self.epoch, self.told = count, -1, list[int]()

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.told.append(epoch)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        return iter([(i * 8 + self.epoch) % self.count for i in range(self.count)])


class Items(Samples):
    """A data set that gives many samples in one call."""

    def __getitems__(self, indices: Any) -> list[Any]:
        return [self[i] for i in indices]


class Batches(Dataset):
    """A data set of whole batches, for batch_size=None."""

    def __init__(self, count: int = 20, size: int = 2) -> None:
        self.data, self.size = Samples(count), size

    def __len__(self) -> int:
        return len(self.data) // self.size

    def __getitem__(self, i: int) -> Any:
        rows = slice(i * self.size, (i + 1) * self.size)
        return self.data.x[rows], self.data.y[rows], torch.arange(len(self.data))[rows]


class Generated(DataLoader):
    """A loader of the user's own, whose `__iter__` runs no line before the first batch is asked for."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        yield from super().__iter__()


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


data = Samples(21)
ONE_PASS: dict[str, Callable[[], DataLoader]] = {
    "shuffle": lambda: DataLoader(data, 4, shuffle=True),
    "generator": lambda: DataLoader(data, 4, shuffle=True, generator=generator()),
    "sampler with a generator": lambda: DataLoader(data, 4, sampler=RandomSampler(data, generator=generator())),
    "subset sampler": lambda: DataLoader(data, 4, sampler=SubsetRandomSampler(range(21))),
    "subset sampler with a generator": lambda: DataLoader(
        data, 4, sampler=SubsetRandomSampler(range(21), generator=generator())
    ),
    "batch sampler": lambda: DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data), 4, False)),
    "batch sampler with a generator": lambda: DataLoader(
        data, batch_sampler=BatchSampler(RandomSampler(data, generator=generator()), 4, False)
    ),
    "custom batch sampler": lambda: DataLoader(data, batch_sampler=Shuffled(21, 4)),
    "python's generators": lambda: DataLoader(data, batch_sampler=FromPython(21, 4)),
    "buckets": lambda: DataLoader(data, batch_sampler=Buckets(21, 4)),
    "drawn one by one": lambda: DataLoader(data, 4, sampler=Lazy(data)),
    "set_epoch": lambda: DataLoader(data, 4, sampler=ByEpoch(21)),
    "distributed": lambda: DataLoader(data, 4, sampler=DistributedSampler(data, num_replicas=1, rank=0, seed=3)),
    "subclass": lambda: Generated(data, 4, shuffle=True),
    "Subset": lambda: DataLoader(Subset(Samples(30), range(21)), 4, shuffle=True),
    "__getitems__": lambda: DataLoader(Items(21), 4, shuffle=True),
    "Subset of __getitems__": lambda: DataLoader(Subset(Items(30), range(21)), 4, shuffle=True),
}
OTHERS: dict[str, Callable[[], DataLoader]] = {
    "weighted": lambda: DataLoader(data, 4, sampler=WeightedRandomSampler(torch.arange(1.0, 22), 21)),
    "weighted with a generator": lambda: DataLoader(
        data, 4, sampler=WeightedRandomSampler(torch.arange(1.0, 22), 21, generator=generator())
    ),
    "replacement": lambda: DataLoader(data, 4, sampler=RandomSampler(data, True, 80)),
    "replacement with a generator": lambda: DataLoader(data, 4, sampler=RandomSampler(data, True, 80, generator=generator())),
    "more than a pass": lambda: DataLoader(data, 4, sampler=RandomSampler(data, num_samples=50)),
    "some": lambda: DataLoader(data, 4, sampler=SubsetRandomSampler(range(3, 15))),
}


def disturb() -> None:
    """Draw from every global generator, as a program does between two runs."""
    random.random(), np.random.rand(3), torch.rand(5)


@pytest.mark.parametrize("kind", [*ONE_PASS, *OTHERS])
def test_order_is_drawn_from_seed_and_epoch(kind: str) -> None:
    """The same whatever else was drawn before, another one in each epoch."""
    build = (ONE_PASS | OTHERS)[kind]
    first = read(build(), epochs=3)
    disturb()
    train = build()
    list(itertools.islice(train, 2))
    second = read(train, epochs=3)
    assert first.epochs == second.epochs
    assert len({tuple(first[e]) for e in range(3)}) == 3
    if kind in ONE_PASS:
        assert all(sorted(first[e]) == list(range(21)) for e in range(3))


@pytest.mark.parametrize("kind", ["shuffle", "generator", "custom batch sampler", "weighted", "subclass"])
def test_another_seed_is_another_order(kind: str) -> None:
    build = (ONE_PASS | OTHERS)[kind]
    found = []
    for seed in (1, 2):
        seen = Seen()
        built_in(make(Seed(seed), seen), loss_fn, build(), epochs=1)
        found.append(seen[0])
    assert found[0] != found[1]


@pytest.mark.parametrize("kind", [*ONE_PASS, *OTHERS])
def test_total_steps_is_told_for_every_sampler(kind: str) -> None:
    told: list[Any] = []

    class Told(Callback):
        def on_fit_start(self, state: Any) -> None:
            told.append(state.total_steps)

    for accumulate in (1, 2):
        loop = make(Plan(5, accumulate), Told())
        assert built_in(loop, loss_fn, (ONE_PASS | OTHERS)[kind](), epochs=2).step == told[-1]
        loop = make(GradientAccumulation(accumulate), Told())
        assert built_in(loop, loss_fn, (ONE_PASS | OTHERS)[kind](), epochs=2).step == told[-1]


def test_set_epoch_is_told_the_epoch() -> None:
    sampler = ByEpoch(21)
    seen = read(DataLoader(data, 4, sampler=sampler), epochs=3)
    assert sampler.told == [0, 1, 2]
    assert [seen[e] for e in range(3)] == [[(i * 8 + e) % 21 for i in range(21)] for e in range(3)]
    distributed = DistributedSampler(data, num_replicas=1, rank=0, seed=3)
    seen = read(DataLoader(data, 4, sampler=distributed), epochs=3)
    for epoch in range(3):
        distributed.set_epoch(epoch)
        assert seen[epoch] == list(distributed)


class Staged(Samples):
    """What it gives hangs on an attribute, which workers hold a copy of."""

    stage = 0

    def __getitem__(self, i: int) -> Any:
        x, y, i = super().__getitem__(i)
        return x + self.stage, y, i


class ToldStage(Staged):
    def set_epoch(self, epoch: int) -> None:
        self.stage = epoch


class ToldStream(IterableDataset[Any]):
    """As Hugging Face's streaming data sets: an order by the epoch that it is told."""

    def __init__(self) -> None:
        self.held, self.epoch = Samples(20), -1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        return iter([self.held[(i * 3 + self.epoch) % 20] for i in range(20)])


class Stage(Callback):
    def on_epoch_start(self, state: State) -> None:
        state.loader.dataset.stage = state.epoch


class ToldOther(Staged):
    """Told the epoch by the Loop, it would give another stage than the hook then says."""

    def set_epoch(self, epoch: int) -> None:
        self.stage = 50 + epoch


class PlacedStream(ToldStream):
    """It says where it stands, and in which epoch."""

    at = 0

    def __iter__(self) -> Iterator[Any]:
        while self.at < 20:
            self.at += 1
            yield self.held[((self.at - 1) * 3 + self.epoch) % 20]
        self.at = 0

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at, "epoch": self.epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at, self.epoch = state["at"], state["epoch"]


class Placed:
    """A loader that says where it stands; to tell it the epoch begins it anew."""

    def __init__(self) -> None:
        self.stream = PlacedStream()
        self.state_dict, self.load_state_dict = self.stream.state_dict, self.stream.load_state_dict

    def set_epoch(self, epoch: int) -> None:
        self.stream.epoch, self.stream.at = epoch, 0

    def __len__(self) -> int:
        return 5

    def __iter__(self) -> Iterator[Any]:
        source = iter(self.stream)
        while rows := list(itertools.islice(source, 4)):
            yield default_collate(rows)


def stateful(workers: int) -> DataLoader[Any]:
    return stateful_loader(PlacedStream(), 4, num_workers=workers)


BY_EPOCH: dict[str, tuple[Callable[[], DataLoader], list[type[Callback]]]] = {
    "a hook's": (lambda: DataLoader(Staged(20), 4, shuffle=True), [Stage]),
    "a hook's, workers": (lambda: DataLoader(Staged(20), 4, shuffle=True, num_workers=1), [Stage]),
    "set_epoch, workers that persist": (
        lambda: DataLoader(ToldStage(20), 4, shuffle=True, num_workers=1, persistent_workers=True), []),
    "the last word is a hook's": (lambda: DataLoader(ToldOther(20), 4, shuffle=True), [Stage]),
    "a stream that says where it stands": (lambda: stateful(0), []),
    "a stream that says where it stands, workers": (lambda: stateful(1), []),
    "a stream that is a loader, and begins anew when told": (Placed, []),
    "a stream": (lambda: DataLoader(ToldStream(), 4), []),
    "a stream, workers that persist": (lambda: DataLoader(ToldStream(), 4, num_workers=1, persistent_workers=True), []),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", BY_EPOCH)
def test_what_an_epoch_changes_in_the_data_is_read_in_that_epoch(kind: str, form: Any, tmp_path: Path) -> None:
    (make_loader, own), held = BY_EPOCH[kind], Samples(20)
    read: list[list[tuple[float, int]]] = []

    def seen(model: Any, batch: Any) -> Any:
        if model.training:
            read.append([(float(x[0] - held.x[i][0]), int(i)) for x, i in zip(batch[0], batch[2], strict=True)])
        return loss_fn(model, batch)

    def run(folder: Path | None, **end: int) -> Loop:
        loop = make(Seed(5), *[kind() for kind in own], *([Checkpoint(folder, every=1)] if folder else []), resume=folder)
        form(loop, seen, make_loader(), **end)
        return loop

    whole = run(None, epochs=3)
    assert len(read) == 15
    for epoch in range(3):
        stages, order = zip(*[one for batch in read[5 * epoch : 5 * epoch + 5] for one in batch], strict=True)
        assert sorted(order) == list(range(20))
        if "stream" in kind:
            assert list(order) == [(i * 3 + epoch) % 20 for i in range(20)]
        else:
            assert all(abs(stage - epoch) < 1e-5 for stage in stages), epoch
    for kill in (4, 8, 10, 12):
        run(tmp_path / str(kill), steps=kill)
        assert_same_bits(bits(run(tmp_path / str(kill), epochs=3)), bits(whole))


def test_a_batch_sampler_of_tuples_is_known_too() -> None:
    class Tuples(Shuffled):
        def __iter__(self) -> Iterator[Any]:
            return iter([tuple(b) for b in super().__iter__()])

    seen = read(DataLoader(data, batch_sampler=Tuples(21, 4)))
    assert sorted(seen[0]) == list(range(21))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("shuffle", [False, True])
def test_data_sets_of_batches(workers: int, shuffle: bool) -> None:
    """batch_size=None: the data set itself gives batches."""

    def build() -> DataLoader:
        return DataLoader(Batches(), batch_size=None, shuffle=shuffle, num_workers=workers)

    first = read(build(), known=False)
    assert sorted(first[0]) == sorted(first[1]) == list(range(20))
    assert (first[0] != first[1]) is shuffle
    disturb()
    assert read(build(), known=False).epochs == first.epochs
    joined = read(build(), known=False, plan=Plan(5, 1, 3))
    assert [len(step) for step in joined.epochs[0]] == [5] * 4
    assert joined[0] == first[0]


WORKERS = [{"num_workers": 1}, {"num_workers": 2}, {"num_workers": 2, "persistent_workers": True},
           {"num_workers": 2, "prefetch_factor": 1}]  # fmt: skip


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("kind", [{"shuffle": True}, {"shuffle": True, "generator": 0}, {"batch_sampler": 0}])
def test_workers_change_neither_order_nor_index(workers: Any, kind: Any) -> None:
    def build(**kwargs: Any) -> DataLoader:
        if "generator" in kind:
            kwargs["generator"] = generator()
        if "batch_sampler" in kind:
            return DataLoader(data, batch_sampler=Shuffled(21, 4), **kwargs)
        return DataLoader(data, 4, shuffle=True, **kwargs)

    assert read(build(**workers), 3, plan=Plan(6, 1, 4)).epochs == read(build(), 3, plan=Plan(6, 1, 4)).epochs


def test_index_is_none_where_workers_answer_in_any_order() -> None:
    train = DataLoader(data, 4, shuffle=True, num_workers=2, in_order=False)
    assert sorted(read(train, 1, known=False)[0]) == list(range(21))


class Draws(Callback):
    def on_step_start(self, state: Any) -> None:
        disturb()

    on_step_end = on_epoch_start = on_step_start


@pytest.mark.parametrize("kind", ["buckets", "drawn one by one"])
@pytest.mark.parametrize("seed", [5, None])
def test_a_sampler_that_draws_as_it_goes(kind: str, seed: int | None) -> None:
    """Its order is that of any number of workers, whoever else draws, and training draws what it does beside fixed batches."""

    def run(workers: int = 0, extra: Any = (), drawn: Any = None) -> tuple[Any, Any]:
        model, seen, first = net(seed=5), Seen(), [] if seed is None else [Seed(seed)]  # net seeds torch's generator
        batches = ONE_PASS[kind]().batch_sampler if drawn is None else drawn
        loop = Loop(model, adamw(model), [*first, *extra, seen])
        built_in(loop, noiseless, DataLoader(data, batch_sampler=batches, num_workers=workers), epochs=1)
        return seen.epochs, bits(loop)

    order, weights = run()
    assert run(1)[0] == run(0, [Draws()])[0] == order
    assert_same_bits(run(drawn=order[0])[1], weights)


# The loader is the user's


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", [*ONE_PASS, *OTHERS])
@pytest.mark.parametrize("fails", [False, True])
def test_the_loader_is_as_before_after_the_run(form: Any, kind: str, fails: bool) -> None:
    train = (ONE_PASS | OTHERS)[kind]()
    sampler, batch_sampler, before = train.sampler, train.batch_sampler, dict(vars(train))
    expected = len(train), sum(len(batch[0]) for batch in train)

    class Fails(Callback):
        def on_step_end(self, state: Any) -> None:
            if fails and state.step == 3:
                raise KeyError("mine")

    loop = make(Seed(5), Fails())
    if fails:
        with pytest.raises(KeyError, match="mine"):
            form(loop, loss_fn, train, epochs=2)
    else:
        form(loop, loss_fn, train, epochs=2)
    assert train.batch_sampler is batch_sampler
    assert train.sampler is sampler
    assert vars(train) == before
    assert (len(train), sum(len(batch[0]) for batch in train)) == expected
    again = copy.copy(train)
    assert sum(len(batch[0]) for batch in again) == expected[1]


def test_the_loader_is_as_before_with_persistent_workers() -> None:
    train = DataLoader(data, 4, shuffle=True, num_workers=1, persistent_workers=True)
    batch_sampler = train.batch_sampler
    by_hand_before = sorted(i for b in train for i in b[2].tolist())
    seen = read(train)
    assert sorted(seen[0]) == list(range(21))
    assert train.batch_sampler is batch_sampler
    assert sorted(i for b in train for i in b[2].tolist()) == by_hand_before == list(range(21))
    assert seen.epochs == read(train).epochs


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_no_worker_outlives_the_run(persistent: bool, fails: bool) -> None:
    """Also not when the run stopped inside an epoch, and while the Loop is kept."""
    train = DataLoader(data, 2, shuffle=True, num_workers=1, persistent_workers=persistent)

    class Fails(Callback):
        def on_step_end(self, state: Any) -> None:
            if state.step == 3:
                raise KeyError("mine")

    loop = make(Fails() if fails else StopAt(3))
    before = {process.pid for process in multiprocessing.active_children()}
    if fails:
        with pytest.raises(KeyError, match="mine"):
            loop.fit(loss_fn, train, epochs=2)
    else:
        loop.fit(loss_fn, train, epochs=2)
    assert {process.pid for process in multiprocessing.active_children()} <= before
    assert loop.state.step == 3


def test_the_loader_is_as_before_when_the_run_never_starts() -> None:
    train = DataLoader(data, 4, shuffle=True)
    batch_sampler = train.batch_sampler

    class Fails(Callback):
        def on_fit_start(self, state: Any) -> None:
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        built_in(make(Fails()), loss_fn, train, epochs=1)
    assert train.batch_sampler is batch_sampler


@pytest.mark.parametrize("form", FORMS)
def test_global_generators_do_not_steer_the_order_and_are_not_steered_by_it(form: Any) -> None:
    """Attaching to a loader draws nothing that the user's own draws could feel, but one number without a Seed."""

    def after(train: Any) -> Any:
        torch.manual_seed(3)
        random.seed(3)
        np.random.seed(3)
        model = nn.Linear(6, 3)
        form(Loop(model, torch.optim.SGD(model.parameters(), lr=0.1)), loss_fn, train, epochs=2)
        return torch.rand(2).tolist(), random.random(), np.random.rand()

    shuffled = after(DataLoader(data, 4, shuffle=True))
    assert shuffled == after(DataLoader(data, 4))
    assert shuffled == after(Generated(data, 4, shuffle=True))
    assert shuffled == after(DataLoader(data, 4, shuffle=True, generator=generator()))


def test_the_loader_may_change_between_epochs() -> None:
    """By hand, each epoch may have data of its own (growing images, a curriculum)."""
    small, large, seen = DataLoader(Samples(9), 4, shuffle=True), DataLoader(Samples(21), 5, shuffle=True), Seen()
    samplers = small.batch_sampler, large.batch_sampler
    with make(Seed(5), seen) as loop:
        for epoch in loop.epochs(4):
            for step in loop.steps(large if epoch % 2 else small):
                for micro in step:
                    with micro:
                        micro.backward(loss_fn)
                loop.update()
    assert [sorted(seen[e]) for e in range(4)] == [list(range(9)), list(range(21))] * 2
    assert (small.batch_sampler, large.batch_sampler) == samplers


def test_a_loop_entered_again_may_get_other_data() -> None:
    loop = make(Seed(5), seen := Seen())
    loop.fit(loss_fn, DataLoader(Samples(9), 4, shuffle=True), epochs=1)
    loop.fit(loss_fn, DataLoader(Samples(21), 5, shuffle=True), epochs=2)
    assert sorted(seen[0]) == list(range(9))
    assert sorted(seen[1]) == list(range(21))


@pytest.mark.parametrize("kind", [DataLoader, Generated])
@pytest.mark.parametrize("workers", [0, 2])
def test_evaluating_on_the_training_loader_moves_nothing(workers: int, kind: Any) -> None:
    """The same loader object may be validated on, in the middle of an epoch too."""
    plain, both = Seen(), Seen()
    train = kind(data, 4, shuffle=True, num_workers=workers)
    first, second = make(Seed(5), plain), make(Seed(5), both)
    first.fit(loss_fn, train, epochs=2)
    second.fit(loss_fn, train, train, epochs=2, validate_every=2)
    assert both.epochs == plain.epochs == read(DataLoader(data, 4, shuffle=True)).epochs
    assert_same_bits(bits(first), bits(second))


def test_evaluating_on_the_training_loader_with_persistent_workers() -> None:
    """Torch keeps one iterator for such a loader: a second pass inside an epoch is refused, or changes nothing."""
    train = DataLoader(data, 4, shuffle=True, num_workers=1, persistent_workers=True)
    loop = make(Seed(5), seen := Seen())
    try:
        loop.fit(loss_fn, train, train, epochs=2, validate_every=2)
    except (ValueError, RuntimeError) as error:
        assert "persistent" in str(error)  # noqa: PT017
    else:
        assert sorted(seen[0]) == sorted(seen[1]) == list(range(21))


@pytest.mark.parametrize("at", [2, 4])
def test_evaluating_on_the_training_loader_sees_all_of_it(at: int) -> None:
    """Also after the run went on inside an epoch."""
    train, seen = DataLoader(data, 4, shuffle=True), []

    class Look(Callback):
        def on_micro_end(self, state: Any) -> None:
            if not state.micro.training:
                seen.append(state.micro.batch[2].tolist())

    loop = make(Seed(5), Look(), StopAt(at))
    loop.fit(loss_fn, train, epochs=1)
    loop.fit(loss_fn, train, train, epochs=1, validate_every=1)
    whole = [sorted(itertools.chain(*seen[i : i + 6])) for i in range(0, len(seen), 6)]
    assert whole
    assert all(one == list(range(21)) for one in whole)


@pytest.mark.parametrize("kind", [DataLoader, Generated])
@pytest.mark.parametrize("swap", [False, True])
def test_two_loops_read_one_loader(swap: bool, kind: Any) -> None:
    """Two Loops in one body (a GAN) on one loader: each reads each sample once an epoch, and gives it back."""
    train = kind(data, 4, shuffle=True)
    batch_sampler, a, b = train.batch_sampler, Seen(), Seen()
    one, two = make(Seed(1), a), make(Seed(2), b)
    first, second = (two, one) if swap else (one, two)
    with first, second:
        for _ in zip(one.epochs(2), two.epochs(2), strict=True):
            for pair in zip(one.steps(train), two.steps(train), strict=True):
                for loop, step in zip((one, two), pair, strict=True):
                    for micro in step:
                        with micro:
                            micro.backward(loss_fn)
                    loop.update()
    assert train.batch_sampler is batch_sampler
    for seen in (a, b):
        assert [sorted(seen[e]) for e in range(2)] == [list(range(21))] * 2
    assert [a.epochs, b.epochs] == [read(DataLoader(data, 4, shuffle=True), seed=seed).epochs for seed in (1, 2)]


# Workers and the noise of samples


class Noisy(Samples):
    """Each sample comes with what it drew."""

    def __getitem__(self, i: int) -> Any:
        drawn = [random.random(), float(np.random.rand()), float(torch.rand((), dtype=torch.float64))]
        return *super().__getitem__(i), torch.tensor(drawn, dtype=torch.float64)


class NoisyItems(Noisy):
    def __getitems__(self, indices: Any) -> list[Any]:
        return [self[i] for i in indices]


def marks(worker: int) -> None:
    get_worker_info().dataset.mark = worker + 1


class Marked(Samples):
    mark = 0

    def __getitem__(self, i: int) -> Any:
        return *super().__getitem__(i), self.mark


@pytest.mark.parametrize("persistent", [False, True])
def test_the_users_worker_init_fn_runs(persistent: bool) -> None:
    train = DataLoader(Marked(21), 4, shuffle=True, num_workers=2, worker_init_fn=marks, persistent_workers=persistent)
    seen = read(train)
    assert set(torch.cat(seen.extra).tolist()) == {1, 2}
    assert train.worker_init_fn is marks


def noise(epochs: int = 2, seed: int | None = 5, source: Any = Noisy, **kwargs: Any) -> Tensor:
    """The noise of every sample, by epoch and position in the data set."""
    seen = Seen()
    train = DataLoader(source(21), 4, **{"shuffle": True, **kwargs})
    built_in(make(*([] if seed is None else [Seed(seed)]), seen), loss_fn, train, epochs=epochs)
    found = torch.cat(seen.extra)
    return torch.stack([found[21 * e : 21 * (e + 1)][torch.tensor(seen[e]).argsort()] for e in range(epochs)])


@pytest.mark.parametrize("kwargs", [*WORKERS, {"source": NoisyItems}, {"source": lambda n: Subset(Noisy(n), range(n))}])
def test_the_noise_of_a_batch_hangs_on_seed_epoch_and_its_number_alone(kwargs: Any) -> None:
    assert torch.equal(noise(**kwargs), noise())


def test_ranks_draw_distinct_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks read one batch number at once; what they draw for it must differ."""
    first = noise(shuffle=False)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    second = noise(shuffle=False)
    assert not torch.isclose(first, second).any()


def test_a_sample_drawn_twice_in_an_epoch_is_augmented_anew() -> None:
    seen, source = Seen(), Noisy(10)
    train = DataLoader(source, 4, sampler=WeightedRandomSampler([1.0] * 10, 80))
    built_in(make(Seed(5), seen), loss_fn, train, epochs=1)
    assert len(torch.unique(torch.cat(seen.extra), dim=0)) == 80


@pytest.mark.parametrize("kwargs", [{}, {"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}])
def test_the_noise_is_distinct_over_samples_epochs_and_seeds(kwargs: Any) -> None:
    found = torch.cat([noise(3, **kwargs).flatten(0, 1), noise(1, seed=6, **kwargs).flatten(0, 1)])
    for column in found.unbind(1):
        assert len(set(column.tolist())) == 4 * 21


def test_the_noise_of_data_sets_of_batches() -> None:
    """batch_size=None: with a Seed, the same for any number of workers there too."""

    class NoisyBatches(Batches):
        def __getitem__(self, i: int) -> Any:
            drawn = torch.tensor([random.random(), float(np.random.rand())], dtype=torch.float64)
            return *super().__getitem__(i), (drawn + torch.rand(2, dtype=torch.float64)).view(1, 2).repeat(2, 1)

    def found(**kwargs: Any) -> Any:
        seen = read(DataLoader(NoisyBatches(), batch_size=None, shuffle=True, **kwargs), known=False)
        return seen.epochs, torch.cat(seen.extra).tolist()

    first = found()
    disturb()
    assert found() == first
    assert len({tuple(row) for row in first[1]}) == 20
    assert found(num_workers=1) == first
    assert found(num_workers=2) == first


@pytest.mark.parametrize("workers", [0, 2])
def test_without_a_seed_manual_seed_makes_a_run_repeat(workers: int) -> None:
    def one(seed: int, disturbed: bool) -> Any:
        if disturbed:
            disturb()
        torch.manual_seed(seed)
        model, seen = net(seed=seed), Seen()
        random.seed(seed)
        np.random.seed(seed)
        loop = Loop(model, adamw(model), [seen])
        built_in(loop, noiseless, DataLoader(Noisy(21), 4, shuffle=True, num_workers=workers), epochs=2)
        return bits(loop), seen.epochs, torch.cat(seen.extra)

    (a, order, drawn), (b, order_again, drawn_again) = one(3, False), one(3, True)
    assert_same_bits(a, b)
    assert order == order_again
    assert torch.equal(drawn, drawn_again)
    assert one(4, False)[1] != order
    assert len(set(drawn.flatten().tolist())) == drawn.numel()


# Data without a length


class Stream(IterableDataset):
    """Samples one after another, with no length."""

    def __init__(self, count: int = 21) -> None:
        self.data = Samples(count)

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        return (self.data[i] for i in range(len(self.data))
                if worker is None or i % worker.num_workers == worker.id)  # fmt: skip


def by_fours(count: int = 21) -> list[Any]:
    samples = Samples(count)
    index = torch.arange(count)
    return [(samples.x[i : i + 4], samples.y[i : i + 4], index[i : i + 4]) for i in range(0, count, 4)]


class Endless:
    """Iterable again and again, without a length."""

    def __init__(self, count: int = 21) -> None:
        self.batches = by_fours(count)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


LENGTHLESS = {
    "stream": lambda: DataLoader(Stream(), 4),
    "stream in workers": lambda: DataLoader(Stream(), 4, num_workers=2),
    "stream of batches": lambda: DataLoader(Endless(), batch_size=None),
    "iterable": Endless,
}


class Look(Callback):
    def __init__(self) -> None:
        self.told: list[Any] = []

    def on_fit_start(self, state: Any) -> None:
        self.told.append((state.total_steps, state.loader))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["stream", "stream in workers", "iterable"])
def test_dl4_data_without_a_length(form: Any, kind: str) -> None:
    train, look, seen = LENGTHLESS[kind](), Look(), Seen(known=False)
    state = form(make(look, seen), loss_fn, train, epochs=2)
    assert look.told == [(None, train)]
    assert state.total_steps is None
    assert state.epoch == 2
    assert [sorted(seen[e]) for e in range(2)] == [list(range(21))] * 2
    look = Look()
    state = form(make(look), loss_fn, LENGTHLESS[kind](), steps=8)
    assert (look.told[0][0], state.step, state.epoch) == (8, 8, 1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["stream", "iterable"])
def test_dl4_what_needs_a_length_says_so_at_the_start(form: Any, kind: str) -> None:
    loop = make(Warmup(0.5))
    with pytest.raises(ValueError, match=r"Warmup\(0.5\).*steps="):
        form(loop, loss_fn, LENGTHLESS[kind](), epochs=2)
    assert loop.state.step == 0
    assert form(make(Warmup(0.5)), loss_fn, LENGTHLESS[kind](), steps=4).step == 4


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["stream", "iterable"])
@pytest.mark.parametrize(("batch", "accumulate"), [(None, 4), (5, 1), (5, 2), (3, 3), (50, 2)])
def test_dl4_shaped_steps_without_a_length(form: Any, kind: str, batch: int | None, accumulate: int) -> None:
    seen = Seen(known=False)
    state = form(make(Plan(batch, accumulate, 2), seen), loss_fn, LENGTHLESS[kind](), epochs=2)
    assert seen[0] == seen[1] == list(range(21))
    assert state.total_steps is None
    assert state.samples == 42
    step = 4 * accumulate if batch is None else batch * accumulate
    assert [len(s) for s in seen.epochs[0]] == [min(step, 21 - i) for i in range(0, 21, step)]


@pytest.mark.parametrize("form", FORMS)
def test_a_list_of_batches_has_a_length(form: Any) -> None:
    look, seen = Look(), Seen(known=False)
    state = form(make(look, Plan(5, 2), seen), loss_fn, by_fours(), epochs=2)
    assert look.told[0][0] == state.step == 6
    assert seen[0] == seen[1] == list(range(21))


@pytest.mark.parametrize("form", FORMS)
def test_a_generator_serves_one_epoch(form: Any) -> None:
    seen = Seen(known=False)
    state = form(make(seen), loss_fn, (batch for batch in by_fours()), epochs=1)
    assert (seen[0], state.step, state.epoch) == (list(range(21)), 6, 1)


@pytest.mark.parametrize("form", FORMS)
def test_a_used_up_generator_is_an_error(form: Any) -> None:
    used = (batch for batch in by_fours())
    list(used)
    loop = make()
    with pytest.raises(ValueError, match=r"iterator \(generator\) with nothing left.*iterated again"):
        form(loop, loss_fn, used, epochs=1)
    assert loop.state.step == 0
    loop = make()
    with pytest.raises(ValueError, match=r"iterator \(generator\) with nothing left"):
        form(loop, loss_fn, (batch for batch in by_fours()), epochs=2)
    assert (loop.state.step, loop.state.epoch) == (6, 1)


@pytest.mark.parametrize("form", FORMS)
def test_an_endless_loader_ends_by_steps(form: Any) -> None:
    state = form(make(), loss_fn, itertools.cycle(by_fours()), steps=20)
    assert (state.step, state.epoch, state.total_steps) == (20, 0, 20)


# Too little data


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("train", "match"),
    [
        (lambda: DataLoader(Samples(3), 4, drop_last=True), "0 batches: 3 samples, batch 4, drop_last=True"),
        (lambda: DataLoader(Samples(0), 4), "0 batches: 0 samples, batch 4, drop_last=False"),
        (lambda: DataLoader(Samples(3), 4, shuffle=True, drop_last=True), "0 batches: 3 samples, batch 4"),
        (lambda: DataLoader(Samples(3), 4, drop_last=True, num_workers=1), "0 batches: 3 samples, batch 4"),
        (lambda: DataLoader(Samples(3), batch_sampler=BatchSampler(range(3), 4, True)), "0 batches: 3 samples"),
        (lambda: DataLoader(Samples(3), 4, sampler=SubsetRandomSampler([])), "0 batches"),
        (lambda: DataLoader(Stream(0), 4), "0 batches"),
        (list, r"\(list\) gives 0 batches"),
        (lambda: Endless(0), r"\(Endless\) gives 0 batches"),
    ],
)
def test_dl1_no_batch_is_an_error_before_the_first_step(form: Any, train: Any, match: str) -> None:
    for plan in (Plan(), Plan(5, 2)):
        loop = make(plan, steps := Seen(known=False))
        before = bits(loop)
        with pytest.raises(ValueError, match=match):
            form(loop, loss_fn, train(), epochs=2)
        assert not steps.epochs
        assert loop.state.step == loop.state.samples == 0
        assert_same_bits(before, bits(loop))


def expected_gradient(samples: Samples, rows: Any) -> Tensor:
    model = net(torch.float64, noise=False)
    nn.functional.cross_entropy(model(samples.x[rows]), samples.y[rows]).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def gradients(form: Any, train: Any, *callbacks: Callback, **kwargs: Any) -> tuple[list[Tensor], Seen, Any]:
    model, found, seen = net(torch.float64, noise=False), Gradients(), Seen(known=isinstance(train, DataLoader))
    loop = Loop(model, torch.optim.SGD(model.parameters(), lr=0.0), [*callbacks, found, seen], **kwargs)
    state = form(loop, loss_fn, train, epochs=2)
    return found.seen, seen, state


def assert_close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> None:
    assert torch.linalg.norm(a - b) <= tolerance * torch.linalg.norm(b)


@pytest.mark.parametrize("form", FORMS)
def test_dl2_a_loader_shorter_than_the_accumulation(form: Any) -> None:
    """One step an epoch, divided by what it holds."""
    train = DataLoader(Samples(24, torch.float64), 8, shuffle=True)
    found, _, state = gradients(form, train, GradientAccumulation(8))
    assert state.step == state.total_steps == 2
    for one in found:
        assert_close(one, expected_gradient(train.dataset, slice(24)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("count", "size", "n"), [(21, 8, 1), (21, 8, 2), (21, 8, 3), (21, 8, 5), (17, 16, 2), (9, 2, 4)])
def test_dl3_a_last_partial_batch_weighs_its_samples(form: Any, count: int, size: int, n: int) -> None:
    train = DataLoader(Samples(count, torch.float64), size)
    found, _, state = gradients(form, train, GradientAccumulation(n))
    steps = -(-count // (size * n))
    assert state.step == 2 * steps
    for i, one in enumerate(found):
        start = i % steps * size * n
        assert_close(one, expected_gradient(train.dataset, slice(start, min(count, start + size * n))))


# Joined, cut, ragged


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("batch", "accumulate", "micro"), [(5, 1, None), (5, 2, 3), (3, 1, 2), (4, 2, 3), (17, 1, 4),
                                                            (None, 2, 3), (2, 3, 1), (40, 1, 6)])  # fmt: skip
def test_index_is_right_in_joined_and_cut_batches(
    form: Any, workers: int, batch: int | None, accumulate: int, micro: int | None
) -> None:
    if workers and form is by_hand:
        return
    train = DataLoader(data, 4, shuffle=True, num_workers=workers)
    plain = read(DataLoader(data, 4, shuffle=True), 2)
    seen = read(train, 2, form=form, plan=Plan(batch, accumulate, micro))  # Seen compares index with the batch
    assert [seen[0], seen[1]] == [plain[0], plain[1]]


def test_micro_number_and_size() -> None:
    found = []

    class Numbers(Callback):
        def on_micro_end(self, state: Any) -> None:
            found.append((state.step, state.micro.number, state.micro.size, state.micro.weight))

    make(Plan(10, 1, 4), Numbers()).fit(loss_fn, DataLoader(data, 4), epochs=1)
    assert found == [(0, 0, 4, 4), (0, 1, 3, 3), (0, 2, 3, 3), (1, 0, 4, 4), (1, 1, 3, 3), (1, 2, 3, 3), (2, 0, 1, 1)]


def padded(lengths: list[int]) -> list[Any]:
    """Batches padded to lengths of their own."""
    samples = Samples(60, torch.float64)
    parts, at = [], 0
    for i, n in enumerate(lengths):
        rows = torch.arange(at, at + n)
        x = torch.cat([samples.x[rows], torch.zeros(n, i % 3, dtype=torch.float64)], 1)
        parts.append((x, samples.y[rows], rows))
        at += n
    return parts


def unpadded(model: nn.Module, batch: Any) -> Any:
    return loss_fn(model, (batch[0][:, :6], batch[1]))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("batch", "accumulate", "micro"), [(None, 2, None), (10, 1, None), (7, 2, 3), (11, 1, 4),
                                                            (None, 3, 2)])  # fmt: skip
def test_ragged_batches_stay_apart_and_exact(form: Any, batch: int | None, accumulate: int, micro: int | None) -> None:
    lengths = [5, 3, 8, 1, 6, 7, 2]
    model, found, seen, widths = net(torch.float64, noise=False), Gradients(), Seen(known=False), set[int]()

    class Widths(Callback):
        def on_micro_end(self, state: Any) -> None:
            widths.add(state.micro.batch[0].shape[1])

    loop = Loop(model, torch.optim.SGD(model.parameters(), lr=0.0), [Plan(batch, accumulate, micro), found, seen, Widths()])
    state = form(loop, unpadded, padded(lengths), epochs=2)
    assert seen[0] == seen[1] == list(range(32))
    assert state.total_steps == state.step
    assert widths == {6, 7, 8}
    for step, one in zip([*seen.epochs[0], *seen.epochs[1]], found.seen, strict=True):
        assert_close(one, expected_gradient(Samples(60, torch.float64), step))


@pytest.mark.parametrize("form", FORMS)
def test_joined_where_it_can_be(form: Any) -> None:
    sizes = []

    class Sizes(Callback):
        def on_micro_end(self, state: Any) -> None:
            sizes.append(state.micro.size)

    form(make(Plan(8, 2), Sizes()), loss_fn, by_fours(), epochs=1)
    assert sizes == [8, 8, 5]


# Growth, stops, entering again


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_grow_and_every_sample_is_read_once(form: Any, workers: int) -> None:
    train = DataLoader(Samples(50), 8, shuffle=True, num_workers=workers)
    sizes = [3, 5, 8, 13, 50, 70]
    seen = read(train, 6, form=form, plan=Plan(lambda state: sizes[state.epoch]))
    for epoch, size in enumerate(sizes):
        assert [len(s) for s in seen.epochs[epoch]] == [min(size, 50 - i) for i in range(0, 50, size)]
        assert sorted(seen[epoch]) == list(range(50))
    if not workers:
        assert sorted(train.dataset.read) == sorted(list(range(50)) * 6)


LOADERS: dict[str, Callable[[], Any]] = {
    "shuffled": lambda: DataLoader(Samples(21), 4, shuffle=True),
    "workers": lambda: DataLoader(Samples(21), 4, shuffle=True, num_workers=2),
    "persistent": lambda: DataLoader(Samples(21), 4, shuffle=True, num_workers=1, persistent_workers=True),
    "custom": lambda: DataLoader(Samples(21), batch_sampler=Shuffled(21, 4)),
    "subclass": lambda: Generated(Samples(21), 4, shuffle=True),
    "subclass, persistent": lambda: Generated(Samples(21), 4, shuffle=True, num_workers=1, persistent_workers=True),
    "batches": lambda: DataLoader(Batches(21 * 2, 2), batch_size=None, shuffle=True),
    "stream": lambda: DataLoader(Stream(), 4),
    "list": by_fours,
}


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize(("batch", "accumulate"), [(None, 1), (None, 2), (3, 1), (5, 2)])
def test_stopped_inside_an_epoch_and_entered_again(kind: str, batch: int | None, accumulate: int) -> None:
    """The same Loop goes on where it stopped: each sample once an epoch, the same bits as never stopped."""
    known = kind not in ("batches", "stream", "list")

    def run(*stops: int) -> tuple[Loop, Seen]:
        model, seen, train = net(seed=5), Seen(known), LOADERS[kind]()
        model[1].eval()
        loop = Loop(model, adamw(model), [Seed(5), Plan(batch, accumulate, 2), seen, StopAt(*stops)])
        for form in (built_in, by_hand, built_in, by_hand)[: len(stops) + 1]:
            form(loop, noiseless, train, epochs=2)
        assert loop.state.epoch == 2
        return loop, seen

    whole, expected = run()
    broken, seen = run(1, 2, 5)
    assert seen.epochs == expected.epochs
    assert_same_bits(bits(whole), bits(broken))


def noiseless(model: nn.Module, batch: Any) -> Any:
    model[1].eval()  # BatchNorm refuses a single sample in training
    return loss_fn(model, batch)


def test_stopped_by_steps_and_entered_again() -> None:
    loop, seen, train = make(Seed(5), seen := Seen()), seen, LOADERS["shuffled"]()
    for steps in (1, 1, 4, 6, 7, 12):
        loop.fit(loss_fn, train, steps=steps)
        assert loop.state.step == steps
    assert sorted(seen[0]) == sorted(seen[1]) == list(range(21))
    assert loop.state.epoch == 2
    assert seen.epochs == read(LOADERS["shuffled"]()).epochs


def test_a_generator_goes_on_when_entered_again() -> None:
    seen = Seen(known=False)
    loop, train = make(seen, StopAt(2, 3)), (batch for batch in by_fours())
    for _ in range(3):
        loop.fit(loss_fn, train, epochs=1)
    assert seen[0] == list(range(21))
    assert (loop.state.epoch, loop.state.step) == (1, 6)


def test_stopped_without_a_seed_and_entered_again() -> None:
    """Without a Seed the Loop keeps the order that it drew."""
    seen = Seen()
    loop, train = make(seen, StopAt(2, 4)), LOADERS["shuffled"]()
    for _ in range(3):
        disturb()
        loop.fit(loss_fn, train, epochs=1)
    assert sorted(seen[0]) == list(range(21))


@pytest.mark.parametrize("plan", [(None, 1), (5, 1), (3, 2)])
def test_an_error_inside_a_step_and_entered_again(plan: Any) -> None:
    """After an error (or Ctrl-C) in a step that was not applied, going on uses its samples all the same."""
    seen = Seen()
    model, train, fails = net(noise=False), LOADERS["shuffled"](), [True]

    class Applied(Callback):
        def __init__(self) -> None:
            self.open, self.samples = list[int](), list[int]()

        def on_step_start(self, state: Any) -> None:
            self.open = []

        def on_micro_end(self, state: Any) -> None:
            self.open += state.micro.batch[2].tolist()

        def on_step_end(self, state: Any) -> None:
            self.samples += self.open

    def sometimes(model: Any, batch: Any) -> Any:
        if loop.state.step == 2 and fails:
            fails.clear()
            raise KeyboardInterrupt
        return loss_fn(model, batch)

    applied = Applied()
    loop = Loop(model, adamw(model), [Seed(5), Plan(*plan), seen, applied])
    with pytest.raises(KeyboardInterrupt):
        loop.fit(sometimes, train, epochs=1)
    loop.fit(sometimes, train, epochs=1)
    assert sorted(applied.samples) == list(range(21))


def test_an_error_after_the_plan_left_a_remainder_whole() -> None:
    """A remainder that one step takes whole is used up: nothing of the next loader batch is left out for it."""
    used: list[int] = []

    class Used(Callback):
        def on_micro_end(self, state: Any) -> None:
            used.extend(state.micro.batch[2].tolist())

        def on_step_end(self, state: Any) -> None:
            if state.step == 2 and len(used) == 8:
                raise KeyError("mine")

    loop, train = make(Seed(5), Plan(lambda state: 5 if state.step == 0 else None), Used()), LOADERS["shuffled"]()
    with pytest.raises(KeyError, match="mine"):
        loop.fit(loss_fn, train, epochs=1)
    loop.fit(loss_fn, train, epochs=1)
    assert sorted(used) == list(range(21))


# What one pass gives


def test_extent() -> None:
    def of(count: int, size: int, **kwargs: Any) -> Any:
        return extent(DataLoader(Samples(count), size, **kwargs))

    assert of(21, 4) == (6, 21)
    assert of(21, 4, drop_last=True) == (5, 20)
    assert of(21, 4, sampler=SubsetRandomSampler(range(9))) == (3, 9)
    assert extent(DataLoader(Samples(21), batch_sampler=Shuffled(21, 4))) == (6, 21)
    assert extent(by_fours()) == (6, 21)
    assert extent(Endless()) == (None, None)
    assert extent(DataLoader(Stream(), 4)) == (None, None)
    assert extent(batch for batch in by_fours()) == (None, None)
    assert extent(DataLoader(Batches(), batch_size=None))[0] == 10


def test_telling_in_advance_draws_nothing() -> None:
    """Counting a custom batch sampler's samples moves no global generator."""
    torch.manual_seed(4)
    before = torch.get_rng_state(), random.getstate()
    extent(DataLoader(Samples(21), batch_sampler=FromPython(21, 4)))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
