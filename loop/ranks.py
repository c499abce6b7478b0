"""Which process this is among several; the only file that asks."""

import os

import torch.distributed as dist


def rank_and_world() -> tuple[int, int]:
    """Return this process's rank and how many there are: torch.distributed's, else torchrun's, else (0, 1)."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
