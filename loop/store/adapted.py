"""Modules that take saved tensors of other shapes than they hold, as observers and fake quantization do."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from typing import Any

from torch import nn


def adapted(model: nn.Module, clean: Callable[[str], str], names: Collection[str], saved: dict[str, Any]) -> set[str]:
    """Return which of these names of other shapes modules take by loading code of their own, as copies of them tell."""
    taken = set[str]()
    for path, module in model.named_modules():
        prefix = clean(f"{path}.") if path else ""
        mine = {name for name in names if name.startswith(prefix)} - taken
        if (
            mine
            and loads_by_itself(module)
            and takes(module, {n[len(prefix) :]: saved[n] for n in saved if n.startswith(prefix)})
        ):
            taken |= mine
    return taken


def loads_by_itself(module: nn.Module) -> bool:
    """Tell whether a module's own code has a say in what it loads."""
    return type(module)._load_from_state_dict is not nn.Module._load_from_state_dict or bool(module._load_state_dict_pre_hooks)


def takes(module: nn.Module, part: dict[str, Any]) -> bool:
    """Tell whether a copy of a module takes all of it as it was saved, in the parameters that it has, which an optimizer holds."""
    hooks = [getattr(hook, "hook", hook) for m in module.modules()
             for hook in (*m._load_state_dict_pre_hooks.values(), *m._load_state_dict_post_hooks.values())]  # fmt: skip
    if any(getattr(hook, "__closure__", None) for hook in hooks):
        return False  # it could reach the module itself, which is to stay as it is
    try:
        tried = copy.deepcopy(module)
        before = [*tried.parameters()]
        tried.load_state_dict(copy.deepcopy(part))
    except Exception:  # whatever its code raises, it doesn't take it
        return False
    after, found = [*tried.parameters()], tried.state_dict()
    alike = all(getattr(found[name], "shape", None) == getattr(x, "shape", None) for name, x in part.items())
    return alike and len(after) == len(before) and all(p is q for p, q in zip(before, after, strict=True))
