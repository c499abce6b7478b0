"""Saves run at once or behind the training; one that fails is told, by a warning or an error, and never lost."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable


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

    def run(self, save: Callable[[], object], tidy: Callable[[], object]) -> bool:
        """Run a save, in the background once the one before has ended, then `tidy`; return False for one that failed already."""
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
