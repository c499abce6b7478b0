"""The search for a micro-batch's size: from what a few real steps took, the largest that fits and is worth it."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .checks import among, share, whole

FIRST, SECOND = 2, 16  # the first sizes tried
JUMP = 8  # the largest step beyond what was measured
WORTH = 0.03  # a doubling that gains less is none
HARDLY = 1.05  # growth not worth a change
KEPT = 64  # measurements of one size that count, and looks for which a failure does


def check(size: Any, headroom: Any, multiple_of: Any, target: Any, memory: Any) -> None:
    """Refuse a size that is neither a number nor "auto", and what tells how to find one beside a number."""
    if size != "auto" and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
        raise ValueError(f"size must be a whole number of samples, at least 1, or 'auto', not {size!r}")
    share("headroom", headroom)
    among("target", target, ("throughput", "memory"))
    if size != "auto" and (headroom, multiple_of, target, memory) != (0.9, 16, "throughput", None):
        raise ValueError(f"headroom, multiple_of, target and memory belong to 'auto', not to size={size!r}; drop them")


def largest(
    took: Iterable[tuple[int, float]], room: float, multiple_of: int = 1, failed: Iterable[Sequence[float]] = ()
) -> int:
    """Return the most samples whose predicted peak fits into `room` bytes, given pairs (samples, bytes taken).

    peak = a + b * samples, with a from least squares and b the steepest among the larger sizes, so that the longest
    sequences seen decide, and what `failed` too (samples, bytes that were not enough); at most 8 times what was ever
    measured; a multiple of `multiple_of` where it is that large.
    """
    points = list(took)
    top = max(n for n, _ in points)
    mean_n, mean_t = (sum(column) / len(points) for column in zip(*points, strict=True))
    spread = sum((n - mean_n) ** 2 for n, _ in points)
    slope = sum((n - mean_n) * (t - mean_t) for n, t in points) / spread if spread else 0.0
    a = min(mean_t - slope * mean_n, *(t for _, t in points)) if spread else 0.0
    b = max([(t - a) / n for n, t in points if 4 * n >= top] + [(t - a) / n for n, t, *_ in failed])
    if b <= 0 and room < a:  # no size took more than another, and all took too much
        a, b = 0.0, max(t / n for n, t in points if n == top)
    found = JUMP * top if JUMP * top * b <= room - a else int(max(0.0, room - a) / b) if b > 0 else 0
    return max(1, found // multiple_of * multiple_of if found >= multiple_of else found)


def gain(rates: Mapping[int, float], small: int, large: int) -> float:
    """Return the share by which samples/s grew for each doubling between two sizes."""
    return math.pow(rates[large] / rates[small], 1 / math.log2(large / small)) - 1


class Sizes:
    """What was measured at which size, and what follows from it; sizes in samples, memory in bytes."""

    def __init__(self, multiple_of: int = 16, throughput: bool = True) -> None:
        whole("multiple_of", multiple_of, 1, none=False)
        self.multiple_of, self.throughput = multiple_of, throughput
        self.took: dict[int, list[float]] = {}  # beyond what lay there before the step; the last few of each size
        self.rates: dict[int, float] = {}  # the best samples/s
        self.timed: dict[int, int] = {}  # how often
        self.failed: list[list[float]] = []  # samples, memory that was not enough, looks until it counts no more
        self.hold, self.patience = 0, 2  # looks until it may grow again after a failure, and after the next one
        self.ceiling: int | None = None
        self.count, self.base = 0, 0.0  # measurements in all, and what lay there at the first
        self.last = self.ran = 0  # the size last measured, and at the look before

    def measured(self, n: int, took: float, base: float = 0) -> None:
        """Take what one step at `n` samples took beyond the `base` that lay there before; failures of old fade."""
        self.last, self.count, self.base = n, self.count + 1, self.base if self.count else base
        if self.count == 2 and base > self.base:  # the first update also made gradients and the optimizer's state
            self.took = {}
        self.took[n] = [*self.took.get(n, []), took][-KEPT:]
        self.failed = [[size, memory, left - 1] for size, memory, left in self.failed if left > 1]
        self.hold = max(0, self.hold - 1)

    def timing(self, n: int, rate: float) -> None:
        """Take the samples/s of one step."""
        self.rates[n] = max(rate, self.rates.get(n, 0.0))
        self.timed[n] = self.timed.get(n, 0) + 1

    def fail(self, n: int, memory: float) -> None:
        """Remember that `n` samples did not fit into `memory`; for longer each time."""
        self.failed.append([n, memory, KEPT])
        self.hold, self.patience = self.patience, min(2 * self.patience, KEPT)

    def choose(self, now: int | None, ran: int, room: float) -> tuple[int, bool]:
        """Return the next size, and whether the search is over; `ran` is what last went through under `now`."""
        points = [(n, t) for n, ts in self.took.items() for t in ts]
        if not points or now is None:
            return now or FIRST, False
        want = largest(points, room, self.multiple_of, self.failed)
        if len(self.took) == 1 and want <= ran and (ran > 1 or now == 1):  # one size tells no slope; what is smaller fits
            return ran // 2 or FIRST, False  # and so did the first
        if self.hold:
            want = min(want, now)
        if self.throughput and self.ceiling is None and want > now:
            if not self._known(ran):
                return now, False
            want = min(want, max(SECOND, 2 * ran))
        want = min(want, self.ceiling or want)
        if now < want < HARDLY * now:
            want = now
        limited, self.ran = now > ran == self.ran, ran  # by the batch: a larger size changes nothing
        return want, want == now or (want > now and limited)

    def _known(self, ran: int) -> bool:
        """Tell whether it is known if growing is worth it; sets the ceiling where a doubling gained too little, twice."""
        smaller = max((n for n in self.rates if n < ran), default=None)
        if ran not in self.rates:
            return False
        if smaller is not None and gain(self.rates, smaller, ran) < WORTH:
            if self.timed[ran] < 2:
                return False
            self.ceiling = max((smaller, ran), key=lambda n: self.rates[n])
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return all of it."""
        return copy.deepcopy({name: value for name, value in vars(self).items() if name not in ("multiple_of", "throughput")})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        vars(self).update(copy.deepcopy(state))
