"""WeightDecay: how much each parameter decays, by its name or its layer's class."""

import math
from collections.abc import Mapping

from torch import Tensor

from ..loop.callback import Callback
from ..loop.checks import flag
from ..loop.decay import Decay, decide
from ..loop.groups import as_text, check_decays, describe, set_groups
from ..loop.rules import Rule, check_rules
from ..loop.state import State


class WeightDecay(Callback):
    """Gives each parameter the decay of the first rule that matches it, or `default`.

    A rule is a regular expression searched in the parameter's name, or the class of a module around it. A decay may be a
    function of depth, 0 for the first layer and 1 for the head (`loop.depth` says what a layer is). Biases, norms
    of every kind and parameters with ndim <= 1 get 0.0 whatever matches, unless `exempt=False`. Groups are split, those
    with equal settings joined; rates, betas and the optimizer's state stay. Frozen parameters stay too, untouched until
    unfrozen; those outside the model (a loss's own) keep their group's decay. Adam, unlike AdamW, adds decay to the
    gradient. Raises TypeError or ValueError for bad settings and for rules that match or decide nothing.
    """

    owns = ("weight decay of all groups",)

    def __init__(self, rules: Mapping[Rule, Decay] = {}, default: Decay = 0.01, exempt: bool = True) -> None:
        flag("exempt", exempt)
        check_rules(rules, "decays", "see default=")
        for name, decay in {"default": default, **{f"rules[{rule!r}]": d for rule, d in rules.items()}}.items():
            number = isinstance(decay, int | float) and not isinstance(decay, bool) and 0 <= decay < math.inf
            if not number and (isinstance(decay, type | Tensor) or not callable(decay)):
                raise ValueError(f"{name} must be a finite decay, at least 0, not {decay!r}")
        self.rules, self.default, self.exempt, self.planned = dict(rules), default, exempt, True
        self._state: State | None = None

    def on_setup(self, state: State) -> None:
        """Split and join the optimizer's groups."""
        groups = state.optimizer.param_groups
        check_decays(state.optimizer)
        held = {p for group in groups for p in group["params"]}
        if missed := [n for n, p in state.model.named_parameters() if p.requires_grad and p not in held]:
            raise ValueError(f"not in the optimizer: {missed[:3]} of {len(missed)} that require grad; pass or freeze them")
        set_groups(state, {"weight_decay": decide(state.model, self.rules, self.default, self.exempt)})
        self._state = state

    def table(self) -> str:
        """Return the groups with their decay and names as a Markdown table; raises RuntimeError before on_setup."""
        if self._state is None:
            raise RuntimeError("WeightDecay.table() runs after on_setup: inside `with loop:`, or later")
        return as_text(describe(self._state.optimizer, self._state.model))
