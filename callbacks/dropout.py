"""Dropout: how much is dropped, set or changed while training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

from torch import nn

from ..loop.callback import Callback
from ..loop.rules import Rule, check_alone, rule_list, select
from ..loop.state import State

Value = float | Mapping[int, float] | Callable[[float], float]


def modules_that_drop(model: nn.Module) -> dict[nn.Module, str]:
    """Return each module that drops, and the name of the attribute that says how much; a recurrent net drops between layers."""
    kinds = {nn.modules.dropout._DropoutNd: "p", nn.MultiheadAttention: "dropout", nn.RNNBase: "dropout"}
    return {m: name for m in model.modules() for kind, name in kinds.items()
            if isinstance(m, kind) and not (isinstance(m, nn.RNNBase) and m.num_layers == 1)}  # fmt: skip


class Dropout(Callback):
    """Sets how much the model's dropout drops: for good, from given epochs on, or by how much of the run is done.

    `p`: a probability, `{epoch: p}` (from that epoch on; before the first, what the modules have), so that `{0: 0.3, 8: 0.0}`
    trains the last epochs without, or a function of the share of the run that is done (0 to 1), asked before each step.
    `modules`: rules (an expression found in a module's name, or its class or that of one around it) that choose among all
    that drop: torch's dropout layers, attention, recurrent nets of several layers (a number that a class of your own gives to
    `F.dropout` is out of reach: give it an `nn.Dropout`). Leaving a run puts back what they had. A compiled or recorded model
    is made anew for each value: give those a table of few. Raises ValueError for bad values, rules that match nothing, a model
    without dropout, and a function where the run's length is not known.
    (Srivastava et al. 2014, https://jmlr.org/papers/v15/srivastava14a.html)
    """

    def __init__(self, p: Value, modules: Iterable[Rule] | Rule | None = None) -> None:
        if not callable(p) and not isinstance(p, Mapping):
            p = {0: p}
        if isinstance(p, Mapping):
            if not p or any(isinstance(e, bool) or not isinstance(e, int) or e < 0 for e in p):
                raise ValueError(f"p must map epochs (from 0) to probabilities, not {dict(p)!r}")
            p = {epoch: probability(value) for epoch, value in sorted(p.items())}
        elif callable(p):
            for done in (0.0, 0.5, 1.0):
                probability(p(done), f"p({done:g})")
        self.p, self.rules = p, rule_list("modules", modules)
        self._found: dict[nn.Module, str] = {}
        self._before: dict[nn.Module, float] = {}

    def on_fit_start(self, state: State) -> None:
        """Find what drops."""
        found = modules_that_drop(state.model)
        if not found:
            raise ValueError(f"the model, a {type(state.model).__name__}, has no dropout to set; leave Dropout out")
        chosen = set(found) if self.rules is None else select("modules", self.rules, state.model, found)
        self._found = {module: name for module, name in found.items() if module in chosen}
        check_alone(self, Dropout, self._found)
        self._before = {module: getattr(module, name) for module, name in self._found.items()}
        if callable(self.p) and state.total_steps is None:
            raise ValueError("Dropout with a function needs the run's length, which is not known: give steps= to fit or epochs, "
                             "or p as a table of epochs")  # fmt: skip

    def on_step_start(self, state: State) -> None:
        """Set it."""
        if callable(self.p):
            value: float | None = probability(self.p(min(1.0, state.step / max(1, state.total_steps or 1))))
        else:
            value = next((p for epoch, p in reversed(self.p.items()) if epoch <= state.epoch), None)
        if value is None:
            return
        for module, name in self._found.items():
            if getattr(module, name) != value:
                setattr(module, name, value)
        state.log("dropout", value)

    def on_fit_end(self, state: State) -> None:
        """Put back what was there."""
        for module, value in self._before.items():
            setattr(module, self._found[module], value)
        self._before = {}


def probability(value: float, name: str = "p") -> float:
    """Return it; raises ValueError for what is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and 0 <= value < 1):
        raise ValueError(f"{name} must be a probability from 0 to below 1, not {value!r}")
    return float(value)
