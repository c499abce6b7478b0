"""Where an epoch begins: the loader is told, callbacks hear of it, and data are brought to where the run stands."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from . import rng
from .alike import check_apart
from .guards import back_to_train, check_trained, modes_of
from .order import tell_epoch
from .wants import decide
from .wrapped import check_shared

if TYPE_CHECKING:
    from .session import Session


def announce(loop: Session, loader: Any) -> None:
    """Tell the loader its epoch, then callbacks, whose word stands; where the epoch goes on, what either draws is of no account."""
    state, kept, inside = loop.state, loop.rng_kept, loop.feed.epoch == loop.state.epoch
    state.loader, loop.rng_kept = loader, None
    if loop.modes and not state.model.training:  # first, so that what a hook now changes stands
        back_to_train(loop)
    if inside and kept is not None:  # what the program drew since, as in making its loader, it had drawn before the save
        rng.restore(kept, state.device)
    loop.feed.attach(loader)  # before it is told: a resumed run's, which has this length too, is compared with it
    tell_epoch(loader, state.epoch, loop.seed or 0, state.device)
    with rng.isolated(state.device) if inside else contextlib.nullcontext():
        if loop.streams is not None:  # the same for all ranks, which may order their data here
            rng.seed_streams(rng.derive(loop.seed or 0, "epoch", state.epoch), loop.streams.generators)
        loop._run("on_epoch_start")
        if loop.streams is not None and state.rank:  # what a program draws from here on is each rank's own
            rng.seed_streams(rng.derive(loop.seed or 0, "epoch", state.epoch, state.rank), loop.streams.generators)
    loop.modes = modes_of(state.model) or loop.modes


def open_data(loop: Session, loader: Any) -> None:
    """Bring the loader to where the run stands, and look whether it gives anything."""
    state, feed = loop.state, loop.feed
    with rng.isolated(state.device):  # reaching the position draws numbers
        feed.open(state.epoch, loop.seed or 0, state.rank, state.seed is not None, state.device)
    if loop._end[0] is not None:
        feed.check_length()
    check_trained(loop)
    if state.ranks.together:
        check_shared(state)
    if empty := loop._read_unless_leaving(lambda: feed.empty, None):
        raise ValueError(empty)
    if state.ranks.together:
        more = loop._read_unless_leaving(feed.more, True)
        loop._more = any(row[0] for row in decide(state, "begins a pass over its data", more))
        check_apart(loop)
