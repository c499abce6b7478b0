"""A folder of checkpoints in use: by one run at a time, swept of what was cut off, holding no more than is to be kept."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
from collections.abc import Container
from pathlib import Path
from typing import ClassVar
from weakref import WeakSet

from . import manifest
from .disk import BESIDE, list_checkpoints, step_of, sync
from .read import readable

log = logging.getLogger("hookloop")


class Folder:
    """Where a run writes its checkpoints."""

    used: ClassVar[WeakSet[Folder]] = WeakSet()

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        if not isinstance(folder, str | os.PathLike) or not os.fspath(folder):
            raise ValueError(f"folder must be the path of a folder, such as 'runs/a', not {folder!r}")
        self.path = Path(folder).absolute()  # the run may change its directory

    def open(self, step: int, run: str | None, unread: Container[str] = ()) -> None:
        """Make the folder ready for a `run` that stands at `step`; what can't be read beyond it, or is `unread`
        by other ranks, is renamed, with a warning.

        Raises OSError where it can't be written, ValueError for one that another Checkpoint of this program writes, or
        that holds checkpoints beyond this run's step, or of another run.
        """
        try:
            self._prepare()
        except OSError as error:
            raise OSError(f"can't write to folder={str(self.path)!r}, give another: {error}") from error
        if any(other.path.resolve() == self.path.resolve() for other in self.used - {self}):
            raise ValueError(f"folder {str(self.path)!r} is written by another Checkpoint now; give each its own")
        self.used.add(self)
        for later in (p for p in list_checkpoints(self.path) if step_of(p) > step):
            if later.name not in unread and readable(later):
                raise ValueError(f"folder {str(self.path)!r} holds {later.name}, beyond this run's step {step}: give "
                                 f"Loop(..., resume={str(self.path)!r}) to go on from it, or an empty folder")  # fmt: skip
            log.warning("%s can't be read: renamed, since this run comes by that step again", later)
            later.rename(later.with_name(f"unreadable-{later.name}"))
        for earlier in list_checkpoints(self.path) if run is not None else ():
            with contextlib.suppress(manifest.Damaged, manifest.Unknown):
                if manifest.read(earlier, step_of(earlier)).get("run", run) not in (run, None):
                    raise ValueError(f"folder {str(self.path)!r} holds {earlier.name} of another run: give an empty folder, or "
                                     f"Loop(..., resume={str(self.path)!r}) to go on from that one")  # fmt: skip

    def close(self) -> None:
        """Let another write there."""
        self.used.discard(self)

    def _prepare(self) -> None:
        missing = [place for place in (self.path, *self.path.parents) if not place.exists()]
        if missing:
            self.path.mkdir(parents=True, exist_ok=True)
        for place in reversed(missing):
            sync(place.parent)
        with tempfile.TemporaryFile(dir=self.path):
            pass
        for draft in (*self.path.glob(".step-*.part"), *self.path.glob(".*.beside.part")):
            shutil.rmtree(draft, ignore_errors=True)
            draft.unlink(missing_ok=True)

    def newest_for(self, reason: str) -> Path | None:
        """Return the newest checkpoint that was saved for this reason."""
        for checkpoint in reversed(list_checkpoints(self.path)):
            try:
                if reason in manifest.read(checkpoint, step_of(checkpoint))["reasons"]:
                    return checkpoint
            except (manifest.Damaged, manifest.Unknown):
                continue
        return None

    def prune(self, keep: int | None, spared: str) -> None:
        """Delete all but the newest `keep` checkpoints and the newest for the spared reason, then what they alone had beside them.

        A checkpoint is renamed before it is deleted, so that one half deleted is never taken for one.
        """
        if keep is None:
            return
        best = self.newest_for(spared)
        for old in list_checkpoints(self.path)[:-keep]:
            if old != best:
                draft = old.with_name(f".{old.name}.part")
                old.rename(draft)
                shutil.rmtree(draft, ignore_errors=True)
        try:
            needed = [name for p in list_checkpoints(self.path) for name in manifest.read(p, step_of(p))["beside"]]
        except (manifest.Damaged, manifest.Unknown):
            return  # what it needs isn't known
        for file in self.path.glob("*.pt"):
            spare = BESIDE.fullmatch(file.name) and file.name not in needed
            if spare and manifest.digest(file).startswith(file.stem[-16:]):  # so it is no file of the user's
                file.unlink(missing_ok=True)
