"""Saves that fail or are cut off: real processes killed, every system call of a save failed, disks full, folders gone.

Runs that are killed are forked by a server, a process of its own that has imported torch and sees no accelerator, so that
a fork may run backward: `python test_faults_save.py` (see `serve`). Each test's name begins with the fault's number.
"""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import hashlib
import itertools
import json
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Samples, adamw, assert_same_bits, bits, built_in, loader, loss_fn, net, same
from torch import nn
from torch.utils.data import DataLoader

from hookloop.callbacks import (
    Checkpoint,
    DynamicBatchSize,
    EarlyStopping,
    GradientAccumulation,
    Seed,
    Warmup,
)
from hookloop.loop import Callback, Goal, Loop, State
from hookloop.loop.store import Folder, Found, list_checkpoints, read, readable
from hookloop.loop.store.disk import Sink

# ---------------------------------------------------------------------------------------------- system calls, watched

NAMES = ("open", "write", "fsync", "close", "mkdir", "rename", "replace", "unlink", "rmdir")


@dataclass
class Call:
    """A call of `os` that is about to be made on something in the folder."""

    number: int
    name: str
    path: Path
    flags: int = 0
    fd: int = -1
    data: bytes = b""

    @property
    def creates(self) -> bool:
        return self.name in ("write", "fsync", "mkdir", "rename", "replace") or bool(self.flags & os.O_CREAT)


class Watch:
    """Inside `with`, `before(call)` runs before each call of `os` that touches `folder` or what it holds; all are kept."""

    def __init__(self, folder: Path, before: Callable[[Call], None] = lambda call: None, armed: bool = True) -> None:
        self.folder, self.before, self.armed = folder, before, armed
        self.calls: list[Call] = []
        self.real = {name: getattr(os, name) for name in NAMES}
        self._paths: dict[int, Path] = {}
        self._busy = False

    def __enter__(self) -> Watch:
        for name in NAMES:
            setattr(os, name, self._wrapped(name))
        return self

    def __exit__(self, *about: Any) -> None:
        for name, real in self.real.items():
            setattr(os, name, real)

    def _path(self, target: Any, dir_fd: int | None) -> Path | None:
        if isinstance(target, int):
            return self._paths.get(target)
        base = self._paths.get(dir_fd, Path("/nowhere")) if dir_fd is not None else Path()
        return base / os.fsdecode(target)

    def _wrapped(self, name: str) -> Callable[..., Any]:
        real = self.real[name]

        def call(*args: Any, **kwargs: Any) -> Any:
            path = self._path(args[0], kwargs.get("dir_fd"))
            inside = path is not None and (path == self.folder or self.folder in path.parents)
            if inside and self.armed and not self._busy:
                assert path is not None
                fd = args[0] if isinstance(args[0], int) else -1
                flags = args[1] if name == "open" else 0
                made = Call(len(self.calls), name, path, flags, fd, bytes(args[1]) if name == "write" else b"")
                self.calls.append(made)
                self._busy = True
                try:
                    self.before(made)
                except OSError:
                    if name == "close":  # Linux has closed it all the same
                        real(*args)
                    raise
                finally:
                    self._busy = False
            result = real(*args, **kwargs)
            if name == "open" and inside and path is not None:
                self._paths[result] = path
            elif name == "close":
                self._paths.pop(args[0], None)
            return result

        return call

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """What runs inside is neither counted nor failed."""
        before, self._busy = self._busy, True
        yield
        self._busy = before


def fail_at(number: int, code: int) -> Callable[[Call], None]:
    def before(call: Call) -> None:
        if call.number == number:
            raise OSError(code, os.strerror(code), str(call.path))

    return before


def die_at(watch: Watch, number: int) -> None:
    """The process is gone in front of this call, or halfway through it where it writes."""

    def before(call: Call) -> None:
        if call.number == number:
            if call.name == "write":
                watch.real["write"](call.fd, call.data[: len(call.data) // 2])
            os._exit(9)

    watch.before = before


# ------------------------------------------------------------------------------------------------------- small runs


class Hook(Callback):
    """Calls `act(state)` in one hook."""

    def __init__(self, hook: str, act: Callable[[State], Any]) -> None:
        setattr(self, hook, self._act)
        self.act = act

    def _act(self, state: State) -> None:
        self.act(state)


def small(folder: Path | None, extra: Any = (), ballast: int = 0, resume: bool = True, **kwargs: Any) -> Loop:
    """Two updates an epoch, dropout, momentum, best weights in a file beside the checkpoints; saved at each epoch's end."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 3), nn.Dropout(0.3))
    if ballast:
        model.register_buffer("ballast", torch.arange(ballast / 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    save = [] if folder is None else [Checkpoint(folder, **{"keep": 1, **kwargs})]
    callbacks = [*save, Seed(5), EarlyStopping("val_loss", patience=99, restore_best=True), *extra]
    return Loop(model, optimizer, callbacks, resume=folder if resume else None)


def train(loop: Loop, epochs: int = 3) -> Loop:
    built_in(loop, loss_fn, loader(16), loader(20), epochs=epochs)
    return loop


@dataclass
class Reference:
    """What runs of one, two and three epochs leave where nothing goes wrong."""

    folders: list[Path]
    found: list[Found]
    bits: list[dict[str, torch.Tensor]]

    @classmethod
    def of(cls, base: Path, **kwargs: Any) -> Reference:
        folders, found, all_bits = [base / "none"], [], []
        for epochs in (1, 2, 3):
            folder = base / f"epochs{epochs}"
            all_bits.append(bits(train(small(folder, **kwargs), epochs)))
            folders.append(folder)
            found.append(there(folder))
        return cls(folders, found, all_bits)

    def copy(self, epochs: int, folder: Path) -> None:
        if epochs:
            shutil.copytree(self.folders[epochs], folder)


def there(folder: Path) -> Found:
    found = read(folder)
    assert found is not None
    return found


def listing(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))


def parts(folder: Path) -> list[str]:
    return [name for name in listing(folder) if name.endswith(".part")]


def same_found(a: Found, b: Found) -> None:
    assert a.place.name == b.place.name
    same(a.model, b.model, "model")
    same(a.state, b.state, "state")
    assert a.lost == b.lost == []


def beside(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.glob("weights-*.pt"))


def told(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(one.message) for one in caught]


@contextlib.contextmanager
def warned() -> Iterator[list[warnings.WarningMessage]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", ResourceWarning)  # of what another test left, whenever the collector finds it
        yield caught


# ------------------------------------------------------------------------------------------------------- the server


class Server:
    """Forks runs, each in a session of its own; `start` and `wait` leave time between them to kill one."""

    def __init__(self, logs: Path) -> None:
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen([sys.executable, __file__], env=environment, bufsize=0, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE)  # fmt: skip
        self.log = logs / "log"
        assert self._line() == "ready"

    def _line(self, timeout: float = 120) -> str:
        assert self.process.stdout is not None
        assert select.select([self.process.stdout], [], [], timeout)[0], "the server does not answer"
        return self.process.stdout.readline().decode().strip()

    def start(self, job: str, *args: Any) -> int:
        assert self.process.stdin is not None
        self.log.unlink(missing_ok=True)
        self.process.stdin.write(json.dumps([job, args, str(self.log)], default=str).encode() + b"\n")
        return int(self._line())

    def running(self, seconds: float) -> bool:
        """Wait for the run to end, at most so long."""
        return not select.select([self.process.stdout], [], [], seconds)[0]

    def wait(self) -> int:
        """The exit status, negative for a signal."""
        return os.waitstatus_to_exitcode(int(self._line(600)))

    def call(self, job: str, *args: Any) -> str:
        self.start(job, *args)
        status = self.wait()
        text = self.log.read_text()
        assert status == 0, text
        return text.splitlines()[-1] if text else ""  # before it stands what was logged

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(20)
        self.process.stdout.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("server"))
    yield made
    made.close()


def serve() -> None:
    """Fork a child for every line of standard input, `[job, arguments, log]`; answer its process id, then its status."""
    with tempfile.TemporaryDirectory() as place:  # what torch imports and sets up at the first use of it
        long_run(str(Path(place, "warm")), str(Path(place, "trace")), 1, False, 0, 1, "")
    print("ready", flush=True)
    for line in sys.stdin:
        job, args, log = json.loads(line)
        told_by, tells = os.pipe()
        if not (pid := os.fork()):
            in_child(globals()[job], args, log, tells)
        os.read(told_by, 1)
        os.close(told_by)
        os.close(tells)
        print(pid, flush=True)
        print(os.waitpid(pid, 0)[1], flush=True)


def in_child(act: Callable[..., None], args: Any, log: str, tells: int) -> None:
    status = 1
    try:
        os.setsid()
        torch.set_num_threads(1)
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(out, 2)
        faulthandler.dump_traceback_later(300, exit=True)
        warnings.simplefilter("error")
        os.write(tells, b".")
        act(*args)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


# ------------------------------------------------------------------------------------- CK1: killed at random times


class Augmented(Samples):
    """Draws from every global generator for each sample."""

    def __getitem__(self, i: int) -> Any:
        x, y, i = super().__getitem__(i)
        return x + random.random() + torch.rand(()), y, i


class Trace(Callback):
    """Appends one line an update to a file: its number, the samples, the loss to the bit."""

    def __init__(self, path: Path) -> None:
        self.file, self.index = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), list[Any]()

    def on_micro_end(self, state: State) -> None:
        assert state.micro is not None
        if state.micro.training:
            self.index.append(state.micro.batch[2].tolist())

    def on_step_end(self, state: State) -> None:
        os.write(self.file, json.dumps([state.step, self.index, float(state.metrics["loss"]).hex()]).encode() + b"\n")
        self.index = []

    @staticmethod
    def read(path: Path) -> dict[int, set[str]]:
        """Update -> all that was ever said of it; a line that a kill cut off is left out."""
        found: dict[int, set[str]] = {}
        for line in path.read_text().splitlines():
            with contextlib.suppress(ValueError):
                found.setdefault(json.loads(line)[0], set()).add(line)
        return found


def long_run(folder: str, trace: str, every: int, background: bool, workers: int, epochs: int, result: str) -> None:
    """All that changes a run, saved often; the same command starts and restarts it."""
    random.seed(0)
    seed, model = [Seed(5)] if every < 3 else [], net(seed=5)  # without it the generators' states decide
    save = [Checkpoint(folder, every=every, keep=2, best="val_loss", background=background)] if folder else []
    shaping = [Warmup(0.3), GradientAccumulation({0: 1, 2: 2, 5: 1}), DynamicBatchSize(4, 9, every=2),
               EarlyStopping("val_loss", patience=99, restore_best=True)]  # fmt: skip
    loop = Loop(model, adamw(model), [*seed, *save, *shaping, Trace(Path(trace))], resume=folder or None)
    data = DataLoader(Augmented(50), 8, shuffle=True, num_workers=workers)
    built_in(loop, loss_fn, data, loader(20), epochs=epochs)
    if result:
        found = bits(loop)
        state = loop.state
        torch.save([found, [state.step, state.samples, state.epoch, state.metrics["val_loss"]]], result)


def killed_until_done(server: Server, base: Path, seed: int, epochs: int, every: int, background: bool,
                      workers: tuple[int, ...]) -> tuple[int, int]:  # fmt: skip
    """Kill a run at random times until it gets through; return the kills, and those that fell into a save."""
    began = time.monotonic()
    server.call("long_run", base / "whole", base / "whole.trace", every, background, 0, epochs, base / "whole.bits")
    limit = (time.monotonic() - began) / 5
    server.call("long_run", "", base / "bare.trace", every, False, 0, epochs, base / "bare.bits")
    clock, kills, torn, folder = random.Random(seed), 0, 0, base / "killed"
    for attempt in itertools.count():
        assert attempt < 2000
        pid = server.start("long_run", folder, base / "killed.trace", every, background, workers[attempt % len(workers)],
                           epochs, base / "killed.bits")  # fmt: skip
        if server.running(clock.uniform(0, limit)):
            with contextlib.suppress(ProcessLookupError):  # it ended just now
                os.killpg(pid, signal.SIGKILL)
        status = server.wait()
        if status == 0:
            break
        assert status == -signal.SIGKILL, server.log.read_text()
        kills, torn, limit = kills + 1, torn + bool(folder.exists() and parts(folder)), limit * 1.01
        assert all(readable(p) for p in list_checkpoints(folder))
    whole, bare, found = (torch.load(base / f"{name}.bits", weights_only=True) for name in ("whole", "bare", "killed"))
    for expected in (whole, bare):
        assert_same_bits(found[0], expected[0])
        assert found[1] == expected[1]
    same_found(there(folder), there(base / "whole"))  # generators, data order, callbacks' states
    assert Trace.read(base / "killed.trace") == Trace.read(base / "bare.trace")  # a repeated update is the same one
    assert parts(folder) == []
    return kills, torn


def test_ck1_killed_at_random_times(server: Server, tmp_path: Path) -> None:
    total = 0
    for name, every, background, workers in (("a", 1, False, (0,)), ("b", 2, True, (0, 0, 2)), ("c", 3, False, (0,))):
        (tmp_path / name).mkdir()
        kills, torn = killed_until_done(server, tmp_path / name, 1, 9, every, background, workers)
        print(f"every={every}, background={background}: {kills} kills, {torn} of them inside a save")
        assert kills
        total += kills
    assert total >= 8


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_ck1_killed_two_hundred_times(server: Server, tmp_path: Path) -> None:
    total = torn = 0
    variants = [(3, False, (0,)), (1, False, (0,)), (1, True, (0,)), (2, False, (0, 2)), (2, True, (2, 0, 1))]
    for number in itertools.count():
        if total >= 200:
            break
        every, background, workers = variants[number % len(variants)]
        (tmp_path / str(number)).mkdir()
        kills, inside = killed_until_done(server, tmp_path / str(number), number, 14, every, background, workers)
        total, torn = total + kills, torn + inside
    print(f"{total} kills, {torn} of them inside a save, {number} runs")
    assert torn


# ---------------------------------------------------------------------- CK2, CK21: killed at every call of a save


def killed_at_every_call(base: str, start: int, stride: int, kwargs: dict[str, Any], end: int = 3) -> None:
    """A job: fork a run of epoch `start` + 1, kill it at its k-th call, look at what it left and go on from there to epoch `end`.

    Of the writes every `stride`-th is taken (0: none), of the other calls each.
    """
    if "best" in kwargs:
        kwargs["best"] = Goal(kwargs["best"], mode="max")  # the first stays the best
    reference, outcomes, kinds = Reference.of(Path(base), **kwargs), list[int](), list[str]()
    count = Watch(Path(base) / "counted")
    reference.copy(start, count.folder)
    with count:
        train(small(count.folder, **kwargs), start + 1)
    points = [c.number for c in count.calls if c.name != "write" or (stride and c.number % stride == 0)]
    for number in [*points, len(count.calls)]:
        folder = Path(base) / f"killed{number}"
        reference.copy(start, folder)
        sys.stdout.flush()
        if not (pid := os.fork()):
            with Watch(folder) as watch:
                die_at(watch, number)
                train(small(folder, **kwargs), start + 1)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert status in (0, 9), status
        found = read(folder)
        if found is None:
            assert start == 0
            outcomes.append(0)
        else:
            outcomes.append(found.state["progress"]["epoch"])
            same_found(found, reference.found[outcomes[-1] - 1])
        assert all(readable(p) for p in list_checkpoints(folder))
        if "best" in kwargs and start:
            best = Folder(folder).newest_for("best of Checkpoint")
            assert best is not None
            assert best.name == "step-00000002"
        kinds.append("part" if parts(folder) else "")

        swept = list[list[str]]()  # at the first epoch's start; later a save may be under way in the background

        def look(state: State, folder: Path = folder, swept: list[list[str]] = swept) -> None:
            swept.append(parts(folder))

        loop = train(small(folder, [Hook("on_epoch_start", look)], **kwargs), end)
        assert swept[:1] in ([], [[]])
        assert parts(folder) == []
        assert_same_bits(bits(loop), reference.bits[end - 1])
        same_found(there(folder), reference.found[end - 1])
        assert listing(folder) == listing(reference.folders[end]), number
        shutil.rmtree(folder)
        assert (status == 0) == (number == len(count.calls))
    assert outcomes == sorted(outcomes)  # one instant at which the new one takes over
    assert set(outcomes) == {start, start + 1}
    assert "part" in kinds
    print(len(outcomes) - 1)


@pytest.mark.parametrize("start", [0, 1])
def test_ck2_killed_at_system_calls_of_a_save(start: int, server: Server, tmp_path: Path) -> None:
    """The first save (start 0), and one that deletes an older checkpoint and the file beside that only it needed."""
    kills = int(server.call("killed_at_every_call", tmp_path, start, 10, {}))
    print(f"{kills} kills")
    assert kills > 30
    if start:
        assert beside(tmp_path / "epochs1") != beside(tmp_path / "epochs2")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("start", [0, 1])
def test_ck2_killed_at_every_system_call_of_a_save(start: int, background: bool, server: Server, tmp_path: Path) -> None:
    kills = int(server.call("killed_at_every_call", tmp_path, start, 1, {"background": background}))
    print(f"{kills} kills")
    assert kills > 150


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_ck21_killed_between_write_and_deletion(keep: int, server: Server, tmp_path: Path) -> None:
    """The best is kept as well as the newest `keep`; what is left over is swept at the next start."""
    kills = int(server.call("killed_at_every_call", tmp_path, 1, 0, {"keep": keep, "best": "val_loss"}))
    assert kills > 20


def test_ck21_killed_between_the_last_write_and_deletion(server: Server, tmp_path: Path) -> None:
    """The run's last save: the same command, started again, has nothing left to train and still leaves one of them."""
    assert int(server.call("killed_at_every_call", tmp_path, 1, 0, {}, 2)) > 20


# -------------------------------------------------------------------------------- CK21: what stands at every instant


@pytest.mark.parametrize(("keep", "best"), [
    (1, "min"), *(pytest.param(*other, marks=pytest.mark.slow) for other in ((1, None), (3, "max"))),
])  # fmt: skip
def test_ck21_at_every_instant(keep: int, best: str | None, tmp_path: Path) -> None:
    """In front of each call that changes the folder: one whole checkpoint at least, none broken, the best among them."""
    folder, most, bests, losses = tmp_path / "run", 0, list[str](), list[float]()
    watch = Watch(folder)

    def look(call: Call) -> None:
        nonlocal most
        if call.name == "write":
            return
        there = list_checkpoints(folder)
        assert all(readable(p) for p in there)
        assert len(there) >= min(most, keep)
        most = max(most, len(there))
        found = Folder(folder).newest_for("best of Checkpoint")
        assert found is not None or not bests
        if found is not None and found.name not in bests[-1:]:
            assert found.name not in bests
            bests.append(found.name)

    watch.before = look
    report = Hook("on_validation_end", lambda state: losses.append(state.metrics["val_loss"]))
    with watch:
        goal = None if best is None else Goal("val_loss", mode=best)
        train(small(folder, [report], keep=keep, every=1, best=goal), 4)
    look(Call(0, "", folder))
    # Saved after each of the updates 1 to 8, and once more after those that end an epoch.
    kept = ["step-00000007", "step-00000008", "step-00000008.2"][-keep:]
    better = min if best == "min" else max
    expected = [f"step-{2 * i + 2:08d}.2" for i in range(4) if better(losses[: i + 1]) not in losses[:i]]
    assert bests == ([] if best is None else expected)
    assert [p.name for p in list_checkpoints(folder)] == sorted({*kept, *bests[-1:]})
    needed = {name for p in list_checkpoints(folder) for name in json.loads((p / "manifest.json").read_text())["beside"]}
    assert set(beside(folder)) == needed
    assert parts(folder) == []


def test_ck21_leftovers_are_swept_at_the_start(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(small(folder), 1)
    before = listing(folder)
    shutil.copytree(list_checkpoints(folder)[0], folder / ".step-00000001.part")
    (folder / ".weights.beside.part").write_bytes(b"half")
    old = b"of a save that never came to its end"
    stale = f"weights-{hashlib.sha256(old).hexdigest()[:16]}.pt"
    (folder / stale).write_bytes(old)
    (folder / "weights-0123456789abcdef.pt").write_bytes(b"of the user, who gave it such a name")
    (folder / "notes.txt").write_text("not ours")
    swept = []
    train(small(folder, [Hook("on_epoch_start", lambda state: swept.append(parts(folder)))]), 2)
    assert swept == [[]]
    assert "notes.txt" in listing(folder)
    assert stale not in listing(folder)
    assert len(beside(folder)) == 2
    assert len(listing(folder)) == len(before) + 2


# ------------------------------------------------------------------------------------------- CK3: order on the disk


def order(calls: list[tuple[str, str]], target: str, old: str) -> None:
    """Assert the one order of (call, path in the folder) that a loss of power cannot hurt."""
    shown = [key for key, _ in itertools.groupby(calls)]
    weights = shown[0][1].removesuffix(".part").removeprefix(".")
    files = [f".{weights}.part"] + [f".{target}.part/{name}" for name in ("model.pt", "state.pt", "manifest.json")]
    put = [[("write", name), ("fsync", name)] for name in files]
    written = [*put[0], ("rename", files[0]), ("fsync", "."), ("mkdir", f".{target}.part"), *put[1], *put[2], *put[3],
               ("fsync", f".{target}.part"), ("rename", f".{target}.part"), ("fsync", ".")]  # fmt: skip
    assert shown[: len(written)] == written
    deleted = shown[len(written) :]
    assert deleted[0] == ("rename", old)
    assert sorted(deleted[1:-2]) == [("unlink", f".{old}.part/{name}") for name in ("manifest.json", "model.pt", "state.pt")]
    assert deleted[-2] == ("rmdir", f".{old}.part")
    assert deleted[-1][0] == "unlink"
    assert re.fullmatch(r"weights-[0-9a-f]{16}\.pt", deleted[-1][1])


@pytest.mark.parametrize("background", [False, True])
def test_ck3_order_of_calls(background: bool, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(small(folder), 1)
    with Watch(folder) as watch:
        train(small(folder, background=background), 2)
    changing = ("write", "fsync", "rename", "replace", "mkdir", "unlink", "rmdir")
    calls = [("rename" if c.name == "replace" else c.name, c.path.relative_to(folder).as_posix())
             for c in watch.calls if c.name in changing]  # fmt: skip
    gone = [("mkdir", "."), ("unlink", ".weights.beside.part")]  # the folder is there already, and no file of that name
    assert calls[:2] == gone
    order(calls[2:], "step-00000004", "step-00000002")


# --------------------------------------------------------------------- CK4, CK5: errors of the system during a save

BALLAST = 400_000
FAILED = "Checkpoint failed to save; older ones stay: "
EITHER = (FAILED, "Checkpoint failed to delete an old one: ")


def faults(base: Path, stride: int, code: int) -> Iterator[tuple[Reference, Path, Call]]:
    """A fresh copy of a folder after one epoch, and each call of the second epoch's save that can fail so."""
    reference = Reference.of(base, ballast=BALLAST)
    folder = base / "counted"
    reference.copy(1, folder)
    with Watch(folder) as watch:
        train(small(folder, ballast=BALLAST), 2)
    started = next(c.number for c in watch.calls if c.name == "mkdir")  # before it: what on_fit_start looks at
    for call in watch.calls:
        if call.number < started or (call.name == "write" and call.number % stride) or not call.creates:
            continue
        if call.name == "mkdir" and call.path == folder:  # it is there: no error comes from this
            continue
        folder = base / f"fault{call.number}"
        reference.copy(1, folder)
        call.path = folder / call.path.relative_to(base / "counted")
        yield reference, folder, call
        shutil.rmtree(folder)


def failing_runs(base: Path, stride: int, code: int) -> int:
    count = 0
    for reference, folder, call in faults(base, stride, code):
        seen = list[Any]()

        def look(state: State, folder: Path = folder, seen: list[Any] = seen) -> None:
            seen.append(
                (parts(folder), [readable(p) for p in list_checkpoints(folder)], there(folder).state["progress"]["epoch"])
            )

        with warned() as caught, Watch(folder, fail_at(call.number, code)):
            loop = small(folder, [Hook("on_epoch_start", look)], ballast=BALLAST)
            train(loop, 3)
        texts = told(caught)
        assert len(texts) == 1, (call, texts)
        assert texts[0].startswith(EITHER), call
        if call.name == "write" or (call.name == "fsync" and not call.path.is_dir() and call.path.suffix != ".part") \
                or (call.name == "fsync" and call.path.name == ".weights.beside.part"):  # fmt: skip
            if code in (errno.ENOSPC, errno.EDQUOT):
                match = re.search(r"disk full: (\S+) needs ([\d.]+) MB, ([\d.]+) MB are free", texts[0])
                assert match, texts[0]
                assert match[1] == str(call.path)
                whole = {".weights.beside.part": "0.4", "model.pt": "0.4", "state.pt": "0.0", "manifest.json": "0.0"}
                assert match[2] == whole[call.path.name]
                assert float(match[3]) == pytest.approx(shutil.disk_usage(folder).free / 1e6, rel=0.2)
        else:
            assert os.strerror(code) in texts[0], texts[0]
        assert len(seen) == 2, call
        left, good, epoch = seen[1]
        assert left == [], call
        assert all(good)
        assert epoch in (1, 2)
        assert_same_bits(bits(loop), reference.bits[2])
        same_found(there(folder), reference.found[2])
        assert listing(folder) == listing(reference.folders[3]), call
        count += 1
    return count


def test_ck4_disk_full_at_calls_of_a_save(tmp_path: Path) -> None:
    count = failing_runs(tmp_path, 10, errno.ENOSPC)
    print(f"{count} calls")
    assert count > 15


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_ck4_disk_full_at_every_call_of_a_save(code: int, tmp_path: Path) -> None:
    count = failing_runs(tmp_path, 1, code)
    print(f"{count} calls")
    assert count > 100


@pytest.mark.parametrize("code", [errno.EIO, errno.EROFS, *(
    pytest.param(code, marks=pytest.mark.slow) for code in (errno.EACCES, errno.EDQUOT))])  # fmt: skip
def test_ck5_errors_in_a_save_are_told_and_training_goes_on(code: int, tmp_path: Path) -> None:
    assert failing_runs(tmp_path, 10**9, code) > 8  # all calls but writes


@pytest.mark.parametrize("background", [False, True])
def test_ck4_stops_where_told_to(background: bool, tmp_path: Path) -> None:
    """With on_failure="stop" the OSError ends the run; with room again, the same command ends as if nothing had been."""
    for reference, folder, call in faults(tmp_path, 60, errno.ENOSPC):
        with Watch(folder, fail_at(call.number, errno.ENOSPC)), pytest.raises(OSError) as raised:  # noqa: PT011
            train(small(folder, ballast=BALLAST, on_failure="stop", background=background), 3)
        assert raised.value.errno == errno.ENOSPC
        assert parts(folder) == []
        loop = train(small(folder, ballast=BALLAST, on_failure="stop", background=background), 3)
        assert_same_bits(bits(loop), reference.bits[2])
        same_found(there(folder), reference.found[2])


def test_what_a_signal_raises_in_a_save_is_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what torch's writer, left half way, says of its file; the same command then ends as if nothing had been."""

    class Oops(Exception):
        pass

    def handler(*about: Any) -> None:
        raise Oops

    reference, writes, real = Reference.of(tmp_path), itertools.count(), Sink.write
    monkeypatch.setattr(Sink, "write", lambda sink, data: (next(writes), real(sink, data))[1])
    train(small(tmp_path / "counted"))
    before = signal.signal(signal.SIGUSR1, handler)
    try:
        for cut in range(0, next(writes), 29):
            folder, left = tmp_path / f"cut{cut}", iter([False] * cut + [True])

            def write(sink: Sink, data: Any, left: Iterator[bool] = left) -> int:
                if next(left, False):
                    signal.raise_signal(signal.SIGUSR1)
                return real(sink, data)

            monkeypatch.setattr(Sink, "write", write)
            with pytest.raises(Oops):
                train(small(folder))
            assert parts(folder) == []
            loop = train(small(folder))
            assert_same_bits(bits(loop), reference.bits[2])
            same_found(there(folder), reference.found[2])
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_ck4_every_save_fails(tmp_path: Path) -> None:
    """A disk that stays full: a warning for each save and no more, what was there stays, and the weights are the same."""
    reference = Reference.of(tmp_path)
    folder = tmp_path / "run"
    reference.copy(1, folder)

    def full(call: Call) -> None:
        if call.name == "write":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with warned() as caught, Watch(folder, full):
        loop = train(small(folder), 3)
    # One for each epoch's end, and one for the last try as the run ends.
    assert [FAILED + "[Errno 28] disk full" in text for text in told(caught)] == [True] * 3
    assert_same_bits(bits(loop), reference.bits[2])
    same_found(there(folder), reference.found[0])
    assert listing(folder) == listing(reference.folders[1])


@pytest.mark.parametrize("code", [errno.EIO, errno.EROFS, errno.EACCES, errno.EDQUOT, errno.ENOSPC])
@pytest.mark.parametrize("exists", [False, True])
def test_ck5_unwritable_folder_is_an_error_at_the_start(code: int, exists: bool, tmp_path: Path) -> None:
    folder, updates = tmp_path / "run", list[int]()
    if exists:
        folder.mkdir()

    def refuse(call: Call) -> None:
        if call.name == "mkdir" or call.flags & (os.O_CREAT | os.O_WRONLY | os.O_RDWR):
            raise OSError(code, os.strerror(code), str(call.path))

    with Watch(folder, refuse), pytest.raises(OSError, match=re.escape(str(folder))) as raised:
        train(small(folder, [Hook("on_step_start", lambda state: updates.append(state.step))]), 1)
    assert os.strerror(code) in str(raised.value)
    assert "give another" in str(raised.value)
    assert updates == []
    assert folder.exists() == exists
    assert not exists or listing(folder) == []


@pytest.mark.parametrize("hook", ["on_epoch_start", "on_step_end", "on_validation_end", "on_epoch_end"])
@pytest.mark.parametrize("background", [False, True])
def test_ck5_folder_removed_in_a_hook(hook: str, background: bool, tmp_path: Path) -> None:
    """The next save makes it again, with the file beside that an earlier save had written."""
    reference, folder = Reference.of(tmp_path, every=1), tmp_path / "run"

    def remove(state: State) -> None:
        if state.epoch in (1, 2) and state.step >= 3:
            for thread in threading.enumerate():
                if thread.name == "hookloop checkpoint":
                    thread.join()
            shutil.rmtree(folder, ignore_errors=True)

    train(small(folder, [Hook(hook, remove)], every=1, background=background), 3)
    found, expected = there(folder), reference.found[2]
    same(found.model, expected.model, "model")
    same(found.state, expected.state, "state")
    assert found.lost == parts(folder) == []
    assert beside(folder) == beside(reference.folders[3])
    assert_same_bits(bits(train(small(folder, every=1), 3)), reference.bits[2])


def test_ck5_folder_removed_at_calls_of_a_save(tmp_path: Path) -> None:
    reference = Reference.of(tmp_path)
    count = Watch(tmp_path / "counted")
    reference.copy(1, count.folder)
    with count:
        train(small(count.folder), 2)
    started = next(c.number for c in count.calls if c.name == "mkdir")
    for call in count.calls[started:]:
        if call.name == "write" and call.number % 20:
            continue
        folder = tmp_path / f"removed{call.number}"
        reference.copy(1, folder)

        def remove(made: Call, number: int = call.number, folder: Path = folder) -> None:
            if made.number == number:
                shutil.rmtree(folder)

        with warned() as caught, Watch(folder, remove):
            loop = train(small(folder), 3)
        texts = told(caught)
        assert len(texts) <= 1, call
        assert all(t.startswith(EITHER) for t in texts)
        assert_same_bits(bits(loop), reference.bits[2])
        same_found(there(folder), reference.found[2])
        assert listing(folder) == listing(reference.folders[3]), call


# -------------------------------------------------------------------------------------- CK6: temporary files elsewhere


def elsewhere(base: str, place: str) -> None:
    """A job: train while TMPDIR says `place`; nothing but the folder is ever written to."""
    os.environ["TMPDIR"], tempfile.tempdir = place, None
    sys.dont_write_bytecode = True
    folder, written = Path(base) / "run", set[str]()

    def audit(event: str, args: Any) -> None:
        made = event in ("os.mkdir", "os.rename", "os.link", "os.symlink", "os.truncate", "tempfile.mkdtemp")
        opened = event == "open" and isinstance(args[0], str) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if made or opened:
            written.add(os.path.abspath(args[0]))

    sys.addaudithook(audit)
    train(small(folder, keep=2, every=1), 3)
    assert {str(folder / ".weights.beside.part"), str(folder / ".step-00000006.part" / "model.pt")} <= written
    outside = [path for path in written if path != str(folder) and not path.startswith(f"{folder}/")]
    assert not outside, outside
    train(small(folder, keep=2, every=1), 4)


def test_ck6_temporary_folder_that_is_missing(server: Server, tmp_path: Path) -> None:
    server.call("elsewhere", tmp_path, tmp_path / "missing")
    assert not (tmp_path / "missing").exists()
    assert there(tmp_path / "run").state["progress"]["epoch"] == 4


def test_ck6_temporary_folder_on_another_file_system(server: Server, tmp_path: Path) -> None:
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK) or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no other file system")
    with tempfile.TemporaryDirectory(dir=memory) as place:
        server.call("elsewhere", tmp_path, place)
        assert list(Path(place).iterdir()) == []
    assert there(tmp_path / "run").state["progress"]["epoch"] == 4


# ----------------------------------------------------------------------------------- CK25: saves behind the training


def behind(folder: Path, failing: set[int], error: Callable[[], BaseException], epochs: int = 3, name: str = "write",
           **kwargs: Any) -> tuple[Loop, list[tuple[int, str]]]:  # fmt: skip
    """Run with saves in the background, those of the epochs `failing` with an error; return what was told at which step.

    Each save has ended before the next step does, so that what is told then is settled.
    """
    heard, epoch = list[tuple[int, str]](), [0]
    loop: Loop

    def fail(call: Call) -> None:
        if call.name == name and epoch[0] in failing:
            assert threading.current_thread().name != "MainThread"
            raise error()

    def ended(state: State) -> None:
        for thread in threading.enumerate():
            if thread.name == "hookloop checkpoint":
                thread.join(60)
        epoch[0] = state.epoch + 1

    with warnings.catch_warnings(), Watch(folder, fail):
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", ResourceWarning)
        loop = small(folder, [Hook("on_step_start", ended)], background=True, **kwargs)
        warnings.showwarning = lambda message, *about, **more: heard.append((loop.state.step, str(message)))
        train(loop, epochs)
    return loop, heard


def full() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_ck25_told_at_the_next_steps_end(tmp_path: Path) -> None:
    """The save of epoch 1 begins after update 2 and fails: told at the end of update 3, once; later ones are made."""
    reference = Reference.of(tmp_path)
    loop, heard = behind(tmp_path / "run", {1}, full)
    assert [step for step, _ in heard] == [3]
    assert "disk full" in heard[0][1]
    assert_same_bits(bits(loop), reference.bits[2])
    same_found(there(tmp_path / "run"), reference.found[2])


def test_ck25_the_last_one_is_told_before_fit_returns(tmp_path: Path) -> None:
    reference = Reference.of(tmp_path)
    loop, heard = behind(tmp_path / "run", {3}, full)
    assert [step for step, _ in heard] == [6, 6]  # and tried once more on leaving
    assert all("disk full" in text for _, text in heard)
    assert_same_bits(bits(loop), reference.bits[2])
    same_found(there(tmp_path / "run"), reference.found[1])


def test_ck25_raised_at_the_next_steps_end(tmp_path: Path) -> None:
    reference, steps = Reference.of(tmp_path), list[int]()
    ends = Hook("on_fit_end", lambda state: steps.append(state.step))
    with pytest.raises(OSError, match="disk full") as raised:
        behind_with(tmp_path / "run", {2}, ends)
    assert raised.value.errno == errno.ENOSPC
    assert steps == [5]
    same_found(there(tmp_path / "run"), reference.found[0])
    loop = train(small(tmp_path / "run"), 3)
    assert_same_bits(bits(loop), reference.bits[2])


def behind_with(folder: Path, failing: set[int], hook: Hook) -> None:
    epoch = [0]

    def fail(call: Call) -> None:
        if call.name == "write" and epoch[0] in failing:
            raise full()

    def ended(state: State) -> None:
        for thread in threading.enumerate():
            if thread.name == "hookloop checkpoint":
                thread.join(60)
        epoch[0] = state.epoch + 1

    with Watch(folder, fail):
        train(small(folder, [Hook("on_step_start", ended), hook.named("other")], background=True, on_failure="stop"), 3)


def test_ck25_the_last_one_is_raised_from_fit(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="disk full"):
        behind(tmp_path / "run", {3}, full, on_failure="stop")
    assert there(tmp_path / "run").state["progress"]["epoch"] == 2


def test_ck25_other_errors_are_raised_whatever_the_policy(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="not the disk's"):
        behind(tmp_path / "run", {2}, lambda: RuntimeError("not the disk's"), name="fsync")
    assert there(tmp_path / "run").state["progress"]["epoch"] == 1


def test_ck25_state_that_is_not_plain_is_raised_at_once(tmp_path: Path) -> None:
    class Odd(Callback):
        made = 0

        def on_step_end(self, state: State) -> None:
            self.made = state.step

        def state_dict(self) -> dict[str, Any]:
            return {"x": object()} if self.made == 3 else {"x": 1}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            pass

    loop = small(tmp_path / "run", [Odd()], background=True, every=1, keep=None)
    with pytest.raises(TypeError, match=r"\['callbacks'\]\['Odd'\]\['x'\] is a builtins.object"):
        train(loop, 3)
    assert loop.state.step == 3
    assert [p.name for p in list_checkpoints(tmp_path / "run")] == ["step-00000001", "step-00000002", "step-00000002.2"]
    assert parts(tmp_path / "run") == []


# ------------------------------------------------------------- real system calls, and a real file system that fills up


def gated(folder: str, gate: str) -> None:
    """A job: train the second epoch once somebody has opened the gate."""
    with open(gate, "rb"):
        pass
    train(small(Path(folder)), 2)


def finished(folder: str, base: str) -> None:
    """A job: what a killed second epoch left is the first's or the second's, and the restarted run ends as one never killed."""
    place, names = Path(folder), [Path(base) / f"epochs{n}" for n in (1, 2, 3)]
    found = there(place)
    epoch = found.state["progress"]["epoch"]
    assert epoch in (1, 2)
    same_found(found, there(names[epoch - 1]))
    assert all(readable(p) for p in list_checkpoints(place))
    loop = train(small(place), 3)
    same_found(there(place), there(names[2]))
    assert listing(place) == listing(names[2])
    assert_same_bits(bits(loop), torch.load(Path(base) / "bits", weights_only=True))
    print(epoch)


def traced(base: Path) -> list[str]:
    """Every path that a save of the second epoch touches, as options of strace."""
    folder = base / "run"
    files = [
        f"{d}/{n}" for d in (".step-00000004.part", ".step-00000002.part") for n in ("model.pt", "state.pt", "manifest.json")
    ]
    names = ["", ".weights.beside.part", ".step-00000004.part", ".step-00000002.part", "step-00000002", "step-00000004", *files,
             *beside(base / "epochs1"), *beside(base / "epochs2")]  # fmt: skip
    return [option for name in names for option in ("-P", str(folder / name).rstrip("/"))]


STRACE = pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
CALLS = ["write", "fsync", "openat", "close", "/^rename", "/^mkdir", "?unlink", "unlinkat", "rmdir"]  # counted each by itself


def killing(call: str, number: int) -> list[str]:
    return ["-f", "-e", f"trace={call}", "-e", f"inject={call}:signal=KILL:when={number}"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@STRACE
@pytest.mark.parametrize("call", CALLS)
def test_ck2_killed_by_strace_at_every_system_call(call: str, server: Server, tmp_path: Path) -> None:
    reference = Reference.of(tmp_path)
    torch.save(reference.bits[2], tmp_path / "bits")
    gate, folder, epochs = tmp_path / "gate", tmp_path / "run", []
    os.mkfifo(gate)
    for number in itertools.count(1):
        reference.copy(1, folder)
        pid = server.start("gated", folder, gate)
        command = ["strace", *killing(call, number), *traced(tmp_path), "-o", str(tmp_path / "trace"), "-p", str(pid)]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as tracer:
            assert tracer.stderr is not None
            assert "attached" in tracer.stderr.readline()
            with open(gate, "wb"):
                pass
            status = server.wait()
            tracer.stderr.read()
        assert status in (0, -signal.SIGKILL), server.log.read_text()
        epochs.append(int(server.call("finished", folder, tmp_path)))
        shutil.rmtree(folder)
        if status == 0:
            break
    print(f"{call}: {number - 1} kills")
    assert epochs == sorted(epochs)
    assert epochs[-1] == 2
    least = {"write": 100, "fsync": 7, "openat": 6, "close": 6, "/^rename": 3, "/^mkdir": 1, "unlinkat": 3, "rmdir": 1}
    assert number - 1 >= least.get(call, 0)


def cold(folder: Path, *options: str) -> int:
    command = ["strace", *options, sys.executable, __file__, str(folder)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, check=False, timeout=120, stderr=subprocess.DEVNULL).returncode


@pytest.mark.slow
@pytest.mark.timeout(900)
@STRACE
def test_ck2_cold_process_killed_by_strace(server: Server, tmp_path: Path) -> None:
    """The same, of a process that starts as a user's does, at the calls that the order of a save rests on."""
    reference, folder = Reference.of(tmp_path), tmp_path / "run"
    torch.save(reference.bits[2], tmp_path / "bits")
    kills = 0
    for call in ("fsync", "/^rename", "/^mkdir"):
        for number in itertools.count(1):
            reference.copy(1, folder)
            status = cold(folder, *killing(call, number), *traced(tmp_path), "-o", str(tmp_path / "trace"))
            server.call("finished", folder, tmp_path)
            shutil.rmtree(folder)
            if status == 0:
                break
            assert status in (-signal.SIGKILL, 128 + signal.SIGKILL)
            kills += 1
    print(f"{kills} kills")
    assert kills >= 9


@pytest.mark.slow
@STRACE
def test_ck3_order_of_system_calls_of_a_cold_process(tmp_path: Path) -> None:
    reference, folder = Reference.of(tmp_path), tmp_path / "run"
    reference.copy(1, folder)
    log = tmp_path / "trace"
    assert cold(folder, "-f", "-y", "-s", "0", "-e", "trace=write,fsync,/^rename,/^mkdir,/^unlink,rmdir", "-o", str(log)) == 0
    calls = []
    for line in log.read_text().splitlines():
        name = re.search(r"(write|fsync|rename|mkdir|unlink|rmdir)(?:at2?)?\(", line)
        found = re.findall(re.escape(str(folder)) + r"([^\">]*)", line)
        if name is None or not found or " = -1 " in line:
            continue
        at = re.search(r'unlinkat\(\d+<[^>]*>, "([^"]*)"', line)
        path = (found[0] + (f"/{at[1]}" if at else "")).lstrip("/") or "."
        calls.append((name[1], path))
    order(calls, "step-00000004", "step-00000002")
    assert listing(folder) == listing(reference.folders[2])


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "tmpfs"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)]
    if os.geteuid() or shutil.which("mount") is None or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("cannot mount a tmpfs")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("background", [False, True])
def test_ck4_real_disk_fills_up_and_is_cleared(background: bool, tmpfs: Path, tmp_path: Path) -> None:
    expected, folder, seen = bits(train(small(None, ballast=BALLAST), 5)), tmpfs / "run", list[Any]()

    def act(state: State) -> None:
        settled(state)  # what was begun behind the last update ends on the disk as it was then
        if state.epoch == 1:
            with open(tmpfs / "filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(4096))
        elif state.epoch == 3:
            (tmpfs / "filler").unlink()
        elif state.epoch in (2, 4):
            seen.append((parts(folder), [p.name for p in list_checkpoints(folder) if readable(p)]))

    def settled(state: State) -> None:
        for thread in threading.enumerate():
            if thread.name == "hookloop checkpoint":
                thread.join(60)

    with warned() as caught:
        loop = train(small(folder, [Hook("on_epoch_start", act), Hook("on_step_start", settled).named("settled")],
                           ballast=BALLAST, background=background), 5)  # fmt: skip
    texts = told(caught)
    assert len(texts) == 2
    assert all(re.search(r"disk full: \S+ needs 0\.\d MB, 0\.\d MB are free", text) for text in texts)
    if not background:
        assert seen == [([], ["step-00000002"]), ([], ["step-00000008"])]
    assert_same_bits(bits(loop), expected)
    assert [p.name for p in list_checkpoints(folder)] == ["step-00000010"]
    assert readable(list_checkpoints(folder)[0])
    assert parts(folder) == []


@pytest.mark.slow
def test_ck4_real_disk_fills_by_checkpoints(tmpfs: Path) -> None:
    """All are kept until nothing fits: then a warning for each save, and every older one still loads."""
    expected = bits(train(small(None, ballast=BALLAST), 14))
    with warned() as caught:
        loop = train(small(tmpfs / "run", ballast=BALLAST, keep=None), 14)
    made = list_checkpoints(tmpfs / "run")
    assert_same_bits(bits(loop), expected)
    assert all(readable(p) for p in made)
    assert 3 <= len(made) < 14
    assert len(told(caught)) == 14 - len(made) + 1  # and the last try as the run ends
    assert all("disk full" in text for text in told(caught))
    assert parts(tmpfs / "run") == []


@pytest.mark.slow
def test_ck5_real_file_system_turns_read_only(tmpfs: Path) -> None:
    expected, folder = bits(train(small(None), 4)), tmpfs / "run"

    def mount(how: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{how}", str(tmpfs)], check=True)

    def act(state: State) -> None:
        if state.epoch in (1, 3):
            mount("ro" if state.epoch == 1 else "rw")

    with warned() as caught:
        loop = train(small(folder, [Hook("on_epoch_start", act)]), 4)
    assert len(told(caught)) == 2
    assert all(FAILED in text and "Read-only file system" in text for text in told(caught))
    assert_same_bits(bits(loop), expected)
    assert [p.name for p in list_checkpoints(folder)] == ["step-00000008"]
    mount("ro")
    with pytest.raises(OSError, match="Read-only file system"):
        train(small(folder), 5)
    mount("rw")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        train(small(Path(sys.argv[1])), 2)
    else:
        serve()
