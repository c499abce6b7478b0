"""What of a loader a run relies on, so that a resume with another is refused instead of training something else."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from .checks import refuse
from .order import dealer, length, told

if TYPE_CHECKING:
    from .feed import Feed

SAID = {
    "data": "the data set holds {} samples",
    "drawn": "the sampler gives {} samples",
    "sampler": "the sampler is {}",
    "batches": "the loader gives {} batches",
    "workers": "the loader of an IterableDataset, which gives each worker its part, has {} workers",
    "size": "the loader's batch size is {}",
    "order": "the DistributedSampler has {}",
}
INSIDE = ("workers", "size", "order")  # no matter where an epoch begins anew


def shape(loader: Any) -> dict[str, Any]:
    """Return what is known of a loader, None where it says nothing or where it may change."""
    if not isinstance(loader, DataLoader):
        return {"batches": length(loader)}
    batched, iterable = loader.batch_sampler, isinstance(loader.dataset, IterableDataset)
    sampler = getattr(batched, "sampler", loader.sampler)
    deals = dealer(loader) if not iterable and standard(loader) else None
    return {
        "data": length(loader.dataset),
        "drawn": None if iterable else length(sampler),
        "sampler": None if iterable else f"{type(sampler).__module__.split('.')[0]}.{type(sampler).__qualname__}",
        "batches": None if batched is None or standard(loader) else length(batched),
        "workers": loader.num_workers if iterable else None,
        "size": getattr(batched, "batch_size", None),
        "order": None if deals is None else f"shuffle={deals.shuffle}, seed={deals.seed}, drop_last={deals.drop_last}",
        "ranks": None if deals is None else deals.num_replicas,
        "dropped": None if deals is None else deals.drop_last,
    }


def standard(loader: DataLoader[Any]) -> bool:
    """Tell whether batches are what the sampler gives, cut in order."""
    kind = type(loader.batch_sampler)
    return issubclass(kind, BatchSampler) and kind.__module__.split(".")[0] in ("torch", "torchdata")


def fit(feed: Feed, promised: dict[str, Any], inside: bool) -> None:
    """Refuse a loader of another shape than that of a checkpoint's run; take a position to one of another batch size."""
    size, here = promised.get("size"), feed.shape.get("size")
    if odd := misfit(promised, feed.shape, inside):
        refuse(odd, feed.strict)
    elif "size" not in promised or size == here:
        return
    elif size is None or here is None or not convertible(feed.loader, feed.stateful):
        if inside:
            refuse(SAID["size"].format(here) + f" here and {size} in the checkpoint's run", feed.strict)
    else:
        if odd := dropped(feed.loader, feed.shape["drawn"], size, here):
            refuse(odd, feed.strict)
        if inside:
            used, held = (feed.read - (feed.left is not None)) * size + feed.offset, feed.shape["drawn"]
            (feed.read, feed.offset), feed.left = divmod(used if held is None else min(used, held), here), None


def convertible(loader: Any, stateful: bool) -> bool:
    """Tell whether another batch size leaves the order of samples as it is."""
    if not isinstance(loader, DataLoader):
        return False
    return standard(loader) and not (isinstance(loader.dataset, IterableDataset) and (stateful or loader.num_workers > 1))


def dropped(loader: DataLoader[Any], drawn: int | None, there: int, here: int) -> str | None:
    """Return what to say where two batch sizes leave other samples out at the epoch's end."""
    left = {size: 0 if drawn is None else drawn // size * size for size in (here, there)}
    if not loader.drop_last or left[here] == left[there]:
        return None
    return (f"with drop_last=True an epoch of batches of {here} holds {left[here]} samples here, and {left[there]}, of batches of "
            f"{there}, in the checkpoint's run")  # fmt: skip


def told_in_workers(loader: Any) -> bool:
    """Tell whether workers begin an epoch with what is told here, which a state of theirs from the last one would overwrite."""
    return bool(getattr(loader, "num_workers", 0)) and any(owner is not loader for owner in told(loader))


@contextlib.contextmanager
def restarting(loader: Any, anew: bool) -> Iterator[None]:
    """Have a loader (torchdata.nodes) whose own state says that all was given begin a new pass or not, whatever it would do."""
    own = getattr(loader, "restart_on_stop_iteration", None)
    if own is not None:
        loader.restart_on_stop_iteration = anew
    try:
        yield
    finally:
        if own is not None:
            loader.restart_on_stop_iteration = own


def says_where(state: Any) -> bool:
    """Tell whether a loader's own state says more than how many batches to read again (torchdata's, without the data set's)."""
    return state is not None and (not (found := _of_data_sets(state)) or any(part is not None for part in found))


def _of_data_sets(state: Any) -> list[Any]:
    if not isinstance(state, dict):
        return []
    inner = [part for value in state.values() for part in _of_data_sets(value)]
    return [state[key] for key in ("dataset_state", "dataset_iter_state") if key in state] + inner


def misfit(there: dict[str, Any], here: dict[str, Any], inside: bool) -> str | None:
    """Return the first thing, but for the batch size, in which two shapes differ, with both values."""
    for name, text in SAID.items():
        if name != "size" and (inside or name not in INSIDE) and name in there and there[name] != here.get(name):
            return f"{text.format(here.get(name))} here and {there[name]} in the checkpoint's run"
    return None
