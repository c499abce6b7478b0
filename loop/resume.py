"""What a checkpoint holds, and how a Loop takes it back."""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING, Any

from . import rng
from .batch import move
from .callback import Callback
from .dispatch import note
from .store import disk, plain

if TYPE_CHECKING:
    from .life import Life


def capture(loop: Life) -> dict[str, Any]:
    """Return model, and all else that a run needs to continue to the same bits, as plain data."""
    state = loop.state
    return {
        "model": state.model.state_dict(),
        "state": {
            "format": 1,
            "progress": {name: getattr(state, name) for name in ("step", "skipped", "epoch", "samples")},
            "optimizer": state.optimizer.state_dict(),
            "scaler": None if state.scaler is None else state.scaler.state_dict(),
            "callbacks": {
                c.key: kept for c in sorted(loop.callbacks, key=lambda c: c.key) if (kept := state_of(c, state.step))
            },
            "rng": rng.snapshot(state.device),
            "data": loop.feed.state_dict(),
            "train_loss": loop.train_loss.state_dict(),
            "metrics": {name: value for name, value in state.metrics.items() if plain(value)},
            "reported": [state.reported_at, sorted(state.reported)],
            "seed": loop.seed,
        },
    }


def state_of(callback: Callback, step: int) -> dict[str, Any]:
    """Return what a callback saves; an error in it says whose it is."""
    try:
        return callback.state_dict()
    except Exception as error:
        note(error, callback.state_dict, "state_dict (for a checkpoint)", step)
        raise


def restore(loop: Life, path: str | os.PathLike[str]) -> None:
    """Take the checkpoint back that `path` names; a folder without one is a fresh start."""
    if (found := disk.read(path)) is None:
        return
    place, model, saved = found
    state, mine = loop.state, {callback.key: callback for callback in loop.callbacks}
    if lost := sorted(set(saved["callbacks"]) - set(mine)):
        raise ValueError(f"{place} holds the state of {', '.join(lost)}, but callbacks has {', '.join(mine) or 'none'}; "
                         "put the missing ones back, or start afresh in another folder")  # fmt: skip
    for key, callback in mine.items():
        if key not in saved["callbacks"] and callback.state_dict():
            warnings.warn(f"{place} holds no state of {key}: it starts fresh at step {saved['progress']['step']}", stacklevel=2)
    if (state.scaler is None) != (saved["scaler"] is None):
        raise ValueError(f"{place} was made {'without' if state.scaler else 'with'} scaler=; give the same")
    state.model.load_state_dict(model)
    state.optimizer.load_state_dict(saved["optimizer"])
    if state.scaler is not None:
        state.scaler.load_state_dict(saved["scaler"])
    state.rates = [group["lr"] for group in state.optimizer.param_groups]
    for name, value in saved["progress"].items():
        setattr(state, name, value)
    for key, value in saved["callbacks"].items():
        mine[key].load_state_dict(value)
    loop.feed.load_state_dict(saved["data"])
    loop.train_loss.load_state_dict(saved["train_loss"], state.device)
    state.metrics, (state.reported_at, reported) = move(saved["metrics"], state.device), saved["reported"]
    state.reported, loop.seed, loop.rng_to_restore = set(reported), saved["seed"], saved["rng"]
    loop._saved_at = state.step
    rng.restore(saved["rng"], state.device)
