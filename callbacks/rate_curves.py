"""The curves that `Schedule("cosine")` and its like follow: factors on every group's own rate, by update and length."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR


def gone(t: float, start: float, stop: float) -> float:
    """Return the share of the way from `start` to `stop` that lies behind t: 0 before, 1 beyond."""
    return 0.0 if t <= start else 1.0 if t >= stop else (t - start) / (stop - start)


def linear(t: int, steps: int, after: int = 0, end: float = 0.0) -> float:
    """Fall straight to `end`: end + (1 - end) * (steps - t) / (steps - after), the rule of torch's `LinearLR`."""
    return end + (1 - end) * gone(steps - t, 0, steps - after)


def cosine(t: int, steps: int, after: int = 0, end: float = 0.0) -> float:
    """Fall along half a cosine: end + (1 - end) * (1 + cos(pi * x)) / 2, with x = (t - after) / (steps - after).

    (Loshchilov and Hutter 2017, https://arxiv.org/abs/1608.03983; torch's `CosineAnnealingLR` with eta_min = end * rate)
    """
    return end + (1 - end) * (1 + math.cos(math.pi * gone(t, after, steps))) / 2


def polynomial(t: int, steps: int, after: int = 0, end: float = 0.0, power: float = 1.0) -> float:
    """Fall by a power: end + (1 - end) * ((steps - t) / (steps - after)) ** power, the rule of torch's `PolynomialLR`."""
    return float(end + (1 - end) * gone(steps - t, 0, steps - after) ** power)


def cosine_restarts(t: int, steps: int, after: int = 0, end: float = 0.0, cycles: int = 4, growth: float = 1.0) -> float:
    """Fall along `cycles` half cosines, each `growth` times as long as the one before, that fill the run to its end.

    (SGDR: Loshchilov and Hutter 2017, https://arxiv.org/abs/1608.03983; torch's `CosineAnnealingWarmRestarts`)
    """
    if t <= after or t >= steps:
        return 1.0 if t <= after else end
    powers = [growth**i for i in range(cycles)]
    edges = [after + round((steps - after) * math.fsum(powers[:i]) / math.fsum(powers)) for i in range(cycles + 1)]
    now = max(i for i in range(cycles) if edges[i] <= t)
    return cosine(t, edges[now + 1], edges[now], end)


def wsd(t: int, steps: int, decay: int, end: float = 0.0, shape: str = "linear") -> float:
    """Keep the rate, and let it fall to `end` over the last `decay` updates: by 1 - x, (1 + cos(pi * x)) / 2 or 1 - sqrt(x).

    (Warmup-stable-decay: Hu et al. 2024, https://arxiv.org/abs/2404.06395; "sqrt", and a decay over 10% to 20% of the run:
    Haegele et al. 2024, https://arxiv.org/abs/2405.18392)
    """
    if shape == "sqrt":
        return end + (1 - end) * (1 - math.sqrt(gone(t, steps - decay, steps)))
    return (linear if shape == "linear" else cosine)(t, steps, steps - decay, end)


def inverse_sqrt(t: int, after: int = 0, timescale: float | None = None) -> float:
    """Fall as 1 / sqrt(1 + (t - after) / timescale), which has no end; timescale=None is `after`, so sqrt(after / t).

    (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, section 5.3)
    """
    timescale = timescale or after
    return 1.0 if t <= after else 1.0 / math.sqrt((t + timescale - after) / timescale)


CURVES: dict[str, Callable[..., float]] = {
    f.__name__: f for f in (linear, cosine, polynomial, cosine_restarts, wsd, inverse_sqrt)
}


class Curve:
    """A factor by name and settings, which a checkpoint holds, so that a resumed run keeps its own."""

    def __init__(self, curve: str, settings: dict[str, Any]) -> None:
        self.curve, self.settings = curve, settings

    def __call__(self, t: int) -> float:
        """Return the factor at update t."""
        return CURVES[self.curve](t, **self.settings)


class OneCycle(OneCycleLR):
    """torch's, which stays at its end beyond its length, where torch's raises an error."""

    def get_lr(self) -> list[float | Tensor]:
        """Return each group's rate."""
        now, self.last_epoch = self.last_epoch, min(self.last_epoch, self.total_steps - 1)
        try:
            return super().get_lr()
        finally:
            self.last_epoch = now
