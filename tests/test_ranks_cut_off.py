"""What ends a run of several ranks, or is refused at its start, where going on would be wrong without a word."""

from __future__ import annotations

import contextlib
import errno
import itertools
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import many
import pytest
import torch
from helpers import adamw, built_in, loader, loss_fn, net
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hookloop.callbacks import Checkpoint, EarlyStopping, GradientAccumulation, TensorBoard
from hookloop.loop import Goal, Loop, store
from hookloop.loop.wrapped import check_mesh


def cut_off(rank: int, world: int, how: str) -> str:
    torch.manual_seed(0)
    model = many.wrap(net(noise=False), how)
    calls = itertools.count()

    def failing(model: nn.Module, batch: Any) -> torch.Tensor:
        if next(calls) == 3:
            raise ZeroDivisionError
        return loss_fn(model, batch)

    loop = Loop(model, adamw(model), [GradientAccumulation(2)])
    data = list(loader(32))
    with contextlib.suppress(ZeroDivisionError):
        built_in(loop, failing, data, epochs=1)
    torch.distributed.barrier()
    try:
        return str(built_in(loop, failing, data, epochs=1).step)
    except RuntimeError as error:
        return str(error)


def test_a_step_cut_off_is_not_done_anew_on_top_of_what_fully_shard_kept() -> None:
    """Of DistributedDataParallel it is, from its first micro-batch on."""
    assert many.values(cut_off, 2, "ddp") == ["2", "2"]
    assert all("which keeps its gradients: build model" in text for text in many.values(cut_off, 2, "fsdp"))


def stopped_around(rank: int, world: int, folder: str) -> list[Any]:
    """The README's loop of one's own, by the same command three times."""
    found = []
    for _ in range(3):
        torch.manual_seed(0)
        model = many.wrap(net(noise=False), "ddp")
        optimizer, made = adamw(model), 0
        loop = Loop(model, optimizer, [EarlyStopping("score", patience=1), Checkpoint(folder, every=2)], resume=folder)
        with loop:
            for batch in loader(96):
                if loop.stopped:
                    break
                loss_fn(model, batch)["loss"].backward()
                with loop.updating(samples=8):
                    optimizer.step()
                optimizer.zero_grad()
                made += 1
                if made % 3 == 0:
                    loop.report({"score": 1.0 + made})
        found.append((made, loop.state.step, loop.state.stop_reason))
    return found


def test_around_a_loop_of_ones_own_all_ranks_hear_of_a_stop_before_the_next_update(tmp_path: Path) -> None:
    for found in many.values(stopped_around, 2, str(tmp_path)):
        assert [one[:2] for one in found] == [(6, 6), (0, 6), (0, 6)]
        assert len({one[2] for one in found}) == 1


def caught_around(rank: int, world: int) -> str:
    model = many.wrap(net(noise=False), "ddp")
    optimizer = adamw(model)

    def fail(*_: Any) -> None:
        if rank == 1:
            raise ArithmeticError("mine")

    loop = Loop(model, optimizer)
    try:
        with loop:
            for batch in loader(64):
                loss_fn(model, batch)["loss"].backward()
                with contextlib.suppress(ArithmeticError), loop.updating(samples=8):
                    optimizer.step()
                    if loop.state.step == 2:
                        fail()
                optimizer.zero_grad()
    except RuntimeError as error:
        return "; ".join([str(error), *getattr(error, "__notes__", ())])
    return "went on"


def test_around_a_loop_of_ones_own_a_rank_that_catches_an_updates_error_ends_all() -> None:
    """At once, by that error's name, and not when the group's patience ends."""
    start = time.monotonic()
    first, second = many.values(caught_around, 2, quiet=30.0)
    assert time.monotonic() - start < 25
    assert "rank 1 failed: ArithmeticError: mine" in first
    assert second != "went on"  # its next backward meets nobody


def full_disk(rank: int, world: int, folder: str) -> None:
    model = many.wrap(net(noise=False), "ddp")
    best = Goal("val_loss")
    loop = Loop(model, adamw(model), [Checkpoint(folder, best=best, background=True, on_failure="stop")])

    def full(*args: Any, **kwargs: Any) -> None:
        time.sleep(0.3)
        raise OSError(errno.ENOSPC, "disk full")

    data = loader(32)
    with loop:
        for _ in loop.epochs(1):
            for step in loop.steps(data):
                for micro in step:
                    with micro:
                        micro.backward(loss_fn)
                loop.update()
            store.write_together = full  # type: ignore[assignment]
        loop.validate(loss_fn, data)


def test_a_last_save_that_fails_ends_all_at_once(tmp_path: Path) -> None:
    for text in many.errors(full_disk, 2, str(tmp_path), within=8.0):
        assert "disk full" in text
        assert "timeout" not in text


def test_what_can_not_be_followed_is_refused() -> None:
    """Parameters on the host that are used on a device, as fully_shard's offloading has them."""
    model = nn.Linear(2, 2)
    model.weight.device_mesh = SimpleNamespace(device_type="cuda")  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"weight lies on the cpu and is used on cuda.*leave offload_policy out"):
        check_mesh(model, 2)


def part_of_the_ranks(rank: int, world: int) -> None:
    group = [torch.distributed.new_group([r]) for r in range(world)][rank]
    model = nn.parallel.DistributedDataParallel(net(noise=False), process_group=group)
    Loop(model, adamw(model))


def test_an_average_over_some_of_the_ranks_is_refused() -> None:
    for text in many.errors(part_of_the_ranks, 2):
        assert "the model is averaged over a process group of 1 of the 2 ranks" in text
        assert "leave process_group out" in text


def one_of_fully_shard(rank: int, world: int, folder: str) -> str:
    model = many.wrap(net(noise=False), "fsdp")
    data = loader(16)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        built_in(Loop(model, adamw(model), [TensorBoard(folder, grad_norm=True)]), loss_fn, data, data, epochs=2)
    return "; ".join(str(one.message) for one in caught)


def test_fully_shard_in_one_process_is_sharded_too(tmp_path: Path) -> None:
    """Its parameters are those that the optimizer holds, also after a validation, and its norm is of whole gradients."""
    assert many.values(one_of_fully_shard, 1, str(tmp_path)) == [""]


def a_forward_before(rank: int, world: int) -> int:
    torch.manual_seed(0)
    model = fully_shard(net(noise=False), mesh=init_device_mesh("cpu", (world,)))
    optimizer = adamw(model)
    with torch.no_grad():
        model(next(iter(loader(8)))[0])
    return built_in(Loop(model, optimizer), loss_fn, loader(16), epochs=1).step


def test_a_forward_of_ones_own_before_the_loop_hides_nothing() -> None:
    found = many.values(a_forward_before, 2)
    assert found[0] == found[1] > 0


def slow_save(rank: int, world: int, folder: str) -> None:
    real = store.disk.sync

    def sync(path: Path) -> None:
        time.sleep(4 if "part" in path.name else 0)
        real(path)

    store.disk.sync = sync
    model = many.wrap(net(noise=False), "ddp")
    built_in(Loop(model, adamw(model), [Checkpoint(folder)]), loss_fn, loader(16), epochs=1)


def test_a_save_longer_than_the_groups_patience_blames_no_rank(tmp_path: Path) -> None:
    """Neither the one that writes nor the one that waits was killed, and the remedy is named."""
    for text in many.errors(slow_save, 2, str(tmp_path), quiet=2.0):
        assert "rank 1 heard nothing from another for longer than the timeout given to init_process_group" in text
        assert "give it a longer one" in text
        assert "killed" not in text
