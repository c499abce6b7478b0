"""The trials of a search in a storage of Optuna that any number of processes share: each is run once, by whoever claims it."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

log = logging.getLogger("hookloop")
LEASE = "lease"


def engine() -> Any:
    """Return Optuna; raises ImportError that names the extra."""
    try:
        import optuna
    except ImportError:
        raise ImportError("a search runs on Optuna: pip install 'hookloop[search]'") from None
    return optuna


def opened(storage: str | os.PathLike[str] | None) -> Any:
    """Return a folder's journal of trials, a database by its URL, or memory; the folder is made if it is missing."""
    optuna = engine()
    if storage is None:
        return optuna.storages.InMemoryStorage()
    if isinstance(storage, str) and "://" in storage:
        return optuna.storages.RDBStorage(storage)
    if not isinstance(storage, str | os.PathLike) or not os.fspath(storage):
        raise ValueError(f"storage must be the path of a folder, a database's URL, or None, not {storage!r}")
    path = Path(storage) / "trials.journal"
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = Lock(path) if os.name == "posix" else optuna.storages.journal.JournalFileOpenLock(str(path))
    return optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(path), lock_obj=lock))


class Lock:
    """Lets one process at a time write the journal; one that dies lets go at once, and what it left half written goes."""

    def __init__(self, path: Path) -> None:
        self.path, self._file = path, cast(Any, None)

    def acquire(self) -> bool:
        """Wait for it."""
        import fcntl

        self._file = open(self.path, "r+b")  # noqa: SIM115  # until release
        fcntl.flock(self._file, fcntl.LOCK_EX)
        end = self._file.seek(0, os.SEEK_END)
        self._file.seek(max(0, end - 2**20))
        tail = self._file.read()
        if tail and not tail.endswith(b"\n"):
            self._file.truncate(end - len(tail) + tail.rfind(b"\n") + 1)
        return True

    def release(self) -> None:
        """Let go."""
        self._file.close()


class Trials:
    """A search's trials, numbered from 0 to `total` - 1, none of which is made anew where one was cut off."""

    def __init__(self, study: Any, total: int, interval: float, tries: int) -> None:
        self.study, self.total, self.interval, self.tries = study, total, interval, tries
        self.storage = study._storage
        self.states = engine().trial.TrialState
        self._seen: dict[int, tuple[Any, float]] = {}  # lease, and since when it has been that

    def all(self) -> list[Any]:
        """Return the trials, as they stand now."""
        return list(self.storage.get_all_trials(self.study._study_id, deepcopy=False))[: self.total]

    def add(self) -> None:
        """Make all trials that are missing, waiting; two who do so at once make some beyond the last, which nobody runs.

        They are all alike: what a trial's settings are hangs on its number, which says nothing of who made it.
        """
        for _ in range(len(self.all()), self.total):
            self.study.enqueue_trial({})

    def claim(self) -> Any:
        """Return a trial that waited and is ours now, or None."""
        for found in self.all():
            if found.state != self.states.WAITING:
                continue
            with contextlib.suppress(engine().exceptions.UpdateFinishedTrialError):
                if self.storage.set_trial_state_values(found._trial_id, self.states.RUNNING):
                    return found
        return None

    def free(self) -> None:
        """Have trials whose process is gone wait again, or fail once that has happened too often."""
        for found in self.all():
            if found.state != self.states.RUNNING or not self._gone(found):
                continue
            tried = found.user_attrs.get("tries", 0)
            log.warning("trial %d was cut off: its process is gone", found.number)
            with contextlib.suppress(engine().exceptions.UpdateFinishedTrialError):
                if tried < self.tries:
                    self.storage.set_trial_user_attr(found._trial_id, LEASE, None)  # or whoever claims it would look gone too
                    self.storage.set_trial_state_values(found._trial_id, self.states.WAITING)
                else:
                    self.fail(found, f"its process was gone {tried} times; look at the memory that it takes")

    def _gone(self, found: Any) -> bool:
        lease, now = found.user_attrs.get(LEASE), time.monotonic()
        known, since = self._seen.get(found.number, (None, now))
        if known != lease or found.number not in self._seen:
            self._seen[found.number] = lease, now
            since = now
        if lease is not None and lease["host"] == place() and os.name == "posix":
            return not alive(lease["pid"], lease["began"])
        return now - since > 2 * self.interval

    def fail(self, found: Any, error: str) -> None:
        """Record why a trial failed."""
        self.storage.set_trial_user_attr(found._trial_id, "error", error)
        self.storage.set_trial_state_values(found._trial_id, self.states.FAIL)

    def running(self) -> bool:
        """Tell whether trials are under way, wherever."""
        return any(found.state == self.states.RUNNING for found in self.all())

    @contextlib.contextmanager
    def leased(self, found: Any) -> Iterator[None]:
        """Say, while the body runs, again and again that this process works on a trial; what interrupts it lets it wait again."""
        mine = {"host": place(), "pid": os.getpid(), "began": began(os.getpid()), "token": uuid.uuid4().hex}
        tried = found.user_attrs.get("tries", 0) + 1
        self.storage.set_trial_user_attr(found._trial_id, "tries", tried)
        self.storage.set_trial_user_attr(found._trial_id, LEASE, {**mine, "beat": 0})
        over = threading.Event()

        def beat() -> None:
            count = 0
            while not over.wait(self.interval):
                count += 1
                with contextlib.suppress(Exception):  # a storage that is away for a moment
                    self.storage.set_trial_user_attr(found._trial_id, LEASE, {**mine, "beat": count})

        thread = threading.Thread(target=beat, name="hookloop-lease", daemon=True)
        thread.start()
        try:
            yield
        except BaseException:
            with contextlib.suppress(engine().exceptions.UpdateFinishedTrialError):
                self.storage.set_trial_user_attr(found._trial_id, "tries", tried - 1)
                self.storage.set_trial_state_values(found._trial_id, self.states.WAITING)
            raise
        finally:
            over.set()
            thread.join()


@functools.cache
def place() -> str:
    """Return what names the processes among which a number is one process: this machine since it began, and the container."""
    found = [socket.gethostname()]
    with contextlib.suppress(OSError):
        found += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(found)


def began(pid: int) -> int:
    """Return when a process began, in its system's ticks; 0 where that is not told."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return -1 if fields[0] in "ZX" else int(fields[19])


def alive(pid: int, since: int) -> bool:
    """Tell whether the process of this number that began then is there still; numbers are used again."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return began(pid) == since
