"""NonFinite: numbers that are not finite are kept from the weights."""

from typing import Any

from torch import Tensor

from ..loop.callback import Callback
from ..loop.checks import among, share, whole
from ..loop.finite import infinite, listed, made, statistics, told, verdicts, watched
from ..loop.host import HostCopy
from ..loop.kept import BadUpdates, Kept
from ..loop.state import State


class NonFinite(BadUpdates, Callback):
    """Keeps an update with a loss, gradient or buffer that is not finite from the weights, as `action` says.

    "stop" raises FloatingPointError; on a device the verdict is read when it has arrived, at the latest before the next
    update, a save or the end, so that one bad update may have been applied. "skip" drops the update and puts buffers back.
    "rollback" goes back to weights, buffers and optimizer state as every `every`-th step began with them (on the host: as
    much memory again), all rates times `factor` from then on; data and counts go on. After `patience` bad updates in a row
    either raises. Both read a verdict an update, which with a fused optimizer waits for no more than the gradients. Weights
    that finite gradients spoilt are found before a save and at the end: "rollback" goes back then, the others raise.
    """

    beside, optional = ("kept",), ("on_micro_end",)

    def __init__(self, action: str = "stop", patience: int = 10, *, every: int = 100, factor: float = 0.5) -> None:
        among("action", action, ("stop", "skip", "rollback"))
        whole("patience", patience, 1, none=False)
        whole("every", every, 1, none=False)
        share("factor", factor)
        self.action, self.patience, self.every, self.factor = action, patience, every, factor
        self._kept, self._host = Kept(every) if action == "rollback" else None, HostCopy()
        self._loss: Tensor | None = None
        self._buffers: set[str] | None = None
        self._by_design: set[str] = set()
        self._state: State | None = None

    def on_setup(self, state: State) -> None:
        """Have gradients checked when they are as the optimizer gets them, and all kept from before a step's first forward."""
        state.checks.append(self._check)
        state.before.append(self._before)
        state.before_save.append(self._whole)
        state.keep_buffers |= self.action == "skip" or state.scaler is not None  # which skips by itself
        self._state = state

    def on_fit_start(self, state: State) -> None:
        """Keep anew what to go back to, which may have changed between two runs."""
        if self._kept is not None:
            self._kept.begin(state, self.factor < 1)

    def _before(self, state: State) -> None:
        self._state, self._loss = state, None
        if self._buffers is None:
            self._buffers, self._by_design = statistics(state), infinite(state)
        if self._kept is not None:
            self._kept.look(state, self._buffers, self._by_design)

    def on_micro_end(self, state: State) -> None:
        """Add up no losses, which may overflow, but 0 of each: what is not finite stays so."""
        if state.micro is not None and state.micro.training:
            loss = state.micro.outputs["loss"]
            self._loss = loss if state.micro.number == 0 or self._loss is None else self._loss + loss * 0

    def on_before_optimizer_step(self, state: State) -> None:
        """Lower the rates as rollbacks asked."""
        if self.scale != 1.0:
            state.scale_rate(self.scale)

    def _check(self, state: State) -> None:
        self._read(state)  # of the update before: its work is done, while this one's is queued
        loss, self._loss = state.given_loss if self._loss is None else self._loss, None
        if not (found := watched(state, loss, self._buffers or ())) and not state.ranks.together:
            return
        good, owners = verdicts(state, found)
        self._host.put((state.step, owners), {"good": good}, most_dims=1)
        if self.action == "stop":
            self._read(state, all=False)
        else:
            state.skip_where(good.logical_not().any(), lambda: self._read(state))

    def _read(self, state: State, all: bool = True) -> str | None:
        for (step, owners), found in self._host.take(all):
            flags: Any = found["good"]
            if False not in flags:
                self.row, self.before = 0, self.row
                continue
            text = f"not finite in update {step + 1}: {told(state, step, owners, flags, self._by_design)}"
            if self.action == "stop":
                raise FloatingPointError(text)
            return self.bad(state, text, bool(made(state, self._by_design, "applies an update")))
        return None

    def _whole(self, state: State) -> None:
        self._read(state)
        if bad := made(state, self._by_design, "saves"):
            self.bad(state, f"not finite after update {state.step}: {listed(bad)}", applied=True)

    def on_fit_end(self, state: State) -> None:
        """Read the last verdict."""
        self._read(state)
        self._state = None

    def state_dict(self) -> dict[str, Any]:
        """Return, once the last verdict is read, the rates' scale, bad updates in a row, what to go back to."""
        if self._state is not None:
            self._read(self._state)
        kept = self._kept and self._kept.data
        return {"action": self.action, "scale": self.scale, "row": self.row, "before": self.before, "kept": kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back; raises ValueError where rollbacks lowered rates and `action` is another now."""
        if state["action"] != self.action and state["scale"] != 1.0:
            raise ValueError(f"action={self.action!r}, and rollbacks before it have multiplied the rates by {state['scale']:g}: "
                             "go on with action='rollback', or with rates of your own choice")  # fmt: skip
        self.scale, self.row, self.before = state["scale"], state["row"], state.get("before", 0)
        if self._kept is not None and self._state is not None:
            self._kept.restore(self._state, state["kept"])
