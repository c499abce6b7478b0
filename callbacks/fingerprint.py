"""Fingerprint: what two runs are compared by, update for update."""

from torch import Tensor
from torch.nn.parameter import is_lazy

from ..loop import digest
from ..loop.callback import Callback
from ..loop.checks import whole
from ..loop.redo import tensors
from ..loop.state import State

KINDS = ("weights", "optimizer", "data", "rng", "gradients")  # in the order in which one makes the next part


class Fingerprint(Callback):
    """Logs, at the first and every `every`-th update, digests of what went into it, for `compare` to say where two runs part.

    They are of the weights and buffers and the optimizer's state before the update, of its batch (the same in any cut), of
    the generators after its forwards, and of its gradients; 24 bits of each, under `fingerprint/...`, which TensorBoard
    writes where its own `every` meets this one. Computed on the device in integers, without a wait: a pass over all of these
    at that interval. `python -m hookloop.loop compare RUN_A RUN_B` reads them.
    Raises ValueError for a bad `every`.
    """

    optional = ("on_step_start", "on_micro_end")

    def __init__(self, every: int = 50) -> None:
        whole("every", every, 1, none=False)
        self.every, self._samples = every, 0
        self._before: dict[str, Tensor] | None = None
        self._data: Tensor | None = None

    def _due(self, state: State) -> bool:
        return (state.step + 1) % self.every == 0 or state.step == 0

    def on_step_start(self, state: State) -> None:
        """Begin with what the update before made."""
        self._before = what_is_trained(state) if self._due(state) else None

    def on_micro_end(self, state: State) -> None:
        """Add a part of the update's batch."""
        micro = state.micro
        if micro is None or not micro.training or not self._due(state):
            return
        if micro.number == 0:
            self._samples, self._data = 0, None
        part = digest.of_batch(micro.batch, micro.size, self._samples, state.device)
        self._data = part if self._data is None else self._data + part
        self._samples += micro.size

    def on_before_optimizer_step(self, state: State) -> None:
        """Log the digests of what this update is made of, in place of those that describe another."""
        for kind in KINDS:
            state.metrics.pop(f"fingerprint/{kind}", None)
        if not self._due(state):
            return
        found = self._before or what_is_trained(state)  # around a loop of the user's own no step starts
        if self._data is not None:
            found["data"] = self._data
        found["gradients"] = digest.whole(state.grads, state.device)
        for kind, value in found.items():
            state.log(f"fingerprint/{kind}", digest.short(value))
        state.log("fingerprint/rng", digest.of_generators(state.device) & 0xFFFFFF)
        self._before = self._data = None


def what_is_trained(state: State) -> dict[str, Tensor]:
    """Return the digests of weights and buffers, and of the optimizer's state."""
    held = [state.optimizer.state.get(p, {}) for group in state.optimizer.param_groups for p in group["params"]]
    weights = [x for x in (*state.model.parameters(), *state.model.buffers()) if not is_lazy(x)]
    return {"weights": digest.whole(weights, state.device), "optimizer": digest.whole(tensors(held), state.device)}
