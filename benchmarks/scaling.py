"""What hookloop adds to a step of DistributedDataParallel, with 1, 2 and 4 ranks on one machine (gloo, CPU).

    python benchmarks/scaling.py [--quick] [--repetitions N] [--steps N] [--out FILE]

An MLP of 4 layers of `WIDTH`, batch 64 a rank, AdamW, two micro-batches a step. Four loops take turns in each repetition:
the loop written by hand (`no_sync` in the first micro-batch), hookloop's bare verbs, hookloop with Seed, Warmup, Schedule and
ClipGradients beside the hand-written loop with the same duties. A figure is the median over repetitions of a step's time on
the slowest rank, from the step after the first `FIRST` on, and its ratio to the hand-written loop of the same repetition with
the 10th and 90th percentile; what comes before, once a run, is a column of its own. Ranks share the machine's cores, so that
what a message costs is mostly the time until the other process is given one. `--quick` shrinks all: its times mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import multiprocessing as mp
import os
import socket
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from machine import facts, header
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hookloop.callbacks import ClipGradients, GradientAccumulation, Schedule, Seed, Warmup
from hookloop.loop import Loop

WIDTH, BATCH, MICROS, FIRST = 512, 64, 2, 3
Batch = tuple[torch.Tensor, torch.Tensor]


class Data:
    """A loader's worth of batches that notes when the first steps are behind."""

    def __init__(self, batches: list[Batch], steps: int) -> None:
        self.batches, self.steps, self.since = batches, steps, 0.0

    def __len__(self) -> int:
        return self.steps * MICROS

    def __iter__(self) -> Iterator[Batch]:
        for i in range(len(self)):
            if i == FIRST * MICROS:
                self.since = time.perf_counter()
            yield self.batches[i % len(self.batches)]


def model_of(width: int, world: int) -> Any:
    torch.manual_seed(0)
    layers = [layer for _ in range(4) for layer in (nn.Linear(width, width), nn.ReLU())]
    net = nn.Sequential(*layers, nn.Linear(width, 10))
    return DistributedDataParallel(net) if world > 1 else net


def loss_fn(model: Any, batch: Batch) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def by_hand(model: Any, data: Data, duties: bool, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 20) * (1 - step / steps))
    batches = iter(data)
    for _ in range(steps):
        optimizer.zero_grad()
        for i in range(MICROS):
            alone = model.no_sync() if i + 1 < MICROS and hasattr(model, "no_sync") else contextlib.nullcontext()
            with alone:
                (loss_fn(model, next(batches)) / MICROS).backward()
        if duties:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if duties:
            schedule.step()


def ours(model: Any, data: Data, duties: bool, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    callbacks: list[Any] = [GradientAccumulation(MICROS)]
    callbacks += [Seed(0), Warmup(20), Schedule("linear"), ClipGradients(1.0)] if duties else []
    Loop(model, optimizer, callbacks).fit(loss_fn, data, steps=steps)


LOOPS = {"by hand": (by_hand, False), "bare verbs": (ours, False),
         "by hand, with duties": (by_hand, True), "callbacks": (ours, True)}  # fmt: skip


def rank_run(rank: int, world: int, port: int, told: argparse.Namespace, out: Any) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", rank=rank, world_size=world, timeout=datetime.timedelta(seconds=120))
    torch.manual_seed(rank)
    batches = [(torch.randn(BATCH, told.width), torch.randint(0, 10, (BATCH,))) for _ in range(8)]
    rows: list[dict[str, tuple[float, float]]] = []
    for repetition in range(told.repetitions + 1):  # the first warms up
        row = dict[str, tuple[float, float]]()
        for name in [*LOOPS][:: 1 if repetition % 2 else -1]:
            run, duties = LOOPS[name]
            model, data = model_of(told.width, world), Data(batches, told.steps)
            if world > 1:
                dist.barrier()
            start = time.perf_counter()
            run(model, data, duties, told.steps)
            end = time.perf_counter()
            row[name] = ((end - data.since) / (told.steps - FIRST), data.since - start)
        rows.append(row)
    if world > 1:
        every: list[Any] = [None] * world
        dist.all_gather_object(every, rows)
        rows = [{name: (max(one[i][name][0] for one in every), max(one[i][name][1] for one in every)) for name in LOOPS}
                for i in range(len(rows))]  # fmt: skip
        dist.destroy_process_group()
    if rank == 0:
        out.put(rows[1:])


def measure(world: int, told: argparse.Namespace) -> dict[str, Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn = mp.get_context("spawn")
    out = spawn.Queue()
    ranks = [spawn.Process(target=rank_run, args=(rank, world, port, told, out), daemon=True) for rank in range(world)]
    for process in ranks:
        process.start()
    rows = out.get(timeout=600)
    for process in ranks:
        process.join(60)
    found: dict[str, Any] = {}
    for name, base in (("bare verbs", "by hand"), ("callbacks", "by hand, with duties")):
        ratios = sorted(row[name][0] / row[base][0] for row in rows)
        more, once = (statistics.median(row[name][i] - row[base][i] for row in rows) for i in (0, 1))
        found[name] = {
            "ms": 1e3 * statistics.median(row[name][0] for row in rows),
            "by_hand_ms": 1e3 * statistics.median(row[base][0] for row in rows),
            "ratio": statistics.median(ratios), "from": ratios[len(ratios) // 10], "to": ratios[-1 - len(ratios) // 10],
            "more_us": 1e6 * more, "once_ms": 1e3 * once,
        }  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--out", type=Path)
    told = parser.parse_args()
    if told.quick:
        told.repetitions, told.steps, told.width, told.worlds = 2, FIRST + 3, 16, [1, 2]
    about = facts()
    print(header(about))
    print(f"MLP of 4 x {told.width}, batch {BATCH} a rank, {MICROS} micro-batches a step, {told.steps} steps, "
          f"{told.repetitions} repetitions")  # fmt: skip
    print(
        "| ranks | loop | ms a step | by hand | ratio (10th to 90th percentile) | more, us a step | once, ms more |\n"
        "|---|---|---|---|---|---|---|"
    )
    results = {}
    for world in told.worlds:
        results[world] = measure(world, told)
        for name, one in results[world].items():
            print(f"| {world} | {name} | {one['ms']:.2f} | {one['by_hand_ms']:.2f} | {one['ratio']:.3f} ({one['from']:.3f} to "
                  f"{one['to']:.3f}) | {one['more_us']:.0f} | {one['once_ms']:.0f} |")  # fmt: skip
            sys.stdout.flush()
    if told.out is not None:
        told.out.write_text(json.dumps({"about": about, "settings": vars(told) | {"out": None}, "results": results}, indent=1))


if __name__ == "__main__":
    main()
