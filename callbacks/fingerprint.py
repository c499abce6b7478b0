"""Fingerprint: what two runs are compared by, update for update."""

from typing import Any

from torch import Tensor

from ..loop import digest
from ..loop.callback import Callback
from ..loop.checks import whole
from ..loop.state import State

KINDS = ("weights", "optimizer", "data", "rng", "gradients")  # in the order in which one makes the next part


class Fingerprint(Callback):
    """Logs, at the first and every `every`-th update, digests of what went into it, for `compare` to say where two runs part.

    They are of weights, buffers and the optimizer's state as the first forward finds them, of the batch (the same in any
    cut), of the generators after each micro-batch, and of the gradients as the optimizer gets them; 24 bits of each, under
    `train/fingerprint/<kind>`, where TensorBoard's own `every` meets this one. Around a loop of your own there is no batch.
    Computed on the device in integers, without a wait: a pass over all of these at that interval.
    `python -m hookloop.loop compare RUN_A RUN_B` reads them. Raises ValueError for a bad `every`.
    """

    optional = ("on_micro_end",)

    def __init__(self, every: int = 50) -> None:
        whole("every", every, 1, none=False)
        self.every, self._samples, self._drawn = every, 0, 0
        self._before = dict[str, Tensor]()
        self._data: Tensor | None = None

    def _due(self, state: State) -> bool:
        return (state.step + 1) % self.every == 0 or state.step == 0

    def on_setup(self, state: State) -> None:
        """Have digests taken before an update's first forward, and when its gradients are as the optimizer gets them."""
        state.before.append(self._begin)
        state.checks.append(self._log)

    def _begin(self, state: State) -> None:
        self._forget(state)
        self._before = what_is_trained(state) if self._due(state) else {}

    def _forget(self, state: State) -> None:  # what describes another update, or one that was left out
        for kind in KINDS:
            state.metrics.pop(f"fingerprint/{kind}", None)
        self._data, self._samples, self._drawn = None, 0, 0

    def on_micro_end(self, state: State) -> None:
        """Add a part of the update's batch, and what its forward and backward left of the generators."""
        micro = state.micro
        if micro is None or not micro.training or not self._due(state):
            return
        if micro.number == 0:
            self._forget(state)
        part = digest.of_batch(micro.batch, micro.size, self._samples, state.device)
        self._data = part if self._data is None else self._data + part
        self._samples += micro.size
        # With Seed the host's generators are others in this hook; those of training keep what they drew until the update.
        self._drawn = digest.told(self._drawn, digest.of_generators(state.device, host=False))

    def _log(self, state: State) -> None:
        (found, self._before), data, drawn = (self._before, {}), self._data, self._drawn
        self._forget(state)
        if not self._due(state):
            return
        if data is not None:
            found["data"] = data
        found["gradients"] = digest.whole([p.grad for p in held(state)], state.device)
        for kind, value in found.items():
            state.log(f"fingerprint/{kind}", digest.short(value))
        state.log("fingerprint/rng", digest.told(drawn, digest.of_generators(state.device)) & 0xFFFFFF)


def held(state: State) -> list[Any]:
    """Return the parameters that the optimizer holds."""
    return [p for group in state.optimizer.param_groups for p in group["params"]]


def what_is_trained(state: State) -> dict[str, Tensor]:
    """Return the digests of weights and buffers, also those that only the optimizer holds, and of the optimizer's state."""
    weights = {id(x): x for x in (*state.model.parameters(), *state.model.buffers(), *held(state))}
    kept = [{k: v for k, v in state.optimizer.state.get(p, {}).items() if v is not None} for p in held(state)]
    return {name: digest.whole(x, state.device) for name, x in (("weights", [*weights.values()]), ("optimizer", kept))}
