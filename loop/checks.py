"""Arguments that could only go wrong later, refused at once, by name and value."""

from __future__ import annotations

import contextlib
import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.utils.data import Dataset


def whole(name: str, value: Any, least: int, none: bool = True) -> None:
    """Refuse an argument that is neither None (where that may be) nor a whole number from `least` on."""
    if not (none and value is None) and (isinstance(value, bool) or not isinstance(value, int) or value < least):
        raise ValueError(f"{name} must be a whole number, at least {least}, not {value!r}")


def is_number(x: Any, low: float, high: float = math.inf) -> bool:
    """Tell whether x is a finite number from `low` to `high`."""
    return isinstance(x, int | float) and not isinstance(x, bool) and low <= x <= high and x < math.inf


def are_numbers(x: Any, low: float, high: float = math.inf) -> bool:
    """Tell whether x is such a number, or a list of them."""
    return all(is_number(one, low, high) for one in x) if isinstance(x, list | tuple) else is_number(x, low, high)


def is_count(x: Any, least: int) -> bool:
    """Tell whether x is a whole number from `least` on."""
    return isinstance(x, int) and is_number(x, least)


def check_optimizer(optimizer: Any) -> None:
    """Refuse what is no single torch optimizer that steps without a closure."""
    if isinstance(optimizer, list | tuple):
        raise TypeError("optimizer is a list; one Loop has one optimizer: make a Loop for each, in one loop body")
    if not hasattr(optimizer, "param_groups") or inspect.isclass(optimizer):
        hint = ": write it with its parameters" if callable(optimizer) else ""
        raise TypeError(f"optimizer must be a torch optimizer, not {optimizer!r:.60}{hint}")
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(f"{type(optimizer).__name__} needs a closure, which a step of several micro-batches can't give; "
                        "take another optimizer")  # fmt: skip
    kind, torchs = type(optimizer).__name__, torch.optim.Optimizer.state_dict
    if not hasattr(optimizer, "_optimizer_step_post_hooks") and getattr(type(optimizer), "state_dict", torchs) is torchs:
        raise TypeError(f"{kind} can't tell its state: it has no state_dict() of its own, and torch's needs what __init__ of "
                        "torch.optim.Optimizer sets up; call super().__init__ there, or define state_dict and "
                        "load_state_dict")  # fmt: skip
    if any("lr" not in group for group in optimizer.param_groups):
        raise ValueError(f"{kind} has parameter groups without 'lr'; give them one before the Loop is built, None if it sets its "
                         "rates by itself: for group in optimizer.param_groups: group.setdefault('lr', None)")  # fmt: skip


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


def flag(name: str, value: Any) -> None:
    """Refuse what is neither True nor False, since a string or number would pass for True."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, not {value!r}")


def among(name: str, value: Any, known: tuple[str, ...]) -> None:
    """Refuse what is none of the words known."""
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, not {value!r}")


def share(name: str, value: Any) -> None:
    """Refuse what is no share of a whole."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise ValueError(f"{name} must be a share above 0 and at most 1, not {value!r}")


def refuse(why: str, strict: bool) -> None:
    """Raise ValueError for a resume under other settings, or warn where `strict=False` allows it."""
    if strict:
        raise ValueError(f"{why}; resume with the same, start afresh in another folder, or allow it: Loop(..., strict=False)")
    warnings.warn(f"{why}; strict=False allows it", stacklevel=2)


def check_loader(name: str, loader: Any) -> None:
    """Refuse what can't be iterated for batches."""
    if isinstance(loader, Dataset) or not (isinstance(loader, Iterable) or hasattr(loader, "__getitem__")):
        hint = "; wrap it: DataLoader(dataset, batch_size=...)" if isinstance(loader, Dataset) else ""
        raise TypeError(f"{name} must give batches when iterated, as a DataLoader does, not a {type(loader).__name__}{hint}")


def say(error: BaseException, text: str) -> None:
    """Add a note to an error; one that takes none stays as it is."""
    with contextlib.suppress(Exception):
        error.add_note(text)


def check_parameters(model: torch.nn.Module, optimizer: Any) -> None:
    """Refuse a model without parameters, and an optimizer that holds none of them: nothing would be trained."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if next(model.parameters(), None) is None:
        raise ValueError(f"the model, a {type(model).__name__}, has no parameters, so nothing would be trained; give one whose "
                         "layers are attributes of it, lists of them as nn.ModuleList")  # fmt: skip
    if not any(id(p) in held for p in model.parameters()):
        raise ValueError(f"none of the {len(held)} tensors in {type(optimizer).__name__} is a parameter of the model; build it "
                         "on model.parameters(), after the model was copied, moved or sharded (fully_shard)")  # fmt: skip


def check_validation(callbacks: Iterable[Any], loader: Any) -> None:
    """Refuse, before a sample is read, validation data that can't be iterated, or reports that a callback will miss (or may)."""
    each = dict(loader) if isinstance(loader, Mapping) else {} if loader is None else {"": loader}
    for name, one in each.items():
        check_loader(f"val_loader[{name!r}]" if name else "val_loader", one)
    if isinstance(loader, Mapping) and not loader:
        raise ValueError("val_loader is an empty mapping; give it loaders by name, or leave it out")
    for callback in callbacks if loader is None else ():
        if lost := [name for name in callback.watches if name.startswith("val_")]:
            raise ValueError(f"{type(callback).__name__} watches {lost[0]!r}, but no val_loader is given; give one, or watch "
                             "'train_loss'")  # fmt: skip
    for callback in callbacks if loader is not None else ():
        if "train_loss" in callback.watches:  # no error: a callback may report it
            warnings.warn(f"{type(callback).__name__} watches 'train_loss', which fit reports only without a val_loader; watch "
                          "'val_loss', leave val_loader out, or have a callback report it", stacklevel=3)  # fmt: skip


def check_end(epochs: Any, steps: Any) -> None:
    """Refuse a run without an end."""
    whole("epochs", epochs, 0)
    whole("steps", steps, 0)
    if epochs is None and steps is None:
        raise ValueError("nothing says when to end: give epochs= or steps=")
