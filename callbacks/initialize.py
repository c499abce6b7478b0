"""Initialize: how weights begin, by their layer's class."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from ..loop import rng
from ..loop.callback import Callback
from ..loop.rules import Rule, check_alone, check_shaped, matches, named, rule_list, select
from ..loop.state import State
from ..loop.store.sharded import filled_by

How = str | Callable[[Tensor], Any]


def function(argument: str, how: How) -> Callable[[Tensor], Any]:
    """Return torch.nn.init's function of that name, with or without its underscore."""
    if callable(how):
        return how
    known = [name[:-1] for name in dir(nn.init) if name.endswith("_") and not name.startswith("_")]
    if not isinstance(how, str) or how.rstrip("_") not in known:
        near = ", ".join(get_close_matches(str(how), known, 3, 0))
        raise ValueError(
            f"{argument} gives {how!r}, which is neither a function nor one of torch.nn.init's; the closest are {near}"
        )
    found: Callable[[Tensor], Any] = getattr(nn.init, how.rstrip("_") + "_")
    return found


class Initialize(Callback):
    """Draws weights anew before the first step of a fresh run, never of a resumed one or of one entered again.

    `rules`: a module's class, or an expression found in a parameter's name, -> the name of a function of `torch.nn.init`
    ("kaiming_uniform", "trunc_normal", "orthogonal", ...) or a function that fills a tensor. A class decides what its
    modules hold themselves but biases, which `bias` fills (None leaves them); the first rule that matches counts. Rows of an
    embedding that stand for padding are 0. With Seed each parameter draws from a stream of its own, by its name, and nothing
    else moves. Raises ValueError for unknown names, rules that match or decide nothing, functions that a shape does not suit,
    with the parameter, where gradients are there already, and on several ranks without Seed.
    (He et al. 2015, https://arxiv.org/abs/1502.01852; Glorot and Bengio 2010)
    """

    def __init__(self, rules: Mapping[Rule, How], bias: How | None = "zeros") -> None:
        if not isinstance(rules, Mapping):
            raise TypeError(f"rules must map module classes or expressions to functions of torch.nn.init, not {rules!r}")
        rule_list("rules", rules)
        self.rules = {rule: function("rules", how) for rule, how in rules.items()}
        self.bias = None if bias is None else function("bias", bias)
        self._done = False

    def on_fit_start(self, state: State) -> None:
        """Draw."""
        if self._done or state.step:
            return
        if state.loader is None and state.grads:
            raise ValueError("Initialize would draw weights anew behind their first backward, as around a loop of your own; do it "
                             "before: Initialize(...).on_fit_start(State(model, optimizer))")  # fmt: skip
        if state.world > 1 and state.seed is None:
            raise ValueError("Initialize would draw other weights on each rank; add Seed(0) to callbacks")
        select("rules", self.rules, state.model, set(state.model.parameters()))
        drawn = decide(state.model, self.rules, self.bias)
        check_shaped({name: p for name, p, _ in drawn})
        check_alone(self, Initialize, [p for _, p, _ in drawn])
        for name, p, fill in drawn:
            seed = None if state.seed is None else rng.derive(state.seed, name)
            try:
                with contextlib.nullcontext() if seed is None else rng.isolated(state.device, seed), torch.no_grad():
                    filled_by(fill, p)
            except Exception as error:
                raise ValueError(
                    f"{name} of shape {tuple(p.shape)} can't be drawn so: {error}; give its layer another"
                ) from error
        filled = {p for _, p, _ in drawn}
        for module in state.model.modules():
            if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.weight in filled:
                module._fill_padding_idx_with_zero()
        self._done = True

    def state_dict(self) -> dict[str, Any]:
        """Return whether it was done."""
        return {"done": self._done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Draw no more: these weights were restored."""
        self._done = True


def decide(model: nn.Module, rules: Mapping[Rule, Any], bias: Any) -> list[tuple[str, Tensor, Any]]:
    """Return name, parameter and function, once for each parameter, by the first rule that matches any of its names."""
    (modules, parameters), found = named(model), dict[Tensor, tuple[int, str, Any]]()
    for name, p in parameters.items():
        path, _, own = name.rpartition(".")
        owner, computes, _ = f".{name}".partition(".parametrizations.")
        for number, (rule, fill) in enumerate(rules.items()):
            if isinstance(rule, str):
                hit, how = matches(rule, name, modules), fill
            elif computes and isinstance(modules[owner[1:]], rule):
                raise ValueError(f"rules has {rule!r}, but {name} computes what it draws there, as weight_norm does: initialize "
                                 f"that layer before it is parametrized, or name {name} before {rule.__name__}")  # fmt: skip
            else:
                hit, how = isinstance(modules[path], rule), bias if "bias" in own else fill
            if hit:
                if p not in found or number < found[p][0]:
                    found[p] = number, found[p][1] if p in found else name, how
                break
    drawn = [(name, p, how) for p, (_, name, how) in found.items() if how is not None]
    used = {number for number, _, how in found.values() if how is not None}
    for rule in (rule for number, rule in enumerate(rules) if number not in used):
        raise ValueError(f"rules has {rule!r}, which decides nothing: rules before it match all that it does, or modules of this "
                         "class hold no weight themselves; put it first, or name the class of the layers inside")  # fmt: skip
    return drawn
