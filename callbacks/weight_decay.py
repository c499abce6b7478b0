"""WeightDecay: how much each parameter decays, by its name or its layer's class."""

import math
import re
from collections.abc import Hashable, Mapping
from difflib import get_close_matches
from typing import Any

from torch import Tensor, nn

from ..loop.callback import Callback
from ..loop.checks import flag
from ..loop.groups import as_text, describe
from ..loop.state import Group, State

Rule = str | type[nn.Module]
NORM = re.compile(r"Norm([123]d)?$")  # any library's: LayerNorm, BatchNorm2d, SyncBatchNorm, LlamaRMSNorm


def spares(name: str, owner: nn.Module, p: Tensor) -> bool:
    """Tell whether a parameter is a bias, at most a vector, or a norm's: by its module's class, not by its name."""
    return p.ndim <= 1 or name.split(".")[-1] == "bias" or any(NORM.search(c.__name__) for c in type(owner).__mro__)


def matches(rule: Rule, name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Tell whether the expression is found in the name, or a module around the parameter is of the class."""
    if isinstance(rule, str):
        return re.search(rule, name) is not None
    return any(isinstance(modules[name[: dot.start()]], rule) for dot in re.finditer(r"^|\.", name))


def decide(model: nn.Module, rules: Mapping[Rule, float], default: float, exempt: bool) -> dict[Tensor, float]:
    """Return parameter -> decay, by the first rule that matches any of its names; a useless rule is a ValueError."""
    modules = dict(model.named_modules(remove_duplicate=False))
    parameters, decays = dict(model.named_parameters(remove_duplicate=False)), dict[Tensor, float]()
    if lazy := [name for name, p in parameters.items() if isinstance(p, nn.UninitializedParameter)]:
        raise ValueError(f"{lazy[:3]} have no shape yet; run one batch through the model before building its optimizer")
    spared = {p for n, p in parameters.items() if exempt and spares(n, modules[n.rpartition(".")[0]], p)}
    for rule, decay in rules.items():
        hits = {p: n for n, p in parameters.items() if matches(rule, n, modules)}
        mine, problem = {p: n for p, n in hits.items() if p not in decays}, ""
        if not hits:
            pool = parameters if isinstance(rule, str) else {type(m).__name__: m for m in modules.values()}
            near = get_close_matches(getattr(rule, "__name__", str(rule)), pool, 3, 0)
            problem = f"matches nothing; the closest are {', '.join(near)}"
        elif not mine:
            problem = f"decides nothing, since rules before it match {[*hits.values()][:3]}; put it first"
        elif decay and spared.issuperset(mine):
            problem = f"decides only biases, norms and vectors, kept at 0.0 unless exempt=False: {[*mine.values()][:3]}"
        if problem:
            raise ValueError(f"rules has {rule!r}, which {problem}")
        decays.update(dict.fromkeys(mine, decay))
    return {p: 0.0 if p in spared else float(decays.get(p, default)) for p in parameters.values()}


def regroup(groups: list[Group], decays: Mapping[Tensor, float]) -> list[Group]:
    """Return the groups split by decay and those with equal settings joined; what `decays` lacks keeps its group's."""
    new: dict[Any, Group] = {}
    for group in groups:
        lists = [k for k in ("params", "param_names") if k in group]
        settings = {k: v for k, v in sorted(group.items()) if k not in (*lists, "weight_decay")}
        values = {k: str(v.tolist()) if isinstance(v, Tensor) else v for k, v in settings.items()}
        equal = tuple((k, v if isinstance(v, Hashable) else id(v)) for k, v in values.items())
        for p, i in {p: i for i, p in enumerate(group["params"])}.items():  # once, were it listed twice
            decay = decays.get(p, group["weight_decay"])
            if (equal, decay) not in new:
                # two groups that shared a rate's tensor would each scale it
                taken = {id(v) for g in new.values() for v in g.values()}
                own = {k: v.clone() if isinstance(v, Tensor) and id(v) in taken else v for k, v in settings.items()}
                new[equal, decay] = {**{k: [] for k in lists}, **own, "weight_decay": decay}
            for k in lists:
                new[equal, decay][k].append(group[k][i])
    return list(new.values())


class WeightDecay(Callback):
    """Gives each parameter the decay of the first rule that matches it, or `default`.

    A rule is a regular expression searched in the parameter's name, or the class of a module around it. Biases, norms
    of every kind and parameters with ndim <= 1 get 0.0 whatever matches, unless `exempt=False`. Groups are split, those
    with equal settings joined; rates, betas and the optimizer's state stay. Frozen parameters stay too, untouched until
    unfrozen; those outside the model (a loss's own) keep their group's decay. Adam, unlike AdamW, adds decay to the
    gradient. Raises TypeError or ValueError for bad settings and for rules that match or decide nothing.
    """

    def __init__(self, rules: Mapping[Rule, float] = {}, default: float = 0.01, exempt: bool = True) -> None:
        flag("exempt", exempt)
        if not isinstance(rules, Mapping):
            raise TypeError(f"rules must map expressions or module classes to decays, not {rules!r}; see default=")
        for rule in rules:
            try:
                re.compile("" if isinstance(rule, type) and issubclass(rule, nn.Module) else rule)
            except (re.error, TypeError) as error:
                raise ValueError(f"rules has {rule!r}, neither an expression nor a module class: {error}") from None
        for name, decay in {"default": default, **{f"rules[{rule!r}]": d for rule, d in rules.items()}}.items():
            if isinstance(decay, bool) or not isinstance(decay, int | float) or not 0 <= decay < math.inf:
                raise ValueError(f"{name} must be a finite decay, at least 0, not {decay!r}")
        self.rules, self.default, self.exempt = dict(rules), default, exempt
        self._state: State | None = None

    def on_setup(self, state: State) -> None:
        """Split and join the optimizer's groups."""
        groups, kind = state.optimizer.param_groups, type(state.optimizer).__name__
        if any("weight_decay" not in group for group in groups):
            raise ValueError(f"{kind} has no weight_decay; take an optimizer that has one, such as AdamW")
        held = {p for group in groups for p in group["params"]}
        if missed := [n for n, p in state.model.named_parameters() if p.requires_grad and p not in held]:
            raise ValueError(f"not in the optimizer: {missed[:3]} of {len(missed)} that require grad; pass or freeze them")
        new = regroup(groups, decide(state.model, self.rules, self.default, self.exempt))
        moved = [set(group["params"]) for group in groups] != [set(group["params"]) for group in new]
        if moved and any("initial_lr" in group for group in groups):
            raise ValueError("a scheduler was built on these groups; build it as Schedule(lambda optimizer, total_steps: ...)")
        groups[:] = new
        self._state = state

    def table(self) -> str:
        """Return the groups with their decay and names as a Markdown table; raises RuntimeError before on_setup."""
        if self._state is None:
            raise RuntimeError("WeightDecay.table() runs after on_setup: inside `with loop:`, or later")
        return as_text(describe(self._state.optimizer, self._state.model))
