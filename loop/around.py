"""What only a loop of the user's own needs: when its step begins, what can't run there, an update that is left out."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim import Optimizer

from .dispatch import AROUND, PLAN, overridden
from .state import State


class FirstForward:
    """Calls a function just before the next forward of a model, or of a part of it, in train mode."""

    def __init__(self, model: nn.Module, act: Callable[[], None]) -> None:
        self.model, self.act = model, weakref.WeakMethod(act)  # whose owner holds this
        self.handle: Any = None

    def arm(self, state: State) -> None:
        """Wait for it, if anyone does: no module pays for that once it has come."""
        if (state.before or state.keep_buffers) and self.handle is None:
            self.parts = set(self.model.modules())
            self.handle = register_module_forward_pre_hook(self._come)

    def late(self) -> None:
        """Call it now where no module of the model ran since the update before."""
        if self.disarm():
            self.act()()  # type: ignore[misc]

    def disarm(self) -> bool:
        """Wait no longer; return whether it was still to come."""
        armed, self.handle = self.handle, None
        if armed is not None:
            armed.remove()
        return armed is not None

    def _come(self, module: nn.Module, args: Any) -> None:
        if module.training and module in self.parts and self.disarm():
            self.act()()  # type: ignore[misc]


def check_around(callbacks: Any) -> None:
    """Refuse, by name, callbacks that need hooks or settings which a loop of the user's own does not have."""
    for callback in callbacks:
        missing = sorted(overridden(callback) - AROUND - set(callback.optional))
        if missing := missing or [f"to decide state.{setting}" for setting in callback.owns if setting in PLAN]:
            raise ValueError(f"{type(callback).__name__} needs {', '.join(missing)}, which does not run around a loop "
                             "of your own; use loop.fit or loop.epochs, loop.steps, or leave it out")  # fmt: skip


def given(loss: Tensor | float | None, samples: int) -> dict[str, Any]:
    """Return what `updating` is to show; raises ValueError for what is no loss or no number of samples."""
    if not isinstance(samples, int) or isinstance(samples, bool) or samples < 0:
        raise ValueError(f"samples must be a whole number, at least 0, not {samples!r}")
    if isinstance(loss, Tensor) and loss.dim():
        raise ValueError(f"loss must be a 0-d tensor or a number, not shape {tuple(loss.shape)}")
    return {} if loss is None else {"loss": loss.detach() if isinstance(loss, Tensor) else float(loss)}


@contextlib.contextmanager
def left_out(optimizer: Optimizer) -> Iterator[None]:
    """Take the gradients away and have `optimizer.step` do nothing, not even call a closure, which would make them anew."""
    optimizer.zero_grad(set_to_none=True)
    own = vars(optimizer).get("step")  # a scheduler puts its own there
    optimizer.step = lambda *args, **kwargs: None  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del optimizer.step
        if own is not None:
            optimizer.step = own  # type: ignore[method-assign]
