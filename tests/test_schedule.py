"""Schedule: every scheduler of torch, stepped by what its user named and continued to the bit."""

from __future__ import annotations

import copy
import gc
import io
import itertools
import math
import weakref
from typing import Any

import pytest
import torch
from helpers import FORMS, Reported, adamw, assert_same_bits, bits, built_in, by_hand, loader, loss_fn, net
from torch import nn
from torch.optim import lr_scheduler as lrs

from hookloop.callbacks import Checkpoint, GradientAccumulation, LayerwiseRate, Seed, Warmup
from hookloop.callbacks.schedule import Schedule
from hookloop.callbacks.weight_decay import WeightDecay
from hookloop.loop import Callback, Goal, Loop, State
from hookloop.loop.store.disk import not_plain

N = 14


class Halving:
    """A function with state, which LambdaLR saves."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, epoch: int) -> float:
        self.asked += 1
        return 0.5**epoch


BUILDERS: dict[str, Any] = {
    "LambdaLR": lambda o, n: lrs.LambdaLR(o, lambda t: 1 / (1 + t)),
    "LambdaLR of an object": lambda o, n: lrs.LambdaLR(o, Halving()),
    "LambdaLR a group": lambda o, n: lrs.LambdaLR(o, [lambda t, i=i: 1 / (i + 1 + t) for i in range(len(o.param_groups))]),
    "LambdaLR that reads the rates": lambda o, n: lrs.LambdaLR(
        o, lambda t, first=float(o.param_groups[0]["lr"]): 1 / (1 + first * t)
    ),
    "MultiplicativeLR": lambda o, n: lrs.MultiplicativeLR(o, lambda t: 0.9 if t % 3 else 0.5),
    "StepLR": lambda o, n: lrs.StepLR(o, 3, 0.3),
    "MultiStepLR": lambda o, n: lrs.MultiStepLR(o, [2, 5, 5, 9], 0.3),
    "ConstantLR": lambda o, n: lrs.ConstantLR(o, 0.3, 5),
    "LinearLR": lambda o, n: lrs.LinearLR(o, 0.3, 0.9, 7),
    "ExponentialLR": lambda o, n: lrs.ExponentialLR(o, 0.83),
    "PolynomialLR": lambda o, n: lrs.PolynomialLR(o, 9, 1.7),
    "CosineAnnealingLR": lambda o, n: lrs.CosineAnnealingLR(o, 5, 1e-4),
    "CosineAnnealingLR over the run": lambda o, n: lrs.CosineAnnealingLR(o, n),
    "CosineAnnealingWarmRestarts": lambda o, n: lrs.CosineAnnealingWarmRestarts(o, 3, 2),
    "OneCycleLR": lambda o, n: lrs.OneCycleLR(o, [float(g["lr"]) for g in o.param_groups], total_steps=n),
    "OneCycleLR in three phases": lambda o, n: lrs.OneCycleLR(o, 0.3, total_steps=n, three_phase=True),
    "CyclicLR": lambda o, n: lrs.CyclicLR(o, 0.01, 0.2, 3, 2, mode="triangular2"),
    "CyclicLR of a function": lambda o, n: lrs.CyclicLR(o, 0.01, 0.2, 3, scale_fn=lambda x: 0.9**x, scale_mode="iterations"),
    "CyclicLR exp_range": lambda o, n: lrs.CyclicLR(o, 0.01, 0.2, 3, mode="exp_range", gamma=0.9),
    "SequentialLR": lambda o, n: lrs.SequentialLR(
        o, [lrs.LinearLR(o, 0.1, 1, 4), lrs.MultiStepLR(o, [2, 4]), lrs.ExponentialLR(o, 0.7)], [4, 9]
    ),
    "ChainedScheduler": lambda o, n: lrs.ChainedScheduler([lrs.ConstantLR(o, 0.2, 4), lrs.ExponentialLR(o, 0.9)]),
    "ReduceLROnPlateau": lambda o, n: lrs.ReduceLROnPlateau(o, "min", 0.5, patience=1, cooldown=1, min_lr=[1e-3, 1e-4]),
}  # fmt: skip
METRICS = [3.0, 2.0, 2.5, 2.4, 2.6, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]


def two_groups(tensor: bool = False, kind: Any = torch.optim.SGD) -> State:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    rates = [torch.tensor(0.1), torch.tensor(0.02)] if tensor else [0.1, 0.02]
    groups = [{"params": [p], "lr": lr} for p, lr in zip(model.parameters(), rates, strict=True)]
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    return State(model, kind(groups, lr=1.0, **options), total_steps=N)


def update(schedule: Schedule, state: State) -> tuple[Any, ...]:
    """One update, then the hooks; what the groups hold after."""
    for p in state.model.parameters():
        p.grad = torch.ones_like(p)
    state.optimizer.step()
    state.step += 1
    state.metrics["val_loss"] = METRICS[state.step]
    schedule.on_step_end(state)
    schedule.on_validation_end(state)
    return tuple(
        (float(g["lr"]), g.get("momentum"), g.get("betas"), g.get("max_lr"), type(g["lr"]))
        for g in state.optimizer.param_groups
    )


def through_disk(x: Any) -> Any:
    assert not_plain(x) is None, not_plain(x)
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def started(name: str, instance: bool, *options: Any, saved: Any = None) -> tuple[Schedule, State]:
    """A Schedule where a Loop has it after entering, restored as a Loop restores, with its start behind it."""
    state, on = two_groups(*options), "val_loss" if name == "ReduceLROnPlateau" else "step"
    build = BUILDERS[name]
    schedule = Schedule(build(state.optimizer, N) if instance else build, on=on)
    schedule.on_setup(state)
    if saved is not None:
        state.optimizer.load_state_dict(saved["optimizer"])
        state.step = saved["step"]
        state.model.load_state_dict(saved["model"])
        schedule.load_state_dict(saved["schedule"])
    schedule.on_fit_start(state)
    return schedule, state


def save(schedule: Schedule, state: State) -> Any:
    return through_disk(
        {"optimizer": state.optimizer.state_dict(), "schedule": schedule.state_dict(), "step": state.step,
         "model": state.model.state_dict()}
    )  # fmt: skip


def test_every_scheduler_of_torch_is_here() -> None:
    classes = {n for n in lrs.__all__ if n not in ("LRScheduler",)}
    assert classes == {name.split()[0] for name in BUILDERS}


@pytest.mark.parametrize("options", [(), (True, torch.optim.Adam)])
@pytest.mark.parametrize("instance", [False, True])
@pytest.mark.parametrize("name", BUILDERS)
def test_restored_at_any_step_is_never_interrupted(name: str, instance: bool, options: Any) -> None:
    schedule, state = started(name, instance, *options)
    whole, saves = [], [save(schedule, state)]
    for _ in range(N):
        whole.append(update(schedule, state))
        saves.append(save(schedule, state))
    bare = two_groups(*options)
    scheduler = BUILDERS[name](bare.optimizer, N)
    plain = Schedule(scheduler, on=schedule.on)
    assert [update(plain, bare) for _ in range(N)] == whole
    for at in (0, 1, 6):
        saved = saves[at]
        schedule, state = started(name, instance, *options, saved=saved)
        assert [update(schedule, state) for _ in range(N - at)] == whole[at:], f"restored at {at}"
    saved = saves[0]
    for step in range(N):  # and when it is killed after each
        schedule, state = started(name, instance, *options, saved=saved)
        assert update(schedule, state) == whole[step]
        saved = save(schedule, state)


@pytest.mark.parametrize("name", BUILDERS)
def test_a_rate_that_is_a_tensor_is_filled_never_replaced(name: str) -> None:
    schedule, state = started(name, False, True)
    for _ in range(3):
        update(schedule, state)
    saved = save(schedule, state)
    state, build = two_groups(True), BUILDERS[name]
    schedule = Schedule(build, on="val_loss" if name == "ReduceLROnPlateau" else "step")
    schedule.on_setup(state)
    state.optimizer.load_state_dict(saved["optimizer"])
    schedule.load_state_dict(saved["schedule"])
    held = [g["lr"] for g in state.optimizer.param_groups]
    schedule.on_fit_start(state)
    state.step = 3
    update(schedule, state)
    assert all(g["lr"] is t for g, t in zip(state.optimizer.param_groups, held, strict=True))


class Rates(Callback):
    """Keeps what each update used."""

    def __init__(self) -> None:
        self.seen: list[list[float]] = []

    def on_step_end(self, state: Any) -> None:
        self.seen.append([float(r) for r in state.rates])


@pytest.mark.parametrize("instance", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", [n for n in BUILDERS if n not in ("ReduceLROnPlateau", "LambdaLR a group")])
def test_in_a_loop_each_update_uses_the_rate_of_torchs_own_loop(name: str, form: Any, instance: bool) -> None:
    model, rates = net(), Rates()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    build = BUILDERS[name]
    schedule = Schedule(build(optimizer, N) if instance else build)
    state = form(Loop(model, optimizer, [rates, schedule]), loss_fn, loader(50, 8), epochs=2)
    assert state.total_steps == N == len(rates.seen)
    weight = nn.Parameter(torch.zeros(2))
    other = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    scheduler, used = build(other, N), []
    for _ in range(N):
        used.append([other.param_groups[0]["lr"]])
        other.step()
        scheduler.step()
    assert rates.seen == used


@pytest.mark.parametrize("form", FORMS)
def test_by_epoch(form: Any) -> None:
    model, rates = net(), Rates()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = Schedule(lambda o, n: lrs.ExponentialLR(o, 0.5), on="epoch")
    form(Loop(model, optimizer, [rates, schedule]), loss_fn, loader(20, 8), epochs=3)
    assert rates.seen == [[1.0]] * 3 + [[0.5]] * 3 + [[0.25]] * 3


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("on", ["val_loss", Goal("val_loss"), Goal("val_accuracy", mode="max")])
def test_on_a_metric(form: Any, on: Any) -> None:
    model, values, rates = net(), Reported(Goal.of(on).metric), Rates()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    mode = Goal.of(on).mode
    schedule = Schedule(lambda o, n: lrs.ReduceLROnPlateau(o, mode, 0.5, patience=0, threshold=0.2), on=on)
    form(
        Loop(model, optimizer, [rates, schedule, values]),
        loss_fn,
        loader(20, 8),
        loader(16, 8, shuffle=False),
        epochs=6,
    )
    other = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    plateau, used = lrs.ReduceLROnPlateau(other, mode, 0.5, patience=0, threshold=0.2), []
    for value in values.seen:
        used += [[other.param_groups[0]["lr"]]] * 3
        plateau.step(value)
    assert rates.seen == used
    assert used[-1] < used[0]


def test_a_metric_that_was_not_reported_lists_those_there_are() -> None:
    model = net()
    schedule = Schedule(lambda o, n: lrs.ReduceLROnPlateau(o), on="val_los")
    loop = Loop(model, adamw(model), [schedule])
    with pytest.raises(KeyError, match=r"Schedule watches 'val_los'.*val_loss"):
        loop.fit(loss_fn, loader(20, 8), loader(16, 8), epochs=1)


@pytest.mark.parametrize("around", [False, True])
def test_skipped_updates_step_no_schedule(around: bool) -> None:
    class Skip(Callback):
        def on_before_optimizer_step(self, state: Any) -> None:
            if (state.step + state.skipped) % 2 == 0:
                state.skip("every second")

    model, schedule = net(noise=False), Schedule(lambda o, n: lrs.ExponentialLR(o, 0.5))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    loop = Loop(model, optimizer, [Skip(), schedule])
    if around:
        with loop:
            for batch in loader(48, 8):
                loss_fn(model, batch)["loss"].backward()
                with loop.updating():
                    optimizer.step()
                optimizer.zero_grad()
    else:
        loop.fit(loss_fn, loader(48, 8), epochs=1)
    assert (loop.state.step, loop.state.skipped) == (3, 3)
    assert optimizer.param_groups[0]["lr"] == 0.125


def test_around_a_loop_an_epochs_schedule_is_refused_and_the_others_are_not() -> None:
    def run(schedule: Any) -> Loop:
        model = net()
        optimizer = adamw(model, 1.0)
        with Loop(model, optimizer, [schedule]) as loop, loop.updating():
            optimizer.step()
        return loop

    with pytest.raises(ValueError, match="Schedule needs on_epoch_end"):
        run(Schedule(lambda o, n: lrs.ExponentialLR(o, 0.5), on="epoch"))
    assert run(Schedule(lambda o, n: lrs.ExponentialLR(o, 0.5))).state.optimizer.param_groups[0]["lr"] == 0.5
    run(Schedule(lambda o, n: lrs.ReduceLROnPlateau(o), on="val_loss"))


def test_only_the_hook_that_is_asked_for_runs() -> None:
    model = net()
    for on, hook in (("step", "on_step_end"), ("epoch", "on_epoch_end"), ("val_loss", "on_validation_end")):
        loop = Loop(model, adamw(model), [Schedule(lambda o, n: lrs.ReduceLROnPlateau(o), on=on)])
        hooks = {"on_step_end", "on_epoch_end", "on_validation_end"}
        assert [h for h in hooks if loop.hooks[h]] == [hook]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("tensor", [False, True])
def test_op9_warmup_schedule_and_another_factor_compose_in_any_order(order: Any, tensor: bool) -> None:
    class Scale(Callback):
        def on_before_optimizer_step(self, state: Any) -> None:
            state.scale_rate(1 / 3)
            state.scale_rate(0.7, 0)

    def run(order: Any) -> tuple[Any, Any, Any]:
        seed, rates = Seed(0), Rates()
        model = net()
        lr = torch.tensor(0.1) if tensor else 0.1
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
        callbacks = [Warmup(9), Schedule(lambda o, n: lrs.CosineAnnealingLR(o, n)), Scale()]
        loop = Loop(model, optimizer, [seed, rates, *(callbacks[i] for i in order)])
        loop.fit(loss_fn, loader(50, 8), epochs=2)
        return bits(loop), rates.seen, float(optimizer.param_groups[0]["lr"])

    found, seen, last = run(order)
    expected, as_listed, bare = run(range(3))
    assert_same_bits(found, expected)
    assert seen == as_listed
    assert last == bare
    for t, (rate,) in enumerate(seen):
        cosine = 0.1 * (1 + math.cos(math.pi * t / N)) / 2
        assert rate == pytest.approx(cosine * min(1, (t + 1) / 9) * 0.7 / 3, rel=1e-5)


def test_op9_two_schedules_would_write_the_same_rates_and_are_refused() -> None:
    model = net()
    two = [Schedule(lambda o, n: lrs.ExponentialLR(o, 0.5)), Schedule(lambda o, n: lrs.StepLR(o, 2)).named("second")]
    with pytest.raises(ValueError, match="Schedule and Schedule both own"):
        Loop(model, adamw(model), two)


def test_accumulation_makes_fewer_steps_and_the_function_is_told() -> None:
    told: list[Any] = []

    def build(optimizer: Any, total: Any) -> Any:
        told.append(total)
        return lrs.OneCycleLR(optimizer, 0.1, total_steps=total)

    model = net()
    loop = Loop(model, adamw(model), [GradientAccumulation(3), schedule := Schedule(build)])
    state = loop.fit(loss_fn, loader(50, 8), epochs=2)
    assert told == [6] == [state.step]
    assert schedule.scheduler.last_epoch == 6


@pytest.mark.parametrize("before", [[], [LayerwiseRate(0.5)]])
def test_an_error_of_the_function_itself_is_told_after_one_call(before: list[Callback]) -> None:
    calls: list[Any] = []

    def build(optimizer: Any, total: Any) -> Any:
        calls.append(total)
        return lrs.StepLR(optimizer, {"short": 5}["long"])

    model = net()
    with pytest.raises(KeyError, match="long"):
        Loop(model, adamw(model), [*before, Schedule(build)]).fit(loss_fn, loader(50, 8), epochs=2)
    assert calls == [N]


@pytest.mark.parametrize("by", [copy.copy, copy.deepcopy])
@pytest.mark.parametrize("make", [lambda: Schedule("cosine"), lambda: Schedule(lambda o, n: lrs.StepLR(o, 2), "epoch"),
                                  lambda: Schedule("plateau", "val_loss", patience=0, threshold=9.0)])  # fmt: skip
def test_a_copy_of_one_that_ran_begins_anew_and_holds_no_optimizer(make: Any, by: Any) -> None:
    def run(schedule: Schedule) -> tuple[list[Any], Loop]:
        model, rates = net(), Rates()
        loop = Loop(model, adamw(model), [Seed(0), schedule, rates])
        loop.fit(loss_fn, loader(), loader(), epochs=3)
        return rates.seen, loop

    first, loop = run(used := make())
    copied = by(used)
    assert copied.scheduler is None
    assert not any(isinstance(x, torch.Tensor) for x in vars(copied)["_first"])
    assert used.scheduler.optimizer is loop.state.optimizer
    assert run(copied)[0] == first


def test_entered_twice_the_scheduler_goes_on() -> None:
    def run(*ends: int) -> Any:
        seed, rates = Seed(0), Rates()
        model = net()
        loop = Loop(model, adamw(model), [seed, rates, Schedule(lambda o, n: lrs.ExponentialLR(o, 0.9))])
        train = loader(50, 8)
        for end in ends:
            loop.fit(loss_fn, train, epochs=end)
        return rates.seen, bits(loop)

    (whole, weights), (parts, again) = run(3), run(1, 2, 3)
    assert whole == parts
    assert_same_bits(weights, again)


class StopAt(Callback):
    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_step_end(self, state: Any) -> None:
        if state.step == self.step:
            state.save("here")
            state.stop("here")


@pytest.mark.parametrize("form", [by_hand, built_in])
@pytest.mark.parametrize("on", ["step", "epoch", "val_loss"])
@pytest.mark.parametrize("instance", [False, True])
@pytest.mark.parametrize("at", [1, 7, 9])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Any, form: Any, on: str, instance: bool, at: int) -> None:
    """Step 7 is an epoch's last: the resumed run's first act is to step the schedule, with no update before it."""

    def run(stop: int | None, folder: Any, resume: Any = None) -> Any:
        seed = Seed(0)
        model = net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)

        def build(o: Any, n: Any) -> Any:
            if on == "val_loss":
                return lrs.ReduceLROnPlateau(o, factor=0.5, patience=0)
            return lrs.OneCycleLR(o, o.param_groups[0]["lr"], total_steps=21) if on == "step" else lrs.StepLR(o, 1, 0.3)

        schedule = Schedule(build(optimizer, 21) if instance else build, on=on)
        decay = [] if instance and on != "val_loss" else [WeightDecay({"0": 0.2})]
        callbacks = [seed, schedule, *decay, Warmup(5), StopAt(stop), Checkpoint(folder)]
        loop = Loop(model, optimizer, callbacks, resume=resume)
        form(loop, loss_fn, loader(50, 8), loader(16, 8, shuffle=False), epochs=3)
        return bits(loop), [g["lr"] for g in optimizer.param_groups]

    whole, rates = run(None, tmp_path / "whole")
    run(at, tmp_path / "cut")
    found, again = run(None, tmp_path / "cut", tmp_path / "cut")
    assert_same_bits(found, whole)
    assert rates == again


@pytest.mark.parametrize("instance", [False, True])
@pytest.mark.parametrize("on", ["epoch", "val_loss"])
def test_a_run_resumed_at_an_epochs_end_steps_first_and_torch_warns_of_nothing(tmp_path: Any, on: str, instance: bool) -> None:
    """Its updates were before the restore, which torch can't know."""

    def run(callbacks: Any, resume: Any = None) -> list[float]:
        model = net()
        optimizer = adamw(model, 0.1)

        def build(o: Any, n: Any = None) -> Any:
            return lrs.StepLR(o, 1, 0.3) if on == "epoch" else lrs.ReduceLROnPlateau(o, factor=0.3, patience=0)

        schedule = Schedule(build(optimizer) if instance else build, on=on)
        loop = Loop(model, optimizer, [Seed(0), schedule, *callbacks], resume=resume)
        loop.fit(loss_fn, loader(50, 8), loader(16, 8, shuffle=False), epochs=1)
        assert loop.state.step == 7
        return [g["lr"] for g in optimizer.param_groups] + [schedule.scheduler.last_epoch]

    whole = run([Checkpoint(tmp_path, every=7)])
    before_the_end = tmp_path / "step-00000007"
    assert run([Checkpoint(tmp_path / "other")], resume=before_the_end) == whole


def test_a_longer_run_takes_the_saved_scheduler_and_another_kind_is_refused() -> None:
    schedule, state = started("StepLR", False)
    update(schedule, state)
    saved = save(schedule, state)
    with pytest.raises(ValueError, match="holds a StepLR, scheduler is a ExponentialLR"):
        started("ExponentialLR", False, saved=saved)
    with pytest.raises(ValueError, match="holds a StepLR, scheduler is a ExponentialLR"):
        started("ExponentialLR", True, saved=saved)


def test_state_before_the_scheduler_is_built_is_kept() -> None:
    schedule, state = started("StepLR", False)
    update(schedule, state)
    saved = schedule.state_dict()
    waiting = Schedule(BUILDERS["StepLR"])
    fresh = waiting.state_dict()
    waiting.load_state_dict(saved)
    assert waiting.state_dict() == saved
    waiting.load_state_dict(fresh)
    assert waiting.state_dict() == fresh
    waiting.on_fit_start(state := two_groups())
    assert waiting.scheduler.last_epoch == 0
    assert [g["lr"] for g in state.optimizer.param_groups] == [0.1, 0.02]


def test_saved_state_is_a_copy() -> None:
    schedule, state = started("SequentialLR", False, True)
    saved = schedule.state_dict()
    before = through_disk(saved)
    for _ in range(6):
        update(schedule, state)
    assert str(saved) == str(before)
    assert str(schedule.state_dict()) != str(before)
    schedule.load_state_dict(saved)
    update(schedule, state)
    assert str(saved) == str(before)


def test_length_not_known_names_steps() -> None:
    def endless() -> Any:
        while True:
            yield next(iter(loader(8, 8)))

    class Stream:
        def __iter__(self) -> Any:
            return endless()

    class Stop(Callback):
        def on_step_end(self, state: Any) -> None:
            if state.step == 3:
                state.stop("enough")

    def run(build: Any, **end: Any) -> Any:
        model = net()
        loop = Loop(model, adamw(model), [Schedule(build), Stop()])
        return loop.fit(loss_fn, Stream(), **end)

    by_length = {
        "OneCycleLR": lambda o, n: lrs.OneCycleLR(o, 0.1, total_steps=n),  # refuses None when built
        "CosineAnnealingLR": lambda o, n: lrs.CosineAnnealingLR(o, n),  # meets None at its first step
        "LinearLR": lambda o, n: lrs.LinearLR(o, 1.0, 0.0, n),
        "a share": lambda o, n: lrs.StepLR(o, n // 3),
    }
    for build in by_length.values():
        with pytest.raises(ValueError, match=r"total_steps=None.*steps= to fit or epochs"):
            run(build, epochs=1)
        assert run(build, steps=3).step == 3
    assert run(lambda o, n: lrs.StepLR(o, 2), epochs=1).step == 3


def test_a_scheduler_stepped_beyond_its_own_end_says_so_itself() -> None:
    model = net()
    loop = Loop(model, adamw(model), [Schedule(lambda o, n: lrs.OneCycleLR(o, 0.1, total_steps=3))])
    with pytest.raises(ValueError, match=r"^Tried to step 4 times. The specified number of total steps is 3\n"):
        loop.fit(loss_fn, loader(50, 8), epochs=1)


@pytest.mark.parametrize(
    ("scheduler", "on", "message"),
    [
        (
            lrs.StepLR,
            "step",
            r"scheduler must be a torch scheduler, or a function such as lambda optimizer, total_steps",
        ),
        (3, "step", "scheduler must be a torch scheduler.*not 3"),
        (None, "step", "scheduler must be a torch scheduler.*not None"),
        (lambda o, n: lrs.StepLR(o, 1), 3, "on must be 'step', 'epoch', a metric's name.*not 3"),
        (lambda o, n: lrs.StepLR(o, 1), None, "on must be"),
        (lambda o, n: lrs.StepLR(o, 1), "", "metric must be the name of a metric"),
        (
            lambda o, n: lrs.ReduceLROnPlateau(o),
            Goal("val_loss", patience=9),
            "metric and mode alone .the patience is Red",
        ),
        (lambda o, n: lrs.ReduceLROnPlateau(o), Goal("val_loss", min_delta=0.1), "metric and mode alone"),
    ],
)
def test_bad_arguments(scheduler: Any, on: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        Schedule(scheduler, on=on)


@pytest.mark.parametrize("instance", [False, True])
@pytest.mark.parametrize(
    ("kind", "on"),
    [
        (lambda o, n: lrs.ReduceLROnPlateau(o), "step"),
        (lambda o, n: lrs.ReduceLROnPlateau(o), "epoch"),
        (lambda o, n: lrs.StepLR(o, 1), "val_loss"),
        (lambda o, n: lrs.StepLR(o, 1), Goal("val_loss")),
        (lambda o, n: lrs.ReduceLROnPlateau(o, "max"), "val_loss"),
        (lambda o, n: lrs.ReduceLROnPlateau(o, "min"), Goal("val_accuracy", mode="max")),
    ],
)
def test_what_does_not_fit_is_refused(instance: bool, kind: Any, on: Any) -> None:
    def begin() -> None:
        state = two_groups()
        Schedule(kind(state.optimizer, N) if instance else kind, on=on).on_fit_start(state)

    with pytest.raises(ValueError, match=r"on=.* doesn't fit (ReduceLROnPlateau|StepLR).*of the same mode"):
        begin()


def test_another_optimizers_scheduler_is_refused() -> None:
    mine, other = two_groups(), two_groups()
    with pytest.raises(ValueError, match="gives a StepLR of another optimizer; build it on the Loop's own"):
        Schedule(lrs.StepLR(other.optimizer, 1)).on_setup(mine)
    with pytest.raises(ValueError, match="gives a StepLR of another optimizer"):
        Schedule(lambda o, n: lrs.StepLR(other.optimizer, 1)).on_fit_start(mine)
    with pytest.raises(ValueError, match="gives a NoneType of another optimizer"):
        Schedule(lambda o, n: None).on_fit_start(mine)  # type: ignore[arg-type, return-value]


def test_beside_weight_decay_the_function_sees_the_split_groups_and_an_instance_is_refused() -> None:
    model = net()
    for order in (1, -1):
        optimizer = adamw(model)
        schedule = Schedule(lambda o, n: lrs.LambdaLR(o, [lambda t: 1.0, lambda t: 0.5**t]))
        loop = Loop(model, optimizer, [WeightDecay(), schedule][::order])
        loop.fit(loss_fn, loader(50, 8), steps=2)
        assert [g["lr"] for g in optimizer.param_groups] == [1e-2, 1e-2 * 0.25]
    optimizer = adamw(model)
    schedule = Schedule(lrs.StepLR(optimizer, 1))
    with pytest.raises(ValueError, match=r"a scheduler was built.*Schedule\(lambda optimizer, total_steps"):
        Loop(model, optimizer, [schedule, WeightDecay()]).fit(loss_fn, loader(50, 8), steps=2)


def test_a_schedule_keeps_no_loop_alive() -> None:
    model = net()
    loop = Loop(model, adamw(model), [Schedule(lambda o, n: lrs.StepLR(o, 1))])
    gone = weakref.ref(loop)
    loop.fit(loss_fn, loader(20, 8), epochs=1)
    del loop
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("kind", [
    lambda o, n: lrs.CosineAnnealingLR(o, 50),
    lambda o, n: lrs.SequentialLR(o, [lrs.ConstantLR(o), lrs.ExponentialLR(o, 0.9)], [50]),
])  # fmt: skip
def test_a_group_added_behind_the_scheduler_is_named(kind: Any) -> None:
    class Adds(Callback):
        def on_epoch_start(self, state: State) -> None:
            if state.epoch == 1:
                state.optimizer.add_param_group({"params": [state.model[-1].bias.requires_grad_(True)]})

    model = net()
    model[-1].bias.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p is not model[-1].bias], lr=0.1)
    loop = Loop(model, optimizer, [Adds(), Schedule(kind)])
    with pytest.raises(ValueError, match=r"LR was built on 1 parameter groups and the optimizer has 2 now.*in on_setup"):
        loop.fit(loss_fn, loader(16, 8), epochs=3)
    assert loop.state.step == 3


@pytest.mark.parametrize("form", ["by hand", "around"])
@pytest.mark.parametrize("kept", ["not", "by itself", "by Schedule"])
def test_a_scheduler_that_the_program_steps_is_warned_of_when_resumed(form: str, kept: str, tmp_path: Any, caplog: Any) -> None:
    data, its_own = list(loader(64, 8, shuffle=False)), dict[str, Any]()

    def run(until: int, folder: Any = None) -> list[float]:
        model, rates = net(), list[float]()
        optimizer = adamw(model, 0.125)
        scheduler = lrs.CosineAnnealingLR(optimizer, 8)
        callbacks = [Schedule(scheduler)] if kept == "by Schedule" else []
        more = [Checkpoint(folder, every=1)] if folder is not None else []
        loop = Loop(model, optimizer, [*callbacks, *more], resume=folder)
        with loop:
            if loop.state.step and kept == "by itself":
                scheduler.load_state_dict(its_own)
                optimizer.param_groups[0]["lr"] = scheduler.get_last_lr()[0]
            if form == "around":
                for batch in data[loop.state.step : until]:
                    loss_fn(model, batch)["loss"].backward()
                    rates.append(optimizer.param_groups[0]["lr"])
                    with loop.updating():
                        optimizer.step()
                    _ = callbacks or scheduler.step()
            for _ in loop.epochs(steps=until) if form == "by hand" else ():
                for step in loop.steps(data):
                    for micro in step:
                        with micro:
                            micro.backward(loss_fn)
                    rates.append(optimizer.param_groups[0]["lr"])
                    loop.update()
                    _ = callbacks or scheduler.step()
        its_own.update(scheduler.state_dict())
        return rates

    whole = run(8)
    assert run(4, tmp_path) == whole[:4]
    assert "of your own" not in caplog.text
    assert (run(8, tmp_path) == whole[4:]) == (kept != "not")
    said = [line for line in caplog.messages if "resumed after 4 updates beside a scheduler of your own" in line]
    assert len(said) == (kept != "by Schedule")
