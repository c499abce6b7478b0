"""DecaySchedule: weight decay of each update, put back after it; and `State.scale_decay` under it."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from helpers import FORMS, KillAt, Killed, adamw, assert_same_bits, bits, built_in, by_hand, loader, loss_fn, net
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from hookloop.callbacks import (
    Checkpoint,
    DecaySchedule,
    GradientAccumulation,
    Schedule,
    Seed,
    SwitchOptimizer,
    TensorBoard,
    Warmup,
    WeightDecay,
)
from hookloop.callbacks.decay_schedule import decay_factor, progress
from hookloop.loop import Callback, Loop, State
from hookloop.loop.graph import Graphs

OPTIM = torch.optim.lr_scheduler
ends = st.floats(0, 5, allow_subnormal=False)  # half of the smallest subnormal is 0, which no relative bound allows for


def one(lr: Any = 0.1, decay: float = 0.4) -> State:
    model = nn.ParameterList([nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))])
    groups = [{"params": [model[0]]}, {"params": [model[1]], "lr": 0.02, "weight_decay": 0.3}]
    return State(model, torch.optim.SGD(groups, lr=lr, weight_decay=decay))


def drive(schedule: DecaySchedule, state: State, updates: int) -> list[list[float]]:
    """Drive it alone, as a loop would; return what each update used, and check that decays come back to the bit."""
    schedule.on_setup(state)
    schedule.on_fit_start(state)
    seen = []
    for _ in range(updates):
        values = [g["weight_decay"] for g in state.optimizer.param_groups]
        schedule.on_before_optimizer_step(state)
        before = state.apply_rates()
        seen.append([g["weight_decay"] for g in state.optimizer.param_groups])
        assert state.decays == seen[-1]
        state.restore_rates(before)
        assert [g["weight_decay"] for g in state.optimizer.param_groups] == values
        state.step += 1
    return seen


@given(st.integers(1, 300), ends, ends, st.sampled_from(["linear", "cosine"]))
@settings(max_examples=100, deadline=None)
def test_every_shape_runs_from_start_to_end(steps: int, start: float, end: float, shape: str) -> None:
    factors = [decay_factor(t, steps, start, end, shape) for t in range(steps + 2)]
    assert factors[0] == start
    if steps > 1:
        assert factors[steps - 1 :] == [pytest.approx(end, rel=1e-12)] * 3
    assert all(min(start, end) * (1 - 1e-12) <= f <= max(start, end) * (1 + 1e-12) for f in factors)


def test_the_shapes_in_the_middle() -> None:
    assert [decay_factor(t, 5, 1.0, 0.0) for t in range(6)] == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    assert decay_factor(1, 5, 1.0, 10.0, "cosine") == pytest.approx(1 + 9 * (1 - math.cos(math.pi / 4)) / 2)
    assert [progress(t, 3) for t in range(5)] == [0.0, 0.5, 1.0, 1.0, 1.0]
    assert progress(0, 1) == 0.0


def test_every_group_by_the_same_factor() -> None:
    state = one()
    state.total_steps = 5
    factors = (1.0, 0.75, 0.5, 0.25, 0.0, 0.0)
    assert drive(DecaySchedule("linear"), state, 6) == [[0.4 * f, 0.3 * f] for f in factors]
    assert drive(DecaySchedule(lambda part: 2.0 + part, steps=3), one(), 4) == [[0.4 * f, 0.3 * f] for f in (2, 2.5, 3, 3)]


def test_the_rate_over_the_one_that_the_group_began_with() -> None:
    state, schedule = one(), DecaySchedule("rate")
    groups = state.optimizer.param_groups
    assert drive(schedule, state, 1) == [[0.4, 0.3]]
    groups[0]["lr"], groups[1]["lr"] = 0.05, 0.002
    schedule.on_before_optimizer_step(state)
    state.scale_rate(0.5)  # as Warmup would, after it
    before = state.apply_rates()
    assert [g["weight_decay"] for g in groups] == [0.4 * (0.05 * 0.5 / 0.1), 0.3 * (0.002 * 0.5 / 0.02)]
    state.restore_rates(before)
    assert [g["lr"] for g in groups] == [0.05, 0.002]
    groups[0]["lr"] = 0.0  # a group at rest
    for group in groups:
        group["initial_lr"] = 0.0
    schedule.on_before_optimizer_step(state)
    assert state.apply_rates() is None


def plain(kind: str, shape: str, updates: int) -> list[torch.Tensor]:
    """The loop in plain torch: decays and rates written out, none of our code."""
    torch.manual_seed(3)
    model = net(noise=False)
    optimizer = make(kind, model)
    scheduler = OPTIM.CosineAnnealingLR(optimizer, updates)
    for t, batch in enumerate(loader(8 * updates, 8, shuffle=False)):
        rate = optimizer.param_groups[0]["lr"] * min(1.0, (t + 1) / 3)
        factor = {"linear": 1.0 * (1 - t / (updates - 1)) + 0.0 * (t / (updates - 1)), "rate": rate / 0.05,
                  "function": (t / (updates - 1)) ** 2}[shape]  # fmt: skip
        kept, optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"], rate
        optimizer.param_groups[0]["weight_decay"] = 0.3 * factor
        optimizer.zero_grad()
        loss_fn(model, batch)["loss"].backward()
        optimizer.step()
        optimizer.param_groups[0]["lr"] = kept
        scheduler.step()
    return [p.detach() for p in model.parameters()]


def make(kind: str, model: nn.Module) -> torch.optim.Optimizer:
    if kind == "sgd":
        return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.3)
    return torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.3, fused=kind == "fused")


@pytest.mark.parametrize("form", [*FORMS, "around"])
@pytest.mark.parametrize("kind", ["sgd", "adamw", "fused"])
@pytest.mark.parametrize("shape", ["linear", "rate", "function"])
def test_it_is_the_loop_in_plain_torch_to_the_bit(form: Any, kind: str, shape: str) -> None:
    model, train = net(noise=False), loader(64, 8, shuffle=False)
    optimizer, updates = make(kind, model), 8
    schedule: Any = (lambda part: part**2) if shape == "function" else shape
    parts = [DecaySchedule(schedule, steps=updates if form == "around" and shape != "rate" else None), Warmup(3)]
    if form == "around":
        scheduler = OPTIM.CosineAnnealingLR(optimizer, updates)
        loop = Loop(model, optimizer, parts)
        with loop:
            for batch in train:
                optimizer.zero_grad()
                loss_fn(model, batch)["loss"].backward()
                with loop.updating():
                    optimizer.step()
                scheduler.step()
    else:
        loop = Loop(model, optimizer, [*parts, Schedule(lambda o, n: OPTIM.CosineAnnealingLR(o, n))])
        form(loop, loss_fn, train, epochs=1)
    for p, q in zip(model.parameters(), plain(kind, shape, updates), strict=True):
        assert torch.equal(p, q)
    assert optimizer.param_groups[0]["weight_decay"] == 0.3


def callbacks(shape: Any) -> list[Any]:
    return [DecaySchedule(shape), WeightDecay({"^0": 0.3}), Warmup(5), GradientAccumulation(2),
            Schedule(lambda o, n: OPTIM.OneCycleLR(o, 0.02, n))]  # fmt: skip


def whole(order: Any, form: Any, shape: Any, folder: Any = None, kill: int | None = None, resume: Any = None) -> Any:
    seed, model, parts = Seed(0), net(), callbacks(shape)
    more = [] if folder is None else [Checkpoint(folder, every=1, keep=None), KillAt(kill)]
    loop = Loop(model, adamw(model), [*more, *(parts[i] for i in order), seed], resume=resume)
    form(loop, loss_fn, loader(50, 8), epochs=2)
    assert {g["weight_decay"] for g in loop.state.optimizer.param_groups} == {0.3, 0.0, 0.01}
    return bits(loop)


@pytest.mark.parametrize("shape", ["cosine", "rate"])
def test_its_place_in_the_list_is_free(shape: str) -> None:
    runs = [whole(order, FORMS[i % 2], shape) for i, order in enumerate([*itertools.permutations(range(5))][::7])]
    for other in runs[1:]:
        assert_same_bits(other, runs[0])


@pytest.mark.parametrize("shape", ["linear", "rate"])
def test_killed_at_any_update_and_resumed_it_has_the_same_bits(tmp_path: Any, shape: str) -> None:
    order = (0, 1, 2, 3, 4)
    reference = whole(order, built_in, shape)
    for at in range(1, 9):
        folder = tmp_path / str(at)
        with pytest.raises(Killed):
            whole(order, by_hand, shape, folder, at)
        assert_same_bits(whole(order[::-1], built_in, shape, folder, None, folder), reference)


class Watch(Callback):
    def __init__(self, skip: bool = False) -> None:
        self.skip, self.seen, self.rates = skip, list[Any](), list[Any]()

    def on_before_optimizer_step(self, state: Any) -> None:
        if self.skip and (state.step + state.skipped) % 3 != 2:
            state.skip("two of three")

    def on_step_end(self, state: Any) -> None:
        self.seen.append(state.decays)
        self.rates.append(state.rates)


def test_a_skipped_update_consumes_none() -> None:
    model, watch = net(), Watch(skip=True)
    loop = Loop(model, torch.optim.AdamW(model.parameters(), weight_decay=1.0), [DecaySchedule("linear", steps=5), watch])
    loop.fit(loss_fn, loader(96, 8), epochs=1)
    assert (loop.state.step, loop.state.skipped) == (4, 8)
    assert watch.seen == [[1.0], [0.75], [0.5], [0.25]]


def test_an_error_in_the_update_leaves_the_decay() -> None:
    model = net()
    optimizer = adamw(model)

    def broken() -> None:
        with Loop(model, optimizer, [DecaySchedule("linear", start=3.0, steps=9)]) as loop, loop.updating():
            assert optimizer.param_groups[0]["weight_decay"] == 0.03
            raise RuntimeError("the optimizer's own")

    with pytest.raises(RuntimeError, match="the optimizer's own"):
        broken()
    assert optimizer.param_groups[0]["weight_decay"] == 0.01


def test_the_horizon_is_the_runs_and_without_one_it_says_what_to_give() -> None:
    model, watch = net(), Watch()
    loop = Loop(model, torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=1.0),
                [GradientAccumulation(2), DecaySchedule("linear"), watch])  # fmt: skip
    loop.fit(loss_fn, loader(50, 8), epochs=2)  # four updates an epoch
    assert watch.seen == [[1.0 * (1 - t / 7) + 0.0 * (t / 7)] for t in range(8)]

    class Stream:
        def __iter__(self) -> Any:
            return iter(loader(50, 8))

    def anew(schedule: Any = "linear") -> Loop:
        model = net()
        return Loop(model, adamw(model), [DecaySchedule(schedule)])

    with pytest.raises(
        ValueError, match=r"DecaySchedule\('linear'\) spans the run, .* not known: give it steps= of its own, or steps= to fit"
    ):
        anew().fit(loss_fn, Stream(), epochs=1)
    assert anew().fit(loss_fn, Stream(), steps=4).step == 4
    assert anew("rate").fit(loss_fn, Stream(), epochs=1).step == 7
    with pytest.raises(ValueError, match="give it steps= of its own, or"), anew() as around, around.updating():
        pass
    with pytest.raises(
        RuntimeError, match=r"DecaySchedule\('linear'\) spans the run: run its on_fit_start first, or give steps="
    ):
        DecaySchedule("linear").on_before_optimizer_step(one())


def test_a_run_continued_keeps_its_length_and_says_so() -> None:
    model, watch = net(), Watch()
    loop = Loop(model, torch.optim.AdamW(model.parameters(), weight_decay=1.0), [DecaySchedule("linear"), watch])
    loop.fit(loss_fn, loader(24, 8), epochs=1)
    with pytest.warns(UserWarning, match="DecaySchedule goes on with a length of 3 updates, and the run has 6 now"):
        loop.fit(loss_fn, loader(24, 8), epochs=2)
    assert watch.seen == [[1.0], [0.5], [0.0], [0.0], [0.0], [0.0]]
    again = DecaySchedule("linear", steps=9)
    again.load_state_dict(DecaySchedule("linear", steps=4).state_dict())
    assert again.state_dict() == {"steps": 9}  # a number is what the program says now


def test_one_cycle_is_measured_by_its_highest_rate() -> None:
    model, watch = net(), Watch()
    loop = Loop(model, torch.optim.AdamW(model.parameters(), weight_decay=1.0),
                [DecaySchedule("rate"), Schedule(lambda o, n: OPTIM.OneCycleLR(o, 0.02, n)), watch])  # fmt: skip
    loop.fit(loss_fn, loader(80, 8), epochs=1)
    assert [row[0] for row in watch.seen] == [rate[0] / 0.02 for rate in watch.rates]
    assert max(row[0] for row in watch.seen) == pytest.approx(1.0)


def sgd(groups: Any) -> Any:
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9)


def switched(shape: str, decay: float | None, resume: Any = None, save: Any = None, kill: int | None = None) -> Any:
    model, watch = net(), Watch()
    own = [] if decay is None else [WeightDecay(default=decay)]
    more = [] if save is None else [Checkpoint(save, every=5, keep=1)]
    loop = Loop(model, torch.optim.AdamW(model.parameters(), lr=1e-3),
                [Seed(0), *own, DecaySchedule(shape), Warmup(8), SwitchOptimizer(sgd, 4), watch, KillAt(kill), *more],
                resume=resume)  # fmt: skip
    loop.fit(loss_fn, loader(80, 8), epochs=1)
    return loop, watch


def test_where_another_optimizer_takes_over_its_own_rate_is_the_measure() -> None:
    _, watch = switched("rate", 0.3)
    assert [row[0] for row in watch.seen] == pytest.approx([0.3 * min(1, (t + 1) / 8) for t in range(10)])
    assert watch.rates[-1][0] == 0.1
    model = net()
    with pytest.raises(ValueError, match=r"DecaySchedule\('rate'\) would read rates that are tensors"):
        Loop(model, adamw(model), [DecaySchedule("rate"), SwitchOptimizer(lambda g: torch.optim.SGD(g, lr=torch.tensor(0.1)), 4)]
             ).fit(loss_fn, loader(80, 8), epochs=1)  # fmt: skip


@pytest.mark.parametrize("decay", [None, 0.3])
@pytest.mark.parametrize("shape", ["linear", "rate"])
def test_resumed_behind_a_switch_whether_the_new_optimizer_decays_or_not(
    tmp_path: Any, shape: str, decay: float | None
) -> None:
    whole, watch = switched(shape, decay)
    with pytest.raises(Killed):
        switched(shape, decay, None, tmp_path, 7)
    again, other = switched(shape, decay, tmp_path, tmp_path)
    assert_same_bits(bits(whole), bits(again))
    assert other.seen == watch.seen[5:]
    again.fit(loss_fn, loader(80, 8), epochs=1)  # entered again: nothing is left to do, and nothing amiss


def test_tensorboard_shows_what_each_update_used(tmp_path: Any) -> None:
    for i, order in enumerate(itertools.permutations(range(2))):
        model, folder = net(), tmp_path / str(i)
        parts = [TensorBoard(folder, every=1), DecaySchedule("linear", start=1.0, end=3.0)]
        loop = Loop(model, torch.optim.AdamW(model.parameters(), weight_decay=0.5), [parts[k] for k in order])
        loop.fit(loss_fn, loader(24, 8), epochs=1)
        events = EventAccumulator(str(folder)).Reload()
        assert [e.value for e in events.Scalars("decay/group0")] == [0.5, 1.0, 1.5]


def test_factors_on_decay_are_a_product_in_any_order_and_of_one_group() -> None:
    factors = (0.1, 0.7, 1.3)
    found = set()
    for order in itertools.permutations(factors):
        state = one()
        for factor in order:
            state.scale_decay(factor)
        state.scale_decay(lambda rate: rate, 1)
        state.scale_rate(0.5, 1)
        before = state.apply_rates()
        found.add(tuple(g["weight_decay"] for g in state.optimizer.param_groups))
        state.restore_rates(before)
    assert found == {(0.4 * (0.1 * 0.7 * 1.3), 0.3 * math.prod(sorted([*factors, 0.02 * 0.5])))}
    assert state.apply_rates() is None
    assert state.decays == []


@pytest.mark.parametrize("bad", [-0.1, math.nan, math.inf])
def test_bad_factors_change_nothing(bad: float) -> None:
    state = one()
    with pytest.raises(ValueError, match=r"scale_decay: factor must be finite and at least 0, not"):
        state.scale_decay(bad)
    state.scale_rate(0.5)
    state.scale_decay(lambda rate: bad)
    with pytest.raises(ValueError, match="scale_decay: factor must be finite"):
        state.apply_rates()
    assert [(g["lr"], g["weight_decay"]) for g in state.optimizer.param_groups] == [(0.1, 0.4), (0.02, 0.3)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"schedule": "cubic"}, "schedule must be one of 'linear', 'cosine', 'rate', or a function of progress .* not 'cubic'"),
        ({"schedule": 0.5}, "not 0.5"),
        ({"schedule": float}, "schedule must be one of"),
        ({"schedule": lambda part: -part}, r"schedule\(0.5\) must be a finite factor, at least 0, not -0.5"),
        ({"schedule": lambda part: None}, r"schedule\(0\) must be a finite factor"),
        ({"schedule": lambda part: torch.ones(())}, r"schedule\(0\) must be a finite factor"),
        ({"schedule": "linear", "end": -1.0}, "end must be a finite factor, at least 0, not -1.0"),
        ({"schedule": "linear", "start": math.nan}, "start must be a finite factor"),
        ({"schedule": "linear", "start": "1"}, "start must be a finite factor"),
        ({"schedule": "linear", "end": True}, "end must be a finite factor"),
        ({"schedule": "rate", "end": 0.5}, "start and end are for 'linear' and 'cosine'"),
        ({"schedule": lambda part: part, "start": 0.5}, "start and end are for"),
        ({"schedule": "linear", "steps": 0}, "steps must be a whole number, at least 1, not 0"),
        ({"schedule": "linear", "steps": 0.5}, "steps must be a whole number"),
        ({"schedule": "rate", "steps": 5}, "'rate' follows the rate, so steps=5 says nothing"),
    ],
)
def test_bad_arguments(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecaySchedule(**arguments)


def test_what_it_can_not_work_with_is_named_at_the_start() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="Rprop has no weight_decay; take an optimizer that has one"):
        DecaySchedule("rate").on_setup(State(model, torch.optim.Rprop(model.parameters())))
    with pytest.raises(ValueError, match="every group's weight_decay is 0, so DecaySchedule changes nothing"):
        drive(DecaySchedule("rate"), State(model, torch.optim.SGD(model.parameters(), lr=0.1)), 1)
    state = State(model, torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.1)))
    with pytest.raises(ValueError, match=r"DecaySchedule\('rate'\) would read rates that are tensors.*give lr as a number"):
        drive(DecaySchedule("rate"), state, 1)
    assert drive(DecaySchedule("linear", steps=3), state, 2) == [[0.01], [0.005]]
    state.runner = Graphs(state, 3, 8)
    with pytest.raises(ValueError, match="CUDAGraph would record anew; leave one out"):
        drive(DecaySchedule("linear", steps=3), state, 1)
