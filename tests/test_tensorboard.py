"""TensorBoard, its files read back with TensorBoard's own readers."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FORMS, adamw, assert_same_bits, bits, built_in, by_hand, loader, loss_fn, net
from tensorboard.backend.event_processing import event_accumulator, plugin_event_accumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.util import tensor_util
from torch.utils._python_dispatch import TorchDispatchMode

from hookloop.callbacks.checkpoint import Checkpoint
from hookloop.callbacks.diagnose import Diagnose
from hookloop.callbacks.early_stopping import EarlyStopping
from hookloop.callbacks.fingerprint import Fingerprint
from hookloop.callbacks.gradient_accumulation import GradientAccumulation
from hookloop.callbacks.progress import Progress
from hookloop.callbacks.seed import Seed
from hookloop.callbacks.tensorboard import TensorBoard, memory
from hookloop.callbacks.warmup import Warmup
from hookloop.loop import Callback, Loop, State
from hookloop.loop.groups import as_text, describe

Curves = dict[str, list[tuple[int, float]]]
STEP_TAGS = {"train/loss", "train/accuracy", "rate/group0", "decay/group0", "batch/size", "batch/micro_size",
             "batch/accumulate", "speed/samples_per_s", "speed/seconds", "memory/process_gib", "progress/epoch", "progress/samples",
             "progress/skipped"}  # fmt: skip


def accumulator(folder: Any) -> Any:
    """What the TensorBoard program itself reads a run with (where its native reader is not used)."""
    return plugin_event_accumulator.EventAccumulator(str(folder), size_guidance={"tensors": 0}).Reload()


def read(folder: Any) -> Curves:
    """Return tag -> (step, value), once both of TensorBoard's readers agree on it."""
    old = event_accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    found = {tag: [(e.step, e.value) for e in old.Scalars(tag)] for tag in old.Tags()["scalars"]}
    found = {tag: points for tag, points in found.items() if points}
    new = accumulator(folder)
    for tag, points in found.items():
        events = [(e.step, float(tensor_util.make_ndarray(e.tensor_proto))) for e in new.Tensors(tag)]
        assert [str(p) for p in events] == [str(p) for p in points], tag
    return found


def steps(curves: Curves, tag: str) -> list[int]:
    return [step for step, _ in curves[tag]]


def alone() -> State:
    model = net()
    return State(model, adamw(model))


def drive(board: TensorBoard, state: State, count: int, offset: float = 0.0, val: tuple[int, ...] = ()) -> None:
    """Take steps whose loss is step + offset, with a validation after some of them."""
    for _ in range(count):
        board.on_before_optimizer_step(state)
        state.step, state.samples = state.step + 1, state.samples + 8
        state.metrics["loss"] = torch.tensor(state.step + offset)
        board.after_step(state)
        if state.step in val:
            state.report({"val_loss": state.step + offset})
            board.on_validation_end(state)


@pytest.mark.parametrize("form", FORMS)
def test_curves(form: Any, tmp_path: Path) -> None:
    model = net()
    board = TensorBoard(tmp_path, every=5, grad_norm=True)
    loop = Loop(model, adamw(model), [Seed(0), Warmup(10), GradientAccumulation(2), board])
    state = form(loop, loss_fn, loader(50, 8), loader(20, 8), epochs=3)
    curves = read(tmp_path)
    assert set(curves) == STEP_TAGS | {"val/loss", "val/accuracy", "batch/grad_norm"}
    assert state.step == 12
    for tag in STEP_TAGS | {"batch/grad_norm"}:
        assert steps(curves, tag) == [1, 5, 10], tag
    assert steps(curves, "val/loss") == [4, 8, 12]
    assert curves["val/loss"][-1][1] == pytest.approx(state.metrics["val_loss"])
    assert curves["rate/group0"] == [(1, pytest.approx(1e-3)), (5, pytest.approx(5e-3)), (10, pytest.approx(1e-2))]
    assert curves["decay/group0"][0][1] == pytest.approx(0.01)
    assert {value for _, value in curves["batch/size"] + curves["batch/micro_size"]} == {8}
    assert {value for _, value in curves["batch/accumulate"]} == {2}
    assert curves["progress/samples"] == [(1, 16), (5, 66), (10, 132)]
    assert curves["progress/epoch"] == [(1, 0), (5, 1), (10, 2)]
    assert all(value > 0 for tag in ("speed/samples_per_s", "speed/seconds", "memory/process_gib") for _, value in curves[tag])


def test_docstrings_name_every_tag(tmp_path: Path) -> None:
    """TensorBoard's those of a run, and those of callbacks that log the tags where they are found."""
    model, own = net(), (EarlyStopping("val_loss"), Diagnose(), Fingerprint(1))
    loop = Loop(model, adamw(model), [TensorBoard(tmp_path, every=1, grad_norm=True), *own])
    built_in(loop, loss_fn, loader(), loader(), epochs=2)
    written, told = set(read(tmp_path)), str(TensorBoard.__doc__)
    for tag in written:
        family = re.sub(r"^(train|val|report)/.*", r"\1/<name>", tag.replace("group0", "group<i>"))
        assert f"`{family}`" in told, tag
    assert "train/early_stopping" in written
    assert "`train/early_stopping`" in str(EarlyStopping.__doc__)
    for kind, callback in (("report/diagnose/", Diagnose), ("train/fingerprint/", Fingerprint)):
        assert any(tag.startswith(kind) for tag in written)
        assert f"`{kind}<kind>`" in str(callback.__doc__)


def test_around_a_loop_of_the_users_own(tmp_path: Path) -> None:
    model = net()
    optimizer = adamw(model)
    loop = Loop(model, optimizer, [TensorBoard(tmp_path, every=3)])
    with loop:
        for batch in loader(50, 8):
            loss = loss_fn(model, batch)["loss"]
            loss.backward()
            with loop.updating(loss=loss.detach(), samples=len(batch[0])):
                optimizer.step()
            optimizer.zero_grad()
        loop.report({"val_loss": 0.5, "fid": torch.tensor(3.0)})
    curves = read(tmp_path)
    assert set(curves) == STEP_TAGS - {"train/accuracy"} | {"val/loss", "report/fid"}
    assert steps(curves, "train/loss") == [1, 3, 6]
    assert {value for _, value in curves["batch/size"]} == {8}


def test_alone_through_state(tmp_path: Path) -> None:
    state, board = alone(), TensorBoard(tmp_path, every=2)
    board.on_fit_start(state)
    drive(board, state, 5, val=(3,))
    assert steps(read(tmp_path), "train/loss") == [1, 2, 4]  # there before anything is closed
    board.on_fit_end(state)
    board.on_fit_end(state)
    assert read(tmp_path)["val/loss"] == [(3, 3.0)]


def test_reports_and_step_values_have_tags_of_their_own(tmp_path: Path) -> None:
    class Logs(Callback):
        def on_step_end(self, state: State) -> None:
            state.log("temperature", 0.5 + state.step)
            state.metrics["words"] = "not a number"
            state.metrics["vector"] = torch.ones(3)

    model = net()
    loop = Loop(model, adamw(model), [TensorBoard(tmp_path, every=2), Logs(), EarlyStopping("train_loss", 9)])
    with loop:
        for epoch in loop.epochs(2):
            for step in loop.steps(loader(24, 8)):
                for micro in step:
                    with micro:
                        micro.backward(loss_fn)
                loop.update()
            loop.report({"train_loss": 1.0, "fid": float(epoch)})
    curves = read(tmp_path)
    assert curves["report/fid"] == [(3, 0.0), (6, 1.0)]
    assert steps(curves, "report/train_loss") == [3, 6]
    assert steps(curves, "train/early_stopping") == [4, 6]
    assert curves["train/temperature"] == [(1, 1.5), (2, 2.5), (4, 4.5), (6, 6.5)]  # though Logs stands after TensorBoard
    assert not [tag for tag in curves if "words" in tag or "vector" in tag or tag in ("train/fid", "train/train_loss")]


def test_what_was_reported_under_a_steps_name_does_not_end_its_curve(tmp_path: Path) -> None:
    model = net()
    loop = Loop(model, adamw(model), [TensorBoard(tmp_path, every=1)])
    with loop:
        for _ in loop.epochs(2):
            for step in loop.steps(loader(24, 8)):
                for micro in step:
                    with micro:
                        micro.backward(loss_fn)
                loop.update()
            loop.report({"loss": 1.0})
    curves = read(tmp_path)
    assert steps(curves, "train/loss") == [1, 2, 3, 4, 5, 6]
    assert curves["report/loss"] == [(3, 1.0), (6, 1.0)]


def test_an_update_in_which_another_callback_fails_is_written(tmp_path: Path) -> None:
    class Fails(Callback):
        def on_step_end(self, state: State) -> None:
            if state.step == 2:
                raise KeyError("mine")

    model = net()
    loop = Loop(model, adamw(model), [TensorBoard(tmp_path, every=1), Fails()])
    data = loader(24, 8)
    with pytest.raises(KeyError):
        loop.fit(loss_fn, data, epochs=1)
    loop.fit(loss_fn, data, epochs=1)
    assert steps(read(tmp_path), "train/loss") == [1, 2, 3]


def test_groups_table_and_hparams(tmp_path: Path) -> None:
    model = net()
    model[1].requires_grad_(False)
    optimizer = torch.optim.AdamW([{"params": model[0].parameters(), "weight_decay": 0.3},
                                   {"params": model[-1].parameters(), "lr": 0.5}], lr=0.125)  # fmt: skip
    table = as_text(describe(optimizer, model))
    board = TensorBoard(tmp_path, settings={"width": 12, "kind": "mlp", "wide": True})
    loop = Loop(model, optimizer, [Seed(7), board])
    loop.fit(loss_fn, loader(24, 8), loader(8, 8), epochs=1)
    loop.fit(loss_fn, loader(24, 8), loader(8, 8), epochs=2)
    curves, run = read(tmp_path), accumulator(tmp_path)
    assert [curves[f"{what}/group{i}"][0][1] for what in ("rate", "decay") for i in (0, 1)] == pytest.approx(
        [0.125, 0.5, 0.3, 0.01]
    )
    [text] = run.Tensors("parameter_groups/text_summary")
    assert text.step == 0
    assert text.tensor_proto.string_val[0].decode() == table
    contents = run.PluginTagToContent("hparams")
    start = HParamsPluginData.FromString(contents["_hparams_/session_start_info"]).session_start_info.hparams
    shown = {name: value.string_value or value.number_value for name, value in start.items()}
    assert shown["optimizer"] == "AdamW"
    assert (shown["lr"], shown["batch_size"], shown["accumulate"], shown["seed"]) == (0.125, 8, 1, 7)
    assert (shown["width"], shown["kind"], shown["wide"], shown["amsgrad"]) == (12, "mlp", "True", "False")
    metrics = HParamsPluginData.FromString(contents["_hparams_/experiment"]).experiment.metric_infos
    assert {m.name.tag for m in metrics} == {"val/loss", "val/accuracy"} <= set(curves)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_not_finite_values_and_any_names_are_stored(tmp_path: Path) -> None:
    state, board = alone(), TensorBoard(tmp_path, every=1)
    board.on_fit_start(state)
    for value in (float("nan"), float("inf"), -float("inf"), 1e300):
        state.step += 1
        state.metrics = {"loss": torch.tensor(value, dtype=torch.float64), "größe/α β": 1}
        board.after_step(state)
    board.on_fit_end(state)
    curves = read(tmp_path)
    assert [str(value) for _, value in curves["train/loss"]] == ["nan", "inf", "-inf", "inf"]
    assert steps(curves, "train/größe/α β") == [1, 2, 3, 4]


def test_grad_norm_is_computed_where_it_is_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    true_norm = State.grad_norm.fget
    assert true_norm is not None

    def norm(state: State) -> Any:
        if state._grad_norm is None and state._grads_open:
            asked.append(state.step + 1)
        return true_norm(state)

    monkeypatch.setattr(State, "grad_norm", property(norm))
    for on in (True, False):
        model = net()
        loop = Loop(model, adamw(model), [TensorBoard(tmp_path / str(on), every=4, grad_norm=on)])
        loop.fit(loss_fn, loader(50, 8), epochs=2)
        assert ("batch/grad_norm" in read(tmp_path / str(on))) == on
    assert asked == [1, 4, 8, 12]


class Late:
    """The event of a copy that the device has not come to."""

    arrived = waited = False

    def query(self) -> bool:
        return self.arrived

    def synchronize(self) -> None:
        self.waited = not self.arrived


def test_values_of_a_late_device_are_written_when_they_come_and_before_a_save(tmp_path: Path) -> None:
    state, board = alone(), TensorBoard(tmp_path, every=2)
    board.on_fit_start(state)
    real, events = board._events.host.put, [Late() for _ in range(3)]

    def put(about: Any, values: Any) -> None:
        real(about, values)
        board._events.host.pending[-1][2].append(events[len(board._events.host.pending) - 1])  # type: ignore[arg-type]

    board._events.host.put = put  # type: ignore[method-assign]
    drive(board, state, 3)
    assert "train/loss" not in read(tmp_path)
    events[0].arrived = True
    drive(board, state, 2)
    assert not any(event.waited for event in events)
    assert read(tmp_path)["train/loss"] == [(1, 1.0)]
    board.state_dict()
    assert read(tmp_path)["train/loss"] == [(1, 1.0), (2, 2.0), (4, 4.0)]
    board.on_fit_end(state)


def test_memory() -> None:
    assert list(memory(torch.device("cpu"))) == ["memory/process_gib"]
    assert 0.05 < memory(torch.device("cpu"))["memory/process_gib"] < 64
    assert list(memory(torch.device("cuda"))) == ["memory/device_gib"]


@pytest.mark.parametrize("saved_at", [0, 5, 6, 7])
@pytest.mark.parametrize("then_validated", [False, True])
def test_resumed_without_overlap(tmp_path: Path, saved_at: int, then_validated: bool) -> None:
    """Whatever a killed run wrote beyond a checkpoint, each (tag, step) is there once, none missing up to it."""
    val = (3, 6, 9)
    state, board = alone(), TensorBoard(tmp_path, every=2)
    board.on_fit_start(state)
    drive(board, state, saved_at, val=tuple(v for v in val if v < saved_at or then_validated))
    saved = board.state_dict()
    drive(board, state, 6, 100.0, val)
    if saved_at in val and not then_validated:  # the killed run came as far as validating at the save's own step
        state.step = saved_at
        state.report({"val_loss": 100.0})
        board.on_validation_end(state)
    board._events.close()
    for entry in range(2):  # killed again before it got anywhere
        state, board = alone(), TensorBoard(tmp_path, every=2)
        state.step, state.samples = saved_at, 8 * saved_at
        if saved:
            board.load_state_dict(saved)
        board.on_fit_start(state)
        if entry == 0:
            board._events.close()
    if saved_at in val:  # some loops validate again here, others do not
        state.report({"val_loss": saved_at})
        board.on_validation_end(state)
    drive(board, state, 12 - saved_at, val=val)
    board.on_fit_end(state)
    curves = read(tmp_path)
    assert curves["train/loss"] == [(step, float(step)) for step in (1, 2, 4, 6, 8, 10, 12)]
    assert curves["val/loss"] == [(step, float(step)) for step in (3, 6, 9)]
    assert [event.step for event in accumulator(tmp_path).Tensors("parameter_groups/text_summary")] == [0]


def test_a_step_it_knows_nothing_of_keeps_what_stands_there(tmp_path: Path) -> None:
    state, board = alone(), TensorBoard(tmp_path, every=2)
    board.on_fit_start(state)
    drive(board, state, 6)
    board._events.close()
    state, board = alone(), TensorBoard(tmp_path, every=2)
    state.step = 4
    board.on_fit_start(state)
    drive(board, state, 4, 100.0)
    board.on_fit_end(state)
    assert read(tmp_path)["train/loss"] == [(1, 1.0), (2, 2.0), (4, 4.0), (6, 106.0), (8, 108.0)]


def test_a_fresh_start_hides_the_run_before(tmp_path: Path) -> None:
    for offset, count in ((100.0, 9), (0.0, 4)):  # the first was killed before its first checkpoint
        state, board = alone(), TensorBoard(tmp_path, every=2)
        board.on_fit_start(state)
        drive(board, state, count, offset)
        board._events.close()
    assert read(tmp_path)["train/loss"] == [(1, 1.0), (2, 2.0), (4, 4.0)]


def test_many_entries_within_a_second(tmp_path: Path) -> None:
    """Files are read in the order of their names, which end in a process id and count in seconds."""
    (tmp_path / f"events.out.tfevents.{int(time.time()) + 500}.zzz.1.0").touch()  # and a clock that was put back
    model = net()
    loop = Loop(model, adamw(model), [TensorBoard(tmp_path, every=2)])
    for epochs in range(1, 5):
        loop.fit(loss_fn, loader(24, 8), loader(8, 8), epochs=epochs)
    curves = read(tmp_path)
    assert steps(curves, "train/loss") == [1, *range(2, 13, 2)]
    assert steps(curves, "val/loss") == list(range(3, 13, 3))
    assert len(list(tmp_path.iterdir())) == 5


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("saved_at", [5, 7, 9])
def test_resumed_from_a_checkpoint(form: Any, tmp_path: Path, saved_at: int) -> None:
    """The curves of a run that broke off and was resumed are those of one that did not."""

    class Breaks(Callback):
        def on_step_end(self, state: State) -> None:
            if state.step == 12:
                raise KeyboardInterrupt

    def run(folder: Path, *more: Callback) -> None:
        seed, model = Seed(3), net()
        boards = [TensorBoard(folder / "tb", every=3), Checkpoint(folder / "ck", every=saved_at, keep=None)]
        loop = Loop(model, adamw(model), [seed, *boards, *more], resume=folder / "ck")
        form(loop, loss_fn, loader(50, 8), loader(20, 8), epochs=3)

    run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", Breaks())
    for newer in sorted((tmp_path / "broken/ck").glob("step-*"))[1:]:  # go back a good way
        newer.rename(tmp_path / newer.name)
    run(tmp_path / "broken")
    whole, broken = (read(tmp_path / name / "tb") for name in ("whole", "broken"))
    timed = ("speed/samples_per_s", "speed/seconds", "memory/process_gib")
    assert {t: steps(whole, t) for t in whole} == {t: steps(broken, t) for t in broken}
    assert {t: v for t, v in whole.items() if t not in timed} == {t: v for t, v in broken.items() if t not in timed}


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
from helpers import adamw, loader, loss_fn, net
from hookloop.callbacks.tensorboard import TensorBoard
from hookloop.loop import Callback, Loop

class Kill(Callback):
    def on_step_end(self, state):
        if state.step == 11:
            os.kill(os.getpid(), signal.SIGKILL)

model = net()
Loop(model, adamw(model), [TensorBoard(sys.argv[1], every=2), Kill()]).fit(loss_fn, loader(), loader(), epochs=9)
"""


def test_a_killed_runs_file_is_read(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), str(Path(__file__).parent)], timeout=120)
    assert done.returncode == -signal.SIGKILL
    curves = read(tmp_path)
    assert steps(curves, "train/loss") == [1, 2, 4, 6, 8, 10]  # all of it
    assert steps(curves, "val/loss") == [7]
    [path] = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-9])  # the power went too
    torn = read(tmp_path)
    assert steps(torn, "train/loss") == [1, 2, 4, 6, 8]
    state, board = alone(), TensorBoard(tmp_path, every=2)
    board.on_fit_start(state)
    drive(board, state, 3)
    board.on_fit_end(state)
    assert read(tmp_path)["train/loss"] == [(1, 1.0), (2, 2.0)]


@pytest.mark.parametrize("form", FORMS)
def test_watching_changes_no_bit(form: Any, tmp_path: Path) -> None:
    def run(*more: Callback) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = net()
        loop = Loop(model, adamw(model), [Warmup(4), *more])  # no Seed, so that any draw would show
        form(loop, loss_fn, loader(50, 8), loader(20, 8), epochs=2)
        return {**bits(loop), "rng": torch.get_rng_state()}

    watchers = [TensorBoard(tmp_path, every=2, grad_norm=True), Progress(every=0.01)]
    assert_same_bits(run(), run(*watchers))


class Reads(TorchDispatchMode):
    """Counts what makes the host wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_no_read_in_any_step(tmp_path: Path) -> None:
    def run(*more: Callback) -> list[int]:
        model, counts = net(), []
        with Reads() as reads, Loop(model, adamw(model), more) as loop:
            for _ in loop.epochs(2):
                for step in loop.steps(loader(50, 8)):
                    before = reads.count
                    for micro in step:
                        with micro:
                            micro.backward(loss_fn)
                    loop.update()
                    counts.append(reads.count - before)
        return counts

    assert run() == run(TensorBoard(tmp_path, every=3, grad_norm=True), Progress(every=0.01))


def test_only_rank_0_writes(tmp_path: Path) -> None:
    state, board = alone(), TensorBoard(tmp_path / "x", every=1)
    state.rank = 1
    board.on_fit_start(state)
    drive(board, state, 3, val=(2,))
    assert board.state_dict()["kept"] == {}
    board.on_fit_end(state)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("spelled", ["run", "run/../run", "link"])
def test_one_writer_a_folder(spelled: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    first, second = TensorBoard(tmp_path / "run"), TensorBoard(f"{tmp_path}/{spelled}").named("second")
    first.on_fit_start(alone())
    with pytest.raises(ValueError, match=re.escape(f"'{tmp_path}/{spelled}' is written by another TensorBoard")):
        second.on_fit_start(alone())
    first.on_fit_end(alone())
    second.on_fit_start(alone())
    second.on_fit_end(alone())


def test_a_relative_folder_stays_where_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    state, board = alone(), TensorBoard("run", every=1)
    for _ in range(2):  # entered again
        os.chdir(tmp_path / "elsewhere")
        board.on_fit_start(state)
        drive(board, state, 1)
        board.on_fit_end(state)
    assert steps(read(tmp_path / "run"), "train/loss") == [1, 2]
    assert not [*Path().iterdir()]


def test_validation_before_the_first_step_and_no_step_at_all(tmp_path: Path) -> None:
    model = net()
    loop = Loop(model, adamw(model), [TensorBoard(tmp_path, every=2), Progress()])
    with loop, pytest.raises(RuntimeError, match=r"loop\.report before the first loop\.steps"):
        loop.report({"val_loss": 1.0})
    assert list(tmp_path.iterdir()) == []
    assert loop.callbacks[0].state_dict() == {}


@pytest.mark.parametrize(("kwargs", "message"), [
    ({"folder": ""}, "folder must be the path of a local folder, such as 'runs/a', not ''"),
    ({"folder": None}, "folder must be the path"), ({"folder": "s3://bucket/run"}, "local folder.*s3://bucket/run"),
    ({"every": 0}, "every must be a whole number of updates, at least 1, not 0"), ({"every": 2.5}, "not 2.5"),
    ({"every": True}, "not True"), ({"settings": {"net": [1]}}, r"settings must hold .*\{'net': \[1\]\}"),
])  # fmt: skip
def test_bad_settings(kwargs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TensorBoard(**{"folder": "runs/a", **kwargs})


@pytest.mark.parametrize("place", ["file/run", "file"])
def test_tb1_a_folder_that_cannot_be_written(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    model = net()
    before = bits(loop := Loop(model, adamw(model), [TensorBoard(tmp_path / place)]))
    with pytest.raises(OSError, match=re.escape(f"can't write to folder={str(tmp_path / place)!r}, give another")):
        loop.fit(loss_fn, loader(), epochs=1)
    assert_same_bits(before, bits(loop))


@pytest.mark.skipif(not os.path.exists("/proc/self"), reason="a folder that even root can't write")
def test_tb1_a_folder_without_permission() -> None:
    with pytest.raises(OSError, match="can't write to folder='/proc/self/run', give another"):
        TensorBoard("/proc/self/run").on_fit_start(alone())


@pytest.mark.parametrize("form", FORMS)
def test_tb1_deleted_mid_run_is_one_warning(form: Any, tmp_path: Path) -> None:
    class Deletes(Callback):
        def on_step_end(self, state: State) -> None:
            if state.step == 4:
                for path in tmp_path.joinpath("tb").iterdir():
                    path.unlink()
                tmp_path.joinpath("tb").rmdir()

    model = net()
    loop = Loop(model, adamw(model), [Deletes(), TensorBoard(tmp_path / "tb", every=2)])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        state = form(loop, loss_fn, loader(50, 8), loader(20, 8), epochs=2)
    assert state.step == 14
    [warning] = [str(w.message) for w in caught]
    assert re.match(rf"TensorBoard stops writing to folder='{tmp_path}/tb': .* was deleted", warning)
    form(loop, loss_fn, loader(50, 8), loader(20, 8), epochs=3)  # entered again it starts a file again
    assert steps(read(tmp_path / "tb"), "train/loss") == [16, 18, 20]


def test_tb1_a_full_disk_is_one_warning(tmp_path: Path) -> None:
    state, board = alone(), TensorBoard(tmp_path, every=1)
    board.on_fit_start(state)
    drive(board, state, 2)
    [path] = tmp_path.iterdir()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, limits[1]))
        try:
            drive(board, state, 2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        drive(board, state, 2, val=(6,))
        board.on_fit_end(state)
    [warning] = [str(w.message) for w in caught]
    assert "TensorBoard stops writing to folder=" in warning
    assert "the disk took 20 of" in warning
    assert steps(read(tmp_path), "train/loss") == [1, 2]


def test_forms_agree(tmp_path: Path) -> None:
    found = []
    for form in (by_hand, built_in):
        model = net()
        form(Loop(model, adamw(model), [Seed(1), TensorBoard(tmp_path / form.__name__, every=2)]), loss_fn, loader(),
             epochs=2)  # fmt: skip
        found.append(read(tmp_path / form.__name__))
    assert {t: v for t, v in found[0].items() if t.startswith(("train/", "report/"))} == {
        t: v for t, v in found[1].items() if t.startswith(("train/", "report/"))
    }
    assert steps(found[0], "report/train_loss") == [7, 14]
