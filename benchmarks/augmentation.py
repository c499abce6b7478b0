"""What it costs that random augmentation is drawn from (seed, epoch, batch) and so resumes exactly, with any workers.

Reading alone: a model that does nothing, samples of 3x32x32 that are flipped, shifted and jittered with draws from
Python's, NumPy's and torch's global generators, and, as the worst case, samples that cost nothing. Each repetition runs
a plain `for batch in loader` with a hand-written step and then ours, over the same data set, with 0 and with 2 workers.

    python benchmarks/augmentation.py [--repetitions 9] [--samples 4096]
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
import timeit
from typing import Any

import numpy as np
import torch
from machine import machine
from overhead import Nothing, loss_fn
from torch.utils.data import DataLoader, Dataset

from hookloop.callbacks import Seed
from hookloop.loop import Loop
from hookloop.loop.rng import seed_streams


class Images(Dataset[Any]):
    def __init__(self, count: int, augmented: bool) -> None:
        self.x, self.augmented = torch.rand(256, 3, 32, 32), augmented
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> torch.Tensor:
        image = self.x[i % 256]
        if not self.augmented:
            return image
        if random.random() < 0.5:
            image = image.flip(-1)
        across, down = (int(n) for n in np.random.randint(-4, 5, 2))
        return image.roll((down, across), (-2, -1)) + 0.1 * torch.randn(3, 1, 1)


def hand_written(loader: DataLoader[Any]) -> None:
    model = Nothing()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in loader:
        optimizer.zero_grad()
        loss_fn(model, batch.to("cpu")).backward()
        optimizer.step()


def ours(loader: DataLoader[Any]) -> None:
    seed, model = Seed(0), Nothing()
    Loop(model, torch.optim.SGD(model.parameters(), lr=0.1), [seed]).fit(loss_fn, loader, epochs=1)


def timed(run: Any, loader: DataLoader[Any]) -> float:
    start = time.perf_counter()
    run(loader)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--samples", type=int, default=4096)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{machine()}; batches of 64, {arguments.repetitions} pairs after one to warm up\n")
    alone = min(timeit.repeat(lambda: seed_streams(1234, [torch.default_generator]), number=1000, repeat=20)) * 1e3
    print(f"seeding Python's, NumPy's and torch's generators, once for each batch: {alone:.1f} us\n")
    print("| samples | workers | hand-written, samples/s | hookloop, samples/s | ratio: median, range | us a batch |")
    print("|---|---|---|---|---|---|")
    for augmented in (True, False):
        for workers in (0, 2):
            loader = DataLoader(Images(arguments.samples, augmented), 64, shuffle=True, num_workers=workers)
            pairs = [(timed(hand_written, loader), timed(ours, loader)) for _ in range(arguments.repetitions + 1)][1:]
            ratios = sorted(a / b for a, b in pairs)
            plain, own = (statistics.median(side) for side in zip(*pairs, strict=True))
            added = statistics.median(b - a for a, b in pairs) / len(loader) * 1e6
            print(f"| {'augmented' if augmented else 'of no cost'} | {workers} | {arguments.samples / plain:,.0f} | "
                  f"{arguments.samples / own:,.0f} | {statistics.median(ratios):.3f}, {ratios[0]:.3f} to {ratios[-1]:.3f} | "
                  f"{added:.0f} |")  # fmt: skip


if __name__ == "__main__":
    main()
