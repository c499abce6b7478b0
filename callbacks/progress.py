"""Progress: how far training is, on the terminal, in a notebook or in a batch job's log."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import sys
import time
from typing import Any

from ..loop.callback import Callback
from ..loop.host import HostCopy
from ..loop.state import State

REFRESH = 0.1  # seconds


def terminal() -> bool:
    """Tell whether standard error is a terminal that bars fit on; some pseudo-terminals say they are 0 columns wide."""
    with contextlib.suppress(AttributeError, OSError, ValueError):
        return sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns > 0
    return False


class Progress(Callback):
    """Shows a bar for the run and one for the epoch: loss, validation, rate, samples/s, time left, early-stopping count.

    Where standard error is no terminal, and in no notebook, it prints a line there at each epoch's end, at the run's end
    and every `every` seconds. The loss is read without a wait for the device, so it may be a tenth of a second old.
    Around a loop of your own no epoch is shown. Only rank 0 shows. Raises ValueError unless `every` is above 0.
    """

    optional = ("on_epoch_start", "on_epoch_end")

    def __init__(self, every: float = 30.0) -> None:
        if isinstance(every, bool) or not isinstance(every, int | float) or not 0 < every < math.inf:
            raise ValueError(f"every must be a finite number of seconds above 0, not {every!r}")
        self.every = every
        self._due = math.inf  # when to look again: never, where nothing is shown
        self._bars: list[Any] = []  # the run's, the epoch's

    def on_fit_start(self, state: State) -> None:
        """Begin at the run's position."""
        self._now = now = time.monotonic()
        self._line, self._mark, self._speed, self._said = now + self.every, (now, state.samples), 0.0, -1
        self._host, self._seen = HostCopy(), dict[str, float]()
        if state.rank:
            return
        from tqdm.auto import tqdm
        from tqdm.autonotebook import tqdm as kind
        from tqdm.std import tqdm as text

        self._due = now
        self._bar = functools.partial(tqdm, dynamic_ncols=True, mininterval=0, miniters=0)
        if kind is not text or terminal():
            self._line = math.inf
            self._bars = [self._bar(desc="run", initial=state.step, total=state.total_steps, unit="step", position=0)]

    def on_epoch_start(self, state: State) -> None:
        """Begin at the epoch's position."""
        if self._bars:
            total = state.epoch_samples or 0
            done = state.samples - state.epoch * total
            done = done if 0 <= done <= total else 0  # epochs before had another length
            self._first = state.samples - done
            self._bars[1:] = [self._bar(desc=f"epoch {state.epoch + 1}", initial=done, total=state.epoch_samples,
                                        unit="sample", position=1, leave=False)]  # fmt: skip

    def on_step_end(self, state: State) -> None:
        """Show, ten times a second at most."""
        self._now = now = time.monotonic()
        if now >= self._due:
            self._look(state)
            if now >= self._line:
                self._say(state, "" if state.loader is None else f"epoch {state.epoch + 1}, ")

    def _look(self, state: State, all: bool = False) -> None:
        """Take in what has arrived, and draw the bars."""
        self._due = self._now + REFRESH
        if all or not self._host.pending:
            self._host.put(None, {"loss": state.metrics.get("loss"), "rate": state.rates[0] if state.rates else None})
        for _, seen in self._host.take(all):
            self._seen = seen
        for bar in self._bars[1:]:
            bar.set_postfix_str(written(self._seen), refresh=False)
            bar.update(state.samples - self._first - bar.n)
        for bar in self._bars[:1]:
            self._measure(state, 1.0)
            live = {**self._seen, "samples/s": self._speed} if state.loader is None else {}
            bar.set_postfix_str(written({**live, **reported(state)}), refresh=False)
            bar.update(state.step - bar.n)

    def _measure(self, state: State, least: float = 0.0) -> None:
        if (seconds := self._now - self._mark[0]) > least and state.samples > self._mark[1]:
            self._speed, self._mark = (state.samples - self._mark[1]) / seconds, (self._now, state.samples)

    def _say(self, state: State, where: str) -> None:
        self._measure(state)
        self._line, self._said = time.monotonic() + self.every, state.step
        place = f"{where}step {state.step}" + (f"/{state.total_steps}" if state.total_steps else "")
        text = written({**self._seen, "samples/s": self._speed, **reported(state)})
        print(f"{place}: {text}", file=sys.stderr, flush=True)

    def on_validation_end(self, state: State) -> None:
        """Leave validation out of the samples per second."""
        self._measure(state)
        self._mark = (time.monotonic(), state.samples)

    def on_epoch_end(self, state: State) -> None:
        """Print the epoch's line, or close its bar."""
        if self._due < math.inf:
            self._look(state, all=True)
            if self._bars:
                self._bars.pop().close()
            else:
                self._say(state, f"epoch {state.epoch} ended, ")

    def on_fit_end(self, state: State) -> None:
        """Show where it ended, also after an error."""
        if self._due < math.inf:
            try:
                self._look(state, all=True)
                if not self._bars and self._said != state.step:
                    self._say(state, "ended, ")
            finally:
                self._due = math.inf
                while self._bars:
                    self._bars.pop().close()


def reported(state: State) -> dict[str, Any]:
    """Return validation's results and the early-stopping count."""
    return {k: v for k, v in state.metrics.items() if k.startswith("val_") or k == "early_stopping"}


def written(values: dict[str, Any]) -> str:
    """Return values for a line; a speed of 0 is one that is not known."""
    known = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in values.items() if v or k != "samples/s"}
    return ", ".join(f"{name} {value}" for name, value in known.items())
