"""What a step reads from the user's loader, in an order that can be drawn again, at a position that can be kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.data.dataloader import _BaseDataLoaderIter

from . import batch as batches
from . import reading
from .chunk import Chunk, fresh, joined, own, piece
from .order import Order, dealt, tell_epoch
from .reading import log
from .reshard import check_dealer, without
from .rng import derive, generators, isolated, mix, seed_streams
from .shape import fit, restarting, says_where, shape, told_in_workers
from .store import plain

END = object()


class Feed:
    """Reads a loader batch by batch; what a step leaves of one is kept for the next (`left`)."""

    def __init__(self, cut: batches.Cut | None, measure: Callable[[Any], int], strict: bool) -> None:
        self.cut, self._measure, self.strict, self.epoch, self.read, self.offset = cut, measure, strict, -1, 0, 0
        self.left: Chunk | None = None
        self.again: list[Chunk] = []  # what a step took that was never updated
        self.loader: Any = None
        self.order: Order | None = None
        self._opened: Any = None
        self._source: Iterator[Any] = iter(())
        self.shape: dict[str, Any] = {}
        self._promised: dict[str, Any] = {}  # the shape of the checkpoint's run
        self.ranks, self.rereads = 1, False  # under several ranks a position holds no data that can be read again
        self.begun = 0  # samples of this epoch that another number of ranks used, all of theirs together
        self.constant = False  # one loader is for all epochs; a program that brings its own to each may change it
        self.failed = False  # the error that is on its way came from reading
        self._ahead: list[Any] = []
        self._first: Any = None
        self.stateful = self._ended = self._lied = False
        self._kept: tuple[Any, bool] | None = None  # a stateful loader's own state, and whether its epoch had ended
        self._before = 0, 0
        self._streams: list[torch.Generator] = []
        self._base = 0

    def attach(self, loader: Any) -> None:
        """Take a loader."""
        if loader is self.loader:
            return
        self.detach()
        self.loader, self.shape, self.stateful = loader, {}, False
        batched = isinstance(loader, DataLoader)
        mapped = batched and not isinstance(loader.dataset, IterableDataset)
        if mapped or (batched and loader.num_workers):
            self.order = Order(loader, mapped)
        if not mapped and not isinstance(loader, Iterator):
            self.stateful = all(callable(getattr(loader, name, None)) for name in ("state_dict", "load_state_dict"))
        if not isinstance(loader, Iterator):
            self.shape = shape(loader)
        self._length = reading.batches_of(loader)  # as the run is planned with
        if batched and loader.num_workers and not getattr(loader, "in_order", True):
            log.warning("DataLoader(in_order=False) gives batches as its workers end: no two runs are the same, and one "
                        "resumed inside an epoch may repeat samples and miss others; leave in_order out")  # fmt: skip

    def detach(self) -> None:
        """Let the loader go, with its workers; an iterator, which can't be begun again, is kept."""
        if self.stateful and self._opened is self.loader:
            self._kept = self._own_state(), self._ended
        if self.order is not None:
            self.order.close()
        if self.failed and not getattr(self.loader, "persistent_workers", False):
            reading.shut_down(self._source)
        if not isinstance(self._opened, Iterator):
            self._source, self._ahead = iter(()), []
        self.loader, self.order, self.failed, self.constant = None, None, False, False

    def open(self, epoch: int, seed: int, rank: int, seeds_samples: bool, device: torch.device) -> None:
        """Start the epoch's iteration at the kept position: skipped without reading, where the order is ours.

        Raises ValueError for data that a position inside the epoch does not fit.
        """
        promised, self._promised, inside = self._promised, {}, self.epoch == epoch
        check_dealer(self.loader, rank, self.ranks, self.begun if inside and not self._ended else 0)
        if promised and self.shape and (inside or self.constant):
            fit(self, promised, inside)
        if not inside:
            self.epoch, self.read, self.left, self.offset, self.again, self.begun = epoch, 0, None, 0, [], 0
        elif self._opened is self.loader and isinstance(self.loader, Iterator):
            return  # a used iterator goes on by itself
        self._start(epoch, seed, rank, seeds_samples, device)

    def _start(self, epoch: int, seed: int, rank: int, seeds_samples: bool, device: torch.device) -> None:
        self._opened, self._source, self._ahead, offset, read = self.loader, iter(()), [], self.offset, self.read
        self._streams, self._base = [], derive(seed, "read", epoch, rank)
        if self._ended and self.begun and not read:  # an epoch of other ranks, that went to its end
            return
        (kept, ended), self._kept, self._ended = self._kept or (None, False), None, False
        goes_on = self.stateful and says_where(kept) and (bool(read) or ended)
        if goes_on and ended and read:
            self._kept, self._ended = (kept, True), True  # the next epoch begins with it
            return
        if goes_on and (read or not told_in_workers(self.loader)):
            self.loader.load_state_dict(kept)
            if not read:  # an ended epoch's state may hold its number
                tell_epoch(self.loader, epoch, seed, device)
        with isolated(device, key := derive(seed, "loader", epoch, rank)):
            if self.order is not None:
                # workers' own streams begin anew in a resumed process, so their samples are seeded without a Seed too
                seeds_samples = seeds_samples or self.loader.num_workers > 0 or self.rereads
                self.order.several = self.ranks > 1
                given = seed, epoch, rank, read, seeds_samples, device, self.begun
                self._source, self._ahead = self._reading(self.order.iterate, *given)
            else:
                with restarting(self.loader, not read):
                    self._source = self._reading(iter, self.loader)
                if goes_on and not read:  # torchdata's puts that state back in `iter` only
                    tell_epoch(self.loader, epoch, seed, device)
                if not (goes_on and read):  # else it draws its order in `iter`, by its own state, and is not seeded again
                    key = key if self.stateful else derive(seed, "first", epoch, rank)
                    if self._begin(key, device) is END and goes_on:  # it rewinds in `iter`, not behind its last batch
                        self._source = self._reading(iter, self.loader)
                        self._begin(key, device)
        if self.order is None or not self.order.skips:
            if seeds_samples and self.order is None and not isinstance(self.loader, list | tuple):  # which may draw here
                self._streams = generators(device)
            if not goes_on:
                self._read_forward(read)
        if offset and self.left is None and self.more():
            chunk, self.left = self._measured(self.left), None
            if offset < (chunk.size or 0):  # else all of it was used: the last one, which may be short, of another size
                self.offset = offset
                self.left = piece(chunk, offset, chunk.size or 0, self.cut)

    def _begin(self, key: int, device: torch.device) -> Any:
        seed_streams(key, generators(device))
        self._ahead = [self._reading(next, self._source, END)]  # many draw their order with the first batch
        return self._ahead[0]

    def _read_forward(self, count: int) -> None:
        """Read what the run has used already, and leave it out."""
        skipped = range(count) if isinstance(self.loader, list | tuple) else reading.forward(self.loader, count)
        for self.read in skipped:
            self._next()
        self.read = count

    def _next(self) -> Any:
        if self._streams:
            seed_streams(mix(self._base, self.read), self._streams)
        data = self._ahead.pop() if self._ahead else self._reading(next, self._source, END)
        if self.read < 2 and self.epoch == 0 and data is not END:
            self._look_at(data)
        return data

    def _reading(self, act: Callable[..., Any], *given: Any) -> Any:
        """Return act(*given); an error in it says what was read."""
        try:
            found = act(*given)
            # torch's own iterator ends with nothing drawn: what is drawn was being read when it ended
            if found is END and self.order is not None and self.order.drawn and isinstance(self._source, _BaseDataLoaderIter):
                raise RuntimeError(reading.STOPPED)
            return found
        except Exception as error:
            self.failed, drawn = True, self.order.drawn if self.order is not None else ()
            known = drawn[0] if drawn and getattr(self.loader, "in_order", True) else None
            reading.explain(error, self.loader, self._source, f"loader batch {self.read} of epoch {self.epoch}", known)
            raise

    def blames(self, error: BaseException | None) -> bool:
        """Tell whether an error came from reading; that of a dead worker comes up anywhere, by a signal."""
        return self.failed or (isinstance(error, RuntimeError) and reading.died(error, self._source))

    def _look_at(self, data: Any) -> None:
        """Warn of samples miscounted, and of workers that all give the same: the first batch is kept until the second is there."""
        if self.read == 0 and (text := batches.in_doubt(data, self._measure)):
            log.warning(text)
        first, self._first = self._first, data if self.read == 0 else None
        if self.read == 1 and first is not None and (text := reading.unsharded(self.loader, first, data)):
            log.warning(text)

    def more(self) -> bool:
        """Tell whether a sample is left in this epoch; reads at most one loader batch ahead."""
        if self.left is not None or self.again:
            return True
        if not self._ended and (data := self._next()) is not END:
            index = None
            if self.order is not None and self.order.drawn:
                drawn = self.order.drawn.popleft()
                known = isinstance(drawn, list | tuple) and getattr(self.loader, "in_order", True)
                index = list(drawn) if known else None
            self.left, self.read, self.offset = Chunk(data, index), self.read + 1, 0
            return True
        if not self._ended:
            self._ended = True
            total = self.order.total if self.order is not None and self.order.skips else None
            with dealt(None if self.order is None else self.order.dealer, self.begun):
                text = reading.miscounted(self.loader, self.read)
            self._warn(text and f"{text}: {reading.OFF}", reading.reshaped(self.loader, self.read, total))
        return False

    def check_length(self) -> None:
        """Warn of a loader that, told of the epoch, has another length than a run of so many epochs was planned with."""
        if not self.begun:
            self._warn(reading.regrown(self.loader, self._length, self.epoch))

    def _warn(self, *texts: str | None) -> None:
        """Say, once in a run, that numbers of batches are not what they were said to be."""
        for text in [text for text in texts if text and not self._lied]:
            log.warning(text)
        self._lied = self._lied or any(texts)

    def gather(self, batch_size: int | None, accumulate: int) -> list[Chunk]:
        """Return the batches of one update: joined where they can be, else their parts; fewer at the epoch's end."""
        if self.again:
            again, self.again = self.again, []
            return again
        self._before, left = (self.read, self.offset), self.left
        found: list[Chunk] = []
        try:
            if batch_size is not None:
                return self._cut_to(batch_size, accumulate)
            while len(found) < accumulate and self.more():  # loader batches as they are
                found.append(self.left)  # type: ignore[arg-type]
                self.left, self.offset = None, 0
            return found
        except BaseException:
            (self.read, self.offset), self.left = self._before, left  # entered again, the run reads them again
            raise

    def _cut_to(self, batch_size: int, accumulate: int) -> list[Chunk]:
        found: list[Chunk] = []
        for _ in range(accumulate):
            parts = joined(self._take(batch_size), self.cut)
            for part in parts:
                if part.part:  # a view's rounding may differ from that of a restored copy, which lies elsewhere in memory
                    part.data = batches.walk(part.data, fresh)
            found += parts
        return found

    def _take(self, wanted: int) -> list[Chunk]:
        parts: list[Chunk] = []
        while wanted and self.more():
            chunk, self.left = self._measured(self.left), None
            take = min(wanted, chunk.size or 0)
            parts.append(piece(chunk, 0, take, self.cut))
            parts[-1].part = bool(self.offset) or take < (chunk.size or 0)
            wanted -= take
            self.offset = self.offset + take if take < (chunk.size or 0) else 0
            if self.offset:
                self.left = piece(chunk, take, chunk.size or 0, self.cut)
        return parts

    def _measured(self, chunk: Chunk | None) -> Chunk:
        assert chunk is not None
        return chunk if chunk.size is not None else Chunk(chunk.data, chunk.index, self._measure(chunk.data))

    def lends(self) -> bool:
        """Let an evaluation iterate the loader; tell whether that leaves training's iterator and its place as they are."""
        if self.stateful and self._opened is self.loader:
            if not self.over:
                return False
            self._kept = self._own_state(), True  # the next epoch goes on from here
        return not getattr(self.loader, "persistent_workers", False)

    def _own_state(self) -> Any:
        return self.loader.state_dict() if self._kept is None else self._kept[0]

    @property
    def over(self) -> bool:
        """Whether all of the epoch was used."""
        return self._ended and self.left is None and not self.again

    @property
    def empty(self) -> str | None:
        """Why the epoch gave no batch at all; None where it gave one, or began inside."""
        if self.read or self.begun or self.more():
            return None
        return without(self.loader) or reading.nothing(self.loader, self.order is not None and self.order.mapped)

    def state_dict(self) -> dict[str, Any]:
        """Return the position: epoch, loader batches read, and what is left of the last one."""
        (read, offset), left = self._before if self.again else (self.read, self.offset), self.left
        again = bool(self.again) or (left is not None and self.rereads and self.order is not None and self.order.skips)
        kept = None if left is None or again else [batches.walk(left.data, own), left.index, left.size]
        if again or not plain(kept):
            read, kept = read - 1, None  # it is read again, and its used samples left out
        passed = kept is None and (left is not None or bool(self.again))  # what the loader can't go back to
        own_state = self._own_state() if self.stateful and self._opened is self.loader and not passed else None
        return {"epoch": self.epoch, "read": read, "offset": offset, "shape": self.shape, "left": kept,
                "loader": own_state, "ended": self._ended and not self.again, "begun": self.begun}  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a position back; `open` goes there."""
        self.epoch, self.read, self.offset, self._promised = (state[k] for k in ("epoch", "read", "offset", "shape"))
        self.left = None if state["left"] is None else Chunk(*state["left"])
        self.begun, self._ended = state.get("begun", 0), state.get("ended", False)
        self._kept = None if state.get("loader") is None else (state["loader"], state["ended"])
