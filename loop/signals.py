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
before: dict[signal.Signals, Any] = {}  # the handlers that ours stand in for
past: dict[signal.Signals, Any] = {}  # the first of them, for a handler set since that still calls ours
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
            if stands is handle:  # another Loop's, or put back by whoever stood in for it
                before.setdefault(number, past.get(number, signal.SIG_DFL))
            elif stands in (None, signal.SIG_IGN):  # ignored, as by nohup
                continue
            elif caught_outside(number):
                log.warning("%s is handled outside Python, which can't put that back: it is left alone", number.name)
            else:
                before[number] = signal.signal(number, handle)
                past.setdefault(number, before[number])

    def close(self, again: bool) -> None:
        """Hear no more; `again`: what was caught is raised again, once no other Loop is open."""
        if self not in open_listeners:
            return
        open_listeners.remove(self)
        if again and self.caught is not None:
            due.append(self.caught)
        if open_listeners:
            return
        for number, previous in before.items():
            if signal.getsignal(number) in (handle, signal.SIG_DFL):  # else somebody set one since
                signal.signal(number, previous)
        raised = due[:1]
        before.clear()
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


def handle(number: int, frame: Any) -> None:
    """Tell every listener; a second Ctrl-C is obeyed at once."""
    name = signal.Signals(number)
    if os.getpid() == process and not open_listeners:  # called by a handler that was set inside a Loop and stayed
        previous = past.get(name)
        if callable(previous):
            previous(number, frame)
        elif previous == signal.SIG_DFL:
            signal.signal(number, previous)
            signal.raise_signal(number)
        return
    elsewhere = os.getpid() != process
    if elsewhere and get_worker_info() is not None:
        return  # a loader's worker: its data are needed, and it ends with the process that it serves
    if elsewhere or (name == signal.SIGINT and any(listener.caught for listener in open_listeners)):
        signal.signal(number, before[name])
        signal.raise_signal(number)
        return
    for listener in open_listeners:
        if name in listener.signals:
            listener.caught = listener.caught or name
            listener.heard(name)
    if name == signal.SIGINT:
        with contextlib.suppress(OSError):  # logging may be what was interrupted
            os.write(2, b"\nSaving at the end of this step, then leaving; Ctrl-C once more leaves at once.\n")
    if hasattr(signal, "SIGCHLD") and signal.SIGCHLD not in before:
        # A signal to the whole process group ends workers too; torch would raise for that in the middle of a step.
        before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
