"""What a Goal takes for an improvement, and when its patience ends."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hookloop.loop import Goal, State
from hookloop.loop.goal import Tracker, number

NAN, INF = math.nan, math.inf


def reports_until_stop(goal: Goal, values: list[float]) -> int | None:
    """Return after how many reports patience ends, None if it holds."""
    tracker = Tracker(goal)
    for count, value in enumerate(values, 1):
        tracker.update(value)
        if tracker.exhausted:
            return count
    return None


@pytest.mark.parametrize(
    ("goal", "values", "stop"),
    [
        # equal values are no improvement
        ({"patience": 3}, [1, 1, 1, 1, 1], 4),
        ({"patience": 1}, [1, 1], 2),
        ({"patience": 2}, [3, 2, 2, 1, 1, 1], 6),
        ({"patience": 3}, [5, 4, 3, 2, 1], None),
        # patience 0 acts as 1
        ({"patience": 0}, [1, 0.5, 0.7], 3),
        ({"patience": 0}, [1], None),
        # modes
        ({"patience": 2, "mode": "max"}, [1, 2, 3, 2, 3], 5),
        ({"patience": 2, "mode": "min"}, [1, 2, 3], 3),
        ({"patience": 2, "mode": "max"}, [0, -1, -2], 3),
        # min_delta: an improvement must be larger, and small steps do not move the reference
        ({"patience": 3, "min_delta": 0.5}, [10, 9.8, 9.6, 9.4, 9.2], None),
        ({"patience": 3, "min_delta": 0.5}, [10, 9.8, 9.6, 9.5, 9.0], 4),
        ({"patience": 2, "min_delta": 1}, [10, 9, 8], None),
        ({"patience": 1, "min_delta": 1}, [10, 9], 2),
        ({"patience": 1, "min_delta": 1, "mode": "max"}, [10, 11], 2),
        ({"patience": 2, "min_delta": 1, "mode": "max"}, [10, 11, 11.5, 11.5, 11.5], 5),
        # relative, also where the metric is negative
        ({"patience": 1, "min_delta": 0.1, "relative": True}, [10, 8.9, 8.1], 3),
        ({"patience": 1, "min_delta": 0.1, "relative": True}, [-10, -11.1, -12.0], 3),
        ({"patience": 1, "min_delta": 0.1, "relative": True, "mode": "max"}, [-10, -8.9, -8.1], 3),
        ({"patience": 1, "min_delta": 0.1, "relative": True, "mode": "max"}, [10, 11.1, 12.0], 3),
        ({"patience": 2, "min_delta": 0.1, "relative": True}, [0, 0, -1e-9], None),
        # an improvement at the last moment
        ({"patience": 2}, [2, 3, 1, 2, 0, 1, 1], 7),
        # not finite
        ({"patience": 2}, [NAN, NAN], 2),
        ({"patience": 2}, [NAN, 1, NAN, 0.5, NAN, NAN], 6),
        ({"patience": 3}, [1, NAN, 2, NAN], 4),
        ({"patience": 2}, [-INF, 1, 0.5], None),
        ({"patience": 2, "mode": "max"}, [INF, INF], 2),
        ({"patience": 2}, [1, -INF, 0.5, 0.4], None),
    ],
)
def test_es4_exact_stop_counts(goal: dict[str, Any], values: list[float], stop: int | None) -> None:
    assert reports_until_stop(Goal("m", **goal), values) == stop


numbers = st.one_of(st.integers(-4, 4).map(lambda i: i / 2), st.sampled_from([NAN, INF, -INF]))


@given(st.lists(numbers, max_size=30), st.sampled_from(["min", "max"]), st.integers(0, 4),
       st.sampled_from([0.0, 0.5, 1.0]), st.booleans())  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_es2_es4_against_ten_lines(values: list[float], mode: str, patience: int, min_delta: float, relative: bool) -> None:
    """Whatever comes: the reference written down once more, with every decision spelt out."""
    tracker = Tracker(Goal("m", mode=mode, patience=patience, min_delta=min_delta, relative=relative))
    best, bad = None, 0
    for value in values:
        gain = None if best is None else (best - value if mode == "min" else value - best)
        needed = min_delta * abs(best) if relative and best is not None else min_delta
        improved = math.isfinite(value) and (gain is None or gain > needed)
        best, bad = (value, 0) if improved else (best, bad + 1)
        assert tracker.update(value) is improved
        assert (tracker.best, tracker.bad, tracker.exhausted) == (best, bad, bad >= max(patience, 1))
        assert tracker.best is None or math.isfinite(tracker.best)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("mode", ["min", "max"])
def test_es2_what_is_not_finite_never_becomes_the_best(bad: float, mode: str) -> None:
    goal = Goal("m", mode=mode)
    assert not goal.better(bad, None)
    assert not goal.better(bad, 1.0)
    tracker = Tracker(goal)
    assert [tracker.update(v) for v in (bad, 3.0, bad)] == [False, True, False]
    assert (tracker.best, tracker.bad) == (3.0, 1)


def test_es1_a_missing_metric_lists_those_there_are() -> None:
    model = nn.Linear(1, 1)
    state = State(model, torch.optim.SGD(model.parameters()))
    with pytest.raises(KeyError, match=r"EarlyStopping watches 'val_loss'.*there are: none"):
        Goal("val_loss").read(state, "EarlyStopping")
    state.metrics = {"val_b_loss": 2.0, "val_a_loss": 1.0}
    with pytest.raises(KeyError, match=r"'val_loss'.*there are: val_a_loss, val_b_loss"):
        Goal("val_loss").read(state, "EarlyStopping")
    assert Goal("val_a_loss").read(state, "EarlyStopping") == 1.0


@pytest.mark.parametrize("value", [2, 2.0, torch.tensor(2.0), torch.tensor([2.0]), torch.tensor(2), np.float32(2),
                                   np.float64(2), np.array(2.0), torch.tensor(2.0, dtype=torch.bfloat16),
                                   torch.tensor(2.0, requires_grad=True)])  # fmt: skip
def test_es3_one_number_of_any_kind(value: Any) -> None:
    found = number("m", value)
    assert found == 2.0
    assert type(found) is float


@pytest.mark.parametrize("value", ["2.0", None, torch.zeros(2), torch.zeros(0), np.zeros(3), [1.0], {"a": 1}, 1 + 2j,
                                   torch.tensor(1 + 2j), object()])  # fmt: skip
def test_es3_anything_else_is_an_error_that_names_it(value: Any) -> None:
    with pytest.raises(TypeError, match="'score' must be one number"):
        number("score", value)


@pytest.mark.parametrize("value", [True, False])
def test_es3_a_bool_is_a_number_or_an_error_but_no_bool(value: bool) -> None:
    assert type(number("m", value)) is float


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"metric": ""}, "metric"),
        ({"metric": None}, "metric"),
        ({"metric": 3}, "metric"),
        ({"mode": "lower"}, "mode must be 'min' or 'max'.*lower"),
        ({"mode": None}, "mode"),
        ({"patience": -1}, "patience.*-1"),
        ({"patience": 1.5}, "patience.*1.5"),
        ({"patience": True}, "patience.*True"),
        ({"patience": None}, "patience"),
        ({"min_delta": -0.1}, "min_delta.*-0.1"),
        ({"min_delta": NAN}, "min_delta"),
        ({"min_delta": INF}, "min_delta"),
        ({"min_delta": "1"}, "min_delta"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Goal(**{"metric": "val_loss", **settings})


def test_defaults_are_those_of_the_design() -> None:
    goal = Goal("val_loss")
    assert (goal.mode, goal.patience, goal.min_delta, goal.relative) == ("min", 3, 0.0, False)
    assert Goal.of("val_loss") == goal
    assert Goal.of(goal) is goal
    with pytest.raises(AttributeError):
        goal.patience = 5  # type: ignore[misc]


def test_a_trackers_state_goes_on() -> None:
    first, second = Tracker(Goal("m", patience=3)), Tracker(Goal("m", patience=3))
    for value in (2.0, 3.0, NAN):
        first.update(value)
    second.load_state_dict(first.state_dict())
    assert not second.exhausted
    assert not second.update(2.0)
    assert second.exhausted
