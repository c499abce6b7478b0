"""Signals heard by every Loop that is open; handlers are put back, and signals raised again, once the last is left."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any

from torch.utils.data import get_worker_info

open_listeners: list[Listener] = []
before: dict[signal.Signals, Any] = {}  # the handlers that ours stand in for
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
        process = os.getpid()
        open_listeners.append(self)
        for number in self.signals:  # but for one set outside Python, which can't put it back, or ignored, as by nohup
            if number not in before and signal.getsignal(number) not in (None, signal.SIG_IGN):
                before[number] = signal.signal(number, handle)

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


def handle(number: int, frame: Any) -> None:
    """Tell every listener; a second Ctrl-C is obeyed at once."""
    name = signal.Signals(number)
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
