"""NonFinite: numbers that are not finite are kept from the weights."""

import logging
from typing import Any, cast

from torch import Tensor

from ..loop.callback import Callback
from ..loop.checks import among, share, whole
from ..loop.finite import finite, names, spoilt, statistics, watched
from ..loop.host import HostCopy
from ..loop.kept import fits, keep, put_back
from ..loop.state import State

log = logging.getLogger("hookloop")


class NonFinite(Callback):
    """Keeps an update with a loss, gradient or buffer that is not finite from the weights, as `action` says.

    "stop" raises FloatingPointError, and the last checkpoint is whole; on a device the verdict is read when it has arrived,
    at the latest just before the next update, a save or the end, so that one bad update may have been applied. "skip" drops
    the update, counts it in `state.skipped` and puts buffers back. "rollback" drops it too, goes back to weights, buffers
    and optimizer state as every `every`-th step began with them (kept on the host: as much memory again), and multiplies all
    rates by `factor` from then on; data and counts go on. After `patience` bad updates in a row either raises. Both read one
    verdict an update, for which a fused optimizer waits no longer than the gradients take. A GradScaler's skips come first.
    """

    beside = ("kept",)
    optional = ("on_micro_end",)

    def __init__(self, action: str = "stop", patience: int = 10, *, every: int = 100, factor: float = 0.5) -> None:
        among("action", action, ("stop", "skip", "rollback"))
        whole("patience", patience, 1, none=False)
        whole("every", every, 1, none=False)
        share("factor", factor)
        self.action, self.patience, self.every, self.factor = action, patience, every, factor
        self.scale, self.row = 1.0, 0
        self._loss, self._host = cast("Tensor | None", None), HostCopy()
        self._kept, self._buffers = cast("dict[str, Any] | None", None), cast("set[str] | None", None)
        self._kept_at: int | None = None  # None: all may have changed since
        self._state: State | None = None

    def on_setup(self, state: State) -> None:
        """Have gradients checked when they are as the optimizer gets them, and all kept from before a step's first forward."""
        state.checks.append(self._check)
        state.before.append(self._before)
        state.keep_buffers |= self.action == "skip"
        self._state = state

    def _before(self, state: State) -> None:
        self._state, self._buffers = state, statistics(state) if self._buffers is None else self._buffers
        if self.action != "rollback" or self._kept_at == state.step or (self._kept_at is not None and state.step % self.every):
            return
        self._kept, self._kept_at = keep(state, self._buffers) or self._kept, state.step

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
        if not (found := watched(state, loss, self._buffers or ())):
            return
        good = finite([tensor for _, tensor in found])
        self._host.put((state.step, [owner for owner, _ in found]), {"good": good}, most_dims=1)
        if self.action == "stop":
            self._read(state, all=False)
        else:
            state.skip_where(good.logical_not().any(), lambda: self._read(state))

    def _read(self, state: State, all: bool = True) -> str | None:
        for (step, owners), found in self._host.take(all):
            flags: Any = found["good"]
            if False not in flags:
                self.row = 0
                continue
            self.row += 1
            bad = [name for name, good in zip(names(state, owners), flags, strict=True) if not good]
            bad = spoilt(state) + bad if state.step == step else bad + spoilt(state)  # the cause, where this update isn't
            text = f"not finite in update {step + 1}: {', '.join(bad[:8])}{f' and {len(bad) - 8} more' if bad[8:] else ''}"
            if self.action == "stop":
                raise FloatingPointError(text)
            if self.row >= self.patience:
                raise FloatingPointError(f"{text} ({self.row} bad updates in a row: patience={self.patience})")
            if self._kept is not None:
                self.scale *= self.factor
                put_back(state, self._kept)
                text += f"; back to the weights of update {self._kept['step']}, rates times {self.scale:g}"
            log.warning("%s", text if self._kept is not None else f"{text}; the update is skipped")
            return text
        return None

    def on_fit_end(self, state: State) -> None:
        """Read the last verdict."""
        self._state = self._kept_at = None
        self._read(state)

    def state_dict(self) -> dict[str, Any]:
        """Return, once the last verdict is read, the rates' scale, bad updates in a row, what to go back to."""
        if self._state is not None:
            self._read(self._state)
        return {"action": self.action, "scale": self.scale, "row": self.row, "kept": self._kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back; raises ValueError where rollbacks lowered rates and `action` is another now."""
        if state["action"] != self.action and state["scale"] != 1.0:
            raise ValueError(f"action={self.action!r}, and rollbacks before it have multiplied the rates by {state['scale']:g}: "
                             "go on with action='rollback', or with rates of your own choice")  # fmt: skip
        self.scale, self.row = state["scale"], state["row"]
        if self.action == "rollback" and state["kept"] and self._state is not None and fits(self._state, state["kept"]):
            self._kept, self._kept_at = state["kept"], state["kept"]["step"]
