"""What may stand in a checkpoint: data that loads again without running any code."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch

PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.Size, torch.dtype, torch.device)
TENSORS = (torch.Tensor, torch.nn.Parameter)
LONGEST = 2039  # bits of an integer that torch's safe reader takes


def is_sharded(x: Any) -> bool:
    """Tell whether a tensor is a DTensor, of which each rank holds its part; asked without importing them, which is slow."""
    return isinstance(x, torch.Tensor) and hasattr(x, "device_mesh")


def not_plain(x: Any, path: str = "", seen: dict[int, torch.dtype] | None = None) -> str | None:
    """Return where `x` holds what `torch.load(weights_only=True)` would refuse, and what it is; None where nowhere.

    `seen`: the type in which each memory was met in this file so far, since torch saves none in two types.
    """
    if type(x) in PLAIN:
        if type(x) is int and x.bit_length() > LONGEST:
            return f"{path} is an integer of {x.bit_length()} bits, more than {LONGEST}"
        return f"{path} is an empty bytes object, which torch can't load again" if x == b"" else None
    if is_sharded(x):
        return f"{path} is a DTensor whose parts are yet to be summed (Partial)" if any(
            placement.is_partial() for placement in x.placements) else None  # fmt: skip
    if isinstance(x, torch.Tensor) and (type(x) in TENSORS or type(x) in torch.serialization.get_safe_globals()):
        has_memory = x.layout == torch.strided and not x.is_meta and not x.is_nested
        if seen is not None and has_memory and seen.setdefault(x.untyped_storage()._cdata, x.dtype) != x.dtype:
            return f"{path} shares its memory with a tensor of another type, so that one must be a clone;"
        return not_plain(vars(x), f"{path}.__dict__", seen) if vars(x) else None
    if type(x) in (dict, OrderedDict):
        found = [not_plain(k, f"{path} key {k!r}", seen) or not_plain(v, f"{path}[{k!r}]", seen) for k, v in x.items()]
        if type(x) is OrderedDict:
            found.append(not_plain(vars(x), f"{path}.__dict__", seen))
    elif type(x) in (list, tuple):
        found = [not_plain(v, f"{path}[{i}]", seen) for i, v in enumerate(x)]
    else:
        return f"{path} is a {type(x).__module__}.{type(x).__qualname__}"
    return next((where for where in found if where), None)


def plain(x: Any) -> bool:
    """Tell whether `x` is numbers, strings, tensors, and dicts and lists of them."""
    return not_plain(x) is None


def reduced(value: Any) -> Any:
    """Return a copy without the entries of dicts that are no plain data: functions and counters stay as built."""
    if type(value) is dict:
        return {k: r for k, v in value.items() if plain(r := reduced(v))}
    if type(value) in (list, tuple):
        return type(value)(map(reduced, value))
    return value.clone() if isinstance(value, torch.Tensor) else value
