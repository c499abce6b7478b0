"""Rules that say something of parameters or modules, by their names or by the classes of the modules around them."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Container, Iterable, Mapping
from difflib import get_close_matches
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .store.named import cleaner

Rule = str | type[nn.Module]
T = TypeVar("T")


def check_rules(rules: Any, what: str, hint: str) -> None:
    """Refuse what is no mapping from expressions and module classes to `what`."""
    if not isinstance(rules, Mapping):
        raise TypeError(f"rules must map expressions or module classes to {what}, not {rules!r}; {hint}")
    for rule in rules:
        check_rule("rules", rule)


def check_rule(argument: str, rule: Any) -> None:
    """Refuse what is neither an expression nor a module's class."""
    try:
        re.compile("" if isinstance(rule, type) and issubclass(rule, nn.Module) else rule)
    except (re.error, TypeError) as error:
        raise ValueError(f"{argument} has {rule!r}, neither an expression nor a module class: {error}") from None


def rule_list(argument: str, rules: Iterable[Rule] | Rule | None) -> list[Rule] | None:
    """Return one rule or several as a list; raises ValueError for what is none, and for an empty list."""
    if rules is None:
        return None
    try:
        found = [rules] if isinstance(rules, str | type) else list(rules)
    except TypeError:
        found = [rules]  # type: ignore[list-item]
    for rule in found:
        check_rule(argument, rule)
    if not found:
        raise ValueError(f"{argument} holds no rule")
    return found


def matches(rule: Rule, name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Tell whether the expression is found in the name, or the module of that name or one around it is of the class."""
    if isinstance(rule, str):
        return re.search(rule, name) is not None
    places = [name[: dot.start()] for dot in re.finditer(r"^|\.", name)] + [name]
    return any(isinstance(modules.get(place), rule) for place in places)


def named(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, nn.Parameter]]:
    """Return modules and parameters by all their names, as the bare model has them: compiled or not, rules match the same."""
    clean = cleaner(model)
    modules = {clean(f"{name}.")[:-1]: module for name, module in model.named_modules(remove_duplicate=False)}
    return modules, {clean(name): p for name, p in model.named_parameters(remove_duplicate=False)}


def nothing(rule: Rule, names: Iterable[str], modules: Mapping[str, nn.Module]) -> str:
    """Say that a rule matches nothing, and which names, or classes, are the closest."""
    known = names if isinstance(rule, str) else {type(module).__name__ for module in modules.values()}
    near = get_close_matches(getattr(rule, "__name__", str(rule)), sorted(known), 3, 0)
    return f"matches nothing; the closest are {', '.join(near)}"


def check_shaped(parameters: Mapping[str, Any]) -> None:
    """Refuse, of what is to be decided, parameters of lazy modules that have seen no data."""
    if lazy := [name for name, x in parameters.items() if is_lazy(x)]:
        raise ValueError(f"{lazy[:3]} have no shape yet; run one batch through the model before building its optimizer")


def select(argument: str, rules: Iterable[Rule], model: nn.Module, among: Container[Any]) -> set[Any]:
    """Return which modules or parameters in `among` the rules match; raises ValueError for one that matches none."""
    modules, parameters = named(model)
    held: dict[str, Any] = {**modules, **parameters}
    pool, found = {name: x for name, x in held.items() if x in among}, set[Any]()
    for rule in rules:
        hits = {x for name, x in pool.items() if matches(rule, name, modules)}
        if not hits:
            raise ValueError(f"{argument} has {rule!r}, which {nothing(rule, pool, modules)}")
        found |= hits
    return found


def by_rules(model: nn.Module, rules: Mapping[Rule, T],
             idle: Callable[[T, Collection[Tensor]], str] = lambda value, mine: "") -> dict[Tensor, T]:  # fmt: skip
    """Return parameter -> the value of the first rule that matches any of its names; a useless rule is a ValueError.

    `idle(value, parameters)` says why a rule that decides for these would change nothing, or returns an empty text.
    """
    (modules, parameters), found = named(model), dict[Tensor, T]()
    for rule, value in rules.items():
        hits = {p: n for n, p in parameters.items() if matches(rule, n, modules)}
        mine, problem = {p: n for p, n in hits.items() if p not in found}, ""
        if not hits:
            problem = nothing(rule, parameters, modules)
        elif not mine:
            problem = f"decides nothing, since rules before it match {[*hits.values()][:3]}; put it first"
        elif why := idle(value, mine.keys()):
            problem = f"{why}: {[*mine.values()][:3]}"
        if problem:
            raise ValueError(f"rules has {rule!r}, which {problem}")
        found.update(dict.fromkeys(mine, value))
    return found


def check_alone(callback: Any, kind: type[Any], mine: Iterable[Any]) -> None:
    """Note what a callback decides; raises ValueError where another of its kind decides the same, so that the last would win."""
    callback._decides, loop = frozenset(mine), callback._loop and callback._loop()
    for other in (c for c in (loop.callbacks if loop else ()) if c is not callback and isinstance(c, kind)):
        if both := callback._decides & other._decides:
            modules, parameters = named(loop.state.model)
            name = next(name for name, x in {**modules, **parameters}.items() if x in both)
            raise ValueError(f"{other.key} and {callback.key} both decide {name!r}, and the last would win: give one of them "
                             "rules that leave it out, or all rules to one")  # fmt: skip
