"""The order of data under several ranks, each of which is stood for by a DistributedSampler of its own in this process."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import KillAt, Killed, Samples, adamw, assert_same_bits, bits, built_in, loss_fn, net
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, IterableDataset, RandomSampler, Sampler

from hookloop.callbacks import Checkpoint, DynamicBatchSize, Seed
from hookloop.loop import Callback, Loop
from hookloop.loop.feed import Feed
from hookloop.loop.order import extent
from hookloop.loop.reshard import first_batch_digest, reshard

CPU = torch.device("cpu")
Positions = list[dict[str, Any]]


def sharded(data: Any, size: int, rank: int, world: int, **more: Any) -> DataLoader:
    kinds = {name: more.pop(name) for name in ("shuffle", "seed", "drop_last") if name in more}
    return DataLoader(data, size, sampler=DistributedSampler(data, num_replicas=world, rank=rank, **kinds), **more)


def begin(loader: Any, rank: int, world: int, position: Any = None, epoch: int = 0) -> Feed:
    """A rank's feed, at the start of an epoch or at a position."""
    feed = Feed(None, lambda data: len(data[0]), True)
    feed.ranks, feed.rereads = world, world > 1
    feed.attach(loader)
    if position is not None:
        feed.load_state_dict(position)
    feed.open(epoch, 5, rank, True, CPU)
    return feed


def step(feed: Feed, size: int | None = None, by: int = 2) -> list[int]:
    """The samples of one update of a rank; none where its epoch has ended."""
    return [int(i) for chunk in (feed.gather(size, 1) if feed.more() else []) for i in chunk.data[by]]


def rest(feed: Feed, size: int | None = None) -> list[list[int]]:
    found = []
    while one := step(feed, size):
        found.append(one)
    return found


def flat(*nested: Any) -> list[int]:
    return sorted(i for one in nested for i in (flat(*one) if isinstance(one, list) else [one]))


# Samples that torch's sampler repeats

LOADERS: dict[str, Callable[[Any, int, int], DataLoader]] = {
    "sampler": lambda data, rank, world: sharded(data, 2, rank, world),
    "in order": lambda data, rank, world: sharded(data, 2, rank, world, shuffle=False),
    "batch sampler": lambda data, rank, world: DataLoader(
        data, batch_sampler=BatchSampler(DistributedSampler(data, num_replicas=world, rank=rank), 2, False)
    ),
    "workers": lambda data, rank, world: sharded(data, 2, rank, world, num_workers=1),
    "persistent": lambda data, rank, world: sharded(data, 2, rank, world, num_workers=1, persistent_workers=True),
}


@pytest.mark.parametrize(("kind", "count", "world"), [
    *[(kind, *sizes) for kind in ("sampler", "in order", "batch sampler") for sizes in ((9, 4), (10, 4), (5, 5), (13, 3))],
    ("workers", 5, 2), ("persistent", 5, 2),
])  # fmt: skip
def test_no_sample_is_read_twice(kind: str, count: int, world: int, caplog: pytest.LogCaptureFixture) -> None:
    """In every epoch, also from a place inside it on; batches and their number are those of the samples that are left."""
    data, found = Samples(count), ([], [])
    with caplog.at_level(logging.WARNING):
        for rank in range(world):
            feed = begin(loader := LOADERS[kind](data, rank, world), rank, world)
            for epoch in (0, 1):
                feed.open(epoch, 5, rank, True, CPU)
                first, position = step(feed), feed.state_dict()
                found[epoch].append([first, *rest(feed)])
                assert extent(loader) == (len(found[epoch][-1]), len(flat(found[epoch][-1])))
                if epoch:
                    again = begin(LOADERS[kind](data, rank, world), rank, world, position, epoch)
                    assert [first, *rest(again)] == found[epoch][-1]
                    again.detach()
            feed.detach()
    assert flat(found[0]) == flat(found[1]) == list(range(count))
    assert not caplog.records, "as many batches as promised"


def test_without_repeats_the_order_is_that_of_torch() -> None:
    data = Samples(10)
    for rank in range(4):
        sampler = DistributedSampler(data, num_replicas=4, rank=rank, seed=3)
        sampler.set_epoch(2)
        known, before = list(sampler), dict(vars(sampler))
        feed = begin(DataLoader(data, 3, sampler=sampler), rank, 4, epoch=2)
        assert flat(rest(feed)) == sorted(known[: 3 if rank < 2 else 2])
        assert vars(sampler) == before, "the user's sampler stays what it was"


def test_data_sets_of_batches_are_dealt_out_too() -> None:
    class Batches(Dataset):
        def __len__(self) -> int:
            return 5

        def __getitem__(self, i: int) -> Any:
            return torch.zeros(2, 6), torch.zeros(2), torch.tensor([2 * i, 2 * i + 1])

    found = []
    for rank in range(3):
        sampler = DistributedSampler(Batches(), num_replicas=3, rank=rank)
        found.append(rest(begin(DataLoader(Batches(), None, sampler=sampler), rank, 3)))
    assert flat(found) == list(range(10))


def test_drop_last_and_other_samplers_stay_what_they_are() -> None:
    class Own(DistributedSampler):
        def __iter__(self) -> Iterator[Any]:
            return iter([*super().__iter__(), 0])

    data = Samples(10)
    dropped = [rest(begin(sharded(data, 4, rank, 4, drop_last=True), rank, 4)) for rank in range(4)]
    assert [len(flat(one)) for one in dropped] == [2] * 4
    assert len(set(flat(dropped))) == 8
    own = [flat(rest(begin(DataLoader(data, 4, sampler=Own(data, 4, rank)), rank, 4))) for rank in range(4)]
    assert [len(one) for one in own] == [4] * 4


class Total(Callback):
    def on_micro_end(self, state: Any) -> None:
        if not state.micro.training:
            self.read += state.micro.batch[2].tolist()

    def on_fit_start(self, state: Any) -> None:
        self.told, self.read = state.total_steps, list[int]()


def fit(train: Any, val: Any = None, **end: int) -> tuple[Loop, Total]:
    model, total = net(noise=False), Total()
    loop = Loop(model, adamw(model), [Seed(5), total])
    built_in(loop, loss_fn, train, val, **end)
    return loop, total


@pytest.mark.parametrize(("rank", "steps"), [(0, 3), (1, 2)])
def test_a_batch_of_a_repeat_alone_is_not_given(rank: int, steps: int, caplog: pytest.LogCaptureFixture) -> None:
    """Of 5 samples rank 1 of 2 has 2, where torch gives it 3; what is told of the epoch says so."""
    data = Samples(5)
    with caplog.at_level(logging.WARNING):
        loop, total = fit(sharded(data, 1, rank, 2), epochs=2)
    assert (loop.state.step, total.told) == (2 * steps, 2 * steps)
    assert not caplog.records


@pytest.mark.parametrize("more", [{}, {"num_workers": 1, "persistent_workers": True}])
def test_validation_reads_no_sample_twice(more: Any, recwarn: pytest.WarningsRecorder) -> None:
    read = [fit(sharded(Samples(8), 4, 0, 1), sharded(Samples(9), 2, rank, 4, **more), epochs=1)[1].read for rank in range(4)]
    assert flat(read) == list(range(9))
    assert not [w for w in recwarn if "says that it gives" in str(w.message)]


@pytest.mark.parametrize("more", [{}, {"drop_last": True}])
def test_a_rank_without_a_sample_says_so(more: Any) -> None:
    with pytest.raises(ValueError, match=r"rank 3 of 4 has no sample of its own: the data set holds 3.*fewer ranks"):
        fit(sharded(Samples(3), 2, 3, 4, **more), epochs=1)


def test_a_sampler_of_another_rank_is_refused() -> None:
    with pytest.raises(ValueError, match="rank=0, num_replicas=2, and this is rank 1 of 2; leave both out"):
        begin(sharded(Samples(9), 2, 0, 2), 1, 2)


# Positions


class Noisy(Samples):
    """Samples with noise of torch's global generator."""

    def __getitem__(self, i: int) -> Any:
        x, y, i = super().__getitem__(i)
        return x + torch.rand(6), y, i


def tensors(x: Any) -> bool:
    if isinstance(x, dict | list | tuple):
        return any(map(tensors, x.values() if isinstance(x, dict) else x))
    return isinstance(x, torch.Tensor)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("seeded", [True, False])
def test_a_position_holds_no_data_and_gives_the_same_bits(workers: int, seeded: bool) -> None:
    """Inside a loader batch, at its border, and with a batch read ahead of which nothing was used."""

    def feed(position: Any = None) -> Feed:
        loader = sharded(Noisy(27), 4, 1, 2, num_workers=workers)
        feed = Feed(None, lambda data: len(data[0]), True)
        feed.ranks, feed.rereads = 2, True
        feed.attach(loader)
        if position is not None:
            feed.load_state_dict(position)
        feed.open(0, 5, 1, seeded, CPU)
        return feed

    def left(feed: Feed) -> list[torch.Tensor]:
        found = []
        while feed.more():
            found += [chunk.data[0] for chunk in feed.gather(3, 1)]
        return found

    undisturbed = left(feed())
    for count in range(1, 5):
        for ahead in (False, True):
            going = feed()
            found = []
            for _ in range(count):
                going.more()
                found += [chunk.data[0] for chunk in going.gather(3, 1)]
            if ahead:
                going.more()
            position = going.state_dict()
            assert not tensors(position)
            torch.rand(count)
            found += left(feed(position))
            assert torch.equal(torch.cat(found), torch.cat(undisturbed))
            going.detach()


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("seeded", [True, False])
def test_a_run_that_reads_again_ends_with_the_same_bits(seeded: bool, workers: int, tmp_path: Path) -> None:
    """Killed at a step's end again and again, with dropout and random augmentation."""

    def train(folder: Path | None, kill: int | None = None) -> Loop:
        save = [Checkpoint(folder, every=1)] if folder else []
        model = net()
        loop = Loop(
            model, adamw(model), [*([Seed(5)] if seeded else []), DynamicBatchSize(3, 3), *save, KillAt(kill)], resume=folder
        )
        loop.feed.rereads = True
        built_in(loop, loss_fn, sharded(Noisy(30), 4, 1, 2, num_workers=workers), epochs=2)
        return loop

    expected = bits(train(None))
    for kill in (2, 4, 6, 8):
        with pytest.raises(Killed):
            train(tmp_path, kill)
    assert_same_bits(expected, bits(train(tmp_path)))


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        return iter([(torch.zeros(6), 0, i) for i in range(20)])


def test_what_cannot_be_read_again_is_kept() -> None:
    feed = begin(DataLoader(Stream(), 4), 0, 2)
    assert step(feed, 3) == [0, 1, 2]
    assert tensors(feed.state_dict()["left"])


# Another number of ranks


def run(data: Any, world: int, size: int, positions: Positions, steps: int, epoch: int = 0,
        plan: int | None = None, **more: Any) -> tuple[list[list[int]], Positions]:  # fmt: skip
    """The samples of each global step, and the position of every rank at the end."""
    feeds = []
    for rank in range(world):
        position = reshard(positions, rank, world, epoch) if positions else None
        feeds.append(begin(sharded(data, size, rank, world, **more), rank, world, position, epoch))
    found = [flat(one) for _ in range(steps) if any(one := [step(feed, plan) for feed in feeds])]
    return found, [feed.state_dict() for feed in feeds]


@pytest.mark.parametrize("epoch", [0, 2])
@pytest.mark.parametrize("order", [(2, 1, 3), (4, 2, 4), (1, 2, 1), (2, 3, 2)])
@pytest.mark.parametrize("count", [70, 72])
def test_rs6_each_global_step_has_the_samples_of_the_undisturbed_run(order: tuple[int, ...], epoch: int, count: int) -> None:
    data = Samples(count)
    for world in (1, 2, 3, 4):
        undisturbed, _ = run(data, world, 12 // world, [], 99, epoch)
        found, positions = list[list[int]](), Positions()
        for one, steps in zip(order, (2, 2, 99), strict=True):
            part, positions = run(data, one, 12 // one, positions, steps, epoch)
            found += part
        assert found == undisturbed
        assert len(found) == 6
    after, _ = run(data, 2, 6, positions, 99, epoch + 1)
    assert (after, flat(after)) == (run(data, 3, 4, [], 99, epoch + 1)[0], list(range(count)))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_law_each_sample_is_used_once_whatever_the_ranks(draw: Any) -> None:
    """Whatever the length, the sizes of loader batch and batch, the places of interruption, and the numbers of ranks."""
    whole = lambda most, least=1: draw.draw(st.integers(least, most))
    data, epoch, found, positions = Samples(whole(40)), whole(2, 0), list[Any](), Positions()
    shuffle, drop, most = draw.draw(st.booleans()), draw.draw(st.booleans()), 1
    for steps in (whole(4, 0), whole(4, 0), whole(4, 0), 99):
        plan = draw.draw(st.none() | st.integers(1, 6))
        most = max(most, world := whole(5))
        part, positions = run(data, world, whole(6), positions, steps, epoch, plan, shuffle=shuffle, drop_last=drop)
        found += part
    assert len(set(flat(found))) == len(flat(found)) > len(data) - (most if drop else 1)


@pytest.mark.parametrize(
    ("count", "world", "size", "drop", "used"), [(9, 2, 4, False, 9), (10, 3, 2, True, 9), (70, 3, 5, True, 30)]
)
def test_a_short_last_batch_counts_as_what_it_held(count: int, world: int, size: int, drop: bool, used: int) -> None:
    """Also where one rank alone had it."""
    _, positions = run(Samples(count), world, size, [], 2, drop_last=drop)
    assert not all(position["ended"] for position in positions)
    assert reshard(positions, 0, 1, 0)["begun"] == used


def test_from_one_process_that_kept_its_data() -> None:
    """A single process holds what is left of a batch in its position; two go on behind what it used of it."""
    data = Samples(30)
    first, positions = run(data, 1, 8, [], 1, plan=5)
    assert tensors(positions)
    after, _ = run(data, 2, 4, positions, 99)
    assert flat(first, after) == list(range(30))


@pytest.mark.parametrize(("plan", "accumulate"), [(None, 2), (24, 1)])
@pytest.mark.parametrize("worlds", [(2, 3, 3), (3, 2, 2), (2, 1, 2)])
def test_an_update_at_the_epochs_end_that_was_gathered_and_not_made_is_still_to_be_made(
        worlds: tuple[int, ...], plan: int | None, accumulate: int) -> None:  # fmt: skip
    """A save as it begins holds the position before it, though the loaders had ended by then."""
    data, feeds, found = Samples(34), list[Feed](), list[Any]()
    for world in worlds:
        before, feeds = [feed.state_dict() for feed in feeds], []
        for rank in range(world):
            position = reshard(before, rank, world, 0) if before else None
            feeds.append(feed := begin(sharded(data, 12 // world, rank, world), rank, world, position))
            gather = functools.partial(feed.gather, plan and plan // world, accumulate)
            found += [] if before else [gather()]
            assert feed.more()
            feed.again = gather()
    found += [feed.again for feed in feeds]
    assert flat([[int(i) for chunk in chunks for i in chunk.data[2]] for chunks in found]) == list(range(34))


def test_the_rest_of_an_epoch_has_random_numbers_of_its_own() -> None:
    """Else the rest would be augmented by the numbers that the epoch began with."""
    first = begin(sharded(Noisy(24), 4, 0, 2), 0, 2)
    first.more()
    position = reshard([{**first.state_dict(), "offset": 4}] * 2, 0, 1, 0)
    again = begin(sharded(Noisy(24), 4, 0, 1), 0, 1, position)
    again.more()
    noise = [feed.left.data[0] - feed.loader.dataset.x[feed.left.data[2]] for feed in (first, again) if feed.left]
    assert not torch.allclose(*noise)


def at(loader: Any, rank: int, world: int, steps: int = 1) -> dict[str, Any]:
    feed = begin(loader, rank, world)
    for _ in range(steps):
        step(feed)
    return feed.state_dict()


class Mine(BatchSampler):
    pass


data = Samples(24)
REFUSED: dict[str, tuple[Callable[[], Positions], str]] = {
    "plain shuffle": (lambda: [at(DataLoader(data, 4, shuffle=True), 0, 1)], r"RandomSampler gave .*num_replicas=1, rank=0\)"),
    "in order": (lambda: [at(DataLoader(data, 4), 0, 1)], "SequentialSampler gave its samples"),
    "own batches": (
        lambda: [at(DataLoader(data, batch_sampler=Mine(DistributedSampler(data, 3, r), 2, False)), r, 3) for r in range(3)],
        "which 3 ranks began and 2 can't take up.*torch's own BatchSampler.*an epoch's end",
    ),
    "stream": (lambda: [at(DataLoader(Stream(), 4), r, 3) for r in range(3)], "another kind of loader gave"),
    "list": (lambda: [at([(torch.zeros(2, 6), 0, torch.arange(2))] * 3, r, 3) for r in range(3)], "kind of loader gave"),
    "whole batches": (
        lambda: [at(DataLoader(data, None, sampler=DistributedSampler(data, 1, 0)), 0, 1, 0) | {"read": 1}],
        "can't take up",
    ),
    "uneven": (lambda: [at(sharded(data, 4, r, 3), r, 3, r) for r in range(3)], r"unequal parts of it: \[0, 4, 8\] samples"),
    "sizes": (lambda: [at(sharded(data, 2 + r, r, 3), r, 3) for r in range(3)], r"size was \[2, 3, 4\]"),
    "other data": (lambda: [at(sharded(Samples(24 + r), 4, r, 3), r, 3) for r in range(3)], "read different data"),
    "other loaders": (
        lambda: [at(sharded(data, 4, 0, 2), 0, 2), at(DataLoader(Stream(), 4), 1, 2), at(sharded(data, 4, 0, 2), 0, 2)],
        "can't take up",
    ),
    "one other loader": (
        lambda: [at(sharded(data, 4, 0, 3), 0, 3), at(DataLoader(Stream(), 4), 1, 3), at(sharded(data, 4, 2, 3), 2, 3)],
        "read different data",
    ),
    "epochs": (lambda: [at(sharded(data, 4, r, 3), r, 3) | {"epoch": -r} for r in range(3)], "read different data"),
    "another number": (lambda: [at(sharded(data, 4, 0, 2), 0, 1)], "DistributedSampler with num_replicas=2 gave"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_another_number_cannot_take_up_is_refused(kind: str) -> None:
    build, text = REFUSED[kind]
    positions = build()
    with pytest.raises(ValueError, match=text):
        reshard(positions, 0, 2, 0)
    assert reshard(positions * 2, 1, 2 * len(positions), 0) is (positions * 2)[1], "the same number needs none of it"


def test_wrong_arguments_are_named() -> None:
    for given_ in (([], 0, 1, 0), ([at(sharded(data, 4, 0, 1), 0, 1)], 2, 2, 0), ([{}], -1, 2, 0)):
        with pytest.raises(ValueError, match="0 <= rank < world and a position for each"):
            reshard(*given_)


def test_the_rest_takes_the_same_kind_of_sampler() -> None:
    positions = [at(sharded(data, 4, r, 2), r, 2) for r in range(2)]
    for loader in (DataLoader(data, 4, shuffle=True), [1, 2], DataLoader(Stream(), 4)):
        with pytest.raises(ValueError, match=r"used 8 samples, and this .* can't be told.*DistributedSampler"):
            begin(loader, 0, 1, reshard(positions, 0, 1, 0))
    for change, text in (
        ({"seed": 1}, "seed=1, drop_last=False here and shuffle=True, seed=0"),
        ({"shuffle": False}, "shuffle="),
    ):
        with pytest.raises(ValueError, match=text):
            begin(sharded(data, 4, 0, 1, **change), 0, 1, reshard(positions, 0, 1, 0))
    with pytest.raises(ValueError, match="holds 25 samples here and 24"):
        begin(sharded(Samples(25), 4, 0, 1), 0, 1, reshard(positions, 0, 1, 0))


@pytest.mark.parametrize("kind", ["plain shuffle", "own batches", "stream", "list"])
def test_at_an_epochs_end_any_loader_goes_on(kind: str) -> None:
    """Where the run has gone on to the next epoch, where its validation was still to come, and where nothing was used."""
    build, _ = REFUSED[kind]
    positions = build()
    anew = [rest(begin(sharded(data, 4, 1, 2), 1, 2, epoch=epoch)) for epoch in (0, 1)]
    assert rest(begin(sharded(data, 4, 1, 2), 1, 2, reshard(positions, 1, 2, 1), epoch=1)) == anew[1]
    unused = [p | {"read": 0, "offset": 0, "left": None} for p in positions]
    assert rest(begin(sharded(data, 4, 1, 2), 1, 2, reshard(unused, 1, 2, 0))) == anew[0]
    ended = [p | {"ended": True} for p in positions]
    for _ in range(2):
        feed = begin(DataLoader(Stream(), 4), 1, 2, reshard(ended, 1, 2, 0))
        assert (feed.more(), feed.empty) == (False, None)
        ended = [feed.state_dict()]
    feed.open(1, 5, 1, True, CPU)
    assert flat(rest(feed)) == list(range(20))


def test_an_epoch_of_which_nothing_is_left_ends() -> None:
    _, positions = run(data, 3, 4, [], 99)
    for world in (1, 2, 5):
        assert run(data, world, 4, positions, 9)[0] == []
    feed = begin(sharded(data, 4, 0, 1), 0, 1, reshard(positions, 0, 1, 0))
    assert feed.empty is None


# DL17: orders


class Fixed(Sampler[int]):
    """A shard of an order that is shuffled once and for all."""

    def __init__(self, count: int, generator: Any = None) -> None:
        self.order, self.generator = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist(), generator

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[int]:
        return iter(self.order)


class Told(Fixed):
    def set_epoch(self, epoch: int) -> None:
        pass


class Drawn(Fixed):
    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(len(self), generator=self.generator).tolist())


class Around(BatchSampler):
    """Holds a sampler where nobody looks for one to tell the epoch."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.sampler = inner, range(len(inner))  # type: ignore[assignment]
        super().__init__(self.sampler, 4, False)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(BatchSampler(self.inner, 4, False))


ORDERS: dict[str, tuple[Callable[[Any], DataLoader], bool]] = {
    "fixed": (lambda data: DataLoader(data, 4, sampler=Fixed(24)), False),
    "fixed in small batches": (lambda data: DataLoader(data, 1, sampler=Fixed(24)), False),
    "fixed, workers": (lambda data: DataLoader(data, 4, sampler=Fixed(24), num_workers=1), False),
    "never told": (lambda data: DataLoader(data, batch_sampler=Around(DistributedSampler(data, 2, 0))), False),
    "told": (lambda data: DataLoader(data, 4, sampler=Told(24)), True),
    "ascending": (lambda data: DataLoader(data, 4, sampler=range(1, 24, 2)), True),
    "drawn": (lambda data: DataLoader(data, 4, sampler=Drawn(24)), True),
    "drawn from its own": (lambda data: DataLoader(data, 4, sampler=Drawn(24, torch.Generator())), True),
    "torch's": (lambda data: DataLoader(data, 4, sampler=RandomSampler(data)), True),
    "distributed": (lambda data: sharded(data, 4, 0, 2), True),
    "too few to tell": (lambda data: DataLoader(data, 4, sampler=Fixed(3)), True),
}


def second(feed: Feed) -> bool:
    feed.open(1, 5, 0, True, CPU)
    return feed.more()


@pytest.mark.parametrize("kind", ORDERS)
def test_dl17_an_order_that_nothing_moves_is_refused(kind: str) -> None:
    """At the second epoch's start, under several ranks; the first epoch, and a single process, are left alone."""
    build, fine = ORDERS[kind]
    feed = begin(build(data), 0, 2)
    rest(feed)
    if fine:
        assert second(feed)
    else:
        with pytest.raises(ValueError, match=r"same shuffled order in epochs 0 and 1.*set_epoch\(epoch\).*`generator`"):
            second(feed)
    feed.detach()
    alone = begin(build(data), 0, 1)
    rest(alone)
    assert second(alone)
    alone.detach()


@pytest.mark.parametrize("kind", ["drawn", "torch's", "drawn from its own"])
def test_dl17_ranks_follow_one_order(kind: str) -> None:
    found = []
    for rank in range(2):
        torch.rand(rank)  # a process draws as it likes before
        found.append(rest(begin(ORDERS[kind][0](data), rank, 2)))
    assert found[0] == found[1]


# The same batch on two ranks


def test_the_digest_of_a_batch_is_that_of_its_bytes() -> None:
    x = torch.arange(6.0)
    make = lambda x, n=1: {"x": x, "n": [n, "a"]}
    alike, others = [make(x), make(x.clone())], [make(x + 1), make(x, 2), make(x.double()), make(x.view(2, 3))]
    assert len({first_batch_digest(one) for one in alike}) == 1
    assert len({first_batch_digest(one) for one in alike[:1] + others}) == 5
    forgotten = [begin(DataLoader(data, 4, shuffle=True), rank, 2) for rank in range(2)]
    dealt = [begin(sharded(data, 4, rank, 2), rank, 2) for rank in range(2)]
    same = []
    for feeds in (forgotten, dealt):
        assert all(feed.more() for feed in feeds)
        same.append(len({first_batch_digest(feed.left.data) for feed in feeds if feed.left}) == 1)
    assert same == [True, False]
