"""HardExamples: the samples with the largest losses, to be looked at."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..loop.callback import Callback
from ..loop.checks import whole
from ..loop.events import Events
from ..loop.hardest import Example, Held, as_text, grid, merged, samples_of, write
from ..loop.host import HostCopy
from ..loop.state import State


class HardExamples(Callback):
    """Finds the `k` samples with the largest loss in each window of training and in each validation; it trains nothing.

    A window is an epoch, or `every` updates. `loss_fn` returns "losses", one a sample; samples go by their position in the
    loader's data set. `examples["train"]`, `["val"]` or `["val_<loader>"]` lists those of the last whole window (in training
    of the one under way, when the run ends before any was whole), largest first: position, loss, `times` (windows in which
    it was among the k), step. One met twice in a window counts once, by its larger loss. `folder` gets `hard_examples.csv`
    and, in `hard_examples/` for TensorBoard, the table, with pictures where a batch holds (n, 1 or 3, H, W). Chosen on the
    device, without a wait; updates that were redone or skipped leave no trace. Of several ranks, the first one's share.
    Raises ValueError for bad settings, OSError at the start for a folder that can't be written, KeyError or ValueError at
    the first step where losses or positions are missing. (Top losses: Howard and Gugger 2020, arXiv:2002.04688)
    """

    def __init__(self, k: int, every: int | None = None, folder: str | os.PathLike[str] | None = None) -> None:
        whole("k (samples)", k, 1, none=False)
        whole("every (updates, None for an epoch)", every, 1)
        if folder is not None and (not isinstance(folder, str | os.PathLike) or not os.fspath(folder)):
            raise ValueError(f"folder must be the path of a folder, such as 'runs/a', or None, not {folder!r}")
        self.k, self.every = k, every
        self.examples = dict[str, list[Example]]()
        self._times = dict[str, dict[int, int]]()
        self._open = dict[str, Held]()  # by split, with the update or evaluation under way
        self._of = -1  # the last try of an update that it saw
        self._held: Held | None = None  # of training's window, after the last update that was applied
        self._host, self._events = HostCopy(), None if folder is None else Events(Path(folder) / "hard_examples")

    def on_fit_start(self, state: State) -> None:
        """Open the files."""
        self.examples = {split: rows for split, rows in self.examples.items() if split in self._times}
        if self._events is not None and state.rank == 0:
            self._events.step = -1  # so that what stands at this very step stays
            self._events.open(state.step)

    def on_micro_end(self, state: State) -> None:
        """Compare its losses with the largest so far."""
        if (micro := state.micro) is None:
            return
        new = samples_of(micro, pictures=self._events is not None)
        before = self._open.get(micro.split) if micro.number else self._held if micro.training else None
        if state.rank == 0:
            self._open[micro.split] = merged(before, new, self.k)
            self._of = state.step + state.skipped if micro.training else self._of

    def on_step_end(self, state: State) -> None:
        """Count the update, and close a window of `every`."""
        took_part = self._of + 1 == state.step + state.skipped
        self._held, self._open = self._open.get("train", self._held) if took_part else self._held, {}
        if self.every is not None and state.step % self.every == 0:
            self._close(state)
        self._drain()

    def on_epoch_end(self, state: State) -> None:
        """Close the epoch's window."""
        if self.every is None:
            self._close(state)

    def _close(self, state: State) -> None:
        if self._held is not None:
            self._host.put(("train", state.step, True), self._held, most_dims=4)
        self._held = None

    def on_validation_end(self, state: State) -> None:
        """Close validation's."""
        found, self._open = self._open, {}
        for split in sorted(found.keys() - {"train"}):
            self._host.put((split, state.step, True), found[split], most_dims=4)

    def on_fit_end(self, state: State) -> None:
        """Write what there is."""
        self._drain(all=True)
        if self._held is not None and "train" not in self._times:
            self._host.put(("train", state.step, False), self._held, most_dims=4)
            self._drain(all=True)
        if self._events is not None and self._events.file is not None:
            write(self._events.folder.with_suffix(".csv"), self.examples)
            self._events.close()

    def _drain(self, all: bool = False) -> None:
        for (split, step, counted), found in self._host.take(all):
            rows = [(p, loss) for p, loss in zip(found["positions"], found["losses"], strict=True) if p >= 0]
            times = self._times.setdefault(split, {}) if counted else {}
            times.update({p: times.get(p, 0) + 1 for p, _ in rows})
            self.examples[split] = [Example(p, loss, times[p], step) for p, loss in rows]
            if counted and self._events is not None and self._events.file is not None:
                write(self._events.folder.with_suffix(".csv"), self.examples)
                self._events.show(step, f"hard_examples/{split}", as_text(self.examples[split]),
                                  grid(found["pictures"][: len(rows)]) if "pictures" in found else None)  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """Return, once all that is pending is on the disk, the windows and what was counted."""
        self._drain(all=True)
        if self._events is not None:
            self._events.state_dict()
        rows = {split: [list(row) for row in self.examples[split]] for split in self._times}
        return {"k": self.k, "every": self.every, "held": self._held, "times": self._times, "examples": rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back; raises ValueError for windows of another size."""
        if (theirs := (state["k"], state["every"])) != (self.k, self.every):
            raise ValueError(
                f"the checkpoint's has k={theirs[0]}, every={theirs[1]}, not {self.k} and {self.every}; give the same"
            )
        self._held, self._times = state["held"], {split: dict(times) for split, times in state["times"].items()}
        self.examples = {split: [Example(*row) for row in rows] for split, rows in state["examples"].items()}
