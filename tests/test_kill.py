"""Real processes, really killed: the digits example ends with the same weights and curves, however often it dies.

A run is started, killed with SIGKILL at some instant and started again, until it ends by itself; then its weights, buffers,
optimizer, callbacks' states, last checkpoint and TensorBoard scalars are those of a run that nobody disturbed, to the bit,
and so were the weights after each update that any of its processes made.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import itertools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils.tensorboard.summary  # what each child would import anew
from tensorboard.compat.proto import event_pb2, summary_pb2  # noqa: F401
from tensorboard.summary.writer import record_writer  # noqa: F401
from test_faults_tensorboard import Curves, read, untimed
from test_preemption import LIMIT, QUIET, Run, Server, Told, in_session
from torch.utils.data import DataLoader, Dataset, Subset

from hookloop.callbacks import Checkpoint, DynamicBatchSize, EarlyStopping, GradientAccumulation, Seed, TensorBoard
from hookloop.loop import Callback, Goal, Loop, State, store

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs fork, and looks at /proc")

ROOT = Path(__file__).parents[1]
KILL = signal.SIGKILL
KEEP = 3  # checkpoints


def load_example() -> Any:
    spec = importlib.util.spec_from_file_location("digits_example", ROOT / "examples" / "digits.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


digits = load_example()

# ------------------------------------------------------------------------------------- what runs in a process of its own


class Shaken(Dataset[Any]):
    """Images shifted, dimmed and made noisy, by Python's, NumPy's and torch's generators."""

    def __init__(self, inner: Dataset[Any]) -> None:
        self.inner = inner

    def __len__(self) -> int:
        return len(self.inner)  # type: ignore[arg-type]

    def __getitem__(self, i: int) -> Any:
        image, label = self.inner[i]
        image = torch.roll(image, random.randint(-1, 1), -1) * float(np.random.uniform(0.9, 1.1))
        return image + 0.05 * torch.randn(image.shape), label


class Updates(Callback):
    """Says when training begins, and writes down what the weights are after each update."""

    def __init__(self, path: Path, start: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file, self.start = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), start

    def on_fit_start(self, state: State) -> None:
        if Told.reply >= 0:
            Told.say("ready")

    def on_step_end(self, state: State) -> None:
        found = 0
        for value in state.model.state_dict().values():
            found = zlib.crc32(value.contiguous().numpy().tobytes(), found)
        os.write(self.file, f"{self.start} {state.step} {found:08x}\n".encode())


def train(place: str, start: int, first: bool = False, persistent: bool = False, background: bool = False,
          seeded: bool = True) -> None:  # fmt: skip
    """The example's run with two workers that shake the images, checkpoints at every third update, and odd batch sizes.

    `place`: its checkpoints and curves are in `run`, what it ended with in `result.pt`; `first`: the checkpoint callback is
    before all the others; not `seeded`: the script seeds the generators itself, and training draws from them as they stand.
    """
    run = Path(place) / "run"
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    seed = [Seed(0)] if seeded else []
    model = digits.build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    checkpoint = Checkpoint(run, every=3, keep=KEEP, best=Goal("val_accuracy", mode="max"), background=background)
    mine = (
        GradientAccumulation({0: 1, 3: 2}),
        DynamicBatchSize(16, 48, growth=1.5, every=2),  # the loader's own is 20, so that parts of batches are carried over
        EarlyStopping("val_loss", patience=3, min_delta=0.01, restore_best=True),
        TensorBoard(run, every=4, grad_norm=True),
    )
    own = {type(callback): callback for callback in mine}
    others = [own.get(type(c), c) for c in digits.callbacks(run) if not isinstance(c, Checkpoint)]
    assert set(own.values()) <= set(others)
    callbacks = [checkpoint, *seed, *others] if first else [*seed, *others, checkpoint]
    images, val = digits.data()
    loader = DataLoader(
        Shaken(Subset(images.dataset, range(640))), 20, shuffle=True, num_workers=2, persistent_workers=persistent
    )
    loop = Loop(model, optimizer, [*callbacks, Updates(Path(place) / "updates", start)], resume=run)
    state = loop.fit(digits.loss_fn, loader, val, epochs=12)
    torch.save({
        "model": model.state_dict(), "optimizer": optimizer.state_dict(), "stop_reason": state.stop_reason,
        "callbacks": {callback.key: callback.state_dict() for callback in sorted(loop.callbacks, key=lambda c: c.key)},
        "counts": [state.step, state.samples, state.epoch, state.skipped],
    }, Path(place) / "result.pt")  # fmt: skip


# ------------------------------------------------------------------------------------------------------ what a run ends with


def flat(x: Any, path: str = "") -> dict[str, Any]:
    """Return all that is in nested data by its path, each number and tensor by its bits."""
    if isinstance(x, dict):
        parts: Any = [(repr(key), value) for key, value in x.items()]
    elif isinstance(x, list | tuple):
        parts = [(str(i), value) for i, value in enumerate(x)]
    elif isinstance(x, torch.Tensor):
        return {path: (str(x.dtype), tuple(x.shape), x.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())}
    else:
        return {path: x.hex() if isinstance(x, float) else repr(x)}
    found: dict[str, Any] = {path: [type(x).__name__, *(name for name, _ in parts)]}
    for name, value in parts:
        found |= flat(value, f"{path}[{name}]")
    return found


@dataclass
class End:
    """What a run left: `weights` are (which start, step, checksum) for each update that was made."""

    weights: list[tuple[int, int, str]]
    values: dict[str, Any]
    curves: Curves

    @classmethod
    def of(cls, place: Path) -> End:
        lines = [line.split() for line in (place / "updates").read_text().splitlines()]
        result, saved = torch.load(place / "result.pt", weights_only=True), store.read(place / "run")
        assert saved is not None
        for callbacks in (result["callbacks"], saved.state["callbacks"]):
            board = callbacks["TensorBoard"]  # what stands at the last step: tag -> value and the time when it was written
            board["kept"] = {tag: value for tag, (value, _) in untimed(board["kept"]).items()}
        values = flat({"result": result, "checkpoint": [saved.model, saved.state]})
        return cls([(int(start), int(step), found) for start, step, found in lines], values, read(place / "run"))

    def differences(self, whole: End) -> list[str]:
        """Say where this run differs from an undisturbed one; the first update that does comes first."""
        wanted, made = {step: value for _, step, value in whole.weights}, {step for _, step, _ in self.weights}
        other = [(start, step) for start, step, value in self.weights if value != wanted.get(step)]
        said = [f"start {start} made other weights at update {step}" for start, step in other[:1]]
        if missing := sorted(wanted.keys() - made):
            said.append(f"updates {missing[:10]} were never made")
        said += [f"{path} differs" for path in sorted(whole.values.keys() | self.values.keys())
                 if whole.values.get(path) != self.values.get(path)]  # fmt: skip
        for tag, points in self.curves.items():
            if len({step for step, _ in points}) != len(points):
                said.append(f"{tag} has a step twice")
        mine, others = untimed(self.curves), untimed(whole.curves)
        for tag in sorted(mine.keys() | others.keys()):
            if flat(mine.get(tag, [])) != flat(others.get(tag, [])):
                odd = sorted(set(mine.get(tag, [])) ^ set(others.get(tag, [])))
                said.append(f"{tag} differs, first at {odd[:2]}")
        return said


def tidy(place: Path) -> list[str]:
    """Say what should not be in a folder of a run that ended: parts, what could not be read, more than is to be kept."""
    run, found = place / "run", [path.name for path in (place / "run").iterdir()]
    said = [f"{name} was left" for name in found if name.endswith(".part") or name.startswith("unreadable-")]
    there = store.list_checkpoints(run)
    if len(there) > KEEP + 1:  # the best may be older
        said.append(f"too many checkpoints: {[path.name for path in there]}")
    return said + [f"{path.name} can't be read" for path in there if not store.readable(path)]


# ---------------------------------------------------------------------------------------------------------------- the driver

VARIANTS: dict[str, dict[str, Any]] = {
    "last": {},
    "first": {"first": True},
    "last, persistent workers": {"persistent": True},
    "first, persistent workers": {"first": True, "persistent": True},
    "last, in the background": {"background": True},
    "last, without a Seed": {"seeded": False},
}


def drafts(run: Path) -> tuple[set[str], set[str]]:
    """Return what is unfinished in a folder of checkpoints: what is being written, and what is being deleted."""
    names = os.listdir(run) if run.exists() else []
    newest = max((int(m[1]) for name in names if (m := re.fullmatch(r"step-(\d+)(\.\d+)?", name))), default=-1)
    writing, deleting = set[str](), set[str]()
    for name in names:
        if m := re.fullmatch(r"\.step-(\d+)(\.\d+)?\.part", name):
            (writing if int(m[1]) >= newest else deleting).add(name)
        elif name.endswith(".beside.part"):
            writing.add(name)
    return writing, deleting


def stopped(pid: int) -> bool:
    """Wait until a process that was sent SIGSTOP stands still; False where it ended first."""
    while True:
        try:
            kind = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return False
        if kind in "TtZX":
            return kind in "Tt"
        time.sleep(0.0002)


def made(place: Path) -> int:
    """Return the last update that was made."""
    path = place / "updates"
    return int(path.read_text().splitlines()[-1].split()[1]) if path.exists() and path.stat().st_size else 0


class Driver:
    """Kills runs at instants of its choice, and counts what it did.

    A run is killed at most `most` times, as densely as may be, or with `spread` all over its updates.
    """

    def __init__(self, server: Server, clock: random.Random, most: int, spread: bool) -> None:
        self.server, self.clock, self.most, self.spread = server, clock, most, spread
        self.seconds, self.saves = (0.1, 2) if spread else (0.4, 8)  # that may pass before a kill
        self.counts: Counter[str] = Counter()
        self.orphans: list[int] = []
        self.before: set[str] = set()

    def start(self, place: Path, number: int, variant: str) -> Run:
        """Start a run; what the kill before left alive lives on beside it, what the one before that left does not."""
        while len(self.orphans) > 1:
            self.sweep()
        self.before = set().union(*drafts(place / "run"))
        return self.server.start(train, place=place, start=number, **VARIANTS[variant])

    def sweep(self) -> None:
        for pid in in_session(self.orphans.pop(0)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, KILL)

    def close(self) -> None:
        while self.orphans:
            self.sweep()

    def killed(self, run: Run, place: Path, after: int) -> bool:
        """Wait for an instant, mostly one after this update, and kill; False where the run ended first."""
        kind = self.clock.choices(["starting", "training", "in a write", "after a write"], [3, 9, 5, 3])[0]
        if kind != "starting":
            run.begun()
            while after > 0 and made(place) < after:
                if run.wait(0.001) is not None:
                    return False
        if not self.waited(kind, run, place / "run"):
            return False
        alone = self.clock.random() < 0.5
        try:
            (os.kill if alone else os.killpg)(run.pid, KILL)
        except ProcessLookupError:
            return False
        if run.wait() != -KILL:
            return False
        writing, deleting = (bool(found - self.before) for found in drafts(place / "run"))
        self.counts.update({kind: 1, "kills": 1, "while writing": writing, "while deleting": deleting, "alone": alone})
        if alone:  # its workers find that out within 5 seconds: the next process doesn't wait for that
            self.orphans.append(run.pid)
            self.server.last = None
        return True

    def waited(self, kind: str, run: Run, folder: Path) -> bool:
        if kind == "starting":
            return run.wait(self.clock.uniform(0.0, 0.25)) is None
        if kind == "training":
            return run.wait(self.clock.uniform(0.0, self.seconds)) is None
        return self.written(run, folder, within=kind == "in a write")

    def written(self, run: Run, folder: Path, within: bool) -> bool:
        """Wait until a save, but not the first ones, has just got its name; `within`: until the process stands still in one."""
        skip, delay = self.clock.randrange(self.saves), self.clock.uniform(0.0, 0.004)
        seen: set[str] = set()
        while run.wait(0.0003) is None:
            now = drafts(folder)[0]
            seen |= now
            if len(seen) <= skip or bool(now) != within:
                continue
            if not within:
                return True
            time.sleep(delay)
            with contextlib.suppress(ProcessLookupError):
                os.kill(run.pid, signal.SIGSTOP)
                if stopped(run.pid) and drafts(folder)[0]:
                    return True
                os.kill(run.pid, signal.SIGCONT)  # it was quicker: at the next one
            delay /= 2
        return False

    def drive(self, tmp_path: Path, whole: Callable[[str], End], kills: int) -> None:
        """Make so many kills, in as many runs as that takes, and check each run's end."""
        for variant in itertools.cycle(list(VARIANTS)[:: 1 if kills > len(VARIANTS) else 2]):
            if self.counts["kills"] >= kills:
                break
            place = tmp_path / f"{self.counts['runs']}"
            self.counts["runs"] += 1
            left, last = min(self.most, kills - self.counts["kills"]), whole(variant).weights[-1][1]
            instants = sorted(self.clock.randrange(last + 1) for _ in range(left)) if self.spread else [0] * left
            for number in itertools.count():
                run = self.start(place, number, variant)
                if number < left and self.killed(run, place, instants[number]):
                    continue
                assert run.wait() == 0, f"start {number} of {place} ({variant}) ended by {run.code}: {run.text}"
                break
            said = [*End.of(place).differences(whole(variant)), *tidy(place)]
            assert not said, f"{place} ({variant}, {number} kills): " + "; ".join(said[:20])
            self.counts["equal"] += 1
            shutil.rmtree(place)

    def __str__(self) -> str:
        c = self.counts
        kinds = ", ".join(f"{c[name]} {name}" for name in ("starting", "training", "in a write", "after a write"))
        return (f"{c['kills']} kills ({c['while writing']} while writing, {c['while deleting']} while deleting, {c['alone']} of "
                f"the main process alone; aimed: {kinds}), {c['runs']} runs, {c['equal']} equal ends")  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------- the tests


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"), Path(__file__).stem)
    yield server
    server.close()


@pytest.fixture(scope="module")
def whole(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], End]:
    """Give the undisturbed run of a variant: how it saves and loads makes no difference, having a Seed does."""

    @functools.cache
    def run(seeded: bool) -> End:
        place = tmp_path_factory.mktemp("whole")
        assert server.run(train, place=place, start=0, seeded=seeded) == 0
        end = End.of(place)
        steps = [step for _, step, _ in end.weights]
        assert steps == list(range(1, len(steps) + 1))
        assert len(steps) > 100
        assert end.differences(end) == tidy(place) == []
        assert len(untimed(end.curves)) > 15
        return end

    return lambda variant: run(VARIANTS[variant].get("seeded", True))


def kill_again_and_again(server: Server, whole: Callable[[str], End], tmp_path: Path, kills: int, most: int, spread: bool,
                         seed: int) -> None:  # fmt: skip
    driver, before = Driver(server, random.Random(seed), most, spread), time.monotonic()
    try:
        driver.drive(tmp_path, whole, kills)
    except BaseException:
        print(f"seed {seed}")
        raise
    finally:
        driver.close()
        print(f"{driver}, {time.monotonic() - before:.0f} s")
    counts = driver.counts
    assert counts["kills"] == kills
    assert counts["equal"] == counts["runs"] >= min(kills, len(VARIANTS))
    assert counts["while writing"] >= kills // 30


def test_rs_killed_at_random_moments(server: Server, whole: Callable[[str], End], tmp_path: Path) -> None:
    kill_again_and_again(server, whole, tmp_path, kills=3, most=1, spread=True, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_rs_killed_a_thousand_times(server: Server, whole: Callable[[str], End], tmp_path: Path) -> None:
    kill_again_and_again(server, whole, tmp_path, kills=1000, most=25, spread=False, seed=2)
    assert whole("last").weights[0] != whole("last, without a Seed").weights[0]


@pytest.mark.slow
def test_rs_cold_starts(whole: Callable[[str], End], tmp_path: Path) -> None:
    """Nothing is left of the process before but its files: the second interpreter goes on from what the first one saved."""
    boot = "import sys; sys.path.insert(0, sys.argv[1]); import test_kill; test_kill.train(sys.argv[2], int(sys.argv[3]))"
    for number in range(2):
        errors = tmp_path / f"errors-{number}"
        with errors.open("w") as file:
            command = [sys.executable, "-c", boot, str(Path(__file__).parent), str(tmp_path), str(number)]
            process = subprocess.Popen(command, env={**os.environ, **QUIET}, stderr=file, start_new_session=True)
        try:
            if number == 0:
                end = time.monotonic() + LIMIT
                while len(store.list_checkpoints(tmp_path / "run")) < KEEP:
                    assert process.poll() is None, errors.read_text()
                    assert time.monotonic() < end
                    time.sleep(0.001)
                process.kill()
                assert process.wait() == -KILL
            else:
                assert process.wait(LIMIT) == 0, errors.read_text()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, KILL)
            process.wait()
    end_of = End.of(tmp_path)
    assert {start for start, _, _ in end_of.weights} == {0, 1}
    assert [*end_of.differences(whole("last")), *tidy(tmp_path)] == []
    print("2 cold starts, 1 kill, the same end")


# --------------------------------------------------------------------------------------------------------- the example itself


def start(folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "examples/digits.py"), "--folder", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_rs_cold_starts_of_the_example(tmp_path: Path) -> None:
    expected = re.search(r"fingerprint +(\w+)", start(tmp_path / "whole").communicate(timeout=200)[0])
    assert expected
    clock, folder, kills = random.Random(0), tmp_path / "killed", 0
    for _ in range(4):
        before = store.list_checkpoints(folder)[-1:]
        process = start(folder)
        while store.list_checkpoints(folder)[-1:] == before and process.poll() is None:
            time.sleep(0.001)
        time.sleep(clock.uniform(0.0, 0.5))
        process.kill()
        process.communicate()
        assert process.returncode in (-KILL, 0)
        kills += process.returncode == -KILL
    out = start(folder).communicate(timeout=200)[0]
    found = re.search(r"fingerprint +(\w+)", out)
    assert found
    print(f"5 cold starts of the example, {kills} kills, the same end")
    assert kills >= 2
    assert found[1] == expected[1]
    assert untimed(read(folder)) == untimed(read(tmp_path / "whole"))
