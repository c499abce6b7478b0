"""What is not finite, found where the numbers lie and told without a wait."""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .state import State, values_of
from .store import Named


def watched(state: State, loss: Any, buffers: Container[str]) -> list[tuple[str | Tensor, Tensor]]:
    """Return what an update's verdict hangs on, and what it is: its loss, each parameter's gradient, some buffers."""
    loss = loss if loss is None or isinstance(loss, Tensor) else torch.tensor(float(loss))
    held: list[tuple[str | Tensor, Tensor]] = [] if loss is None else [("the loss", loss)]
    held += [(p, p.grad) for g in state.optimizer.param_groups for p in g["params"] if p.grad is not None]
    held += [(f"buffer {name}", b) for name, b in state.model.named_buffers() if name in buffers]
    return [(owner, x) for owner, found in held if (x := numbers_of(found)) is not None]


def numbers_of(x: Tensor) -> Tensor | None:
    """Return what of a tensor can be infinite or NaN, sparse ones and complex ones too; None where nothing can.

    Of a tensor that is sharded over ranks, this rank's part.
    """
    if hasattr(x, "to_local"):
        x = x.to_local()
    if is_lazy(x) or not x.numel() or not (x.is_complex() or (x.is_floating_point() and x.itemsize > 1)):
        return None
    x = values_of(x) if x.layout in (torch.strided, torch.sparse_coo) else x.values()
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x  # a magnitude could overflow


def names(state: State, owners: Iterable[str | Tensor]) -> list[str]:
    """Return what each of `watched` is, in words."""
    held = {id(p): name for name, p in Named(state.model, state.optimizer).tensors.items()}
    return [owner if isinstance(owner, str) else f"the gradient of {held.get(id(owner))}" for owner in owners]


def listed(bad: list[str]) -> str:
    """Return what is not finite, the first of it by name."""
    return f"{', '.join(bad[:8])}{f' and {len(bad) - 8} more' if bad[8:] else ''}"


def sound(x: Tensor, by_design: bool) -> bool:
    """Tell whether all of `numbers_of` a weight is finite, or infinite `by_design`; waits for the device."""
    return not bool(x.isnan().any() if by_design else x.isfinite().logical_not().any())


def masks(state: State, by_design: Container[str]) -> set[str]:
    """Return which weights may be infinite, by all their names: those `by_design`, and those that no update changes."""
    held = {id(p) for name, p in state.model.named_parameters() if name in by_design or not p.requires_grad}
    return {name for name, p in state.model.named_parameters(remove_duplicate=False) if id(p) in held}


def spoilt(state: State, by_design: Container[str]) -> list[str]:
    """Return which weights are not finite; waits for the device."""
    held = {name: numbers_of(p) for name, p in state.model.named_parameters()}
    free = masks(state, by_design)
    return [f"{name} itself" for name, p in held.items() if p is not None and not p.is_meta and not sound(p, name in free)]


def told(state: State, step: int, owners: Iterable[str | Tensor], flags: Iterable[bool], by_design: Collection[str]) -> str:
    """Return what an update's verdicts found, and which weights are not finite; waits for the device."""
    bad, weights = [name for name, good in zip(names(state, owners), flags, strict=True) if not good], spoilt(state, by_design)
    text = listed(weights + bad if state.step == step else bad + weights)  # the cause, where this update isn't
    return f"{text}; {listed(sorted(by_design))} held infinities before the first step" if by_design else text


def trained(state: State) -> dict[str, Tensor]:
    """Return the weights that an update may spoil."""
    held = {name: numbers_of(p) for name, p in state.model.named_parameters() if p.requires_grad}
    return {name: p for name, p in held.items() if p is not None and not p.is_meta}


def infinite(state: State) -> set[str]:
    """Return the weights that hold infinities by design, as a mask does: those that do before the first step."""
    return {name for name, p in trained(state).items() if p.isinf().any() and not p.isnan().any()}


def made(state: State, by_design: Container[str], kind: str) -> list[str]:
    """Return which weights updates made not finite, on any rank; waits once for the device."""
    held = {name: p for name, p in trained(state).items() if name not in by_design}
    bad = [f"{name} itself" for name, good in zip(held, finite(held.values()).tolist(), strict=True) if not good]
    if state.ranks.sharded and not state.ranks.smallest(not bad, kind):  # else all ranks hold the same
        return bad or ["what another rank holds"]
    return bad


def statistics(state: State) -> set[str]:
    """Return the buffers that should be finite: those that are saved, and hold no infinity by design as a mask does."""
    saved = state.model.state_dict(keep_vars=True).keys()
    held = {name: numbers_of(b) for name, b in state.model.named_buffers() if name in saved and not b.is_meta}
    return {name for name, b in held.items() if b is not None and (not b.isinf().any() or b.isnan().any())}


def finite(tensors: Iterable[Tensor]) -> Tensor:
    """Return, for each of `numbers_of`, whether all of it is finite, as one vector, on an accelerator where one holds any."""
    if not (dense := list(tensors)):
        return torch.ones(0, dtype=torch.bool)
    where = next((t.device for t in dense if t.device.type != "cpu"), dense[0].device)  # to the host a copy would wait
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, t in enumerate(dense):
        kinds.setdefault((t.device, t.dtype), []).append(i)
    found: dict[int, Tensor] = {}
    for places in kinds.values():
        # The largest magnitude is not finite exactly where something is not: unlike a sum of squares, it can't overflow.
        flags = torch.stack(torch._foreach_norm([dense[i] for i in places], float("inf"))).isfinite()
        if len(kinds) == 1:
            return flags
        found.update(zip(places, flags.to(where, non_blocking=True), strict=True))
    return torch.stack([found[i] for i in range(len(dense))])


def verdicts(state: State, found: Iterable[tuple[str | Tensor, Tensor]]) -> tuple[Tensor, list[str | Tensor]]:
    """Return whether each of `watched` is finite, and what it is; of several ranks also whether all of what others hold is."""
    held = list(found)
    good, owners = finite([tensor for _, tensor in held]), [owner for owner, _ in held]
    if not state.ranks.together:
        return good, owners
    mine = good.all()
    return torch.cat([good, (state.ranks.all(mine) | ~mine)[None]]), [*owners, "what another rank holds"]
