"""What an accelerator tells about its memory and time without being waited for."""

from __future__ import annotations

from typing import Any

import torch

TEXTS = ("CUDA out of memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED",
         "HIP out of memory", "XPU out of memory", "MPS backend out of memory", "DefaultCPUAllocator: can't allocate memory",
         "DefaultCPUAllocator: not enough memory")  # fmt: skip


def out_of_memory(error: BaseException | None) -> bool:
    """Tell whether an error, or what it was raised from, is a device's or the CPU allocator's lack of memory."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError):
            return True
        if isinstance(error, RuntimeError) and any(text in str(error) for text in TEXTS):
            return True
        error = error.__cause__
    return False


class DeviceMemory:
    """What an accelerator's allocator and clock tell without waiting for the device, in bytes and seconds."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.module = device, torch.get_device_module(device)

    def capacity(self) -> int:
        """Return what this process may hold: what is free, with what its allocator keeps, under its own limit."""
        free, total = self.module.mem_get_info(self.device)
        share = getattr(self.module, "get_per_process_memory_fraction", lambda device: 1.0)(self.device)
        return min(int(free + self.module.memory_reserved(self.device)), int(share * total))

    def allocated(self) -> int:
        """Return what tensors hold now."""
        return int(self.module.memory_allocated(self.device))

    def reset(self) -> None:
        """Begin a new peak."""
        self.module.reset_peak_memory_stats(self.device)

    def peak(self) -> int:
        """Return the most that tensors held since `reset`."""
        return int(self.module.max_memory_allocated(self.device))

    def retries(self) -> int:
        """Return how often the allocator had to give back what it kept to find room: memory is full or in pieces."""
        return int(self.module.memory_stats(self.device).get("num_alloc_retries", 0))

    def mark(self) -> Any:
        """Return a moment on the device's clock."""
        event = torch.Event(self.device.type, enable_timing=True)
        event.record(torch.accelerator.current_stream(self.device))
        return event

    def seconds(self, start: Any, end: Any) -> float | None:
        """Return the time between two moments, None while the device has not reached the second."""
        return float(start.elapsed_time(end)) / 1e3 if end.query() else None


def memory_of(device: torch.device) -> DeviceMemory | None:
    """Return what tells this device's memory, None where nothing does."""
    known = device.type != "cpu" and hasattr(torch.get_device_module(device), "mem_get_info")
    return DeviceMemory(device) if known else None


def too_small(tried: list[int], device: torch.device) -> str:
    """Return what to say where no smaller size is left, with the allocator's own account where there is one."""
    tell = getattr(torch.get_device_module(device), "memory_summary", None)
    what = "one sample" if tried[-1] == 1 else f"{tried[-1]} samples"
    return (f"memory is too small for {what} (sizes tried: {', '.join(map(str, tried))}): use MicroBatch('auto'), a smaller "
            "model or input, activation checkpointing or a lower precision"
            + (f"\n{tell(device, abbreviated=True)}" if tell else ""))  # fmt: skip
