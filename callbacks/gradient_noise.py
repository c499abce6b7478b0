"""The numbers behind NoiseScale: estimates from the norms of two mean gradients, over the samples of all ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..loop.state import State


def two_batch_estimate(small: Any, big: Any, few: Any, many: Any) -> tuple[Any, Any]:
    """Return unbiased estimates (trace of the gradient's covariance per sample, squared norm of the true gradient).

    `small`, `big`: squared norms of the mean gradient over `few` and over `many` samples. Their ratio is the simple
    noise scale. (McCandlish et al. 2018, https://arxiv.org/abs/1812.06162, appendix A.1)
    """
    return (small - big) / (1 / few - 1 / many), (many * big - few * small) / (many - few)


def wide(x: Tensor) -> Tensor:
    """Return the tensor in a type in which the square of a norm fits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def over_ranks(state: State, norm: Tensor, found: tuple[Tensor, Any] | None) -> tuple[Any, Any, Any]:
    """Return the squared norm after the first micro-batch, of how many samples it is, and how many the update holds.

    Of several ranks the first two are means over those that measured; what none did is not finite, and is to be left out.
    """
    if not state.ranks.together:
        assert found is not None
        return found[0], found[1] * state.update_size, state.update_size
    mine = [0.0, 0.0, 0.0] if found is None else [found[0], 1 / found[1], 1.0]
    row = torch.stack([x.to(norm) if isinstance(x, Tensor) else norm.new_full((), x) for x in (*mine, state.update_size)])
    small, parts, ranks, many = state.ranks.total(row)
    return small / ranks, many / parts * ranks / state.world, many
