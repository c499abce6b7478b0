"""A rank whose data have ended takes part in the others' steps and leaves no trace, also where it resumes just there."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import many
import pytest
import torch
from helpers import built_in
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset
from torchmetrics import SumMetric

from hookloop.callbacks import Checkpoint, GradientAccumulation, Metrics, MicroBatch, NonFinite, Preemption, Seed
from hookloop.loop import Callback, Loop, State
from hookloop.loop.share import first_of


def mse(model: nn.Module, batch: Any) -> torch.Tensor:
    x, y = batch
    return (model(x) - y).square().mean()


def pairs(seed: int, count: int, size: int = 4) -> list[Any]:
    generator = torch.Generator().manual_seed(seed + 1)
    return [(torch.randn(size, 4, generator=generator), torch.randn(size, 1, generator=generator)) for _ in range(count)]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05)


def sharded(model: nn.Module, world: int) -> nn.Module:
    return fully_shard(model, mesh=init_device_mesh("cpu", (world,)))


# ------------------------------------------------------------------------------------------ resumed where one's data had ended


def resumed(rank: int, world: int, folder: str, kind: str, seeded: bool) -> bool:
    """Whether a run that goes on from the step at which rank 1 had no data ends as one that nobody stopped."""

    def run(place: str, **more: Any) -> tuple[dict[str, torch.Tensor], int]:
        torch.manual_seed(0)
        model = DistributedDataParallel(nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.Linear(16, 1)))
        data = TensorDataset(*(torch.cat(each) for each in zip(*pairs(3, 9, 1), strict=True)))
        loaders = {
            "persistent": lambda: DataLoader(data, 4, sampler=DistributedSampler(data), num_workers=1, persistent_workers=True),
            "sampler": lambda: DataLoader(data, 4, sampler=DistributedSampler(data)),
            "list": lambda: [*pairs(rank, 2 - rank, 4), *pairs(rank + 5, 1, 2)],  # a short last batch draws fewer numbers
        }
        torch.manual_seed(100 + rank)
        optimizer = sgd(model)
        callbacks = [*([Seed(0)] if seeded else []), Checkpoint(place, every=1, keep=None)]
        state = built_in(Loop(model, optimizer, callbacks, **more), mse, loaders[kind](), epochs=2)
        return many.everything(model, optimizer), state.step // 2

    many.may_have_children()
    whole, steps = run(f"{folder}/whole")
    place = f"{folder}/step-{steps - 1:08d}"  # the last step of the first epoch has no data on rank 1
    if not rank:
        shutil.copytree(f"{folder}/whole/step-{steps - 1:08d}", place)
    torch.distributed.barrier()
    again, _ = run(f"{folder}/again", resume=place)
    return all(torch.equal(again[name], value) for name, value in whole.items())


@pytest.mark.parametrize("seeded", [False, True])
@pytest.mark.parametrize("kind", ["list", "sampler"])
def test_a_rank_resumes_where_its_data_had_ended(kind: str, seeded: bool, tmp_path: Path) -> None:
    assert many.values(resumed, 2, str(tmp_path), kind, seeded) == [True, True]


def test_a_rank_whose_workers_persist_resumes_where_its_data_had_ended(tmp_path: Path) -> None:
    assert many.values(resumed, 2, str(tmp_path), "persistent", False) == [True, True]


class Plain:
    state = State(nn.Linear(4, 1), torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1))


def test_a_checkpoint_without_it_has_one_read_anew() -> None:
    """As of data that are not plain, and of another number of ranks; no worker that serves training is asked."""
    data = TensorDataset(torch.arange(8.0))
    loop: Any = Plain()
    for loader in (DataLoader(data, 4, num_workers=1, persistent_workers=True), DataLoader(data, None), [[torch.arange(4.0)]]):
        loop.state.loader = loader
        before = torch.get_rng_state()
        assert first_of(loop).data[0].flatten()[0] == 0
        assert torch.equal(before, torch.get_rng_state())
        assert getattr(loader, "_iterator", None) is None
    loop.state.loader = iter([])
    with pytest.raises(
        RuntimeError, match=r"had ended when the checkpoint was made.*resume from a checkpoint at an epoch's end"
    ):
        first_of(loop)


def generators(rank: int, world: int, folder: str) -> float:
    model = DistributedDataParallel(nn.Linear(4, 1))
    loop = Loop(model, sgd(model), resume=folder)
    with loop:
        return float(torch.rand(()))


def test_ranks_that_are_new_draw_numbers_of_their_own(tmp_path: Path) -> None:
    model = nn.Linear(4, 1)
    built_in(Loop(model, sgd(model), [Checkpoint(tmp_path)]), mse, pairs(0, 2), epochs=1)
    assert len({*many.values(generators, 2, str(tmp_path))}) == 2


def rearranged(rank: int, world: int, folder: str) -> bool:
    def noisy(model: nn.Module, batch: Any) -> torch.Tensor:
        return mse(model, batch) * random.random()

    def run(place: str, **more: Any) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        random.seed(rank)
        model = DistributedDataParallel(nn.Linear(4, 1))
        optimizer = sgd(model)
        built_in(Loop(model, optimizer, [Checkpoint(place, every=1, keep=None)], **more), noisy, pairs(rank, 3), epochs=1)
        return many.everything(model, optimizer)

    whole = run(f"{folder}/whole")
    again = run(f"{folder}/again", resume=f"{folder}/whole/step-00000002")
    return all(torch.equal(again[name], value) for name, value in whole.items())


@pytest.mark.slow
def test_a_first_step_that_runs_twice_draws_once(tmp_path: Path) -> None:
    """Of Python's generator too, without a Seed."""
    assert many.values(rearranged, 3, str(tmp_path)) == [True] * 3


# ------------------------------------------------------------------------------------------------------- it leaves no trace


def sizes(rank: int, world: int) -> list[int]:
    torch.manual_seed(0)
    model = sharded(nn.Linear(4, 1), world)
    seen = set[int]()

    def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
        seen.add(len(batch[0]))
        return mse(model, batch)

    uneven = pairs(rank, 2 - rank, 64)
    built_in(Loop(model, sgd(model), [MicroBatch(4)]), loss_fn, uneven, uneven, epochs=1)
    return sorted(seen)


def test_it_is_no_larger_than_a_micro_batch() -> None:
    """In training and, under fully_shard, in an evaluation."""
    assert many.values(sizes, 2) == [[4], [4]]


class Buffered(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer, self.kind = nn.Linear(4, 1), kind
        self.register_buffer("seen", torch.zeros(4))
        self.register_buffer("mask", torch.ones(1, 4).expand(8, 4) if kind == "expanded" else torch.ones(4, 8).t())

    def forward(self, x: torch.Tensor) -> Any:
        if self.training and self.kind == "rebound":
            self.seen = 0.9 * self.seen + 0.1 * x.detach().mean(0)
        elif self.training:
            self.seen.mul_(0.9).add_(0.1 * x.detach().mean(0))
        return self.layer(x * self.mask[: len(x)])


class Watch(Callback):
    def __init__(self) -> None:
        self.seen = list[torch.Tensor]()

    def on_step_end(self, state: State) -> None:
        self.seen.append(next(b for name, b in state.model.named_buffers() if name.endswith("seen")).clone())


def buffers(rank: int, world: int, how: str, kind: str) -> bool:
    torch.manual_seed(0)
    model = (
        sharded(Buffered(kind), world) if how == "fsdp" else DistributedDataParallel(Buffered(kind), broadcast_buffers=False)
    )
    watch, data = Watch(), pairs(rank, 3 - rank)
    built_in(Loop(model, sgd(model), [watch]), mse, data, data, epochs=1)
    return torch.equal(watch.seen[-1], watch.seen[-2])


@pytest.mark.parametrize(("how", "kind"), [("fsdp", "expanded"), ("ddp", "rebound"), ("fsdp", "rebound"), ("ddp", "in place")])
def test_buffers_are_as_they_were(how: str, kind: str) -> None:
    """Those that a forward fills, or makes anew; a view that repeats itself, or is transposed, is no hindrance."""
    assert many.values(buffers, 2, how, kind) == [False, True]


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> Any:
        return checkpoint(self.b, self.a(x).relu(), use_reentrant=True)


def checkpointed(rank: int, world: int) -> tuple[int, int]:
    torch.manual_seed(0)
    model = DistributedDataParallel(Checkpointed())
    data = pairs(rank, 4 - 2 * rank)
    if rank:
        data[-1][0][0, 0] = torch.nan  # the batch that stands in for two more
    state = built_in(Loop(model, sgd(model), [NonFinite("skip")]), mse, data, epochs=1)
    return state.step, state.skipped


def test_nan_in_it_reaches_nobody_through_a_checkpointed_part_either() -> None:
    assert many.values(checkpointed, 2) == [(3, 1)] * 2


class Memory:
    """Answers as a device of which each sample takes a megabyte."""

    def __init__(self) -> None:
        self.ran, self.fails = [0], 0

    def capacity(self) -> float:
        return 1e5

    def allocated(self) -> float:
        return 10.0

    def reset(self) -> None:
        self.ran = [0]

    def peak(self) -> float:
        return 10.0 + max(self.ran)

    def retries(self) -> int:
        return self.fails


def measured(rank: int, world: int) -> list[int]:
    torch.manual_seed(0)
    model, memory, found = DistributedDataParallel(nn.Linear(4, 1)), Memory(), list[int]()

    class Look(Callback):
        def on_before_optimizer_step(self, state: State) -> None:
            memory.fails += state.micro_size == 0  # an allocator that had to try again while this rank stood in

        def on_step_end(self, state: State) -> None:
            found.append(state.micro_batch_size or 0)

    def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
        memory.ran.append(len(batch[0]))
        return mse(model, batch)

    built_in(Loop(model, sgd(model), [Look(), MicroBatch("auto", memory=memory, target="memory")]), loss_fn,
             pairs(rank, 4 - rank, 512), epochs=3)  # fmt: skip
    return found


def test_it_tells_nothing_of_what_a_micro_batch_takes() -> None:
    found, other = many.values(measured, 2)
    assert found == other == sorted(found), "no size shrinks after a step in which one rank stood in"
    assert found[-1] > 512


class SkipOne(Callback):
    def on_before_optimizer_step(self, state: State) -> None:
        if state.step + state.skipped == 1:
            state.skip("told to")


def after_a_skip(rank: int, world: int, folder: str) -> tuple[float, int, int]:
    torch.manual_seed(0)
    model, data = DistributedDataParallel(nn.Linear(4, 1)), pairs(rank, 3 - rank)
    if rank:
        data[-1][0][0, 0] = torch.inf

    def loss_fn(model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        loss = mse(model, batch)
        return {"loss": loss, "preds": torch.tensor(float(len(batch[0]))), "target": loss}

    state = built_in(
        Loop(model, sgd(model), [SkipOne(), Metrics({"count": Count()}, training=True), NonFinite()]), loss_fn, data, epochs=1
    )
    return float(state.metrics["train_count"]), state.step, state.skipped


class Count(SumMetric):
    def update(self, preds: torch.Tensor, target: torch.Tensor) -> None:
        super().update(preds)


def test_what_an_update_that_was_skipped_left_is_not_counted_in_the_next(tmp_path: Path) -> None:
    """Rank 1 skips its last batch, which is infinite, and then stands in: an epoch of 3 x 4 and 2 x 4 samples, 8 left out."""
    assert many.values(after_a_skip, 2, str(tmp_path)) == [(12.0, 2, 1)] * 2


# ----------------------------------------------------------------------------------------- a signal that ends the workers too


class Slow(Dataset):
    def __init__(self, count: int, seconds: float) -> None:
        self.count, self.seconds = count, seconds

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> Any:
        time.sleep(self.seconds)
        return torch.full((4,), float(i)), torch.ones(1)


class Kick(Callback):
    """SIGTERM for this process and its workers, as an agent sends it."""

    def __init__(self, where: str) -> None:
        self.where, self.done = where, False

    def on_step_start(self, state: State) -> None:
        self.kick(self.where == "training" and state.step == 2)

    def on_micro_end(self, state: State) -> None:
        self.kick(self.where == "validation" and state.micro is not None and not state.micro.training)

    def kick(self, now: bool) -> None:
        if now and not self.done:
            self.done = True
            os.killpg(0, signal.SIGTERM)


def signalled(rank: int, world: int, folder: str, where: str) -> tuple[str | None, list[str]]:
    os.setpgid(0, 0)
    many.may_have_children()
    model = DistributedDataParallel(nn.Linear(4, 1))
    here = where == "training"
    train = DataLoader(Slow(64, 0.05 * here), 4, num_workers=int(here), prefetch_factor=1 if here else None)
    val = DataLoader(Slow(8, 0.0 if here else 0.1), 2, num_workers=int(not here), prefetch_factor=None if here else 1)
    callbacks = [Seed(0), GradientAccumulation(2), Checkpoint(folder), Preemption(on_signal="return"), Kick(where)]
    state = built_in(Loop(model, sgd(model), callbacks), mse, train, val, epochs=2)
    torch.distributed.barrier()
    return state.stop_reason, sorted(path.name for path in Path(folder).glob("step-*"))


@pytest.mark.parametrize(("where", "step"), [("validation", 8), ("training", 2)])
def test_a_signal_to_the_whole_group_saves_what_was_trained(where: str, step: int, tmp_path: Path) -> None:
    """The loader's workers die of it while the next batch is awaited."""
    assert many.values(signalled, 2, str(tmp_path), where) == [("SIGTERM was received", [f"step-{step:08d}"])] * 2
