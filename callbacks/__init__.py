"""Callbacks that each do one thing to training; they work in `Loop.fit`, by hand, and around your own loop."""

from .average import Average
from .batch_policies import Epochs, Plateau, Policy, Steps
from .checkpoint import Checkpoint
from .clip_gradients import ClipGradients
from .cuda_graph import CUDAGraph
from .decay_schedule import DecaySchedule
from .diagnose import Diagnose
from .dropout import Dropout
from .dynamic_batch_size import DynamicBatchSize
from .early_stopping import EarlyStopping
from .fingerprint import Fingerprint
from .gradient_accumulation import GradientAccumulation
from .hard_examples import HardExamples
from .initialize import Initialize
from .layerwise_rate import LayerwiseRate
from .make_optimizer import make_optimizer
from .metrics import Metrics
from .micro_batch import MicroBatch
from .noise_scale import NoiseScale
from .non_finite import NonFinite
from .preemption import Preemption
from .progress import Progress
from .prune import Prune
from .schedule import Schedule
from .seed import Seed
from .switch_optimizer import SwitchOptimizer
from .tensorboard import TensorBoard
from .unfreeze import Unfreeze
from .warmup import Warmup
from .weight_decay import WeightDecay

__all__ = [
    "Average",
    "CUDAGraph",
    "Checkpoint",
    "ClipGradients",
    "DecaySchedule",
    "Diagnose",
    "Dropout",
    "DynamicBatchSize",
    "EarlyStopping",
    "Epochs",
    "Fingerprint",
    "GradientAccumulation",
    "HardExamples",
    "Initialize",
    "LayerwiseRate",
    "Metrics",
    "MicroBatch",
    "NoiseScale",
    "NonFinite",
    "Plateau",
    "Policy",
    "Preemption",
    "Progress",
    "Prune",
    "Schedule",
    "Seed",
    "Steps",
    "SwitchOptimizer",
    "TensorBoard",
    "Unfreeze",
    "Warmup",
    "WeightDecay",
    "make_optimizer",
]
