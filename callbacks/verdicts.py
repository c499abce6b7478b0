"""What a run's curves tell, by the rules of thumb of the guides: pure functions of numbers."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from .loss_curve import Point

KINDS = ("divergence", "rate_too_high", "noise", "overfitting", "plateau", "rate_too_low", "underfitting")
# Tuned on seeds 0 to 2 of benchmarks/diagnose.py. WINDOW: reports that make a trend; STEADY: the share of the loss that a run
# which still learns loses from one report to the next; SHARE: of the first update's loss, what is good enough.
WINDOW, STEADY, SHARE = 4, 0.05, 0.1
LEAP = 20  # times the largest loss of the report beside it: of a net that has learnt, single losses differ by nearly as much
REMEDIES = {
    "divergence": "go back to a checkpoint, with a rate 3 to 10 times lower, a Warmup or ClipGradients (Bengio 2012, 3.1.1)",
    "rate_too_high": "take a rate 3 to 10 times lower, or a longer Warmup; find_rate shows where it diverges (Smith 2017)",
    "noise": "take a larger batch (or GradientAccumulation), or a lower rate (McCandlish et al. 2018; Smith et al. 2018)",
    "overfitting": "get more data or augmentation, more dropout or WeightDecay, EarlyStopping, or a smaller net (Ng 2018, 26-27)",
    "plateau": "decay the rate later or begin with a larger one (Bengio 2012, 3.1.1); if it never fell, train on one batch until "
               "its loss is 0, to tell a bug from a bad start (Karpathy 2019)",
    "rate_too_low": "take a rate 3 to 10 times higher, found by find_rate (Smith 2018, 4.1)",
    "underfitting": "take a larger net, less regularisation (dropout also raises the training loss itself), or better features "
                    "(Ng 2018, 25-26)",
}  # fmt: skip


class Finding(NamedTuple):
    """What ails a run, the numbers that say so, and the remedy."""

    kind: str
    numbers: str

    def __str__(self) -> str:
        return f"{self.kind.replace('_', ' ')}: {self.numbers}. Remedy: {REMEDIES[self.kind]}"


def falls(points: Sequence[Point]) -> float:
    """Return the mean share of its training loss that a run lost from each of these reports to the next."""
    return (1 - points[-1].train / points[0].train) / (len(points) - 1) if points[0].train > 0 else 0.0


def verdict(points: Sequence[Point], first: float, target: float | None = None, noise: float | None = None) -> Finding | None:
    """Return what ails a run, the first in the order in which things are mended; None where nothing is seen.

    `first`: the first update's loss. `target`: the training loss that is good enough (None: a tenth of `first`). `noise`: the
    gradient noise scale over the samples of an update, where it is known.
    """
    if not points:
        return None
    # Of a net that begins trained the first update's loss is chance, and says nothing of what is good enough.
    unknown = target is None and points[0].spread > first
    now, best, target = points[-1], min(p.train for p in points), SHARE * first if target is None else target
    loss = f"the training loss is {now.train:.3g} after {first:.3g} in the first update"
    if not (math.isfinite(now.train) and math.isfinite(first) and math.isfinite(now.val or 0.0)):
        return Finding("divergence", f"a loss is not finite: training {now.train:.3g}, validation {now.val}")
    if len(points) > 1 and now.train > max(first, 2 * best) and now.train - best > now.spread:
        return Finding("divergence", f"{loss}, and was {best:.3g} before")
    high = now.train > target and (now.val is None or now.val > target / 2)
    peaks = [sorted((a.peak, b.peak)) for a, b in itertools.pairwise(points)]
    leapt = any(large > LEAP * max(small, first / 2) for small, large in peaks)
    if high and first > 0 and (leapt or any(p.train > 1.5 * first and p.train - first > 2 * p.spread for p in points)):
        peak, top = max(p.peak for p in points), max(p.top for p in points)
        return Finding("rate_too_high", f"{loss}, and leapt to {peak:.3g} at a rate of {top:.3g}")
    if len(points) < WINDOW or unknown:
        return None
    recent, half = points[-WINDOW:], len(points) // 2
    spread = statistics.median(p.spread / p.train if p.train > 0 else 0.0 for p in recent)
    if spread > 3 and max(p.peak for p in recent) > target and (noise is None or noise > 10):
        scale = "" if noise is None else f"; the gradient noise scale asks for {noise:.3g} times the batch"
        return Finding(
            "noise", f"from update to update the loss changes by {spread:.2g} times its mean, {now.train:.3g}{scale}"
        )
    vals = [(p.val, p.val - p.train) for p in points if p.val is not None]
    earlier, later = vals[: len(vals) // 2], vals[len(vals) // 2 :]
    before, gap = (statistics.fmean(g for _, g in part) if part else 0.0 for part in (earlier, later))
    improves = bool(earlier) and min(later)[0] < min(earlier)[0] - STEADY * abs(min(earlier)[0])
    if (
        gap > max(before + 0.1 * abs(before), target / 2)
        and not improves
        and now.train < points[half - 1].train
        and now.val is not None
    ):
        return Finding("overfitting", f"validation is {now.val:.3g} with a training loss of {now.train:.3g}: the gap grew from "
                       f"{before:.3g} to {gap:.3g} while training improved")  # fmt: skip
    if not high or min(best, first) <= 0:  # below 0 shares of a loss mean nothing
        return None
    fall, top = falls(recent), max(p.top for p in points)
    text = f"{loss}, and changes by {-fall:+.1%} a report"
    steepest = max([1 - points[0].train / first, *(falls(points[i : i + 2]) for i in range(len(points) - 1))])
    if fall > STEADY:
        slow = steepest < 0.3
        return (
            Finding("rate_too_low", f"{text}, never by more than {-steepest:.0%}, at a rate of {now.rate:.3g}")
            if slow
            else None
        )
    if steepest < 2 * STEADY:
        noisy = now.spread * math.sqrt(2 / max(1, now.step - recent[-2].step))  # of the difference of two reports' means
        kind, so = ("rate_too_low", "and still falls") if recent[0].train - now.train > 4 * noisy else ("plateau", "and stands")
        return Finding(kind, f"{text}: it never fell by more than {max(steepest, 0.0):.1%}, {so}, at a rate of {now.rate:.3g}")
    learning = points[: max([i for i, p in enumerate(points) if p.rate >= top / 2], default=-1) + 1][-WINDOW:]
    if now.rate < top / 10 and (len(learning) < 2 or falls(learning) > STEADY):
        return Finding("plateau", f"{text}, since the rate went from {top:.3g} to {now.rate:.3g} while the loss still fell")
    close = "" if now.val is None else f"; validation is {now.val:.3g}"
    return Finding("underfitting", f"{text}, above {target:.3g}{close}")
