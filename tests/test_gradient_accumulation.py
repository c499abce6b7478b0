"""GradientAccumulation alone; the law *Cut* holds it to exactness."""

from __future__ import annotations

from typing import Any

import pytest
from helpers import FORMS, adamw, loader, loss_fn, net

from hookloop.callbacks import GradientAccumulation
from hookloop.loop import Loop, State


@pytest.mark.parametrize(("n", "expected"), [(3, [3, 3, 3, 3, 3]), ({0: 2}, [2] * 5), ({3: 8, 1: 4}, [1, 4, 4, 8, 8])])
def test_the_plan_by_epoch(n: Any, expected: list[int]) -> None:
    model, callback = net(), GradientAccumulation(n)
    state = State(model, adamw(model))
    for state.epoch, count in enumerate(expected):
        callback.on_step_start(state)
        assert state.accumulate == count


@pytest.mark.parametrize("form", FORMS)
def test_dl2_a_loader_shorter_than_the_group(form: Any) -> None:
    model = net(noise=False)
    state = form(Loop(model, adamw(model), [GradientAccumulation(8)]), loss_fn, loader(20, 8), epochs=2)
    assert state.step == state.total_steps == 2


@pytest.mark.parametrize(("n", "says"), [
    (0, "at least 1, not 0"), (-2, "not -2"), (2.0, "not 2.0"), (True, "not True"), ({}, "empty mapping"), ({-1: 2}, "not -1"),
    ({0: 0}, "not 0"), ({"0": 2}, "not '0'"),
])  # fmt: skip
def test_bad_arguments(n: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        GradientAccumulation(n)
