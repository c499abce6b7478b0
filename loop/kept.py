"""Weights, buffers and optimizer state kept in host memory, to go back to."""

from __future__ import annotations

from typing import Any

import torch

from .groups import put
from .redo import tensors
from .state import State
from .store import Copies, Named, reduced


def keep(state: State) -> dict[str, Any] | None:
    """Return a copy, as plain data by names; None where something in it is not finite."""
    named, copies = Named(state.model, state.optimizer), Copies()
    found = copies.of({"step": state.step, "model": named.model_state(), "optimizer": named.optimizer_state()})
    copies.wait()
    return found if all(x.isfinite().all() for x in tensors(found) if x.is_floating_point()) else None


def put_back(state: State, kept: dict[str, Any]) -> None:
    """Go back to it; the rates and other settings of the parameter groups stay as they are now."""
    named, groups = Named(state.model, state.optimizer), state.optimizer.param_groups
    now = [reduced({k: v for k, v in group.items() if k != "params"}) for group in groups]
    named.load_model(kept["model"])
    state.optimizer.state.clear()  # what has come since the copy, too
    named.load_optimizer(kept["optimizer"], named.options(), named.options())
    with torch.no_grad():
        for group, settings in zip(groups, now, strict=True):
            put(group, settings)
