"""Signals in the process of the tests itself: who hears them, and which handlers stand afterwards."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from signal import SIG_DFL, SIG_IGN, SIGINT, SIGTERM
from typing import Any

import pytest
from helpers import FORMS, adamw, loader, loss_fn, net

from hookloop.callbacks import Checkpoint, Preemption
from hookloop.loop import Callback, Loop, State, signals
from hookloop.loop.store import list_checkpoints

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX signals")
SIGUSR1, SIGUSR2 = (getattr(signal, name, SIGTERM) for name in ("SIGUSR1", "SIGUSR2"))


@pytest.fixture(autouse=True)
def heard() -> Iterator[list[int]]:
    """What a handler of the program hears of three signals; the tests' own handlers are put back."""
    found: list[int] = []
    own = {number: signal.signal(number, lambda number, frame: found.append(number)) for number in (SIGTERM, SIGUSR1, SIGUSR2)}
    own |= {number: signal.getsignal(number) for number in (SIGINT, signal.SIGCHLD)}
    yield found
    after = {number: signal.signal(number, handler) for number, handler in own.items()}
    assert {number: after[number] for number in (SIGINT, signal.SIGCHLD)} == {n: own[n] for n in (SIGINT, signal.SIGCHLD)}
    assert signals.open_listeners == signals.due == []
    assert signals.ours == {}


class At(Callback):
    def __init__(self, step: int, act: Callable[[], Any]) -> None:
        self.step, self.act = step, act

    def on_before_optimizer_step(self, state: State) -> None:
        if state.step == self.step:
            self.act()


def make(folder: Path, act: Callable[[], Any], *callbacks: Callback, **how: Any) -> Loop:
    model = net(seed=5)
    return Loop(model, adamw(model), [Preemption(**how), Checkpoint(folder), At(3, act), *callbacks])


@pytest.mark.parametrize("form", FORMS)
def test_a_programs_handler_hears_it_once_what_was_trained_is_saved(form: Any, tmp_path: Path, heard: list[int]) -> None:
    mine = signal.getsignal(SIGTERM)
    loop = make(tmp_path, lambda: signal.raise_signal(SIGTERM))
    form(loop, loss_fn, loader(), epochs=2)
    assert heard == [SIGTERM]
    assert signal.getsignal(SIGTERM) is mine
    assert loop.state.step == 4
    assert [place.name for place in list_checkpoints(tmp_path)] == ["step-00000004"]


def test_with_return_nothing_is_raised_again(tmp_path: Path, heard: list[int]) -> None:
    loop = make(tmp_path, lambda: signal.raise_signal(SIGTERM), on_signal="return")
    loop.fit(loss_fn, loader(), epochs=2)
    assert heard == []
    assert loop.state.step == 4


def test_a_second_ctrl_c_is_obeyed_at_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def twice() -> None:
        signal.raise_signal(SIGINT)
        assert "Saving at the end of this step" in capfd.readouterr().err
        signal.raise_signal(SIGINT)

    loop = make(tmp_path, twice)
    with pytest.raises(KeyboardInterrupt):
        loop.fit(loss_fn, loader(), epochs=2)
    assert loop.state.step == 3


def test_every_open_loop_hears_it_and_the_last_to_be_left_raises_it_once(tmp_path: Path, heard: list[int]) -> None:
    def within() -> None:
        inner = make(tmp_path / "inner", lambda: signal.raise_signal(SIGTERM))
        inner.fit(loss_fn, loader(), epochs=2)
        steps.append(inner.state.step)
        assert heard == []

    steps: list[int] = []
    outer = make(tmp_path / "outer", within)
    outer.fit(loss_fn, loader(), epochs=2)
    assert [*steps, outer.state.step] == [4, 4]
    assert heard == [SIGTERM]


@pytest.mark.parametrize("handler", [signal.default_int_handler, SIG_IGN])
def test_a_handler_set_in_the_run_stays(handler: Any, tmp_path: Path) -> None:
    loop = make(tmp_path, lambda: signal.signal(SIGUSR1, handler), signals=[SIGUSR1])
    loop.fit(loss_fn, loader(), epochs=1)
    assert signal.getsignal(SIGUSR1) is handler


@pytest.mark.parametrize("run", ["first", "second"])
def test_a_handler_set_in_the_run_that_calls_ours_calls_the_one_of_before(run: str, tmp_path: Path, heard: list[int]) -> None:
    """In a second run too, before which the program has set another one."""

    def chain() -> None:
        ours = signal.getsignal(SIGUSR1)
        assert callable(ours)
        signal.signal(SIGUSR1, lambda number, frame: ours(number, frame))

    if run == "second":
        mine = signal.getsignal(SIGUSR1)
        signal.signal(SIGUSR1, SIG_DFL)
        make(tmp_path / "first", chain, signals=[SIGUSR1]).fit(loss_fn, loader(), epochs=1)
        signal.signal(SIGUSR1, mine)
    make(tmp_path / "run", chain, signals=[SIGUSR1]).fit(loss_fn, loader(), epochs=1)
    signal.raise_signal(SIGUSR1)
    assert heard == [SIGUSR1]


def test_what_is_ignored_stays_ignored(tmp_path: Path) -> None:
    signal.signal(SIGUSR1, SIG_IGN)
    loop = make(tmp_path, lambda: signal.raise_signal(SIGUSR1), signals=[SIGUSR1])
    loop.fit(loss_fn, loader(24, 4), steps=6)
    assert loop.state.step == 6
    assert signal.getsignal(SIGUSR1) is SIG_IGN


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells of handlers outside Python")
def test_what_is_handled_outside_python_is_left_alone_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    signal.signal(SIGUSR2, signal.SIG_DFL)
    with (tmp_path / "stacks").open("w") as file:
        faulthandler.register(SIGUSR2, file)
        try:
            loop = make(tmp_path / "run", lambda: signal.raise_signal(SIGUSR2), signals=[SIGUSR2])
            loop.fit(loss_fn, loader(24, 4), steps=6)
        finally:
            faulthandler.unregister(SIGUSR2)
    assert loop.state.step == 6
    assert "test_signals.py" in (tmp_path / "stacks").read_text()
    assert "SIGUSR2 is handled outside Python, which can't put that back: it is left alone" in caplog.text
