"""Which rate to train with: a sweep over real updates, and short runs beside each other, which leave no trace."""

from __future__ import annotations

import itertools
import math
import statistics
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..checks import whole
from ..loop import Loop
from .look_ahead import LookAhead, LossFn, check_free, untouched
from .pictures import Picture, figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DIVERGED = 3.0  # a rise above the least smoothed loss, as a multiple of its size, or of the losses' noise where that is more
AT_ONCE = "the loss is {} before the first update, so no rate is to blame: look at the data, the weights and loss_fn"


@dataclass(frozen=True)
class Found(Picture):
    """What a sweep saw: rates (the largest group's), the loss before each update, smoothed, and what to train with.

    `steepest`: where the smoothed loss falls most for a given factor of the rate. `valley`: the middle, on the rate's
    logarithmic scale, of its fall. Both are of what follows the first 1 / (1 - `smooth`) updates, a fifth of all at most,
    over which the loss is hardly smoothed, and None where it did not fall by more than its noise. `diverged`: the rate that
    ended the sweep, None where none did.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    steepest: float | None
    valley: float | None
    diverged: float | None

    def __str__(self) -> str:
        end = "did not diverge" if self.diverged is None else f"diverged at {self.diverged:.3g}"
        if self.valley is None:
            return f"no rate from {self.rates[0]:.3g} to {self.rates[-1]:.3g} lowered the loss beyond its noise; it {end}"
        return f"valley {self.valley:.3g}, steepest descent {self.steepest:.3g}; the loss {end}"

    def figure(self) -> Figure:
        """Return the curve as a matplotlib figure."""
        made, axes = figure("rate", "loss")
        axes.plot(self.rates, self.losses, color="0.75", linewidth=0.8, label="loss")
        axes.plot(self.rates, self.smoothed, color="C0", label="smoothed")
        for name, rate, colour in (("valley", self.valley, "C2"), ("steepest", self.steepest, "C1")):
            if rate is not None:
                axes.axvline(rate, color=colour, linestyle="--", label=f"{name} {rate:.2g}")
        axes.set_xscale("log")
        low, high = min(self.losses), max(self.smoothed[: max(1, len(self.smoothed) // 2)])
        axes.set_ylim(low - 0.1 * (high - low), high + 0.5 * (high - low or 1.0))
        axes.legend()
        return made


@dataclass(frozen=True)
class Tried(Picture):
    """What short runs saw: name -> rate, and name -> the losses, up to one that was not finite."""

    rates: dict[str, float]
    losses: dict[str, tuple[float, ...]]

    def __str__(self) -> str:
        ends = {name: statistics.fmean(losses[-10:]) for name, losses in self.losses.items()}
        return "; ".join(f"{n} ({rate:.3g}): loss {self.losses[n][0]:.4g} to {ends[n]:.4g}" for n, rate in self.rates.items())

    def figure(self) -> Figure:
        """Return the losses of all runs as a matplotlib figure."""
        made, axes = figure("update", "loss")
        for name, rate in self.rates.items():
            axes.plot(self.losses[name], label=f"{name}: {rate:.2g}")
        first = max(losses[0] for losses in self.losses.values() if losses)
        axes.set_ylim(min(0.0, *(min(losses) for losses in self.losses.values())), 2 * first if first > 0 else None)
        axes.legend()
        return made


def find_rate(loop: Loop, loss_fn: LossFn, loader: Any, start: float = 1e-7, end: float = 10.0, steps: int = 100,
              smooth: float = 0.9, micro_batch_size: int | None = None) -> Found:  # fmt: skip
    """Sweep the rate from `start` to `end` over `steps` real updates, return what the loss did, and leave no trace.

    Each update multiplies the rate by the same factor; several groups keep the ratio of their rates. The sweep ends where
    the loss, smoothed by an exponential mean of factor `smooth`, is above 4 times its least, or not finite (where its least
    is about 0: above it by three times the noise from update to update). Updates hold as many samples as the run's next one
    (the loader's batch, `GradientAccumulation`, `DynamicBatchSize` as it stands), in micro-batches of at most
    `micro_batch_size` (None: as the run has them now); no other callback takes part. Model, optimizer, scaler, generators,
    loader and Loop are after it, to the bit, what they were, also where it raises: before the run, between two epochs,
    after any update. What `loss_fn`, hooks on the model or a data set keep elsewhere is not put back, nor what the optimizer
    keeps in objects that are no tensors, containers or optimizers. A Loop with `resume=` has the checkpoint's weights once it
    is entered. The host holds a copy of weights, gradients and optimizer state meanwhile. Raises ValueError for bad settings,
    a loss that is not finite at once and a loader without data, TypeError for a loader that can't be begun again,
    RuntimeError inside a step or with several ranks.
    (Smith 2017, https://arxiv.org/abs/1506.01186)
    """
    check_rate("start", start)
    check_rate("end", end)
    if not start < end:
        raise ValueError(f"start must be below end, not start={start!r} and end={end!r}")
    whole("steps", steps, 10, none=False)
    whole("micro_batch_size", micro_batch_size, 1)
    if isinstance(smooth, bool) or not isinstance(smooth, int | float) or not 0 <= smooth < 1:
        raise ValueError(f"smooth must be at least 0 and below 1, not {smooth!r}")
    check_free(loop, loss_fn, loader, "find_rate")
    rates, losses, smoothed = list[float](), list[float](), list[float]()
    with untouched(loop, loader), LookAhead(loop, loss_fn, loader, micro_batch_size) as ahead:
        for number in range(steps):
            rate = start * (end / start) ** (number / (steps - 1))
            loss = ahead.update(rate)
            if not rates and not math.isfinite(loss):
                raise ValueError(AT_ONCE.format(loss))
            if not math.isfinite(loss):
                break
            rates.append(rate)
            losses.append(loss)
            smoothed.append(ema(losses, smooth))
            if smoothed[-1] - (least := min(smoothed)) > DIVERGED * max(abs(least), noise_of(losses)):
                break
        else:
            rate = math.nan
    # Before that the mean is of so few losses that a single one's noise is taken for a fall; a short sweep has few to spare.
    first = min(round(1 / (1 - smooth)), len(rates) // 5)
    noise = noise_of(losses) * math.sqrt(2 * (1 - smooth) / (1 + smooth))  # of the difference of two smoothed ones
    steepest, valley = suggest(rates[first:], smoothed[first:], noise)
    found = Found(tuple(rates), tuple(losses), tuple(smoothed), steepest, valley, None if math.isnan(rate) else rate)
    if valley is None:
        warnings.warn(
            f"find_rate: {found}; look further (start=, end=), more finely (steps=), or at what is trained", stacklevel=2
        )
    return found


def try_rates(loop: Loop, loss_fn: LossFn, loader: Any, rates: Found | Mapping[str, float] | Sequence[float], steps: int = 100,
              micro_batch_size: int | None = None) -> Tried:  # fmt: skip
    """Train `steps` updates at each of these constant rates from where the Loop stands, and leave no trace.

    All runs see the same data and the same random numbers. `rates`: by name, a list, or what `find_rate` returned, which
    gives a rate too low (a hundredth of the valley), the valley, and one too high (where the sweep diverged, or a hundred
    valleys).
    The rest, also what it raises, is as in `find_rate`.
    """
    whole("steps", steps, 1, none=False)
    whole("micro_batch_size", micro_batch_size, 1)
    if isinstance(rates, Found):
        if rates.valley is None:
            raise ValueError(f"rates has no valley to start from: {rates}")
        high = 100 * rates.valley if rates.diverged is None else rates.diverged
        rates = {"too low": rates.valley / 100, "fitting": rates.valley, "too high": high}
    if not isinstance(rates, Mapping | Sequence) or isinstance(rates, str | bytes) or not rates:
        raise TypeError(f"rates must be what find_rate returned, name -> rate, or a list of rates, not {rates!r:.60}")
    named = dict(rates) if isinstance(rates, Mapping) else {str(rate): rate for rate in rates}
    for name, rate in named.items():
        check_rate(f"rates[{name!r}]", rate)
    check_free(loop, loss_fn, loader, "try_rates")
    losses: dict[str, tuple[float, ...]] = {}
    for name, rate in named.items():
        found = list[float]()
        with untouched(loop, loader), LookAhead(loop, loss_fn, loader, micro_batch_size) as ahead:
            while len(found) < steps and math.isfinite(loss := ahead.update(rate)):
                found.append(loss)
        if not found:
            raise ValueError(AT_ONCE.format(loss))
        losses[name] = tuple(found)
    return Tried(named, losses)


def check_rate(name: str, value: Any) -> None:
    """Refuse what is no rate."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a finite rate above 0, not {value!r}")


def ema(values: Sequence[float], factor: float) -> float:
    """Return the exponential mean of the values, the last with weight 1 - factor, corrected for its short beginning."""
    total = 0.0
    for value in values:
        total = factor * total + (1 - factor) * value
    return total / (1 - factor ** len(values))


def noise_of(values: Sequence[float]) -> float:
    """Return the values' standard deviation about their trend, by the median of successive differences."""
    apart = sorted(abs(b - a) for a, b in itertools.pairwise(values))
    return apart[len(apart) // 2] / 0.954 if apart else 0.0  # of a normal difference: 0.6745 * sqrt(2)


def suggest(rates: Sequence[float], smoothed: Sequence[float], noise: float = 0.0) -> tuple[float | None, float | None]:
    """Return the rates of (steepest descent, the fall's middle); None where the curve falls by at most three times `noise`."""
    bottom = min(range(len(smoothed)), key=smoothed.__getitem__, default=0)
    high = max(smoothed[: bottom + 1], default=0.0)
    if bottom == 0 or not (fall := high - smoothed[bottom]) > 3 * noise:
        return None, None
    begins = max(i for i in range(bottom + 1) if smoothed[i] >= high - 0.1 * fall)
    ends = min(i for i in range(begins, bottom + 1) if smoothed[i] <= high - 0.9 * fall)
    last = len(smoothed) - 1
    slopes = {i: smoothed[min(i + 1, last)] - smoothed[i - 1] for i in range(max(1, begins), bottom + 1)}
    return rates[min(slopes, key=slopes.__getitem__)], math.sqrt(rates[begins] * rates[ends])
