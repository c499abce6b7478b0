"""The manifest of a checkpoint: what its files must be, to the bit."""

from __future__ import annotations

import functools
import hashlib
import json
import stat
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

FORMAT = 1
NAME = "manifest.json"


class Damaged(Exception):
    """A checkpoint that is not what was written; the message names the file."""


class Unknown(ValueError):
    """A checkpoint of a format that this version does not read: no reason to go on from an older one."""


def digest(path: Path) -> str:
    """Return a file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def entry(path: Path) -> dict[str, Any]:
    """Return what a file is: its size and digest."""
    return {"bytes": path.stat().st_size, "sha256": digest(path)}


def render(
    step: int, reasons: list[str], files: dict[str, Any], beside: dict[str, Any], about: dict[str, Any] | None = None
) -> str:
    """Return the manifest's text; its last entry is the digest of all the others."""
    content = {"format": FORMAT, "step": step, "reasons": reasons, "torch": str(torch.__version__), "hookloop": version(),
               **(about or {}), "files": files, "beside": beside}  # fmt: skip
    return _text(content)


@functools.cache
def version() -> str:
    """Return hookloop's; to look it up reads all of its packaging metadata."""
    try:
        return metadata.version("hookloop")
    except metadata.PackageNotFoundError:  # the source folder on the path, never installed
        return "unknown"


def _text(content: dict[str, Any]) -> str:
    own = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps({**content, "sha256": own}, indent=1) + "\n"


def read(checkpoint: Path, step: int) -> dict[str, Any]:
    """Return a checkpoint's manifest; raises Damaged where it is not what was written, or not that of this step (-1: any)."""
    path = checkpoint / NAME
    try:
        text = path.read_bytes().decode()
        found: dict[str, Any] = json.loads(text)
        whole = _text({k: v for k, v in found.items() if k != "sha256"}) == text
    except FileNotFoundError:
        raise Damaged(f"{path} is missing, so the checkpoint was never finished, or was not written by hookloop") from None
    except (ValueError, AttributeError):
        whole = False
    if not whole:
        raise Damaged(f"{path} is damaged")
    if found.get("format") != FORMAT:
        raise Unknown(f"{path} says format {found.get('format')!r} (hookloop {found.get('hookloop')}), which this version of "
                      f"hookloop can't read; it reads {FORMAT}")  # fmt: skip
    if step >= 0 and found.get("step") != step:
        raise Damaged(f"{path} is that of step {found.get('step')}, in a folder of another name")
    return found


def check(path: Path, expected: dict[str, Any]) -> None:
    """Raise Damaged unless a file is there, whole and unchanged."""
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):
            raise Damaged(f"{path} is no file")
        if (size := about.st_size) != expected["bytes"]:
            raise Damaged(f"{path} holds {size:,} bytes, not the {expected['bytes']:,} that were written")
        if digest(path) != expected["sha256"]:
            raise Damaged(f"{path} is damaged: its digest is not that of what was written")
    except FileNotFoundError:
        raise Damaged(f"{path} is missing") from None
