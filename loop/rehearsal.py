"""The first step of a new size under several ranks, run by each alone first: so one that fails in it is missed by none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .checks import say
from .memory import out_of_memory
from .redo import Snapshot

if TYPE_CHECKING:
    from .step import Step

FINE = 2**40  # what a rank answers that needs no redo: more than any size


def is_new(step: Step) -> bool:
    """Tell whether this step's micro-batches are larger, on some rank, than any that went through: then it is rehearsed.

    Only where a callback answers errors. A forward that the ranks share, FSDP2's or SyncBatchNorm's, can't be one.
    """
    loop, ranks = step.loop, step.loop.state.ranks
    if not ranks.together or ranks.coupled or not loop.hooks["on_exception"] or step.largest <= loop.proven:
        return False
    model: Any = loop.state.model
    if hasattr(model, "reducer"):
        model.reducer._rebuild_buckets()  # else DDP's ranks would wait for one another in the next forward
    return True


def rearranges(step: Step) -> Snapshot | None:
    """Return the moment to go back to where DDP rearranges its buckets after this pass: then it is run again, and only that counts.

    Of three ranks on, how a sum is rounded hangs on where a gradient lies in its bucket, so that a run that resumes, whose
    buckets are as they were built, would go on to other bits.
    """
    loop, model = step.loop, step.loop.state.model
    if loop.arranged or step.rehearsal:
        return None
    loop.arranged = True
    ddp: Any = next((m for m in model.modules() if isinstance(m, nn.parallel.DistributedDataParallel)), None)
    if loop.state.ranks.count < 3 or ddp is None or (ddp.find_unused_parameters and not ddp.static_graph):
        return None
    before = Snapshot(loop.state, host=True)
    before.take(step.chunks)
    return before


def redoes(step: Step, error: Exception, size: int) -> bool:
    """Tell whether a step, in which `size` samples failed, is redone: under several ranks by all of them or by none."""
    loop = step.loop
    if not loop.state.ranks.together:
        return loop.redoes(error, size)
    if not step.rehearsal:
        if out_of_memory(error):
            say(error, "in a pass in which the ranks depend on one another: one of them alone can't redo it, go on from the "
                           "last checkpoint")  # fmt: skip
        return False
    answer = loop.redoes(error, size)
    if answer:
        agreed(step, loop.state.micro_batch_size or FINE - 1)
    return answer


def agreed(step: Step, again: int = FINE) -> bool:
    """Tell whether a rehearsal went well on all ranks; each asks once in it.

    `again`: it did not here, and is redone at that size. Where others ask for a smaller size, this rank's callbacks hear of
    it as of an error of their own.
    """
    loop = step.loop
    size = loop.state.ranks.smallest(again, "rehearses a step")
    if size == FINE:
        loop.proven = step.largest
        model: Any = loop.state.model
        if hasattr(model, "require_forward_param_sync"):
            model.require_forward_param_sync = True
        return True
    error = torch.OutOfMemoryError(f"another rank ran out of memory and asks for micro-batches of {size} samples")
    if size != again and not loop.redoes(error, 2 * size):
        raise error
    step.fail(error)
    return False
