"""Preemption: a run that is told to end saves where it stands, and ends."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Any

from torch.utils.data import get_worker_info

from ..loop.callback import Callback
from ..loop.checks import among
from ..loop.state import State

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name))


class Preemption(Callback):
    """Ends training at the next step's end when a signal arrives or shortly before `deadline`; Checkpoint saves there.

    No validation follows, and one under way is broken off: the resumed run makes up for it. Handlers of `signals` stand
    from the start of training to the end of `with loop`, in the main thread only. There the ones before them are put
    back and the signal is raised again, so that SIGTERM ends the program with status 143, Ctrl-C (SIGINT) with 130; with
    `on_signal="return"`, or after Ctrl-C in an interactive session, training returns its state instead. A second Ctrl-C
    is obeyed at once; a signal that was ignored before stays so. `deadline`: a `datetime`, or a `timedelta` from now;
    left `margin` plus the longest step before it, always with a plain return. Raises ValueError for bad settings, and at
    the start where nothing writes checkpoints.
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
            if left <= timedelta(0):
                raise ValueError(f"deadline={deadline!r} has passed; give one to come")
            self._deadline = time.monotonic() + left.total_seconds()
        self._caught: signal.Signals | None = None
        self._since = self._longest = 0.0

    def on_fit_start(self, state: State) -> None:
        """Stand by."""
        if not state.writers and self.on_signal == "raise":
            raise ValueError("Preemption would end the run with nothing saved: add Checkpoint(folder) to callbacks, or give "
                             "on_signal='return' and save yourself")  # fmt: skip
        self._caught, self._since = None, time.monotonic()
        handler = functools.partial(self._handle, state, os.getpid(), before := dict[signal.Signals, Any]())
        if threading.current_thread() is threading.main_thread():  # nowhere else can a handler be set
            for number in self.signals:  # but for one set outside Python, which can't put it back, or ignored, as by nohup
                if signal.getsignal(number) not in (None, signal.SIG_IGN):
                    before[number] = signal.signal(number, handler)
        state.at_exit.append(functools.partial(self._leave, handler, before))
        self.on_step_end(state)

    def on_step_start(self, state: State) -> None:
        """Take the time of a step."""
        self._since = time.monotonic()

    def on_step_end(self, state: State) -> None:
        """Plan to leave in time for the deadline."""
        now = time.monotonic()
        self._since, self._longest = now, max(self._longest, now - self._since)
        if self._deadline < math.inf:
            state.leave("the deadline is near", self._deadline - self.margin.total_seconds() - self._longest)

    def _handle(self, state: State, process: int, before: dict[signal.Signals, Any], number: int, frame: Any) -> None:
        name = signal.Signals(number)
        if os.getpid() != process and get_worker_info() is not None:
            return  # a loader's worker: its data are needed, and it ends with the process that it serves
        if os.getpid() != process or (name == signal.SIGINT and self._caught is not None):
            signal.signal(number, before[name])
            signal.raise_signal(number)
            return
        self._caught = self._caught or name
        state.leave(f"{name.name} was received")
        if name == signal.SIGINT:
            with contextlib.suppress(OSError):  # logging may be what was interrupted
                os.write(2, b"\nSaving at the end of this step, then leaving; Ctrl-C once more leaves at once.\n")
        if hasattr(signal, "SIGCHLD") and signal.SIGCHLD not in before:
            # A signal to the whole process group ends workers too; torch would raise for that in the middle of a step.
            before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def _leave(self, handler: Any, before: dict[signal.Signals, Any], error: BaseException | None) -> None:
        for number, previous in before.items():
            if signal.getsignal(number) in (handler, signal.SIG_DFL):  # else somebody set one since
                signal.signal(number, previous)
        interactive = self._caught == signal.SIGINT and hasattr(sys, "ps1")
        if self._caught is not None and self.on_signal == "raise" and not interactive and error is None:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(Exception):  # there may be none, or a pipe that is closed
                    stream.flush()
            signal.raise_signal(self._caught)
