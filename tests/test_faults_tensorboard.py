"""TensorBoard's files under faults: no place to write, a full disk, kills, odd values, torn records."""

from __future__ import annotations

import contextlib
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FORMS, adamw, assert_same_bits, bits, built_in, by_hand, loader, loss_fn, net
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from test_preemption import Server, Told

from hookloop.callbacks import Checkpoint, GradientAccumulation, Seed, TensorBoard, Warmup
from hookloop.loop import Callback, Loop, State
from hookloop.loop.store import list_checkpoints, readable, step_of

Curves = dict[str, list[tuple[int, float]]]
TIMED = ("speed/", "memory/")


def read(folder: Path) -> Curves:
    reader = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    reader.Reload()
    found = {tag: [(event.step, event.value) for event in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}
    return {tag: points for tag, points in found.items() if points}


def untimed(curves: Curves) -> Curves:
    return {tag: points for tag, points in curves.items() if not tag.startswith(TIMED)}


def steps(curves: Curves, tag: str = "train/loss") -> list[int]:
    return [step for step, _ in curves.get(tag, [])]


def make(tb: Path | None, checkpoints: Path | None = None, *more: Callback, every: int = 1) -> Loop:
    seed, model = Seed(5), net(seed=5)
    callbacks: list[Callback] = [seed, Warmup(6), GradientAccumulation({0: 1, 1: 2}), *more]
    if tb is not None:
        callbacks.append(TensorBoard(tb, every=every, grad_norm=True))
    if checkpoints is not None:
        callbacks.append(Checkpoint(checkpoints, every=2, keep=None))
    return Loop(model, adamw(model), callbacks, resume=checkpoints)


def run(form: Any, loop: Loop, epochs: int = 3) -> State:
    return form(loop, loss_fn, loader(), loader(20, 8), epochs=epochs)


@contextlib.contextmanager
def one_warning(folder: Path, says: str = "") -> Iterator[None]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    texts = [str(warning.message) for warning in caught]
    ours = [text for text in texts if text.startswith(f"TensorBoard stops writing to folder={str(folder)!r}: ")]
    assert texts == ours, texts
    assert len(ours) == 1, texts
    assert says in ours[0]


class At(Callback):
    def __init__(self, step: int, act: Any) -> None:
        self.step, self.act = step, act

    def on_step_end(self, state: State) -> None:
        if state.step == self.step:
            self.act()


# ------------------------------------------------------------------------------------------------------------------- TB1


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("place", ["file", "file/run", "a/file/run"])
def test_tb1_under_a_file_is_an_error_before_the_first_step(place: str, form: Any, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for name in ("file", "a/file"):
        (tmp_path / name).write_text("of the user's")
    before = bits(loop := make(tmp_path / place, tmp_path / "ck"))
    with pytest.raises(OSError, match=re.escape(f"TensorBoard can't write to folder={str(tmp_path / place)!r}, give another")):
        run(form, loop)
    assert_same_bits(before, bits(loop))
    assert (tmp_path / "file").read_text() == "of the user's"
    assert not (tmp_path / "ck").exists() or list_checkpoints(tmp_path / "ck") == []


def test_tb1_no_permission_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "shut").mkdir(mode=0o555)
    root = os.geteuid() == 0
    if root:  # who may write anywhere
        os.seteuid(65534)
    try:
        with pytest.raises(OSError, match=r"TensorBoard can't write to folder=.*, give another: .*Permission denied"):
            TensorBoard(tmp_path / "shut" / "run").on_fit_start(make(None).state)
    finally:
        if root:
            os.seteuid(0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("what", ["file", "folder"])
@pytest.mark.parametrize("first", [True, False], ids=["before its hook", "after its hook"])
def test_tb1_deleted_while_training(first: bool, what: str, form: Any, tmp_path: Path) -> None:
    """One warning; the same bits; checkpoints go on; the resumed run writes again."""
    whole, tb = make(None), tmp_path / "tb"
    run(form, whole)

    def delete() -> None:
        if what == "folder":
            shutil.rmtree(tb)
        for path in tb.glob("*"):
            path.unlink()

    loop = make(tb, tmp_path / "ck", At(5, delete))
    if not first:
        for callback in loop.callbacks:
            del callback._loop
        loop = Loop(loop.state.model, loop.state.optimizer, loop.callbacks[::-1], resume=tmp_path / "ck")
    with one_warning(tb, "was deleted"):
        assert run(form, loop).step == 15
    assert_same_bits(bits(whole), bits(loop))
    assert [step_of(p) for p in list_checkpoints(tmp_path / "ck")][-1] == 15
    run(form, make(tb, tmp_path / "ck"), epochs=4)
    assert steps(read(tb)) == [16, 17, 18, 19]


# ------------------------------------------------------------------------------------------------------------------- TB2


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root can mount")
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"can't mount: {done.stderr}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def fill(disk: Path, leave: int = 0) -> None:
    """Leave so many bytes, in whole pages."""
    with (disk / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)) == 4096:
            pass
    size = (disk / "filler").stat().st_size
    os.truncate(disk / "filler", size - leave)


@pytest.mark.parametrize("form", FORMS)
def test_tb2_a_full_disk_of_its_own(form: Any, small_disk: Path, tmp_path: Path) -> None:
    """One warning; the same bits; what was whole is read, and the resumed run goes on from there."""
    whole, tb = make(tmp_path / "whole"), small_disk / "tb"
    run(form, whole)
    loop = make(tb, tmp_path / "ck", At(5, lambda: fill(small_disk)))
    with one_warning(tb):
        assert run(form, loop).step == 15
    assert_same_bits(bits(whole), bits(loop))
    assert [step_of(p) for p in list_checkpoints(tmp_path / "ck")][-1] == 15
    found, wanted = untimed(read(tb)), untimed(read(tmp_path / "whole"))
    last = steps(found)[-1]
    assert 4 <= last < 15
    assert found["train/loss"] == [point for point in wanted["train/loss"] if point[0] <= last]
    (small_disk / "filler").unlink()
    for later in list_checkpoints(tmp_path / "ck"):
        if step_of(later) > 4:
            shutil.rmtree(later)
    run(form, again := make(tb, tmp_path / "ck"))
    assert_same_bits(bits(whole), bits(again))
    assert untimed(read(tb)) == wanted


def test_tb2_checkpoints_come_first_on_a_disk_that_both_fill(small_disk: Path) -> None:
    """With room again, checkpoints are written again; the curves' file stays closed, and takes no room from them."""
    tb, ck = small_disk / "tb", small_disk / "ck"
    room = At(13, lambda: (small_disk / "filler").unlink())
    whole = make(None)
    run(built_in, whole)
    loop = make(tb, ck, At(5, lambda: fill(small_disk)), room.named("room"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert run(built_in, loop).step == 15
    assert_same_bits(bits(whole), bits(loop))
    texts = [str(warning.message) for warning in caught]
    assert len([text for text in texts if text.startswith("TensorBoard stops writing")]) == 1, texts
    failed = [text for text in texts if "Checkpoint failed" in text]
    assert 2 <= len(failed) == len(texts) - 1, texts
    assert all("No space left" in text or "disk full" in text for text in failed)
    saved = [step_of(p) for p in list_checkpoints(ck)]
    assert saved == [2, 4, 14, 15]
    assert all(readable(p) for p in list_checkpoints(ck))
    assert not list(ck.glob(".*"))
    assert 4 <= steps(read(tb))[-1] <= 12  # what the last page of its file had room for


@pytest.mark.parametrize("took", [0, 1, 8, 12, 13, 40, 200])
def test_tb2_a_disk_that_takes_a_part_of_a_record(took: int, tmp_path: Path) -> None:
    loop = make(tmp_path, every=1)
    state, board = loop.state, loop.callbacks[-1]
    board.on_fit_start(state)
    drive(board, state, 3)
    [path] = tmp_path.iterdir()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = read(tmp_path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + took, limits[1]))
    try:
        with one_warning(tmp_path):
            drive(board, state, 3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    board.on_fit_end(state)
    assert steps(before) == [1, 2, 3]
    assert read(tmp_path) == before


def drive(board: Any, state: State, count: int, offset: float = 0.0) -> None:
    for _ in range(count):
        board.on_before_optimizer_step(state)
        state.step, state.samples = state.step + 1, state.samples + 8
        state.metrics["loss"] = torch.tensor(state.step + offset)
        board.after_step(state)


# ------------------------------------------------------------------------------------------------------------------- TB3


class Paced(Callback):
    """Takes its time, and dies by SIGKILL at a hook of a step."""

    def __init__(self, kill: list[Any] | None, pace: float) -> None:
        self.kill, self.pace = kill, pace

    def _come_by(self, hook: str, state: State) -> None:
        time.sleep(self.pace)
        if self.kill == [hook, state.step]:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_fit_start(self, state: State) -> None:
        Told.say("ready")

    def on_micro_end(self, state: State) -> None:
        self._come_by("on_micro_end", state)

    def on_step_end(self, state: State) -> None:
        self._come_by("on_step_end", state)

    def on_validation_end(self, state: State) -> None:
        self._come_by("on_validation_end", state)

    def on_epoch_end(self, state: State) -> None:
        self._come_by("on_epoch_end", state)


def killed(folder: str, form: str, kill: list[Any] | None, pace: float, first: bool, every: int) -> None:
    """Train; `first`: the kill comes before TensorBoard's hook, else after it."""
    where = Path(folder)
    loop = make(where / "tb", where / "ck", Paced(kill, pace), every=every)
    if not first:
        for callback in loop.callbacks:
            del callback._loop
        loop = Loop(loop.state.model, loop.state.optimizer, loop.callbacks[::-1], resume=where / "ck")
    run(by_hand if form == "by_hand" else built_in, loop)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"), Path(__file__).stem)
    yield server
    server.close()


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Curves]:
    found = {}
    for every in (1, 3):
        folder = tmp_path_factory.mktemp("whole")
        run(built_in, make(folder / "tb", every=every))
        found[every] = untimed(read(folder / "tb"))
    return found


def saved(folder: Path) -> int:
    there = list_checkpoints(folder / "ck")
    return step_of(there[-1]) if there else 0


def check_curves(found: Curves, whole: Curves, upto: int) -> None:
    """Each (tag, step) at most once, and none missing up to a step; the values are those of the undisturbed run."""
    for tag, points in found.items():
        assert len({step for step, _ in points}) == len(points), tag
    found = untimed(found)
    assert found.keys() <= whole.keys()
    for tag, points in whole.items():
        there = dict(found.get(tag, []))
        missing = [point for point in points if point[0] < upto and point[0] not in there]
        assert not missing, f"{tag}: {missing} are missing before step {upto}"
        assert {step: value for step, value in points if step in there} == there, tag


KILLS = [("on_micro_end", 3), ("on_step_end", 1), ("on_step_end", 6), ("on_step_end", 7), ("on_validation_end", 7),
         ("on_epoch_end", 7), ("on_micro_end", 7), ("on_validation_end", 11), ("on_step_end", 15), ("on_validation_end", 15),
         ("on_epoch_end", 15)]  # fmt: skip


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("first", [True, False], ids=["before its hook", "after its hook"])
@pytest.mark.parametrize("kill", KILLS)
def test_tb3_killed_in_a_hook_and_resumed(kill: Any, first: bool, every: int, server: Server, wanted: Any,
                                          tmp_path: Path) -> None:  # fmt: skip
    common = {"folder": tmp_path, "pace": 0.0, "first": first, "every": every}
    assert server.run(killed, form="built_in", kill=list(kill), **common) == -signal.SIGKILL
    check_curves(read(tmp_path / "tb"), wanted[every], saved(tmp_path))
    assert server.run(killed, form="by_hand", kill=None, **common) == 0
    assert untimed(read(tmp_path / "tb")) == wanted[every]


def random_kills(server: Server, wanted: Any, tmp_path: Path, count: int, seed: int) -> None:
    clock, kills = random.Random(seed), 0
    for number in range(50 * count):
        folder, every = tmp_path / str(number), clock.choice([1, 3])
        for _ in range(100):
            form = clock.choice(["built_in", "by_hand"])
            child = server.start(
                killed, folder=folder, form=form, kill=None, pace=0.003, first=clock.random() < 0.5, every=every
            )
            if kills < count and child.wait(clock.uniform(0.02, 0.5)) is None:
                os.kill(child.pid, signal.SIGKILL)
            if child.wait() == 0:
                break
            assert child.code == -signal.SIGKILL, child.text
            kills += 1
            if (folder / "tb").exists():
                check_curves(read(folder / "tb"), wanted[every], saved(folder))
        assert child.code == 0
        assert untimed(read(folder / "tb")) == wanted[every]
        if kills >= count:
            print(f"{kills} kills in {number + 1} runs")
            return
    raise AssertionError


def test_tb3_killed_at_random_instants(server: Server, wanted: Any, tmp_path: Path) -> None:
    random_kills(server, wanted, tmp_path, 12, 1)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_tb3_killed_at_random_instants_at_length(server: Server, wanted: Any, tmp_path: Path) -> None:
    random_kills(server, wanted, tmp_path, 150, 2)


# ------------------------------------------------------------------------------------------------------------------- TB4

VALUES = {"nan": math.nan, "inf": math.inf, "minus_inf": -math.inf, "beyond float32": 1e300, "zero": 0, "tiny": 1e-300,
          "whole": 3, "flag": True, "bfloat": torch.tensor(1.5, dtype=torch.bfloat16), "nan tensor": torch.tensor(math.nan),
          "verlust/größe — 損失 🚀": 2.5, "a b\tc\nd": 4.0, "x" * 3000: 5.0}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_tb4_odd_values_and_names_are_stored(form: Any, tmp_path: Path) -> None:
    class Logs(Callback):
        def on_step_end(self, state: State) -> None:
            for name, value in VALUES.items():
                state.log(name, value)

        def on_validation_end(self, state: State) -> None:
            reported.append(dict(state.metrics))

    reported: list[Any] = []
    loop = make(tmp_path, None, Logs())
    run(form, loop, epochs=1)
    curves = read(tmp_path)
    for name, value in VALUES.items():
        value = float(torch.tensor(float(value), dtype=torch.float32))  # what a file holds
        points = curves[f"train/{name}"]
        assert [step for step, _ in points] == list(range(1, 8)), name
        assert all(v == value or (math.isnan(v) and math.isnan(value)) for _, v in points), name
    assert reported


def test_tb4_a_loss_that_is_nan_is_shown(tmp_path: Path) -> None:
    loop = make(tmp_path)
    state, board = loop.state, loop.callbacks[-1]
    board.on_fit_start(state)
    for value in (1.0, math.nan, math.inf, 2.0):
        drive(board, state, 1, value - state.step - 1)
    state.report({"val_loss": math.nan, "val_other": -math.inf})
    board.on_validation_end(state)
    board.on_fit_end(state)
    curves = read(tmp_path)
    assert [str(value) for _, value in curves["train/loss"]] == ["1.0", "nan", "inf", "2.0"]
    assert str(curves["val/loss"]) == "[(4, nan)]"
    assert curves["val/other"] == [(4, -math.inf)]


@pytest.mark.parametrize("form", FORMS)
def test_tb4_three_hundred_tags(form: Any, tmp_path: Path) -> None:
    class Logs(Callback):
        def on_step_end(self, state: State) -> None:
            for i in range(300):
                state.log(f"layer{i}/scale", state.step + i)

    run(form, make(tmp_path, None, Logs(), every=3))
    curves = read(tmp_path)
    for i in range(300):
        points = curves[f"train/layer{i}/scale"]
        assert [step for step, _ in points] == [1, 3, 6, 9, 12, 15]
        assert [value for step, value in points if step > 1] == [step + i for step, _ in points if step > 1]


@pytest.mark.parametrize("value", [torch.ones(3), torch.ones(2, 1), "text", None, [1.0], {"a": 1}, 1j, object()])
def test_tb4_what_is_no_number_is_an_error_or_left_out(value: Any, tmp_path: Path) -> None:
    """Logged or reported it is an error that names it; put into the metrics by hand it is left out."""
    loop = make(tmp_path)
    state, board = loop.state, loop.callbacks[-1]
    with pytest.raises(TypeError, match=r"log\('odd'\) takes a number, a 0-d tensor"):
        state.log("odd", value)
    with pytest.raises((TypeError, ValueError), match="odd"):
        state.report({"odd": value})
    board.on_fit_start(state)
    state.metrics["odd"] = value
    drive(board, state, 3)
    board.on_fit_end(state)
    curves = read(tmp_path)
    assert steps(curves) == [1, 2, 3]
    assert not [tag for tag in curves if "odd" in tag]


@pytest.mark.parametrize("value", [10**400, -(10**400)], ids=["above", "below"])
def test_tb4_a_whole_number_beyond_all_floats(value: int, tmp_path: Path) -> None:
    """Stored as what it is to a file of 32 bits, or an error that names it: no overflow without a name."""
    loop = make(tmp_path)
    state, board = loop.state, loop.callbacks[-1]
    board.on_fit_start(state)
    try:
        state.log("big", value)
        drive(board, state, 2)
        board.on_fit_end(state)
    except Exception as error:
        board._events.close()
        assert "big" in "".join([str(error), *getattr(error, "__notes__", [])])  # noqa: PT017
    else:
        assert steps(read(tmp_path)) == [1, 2]


# ------------------------------------------------------------------------------------------------------------------- TB5


def records(path: Path) -> list[int]:
    """Return where each record of an event file ends."""
    data, ends = path.read_bytes(), [0]
    while ends[-1] < len(data):
        ends.append(ends[-1] + 8 + 4 + int.from_bytes(data[ends[-1] : ends[-1] + 8], "little") + 4)
    assert ends[-1] == len(data)
    return ends


def test_tb5_a_last_record_cut_at_every_length(tmp_path: Path) -> None:
    """The reader shows all the others; the run that goes on, and one that starts afresh, are unaffected."""
    loop = make(tmp_path / "whole")
    state, board = loop.state, loop.callbacks[-1]
    board.on_fit_start(state)
    drive(board, state, 4)
    kept = board.state_dict()
    drive(board, state, 2)
    board._events.close()
    [path] = (tmp_path / "whole").iterdir()
    data, ends = path.read_bytes(), records(path)
    assert len(list(EventFileLoader(str(path)).Load())) == len(ends) - 1
    assert ends[-1] - ends[-2] > 100
    one = tmp_path / "cut"
    for length in range(ends[-2], ends[-1]):
        one.mkdir()
        (one / path.name).write_bytes(data[:length])
        assert steps(read(one)) == [1, 2, 3, 4, 5], length
        if length % 10 < 2 or length - ends[-2] < 20 or ends[-1] - length < 20:
            for start in (4, 0):
                after = make(one)
                board = after.callbacks[-1]
                if start:
                    board.load_state_dict(kept)
                    after.state.step, after.state.samples = 4, 32
                board.on_fit_start(after.state)
                drive(board, after.state, 3, 100.0)
                board.on_fit_end(after.state)
                before = [(step, float(step)) for step in range(1, start + 1)]
                news = [(step, step + 100.0) for step in range(start + 1, start + 4)]
                assert read(one)["train/loss"] == before + news, (length, start)
                if start:
                    assert (one / path.name).read_bytes() == data[:length]  # nothing of the user's past is rewritten
        shutil.rmtree(one)


@pytest.mark.parametrize("at", [8, 11, 20, -2])
def test_tb5_a_broken_byte_in_the_last_record(at: int, tmp_path: Path) -> None:
    loop = make(tmp_path)
    state, board = loop.state, loop.callbacks[-1]
    board.on_fit_start(state)
    drive(board, state, 5)
    [path] = tmp_path.iterdir()
    data, ends = bytearray(path.read_bytes()), records(path)
    data[ends[-2] + at if at > 0 else at] ^= 0x10
    path.write_bytes(data)
    assert steps(read(tmp_path)) == [1, 2, 3, 4]
    board._events.close()
    after = make(tmp_path)
    drive_on = after.callbacks[-1]
    after.state.step = 3
    drive_on.on_fit_start(after.state)
    drive(drive_on, after.state, 3, 100.0)
    drive_on.on_fit_end(after.state)
    assert read(tmp_path)["train/loss"] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 104.0), (5, 105.0), (6, 106.0)]
