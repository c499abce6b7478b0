"""A minimal training loop that exposes hooks: `Loop`, what its hooks receive, and what a callback is."""

from .callback import Callback
from .goal import Goal
from .loop import Loop
from .state import State

__all__ = ["Callback", "Goal", "Loop", "State"]
