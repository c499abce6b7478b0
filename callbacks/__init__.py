"""Callbacks that each do one thing to training; they work in `Loop.fit`, by hand, and around your own loop."""

from .checkpoint import Checkpoint
from .clip_gradients import ClipGradients
from .dynamic_batch_size import DynamicBatchSize
from .early_stopping import EarlyStopping
from .gradient_accumulation import GradientAccumulation
from .metrics import Metrics
from .micro_batch import MicroBatch
from .seed import Seed
from .warmup import Warmup

__all__ = [
    "Checkpoint",
    "ClipGradients",
    "DynamicBatchSize",
    "EarlyStopping",
    "GradientAccumulation",
    "Metrics",
    "MicroBatch",
    "Seed",
    "Warmup",
]
