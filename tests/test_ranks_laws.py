"""The laws across ranks, in real processes: Cut, One pass and Restart hold for two ranks as for one, in both forms."""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import many
import pytest
import torch
import torch.distributed as dist
from helpers import Reported, Samples, built_in, by_hand, loss_fn, net
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from hookloop.callbacks import (
    Checkpoint,
    ClipGradients,
    DynamicBatchSize,
    GradientAccumulation,
    MicroBatch,
    Seed,
    Steps,
    Warmup,
)
from hookloop.loop import Callback, Loop, State, ranks

FORMS = {"by hand": by_hand, "built in": built_in}
EPOCHS = 2

# ------------------------------------------------------------------------------------------------------------------------ Cut


@dataclass
class Case:
    """`sizes`: of the batches that rank 0 reads, and rank 1 (rank 2 as rank 0, ...); `updates`: samples of each in each."""

    sizes: tuple[list[int], list[int]]
    updates: list[tuple[int, int]]
    accumulate: int = 1
    micro: int | None = None
    later: list[tuple[int, int]] | None = None  # the second epoch's updates, where they are others
    grows: bool = False
    tokens: str = ""  # what weigh returns: "tensor" or "number"
    weightless: tuple[int, ...] = ()  # batches of rank 1 with no token to predict
    validates: bool = False


CASES = {
    "2 x 16": Case(([16] * 4, [16] * 4), [(16, 16)] * 4),
    "short last group": Case(([16, 16, 16, 9], [16, 16, 16, 3]), [(48, 48), (9, 3)], accumulate=3),
    "a rank ends early": Case(([16] * 5, [16] * 3), [(16, 16)] * 3 + [(16, 0)] * 2, validates=True),
    "the first rank ends early": Case(([16], [16, 16]), [(16, 16), (0, 16)], micro=7),
    "a rank has half a group": Case(([8] * 5, [8] * 3), [(16, 16), (16, 8), (8, 0)], accumulate=2),
    "cut": Case(([16, 16, 7], [16, 16, 16]), [(16, 16), (16, 16), (7, 16)], micro=5),
    "a rank has more micro-batches": Case(([4, 4], [16, 16]), [(8, 32)], accumulate=2, micro=6),
    "batches grow": Case(([10] * 5, [10] * 3), [(6, 6), (6, 6), (12, 12), (12, 6), (14, 0)], micro=5, grows=True,
                         later=[(24, 24), (24, 6), (2, 0)]),
    "tokens": Case(([8, 8, 8, 5], [8, 8, 8, 2]), [(16, 16), (13, 10)], accumulate=2, micro=3, tokens="tensor"),
    "tokens as numbers": Case(([8, 8, 8, 5], [8, 8]), [(8, 8), (8, 8), (8, 0), (5, 0)], tokens="number"),
    "a rank's update weighs nothing": Case(([8] * 3, [8] * 3), [(8, 8)] * 3, tokens="number", weightless=(1,)),
    "a rank's update weighs nothing, as a tensor": Case(([8] * 3, [8] * 3), [(8, 8)] * 3, tokens="tensor", weightless=(1,)),
    "a rank's first update weighs nothing": Case(([8] * 3, [8] * 3), [(8, 8)] * 3, tokens="number", weightless=(0,)),
}  # fmt: skip


def stream(case: Case, rank: int) -> list[Any]:
    """Return the batches that a rank reads."""
    generator, shape = torch.Generator().manual_seed(10 + rank), (5,) if case.tokens else ()
    found = []
    for i, n in enumerate(case.sizes[rank % 2]):
        x = torch.randn(n, *shape, 6, generator=generator, dtype=torch.float64)
        y = torch.randint(0, 3, (n, *shape), generator=generator)
        if case.tokens:
            y[torch.rand(y.shape, generator=generator) < 0.4] = -100
            y[:, 0] = 1  # none weighs nothing
        if rank % 2 and i in case.weightless:
            y[:] = -100
        found.append((x, y))
    return found


def held_out(rank: int) -> list[Any]:
    """Return a rank's shard of the validation data: the second has 5 samples, the first 39."""
    generator = torch.Generator().manual_seed(50 + rank)
    sizes = [5] if rank % 2 else [16, 16, 7]
    return [(torch.randn(n, 6, generator=generator, dtype=torch.float64), torch.randint(0, 3, (n,), generator=generator))
            for n in sizes]  # fmt: skip


def mean_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]).flatten(0, -2), batch[1].flatten(), ignore_index=-100)


def tokens(batch: Any) -> torch.Tensor:
    return (batch[1] != -100).sum()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)  # Adam would hide a factor that all gradients share


def truth(case: Case, world: int) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Return weights and what is reported, by plain torch on one process that holds all ranks' samples."""
    model = net(torch.float64, noise=False)
    optimizer, reported = sgd(model), []
    data = [[torch.cat(part) for part in zip(*stream(case, rank), strict=True)] for rank in range(world)]
    for epoch in range(EPOCHS):
        summed, weighed, at = 0.0, 0.0, [0] * world
        for counts in case.later if epoch and case.later else case.updates:
            take = [slice(at[rank], at[rank] + counts[rank % 2]) for rank in range(world)]
            at = [one.stop for one in take]
            x, y = (torch.cat([data[rank][i][take[rank]] for rank in range(world)]) for i in range(2))
            weight = (y != -100).sum()
            optimizer.zero_grad()
            loss = mean_loss(model, (x, y))
            loss.backward()
            optimizer.step()
            summed, weighed = summed + float(loss.detach()) * float(weight), weighed + float(weight)
        reported.append(summed / weighed)
        if case.validates:
            x, y = (torch.cat(part) for part in zip(*[batch for rank in range(world) for batch in held_out(rank)], strict=True))
            with torch.no_grad():
                reported[-1] = float(mean_loss(model, (x, y)))
        assert at == [len(part[0]) for part in data], "the case's updates do not add up"
    return {name: value.clone() for name, value in model.state_dict().items()}, reported


@contextlib.contextmanager
def reductions(model: nn.Module) -> Iterator[list[int]]:
    """Count how often gradients are reduced: DDP's buckets, FSDP2's groups of parameters."""
    count = [0]
    if not many.sharded(model):

        def hook(group, bucket):  # type: ignore[no-untyped-def]  # DDP reads annotations, and knows no strings
            count[0] += 1
            work = dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True)
            assert work is not None
            return work.get_future().then(lambda future: future.value()[0])

        model.register_comm_hook(None, hook)  # type: ignore[operator]
        yield count
        return
    name = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"  # before torch 2.13
    plain = getattr(dist, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        return plain(*args, **kwargs)

    setattr(dist, name, counted)
    try:
        yield count
    finally:
        setattr(dist, name, plain)


def cuts(rank: int, world: int, how: str, names: list[str]) -> dict[Any, Any]:
    """Train every case in both forms; return what each ended with."""
    found = {}
    for name in names:
        case = CASES[name]
        for form, train in FORMS.items():
            callbacks: list[Callback] = [reported := Reported("val_loss" if case.validates else "train_loss")]
            callbacks += [GradientAccumulation(case.accumulate)] if case.accumulate > 1 else []
            callbacks += [MicroBatch(case.micro)] if case.micro else []
            callbacks += [DynamicBatchSize(6, 24, growth=2, every=Steps(2))] if case.grows else []
            weigh = {"": None, "tensor": tokens, "number": lambda batch: int(tokens(batch))}[case.tokens]
            model = many.wrap(net(torch.float64, noise=False), how)
            loop = Loop(model, sgd(model), callbacks, weigh=weigh)
            try:
                with reductions(model) as count:
                    train(loop, mean_loss, stream(case, rank), held_out(rank) if case.validates else None, epochs=EPOCHS)
            except Exception as error:
                error.add_note(f"in case {name!r}, {form}")
                raise
            found[name, form] = many.weights(model), reported.seen, loop.state.step, count[0]
    return found


HARD = [name for name in CASES if "weighs nothing" in name]


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("how", many.WRAPS)
def test_cut_many_ranks_are_one(how: str, world: int) -> None:
    """Weights, the reported loss, and one reduction of gradients an update, whatever the micro-batches."""
    check_cuts(how, [name for name in CASES if name not in HARD], world)


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("how", many.WRAPS)
def test_cut_a_rank_without_a_token_to_predict(how: str, name: str) -> None:
    """Its mean is 0/0, which no other rank may hear of."""
    check_cuts(how, [name], 2)


def check_cuts(how: str, names: list[str], world: int) -> None:
    ranks = many.values(cuts, world, how, names)
    for name in names:
        case, (expected, reported) = CASES[name], truth(CASES[name], world)
        for form in FORMS:
            say = f"{name}, {form}"
            for weights, seen, steps, count in (found[name, form] for found in ranks):
                assert steps == len(case.updates) + len(case.later or case.updates), say
                many.close(weights, expected, where=say)
                assert seen == pytest.approx(reported, rel=1e-12), say
                rearranged = how == "ddp" and world > 2  # a pass more, once
                assert count == steps * (1 if how == "ddp" else 2) + rearranged, say  # two layers have weights
                assert all(torch.equal(weights[n], ranks[0][name, form][0][n]) for n in weights), say


# ------------------------------------------------------------------------------------------------------------------- One pass


class Seen(Callback):
    """Keeps which samples each epoch trained on, by update, and the update at which it ended."""

    def __init__(self) -> None:
        self.updates: list[list[int]] = []
        self.open: list[int] = []
        self.epochs: list[list[list[int]]] = []
        self.ends: list[int] = []

    def on_step_start(self, state: State) -> None:
        self.open = []

    def on_micro_end(self, state: State) -> None:
        assert state.micro is not None
        if state.micro.training:
            self.open += state.micro.batch[2].tolist()

    def on_step_end(self, state: State) -> None:
        self.updates.append(self.open)

    def on_epoch_end(self, state: State) -> None:
        self.epochs.append(self.updates)
        self.ends.append(state.step)
        self.updates = []


class Shard(IterableDataset[Any]):
    """Samples of an iterable without a length."""

    def __init__(self, indices: list[int]) -> None:
        self.data, self.indices = Samples(64), indices

    def __iter__(self) -> Iterator[Any]:
        return iter([self.data[i] for i in self.indices])


def shards(rank: int, world: int, kind: str) -> tuple[Any, int]:
    """Return a rank's loader, and of how many samples all ranks' together are: rank 0 has 5 batches of 8, the others 3."""
    if kind == "padded sampler":
        data = Samples(49)
        return DataLoader(data, 8, sampler=DistributedSampler(data, shuffle=True)), 49
    starts = [0] + [40 + 24 * i for i in range(world)]
    data, total = Samples(starts[world]), starts[world]
    batches = [list(range(i, i + 8)) for i in range(starts[rank], starts[rank + 1], 8)]
    if kind == "batch sampler":
        return DataLoader(data, batch_sampler=batches), total
    if kind == "iterable data set":
        shard = Shard([i for batch in batches for i in batch])
        shard.data = data
        return DataLoader(shard, 8), total
    return [torch.utils.data.default_collate([data[i] for i in batch]) for batch in batches], total


KINDS = ["list", "batch sampler", "iterable data set", "padded sampler"]


def passes(rank: int, world: int, how: str) -> dict[Any, Any]:
    found = {}
    for kind in KINDS:
        for form, train in FORMS.items():
            for grows in (False, True):
                seen, model = Seen(), many.wrap(net(noise=kind != "padded sampler"), how)  # one batch there is a sample
                loader, total = shards(rank, world, kind)
                more = [DynamicBatchSize(3, 12, growth=2, every=Steps(2))] if grows else []
                loop = Loop(model, sgd(model), [Seed(1), seen, *more])
                try:
                    train(loop, loss_fn, loader, epochs=EPOCHS)
                except Exception as error:
                    error.add_note(f"in {kind}, {form}, grows: {grows}")
                    raise
                passed = many.weights(model).get("1.num_batches_tracked")
                found[kind, form, grows] = seen.epochs, seen.ends, total, loop.state.skipped, passed
    return found


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("how", many.WRAPS)
def test_dd1_one_pass_over_uneven_shards(how: str, world: int) -> None:
    """Each sample once an epoch, which ends at the same update for all; none is left out where ranks' data differ in length."""
    ranks = many.values(passes, world, how)
    for key in ranks[0]:
        told, ends, total, skipped, passed = zip(*[found[key] for found in ranks], strict=True)
        assert len(set(map(tuple, ends))) == 1, key
        assert skipped == (0,) * world, key
        for epoch in range(EPOCHS):
            seen = [i for epochs in told for update in epochs[epoch] for i in update]
            assert sorted(seen) == list(range(total[0])), (key, epoch)
            assert len({len(epochs[epoch]) for epochs in told}) == 1, (key, epoch)
        if key[0] == "list" and not key[2]:  # a rank without data takes part, and leaves no trace in its running statistics
            assert passed[0] == 5 * EPOCHS, key
            assert how == "ddp" or passed[1:] == (3 * EPOCHS,) * (world - 1), key


def orders(rank: int, world: int) -> Any:
    seen, data, model = Seen(), Samples(48), many.wrap(net(), "ddp")
    loader = DataLoader(data, 8, sampler=DistributedSampler(data, shuffle=True))  # nobody calls set_epoch
    built_in(Loop(model, sgd(model), [Seed(1), seen]), loss_fn, loader, epochs=3)
    return seen.epochs


def test_dl17_a_sampler_whose_epoch_nobody_sets_is_shuffled_anew() -> None:
    ranks = many.values(orders, 2)
    each = [[[i for update in epoch for i in update] for epoch in rank] for rank in ranks]
    for epoch in range(3):
        assert sorted(each[0][epoch] + each[1][epoch]) == list(range(48))
    for rank in each:
        assert len({tuple(epoch) for epoch in rank}) == 3


# -------------------------------------------------------------------------------------------------------------------- Restart

TOTAL = 9  # updates of a short run, over two epochs and a part


class Trail(Callback):
    """Writes down each update: the weights' checksum, what the model drew and which samples it saw; and kills."""

    def __init__(self, path: Path, kill: int | None = None) -> None:
        self.path, self._kill, self.open = path, kill, list[int]()  # one rank dies: its own affair

    def on_step_start(self, state: State) -> None:
        self.open = []

    def on_micro_end(self, state: State) -> None:
        assert state.micro is not None
        if state.micro.training:
            self.open += state.micro.batch[2].tolist()

    def on_step_end(self, state: State) -> None:
        found = 0
        for p in state.model.parameters():
            found = zlib.crc32((p.to_local() if hasattr(p, "to_local") else p).detach().numpy().tobytes(), found)
        with self.path.open("a") as file:
            file.write(f"{state.step} {found:08x} {float(state.metrics['loss']).hex()} {self.open}\n")
        if state.step == self._kill:
            os.kill(os.getpid(), 9)


def life(rank: int, world: int, folder: str, how: str, form: str, end: int, kill: int | None = None) -> Any:
    """One process's part of a run up to update `end`; with `kill` this rank dies at that update's end, before its save."""
    seed, model, data = Seed(0), many.wrap(net(), how), Samples(24 * world - 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    run = Path(folder) / "run"
    callbacks = [seed, DynamicBatchSize(5, 12, growth=2, every=Steps(4)), ClipGradients(1.0), Warmup(4), MicroBatch(4),
                 Trail(Path(folder) / f"{rank}.txt", kill), Checkpoint(run, every=1, keep=2)]  # fmt: skip
    loader = DataLoader(data, 8, sampler=DistributedSampler(data, shuffle=True))
    loop = Loop(model, optimizer, callbacks, resume=run)
    FORMS[form](loop, loss_fn, loader, steps=end)
    return many.everything(model, optimizer)


def stops(rank: int, world: int, folder: str, how: str, form: str, ends: list[int]) -> Any:
    """A run that is stopped at each of these updates, and built anew."""
    return [life(rank, world, folder, how, form, end) for end in ends][-1]


def trail(folder: Path, rank: int) -> dict[int, str]:
    """Return what was written down of each update; one that was made twice must have been made alike."""
    found: dict[int, str] = {}
    for line in (folder / f"{rank}.txt").read_text().splitlines():
        step = int(line.split()[0])
        assert found.setdefault(step, line) == line, "an update was made otherwise the second time"
    return found


def assert_same_run(folders: tuple[Path, Path], ended: tuple[list[Any], list[Any]]) -> None:
    for rank, (a, b) in enumerate(zip(*ended, strict=True)):
        mine, theirs = trail(folders[0], rank), trail(folders[1], rank)
        assert list(mine) == list(range(1, TOTAL + 1))
        assert mine == theirs, f"rank {rank}"
        assert a.keys() == b.keys()
        assert not [name for name in a if not torch.equal(a[name], b[name])], f"rank {rank}"


@pytest.mark.parametrize(("how", "form"), [("ddp", "by hand"), ("ddp", "built in"), ("fsdp", "built in"),
                                           pytest.param("fsdp", "by hand", marks=pytest.mark.slow)])  # fmt: skip
def test_restart_after_each_update_is_bitwise(tmp_path: Path, how: str, form: str) -> None:
    """Weights, optimizer state, dropout's draws and the order of data, on each rank."""
    places = tmp_path / "whole", tmp_path / "stopped"
    for place in places:
        place.mkdir()
    whole = many.values(stops, 2, str(places[0]), how, form, [TOTAL])
    stopped = many.values(stops, 2, str(places[1]), how, form, list(range(1, TOTAL + 1)))
    assert_same_run(places, (whole, stopped))


@pytest.mark.parametrize(("how", "world", "steps"), [
    ("ddp", 2, [5]), pytest.param("ddp", 2, range(2, TOTAL + 1), marks=pytest.mark.slow),
    pytest.param("fsdp", 2, range(2, TOTAL + 1), marks=pytest.mark.slow),
    pytest.param("ddp", 4, range(2, TOTAL + 1), marks=pytest.mark.slow),
], ids=["ddp-2", "ddp-2-each", "fsdp-2-each", "ddp-4-each"])  # fmt: skip
def test_dd2_restart_killed_at_updates_is_bitwise(tmp_path: Path, how: str, world: int, steps: list[int]) -> None:
    """One rank dies by SIGKILL, another each time; the others name it, and all are started again."""
    places = tmp_path / "whole", tmp_path / "killed"
    for place in places:
        place.mkdir()
    whole = many.values(life, world, str(places[0]), how, "built in", TOTAL)
    for step in steps:
        victim = step % world
        ended = many.run(victim_life, world, str(places[1]), how, step, victim)
        for rank, one in enumerate(ended):
            if rank == victim:
                assert one.code == -9
            else:
                assert f"rank {victim}" in one.error, one
                assert one.seconds < 30
    killed = many.values(life, world, str(places[1]), how, "built in", TOTAL)
    assert_same_run(places, (whole, killed))


def victim_life(rank: int, world: int, folder: str, how: str, step: int, victim: int) -> None:
    ranks.PATIENCE = 0.5  # of the survivors: whoever can say something does so at once here
    life(rank, world, folder, how, "built in", TOTAL, step if rank == victim else None)


GLOBAL = 12


def portion(rank: int, world: int, folder: str, end: int, how: str = "ddp", batch: int = GLOBAL) -> Any:
    """A run of `batch` samples an update on however many ranks, up to update `end`; without randomness in the model."""
    data, model, seen = Samples(64, torch.float64), many.wrap(net(torch.float64, noise=False), how), Seen()
    run = Path(folder) / "run"
    loader = DataLoader(data, batch // world, sampler=DistributedSampler(data, shuffle=True))
    loop = Loop(model, sgd(model), [Seed(0), seen, Checkpoint(run)], resume=run)
    built_in(loop, loss_fn, loader, steps=end)
    return [update for epoch in [*seen.epochs, seen.updates] for update in epoch], many.weights(model)


@pytest.mark.parametrize("worlds", [(2, 1), (1, 2)], ids=str)
@pytest.mark.parametrize("how", many.WRAPS)
def test_rs6_restart_with_another_number_of_ranks(tmp_path: Path, worlds: tuple[int, ...], how: str) -> None:
    """Each update has the samples that it would have had, so that each is used once an epoch; weights to rounding."""
    check_worlds(tmp_path, worlds, how)


@pytest.mark.slow
@pytest.mark.parametrize("worlds", [(2, 1, 3), (4, 2), (1, 4), (3, 2, 4, 1)], ids=str)
@pytest.mark.parametrize("how", many.WRAPS)
def test_rs6_restart_with_ever_other_numbers_of_ranks(tmp_path: Path, worlds: tuple[int, ...], how: str) -> None:
    check_worlds(tmp_path, worlds, how)


def check_worlds(tmp_path: Path, worlds: tuple[int, ...], how: str) -> None:
    ends = [*[3, 8, 13][: len(worlds) - 1], 15]  # each inside an epoch, which has 5 whole updates and a short one
    expected = many.values(portion, worlds[0], str(tmp_path / "whole"), ends[-1], how)
    updates: list[list[int]] = []
    for world, end in zip(worlds, ends, strict=True):
        found = many.values(portion, world, str(tmp_path / "changed"), end, how)
        updates += [sorted(i for rank in found for i in rank[0][u]) for u in range(len(found[0][0]))]
    whole = [sorted(i for rank in expected for i in rank[0][u]) for u in range(len(expected[0][0]))]
    assert sorted(i for update in updates[:6] for i in update) == list(range(64))
    assert updates == whole
    many.close(found[0][1], expected[0][1])


def test_rs6_another_number_of_samples_an_update_is_refused(tmp_path: Path) -> None:
    """12 samples an update on 2 ranks, and 3 ranks that would make it 6 x 3."""
    many.values(portion, 2, str(tmp_path), 3)
    for error in many.errors(portion, 3, str(tmp_path), 6, "ddp", 18):
        assert "ValueError" in error
        assert "18" in error
        assert "12" in error
