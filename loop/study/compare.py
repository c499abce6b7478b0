"""Where two runs part, and in what: read from the digests that Fingerprint left in their TensorBoard files."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ...callbacks.fingerprint import KINDS

Curve = dict[int, float]
CAUSES = {
    "weights": "the weights before this update, so they began apart or the update before differed: its rate, decay or arithmetic",
    "optimizer": "the optimizer's state before this update",
    "data": "the batch: its samples, their order or their augmentation",
    "rng": "the random generators after the forwards: another seed, something that drew, or, with Seed, other cuts of the batch",
    "gradients": "the gradients alone: another loss, other cuts of the batch, or an operation that is not deterministic",
}


@dataclass(frozen=True)
class Parting:
    """How two runs compare: `step`, the first update whose digests differ, and in which `kinds`, the first to part first."""

    steps: list[int]
    step: int | None
    kinds: tuple[str, ...]
    last: int  # update that either of them logged

    def __str__(self) -> str:
        if self.step is None:
            more = f"; only one of them goes on, to {self.last}" if self.last > self.steps[-1] else ""
            return f"the same in all {len(self.steps)} updates compared, {self.steps[0]} to {self.steps[-1]}{more}"
        last = max((step for step in self.steps if step < self.step), default=self.step - 1)
        since = "" if last == self.step - 1 else f" (the same until update {last}; none between was logged)"
        also = f"\nalso differ there: {', '.join(self.kinds[1:])}" if self.kinds[1:] else ""
        return f"part at update {self.step}{since}, first in {self.kinds[0]}: {CAUSES[self.kinds[0]]}{also}"


def compare(a: str | os.PathLike[str], b: str | os.PathLike[str]) -> Parting:
    """Return at which update two runs, given as folders of TensorBoard files, part, and in what first.

    Raises ValueError for a folder without fingerprints, and where the two have no update in common.
    """
    runs = [read(Path(folder)) for folder in (a, b)]
    kinds = [kind for kind in KINDS if all(kind in run for run in runs)]
    steps = sorted(set.intersection(*(set(run[kind]) for run in runs for kind in kinds)))
    if not steps:
        raise ValueError(f"{a} and {b} have no update in common; give both runs' Fingerprint and TensorBoard the same every=")
    last = max(step for run in runs for kind in kinds for step in run[kind])
    for step in steps:
        if apart := tuple(kind for kind in kinds if runs[0][kind][step] != runs[1][kind][step]):
            return Parting(steps, step, apart, last)
    return Parting(steps, None, (), last)


def read(folder: Path) -> dict[str, Curve]:
    """Return, by kind, the digests at each update."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; give that of a run's TensorBoard files")
    reader = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    reader.Reload()
    tags = {kind: f"train/fingerprint/{kind}" for kind in KINDS}
    there = set(reader.Tags()["scalars"])
    found = {kind: {e.step: e.value for e in reader.Scalars(tag)} for kind, tag in tags.items() if tag in there}
    if not found:
        raise ValueError(f"{folder} holds no fingerprints; train with Fingerprint() beside TensorBoard({str(folder)!r})")
    return found
