"""What is kept of a run's losses: a point a report, from sums over the updates before it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple


class Point(NamedTuple):
    """What the updates since the report before gave, and that report."""

    step: int
    train: float  # mean of the updates' losses
    spread: float  # of one update's loss about its trend
    peak: float
    val: float | None
    rate: float  # the largest group's in the last update
    top: float  # and in any


@dataclass
class Interval:
    """Sums over the updates since a report."""

    count: int = 0
    total: float = 0.0
    peak: float = -math.inf
    last: float | None = None
    pairs: int = 0
    squares: float = 0.0
    top: float = 0.0

    def add(self, loss: float) -> None:
        """Take one update's loss."""
        self.count, self.total, self.peak = self.count + 1, self.total + loss, max(self.peak, loss)
        if self.last is not None:
            self.pairs, self.squares = self.pairs + 1, self.squares + (loss - self.last) * (loss - self.last)
        self.last = loss

    def point(self, step: int, val: float | None, rate: float) -> Point:
        """Return what the updates gave; the spread is by successive differences, blind to a trend (von Neumann 1941)."""
        spread = math.sqrt(self.squares / self.pairs / 2) if self.pairs else 0.0
        return Point(step, self.total / self.count, spread, self.peak, val, rate, max(self.top, rate))
