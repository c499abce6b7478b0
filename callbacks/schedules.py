"""Schedules by name, as `Schedule("cosine", end=0.1)` takes them: the curves, and two of torch's own."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from ..loop.checks import are_numbers, is_count, is_number
from .rate_curves import CURVES, Curve, OneCycle

log = logging.getLogger("hookloop")


def one_cycle(optimizer: Optimizer, steps: int, **options: Any) -> LRScheduler:
    """Rise to each group's own rate and fall far below it, while momentum does the opposite: torch's `OneCycleLR`.

    (Smith and Topin 2018, https://arxiv.org/abs/1708.07120)
    """
    if (share := options.get("pct_start", 0.3)) * steps == 1:  # torch divides by 0
        raise ValueError(f"one_cycle: pct_start={share} is 1 of {steps} updates, over which nothing can rise; give another")
    return OneCycle(optimizer, [float(g["lr"]) for g in optimizer.param_groups], total_steps=steps, **options)


TORCHS = {"one_cycle": (OneCycle, ("optimizer", "max_lr", "total_steps", "epochs", "steps_per_epoch", "last_epoch")),
          "plateau": (ReduceLROnPlateau, ("optimizer", "mode"))}  # fmt: skip


ALLOWED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "after": (lambda x: is_count(x, 0) or (is_number(x, 0, 1) and 0 < x < 1), "a whole number of updates, or a share of them"),
    "decay": (lambda x: is_count(x, 1) or (is_number(x, 0, 1) and 0 < x < 1), "a whole number of updates, or a share of them"),
    **dict.fromkeys(("patience", "cooldown"), (lambda x: is_count(x, 0), "a whole number, at least 0")),
    **dict.fromkeys(("threshold", "eps"), (lambda x: is_number(x, 0), "a finite number, at least 0")),
    **dict.fromkeys(("power", "div_factor", "final_div_factor"), (lambda x: is_number(x, 0) and x > 0, "a number above 0")),
    "factor": (lambda x: is_number(x, 0, 1) and 0 < x < 1, "a number above 0 and below 1"),
    "steps": (lambda x: x is None or is_count(x, 1), "a whole number of updates, or None for those of the run"),
    **dict.fromkeys(("end", "pct_start"), (lambda x: is_number(x, 0, 1), "a share, from 0 to 1")),
    "cycles": (lambda x: is_count(x, 1), "a whole number, at least 1"),
    "growth": (lambda x: is_number(x, 1), "a number, at least 1"),
    "min_lr": (lambda x: are_numbers(x, 0), "a finite rate, at least 0, or one for each group"),
    **dict.fromkeys(
        ("base_momentum", "max_momentum"), (lambda x: are_numbers(x, 0, 1), "a number from 0 to 1, or one for each")
    ),
    **dict.fromkeys(("cycle_momentum", "three_phase"), (lambda x: isinstance(x, bool), "True or False")),
    "anneal_strategy": (lambda x: x in ("cos", "linear"), "'cos' or 'linear'"),
    "threshold_mode": (lambda x: x in ("rel", "abs"), "'rel' or 'abs'"),
    "shape": (lambda x: x in ("linear", "cosine", "sqrt"), "'linear', 'cosine' or 'sqrt'"),
    "timescale": (lambda x: x is None or (is_number(x, 0) and x > 0), "a number of updates above 0, or None for after"),
}


def named(name: Any, on: Any, options: Mapping[str, Any]) -> Callable[[Optimizer, int | None], Any]:
    """Return the function that builds the named scheduler; raises TypeError or ValueError for what can't be, naming what can."""
    known = (*CURVES, *TORCHS)
    if not isinstance(name, str):
        raise TypeError(f"Schedule takes {', '.join(options)} beside a name only, as in Schedule('cosine', end=0.1)")
    if name not in known:
        near = get_close_matches(name.lower().replace("-", "_"), known, 1, 0)[0]
        raise ValueError(f"no schedule is named {name!r}; the closest is {near!r}, and there are {', '.join(known)}")
    if (on in ("step", "epoch")) if name == "plateau" else on != "step":
        needs = "follows a metric: on='val_loss'" if name == "plateau" else "goes by updates; leave on= out"
        raise ValueError(f"on={on!r} doesn't fit {name!r}, which {needs}")
    kind, given = TORCHS.get(name, (None, ("t",)))
    there = [p for p in inspect.signature(kind or CURVES[name]).parameters if p not in given]
    there += ["steps"] if name == "one_cycle" else []
    for option, value in options.items():
        if option not in there:
            raise ValueError(f"{name!r} has no option {option!r}; it has {', '.join(there)}")
        if option in ALLOWED and not ALLOWED[option][0](value):
            raise ValueError(f"{option} must be {ALLOWED[option][1]}, not {value!r}")
    if name == "inverse_sqrt" and not (options.get("after") or options.get("timescale")):
        raise ValueError("inverse_sqrt needs after=, the updates of the warmup beside it, or timescale=, in updates")

    def build(optimizer: Optimizer, total_steps: int | None) -> Any:
        if name == "plateau":
            return ReduceLROnPlateau(optimizer, on.mode, **options)
        if name == "one_cycle":
            own = {k: v for k, v in options.items() if k != "steps"}
            return one_cycle(optimizer, length(name, options, total_steps), **own)
        return LambdaLR(optimizer, Curve(name, resolved(name, options, total_steps)))

    if kind is not None and not any(isinstance(v, list | tuple) for v in options.values()):  # which go by groups
        try:  # now, not when the run starts
            build(torch.optim.SGD([torch.zeros(1)], lr=1.0, momentum=0.9), 1009)
        except (TypeError, ValueError) as error:
            raise ValueError(f"Schedule({name!r}): {error}") from error
    return build


def length(name: str, options: Mapping[str, Any], total_steps: int | None) -> int:
    """Return the updates that a schedule is for."""
    if (steps := options.get("steps") or total_steps) is None:
        raise ValueError(f"Schedule({name!r}) goes over the whole run; say how long that is, with its own steps= or the run's")
    return max(1, int(steps))


def resolved(name: str, options: Mapping[str, Any], total_steps: int | None) -> dict[str, Any]:
    """Return the settings of a curve over a run of so many updates, shares of it in updates."""
    found = {k: p.default for k, p in inspect.signature(CURVES[name]).parameters.items() if k not in ("t", "steps")}
    found.update({"decay": 0.2} if name == "wsd" else {}, **{k: v for k, v in options.items() if k != "steps"})
    shares = [k for k in ("after", "decay") if isinstance(found.get(k), float)]
    if name != "inverse_sqrt" or shares:
        steps = length(name, options, total_steps)
        found |= {k: math.ceil(found[k] * steps) for k in shares}  # as Warmup counts its share
        found |= {"steps": steps} if name != "inverse_sqrt" else {}
        if found.get("after", 0) + (found["cycles"] if found.get("growth") == 1 else 0) >= steps:
            log.warning("Schedule(%r) with %s: the run has %d updates, so rates stay flat", name, found, steps)
        if found.get("decay", 0) > steps:
            log.warning("Schedule(%r, decay=%d): the run has %d updates, and all of them decay", name, found["decay"], steps)
            found["decay"] = steps
    return found
