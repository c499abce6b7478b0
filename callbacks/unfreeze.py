"""Unfreeze: layers that join training in later epochs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from ..loop.callback import Callback
from ..loop.rules import Rule, check_alone, check_shaped, rule_list, select
from ..loop.state import State


class Unfreeze(Callback):
    """Trains each parameter from the epoch on whose rules are the first to match it; what none matches trains all along.

    `plan`: `{epoch: rules}`, a rule being an expression found in a parameter's name or a class of a module around it, or a
    list of them: `{0: "head", 2: "layer4", 4: "."}`. Until then it has no gradient, no decay and no optimizer state, and
    norms whose parameters are all frozen (one without any goes by its own name) are in eval mode at each step's start, so
    that their running statistics stay too: leave `model.train()` out of a step. Groups keep all parameters throughout; what is
    still frozen when a run ends stays so. DDP needs `find_unused_parameters=True`, SGD with momentum no `fused=True`.
    Raises ValueError for bad plans, for rules that match or decide nothing, and for a plan that leaves nothing to train at
    first.
    (Howard and Ruder 2018, https://arxiv.org/abs/1801.06146: gradual unfreezing)
    """

    def __init__(self, plan: Mapping[int, Iterable[Rule] | Rule]) -> None:
        if not isinstance(plan, Mapping) or not plan:
            raise ValueError(f"plan must map epochs to rules, such as {{0: 'head', 2: '.'}}, not {plan!r}")
        for epoch in plan:
            if isinstance(epoch, bool) or not isinstance(epoch, int) or epoch < 0:
                raise ValueError(f"plan must map epochs (from 0) to rules, not {epoch!r}")
        given = {epoch: [None] if plan[epoch] is None else plan[epoch] for epoch in sorted(plan)}
        self.plan = {epoch: rule_list(f"plan[{epoch}]", rules) or [] for epoch, rules in given.items()}  # type: ignore[arg-type]
        self._from: dict[Tensor | nn.Module, int] = {}
        self._norms: dict[nn.Module, int] = {}

    def on_setup(self, state: State) -> None:
        """Decide when each parameter joins, and freeze those that do not train at first."""
        all_norms = [m for m in state.model.modules() if getattr(m, "running_mean", None) is not None]
        norms: dict[nn.Module, list[Any]] = {norm: [*norm.parameters(recurse=False)] or [norm] for norm in all_norms}
        among = {*state.model.parameters(), *(norm for norm, own in norms.items() if norm in own)}
        for epoch, rules in self.plan.items():
            mine = select(f"plan[{epoch}]", rules, state.model, among)
            if self._from.keys() >= mine:
                raise ValueError(f"plan[{epoch}] decides nothing: epochs before it match all that it does")
            self._from = {**dict.fromkeys(mine, epoch), **self._from}
        check_alone(self, Unfreeze, self._from)
        decided = {norm: own for norm, own in norms.items() if self._from.keys() >= {*own}}
        self._norms = {norm: min(self._from[x] for x in own) for norm, own in decided.items()}
        held = {p for group in state.optimizer.param_groups for p in group["params"]}
        if lost := [name for name, p in state.model.named_parameters() if p in self._from and p not in held]:
            raise ValueError(f"plan unfreezes {', '.join(lost[:3])}, which the optimizer does not hold; build it on all of "
                             "model.parameters()")  # fmt: skip
        if late := [name for name, p in state.model.named_parameters() if p in self._from and p in state.ranks.frozen]:
            raise ValueError(f"plan unfreezes {', '.join(late[:3])}, frozen before DistributedDataParallel was built, and so "
                             "left to each rank alone: wrap the model unfrozen, Unfreeze freezes by itself")  # fmt: skip
        check_shaped({name: p for name, p in state.model.named_parameters() if self._from.get(p, 0) > state.epoch})
        self._apply(state)
        if not any(p.requires_grad for p in held):
            raise ValueError(f"plan leaves nothing to train before epoch {min(self.plan)}; give epoch 0 rules of its own, such as "
                             "{0: 'head'}")  # fmt: skip

    def on_fit_start(self, state: State) -> None:
        """Refuse a fused momentum that would begin at different times; by now groups are as they stay."""
        for i, group in enumerate(state.optimizer.param_groups):
            joins = {max(self._from.get(p, 0), state.epoch) for p in group["params"] if p in self._from or p.requires_grad}
            if len(joins) > 1 and group.get("fused") and group.get("momentum"):
                raise ValueError(f"parameter group {i} of {type(state.optimizer).__name__} holds parameters that join at epochs "
                                 f"{', '.join(map(str, sorted(joins)))}, and torch's fused form with momentum takes none after the "
                                 "others: build it with fused=False")  # fmt: skip

    def on_epoch_start(self, state: State) -> None:
        """Have this epoch's parameters train; what is frozen keeps its statistics."""
        self._apply(state)
        state.log("frozen", sum(isinstance(p, Tensor) and not p.requires_grad for p in self._from))

    def on_step_start(self, state: State) -> None:
        """Keep them also where someone has called `model.train()` since."""
        for norm, epoch in self._norms.items():
            if norm.training and epoch > state.epoch:
                norm.eval()

    def _apply(self, state: State) -> None:
        for p, epoch in self._from.items():
            if isinstance(p, Tensor) and p.requires_grad != (epoch <= state.epoch):
                p.requires_grad_(epoch <= state.epoch)
                p.grad = None
        for norm, epoch in self._norms.items():
            norm.train(state.model.training and epoch <= state.epoch)
