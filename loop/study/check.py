"""One call that tells whether a loss is a mean over samples, as exact micro-batches need."""

from __future__ import annotations

from typing import Any

import torch

from .. import batch as batches
from ..chunk import Chunk, piece
from ..loop import Loop
from ..outputs import checked, weight_of
from ..redo import Snapshot
from ..rng import isolated


def check_mean(loop: Loop, loss_fn: Any, batch: Any, tolerance: float = 1e-4) -> float:
    """Return how far the gradient of `batch` in two cuts is from that of the whole, relative to it; train nothing.

    About 1e-7 (float32) says that the loss is a mean over samples, or over what `Loop(weigh=)` counts, and every cut
    and accumulation is exact; a contrastive loss gives 0.1 to 1. The model is put into eval mode meanwhile, since
    BatchNorm and dropout differ from cut to cut; buffers that the forward changes are put back. Raises ValueError, naming
    the difference, above `tolerance`, and for a batch of fewer than 2 samples, which can't be cut.
    """
    state, model = loop.state, loop.state.model
    parameters = [p for p in model.parameters() if p.requires_grad]
    modes = [(module, module.training) for module in model.modules()]
    if (total := loop.measure(batch)) < 2:
        raise ValueError(f"batch holds {total} sample(s), which can't be cut in two; give at least 2")
    buffers = Snapshot(state, seeded=True)
    buffers.take([])

    def gradient(count: int) -> torch.Tensor:
        cuts = batches.equal_cuts(total, -(-total // count))
        chunks = [piece(Chunk(batch, None, total), a, b, loop.cut) for a, b in cuts]
        weights = [weight_of(loop, chunk) for chunk in chunks]
        summed = torch.zeros((), dtype=torch.float64, device=state.device)
        for chunk, weight in zip(chunks, weights, strict=True):
            loss = checked(loop.forward(loss_fn, model, batches.move(chunk.data, state.device)))["loss"]
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
            flat = [torch.zeros_like(p) if g is None else g.to_dense() for g, p in zip(found, parameters, strict=True)]
            summed = summed + torch.cat([g.flatten() for g in flat]).double() * (weight / sum(weights))
        return summed

    with isolated(state.device):
        try:
            model.eval()
            whole, cut = gradient(1), gradient(2)
        finally:
            for module, training in modes:
                module.training = training
            buffers.put_back_buffers()
    apart = float(torch.linalg.norm(cut - whole) / torch.linalg.norm(whole).clamp_min(1e-30))
    if not apart <= tolerance:
        raise ValueError(f"the gradient in two cuts is {apart:.2g} of its length off the batch's: loss_fn is "
                         "no mean over samples (or over what weigh= counts), so micro-batches would change training")  # fmt: skip
    return apart
