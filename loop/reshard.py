"""The order of data under several ranks: taken up by another number of them, and what of it each must have."""

from __future__ import annotations

from typing import Any

import torch

from .digest import whole
from .order import dealer, dealt

REMEDY = ("resume with {}, or from a checkpoint made at an epoch's end; to change it inside an epoch, give DataLoader a "
          "DistributedSampler under either number, in one process too, where it is DistributedSampler(dataset, num_replicas=1, "
          "rank=0)")  # fmt: skip


def reshard(positions: list[dict[str, Any]], rank: int, world: int, epoch: int) -> dict[str, Any]:
    """Return the position at which this rank of `world` takes up the data of a run that had a position for each rank.

    Each sample of an interrupted epoch is used once, and equal global batches hold the same samples: what was used is how
    the epoch's order begins, since DistributedSampler deals it out one by one, and its rest is dealt out anew. `epoch`:
    the run's; positions in another one are at that epoch's end, which all loaders can begin anew from. Raises ValueError
    for an order that another number of ranks can't take up inside an epoch, or that the ranks did not use alike.
    """
    if not 0 <= rank < world or not positions:
        raise ValueError(f"reshard needs 0 <= rank < world and a position for each saved rank, not rank={rank}, world={world} and "
                         f"{len(positions)} positions")  # fmt: skip
    if len(positions) == world:
        return positions[rank]
    first, were = positions[0], len(positions)
    shape = first["shape"]
    new = {**first, "read": 0, "offset": 0, "left": None, "loader": None, "begun": 0, "shape": {}}
    if first["epoch"] != epoch or not any(p.get("begun") or batches_used(p) or p["offset"] for p in positions):
        return {**new, "ended": False}
    if all(p["ended"] for p in positions):
        return {**new, "begun": first.get("begun", 0) + sum(p["read"] for p in positions)}  # above 0 is all that counts
    remedy = REMEDY.format(f"{were} rank{'s' if were > 1 else ''}")
    what = f"this checkpoint stands inside epoch {epoch}, which {were} rank{'s' if were > 1 else ''} began"
    if shape.get("ranks") != were:
        drew = shape.get("sampler") or "another kind of loader"
        dealt_to = "" if shape.get("ranks") is None else f" with num_replicas={shape['ranks']}"
        raise ValueError(f"{what} and {world} can't take up, since {drew}{dealt_to} gave its samples, and not a DistributedSampler "
                         f"of {were} through torch's own BatchSampler; {remedy}")  # fmt: skip
    begun = first.get("begun", 0)
    where = [p["shape"] | {"epoch": p["epoch"], "begun": p.get("begun", 0)} for p in positions]
    if odd := [name for name in where[0] if any(one.get(name) != where[0][name] for one in where)]:
        raise ValueError(f"{what} and {world} can't take up, since they read different data: {odd[0]} was "
                         f"{[one.get(odd[0]) for one in where]} by rank; {remedy}")  # fmt: skip
    used = [samples_used(p, r) for r, p in enumerate(positions)]
    total = begun + sum(used)
    if used != [len(range(begun + r, total, were)) for r in range(were)]:
        raise ValueError(f"{what} and {world} can't take up, since they used unequal parts of it: {used} samples by rank; "
                         f"{remedy}")  # fmt: skip
    return {**new, "begun": total, "ended": False, "shape": {name: shape[name] for name in ("data", "sampler", "order")}}


def batches_used(position: dict[str, Any]) -> int:
    """Return the loader batches that were used up."""
    return int(position["read"]) - (position["left"] is not None)


def samples_used(position: dict[str, Any], rank: int) -> int:
    """Return what a rank used of its part of the order, the last batch of which may be short."""
    shape, begun = position["shape"], position.get("begun", 0)
    stop = begun + (shape["data"] - begun) // shape["ranks"] * shape["ranks"] if shape["dropped"] else shape["data"]
    own = len(range(begun + rank, stop, shape["ranks"]))
    return min(own, batches_used(position) * int(shape["size"]) + int(position["offset"]))


def check_dealer(loader: Any, rank: int, ranks: int, begun: int) -> None:
    """Refuse a DistributedSampler of another rank, and any other one for the rest of an epoch that it is to deal out."""
    sampler = dealer(loader)
    if begun and sampler is None:
        raise ValueError(f"this epoch was begun by another number of ranks, which used {begun} samples, and this "
                         f"{type(loader).__name__} can't be told to leave these out; {REMEDY.format('their number')}")  # fmt: skip
    if ranks > 1 and sampler is not None and (sampler.rank, sampler.num_replicas) != (rank, ranks):
        raise ValueError(f"DistributedSampler has rank={sampler.rank}, num_replicas={sampler.num_replicas}, and this is rank "
                         f"{rank} of {ranks}; leave both out, or give it rank={rank}, num_replicas={ranks}")  # fmt: skip


def without(loader: Any) -> str | None:
    """Return what to say where a data set is too small to have a sample for each rank, and this one gets none."""
    if (sampler := dealer(loader)) is None:
        return None
    with dealt(sampler):
        own, total = len(sampler), len(sampler.dataset)  # type: ignore[arg-type]
    if own or not total:
        return None
    return (f"rank {sampler.rank} of {sampler.num_replicas} has no sample of its own: the data set holds {total}, "
            f"drop_last={sampler.drop_last}; give it more data, or train with fewer ranks")  # fmt: skip


def first_batch_digest(data: Any) -> str:
    """Return a digest of all that a batch holds, equal where two ranks read the same; of other objects only the type counts."""
    return f"{int(whole(data, torch.device('cpu'))) % 2**64:016x}"
