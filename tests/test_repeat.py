"""The same training over several seeds: spread, intervals and Welch's test against scipy and against chance itself."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from helpers import adamw, built_in, loader, loss_fn, net

from hookloop.callbacks import Seed
from hookloop.loop import Callback, Loop, State
from hookloop.loop.study import repeat

ROOT = Path(__file__).parents[1]


def small(seed: int, lr: float = 1e-2) -> State:
    first = Seed(seed)
    model = net(seed=seed)
    return built_in(Loop(model, adamw(model, lr), [first]), loss_fn, loader(), loader(20, 8), epochs=1)


def test_values_are_those_of_the_runs() -> None:
    found = repeat(small, seeds=3)
    [sample] = found.samples
    assert (sample.name, sample.seeds) == ("small", (0, 1, 2))
    assert list(sample.values) == [small(seed).metrics["val_loss"] for seed in range(3)]
    assert len(set(sample.values)) == 3
    assert sample.mean == pytest.approx(np.mean(sample.values))
    assert sample.std == pytest.approx(np.std(sample.values, ddof=1))
    half = scipy.stats.t.ppf(0.975, 2) * sample.std / 3**0.5
    assert sample.interval() == pytest.approx((sample.mean - half, sample.mean + half))


def test_two_settings_against_the_formula() -> None:
    """Welch 1947: t of the difference over its error, and degrees of freedom from the two spreads."""
    given = {"a": [0.91, 0.93, 0.92, 0.95, 0.9], "b": [0.94, 0.95, 0.99, 0.96, 0.93]}
    found = repeat({name: values.__getitem__ for name, values in given.items()}, metric="accuracy")
    a, b = (np.array(given[name]) for name in "ab")
    va, vb = a.var(ddof=1) / 5, b.var(ddof=1) / 5
    freedom = (va + vb) ** 2 / (va**2 / 4 + vb**2 / 4)
    apart, error = b.mean() - a.mean(), (va + vb) ** 0.5
    difference = found.difference("a", "b")
    assert difference.value == pytest.approx(apart)
    assert difference.p == pytest.approx(2 * scipy.stats.t.sf(apart / error, freedom))
    half = scipy.stats.t.ppf(0.975, freedom) * error
    assert difference.interval() == pytest.approx((apart - half, apart + half))
    assert found.difference("b", "a").p == pytest.approx(difference.p)
    table = str(found).splitlines()
    assert table[0].startswith("| accuracy | seeds | mean | standard deviation | 95% interval | difference | ")
    assert table[2].startswith("| a | 5 | 0.922 | 0.0192 | ")
    assert f"| {apart:+.3g} | " in table[3]
    assert table[3].endswith(f"| {difference.p:.2g} |")
    assert len({line.count("|") for line in table}) == 1


def test_chance_is_called_chance() -> None:
    """Of 400 pairs of settings that are the same, about one in twenty is called different at p < 0.05; 1 sigma of that is 1.1%."""
    draws = np.random.default_rng(0).normal(size=(400, 2, 5))
    called = [repeat({"a": a.__getitem__, "b": b.__getitem__}).difference("a", "b").p < 0.05 for a, b in draws]
    assert 0.01 <= np.mean(called) <= 0.085
    apart = [repeat({"a": a.__getitem__, "b": (b + 3).__getitem__}).difference("a", "b").p < 0.05 for a, b in draws]
    assert np.mean(apart) > 0.95


def test_without_any_spread() -> None:
    with pytest.warns(UserWarning, match=r"[abc] gave val_loss=[12]\.0 with every seed: does it build all anew") as seen:
        found = repeat({"a": lambda seed: 1.0, "b": lambda seed: 1.0, "c": lambda seed: 2.0})
    assert len(seen) == 3
    assert (found.difference("a", "b").p, found.difference("a", "c").p) == (1.0, 0.0)
    assert found["a"].interval() == (1.0, 1.0)
    assert found.difference("a", "c").interval() == (1.0, 1.0)
    assert "nan" not in str(found)


@pytest.mark.parametrize(("what", "says"), [
    ({"seeds": 1}, "seeds must be at least two different ones, not 1"), ({"seeds": True}, "seeds must be how many"),
    ({"seeds": [3, 3]}, "seeds must be at least two different ones"), ({"seeds": []}, "seeds must be at least two"),
    ({"seeds": ()}, "seeds must be at least two"), ({"run": {}}, "run is an empty mapping"),
    ({"seeds": [0, 1.5]}, "seeds must be whole numbers, not 1.5"), ({"seeds": [0, True]}, "seeds must be whole numbers"),
    ({"seeds": torch.tensor([0.5, 1.5])}, r"seeds must be whole numbers, not tensor\(0\.5"), ({"seeds": 2.5}, "not 2.5"),
    ({"seeds": torch.tensor([3, 3])}, "seeds must be at least two different ones"), ({"seeds": None}, "seeds must be how many"),
    ({"metric": ""}, "metric must be the name of a metric"), ({"metric": 3}, "metric must be the name of a metric"),
    ({"seeds": "ab"}, "seeds must be whole numbers"), ({"metric": "none"}, r"metric='none' is not among what small gave"),
])  # fmt: skip
def test_bad_arguments(what: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        repeat(**{"run": small, **what})


@pytest.mark.parametrize(("what", "says"), [
    (3, "run must be a function of a seed"), ({"a": small, "b": None}, "run must be a function of a seed"),
    ({0.1: small}, "run must name each setting by a string"), ({"": small}, "run must name each setting by a string"),
    ({"a": lambda: 1.0}, "a must take one argument, the seed"), ({"a": small, "b": lambda seed, lr: lr}, "b must take one"),
])  # fmt: skip
def test_a_bad_setting_is_refused_before_any_training(what: Any, says: str) -> None:
    def first(seed: int) -> float:
        pytest.fail("trained")

    with pytest.raises(TypeError, match=says):
        repeat({"first": first, **what} if isinstance(what, dict) else what)


@pytest.mark.parametrize("count", [3, np.int64(3), torch.tensor(3)])
def test_a_count_may_be_any_integer(count: Any) -> None:
    assert repeat(lambda seed: seed / 2, seeds=count).samples[0].seeds == (0, 1, 2)


def test_a_name_that_is_not_there_lists_those_that_are() -> None:
    found = repeat({"a": lambda seed: seed / 2, "b": lambda seed: seed / 3})
    for act in (lambda: found["typo"], lambda: found.difference("a", "typo")):
        with pytest.raises(KeyError, match="no setting is named 'typo'; there are: a, b"):
            act()


def test_names_in_the_table_are_escaped() -> None:
    table = str(repeat({"a|b": lambda seed: seed / 2, "c\nd": lambda seed: seed / 3}, metric="val|x")).splitlines()
    assert [line.split(" | ")[0] for line in table] == [r"| val\|x", table[1], r"| a\|b", r"| c\nd"]
    assert len({line.replace(r"\|", "").count("|") for line in table}) == 1


def test_a_run_that_returns_nothing_or_left_early_is_refused() -> None:
    with pytest.raises(TypeError, match="it returned None with seed 0; return what fit returned"):
        repeat({"it": lambda seed: None})

    class Stop(Callback):
        def __init__(self, act: str) -> None:
            self.act = act

        def on_step_end(self, state: State) -> None:
            if state.step == 3:
                getattr(state, self.act)("asked")

    def cut(act: str, seed: int) -> State:
        first = Seed(seed)
        model = net(seed=seed)
        loop = Loop(model, adamw(model), [first, Stop(act)])
        return built_in(loop, loss_fn, loader(), loader(20, 8), steps=4)

    def whole(seed: int) -> State:
        return cut("stop", seed)

    with pytest.raises(ValueError, match=r"it with seed 0 was left early \(asked\)"):
        repeat({"it": lambda seed: cut("leave", seed)}, metric="loss")
    assert len(repeat(whole, seeds=2, metric="loss").samples[0].values) == 2  # as EarlyStopping stops


def test_ctrl_c_leaves_what_had_ended() -> None:
    def run(seed: int) -> float:
        if seed == 2:
            raise KeyboardInterrupt
        return seed / 4

    with pytest.raises(KeyboardInterrupt) as caught:
        repeat(run)
    assert caught.value.__notes__ == ["in run with seed 2; val_loss of what had ended: {'run': [0.0, 0.25]}"]


def test_what_is_not_finite_has_no_spread() -> None:
    with pytest.raises(ValueError, match=r"val_loss is nan in it with seed 1: a spread of it means nothing"):
        repeat({"it": lambda seed: float("nan") if seed else 1.0})


@pytest.mark.parametrize("as_", [float, torch.tensor, np.float32, lambda x: {"val_loss": x, "x": 1}])
@pytest.mark.parametrize("seeds", [(4, 8), np.array([4, 8])])
def test_what_a_run_may_return(as_: Any, seeds: Any) -> None:
    sample = repeat(lambda seed: as_(seed / 16), seeds=seeds).samples[0]
    assert (sample.values, sample.seeds) == ((0.25, 0.5), (4, 8))
    assert all(type(seed) is int for seed in sample.seeds)


def test_a_failed_run_costs_none_of_those_that_ended() -> None:
    def run(seed: int) -> float:
        if seed == 2:
            raise RuntimeError("no more memory")
        return seed / 4

    with pytest.raises(RuntimeError, match="no more memory") as caught:
        repeat(run)
    assert caught.value.__notes__ == ["in run with seed 2; val_loss of what had ended: {'run': [0.0, 0.25]}"]


def test_without_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before any training."""
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(ImportError, match=r"pip install 'hookloop\[study\]'"):
        repeat(lambda seed: pytest.fail("trained"))


@pytest.mark.slow
def test_digits_with_five_seeds(capsys: pytest.CaptureFixture[str]) -> None:
    """The example's net, with and without dropout, three epochs each."""
    spec = importlib.util.spec_from_file_location("digits_repeated", ROOT / "examples" / "digits.py")
    assert spec is not None
    assert spec.loader is not None
    digits = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(digits)

    def at(lr: float) -> Any:
        def run(seed: int) -> State:
            first = Seed(seed)
            model = digits.build()
            train, val = digits.data()
            return Loop(model, torch.optim.AdamW(model.parameters(), lr), [first]).fit(digits.loss_fn, train, val, epochs=2)

        return run

    found = repeat({"lr 3e-3": at(3e-3), "lr 3e-3 again": at(3e-3), "lr 3e-5": at(3e-5)}, seeds=5)
    with capsys.disabled():
        print(f"\n{found}")
    assert found["lr 3e-3"].values == found["lr 3e-3 again"].values
    assert found["lr 3e-3"].std > 0
    assert found.difference("lr 3e-3", "lr 3e-3 again").p == 1.0
    assert found.difference("lr 3e-3", "lr 3e-5").p < 1e-3
