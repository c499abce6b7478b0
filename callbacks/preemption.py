"""Preemption: a run that is told to end saves where it stands, and ends."""

from __future__ import annotations

import math
import signal
import sys
import time
from collections import deque
from collections.abc import Iterable
from datetime import datetime, timedelta

from ..loop.callback import Callback
from ..loop.checks import among
from ..loop.signals import Listener
from ..loop.state import State

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name))


class Preemption(Callback):
    """Ends training at the next step's end when a signal arrives or shortly before `deadline`; Checkpoint saves there.

    No validation follows, and one under way is broken off: the resumed run makes up for it. Handlers of `signals` stand
    while `with loop` is open, in the main thread only. At its end those before them are put back and the signal is
    raised again, so that SIGTERM ends the program with status 143, Ctrl-C (SIGINT) with 130; with `on_signal="return"`,
    or after Ctrl-C in an interactive session, training returns its state instead. A second Ctrl-C is obeyed at once; a
    signal that was ignored before, or is handled outside Python, stays so. `deadline`: a `datetime`, or a `timedelta`
    from now; left `margin` plus a long step before it, always with a plain return. Raises ValueError for bad settings,
    and at the start where nothing writes checkpoints.
    """

    optional = ("on_step_start",)

    def __init__(self, signals: Iterable[int] = SIGNALS, deadline: datetime | timedelta | None = None,
                 margin: timedelta = timedelta(minutes=1), on_signal: str = "raise") -> None:  # fmt: skip
        among("on_signal", on_signal, ("raise", "return"))
        numbers = list(signals) if isinstance(signals, Iterable) else [signals]
        for number in numbers:
            if number not in signal.valid_signals() or number in (getattr(signal, n, -1) for n in ("SIGKILL", "SIGSTOP")):
                raise ValueError(f"signals must hold signals that can be caught, such as signal.SIGTERM, not {number!r}")
        if not isinstance(margin, timedelta) or margin < timedelta(0):
            raise ValueError(f"margin must be a timedelta of at least 0, not {margin!r}")
        self.signals, self.margin, self.on_signal = [signal.Signals(n) for n in numbers], margin, on_signal
        self._deadline = math.inf
        if deadline is not None:
            if not isinstance(deadline, datetime | timedelta):
                raise TypeError(f"deadline must be a datetime, or a timedelta from now, not {deadline!r}")
            left = deadline if isinstance(deadline, timedelta) else deadline - datetime.now(deadline.tzinfo)
            if left <= margin:
                raise ValueError(f"deadline={deadline!r} has passed, or is nearer than margin={margin!r}; give a later one")
            self._deadline = time.monotonic() + left.total_seconds()
        self._since, self._steps = 0.0, deque[float](maxlen=32)
        self._listener: Listener | None = None

    def on_setup(self, state: State) -> None:
        """Stand by, also while a checkpoint is read."""
        self._stand_by(state)

    def on_fit_start(self, state: State) -> None:
        """Stand by; begin to plan for the deadline."""
        if not state.writers and self.on_signal == "raise":
            raise ValueError("Preemption would end the run with nothing saved: add Checkpoint(folder) to callbacks, or give "
                             "on_signal='return' and save yourself")  # fmt: skip
        self._stand_by(state)
        self._since = time.monotonic()
        self._plan(state)

    def on_step_start(self, state: State) -> None:
        """Take the time of a step."""
        self._since = time.monotonic()

    def on_step_end(self, state: State) -> None:
        """Plan to leave in time for the deadline."""
        now = time.monotonic()
        self._steps.append(now - self._since)
        self._since = now
        self._plan(state)

    def _stand_by(self, state: State) -> None:
        if self._listener is None:
            self._listener = Listener(self.signals, lambda number: state.leave(f"{number.name} was received"))
            state.at_exit.append(self._leave)

    def _plan(self, state: State) -> None:
        if self._deadline < math.inf:
            longest = sorted(self._steps)[-2:][0] if self._steps else 0.0  # the second: the first may have been stopped
            state.leave("the deadline is near", self._deadline - self.margin.total_seconds() - longest)

    def _leave(self, error: BaseException | None) -> None:
        listener, self._listener = self._listener, None
        assert listener is not None
        interactive = listener.caught == signal.SIGINT and hasattr(sys, "ps1")
        listener.close(again=self.on_signal == "raise" and not interactive and error is None)
