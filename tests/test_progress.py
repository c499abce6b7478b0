"""Progress, on a terminal, in a notebook's place and in a batch job's log."""

from __future__ import annotations

import io
import math
import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FORMS, adamw, built_in, loader, loss_fn, net

from hookloop.callbacks.checkpoint import Checkpoint
from hookloop.callbacks.early_stopping import EarlyStopping
from hookloop.callbacks.progress import Progress
from hookloop.loop import Callback, Loop, State


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    @property
    def lines(self) -> list[str]:
        """What was drawn, each redrawing a line."""
        return [line for line in re.split(r"[\r\n]|\x1b\[A", self.getvalue()) if line.strip()]


def on_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "stderr", shown := Terminal())  # not in a fixture: pytest sets it anew for the call
    return shown


def make(*callbacks: Callback, **kwargs: Any) -> Loop:
    model = net()
    return Loop(model, adamw(model), callbacks, **kwargs)


class Slow(Callback):
    def on_step_end(self, state: State) -> None:
        time.sleep(0.03)


@pytest.mark.parametrize("form", FORMS)
def test_lines_where_there_is_no_terminal(form: Any, capsys: pytest.CaptureFixture[str]) -> None:
    loop = make(Slow(), Progress(every=0.12), EarlyStopping("val_loss", 9))
    form(loop, loss_fn, loader(50, 8), loader(20, 8), epochs=2)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ""
    ended = [line for line in lines if "ended" in line]
    number = r"-?\d[\d.e+-]*"
    pattern = (rf"loss {number}, rate 0.01, samples/s {number}, "
               rf"(val_loss {number}, val_accuracy {number}, early_stopping \d|early_stopping \d, val_loss .*)")  # fmt: skip
    assert [re.match(r"(.*): ", line)[1] for line in ended] == [  # type: ignore[index]
        "epoch 1 ended, step 7/14", "epoch 2 ended, step 14/14"]  # fmt: skip
    assert all(re.fullmatch(rf".*: {pattern}", line) for line in ended), ended
    between = [line for line in lines if line not in ended]
    assert len(between) >= 2
    assert all(re.match(rf"epoch [12], step \d+/14: loss {number}, rate 0.01", line) for line in between)
    loss = float(loop.state.metrics["loss"])
    assert f"loss {loss:.4g}," in lines[-1]


def test_a_short_run_without_epochs_leaves_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    model = net()
    optimizer = adamw(model)
    with Loop(model, optimizer, [Progress()]) as loop:
        for batch in loader(24, 8):
            loss = loss_fn(model, batch)["loss"]
            loss.backward()
            with loop.updating(loss=loss, samples=8):
                optimizer.step()
            optimizer.zero_grad()
    [line] = capsys.readouterr().err.splitlines()
    assert re.fullmatch(rf"ended, step 3/\?: loss {loss:.4g}, rate 0.01, samples/s .*", line)


def test_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    make(Progress(), EarlyStopping("val_loss", 9)).fit(loss_fn, loader(50, 8), loader(20, 8), epochs=2)
    lines = terminal.lines
    text = "\n".join(lines)
    assert re.search(r"epoch 1: +0%.* 0/50 ", text)
    assert re.search(r"epoch 2: 100%.* 50/50 \[.*<.*sample/s, loss [\d.]+, rate 0.01", text)
    assert re.search(r"run: +\d+%.* 1/14 ", text)
    assert re.search(r"run: +50%.* 7/14 .*val_loss [\d.]+, val_accuracy [\d.]+", text)
    assert re.search(r"run: 100%.* 14/14 \[\d.*<00:00, .*early_stopping \d", lines[-1])
    assert terminal.getvalue().endswith("\n")
    assert "ended" not in text


def test_bars_around_a_loop_of_the_users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    model = net()
    optimizer = adamw(model)
    with Loop(model, optimizer, [Progress()]) as loop:
        for batch in loader(24, 8):
            loss = loss_fn(model, batch)["loss"]
            loss.backward()
            with loop.updating(loss=loss):
                optimizer.step()
            optimizer.zero_grad()
        loop.report({"val_loss": 0.25})
    assert re.search(rf"run: 3step \[.*, loss {loss:.4g}, rate 0.01, val_loss 0.25", terminal.lines[-1])
    assert "epoch" not in terminal.getvalue()


def test_bars_begin_where_a_resumed_run_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    terminal = on_terminal(monkeypatch)

    class Breaks(Callback):
        def on_step_end(self, state: State) -> None:
            if state.step == 10:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(Checkpoint(tmp_path, every=10), Breaks()).fit(loss_fn, loader(50, 8), epochs=3, steps=None)
    shown_before = len(terminal.getvalue())
    newest = max(int(re.findall(r"\d+", p.name)[0]) for p in tmp_path.glob("step-*"))
    loop = make(Checkpoint(tmp_path, every=10), Progress(), resume=tmp_path)
    loop.fit(loss_fn, loader(50, 8), epochs=3)
    assert shown_before == 0
    done = newest - 7 if newest > 7 else 0
    assert re.search(rf"run: +\d+%.* {newest}/21 ", terminal.lines[0])
    assert re.search(rf"epoch 2: .* {done * 8}/50 ", "\n".join(terminal.lines))
    assert re.search(r"run: 100%.* 21/21 ", terminal.lines[-1])


def test_entered_again(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    loop = make(Progress())
    loop.fit(loss_fn, loader(50, 8), epochs=9, steps=9)
    at = len(terminal.lines)
    loop.fit(loss_fn, loader(50, 8), epochs=9, steps=20)
    assert re.search(r"run: +45%.* 9/20 ", terminal.lines[at])
    assert re.search(r"epoch 2: .* 16/50 ", "\n".join(terminal.lines[at:]))
    assert re.search(r"run: 100%.* 20/20 ", terminal.lines[-1])


def test_closed_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)

    def fails(model: Any, batch: Any) -> Any:
        if loop.state.step == 3:
            raise ZeroDivisionError
        return loss_fn(model, batch)

    progress = Progress()
    loop = make(progress)
    with pytest.raises(ZeroDivisionError):
        loop.fit(fails, loader(50, 8), epochs=2)
    assert progress._bars == []
    assert re.search(r"run: .* 3/14 ", terminal.lines[-1])
    assert terminal.getvalue().endswith("\n")


@pytest.mark.parametrize("fails_at", ["on_fit_start", "on_setup"])
def test_an_error_before_it_began(fails_at: str, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(state: State) -> None:
        raise ZeroDivisionError

    first = Callback()
    setattr(first, fails_at, fail)
    with pytest.raises(ZeroDivisionError):
        make(first, Progress()).fit(loss_fn, loader(), epochs=1)
    assert capsys.readouterr().err == ""


def test_no_length(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    make(Progress()).fit(loss_fn, iter(list(loader(24, 8))), steps=3)
    assert re.search(r"run: 100%.* 3/3 ", terminal.lines[-1])
    assert re.search(r"epoch 1: 24sample", "\n".join(terminal.lines))


def test_only_rank_0_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    state, progress = State(model := net(), adamw(model), rank=1), Progress()
    for hook in ("on_fit_start", "on_epoch_start", "on_step_end", "on_validation_end", "on_epoch_end", "on_fit_end"):
        getattr(progress, hook)(state)
    assert terminal.getvalue() == ""


def test_a_step_looks_ten_times_a_second_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    state, progress, looks = State(model := net(), adamw(model)), Progress(), []
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    progress.on_fit_start(state)
    real = progress._look
    monkeypatch.setattr(progress, "_look", lambda *a, **k: (looks.append(clock[0]), real(*a, **k)))
    state.metrics = {"loss": torch.tensor(2.0)}
    for _ in range(1000):
        state.step, state.samples = state.step + 1, state.samples + 10
        clock[0] += 0.001
        progress.on_step_end(state)
    assert 9 <= len(looks) <= 11
    assert progress._seen == {"loss": 2.0, "rate": 0.01}
    clock[0] += 1
    progress.on_step_end(state)
    assert progress._seen["samples/s"] == pytest.approx(10_000 / 2, rel=0.01)
    progress.on_fit_end(state)


def test_speed_leaves_validation_out(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    state, progress, clock = State(model := net(), adamw(model)), Progress(), [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    progress.on_fit_start(state)
    for _ in range(3):
        for _ in range(5):
            state.step, state.samples, clock[0] = state.step + 1, state.samples + 10, clock[0] + 0.1
            progress.on_step_end(state)
        clock[0] += 60  # validation
        state.metrics["val_loss"] = 0.5
        progress.on_validation_end(state)
        assert progress._seen["samples/s"] == pytest.approx(100)
    progress.on_fit_end(state)
    assert "samples/s 100, val_loss 0.5" in capsys.readouterr().err


def test_the_loss_of_a_late_device_is_shown_late() -> None:
    """While a copy has not arrived no other is made, and nothing waits."""
    state, progress = State(model := net(), adamw(model)), Progress()
    progress.on_fit_start(state)

    class Late:
        arrived = False

        def query(self) -> bool:
            return self.arrived

        def synchronize(self) -> None:
            assert self.arrived, "waited in a step"

    state.metrics = {"loss": torch.tensor(1.0)}
    progress._host.put(None, state.metrics)
    progress._host.pending[0][2].append(Late())  # type: ignore[arg-type]
    for _ in range(3):
        progress._look(state)
    assert progress._seen == {}
    assert len(progress._host.pending) == 1
    Late.arrived = True
    state.metrics = {"loss": torch.tensor(4.0)}
    progress._look(state)
    assert progress._seen["loss"] == 1.0
    progress._look(state)
    assert progress._seen["loss"] == 4.0


SIZELESS = """
import sys
sys.path.insert(0, sys.argv[1])
from helpers import adamw, loader, loss_fn, net
from hookloop.callbacks.progress import Progress
from hookloop.loop import Loop
model = net()
Loop(model, adamw(model), [Progress()]).fit(loss_fn, loader(), loader(), epochs=1)
"""


def test_a_terminal_without_a_size_shows_bars() -> None:
    """`docker run -t` without a terminal of its own says 0 columns, where tqdm draws nothing."""
    here, there = pty.openpty()
    env = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
    run = subprocess.Popen([sys.executable, "-W", "error", "-c", SIZELESS, str(Path(__file__).parent)],
                           stderr=there, stdout=there, stdin=there, env=env)  # fmt: skip
    os.close(there)
    shown, end = b"", time.monotonic() + 100
    while time.monotonic() < end and select.select([here], [], [], 1) is not None:
        try:
            if not (part := os.read(here, 4096)):
                break
        except OSError:
            break
        shown += part
    assert run.wait(10) == 0
    os.close(here)
    assert re.search(r"run: 100%.* 7/7 ", shown.decode())


def test_no_stream_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    built_in(make(Progress()), loss_fn, loader(24, 8), epochs=1)


@pytest.mark.parametrize("every", [0, -1.0, math.inf, math.nan, True, "30", None])
def test_bad_settings(every: Any) -> None:
    with pytest.raises(ValueError, match=rf"every must be a finite number of seconds above 0, not {re.escape(repr(every))}"):
        Progress(every=every)


def test_a_notebook_gets_bars_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from tqdm import auto, autonotebook, std

    made: list[dict[str, Any]] = []

    class Widget(std.tqdm):
        def __init__(self, **kwargs: Any) -> None:
            made.append(kwargs)
            super().__init__(**kwargs, file=io.StringIO())

    monkeypatch.setattr(autonotebook, "tqdm", Widget)
    monkeypatch.setattr(auto, "tqdm", Widget)
    make(Progress()).fit(loss_fn, loader(24, 8), epochs=2)
    assert [kwargs["desc"] for kwargs in made] == ["run", "epoch 1", "epoch 2"]
    assert all(kwargs["dynamic_ncols"] and "ncols" not in kwargs for kwargs in made)
