"""hookloop's runs of throughput.py: no callback, each alone, those of the hand-written loop's duties, all, all but one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torchmetrics.classification import MulticlassAccuracy
from workloads import ACCUMULATE, DECAY, EVERY, NORM, WARMUP, Job, forward

from hookloop.callbacks import (
    Average,
    Checkpoint,
    ClipGradients,
    CUDAGraph,
    DecaySchedule,
    Diagnose,
    DynamicBatchSize,
    EarlyStopping,
    Fingerprint,
    GradientAccumulation,
    LayerwiseRate,
    Metrics,
    MicroBatch,
    NoiseScale,
    NonFinite,
    Preemption,
    Progress,
    Schedule,
    Seed,
    SwitchOptimizer,
    TensorBoard,
    Warmup,
    WeightDecay,
)
from hookloop.loop import Callback, Loop, State

FAR = 10**9
DUTIES = ("Seed", "WeightDecay", "Warmup", "GradientAccumulation", "TensorBoard")
Make = Callable[[Job], Callback]


class Ended(Exception):
    """The run is over; no epoch's end follows, so that no run writes a checkpoint of its whole model."""


class Tick(Callback):
    def __init__(self, job: Job) -> None:
        self.watch = job.watch

    def on_step_end(self, state: State) -> None:
        self.watch.tick()
        if self.watch.ended:
            raise Ended


def cosine(optimizer: torch.optim.Optimizer, total: Any) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, FAR)


def accuracy(job: Job) -> Any:
    return MulticlassAccuracy(job.workload.classes, average="micro", validate_args=False)  # which would wait for the device


CALLBACKS: dict[str, Make] = {
    "Seed": lambda job: Seed(0),
    "WeightDecay": lambda job: WeightDecay(default=DECAY),
    "Warmup": lambda job: Warmup(WARMUP),
    "Schedule": lambda job: Schedule(cosine),
    "GradientAccumulation": lambda job: GradientAccumulation(ACCUMULATE),
    "DynamicBatchSize": lambda job: DynamicBatchSize(job.workload.batch, 2 * job.workload.batch, every=FAR),
    "MicroBatch": lambda job: MicroBatch("auto", target="memory"),  # whole batches wherever they fit
    "ClipGradients": lambda job: ClipGradients(NORM),
    "NonFinite": lambda job: NonFinite(),
    "NoiseScale": lambda job: NoiseScale(),
    "Fingerprint": lambda job: Fingerprint(EVERY),
    "Metrics": lambda job: Metrics({"metric": accuracy(job)}, training=True),
    "EarlyStopping": lambda job: EarlyStopping("train_loss"),
    "TensorBoard": lambda job: TensorBoard(Path(job.folder) / "curves", every=EVERY),
    "Progress": lambda job: Progress(every=1e6),
    "Checkpoint": lambda job: Checkpoint(Path(job.folder) / "checkpoints", every=FAR),
    "Preemption": lambda job: Preemption(on_signal="return"),  # without Checkpoint it raises nothing
}

ALONE: dict[str, Make] = {  # what few runs hold together, or what is work of its own
    "Average": lambda job: Average(),
    "DecaySchedule": lambda job: DecaySchedule("linear", steps=FAR),
    "Diagnose": lambda job: Diagnose(),
    "LayerwiseRate": lambda job: LayerwiseRate(0.9),
    "SwitchOptimizer": lambda job: SwitchOptimizer(lambda groups: torch.optim.SGD(groups, lr=0.1), at=FAR),
}


def ours(job: Job, names: tuple[str, ...], graphs: bool = False) -> None:
    """Run `Loop.fit` with these callbacks."""
    callbacks = [(CALLBACKS | ALONE)[name](job) for name in names]  # Seed is the first, so that it covers the model
    model = job.build()
    loop = Loop(model, job.optimizer(model.parameters()), [*callbacks, *([CUDAGraph()] if graphs else []), Tick(job)],
                autocast=job.workload.autocast)  # fmt: skip
    if "GradientAccumulation" not in names:
        loop.state.accumulate = ACCUMULATE
    with contextlib.suppress(Ended):
        loop.fit(forward, job.source(), epochs=1)


def sets() -> dict[str, tuple[str, ...]]:
    """Return which callbacks run under which name."""
    every = tuple(CALLBACKS)
    return {
        "hookloop, no callback": (),
        "hookloop, the same duties": DUTIES,
        "hookloop, all callbacks": every,
        **{f"hookloop, {name} alone": (name,) for name in (*every, *ALONE)},
        **{f"hookloop, all but {name}": tuple(n for n in every if n != name) for name in every},
    }
