"""Rules that choose parameters or modules: expressions found in names, or classes."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from torch import nn

Rule = str | type[nn.Module]


def check_rules(argument: str, rules: Iterable[Rule] | Rule | None) -> list[Rule] | None:
    """Return rules as a list; raises ValueError for what is neither an expression nor a module's class."""
    if rules is None:
        return None
    found = [rules] if isinstance(rules, str | type) else list(rules)
    for rule in found:
        try:
            re.compile("" if isinstance(rule, type) and issubclass(rule, nn.Module) else rule)
        except (re.error, TypeError) as error:
            raise ValueError(f"{argument} has {rule!r}, neither an expression nor a module class: {error}") from None
    if not found:
        raise ValueError(f"{argument} holds no rule")
    return found


def matches(rule: Rule, name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Tell whether the expression is found in the name, or the module of that name or one around it is of the class."""
    if isinstance(rule, str):
        return re.search(rule, name) is not None
    places = [name[: dot.start()] for dot in re.finditer(r"^|\.", name)] + [name]
    return any(isinstance(modules.get(place), rule) for place in places)


def select(argument: str, rules: Iterable[Rule], model: nn.Module, among: Container[Any]) -> set[Any]:
    """Return which modules or parameters in `among` the rules match; raises ValueError for one that matches none."""
    modules = dict(model.named_modules(remove_duplicate=False))
    held: dict[str, Any] = {**modules, **dict(model.named_parameters(remove_duplicate=False))}
    pool, found = {name: x for name, x in held.items() if x in among}, set[Any]()
    for rule in rules:
        hits = {x for name, x in pool.items() if matches(rule, name, modules)}
        if not hits:
            known = pool if isinstance(rule, str) else {type(m).__name__: m for m in modules.values()}
            near = get_close_matches(getattr(rule, "__name__", str(rule)), known, 3, 0)
            raise ValueError(f"{argument} has {rule!r}, which matches nothing; the closest are {', '.join(near)}")
        found |= hits
    return found
