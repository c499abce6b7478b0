"""What a rank's part of a step weighs among all ranks' parts, and what a rank does that has none."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from .batch import walk
from .chunk import Chunk, own, piece
from .rng import isolated
from .store import plain
from .wants import decide

if TYPE_CHECKING:
    from .session import Session
    from .step import Micro, Step


def among_ranks(step: Step, micros: list[Micro], kind: str) -> list[Micro] | None:
    """Weigh a step's micro-batches so that the ranks' average is the mean over all their samples.

    A rank whose data have ended, or weigh nothing, takes part with a stand-in. None where the run is to end before this step.
    """
    loop, state = step.loop, step.loop.state
    ranks = state.ranks
    weight = step.weight if micros else 0
    tensor = isinstance(weight, Tensor)  # its batch lies on the device
    rows = decide(state, kind, 0 if tensor else weight, tensor, state.micro_size, len(micros))
    if kind == "begins a step":
        loop.feed.again = step.chunks  # a save holds the position before them
        loop._flush()
        if loop.stopped:
            loop._step = None
            return None
        loop.feed.again = []
    total: Any = math.fsum(row[0] for row in rows)
    if on_device := any(row[1] for row in rows):
        # filled, since a copy of a number would wait for the device
        mine: Any = weight if tensor else torch.full((), weight, dtype=torch.float64, device=state.device)
        total = ranks.total(mine.to(state.device, torch.float64))
    step.largest = int(max(row[2] for row in rows))
    most = ranks.micros = int(max(row[3] for row in rows))
    if not most:
        state.skip("the weights of the whole step sum to 0")
        return []
    for micro in micros:
        micro._factor = micro.weight * (ranks.world / total) if on_device else micro.weight * ranks.world / total
    while len(micros) < (most if ranks.coupled else 1):
        micros.append(stand_in(step, len(micros)))
    for micro in micros:
        micro._last = micro is micros[-1]
    return micros


def stand_in(step: Step, number: int) -> Micro:
    """Return a micro-batch that counts for nothing, for a rank without data that others would wait for."""
    from .step import Micro

    loop = step.loop
    if (chunk := loop.stand_in) is None and (chunk := next(iter(step.chunks), None)) is None:
        chunk = first_of(loop)
    micro = Micro(step, number, shortened(loop, chunk, loop.state.micro_batch_size), 0.0, 0.0)
    micro.stand_in = True
    return micro


def shortened(loop: Session, chunk: Chunk, limit: int | None) -> Chunk:
    """Return as much of a chunk as may go through at once."""
    if limit is None:
        return chunk
    if chunk.size is None:
        chunk.size = loop.measure(chunk.data)
    return piece(chunk, 0, min(chunk.size, limit), loop.cut)


def first_of(loop: Session) -> Chunk:
    """Return a batch for a rank that resumes where its data had ended, and whose checkpoint holds none."""
    loader: Any = loop.state.loader
    if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):  # whose own workers may be at work
        batched: dict[str, Any] = {"batch_size": None, "sampler": loader.sampler}
        if loader.batch_sampler is not None:
            batched = {"batch_sampler": loader.batch_sampler}
        loader = DataLoader(loader.dataset, collate_fn=loader.collate_fn, **batched)
    with isolated(loop.state.device):
        for data in loader:
            return Chunk(data)
    raise RuntimeError("the data of this rank had ended when the checkpoint was made, and the others need a batch from it, which a "
                       f"{type(loader).__name__} can't give again; resume from a checkpoint at an epoch's end")  # fmt: skip


def kept_stand_in(loop: Session) -> list[Any] | None:
    """Return, as plain data, what a rank whose data have ended takes part with, for its checkpoint."""
    chunk = loop.stand_in if loop.state.ranks.together and loop.feed.over else None
    kept = None if chunk is None else [walk(chunk.data, own), chunk.index, chunk.size]
    return kept if plain(kept) else None


@contextlib.contextmanager
def silenced(loss: Tensor, model: nn.Module) -> Iterator[None]:
    """Have a backward leave zeros in every parameter: what is not finite stays so when it is multiplied by 0."""
    # the model's own too, which a checkpointed part (use_reentrant=True) reaches by a graph of its own
    hooks: list[Any] = [p.register_hook(torch.zeros_like) for p in model.parameters() if p.requires_grad]
    seen, ahead = set[Any](), [loss.grad_fn]
    while ahead:
        if (node := ahead.pop()) is None or node in seen:
            continue
        seen.add(node)
        ahead += [other for other, _ in node.next_functions]
        if type(node).__name__ == "AccumulateGrad":
            hooks.append(node.variable.register_hook(torch.zeros_like))  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
