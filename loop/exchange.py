"""Another optimizer in the middle of a run, on the same parameters: what it takes over, and who is told."""

from __future__ import annotations

import functools
import inspect
import math
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer

from .checks import check_optimizer
from .factors import rates_of
from .groups import Group, check_rated, own_rates, put
from .schedulers import rates
from .state import State
from .store import Named

if TYPE_CHECKING:
    from .session import Session

Build = Callable[[list[Group]], Optimizer]


def check_given(build: Any, rate: Any, waits: bool) -> None:
    """Refuse, at construction, what builds no optimizer, or can't be its rate, or one to wait for."""
    if isinstance(build, Optimizer | type) or not callable(build):
        raise TypeError(f"to must be a function such as lambda groups: SGD(groups, lr=0.1, momentum=0.9), not {build!r:.60}")
    if not (rate in (None, "swats") or (isinstance(rate, int | float) and rate is not True and 0 < rate < math.inf)):
        raise ValueError(f"rate must be finite and above 0, 'swats', or None for the rate that to gives, not {rate!r}")
    if waits and rate != "swats":
        raise ValueError("at=None waits for the projected rate to settle, so it goes with rate='swats'; else say at=")


def check_unscheduled(optimizer: Optimizer) -> None:
    """Refuse a scheduler of the first optimizer, which would go on to schedule nothing."""
    if getattr(optimizer.step, "_wrapped_by_lr_sched", False):
        raise ValueError("a scheduler was built on the optimizer that SwitchOptimizer replaces, and would not follow; give "
                         "a function instead: Schedule(lambda optimizer, total_steps: ...)")  # fmt: skip


def successor(state: State, build: Build, rate: float | Callable[[Group], float] | None = None,
              given: Mapping[Tensor, Any] = {}) -> Optimizer:  # fmt: skip
    """Return `build(groups)` for the parameters that are trained now, with a rate, or one that a function says for a group.

    The groups hold the decay that each was given; if all have their optimizer's own, none is handed over. The ratios of the
    groups' rates stay, of those `given` by the program, not of what a scheduler has made of them. Raises TypeError or
    ValueError for what can't take over: other parameters, a decay that would be lost, whatever a callback refuses.
    """
    old = state.optimizer
    by_group = any(g.get("weight_decay") != old.defaults.get("weight_decay") for g in old.param_groups)
    keep = ("params", "weight_decay") if by_group else ("params",)
    new = build([{k: [*g[k]] if k == "params" else g[k] for k in keep if k in g} for g in old.param_groups])
    check_optimizer(new)
    kind, first, now = type(new).__name__, held(old), held(new)
    if new is old:
        raise ValueError(f"to gives the {kind} that trains already; it must build another on the groups that it is given")
    if len(now) != len(first) or {*map(id, now)} != {*map(id, first)}:
        raise ValueError(f"to gives a {kind} of {len(now)} parameters, which are not the {len(first)} that are trained now; build "
                         "it on the groups that to is given: lambda groups: SGD(groups, lr=0.1)")  # fmt: skip
    if by_group:
        check_decay(old, new)
    for accept in state.accepts:
        accept(new)
    own_rates(new)
    for group in new.param_groups if rate is not None else ():
        put(group, {"lr": rate(group) if callable(rate) else rate})
    check_rated(old)
    known = {**given, **state.layer_rates}
    firsts = {id(p): float(known.get(p, group["lr"])) for group in old.param_groups for p in group["params"]}
    if (top := max(firsts.values())) > min(firsts.values()):
        for group in new.param_groups:
            if len(mine := {firsts[id(p)] for p in group["params"]}) > 1:
                raise ValueError(f"to joins parameters whose rates differ now ({sorted(mine)}) in one group; build the {kind} on "
                                 "the groups that to is given, so that each keeps its share")  # fmt: skip
            put(group, {"lr": group["lr"] * (mine.pop() / top)})
    return new


def exchange(state: State, new: Optimizer) -> None:
    """Train on with another optimizer, between two updates; the old one's state is let go, its other holders are told."""
    old, state.optimizer = state.optimizer, new
    old.state.clear()  # the user's variable still holds the optimizer, and would hold its memory
    if state.layer_rates:  # those of the old one are no measure now
        state.layer_rates |= rates(new)
    state.rates = rates_of(new)
    for tell in state.exchanged:
        tell(state)


def follow(loop: weakref.ref[Session], state: State) -> None:
    """Have a Loop, which is not kept by this, count the steps of the optimizer that it trains with now, and know its settings."""
    if (found := loop()) is None:
        return
    if hasattr(state.optimizer, "_optimizer_step_post_hooks"):
        state.optimizer.register_step_post_hook(functools.partial(count_step, loop))
    found.settings = Named(state.model, state.optimizer).options()


def count_step(loop: weakref.ref[Session], *about: Any) -> None:
    """Count a step of the optimizer, whoever ran it."""
    if (found := loop()) is not None:
        found.optimizer_steps += 1


def held(optimizer: Optimizer) -> list[Tensor]:
    """Return the parameters of all groups."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def check_decay(old: Optimizer, new: Optimizer) -> None:
    """Refuse an optimizer that would lose the decay of the groups, or its own to theirs."""
    kind = type(new).__name__
    own: Any = new.defaults.get("weight_decay")
    if own is None:
        raise ValueError(f"the groups have decays of their own, and {kind} has no weight_decay; leave them out in to=: "
                         'lambda groups: Rprop([{"params": g["params"]} for g in groups])')  # fmt: skip
    given: dict[int, Any] = {id(p): group.get("weight_decay") for group in old.param_groups for p in group["params"]}
    for group in new.param_groups:
        if len(mine := {given[id(p)] for p in group["params"]}) > 1:
            raise ValueError(f"to joins parameters whose decays differ ({sorted(mine)}) in one group, which has one decay; build "
                             f"the {kind} on the groups that to is given, and change their decays there")  # fmt: skip
    usual = inspect.signature(type(new)).parameters.get("weight_decay")
    if usual is not None and own != usual.default and own not in decays(new.param_groups):
        raise ValueError(f"to gives weight_decay={own!r}, which no group would have, since the groups that to is given have decays "
                         f"of their own ({', '.join(map(str, sorted(decays(new.param_groups))))}); change them there, or leave "
                         "weight_decay out of to")  # fmt: skip


def decays(groups: Iterable[Group]) -> set[Any]:
    """Return the decays of all groups."""
    return {group["weight_decay"] for group in groups}
