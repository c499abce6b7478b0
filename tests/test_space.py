"""What a search chooses from: each point of a grid once, draws that follow the space's law, and bad spaces refused."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest

from hookloop.loop import Goal
from hookloop.loop.study import integers, log_uniform, uniform, when
from hookloop.loop.study.space import Space, nested
from hookloop.loop.study.worker import Job, sampler

optuna = pytest.importorskip("optuna")

NESTED = {
    "rate": [1e-3, 1e-2],
    "optimizer": {"kind": ["adamw", "sgd", "lion"], "momentum": when("optimizer.kind", "sgd", [0.5, 0.9])},
    "nesterov": when("optimizer.momentum", 0.9, [False, True]),
}


def test_a_grid_has_each_point_once_and_only_settings_that_exist() -> None:
    points = list(Space(NESTED).points())
    sgd = [{"optimizer.momentum": 0.5}, *({"optimizer.momentum": 0.9, "nesterov": x} for x in (False, True))]
    mores = {"adamw": [{}], "sgd": sgd, "lion": [{}]}
    expected = [{"rate": r, "optimizer.kind": kind, **more} for r in (1e-3, 1e-2) for kind in mores for more in mores[kind]]
    assert sorted(map(repr, points)) == sorted(map(repr, expected))
    assert len(points) == len({repr(point) for point in points}) == 10


def test_conditions_may_stand_before_what_they_hang_on() -> None:
    turned = dict(reversed(NESTED.items()))
    assert {repr(sorted(p.items(), key=repr)) for p in Space(turned).points()} == {
        repr(sorted(p.items(), key=repr)) for p in Space(NESTED).points()
    }


def test_a_dict_under_a_condition() -> None:
    space = Space({"kind": ["a", "b"], "more": when("kind", "b", {"x": [1, 2], "y": when("more.x", 2, [3])})})
    assert [nested(p) for p in space.points()] == [{"kind": "a"}, {"kind": "b", "more": {"x": 1}},
                                                  {"kind": "b", "more": {"x": 2, "y": 3}}]  # fmt: skip


def test_a_condition_on_a_whole_number() -> None:
    points = list(Space({"layers": integers(1, 3), "width": when("layers", 2, [8, 16])}).points())
    assert points == [{"layers": 1}, {"layers": 2, "width": 8}, {"layers": 2, "width": 16}, {"layers": 3}]


def test_points_are_counted_where_they_are_and_not_where_none_is() -> None:
    """Ten kinds with four settings of four values each: 4^40 combinations, 10 x 4^4 points."""
    kinds = [str(i) for i in range(10)]
    more = {f"of {kind}": when("kind", kind, {name: [1, 2, 3, 4] for name in "abcd"}) for kind in kinds}
    points = list(Space({"kind": kinds, **more}).points())
    assert len(points) == len(set(map(repr, points))) == 2560


def test_whole_numbers_are_points() -> None:
    assert list(Space({"size": integers(10, 70, multiple_of=16)}).points()) == [{"size": n} for n in (16, 32, 48, 64)]


def draws(space: dict[str, Any], count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Settings as a search draws them: by a sampler anew for each trial."""
    study, found = optuna.create_study(), []
    job = Job(len, space, "random", count, Goal("x"), None, "search", (seed,), False, seed, 1.0, 1)
    for number in range(count):
        study.sampler = sampler(job, Space(space), number)
        found.append(Space(space).suggest(study.ask()))
    return found


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_thousand_draws_follow_the_law() -> None:
    """Kolmogorov-Smirnov for ranges, chi squared for what is counted, and no setting hangs on another."""
    stats = pytest.importorskip("scipy.stats")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = {"a": uniform(-2, 5), "b": log_uniform(1e-5, 1e-1), "c": integers(16, 128, multiple_of=16), "d": ["x", "y", "z"]}
    found = draws(space, 1000)
    assert stats.kstest([x["a"] for x in found], stats.uniform(-2, 7).cdf).pvalue > 0.01
    assert stats.kstest([math.log(x["b"]) for x in found], stats.uniform(math.log(1e-5), math.log(1e4)).cdf).pvalue > 0.01
    for name, values in (("c", range(16, 129, 16)), ("d", "xyz")):
        counts = Counter(x[name] for x in found)
        assert set(counts) == set(values)
        assert stats.chisquare(list(counts.values())).pvalue > 0.01
    assert stats.spearmanr([x["a"] for x in found], [x["b"] for x in found]).pvalue > 0.01
    assert stats.spearmanr([x["a"] for x in found][1:], [x["a"] for x in found][:-1]).pvalue > 0.01
    assert found[:50] == draws(space, 50)
    assert found[:50] != draws(space, 50, seed=1)


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "empty": ({}, ValueError, "space must map names of settings to lists or ranges, and hold at least one, not {}"),
    "a list": ([1], ValueError, "space must map names"),
    "no list": ({"a": 3}, TypeError, r"space\['a'\] must be a list of values"),
    "a string": ({"a": "xyz"}, TypeError, r"space\['a'\] must be a list of values"),
    "an empty list": ({"a": []}, ValueError, r"space\['a'\] is an empty list"),
    "an empty dict": ({"a": {}}, ValueError, r"space\['a'\] is empty"),
    "twice": ({"a": [1, 2, 1]}, ValueError, r"space\['a'\] holds a value twice: \[1, 2, 1\]"),
    "equals": ({"a": [1, True]}, ValueError, r"space\['a'\] holds a value twice: \[1, True\]; 1, 1.0 and True are equal"),
    "no and nought": ({"a": [None, 0.0, False]}, ValueError, r"space\['a'\] holds a value twice"),
    "a function": ({"a": [len]}, TypeError, r"space\['a'\] holds <built-in function len>.*give names"),
    "nan": ({"a": [math.nan]}, TypeError, r"space\['a'\] holds nan"),
    "a dot": ({"a.b": [1]}, ValueError, r"strings without a dot, not 'a.b'"),
    "no name": ({1: [1]}, ValueError, "strings without a dot, not 1"),
    "unknown condition": ({"a": when("b", 1, [1])}, ValueError, r"space\['a'\] hangs on 'b', which is no setting"),
    "a circle": ({"a": when("b", 1, [1]), "b": when("a", 1, [1])}, ValueError, "hangs on"),
    "never": ({"a": [1], "b": when("a", 2, [1])}, ValueError, r"space\['b'\] exists when 'a' is 2, which it never is"),
    "of a range": ({"a": uniform(0, 1), "b": when("a", 0.5, [1])}, ValueError, "'a' is 0.5, and that is a continuous range"),
    "of no multiple": ({"a": integers(2, 8, 2), "b": when("a", 3, [1])}, ValueError, "'a' is 3, which it never is"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_spaces(name: str) -> None:
    space, kind, text = BAD[name]
    with pytest.raises(kind, match=text):
        Space(space)


@pytest.mark.parametrize(("make", "text"), [
    (lambda: uniform(1, 1), "low must be below high, not 1 and 1"),
    (lambda: uniform(math.nan, 1), "low must be a finite number, not nan"),
    (lambda: uniform(0, math.inf), "high must be a finite number, not inf"),
    (lambda: uniform(0, 10**400), "high must be a finite number, not 1000"),
    (lambda: uniform(-1e308, 1e308), r"low must be a finite number, not -1e\+308"),
    (lambda: uniform(True, 2), "low must be a finite number, not True"),
    (lambda: uniform("0", 2), "low must be a finite number, not '0'"),
    (lambda: log_uniform(0, 1), "low must be a finite number above 0, not 0"),
    (lambda: integers(1.0, 2), "low must be a whole number, not 1.0"),
    (lambda: integers(17, 31, multiple_of=16), r"integers\(17, 31, multiple_of=16\) holds no number"),
    (lambda: integers(1, 9, multiple_of=0), "multiple_of must be a whole number, at least 1, not 0"),
    (lambda: when("", 1, [1]), "name must be that of a setting"),
])  # fmt: skip
def test_bad_ranges(make: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()


def test_a_grid_over_a_range_names_it() -> None:
    with pytest.raises(ValueError, match=r"space\['rate'\] is a continuous range, of which a grid has no points; give a list"):
        list(Space({"rate": log_uniform(1e-4, 1)}).points())
