"""Which process this is among several, and what they agree on; the only file that asks."""

from __future__ import annotations

import contextlib
import functools
import os
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from .checks import say

if TYPE_CHECKING:
    from .step import Step

FINE = 2**40  # what a rank answers that needs no redo: more than any size


def rank_and_world() -> tuple[int, int]:
    """Return this process's rank and how many there are: torch.distributed's, else torchrun's, else (0, 1)."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def smallest(value: int, world: int) -> int:
    """Return the smallest value that any rank gives; all must ask at the same moment. No device is waited for."""
    if world == 1 or not dist.is_initialized():
        return value
    found = torch.tensor(value)
    dist.all_reduce(found, dist.ReduceOp.MIN, group=host_group(dist.group.WORLD))
    return int(found)


@functools.cache
def host_group(world: Any) -> Any:
    """Return a group of all ranks that talks over the host, one for each life of the process group."""
    return dist.new_group(backend="gloo")


def reducing(model: Any, last: bool, alone: bool) -> contextlib.AbstractContextManager[Any]:
    """Return the context of a micro-batch in which ranks average their gradients in a step's last backward only.

    `alone`: nothing at all is exchanged, not even DDP's buffers, so that a rank may fail without the others missing it.
    """
    if hasattr(model, "set_requires_gradient_sync"):  # FSDP2
        model.set_requires_gradient_sync(last and not alone)
    if alone and hasattr(model, "require_forward_param_sync"):
        model.require_forward_param_sync = False
    return model.no_sync() if (alone or not last) and hasattr(model, "no_sync") else contextlib.nullcontext()


def is_new(step: Step) -> bool:
    """Tell whether this step's micro-batches are larger, on some rank, than any that went through: then it is rehearsed.

    In a rehearsal each rank runs the step alone, so that one that fails is missed by none. FSDP's forward can't be one.
    """
    loop = step.loop
    if not loop.hooks["on_exception"] or hasattr(loop.state.model, "unshard"):
        return False
    step.largest = -smallest(-loop.state.micro_size, loop.state.world)
    model: Any = loop.state.model
    if step.largest > loop.proven and hasattr(model, "reducer"):
        model.reducer._rebuild_buckets()  # else DDP's ranks would wait for one another in the next forward
    return step.largest > loop.proven


def redoes(step: Step, error: Exception, size: int) -> bool:
    """Tell whether a step, in which `size` samples failed, is redone: under several ranks by all of them or by none."""
    loop = step.loop
    if loop.state.world == 1:
        return loop.redoes(error, size)
    if not step.rehearsal:
        say(error, "in a pass in which the ranks depend on one another: one of them alone can't redo it, go on from the "
                       "last checkpoint")  # fmt: skip
        return False
    answer = loop.redoes(error, size)
    agreed(step, (loop.state.micro_batch_size or FINE - 1) if answer else 0)
    return answer


def agreed(step: Step, again: int = FINE) -> bool:
    """Tell whether a rehearsal went well on all ranks; each asks once in it.

    `again`: it did not here, and would be redone at that size (0: nor can it be redone). Where others ask for a smaller
    size, this rank's callbacks hear of it as of an error of their own.
    """
    size = smallest(again, step.loop.state.world)
    if size == FINE:
        step.loop.proven = step.largest
        model: Any = step.loop.state.model
        if hasattr(model, "require_forward_param_sync"):
            model.require_forward_param_sync = True
    if size == FINE or again == 0:
        return size == FINE
    if size == 0:
        raise RuntimeError("another rank failed inside this step; its own error says why")
    error = torch.OutOfMemoryError(f"another rank ran out of memory and asks for micro-batches of {size} samples")
    if size != again and not step.loop.redoes(error, 2 * size):
        raise error
    step.fail(error)
    return False
