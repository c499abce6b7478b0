"""What a step reads from the user's loader, in an order that can be drawn again, at a position that can be kept."""

from __future__ import annotations

import itertools
import random
import sys
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from . import batch as batches
from .rng import derive, isolated, mix
from .store import plain

END = object()


@dataclass(slots=True)
class Chunk:
    """A batch, or a cut of one, with the positions of its samples in the data set."""

    data: Any
    index: list[Any] | None = None
    size: int | None = None


class SeededIndices(list[Any]):
    """A list of indices that seeds all generators for each sample, wherever it is walked: here or in a worker."""

    def __init__(self, indices: Any, base: int) -> None:
        super().__init__(indices)
        self.base = base

    def __iter__(self) -> Iterator[Any]:
        for index in super().__iter__():
            key = mix(self.base, index if isinstance(index, int) else zlib.crc32(repr(index).encode()))
            random.seed(key)
            torch.default_generator.manual_seed(key)
            if numpy := sys.modules.get("numpy"):
                numpy.random.seed(key & 0xFFFFFFFF)
            yield index

    def __reduce__(self) -> Any:  # the default one walks the list, here in the parent
        return SeededIndices, (list(super().__iter__()), self.base)


class Order:
    """Stands in for a DataLoader's (batch) sampler: the same indices, in an order drawn from (seed, epoch)."""

    def __init__(self, inner: Any, owners: Sequence[Any]) -> None:
        self.inner, self.owners, self.seed, self.skip, self.base = inner, owners, 0, 0, 0
        self.drawn: deque[Any] = deque()
        self.seeds_samples = False

    def prepare(self, seed: int, epoch: int, skip: int, seeds_samples: bool) -> None:
        """Set the next iteration: which order, and how much of it was used already."""
        self.seed, self.skip, self.seeds_samples = derive(seed, "order", epoch), skip, seeds_samples
        self.base = derive(seed, "sample", epoch)
        self.drawn.clear()
        for owner in self.owners:
            if hasattr(owner, "set_epoch"):
                owner.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.inner)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __iter__(self) -> Iterator[Any]:
        with isolated(torch.device("cpu"), self.seed):
            for owner in self.owners:
                if isinstance(generator := getattr(owner, "generator", None), torch.Generator):
                    generator.manual_seed(self.seed)
            iterator = iter(self.inner)
            first = list(itertools.islice(iterator, 1))
        for indices in itertools.islice(itertools.chain(first, iterator), self.skip, None):
            self.drawn.append(indices)
            is_list = isinstance(indices, list | tuple) and self.seeds_samples
            yield SeededIndices(indices, self.base) if is_list else indices


class Feed:
    """Reads a loader batch by batch; what a step leaves of one is kept for the next (`left`)."""

    def __init__(self, cut: batches.Cut | None, measure: Callable[[Any], int]) -> None:
        self.cut, self._measure, self.epoch, self.read, self.offset = cut, measure, -1, 0, 0
        self.left: Chunk | None = None
        self.loader: Any = None
        self._opened: Any = None
        self.order: Order | None = None
        self._source: Iterator[Any] = iter(())
        self._shape: dict[str, Any] | None = None

    def attach(self, loader: Any) -> None:
        """Take the order of a map-style DataLoader over; refuse data that a resumed position does not fit."""
        if loader is self.loader:
            return
        self.detach()
        self.loader, shape = loader, {}
        if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
            inner = self._slot(loader)
            owners = (loader, inner, getattr(inner, "sampler", None), loader.sampler, loader.dataset)
            self.order = Order(inner, list({id(o): o for o in owners}.values()))
            self._install(self.order)
            shape = {"samples in the data set": _len(loader.dataset), "batch size of the loader": loader.batch_size}
        for name, value in shape.items():
            if self._shape is not None and self._shape.get(name, value) != value:
                raise ValueError(f"the checkpoint was made with {self._shape[name]} {name}, not {value}; "
                                 "resume with the same data, or start afresh in another folder")  # fmt: skip
        self._shape = shape

    def detach(self) -> None:
        """Put the loader's own sampler back."""
        if self.order is not None:
            self._install(self.order.inner)
        self.loader = self.order = None

    def _slot(self, loader: Any) -> Any:
        return loader.sampler if loader.batch_sampler is None else loader.batch_sampler

    def _install(self, sampler: Any) -> None:
        slot = "sampler" if self.loader.batch_sampler is None else "batch_sampler"
        object.__setattr__(self.loader, slot, sampler)  # DataLoader refuses a plain assignment
        self.loader._iterator = None  # persistent workers hold the sampler they were started with

    def open(self, epoch: int, seed: int, rank: int, seeds_samples: bool, device: torch.device) -> None:
        """Start the epoch's iteration at the kept position: skipped without reading, where the order is ours."""
        if self.epoch != epoch:
            self.epoch, self.read, self.left, self.offset = epoch, 0, None, 0
        elif self._opened is self.loader and isinstance(self.loader, Iterator):
            return  # a used iterator goes on by itself
        self._opened, offset = self.loader, self.offset
        with isolated(device, derive(seed, "loader", epoch, rank)):
            if self.order is not None:
                self.order.prepare(seed, epoch, self.read, seeds_samples)
                self._source = iter(self.loader)
            else:
                self._source = iter(self.loader)
                ahead = list(itertools.islice(self._source, 1))  # many draw their order with the first batch
                self._source = itertools.chain(ahead, self._source)
        if self.order is None:
            next(itertools.islice(self._source, self.read, self.read), None)
        if offset and self.left is None and self.more():
            self.offset = offset
            self._put_back(self._measured(self.left), offset)

    def more(self) -> bool:
        """Tell whether a sample is left in this epoch; reads at most one loader batch ahead."""
        if self.left is None and (data := next(self._source, END)) is not END:
            index = self.order.drawn.popleft() if self.order is not None and self.order.drawn else None
            known = isinstance(index, list) and getattr(self.loader, "in_order", True)
            self.left, self.read, self.offset = Chunk(data, index if known else None), self.read + 1, 0
        return self.left is not None

    def gather(self, batch_size: int | None, accumulate: int) -> list[Chunk]:
        """Return the batches of one update: joined where they can be, else their parts; fewer at the epoch's end."""
        if batch_size is None and accumulate == 1 and self.left is not None:
            only, self.left = [self.left], None
            return only
        found: list[Chunk] = []
        for _ in range(accumulate):
            parts = self._take(batch_size)
            if len(parts) > 1 and (joined := batches.join([part.data for part in parts])) is not None:
                known = all(part.index is not None for part in parts)
                index = [i for part in parts for i in part.index or ()] if known else None
                parts = [Chunk(joined, index, sum(part.size or 0 for part in parts))]
            found += parts
        return found

    def _take(self, wanted: int | None) -> list[Chunk]:
        parts: list[Chunk] = []
        while wanted != 0 and self.more():
            chunk, self.left = self.left, None
            if wanted is None:
                return [chunk]  # type: ignore[list-item]
            chunk = self._measured(chunk)
            take = min(wanted, chunk.size or 0)
            parts.append(piece(chunk, 0, take, self.cut))
            wanted -= take
            self.offset = self.offset + take if take < (chunk.size or 0) else 0
            if self.offset:
                self._put_back(chunk, take)
        return parts

    def _put_back(self, chunk: Chunk, start: int) -> None:
        self.left = piece(chunk, start, chunk.size or 0, self.cut)

    def _measured(self, chunk: Chunk | None) -> Chunk:
        assert chunk is not None
        return chunk if chunk.size is not None else Chunk(chunk.data, chunk.index, self._measure(chunk.data))

    @property
    def empty(self) -> str | None:
        """Why the epoch gave no batch at all; None where it gave one, or began inside."""
        if self.read or self.more():
            return None
        if isinstance(self.loader, Iterator):
            kind = type(self.loader).__name__
            return f"the loader is an iterator ({kind}) with nothing left; pass what can be iterated again"
        if self.order is not None:
            count, loader = _len(self.loader.dataset), self.loader
            sizes = f"{count} samples, batch {loader.batch_size}, drop_last={loader.drop_last}"
            return f"the loader gives 0 batches: {sizes}; give it more data or a smaller batch"
        return f"the loader ({type(self.loader).__name__}) gives 0 batches; give it data"

    def state_dict(self) -> dict[str, Any]:
        """Return the position: epoch, loader batches read, and what is left of the last one."""
        left, read = None, self.read
        if self.left is not None:
            if plain(self.left.data) and plain(self.left.index):
                left = [self.left.data, self.left.index, self.left.size]
            else:
                read -= 1  # it is read again, and its used samples left out
        return {"epoch": self.epoch, "read": read, "offset": self.offset, "shape": self._shape, "left": left}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a position back; `open` goes there."""
        self.epoch, self.read, self.offset, self._shape = (state[k] for k in ("epoch", "read", "offset", "shape"))
        self.left = None if state["left"] is None else Chunk(*state["left"])


def piece(chunk: Chunk, start: int, stop: int, cut: batches.Cut | None) -> Chunk:
    """Return samples start..stop of a measured chunk."""
    total = chunk.size or 0
    index = chunk.index[start:stop] if chunk.index is not None and len(chunk.index) == total else None
    return Chunk(batches.cut(chunk.data, start, stop, total, cut), index, stop - start)


def extent(loader: Any) -> tuple[int | None, int | None]:
    """Return how many batches and how many samples one pass over the loader gives, None where it can't tell."""
    count = _len(loader)
    if isinstance(loader, DataLoader) and count is not None and not isinstance(loader.dataset, IterableDataset):
        sampler = getattr(loader.batch_sampler, "inner", loader.batch_sampler)
        if type(sampler) is BatchSampler and (total := _len(sampler.sampler)) is not None:
            return count, total // sampler.batch_size * sampler.batch_size if sampler.drop_last else total
        if sampler is not None:
            with isolated(torch.device("cpu"), 0):
                return count, sum(len(indices) for indices in sampler)
    if isinstance(loader, Sequence):
        sizes = [batches.size(data) for data in loader]
        return count, None if None in sizes else sum(n or 0 for n in sizes)
    return count, None


def _len(x: Any) -> int | None:
    try:
        return len(x)
    except (TypeError, NotImplementedError):
        return None
