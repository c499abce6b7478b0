"""What a rank asks for alone, and all ranks then do at the same point: to stop, to leave, to save, to skip an update."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .ranks import Ranks
    from .state import State


def wants(state: State) -> dict[str, list[str]]:
    """Return what was asked for on this rank, and why."""
    due = not state.ranks.leaves and time.monotonic() >= state._leave_at
    return {"stop": [state._stop] if state._stop and not state.stop_reason else [],
            "leave": [state._leave_reason] if due else [],
            "save": state._saves, "skip": [state._skip] if state._skip else []}  # fmt: skip


def decide(state: State, kind: str, *numbers: float) -> list[list[float]]:
    """Return what every rank says at this point, and make what any of them wants what all want."""
    ranks: Ranks = state.ranks
    if not ranks.together:
        return [[*numbers]]
    mine = wants(state)
    rows = ranks.agree(kind, any(mine.values()), *numbers)
    if any(row[0] for row in rows):
        every = ranks.exchange(kind, mine)
        for want in mine:
            take(state, want, [*dict.fromkeys(text for each in every for text in each[want])])
    return [row[1:] for row in rows]


def take(state: State, want: str, reasons: list[str]) -> None:
    """Take what any rank asked for as what all do; the first reason stands."""
    if want == "save":
        state._due, state._saves = state._due + reasons, []
    elif reasons and want == "skip":
        state._skip = reasons[0]
    elif reasons:
        state.stop_reason = state.stop_reason or reasons[0]
        if want == "leave":
            state.ranks.leaves, state._leave_reason = True, state.stop_reason
