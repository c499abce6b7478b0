"""Growing the batch in place of decaying the rate, on scikit-learn's digits: accuracy reached, and updates it takes.

python benchmarks/batch_growth.py [--seeds 5] [--epochs 24] [--rate 0.04]

Four decay schedules, each over all seeds; the best by mean final validation accuracy (ties: lower validation loss) is
then run again with a constant rate and a batch that multiplies at each epoch at which that schedule divides. Epochs,
seeds, initial weights and data are the same. Neither decay nor growth is run too, to show what there is to gain.
(Smith et al. 2018, https://arxiv.org/abs/1711.00489)
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from machine import machine
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from hookloop.callbacks import DynamicBatchSize, Metrics, Schedule, Seed
from hookloop.loop import Callback, Loop

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from digits import data, loss_fn

BATCH = 16
# (stretches of equal length, factor between two): whichever wins, its growth makes fewer than half the updates, and its
# last batch, at most 16 * 32, fits into the 1437 training samples, so that the batch grows as often as the rate decays
SCHEDULES = ((6, 2), (4, 2), (3, 3), (3, 5))


class Run(NamedTuple):
    kind: str  # "decay", "growth" or "neither"
    every: int
    factor: int
    epochs: int
    rate: float

    def name(self) -> str:
        text = {"decay": f"rate / {self.factor}", "growth": f"batch x {self.factor}"}.get(self.kind)
        return f"{text} every {self.every} epochs" if text else "constant rate and batch"


class Result(NamedTuple):
    updates: int
    accuracy: float
    loss: float


def build() -> nn.Module:
    # smaller than the example's net, which leaves too few errors to compare, and without batch norm and dropout, so
    # that the size of the batch acts through the updates alone
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16 * 2 * 2, 10),
    )  # fmt: skip


def train(run: Run, number: int) -> Result:
    torch.set_num_threads(1)
    seed = Seed(number)  # before the model, so that it covers the initial weights
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=run.rate, momentum=0.9)
    given, val = data()
    callbacks: list[Callback] = [seed, Metrics({"accuracy": MulticlassAccuracy(10, average="micro")})]
    if run.kind == "decay":
        callbacks.append(Schedule(torch.optim.lr_scheduler.StepLR(optimizer, run.every, 1 / run.factor), on="epoch"))
    if run.kind == "growth":
        last = BATCH * run.factor ** (run.epochs // run.every - 1)
        callbacks.append(DynamicBatchSize(BATCH, last, growth=run.factor, every=run.every))
    loop = Loop(model, optimizer, callbacks)
    state = loop.fit(loss_fn, DataLoader(given.dataset, BATCH, shuffle=True), epochs=run.epochs)
    metrics = loop.evaluate(loss_fn, val)
    return Result(state.step, metrics["val_accuracy"], metrics["val_loss"])


def row(run: Run, results: list[Result]) -> str:
    found, loss = [r.accuracy for r in results], statistics.mean(r.loss for r in results)
    return (f"| {run.name()} | {results[0].updates:,} | {statistics.mean(found):.2%} | {min(found):.2%} .. {max(found):.2%} "
            f"| {100 * statistics.stdev(found):.2f} | {loss:.4f} |")  # fmt: skip


def closing_line(decay: list[Result], growth: list[Result]) -> str:
    reference = [r.accuracy for r in decay]
    mean, spread = statistics.mean(r.accuracy for r in growth), statistics.stdev(reference)
    difference, ratio = mean - statistics.mean(reference), growth[0].updates / decay[0].updates
    within, half = abs(difference) <= spread and min(reference) <= mean <= max(reference), ratio <= 0.5
    return (f"growth against the best decay: {100 * difference:+.2f} points of mean accuracy, which is "
            f"{'within' if within else 'OUTSIDE'} the seed-to-seed spread (standard deviation {100 * spread:.2f} points, and "
            f"{min(reference):.2%} .. {max(reference):.2%}); {ratio:.3f} of the updates, "
            f"{'at most' if half else 'MORE THAN'} half: the claim {'holds' if within and half else 'DOES NOT HOLD'}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="at least 2")
    parser.add_argument("--epochs", type=int, default=24, help="a multiple of 12, so that all stretches are equal")
    parser.add_argument("--rate", type=float, default=0.04, help="the initial rate of all runs")
    found = parser.parse_args()
    if found.seeds < 2 or found.epochs < 12 or found.epochs % 12:
        parser.error("--seeds must be at least 2 and --epochs a multiple of 12")
    start = time.perf_counter()
    decays = [Run("decay", found.epochs // n, factor, found.epochs, found.rate) for n, factor in SCHEDULES]
    neither = Run("neither", 1, 1, found.epochs, found.rate)
    results: dict[Run, list[Result]] = {}
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:

        def measure(*runs: Run) -> None:
            waiting = {run: [pool.submit(train, run, number) for number in range(found.seeds)] for run in runs}
            results.update({run: [future.result() for future in futures] for run, futures in waiting.items()})

        measure(neither, *decays)
        best = max(decays, key=lambda run: (sum(r.accuracy for r in results[run]), -sum(r.loss for r in results[run])))
        measure(growth := best._replace(kind="growth"))
    print("python benchmarks/batch_growth.py", f"--seeds {found.seeds} --epochs {found.epochs} --rate {found.rate}")
    print(machine())
    print(f"digits, SGD with momentum 0.9, rate {found.rate}, batch {BATCH} at first; {time.perf_counter() - start:.0f} s\n")
    print("| | updates | mean accuracy | min .. max | standard deviation, points | mean loss |\n|---|---|---|---|---|---|")
    print("\n".join(row(run, results[run]) for run in (neither, *decays, growth)))
    print(f"\nbest decay: {best.name()}; {closing_line(results[best], results[growth])}")


if __name__ == "__main__":
    main()
