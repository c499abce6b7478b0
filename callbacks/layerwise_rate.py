"""LayerwiseRate: small rates near the input, the full rate at the head."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..loop.callback import Callback
from ..loop.depth import Layer, as_run, layers
from ..loop.groups import as_text, check_rated, fold, set_groups
from ..loop.rules import Rule, by_rules, check_rules
from ..loop.state import State


def rate_factors(found: list[Layer], decay: float) -> dict[Tensor, float]:
    """Return parameter -> decay ** (its layer's distance from the last)."""
    return {p: decay ** (len(found) - 1 - i) for i, layer in enumerate(found) for p in layer}


class LayerwiseRate(Callback):
    """Multiplies each layer's rate by `decay` ** (its distance from the head), for fine-tuning.

    `decay`: above 0, at most 1. A layer: a leaf of the module tree in the order of registration, a whole block where the
    model repeats one, all embeddings together (the first); `loop.depth.layers` says it in full, `table()` shows it.
    `example`: what the model's forward takes (a loader batch's first parts will do), for the order in which layers run
    instead; it runs on "meta", without values. `rules`: the factor itself, for parameters whose name an expression is
    found in or that a module of a class is around; the first that matches decides. Factors are written into each group's
    `lr` and `initial_lr`, so every scheduler that begins at them keeps their ratios (`Schedule(function)`); OneCycleLR and
    CyclicLR take rates of their own, as lists. Parameters outside the model keep theirs. Raises TypeError or ValueError for
    bad settings, for what would change nothing, and where a scheduler was built before. (Howard and Ruder 2018,
    https://arxiv.org/abs/1801.06146; Clark et al. 2020, https://arxiv.org/abs/2003.10555)
    """

    owns, planned = ("layers' rates",), True

    def __init__(self, decay: float = 1.0, rules: Mapping[Rule, float] = {}, example: Any = None) -> None:
        check_rules(rules, "factors", "decay= is for the layers that they do not match")
        for name, factor in {"decay": decay, **{f"rules[{rule!r}]": f for rule, f in rules.items()}}.items():
            most = 1.0 if name == "decay" else 1e6
            if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor <= most:
                raise ValueError(f"{name} must be a factor above 0 and at most {most:g}, not {factor!r}; to freeze a layer: "
                                 "requires_grad_(False)")  # fmt: skip
        if decay == 1 and (not rules or example is not None):
            raise ValueError(f"decay={decay!r} changes no layer's rate{'' if rules else ' and there are no rules'}; give "
                             "decay=0.75" + ("" if example is None else ", or leave example out"))  # fmt: skip
        self.decay, self.rules, self.example = decay, dict(rules), example
        self._rows: list[dict[str, Any]] = []
        self._given: list[Any] = []
        self._state: State | None = None

    def on_setup(self, state: State) -> None:
        """Split and join the optimizer's groups, and write their rates, once."""
        if self._state is state:  # an entry into the Loop that failed later is made again
            return
        ruled, found = by_rules(state.model, self.rules), layers(state.model)
        if self.example is not None:
            found = as_run(state.model, found, self.example)
        if not found[1:] and not ruled:
            raise ValueError(f"the model is one layer, so decay={self.decay} changes nothing; give rules")
        check_rated(state.optimizer)
        factors = {**rate_factors(found, self.decay), **ruled}
        rates = {p: scaled(group["lr"], factors.get(p, 1.0))
                 for group in state.optimizer.param_groups for p in group["params"]}  # fmt: skip
        firsts = {p: rate.clone() if isinstance(rate, Tensor) else rate for p, rate in rates.items()}
        set_groups(state, {"lr": rates, "initial_lr": firsts})
        self._given = [group["lr"] for group in state.optimizer.param_groups]
        self._rows = [{"layer": i, "factor": factor, "names": fold([n for n, p in state.model.named_parameters() if p in some])}
                      for i, layer in enumerate(found) for factor in sorted({factors[p] for p in layer})
                      for some in [{p for p in layer if factors[p] == factor}]]  # fmt: skip
        self._state, self.example = state, None

    def on_before_optimizer_step(self, state: State) -> None:
        """Refuse, at a run's first two updates, rates that a scheduler has made one again."""
        if state.step > 1 or not self._given:  # CyclicLR does it after its first
            return
        given, now = self._given, [group["lr"] for group in state.optimizer.param_groups]
        if any(isinstance(rate, Tensor) for rate in [*given, *now]):  # reading them would wait for the device
            return
        if len(set(given)) > 1 and len(set(now)) == 1 and now[0]:
            raise ValueError(f"a scheduler wrote the rate {now[0]:.6g} over all layers' own; OneCycleLR and CyclicLR take a list: "
                             "max_lr=[group['lr'] for group in optimizer.param_groups]")  # fmt: skip

    def table(self) -> str:
        """Return the layers with factor and names as a Markdown table; raises RuntimeError before on_setup."""
        if not self._rows:
            raise RuntimeError("LayerwiseRate.table() runs after on_setup: inside `with loop:`, or later")
        return as_text(self._rows)


def scaled(rate: Any, factor: float) -> Any:
    """Return the rate times the factor; a tensor's rate is a tensor of its own."""
    return rate if factor == 1.0 else rate * factor
