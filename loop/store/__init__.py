"""Checkpoints on disk: one folder each, written whole or not at all, verified, and read without running any code."""

from .copies import Copies
from .disk import Contents, list_checkpoints, step_of, sync, write
from .folder import Folder
from .inner import inner
from .manifest import Damaged
from .named import Named
from .plain import is_sharded, plain, reduced
from .read import Found, read, readable
from .sharded import check_same_folder, fill, write_together
from .writer import Writer

__all__ = [
    "Contents",
    "Copies",
    "Damaged",
    "Folder",
    "Found",
    "Named",
    "Writer",
    "check_same_folder",
    "fill",
    "inner",
    "is_sharded",
    "list_checkpoints",
    "plain",
    "read",
    "readable",
    "reduced",
    "step_of",
    "sync",
    "write",
    "write_together",
]
