"""Where a run may stop and save: between updates, once every hook has run, and where all ranks agree to."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

from .dispatch import Dispatch
from .redo import Snapshot
from .resume import capture
from .wants import decide, wants

if TYPE_CHECKING:
    from .session import Session

log = logging.getLogger("hookloop")
INTERVALS = ("step", "time", "epoch", "best")


def concerning(write: Any, writers: Iterable[Any], reasons: Iterable[str]) -> list[str]:
    """Return the reasons that are a writer's to write for: all but the intervals of other writers, "step of <its key>"."""
    others = [getattr(getattr(other, "__self__", None), "key", "") for other in writers if other != write]
    return sorted({*reasons}.difference(f"{interval} of {key}" for key in others for interval in INTERVALS))


class Saves(Dispatch):
    """Writes the checkpoints that hooks asked for, stops where they asked to, keeps what a skipped update puts back."""

    snapshot: Snapshot | None = None
    _saved_at = -1  # the step of the checkpoint that the run goes on from
    _written: Mapping[Any, int] = MappingProxyType({})  # by writer, the step of its last good save
    validated_at = -1  # the step of the last validation
    _end: tuple[int | None, int | None] = (None, None)
    _torn = False  # an optimizer's step was cut off, so that weights may be half updated

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

    def _check_whole(self) -> None:
        """Refuse to go on, or to save, behind an update that was cut off."""
        if self._torn:
            raise RuntimeError("an error cut this Loop's optimizer off inside a step, so its weights may be half updated, or a "
                               "step of a sharded model, which keeps its gradients: build model, optimizer and callbacks anew, and "
                               "a Loop that resumes from the last checkpoint")  # fmt: skip

    def _save_last(self) -> None:
        """Ask for a save of where the run stands, unless all writers have it on the disk."""
        self._check_whole()
        state, found = self.state, dict[Any, int]()
        self._judge()
        for write in state.writers:
            whole = write(state, [], lambda: capture(cast("Session", self)))
            found[write] = state.ranks.smallest(self._written.get(write, self._saved_at) if whole else -1, "saves")
        self._written = found
        if any(step != state.step for step in found.values()):
            state._due.append("end")

    def _judge(self) -> None:
        """Let callbacks mend or refuse what is about to be saved, or to be left with."""
        for act in self.state.before_save:
            act(self.state)

    def _flush(self) -> None:
        """Write the checkpoint that hooks asked for, once all of them have run; of several ranks, once all agreed to."""
        self._check_whole()
        state, asked = self.state, self.state._due
        if not state.ranks.together:
            asked, state._saves = asked + state._saves, []
        state._due = []
        if asked and state.writers:
            self._judge()
        for write in state.writers if asked else ():
            at_end = self._written.get(write) == state.step  # so that "end" is another writer's
            reasons = [why for why in concerning(write, state.writers, asked) if why != "end" or not at_end]
            if reasons and write(state, reasons, lambda: capture(cast("Session", self))):
                self._written = {**self._written, write: state.step}

    def _before_forward(self) -> None:
        """Let callbacks look, and keep buffers, where a step of a loop of the user's own begins: where the last one ended."""
        for act in self.state.before:
            act(self.state)
        if self.state.keep_buffers:
            self.snapshot = self.snapshot or Snapshot(self.state)
            self.snapshot.take([])

    def _read_unless_leaving(self, read: Callable[..., Any], otherwise: Any, *given: Any) -> Any:
        """Return what `read` gives, or `otherwise` where it fails on a rank whose signal to leave may have ended workers too."""
        try:
            return read(*given)
        except Exception as error:
            if not (self.state.ranks.together and wants(self.state)["leave"]):
                raise
            log.warning("reading data failed while leaving: %r", error)
            return otherwise

    def _settle(self, applied: bool) -> bool:
        """Return whether the update was applied; where it was left out, put back what may have to be."""
        if self.callbacks:
            self.sample()
        applied = applied and self.state.settle()
        if not applied and self.state.keep_buffers and self.snapshot is not None:
            self.snapshot.put_back_buffers()
        return applied
