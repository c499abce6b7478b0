"""Progress: how far training is, on the terminal, in a notebook or in a batch job's log."""

import functools
import math
import shutil
import sys
import time
from typing import Any

from ..loop.callback import Callback
from ..loop.host import HostCopy
from ..loop.state import State


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
        self._line, self._mark, self._said, self._first = now + self.every, (now, state.samples), -1, 0
        self._host, self._seen = HostCopy(), dict[str, Any]()
        if state.rank:
            return
        from tqdm import auto, autonotebook, std

        self._due = now
        notebook, size = autonotebook.tqdm is not std.tqdm, shutil.get_terminal_size()  # 80 x 24 where it says 0 x 0
        shape = {"dynamic_ncols": True} if notebook else {"ncols": size.columns, "nrows": size.lines}
        self._bar = functools.partial(auto.tqdm, mininterval=0, miniters=0, **shape)
        if notebook or getattr(sys.stderr, "isatty", bool)():
            self._bars = [self._bar(desc="run", initial=state.step, total=state.total_steps, unit="step", position=0)]

    def on_epoch_start(self, state: State) -> None:
        """Begin at the epoch's position."""
        if self._bars:
            total, done = state.epoch_samples, state.samples - state.epoch * (state.epoch_samples or 0)
            done = done if 0 <= done <= (total or 0) else 0  # epochs before had another length
            self._close(1)
            self._first, name = state.samples - done, f"epoch {state.epoch + 1}"
            self._bars += [self._bar(desc=name, initial=done, total=total, unit="sample", position=1, leave=False)]

    def on_step_end(self, state: State) -> None:
        """Show, ten times a second at most."""
        self._now = now = time.monotonic()
        if now >= self._due:
            self._look(state)
            if now >= self._line and not self._bars:
                self._say(state, "" if state.loader is None else f"epoch {state.epoch + 1}, ")

    def _look(self, state: State, all: bool = False) -> None:
        """Take in what has arrived, and draw the bars."""
        self._due = self._now + 0.1
        if all or not self._host.pending:
            self._host.put(None, {"loss": state.metrics.get("loss"), "rate": state.rates[0] if state.rates else None})
        for _, seen in self._host.take(all):
            self._seen |= seen
        found = {k: v for k, v in sorted(state.metrics.items(), reverse=True) if k.startswith("val_") or k == "early_stopping"}
        seconds, samples = self._now - self._mark[0], state.samples - self._mark[1]
        if samples and seconds > (0.0 if all else 1.0):
            self._seen["samples/s"], self._mark = samples / seconds, (self._now, state.samples)
        self._text = written(self._seen | found)
        texts = self._text if state.loader is None else written(found), written(self._seen)
        for bar, text, place in zip(self._bars, texts, (state.step, state.samples - self._first), strict=False):
            bar.set_postfix_str(text, refresh=False)
            bar.update(place - bar.n)

    def _say(self, state: State, where: str) -> None:
        self._line, self._said = time.monotonic() + self.every, state.step
        print(f"{where}step {state.step}/{state.total_steps or '?'}: {self._text}", file=sys.stderr, flush=True)

    def on_validation_end(self, state: State) -> None:
        """Show the results, and leave validation out of the samples per second."""
        if self._due < math.inf:
            self._look(state, all=True)
            self._mark = (time.monotonic(), state.samples)

    def on_epoch_end(self, state: State) -> None:
        """Print the epoch's line, or close its bar."""
        if self._due < math.inf:
            self._end(state, f"epoch {state.epoch} ended, ")

    def on_fit_end(self, state: State) -> None:
        """Show where it ended, also after an error."""
        try:
            if self._due < math.inf and self._said != state.step:
                self._end(state, "ended, ")
        finally:
            self._due = math.inf
            self._close(0)

    def _end(self, state: State, where: str) -> None:
        self._look(state, all=True)
        if not self._bars:
            self._say(state, where)
        self._close(1)

    def _close(self, kept: int) -> None:
        while len(self._bars) > kept:
            self._bars.pop().close()


def written(values: dict[str, Any]) -> str:
    """Return numbers and strings for a line."""
    shown = {name: value for name, value in values.items() if isinstance(value, float | int | str)}
    return ", ".join(f"{name} {f'{v:.4g}' if isinstance(v, float) else v}" for name, v in shown.items())
