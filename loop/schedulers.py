"""What a torch scheduler was built with, so that a resumed run tells when the program now builds another."""

from __future__ import annotations

import inspect
import math
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from .checks import say
from .goal import Goal
from .groups import Group, check_rated, put
from .store import reduced

if TYPE_CHECKING:
    from .state import State

POINTS = (0, 1, 10, 100, 1000)
UNSAVED = (FunctionType, MethodType, BuiltinFunctionType, partial)  # torch leaves them out, or saves them empty


def rates(optimizer: Optimizer) -> dict[Tensor, Any]:
    """Return each parameter's rate, as a plain number."""
    return {p: reduced(group["lr"]) for group in optimizer.param_groups for p in group["params"]}


def plain(group: Group) -> dict[str, Any]:
    """Return a group's settings, as plain data."""
    found: dict[str, Any] = reduced({k: v for k, v in group.items() if k != "params"})
    return found


def put_all(optimizer: Optimizer, found: list[dict[str, Any]]) -> None:
    """Give each group these settings."""
    for group, one in zip(optimizer.param_groups, found, strict=True):
        put(group, one)


def build(function: Callable[..., Any], state: State, since: int, first: dict[Tensor, Any]) -> Any:
    """Return what the function builds, which begins at each group's rate: `first` gives that of its parameters, where known.

    Raises ValueError where a group can have no rate.
    """
    check_rated(state.optimizer)
    groups, total = state.optimizer.param_groups, length(state, since)
    for group in groups:
        put(group, {"lr": first.get(group["params"][0], group["lr"])})
    # what LayerwiseRate wrote, or a checkpoint brought: CyclicLR gives `lr` where it begins, and torch keeps an initial_lr there is
    ours = bool(first or state.layer_rates)
    orders = [[*group] for group in groups]
    firsts = [group.pop("initial_lr", None) if ours else None for group in groups]
    try:
        return told(total, function, state.optimizer, total)
    except KeyError as error:  # one that goes on, by last_epoch=, asks for it
        if "initial_lr" not in str(error) or firsts == [None] * len(groups):
            raise
        put_first(groups, firsts, orders)
        return told(total, function, state.optimizer, total)
    finally:
        put_first(groups, firsts, orders)


def put_first(groups: list[Group], firsts: list[Any], orders: list[list[str]]) -> None:
    """Give each group the initial_lr that it lacks, and its settings in the order of before, as a checkpoint has them."""
    for group, first, order in zip(groups, firsts, orders, strict=True):
        if (now := group.get("initial_lr", first)) is not None:
            found = {**group, "initial_lr": now}
            group.clear()
            group.update({name: found[name] for name in [*order, *found] if name in found})


def settings(scheduler: Any) -> dict[str, Any]:
    """Return its single values, and as lists what can't be saved: what functions give at a few points, milestones."""
    single = {k: v for k, v in scheduler.state_dict().items() if isinstance(v, int | float | str)}
    found: dict[str, Any] = {k: v for k, v in single.items() if k[0] != "_" and k != "last_epoch"}
    for name, value in vars(scheduler).items():
        held = value if isinstance(value, list | tuple) else [value]
        if isinstance(value, Counter):
            found[name] = sorted(value.elements())
        elif name == "_milestones":
            found["milestones"] = str(value)
        elif functions := [f for f in held if isinstance(f, UNSAVED)]:
            found[f"{name} at {', '.join(map(str, POINTS))}"] = [[_at(f, point) for point in POINTS] for f in functions]
        elif name == "lr_lambdas":
            for f in held:  # objects, whose attributes torch saves
                found |= chosen(f)
    for i, inner in enumerate(getattr(scheduler, "_schedulers", ())):
        found |= {f"{name} of its scheduler {i}": value for name, value in settings(inner).items()}
    return found


def chosen(function: Any) -> dict[str, Any]:
    """Return the single values that an object computes with; a word may choose what it computes, so it is kept as a list."""
    held = getattr(function, "__dict__", {})
    inner = [v for v in held.values() if isinstance(v, dict)]
    flat = {k: v for values in (held, *inner) for k, v in values.items() if isinstance(v, int | float | str)}
    return {k: [v] if isinstance(v, str) else v for k, v in flat.items()}


def _at(function: Any, point: int) -> float | None:
    try:
        with warnings.catch_warnings(action="ignore"):
            value = float(function(point))
        return value if math.isfinite(value) else None
    except Exception:  # beyond its range, or no function of the step alone
        return None


def differences(here: dict[str, Any], there: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Return, as text, where two differ: in values, which a restore takes over, and in functions, which none can."""
    differ = [name for name in here if name in there and here[name] != there[name]]
    text = {name: f"{name} {there[name]!r} (not {here[name]!r})" for name in differ}
    return ([text[n] for n in differ if not isinstance(here[n], list)], [text[n] for n in differ if isinstance(here[n], list)])


def check_given(scheduler: Any, on: Any) -> None:
    """Raise TypeError or ValueError for what is no scheduler, function or name, and for what it can't be stepped on."""
    if inspect.isclass(scheduler) or not (isinstance(scheduler, LRScheduler | str) or callable(scheduler)):
        raise TypeError("scheduler must be a torch scheduler, or a function such as lambda optimizer, total_steps: "
                        f"CosineAnnealingLR(optimizer, total_steps), or a name as 'cosine', not {scheduler!r}")  # fmt: skip
    if not isinstance(on, str | Goal) or (isinstance(on, Goal) and on != Goal(on.metric, on.mode)):
        raise ValueError("on must be 'step', 'epoch', a metric's name, or a Goal of metric and mode alone (the "
                         f"patience is ReduceLROnPlateau's), not {on!r}")  # fmt: skip


def check_kind(scheduler: Any, on: Any, optimizer: Optimizer | None = None) -> Any:
    """Return the scheduler; raises ValueError for one of another optimizer, or that is not stepped `on` this."""
    kind, mode = type(scheduler).__name__, getattr(on, "mode", None)
    if optimizer is not None and getattr(scheduler, "optimizer", None) is not optimizer:
        raise ValueError(f"scheduler gives a {kind} of another optimizer; build it on the Loop's own")
    if mode != (scheduler.mode if isinstance(scheduler, ReduceLROnPlateau) else None):
        raise ValueError(f"on={on!r} doesn't fit {kind}: ReduceLROnPlateau takes a metric's name or Goal, of "
                         "the same mode as its own, and every other scheduler 'step' or 'epoch'")  # fmt: skip
    return scheduler


def told(length: int | None, act: Callable[..., Any], *args: Any) -> Any:
    """Return what it gives; an error says where the run's length, which the scheduler may need, was not known."""
    try:
        return act(*args)
    except (TypeError, ValueError) as error:
        if length is not None:
            raise
        raise ValueError(f"{error}; the scheduler was built with total_steps=None, since the run's length is not known: if it "
                         "needs it, give it a number of its own, or steps= to fit or epochs, where one of them runs "
                         "it") from error  # fmt: skip


def step(scheduler: Any, length: int | None, *args: Any) -> None:
    """Step it; raises ValueError where groups were added since it was built, which torch takes for an error or leaves alone."""
    first = (getattr(scheduler, "_schedulers", None) or [scheduler])[0]
    built, now = len(getattr(first, "base_lrs", scheduler.optimizer.param_groups)), len(scheduler.optimizer.param_groups)
    if built != now:
        raise ValueError(f"{type(scheduler).__name__} was built on {built} parameter groups and the optimizer has {now} now, so "
                         "that it has no rate for those added: add groups before, in on_setup at the latest; to train parameters "
                         "later, Unfreeze keeps them in their groups")  # fmt: skip
    told(length, scheduler.step, *args)


def check_same(kind: str, here: dict[str, Any], saved: dict[str, Any]) -> None:
    """Raise ValueError for a saved scheduler of another kind or with other functions; warn of settings that it brings along."""
    if saved["kind"] != kind:
        raise ValueError(f"the checkpoint holds a {saved['kind']}, scheduler is a {kind}; give the same one")
    lost, changed = differences(here, saved["settings"])
    if changed:
        raise ValueError(f"the checkpoint's {kind} has {', '.join(changed)}; a function can't be saved, so give the same")
    if lost:
        warnings.warn(f"{kind} goes on with the checkpoint's {', '.join(lost)}", stacklevel=3)


def length(state: State, since: int) -> int | None:
    """Return the updates from `since` to the run's end, None where that is not known."""
    return None if state.total_steps is None else max(state.total_steps - since, 1)


def check_length(here: dict[str, Any], built: int | None, now: int | None) -> None:
    """Warn where a run is entered again with another length than stands among its scheduler's settings."""
    if built and now and now != built and built in here.values():
        warnings.warn(f"Schedule goes on with a length of {built} updates, and the run has {now} now", stacklevel=3)


def check_follows(build: Callable[[Optimizer, int | None], Any] | None, new: Optimizer, state: State) -> None:
    """Refuse what can't schedule another optimizer, told by building it on a copy of that."""
    if build is None:
        raise ValueError("a scheduler can't follow to another optimizer: Schedule(lambda optimizer, total_steps: ...) can")
    if state.total_steps is None:
        return
    tried: Optimizer = object.__new__(type(new))
    vars(tried).update(vars(new))
    tried.param_groups = [{k: v.clone() if isinstance(v, Tensor) else v for k, v in g.items()} for g in new.param_groups]
    try:
        build(tried, length(state, state.step))
    except Exception as error:
        say(error, f"in building the scheduler for {type(new).__name__}, which is to take over")
        raise
