"""How many updates a run will have, told before it starts."""

from __future__ import annotations

import math
from collections.abc import Iterable

from .batch import Size, size
from .callback import Callback
from .checks import whole
from .dispatch import overridden
from .order import extent
from .state import State


def update_samples(callbacks: Iterable[Callback], state: State) -> int | None:
    """Return the samples that the update at this position is planned to hold; None where unknown, or a matter of measuring."""
    shape = [c for c in callbacks if {"batch_size", "accumulate"} & set(c.owns)]
    if any(c.measured for c in shape):
        return None
    shadow = State(state.model, state.optimizer, loader=state.loader, epoch_samples=state.epoch_samples, step=state.step,
                   epoch=state.epoch, batch_size=state.batch_size, accumulate=state.accumulate)  # fmt: skip
    for callback in shape:
        callback.on_step_start(shadow)
    batched = getattr(state.loader, "batch_sampler", None)
    size = shadow.batch_size or getattr(state.loader, "batch_size", None) or getattr(batched, "batch_size", None)
    return None if size is None else size * shadow.accumulate


def count_steps(
    callbacks: Iterable[Callback], state: State, epochs: int | None, steps: int | None, size: Size = size
) -> int | None:
    """Return the updates from a run's first to its end; None where data have no length or a callback measures."""
    shape = [c for c in callbacks if {"batch_size", "accumulate"} & set(c.owns)]
    batches, samples = extent(state.loader, bool(shape), size)
    state.epoch_samples = samples
    if epochs is None or batches is None or any(c.measured for c in shape):
        return steps
    if not shape:
        total = epochs * math.ceil(batches / state.accumulate)
        return total if steps is None else min(total, steps)
    hooks = [c.on_step_start for c in shape if "on_step_start" in overridden(c)]
    shadow = State(state.model, state.optimizer, loader=state.loader, epoch_samples=samples)
    # Where nobody sets a batch size, or samples can't be counted, an epoch is counted in loader batches.
    by_samples = samples is not None and any("batch_size" in c.owns for c in shape)
    unit = (getattr(state.loader, "batch_size", None) or math.ceil((samples or 0) / max(1, batches))) if by_samples else 1
    held = samples if by_samples and samples is not None else batches
    for shadow.epoch in range(epochs):
        used = 0
        while used < held and (steps is None or shadow.step < steps):
            for hook in hooks:
                hook(shadow)
            whole("state.accumulate", shadow.accumulate, 1, none=False)
            whole("state.batch_size", shadow.batch_size, 1)
            if shadow.batch_size is not None and not by_samples:
                return steps
            for _ in range(shadow.accumulate):
                used = (used // unit + 1) * unit if shadow.batch_size is None else used + shadow.batch_size
            shadow.step += 1
    return shadow.step
