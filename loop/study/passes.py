"""One pass over the data, told beforehand: the batches of a loader, and how updates and micro-batches are made of them."""

from __future__ import annotations

import functools
from bisect import bisect_right
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from .. import batch as batches
from ..order import extent
from ..rng import isolated


def loader_sizes(loader: Any, by_samples: bool) -> tuple[list[int] | None, str]:
    """Return the samples of an epoch's batches, 0 where only their number is known, None where that isn't; and what is untold."""
    count, samples = extent(loader)
    if count is None or (samples is None and by_samples):
        return None, f"the loader tells no {'length' if count is None else 'number of samples'}"
    return sizes_of(loader, count, samples), "the loader does not tell its batches' sizes"


def sizes_of(loader: Any, count: int, samples: int | None) -> list[int]:
    """Return the samples of each of `count` batches, 0 where they are not known."""
    if not count:
        return []
    if isinstance(loader, list | tuple):
        return [batches.size(data) or 0 for data in loader]
    size: Any = getattr(loader, "batch_size", None)
    mapped = isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)
    if samples is None:
        return [size if isinstance(size, int) and getattr(loader, "drop_last", False) else 0] * count
    if size is None and mapped:
        with isolated(torch.device("cpu"), 0):
            return [len(indices) for indices in loader.batch_sampler]
    return [size] * (count - 1) + [samples - size * (count - 1)]


def gather(used: int, ends: list[int], batch_size: int | None, accumulate: int) -> list[int]:
    """Return the batches of the next update of an epoch whose loader batches end at `ends`, `used` samples of it gone."""
    found = []
    for _ in range(accumulate):
        if used >= ends[-1]:
            break
        stop = ends[bisect_right(ends, used)] if batch_size is None else min(used + batch_size, ends[-1])
        found.append(stop - used)
        used = stop
    return found


@functools.lru_cache(1024)
def largest_micro(parts: tuple[int, ...], limit: int | None, least: int) -> int:
    """Return the largest micro-batch of an update, as a step cuts it: each batch in equal parts under the limit."""
    if len(parts) < least:
        limit = min(-(-sum(parts) // least), limit or sum(parts)) or 1
    return max(n if limit is None or not n else -(-n // -(-n // limit)) for n in parts)
