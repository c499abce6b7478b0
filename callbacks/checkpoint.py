"""Checkpoint: a run that ends, for whatever reason, can go on from where it was."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from ..loop import store
from ..loop.callback import Callback
from ..loop.goal import Goal, Tracker
from ..loop.state import State


class Checkpoint(Callback):
    """Saves everything that the run needs to continue to the same bits: `Loop(..., resume=folder)` does.

    Written at each epoch's end, at the end of training, and every `every` updates or `timedelta`; whole or not at all,
    after every callback's hook has run. The newest `keep` stay (None: all), and the best of `best` (a metric or `Goal`
    with its mode), which holds a file named `best`. In each folder `model.pt` is the plain state dict, which
    `torch.load(..., weights_only=True)` reads without hookloop. Raises ValueError for bad settings and for a folder
    that holds checkpoints of another run, OSError at the start for one that can't be written.
    """

    def __init__(self, folder: str | os.PathLike[str], every: int | timedelta | None = None, keep: int | None = 3,
                 best: str | Goal | None = None) -> None:  # fmt: skip
        length = every.total_seconds() if isinstance(every, timedelta) else every
        if every is not None and (isinstance(length, bool) or not isinstance(length, int | float) or not length > 0):
            raise ValueError(f"every must be a number of updates, at least 1, or a timedelta above 0, not {every!r}")
        if isinstance(every, float):
            raise ValueError(f"every counts updates: give a whole number, or a timedelta, not {every!r}")
        if keep is not None and (not isinstance(keep, int) or isinstance(keep, bool) or keep < 1):
            raise ValueError(f"keep must be a number of checkpoints, at least 1, or None for all, not {keep!r}")
        if not isinstance(folder, str | os.PathLike) or not os.fspath(folder):
            raise ValueError(f"folder must be the path of a folder, such as 'runs/a', not {folder!r}")
        self.folder, self.every, self.keep = Path(folder), every, keep
        self.tracker = None if best is None else Tracker(Goal.of(best))
        self.watches = () if self.tracker is None else (self.tracker.goal.metric,)
        self.optional = () if every is None else ("on_epoch_end",)
        self._saved_at = time.monotonic()

    def on_setup(self, state: State) -> None:
        """Be the one who writes."""
        state.writers.append(self._write)

    def on_fit_start(self, state: State) -> None:
        """See that the folder can be written, and that it is this run's."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise OSError(f"can't write to folder={str(self.folder)!r}, give another: {error}") from error
        for draft in self.folder.glob(".step-*.part"):
            shutil.rmtree(draft, ignore_errors=True)
        for later in (p for p in store.list_checkpoints(self.folder) if store.step_of(p) > state.step):
            if store.readable(later):
                raise ValueError(f"folder {str(self.folder)!r} holds {later.name}, beyond this run's step {state.step}: give "
                                 f"Loop(..., resume={str(self.folder)!r}) to go on from it, or an empty folder")  # fmt: skip
            later.rename(later.with_name(f"unreadable-{later.name}"))  # this run comes by that step again
        self._saved_at = time.monotonic()

    def on_step_end(self, state: State) -> None:
        """Ask for a save where one is due."""
        if isinstance(self.every, int) and state.step % self.every == 0:
            state.save("step")
        elif isinstance(self.every, timedelta) and time.monotonic() - self._saved_at >= self.every.total_seconds():
            state.save("time")

    def on_validation_end(self, state: State) -> None:
        """Ask for one where the metric is the best so far."""
        if self.tracker is not None and self.tracker.update(self.tracker.goal.read(state, "Checkpoint")):
            state.save("best")

    def on_epoch_end(self, state: State) -> None:
        """Ask for one."""
        state.save("epoch")

    def _write(self, state: State, reasons: list[str], capture: Callable[[], dict[str, Any]]) -> None:
        contents = capture()
        marks = ["best"] if "best" in reasons else []
        store.write(self.folder, state.step, contents["model"], contents["state"], marks)
        self._saved_at = time.monotonic()
        there = store.list_checkpoints(self.folder)
        for old in there[: -self.keep] if self.keep else ():
            if old != self.best:
                with contextlib.suppress(FileNotFoundError):
                    shutil.rmtree(old)

    @property
    def best(self) -> Path | None:
        """The newest checkpoint that was the best of its time, so the best there is."""
        return next((p for p in reversed(store.list_checkpoints(self.folder)) if (p / "best").exists()), None)

    def state_dict(self) -> dict[str, Any]:
        """Return the best value so far."""
        return {} if self.tracker is None else self.tracker.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        if self.tracker is not None:
            self.tracker.load_state_dict(state)
