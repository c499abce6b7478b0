"""Search the rate, batch size and weight decay of the digits net: a coarse grid, a finer search around its best, and the test.

What is best is chosen on one half of the held-out digits, and held against the settings of digits.py on the other, over seeds
that the search did not see; the closing table says whether chance explains the difference. Stop it with Ctrl-C and start it
again with the same command: it goes on. `--jobs 2` takes about two minutes on two cores.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

import torch
from digits import build, data, loss_fn
from torch.utils.data import DataLoader, Subset
from torchmetrics.classification import MulticlassAccuracy

from hookloop.callbacks import Metrics, Schedule, Warmup, WeightDecay
from hookloop.loop import Callback, Loop, State
from hookloop.loop.study import grid_search, refine

COARSE = {"rate": [3e-4, 3e-3, 3e-2], "batch": [16, 64], "decay": [0.0, 0.1]}
OWN = {"rate": 3e-3, "batch": 32, "decay": 0.01}  # of digits.py
EPOCHS = 5


@functools.cache  # once for all trials of a process
def parts() -> tuple[Any, Any, Any]:
    train, held = data()
    half = len(held.dataset) // 2  # type: ignore[arg-type]
    return train.dataset, Subset(held.dataset, range(half)), Subset(held.dataset, range(half, 2 * half))


def train(settings: Any, callbacks: list[Callback], half: int = 1) -> State:
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings["rate"])
    more = [WeightDecay(default=settings["decay"]), Warmup(0.1), Schedule("cosine"),
            Metrics({"accuracy": MulticlassAccuracy(10, average="micro")})]  # fmt: skip
    loader = DataLoader(parts()[0], settings["batch"], shuffle=True)
    return Loop(model, optimizer, [*callbacks, *more]).fit(loss_fn, loader, DataLoader(parts()[half], 180), epochs=EPOCHS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--folder", type=Path, default=Path("runs/search"), help="trials, tables and TensorBoard files")
    given = parser.parse_args()
    torch.set_num_threads(1)
    coarse = grid_search(train, COARSE, storage=given.folder / "coarse", jobs=given.jobs)
    print(coarse, end="\n\n")
    fine = grid_search(train, refine(coarse, COARSE, keep=1), storage=given.folder / "fine", jobs=given.jobs)
    print(fine, end="\n\n")
    best = min(coarse.best, fine.best, key=lambda row: row.mean)
    print(f"best: {best.settings}, against {OWN} of digits.py, on digits that took no part in the choice, seeds 100 to 104:\n")
    both = {f"digits.py: {OWN}": OWN, f"found: {best.settings}": best.settings}
    last = grid_search(lambda settings, callbacks: train(both[settings["which"]], callbacks, half=2), {"which": list(both)},
                       storage=given.folder / "test", seeds=5, seed=100, prune=False)  # fmt: skip
    print(last)
    print(f"\nlook at it with: tensorboard --logdir {given.folder}")


if __name__ == "__main__":
    main()
