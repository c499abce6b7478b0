"""Random streams: derived from a seed and from where training stands, never from who drew before."""

from __future__ import annotations

import contextlib
import random
import sys
import zlib
from collections.abc import Iterator
from typing import Any

import torch

MASK = 2**64 - 1


def mix(base: int, key: int) -> int:
    """Return 64 well-mixed bits of a base and a key (the finaliser of SplitMix64, Steele et al. 2014)."""
    x = (base + (key + 1) * 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def derive(seed: int, *keys: int | str) -> int:
    """Return a seed of its own for each tuple of keys."""
    for key in keys:
        seed = mix(seed, zlib.crc32(key.encode()) if isinstance(key, str) else key)
    return seed


def generators(device: torch.device) -> list[torch.Generator]:
    """Return torch's global generators that a step on this device draws from."""
    found: list[torch.Generator] = [torch.default_generator]
    if device.type == "mps":
        found.append(torch.mps._get_default_mps_generator())
    elif device.type in ("cuda", "xpu"):
        module = torch.get_device_module(device)
        module.init()
        found.append(module.default_generators[module.current_device() if device.index is None else device.index])
    return found


def seed_host(seed: int) -> None:
    """Seed Python's generator, and NumPy's if it was imported."""
    random.seed(seed)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(seed & 0xFFFFFFFF)


def seed_streams(key: int, streams: list[torch.Generator]) -> None:
    """Seed Python's and NumPy's generators and these of torch's."""
    seed_host(key)
    for generator in streams:
        generator.manual_seed(key)


class Streams:
    """What training draws from, seeded for each micro-batch and update, so that nothing else that draws can move it."""

    UPDATE = (1 << 20) - 1

    def __init__(self, base: int, device: torch.device) -> None:
        self.base, self.generators = base, generators(device)

    def begin(self, attempt: int, number: int) -> None:
        """Seed for micro-batch `number` (or `UPDATE`) of the `attempt`-th update of the run."""
        seed_streams(mix(self.base, (attempt << 20) + number), self.generators)


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy if imported, torch and every accelerator."""
    seed_host(seed)
    torch.manual_seed(seed)


def snapshot(device: torch.device) -> dict[str, Any]:
    """Return the state of every global generator."""
    state: dict[str, Any] = {"torch": [g.get_state() for g in generators(device)], "python": random.getstate()}
    if numpy := sys.modules.get("numpy"):
        state["numpy"] = numpy.random.get_state()
    return state


def as_plain(state: dict[str, Any]) -> dict[str, Any]:
    """Return a snapshot as plain data; the words as tensors, since a list of numbers is saved one by one."""
    version, words, gauss = state["python"]
    found = {"torch": state["torch"], "python": [version, torch.tensor(words), gauss]}
    if "numpy" in state:
        kind, keys, *rest = state["numpy"]
        found["numpy"] = [kind, torch.from_numpy(keys.astype("int64")), *rest]
    return found


def restore(state: dict[str, Any], device: torch.device) -> None:
    """Put the global generators back to a snapshot, plain or not; in older checkpoints the words are lists."""
    for generator, one in zip(generators(device), state["torch"], strict=False):
        generator.set_state(one)
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist() if isinstance(words, torch.Tensor) else words), gauss))
    if "numpy" in state and (numpy := sys.modules.get("numpy")):
        kind, keys, *rest = state["numpy"]
        keys = keys.numpy() if isinstance(keys, torch.Tensor) else keys
        numpy.random.set_state((kind, numpy.array(keys, dtype="uint32"), *rest))


@contextlib.contextmanager
def isolated(device: torch.device, seed: int | None = None) -> Iterator[None]:
    """Run the body on streams of its own: seeded if told, and everything put back after."""
    before = snapshot(device)
    try:
        if seed is not None:
            seed_host(seed)
            for generator in generators(device):
                generator.manual_seed(seed)
        yield
    finally:
        restore(before, device)


def drawing(source: Iterator[Any], stream: dict[str, Any]) -> Iterator[Any]:
    """Yield what an iterator gives, which draws on the host, and goes on from this snapshot as if no one else drew."""
    host = torch.device("cpu")
    while True:
        with isolated(host):
            restore(stream, host)
            try:
                found = next(source)
            except StopIteration:
                return
            stream = snapshot(host)
        yield found
