"""Weights, buffers and optimizer state kept in host memory, to go back to."""

from __future__ import annotations

import copy
import logging
from collections.abc import Container
from typing import Any

import torch

from .groups import put
from .redo import shaped, tensors
from .state import State
from .store import Copies, Named, reduced

log = logging.getLogger("hookloop")


def keep(state: State, buffers: Container[str] = ()) -> dict[str, Any] | None:
    """Return a copy, as plain data by names; None, and a warning, where weights, these buffers or state are not finite."""
    named, copies = Named(shaped(state.model), state.optimizer), Copies()
    found = copies.of({"step": state.step, "model": named.model_state(), "optimizer": named.optimizer_state(),
                       "unsaved": unsaved(state, named)})  # fmt: skip
    copies.wait()
    # Settings stay as they are when going back; a copy of them would hang on which callback set what first.
    found["optimizer"]["groups"] = [{"params": group["params"]} for group in found["optimizer"]["groups"]]
    others = {named.clean(name) for name, _ in state.model.named_buffers() if name not in buffers}
    parts = {**{name: x for name, x in found["model"].items() if name not in others},
             **{f"the optimizer's state of {name}": x for name, x in found["optimizer"]["state"].items()}}  # fmt: skip
    bad = [name for name, part in parts.items() for x in tensors(part)
           if (x.is_floating_point() or x.is_complex()) and x.itemsize > 1 and not x.isfinite().all()]  # fmt: skip
    if bad:
        log.warning("nothing new is kept to roll back to: after update %d %s is not finite", state.step, ", ".join(bad[:4]))
    return None if bad else found


def unsaved(state: State, named: Named) -> dict[str, Any]:
    """Return the buffers that are in no state dict."""
    held = state.model.state_dict().keys()
    return {named.clean(name): b for name, b in state.model.named_buffers() if name not in held}


def put_back(state: State, kept: dict[str, Any]) -> None:
    """Go back to it; the rates and other settings of the parameter groups stay as they are now."""
    named, groups = Named(state.model, state.optimizer), [*state.optimizer.param_groups]
    now = [reduced({k: v for k, v in group.items() if k != "params"}) for group in groups]
    named.load_model(kept["model"])
    state.optimizer.state.clear()  # what has come since the copy, too
    own = copy.deepcopy(kept["optimizer"])  # torch takes tensors as they are, and would go on in what is kept
    named.load_optimizer(own, named.options(), named.options())
    with torch.no_grad():
        for name, b in unsaved(state, named).items():
            if name in kept["unsaved"] and kept["unsaved"][name].shape == b.shape:
                b.copy_(kept["unsaved"][name])
        state.optimizer.param_groups[:] = groups  # loading made them anew, and others hold these
        for group, settings in zip(groups, now, strict=True):
            put(group, settings)
