"""What is not finite, found where the numbers lie and told without a wait."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .state import State, values_of
from .store import Named


def watched(state: State, loss: Any, buffers: Container[str]) -> list[tuple[str | Tensor, Tensor]]:
    """Return what an update's verdict hangs on, and what it is: its loss, each parameter's gradient, some buffers."""
    loss = loss if loss is None or isinstance(loss, Tensor) else torch.tensor(float(loss))
    found: list[tuple[str | Tensor, Tensor]] = [] if loss is None else [("the loss", loss)]
    found += [(p, p.grad) for g in state.optimizer.param_groups for p in g["params"] if p.grad is not None and p.numel()]
    return found + [(f"buffer {name}", b) for name, b in state.model.named_buffers() if name in buffers]


def names(state: State, owners: Iterable[str | Tensor]) -> list[str]:
    """Return what each of `watched` is, in words."""
    held = {id(p): name for name, p in Named(state.model, state.optimizer).tensors.items()}
    return [owner if isinstance(owner, str) else f"the gradient of {held.get(id(owner))}" for owner in owners]


def statistics(state: State) -> set[str]:
    """Return the buffers that should be finite: those that are saved, and hold no infinity by design as a mask does."""
    saved = state.model.state_dict(keep_vars=True).keys()
    held = {name: b for name, b in state.model.named_buffers() if name in saved and not is_lazy(b) and b.numel()}
    held = {name: b for name, b in held.items() if b.is_complex() or (b.is_floating_point() and b.itemsize > 1)}
    return {name for name, b in held.items() if not b.isinf().any() or b.isnan().any()}


def finite(tensors: Iterable[Tensor]) -> Tensor:
    """Return, for each tensor, whether all of it is finite, as one vector on the first one's device."""
    dense = [values_of(t) for t in tensors]
    dense = [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in dense]  # a magnitude could overflow
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
