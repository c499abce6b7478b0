"""Host time that hookloop adds to a step and to a micro-batch of a hand-written loop, on a model that does nothing.

Each repetition runs the hand-written loop and ours, one after the other, with 1 and with 4 micro-batches a step; what
they differ by is a step's cost plus that of its micro-batches. Beside ClipGradients and Schedule the hand-written loop
calls `clip_grad_norm_` and `scheduler.step()` itself: reported is what the callback costs, not what clipping does.
Reported are the difference of the minima over all repetitions (what the code costs) and percentiles of the paired
differences (what a machine makes of it).

    python benchmarks/overhead.py [--repetitions 400] [--steps 16]

Short repetitions, and many, so that some of each meet nothing else that the machine does.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from machine import machine
from torch import nn

from hookloop.callbacks import (
    Checkpoint,
    ClipGradients,
    DynamicBatchSize,
    EarlyStopping,
    GradientAccumulation,
    MicroBatch,
    Progress,
    Schedule,
    Seed,
    TensorBoard,
    Warmup,
    WeightDecay,
)
from hookloop.loop import Callback, Loop

SAMPLES = 4
FAR = 10**9
BATCHES = [torch.zeros(SAMPLES, 1)] * 10**6  # in memory: what reading costs is no part of a step
READS = ", a loader that may draw"


class Nothing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(()))

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.w * 1.0


class Idle(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:
        pass


def loss_fn(model: nn.Module, batch: torch.Tensor) -> Any:
    return model(batch)


def hand_written(micros: int, name: str) -> Iterator[None]:
    model = Nothing()
    optimizer = Idle(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, FAR)
    clips, schedules = name in ("ClipGradients", "all"), name in ("Schedule (cosine)", "all")
    device = torch.device("cpu")
    batches = iter(BATCHES)
    while True:
        optimizer.zero_grad()
        for _ in range(micros):
            loss = loss_fn(model, next(batches).to(device))
            (loss if micros == 1 else loss / micros).backward()
        if clips:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if schedules:
            scheduler.step()
        yield


def ours(micros: int, callbacks: list[Callback], reads: bool) -> Iterator[None]:
    model = Nothing()
    loop = Loop(model, Idle(model.parameters(), lr=0.1), callbacks)
    loop.state.accumulate = micros
    with loop:
        for _ in loop.epochs(steps=FAR):
            for step in loop.steps(iter(BATCHES) if reads else BATCHES):
                for micro in step:
                    with micro:
                        micro.backward(loss_fn)
                loop.update()
                yield


def once(run: Iterator[None], steps: int) -> float:
    start = time.perf_counter()
    for _ in range(steps):
        next(run)
    return (time.perf_counter() - start) / steps * 1e6


def sets(folder: str) -> dict[str, Callable[[int], list[Callback]]]:
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR
    one: dict[str, Callable[[int], list[Callback]]] = {
        "Seed": lambda k: [Seed(0)],
        f"Seed{READS}": lambda k: [Seed(0)],
        "Warmup": lambda k: [Warmup(FAR)],
        "Schedule (cosine)": lambda k: [Schedule(lambda optimizer, total: cosine(optimizer, FAR))],
        "GradientAccumulation": lambda k: [GradientAccumulation(k)],
        "DynamicBatchSize": lambda k: [DynamicBatchSize(SAMPLES, SAMPLES * 2, every=FAR)],
        'MicroBatch("auto")': lambda k: [MicroBatch("auto")],
        "WeightDecay": lambda k: [WeightDecay()],
        "EarlyStopping": lambda k: [EarlyStopping()],
        "ClipGradients": lambda k: [ClipGradients(1.0)],
        "TensorBoard": lambda k: [TensorBoard(f"{folder}/tb{k}", every=FAR)],
        "Progress": lambda k: [Progress(every=1e6)],
        "Checkpoint": lambda k: [Checkpoint(f"{folder}/ck{k}{time.time_ns()}", every=FAR)],
    }
    return {
        "the bare verbs": lambda k: [],
        **one,
        "all": lambda k: [c for name, make in one.items() if not name.endswith(READS) for c in make(k)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=400)
    parser.add_argument("--steps", type=int, default=16)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{machine()}\nmicroseconds over the hand-written loop; {arguments.repetitions} paired repetitions of "
          f"{arguments.steps} steps\n")  # fmt: skip
    print("| callbacks | a step | a micro-batch | step of one micro-batch: 10th / 50th / 90th percentile |")
    print("|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name, make in sets(folder).items():
            runs = {k: (hand_written(k, name), ours(k, make(k), reads=name.endswith(READS))) for k in (1, 4)}
            best: dict[Any, float] = {}
            paired: list[float] = []
            for repetition in range(arguments.repetitions + 1):
                for k, pair in runs.items():
                    times = [once(run, arguments.steps // k) for run in pair]
                    if repetition == 0:
                        continue  # warming up
                    for which, found in enumerate(times):
                        best[k, which] = min(best.get((k, which), found), found)
                    if k == 1:
                        paired.append(times[1] - times[0])
            added = {k: best[k, 1] - best[k, 0] for k in runs}
            micro = (added[4] - added[1]) / 3
            low, middle, high = (statistics.quantiles(paired, n=10)[i] for i in (0, 4, 8))
            print(f"| {name} | {added[1] - micro:.1f} | {micro:.1f} | {low:.1f} / {middle:.1f} / {high:.1f} |", flush=True)
            for _, run in runs.values():
                run.close()  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
