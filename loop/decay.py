"""Which parameters decay, and how much: by names, module classes, shapes and depth, never by guesses."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from torch import Tensor, nn

from .depth import depths, is_norm
from .rules import Rule, by_rules, check_shaped

Decay = float | Callable[[float], float]


def spares(name: str, owner: nn.Module, p: Tensor) -> bool:
    """Tell whether a parameter is at most a vector, a bias by its own name, or a norm's by its module's classes' names."""
    return p.ndim <= 1 or name.split(".")[-1] == "bias" or is_norm(owner)


def decide(model: nn.Module, rules: Mapping[Rule, Decay], default: Decay, exempt: bool) -> dict[Tensor, float]:
    """Return parameter -> decay, by the first rule that matches any of its names; a useless rule is a ValueError."""
    modules = dict(model.named_modules(remove_duplicate=False))
    parameters: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    check_shaped(parameters)
    spared = {p for n, p in parameters.items() if exempt and spares(n, modules[n.rpartition(".")[0]], p)}
    idle = "decides only biases, norms and vectors, kept at 0.0 unless exempt=False"
    ruled = by_rules(model, rules, lambda decay, mine: idle if decay and spared.issuperset(mine) else "")
    depth = depths(model) if any(callable(decay) for decay in [default, *rules.values()]) else {}
    return {p: 0.0 if p in spared else at(ruled.get(p, default), depth.get(p, 1.0)) for p in parameters.values()}


def at(decay: Decay, depth: float) -> float:
    """Return the decay at a depth; raises ValueError for what is none."""
    value = decay(depth) if callable(decay) else decay
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(f"a function of depth must give a finite decay, at least 0, not {value!r}, as it does at {depth:.3g}")
    return float(value)
