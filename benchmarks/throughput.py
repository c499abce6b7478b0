"""Samples a second of a full set of callbacks against the hand-written loop, on the device there is.

python benchmarks/throughput.py [--repetitions 7] [--steps 60]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from typing import Any

import torch
from machine import machine
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hookloop.callbacks import (
    ClipGradients,
    GradientAccumulation,
    MicroBatch,
    Seed,
    TensorBoard,
    Warmup,
    WeightDecay,
)
from hookloop.loop import Loop

BATCH, ACCUMULATE, FEATURES = 128, 4, 256


def build(device: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    layers = [layer for _ in range(4) for layer in (nn.Linear(FEATURES, FEATURES), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(FEATURES, 10)).to(device)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3, fused=device != "cpu")


def data(steps: int, device: str) -> DataLoader[Any]:
    count = steps * BATCH * ACCUMULATE
    return DataLoader(TensorDataset(torch.randn(count, FEATURES), torch.randint(0, 10, (count,))), BATCH, shuffle=True)


def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def wait(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


def hand_written(steps: int, device: str) -> float:
    """The forty lines: accumulation, warmup, clipping, two decay groups, TensorBoard."""
    from torch.utils.tensorboard import SummaryWriter

    model, _ = build(device)
    flat = [p for p in model.parameters() if p.ndim <= 1]
    rest = [p for p in model.parameters() if p.ndim > 1]
    groups = [{"params": rest, "weight_decay": 0.01}, {"params": flat, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, fused=device != "cpu")
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min(1.0, (t + 1) / 100))
    loader, done = data(steps, device), 0
    with tempfile.TemporaryDirectory() as folder, SummaryWriter(folder) as writer:
        wait(device)
        start = time.perf_counter()
        for i, batch in enumerate(loader):
            x, y = (part.to(device, non_blocking=True) for part in batch)
            loss = loss_fn(model, (x, y)) / ACCUMULATE
            loss.backward()
            if (i + 1) % ACCUMULATE == 0:
                norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                warmup.step()
                optimizer.zero_grad()
                done += 1
                if done % 50 == 0:
                    writer.add_scalar("train/loss", float(loss) * ACCUMULATE, done)
                    writer.add_scalar("batch/grad_norm", float(norm), done)
        wait(device)
        return steps * BATCH * ACCUMULATE / (time.perf_counter() - start)


def ours(steps: int, device: str) -> float:
    seed = Seed(0)
    model, optimizer = build(device)
    with tempfile.TemporaryDirectory() as folder:
        shaping = [WeightDecay(), Warmup(100), GradientAccumulation(ACCUMULATE), MicroBatch("auto"), ClipGradients(1.0)]
        loop = Loop(model, optimizer, [seed, *shaping, TensorBoard(folder, every=50, grad_norm=True)])
        loader = data(steps, device)
        wait(device)
        start = time.perf_counter()
        state = loop.fit(loss_fn, loader, epochs=1)
        wait(device)
        return state.samples / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hand_written(5, device), ours(5, device)
    pairs = [(hand_written(arguments.steps, device), ours(arguments.steps, device)) for _ in range(arguments.repetitions)]
    ratios = sorted(b / a for a, b in pairs)
    print(machine())
    print(f"MLP 4x{FEATURES}, batch {BATCH}, accumulation {ACCUMULATE}, on {device}, {arguments.repetitions} pairs")
    print(f"hand-written {statistics.median(a for a, _ in pairs):,.0f} samples/s, "
          f"all callbacks {statistics.median(b for _, b in pairs):,.0f}; ratio {statistics.median(ratios):.3f} "
          f"(from {ratios[0]:.3f} to {ratios[-1]:.3f})")  # fmt: skip


if __name__ == "__main__":
    main()
