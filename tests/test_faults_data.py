"""Data of every kind, and the faults that they bring: what is cut, joined, weighed, held in memory, or refused."""

from __future__ import annotations

import gc
import itertools
import math
import multiprocessing
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from helpers import FORMS, Samples, adamw, assert_same_bits, bits, loader, loss_fn, net
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from hookloop.callbacks import (
    DynamicBatchSize,
    GradientAccumulation,
    MicroBatch,
    NoiseScale,
    Seed,
    Steps,
)
from hookloop.loop import Callback, Loop, State

data = Samples(43, torch.float64)


class Gradients(Callback):
    """Keeps what the optimizer is about to see."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def on_before_optimizer_step(self, state: State) -> None:
        self.seen.append(torch.cat([g.flatten() for g in state.grads]))


class Micros(Callback):
    """Keeps, for each try of an update, the sizes of its micro-batches."""

    def __init__(self) -> None:
        self.sizes: list[list[int]] = []

    def on_step_start(self, state: State) -> None:
        self.sizes.append([])

    def on_micro_end(self, state: State) -> None:
        assert state.micro is not None
        self.sizes[-1].append(state.micro.size)


def expected(rows: Any) -> Tensor:
    """The gradient of the plain mean over these samples."""
    model = net(torch.float64, noise=False)
    nn.functional.cross_entropy(model(data.x[rows]), data.y[rows]).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def near(found: Tensor, wanted: Tensor) -> None:
    assert torch.linalg.norm(found - wanted) <= 1e-12 * torch.linalg.norm(wanted)


def still() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = net(torch.float64, noise=False)
    return model, torch.optim.SGD(model.parameters(), lr=0.0)


# Loaders and structures: nested batches that hold strings


class Nested(Dataset):
    """A sample: a nested structure with a name, words of its own, and a number."""

    def __len__(self) -> int:
        return 43

    def __getitem__(self, i: int) -> Any:
        return {"in": {"x": data.x[i], "name": f"n{i}"}, "out": (data.y[i], {"at": i, "word": "w" * (i % 5)})}


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        return (Nested()[i] for i in range(43))


class Backwards(Sampler):
    def __len__(self) -> int:
        return 43

    def __iter__(self) -> Iterator[int]:
        return iter(range(42, -1, -1))


def nested_loss(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch["in"]["x"]), batch["out"][0])


BATCHES = [[0, 1, 2], [*range(3, 20)], [20], [*range(21, 43)]]
KINDS: dict[str, Callable[[], Any]] = {
    "map": lambda: DataLoader(Nested(), 8, shuffle=True),
    "drop last": lambda: DataLoader(Nested(), 8, shuffle=True, drop_last=True),
    "iterable": lambda: DataLoader(Stream(), 8),
    "iterable drop last": lambda: DataLoader(Stream(), 8, drop_last=True),
    "sampler": lambda: DataLoader(Nested(), 8, sampler=Backwards()),
    "batch sampler": lambda: DataLoader(Nested(), batch_sampler=BATCHES),
    "workers": lambda: DataLoader(Nested(), 8, num_workers=2, shuffle=True),
    "persistent": lambda: DataLoader(Nested(), 8, num_workers=1, persistent_workers=True, shuffle=True),
    "iterable in a worker": lambda: DataLoader(Stream(), 8, num_workers=1),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_nested_batches_with_strings_from_every_loader(form: Any, kind: str) -> None:
    """Names and words go with their samples through every cut and join; the gradient is that of the step's plain mean."""
    model, optimizer = still()
    gradients, rows = Gradients(), list[list[int]]()

    class See(Callback):
        def on_micro_end(self, state: State) -> None:
            assert state.micro is not None
            batch = state.micro.batch
            at = batch["out"][1]["at"].tolist()
            assert list(batch["in"]["name"]) == [f"n{i}" for i in at]
            assert list(batch["out"][1]["word"]) == ["w" * (i % 5) for i in at]
            assert torch.equal(batch["in"]["x"], data.x[at])
            assert state.micro.size == len(at)
            if not state.micro.number:
                rows.append([])
            rows[-1] += at

    callbacks = [DynamicBatchSize(5, 18, 2), GradientAccumulation({0: 1, 1: 2}), MicroBatch(7), gradients, See()]
    state = form(Loop(model, optimizer, callbacks), nested_loss, KINDS[kind](), epochs=3)
    used = 40 if "drop" in kind else 43
    assert state.samples == 3 * used
    sizes = [5] * (used // 5) + [3] * (used % 5 > 0) + [20] * (used // 20) + [3] * (used % 20 > 0) + [36, used - 36]
    assert [len(step) for step in rows] == sizes
    for step, found in zip(rows, gradients.seen, strict=True):
        near(found, expected(step))
    for epoch in np.split(np.array([i for step in rows for i in step]), 3):
        assert len(set(epoch.tolist())) == used


def collate(samples: list[tuple[Tensor, str]]) -> Any:
    """Pads to the longest of this batch."""
    return nn.utils.rnn.pad_sequence([x for x, _ in samples], True, -1.0), [name for _, name in samples]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("micro", [None, 2])
def test_padded_batches_are_joined_only_where_lengths_agree(form: Any, micro: int | None) -> None:
    """By tokens: the mean over all tokens of the step, whatever lengths its batches were padded to."""
    lengths = [2, 3, 3, 1, 5, 2, 4, 4, 4, 1, 3, 3, 2, 6]
    texts = [(torch.linspace(i, i + 1, n, dtype=torch.float64), f"t{i}") for i, n in enumerate(lengths)]
    widths, names, found = [], list[list[str]](), []

    class See(Callback):
        def on_step_start(self, state: State) -> None:
            names.append([])
            widths.append([])

        def on_micro_end(self, state: State) -> None:
            assert state.micro is not None
            names[-1] += state.micro.batch[1]
            widths[-1].append(tuple(state.micro.batch[0].shape))
            assert state.micro.weight == (state.micro.batch[0] >= 0).sum()

        def on_before_optimizer_step(self, state: State) -> None:
            found.append(state.grads[0].item())

    model = nn.Linear(1, 1, bias=False).double()
    callbacks = [DynamicBatchSize(4, 4), *([] if micro is None else [MicroBatch(micro)]), See()]
    loop = Loop(model, torch.optim.SGD(model.parameters(), lr=0.0), callbacks, weigh=lambda b: (b[0] >= 0).sum())

    def loss(model: Any, batch: Any) -> Tensor:
        return (model.weight * batch[0][batch[0] >= 0]).mean()

    state = form(loop, loss, DataLoader(texts, 3, collate_fn=collate), epochs=1)  # type: ignore[arg-type]
    assert state.total_steps == state.step == 4
    assert names == [[f"t{i}" for i in range(a, min(14, a + 4))] for a in range(0, 14, 4)]
    for step, value in zip(names, found, strict=True):
        tokens = torch.cat([texts[int(name[1:])][0] for name in step])
        assert value == pytest.approx(tokens.mean().item(), rel=1e-12)
    if micro is None:  # 3 | 5 | 4 | 3 | 6 wide
        assert widths == [[(3, 3), (1, 5)], [(2, 5), (2, 4)], [(1, 4), (3, 3)], [(2, 6)]]


def test_batches_padded_alike_are_joined() -> None:
    texts = [(torch.ones(n, dtype=torch.float64), "t") for n in (2, 3, 3, 1, 3, 2)]
    shapes = []

    class See(Callback):
        def on_micro_end(self, state: State) -> None:
            assert state.micro is not None
            shapes.append((tuple(state.micro.batch[0].shape), state.micro.batch[1]))

    model = nn.Linear(1, 1, bias=False).double()
    loop = Loop(model, torch.optim.SGD(model.parameters(), lr=0.0), [DynamicBatchSize(5, 5), See()])
    loop.fit(lambda m, b: (m.weight * b[0]).mean(), DataLoader(texts, 3, collate_fn=collate), epochs=1)  # type: ignore[arg-type]
    assert shapes == [((5, 3), ["t"] * 5), ((1, 3), ["t"])]


# Weights of zero


def weighted(model: nn.Module, batch: Any) -> Tensor:
    """A mean over what is not masked: 0/0 where all is."""
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def masked(groups: list[list[int]]) -> list[Any]:
    """Batches of 4 samples, of which so many count."""
    found = []
    for i, n in enumerate(itertools.chain.from_iterable(groups)):
        rows = slice(4 * i, 4 * i + 4)
        y = data.y[rows].clone()
        y[n:] = -100
        found.append((data.x[rows], y, torch.arange(4 * i, 4 * i + 4)))
    return found


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("group", [[0, 3], [3, 0], [2, 0, 4], [0, 0, 1], [4, 4, 0, 1], [0, 4, 0]])
@pytest.mark.parametrize("micro", [None, 1, 3])
@pytest.mark.parametrize("watch", [False, True])
def test_a_micro_batch_of_weight_zero_takes_no_part(form: Any, group: list[int], micro: int | None, watch: bool) -> None:
    model, optimizer = still()
    gradients, seen = Gradients(), []

    class See(Callback):
        def on_micro_end(self, state: State) -> None:
            assert state.micro is not None
            seen.append(state.micro.weight)

    callbacks = [GradientAccumulation(len(group)), *([] if micro is None else [MicroBatch(micro)]), gradients, See(),
                 *([NoiseScale(2)] if watch else [])]  # fmt: skip
    loop = Loop(model, optimizer, callbacks, weigh=lambda b: (b[1] != -100).sum())
    state = form(loop, weighted, masked([group]), epochs=1)
    assert (state.step, state.skipped, state.skip_reason) == (1, 0, None)
    rows = [4 * i + j for i, n in enumerate(group) for j in range(n)]
    near(gradients.seen[0], expected(rows))
    assert min(seen) > 0
    assert sum(seen) == sum(group)
    assert math.isfinite(float(state.metrics["loss"]))
    assert float(state.metrics["loss"]) == pytest.approx(state.metrics["train_loss"], rel=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("where", [0, 1, 2])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_group_of_weight_zero_is_skipped(form: Any, where: int, scaled: bool) -> None:
    """A clear skip: weights, optimizer and metrics as they were, to the bit; the run that lacks the group goes the same way."""
    groups = [[4, 2], [3, 4], [1, 1]]
    empty = [*groups[:where], [0, 0], *groups[where:]]
    reasons, kept = [], []

    class See(Callback):
        def on_step_start(self, state: State) -> None:
            reasons.append(state.skip_reason)
            kept.append(bits(loop))

    def make(more: list[Callback]) -> Loop:
        model = net(torch.float64, noise=False)
        scaler = torch.amp.GradScaler("cpu") if scaled else None
        return Loop(model, adamw(model), [GradientAccumulation(2), *more], weigh=lambda b: (b[1] != -100).sum(), scaler=scaler)

    loop, other = make([See(), NoiseScale(2)]), make([])
    state = form(loop, weighted, masked(empty), epochs=1)
    assert (state.step, state.skipped, state.samples) == (3, 1, 32)
    if where < 2:
        assert reasons[where + 1] == "the weights of the whole step sum to 0"
        assert_same_bits(kept[where], kept[where + 1])
    assert state.skip_reason is None
    batches = masked(empty)
    form(other, weighted, batches[: 2 * where] + batches[2 * where + 2 :], epochs=1)
    assert_same_bits(bits(loop), bits(other))
    assert state.metrics["train_loss"] == other.state.metrics["train_loss"]


@pytest.mark.parametrize("form", FORMS)
def test_nothing_but_weight_zero_ends_with_a_reason(form: Any) -> None:
    model = net(torch.float64, noise=False)
    loop = Loop(model, adamw(model), [GradientAccumulation(2)], weigh=lambda b: (b[1] != -100).sum(), max_skips=3)
    before = bits(loop)
    with pytest.raises(RuntimeError, match=r"3 updates in a row were skipped .*the weights of the whole step sum to 0"):
        form(loop, weighted, masked([[0, 0]] * 5), epochs=1)
    assert_same_bits(before, bits(loop))


# A batch of no sample (from a collate_fn that filters) weighs nothing: its mean loss is 0/0.
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("callbacks", [[lambda: GradientAccumulation(3)], [lambda: DynamicBatchSize(6, 6)],
                                       [lambda: GradientAccumulation(3), lambda: MicroBatch(2)]])  # fmt: skip
def test_a_loader_batch_of_no_sample_takes_no_part(form: Any, callbacks: Any) -> None:
    model, optimizer = still()
    gradients, losses = Gradients(), []

    class See(Callback):
        def on_step_end(self, state: State) -> None:
            losses.append(float(state.metrics["loss"]))

    batches = [(data.x[rows], data.y[rows], torch.arange(43)[rows]) for rows in (slice(0, 4), slice(4, 4), slice(4, 6))]
    form(Loop(model, optimizer, [*(make() for make in callbacks), gradients, See()]), loss_fn, batches, epochs=1)
    (found,) = gradients.seen
    near(found, expected(slice(0, 6)))
    assert all(map(math.isfinite, losses))


@pytest.mark.parametrize("form", FORMS)
def test_a_step_of_no_sample_is_skipped(form: Any) -> None:
    model, reasons, kept = net(torch.float64, noise=False), [], []

    class See(Callback):
        def on_step_start(self, state: State) -> None:
            reasons.append(state.skip_reason)
            kept.append(bits(loop))

    batches = [(data.x[rows], data.y[rows], torch.arange(43)[rows]) for rows in (slice(0, 4), slice(4, 4), slice(4, 6))]
    loop = Loop(model, adamw(model), [See()])
    state = form(loop, loss_fn, batches, epochs=1)
    assert_same_bits(kept[1], kept[2])
    assert math.isfinite(state.metrics["train_loss"])
    assert (state.step, state.skipped) == (2, 1)
    assert reasons[2] is not None


# What a step holds in host memory


class Memory:
    """Loader batches of 8 samples of value `number`, each in memory of its own, of which it is known when it is let go."""

    def __init__(self, count: int = 12) -> None:
        self.count = count
        self.made: list[weakref.ref[Any]] = []

    def make(self) -> Tensor:
        array = np.full((8, 4), len(self.made), dtype=np.float32)
        self.made.append(weakref.ref(array))  # a storage made of an array holds it
        return torch.from_numpy(array)

    @property
    def alive(self) -> set[int]:
        return {i for i, array in enumerate(self.made) if array() is not None}

    def loader(self, kind: str) -> Any:
        outer = self

        class Map(Dataset):
            def __len__(self) -> int:
                return outer.count

            def __getitem__(self, i: int) -> Tensor:
                return outer.make()

        class Bare:
            def __iter__(self) -> Iterator[Tensor]:
                return (outer.make() for _ in range(outer.count))

        class Streamed(Bare, IterableDataset):
            pass

        return Bare() if kind == "iterable" else DataLoader(Map() if kind == "map" else Streamed(), batch_size=None)


PLANS: dict[str, list[Callable[[], Callback]]] = {
    "plain": [],
    "accumulated": [lambda: GradientAccumulation(3)],
    "cut": [lambda: MicroBatch(3)],
    "cut, with a redo": [lambda: MicroBatch("auto")],
    "small": [lambda: DynamicBatchSize(3, 3)],
    "joined": [lambda: DynamicBatchSize(16, 16)],
    "joined, unaligned": [lambda: DynamicBatchSize(20, 20)],
    "joined, hardly unaligned": [lambda: DynamicBatchSize(9, 9)],
    "gathered": [lambda: DynamicBatchSize(5, 5), lambda: GradientAccumulation(3)],
    "growing": [lambda: DynamicBatchSize(2, 32, 2, every=Steps(2)), lambda: Seed(0)],
}


def held(form: Any, kind: str, plan: str) -> list[tuple[set[int], set[int], set[int]]]:
    """For each update the loader batches that it holds samples of, those that its micro-batches lie in, those alive."""
    memory, rows = Memory(), list[tuple[set[int], set[int], set[int]]]()
    own: set[int] = set()
    seen: set[int] = set()

    class See(Callback):
        def on_step_start(self, state: State) -> None:
            own.clear()
            seen.clear()

        def on_micro_end(self, state: State) -> None:
            assert state.micro is not None
            mine = {int(i) for i in state.micro.batch[:, 0].unique().tolist()}
            own.update(mine)
            seen.update(mine if len(mine) == 1 else ())  # more than one are joined: a copy

        def on_before_optimizer_step(self, state: State) -> None:
            rows.append((set(own), set(seen), memory.alive))

    model = nn.Linear(4, 1)
    loop = Loop(model, torch.optim.SGD(model.parameters(), lr=0.0), [*(make() for make in PLANS[plan]), See()])
    gc.disable()  # no cycle may be what lets data go
    try:
        form(loop, lambda m, b: m(b).mean(), memory.loader(kind), epochs=2)
    finally:
        gc.enable()
    assert len(memory.made) == 24
    return rows


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["map", "iterable", "iterable data set"])
@pytest.mark.parametrize("plan", PLANS)
def test_a_step_holds_no_data_of_another(form: Any, kind: str, plan: str) -> None:
    for mine, _, alive in held(form, kind, plan):
        assert alive <= mine, f"data of another step is held: batches {sorted(alive - mine)} beside {sorted(mine)}"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("plan", PLANS)
def test_a_step_holds_at_most_one_loader_batch_beside_its_own_data(form: Any, plan: str) -> None:
    for _, seen, alive in held(form, "map", plan):
        assert len(alive - seen) <= 1, f"beside its own data a step holds loader batches {sorted(alive - seen)}"


# DL8: leaves of different first dimensions


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("callback", [lambda: MicroBatch(4), lambda: DynamicBatchSize(5, 5), lambda: NoiseScale(2)])
@pytest.mark.parametrize("first", ["x", "w"])
def test_dl8_leaves_of_different_first_dimensions(form: Any, callback: Any, first: str) -> None:
    """Whoever cuts, the error names the leaf, both sizes and the remedy, before anything was trained on."""
    leaves = {"x": data.x[:8], "w": torch.zeros(3)}
    batch = {name: leaves[name] for name in sorted(leaves, reverse=first == "x")}
    model, optimizer = still()
    loop = Loop(model, optimizer, [callback()])
    other = "w" if first == "x" else "x"
    sizes = (8, 3) if first == "x" else (3, 8)
    if first == "w":  # nothing is cut where 3 samples are all that is seen
        loop = Loop(model, optimizer, [MicroBatch(2)])
    with pytest.raises(ValueError, match=rf"batch\['{other}'\] holds {sizes[1]} .* {sizes[0]} samples.*Loop\(\.\.\., cut=fn"):
        form(loop, lambda m, b: m(b["x"]).mean(), [batch] * 3, epochs=1)
    assert loop.state.step == 0


@pytest.mark.parametrize("form", FORMS)
def test_dl8_the_remedy_helps(form: Any) -> None:
    batch = {"x": data.x[:8], "y": data.y[:8], "w": torch.ones(3)}
    (model, optimizer), gradients = still(), Gradients()
    loop = Loop(model, optimizer, [MicroBatch(3), gradients],
                cut=lambda b, i, j: {"x": b["x"][i:j], "y": b["y"][i:j], "w": b["w"]})  # fmt: skip
    form(loop, lambda m, b: nn.functional.cross_entropy(m(b["x"]), b["y"]) * b["w"].mean(), [batch], epochs=1)
    near(gradients.seen[0], expected(slice(0, 8)))


# DL9: fewer samples than micro-batches


class Least(Callback):
    """Asks for four micro-batches at least, as one that measures may."""

    def on_step_start(self, state: State) -> None:
        state.least_micros = 4


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("count", "size", "callbacks", "last"), [
    (3, 4, [lambda: MicroBatch(1)], [1, 1, 1]),
    (11, 8, [lambda: MicroBatch(2)], [2, 1]),
    (19, 16, [lambda: MicroBatch(4)], [3]),
    (3, 3, [Least], [1, 1, 1]),
    (11, 8, [Least], [1, 1, 1]),
    (3, 1, [lambda: GradientAccumulation(4)], [1, 1, 1]),
    (3, 3, [lambda: DynamicBatchSize(1, 1), lambda: GradientAccumulation(4)], [1, 1, 1]),
    (7, 7, [lambda: DynamicBatchSize(4, 4), lambda: GradientAccumulation(4), lambda: MicroBatch(1)], [1] * 7),
    (9, 4, [lambda: NoiseScale(2)], [1]),
])  # fmt: skip
def test_dl9_fewer_samples_than_micro_batches(form: Any, count: int, size: int, callbacks: Any, last: list[int]) -> None:
    """Fewer micro-batches, none of them empty, and the gradient of the plain mean."""
    (model, optimizer), gradients, micros = still(), Gradients(), Micros()
    train = DataLoader(Samples(count, torch.float64), size)
    state = form(Loop(model, optimizer, [*(make() for make in callbacks), gradients, micros]), loss_fn, train, epochs=1)
    assert micros.sizes[-1] == last
    assert min(itertools.chain.from_iterable(micros.sizes)) >= 1
    assert sum(itertools.chain.from_iterable(micros.sizes)) == count == state.samples
    full = Samples(count, torch.float64)
    model = net(torch.float64, noise=False)
    nn.functional.cross_entropy(model(full.x[-sum(last) :]), full.y[-sum(last) :]).backward()
    near(gradients.seen[-1], torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))


# DL20: loaders without end, or made anew


def everything() -> list[Callback]:
    return [Seed(0), GradientAccumulation(2), DynamicBatchSize(5, 12, every=NoiseScale(2, 0.5)), MicroBatch("auto"),
            NoiseScale(3).named("another")]  # fmt: skip


class Endless:
    """Makes batches without end, and knows which are alive."""

    def __init__(self) -> None:
        self.made, self.alive = 0, set[weakref.ref[Tensor]]()

    def __iter__(self) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(0)
        while True:
            x = torch.randn(4, 6, generator=generator)
            self.alive.add(weakref.ref(x, self.alive.discard))
            self.made += 1
            yield x, torch.zeros(4, dtype=torch.int64)


class Flat(Callback):
    """Counts, at each update, what is alive; the second half of a run must hold no more than the first."""

    def __init__(self, alive: Callable[[], int]) -> None:
        self.alive, self.counts = alive, list[tuple[int, int]]()
        gc.freeze()  # what is there already is neither counted nor looked through

    def on_step_end(self, state: State) -> None:
        if state.step % 7 == 0:
            gc.collect()
            self.counts.append((self.alive(), len(gc.get_objects())))

    def check(self, slack: int = 60) -> None:
        half = len(self.counts) // 2
        early, late = self.counts[half // 2 : half], self.counts[half:]
        assert max(alive for alive, _ in late) <= max(alive for alive, _ in early)
        assert max(objects for _, objects in late) <= max(objects for _, objects in early) + slack


def simple(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize(("form", "iterator"), [(FORMS[0], True), pytest.param(FORMS[1], False, marks=pytest.mark.slow)])
def test_dl20_data_without_end(form: Any, iterator: bool) -> None:
    """Stops at the steps, reads no batch more than one ahead, and holds as much at the end as at the start."""
    endless = Endless()
    flat = Flat(lambda: len(endless.alive))
    model = net(noise=False)
    state = form(Loop(model, adamw(model), [*everything(), flat]), simple, iter(endless) if iterator else endless, steps=140)
    assert (state.step, state.epoch, state.total_steps) == (140, 0, 140)
    assert state.stop_reason is None
    assert 4 * endless.made - 4 <= state.samples <= 4 * endless.made
    flat.check()


@pytest.mark.parametrize("form", FORMS[:1])
def test_dl20_a_cycle(form: Any) -> None:
    batches = [(torch.randn(4, 6), torch.zeros(4, dtype=torch.int64)) for _ in range(5)]
    flat, model = Flat(lambda: 0), net(noise=False)
    state = form(Loop(model, adamw(model), [*everything(), flat]), simple, itertools.cycle(batches), steps=140)
    assert (state.step, state.epoch, state.total_steps) == (140, 0, 140)
    flat.check()


def test_dl20_a_loader_made_anew_in_each_epoch() -> None:
    """By hand: no loader, data set or batch of an epoch outlives it (but for the first, which `state.loader` names)."""
    made: list[weakref.ref[Any]] = []
    model = net(noise=False)
    flat = Flat(lambda: sum(one() is not None for one in made))
    loop = Loop(model, adamw(model), [*everything(), flat])

    def anew() -> DataLoader:
        found = loader(24, 4)
        made.extend([weakref.ref(found), weakref.ref(found.dataset)])
        return found

    with loop:
        for _ in loop.epochs(30):
            for step in loop.steps(anew()):
                for micro in step:
                    with micro:
                        micro.backward(loss_fn)
                loop.update()
    assert loop.state.epoch == 30
    assert loop.state.samples == 30 * 24
    assert max(alive for alive, _ in flat.counts) <= 4
    flat.check()


def test_dl20_persistent_workers_made_anew_in_each_epoch() -> None:
    model, alive = net(noise=False), []
    loop = Loop(model, adamw(model), [Seed(0), GradientAccumulation(2)])
    with loop:
        for _ in loop.epochs(4):
            for step in loop.steps(loader(24, 4, num_workers=1, persistent_workers=True)):
                for micro in step:
                    with micro:
                        micro.backward(loss_fn)
                loop.update()
            gc.collect()
            alive.append(len(multiprocessing.active_children()))
    assert max(alive) <= 1, alive
    gc.collect()
    assert not multiprocessing.active_children()
