"""What a run is going to use at each update, told by its callbacks before it starts, without model or data."""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from ... import callbacks as ours
from ...callbacks.rate_curves import Curve
from ..callback import Callback
from ..checks import check_end, check_loader, check_optimizer, say
from ..dispatch import check, overridden
from ..groups import describe
from ..plan import count_steps
from ..state import State
from .passes import gather, largest_micro, loader_sizes
from .previewed import SAMPLES, Preview

BY_MEASURE = {"on_micro_end", "on_exception", "on_validation_end"}  # what goes by these, no preview can know
SHAPING = {"on_setup", "on_fit_start", "on_epoch_start", "on_step_start", "on_before_optimizer_step"}
SPARED = (ours.Average, ours.Checkpoint, ours.ClipGradients, ours.CUDAGraph, ours.Diagnose, ours.Dropout, ours.EarlyStopping,
          ours.Fingerprint, ours.HardExamples, ours.Initialize, ours.Metrics, ours.NoiseScale, ours.NonFinite, ours.Preemption,
          ours.Progress, ours.Seed, ours.TensorBoard, ours.Unfreeze)  # fmt: skip
SIZES = ("epochs", "batch_size", "accumulate", "update_size", "micro_batch_size")
OWNED = {"optimizer's rates": ("rates",), "micro_batch_size": ("micro_batch_size",), "optimizer": ("rates", "decays")}


def preview(callbacks: Iterable[Callback], loader: Any, *, epochs: int | None = None, steps: int | None = None,
            optimizer: torch.optim.Optimizer | None = None, model: nn.Module | None = None) -> Preview:  # fmt: skip
    """Return every group's rate and decay and all sizes, at each update of the run that `fit` would make of these; run nothing.

    The hooks of callbacks with `planned = True` run on copies, so that what is given stays as it is; samples are taken to
    be of one shape, so that batches join. `loader`: the run's, or a list of batches that stands for it; one that tells no
    length needs `steps`, and what hangs on where its passes end is not known. Without `optimizer`, rates are factors on 1;
    `model` is what rules on names need. What is not known is None, and `unknown` says why, or by whom it is measured; rates go
    on as if no update was skipped, and to the planned end. `left_out`: callbacks of your own that may change an update and say
    no `planned`. Under CUDAGraph rates are rounded to float32. Raises ValueError where batch sizes hang on what is measured,
    for callbacks that have run, and for a run without an end; TypeError for what can't be copied.
    """
    given = tuple(callbacks) if not isinstance(callbacks, Callback) else (callbacks,)
    check(given)
    check_end(epochs, steps)
    check_loader("loader", loader)
    for callback in given:
        if callback._used:
            raise ValueError(f"{type(callback).__name__} has run already, and would be previewed from where it stands; give "
                             "new callbacks")  # fmt: skip
    known, unknown, left_out = sort(given)
    noise = [c for c in given if isinstance(c, ours.NoiseScale)]
    sizes, untold = loader_sizes(loader, any("batch_size" in c.owns for c in known))
    if sizes == []:
        raise ValueError("the loader gives 0 batches; give it more data or a smaller batch")
    if sizes is None and steps is None:
        raise ValueError(f"{untold}, so nothing says when the run ends: give steps=, or a list of batches that stands for the "
                         "loader, such as [torch.empty(32, 1)] * 1000")  # fmt: skip
    first, *again = [Simulation(*shadow(known, noise, loader, optimizer, model), sizes) for _ in range(1 + (sizes is None))]
    with warnings.catch_warnings():  # a scheduler's first step finds that no optimizer has stepped
        warnings.filterwarnings("ignore", message=r"Detected call of `lr_sch|Seems like `optimizer.step")
        try:
            found = first.run(epochs, steps)
        except Exception as error:
            if model is None:
                say(error, "in a preview without model=, whose names and layers rules go by")
            raise
    unknown = dict.fromkeys([name for one in again for name in by_epochs(found, one, steps)], untold) | unknown
    for name in unknown:
        found[name] = None
    missing = [n for n in SAMPLES if found[n] is not None and not found[n].all()]
    unknown |= dict.fromkeys(missing, untold)
    if found["rates"] is not None and found["rates"].numel() and found["rates"].isnan().all():
        missing, unknown["rates"] = [*missing, "rates"], f"{type(optimizer).__name__} sets its rates by itself"
    found |= dict.fromkeys(missing)
    names = tuple([row["names"] for row in describe(first.state.optimizer, model)]) if model is not None else ()
    return Preview(**found, names=names, unknown=unknown, left_out=left_out)


def sort(given: Sequence[Callback]) -> tuple[list[Callback], dict[str, str], tuple[str, ...]]:
    """Return the callbacks whose hooks can be run, what others keep unknown, and those that may be missed."""
    known, unknown, left_out = list[Callback](), dict[str, str](), list[str]()
    for callback in given:
        name, measures = type(callback).__name__, overridden(callback) & BY_MEASURE
        if callback.planned and not callback.measured and not measures:
            known.append(callback)
        elif {"batch_size", "accumulate"} & set(callback.owns):
            why = (
                "hang on what a run measures"
                if callback.planned
                else "are known to no preview, since it says no planned = True"
            )
            raise ValueError(f"{name}'s sizes {why}, and all else hangs on them; give a table of sizes in its place, or leave "
                             "it out")  # fmt: skip
        elif owned := [name for setting in callback.owns for name in OWNED.get(setting, ())]:
            why = (
                f"{name} decides by what a run measures" if measures or callback.measured else f"{name} says no planned = True"
            )
            unknown |= dict.fromkeys(owned, why)
        elif not isinstance(callback, SPARED) and overridden(callback) & SHAPING:
            left_out.append(name)
    return known, unknown, tuple(left_out)


def shadow(known: list[Callback], noise: list[Any], loader: Any, optimizer: Any,
           model: nn.Module | None) -> tuple[State, list[Callback], list[Any]]:  # fmt: skip
    """Return a State on a copy of the optimizer that shares its parameters and nothing else, and copies of the callbacks."""
    if optimizer is None:
        held = [p for p in model.parameters() if p.requires_grad] if model is not None else []
        optimizer = torch.optim.SGD(held or [nn.Parameter(torch.zeros(1))], lr=1.0)
    check_optimizer(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    memo: dict[int, Any] = {id(p): p for p in parameters}
    memo |= {id(x): x for x in (model, loader) if x is not None}
    memo[id(optimizer.state)] = defaultdict(dict)  # moments, as large as the model
    for group in (*optimizer.param_groups, optimizer.defaults):
        memo |= {id(v): v.detach().to("cpu", copy=True) for v in group.values() if isinstance(v, Tensor)}
    copied, mine, watching = copied_with(memo, optimizer), [copied_with(memo, c) for c in known], copy.deepcopy(noise)
    copied._opt_called = True
    for group in copied.param_groups:
        group["lr"] = math.nan if group["lr"] is None else group["lr"]
    return State(model or nn.ParameterList(parameters), copied, loader=loader), mine, watching


def copied_with(memo: dict[int, Any], given: Any) -> Any:
    """Return a copy; what `memo` holds by its id is taken from there."""
    try:
        return copy.deepcopy(given, memo)
    except Exception as error:
        raise TypeError(
            f"{type(given).__name__} can't be copied, and a preview may not use up what it is given: {error}"
        ) from error


def by_epochs(found: dict[str, Any], again: Simulation, steps: int | None) -> list[str]:
    """Return what hangs on where epochs end: what is another where each update ends one."""
    try:
        with warnings.catch_warnings(action="ignore"):
            other = again.run(None, steps, short=True)
    except Exception:  # such as of a scheduler that knows so many epochs and no more
        other = {}
    names = ("rates", "decays", "batch_size", "accumulate")
    return [name for name in names if name not in other or not torch.equal(found[name], other[name])]


def quicken(scheduler: Any) -> None:
    """Have a plain scheduler of torch step by its own formula alone, without what guards it, which takes most of the time."""
    kind = type(scheduler)
    plain = kind.step is LRScheduler.step and getattr(kind, "_update_lr", None) is getattr(LRScheduler, "_update_lr", 0)
    groups = scheduler.optimizer.param_groups
    if not plain or any(isinstance(group["lr"], Tensor) for group in groups):
        return
    curves: list[Any] = getattr(scheduler, "lr_lambdas", None) or [None]
    curve: Any = curves[0]

    def step() -> None:
        scheduler.last_epoch += 1
        scheduler._step_count += 1
        for group, rate in zip(groups, scheduler.get_lr(), strict=True):
            group["lr"] = rate

    def step_alike() -> None:
        scheduler.last_epoch += 1
        scheduler._step_count += 1
        factor = curve(scheduler.last_epoch)
        for group, base in zip(groups, scheduler.base_lrs, strict=True):
            group["lr"] = base * factor

    scheduler._get_lr_called_within_step = True
    alone = kind is LambdaLR and isinstance(curve, Curve) and all(f is curve for f in curves)
    scheduler.step = step_alike if alone else step


class Simulation:
    """The order in which a Loop runs hooks, without batches between them."""

    def __init__(self, state: State, callbacks: list[Callback], noise: list[Any], sizes: list[int] | None) -> None:
        self.state, self.callbacks, self.sizes = state, callbacks, sizes
        self.planners = [*self._hooks("on_step_start"), *(c.on_step_start for c in noise)]  # which only has updates cut in two

    def _hooks(self, name: str) -> list[Callable[[State], Any]]:
        return [getattr(c, name) for c in self.callbacks if name in overridden(c)]

    def _run(self, name: str) -> None:
        for hook in self._hooks(name):
            hook(self.state)

    def run(self, epochs: int | None, steps: int | None, short: bool = False) -> dict[str, Any]:
        """Go through the run, `short` with an epoch for each update, and return what each update used."""
        state, sizes = self.state, self.sizes
        self._run("on_setup")
        state.total_steps = count_steps(self.callbacks, state, epochs, steps)
        self._run("on_fit_start")
        self._quicken()
        sizes_used, rates, decays = array("q"), array("d"), array("d")
        ends = None if sizes is None else list(itertools.accumulate(n or 1 for n in sizes))
        told = sizes is not None and all(sizes)
        while (epochs is None or state.epoch < epochs) and (steps is None or state.step < steps):
            self._run("on_epoch_start")
            self._epoch(ends, told, state.step + 1 if short else steps, sizes_used.extend, rates.extend, decays.extend)
            state.epoch += 1
            self._run("on_epoch_end")
            if state.stop_reason is not None or not (ends or short):
                break
        table = torch.tensor(sizes_used, dtype=torch.int64).view(-1, len(SIZES))
        return {**dict(zip(SIZES, table.unbind(1), strict=True)),
                "rates": torch.tensor(rates, dtype=torch.float64).view(-1, len(state.optimizer.param_groups)),
                "decays": torch.tensor(decays, dtype=torch.float64).view(-1, len(state.optimizer.param_groups))}  # fmt: skip

    def _quicken(self) -> None:
        for callback in self.callbacks:
            if isinstance(callback, ours.Schedule):
                quicken(callback.scheduler)

    def _groups(self, now: list[Any]) -> list[Any]:
        """Return the groups of an optimizer that took over."""
        if len(found := self.state.optimizer.param_groups) != len(now):
            raise ValueError(f"the optimizer that takes over has {len(found)} parameter groups, and the one before it {len(now)}: "
                             "a preview needs as many; keep the groups that to is given")  # fmt: skip
        self._quicken()
        return found

    def _epoch(self, ends: list[int] | None, told: bool, steps: int | None, sized: Any, rated: Any, decayed: Any) -> None:
        state, planners, used = self.state, self.planners, 0
        groups, loader_size = state.optimizer.param_groups, getattr(state.loader, "batch_size", None) or 0
        before, after = self._hooks("on_before_optimizer_step"), self._hooks("on_step_end")
        last, total, largest, first = None, 0, 0, loader_size or (ends[0] if told and ends else 0)
        while state.stop_reason is None and (ends is None or used < ends[-1]) and (steps is None or state.step < steps):
            state.least_micros = 1
            for hook in planners:
                hook(state)
            if state.optimizer.param_groups is not groups:
                groups = self._groups(groups)
            size, count = state.batch_size, state.accumulate
            cut = size, count, state.micro_batch_size, state.least_micros
            # in the midst of an epoch sizes stay as they are
            if cut != last or size is None or ends is None or used + total > ends[-1]:
                parts = [size or loader_size] * count if ends is None else gather(used, ends, size, count)
                total, last = sum(parts), cut
                largest = largest_micro(tuple(parts), state.micro_batch_size, state.least_micros)
            used += total
            if told:
                state.update_size, state.micro_size = total, largest
            for hook in before:
                hook(state)
            rates = state.apply_rates()
            sized((state.epoch, size or first, count, state.update_size, state.micro_size))
            rated(state.rates)
            decayed([group.get("weight_decay", 0.0) for group in groups])
            state.restore_rates(rates)
            state.step += 1
            state.samples += state.update_size
            for hook in after:
                hook(state)
