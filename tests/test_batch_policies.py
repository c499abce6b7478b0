"""The policies of DynamicBatchSize: sizes, rates, bounds, resume, bad input, and a user's own."""

from __future__ import annotations

import copy
import gc
import itertools
import logging
import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FORMS, Samples, adamw, assert_same_bits, bits, built_in, by_hand, loader, loss_fn
from torch import nn
from torch.utils.data import DataLoader

from hookloop.callbacks import (
    Checkpoint,
    DynamicBatchSize,
    Epochs,
    GradientAccumulation,
    NoiseScale,
    Plateau,
    Policy,
    Seed,
    Steps,
    Warmup,
)
from hookloop.callbacks.batch_policies import at
from hookloop.loop import Callback, Goal, Loop, State


class Sizes(Callback):
    """Keeps (epoch, step, planned size, samples of the update, rates used)."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, int, int | None, int, list[float]]] = []

    def on_step_end(self, state: State) -> None:
        self.rows.append((state.epoch, state.step - 1, state.batch_size, state.update_size, list(state.rates)))

    @property
    def planned(self) -> list[int | None]:
        return [row[2] for row in self.rows]


class Own(Policy):  # what the README promises: three lines
    def size(self, state: State, grow: Callable[[int], int]) -> int:
        return grow(state.step // 4)


POLICIES: dict[str, Callable[[], Any]] = {
    "epochs": lambda: 2,
    "steps": lambda: Steps(5),
    "table": lambda: {0: 4, 1: 9, 2: 6},
    "step table": lambda: Steps({0: 5, 7: 11, 12: 4}),
    "own": lambda: Own(),
    "goal": lambda: Goal("val_loss", patience=1, min_delta=9),
    "plateau": lambda: Plateau(Goal("val_accuracy", patience=1)),
    "plateau of training": lambda: Plateau(Goal("train_loss", "max", patience=1)),
    "noise": lambda: NoiseScale(every=3, smoothing=0.5),
}


def growing(policy: str, **kwargs: Any) -> DynamicBatchSize:
    return DynamicBatchSize(4, 16, every=POLICIES[policy](), **kwargs)


def run(form: Any, callbacks: list[Callback], epochs: int = 4, val: Any = None, **kwargs: Any) -> tuple[Loop, Sizes]:
    seed, model, sizes = Seed(5), dropping(), Sizes()
    loop = Loop(model, adamw(model), [seed, *callbacks, sizes], **kwargs)
    form(loop, loss_fn, loader(41, 8), val, epochs=epochs)
    return loop, sizes


def dropping(seed: int = 5) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 12), nn.Dropout(0.3), nn.ReLU(), nn.Linear(12, 3))


def val_of(policy: str) -> Any:
    return None if "training" in policy else loader(20, 8, shuffle=False)


# The pure functions


def test_at() -> None:
    table = {3: 30, 0: 5, 10: 7}
    assert [at(table, i) for i in (0, 2, 3, 9, 10, 99)] == [5, 5, 30, 30, 7, 7]
    assert at({2: 9}, 1) is None
    assert at({}, 5) is None


@pytest.mark.parametrize(("policy", "field"), [(Epochs, "epoch"), (Steps, "step")])
def test_growths_by_position(policy: Any, field: str) -> None:
    model = dropping()
    state, asked = State(model, adamw(model)), []
    for position in range(7):
        setattr(state, field, position)
        asked.append(policy(3).size(state, lambda k: 100 + k))
    assert asked == [100, 100, 100, 101, 101, 101, 102]


@pytest.mark.parametrize(("policy", "field"), [(Epochs, "epoch"), (Steps, "step")])
def test_a_table_by_position(policy: Any, field: str) -> None:
    model = dropping()
    state, asked = State(model, adamw(model)), []
    for position in range(7):
        setattr(state, field, position)
        asked.append(policy({5: 3, 2: 20}).size(state, lambda k: 100 + k))
    assert asked == [100, 100, 20, 20, 20, 3, 3]  # before the first entry: the initial size


def test_a_plateau_without_a_loop() -> None:
    model = dropping()
    state, policy, asked = State(model, adamw(model)), Plateau(Goal("val_loss", patience=2)), []
    for value in (5, 4, 4, 4, 3, 3, math.nan, 3, 3):
        state.report({"val_loss": value})
        policy.on_validation_end(state)
        asked.append(policy.size(state, lambda k: k))
    assert asked == [0, 0, 0, 1, 1, 1, 2, 2, 3]
    other = Plateau("val_loss")
    other.load_state_dict(policy.state_dict())
    assert other.size(state, lambda k: k) == 3
    assert (Plateau("val_loss").watches, DynamicBatchSize(4, 8, every=Goal("acc", "max")).watches) == (("val_loss",), ("acc",))


@pytest.mark.parametrize("form", FORMS)
def test_a_plain_name_is_a_goal_with_the_defaults(form: Any) -> None:
    def sizes(every: Any) -> Any:
        return run(form, [DynamicBatchSize(4, 16, every=every)], 8, loader(20, 8, shuffle=False))[1].planned

    assert sizes("val_accuracy") == sizes(Goal("val_accuracy"))
    assert len(set(sizes("val_accuracy"))) > 1


# Through a Loop


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("every", "expected"), [
    (2, lambda e, s: [4, 4, 6, 6][e]),
    (Steps(5), lambda e, s: [4, 6, 9, 13, 16, 16, 16][s // 5]),
    ({0: 4, 1: 9, 2: 6}, lambda e, s: [4, 9, 6, 6][e]),
    (Steps({0: 5, 7: 11, 12: 4}), lambda e, s: 5 if s < 7 else 11 if s < 12 else 4),
    ({2: 16}, lambda e, s: 4 if e < 2 else 16),
    (Own(), lambda e, s: [4, 6, 9, 13, 16, 16, 16, 16][s // 4]),
])  # fmt: skip
@pytest.mark.parametrize("accumulate", [1, 3])
def test_sizes_of_unmeasured_policies(form: Any, every: Any, expected: Any, accumulate: int) -> None:
    """The size changes in the very update that is told, also inside an epoch; and all is told in advance."""
    loop, sizes = run(form, [DynamicBatchSize(4, 16, every=every), GradientAccumulation(accumulate)])
    state = loop.state
    assert sizes.planned == [expected(epoch, step) for epoch, step, *_ in sizes.rows]
    left = 41
    for _, _, size, used, _ in sizes.rows:
        assert used == min(left, accumulate * size)
        left = left - used or 41
    assert state.total_steps == state.step == len(sizes.rows)
    assert state.samples == 4 * 41


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("scale", ["none", "linear", "sqrt"])
def test_rates_follow_under_every_policy(policy: str, scale: str) -> None:
    loop, sizes = run(by_hand, [growing(policy, scale_lr=scale)], val=val_of(policy))
    factor = {"none": lambda r: 1.0, "linear": lambda r: r, "sqrt": math.sqrt}[scale]
    assert len(set(sizes.planned)) > 1
    for _, _, size, _, (rate,) in sizes.rows:
        assert rate == pytest.approx(1e-2 * factor((size or 0) / 4), rel=1e-15)
    assert loop.state.optimizer.param_groups[0]["lr"] == 1e-2


def test_a_share_of_warmup_knows_the_length_under_a_policy() -> None:
    loop, sizes = run(built_in, [DynamicBatchSize(4, 16, every=Steps(5)), Warmup(0.5)])
    steps = len(sizes.rows)
    rates = [row[4][0] for row in sizes.rows]
    assert loop.state.total_steps == steps
    assert [rate < 1e-2 for rate in rates].index(False) in (steps // 2 - 1, steps // 2, steps // 2 + 1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("policy", ["goal", "plateau of training", "noise"])
def test_measured_growth_tells_no_length(form: Any, policy: str) -> None:
    assert run(form, [growing(policy)], val=val_of(policy))[0].state.total_steps is None
    model = dropping()
    loop = Loop(model, adamw(model), [growing(policy)])
    assert form(loop, loss_fn, loader(41, 8), val_of(policy), steps=13).total_steps == 13


class Killed(Exception):
    pass


class Kill(Callback):
    """Ends the run as a crash would, in a micro-batch of the given update, or in the validation after it."""

    def __init__(self, step: int, training: bool = True) -> None:
        self.step, self.training = step, training

    def on_micro_end(self, state: State) -> None:
        if state.step == self.step and state.micro is not None and state.micro.training == self.training:
            raise Killed


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("accumulate", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_resumed_in_the_middle(form: Any, policy: str, accumulate: int, tmp_path: Path) -> None:
    """By the law Restart: the same sizes and the same bits, wherever the run was cut off; and saving changes nothing."""

    def go(*more: Callback, **kwargs: Any) -> tuple[Loop, Sizes]:
        return run(form, [growing(policy), GradientAccumulation(accumulate), *more], val=val_of(policy), **kwargs)

    whole, sizes = go()
    assert len(set(sizes.planned)) > 1
    rows = [row[:4] for row in sizes.rows]
    ends = [i + 1 for i, (a, b) in enumerate(itertools.pairwise(rows)) if a[0] != b[0]]
    kills = [1, len(rows) // 3, len(rows) // 2 + 1, len(rows) - 1, *(() if val_of(policy) is None else (ends[1],))]
    folder = tmp_path / "often"
    for step in sorted(kills):  # one run, cut off again and again
        with pytest.raises(Killed):
            go(Checkpoint(folder, every=1), Kill(step, training=step != ends[1] or val_of(policy) is None), resume=folder)
    resumed, rest = go(Checkpoint(folder, every=1), resume=folder)
    assert [row[:4] for row in rest.rows] == rows[-len(rest.rows) :]
    assert len(rest.rows) < len(rows) / 2
    assert_same_bits(bits(whole), bits(resumed))


# Bounds


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("every", [1, Steps(2), {0: 4, 1: 50, 2: 100}, Own(), Goal("train_loss", "max", 1), NoiseScale(2, 0.0)])
def test_never_more_than_an_epoch_holds(form: Any, every: Any, caplog: pytest.LogCaptureFixture) -> None:
    model, sizes = dropping(), Sizes()
    callback = copy.deepcopy(DynamicBatchSize(4, 100, 2, every=every) if not isinstance(every, dict) else
                             DynamicBatchSize(4, 100, every=every))  # fmt: skip
    with caplog.at_level(logging.WARNING, "hookloop"):
        form(Loop(model, adamw(model), [callback, sizes]), loss_fn, loader(41, 8, drop_last=True), epochs=16)
    said = [r.getMessage() for r in caplog.records if r.name == "hookloop"]
    assert [m for m in said if "maximum=100" in m and "40 samples" in m], said
    assert max(s for s in sizes.planned if s) == 40
    assert sizes.rows[-1][2:4] == (40, 40)


def test_a_maximum_that_an_epoch_holds_is_not_talked_about(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "hookloop"):
        loop, _ = run(built_in, [DynamicBatchSize(4, 41, 3)])
    assert not caplog.records
    assert loop.state.epoch_samples == 41


def test_no_clamp_where_data_have_no_length(caplog: pytest.LogCaptureFixture) -> None:
    model, sizes = dropping(), Sizes()
    data = Samples(41)

    class Endless:
        def __iter__(self) -> Any:
            return iter(DataLoader(data, 8))

    with caplog.at_level(logging.INFO, "hookloop"):
        state = built_in(Loop(model, adamw(model), [DynamicBatchSize(4, 100, 5), sizes]), loss_fn, Endless(), epochs=3)
    assert not caplog.records
    assert (state.epoch_samples, state.total_steps) == (None, None)
    assert [s for _, _, s, _, _ in sizes.rows][-1] == 100
    assert sizes.rows[-1][3] == 41


def test_an_epoch_smaller_than_the_initial_size() -> None:
    loop, sizes = run(built_in, [DynamicBatchSize(50, 100)])
    assert [row[3] for row in sizes.rows] == [41] * 4
    assert loop.state.total_steps == 4


# Bad input


@pytest.mark.parametrize(("make", "says"), [
    (lambda: DynamicBatchSize(16, 8), r"maximum must be at least initial, 16, not 8"),
    (lambda: DynamicBatchSize(8, 16, 1), r"growth must be a factor above 1, not 1"),
    (lambda: DynamicBatchSize(8, 16, 0.5), r"growth must be a factor above 1, not 0.5"),
    (lambda: DynamicBatchSize(8, 16, math.nan), r"growth must be a factor above 1, not nan"),
    (lambda: DynamicBatchSize(8, 16, multiple_of=32), r"multiple_of=32 is more than maximum=16"),
    (lambda: DynamicBatchSize(8, 16, every={0: 32}), r"size 32, from 0 on, must be .* at most maximum=16"),
    (lambda: DynamicBatchSize(8, 16, every=Steps({0: 8, 9: 17})), r"size 17, from 9 on, must be .* at most maximum=16"),
    (lambda: DynamicBatchSize(8, 16, every={0: 12}, multiple_of=8), r"size 12, from 0 on, must be a multiple of 8"),
    (lambda: DynamicBatchSize(8, 16, every={}), r"every is an empty table; give \{epoch: size\}"),
    (lambda: Steps({}), r"every is an empty table; give \{step: size\}"),
    (lambda: DynamicBatchSize(8, 16, 2, every={0: 8}), r"growth=2 has no use beside a table of sizes; leave it out"),
    (lambda: DynamicBatchSize(8, 16, 2, every=Steps({0: 8})), r"growth=2 has no use beside a table of sizes; leave it out"),
    (lambda: DynamicBatchSize(8, 16, every={-1: 8}), r"a table's epoch must be a whole number, at least 0, not -1"),
    (lambda: Steps({1.5: 8}), r"a table's step must be a whole number, at least 0, not 1.5"),
    (lambda: Epochs({3: 0}), r"the size from epoch 3 on must be a whole number, at least 1, not 0"),
    (lambda: Steps(0), r"every must be a whole number, at least 1, not 0"),
    (lambda: Steps("x"), r"every must be a whole number, at least 1, not 'x'"),  # type: ignore[arg-type]
    (lambda: Plateau(""), r"metric must be the name of a metric, such as 'val_loss', not ''"),
    *((lambda v=v: DynamicBatchSize(8, 16, every=v), r"every must be ") for v in ("step", "epoch", None, 2.5, True, 0, [1, 2])),
])  # fmt: skip
def test_bad_settings(make: Callable[[], Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()


# Among them what has a `size` of its own: a class where its instance belongs, a tensor for a number.
@pytest.mark.parametrize("every", [NoiseScale, Plateau, Steps, Epochs, torch.tensor(2)])
def test_a_policy_that_is_none(every: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="every"):
        DynamicBatchSize(8, 16, every=every)


@pytest.mark.parametrize("policy", [lambda: Goal("val_los"), lambda: Plateau("val_los")])
def test_a_metric_that_never_comes(policy: Any) -> None:
    model = dropping()
    loop = Loop(model, adamw(model), [DynamicBatchSize(4, 16, every=policy())])
    with pytest.raises(KeyError, match=r"'val_los', which was not reported; there are: .*val_accuracy, val_loss") as error:
        built_in(loop, loss_fn, loader(), loader(), epochs=2)
    assert "DynamicBatchSize watches" in str(error.value)


def test_an_error_in_a_policy_says_where_it_arose() -> None:
    model = dropping()
    loop = Loop(model, adamw(model), [DynamicBatchSize(4, 16, every=Goal("val_los"))])
    with pytest.raises(KeyError) as error:
        built_in(loop, loss_fn, loader(), loader(), epochs=2)
    (said,) = [note for note in error.value.__notes__ if "on_validation_end at step" in note]
    assert "NoneType" not in said


def test_val_loss_without_validation_data() -> None:
    data, model = loader(), dropping()
    loop = Loop(model, adamw(model), [DynamicBatchSize(4, 16, every=Goal("val_loss"))])
    with pytest.raises(ValueError, match=r"DynamicBatchSize watches 'val_loss', but no val_loader is given.*'train_loss'"):
        built_in(loop, loss_fn, data, epochs=2)
    assert (loop.state.step, data.dataset.read) == (0, [])
    model = dropping()
    loop = Loop(model, adamw(model), [DynamicBatchSize(4, 16, every=Goal("val_loss"))])
    with pytest.raises(KeyError, match=r"'val_loss', which was not reported; there are: .*train_loss"):
        by_hand(loop, loss_fn, loader(), epochs=2)


@pytest.mark.parametrize("form", FORMS)
def test_nothing_was_reported(form: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = dropping()
    loop = Loop(model, adamw(model), [DynamicBatchSize(4, 16, every=Goal("val_loss"))])
    with caplog.at_level(logging.WARNING, "hookloop"):
        form(loop, loss_fn, loader(), loader(), steps=3)
    (said,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and "watched" in r.getMessage()]
    assert "DynamicBatchSize watched 'val_loss', but nothing was reported in 3 updates" in said


@pytest.mark.parametrize("size", [0, -3, 2.5, None])
def test_a_policy_of_ones_own_that_gives_no_size(size: Any) -> None:
    class Broken(Policy):
        def size(self, state: State, grow: Any) -> Any:
            return size

    model = dropping()
    loop = Loop(model, adamw(model), [DynamicBatchSize(4, 16, every=Broken())])
    with pytest.raises((TypeError, ValueError)):
        built_in(loop, loss_fn, loader(), steps=3)
    assert loop.state.step == 0


# A user's own


@pytest.mark.parametrize("form", FORMS)
def test_a_policy_of_ones_own_has_hooks_and_a_state(form: Any, tmp_path: Path) -> None:
    class Counts(Policy):
        measured = True
        seen = 0

        def on_step_end(self, state: State) -> None:
            self.seen += 1

        def size(self, state: State, grow: Callable[[int], int]) -> int:
            return grow(self.seen // 3)

        def state_dict(self) -> dict[str, Any]:
            return {"seen": self.seen}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.seen = state["seen"]

    def go(*more: Callback, **kwargs: Any) -> tuple[Loop, Sizes]:
        return run(form, [DynamicBatchSize(4, 16, every=Counts()), *more], **kwargs)

    whole, sizes = go()
    assert sizes.planned == [[4, 6, 9, 13, 16][min(4, i // 3)] for i in range(len(sizes.rows))]
    assert whole.state.total_steps is None
    with pytest.raises(Killed):
        go(Checkpoint(tmp_path, every=1), Kill(8))
    resumed, rest = go(Checkpoint(tmp_path, every=1), resume=tmp_path)
    assert rest.planned == sizes.planned[8:]
    assert_same_bits(bits(whole), bits(resumed))


def test_a_policy_of_ones_own_is_bounded() -> None:
    class Huge(Policy):
        def size(self, state: State, grow: Callable[[int], int]) -> int:
            return 10**9

    assert set(run(built_in, [DynamicBatchSize(4, 16, every=Huge())])[1].planned) == {16}


# Copies and lives


@pytest.mark.parametrize("policy", ["noise", "goal", "steps"])
def test_deep_copies_are_independent(policy: str) -> None:
    first = growing(policy)
    second, used = copy.deepcopy(first), first
    loop, sizes = run(built_in, [used], val=val_of(policy))
    kept = str(used.state_dict())
    assert str(second.state_dict()) == str(growing(policy).state_dict())
    again, others = run(built_in, [second], val=val_of(policy))
    assert sizes.rows == others.rows
    assert_same_bits(bits(loop), bits(again))
    third = copy.deepcopy(used)  # of a used one: free for another Loop, and it starts from what was learnt
    assert third.policy is not used.policy
    run(built_in, [third], val=val_of(policy))
    assert str(used.state_dict()) == kept
    if policy != "steps":
        assert str(third.state_dict()) != kept


@pytest.mark.parametrize("policy", POLICIES)
def test_a_loop_with_a_policy_is_gone_with_its_last_reference(policy: str) -> None:
    gc.collect()
    gc.disable()
    try:
        loop, _ = run(built_in, [growing(policy)], val=val_of(policy), epochs=1)
        gone = weakref.ref(loop.state.model)
        del loop
        assert gone() is None
    finally:
        gc.enable()
