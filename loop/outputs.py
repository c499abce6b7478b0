"""What a loss function gives and what it weighs, checked before anything is built on it."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .chunk import Chunk
from .goal import plain

if TYPE_CHECKING:
    from .session import Session


def checked(outputs: Any, training: bool = True) -> dict[str, Any]:
    """Return what `loss_fn` gave as a dict with "loss"; raises TypeError or ValueError where that is no mean loss."""
    if isinstance(outputs, Tensor):
        if not outputs.dim() and outputs.requires_grad and outputs.is_floating_point():
            return {"loss": outputs}
        found = {"loss": outputs}
    else:
        if not isinstance(outputs, Mapping):
            raise TypeError(f"loss_fn returned {type(outputs).__name__}; return the mean loss, a scalar tensor, "
                            'or a mapping that holds it as "loss"')  # fmt: skip
        if "loss" not in outputs:
            raise ValueError(f'loss_fn returned a mapping without "loss"; it holds {sorted(map(str, outputs))}')
        found = dict(outputs)
    loss = found["loss"]
    if not isinstance(loss, Tensor):
        raise TypeError(f"the loss is a {type(loss).__name__}, not a tensor; return what the criterion gave, not .item()")
    if loss.dim() or loss.is_complex():
        raise ValueError(f"the loss has shape {tuple(loss.shape)} and type {loss.dtype}; return one real number: loss.mean()")
    if training and not loss.requires_grad:
        raise ValueError("the loss has requires_grad=False, so nothing can be learnt from it; "
                         "is it detached, under no_grad, or are all parameters frozen?")  # fmt: skip
    return found


def weight_of(loop: Session, chunk: Chunk) -> float | Tensor:
    """Return what this micro-batch's mean loss is a mean over; a tensor only where the batch lies on a device."""
    if loop.weigh is None:
        return chunk.size or 0
    weight: Any = loop.weigh(chunk.data)
    if isinstance(weight, Tensor):
        if weight.dim():
            raise ValueError(f"weigh must return a number or a 0-d tensor, not shape {tuple(weight.shape)}; sum it")
        if weight.device.type != "cpu":
            return weight.detach()
        weight = weight.tolist()
    if not isinstance(weight, numbers.Real) or not 0 <= float(weight) < float("inf"):
        raise ValueError(f"weigh must return a finite number that is at least 0, not {weight!r}")
    return float(weight)


def detached(x: Any, path: str) -> Any:
    """Return a tensor without its graph, anything else as it is."""
    return x.detach() if isinstance(x, Tensor) else x


def single(value: Any) -> bool:
    """Tell whether an output is one number, to be averaged and logged."""
    if isinstance(value, Tensor):
        return not value.dim()
    return type(value) in (float, int) or (isinstance(value, numbers.Real) and not isinstance(value, bool))


def as_now(value: Tensor) -> Tensor:
    """Return a 0-d tensor without its graph, a copy of one that was not computed just now, for its program may fill it anew."""
    return value.detach().clone() if value.grad_fn is None else value.detach()


def singles(outputs: dict[str, Any]) -> dict[str, Any]:
    """Return the outputs that are one number, without their graph."""
    if len(outputs) == 1:
        return {"loss": as_now(outputs["loss"])}
    found = {}
    for name, value in outputs.items():
        if isinstance(value, Tensor):
            if not value.dim():
                found[name] = as_now(value)
        elif single(value):
            found[name] = plain(value)
    return found


def weighted(values: list[Any], factors: list[Any]) -> Any:
    """Return the sum of values times factors; a factor known to the host travels as an argument, with no copy."""
    total = values[0] * factors[0]
    for value, factor in zip(values[1:], factors[1:], strict=True):
        if isinstance(total, Tensor) and isinstance(value, Tensor) and not isinstance(factor, Tensor):
            total.add_(value, alpha=factor)
        else:
            total = total + value * factor
    return total
