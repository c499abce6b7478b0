"""Checkpoints on disk: one folder each, written whole or not at all, verified, and read without running any code."""

from .copies import Copies
from .disk import Contents, intact, list_checkpoints, newest_for, prepare, prune, step_of, sync, write
from .manifest import Damaged
from .named import Named
from .plain import plain
from .read import Found, read
from .writer import Writer

__all__ = [
    "Contents",
    "Copies",
    "Damaged",
    "Found",
    "Named",
    "Writer",
    "intact",
    "list_checkpoints",
    "newest_for",
    "plain",
    "prepare",
    "prune",
    "read",
    "step_of",
    "sync",
    "write",
]
