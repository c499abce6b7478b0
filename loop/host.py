"""Single numbers brought from a device to the host without a training step waiting for them."""

from collections import deque
from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch


class HostCopy:
    """`put` queues copies behind the work that makes the numbers; `take` gives, in order, what has arrived, as floats."""

    def __init__(self) -> None:
        self.pending: deque[tuple[Any, dict[str, Any], list[torch.Event]]] = deque()

    def put(self, about: Any, values: Mapping[str, Any], most_dims: int = 0) -> None:
        """Capture each number and real tensor of at most so many dimensions as it is now, and leave out the rest."""
        found, events = dict[str, Any](), list[torch.Event]()
        for name, value in values.items():
            if isinstance(value, Real):
                found[name] = value
            elif isinstance(value, torch.Tensor) and value.dim() <= most_dims and not value.is_complex():
                pinned = value.device.type in ("cuda", "xpu")
                host = torch.empty(value.shape, dtype=value.dtype, device="cpu", pin_memory=pinned)
                found[name] = host.copy_(value.detach(), non_blocking=pinned)
                if pinned:
                    events.append(torch.Event(value.device.type))
                    events[-1].record(torch.accelerator.current_stream(value.device))
        self.pending.append((about, found, events))

    def take(self, all: bool = False) -> list[tuple[Any, dict[str, Any]]]:
        """Return pairs (about, name -> float, list, or tensor of 3 dimensions on) of what arrived; `all` waits for the rest."""
        done = []
        while self.pending and (all or not [event for event in self.pending[0][2] if not event.query()]):
            about, found, events = self.pending.popleft()
            for event in events:
                if not event.query():
                    event.synchronize()
            plain = {k: v.tolist() if hasattr(v, "tolist") and v.ndim < 3 else v for k, v in found.items()}
            done.append((about, {k: v if isinstance(v, list | torch.Tensor) else float(v) for k, v in plain.items()}))
        return done
