"""What is not finite, found where the numbers lie and told without a wait."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .state import State
from .store import Named


def watched(state: State, loss: Tensor | None) -> list[Tensor]:
    """Return what an update's verdict hangs on: its loss, the gradients, and buffers such as running statistics."""
    found = [] if loss is None else [loss]
    found += [grad for grad in state.grads if grad.numel()]
    return found + [b for b in state.model.buffers() if b.is_floating_point() and b.numel()]


def names(state: State, with_loss: bool) -> list[str]:
    """Return what each of `watched` is, in words."""
    held = Named(state.model, state.optimizer).tensors
    found = ["the loss"] if with_loss else []
    found += [f"the gradient of {name}" for name, p in held.items() if p.grad is not None and p.numel()]
    return found + [f"buffer {name}" for name, b in state.model.named_buffers() if b.is_floating_point() and b.numel()]


def finite(tensors: Iterable[Tensor]) -> Tensor:
    """Return, for each tensor, whether all of it is finite, as one vector on the first one's device."""
    dense = [values_of(t) for t in tensors]
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, t in enumerate(dense):
        kinds.setdefault((t.device, t.dtype), []).append(i)
    found: dict[int, Tensor] = {}
    for places in kinds.values():
        # The largest magnitude is not finite exactly where something is not: unlike a sum of squares, it can't overflow.
        flags = torch.stack(torch._foreach_norm([dense[i] for i in places], float("inf"))).isfinite()
        if len(kinds) == 1:
            return flags
        found.update(zip(places, flags.to(dense[0].device, non_blocking=True), strict=True))
    return torch.stack([found[i] for i in range(len(dense))])


def values_of(x: Tensor) -> Tensor:
    """Return what a tensor holds, also a sparse one."""
    if not x.is_sparse:
        return x
    values = x.coalesce().values()
    return values if values.numel() else values.new_zeros(1)
