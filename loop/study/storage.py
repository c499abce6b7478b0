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
HERE: set[str] = set()  # the tokens of leases under which this process works now


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
    if is_url(storage):
        return optuna.storages.RDBStorage(storage)
    path = Path(storage) / "trials.journal"
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = Lock(path) if os.name == "posix" else optuna.storages.journal.JournalFileOpenLock(str(path))
    return optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(path), lock_obj=lock))


def located(storage: Any) -> str | None:
    """Return a storage such that it stays the same when train changes the working directory; raises ValueError for what is none."""
    if storage is None:
        return None
    if not isinstance(storage, str | os.PathLike) or not os.fspath(storage):
        raise ValueError(f"storage must be the path of a folder, a database's URL, or None, not {storage!r}")
    if not is_url(storage):
        if os.path.exists(storage) and not os.path.isdir(storage):
            raise ValueError(f"storage={os.fspath(storage)!r} is a file; give a folder, or a database as sqlite:///{storage}")
        return os.path.abspath(storage)
    name, file = os.fspath(storage), database(os.fspath(storage))
    kind, _, rest = name.partition(":///")
    return name if file is None else f"{kind}:///{os.path.abspath(file)}{rest.removeprefix(file)}"


def is_url(storage: Any) -> bool:
    """Tell a database's URL from a folder."""
    return "://" in str(storage)


def database(url: str) -> str | None:
    """Return the file of an SQLite database, None for other databases."""
    kind, _, file = url.partition(":///")
    file = file.partition("?")[0]
    return file if kind.startswith("sqlite") and file not in ("", ":memory:") and not file.startswith("file:") else None


def in_memory(url: str) -> bool:
    """Tell an SQLite database that each process has for itself."""
    return url.startswith("sqlite:") and url.partition(":///")[2].partition("?")[0] in ("", ":memory:")


@contextlib.contextmanager
def alone(storage: str | None) -> Iterator[None]:
    """Let one process at a time run the body: what looks at a trial and then takes it must not be overtaken between the two.

    A server's database has no file to lock: there each statement is one process's at a time, and no more than that.
    """
    path = None if storage is None else database(storage) if is_url(storage) else os.path.join(storage, "trials")
    if path is None or os.name != "posix":
        yield
        return
    import fcntl

    with open(f"{path}.lock", "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # closing it is not enough: a data loader's process may hold it open too


class Lock:
    """Lets one process at a time write the journal; one that dies lets go at once, and what it left half written goes."""

    def __init__(self, path: Path) -> None:
        self.path, self._file = path, cast(Any, None)

    def acquire(self) -> bool:
        """Wait for it."""
        import fcntl

        self._file = open(self.path, "r+b")  # noqa: SIM115  # until release
        fcntl.flock(self._file, fcntl.LOCK_EX)
        end, size, tail = self._file.seek(0, os.SEEK_END), 1, b""
        while len(tail) < end and b"\n" not in tail:  # as a rule the last byte is one
            self._file.seek(max(0, end - size))
            tail, size = self._file.read(), 8 * size
        if tail and not tail.endswith(b"\n"):
            self._file.truncate(end - len(tail) + tail.rfind(b"\n") + 1)
        return True

    def release(self) -> None:
        """Let go, also where a data loader's process was forked meanwhile and holds the file open."""
        import fcntl

        fcntl.flock(self._file, fcntl.LOCK_UN)
        self._file.close()


class Trials:
    """A search's trials, numbered from 0 to `total` - 1, none of which is made anew where one was cut off."""

    def __init__(self, study: Any, total: int, interval: float, tries: int, place: str | None = None) -> None:
        self.study, self.total, self.interval, self.tries, self.where = study, total, interval, tries, place
        self.storage = study._storage
        self.states = engine().trial.TrialState
        self._seen: dict[int, tuple[Any, float]] = {}  # when it began, and its lease; since when it has been that

    def all(self) -> list[Any]:
        """Return the trials, as they stand now."""
        return list(self.storage.get_all_trials(self.study._study_id, deepcopy=False))[: self.total]

    def add(self) -> None:
        """Make all trials that are missing, waiting; two who do so at once make some beyond the last, which nobody runs.

        They are all alike: what a trial's settings are hangs on its number, which says nothing of who made it.
        """
        for _ in range(len(self.all()), self.total):
            self.study.enqueue_trial({})

    def take(self) -> Any:
        """Return a trial that waited, or whose process is gone, and is ours now, or None."""
        with alone(self.where):
            self.free()
            return self.claim()

    def claim(self) -> Any:
        """Return a trial that waited and is ours now, or None; only in `alone`."""
        for found in self.all():
            if found.state != self.states.WAITING:
                continue
            with contextlib.suppress(engine().exceptions.UpdateFinishedTrialError):
                if self.storage.set_trial_state_values(found._trial_id, self.states.RUNNING):
                    return found
        return None

    def free(self) -> None:
        """Have trials whose process is gone wait again, or fail once that has happened too often; only in `alone`."""
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
        sign = found.datetime_start, lease
        if found.number not in self._seen or self._seen[found.number][0] != sign:
            self._seen[found.number] = sign, now
        if lease is not None and lease["host"] == place() and os.name == "posix":
            if lease["pid"] == os.getpid() and lease["began"] == began(os.getpid()):
                return lease["token"] not in HERE  # an earlier search in this process could not give it back
            return not alive(lease["pid"], lease["began"])
        return now - self._seen[found.number][1] > 2 * self.interval

    def fail(self, found: Any, error: str) -> None:
        """Record why a trial failed."""
        self.storage.set_trial_user_attr(found._trial_id, "error", error)
        self.storage.set_trial_state_values(found._trial_id, self.states.FAIL)

    def open(self) -> bool:
        """Tell whether trials wait or are under way, wherever."""
        return any(not found.state.is_finished() for found in self.all())

    @contextlib.contextmanager
    def leased(self, found: Any) -> Iterator[None]:
        """Say, while the body runs, again and again that this process works on a trial; what interrupts it lets it wait again."""
        token = uuid.uuid4().hex
        mine = {"host": place(), "pid": os.getpid(), "began": began(os.getpid()), "token": token}
        tried = found.user_attrs.get("tries", 0) + 1
        over = threading.Event()

        def beat() -> None:
            count = 0
            while not over.wait(self.interval):
                count += 1
                with contextlib.suppress(Exception):  # a storage that is away for a moment
                    self.storage.set_trial_user_attr(found._trial_id, LEASE, {**mine, "beat": count})

        thread = threading.Thread(target=beat, name="hookloop-lease", daemon=True)
        HERE.add(token)
        try:
            try:
                self.storage.set_trial_user_attr(found._trial_id, "tries", tried)
                self.storage.set_trial_user_attr(found._trial_id, LEASE, {**mine, "beat": 0})
                thread.start()
                yield
            finally:
                over.set()
                if thread.ident is not None:
                    thread.join()  # or a last sign of it would come after the lease was given back
        except BaseException:
            with contextlib.suppress(engine().exceptions.UpdateFinishedTrialError):
                self.storage.set_trial_user_attr(found._trial_id, "tries", tried - 1)
                self.storage.set_trial_user_attr(found._trial_id, LEASE, None)
                self.storage.set_trial_state_values(found._trial_id, self.states.WAITING)
            raise
        finally:
            HERE.discard(token)


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
