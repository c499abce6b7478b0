"""Weights, buffers and optimizer state kept in host memory, to go back to."""

from __future__ import annotations

import copy
import logging
from collections.abc import Container
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .finite import masks, numbers_of, sound
from .groups import check_rated, put
from .redo import put_buffer, shaped, tensors
from .state import State
from .store import Copies, Named, inner

log = logging.getLogger("hookloop")
Slot = tuple[dict[str, Tensor | None], str]  # a module's buffers, and the name of one


class Kept:
    """What to go back to, kept anew at what every `every`-th step begins with."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.data: dict[str, Any] | None = None
        self.at: int | None = None  # None: all may have changed since
        self.restored = False
        self.optimizer: Optimizer | None = None

    def begin(self, state: State, scales: bool) -> None:
        """Keep anew before the first step, which callbacks may still change weights for, also between two runs.

        `scales`: whether going back will scale rates, which is refused here of an optimizer that has none.
        """
        if scales:
            check_rated(state.optimizer)
        if state.loader is not None and not self.restored:
            self.at = None
        self.restored = False

    def look(self, state: State, buffers: Container[str], by_design: Container[str]) -> None:
        """Keep, where it is time, what the step that begins finds."""
        if self.optimizer is not state.optimizer:
            if self.optimizer is not None:  # another took over, and can't go back to this one's state
                self.data = self.at = None
            self.optimizer = state.optimizer
        if self.at is None or (state.step % self.every == 0 and state.step != self.at):
            self.data, self.at = keep(state, buffers, by_design) or self.data, state.step

    def restore(self, state: State, data: dict[str, Any] | None) -> None:
        """Take back what was saved, unless the model has other layers now."""
        if data is not None and fits(state, data):
            self.data, self.at, self.restored, self.optimizer = data, data["step"], True, state.optimizer


class BadUpdates:
    """What is done about updates that are bad: an error, the way back, or a word in the log of what is left out."""

    action: str
    patience: int
    factor: float
    scale, row, before = 1.0, 0, 0  # of the rates; bad updates in a row now, and before the last good verdict
    _kept: Kept | None

    def bad(self, state: State, text: str, spoilt: bool = False, applied: bool = False) -> str:
        """Raise, or go back, and return that in words; `applied`: it can't be left out any more.

        `spoilt`: the weights are what is bad, so the update before was bad too, whatever its gradients were.
        """
        self.row, self.before = max(self.row, self.before if spoilt or applied else 0) + 1, 0
        back = None if self._kept is None else self._kept.data
        if applied and back is None:
            raise FloatingPointError(text)
        if self.row >= self.patience:
            raise FloatingPointError(f"{text} ({self.row} bad updates in a row: patience={self.patience})")
        if back is not None:
            put_back(state, back)
            self.scale *= self.factor
            text += f"; back to the weights of update {back['step']}, rates times {self.scale:g}"
        log.warning("%s", text if back is not None else f"{text}; the update is skipped")
        return text


def keep(state: State, buffers: Container[str] = (), by_design: Container[str] = ()) -> dict[str, Any] | None:
    """Return a copy, as plain data by names; None, and a warning, where weights, these buffers or state are not finite.

    `by_design`: weights that may be infinite.
    """
    named, copies = Named(shaped(state.model), state.optimizer), Copies()
    places, optimizer = slots(state, named), named.optimizer_state()
    # Settings stay as they are when going back; a copy of them would hang on which callback set what first.
    optimizer["groups"] = [{"params": group["params"]} for group in optimizer["groups"]]
    weights = {name: x for name, x in named.model_state().items() if name not in places}
    found = copies.of({"step": state.step, "weights": weights, "optimizer": optimizer,
                       "buffers": {name: owner[own] for name, (owner, own) in places.items()},
                       "along": {key: read() for key, (read, _) in sorted(state.along.items())}})  # fmt: skip
    copies.wait()
    judged = {named.clean(name) for name, _ in state.model.named_buffers() if name in buffers}
    parts = {**found["weights"], **{name: x for name, x in found["buffers"].items() if name in judged},
             **{f"the optimizer's state of {name}": x for name, x in optimizer["state"].items()}}  # fmt: skip
    for path, one in optimizer["inner"].items():
        parts |= {f"the optimizer's {path}'s state of {name}": x for name, x in one["state"].items()}
    free = {named.clean(name) for name in masks(state, by_design)}
    bad = [name for name, part in parts.items() for x in map(numbers_of, tensors(part))
           if x is not None and not x.is_meta and not sound(x, name in free)]  # fmt: skip
    if bad:
        log.warning("nothing new is kept to roll back to: after update %d %s is not finite", state.step, ", ".join(bad[:4]))
    return None if bad else found


def slots(state: State, named: Named) -> dict[str, Slot]:
    """Return where each buffer is held, by name; also the empty places."""
    modules = state.model.named_modules()
    return {named.clean(f"{path}.{name}" if path else name): (m._buffers, name) for path, m in modules for name in m._buffers}


def fits(state: State, kept: dict[str, Any]) -> bool:
    """Tell whether weights and optimizer are still those that were kept: a run may be resumed with other layers."""
    named = Named(state.model, state.optimizer)
    mine = {name: getattr(x, "shape", None) for name, x in named.model_state().items() if name not in slots(state, named)}
    theirs = {name: getattr(x, "shape", None) for name, x in kept["weights"].items()}
    return mine == theirs and named.kind == kept["optimizer"]["kind"]


def put_back(state: State, kept: dict[str, Any]) -> None:
    """Go back to it; the rates and other settings of the parameter groups stay as they are now."""
    named, groups = Named(state.model, state.optimizer), [*state.optimizer.param_groups]
    now = [{k: v.clone() if isinstance(v, Tensor) else v for k, v in group.items() if k != "params"} for group in groups]
    named.load_model(kept["weights"])
    for one in (state.optimizer, *inner(state.optimizer).values()):
        one.state.clear()  # what has come since the copy, too
    # Torch takes what it is given as it is, and would go on in what is kept.
    named.load_optimizer(copy.deepcopy(kept["optimizer"]), named.options(), named.options())
    with torch.no_grad():
        for name, (owner, own) in slots(state, named).items():
            put_buffer(owner, own, kept["buffers"].get(name), state.device)
            if name not in kept["buffers"]:
                del owner[own]
        state.optimizer.param_groups[:] = groups  # loading made them anew, and others hold these
        for group, settings in zip(groups, now, strict=True):
            put(group, settings)
    for key, made in kept.get("along", {}).items():  # formats of before have none
        if key in state.along:
            state.along[key][1](copy.deepcopy(made))
