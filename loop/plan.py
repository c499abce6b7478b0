"""How many updates a run will have, told before it starts."""

from __future__ import annotations

import math
from collections.abc import Iterable

from .callback import Callback
from .dispatch import overridden
from .feed import extent
from .state import State


def count_steps(callbacks: Iterable[Callback], state: State, epochs: int | None, steps: int | None) -> int | None:
    """Return the updates from a run's first to its end; None where data have no length or a callback measures."""
    shape = [c for c in callbacks if {"batch_size", "accumulate"} & set(c.owns)]
    batches, samples = extent(state.loader, walk=bool(shape))
    state.epoch_samples = samples
    if epochs is None or batches is None or any(c.measured for c in shape):
        return steps
    if not shape:
        total = epochs * math.ceil(batches / state.accumulate)
        return total if steps is None else min(total, steps)
    hooks = [c.on_step_start for c in shape if "on_step_start" in overridden(c)]
    shadow = State(state.model, state.optimizer, loader=state.loader)
    # Data whose samples can't be counted are counted in loader batches of one.
    unit = 1 if samples is None else getattr(state.loader, "batch_size", None) or math.ceil(samples / max(1, batches))
    held = batches if samples is None else samples
    for shadow.epoch in range(epochs):
        used = 0
        while used < held and (steps is None or shadow.step < steps):
            for hook in hooks:
                hook(shadow)
            if shadow.batch_size is not None and samples is None:
                return steps
            for _ in range(shadow.accumulate):
                used = (used // unit + 1) * unit if shadow.batch_size is None else used + shadow.batch_size
            shadow.step += 1
    return shadow.step
