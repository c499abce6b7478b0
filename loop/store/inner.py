"""Optimizers inside of an optimizer, as one that wraps another or keeps several has them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

SAVED = ("state", "param_groups", "defaults")  # attributes of every optimizer, of which its state dict tells


def inner(optimizer: Optimizer) -> dict[str, Optimizer]:
    """Return the optimizers among an optimizer's attributes, and in containers there, by path, each once."""
    found = {id(x): (path, x) for path, x in attributes(optimizer) if isinstance(x, Optimizer) and x is not optimizer}
    return dict(found.values())


def silent(optimizer: Optimizer) -> dict[str, Optimizer]:
    """Return those whose state its state dict leaves out; nothing for a class with a state dict of its own."""
    return inner(optimizer) if type(optimizer).state_dict is Optimizer.state_dict else {}


def check_inner(kind: str, optimizer: Optimizer, path: str, one: Optimizer) -> None:
    """Raise ValueError for state of an inner optimizer that can't be saved to the bit beside the outer one's."""
    own = {id(p) for group in optimizer.param_groups for p in group["params"]}  # which the checkpoint has as such
    loose = [name for name, x in attributes(optimizer)
             if isinstance(x, Tensor | int | float) and not isinstance(x, bool) and id(x) not in own]  # fmt: skip
    whose = {id(group) for group in optimizer.param_groups}
    if loose or any(id(group) not in whose for group in one.param_groups):
        more = f", as it does {', '.join(loose[:4])}" if loose else ", and whose parameter groups are not its own"
        raise ValueError(f"can't save {kind}: it keeps a {type(one).__qualname__} in {path}, whose state its state_dict() leaves "
                         f"out{more}; define state_dict and load_state_dict, which pass on those of {path}")  # fmt: skip


def together(optimizer: Optimizer, lists: list[tuple[Optimizer, list[Any]]], alike: list[Optimizer]) -> None:
    """Have it and those inside share what they did before each of them was loaded, which makes groups and state anew.

    `lists`: their groups before, the outer one's first; `alike`: those whose state was the outer one's.
    """
    for old, new in zip(lists[0][1] if lists else [], optimizer.param_groups, strict=False):
        settings = dict(new)
        old.clear()
        old.update(settings)
    for one, groups in lists:
        one.param_groups[:] = groups
    for one in alike:
        one.state = optimizer.state


def attributes(optimizer: Optimizer) -> Iterator[tuple[str, Any]]:
    """Yield what lies in an optimizer's attributes, and in containers there, beside what every optimizer has."""
    seen = set[int]()
    for name, x in vars(optimizer).items():
        if name not in SAVED:
            yield from leaves(x, f".{name}", seen)


def leaves(x: Any, path: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """Yield what lies in nested containers, with its path, but for containers `seen` before, as one that holds itself."""
    if not isinstance(x, dict | list | tuple):
        yield path, x
    elif id(x) not in seen:
        seen.add(id(x))
        for key, one in x.items() if isinstance(x, dict) else enumerate(x):
            yield from leaves(one, f"{path}[{key!r}]", seen)
