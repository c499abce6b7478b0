"""More of a run across ranks: what they don't share is refused, no stand-in is heard of, no evaluation is waited for."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import many
import pytest
import torch
from helpers import built_in, loss_fn, net
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from hookloop.callbacks import (
    Average,
    Checkpoint,
    ClipGradients,
    DynamicBatchSize,
    GradientAccumulation,
    MicroBatch,
    NoiseScale,
    NonFinite,
    Seed,
    SwitchOptimizer,
    Unfreeze,
)
from hookloop.callbacks.gradient_noise import over_ranks, two_batch_estimate
from hookloop.loop import Callback, Loop, State


def batches(seed: int, count: int, size: int = 8, dtype: torch.dtype = torch.float32) -> list[Any]:
    generator = torch.Generator().manual_seed(seed + 10)
    make = lambda: (torch.randn(size, 6, generator=generator, dtype=dtype), torch.randint(0, 3, (size,), generator=generator))
    return [make() for _ in range(count)]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def alike(*found: dict[str, torch.Tensor]) -> None:
    assert all(torch.equal(value, other[name]) for other in found[1:] for name, value in found[0].items())


# ------------------------------------------------------------------------------------------------------- what is not shared


class Parts(nn.Module):
    """A model of which the program wraps one part."""

    def __init__(self, kind: str, world: int) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 12), nn.Linear(12, 3)
        if kind == "ddp":
            self.body = DistributedDataParallel(self.body)
        else:
            fully_shard(self.body, mesh=init_device_mesh("cpu", (world,)))

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(self.body(x).relu())


def unshared(rank: int, world: int, kind: str) -> None:
    callbacks: list[Callback] = []
    torch.manual_seed(3)
    if kind in ("ddp in part", "fsdp in part"):
        model: Any = Parts(kind.split()[0], world)
        optimizer = sgd(model)
    elif kind == "not the root's own":
        inner = Parts("fsdp", world)
        inner.scale = nn.Parameter(torch.ones(()))
        mesh = init_device_mesh("cpu", (world,))
        model = fully_shard(inner, mesh=mesh, ignored_params={inner.scale})
        optimizer = sgd(model)
    elif kind == "outside":
        model = DistributedDataParallel(net())
        optimizer = torch.optim.SGD([*model.parameters(), nn.Parameter(torch.ones(()))], lr=0.1)
    else:
        inside: Any = net(noise=False)
        inside[0].requires_grad_(kind != "frozen before")
        model = DistributedDataParallel(inside, find_unused_parameters=kind == "frozen before")
        optimizer, callbacks = sgd(model), [Unfreeze({1: r"^module\.0\.|^0\."})]
    built_in(Loop(model, optimizer, callbacks), loss_fn, batches(rank, 3), epochs=2)


@pytest.mark.parametrize(("kind", "words"), [
    ("ddp in part", ("wrap the whole",)), ("fsdp in part", ("fully_shard(model)",)),
    ("not the root's own", ("scale", "apart")), ("outside", ("outside of the model", "apart")),
    ("frozen before", ("Unfreeze", "0.weight")), ("frozen after", ("Unfreeze", "find_unused_parameters=True", "0.weight")),
])  # fmt: skip
def test_what_ranks_would_not_average_is_refused(kind: str, words: tuple[str, ...]) -> None:
    """Else they drift apart without a word, or wait for a gradient that does not come."""
    for error in many.errors(unshared, 2, kind):
        assert error.startswith("ValueError"), error
        assert all(word in error for word in words), error


def partly_frozen(rank: int, world: int) -> Any:
    inside: Any = net(noise=False)
    inside[0].requires_grad_(False)
    model = DistributedDataParallel(inside)
    built_in(Loop(model, sgd(model)), loss_fn, batches(rank, 3), epochs=2)
    return many.weights(model)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_was_frozen_before_ddp_and_stays_so_is_fine() -> None:
    alike(*many.values(partly_frozen, 2))


def copied_or_compared(rank: int, world: int, name: str) -> None:
    model = many.wrap(net(noise=False), "fsdp")
    callback = {"Average": Average, "NoiseScale": NoiseScale,
                "DynamicBatchSize": lambda: DynamicBatchSize(4, 8, every=NoiseScale())}[name]()  # fmt: skip
    built_in(Loop(model, sgd(model), [Seed(1), callback]), loss_fn, batches(rank, 3), epochs=1)


@pytest.mark.parametrize("name", ["Average", "NoiseScale", "DynamicBatchSize"])
def test_refused_with_fully_shard(name: str) -> None:
    """A norm of gradients that are nowhere yet is 0: a noise scale of that is a number, and wrong."""
    for error in many.errors(copied_or_compared, 2, name):
        assert error.startswith("ValueError"), error
        assert "fully_shard" in error, error
        assert "at step 0" in error, error


# -------------------------------------------------------------------------------------------------------------- stand-ins


def after_nan(rank: int, world: int, how: str) -> Any:
    """Rank 1's last batch can't be used, and it has no other to stand in with."""
    model, data = many.wrap(net(noise=False), how), batches(rank, 3 if rank else 6)
    if rank:
        data[-1][0][0, 0] = float("nan")
    loop = Loop(model, sgd(model), [NonFinite("skip")])
    state = built_in(loop, loss_fn, data, epochs=2)
    return state.step, state.skipped, many.weights(model)


@pytest.mark.parametrize("how", many.WRAPS)
def test_a_stand_in_that_is_not_finite_is_not_heard_of(how: str) -> None:
    """One bad batch costs its own update: 0 times NaN would have cost all that follow it."""
    first, second = many.values(after_nan, 2, how)
    assert first[:2] == second[:2] == (10, 2)
    alike(first[2], second[2])


class Together(nn.SyncBatchNorm):
    """What torch's own does, on the CPU too: each forward of training waits for all ranks."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            total = x.detach().mean(0)
            torch.distributed.all_reduce(total)
            x = x - total / torch.distributed.get_world_size()
        return x * self.weight + self.bias


def normed_together(rank: int, world: int, auto: bool) -> Any:
    DistributedDataParallel._passing_sync_batchnorm_handle = lambda *_: None  # type: ignore[method-assign]
    torch.manual_seed(3)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(6, 12), Together(12), nn.ReLU(), nn.Linear(12, 3)))
    callbacks = [Seed(1), MicroBatch("auto" if auto else 4), GradientAccumulation(2)]
    state = built_in(Loop(model, sgd(model), callbacks), loss_fn, batches(rank, 5 - 2 * rank, 3 if rank else 8), epochs=2)
    return state.step, many.weights(model)


@pytest.mark.parametrize("auto", [False, True])
def test_sync_batch_norm_has_as_many_forwards_on_each_rank(auto: bool) -> None:
    """Whichever rank has fewer micro-batches, or no data left."""
    first, second = many.values(normed_together, 2, auto)
    assert first[0] == second[0] == 6
    alike(first[1], second[1])


# ------------------------------------------------------------------------------------------------------------------- skips


class Skips(Callback):
    """Wants, on rank 1 alone, that an update is left out."""

    def on_micro_end(self, state: State) -> None:
        if state.rank == 1 and state.step == 1 and not state.skipped:
            state.skip("mine")


def skips(rank: int, world: int, around: bool) -> Any:
    model: Any = many.wrap(net(noise=False), "fsdp")
    optimizer = sgd(model)
    loop = Loop(model, optimizer, [ClipGradients(0.3)] if around else [ClipGradients(0.3), Skips()])
    if not around:
        state = built_in(loop, loss_fn, batches(rank, 4), epochs=1)
        return state.step, state.skipped, many.weights(model)
    with loop:
        for i, batch in enumerate(batches(rank, 4)):
            loss = loss_fn(model, batch)["loss"]
            loss.backward()
            if rank and i == 1:
                loop.state.skip("mine")
            with loop.updating(loss=loss.detach(), samples=8):
                optimizer.step()
            optimizer.zero_grad()
    return loop.state.step, loop.state.skipped, many.weights(model)


@pytest.mark.parametrize("around", [False, True])
def test_a_skip_that_one_rank_wants_before_the_norm_of_sharded_gradients(around: bool) -> None:
    """The others compute the norm in their hooks, and would wait for its part."""
    first, second = many.values(skips, 2, around)
    assert first[:2] == second[:2] == (3, 1)
    alike(first[2], second[2])


# ------------------------------------------------------------------------------------------------------------- evaluations


def evaluates(rank: int, world: int, kind: str) -> Any:
    model: Any = many.wrap(net(noise=False), "fsdp")

    def fails(module: nn.Module, args: Any) -> None:
        if kind == "memory" and rank and not model.training:
            raise torch.OutOfMemoryError("CUDA out of memory (made up)")

    model[1].register_forward_pre_hook(fails)  # between two layers whose weights the ranks gather
    loop = Loop(model, sgd(model), [MicroBatch("auto")])
    built_in(loop, loss_fn, batches(rank, 3), [] if kind == "empty" and rank else batches(5, 3), epochs=1)


@pytest.mark.parametrize(("kind", "words"), [("empty", "0 batches"), ("memory", "alone can't redo it")])
def test_an_evaluation_of_a_sharded_model_that_one_rank_can_not_run_ends_all(kind: str, words: str) -> None:
    """At once, with why: not by the timeout of those who wait for its part of the weights."""
    for error in many.errors(evaluates, 2, kind, within=6.0):
        assert words in error, error


def before_entering(rank: int, world: int) -> Any:
    model = DistributedDataParallel(net(noise=False))
    loop = Loop(model, sgd(model))
    found = loop.evaluate(loss_fn, batches(rank, 2))
    assert loop.state.ranks.host is not torch.distributed.group.WORLD
    assert loop.state.ranks.host is not None, "what talks over the host needs a group that does: WORLD may be NCCL's"
    return found


def test_evaluate_alone_talks_over_the_host() -> None:
    first, second = many.values(before_entering, 2)
    assert first == second


def weighs_nothing(rank: int, world: int, all_of_it: bool) -> Any:
    model = DistributedDataParallel(net(noise=False))
    loop = Loop(model, sgd(model), weigh=lambda batch: 0 if rank or all_of_it else len(batch[1]))
    return loop.evaluate(loss_fn, batches(rank, 2)), Loop(model, sgd(model)).evaluate(loss_fn, batches(0, 2))


def test_one_ranks_validation_may_weigh_nothing_but_not_all() -> None:
    for found, of_the_first in many.values(weighs_nothing, 2, False):
        assert found == of_the_first
    for error in many.errors(weighs_nothing, 2, True, within=6.0):
        assert "weights of the val loader's batches sum to 0" in error


def in_another_order(rank: int, world: int) -> Any:
    model = DistributedDataParallel(net(noise=False))
    loaders = {"a": batches(1, 2), "b": batches(2, 2)}
    loop = Loop(model, sgd(model))
    return loop.evaluate(loss_fn, dict(sorted(loaders.items(), reverse=bool(rank))))


def test_validation_loaders_in_another_order_are_refused() -> None:
    """Their numbers would be mixed: one rank's share of the one set with another's of the other."""
    for error in many.errors(in_another_order, 2):
        assert "['a', 'b']" in error, error


def reports_infinities(rank: int, world: int) -> Any:
    model = DistributedDataParallel(net(noise=False))
    loop = Loop(model, sgd(model))
    with loop:
        for _ in loop.epochs(1):
            for step in loop.steps(batches(rank, 1)):
                for micro in step:
                    with micro:
                        micro.backward(loss_fn)
                loop.update()
            loop.report({"both": float("inf") if rank else float("-inf"), "one": float("inf") if rank else 1.0})
    return loop.state.metrics


def test_what_is_reported_may_be_infinite() -> None:
    for found in many.values(reports_infinities, 2):
        assert found["both"] != found["both"]
        assert found["one"] == float("inf")


# --------------------------------------------------------------------------------------------------------------- callbacks


class Memory:
    """A device of which each rank says something else."""

    def __init__(self, capacity: int) -> None:
        self.size, self.most = 0, capacity

    def allocated(self) -> int:
        return 0

    def capacity(self) -> int:
        return self.most

    def reset(self) -> None:
        pass

    def retries(self) -> int:
        return 0

    def peak(self) -> int:
        return 4 * self.size


def of_unlike_memory(rank: int, world: int, folder: str, epochs: int) -> Any:
    model, memory = DistributedDataParallel(net(noise=False)), Memory(100 if rank else 1000)
    micro = MicroBatch("auto", memory=memory, multiple_of=1, target="memory")

    def loss(model: nn.Module, batch: Any) -> Any:
        memory.size = len(batch[0])
        if not model.training and rank and memory.size > 6:
            raise torch.OutOfMemoryError("CUDA out of memory (made up)")
        return loss_fn(model, batch)

    loop = Loop(model, sgd(model), [Seed(1), micro, Checkpoint(folder)], resume=folder)
    state = built_in(loop, loss, batches(rank, 6, 64), batches(rank, 2), epochs=epochs)
    return state.step, micro.train, micro.evaluation, many.weights(model)


def test_sizes_that_differ_by_rank_are_no_difference_between_their_programs(tmp_path: Path) -> None:
    """A run goes on from a checkpoint in which one rank validates in smaller cuts, and had found its size."""
    many.values(of_unlike_memory, 2, str(tmp_path), 1)
    first, second = many.values(of_unlike_memory, 2, str(tmp_path), 2)
    assert (first[0], first[2], second[2]) == (12, None, 4)
    alike(first[3], second[3])


def averaged(rank: int, world: int, kind: str, folder: str, epochs: int) -> Any:
    """Running statistics of which each rank has its own."""
    model = DistributedDataParallel(net())
    average = Average("ema", 0.8, start=1, batch_norm=kind)
    loop = Loop(model, sgd(model), [Seed(1), average, Checkpoint(folder)], resume=folder)
    state = built_in(loop, loss_fn, batches(rank, 4 - rank), batches(rank + 5, 2), epochs=epochs)
    return state.step, state.metrics["val_loss"], many.weights(average.model)


@pytest.mark.parametrize("kind", ["average", pytest.param("measure", marks=pytest.mark.slow)])
def test_an_average_validates_with_the_first_rank_s_statistics(tmp_path: Path, kind: str) -> None:
    """They are those that a checkpoint holds, so a run that is resumed reports the same; also where a rank's data end early."""
    whole = many.values(averaged, 2, kind, str(tmp_path / "whole"), 3)
    many.values(averaged, 2, kind, str(tmp_path / "cut"), 2)
    again = many.values(averaged, 2, kind, str(tmp_path / "cut"), 3)
    for one, other in zip(whole, again, strict=True):
        assert one[:2] == other[:2] == (12, whole[0][1])
        alike(one[2], other[2], whole[0][2])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_noise_of_all_ranks_waits_for_no_device() -> None:
    ranks = SimpleNamespace(together=True, total=lambda x: x)
    state: Any = SimpleNamespace(ranks=ranks, world=1, update_size=8)
    norm = torch.ones((), device="cuda")
    try:
        torch.cuda.set_sync_debug_mode("error")
        found = over_ranks(state, norm, (norm, 0.5)), over_ranks(state, norm, None)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [float(x) for x in found[0]] == [1.0, 4.0, 8.0]


def switched(rank: int, world: int, how: str) -> Any:
    model: Any = net(torch.float64, noise=False)
    if how != "plain":
        model = many.wrap(model, how)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    switch = SwitchOptimizer(lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9), at=4, rate="swats")
    share = slice(rank * 16 // world, (rank + 1) * 16 // world)
    data = [(x[share], y[share]) for x, y in batches(0, 8, 16, torch.float64)]
    state: State = built_in(Loop(model, optimizer, [Seed(1), switch]), loss_fn, data, epochs=1)
    return state.step, switch.used, many.weights(model)


@pytest.mark.parametrize("how", many.WRAPS)
def test_the_projected_rate_is_that_of_all_parts(how: str) -> None:
    (alone,) = many.values(switched, 1, "plain", group=False)
    for found in many.values(switched, 2, how):
        assert found[1] == pytest.approx(alone[1], rel=1e-12)
        many.close(found[2], alone[2])


def static(rank: int, world: int) -> None:
    model = DistributedDataParallel(net(noise=False), static_graph=True)
    built_in(Loop(model, sgd(model), [GradientAccumulation(2)]), loss_fn, batches(rank, 4), epochs=1)


def test_static_graph_with_micro_batches_says_what_to_change() -> None:
    for error in many.errors(static, 2):
        assert "take static_graph out" in error, error


def test_ranks_without_data_count_for_nothing_in_the_noise() -> None:
    """Two of four ranks measured: 4 samples each, of 16 in the update, which is a share of 4 * 4 / 16 of a rank's part."""
    norm, rows = torch.ones((), dtype=torch.float64), list[torch.Tensor]()
    ranks = [(8, (norm * 2, 1.0)), (8, (norm * 6, 1.0)), (0, None), (0, None)]

    def answers(total: Any) -> list[Any]:
        sums = SimpleNamespace(together=True, total=total)
        states: list[Any] = [SimpleNamespace(world=4, update_size=size, ranks=sums) for size, _ in ranks]
        return [over_ranks(state, norm, found) for state, (_, found) in zip(states, ranks, strict=True)]

    answers(lambda row: rows.append(row) or row)
    found = answers(lambda row: torch.stack(rows).sum(0))
    assert [[float(x) for x in one] for one in found] == [[4.0, 4.0, 16.0]] * 4


def measures(rank: int, world: int, parts: list[tuple[int, int]]) -> Any:
    """The noise and the signal in a first update of which each rank has these samples."""
    model, noise, logged = many.wrap(net(torch.float64, noise=False), "ddp"), NoiseScale(every=2, smoothing=0.0), "noise_scale"
    data = [tuple(x[slice(*parts[rank])] for x in batch) for batch in batches(0, 2, dtype=torch.float64)]
    state = built_in(Loop(model, sgd(model), [noise]), loss_fn, data, epochs=1)
    return noise.means.tolist(), noise.count, logged in state.metrics


def test_a_rank_with_a_single_sample_measures_no_noise() -> None:
    """Its first micro-batch is its last, after which it holds the mean over all ranks; the other's first one has 4 samples."""
    (x, y), model, norms = batches(0, 1, dtype=torch.float64)[0], net(torch.float64, noise=False), []
    for few in (slice(1, 5), slice(0, 8)):
        grads = torch.autograd.grad(loss_fn(model, (x[few], y[few]))["loss"], [*model.parameters()])
        norms.append(float(sum(grad.square().sum() for grad in grads)))
    for means, count, logged in many.values(measures, 2, [(0, 1), (1, 8)]):
        assert (means, count, logged) == (pytest.approx(two_batch_estimate(*norms, 4, 8), rel=1e-9), 1, True)


def test_where_every_rank_has_a_single_sample_no_noise_is_measured_and_that_is_said() -> None:
    for ended in many.run(measures, 2, [(0, 1), (1, 2)]):
        assert ended.value == ([0.0, 0.0], 0, False), ended.error
        assert "can't measure updates of one sample a rank: begin with 2 samples a rank" in ended.said
