"""Callbacks that each do one thing to training; they work in `Loop.fit`, by hand, and around your own loop."""

from .clip_gradients import ClipGradients
from .gradient_accumulation import GradientAccumulation
from .seed import Seed
from .warmup import Warmup

__all__ = ["ClipGradients", "GradientAccumulation", "Seed", "Warmup"]
