"""Factors on the rates and decays of one update, multiplied in before the optimizer's step and put back after it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from .groups import Group

Factor = float | Callable[[Any], float]  # of the group's rate in this update
Asked = tuple[Group | None, Factor]  # for one group, or for all


def checked(name: str, factor: float) -> float:
    """Refuse what is no factor."""
    if not (math.isfinite(factor) and factor >= 0):
        raise ValueError(f"{name}: factor must be finite and at least 0, not {factor!r}")
    return factor


def product(group: Group, factors: Sequence[Asked], rate: Any = None) -> float:
    """Return the product of a group's factors, sorted: one of three in list order differs in the last bit half the time."""
    mine: list[Any] = [f for g, f in factors if g is None or g is group]
    return math.prod(sorted(checked("scale_decay", f(rate)) if callable(f) else f for f in mine))


def multiply(groups: list[Group], rates: Sequence[Asked], decays: Sequence[Asked]) -> list[Any]:
    """Multiply every group's rate and decay by its factors; return what `put_back` takes."""
    by = [product(group, rates) if rates else None for group in groups]
    decay = [g["weight_decay"] * product(g, decays, g["lr"] if factor is None else g["lr"] * factor)
             if decays and "weight_decay" in g else None for g, factor in zip(groups, by, strict=True)]  # fmt: skip
    before: list[dict[str, Any]] = []  # nothing is changed until all is computed: a function may raise
    for group, factor, other in zip(groups, by, decay, strict=True):
        kept, rate = {}, group["lr"]
        if factor is not None:
            kept["lr"] = rate.clone() if isinstance(rate, Tensor) else rate
            # a captured step reads this very tensor: filled, not replaced
            group["lr"] = rate.mul_(factor) if isinstance(rate, Tensor) else rate * factor
        if other is not None:
            kept["weight_decay"], group["weight_decay"] = group["weight_decay"], other
        before.append(kept)
    return before


def put_back(groups: list[Group], before: list[Any]) -> None:
    """Put rates and decays back as they were."""
    for group, kept in zip(groups, before, strict=True):
        for name, value in kept.items():
            if isinstance(value, Tensor) and isinstance(group[name], Tensor):
                group[name].copy_(value)
            else:
                group[name] = value


def rates_of(optimizer: Optimizer) -> list[Any]:
    """Return the groups' rates as they are now."""
    return [r.clone() if isinstance(r := g["lr"], Tensor) else r for g in optimizer.param_groups]


def without(parameters: list[Tensor], steps: Sequence[Tensor], groups: list[Group],
            rates: list[Any], used: list[Any]) -> Sequence[Tensor]:  # fmt: skip
    """Return parameters' steps divided by the factor that made of their groups' rates those used."""
    changed = [(g, a, b) for g, a, b in zip(groups, rates, used, strict=True) if isinstance(a, Tensor) or (a and a != b)]
    by = {p: b / a for g, a, b in changed for p in g["params"]}
    return [step / by[p] if p in by else step for p, step in zip(parameters, steps, strict=True)]
