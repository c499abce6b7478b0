"""The order of a map-style DataLoader's samples, and each batch's randomness, drawn from (seed, epoch) alone; its extent."""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset

from . import batch as batches
from .rng import derive, drawing, generators, isolated, mix, seed_streams, snapshot

HEAD, ENOUGH = 64, 12  # batches that two epochs are compared by; so few samples a shuffle may well give alike twice


class Seeded:
    """A batch of indices, or one, that seeds all generators of the worker that unpickles it, just before it reads."""

    def __init__(self, drawn: Any, key: int) -> None:
        self.drawn, self.key = drawn, key

    def __reduce__(self) -> Any:
        return unpickle, (self.drawn, self.key)


def unpickle(indices: Any, key: int) -> Any:
    """Return the indices, in the worker that is about to read their samples."""
    seed_streams(key, [torch.default_generator])
    return indices


class Order:
    """Stands in for a DataLoader's (batch) sampler while it is iterated: the same indices, in our order.

    Where data are not `mapped` (an IterableDataset), what it gives only seeds.
    """

    def __init__(self, loader: DataLoader[Any], mapped: bool = True) -> None:
        self.loader, self.mapped = loader, mapped
        self.slot = "sampler" if loader.batch_sampler is None else "batch_sampler"
        self.inner: Any = getattr(loader, self.slot)
        self.drawn: deque[Any] = deque()
        self.seed = self.epoch = self.skip = self.begun = 0
        self.base: int | None = None
        self.dealer = dealer(loader) if mapped else None
        self.several = False  # ranks, each of which reads its part of an order
        self.followed = False  # the loader's iterator asked us, and not another (batch) sampler
        self.total: int | None = None  # batches drawn in an epoch, known once it has no more
        self._late: tuple[int, torch.device] | None = None
        self._head: tuple[int, list[Any]] | None = None

    def iterate(
        self, seed: int, epoch: int, rank: int, skip: int, seeds_samples: bool, device: torch.device, begun: int = 0
    ) -> tuple[Iterator[Any], list[Any]]:
        """Iterate the loader in the order of (seed, epoch) from the `skip`-th batch on; its own sampler stays its own.

        Returns the iterator, and what was read of it already. `begun`: what other numbers of ranks used of the epoch, in
        samples, all ranks' together; the rest is dealt out anew.
        """
        loader, self.seed, self.skip = self.loader, derive(seed, "order", epoch), skip if self.mapped else 0
        self.epoch, self.begun, self.followed, self.total, self._late = epoch, begun, False, None, None
        base = derive(seed, "sample", epoch, rank, *([begun] if begun else []))
        self.base = base if seeds_samples else None
        self.drawn.clear()
        # persistent workers keep the sampler that they were started with, and the epoch that their data set was told
        if getattr(loader._iterator, "_index_sampler", self) is not self or hasattr(loader.dataset, "set_epoch"):
            loader._iterator = None
        object.__setattr__(loader, self.slot, self)  # DataLoader refuses a plain assignment
        try:
            source: Iterator[Any] = iter(loader)
            if self.followed:
                return source, []
            # an `__iter__` of the loader's own that is a generator runs from the first batch on, and asks for indices then
            self.base, self._late = base, (derive(seed, "first", epoch, rank), device)
            source = self._alone(source, *self._late)
            return source, list(itertools.islice(source, 1))
        finally:
            object.__setattr__(loader, self.slot, self.inner)

    def _alone(self, source: Iterator[Any], key: int, device: torch.device) -> Iterator[Any]:
        """Read each batch on streams seeded by its number: the first to be read is another one in a run that was resumed."""
        number = 0
        while True:
            with isolated(device, mix(key, number)):
                try:
                    data = next(source)
                except StopIteration:
                    return
            number = 1 + max(number, self.skip if self.followed else 0)
            yield data

    @property
    def skips(self) -> bool:
        """Whether what a run used already is left out without being read."""
        return self.mapped and self.followed

    def close(self) -> None:
        """Let persistent workers that follow this order go."""
        if getattr(self.loader._iterator, "_index_sampler", None) is self:
            self.loader._iterator = None

    def __len__(self) -> int:
        return len(self.inner)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)  # a loader of the user's own may ask its (batch) sampler for more than indices

    def __iter__(self) -> Iterator[Any]:
        self.followed = True
        if self._late is not None:
            key, device = self._late
            seed_streams(mix(key, self.skip), generators(device))
        return self._indices()

    def _indices(self) -> Iterator[Any]:
        compared = self.several and self.mapped and not any(hasattr(x, "set_epoch") for x in samplers(self.inner))
        with isolated(torch.device("cpu"), self.seed), dealt(self.dealer, self.begun):
            for generator in own_generators(owners(self.loader, self.inner) if self.mapped else []):
                generator.manual_seed(self.seed)
            iterator = iter(self.inner)
            first = list(itertools.islice(iterator, HEAD if compared else 1))
            deque(itertools.islice(iterator, max(0, self.skip - len(first))), 0)  # here, where skipped ones draw what they drew
            if self.mapped and not draws_at_once(self.inner):
                iterator = drawing(iterator, snapshot(torch.device("cpu")))
        if compared:
            self._compare(first)
        number = self.skip - 1
        for number, drawn in enumerate(itertools.chain(first[self.skip :], iterator), self.skip):
            if self.mapped:
                self.drawn.append(drawn)
            yield drawn if self.base is None else self._seeded(drawn, mix(self.base, number))
        self.total = number + 1

    def _compare(self, first: list[Any]) -> None:
        """Refuse an order that is no plain one and the same in two epochs: nothing we seed reaches what drew it."""
        head = [i for drawn in first for i in (drawn if isinstance(drawn, list | tuple) else [drawn])]
        epoch, before = self._head = self._head or (self.epoch, head)
        if epoch != self.epoch and len(head) >= ENOUGH and head == before and not ascending(head):
            kind = type(samplers(self.inner)[-1]).__name__
            raise ValueError(f"{kind} gives the same shuffled order in epochs {epoch} and {self.epoch}, and nothing lets the ranks "
                             "draw another one together; give it a method set_epoch(epoch), called before each epoch, or an "
                             "attribute `generator` (torch.Generator) that it draws from")  # fmt: skip

    def _seeded(self, drawn: Any, key: int) -> Any:
        if self.loader.num_workers == 0:
            seed_streams(key, [torch.default_generator])  # the samples are read next, here
            return drawn
        return Seeded(drawn, key)


def samplers(inner: Any) -> list[Any]:
    """Return a (batch) sampler, and the one inside it."""
    return [x for x in (inner, getattr(inner, "sampler", None)) if x is not None]


def draws_at_once(sampler: Any) -> bool:
    """Tell whether a (batch) sampler draws all from the global generators when its first indices are asked for, as torch's do."""
    method = getattr(type(sampler), "__iter__", None)
    if method is None or isinstance(sampler, Iterator):
        return False
    made = (getattr(method, "__module__", None) or "builtins").split(".")[0]  # a list's or a range's own
    inner = getattr(sampler, "sampler", None)
    return made in ("torch", "torchdata", "builtins") and (inner is None or draws_at_once(inner))


def ascending(indices: list[Any]) -> bool:
    """Tell whether indices never go down."""
    with contextlib.suppress(Exception):  # keys of any kind, which may have no order
        return all(a <= b for a, b in itertools.pairwise(indices))
    return False


def dealer(loader: Any) -> DistributedSampler[Any] | None:
    """Return the sampler that deals a loader's order out to ranks in torch's own way; None for any other."""
    found = [*samplers(getattr(loader, "batch_sampler", None)), getattr(loader, "sampler", None)]
    return next((x for x in found if getattr(type(x), "__iter__", None) is DistributedSampler.__iter__), None)


@contextlib.contextmanager
def dealt(sampler: DistributedSampler[Any] | None, begun: int = 0) -> Iterator[None]:
    """Have a DistributedSampler deal out the order without its first `begun` samples, none of them twice, for a while.

    It is the sampler itself that does, under other numbers, so that whatever iterates or measures it finds them.
    """
    if sampler is None:
        yield
        return
    total, ranks, start = len(sampler.dataset), sampler.num_replicas, begun + sampler.rank  # type: ignore[arg-type]
    stop = begun + (total - begun) // ranks * ranks if sampler.drop_last else total
    before = {name: vars(sampler)[name] for name in ("rank", "num_samples", "total_size")}
    vars(sampler).update(rank=start, num_samples=len(range(start, stop, ranks)), total_size=stop)
    try:
        yield
    finally:
        vars(sampler).update(before)


def owners(loader: Any, inner: Any) -> list[Any]:
    """Return what of a loader, around this (batch) sampler, may have a generator or want to know the epoch."""
    found = (loader, inner, getattr(inner, "sampler", None), getattr(loader, "sampler", None), getattr(loader, "dataset", None))
    return list({id(owner): owner for owner in found}.values())


def own_generators(owners: Iterable[Any]) -> list[torch.Generator]:
    """Return the generators that a loader was given."""
    found = [getattr(owner, "generator", None) for owner in owners]
    return [generator for generator in found if isinstance(generator, torch.Generator)]


def told(loader: Any) -> list[Any]:
    """Return what of a loader asks to be told the epoch (`set_epoch`): itself, its samplers, its data set."""
    every = [] if isinstance(loader, Iterator) else owners(loader, getattr(loader, "batch_sampler", None))
    return [owner for owner in every if callable(getattr(owner, "set_epoch", None))]


def tell_epoch(loader: Any, epoch: int, seed: int, device: torch.device) -> None:
    """Tell it; what it draws then hangs on the epoch alone."""
    if found := told(loader):
        with isolated(device, derive(seed, "epoch", epoch)):
            for owner in found:
                owner.set_epoch(epoch)


@contextlib.contextmanager
def apart(loader: Any, key: int | None) -> Iterator[None]:
    """Seed a loader's own generators for a while, and put them back; None leaves them alone. No sample comes twice."""
    found = [] if key is None else own_generators(owners(loader, getattr(loader, "batch_sampler", None)))
    before = [generator.get_state() for generator in found]
    try:
        for generator in found:
            generator.manual_seed(key or 0)
        with dealt(dealer(loader)):
            yield
    finally:
        for generator, state in zip(found, before, strict=True):
            generator.set_state(state)


def extent(loader: Any, walk: bool = True, size: batches.Size = batches.size) -> tuple[int | None, int | None]:
    """Return the batches and samples of this rank's pass, None where unknown; `walk` through a custom batch sampler to see."""
    with dealt(dealer(loader)):
        return _extent(loader, walk, size)


def _extent(loader: Any, walk: bool, size: batches.Size) -> tuple[int | None, int | None]:
    count = length(loader)
    if isinstance(loader, DataLoader) and count is not None and not isinstance(loader.dataset, IterableDataset):
        sampler = loader.batch_sampler
        if type(sampler) is BatchSampler and (total := length(sampler.sampler)) is not None:
            return count, total // sampler.batch_size * sampler.batch_size if sampler.drop_last else total
        if sampler is not None and walk:
            with isolated(torch.device("cpu"), 0):
                return count, sum(len(indices) for indices in sampler)
    if isinstance(loader, list | tuple):  # another sequence may load each batch as it is asked for it
        sizes = [size(data) for data in loader]
        return count, None if None in sizes else sum(n or 0 for n in sizes)
    return count, None


def length(x: Any) -> int | None:
    """Return len(x), None where there is none."""
    try:
        return len(x)
    except Exception:  # whatever a data set says where it knows none
        return None
