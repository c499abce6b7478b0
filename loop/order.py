"""The order of a map-style DataLoader's samples, and each sample's randomness, drawn from (seed, epoch) alone."""

from __future__ import annotations

import itertools
import zlib
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from .rng import derive, isolated, mix, seed_streams


def seed_sample(base: int, index: Any) -> None:
    """Seed all generators of this process for one sample."""
    key = mix(base, index if isinstance(index, int) else zlib.crc32(repr(index).encode()))
    seed_streams(key, [torch.default_generator])


class SeededIndices(list[Any]):
    """A list of indices that seeds all generators for each sample, wherever it is walked: here or in a worker."""

    def __init__(self, indices: Any, base: int) -> None:
        super().__init__(indices)
        self.base = base

    def __iter__(self) -> Iterator[Any]:
        for index in super().__iter__():
            seed_sample(self.base, index)
            yield index

    def __reduce__(self) -> Any:  # the default one walks the list, here in the parent
        return SeededIndices, (list(super().__iter__()), self.base)


class SeededIndex(int):
    """One index, where nothing is collated: it seeds when a worker unpickles it; `Order` seeds where there is none."""

    base: int

    def __reduce__(self) -> Any:
        return unpickle_index, (int(self), self.base)


class SeededBatch(list[Any]):
    """Indices that the data set takes whole: they seed when a worker unpickles them."""

    base: int

    def __reduce__(self) -> Any:
        return unpickle_index, (list(self), self.base)


def unpickle_index(index: Any, base: int) -> Any:
    """Return the index, in the worker that is about to read its sample."""
    seed_sample(base, index)
    return index


class Order:
    """Stands in for a DataLoader's (batch) sampler while it is iterated: the same indices, in our order."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.loader = loader
        self.slot = "sampler" if loader.batch_sampler is None else "batch_sampler"
        self.inner: Any = getattr(loader, self.slot)
        self.drawn: deque[Any] = deque()
        self.seed, self.skip = 0, 0
        self.base: int | None = None

    def iterate(self, seed: int, epoch: int, skip: int, seeds_samples: bool) -> Iterator[Any]:
        """Iterate the loader in the order of (seed, epoch) from the `skip`-th batch on; its own sampler stays its own."""
        loader, self.seed, self.skip = self.loader, derive(seed, "order", epoch), skip
        self.base = derive(seed, "sample", epoch) if seeds_samples else None
        self.drawn.clear()
        for owner in self._owners():
            if hasattr(owner, "set_epoch"):
                owner.set_epoch(epoch)
        if getattr(loader._iterator, "_index_sampler", self) is not self:
            loader._iterator = None  # persistent workers keep the sampler that they were started with
        object.__setattr__(loader, self.slot, self)  # DataLoader refuses a plain assignment
        try:
            return iter(loader)
        finally:
            object.__setattr__(loader, self.slot, self.inner)

    def close(self) -> None:
        """Let persistent workers that follow this order go."""
        if getattr(self.loader._iterator, "_index_sampler", None) is self:
            self.loader._iterator = None

    def _owners(self) -> list[Any]:
        owners = (self.loader, self.inner, getattr(self.inner, "sampler", None), self.loader.sampler, self.loader.dataset)
        return list({id(owner): owner for owner in owners}.values())

    def __len__(self) -> int:
        return len(self.inner)

    def __iter__(self) -> Iterator[Any]:
        with isolated(torch.device("cpu"), self.seed):
            for owner in self._owners():
                if isinstance(generator := getattr(owner, "generator", None), torch.Generator):
                    generator.manual_seed(self.seed)
            iterator = iter(self.inner)
            first = list(itertools.islice(iterator, 1))
        for drawn in itertools.islice(itertools.chain(first, iterator), self.skip, None):
            self.drawn.append(drawn)
            yield drawn if self.base is None else self._seeded(drawn, self.base)

    def _seeded(self, drawn: Any, base: int) -> Any:
        if self.slot == "batch_sampler":
            return SeededIndices(drawn, base)
        seed_sample(base, drawn)
        if type(drawn) in (int, list):
            drawn = SeededIndex(drawn) if type(drawn) is int else SeededBatch(drawn)
            drawn.base = base
        return drawn
