"""A copy of plain data in host memory, at one moment: what training does next does not reach it."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch


class Copies:
    """Copies tensors to the host, those that share memory into memory that they share; `wait` until all have arrived.

    From a CUDA or XPU device copies are queued behind the work that is under way, so nothing waits for them here.
    """

    def __init__(self) -> None:
        self._storages: dict[int, tuple[Any, Any]] = {}
        self._events: dict[torch.device, torch.Event] = {}

    def of(self, x: Any) -> Any:
        """Return the copy."""
        if isinstance(x, torch.Tensor):
            copied: Any = self._tensor(x.detach())
            if type(x) is torch.nn.Parameter:
                copied = torch.nn.Parameter(copied, x.requires_grad)
            vars(copied.requires_grad_(x.requires_grad)).update(self.of(vars(x)))
            return copied
        if isinstance(x, dict):
            copied = type(x)((key, self.of(value)) for key, value in x.items())
            if isinstance(x, OrderedDict):
                vars(copied).update(vars(x))  # a state dict's versions of modules
            return copied
        return type(x)(self.of(value) for value in x) if type(x) in (list, tuple) else x

    def wait(self) -> None:
        """Return when all that was copied is there."""
        for event in self._events.values():
            event.synchronize()

    def _tensor(self, x: torch.Tensor) -> torch.Tensor:
        if type(x) is not torch.Tensor or x.layout != torch.strided or x.is_meta or x.is_nested or x.is_quantized \
                or x.is_conj() or x.is_neg() or x.device.type not in ("cpu", "cuda", "xpu"):  # fmt: skip
            return x if x.is_meta else x.to("cpu", copy=True)
        source = x.untyped_storage()
        if source._cdata not in self._storages:
            pinned = x.device.type != "cpu"
            if pinned:
                host = torch.empty(source.nbytes(), dtype=torch.uint8, pin_memory=True).untyped_storage()
                host.copy_(source, non_blocking=True)
            else:
                host = source.clone()
            self._storages[source._cdata] = source, host  # kept, so that no other storage comes by this address
            if pinned:
                event = self._events.setdefault(x.device, torch.Event(x.device.type))
                event.record(torch.accelerator.current_stream(x.device))
        host = self._storages[source._cdata][1]
        return torch.empty(0, dtype=x.dtype).set_(host, x.storage_offset(), x.size(), x.stride())
