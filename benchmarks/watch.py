"""What times a run: it is told of each update, and waits for the device only where the timed part begins and ends."""

from __future__ import annotations

import contextlib
import io
import logging
import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch

PROFILED = 4  # updates that a profiled run looks at
END = "the profiled part ends"
KINDS = {
    "launches": ("cudaLaunch", "cuLaunch", "cudaGraphLaunch"),
    "copies": ("cudaMemcpy", "cuMemcpy"),
    "synchronisations": ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cuStreamSynchronize",
                         "cuCtxSynchronize", "cuEventSynchronize"),
}  # fmt: skip


class Watch:
    """Counts updates: `warm` of them, then `timed` between two waits for the device; nothing is timed of a profiled run."""

    def __init__(self, device: torch.device, warm: int, timed: int, profiled: bool = False) -> None:
        self.device, self.warm, self.total, self.done = device, warm, warm + timed, 0
        self.timed, self.seconds, self.reserved = timed, 0.0, 0  # the most bytes of a GPU that were kept
        self.profile = both() if profiled else None

    @property
    def ended(self) -> bool:
        return self.done >= self.total

    def tick(self) -> None:
        """Take note of an update."""
        self.done += 1
        if self.device.type == "cuda" and (self.done <= self.warm or self.ended):  # callbacks may begin a new peak
            self.reserved = max(self.reserved, torch.cuda.max_memory_reserved(self.device))
        if self.done == self.warm:
            wait(self.device)
            if self.profile is not None:
                self.profile.start()
            self.since = time.perf_counter()
        elif self.done == self.total:
            if self.profile is not None:
                with torch.profiler.record_function(END):
                    pass
                self.profile.stop()
            wait(self.device)
            self.seconds = time.perf_counter() - self.since

    def counts(self, parts: int) -> dict[str, float]:
        """Return what a profiled run asked of the device, by kind, for each of the timed updates' `parts`."""
        assert self.profile is not None
        return count(self.profile, self.timed * parts)


def both() -> torch.profiler.profile:
    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA])


def count(profile: Any, parts: int) -> dict[str, float]:
    """Return calls by kind and part, up to the mark: the profiler itself waits for the device behind it."""
    events = profile.events()
    end = max(event.time_range.start for event in events if event.name == END)
    names = [event.name for event in events if event.time_range.start <= end]
    return {kind: sum(name.startswith(starts) for name in names) / parts for kind, starts in KINDS.items()}


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what loops say from the table."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(disabled)
