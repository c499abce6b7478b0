"""What went wrong in reading data: said beside the error, which seldom says it itself."""

from __future__ import annotations

import itertools
import logging
import time
import traceback
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler

from .batch import leaves
from .checks import say
from .order import dealer, dealt, length
from .rng import isolated

log = logging.getLogger("hookloop")
SHOWN, SECONDS = 8, 10.0
STOPPED = ("StopIteration was raised inside the data set or its collate_fn, which would end the epoch early without a word; raise "
           "another error there, or leave the sample out")  # fmt: skip


OFF = "what counts on it, as state.total_steps and schedules do, is off"


def explain(error: BaseException, loader: Any, source: Iterator[Any], where: str, indices: Any) -> None:
    """Note on an error in reading which samples were read, which of them is odd, and which worker died."""
    listed = list(indices) if isinstance(indices, list | tuple) else [] if indices is None else [indices]
    more = ", ..." if len(listed) > 64 else ""
    say(error, f"in reading {where}" + (f", samples {str(listed[:64])[1:-1]}{more}" if listed else ""))
    if hasattr(source, "_workers"):  # torch's frames hold the error itself: a cycle, and all of the run would hang on it
        traceback.clear_frames(error.__traceback__)
    if not died(error, source) and listed:
        say(error, _odd(loader.dataset, listed))


def died(error: BaseException, source: Iterator[Any]) -> bool:
    """Note on an error which workers died; tell whether any did."""
    workers = [w for w in getattr(source, "_workers", ()) if w.exitcode]
    for worker in workers:
        how = f"signal {-worker.exitcode}" if worker.exitcode < 0 else f"exit code {worker.exitcode}"
        say(error, f"worker pid {worker.pid} died ({how}): often a lack of memory or of shared memory (/dev/shm); give it "
                       "more, or fewer workers or smaller batches")  # fmt: skip
    return bool(workers)


def _odd(dataset: Any, indices: list[Any]) -> str:
    """Return which of these samples can't be read, or are not like the others; reads them again, for some seconds at most."""
    found: dict[str, list[Any]] = {}
    end = time.monotonic() + SECONDS
    with isolated(torch.device("cpu")):
        for i in itertools.takewhile(lambda _: time.monotonic() < end, indices):
            try:
                kind = described(dataset.__getitems__([i])[0] if hasattr(dataset, "__getitems__") else dataset[i])
            except (Exception, SystemExit) as error:
                kind = f"{type(error).__name__}: {error}"
            found.setdefault(kind, []).append(i)
    if len(found) < 2:
        (kind, same), *_ = found.items()
        return f"read again, {'all' if len(same) == len(indices) else f'the first {len(same)}'} of them are {kind}"
    return "read again: " + "; ".join(f"{kind} (samples {str(some[:SHOWN])[1:-1]}{', ...' if some[SHOWN:] else ''})"
                                      for kind, some in sorted(found.items(), key=lambda one: len(one[1])))  # fmt: skip


def described(sample: Any) -> str:
    """Return the types and shapes in a sample as text."""
    return ", ".join(f"{path.removeprefix('batch')} {type(x).__name__}{tuple(x.shape) if hasattr(x, 'shape') else ''}".strip()
                     for path, x in leaves(sample)) or repr(sample)  # fmt: skip


def shut_down(source: Iterator[Any]) -> None:
    """End a loader's workers now: else whoever keeps an error keeps them too."""
    getattr(source, "_shutdown_workers", bool)()


def in_sequence(loader: Any, number: int) -> list[int] | None:
    """Return the samples of a batch of a loader that goes through its data set in order; None for another.

    Of a DistributedSampler those that an evaluation deals out to its rank.
    """
    batched, total = getattr(loader, "batch_sampler", None), length(getattr(loader, "dataset", None))
    if type(batched) is not BatchSampler or not total or not getattr(loader, "in_order", True):
        return None  # another batch sampler may draw from its sampler in an order of its own
    part = dealer(loader)
    if type(batched.sampler) is SequentialSampler:
        every = range(total)
    elif part is not None and part is batched.sampler and not part.shuffle:
        every = range(part.rank, part.total_size, part.num_replicas)
    else:
        return None
    return list(every[number * batched.batch_size : (number + 1) * batched.batch_size])


def miscounted(loader: Any, gave: int) -> str | None:
    """Return what to say of a loader that gave another number of batches than its `len`."""
    said = length(loader)
    return None if said in (None, gave) else f"{type(loader).__name__} says that it gives {said} batches and gave {gave}"


def batches_of(loader: Any) -> int | None:
    """Return how many batches a loader says that an epoch has, None where it says nothing."""
    with dealt(dealer(loader)):
        return length(loader)


def regrown(loader: Any, before: int | None, epoch: int) -> str | None:
    """Return what to say of a loader whose length is another one now, told of the epoch, than the run was planned with."""
    now = batches_of(loader)
    return None if None in (now, before) or now == before else (
        f"{type(loader).__name__} said that it gives {before} batches when the run was planned, and {now} in epoch {epoch}: {OFF}; "
        "say in updates when to end: steps= in place of epochs=")  # fmt: skip


def forward(loader: Any, count: int) -> Iterable[int]:
    """Return the numbers of the batches that are read only to be left out, under a progress bar, and say so."""
    if not count:
        return ()
    from tqdm.auto import tqdm

    log.warning("%s can't be told where to go on, so its first %d batches are read again and left out; a loader with state_dict, "
                "such as torchdata's StatefulDataLoader, spares that", type(loader).__name__, count)  # fmt: skip
    bar: Iterable[int] = tqdm(range(count), desc="reading forward", unit="batch", leave=False, disable=None)
    return bar


def nothing(loader: Any, mapped: bool) -> str:
    """Return what to say of a loader that gave no batch."""
    if isinstance(loader, Iterator):
        return f"the loader is an iterator ({type(loader).__name__}) with nothing left; pass what can be iterated again"
    if mapped:
        sizes = f"{length(loader.dataset)} samples, batch {loader.batch_size}, drop_last={loader.drop_last}"
        return f"the loader gives 0 batches: {sizes}; give it more data or a smaller batch"
    return f"the loader ({type(loader).__name__}) gives 0 batches; give it data"


def reshaped(loader: Any, gave: int, drawn: int | None) -> str | None:
    """Return a warning where a loader of the user's own gave more or fewer batches than its sampler drew in the epoch."""
    return None if drawn in (None, gave) else (
        f"{type(loader).__name__} gave {gave} batches where its sampler drew {drawn}, so that a run resumed inside an epoch would "
        "repeat samples or miss some; leave batches out, or cut them, in the data set or the sampler")  # fmt: skip


def unsharded(loader: Any, first: Any, second: Any) -> str | None:
    """Return a warning where two workers of an iterable data set gave the same first batch."""
    if not (isinstance(loader, DataLoader) and isinstance(loader.dataset, IterableDataset) and loader.num_workers > 1):
        return None
    a, b = ([x for _, x in leaves(batch) if isinstance(x, torch.Tensor)] for batch in (first, second))
    if not a or any(x.layout != torch.strided or x.is_nested for x in a) or [x.shape for x in a] != [x.shape for x in b]:
        return None
    if not all(map(torch.equal, a, b)):
        return None
    return (f"two of the {loader.num_workers} workers gave the same first batch, so every sample may come {loader.num_workers} "
            f"times: {type(loader.dataset).__name__}.__iter__ must give each worker its part, by "
            "torch.utils.data.get_worker_info().id and .num_workers")  # fmt: skip
