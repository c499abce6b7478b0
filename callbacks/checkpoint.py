"""Checkpoint: a run that ends, for whatever reason, can go on from where it was."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from ..loop import store
from ..loop.callback import Callback
from ..loop.checks import among, flag, whole
from ..loop.goal import Goal, Tracker
from ..loop.ranks import Ranks
from ..loop.state import State


class Checkpoint(Callback):
    """Saves everything that the run needs to continue to the same bits: `Loop(..., resume=folder)` does.

    Written at each epoch's end, at the end of training, every `every` updates or `timedelta`, and where `state.save` asks for it,
    whole or not at all, once all hooks have run; another Checkpoint has intervals of its own. The newest `keep` stay (None: all),
    and the best of `best` (a metric or `Goal` with its mode). `background`: a step waits for the copy to host memory alone, and
    for a save still under way. `on_failure`: a failed save (a full disk) leaves the older ones whole and is a warning ("warn") or
    ends the run with its OSError ("stop"). `model.pt` is the plain state dict, which `torch.load` reads without hookloop; a
    sharded model's tensors are in `shards/`. Raises ValueError for bad settings and for a folder that holds checkpoints of
    another run, OSError for one that can't be written, TypeError at the first save for state of a callback that is no plain data.
    """

    def __init__(self, folder: str | os.PathLike[str], every: int | timedelta | None = None, keep: int | None = 3,
                 best: str | Goal | None = None, background: bool = False, on_failure: str = "warn") -> None:  # fmt: skip
        flag("background", background)
        among("on_failure", on_failure, ("warn", "stop"))
        if not (isinstance(every, timedelta) and every > timedelta(0)):
            whole("every (updates, or a timedelta above 0)", every, 1)
        whole("keep (checkpoints, None for all)", keep, 1)
        self._place = store.Folder(folder)
        self.folder, self.every, self.keep = self._place.path, every, keep
        self.tracker = None if best is None else Tracker(Goal.of(best))
        self.watches = () if self.tracker is None else (self.tracker.goal.metric,)
        self.optional = () if every is None else ("on_epoch_end",)
        self._writer, self._known = store.Writer(background, on_failure), dict[tuple[str, str], Any]()

    def on_setup(self, state: State) -> None:
        """Be the one who writes."""
        self._writer.check(state.model)
        state.writers.append(self._write)

    def on_fit_start(self, state: State) -> None:
        """See that the folder can be written, and that it is this run's."""
        if state.ranks.first:
            self._place.open(state.step, state.run, state.ranks.unread)
            self._writer.tidy(lambda: self._place.prune(self.keep, f"best of {self.key}"))  # what a kill cut off
        if state.ranks.sharded:
            store.check_same_folder(self.folder, state.ranks)
        self._saved_at = time.monotonic()

    def on_step_end(self, state: State) -> None:
        """Ask for a save where one is due; tell of one that failed behind the training."""
        self._writer.settle(wait=False)
        if isinstance(self.every, int) and state.step % self.every == 0:
            state.save(f"step of {self.key}")
        elif isinstance(self.every, timedelta) and time.monotonic() - self._saved_at >= self.every.total_seconds():
            state.save(f"time of {self.key}")

    def on_validation_end(self, state: State) -> None:
        """Ask for one where the metric is the best so far."""
        if self.tracker is not None:
            self._writer.settle(wait=self.tracker.before is not None)
            self.tracker.unsaved(same=False)
            if self.tracker.update(self.tracker.goal.read(state, "Checkpoint")):
                state.save(f"best of {self.key}")

    def on_epoch_end(self, state: State) -> None:
        """Ask for one."""
        state.save(f"epoch of {self.key}")

    def on_fit_end(self, state: State) -> None:
        """Wait for what is still being written."""
        self._place.close()
        self._writer.settle()

    def _write(self, state: State, reasons: list[str], capture: Callable[[], store.Contents]) -> bool:
        self._writer.settle()
        if not reasons:
            return self._writer.saved
        if self.tracker is not None and self.tracker.unsaved(same=state.reported_at == state.step):
            reasons = [*{*reasons, f"best of {self.key}"}]
        self._saved_at = time.monotonic()

        def save(contents: store.Contents) -> None:
            ranks = Ranks() if self._writer.background else state.ranks  # in the background one writes alone
            state.saved = str(store.write_together(self.folder, contents, reasons, self._known, ranks))

        return self._writer.write(capture(), save, self._saved, state.ranks.first)

    def _saved(self, first: bool) -> None:
        if self.tracker is not None:
            self.tracker.before = None
        if first:
            self._place.prune(self.keep, f"best of {self.key}")

    @property
    def best(self) -> Path | None:
        """The newest checkpoint that was the best of its time, so the best there is."""
        return self._place.newest_for(f"best of {self.key}")

    def state_dict(self) -> dict[str, Any]:
        """Return the best value so far."""
        return {} if self.tracker is None else self.tracker.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        if self.tracker is not None:
            self.tracker.load_state_dict(state)
