"""Files that TensorBoard reads: written through, continued after a kill with each value once."""

from __future__ import annotations

import io
import os
import re
import socket
import time
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakSet

from .host import HostCopy


class EventFile(io.FileIO):
    """A new event file in `folder`; TensorBoard shows nothing that the others there hold from step `purge` on.

    What is added is with the system when `add` returns: a killed process loses none of it, and no writer's thread hides
    an error. Raises OSError where the folder can't be written, or later, where the file is gone or the disk is full.
    """

    def __init__(self, folder: Path, purge: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder.mkdir(parents=True, exist_ok=True)
        # Readers go by the order of names: neither a restart within the second nor a clock put back may come first.
        others = [re.match(r"events\.out\.tfevents\.(\d{10})\.", path.name) for path in folder.iterdir()]
        stamp = max([int(time.time()), *(int(other[1]) + 1 for other in others if other)])
        super().__init__(folder / f"events.out.tfevents.{stamp:010d}.{socket.gethostname()}.{os.getpid()}.0", "xb")
        self._event, self._summary, self._record = Event, Summary, RecordWriter(self)
        start = Event(wall_time=time.time(), step=purge, session_log=SessionLog(status=SessionLog.START))
        # TensorBoard takes the first START of a folder for no restart and hides nothing, so there are two.
        for event in (Event(wall_time=time.time(), file_version="brain.Event:2"), start, start):
            self._record.write(event.SerializeToString())

    def write(self, data: Any) -> int:
        """Write one record; raises OSError unless all of it went into a file that is still there."""
        if not os.fstat(self.fileno()).st_nlink:
            raise FileNotFoundError(f"{self.name!s} was deleted")
        if (count := super().write(data)) != len(data):
            raise OSError(f"the disk took {count} of {len(data)} bytes")
        return len(data)

    def add(self, step: int, when: float, values: Mapping[str, float], others: Iterable[Any] = ()) -> None:
        """Add numbers (tag -> value) and whole summaries at a step; `when` is what time.time() said."""
        found = [self._summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        found += [value for other in others for value in other.value]
        self._record.write(self._event(wall_time=when, step=step, summary=self._summary(value=found)).SerializeToString())


class Events:
    """A run's curves in `folder`, each (tag, step) once, over kills, resumes and several entries of a Loop.

    Numbers on a device reach the file without a wait, at a later call. A file that fails is closed with one warning.
    """

    opened: ClassVar[WeakSet[Events]] = WeakSet()

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder, self.step = Path(folder).absolute(), 0  # the run may change its directory
        self.file: EventFile | None = None
        self.host = HostCopy()
        self._kept: dict[str, list[float]] = {}  # tag -> value and time of what was written at `_kept_step`
        self._kept_step = 0

    def open(self, step: int) -> None:
        """Hide what other files hold from this step on, and write again what is known to belong to this very step."""
        if any(other.file is not None and other.folder.resolve() == self.folder.resolve() for other in self.opened):
            raise ValueError(f"folder {str(self.folder)!r} is written by another TensorBoard now; give each its own")
        known = self.step == step  # else nothing of this step is, so what stands there stays
        kept = self._kept if self._kept_step == step and known else {}
        try:
            self.file = EventFile(self.folder, step + (not known))
        except OSError as error:
            raise OSError(f"TensorBoard can't write to folder={str(self.folder)!r}, give another: {error}") from error
        self.opened.add(self)
        self.step, self._kept, self._kept_step = step, {}, step
        for tag, (value, when) in kept.items():
            self.write(step, when, {tag: value})

    def put(self, step: int, values: Mapping[str, Any], all: bool = False) -> None:
        """Take numbers and 0-d tensors as they are now, and leave out the rest; `all` waits until they are written."""
        self.step = step
        self.host.put((step, time.time()), values)
        self.drain(all)

    def drain(self, all: bool = False) -> None:
        """Write what has arrived from the device; `all` waits for the rest."""
        for (step, when), values in self.host.take(all):
            self.write(step, when, values)

    def write(self, step: int, when: float, values: Mapping[str, float], others: Iterable[Any] = ()) -> None:
        """Write values at a step, less those that stand there."""
        if step != self._kept_step:
            self._kept, self._kept_step = {}, step
        values = {tag: value for tag, value in values.items() if tag not in self._kept}
        self._kept.update({tag: [value, when] for tag, value in values.items()})
        if self.file is not None and (values or others):
            self._try(self.file.add, step, when, values, others)

    def text(self, tag: str, text: str) -> None:
        """Write Markdown."""
        from torch.utils.tensorboard.summary import text as summary

        self.write(self.step, time.time(), {}, [summary(tag, text)])

    def show(self, step: int, tag: str, text: str, picture: Any = None) -> None:
        """Write Markdown and a picture (a tensor (C, H, W) of values from 0 to 1) that belong to a step."""
        from torch.utils.tensorboard.summary import image
        from torch.utils.tensorboard.summary import text as summary

        pictures = [] if picture is None else [image(tag, picture, dataformats="CHW")]
        self.write(step, time.time(), {}, [summary(tag, text), *pictures])

    def hparams(self, settings: Mapping[str, Any], tags: Iterable[str]) -> None:
        """Write, after all that is pending, the HParams page's row: settings, and these tags' last values."""
        self.drain(all=True)
        if self.file is None:
            return
        from torch.utils.tensorboard.summary import hparams

        shown = {name: value for name, value in settings.items() if isinstance(value, int | float | str)}
        shown = {name: str(value) if isinstance(value, bool) else value for name, value in shown.items()}
        self.write(self.step, time.time(), {}, hparams(shown, dict.fromkeys(tags, 0.0)))

    def _try(self, act: Any, *args: Any) -> None:
        try:
            act(*args)
        except OSError as error:
            self.close()
            warnings.warn(f"TensorBoard stops writing to folder={str(self.folder)!r}: {error}", stacklevel=2)

    def close(self) -> None:
        """Close the file."""
        file, self.file = self.file, None
        if file is not None:
            file.close()

    def state_dict(self) -> dict[str, Any]:
        """Return, once all that is pending is on the disk, the step and what was written at it."""
        self.drain(all=True)
        if self.file is not None:
            self._try(os.fsync, self.file.fileno())
        return {"step": self.step, "kept": self._kept if self._kept_step == self.step else {}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        self.step = self._kept_step = state["step"]
        self._kept = state["kept"]
