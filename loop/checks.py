"""Arguments that could only go wrong later, refused at once, by name and value."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from typing import Any

import torch


def whole(name: str, value: Any, least: int, none: bool = True) -> None:
    """Refuse an argument that is neither None (where that may be) nor a whole number from `least` on."""
    if not (none and value is None) and (isinstance(value, bool) or not isinstance(value, int) or value < least):
        raise ValueError(f"{name} must be a whole number, at least {least}, not {value!r}")


def check_optimizer(optimizer: Any) -> None:
    """Refuse what is no single torch optimizer that steps without a closure."""
    if isinstance(optimizer, list | tuple):
        raise TypeError("optimizer is a list; one Loop has one optimizer: make a Loop for each, in one loop body")
    if not hasattr(optimizer, "param_groups") or inspect.isclass(optimizer):
        hint = ": write it with its parameters" if callable(optimizer) else ""
        raise TypeError(f"optimizer must be a torch optimizer, not {optimizer!r:.60}{hint}")
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(f"{type(optimizer).__name__} needs a closure, which a step of several micro-batches can't give; use "
                        "loop.updating around your own optimizer.step(closure), or another optimizer")  # fmt: skip


def autocast_context(autocast: Any, device: torch.device) -> Callable[[], contextlib.AbstractContextManager[Any]] | None:
    """Return what makes the context of a forward; raises ValueError for a dtype that the device can't autocast to."""
    if not isinstance(autocast, torch.dtype):
        if autocast is not None and not callable(autocast):
            raise TypeError(f"autocast must be a dtype or a function that gives a context, not {autocast!r}")
        return autocast  # type: ignore[no-any-return]
    can = {torch.bfloat16, torch.float16} if torch.amp.is_autocast_available(device.type) else set()
    if device.type == "cuda" and not torch.cuda.is_bf16_supported():
        can.discard(torch.bfloat16)
    if autocast not in can:
        raise ValueError(f"autocast={autocast} is not there on {device.type}; it has {sorted(map(str, can)) or 'none'}")
    return lambda: torch.autocast(device.type, autocast)
