"""Checkpoints on disk: each a folder `step-00000120` of `model.pt` (the plain state dict), `state.pt` and a manifest.

Of a sharded model it holds `shards/` too, and placeholders where the tensors stood that are in there (`sharded.py`).

A save, in order: files beside the checkpoints, each under a temporary name, flushed, renamed, and the folder's entries
flushed; then a draft folder, its files flushed one by one, the draft's entries flushed, the draft renamed, the folder's
entries flushed. Only what has been renamed is ever read, and nothing older is deleted before all of it is done.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import sys
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from . import manifest
from .plain import not_plain

NAME = re.compile(r"step-(\d{8,})(?:\.(\d+))?")
FILES = ("model.pt", "state.pt")
BESIDE = re.compile(r"\w+-[0-9a-f]{16}\.pt")
SHARD = re.compile(r"shards/(\.metadata|__\d+_\d+\.distcp)")


@dataclass
class Contents:
    """What a checkpoint holds; `beside`: (callback, entry of its state) -> what is kept in a file of its own.

    `about`: facts of this save, for its manifest: two runs with the same content may differ in them.
    """

    step: int
    model: dict[str, Any]
    state: dict[str, Any]
    beside: dict[tuple[str, str], Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Raise TypeError naming what is no plain data, while it can still be put right."""
        parts = {"model": self.model, "state": self.state, **{f"{key}'s {name}": x for (key, name), x in self.beside.items()}}
        for name, part in parts.items():
            if where := not_plain(part, name, {}):
                raise TypeError(f"can't save {where}; state_dict() must give plain data: numbers, strings, tensors, and lists "
                                "and dicts of them")  # fmt: skip


class Sink:
    """A file for torch to write into; the first error is kept, since torch would tell of it in words of its own."""

    def __init__(self, path: Path) -> None:
        self.fd, self.bytes = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), 0
        self.error: BaseException | None = None

    def write(self, data: Any) -> int:
        """Write all of `data`, or, after an error, nothing."""
        self.bytes += len(data)
        view = memoryview(data)
        try:
            while view and self.error is None:
                view = view[os.write(self.fd, view) :]
        except BaseException as error:  # Ctrl-C too: torch's writer must not meet it
            self.error = error
        return len(data)

    def flush(self) -> None:
        """Do nothing: nothing is held back."""

    def close(self) -> None:
        """Do nothing: whoever opened it closes it."""

    def tell(self) -> int:
        """Return where the next byte goes."""
        return self.bytes

    def sync(self) -> None:
        """Have the disk hold it; raises the first error."""
        if self.error is not None:
            raise self.error
        os.fsync(self.fd)


@contextmanager
def opened(path: Path) -> Iterator[Sink]:
    """Open a new file, and have the disk hold it in the end; raises OSError, which says how much a full disk lacks."""
    sink = Sink(path)
    try:
        yield sink
        sink.sync()
    except OSError as error:
        why = f"{error.strerror} in writing {path}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(path.parent).free
            why = f"disk full: {path} needs {sink.bytes / 1e6:.1f} MB, {free / 1e6:.1f} MB are free"
        raise OSError(error.errno, why) from None
    finally:
        os.close(sink.fd)


def sync(path: Path) -> None:
    """Have the disk hold a file, or a folder's entries, before anything that relies on it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _put(path: Path, content: Any, other: ThreadPoolExecutor) -> Future[dict[str, Any]]:
    """Write a file, have the disk hold it, and return its manifest entry, read back while the disk is at work."""
    outer = sys.exception()
    with opened(path) as sink:
        if isinstance(content, str):
            sink.write(content.encode())
        else:
            try:
                torch.save(content, sink)  # type: ignore[arg-type]  # it asks for write and flush alone
            except RuntimeError as error:  # what a signal's handler raised beside a write ends as torch's "enforce fail"
                if error.__cause__ is not None or error.__context__ in (None, outer):
                    raise
                raise error.__context__ from None
        return other.submit(manifest.entry, path)


def write(folder: Path, contents: Contents, reasons: Sequence[str], known: dict[tuple[str, str], Any]) -> Path:
    """Write a checkpoint whole or not at all, and return its folder; after an error nothing of it is left.

    `known`: what stands beside the checkpoints already, (callback, entry) -> (content, its name, its manifest entry).
    """
    steps = writing(folder, contents, reasons, known)
    next(steps)
    return finish(steps, {})


def writing(folder: Path, contents: Contents, reasons: Sequence[str],
            known: dict[tuple[str, str], Any]) -> Generator[Path, dict[str, Any], Path]:  # fmt: skip
    """Write a checkpoint, with a pause: it yields its draft, and takes in the manifest entries of what others put there.

    Closed in the pause, it takes the draft away.
    """
    folder.mkdir(parents=True, exist_ok=True)
    there = [m for p in folder.glob(f"*step-{contents.step:08d}*") if (m := NAME.search(p.name))]
    last = max((int(m[2] or 1) for m in there), default=0)  # not their count: older ones may be gone
    target = folder / (f"step-{contents.step:08d}" + (f".{last + 1}" if last else ""))
    draft = folder / f".{target.name}.part"  # beside the target: a rename across file systems is a copy
    try:
        with ThreadPoolExecutor(1) as other:
            for place, content in contents.beside.items():
                if place not in known or known[place][0] is not content or not (folder / known[place][1]).exists():
                    known[place] = (content, *_write_beside(folder, place[1], content, other))
            beside = {place: known[place][1:] for place in contents.beside}
            draft.mkdir()
            more = yield draft
            state = {**contents.state, "beside": [[*place, name] for place, (name, _) in beside.items()]}
            parts = zip(FILES, (contents.model, state), strict=True)
            found = {name: _put(draft / name, content, other) for name, content in parts}
            files = {name: future.result() for name, future in found.items()} | more
            text = manifest.render(contents.step, sorted(reasons), files, dict(beside.values()), contents.about)
            _put(draft / manifest.NAME, text, other)
        sync(draft)
        draft.rename(target)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    sync(folder)
    return target


def finish(steps: Generator[Path, dict[str, Any], Path], more: dict[str, Any]) -> Path:
    """Have a paused `writing` go on to its end, and return the checkpoint's folder."""
    try:
        steps.send(more)
    except StopIteration as done:
        return Path(done.value)
    raise AssertionError("it pauses once")


def _write_beside(folder: Path, what: str, content: Any, other: ThreadPoolExecutor) -> tuple[str, dict[str, Any]]:
    draft = folder / f".{what}.beside.part"
    draft.unlink(missing_ok=True)
    try:
        entry = _put(draft, content, other).result()
        name = f"{what}-{entry['sha256'][:16]}.pt"
        draft.replace(folder / name)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    sync(folder)
    return name, entry


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, oldest first."""
    found = [(m, p) for p in folder.iterdir() if (m := NAME.fullmatch(p.name))] if folder.is_dir() else []
    return [p for m, p in sorted(found, key=lambda mp: (int(mp[0][1]), int(mp[0][2] or 1)))]


def step_of(checkpoint: Path) -> int:
    """Return the step that a checkpoint's name says, -1 where it says none."""
    match = NAME.fullmatch(checkpoint.name)
    return int(match[1]) if match else -1


def verify(checkpoint: Path, beside: bool = True) -> dict[str, Any]:
    """Return a checkpoint's manifest; raises Damaged, naming the file, unless all that it lists is as it was written."""
    found = manifest.read(checkpoint, step_of(checkpoint))
    shards = found["files"].keys() - set(FILES)
    if len(found["files"]) != len(shards) + len(FILES) or not (
            all(map(SHARD.fullmatch, shards)) and all(map(BESIDE.fullmatch, found["beside"]))):  # fmt: skip
        raise manifest.Damaged(
            f"{checkpoint / manifest.NAME} names files that no checkpoint has: {[*found['files'], *found['beside']]}"
        )
    for name, expected in found["files"].items():
        manifest.check(checkpoint / name, expected)
    for name, expected in found["beside"].items() if beside else ():
        manifest.check(checkpoint.parent / name, expected)
    return found
