"""Saves run at once or behind the training; one that fails is told, by a warning or an error, and never lost."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable

from torch import nn

from .copies import Copies
from .disk import Contents
from .plain import is_sharded


class Writer:
    """Runs one save at a time; `background`: in a thread of its own, which ends with the save.

    An OSError is a failed save: a warning, or with `on_failure="stop"` raised. Any other error is raised. What fails in
    the background is told by the next `settle` that finds it.
    """

    def __init__(self, background: bool, on_failure: str) -> None:
        self.background, self.on_failure = background, on_failure
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self.saved = True  # the last save, for all that is known

    def check(self, model: nn.Module) -> None:
        """Refuse a model that can't be saved in the background."""
        if self.background and any(map(is_sharded, model.parameters())):
            raise ValueError("background=True can't save a sharded model (fully_shard), whose ranks write together while training "
                             "waits; use background=False")  # fmt: skip

    def write(self, contents: Contents, save: Callable[[Contents], object], saved: Callable[[bool], object],
              first: bool) -> bool:  # fmt: skip
        """Check and `save` contents, in the background a copy of them, which the `first` rank alone makes; then tell `saved`.

        Return False for a save that failed already.
        """
        contents.check()
        copies = Copies()
        if self.background:
            if not first:
                saved(False)
                return True
            contents.model, contents.state = copies.of(contents.model), copies.of(contents.state)

        def write() -> None:
            copies.wait()
            save(contents)

        return self._run(write, lambda: saved(first))

    def tidy(self, act: Callable[[], object]) -> None:
        """Tidy up what earlier runs left."""
        self._run(lambda: None, act)
        self.settle()

    def _run(self, save: Callable[[], object], tidy: Callable[[], object]) -> bool:
        self.settle()
        if self.background:
            self._thread = threading.Thread(target=self._attempt, args=(save, tidy), name="hookloop checkpoint")
            self._thread.start()
            return True
        self._attempt(save, tidy)
        self.settle()
        return self.saved

    def _attempt(self, save: Callable[[], object], tidy: Callable[[], object]) -> None:
        self.saved = False
        try:
            save()
            self.saved = True
            tidy()
        except BaseException as error:
            self._error = error

    def settle(self, wait: bool = True) -> None:
        """Tell of a save that failed; `wait` for one that is still running."""
        if self._thread is not None and (wait or not self._thread.is_alive()):
            self._thread.join()
            self._thread = None
        if self._thread is not None or self._error is None:
            return
        error, self._error = self._error, None
        if self.on_failure == "stop" or not isinstance(error, OSError):
            raise error
        warnings.warn(
            f"Checkpoint failed to {'delete an old one' if self.saved else 'save; older ones stay'}: {error}", stacklevel=2
        )
