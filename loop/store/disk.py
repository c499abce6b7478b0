"""One folder a checkpoint, `step-00000120`: `model.pt` (the plain state dict) and `state.pt` (all the rest)."""

from __future__ import annotations

import os
import re
import shutil
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

NAME = re.compile(r"step-(\d{8,})(?:\.(\d+))?")
PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.Size, torch.dtype, torch.device)


def not_plain(x: Any, path: str = "") -> str | None:
    """Return where `x` holds what `torch.load(weights_only=True)` would refuse, and what it is; None where nowhere."""
    if type(x) in PLAIN or isinstance(x, torch.Tensor):
        return None
    if type(x) in (dict, OrderedDict):
        found = (not_plain(k, f"{path} key {k!r}") or not_plain(v, f"{path}[{k!r}]") for k, v in x.items())
    elif type(x) in (list, tuple):
        found = (not_plain(v, f"{path}[{i}]") for i, v in enumerate(x))
    else:
        return f"{path} is a {type(x).__module__}.{type(x).__name__}"
    return next((where for where in found if where), None)


def plain(x: Any) -> bool:
    """Tell whether `x` is numbers, strings, tensors, and dicts and lists of them."""
    return not_plain(x) is None


def sync(path: Path) -> None:
    """Have the disk hold a file, or a folder's entries, before anything that relies on it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, oldest first."""
    found = [(m, p) for p in folder.iterdir() if (m := NAME.fullmatch(p.name))] if folder.is_dir() else []
    return [p for m, p in sorted(found, key=lambda mp: (int(mp[0][1]), int(mp[0][2] or 1)))]


def step_of(checkpoint: Path) -> int:
    """Return the step that a checkpoint's name says."""
    match = NAME.fullmatch(checkpoint.name)
    return int(match[1]) if match else -1


def write(folder: Path, step: int, model: dict[str, Any], state: dict[str, Any], marks: Sequence[str] = ()) -> Path:
    """Write a checkpoint whole or not at all, and return its folder; raises TypeError naming what is no plain data."""
    for name, part in (("model", model), ("state", state)):
        if where := not_plain(part, name):
            raise TypeError(f"can't save {where}; state_dict() must give plain data: numbers, strings, tensors, lists, dicts")
    there = [m for p in folder.glob(f"*step-{step:08d}*") if (m := NAME.search(p.name))]
    last = max((int(m[2] or 1) for m in there), default=0)  # not their count: older ones may be gone
    target = folder / (f"step-{step:08d}" + (f".{last + 1}" if last else ""))
    draft = folder / f".{target.name}.part"  # beside the target: a rename across file systems is a copy
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    for name, content in (("model.pt", model), ("state.pt", state)):
        torch.save(content, draft / name)
        sync(draft / name)
    for mark in marks:
        (draft / mark).touch()
    sync(draft)
    draft.rename(target)
    sync(folder)
    return target


def load(checkpoint: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (model, state) of one checkpoint, running none of its content as code."""
    files = checkpoint / "model.pt", checkpoint / "state.pt"
    model, state = (torch.load(file, map_location="cpu", weights_only=True) for file in files)
    if not isinstance(state, dict) or state.get("format") != 1:
        raise ValueError("its format is not 1, the only one that this version of hookloop reads")
    return model, state


def readable(checkpoint: Path) -> bool:
    """Tell whether a checkpoint loads."""
    try:
        load(checkpoint)
    except Exception:
        return False
    return True


def newest(folder: Path) -> tuple[Path, dict[str, Any], dict[str, Any]] | None:
    """Return the newest good checkpoint with its content, None where there is none; raises if all are bad."""
    bad: list[str] = []
    for checkpoint in reversed(list_checkpoints(folder)):
        try:
            found = (checkpoint, *load(checkpoint))
        except Exception as error:
            bad.append(f"{checkpoint}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            continue
        if bad:
            warnings.warn(f"resumed from {checkpoint}, since a newer one can't be read: {'; '.join(bad)}", stacklevel=2)
        return found
    if bad:
        raise RuntimeError("no checkpoint can be read, and none is a reason to start afresh: " + "; ".join(bad))
    return None


def read(path: str | os.PathLike[str]) -> tuple[Path, dict[str, Any], dict[str, Any]] | None:
    """Return what `resume=` names: one checkpoint (or a file in it), or the newest good one in a folder."""
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"resume must be the path of a checkpoint or of a folder of them, not {path!r}")
    place = Path(path)
    if place.is_file():
        place = place.parent
        if not NAME.fullmatch(place.name):
            raise ValueError(f"resume={str(path)!r} is no checkpoint of hookloop; load weights with model.load_state_dict")
    there = [checkpoint.name for checkpoint in list_checkpoints(place.parent)]
    inside = place.name.startswith("step-") or NAME.fullmatch(place.parent.name) is not None
    if inside or place.suffix == ".pt" or (there and not place.is_dir()):
        if not NAME.fullmatch(place.name) or not place.is_dir():
            raise FileNotFoundError(f"resume={str(path)!r}: there is no such checkpoint; beside it are {there or 'none'}")
        return (place, *load(place))
    return newest(place)
