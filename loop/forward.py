"""A forward under autocast, whoever runs it, and what its loss is multiplied by before backward."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


class Forward:
    """What a Loop runs of the user's: `loss_fn` under autocast, which ends before backward, run in the types forward chose."""

    autocast: Callable[[], contextlib.AbstractContextManager[Any]] | None
    _opened: contextlib.ExitStack | None = None
    _constants: dict[Any, Tensor]

    def open_autocast(self) -> None:
        """Begin autocast, where the Loop has one, for a forward that may stand in the user's own code."""
        if self.autocast is not None:
            self._opened = contextlib.ExitStack()
            self._opened.enter_context(self.autocast())

    def leave_autocast(self) -> None:
        """End that autocast, if it has not ended."""
        opened, self._opened = self._opened, None
        if opened is not None:
            opened.close()

    def forward(self, loss_fn: Callable[[nn.Module, Any], Any], model: nn.Module, batch: Any) -> Any:
        """Run `loss_fn` under autocast, begun here or before."""
        if self.autocast is None:
            return loss_fn(model, batch)
        opened, self._opened = self._opened, None
        with opened or self.autocast():
            return loss_fn(model, batch)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Leave the autocast of a micro-batch in whose body an evaluation runs to that micro-batch's own loss."""
        opened, self._opened = self._opened, None
        try:
            yield
        finally:
            self._opened = opened
            torch.clear_autocast_cache()  # torch 2.10 keeps what was cast under no_grad there, for a loss that would not learn

    def constant(self, value: float | Tensor | None, like: Tensor) -> Tensor | None:
        """Return a number as a 0-d tensor like another one, made by a fill, which waits for no device."""
        if value is None or isinstance(value, Tensor):
            return value if value is None else value.to(like)
        key = (value, like.dtype, like.device)
        if key not in self._constants:
            if len(self._constants) > 256:
                self._constants.clear()
            self._constants[key] = torch.full((), value, dtype=like.dtype, device=like.device)
        return self._constants[key]
