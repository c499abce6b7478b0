"""What a step reads from the user's loader, in an order that can be drawn again, at a position that can be kept."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from . import batch as batches
from .order import Order
from .rng import derive, generators, isolated, mix, seed_streams
from .store import plain

END = object()


@dataclass(slots=True)
class Chunk:
    """A batch, or a cut of one, with the positions of its samples in the data set."""

    data: Any
    index: list[Any] | None = None
    size: int | None = None
    part: bool = False  # of a loader batch


class Feed:
    """Reads a loader batch by batch; what a step leaves of one is kept for the next (`left`)."""

    def __init__(self, cut: batches.Cut | None, measure: Callable[[Any], int]) -> None:
        self.cut, self._measure, self.epoch, self.read, self.offset = cut, measure, -1, 0, 0
        self.left: Chunk | None = None
        self.again: list[Chunk] = []  # what a step took that was never updated
        self.loader: Any = None
        self.order: Order | None = None
        self._opened: Any = None
        self._source: Iterator[Any] = iter(())
        self._shape: dict[str, Any] = {}
        self._promised: dict[str, Any] = {}
        self.failed: Exception | None = None
        self._before = 0, 0
        self._streams: list[torch.Generator] = []
        self._base = 0

    def attach(self, loader: Any) -> None:
        """Take a loader."""
        if loader is self.loader:
            return
        self.detach()
        self.loader, self._shape = loader, {}
        if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
            self.order = Order(loader)
            self._shape = {"samples in the data set": _len(loader.dataset), "batch size of the loader": loader.batch_size}

    def detach(self) -> None:
        """Let the loader go, with its workers; an iterator, which can't be begun again, is kept."""
        if self.order is not None:
            self.order.close()
        if not isinstance(self._opened, Iterator):
            self._source = iter(())
        self.loader = self.order = None

    def open(self, epoch: int, seed: int, rank: int, seeds_samples: bool, device: torch.device) -> None:
        """Start the epoch's iteration at the kept position: skipped without reading, where the order is ours.

        Raises ValueError for data that a position inside the epoch does not fit.
        """
        promised, self._promised = self._promised, {}
        for name, value in self._shape.items() if self.epoch == epoch else ():
            if promised.get(name, value) != value:
                raise ValueError(f"the checkpoint was made with {promised[name]} {name}, not {value}; "
                                 "resume with the same data, or start afresh in another folder")  # fmt: skip
        if self.epoch != epoch:
            self.epoch, self.read, self.left, self.offset, self.again = epoch, 0, None, 0, []
        elif self._opened is self.loader and isinstance(self.loader, Iterator):
            return  # a used iterator goes on by itself
        try:
            self._start(epoch, seed, rank, seeds_samples, device)
        except Exception as error:
            self.failed = error
            raise

    def _start(self, epoch: int, seed: int, rank: int, seeds_samples: bool, device: torch.device) -> None:
        self._opened, offset, read = self.loader, self.offset, self.read
        self._streams, self._base = [], derive(seed, "read", epoch, rank)
        with isolated(device, derive(seed, "loader", epoch, rank)):
            if self.order is not None:
                # workers' own streams begin anew in a resumed process, so their samples are seeded without a Seed too
                self._source = self.order.iterate(seed, epoch, rank, read, seeds_samples or self.loader.num_workers > 0)
            else:
                self._source = iter(self.loader)
                ahead = list(itertools.islice(self._source, 1))  # many draw their order with the first batch
                self._source = itertools.chain(iter(ahead), self._source)  # chain holds its arguments, an iterator what is left
        if self.order is None:
            if seeds_samples and not isinstance(self.loader, list | tuple):  # it may draw here, for each batch
                self._streams = generators(device)
            for self.read in range(read):
                self._next()
            self.read = read
        if offset and self.left is None and self.more():
            self.offset = offset
            self._put_back(self._measured(self.left), offset)

    def _next(self) -> Any:
        if self._streams:
            seed_streams(mix(self._base, self.read), self._streams)
        try:
            return next(self._source, END)
        except Exception as error:
            self.failed = error
            raise

    def more(self) -> bool:
        """Tell whether a sample is left in this epoch; reads at most one loader batch ahead."""
        if self.left is None and not self.again and (data := self._next()) is not END:
            index = self.order.drawn.popleft() if self.order is not None and self.order.drawn else None
            known = isinstance(index, list | tuple) and getattr(self.loader, "in_order", True)
            self.left, self.read, self.offset = Chunk(data, list(index) if known else None), self.read + 1, 0  # type: ignore[arg-type]
        return self.left is not None or bool(self.again)

    def gather(self, batch_size: int | None, accumulate: int) -> list[Chunk]:
        """Return the batches of one update: joined where they can be, else their parts; fewer at the epoch's end."""
        if self.again:
            again, self.again = self.again, []
            return again
        self._before, left = (self.read, self.offset), self.left
        try:
            return self._gather(batch_size, accumulate)
        except BaseException:
            (self.read, self.offset), self.left = self._before, left  # entered again, the run reads them again
            raise

    def _gather(self, batch_size: int | None, accumulate: int) -> list[Chunk]:
        if batch_size is None and accumulate == 1 and self.left is not None:
            only, self.left, self.offset = [self.left], None, 0
            return only
        found: list[Chunk] = []
        for _ in range(accumulate):
            parts = self._take(batch_size)
            if len(parts) > 1 and (joined := batches.join([part.data for part in parts])) is not None:
                known = all(part.index is not None for part in parts)
                index = [i for part in parts for i in part.index or ()] if known else None
                parts = [Chunk(joined, index, sum(part.size or 0 for part in parts))]
            for part in parts:
                if part.part:  # a view's rounding may differ from that of a restored copy, which lies elsewhere in memory
                    part.data = batches.walk(part.data, fresh)
            found += parts
        return found

    def _take(self, wanted: int | None) -> list[Chunk]:
        parts: list[Chunk] = []
        while wanted != 0 and self.more():
            chunk, self.left = self.left, None
            if wanted is None:
                self.offset = 0
                return [chunk]  # type: ignore[list-item]
            chunk = self._measured(chunk)
            take = min(wanted, chunk.size or 0)
            parts.append(piece(chunk, 0, take, self.cut))
            parts[-1].part = bool(self.offset) or take < (chunk.size or 0)
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
        (read, offset), left = self._before if self.again else (self.read, self.offset), self.left
        kept = None if left is None or self.again else [batches.walk(left.data, own), left.index, left.size]
        if self.again or not plain(kept):
            read, kept = read - 1, None  # it is read again, and its used samples left out
        return {"epoch": self.epoch, "read": read, "offset": offset, "shape": self._shape, "left": kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a position back; `open` goes there."""
        self.epoch, self.read, self.offset, self._promised = (state[k] for k in ("epoch", "read", "offset", "shape"))
        self.left = None if state["left"] is None else Chunk(*state["left"])


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


def extent(loader: Any, walk: bool = True) -> tuple[int | None, int | None]:
    """Return the batches and samples of one pass, None where unknown; `walk` through a custom batch sampler to see."""
    count = _len(loader)
    if isinstance(loader, DataLoader) and count is not None and not isinstance(loader.dataset, IterableDataset):
        sampler = loader.batch_sampler
        if type(sampler) is BatchSampler and (total := _len(sampler.sampler)) is not None:
            return count, total // sampler.batch_size * sampler.batch_size if sampler.drop_last else total
        if sampler is not None and walk:
            with isolated(torch.device("cpu"), 0):
                return count, sum(len(indices) for indices in sampler)
    if isinstance(loader, list | tuple):  # another sequence may load each batch as it is asked for it
        sizes = [batches.size(data) for data in loader]
        return count, None if None in sizes else sum(n or 0 for n in sizes)
    return count, None


def _len(x: Any) -> int | None:
    try:
        return len(x)
    except (TypeError, NotImplementedError):
        return None
