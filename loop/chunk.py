"""A batch, or a cut of one, on its way from the loader to a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from . import batch as batches


@dataclass(slots=True)
class Chunk:
    """A batch, or a cut of one, with the positions of its samples in the data set."""

    data: Any
    index: list[Any] | None = None
    size: int | None = None
    part: bool = False  # of a loader batch


def fresh(x: Any, path: str) -> Any:
    """Return a tensor in memory of its own, unless that is pinned for a device to copy from."""
    return x if isinstance(x, torch.Tensor) and x.is_pinned() else own(x, path)


def own(x: Any, path: str) -> Any:
    """Return a tensor without the storage that it is a view of."""
    return x.clone() if isinstance(x, torch.Tensor) and x.layout == torch.strided and not x.is_nested else x


def piece(chunk: Chunk, start: int, stop: int, cut: batches.Cut | None) -> Chunk:
    """Return samples start..stop of a measured chunk."""
    total = chunk.size or 0
    index = chunk.index[start:stop] if chunk.index is not None and len(chunk.index) == total else None
    return Chunk(batches.cut(chunk.data, start, stop, total, cut), index, stop - start)


def joined(parts: list[Chunk], cut: batches.Cut | None) -> list[Chunk]:
    """Return measured chunks as one where they can be joined, else as they are."""
    if len(parts) < 2 or cut is not None:  # the dimension along which a user's cut cuts is known to it alone
        return parts
    if (data := batches.join([part.data for part in parts], [part.size for part in parts])) is None:
        return parts
    known = all(part.index is not None for part in parts)
    index = [i for part in parts for i in part.index or ()] if known else None
    return [Chunk(data, index, sum(part.size or 0 for part in parts))]
