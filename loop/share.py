"""What a rank's part of a step weighs among all ranks' parts, and what a rank does that has none."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .chunk import Chunk
from .rng import isolated
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
    most = int(max(row[3] for row in rows))
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
        with isolated(loop.state.device):
            chunk = Chunk(next(iter(loop.state.loader)))  # a run that resumes where this rank's data had ended
    micro = Micro(step, number, chunk, 0.0, 0.0)
    micro.stand_in = True
    return micro


@contextlib.contextmanager
def silenced(loss: Tensor) -> Iterator[None]:
    """Have a backward leave zeros in every parameter: what is not finite stays so when it is multiplied by 0."""
    seen, ahead, hooks = set[Any](), [loss.grad_fn], list[Any]()
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


class Buffers:
    """A model's buffers before a forward that is to leave no trace in them."""

    def __init__(self, loop: Session) -> None:
        self.model: nn.Module = loop.state.model
        self.kept: list[tuple[Tensor, Tensor]] = [(b, b.clone()) for b in self.model.buffers()]

    @torch.no_grad()
    def put_back(self) -> None:
        """Undo what the forward did to them."""
        for buffer, kept in self.kept:
            buffer.copy_(kept)
