"""NonFinite: numbers that are not finite are kept from the weights."""

import logging
from typing import Any

from torch import Tensor

from ..loop.callback import Callback
from ..loop.checks import among, share, whole
from ..loop.finite import finite, names, statistics, watched
from ..loop.host import HostCopy
from ..loop.kept import keep, put_back
from ..loop.state import State

log = logging.getLogger("hookloop")


class NonFinite(Callback):
    """Keeps an update with a loss, gradient or buffer that is not finite from the weights, as `action` says.

    "stop" raises FloatingPointError, and the last checkpoint is whole; on a device the verdict is read when it has arrived,
    at the latest just before the next update, a save or the end, so that one bad update may have been applied. "skip" drops
    the update, counts it in `state.skipped` and puts buffers back. "rollback" drops it too, goes back to weights, buffers
    and optimizer state kept after the last of every `every` updates (on the host: as much memory again), and multiplies all
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
        self._loss: Tensor | None = None
        self._host = HostCopy()
        self._kept: dict[str, Any] | None = None
        self._buffers = set[str]()
        self._state: State | None = None

    def on_setup(self, state: State) -> None:
        """Have gradients checked when they are as the optimizer gets them, and buffers kept from each step's start."""
        state.checks.append(self._check)
        state.keep_buffers |= self.action == "skip"

    def on_fit_start(self, state: State) -> None:
        """See which buffers should be finite, and keep what to go back to."""
        self._state, self._buffers = state, statistics(state)
        if self.action == "rollback" and self._kept is None:
            self._kept = keep(state, self._buffers)

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
        if not (found := watched(state, loss, self._buffers)):
            return
        good = finite(tensor for _, tensor in found)
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
            spoilt = [f"{name} itself" for name, p in state.model.named_parameters() if not p.isfinite().all()]
            bad = spoilt + bad if state.step == step else bad + spoilt  # the cause, where this update didn't make it
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

    def on_step_end(self, state: State) -> None:
        """Keep what to go back to."""
        if self.action == "rollback" and state.step % self.every == 0:
            self._kept = keep(state, self._buffers) or self._kept

    def on_fit_end(self, state: State) -> None:
        """Read the last verdict."""
        self._read(state)
        self._state = None

    def state_dict(self) -> dict[str, Any]:
        """Return, once the last verdict is read, the rates' scale, bad updates in a row, what to go back to."""
        if self._state is not None:
            self._read(self._state)
        return {"scale": self.scale, "row": self.row, "kept": self._kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        self.scale, self.row, self._kept = state["scale"], state["row"], state["kept"]
