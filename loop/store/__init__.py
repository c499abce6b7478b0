"""Checkpoints on disk: one folder each, written whole or not at all, read without running any code."""

from .disk import list_checkpoints, plain, read, readable, step_of, sync, write

__all__ = ["list_checkpoints", "plain", "read", "readable", "step_of", "sync", "write"]
