"""Signals heard by every Loop that is open; handlers are put back, and signals raised again, once the last is left."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any

from torch.utils.data import get_worker_info

log = logging.getLogger("hookloop")
open_listeners: list[Listener] = []
ours: dict[signal.Signals, Handler] = {}  # each knows the handler that it stands in for
due: list[signal.Signals] = []  # what Loops that were left already want raised again
process = 0  # in which ours were set


class Listener:
    """Calls `heard` at each of `signals` until closed. In a thread that is not the main one it hears nothing."""

    def __init__(self, signals: Iterable[signal.Signals], heard: Callable[[signal.Signals], None]) -> None:
        global process
        self.signals, self.heard = tuple(signals), heard
        self.caught: signal.Signals | None = None
        if threading.current_thread() is not threading.main_thread():
            return  # nowhere else can a handler be set
        if process != os.getpid():  # a fork has no share in what its parent hears
            open_listeners.clear()
            due.clear()
        process = os.getpid()
        open_listeners.append(self)
        for number in self.signals:
            stands = signal.getsignal(number)
            if isinstance(stands, Handler):  # another Loop's, or put back by whoever stood in for it
                ours.setdefault(number, stands)
            elif stands in (None, signal.SIG_IGN):  # ignored, as by nohup
                continue
            elif caught_outside(number):
                log.warning("%s is handled outside Python, which can't put that back: it is left alone", number.name)
            else:
                ours[number] = Handler(stands)
                signal.signal(number, ours[number])

    def close(self, again: bool) -> None:
        """Hear no more; `again`: what was caught is raised again, once no other Loop is open."""
        if self not in open_listeners:
            return
        open_listeners.remove(self)
        if again and self.caught is not None:
            due.append(self.caught)
        if open_listeners:
            return
        for number, handler in ours.items():
            stands = signal.getsignal(number)
            if isinstance(stands, Handler) or stands == signal.SIG_DFL:  # else somebody set one since
                signal.signal(number, handler.previous)
        raised = due[:1]
        ours.clear()
        due.clear()
        for number in raised:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(Exception):  # there may be none, or a pipe that is closed
                    stream.flush()
            signal.raise_signal(number)


def caught_outside(number: signal.Signals) -> bool:
    """Tell whether a handler stands that Python does not know of, as faulthandler's; only Linux says so."""
    if signal.getsignal(number) is not signal.SIG_DFL:
        return False
    with contextlib.suppress(OSError, ValueError, StopIteration), open("/proc/self/status") as file:
        mask = next(line for line in file if line.startswith("SigCgt:"))
        return bool(int(mask.split()[1], 16) >> (number - 1) & 1)
    return False


class Handler:
    """Tells every listener; a second Ctrl-C is obeyed at once."""

    def __init__(self, previous: Any) -> None:
        self.previous = previous

    def __call__(self, number: int, frame: Any) -> None:
        """Tell them; what to do where none is open, or in another process, is for the handler of before to say."""
        name = signal.Signals(number)
        if os.getpid() == process and not open_listeners:  # called by a handler that was set inside a Loop and stayed
            if callable(self.previous):
                self.previous(number, frame)
            elif self.previous == signal.SIG_DFL:
                signal.signal(number, self.previous)
                signal.raise_signal(number)
            return
        elsewhere = os.getpid() != process
        if elsewhere and get_worker_info() is not None:
            return  # a loader's worker: its data are needed, and it ends with the process that it serves
        if elsewhere or (name == signal.SIGINT and any(listener.caught for listener in open_listeners)):
            signal.signal(number, self.previous)
            signal.raise_signal(number)
            return
        for listener in open_listeners:
            if name in listener.signals:
                listener.caught = listener.caught or name
                listener.heard(name)
        if name == signal.SIGINT:
            with contextlib.suppress(OSError):  # logging may be what was interrupted
                os.write(2, b"\nSaving at the end of this step, then leaving; Ctrl-C once more leaves at once.\n")
        if hasattr(signal, "SIGCHLD") and signal.SIGCHLD not in ours:
            # A signal to the whole process group ends workers too; torch would raise for that in the middle of a step.
            ours[signal.SIGCHLD] = Handler(signal.signal(signal.SIGCHLD, signal.SIG_DFL))
