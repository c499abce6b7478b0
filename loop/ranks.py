"""Which process this is among several, and what they agree on; the only file that asks."""

import contextlib
import functools
import os
from typing import Any

import torch
import torch.distributed as dist


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
