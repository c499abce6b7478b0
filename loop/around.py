"""What only a loop of the user's own needs: what can't run there, what it gives, an update that is left out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from .dispatch import AROUND, OWNED, overridden
from .outputs import as_now
from .state import State


def check_around(callbacks: Any) -> None:
    """Refuse, by name, callbacks that need hooks or settings which a loop of the user's own does not have."""
    for callback in callbacks:
        missing = sorted(overridden(callback) - AROUND - set(callback.optional))
        if missing := missing or [f"to decide state.{setting}" for setting in callback.owns if setting in OWNED]:
            raise ValueError(f"{type(callback).__name__} needs {', '.join(missing)}, which does not run around a loop "
                             "of your own; use loop.fit or loop.epochs, loop.steps, or leave it out")  # fmt: skip


def given(loss: Tensor | float | None, samples: int) -> dict[str, Any]:
    """Return what `updating` is to show; raises ValueError for what is no loss or no number of samples."""
    if not isinstance(samples, int) or isinstance(samples, bool) or samples < 0:
        raise ValueError(f"samples must be a whole number, at least 0, not {samples!r}")
    if isinstance(loss, Tensor) and loss.dim():
        raise ValueError(f"loss must be a 0-d tensor or a number, not shape {tuple(loss.shape)}")
    return {} if loss is None else {"loss": as_now(loss) if isinstance(loss, Tensor) else float(loss)}


def moved(optimizer: Optimizer, steps: int) -> tuple[Any, ...]:
    """Return what differs after an update: how many steps were counted, and a weight's version, for one written out by hand."""
    p = next((p for group in optimizer.param_groups for p in group["params"] if p.grad is not None), None)
    return steps, None if p is None else p._version


def check_rates(state: State) -> None:
    """Refuse rates that were changed while they held an update's factors, with which the change would be put back."""
    for group, used in zip(state.optimizer.param_groups, state.rates, strict=False):
        if not isinstance(group["lr"], Tensor) and group["lr"] != used:
            raise RuntimeError(f"the rate was changed from {used:g} to {group['lr']:g} inside `with loop.updating():`, where it "
                               "holds this update's factors, as of Warmup: call scheduler.step() after it")  # fmt: skip


@contextlib.contextmanager
def left_out(optimizer: Optimizer) -> Iterator[None]:
    """Take the gradients away and have `optimizer.step` do nothing, not even call a closure, which would make them anew."""
    optimizer.zero_grad(set_to_none=True)
    own = vars(optimizer).get("step")  # a scheduler puts its own there
    optimizer.step = lambda *args, **kwargs: None  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del optimizer.step
        if own is not None:
            optimizer.step = own  # type: ignore[method-assign]
