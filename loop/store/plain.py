"""What may stand in a checkpoint: data that loads again without running any code."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch

PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.Size, torch.dtype, torch.device)
TENSORS = (torch.Tensor, torch.nn.Parameter)


def not_plain(x: Any, path: str = "") -> str | None:
    """Return where `x` holds what `torch.load(weights_only=True)` would refuse, and what it is; None where nowhere."""
    if type(x) in PLAIN:
        return None
    if isinstance(x, torch.Tensor) and (type(x) in TENSORS or type(x) in torch.serialization.get_safe_globals()):
        return not_plain(vars(x), f"{path}.__dict__") if vars(x) else None
    if type(x) in (dict, OrderedDict):
        found = (not_plain(k, f"{path} key {k!r}") or not_plain(v, f"{path}[{k!r}]") for k, v in x.items())
    elif type(x) in (list, tuple):
        found = (not_plain(v, f"{path}[{i}]") for i, v in enumerate(x))
    else:
        return f"{path} is a {type(x).__module__}.{type(x).__qualname__}"
    return next((where for where in found if where), None)


def plain(x: Any) -> bool:
    """Tell whether `x` is numbers, strings, tensors, and dicts and lists of them."""
    return not_plain(x) is None
