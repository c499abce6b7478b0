"""Unfreeze: layers that join training in later epochs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from ..loop.callback import Callback
from ..loop.rules import Rule, rule_list, select
from ..loop.state import State


class Unfreeze(Callback):
    """Trains each parameter from the epoch on whose rules are the first to match it; what none matches trains all along.

    `plan`: `{epoch: rules}`, a rule being an expression found in a parameter's name or a class of a module around it, or a
    list of them: `{0: "head", 2: "layer4", 4: "."}`. Until then it has no gradient, no decay and no optimizer state, and
    norms whose parameters are all frozen stay in eval mode, so that their running statistics stay too. Groups keep all
    parameters throughout. Raises ValueError for bad plans, and for rules that match or decide nothing.
    (Howard and Ruder 2018, https://arxiv.org/abs/1801.06146: gradual unfreezing)
    """

    def __init__(self, plan: Mapping[int, Iterable[Rule] | Rule]) -> None:
        if not isinstance(plan, Mapping) or not plan:
            raise ValueError(f"plan must map epochs to rules, such as {{0: 'head', 2: '.'}}, not {plan!r}")
        for epoch in plan:
            if isinstance(epoch, bool) or not isinstance(epoch, int) or epoch < 0:
                raise ValueError(f"plan must map epochs (from 0) to rules, not {epoch!r}")
        self.plan = {epoch: rule_list(f"plan[{epoch}]", plan[epoch]) or [] for epoch in sorted(plan)}
        self._from: dict[Tensor, int] = {}

    def on_setup(self, state: State) -> None:
        """Decide when each parameter joins, and freeze those that do not train at first."""
        for epoch, rules in self.plan.items():
            mine = select(f"plan[{epoch}]", rules, state.model, set(state.model.parameters()))
            if self._from.keys() >= mine:
                raise ValueError(f"plan[{epoch}] decides nothing: epochs before it match all that it does")
            self._from = {**dict.fromkeys(mine, epoch), **self._from}
        held = {p for group in state.optimizer.param_groups for p in group["params"]}
        if lost := [name for name, p in state.model.named_parameters() if p in self._from and p not in held]:
            raise ValueError(f"plan unfreezes {', '.join(lost[:3])}, which the optimizer does not hold; build it on all of "
                             "model.parameters()")  # fmt: skip
        self._apply(state)

    def on_epoch_start(self, state: State) -> None:
        """Have this epoch's parameters train; what is frozen keeps its statistics."""
        self._apply(state)
        state.log("frozen", sum(not p.requires_grad for p in self._from))

    def _apply(self, state: State) -> None:
        for p, epoch in self._from.items():
            if p.requires_grad != (epoch <= state.epoch):
                p.requires_grad_(epoch <= state.epoch)
                p.grad = None
        for module in state.model.modules():
            own = list(module.parameters(recurse=False))
            if getattr(module, "running_mean", None) is not None and own and all(p in self._from for p in own):
                module.train(state.model.training and any(p.requires_grad for p in own))
