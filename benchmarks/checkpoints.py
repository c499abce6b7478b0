"""What a checkpoint costs: saves and loads against torch.save, safetensors and torch's distributed checkpoint, and stalls.

python benchmarks/checkpoints.py [--repetitions 9] [--mib 300] [--folder runs/benchmark]

The content is the same for all: a model's weights and AdamW's state, about `--mib` MiB. Each save ends flushed to the
disk. The stall is how long a step waits for a save in the background, beside the bare copy of the same tensors to host
memory and torch's asynchronous distributed checkpoint. Last, what a save adds to each update of a net of a few kilobytes, in
a whole run: hookloop's holds the run (position, generators, the epoch's losses), the hand-written one weights and optimizer.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import os
import shutil
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from machine import machine
from torch import nn

from hookloop.callbacks import Checkpoint, Seed
from hookloop.loop import Loop, store

WIDTH = 1024


def build(mib: int, device: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    layers = max(1, mib * 2**20 // (3 * 4 * WIDTH * (WIDTH + 1)))
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(layers))).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def flush(path: Path) -> None:
    for file in (path, *path.rglob("*")) if path.is_dir() else (path,):
        store.sync(file)


def tensors(x: Any, path: str = "") -> dict[str, torch.Tensor]:
    if isinstance(x, torch.Tensor):
        return {path: x}
    each = x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, list | tuple) else ()
    return {name: t for key, value in each for name, t in tensors(value, f"{path}.{key}").items()}


def size(path: Path) -> int:
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())


def give_back() -> None:
    """Give freed memory back to the system, so that whoever copies next finds what the others found."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def timed(act: Callable[[], Any]) -> float:
    give_back()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


class Contestants:
    """What saves and loads the same content."""

    def __init__(self, folder: Path, mib: int, device: str) -> None:
        self.folder, self.device = folder, device
        self.model, self.optimizer = build(mib, device)
        self.step = 0
        self.saves: dict[str, Callable[[Path], Any]] = {
            "torch.save, flushed": self.torch_save, "hookloop": self.hookloop, "safetensors, flushed": self.safetensors,
            "distributed checkpoint, flushed": self.distributed,
        }  # fmt: skip
        self.loads: dict[str, Callable[[Path], Any]] = {
            "torch.save, flushed": lambda p: torch.load(p, map_location="cpu", weights_only=True),
            "hookloop": lambda p: store.read(p),
            "safetensors, flushed": self.safetensors_load,
            "distributed checkpoint, flushed": lambda p: dcp.load(self.empty(), checkpoint_id=p, no_dist=True),
        }

    def content(self) -> dict[str, Any]:
        named = store.Named(self.model, self.optimizer)
        return {"model": named.model_state(), "optimizer": named.optimizer_state()}

    def empty(self) -> dict[str, Any]:
        return {name: torch.empty_like(t, device="cpu") for name, t in tensors(self.content()).items()}

    def torch_save(self, path: Path) -> None:
        torch.save(self.content(), path)
        flush(path)
        store.sync(path.parent)

    def hookloop(self, path: Path) -> None:
        self.step += 1
        content = self.content()
        store.write(
            path, store.Contents(self.step, content["model"], {"optimizer": content["optimizer"], "callbacks": {}}), [], {}
        )

    def safetensors(self, path: Path) -> None:
        from safetensors.torch import save_file

        save_file({name: t.contiguous() for name, t in tensors(self.content()).items()}, path)
        flush(path)
        store.sync(path.parent)

    def safetensors_load(self, path: Path) -> Any:
        from safetensors.torch import load_file

        return load_file(path)

    def distributed(self, path: Path) -> None:
        dcp.save(tensors(self.content()), checkpoint_id=path, no_dist=True)
        flush(path)


def copy(content: dict[str, torch.Tensor], kept: list[Any]) -> None:
    """The bare copy to host memory: pinned where there is a device to copy from, as fast as it goes; freed outside."""
    for t in content.values():
        kept.append(torch.empty(t.shape, dtype=t.dtype, pin_memory=t.is_cuda).copy_(t, non_blocking=True))
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def stalls(all: Contestants, repetitions: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {
        "bare copy to host memory": [],
        "hookloop, background=True": [],
        "distributed, async_save": [],
    }
    folder = all.folder / "stall"
    save = Checkpoint(folder, every=10**9, keep=1, background=True)
    loop = Loop(all.model, all.optimizer, [save])
    with loop:
        loop._begin(None)
        for _ in range(repetitions):
            content = tensors(all.content())
            kept: list[Any] = []
            found["bare copy to host memory"].append(timed(lambda c=content, k=kept: copy(c, k)))  # type: ignore[misc]
            kept.clear()
            loop.state.step += 1
            loop.state.save("benchmark")
            found["hookloop, background=True"].append(timed(loop._flush))
            save.on_fit_end(loop.state)
            futures: list[Any] = []
            path = all.folder / f"async-{loop.state.step}"
            found["distributed, async_save"].append(timed(
                lambda p=path, c=content, f=futures: f.append(dcp.async_save(c, checkpoint_id=p, no_dist=True))))  # type: ignore[misc]  # fmt: skip
            futures[0].result()
            shutil.rmtree(path)
    return found


def in_a_run(folder: Path, repetitions: int, updates: int = 100) -> dict[str, list[float]]:
    data = [(torch.randn(4, 6), torch.zeros(4, dtype=torch.int64))] * updates

    def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    def run(saves: bool, by_hand: bool) -> None:
        model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
        optimizer = torch.optim.AdamW(model.parameters())
        if not by_hand:
            more = [Checkpoint(folder / "small", every=1)] if saves else []
            Loop(model, optimizer, [Seed(0), *more]).fit(loss_fn, data, epochs=1)
            return
        for number, batch in enumerate(data):
            optimizer.zero_grad()
            loss_fn(model, batch).backward()
            optimizer.step()
            if saves:
                path = folder / "small" / f"{number % 3}"
                path.parent.mkdir(exist_ok=True)
                torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
                flush(path)

    found: dict[str, list[float]] = {"torch.save by hand, flushed": [], "hookloop, Checkpoint(every=1)": []}
    for _ in range(repetitions):
        for by_hand, times in zip((True, False), found.values(), strict=True):
            bare, saving = (timed(lambda saves=saves, by_hand=by_hand: run(saves, by_hand)) for saves in (False, True))  # type: ignore[misc]
            times.append((saving - bare) / updates)
            shutil.rmtree(folder / "small")
    return found


def row(name: str, times: list[float], base: list[float]) -> str:
    ratio = sorted(a / b for a, b in zip(times, base, strict=True))
    middle = f"{statistics.median(ratio):.2f} ({ratio[0]:.2f} to {ratio[-1]:.2f})"
    return f"| {name} | {statistics.median(times) * 1e3:.3g} | {middle} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--mib", type=int, default=300)
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark"))
    given = parser.parse_args()
    warnings.filterwarnings("ignore", module="torch.distributed")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shutil.rmtree(given.folder, ignore_errors=True)
    given.folder.mkdir(parents=True)
    all = Contestants(given.folder, given.mib, device)
    saves: dict[str, list[float]] = {name: [] for name in all.saves}
    loads: dict[str, list[float]] = {name: [] for name in all.saves}
    sizes: dict[str, int] = {}
    for _ in range(given.repetitions + 1):  # the first warms up
        for name, act in all.saves.items():
            path = given.folder / "one"
            os.sync()
            saves[name].append(timed(lambda act=act, path=path: act(path)))  # type: ignore[misc]
            sizes[name] = size(path)
            loads[name].append(timed(lambda name=name, path=path: all.loads[name](path)))  # type: ignore[misc]
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    base = next(iter(saves))
    print(machine() + "\n")
    print("| | save, ms | ratio | load, ms | ratio | MB |\n|---|---|---|---|---|---|")
    for name in saves:
        loaded = row("", loads[name][1:], loads[base][1:])[4:]
        print(row(name, saves[name][1:], saves[base][1:]) + loaded + f" {sizes[name] / 1e6:.1f} |")
    found = stalls(all, given.repetitions + 1)
    bare = next(iter(found.values()))
    print("\n| | a step waits, ms | ratio |\n|---|---|---|")
    for name, times in found.items():
        print(row(name, times[1:], bare[1:]))
    found = in_a_run(given.folder, given.repetitions + 1)
    by_hand = next(iter(found.values()))
    print("\n| | a save of a small net adds, ms | ratio |\n|---|---|---|")
    for name, times in found.items():
        print(row(name, times[1:], by_hand[1:]))
    shutil.rmtree(given.folder)


if __name__ == "__main__":
    main()
