"""Where two runs part, and in what: read from the digests that Fingerprint left in their TensorBoard files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...callbacks.fingerprint import KINDS

Curves = dict[str, dict[int, float]]  # by kind, the digest at each update
NAMES = {
    "weights": "the weights and buffers before this update",
    "optimizer": "the optimizer's state before this update",
    "data": "the data",
    "rng": "the random generators after a micro-batch's forward and backward",
    "gradients": "the gradients",
}
CAUSES = {
    "weights": "the update before differed (its rate, decay or arithmetic), or something changed them since",
    "optimizer": "the update before differed (its settings or arithmetic), or something changed it since",
    "data": "its samples, their order or their augmentation",
    "rng": "another seed, something that drew, or other cuts of the batch",
    "gradients": "another loss, clipping or other factor, other cuts of the batch, or an operation that is not deterministic",
}


@dataclass(frozen=True)
class Parting:
    """How two runs compare: `step`, the first update whose digests differ, and in which `kinds`, the first to part first.

    `cause` is None where it can't be told, since updates between were not logged. `drew`: the first update after which the
    generators were apart without a consequence. `of`: how many updates the longer run's files tell of.
    """

    steps: list[int]
    step: int | None
    kinds: tuple[str, ...]
    cause: str | None = None
    drew: int | None = None
    notes: tuple[str, ...] = ()
    of: int = 0

    def __str__(self) -> str:
        if self.step is None:
            count = len(self.steps)
            part = f"the {count} update{'s' * (count > 1)} compared, of {self.of}"
            which = part if count < self.of else f"all {count} updates compared"
            what = f"the same in {which}, {self.steps[0]} to {self.steps[-1]}"
            lines = [f"{what}; what the last made of the weights is not compared"]
        else:
            last = max((step for step in self.steps if step < self.step), default=0)
            if self.cause is not None:
                lines = [f"part at update {self.step}, first in {self.kinds[0]}: {self.cause}"]
            else:
                where = (
                    f"between updates {last} and {self.step}, in one" if last else f"before update {self.step}, in an update"
                )
                lines = [f"part {where} that was not logged, so what parted first isn't known; to find out run both again with "
                         f"Fingerprint(every=1), TensorBoard(every=1), up to update {self.step}"]  # fmt: skip
            if also := self.kinds[self.cause is not None :]:
                lines.append(f"{'also ' * (self.cause is not None)}differ there: {', '.join(also)}")
        if self.drew is not None:
            lines.append(f"the random generators were apart from update {self.drew} on, which alone changed nothing")
        return "\n".join([*lines, *self.notes])


def compare(a: str | os.PathLike[str], b: str | os.PathLike[str]) -> Parting:
    """Return at which update two runs, given as folders of TensorBoard files, part, and in what first.

    Raises ValueError for a folder without fingerprints, a damaged file, and where the two have no update in common; OSError
    for what can't be read, ImportError without tensorboard.
    """
    runs, ends = zip(*(read(Path(folder)) for folder in (a, b)), strict=True)
    kinds = [kind for kind in KINDS if all(kind in run for run in runs)]
    logged = [set.intersection(*(set(run[kind]) for kind in kinds)) if kinds else set() for run in runs]
    steps = sorted(logged[0] & logged[1])
    if not steps:
        raise ValueError(f"{a} and {b} have no update in common; give both runs' Fingerprint and TensorBoard the same every=")
    notes = []
    if logged[0] != logged[1]:
        first, second = (f"{len(one)} updates, up to {max(one)}" for one in logged)
        notes.append(f"the first run logged {first}, the second {second}; {len(steps)} are common, so they are compared up to "
                     f"update {steps[-1]}")  # fmt: skip
    for kind in KINDS:
        if kind not in kinds:
            has = [name for name, run in zip(("the first", "the second"), runs, strict=True) if kind in run]
            notes.append(f"not compared: {kind}, which {f'only {has[0]}' if has else 'neither'} run logged")
    apart = {step: tuple([kind for kind in kinds if runs[0][kind][step] != runs[1][kind][step]]) for step in steps}
    step, found, drew = first_of(apart)
    cause = None if step is None else why(found[0], step, max((s for s in steps if s < step), default=0), kinds)
    return Parting(steps, step, found, cause, drew, tuple(notes), max(ends))


def first_of(apart: dict[int, tuple[str, ...]]) -> tuple[int | None, tuple[str, ...], int | None]:
    """Return the first update with a difference that had a consequence, in which kinds, and where the generators' had none."""
    drew, before, steps = None, False, [*apart]
    for step, after in zip(steps, [*steps[1:], None], strict=True):
        kinds, then = apart[step], () if after is None else apart[after]
        if kinds == ("rng",) and (before or not {"weights", "optimizer"}.intersection(then)):
            drew, before = drew or step, True
        elif kinds:
            return step, tuple(sorted(kinds, key=lambda kind: before and kind == "rng")), drew
        else:
            before = False
    return None, (), drew


def why(kind: str, step: int, last: int, kinds: list[str]) -> str | None:
    """Return what may have made a kind part at an update, the same in all at `last`; None where that can't be told."""
    missing = [one for one in KINDS[: KINDS.index(kind)] if one not in kinds]
    if last < step - 1 and (kind in ("weights", "optimizer") or "weights" in missing):
        return None
    head = NAMES[kind] + (f", or {' or '.join(NAMES[one] for one in missing)}, which were not logged" if missing else "")
    if kind == "gradients" and not missing:
        head += " alone"
    began = kind in ("weights", "optimizer") and step == 1
    return f"{head}: {'they began apart' if began else CAUSES[kind]}"


def read(folder: Path) -> tuple[Curves, int]:
    """Return, by kind, the digests at each update, and the last update that is told of.

    They are as TensorBoard shows them: a file that goes on hides what it writes again.
    """
    try:
        from tensorboard.compat.proto.event_pb2 import SessionLog
    except ImportError as error:
        raise ImportError(f"compare needs tensorboard to read a run's files: pip install tensorboard ({error})") from None
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; give that of a run's TensorBoard files")
    tags = {f"train/fingerprint/{kind}": kind for kind in KINDS}
    found, last = Curves(), 0
    for path in sorted(path for path in folder.iterdir() if "tfevents" in path.name and not path.is_dir()):
        for event in events(path):
            if event.HasField("session_log") and event.session_log.status == SessionLog.START:
                found = {kind: {s: x for s, x in curve.items() if s < event.step} for kind, curve in found.items()}
                last = min(last, max(0, event.step - 1))
            last = max(last, event.step if event.HasField("summary") else 0)
            for value in event.summary.value:
                if value.tag in tags:
                    found.setdefault(tags[value.tag], {})[event.step] = value.simple_value
    if not (found := {kind: curve for kind, curve in found.items() if curve}):
        raise ValueError(f"{folder} holds no fingerprints; train with Fingerprint() beside TensorBoard({str(folder)!r})")
    return found, last


def events(path: Path) -> Iterator[Any]:
    """Yield what an event file holds; raises ValueError, naming the file and the byte, where it is damaged or cut off."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.tensorflow_stub.errors import DataLossError, OutOfRangeError
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import PyRecordReader_New

    path.open("rb").close()  # an error that says why
    reader, at = PyRecordReader_New(str(path)), 0
    while True:
        try:
            reader.GetNext()
        except OutOfRangeError:
            return
        except DataLossError as error:
            raise ValueError(f"{path} is damaged at byte {at} of {path.stat().st_size}, and nothing behind it can be read; give "
                             "a whole copy, or to compare what stands before it cut it off there: "
                             f"truncate -s {at} {path} ({error.message})") from None  # fmt: skip
        yield Event.FromString(reader.record())
        at += len(reader.record()) + 16  # length and two checksums
