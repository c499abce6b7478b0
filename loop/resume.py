"""What a checkpoint holds, and how a Loop takes it back."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import warnings
from collections.abc import Container, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import rng, store
from .batch import move
from .callback import Callback
from .chunk import Chunk
from .dispatch import note
from .mean import Mean
from .plan import update_samples
from .reshard import reshard
from .share import kept_stand_in
from .wrapped import load_buffers, own_buffers

if TYPE_CHECKING:
    from .ranks import Ranks
    from .session import Session

log = logging.getLogger("hookloop")

PROGRESS = ("step", "skipped", "epoch", "samples")


def capture(loop: Session) -> store.Contents:
    """Return model, and all else that a run needs to continue to the same bits, as plain data."""
    state, named = loop.state, store.Named(loop.state.model, loop.state.optimizer)
    ours = sorted(loop.callbacks, key=lambda c: c.key)
    callbacks = {c.key: kept for c in ours if (kept := state_of(c, state.step))}
    beside = {(c.key, name): callbacks[c.key][name] for c in ours for name in c.beside
              if callbacks.get(c.key, {}).get(name) is not None}  # fmt: skip
    whole = dict(callbacks)
    for key, name in beside:
        callbacks[key] = {**callbacks[key], name: None}
    return store.Contents(state.step, named.model_state(), {
        "progress": {name: getattr(state, name) for name in PROGRESS},
        "optimizer": named.optimizer_state(),
        "settings": loop.settings,
        "scaler": None if state.scaler is None else state.scaler.state_dict(),
        **(mine := own(loop, callbacks, whole)),
        # on the host: what lies on a device would be unpickled there, by every rank
        "ranks": state.ranks.exchange("saves", move(mine, torch.device("cpu"))) if state.ranks.together else None,
        "callbacks": callbacks,
        "metrics": {name: value for name, value in sorted(state.metrics.items()) if store.plain(value)},
        "reported": [state.reported_at, sorted(state.reported)],
        "validated": loop.validated_at,
        "of_update": sorted(state.of_update),
        "used": [[x if x is None or isinstance(x, torch.Tensor) else float(x) for x in y] for y in (state.rates, state.decays)],
        "seed": loop.seed,
        "seeded": state.seed is not None,
        "update_samples": None if state.loader is None else update_samples(loop.callbacks, state),
        "world": state.ranks.count,
    }, beside, {"device": state.device.type, "seconds": state.seconds, "run": state.run})  # fmt: skip


def own(loop: Session, callbacks: dict[str, Any], whole: dict[str, Any]) -> dict[str, Any]:
    """Return what each rank has of its own; `whole`: the callbacks' states with what is written beside."""
    buffers = own_buffers(loop.state, loop.given_buffers)
    return {
        "rng": rng.as_plain(rng.snapshot(loop.state.device)),
        "data": loop.feed.state_dict(),
        "train_loss": loop.train_loss.state_dict(),
        "callbacks": {c.key: callbacks[c.key] for c in loop.callbacks if c.of_rank and c.key in callbacks},
        "buffers": buffers,
        "kept": tensors_of(whole, buffers) if loop.state.ranks.together else [],
        "samples": loop.state.samples,
        "sizes": [loop.state.update_size, loop.state.micro_size],
        "stand_in": kept_stand_in(loop),
    }


def tensors_of(kept: Any, names: Container[str], path: tuple[str, ...] = ()) -> list[Any]:
    """Return, with their paths, the buffers of these names in what callbacks keep, as of the best model or an average."""
    if isinstance(kept, dict):
        return [found for key, value in kept.items() for found in tensors_of(value, names, (*path, key))]
    mine = isinstance(kept, torch.Tensor) and path[-1] in names and not hasattr(kept, "device_mesh")
    return [[[*path], kept]] if mine else []


def put_tensors(kept: Any, found: list[Any]) -> None:
    """Put them into what was saved of the first rank."""
    for (*path, name), x in found:
        place = kept
        for key in path:
            place = place.get(key) if isinstance(place, dict) else None
        if isinstance(place, dict) and name in place:
            place[name] = x


def own_of(saved: dict[str, Any], ranks: Ranks, callbacks: Iterable[Callback]) -> dict[str, Any]:
    """Return what a rank goes on from: what it had of its own, or, of another number of ranks, its share of what all had."""
    every = saved.get("ranks") or [{**saved, "samples": saved["progress"]["samples"]}]
    if len(every) == ranks.count:
        return dict(every[ranks.rank])
    losses = Mean.joined([each["train_loss"] for each in every]) if ranks.first else Mean()
    states = {c: [each["callbacks"].get(c.key) for each in every] for c in callbacks if c.of_rank}
    return {"rng": every[ranks.rank % len(every)]["rng"], "train_loss": losses.state_dict(),
            "samples": sum(each.get("samples", 0) for each in every) // ranks.count,
            "callbacks": {c.key: c.joined(found, ranks.first) for c, found in states.items() if all(found)},
            "data": reshard([each["data"] for each in every], ranks.rank, ranks.count, saved["progress"]["epoch"])}  # fmt: skip


def promised(saved: dict[str, Any]) -> int | None:
    """Return the samples of an update, over all ranks, that the checkpoint's run would have made next."""
    return None if saved.get("update_samples") is None else saved["update_samples"] * saved.get("world", 1)


def state_of(callback: Callback, step: int) -> dict[str, Any]:
    """Return what a callback saves; an error in it says whose it is."""
    try:
        return callback.state_dict()
    except Exception as error:
        note(error, callback.state_dict, "state_dict (for a checkpoint)", step)
        raise


def restore(loop: Session, path: str | os.PathLike[str], strict: bool) -> None:
    """Take the checkpoint back that `path` names; a folder without one is a fresh start.

    Raises ValueError naming, all at once and before anything is changed, what does not fit; without `strict` that is a
    warning, and what fits is taken.
    """
    if (found := common(loop.state.ranks, path, strict)) is None:
        return
    state, mine = loop.state, {callback.key: callback for callback in loop.callbacks}
    store.fill(found, store.Named(state.model, state.optimizer).layout())
    saved = found.state
    alone = own_of(saved, state.ranks, loop.callbacks)
    if state.ranks.rank >= saved.get("world", 1) and state.ranks.together:  # else it would draw what another one draws
        with rng.isolated(state.device, rng.derive(saved["seed"] or 0, "rank", state.rank, saved["progress"]["step"])):
            alone["rng"] = rng.snapshot(state.device)
    put_tensors(saved["callbacks"], alone.get("kept") or [])
    saved["callbacks"] |= alone["callbacks"]
    taken, refused = _load_callbacks(mine, saved["callbacks"])
    named = store.Named(state.model, state.optimizer)  # maybe another optimizer than before
    optimizer = saved["optimizer"]
    skip, rounded = named.model_misfits(found.model), named.rounded(found.model)
    amiss = [*skip.values(), *rounded.values(), *named.optimizer_misfits(optimizer, saved["settings"], loop.settings, skip)]
    amiss += [f"{key} has state in the checkpoint and is not in callbacks ({', '.join(mine) or 'none'})"
              for key in sorted(saved["callbacks"].keys() - mine.keys())]  # fmt: skip
    if (state.scaler is None) != (saved["scaler"] is None):
        amiss.append(f"the checkpoint was made {'without' if state.scaler else 'with'} scaler=, which is not so here")
    if state.seed is not None and saved["seed"] not in (None, state.seed):
        there = saved["seed"] if saved.get("seeded", True) else "drawn, without a Seed,"
        amiss.append(f"the seed is {state.seed} here and {there} in the checkpoint's run")
    if (amiss := amiss + refused) and strict:
        for callback, fresh in taken:
            with contextlib.suppress(Exception):
                callback.load_state_dict(fresh)
        more = f"; and {len(amiss) - 20} more" if len(amiss) > 20 else ""
        raise ValueError(f"{found.place} does not fit: {'; '.join(amiss[:20])}{more}. Put that right, start afresh in another "
                         "folder, or take what fits: Loop(..., strict=False)")  # fmt: skip
    if amiss or found.lost:
        warnings.warn(f"{found.place}: not taken, as strict=False allows: {'; '.join(amiss + found.lost)}", stacklevel=2)
    here = {"torch": str(torch.__version__), "device": state.device.type}
    if here != (made := {name: found.about.get(name, value) for name, value in here.items()}):
        was, now = " on ".join(made.values()), " on ".join(here.values())
        warnings.warn(f"{found.place} was made by torch {was}, and this is torch {now}: the run goes on, but not to the "
                      "same bits", stacklevel=2)  # fmt: skip
    for key, callback in mine.items():
        if key not in saved["callbacks"] and callback.state_dict():
            step = saved["progress"]["step"]
            warnings.warn(f"{found.place} holds no state of {key}: it starts fresh at step {step}", stacklevel=2)
    named.load_model(found.model, skip)
    if optimizer["kind"] == named.kind:
        named.load_optimizer(optimizer, saved["settings"], loop.settings, skip, rounded)
    if state.scaler is not None and saved["scaler"] is not None:
        state.scaler.load_state_dict(saved["scaler"])
    state.rates, state.decays = move(saved.get("used") or [[g["lr"] for g in state.optimizer.param_groups], []], state.device)
    for name in PROGRESS:
        setattr(state, name, saved["progress"][name])
    if rounded and saved["data"]["left"] is not None:  # data of the other type: they are read again
        saved["data"].update(left=None, read=saved["data"]["read"] - 1)
    state.samples, (state.update_size, state.micro_size) = alone["samples"], alone.get("sizes") or (0, 0)
    load_buffers(state, alone.get("buffers") or {}, skip)
    loop.stand_in = Chunk(*alone["stand_in"]) if alone.get("stand_in") else None
    loop.feed.load_state_dict(alone["data"])
    loop.train_loss.load_state_dict(alone["train_loss"], state.device)
    state.saved, state.run = str(found.place), found.about.get("run")
    state.metrics, (state.reported_at, reported) = move(saved["metrics"], state.device), saved["reported"]
    state.of_update = {*saved.get("of_update", ())}
    state.reported, loop.seed, loop.rng_to_restore = set(reported), saved["seed"], alone["rng"]
    loop.validated_at = saved.get("validated", state.reported_at)
    loop._saved_at, loop.promised, state.spent = state.step, promised(saved), found.about.get("seconds", 0.0)
    rng.restore(alone["rng"], state.device)
    ours = any("optimizer's rates" in callback.owns for callback in loop.callbacks)
    if state.step and not ours and getattr(state.optimizer.step, "_wrapped_by_lr_sched", False):
        log.warning("resumed after %d updates beside a scheduler of your own, whose place the checkpoint does not hold, so that it "
                    "begins anew: give callbacks Schedule(scheduler), which steps it too, or put it and the rates where they "
                    "were, by its load_state_dict() and get_last_lr()", state.step)  # fmt: skip


def common(ranks: Ranks, path: str | os.PathLike[str], strict: bool) -> store.Found | None:
    """Return what `resume=` names; of several ranks the newest checkpoint that all can read.

    Raises ValueError where some ranks see checkpoints and others none, RuntimeError where no two are the same.
    """
    found = store.read(path, strict)
    names = ranks.exchange("enters `with loop:`", found and found.identity)
    if len({*names}) == 1:
        return found
    if None in names:
        raise ValueError(f"resume={str(path)!r}: rank {names.index(None)} finds no checkpoint there, and others do; give a folder "
                         "that all ranks see")  # fmt: skip
    every = ranks.exchange("enters `with loop:`", [place.name for place in store.list_checkpoints(Path(path))])
    for name in [name for name in every[0][::-1] if all(name in each for each in every)]:
        with contextlib.suppress(store.Damaged, FileNotFoundError):
            found = store.read(Path(path) / name, strict)
        these = ranks.exchange("enters `with loop:`", found and found.identity)
        if these[0][0] == name and len({*these}) == 1:
            step = store.step_of(Path(name))
            ranks.unread = {place.name for place in store.list_checkpoints(Path(path)) if store.step_of(place) > step}
            log.warning("resumed from %s, the newest checkpoint that all ranks can read; rank by rank that was %s",
                        name, [one[0] for one in names])  # fmt: skip
            return found
    raise RuntimeError(f"resume={str(path)!r}: no checkpoint there can be read by all ranks, to the same content; give a folder "
                       f"that all ranks see; the newest, rank by rank: {[' '.join(one) for one in names]}")  # fmt: skip


Taken = list[tuple[Callback, dict[str, Any]]]


def _load_callbacks(mine: dict[str, Callback], saved: dict[str, Any]) -> tuple[Taken, list[str]]:
    """Have callbacks take their state back, first who decides which optimizer the others meet.

    Return who took it, with its state before, and who did not, in words: that one stays as it was.
    """
    taken, refused = Taken(), list[str]()
    for key in sorted(mine.keys() & saved.keys(), key=lambda key: ("optimizer" not in mine[key].owns, [*mine].index(key))):
        fresh = copy.deepcopy(mine[key].state_dict())
        try:
            mine[key].load_state_dict(saved[key])
            taken.append((mine[key], fresh))
        except Exception as error:
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            refused.append(f"{key} does not take its state: {kind}{error}")
            with contextlib.suppress(Exception):
                mine[key].load_state_dict(fresh)
    return taken, refused
