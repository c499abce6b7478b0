"""A weighted mean of device scalars that waits for no device and rounds the same however often it is saved."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .batch import move


class Mean:
    """Adds up values by weight; every 64 go into a double at once, so that adding one costs two list appends."""

    def __init__(self) -> None:
        self.total: Any = 0.0
        self.weight: Any = 0.0
        self.values: list[Tensor] = []
        self.weights: list[Any] = []

    def add(self, value: Tensor | float, weight: float | Tensor) -> None:
        """Take one value."""
        self.values.append(value if isinstance(value, Tensor) else torch.tensor(float(value), dtype=torch.float64))
        self.weights.append(weight)
        if len(self.values) == 64:
            self.total, self.weight = self._sum()
            self.values, self.weights = [], []

    def _sum(self) -> tuple[Any, Any]:
        if not self.values:
            return self.total, self.weight
        stack = torch.stack(self.values)
        stack = stack.to(torch.float32 if stack.device.type == "mps" else torch.float64)
        if any(isinstance(weight, Tensor) for weight in self.weights):
            weights = torch.stack([torch.as_tensor(w, device=stack.device) for w in self.weights]).to(stack.dtype)
        else:
            weights = torch.tensor(self.weights, dtype=stack.dtype)
            if stack.device.type == "cuda":
                weights = weights.pin_memory().to(stack.device, non_blocking=True)  # a plain copy would wait
        weights = weights.to(stack.device)
        return self.total + (stack * weights).sum(), self.weight + weights.sum()

    def value(self) -> Any:
        """Return the mean so far (NaN of nothing), a tensor on the values' device."""
        total, weight = self._sum()
        return total / weight if self.values or isinstance(total, Tensor) else float("nan")

    def sums(self) -> tuple[float, float]:
        """Return the sum of values times weights, and of weights, as the host has them."""
        total, weight = self._sum()
        return float(total), float(weight)

    @classmethod
    def joined(cls, states: list[dict[str, Any]]) -> Mean:
        """Return the mean over the values of several."""
        found = cls()
        for state in states:
            one = cls()
            one.load_state_dict(state, torch.device("cpu"))
            total, weight = one.sums()
            found.total, found.weight = found.total + total, found.weight + weight
        found.total, found.weight = (torch.tensor(x, dtype=torch.float64) for x in (found.total, found.weight))
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return sums and what is not yet added to them."""
        values: Any = torch.stack(self.values) if self.values else []  # one tensor is saved as fast as one of its numbers
        return {"total": self.total, "weight": self.weight, "values": values, "weights": self.weights}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Take them back."""
        moved = move(state, device)
        self.total, self.weight = moved["total"], moved["weight"]
        self.values, self.weights = list(moved["values"]), list(moved["weights"])
