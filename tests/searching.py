"""Trainings for the tests of search, in a module so that other processes find them; run as a program it takes part in one."""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import torch
from helpers import loader, loss_fn, net

from hookloop.loop import Loop
from hookloop.loop.study import grid_search, integers, log_uniform, random_search

GRID = {"rate": [1e-3, 1e-2, 1e-1], "size": [4, 8], "decay": [0.0, 0.1]}
RANGES = {"rate": log_uniform(1e-4, 1e-1), "size": integers(4, 16, multiple_of=4), "decay": [0.0, 0.1]}


def train(settings: Any, callbacks: Any, epochs: int = 2, slow: float = 0.0) -> Any:
    time.sleep(slow)
    model = net(seed=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings["rate"], weight_decay=settings["decay"])
    val = loader(20, 8, shuffle=False)
    return Loop(model, optimizer, callbacks).fit(loss_fn, loader(30, settings["size"]), val, epochs=epochs)


def slowly(settings: Any, callbacks: Any) -> Any:
    """Note who began it, when it is due to be looked at."""
    with open(Path(os.environ["NOTES"]) / f"{os.getpid()}", "a") as file:
        file.write(f"{settings.number}\n")
    return train(settings, callbacks, slow=0.05)


def number(settings: Any, callbacks: Any) -> float:
    """No training at all."""
    return float(settings["x"])


SIZES: list[int] = []
ALIVE: weakref.WeakSet[Any] = weakref.WeakSet()


def heavy(settings: Any, callbacks: Any) -> float:
    """A model of four MiB; every third trial fails with it in its hands."""
    gc.collect()
    SIZES.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
    model = net().append(torch.nn.Linear(3, 2**18))
    ALIVE.add(model)
    loop = Loop(model, torch.optim.SGD(model.parameters(), lr=0.1), callbacks)
    loop.fit(lambda m, b: {"loss": m(b[0]).mean()}, loader(8, 8), loader(8, 8), epochs=1)
    if settings["x"] % 3 == 0:
        raise RuntimeError(f"no luck with {len(ALIVE)}")
    return float(len(ALIVE))


def poison(settings: Any, callbacks: Any) -> float:
    """The last one takes its process with it, as what the system kills for its memory does."""
    if settings["x"] == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return float(settings["x"])


def endless(settings: Any, callbacks: Any) -> float:
    """Note who began it, and wait to be ended."""
    (Path(os.environ["NOTES"]) / str(os.getpid())).touch()
    time.sleep(60)
    return 0.0


def leaves(settings: Any, callbacks: Any) -> float:
    sys.exit("no data")


def vanishes(settings: Any, callbacks: Any) -> float:
    if settings["x"] == 1:
        os._exit(0)
    return float(settings["x"])


def main() -> None:
    """Take part: `searching.py <method> <folder> <train> <trials>`, and print what all of it came to."""
    method, folder, name, count = sys.argv[1:]
    torch.set_num_threads(1)
    if method == "jobs":
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job in the background ignores it
        grid_search(globals()[name], {"x": list(range(int(count)))}, storage=folder, jobs=2, prune=False)
        return
    if method == "memory":
        found = grid_search(heavy, {"x": list(range(int(count)))}, prune=False)
        print(json.dumps([SIZES, max(row.mean for row in found.trials if row.values)]))
        return
    search = {"grid": lambda *a, **k: grid_search(*a, **k), "random": lambda *a, **k: random_search(*a, int(count), **k)}[
        method
    ]
    space = {"x": list(range(int(count)))} if name == "number" else GRID if method == "grid" else RANGES
    found = search(globals()[name], space, storage=folder, interval=0.5, tries=50, prune=False,
                   metric="x" if name == "number" else "val_loss")  # fmt: skip
    print(json.dumps([[row.number, row.state, row.settings, row.values] for row in found.trials]))


if __name__ == "__main__":
    main()
