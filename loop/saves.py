"""Where a run may stop and save: between updates, once every hook has run, and where all ranks agree to."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from .dispatch import Dispatch
from .redo import Snapshot
from .resume import capture
from .wants import decide, wants

if TYPE_CHECKING:
    from .session import Session

log = logging.getLogger("hookloop")


class Saves(Dispatch):
    """Writes the checkpoints that hooks asked for, stops where they asked to, keeps what a skipped update puts back."""

    snapshot: Snapshot | None = None
    _saved_at = -1
    _end: tuple[int | None, int | None] = (None, None)

    @property
    def stopped(self) -> bool:
        """Whether a callback asked to stop, or the `steps=` are done."""
        state, end = self.state, self._end[1]
        return state.leaving or state.stop_reason is not None or (end is not None and state.step >= end)

    def _goes_on(self, kind: str) -> bool:
        """Return whether training goes on, having done what any rank asked for."""
        if self.state.ranks.together:
            decide(self.state, kind)
            self._flush()
        return not self.stopped

    def _save_last(self) -> None:
        """Ask for a save of where the run stands, unless it is on the disk."""
        if not self.state.writers:
            return
        if not all([write(self.state, [], lambda: capture(cast("Session", self))) for write in self.state.writers]):
            self._saved_at = -1
        self._saved_at = self.state.ranks.smallest(self._saved_at, "saves")
        if self.state.step != self._saved_at:
            self.state._due.append("end")

    def _flush(self) -> None:
        """Write the checkpoint that hooks asked for, once all of them have run; of several ranks, once all agreed to."""
        state, asked = self.state, self.state._due
        if not state.ranks.together:
            asked, state._saves = asked + state._saves, []
        reasons, state._due = sorted(set(asked)), []
        for write in self.state.writers if reasons else ():
            if write(self.state, reasons, lambda: capture(cast("Session", self))):
                self._saved_at = self.state.step

    def _before_forward(self) -> None:
        """Let callbacks look, and keep buffers, where a step of a loop of the user's own begins: where the last one ended."""
        for act in self.state.before:
            act(self.state)
        if self.state.keep_buffers:
            self.snapshot = self.snapshot or Snapshot(self.state)
            self.snapshot.take([])

    def _read_unless_leaving(self, read: Callable[[], Any], otherwise: Any) -> Any:
        """Return what `read` gives, or `otherwise` where it fails on a rank whose signal to leave may have ended workers too."""
        try:
            return read()
        except Exception as error:
            if not (self.state.ranks.together and wants(self.state)["leave"]):
                raise
            log.warning("reading data failed while leaving: %r", error)
            return otherwise

    def _settle(self, applied: bool) -> bool:
        """Return whether the update was applied; where it was left out, put back what may have to be."""
        self.sample()
        applied = applied and self.state.settle()
        if not applied and self.state.keep_buffers and self.snapshot is not None:
            self.snapshot.put_back_buffers()
        return applied
