"""One call that tells whether a loss is a mean over samples, as exact micro-batches need."""

from __future__ import annotations

import math
from typing import Any

import torch

from .. import batch as batches
from ..checks import say
from ..chunk import Chunk, piece
from ..loop import Loop
from ..outputs import checked, weight_of
from ..redo import Snapshot
from ..rng import isolated


def check_mean(loop: Loop, loss_fn: Any, batch: Any, tolerance: float | None = None) -> float:
    """Return how far the gradient of `batch` in two cuts is from that of the whole, relative to it; train nothing.

    About 1e-7 (float32) says that the loss is a mean over samples, or over what `Loop(weigh=)` counts, and every cut
    and accumulation is exact; a contrastive loss gives 0.1 to 1. The model is put into eval mode meanwhile, since
    BatchNorm and dropout differ from cut to cut, and the Loop's autocast is off where weights are float32 or finer, since it
    rounds coarsely; buffers that the forward changes are put back. Raises ValueError, naming the difference, above `tolerance`
    (None: 1e-4, or 4 roundings of the coarsest type of a weight, which is 0.004 for float16 and 0.03 for bfloat16), for a batch
    of fewer than 2 samples, which can't be cut, for one that weighs 0, and for gradients that are not finite.
    """
    state, model = loop.state, loop.state.model
    parameters = [p for p in model.parameters() if p.requires_grad]
    eps = max([torch.finfo(p.dtype).eps for p in model.parameters() if is_float(p)], default=0.0)
    plain = eps <= torch.finfo(torch.float32).eps
    modes = [(module, module.training) for module in model.modules()]
    if (total := loop.measure(batch)) < 2:
        raise ValueError(f"batch holds {total} sample(s), which can't be cut in two; give at least 2")
    buffers = Snapshot(state, seeded=True)
    buffers.take([])

    def outputs_of(data: Any) -> Any:
        if not plain or loop.autocast is None:
            return loop.forward(loss_fn, model, data)
        try:
            return loss_fn(model, data)
        except Exception as error:
            say(error, "in check_mean, which runs loss_fn without the Loop's autocast=; give batches of the weights' types")
            raise

    def gradient(count: int) -> torch.Tensor:
        cuts = batches.equal_cuts(total, -(-total // count))
        chunks = [piece(Chunk(batch, None, total), a, b, loop.cut) for a, b in cuts]
        every = [(chunk, weight_of(loop, chunk)) for chunk in chunks]
        weighed = [(chunk, weight) for chunk, weight in every if isinstance(weight, torch.Tensor) or weight > 0]  # as in a step
        if not (sum_of := sum(weight for _, weight in weighed)):
            raise ValueError("the weights of batch sum to 0, so that its loss is a mean over nothing; give one for which weigh= "
                             "gives more")  # fmt: skip
        summed = torch.zeros((), dtype=torch.float64, device=state.device)
        for chunk, weight in weighed:
            loss = checked(outputs_of(batches.move(chunk.data, state.device)))["loss"]
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
            flat = [torch.zeros_like(p) if g is None else g.to_dense() for g, p in zip(found, parameters, strict=True)]
            flat = [torch.view_as_real(g.resolve_conj()) if g.is_complex() else g for g in flat]
            summed = summed + torch.cat([g.flatten() for g in flat]).double() * (weight / sum_of)
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
    if math.isnan(apart):
        raise ValueError("the gradient of batch, or of its cuts, is not finite, so that they can't be compared: look at the batch "
                         "and the weights")  # fmt: skip
    if not apart <= (max(1e-4, 4 * eps) if tolerance is None else tolerance):
        raise ValueError(f"the gradient in two cuts is {apart:.2g} of its length off the batch's: loss_fn is "
                         "no mean over samples (or over what weigh= counts), so micro-batches would change training")  # fmt: skip
    return apart


def is_float(p: torch.Tensor) -> bool:
    """Tell whether a weight's type is one that forwards reckon in: no whole numbers, no 8 bits that are only stored."""
    return p.is_complex() or (p.is_floating_point() and p.itemsize > 1)
