"""GradientAccumulation: several batches in one update."""

from __future__ import annotations

from collections.abc import Mapping

from ..loop.callback import Callback
from ..loop.state import State


class GradientAccumulation(Callback):
    """Makes each update hold `n` batches, with the gradient of all their samples' mean, exactly.

    `n` is a whole number, or `{epoch: n}`: n from that epoch on (1 before the first). A last short group is divided by
    what it holds, never by n. Exact for losses that are means over samples (or over what `Loop(weigh=)` counts); a
    contrastive loss, whose samples see each other, is not one. Raises ValueError for bad settings.
    """

    owns, planned = ("accumulate",), True

    def __init__(self, n: int | Mapping[int, int]) -> None:
        plan = dict(n) if isinstance(n, Mapping) else {0: n}
        for epoch, count in plan.items():
            if not isinstance(epoch, int) or isinstance(epoch, bool) or epoch < 0:
                raise ValueError(f"n must map epochs (from 0) to batches, not {epoch!r}")
            if not isinstance(count, int) or isinstance(count, bool) or count < 1:
                raise ValueError(f"n must be a whole number of batches, at least 1, not {count!r}")
        if not plan:
            raise ValueError("n is an empty mapping; give {epoch: batches}, such as {0: 1, 5: 4}")
        self.plan = dict(sorted(plan.items()))

    def on_step_start(self, state: State) -> None:
        """Plan the next update."""
        state.accumulate = next((n for epoch, n in reversed(self.plan.items()) if epoch <= state.epoch), 1)
