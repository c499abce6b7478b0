"""Checkpoints read back: verified against their manifest, and no code in them ever run."""

from __future__ import annotations

import logging
import os
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from . import disk, manifest

log = logging.getLogger("hookloop")


@dataclass
class Found:
    """A checkpoint's content, and its manifest; `lost`: files beside it that are gone, where a reader may go without."""

    place: Path
    model: dict[str, Any]
    state: dict[str, Any]
    about: dict[str, Any]
    lost: list[str] = field(default_factory=list)

    @property
    def identity(self) -> tuple[str, str]:
        """Its name and its manifest's digest, the same for two readers of one checkpoint alone."""
        return self.place.name, str(self.about["sha256"])[:16]


def load(checkpoint: Path, strict: bool = True) -> Found:
    """Return one checkpoint; raises Damaged, which names the file, for one that is not what was written, or no plain data."""
    about = disk.verify(checkpoint, beside=strict)
    model, state = (_content(checkpoint / name) for name in disk.FILES)
    found = Found(checkpoint, model, state, about)
    try:
        for key, name, file in state.pop("beside"):
            path, entries = checkpoint.parent / file, state["callbacks"][key]
            try:
                manifest.check(path, about["beside"][file])
            except manifest.Damaged as error:
                found.lost.append(f"{key}'s {name}: {error}")
            else:
                entries[name] = _content(path)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise manifest.Damaged(f"{checkpoint / disk.FILES[1]} was not written by hookloop: {error!r}") from None
    return found


def _content(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # torch's words advise to load it with code and all
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f" ({named[1]})" if named else ""
        raise manifest.Damaged(f"{path} holds what is no plain data{what}, and was not loaded") from None


def newest(folder: Path, strict: bool = True) -> Found | None:
    """Return the newest good checkpoint, None where there is none at all; raises RuntimeError if all are bad."""
    bad: list[str] = []
    for checkpoint in reversed(disk.list_checkpoints(folder)):
        try:
            found = load(checkpoint, strict)
        except (manifest.Damaged, FileNotFoundError) as error:
            if not checkpoint.is_dir():
                return newest(folder, strict)  # deleted meanwhile by a run that still writes: it has newer ones
            bad.append(str(error))
            continue
        if bad:
            warnings.warn(f"resumed from {checkpoint}, since a newer one can't be read: {'; '.join(bad)}", stacklevel=2)
        return found
    if bad:
        raise RuntimeError("no checkpoint can be read, and none is a reason to start afresh: " + "; ".join(bad) +
                           "; give another folder (Loop(..., strict=False) goes without a lost file of a callback's)")  # fmt: skip
    log.warning("%s holds no checkpoint yet: a fresh start", folder)
    return None


def readable(checkpoint: Path) -> bool:
    """Tell whether a checkpoint can be resumed from."""
    try:
        load(checkpoint)
    except manifest.Damaged:
        return False
    return True


def read(path: str | os.PathLike[str], strict: bool = True) -> Found | None:
    """Return what `resume=` names: one checkpoint (or a file in it), or the newest good one in a folder."""
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"resume must be the path of a checkpoint or of a folder of them, not {path!r}")
    place = Path(path)
    if place.is_file():
        place = place.parent
        if not (place / manifest.NAME).exists():
            raise ValueError(f"resume={str(path)!r} is no checkpoint of hookloop; load weights with model.load_state_dict")
    if (place / manifest.NAME).exists() or (place / disk.FILES[0]).exists():
        return load(place.resolve(), strict)
    there = [checkpoint.name for checkpoint in disk.list_checkpoints(place.parent)]
    inside = place.name.startswith("step-") or disk.NAME.fullmatch(place.parent.name) is not None
    if inside or place.suffix == ".pt" or (there and not place.is_dir()):
        if not disk.NAME.fullmatch(place.name) or not place.is_dir():
            raise FileNotFoundError(f"resume={str(path)!r}: there is no such checkpoint; beside it are {there or 'none'}")
        return load(place, strict)
    return newest(place, strict)
