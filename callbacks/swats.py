"""The rate of SGD steps that are like the steps an optimizer takes now, and when it has settled."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..loop.checks import whole
from ..loop.exchange import held
from ..loop.factors import rates_of, without
from ..loop.groups import Group
from ..loop.host import HostCopy
from ..loop.state import State
from ..loop.wrapped import reals

KEPT = ("mean", "settled", "count", "beta", "ended")


def projected_rate(steps: Sequence[Tensor], grads: Sequence[Tensor], total: Callable[..., Tensor] = Tensor.clone) -> Tensor:
    """Return the rate of the SGD step whose projection onto the step taken is that step: p.p / -p.g, sums over all ranks."""
    first = steps[0].device
    own = [(p * p).sum(dtype=torch.float64).to(first) for p in steps]
    cross = [(p * g).sum(dtype=torch.float64).to(first) for p, g in zip(steps, grads, strict=True)]
    both = total(torch.stack([torch.stack(own).sum(), torch.stack(cross).sum()]))
    return both[0] / -both[1]


def settle(mean: Tensor, rate: Tensor, count: int, beta: float, tolerance: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the running mean with the `count`-th rate in it, the mean without its bias to 0, and whether the two agree."""
    good = rate.isfinite()  # it is not where p.g is 0
    mean = torch.where(good, beta * mean + (1 - beta) * rate, mean)
    unbiased = mean / (1 - beta**count)
    agree = good & ((unbiased - rate).abs() < tolerance) & (unbiased > 0)  # a rate below 0 would climb
    return mean, unbiased, agree if count > 1 else torch.zeros_like(agree)


def sgd_rate(projected: float) -> Callable[[Group], float]:
    """Return what makes of a projected rate that of a group of SGD, whose momentum adds its steps up."""

    def rate(group: Group) -> float:
        if "momentum" not in group or group.get("dampening") or "alpha" in group:
            raise ValueError("rate='swats' is one of SGD without dampening, and to gives another optimizer; give rate= a "
                             "number")  # fmt: skip
        return projected * (1 - float(group["momentum"]))

    return rate


class ProjectedRate:
    """The mean of the projected rates of all updates, and its value when it first agreed with one of them, on the device.

    (Keskar and Socher 2017, https://arxiv.org/abs/1712.07628, algorithm 1)
    """

    def __init__(self, tolerance: float, every: int) -> None:
        if isinstance(tolerance, bool) or not isinstance(tolerance, int | float) or not 0 < tolerance < math.inf:
            raise ValueError(f"tolerance must be finite and above 0, a difference of rates, not {tolerance!r}")
        whole("every", every, 1, none=False)
        self.tolerance, self.every, self.ended = tolerance, every, False
        self.mean, self.settled = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)  # 0: it has not
        self.count, self.beta, self.seen = 0, 0.0, 0.0
        self._host, self._before, self._rates = HostCopy(), list[Tensor](), list[Any]()

    def keep(self, state: State) -> None:
        """Copy the weights from before an update, and the rates that its factors will change."""
        if self.ended:
            return
        now, self._rates = [reals(p) for p in held(state.optimizer)], rates_of(state.optimizer)
        if [p.shape for p in now] != [p.shape for p in self._before]:
            self._before = [torch.empty_like(p) for p in now]
        torch._foreach_copy_(self._before, now)

    def measure(self, state: State) -> None:
        """Take in the step that was applied, without the factors on its rate, which the next optimizer's rate will have too."""
        if self.ended:
            return
        pairs = [(p, old) for p, old in zip(held(state.optimizer), self._before, strict=True) if p.grad is not None]
        taken = torch._foreach_sub([reals(p) for p, _ in pairs], [old for _, old in pairs])
        steps = without([p for p, _ in pairs], taken, state.optimizer.param_groups, self._rates, state.rates)
        total = state.ranks.total if state.ranks.sharded else Tensor.clone
        rate = projected_rate(steps, [reals(p.grad) for p, _ in pairs if p.grad is not None], total)
        self.beta = state.optimizer.param_groups[0].get("betas", (0.0, 0.999))[1]
        self.count += 1
        self.mean, unbiased, agree = settle(self.mean.to(rate.device), rate, self.count, self.beta, self.tolerance)
        settled = self.settled.to(rate.device)
        self.settled = torch.where(agree & (settled == 0), unbiased, settled)
        state.log("swats_rate", unbiased)
        if state.step % self.every == 0:
            self._host.put(state.step, {"rate": self.settled})

    def look(self, state: State) -> float:
        """Return, on the last update of every so many, the rate if it had settled at their first, else 0."""
        return self._drained() if state.step % self.every == self.every - 1 else 0.0

    def end(self, state: State, first: bool) -> float:
        """Measure no more; return the rate that settled `first`, or else the mean now, for which the device is waited."""
        rate = self.seen if first else float(self.mean) / (1 - self.beta**self.count) if self.count else 0.0
        if not 0 < rate < math.inf:
            raise RuntimeError(f"the projected rate is {rate:g} after update {state.step}, which SGD can't use: the steps do not "
                               "go down the gradient; give rate= a number, or a later at=")  # fmt: skip
        self.ended, self._before = True, []
        return rate

    def _drained(self) -> float:
        for _, found in self._host.take(all=True):
            self.seen = found["rate"]
        return self.seen

    def state_dict(self) -> dict[str, Any]:
        """Return what was measured."""
        return {"seen": self._drained(), **{name: getattr(self, name) for name in KEPT}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        vars(self).update(state)
