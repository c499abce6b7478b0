"""ClipGradients: no update's gradient is longer than a limit."""

from __future__ import annotations

import math

import torch

from ..loop.callback import Callback
from ..loop.state import State


class ClipGradients(Callback):
    """Scales an update's gradients down to the 2-norm `norm` where they are longer, as `clip_grad_norm_` does, bitwise.

    It is a factor on the gradients (after unscaling, on what several micro-batches add up to); `state.grad_norm` is
    the norm before it, and waits for no device. Raises ValueError unless `norm` is above 0. (Pascanu et al. 2013)
    """

    def __init__(self, norm: float) -> None:
        if not isinstance(norm, int | float) or isinstance(norm, bool) or not 0 < norm < math.inf:
            raise ValueError(f"norm must be a finite number above 0, not {norm!r}")
        self.norm = float(norm)

    def on_before_optimizer_step(self, state: State) -> None:
        """Scale the gradients by min(1, norm / their norm)."""
        if (found := state.grad_norm) is not None:
            state.scale_gradients(torch.clamp(self.norm / (found + 1e-6), max=1.0))
