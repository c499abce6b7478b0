"""NoiseScale: how large a batch is worth having, told by the gradients themselves."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from ..loop.callback import Callback
from ..loop.checks import whole
from ..loop.host import HostCopy
from ..loop.state import State, values_of
from ..loop.wrapped import sharded
from .batch_policies import Grow, Policy
from .gradient_noise import over_ranks, two_batch_estimate, wide

KEPT = ("means", "count", "growths", "_decided", "_measured")
log = logging.getLogger("hookloop")


class NoiseScale(Policy, Callback):
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

    def __init__(self, every: int = 10, smoothing: float = 0.95) -> None:
        whole("every", every, 2, none=False)
        if isinstance(smoothing, bool) or not isinstance(smoothing, int | float) or not 0 <= smoothing < 1:
            raise ValueError(f"smoothing must be at least 0 and below 1, not {smoothing!r}")
        self.every, self.smoothing = every, smoothing
        self.means = torch.zeros(2)  # of the noise and of the signal
        self.count, self.growths, self._measured, self._decided = 0, 0, -1, -1
        self._host, self._seen = HostCopy(), dict[str, float]()
        self._small: tuple[Tensor, Any] | None = None  # squared norm, and what share of the update it is of

    def on_setup(self, state: State) -> None:
        """Refuse a model that holds no gradient of a first micro-batch."""
        if sharded(state.model):
            raise ValueError("NoiseScale compares gradients within an update, which fully_shard gives out at its end alone: share "
                             "the model with DistributedDataParallel, or grow batches by another policy")  # fmt: skip

    def on_step_start(self, state: State) -> None:
        """Have the update that will be measured hold two micro-batches at least."""
        self._small = None
        if self._due(state):
            state.least_micros = max(state.least_micros, 2)

    def _due(self, state: State) -> bool:
        return state.step % self.every == 0 and state.step != self._measured  # once, whatever is skipped

    def on_micro_end(self, state: State) -> None:
        """Take the norm after the first micro-batch."""
        micro = state.micro
        if micro is None or not micro.training or micro.number or micro.share is None or not self._due(state):
            return
        norm = wide(torch.nn.utils.get_total_norm([values_of(grad) for grad in state.grads]))
        if state.scaler is not None:
            norm = norm / state.scaler.scale(torch.ones_like(norm))
        self._small = (norm / micro.share) ** 2, micro.share

    def on_before_optimizer_step(self, state: State) -> None:
        """Take the norm after the last, and log the scale."""
        # one may have run out of data, or have a single micro-batch, after which DDP has averaged over all ranks already
        among_ranks = state.ranks.together and state.ranks.micros > 1 and self._due(state)
        if (self._small is None and not among_ranks) or state.grad_norm is None:
            if self._due(state) and not self.count and state.update_size == 1:
                of = " a rank" if state.ranks.together else ""
                log.warning("NoiseScale can't measure updates of one sample%s: begin with 2 samples%s, or accumulate", of, of)
            return
        norm, found, self._small, self._measured = wide(state.grad_norm), self._small, None, state.step
        small, few, many = over_ranks(state, norm, found)
        new = torch.stack(two_batch_estimate(small, norm**2, few, many))
        old = self.means.to(norm.device)  # restored ones lie on the host
        good = torch.isfinite(new).all()  # one bad gradient must not stay in the averages
        self.means = torch.where(good, self.smoothing * old + (1 - self.smoothing) * new, old)
        self.count += 1
        state.log("noise_scale", self.means[0] / self.means[1])
        self._host.pending.clear()  # only the latest counts, and where nobody asks for a size none is taken
        self._host.put(self.count, {"noise": self.means[0], "signal": self.means[1]})

    def size(self, state: State, grow: Grow) -> int:
        """Return the batch size that the noise measured so far asks for."""
        before, self._decided = self._decided, state.step - state.step % self.every
        if before != self._decided and self._drained() and self.count >= 1 / (1 - self.smoothing):
            more = next((k for k in range(self.growths + 1, self.growths + 1000) if grow(k) > grow(self.growths)), None)
            if more is not None and self._seen["noise"] > grow(more) * self._seen["signal"]:
                self.growths = more
            self._seen = {}
        return grow(self.growths)

    def _drained(self) -> bool:
        for _, seen in self._host.take(all=True):
            self._seen = seen
        return bool(self._seen)

    def state_dict(self) -> dict[str, Any]:
        """Return the averages and what they led to."""
        self._drained()
        return {"seen": self._seen, **{name: getattr(self, name) for name in KEPT}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        self._seen = state["seen"]
        vars(self).update({name: state[name] for name in KEPT if name in state})
