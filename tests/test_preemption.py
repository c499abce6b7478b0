"""Preemption, by real signals to real processes: saved where it stood, ended as asked, continued to the same bits."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import random
import re
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FORMS, Samples, adamw, assert_same_bits, bits, built_in, by_hand, loader, loss_fn, net, same
from torch import nn
from torch.utils.data import DataLoader

from hookloop.callbacks import Checkpoint, GradientAccumulation, Preemption, Seed, Warmup
from hookloop.loop import Callback, Loop, State
from hookloop.loop.store import list_checkpoints, readable, step_of

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and POSIX signals")

LIMIT = 100.0  # seconds, for whatever takes a fraction of one on an idle machine
VAL = 3  # batches of a validation, unless said otherwise
STEPS = 15  # of a whole run: 7 + 4 + 4
TERM, USR1, INT, KILL = signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGKILL
WATCHED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGCHLD)

# ------------------------------------------------------------------------------------- what runs in a process of its own


class Told:
    """The process that trains: it logs what it does, byte by byte, and says when a given point is reached.

    The log's bytes: f and v begin a forward (in training, in validation), e ends a step, V a validation, E an epoch; a
    signal is its number, written by the C handler itself the moment that it arrives (`set_wakeup_fd`).
    """

    reply = -1  # a pipe to the test

    def __init__(self, log: str | None, point: str | None, at: int, act: Callable[[], None], times: int = 1) -> None:
        self.state: State | None = None
        self.point, self.at, self.act, self.times, self.pid = point, at, act, times, os.getpid()
        self.log = -1 if log is None else os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK)
        if self.log >= 0:
            signal.set_wakeup_fd(self.log, warn_on_full_buffer=False)

    def note(self, byte: bytes) -> None:
        if self.log >= 0:
            os.write(self.log, byte)

    def here(self, point: str, at: int | None = None) -> None:
        """Come by a point, at a step (a read: at a sample of epoch 1, since workers know no step)."""
        if point != self.point or not self.times or self.state is None:
            return
        if (self.state.step if at is None else at) == self.at:
            self.times -= 1
            self.act()

    @classmethod
    def say(cls, text: str) -> None:
        os.write(cls.reply, f"{text}\n".encode())


class Read(Samples):
    """Comes by `point` whenever a sample is read, and takes `pace` seconds for it."""

    def __init__(self, count: int, told: Told, point: str, pace: float) -> None:
        super().__init__(count)
        self.told, self.point, self.pace = told, point, pace

    def __getitem__(self, i: int) -> Any:
        state = self.told.state
        if self.point == "read" and state is not None:
            self.told.here("read", 100 * state.epoch + i)
        else:
            self.told.here(self.point)
        time.sleep(self.pace)
        return super().__getitem__(i)


class Log(Callback):
    def __init__(self, told: Told) -> None:
        self.told = told

    def on_fit_start(self, state: State) -> None:
        self.told.state = state
        self.told.say("ready")
        self.told.here("fit_start")

    def on_micro_end(self, state: State) -> None:
        if state.micro is not None and state.micro.training:
            self.told.here("micro_end")

    def on_before_optimizer_step(self, state: State) -> None:
        self.told.here("before_update")

    def on_step_end(self, state: State) -> None:
        self.told.note(b"e")
        self.told.here("step_end")

    def on_validation_end(self, state: State) -> None:
        self.told.note(b"V")
        self.told.here("validation_end")

    def on_epoch_end(self, state: State) -> None:
        self.told.note(b"E")
        self.told.here("epoch_end")

    def on_fit_end(self, state: State) -> None:
        self.told.here("fit_end")


class History(Callback):
    """What was reported, at which step, over all restarts."""

    def __init__(self) -> None:
        self.seen: list[list[Any]] = []

    def on_validation_end(self, state: State) -> None:
        self.seen.append([state.step, *(state.metrics[name] for name in sorted(state.reported))])

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]


class Slow(nn.Module):
    """Comes by forward, or val_forward; comes by optimizer in the optimizer's own step."""

    def __init__(self, told: Told, pace: float) -> None:
        super().__init__()
        self.inner, self.told, self.pace = net(seed=5), told, pace

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.told.note(b"f" if self.training else b"v")
        self.told.here("forward" if self.training else "val_forward")
        time.sleep(self.pace)
        return self.inner(x)


def train(folder: str, form: str = "built_in", log: str | None = None, point: str | None = None, at: int = 0, times: int = 1,
          numbers: Any = (TERM,), group: bool = False, block: bool = False, workers: int = 0, val_workers: int = 0,
          background: bool = False, plain: bool = False, pace: float = 0.0, val_count: int = 20, every: int = 3,
          validate_every: int | None = None, persistent: bool = False, deadline: float | None = None, jump: float = 0.0,
          again: bool = False, ps1: bool = False, **settings: Any) -> None:  # fmt: skip
    """Train to the end and leave the result in `folder`; at `point` send oneself signals, or say so and block for good."""

    def act() -> None:
        if block:
            told.say(f"at {point}")
            while True:
                time.sleep(0.1)  # a signal just before a long one would wait for its end
        for number in numbers:
            (os.killpg if group else os.kill)(told.pid, number)

    told = Told(log, point, at, act, times)
    where, fsync, clock = Path(folder), os.fsync, time.time

    def at_fsync(handle: int) -> None:
        """The step is the save's: in the background training may be beyond it."""
        named = re.search(r"step-(\d{8})", os.readlink(f"/proc/self/fd/{handle}")) if os.path.isdir("/proc/self/fd") else None
        told.here("save", int(named[1]) if named else None)
        fsync(handle)

    os.fsync = at_fsync  # type: ignore[assignment]
    if jump:
        time.time = lambda: clock() + (jump if told.state is not None and told.state.step >= 4 else 0.0)
    if ps1:
        sys.ps1 = ">>> "
    seed, history, model = Seed(5), History(), Slow(told, pace)
    optimizer = adamw(model)
    optimizer.register_step_pre_hook(lambda *_: told.here("optimizer"))
    callbacks: list[Callback] = [seed, Warmup(6), GradientAccumulation({0: 1, 1: 2}), history]
    if not plain:
        left = None if deadline is None else timedelta(seconds=deadline)
        callbacks += [Preemption(deadline=left, **settings), Checkpoint(where, every=every, background=background)]
    loop = Loop(model, optimizer, [*callbacks, Log(told)], resume=None if plain else where)
    kept = {"persistent_workers": True} if persistent else {}
    one = DataLoader(Read(50, told, "read", pace / 8), 8, shuffle=True, num_workers=workers, **(kept if workers else {}))
    two = DataLoader(Read(val_count, told, "val_read", pace / 8), 8, num_workers=val_workers, **(kept if val_workers else {}))

    def fit() -> Any:
        if form == "by_hand":
            return by_hand(loop, loss_fn, one, two, epochs=3)
        return loop.fit(loss_fn, one, two, epochs=3, validate_every=validate_every)

    state = fit()
    if again:
        assert state is loop.state
        assert state.stop_reason == f"{signal.Signals(numbers[0]).name} was received"
        told.say(f"returned {state.step}")
        state = fit()
        assert state.stop_reason is None
    counts = [state.step, state.samples, state.epoch, state.skipped]
    where.mkdir(parents=True, exist_ok=True)
    torch.save({"bits": bits(loop), "history": history.seen, "counts": counts}, where / "result.pt")


def around(folder: str, point: int, every_other: bool = False) -> None:
    """A loop of the user's own."""
    model = net()
    optimizer = adamw(model)
    loop = Loop(model, optimizer, [Checkpoint(folder, every=100), Preemption()])
    with loop:
        for batch in loader(400, 8):
            loss_fn(model, batch)["loss"].backward()
            if loop.state.step == point:
                os.kill(os.getpid(), TERM)
                assert loop.stopped  # also inside the body, which may ask anywhere
            with loop.updating(samples=len(batch[0])):
                optimizer.step()
            optimizer.zero_grad()
            if loop.stopped:
                assert loop.state.stop_reason == "SIGTERM was received"
                break
        Told.say(f"left {loop.state.step}")
    Told.say("went on")


def loops(folder: str, inner_first: bool, asks: str) -> None:
    """A GAN: two Loops in one loop body; which of them begins first says whose handlers stand on top."""
    made = []
    for name in ("a", "b"):
        model = net(noise=False)
        made.append((model, adamw(model), Path(folder) / name))
    outer, inner = (Loop(m, o, [Checkpoint(where, every=100), Preemption()]) for m, o, where in made)
    before = [signal.getsignal(number) for number in WATCHED]
    seen: list[int] = []
    signal.signal(USR1, last := lambda number, frame: seen.append(number))
    before[1] = last
    with outer, inner:
        for number, batch in enumerate(loader(400, 8, shuffle=False)):
            for i in (1, 0) if inner_first else (0, 1):
                model, optimizer, _ = made[i]
                optimizer.zero_grad()
                loss_fn(model, batch)["loss"].backward()
                with (outer, inner)[i].updating(samples=8):
                    optimizer.step()
            if number == 4:
                os.kill(os.getpid(), USR1)
            asked = {"either": outer.stopped or inner.stopped, "outer": outer.stopped, "inner": inner.stopped}[asks]
            if asked:
                break
    assert outer.state.step == inner.state.step == 5, (outer.state.step, inner.state.step)
    for _, _, where in made:
        assert [p.name for p in list_checkpoints(where)] == ["step-00000005"]
    assert [signal.getsignal(number) for number in WATCHED] == before, "handlers were not put back"
    assert seen == [USR1], "the signal was not raised again, once"


def mine(folder: str, what: str) -> None:
    """Handlers that a program has set itself."""
    seen: list[int] = []
    mark = lambda number, frame: seen.append(number)
    for number in WATCHED[: 3 if what != "chld" else 4]:
        signal.signal(number, mark)
    if what == "ignored":
        signal.signal(TERM, signal.SIG_IGN)
    before = [signal.getsignal(number) for number in WATCHED]
    during: list[Any] = []
    model = net()

    class At(Callback):
        def on_step_end(self, state: State) -> None:
            if state.step == 3:
                during.extend(signal.getsignal(number) for number in WATCHED[:3])
                os.kill(os.getpid(), USR1 if what == "usr1" else TERM)
                assert seen == []
                if what == "error":
                    raise ZeroDivisionError("of the program's own")
                if what == "replaced":
                    signal.signal(USR1, signal.SIG_IGN)

    loop = Loop(model, adamw(model), [At(), Checkpoint(folder), Preemption()])
    if what == "error":
        try:
            loop.fit(loss_fn, loader(), epochs=2)
        except ZeroDivisionError:
            assert seen == [], "an error in flight surfaces, not the signal"
        else:
            raise AssertionError
    elif what == "ignored":
        state = loop.fit(loss_fn, loader(), epochs=2)
        assert state.step == 14
        assert state.stop_reason is None
        assert seen == []
    else:
        state = loop.fit(loss_fn, loader(), epochs=2)
        assert state.step == 3
        assert state.epoch == 0
        assert seen == [USR1 if what == "usr1" else TERM]
        assert step_of(list_checkpoints(Path(folder))[-1]) == 3
    assert all(handler is not mark for i, handler in enumerate(during) if what != "ignored" or i)
    if what == "replaced":  # by somebody else, while training: that one stays
        before[1] = signal.SIG_IGN
    assert [signal.getsignal(number) for number in WATCHED] == before
    os.kill(os.getpid(), INT)
    assert seen[-1] == INT


def threaded(folder: str) -> None:
    """Training in a thread that is not the main one, where no handler can be set."""
    before = [signal.getsignal(number) for number in WATCHED]
    problems: list[BaseException] = []
    states: list[State] = []

    def work() -> None:
        try:
            model = net()
            late = Preemption(deadline=timedelta(days=1))
            states.append(Loop(model, adamw(model), [Checkpoint(folder), late]).fit(loss_fn, loader(), epochs=2))
        except BaseException as problem:
            problems.append(problem)

    thread = threading.Thread(target=work)
    thread.start()
    while thread.is_alive():
        assert [signal.getsignal(number) for number in WATCHED] == before
        thread.join(0.001)
    if problems:
        raise problems[0]
    assert states[0].step == 14
    assert states[0].stop_reason is None
    assert [signal.getsignal(number) for number in WATCHED] == before


def forked(folder: str) -> None:
    """A process that the program forks while training is no worker: a signal ends it as it would without us."""
    model = net()

    class Forks(Callback):
        def on_step_end(self, state: State) -> None:
            if state.step == 3:
                for number in (TERM, USR1):
                    if not (pid := os.fork()):
                        os.kill(os.getpid(), number)
                        os._exit(0)
                    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -number

    state = Loop(model, adamw(model), [Forks(), Checkpoint(folder), Preemption()]).fit(loss_fn, loader(), epochs=1)
    assert state.step == 7
    assert state.stop_reason is None


# ------------------------------------------------------------------------------------------------------- the fork server


def serve(known: dict[str, Any]) -> None:
    """Import and warm up once, then fork a process for each line that comes."""
    Told.reply = os.dup(1)
    os.dup2(2, 1)
    model = net()
    Loop(model, adamw(model), [Seed(0)]).fit(loss_fn, loader(), loader(), epochs=1)
    for line in iter(sys.stdin.readline, ""):
        asked = json.loads(line)
        pid = os.fork()
        if not pid:
            return child(known, **asked)
        Told.say(f"pid {pid}")
        Told.say(f"exit {os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}")
    return None


def child(known: Any, what: str, kwargs: dict[str, Any], errors: str, terminal: str | None, as_program: bool) -> None:
    """Be the process: a session of its own, and where asked for with a terminal; `as_program`: Python itself ends it."""
    os.setsid()
    for number, handler in ((INT, signal.default_int_handler), (TERM, signal.SIG_DFL), (USR1, signal.SIG_DFL)):
        signal.signal(number, handler)  # whatever the tests were started under
    out = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND) if terminal is None else os.open(terminal, os.O_RDWR)
    for stream in (0, 1, 2) if terminal is not None else (1, 2):
        os.dup2(out, stream)
    if as_program:
        known[what](**kwargs)
        return
    code = 1
    try:
        known[what](**kwargs)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


class Run:
    """A process under way."""

    def __init__(self, server: Server, errors: Path) -> None:
        self.server, self.errors, self.code = server, errors, None
        early = []
        while not (line := self._line(LIMIT)).startswith("pid "):
            early.append(f"{line}\n".encode())  # the child may speak before the server does
        self.pid = int(line.split()[1])
        server.buffer = b"".join([*early, server.buffer])

    def _line(self, limit: float) -> str:
        end = time.monotonic() + limit
        while b"\n" not in self.server.buffer:
            left = max(0.0, end - time.monotonic())
            if not select.select([self.server.out], [], [], left)[0]:
                raise TimeoutError
            data = os.read(self.server.out, 4096)
            assert data, "the fork server ended"
            self.server.buffer += data
        line, _, self.server.buffer = self.server.buffer.partition(b"\n")
        return line.decode()

    def expect(self, text: str) -> None:
        try:
            found = self._line(LIMIT)
        except TimeoutError:
            found = "nothing in time"
        assert found == text, f"{found} instead of {text!r}: {self.text}"

    def begun(self) -> None:
        """Wait until training has begun, or is seen to be done."""
        if (found := self._line(LIMIT)) != "ready":
            self.code = int(found.split()[1])

    @property
    def text(self) -> str:
        return self.errors.read_text() if self.errors.exists() else ""

    def wait(self, limit: float = LIMIT) -> int | None:
        """Return the exit status as subprocess would, None where the process outlives `limit`."""
        end = time.monotonic() + limit
        while self.code is None:
            try:
                line = self._line(max(0.0, end - time.monotonic()))
            except TimeoutError:
                return None
            if line.startswith("exit"):
                self.code = int(line.split()[1])
        return self.code


class Server:
    def __init__(self, folder: Path, module: str = "test_preemption") -> None:
        boot = "import sys; sys.path.insert(0, sys.argv[1]); from test_preemption import serve; "
        boot += f"import {module}; serve(vars({module}))"
        command = [sys.executable, "-c", boot, str(Path(__file__).parent)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, **QUIET})
        assert self.process.stdout is not None
        self.out, self.buffer, self.folder, self.count = self.process.stdout.fileno(), b"", folder, 0
        self.last: Run | None = None

    def start(self, what: Callable[..., None], /, terminal: str | None = None, as_program: bool = False, **kwargs: Any) -> Run:
        self.stop()
        self.count += 1
        errors = self.folder / f"errors-{self.count}"
        kwargs = {name: str(value) if isinstance(value, Path) else value for name, value in kwargs.items()}
        asked = {"what": what.__name__, "kwargs": kwargs, "errors": str(errors), "terminal": terminal, "as_program": as_program}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(asked).encode() + b"\n")
        self.process.stdin.flush()
        self.last = Run(self, errors)
        return self.last

    def stop(self) -> None:
        """End what is left of the last process."""
        if self.last is not None and self.last.code is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.last.pid, KILL)
            self.last.wait()
        for pid in [] if self.last is None else in_session(self.last.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, KILL)
        self.last = None

    def close(self) -> None:
        self.stop()
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(LIMIT)
        self.process.stdout.close()

    def run(self, what: Callable[..., None], /, **kwargs: Any) -> int:
        run = self.start(what, **kwargs)
        code = run.wait()
        assert code is not None, f"did not end: {run.text}"
        if code > 0:
            print(run.text)
        return code


QUIET = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def in_session(session: int) -> list[int]:
    """Return the processes of a session that are alive."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = (place / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] not in "ZX":
                found.append(int(place.name))
    return found


def none_left(session: int, limit: float = LIMIT) -> bool:
    end = time.monotonic() + limit
    while in_session(session):
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.close()


@pytest.fixture
def server(started: Server) -> Iterator[Server]:
    yield started
    started.stop()


@pytest.fixture(scope="module")
def expected(started: Server, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """The result of a run that nothing disturbed, with neither Preemption nor Checkpoint."""
    known: dict[str, Any] = {}

    def get(**kwargs: Any) -> Any:
        if (key := json.dumps(kwargs)) not in known:
            folder = tmp_path_factory.mktemp("undisturbed")
            assert started.run(train, folder=folder, plain=True, **kwargs) == 0
            known[key] = result(folder)
        return known[key]

    return get


def result(folder: Path) -> Any:
    return torch.load(folder / "result.pt", weights_only=True)


def assert_same_run(found: Any, wanted: Any) -> None:
    assert_same_bits(found["bits"], wanted["bits"])
    same(found, wanted)


def newest(folder: Path) -> int:
    there = list_checkpoints(folder)
    assert all(readable(one) for one in there)
    return step_of(there[-1]) if there else -1


def check_left(log: bytes, number: int, before: int, after: int, val: int = VAL) -> None:
    """What was done after the signal arrived is the rest of the step under way, and no validation."""
    told = log.index(bytes([number]))
    log = log.replace(bytes([signal.SIGCHLD]), b"")
    told = log.index(bytes([number]))
    earlier, later = log[:told], log[told:].replace(bytes([number]), b"")
    said = f"{log!r}, told at {told}"
    ended = later.count(b"e")
    assert ended == 1 if earlier.rfind(b"f") > earlier.rfind(b"e") else ended <= 1, said
    assert after == max(0, before) + log.replace(bytes([number]), b"").count(b"e"), f"checkpoint {after} from {before}: {said}"
    assert later.count(b"v") <= 1, said
    assert later.count(b"f") <= 2, said  # the micro-batches of one step
    if b"V" in later:  # only where its last batch had been reached
        assert len(re.findall(b"v*$", earlier)[0]) >= val - 1, said
    assert not re.search(rb"[fve]E", log.replace(bytes([number]), b"")), said  # no epoch without its validation
    assert b"f" not in later.partition(b"E")[2], said


def finish(server: Server, folder: Path, **kwargs: Any) -> Any:
    assert server.run(train, folder=folder, **kwargs) == 0
    return result(folder)


# ------------------------------------------------------------------------------------------------------------------- SG1

POINTS = [("fit_start", 0, 0), ("forward", 9, 10), ("forward", 10, 11), ("micro_end", 9, 10), ("before_update", 9, 10),
          ("optimizer", 9, 10), ("step_end", 9, 9), ("step_end", 11, 11), ("save", 9, 9), ("read", 117, None),
          ("val_read", 11, 11), ("val_forward", 11, 11), ("validation_end", 11, 11), ("epoch_end", 11, 11),
          ("forward", 14, 15), ("fit_end", 15, 15)]  # fmt: skip


@pytest.mark.parametrize("form", ["built_in", "by_hand"])
@pytest.mark.parametrize(("point", "at", "saved"), POINTS)
def test_sg1_sigterm_at_every_kind_of_instant(point: str, at: int, saved: int | None, form: str, server: Server,
                                              expected: Any, tmp_path: Path) -> None:  # fmt: skip
    folder, log = tmp_path / "run", tmp_path / "log"
    assert server.run(train, folder=folder, form=form, log=log, point=point, at=at) == -TERM
    check_left(log.read_bytes(), TERM, -1, found := newest(folder))
    assert found == saved or (saved is None and 7 <= found <= 11)
    assert not (folder / "result.pt").exists()
    assert_same_run(finish(server, folder, form=form), expected())


@pytest.mark.parametrize("group", [False, True], ids=["process", "group"])
@pytest.mark.parametrize("number", [TERM, USR1])
@pytest.mark.parametrize(("point", "at"), [("forward", 9), ("forward", 10), ("save", 9), ("read", 117)])
def test_sg1_workers_and_saves_in_the_background(point: str, at: int, number: int, group: bool, server: Server, expected: Any,
                                                 tmp_path: Path) -> None:  # fmt: skip
    folder, log = tmp_path / "run", tmp_path / "log"
    run = server.start(train, folder=folder, log=log, point=point, at=at, numbers=[number], group=group, workers=2,
                       background=True)  # fmt: skip
    assert run.wait() == -number, run.text
    assert none_left(run.pid)
    check_log = log.read_bytes()
    if group and number == TERM:  # which ends the workers too: the step under way may have lost its data
        assert newest(folder) >= check_log.count(b"e") > 0
    else:
        check_left(check_log, number, -1, newest(folder))
    assert_same_run(finish(server, folder), expected())


@pytest.mark.parametrize(("point", "at", "persistent"), [
    ("val_read", 11, False), ("val_forward", 11, False), ("read", 0, False), ("read", 20, True),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (  # torch looks after its workers every 5 s
        ("read", 20, False), ("read", 100, False), ("val_read", 7, True), ("val_forward", 11, True), ("read", 0, True))),
])  # fmt: skip
def test_sg1_the_whole_group_while_workers_read(point: str, at: int, persistent: bool, server: Server, expected: Any,
                                                tmp_path: Path) -> None:  # fmt: skip
    """As a batch system does: workers die of the signal, which is no error of the run's data."""
    folder, log = tmp_path / "run", tmp_path / "log"
    run = server.start(train, folder=folder, log=log, point=point, at=at, group=True, workers=2, val_workers=2,
                       persistent=persistent)  # fmt: skip
    assert run.wait() == -TERM, run.text
    assert newest(folder) == log.read_bytes().count(b"e"), run.text
    assert none_left(run.pid)
    assert_same_run(finish(server, folder), expected())


def random_signals(server: Server, expected: Any, tmp_path: Path, wanted: int, seed: int, group: bool, workers: int,
                   background: bool) -> None:  # fmt: skip
    clock, sent, runs, replay = random.Random(seed), 0, 0, []
    for number in range(100 * wanted):
        folder, before = tmp_path / f"run-{number}", -1
        for attempt in range(200):
            runs += 1
            log, now = tmp_path / f"log-{number}-{attempt}", clock.choice([TERM, TERM, USR1])
            form, whole = clock.choice(["built_in", "by_hand"]), group and clock.random() < 0.5
            run = server.start(train, folder=folder, form=form, log=log, workers=workers, val_workers=clock.choice([0, workers]),
                               background=background, pace=0.004)  # fmt: skip
            run.begun()
            after = clock.uniform(0.0, 0.6 + 0.5 * (workers > 0))
            if sent < wanted and run.wait(after) is None:
                replay.append((number, attempt, form, whole, now, after))
                with contextlib.suppress(ProcessLookupError):
                    (os.killpg if whole else os.kill)(run.pid, now)
            code, text, step = run.wait(), log.read_bytes(), newest(folder)
            if code == 0:
                break
            assert code == -now, f"{replay}: {run.text}"
            if bytes([now]) not in text:  # it came when all was done
                assert step == STEPS
            elif whole and now == TERM:
                assert step == max(0, before) + text.count(b"e"), replay
            else:
                check_left(text, now, before, step)
            sent, before = sent + 1, step
        assert_same_run(result(folder), expected())
        if sent >= wanted:
            print(f"{sent} signals in {runs} runs")
            return
    raise AssertionError


@pytest.mark.parametrize(("workers", "background"), [(0, False), (2, True)])
def test_sg1_random_instants(workers: int, background: bool, server: Server, expected: Any, tmp_path: Path) -> None:
    random_signals(server, expected, tmp_path, 4, workers + background, False, workers, background)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("background", [False, True], ids=["foreground", "background"])
@pytest.mark.parametrize("workers", [0, 2])
def test_sg1_random_instants_at_length(workers: int, background: bool, server: Server, expected: Any, tmp_path: Path) -> None:
    random_signals(server, expected, tmp_path, 50, 100 + workers + background, workers > 0, workers, background)


@pytest.mark.parametrize("point", ["val_read", "val_forward"])
@pytest.mark.parametrize("validate_every", [None, 5])
def test_sg1_a_long_validation_is_broken_off_and_made_up_for(point: str, validate_every: int | None, server: Server,
                                                             expected: Any, tmp_path: Path) -> None:  # fmt: skip
    folder, log, at = tmp_path / "run", tmp_path / "log", 11 if validate_every is None else 10
    long = {"val_count": 400, "validate_every": validate_every}
    assert server.run(train, folder=folder, log=log, point=point, at=at, **long) == -TERM
    told = log.read_bytes()
    assert len(told.rpartition(b"e")[2].replace(bytes([TERM]), b"")) <= 2, told  # of 50 batches
    assert newest(folder) == at
    kept = torch.load(list_checkpoints(folder)[-1] / "state.pt", weights_only=True)
    assert kept["progress"]["epoch"] == 1
    steps = [seen[0] for seen in kept["callbacks"]["History"]["seen"]]
    assert steps == ([7] if validate_every is None else [5])
    again = tmp_path / "again"
    found = finish(server, folder, log=again, **long)
    assert again.read_bytes().startswith(b"v" * 50 + b"V")  # the first that it does
    wanted = expected(**long)
    assert_same_run(found, wanted)
    assert [seen[0] for seen in found["history"]] == ([7, 11, 15] if validate_every is None else [5, 10, 15])


# ------------------------------------------------------------------------------------------------------------------- SG2


@pytest.mark.parametrize("background", [False, True], ids=["foreground", "background"])
@pytest.mark.parametrize("count", [2, 10])
@pytest.mark.parametrize(("point", "at", "times"), [("save", 9, 4), ("forward", 9, 1)])
def test_sg2_again_and_again_also_in_the_save(point: str, at: int, times: int, count: int, background: bool, server: Server,
                                              expected: Any, tmp_path: Path) -> None:  # fmt: skip
    """At each of the save's calls as many signals: it is completed, and the program ends as after one."""
    folder, log = tmp_path / "run", tmp_path / "log"
    run = server.start(train, folder=folder, log=log, point=point, at=at, times=times, numbers=[TERM] * count,
                       background=background)  # fmt: skip
    assert run.wait() == -TERM, run.text
    assert newest(folder) == log.read_bytes().count(b"e") >= 9
    assert_same_run(finish(server, folder), expected())


def test_sg2_ten_from_outside_while_the_last_save_is_written(server: Server, expected: Any, tmp_path: Path) -> None:
    """The save that the first one asks for waits in its middle until the other nine have come."""
    folder, log = tmp_path / "run", tmp_path / "log"
    run = server.start(train, folder=folder, log=log, point="save", at=4, block=False, numbers=[TERM] * 9, every=100,
                       pace=0.01)  # fmt: skip
    run.expect("ready")
    while log.read_bytes().count(b"e") < 3:
        time.sleep(0.001)
    os.kill(run.pid, TERM)
    assert run.wait() == -TERM, run.text
    assert newest(folder) == log.read_bytes().count(b"e") in (3, 4, 5, 6)
    assert_same_run(finish(server, folder), expected())


# ------------------------------------------------------------------------------------------------------------------- SG3


@contextlib.contextmanager
def terminal() -> Iterator[tuple[int, str, Callable[[], bytes]]]:
    """A terminal: its keyboard, its name, and what was shown on it."""
    master, slave = os.openpty()
    shown: list[bytes] = []

    def read() -> None:
        with contextlib.suppress(OSError):
            while data := os.read(master, 4096):
                shown.append(data)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    try:
        yield master, os.ttyname(slave), lambda: b"".join(shown)
    finally:
        os.close(slave)  # ends the reading, once no other process has it
        thread.join(LIMIT)
        os.close(master)


@pytest.mark.parametrize("point", ["forward", "val_read"])
def test_sg3_ctrl_c_saves_and_twice_is_at_once(point: str, server: Server, expected: Any, tmp_path: Path) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    with terminal() as (keys, name, shown):
        run = server.start(train, terminal=name, as_program=True, folder=folder, log=log, workers=2, val_workers=2, pace=0.02)
        run.expect("ready")
        wanted = b"f" if point == "forward" else b"v"
        while log.read_bytes().count(wanted) < 2:
            time.sleep(0.002)
        os.write(keys, b"\x03")
        assert run.wait() == -INT, shown()  # what a shell shows as 130
        assert none_left(run.pid)
    assert shown().count(b"Saving at the end of this step") == 1
    assert b"KeyboardInterrupt" in shown()
    assert b"Error" not in shown()
    check_left(log.read_bytes(), INT, -1, newest(folder))
    assert_same_run(finish(server, folder), expected())


def test_sg3_a_second_ctrl_c_is_at_once(server: Server, tmp_path: Path) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    with terminal() as (keys, name, shown):
        run = server.start(train, terminal=name, as_program=True, folder=folder, log=log, point="forward", at=4, block=True,
                           workers=2)  # fmt: skip
        run.expect("ready")
        run.expect("at forward")  # and there it stays
        os.write(keys, b"\x03")
        end = time.monotonic() + LIMIT
        while b"Saving at the end of this step" not in shown():
            assert time.monotonic() < end
            time.sleep(0.002)
        assert run.wait(0.3) is None  # it waits for the step's end
        os.write(keys, b"\x03")
        assert run.wait() == -INT, shown()
        assert none_left(run.pid)
    assert newest(folder) == 3  # nothing was saved of the step that was cut off
    assert log.read_bytes().count(b"e") == 4


PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from test_preemption import Told, train
Told.reply = 1
if __name__ == "__main__":
    train(Path(sys.argv[2]), log=sys.argv[3], workers=2, val_workers=2, pace=0.02)
"""


@pytest.mark.parametrize(("number", "status"), [(INT, 130), (TERM, 143)])
def test_sg3_a_program_started_by_a_shell(number: int, status: int, tmp_path: Path) -> None:
    """A cold start, by the shell of a terminal, which says how the program ended."""
    program, log, says = tmp_path / "program.py", tmp_path / "log", tmp_path / "status"
    program.write_text(PROGRAM)
    line = f"{sys.executable} {program} {Path(__file__).parent} {tmp_path / 'run'} {log}; echo $? > {says}"
    pid, keys = pty.fork()
    if not pid:
        for each in (INT, TERM, signal.SIGHUP):
            signal.signal(each, signal.SIG_DFL)
        os.execve("/bin/sh", ["sh", "-c", f"trap : INT; {line}"], {**os.environ, **QUIET})
    shown, end, sent = b"", time.monotonic() + LIMIT, False
    try:
        while not says.exists() or not says.read_text():
            assert time.monotonic() < end, shown
            if select.select([keys], [], [], 0.01)[0]:
                with contextlib.suppress(OSError):
                    shown += os.read(keys, 4096)
            if not sent and log.exists() and log.read_bytes().count(b"e") >= 2:
                sent = True
                if number == INT:
                    os.write(keys, b"\x03")
                else:
                    [main] = [p for p in in_session(pid) if p != pid and parent(p) == pid]
                    os.kill(main, number)
        assert int(says.read_text()) == status, shown
        assert newest(tmp_path / "run") == log.read_bytes().count(b"e")
        assert none_left(pid)
    finally:
        for process in in_session(pid):
            os.kill(process, KILL)
        os.waitpid(pid, 0)
        os.close(keys)


def parent(pid: int) -> int:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return -1


# ------------------------------------------------------------------------------------------------------------------- SG6


def test_sg6_not_in_the_main_thread(server: Server, tmp_path: Path) -> None:
    assert server.run(threaded, folder=tmp_path) == 0


def test_sg6_a_forked_process_is_not_ours(server: Server, tmp_path: Path) -> None:
    assert server.run(forked, folder=tmp_path) == 0


@pytest.mark.parametrize("what", ["term", "usr1", "chld", "ignored", "error", "replaced"])
def test_sg6_handlers_of_the_program_are_called_once_and_put_back(what: str, server: Server, tmp_path: Path) -> None:
    assert server.run(mine, folder=tmp_path, what=what) == 0


@pytest.mark.parametrize("form", ["built_in", "by_hand"])
@pytest.mark.parametrize(
    ("point", "at", "saved"), [p for p in POINTS if p[2] is not None and p[0] not in ("fit_end", "fit_start")]
)
def test_sg6_return_and_go_on_in_the_same_process(point: str, at: int, saved: int, form: str, server: Server, expected: Any,
                                                  tmp_path: Path) -> None:  # fmt: skip
    run = server.start(train, folder=tmp_path, form=form, point=point, at=at, again=True, on_signal="return")
    run.expect("ready")
    run.expect(f"returned {saved}")
    assert run.wait() == 0, run.text
    assert_same_run(result(tmp_path), expected())


@pytest.mark.parametrize("number", [INT, TERM])
def test_sg6_ctrl_c_in_a_notebook_returns_the_state(number: int, server: Server, expected: Any, tmp_path: Path) -> None:
    run = server.start(train, folder=tmp_path, point="forward", at=9, numbers=[number], ps1=True, again=True)
    run.expect("ready")
    if number == INT:
        run.expect("returned 10")
        assert run.wait() == 0, run.text
        assert_same_run(result(tmp_path), expected())
    else:
        assert run.wait() == -TERM, run.text
        assert newest(tmp_path) == 10


@pytest.mark.parametrize("asks", ["either", "outer", "inner"])
@pytest.mark.parametrize("inner_first", [False, True], ids=["outer begins", "inner begins"])
def test_sg6_two_loops_in_one_body(inner_first: bool, asks: str, server: Server, tmp_path: Path) -> None:
    assert server.run(loops, folder=tmp_path, inner_first=inner_first, asks=asks) == 0


@pytest.mark.parametrize("point", [0, 5])
def test_sg6_around_a_loop_of_the_users_own(point: int, server: Server, tmp_path: Path) -> None:
    """Also before the first `updating`: handlers stand from the beginning of `with loop`."""
    run = server.start(around, folder=tmp_path, point=point)
    run.expect(f"left {point + 1}")
    assert run.wait() == -TERM, run.text
    assert newest(tmp_path) == point + 1


# ------------------------------------------------------------------------------------------------------------- SG7 and SG8


def test_sg7_stopped_and_continued(server: Server, expected: Any, tmp_path: Path) -> None:
    log = tmp_path / "log"
    run = server.start(train, folder=tmp_path / "run", log=log, workers=2, pace=0.005, deadline=3600.0)
    run.expect("ready")
    for count in (2, 6, 9):
        while log.read_bytes().count(b"e") < count:
            time.sleep(0.001)
        os.killpg(run.pid, signal.SIGSTOP)
        time.sleep(0.25)
        os.killpg(run.pid, signal.SIGCONT)
    assert run.wait() == 0, run.text
    assert_same_run(result(tmp_path / "run"), expected())


@pytest.mark.parametrize("jump", [10 * 86400.0, -10 * 86400.0])
def test_sg7_the_wall_clock_jumps(jump: float, server: Server, expected: Any, tmp_path: Path) -> None:
    assert server.run(train, folder=tmp_path, jump=jump, deadline=3600.0) == 0
    assert_same_run(result(tmp_path), expected())


@pytest.mark.parametrize("background", [False, True], ids=["foreground", "background"])
@pytest.mark.parametrize("call", range(5))
def test_sg8_killed_while_the_save_is_written(call: int, background: bool, server: Server, expected: Any,
                                              tmp_path: Path) -> None:  # fmt: skip
    """At each of the save's five flushes to disk."""
    run = server.start(stuck, folder=tmp_path, call=call, background=background)
    run.expect("ready")
    run.expect("step 10")
    os.kill(run.pid, TERM)
    run.expect("stuck")
    assert run.wait(0.1) is None
    os.kill(run.pid, KILL)
    assert run.wait() == -KILL, run.text
    assert newest(tmp_path) == (9 if call < 4 else 10)  # the last flush follows the rename
    assert_same_run(finish(server, tmp_path), expected())


def stuck(folder: str, call: int, background: bool) -> None:
    """Wait for the signal in step 11's data, then never come back from a flush of the save that follows."""
    fsync, calls = os.fsync, 0

    def slow(handle: int) -> None:
        nonlocal calls
        if told:
            calls += 1
            if calls == call + 1:
                Told.say("stuck")
                while True:
                    time.sleep(0.1)
        fsync(handle)

    told: list[int] = []
    inner = Slow.forward

    def forward(self: Slow, x: torch.Tensor) -> torch.Tensor:
        state = self.told.state
        if self.training and state is not None and state.step == 9 and not told:
            for thread in threading.enumerate():  # the save of step 9 is there before that of step 10 is asked for
                if thread.name == "hookloop checkpoint":
                    thread.join()
            Told.say("step 10")
            while not state.leaving:
                time.sleep(0.001)
            told.append(1)
        return inner(self, x)

    os.fsync = slow
    Slow.forward = forward  # type: ignore[method-assign]
    train(folder, background=background)


# ------------------------------------------------------------------------------------------- deadlines, settings, in here


class Clock:
    """`time.monotonic`, which only training moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, train: float, val: float = 0.0) -> None:
        self.now, self.train, self.val = 1000.0, train, val
        monkeypatch.setattr(time, "monotonic", lambda: self.now)

    def loss(self, model: nn.Module, batch: Any) -> Any:
        self.now += self.train if model.training else self.val
        return loss_fn(model, batch)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["timedelta", "aware", "naive"])
def test_deadline_is_kept_with_a_margin(kind: str, form: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, model, hour = Clock(monkeypatch, 100.0), net(), timedelta(hours=1)
    when: Any = {"timedelta": hour, "aware": datetime.now(UTC) + hour, "naive": datetime.now() + hour}[kind]
    history = History()
    loop = Loop(model, adamw(model), [Preemption(deadline=when), Checkpoint(tmp_path), history])
    state = form(loop, clock.loss, loader(400, 8), loader(8, 8), epochs=2)
    assert state.step == 35  # 3500 s: another would end within 100 s + the margin of 60 s before 3600 s
    assert state.stop_reason == "the deadline is near"
    assert state.epoch == 0
    assert history.seen == []
    assert [step_of(p) for p in list_checkpoints(tmp_path)] == [35]


def test_deadline_margin_and_growing_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, model = Clock(monkeypatch, 10.0), net()

    def loss(model: nn.Module, batch: Any) -> Any:
        clock.train += 10.0
        return clock.loss(model, batch)

    late = Preemption(deadline=timedelta(seconds=1000), margin=timedelta(seconds=200))
    state = by_hand(Loop(model, adamw(model), [late, Checkpoint(tmp_path)]), loss, loader(400, 8), epochs=1)
    # steps of 20, 30, 40, ... s end at 20, 50, 90, 140, 200, 270, 350, 440, 540, 650: 650 + 110 + 200 < 1000 no more at 11
    ends = [sum(range(20, 20 + 10 * n, 10)) for n in range(1, 20)]
    wanted = next(n for n, end in enumerate(ends, 1) if end + 200 + 10 * (n + 1) >= 1000)
    assert state.step == wanted
    assert ends[wanted - 1] <= 800


@pytest.mark.parametrize("form", FORMS)
def test_deadline_breaks_a_validation_off(form: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, history, model = Clock(monkeypatch, 1.0, 100.0), History(), net()
    loop = Loop(model, adamw(model), [Preemption(deadline=timedelta(hours=1)), Checkpoint(tmp_path), history])
    state = form(loop, clock.loss, loader(80, 8), loader(8000, 8), epochs=2)
    assert state.step == 10
    assert state.epoch == 0
    assert history.seen == []
    assert 3600 - 60 - 1 <= clock.now - 1000.0 <= 3600 - 60 + 100
    assert [step_of(p) for p in list_checkpoints(tmp_path)] == [10]
    model, history = net(), History()
    loop = Loop(model, adamw(model), [Preemption(), Checkpoint(tmp_path), history], resume=tmp_path)
    state = form(loop, clock.loss, loader(80, 8), loader(8000, 8), epochs=1)
    assert [seen[0] for seen in history.seen] == [10]
    assert state.epoch == 1


def test_deadline_a_validation_is_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is broken off at once, so what it takes is not to be left before the deadline."""
    clock, model = Clock(monkeypatch, 10.0, 1800.0), net()
    loop = Loop(model, adamw(model), [Preemption(deadline=timedelta(hours=10)), Checkpoint(tmp_path)])
    built_in(loop, clock.loss, loader(80, 8), loader(8, 8), epochs=100)
    assert clock.now - 1000.0 >= 36000 - 60 - 10
    assert clock.now - 1000.0 <= 36000 - 60 + 1800


def test_deadline_that_passed_between_two_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, model = Clock(monkeypatch, 1.0), net()
    loop = Loop(model, adamw(model), [Preemption(deadline=timedelta(hours=1)), Checkpoint(tmp_path)])
    assert built_in(loop, clock.loss, loader(), epochs=1).step == 7
    clock.now += 3600
    state = built_in(loop, clock.loss, loader(), epochs=2)
    assert state.step == 7
    assert state.stop_reason == "the deadline is near"


@pytest.mark.parametrize(("kwargs", "error", "says"), [
    ({"deadline": timedelta(0)}, ValueError, "has passed"), ({"deadline": timedelta(seconds=-1)}, ValueError, "has passed"),
    ({"deadline": datetime(2020, 1, 1)}, ValueError, r"deadline=.*2020.* has passed, or is nearer than margin"),
    ({"deadline": datetime(2020, 1, 1, tzinfo=UTC)}, ValueError, "has passed"),
    ({"deadline": 60}, TypeError, "deadline must be a datetime, or a timedelta from now, not 60"),
    ({"signals": [signal.SIGKILL]}, ValueError, "can be caught.*SIGKILL"), ({"signals": [signal.SIGSTOP]}, ValueError, "SIGSTOP"),
    ({"signals": [0]}, ValueError, "not 0"), ({"signals": [10**6]}, ValueError, "not 1000000"),
    ({"signals": "SIGTERM"}, ValueError, "not 'S'"), ({"signals": ["SIGTERM"]}, ValueError, "not 'SIGTERM'"),
    ({"signals": None}, ValueError, "not None"), ({"margin": timedelta(seconds=-1)}, ValueError, "margin must be"),
    ({"margin": 60}, ValueError, "margin must be a timedelta of at least 0, not 60"),
    ({"on_signal": "exit"}, ValueError, "on_signal.*exit"), ({"on_signal": None}, ValueError, "on_signal.*None"),
])  # fmt: skip
def test_bad_settings(kwargs: Any, error: Any, says: str) -> None:
    with pytest.raises(error, match=says):
        Preemption(**kwargs)


def test_one_signal_is_enough_and_so_is_none(tmp_path: Path) -> None:
    assert Preemption(signals=signal.SIGUSR1).signals == [signal.SIGUSR1]  # type: ignore[arg-type]
    model = net()
    before = [signal.getsignal(number) for number in WATCHED]
    loop = Loop(model, adamw(model), [Preemption(signals=()), Checkpoint(tmp_path)])
    assert built_in(loop, loss_fn, loader(), epochs=1).step == 7
    assert [signal.getsignal(number) for number in WATCHED] == before


@pytest.mark.parametrize("form", FORMS)
def test_nothing_that_saves_is_an_error_at_the_start(form: Any) -> None:
    model = net()
    loop = Loop(model, adamw(model), [Preemption()])
    before, handlers = bits(loop), [signal.getsignal(number) for number in WATCHED]
    with pytest.raises(ValueError, match=r"add Checkpoint\(folder\) to callbacks, or give on_signal='return'"):
        form(loop, loss_fn, loader(), epochs=1)
    assert_same_bits(before, bits(loop))
    assert [signal.getsignal(number) for number in WATCHED] == handlers
    model = net()
    assert form(Loop(model, adamw(model), [Preemption(on_signal="return")]), loss_fn, loader(), epochs=1).step == 7


@pytest.fixture
def harmless() -> Iterator[list[int]]:
    """A handler of SIGUSR1 that stands for the program's own."""
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("handlers can be set in the main thread only")
    seen: list[int] = []
    before = signal.signal(USR1, lambda number, frame: seen.append(number))
    yield seen
    signal.signal(USR1, before)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("on_signal", ["raise", "return"])
def test_sg6_in_this_very_process(on_signal: str, form: Any, harmless: list[int], tmp_path: Path) -> None:
    class At(Callback):
        def on_before_optimizer_step(self, state: State) -> None:
            if state.step == 3:
                signal.raise_signal(USR1)

    def make(*more: Callback) -> Loop:
        seed, model = Seed(4), net()
        return Loop(model, adamw(model), [seed, *more])

    form(whole := make(), loss_fn, loader(), loader(20, 8), epochs=2)
    own = signal.getsignal(USR1)
    loop = make(At(), Preemption([USR1], on_signal=on_signal), Checkpoint(tmp_path))
    state = form(loop, loss_fn, loader(), loader(20, 8), epochs=2)
    assert (state.step, state.epoch, state.stop_reason) == (4, 0, "SIGUSR1 was received")
    assert harmless == ([USR1] if on_signal == "raise" else [])
    assert signal.getsignal(USR1) is own
    assert newest(tmp_path) == 4
    assert form(loop, loss_fn, loader(), loader(20, 8), epochs=2).stop_reason is None
    assert_same_bits(bits(whole), bits(loop))


# ------------------------------------------------------------------------------------------------------------------- ES6


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("micro", range(4))
def test_es6_a_stop_inside_a_window_waits_for_its_end(micro: int, form: Any, tmp_path: Path) -> None:
    class Stops(Callback):
        def on_micro_end(self, state: State) -> None:
            assert state.micro is not None
            if state.step == 5 and state.micro.number == micro:
                state.stop("enough")

    def make(folder: Path, *more: Callback) -> Loop:
        seed, model = Seed(4), net()
        callbacks = [seed, GradientAccumulation(4), Checkpoint(folder, every=100, keep=None), *more]
        return Loop(model, adamw(model), callbacks, resume=folder)

    def run(loop: Loop) -> Any:
        return form(loop, loss_fn, loader(200, 8), loader(20, 8), epochs=2)

    run(whole := make(tmp_path / "whole"))
    steps = form(make(tmp_path / "six"), loss_fn, loader(200, 8), loader(20, 8), steps=6)
    assert steps.samples == 6 * 32
    state = run(stopped := make(tmp_path / "a", Stops()))
    assert (state.step, state.samples, state.epoch, state.stop_reason) == (6, 6 * 32, 0, "enough")
    assert [p.name for p in list_checkpoints(tmp_path / "a")] == ["step-00000006"]
    plain = torch.load(list_checkpoints(tmp_path / "a")[-1] / "model.pt", weights_only=True)
    assert_same_bits(plain, stopped.state.model.state_dict())
    assert_same_bits(plain, torch.load(list_checkpoints(tmp_path / "six")[-1] / "model.pt", weights_only=True))
    state = run(again := make(tmp_path / "a"))  # nobody stops it
    assert state.stop_reason is None
    assert_same_bits(bits(whole), bits(again))
