"""What a torchmetric computes, as numbers by name."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..loop.goal import number
from .metric_parts import parts

if TYPE_CHECKING:
    from torchmetrics import Metric


def values(prefix: str, name: str, metric: Metric) -> dict[str, float]:
    """Return what a metric computes, by the names that it is reported as; raises TypeError for what is no numbers."""
    return {prefix + key: value for key, value in _numbers(name, metric.compute(), metric)}


def _numbers(name: str, value: Any, metric: Metric) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for key, one in ((str(key), one) for key, one in value.items()):
            begins = key.startswith(name) and not key[len(name) :][:1].isalnum()  # as a wrapper's own prefix may make it
            yield from _numbers(key if begins else f"{name}_{key}", one, metric)
    elif isinstance(value, Tensor) and value.dim() == 1 and len(value) != 1:
        for i, one in enumerate(value.detach().cpu()):
            yield from _numbers(f"{name}_{i}", one, metric)
    else:
        try:
            yield name, number(name, value)
        except TypeError:
            shape = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""
            raise TypeError(
                f"Metrics can't report {name!r}: {type(metric).__name__} computes a {type(value).__name__}{shape}; give one that "
                "computes a number, a row of them or names to them, or a subclass whose compute() picks some"
            ) from None


def check_values(name: str, metric: Metric) -> None:
    """Refuse a metric that shows before it was fed that it computes no numbers, such as a matrix of counts."""
    stores = any(isinstance(default, list) for part in parts(metric).values() for default in part._defaults.values())
    if stores or next(metric.parameters(), None) is not None:  # needs data, or is costly
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            unfed = metric.clone()
            unfed.reset()
            for part in parts(unfed).values():
                part._to_sync = False  # no word to other ranks, which may not be here
            value = unfed.compute()
        except Exception:
            return
    if isinstance(value, tuple) or (isinstance(value, Tensor) and value.dim() > 1):  # else feeding it may make it numbers
        dict(_numbers(name, value, metric))
