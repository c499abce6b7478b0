"""What of a model an average is taken of, what it copies, and which statistics it measures anew."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..loop import rng
from ..loop.checks import among, share, whole
from ..loop.state import State
from ..loop.store import Named
from .model_copy import Pairs, take_extra_states, tensors

Take = Callable[[list[Tensor], list[Tensor], int], Any]


def check(kind: str, decay: float, start: float, every: int, batch_norm: str, forward: Any) -> None:
    """Refuse bad settings, a decay that moves nothing, and a forward that is none or would never run."""
    among("kind", kind, ("ema", "swa"))
    among("batch_norm", batch_norm, ("average", "measure"))
    whole("every", every, 1, none=False)
    if not (isinstance(start, float) and 0 < start < 1):
        whole("start (an update, or a share of the run between 0 and 1)", start, 0, none=False)
    share("decay", decay)
    if decay == 1:
        raise ValueError("decay must be below 1, not 1, which would keep the first weights for good")
    if forward is not None and (not callable(forward) or batch_norm != "measure"):
        raise TypeError(f"forward must be a function of model and batch, beside batch_norm='measure' alone, not {forward!r} "
                        f"beside {batch_norm!r}")  # fmt: skip


def to_measure(average: nn.Module, model: nn.Module) -> list[nn.Module]:
    """Return the average's norms that keep statistics, but for those that are frozen in training, in eval mode there."""
    both = zip(average.modules(), model.modules(), strict=True)
    return [a for a, b in both if getattr(a, "running_mean", None) is not None and b.training]


@torch.no_grad()
def take_in(take: Take, named: Named, model: nn.Module, pairs: Pairs, count: int, measured: list[nn.Module],
            wide: dict[str, Tensor]) -> dict[str, Tensor]:  # fmt: skip
    """Take a model's parameters and running statistics into an average of `count`, by pairs; all else is copied.

    They may hold infinities, as a mask does, whose mean with themselves is NaN, or grow, as positions do. What `measured`
    norms hold is left alone. In fewer than 4 bytes a small step would be rounded away: there the average is a rounding of
    `wide`, the means in float32 by name, which are returned for the next time.
    """
    average = named.model
    left = {id(x) for norm in measured for x in norm.buffers(recurse=False)}
    norms = [m for m in average.modules() if getattr(m, "running_mean", None) is not None]
    means = {id(x) for x in average.parameters()} | {id(x) for norm in norms for x in norm.buffers(recurse=False)}
    both = [(a, b) for a, b in pairs if id(a) not in left]
    mean = [(a, b) for a, b in both if id(a) in means and (a.is_floating_point() or a.is_complex())]
    done = {id(a) for a, _ in mean}
    few = {id(a) for a, _ in mean if a.itemsize < 4}
    low = {named.clean(name): x for name, x in tensors(average).items() if id(x) in few} if few else {}
    wide = {n: wide[n].to(x.device) if n in wide and wide[n].shape == x.shape else x.float() for n, x in low.items()}
    of = {id(x): wide[name] for name, x in low.items()}
    take([of.get(id(a), a) for a, _ in mean], [b.float() if id(a) in of else b for a, b in mean], count)
    if low:
        torch._foreach_copy_([*low.values()], [*wide.values()])
    for a, b in both:
        if id(a) not in done:
            a.copy_(b)
    take_extra_states(average, model)
    return wide


@torch.no_grad()
def measure(
    state: State, forward: Callable[[nn.Module, Any], Any], average: nn.Module, norms: list[nn.Module], batch: Any
) -> None:
    """Have these norms see a batch as training does, all else in eval mode; what that draws moves no stream of training's."""
    if batch is None:
        raise ValueError("Average saw no micro-batch of this update, as around your loop: take batch_norm='average'")
    for norm in norms:
        norm.train()
    try:
        with rng.isolated(state.device), (state.autocast or contextlib.nullcontext)():
            forward(average, batch)
    finally:
        average.eval()


def first_argument(model: nn.Module, batch: Any) -> Any:
    """Run the model on the first entry of a batch, as torch's `update_bn` does."""
    if not isinstance(batch, list | tuple):
        raise ValueError(f"Average can't tell what of a {type(batch).__name__} the model takes: give forward=fn(model, batch)")
    return model(batch[0])
