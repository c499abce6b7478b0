"""Which process this is among several; the only file that asks."""

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
    """Return the smallest value that any rank gives; all must ask at the same moment. Nothing waits for a device."""
    if world == 1 or not dist.is_initialized():
        return value
    found = torch.tensor(value)
    dist.all_reduce(found, dist.ReduceOp.MIN, group=host_group())
    return int(found)


@functools.cache
def host_group() -> Any:
    """Return a group of all ranks that talks over the host."""
    return dist.new_group(backend="gloo")
