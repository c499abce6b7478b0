"""The laws over random schedules, sizes, data set lengths and loaders: 50 examples in the fast run, 1,000 in the slow one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers import FORMS, Samples, assert_same_bits, bits, loss_fn, net
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Sampler

from hookloop.callbacks import DynamicBatchSize, Epochs, GradientAccumulation, MicroBatch, NoiseScale, Plateau, Seed, Steps
from hookloop.callbacks.batch_policies import Policy
from hookloop.loop import Callback, Goal, Loop, State

fast = settings(max_examples=50, deadline=None, derandomize=True, database=None)
slow = settings(max_examples=1000, deadline=None, derandomize=True, database=None)
LOADERS = ("in order", "shuffled", "drop last", "iterable", "iterable drop last", "sampler", "batch sampler", "list")


class Stream(IterableDataset):
    """Samples one after another, with no length."""

    def __init__(self, data: Samples) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Any]:
        return (self.data[i] for i in range(len(self.data)))


class Odd(Sampler):
    """A sampler of the user's own: the odd positions backwards, then the even ones."""

    def __init__(self, count: int) -> None:
        self.order = [*range(count)][1::2][::-1] + [*range(count)][::2]

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[int]:
        return iter(self.order)


class Uneven:
    """A batch sampler of the user's own, whose batches hold 1 to `most` samples."""

    def __init__(self, count: int, most: int) -> None:
        self.batches, at = list[list[int]](), 0
        while at < count:
            size = 1 + (3 * len(self.batches) + 1) % most
            self.batches.append([*range(at, min(count, at + size))])
            at += size

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)


class Ramp(Policy):
    """A user's own policy."""

    def __init__(self, sizes: list[int]) -> None:
        self.sizes = sizes

    def size(self, state: State, grow: Callable[[int], int]) -> int:
        return self.sizes[(state.step + state.epoch) % len(self.sizes)]


@dataclass(frozen=True)
class Case:
    """One schedule over one loader; callbacks and loaders are made anew from it."""

    kind: str
    count: int
    loader_batch: int
    policy: str
    initial: int
    more: int
    growth: float
    every: int
    table: Mapping[int, int]
    accumulate: Any
    micro: int | None
    epochs: int

    @property
    def maximum(self) -> int:
        return self.initial + self.more

    def loader(self, dtype: torch.dtype = torch.float32) -> Any:
        data, size = Samples(self.count, dtype), self.loader_batch
        if self.kind == "list":
            rows = torch.arange(self.count).split(size)
            return [(data.x[r], data.y[r], r) for r in rows]
        if self.kind == "batch sampler":
            return DataLoader(data, batch_sampler=Uneven(self.count, size))
        if self.kind.startswith("iterable"):
            return DataLoader(Stream(data), size, drop_last="drop" in self.kind)
        sampler = Odd(self.count) if self.kind == "sampler" else None
        return DataLoader(data, size, sampler=sampler, shuffle=self.kind == "shuffled", drop_last="drop" in self.kind)

    @property
    def used(self) -> int:
        """Samples of an epoch."""
        return self.count // self.loader_batch * self.loader_batch if "drop" in self.kind else self.count

    @property
    def batches(self) -> list[int]:
        """Sizes of the loader's batches."""
        if self.kind == "batch sampler":
            return [len(b) for b in Uneven(self.count, self.loader_batch)]
        full, rest = divmod(self.used, self.loader_batch)
        return [self.loader_batch] * full + [rest] * (rest > 0)

    def callbacks(self) -> list[Callback]:
        """The schedule, as a user writes it."""
        policies: dict[str, Any] = {
            "epochs": lambda: self.every, "named epochs": lambda: Epochs(self.every), "steps": lambda: Steps(self.every),
            "table": lambda: dict(self.table), "step table": lambda: Steps({2 * k: v for k, v in self.table.items()}),
            "ramp": lambda: Ramp([*self.table.values()]), "goal": lambda: Goal("train_loss", patience=1),
            "plateau": lambda: Plateau(Goal("train_loss", "max", patience=1)),
            "noise": lambda: NoiseScale(every=1 + self.every, smoothing=0.5),
        }  # fmt: skip
        found: list[Callback] = [] if self.accumulate is None else [GradientAccumulation(self.accumulate)]
        if self.policy != "none":
            growth = 1.5 if "table" in self.policy else self.growth
            found.append(DynamicBatchSize(self.initial, self.maximum, growth, policies[self.policy]()))
        return found

    def plan(self, epoch: int, step: int) -> tuple[int | None, int]:
        """Batch size and accumulation, by the definition and not by the code."""
        n = self.accumulate or 1
        if isinstance(n, Mapping):
            n = n[max(k for k in n if k <= epoch)]
        if self.policy == "none":
            return None, n
        told = not self.kind.startswith("iterable")
        most = min(self.maximum, max(self.initial, self.used)) if told else self.maximum
        table = {2 * k: v for k, v in self.table.items()} if self.policy == "step table" else self.table
        if "table" in self.policy:
            at = epoch if self.policy == "table" else step
            before = [k for k in table if k <= at]
            return min(most, table[max(before)] if before else self.initial), n
        if self.policy == "ramp":
            sizes = [*table.values()]
            return min(most, sizes[(step + epoch) % len(sizes)]), n
        k = (step if self.policy == "steps" else epoch) // self.every
        size = float(self.initial)
        return min(most, max(self.initial, math.floor(size * self.growth**k) if k < 60 else most)), n

    def updates(self) -> list[list[int]]:
        """For each epoch the sizes of its updates, written out."""
        found: list[list[int]] = []
        step = 0
        for epoch in range(self.epochs):
            found.append([])
            left, batches = self.used, self.batches
            while left:
                size, n = self.plan(epoch, step)
                if size is None:
                    group, batches = batches[:n], batches[n:]
                    took = sum(group)
                else:
                    took = min(left, size * n)
                found[-1].append(took)
                left, step = left - took, step + 1
        return found


UNMEASURED = ("epochs", "named epochs", "steps", "table", "step table", "ramp")
MEASURED = ("goal", "plateau", "noise")


@st.composite
def cases(draw: Any, policies: tuple[str, ...], least: int = 1) -> Case:
    """A random case; a loader that drops its last batch has one at least."""
    initial, more = draw(st.integers(1, 9)), draw(st.integers(0, 30))
    table = draw(st.dictionaries(st.integers(0, 4), st.integers(1, initial + more), min_size=1, max_size=4))
    case = Case(
        kind=draw(st.sampled_from(LOADERS)), count=draw(st.integers(least, 45)), loader_batch=draw(st.integers(1, 12)),
        policy=draw(st.sampled_from(policies)), initial=initial, more=more, growth=draw(st.sampled_from([1.25, 1.5, 2, 3.7])),
        every=draw(st.integers(1, 4)), table=table,
        accumulate=draw(st.none() | st.integers(1, 4) | st.fixed_dictionaries({0: st.integers(1, 4), 2: st.integers(1, 4)})),
        micro=draw(st.one_of(st.none(), st.integers(1, 9))), epochs=draw(st.integers(1, 4)),
    )  # fmt: skip
    assume(case.used)
    return case


class Watch(Callback):
    """Keeps, for each update, its samples' positions and the gradient; and what was told at the start."""

    def __init__(self) -> None:
        self.epochs: list[list[list[int]]] = []
        self.gradients: list[Tensor] = []
        self.told: list[int | None] = []
        self.micros: list[int] = []

    def on_fit_start(self, state: State) -> None:
        self.told.append(state.total_steps)

    def on_epoch_start(self, state: State) -> None:
        self.epochs.append([])

    def on_micro_end(self, state: State) -> None:
        assert state.micro is not None
        rows = state.micro.batch[2].tolist()
        assert state.micro.index in (None, rows)
        if state.micro.number == 0:
            self.epochs[-1].append([])
        self.epochs[-1][-1] += rows
        self.micros.append(len(rows))

    def on_before_optimizer_step(self, state: State) -> None:
        self.gradients.append(torch.cat([g.flatten() for g in state.grads]))


def near(found: Tensor, expected: Tensor) -> None:
    assert torch.linalg.norm(found - expected) <= 1e-12 * torch.linalg.norm(expected)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def cut(form: Any, case: Case) -> None:
    """Gradients and weights are those of one batch an update, written out by hand; updates hold what was planned."""
    model, watch, data = net(torch.float64, noise=False), Watch(), Samples(case.count, torch.float64)
    micro = [] if case.micro is None else [MicroBatch(case.micro)]
    loop = Loop(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5), [*case.callbacks(), *micro, watch])
    form(loop, loss_fn, case.loader(torch.float64), epochs=case.epochs)
    assert [[len(rows) for rows in epoch] for epoch in watch.epochs] == case.updates()
    assert max(watch.micros) <= (case.micro or math.inf)
    other = net(torch.float64, noise=False)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.5)
    for rows, found in zip([rows for epoch in watch.epochs for rows in epoch], watch.gradients, strict=True):
        optimizer.zero_grad()
        nn.functional.cross_entropy(other(data.x[rows]), data.y[rows]).backward()
        near(found, torch.cat([p.grad.flatten() for p in other.parameters() if p.grad is not None]))
        optimizer.step()
    near(flat(model), flat(other))


def one_pass(form: Any, case: Case) -> None:
    """Each sample is used exactly once an epoch, whatever the schedule measures or was told."""
    model, watch = net(noise=False), Watch()
    micro = [] if case.micro is None else [MicroBatch(case.micro)]
    loop = Loop(model, torch.optim.SGD(model.parameters(), lr=0.1), [*case.callbacks(), *micro, watch])
    state = form(loop, loss_fn, case.loader(), epochs=case.epochs)
    read = [[i for rows in epoch for i in rows] for epoch in watch.epochs]
    assert [len(rows) for rows in read] == [case.used] * case.epochs
    for rows in read:
        assert len(set(rows)) == case.used
        if "drop" not in case.kind:
            assert sorted(rows) == [*range(case.count)]
    assert state.samples == case.used * case.epochs
    assert state.step == sum(len(epoch) for epoch in watch.epochs)


def told(form: Any, case: Case, steps: int | None) -> None:
    """The updates told at the start are those that happen; None where growth is measured or data have no length."""

    def run(steps: int | None) -> tuple[Any, int]:
        model, watch = net(noise=False), Watch()
        loop = Loop(model, torch.optim.SGD(model.parameters(), lr=0.1), [*case.callbacks(), watch])
        state = form(loop, loss_fn, case.loader(), epochs=case.epochs, steps=steps)
        (said,) = watch.told
        return said, state.step

    said, happened = run(None)
    known = case.policy not in MEASURED and not case.kind.startswith("iterable")
    if case.policy not in MEASURED:
        assert happened == sum(len(epoch) for epoch in case.updates())
    assert said == (happened if known else None)
    if steps is not None:
        said, taken = run(steps)
        assert taken == min(steps, happened)
        assert said == (taken if known else steps)


class Tally(nn.Module):
    """A buffer that each training forward changes, of any number of samples."""

    def __init__(self) -> None:
        super().__init__()
        self.mean: Tensor
        self.register_buffer("mean", torch.zeros(12))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        return x - self.mean


def noisy() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 12), Tally(), nn.Dropout(0.3), nn.ReLU(), nn.Linear(12, 3))


class From(Callback):
    """Uses a micro-batch size from a given attempt on."""

    owns = ("micro_batch_size",)

    def __init__(self, start: int, size: int | None) -> None:
        self.start, self.size = start, size

    def on_step_start(self, state: State) -> None:
        if state.step >= self.start:
            state.micro_batch_size = self.size


class Used(Callback):
    """Keeps the micro-batch size that each update was made with."""

    def __init__(self) -> None:
        self.sizes: list[int | None] = []

    def on_before_optimizer_step(self, state: State) -> None:
        self.sizes.append(state.micro_batch_size)


def out_of_memory(form: Any, case: Case, limit: int, start: int, where: str, seeded: bool) -> bool:
    """A run that met it is the run that used the smaller size from that step on, to the bit; says whether it met it."""

    def run(choose: Callback, fails: bool) -> tuple[Any, list[int | None]]:
        seed = [Seed(2)] if seeded else []
        model, used = noisy(), Used()
        torch.manual_seed(11)

        def fail(_: Any) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

        def loss(model: nn.Module, batch: Any) -> Any:
            logits = model(batch[0])
            if fails and loop.state.step >= start and len(batch[0]) > limit:
                if where == "forward":
                    fail(None)
                logits.register_hook(fail)
            return nn.functional.cross_entropy(logits, batch[1])

        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        loop = Loop(model, optimizer, [*seed, *case.callbacks(), choose, used])
        form(loop, loss, case.loader(), epochs=case.epochs)
        return bits(loop), used.sizes

    found, sizes = run(MicroBatch("auto"), True)
    met = next((i for i, size in enumerate(sizes) if size is not None), None)
    if met is None:
        smaller: tuple[int, int | None] = (0, None)
    else:
        assert met >= start
        size = sizes[met]
        assert size is not None
        assert size <= limit
        assert sizes == [None] * met + [size] * (len(sizes) - met)
        smaller = (met, size)
    expected, others = run(From(*smaller), False)
    assert sizes == others
    assert_same_bits(found, expected)
    return met is not None


both = pytest.mark.parametrize("form", FORMS)
trial = {"case": cases(("none", *UNMEASURED, *MEASURED), 12), "limit": st.integers(1, 5), "start": st.integers(0, 4),
         "where": st.sampled_from(["forward", "backward"]), "seeded": st.booleans()}  # fmt: skip


@both
@given(cases(("none", *UNMEASURED)))
@fast
def test_cut(form: Any, case: Case) -> None:
    cut(form, case)


@both
@given(cases(("none", *UNMEASURED, *MEASURED)))
@fast
def test_one_pass(form: Any, case: Case) -> None:
    one_pass(form, case)


@both
@given(cases(("none", *UNMEASURED, *MEASURED)), st.none() | st.integers(1, 60))
@fast
def test_told_in_advance(form: Any, case: Case, steps: int | None) -> None:
    told(form, case, steps)


@both
def test_out_of_memory(form: Any) -> None:
    met = []

    @given(**trial)
    @fast
    def property(case: Case, limit: int, start: int, where: str, seeded: bool) -> None:
        met.append(out_of_memory(form, case, limit, start, where, seeded))

    property()
    assert sum(met) > len(met) // 5  # the law is about those


@both
@given(cases(("none", *UNMEASURED)))
@slow
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_cut_at_length(form: Any, case: Case) -> None:
    cut(form, case)


@both
@given(cases(("none", *UNMEASURED, *MEASURED)))
@slow
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_one_pass_at_length(form: Any, case: Case) -> None:
    one_pass(form, case)


@both
@given(cases(("none", *UNMEASURED, *MEASURED)), st.none() | st.integers(1, 60))
@slow
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_told_in_advance_at_length(form: Any, case: Case, steps: int | None) -> None:
    told(form, case, steps)


@both
@given(**trial)
@slow
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_out_of_memory_at_length(form: Any, case: Case, limit: int, start: int, where: str, seeded: bool) -> None:
    out_of_memory(form, case, limit, start, where, seeded)
