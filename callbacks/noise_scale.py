"""NoiseScale: how large a batch is worth having, told by the gradients themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..loop.callback import Callback
from ..loop.checks import whole
from ..loop.host import HostCopy
from ..loop.state import State
from .batch_policies import Grow


def two_batch_estimate(small: Any, big: Any, few: Any, many: Any) -> tuple[Any, Any]:
    """Return unbiased estimates (trace of the gradient's covariance per sample, squared norm of the true gradient).

    `small`, `big`: squared norms of the mean gradient over `few` and over `many` samples. Their ratio is the simple
    noise scale. (McCandlish et al. 2018, https://arxiv.org/abs/1812.06162, appendix A.1)
    """
    return (small - big) / (1 / few - 1 / many), (many * big - few * small) / (many - few)


class NoiseScale(Callback):
    """Measures the gradient noise scale, in samples: batches far below it waste no sample, far above it waste most.

    Every `every` updates it takes the norm of the gradient after the first micro-batch and after the last: one norm
    more, no copy of gradients. An update that is a single micro-batch is cut in two for it. The two estimates are each
    averaged with the factor `smoothing` before they are divided; `state.metrics["noise_scale"]` is their ratio, on the
    device. Alone in the list it only watches; as `DynamicBatchSize(..., every=NoiseScale())` it also grows the batch
    while the noise scale is above the next size, at most once in `every` updates, from the 1 / (1 - smoothing)-th
    measurement on. Nothing waits for the device: a decision reads what was measured `every` updates before.
    Raises ValueError for bad settings. (McCandlish et al. 2018, https://arxiv.org/abs/1812.06162)
    """

    measured = True
    table = None

    def __init__(self, every: int = 10, smoothing: float = 0.95) -> None:
        whole("every", every, 2, none=False)
        if isinstance(smoothing, bool) or not isinstance(smoothing, int | float) or not 0 <= smoothing < 1:
            raise ValueError(f"smoothing must be at least 0 and below 1, not {smoothing!r}")
        self.every, self.smoothing = every, smoothing
        self.noise: Any = 0.0
        self.signal: Any = 0.0
        self.count, self.growths = 0, 0
        self._host, self._seen = HostCopy(), dict[str, float]()
        self._small: tuple[Tensor, Any] | None = None

    def on_step_start(self, state: State) -> None:
        """Have the update that will be measured hold two micro-batches at least."""
        self._small = None
        if state.step % self.every == 0:
            state.least_micros = max(state.least_micros, 2)

    def on_micro_end(self, state: State) -> None:
        """Take the norm after the first micro-batch."""
        micro = state.micro
        if micro is None or not micro.training or micro.number or state.step % self.every or micro.share is None:
            return
        norm = torch.nn.utils.get_total_norm(state.grads)
        if state.scaler is not None:
            norm = norm / state.scaler.scale(torch.ones_like(norm))
        self._small = (norm / micro.share) ** 2, micro.share * state.update_size

    def on_before_optimizer_step(self, state: State) -> None:
        """Take the norm after the last, and log the scale."""
        if self._small is None or (norm := state.grad_norm) is None:
            return
        (small, few), self._small = self._small, None
        noise, signal = two_batch_estimate(small, norm**2, few, state.update_size)
        old, new = 1.0 * self.smoothing, 1.0 - self.smoothing
        good = torch.isfinite(noise + signal)  # one bad gradient must not stay in the averages
        self.noise = torch.where(good, old * self.noise + new * noise, self.noise)
        self.signal = torch.where(good, old * self.signal + new * signal, self.signal)
        self.count += 1
        state.log("noise_scale", self.noise / self.signal)
        self._host.pending.clear()  # only the latest counts, and where nobody asks for a size none is taken
        self._host.put(self.count, {"noise": self.noise, "signal": self.signal})

    def size(self, state: State, grow: Grow) -> int:
        """Return the batch size that the noise measured so far asks for."""
        if state.step % self.every == 0 and self._drained() and self.count >= 1 / (1 - self.smoothing):
            following = grow(self.growths + 1)
            if following > grow(self.growths) and self._seen["noise"] > following * self._seen["signal"]:
                self.growths += 1
            self._seen = {}  # one growth a measurement, also after a skipped update
        return grow(self.growths)

    def _drained(self) -> bool:
        for _, seen in self._host.take(all=True):
            self._seen = seen
        return bool(self._seen)

    def state_dict(self) -> dict[str, Any]:
        """Return the averages and what they led to."""
        self._drained()
        kept = {name: getattr(self, name) for name in ("noise", "signal", "count", "growths")}
        return {**kept, "seen": self._seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        self._seen = state["seen"]
        for name in ("noise", "signal", "count", "growths"):
            setattr(self, name, state[name])
