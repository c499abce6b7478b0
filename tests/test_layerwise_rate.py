"""LayerwiseRate: each layer's rate, in groups that schedulers and other callbacks respect."""

from __future__ import annotations

import contextlib
import itertools
import math
from typing import Any

import pytest
import torch
from helpers import FORMS, KillAt, Killed, adamw, assert_same_bits, bits, built_in, by_hand, loader, loss_fn, net, same
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from hookloop.callbacks import Checkpoint, LayerwiseRate, Schedule, Seed, TensorBoard, Warmup, WeightDecay
from hookloop.callbacks.layerwise_rate import rate_factors
from hookloop.loop import Callback, Loop, State

OPTIM = torch.optim.lr_scheduler


def rates(state: State) -> dict[str, float]:
    of = {p: float(g["lr"]) for g in state.optimizer.param_groups for p in g["params"]}
    assert len(of) == sum(len(g["params"]) for g in state.optimizer.param_groups)
    return {name: of[p] for name, p in state.model.named_parameters()}


def deep() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


def set_up(model: nn.Module, *args: Any, optimizer: Any = None, **kwargs: Any) -> State:
    state = State(model, optimizer or torch.optim.AdamW(model.parameters(), lr=0.1))
    LayerwiseRate(*args, **kwargs).on_setup(state)
    return state


def test_the_core_alone() -> None:
    a, b, c = (torch.nn.Parameter(torch.zeros(1)) for _ in range(3))
    assert rate_factors([[a, b], [c]], 0.5) == {a: 0.5, b: 0.5, c: 1.0}


def test_rates_fall_from_the_head_down() -> None:
    state = set_up(deep(), 0.5)
    assert rates(state) == {"0.weight": 0.1 * 0.25, "0.bias": 0.1 * 0.25, "1.weight": 0.1 * 0.25, "1.bias": 0.1 * 0.25,
                            "3.weight": 0.05, "3.bias": 0.05, "5.weight": 0.1, "5.bias": 0.1}  # fmt: skip
    assert [(g["lr"], g["initial_lr"]) for g in state.optimizer.param_groups] == [(0.025, 0.025), (0.05, 0.05), (0.1, 0.1)]


def test_rules_are_the_factor_itself() -> None:
    found = rates(set_up(deep(), 0.5, rules={r"^1\.": 1.0, "bias": 0.3}))
    assert (found["1.bias"], found["3.bias"], found["3.weight"]) == (0.1, 0.1 * 0.3, 0.05)
    only = rates(set_up(deep(), rules={nn.LayerNorm: 2.0, r"^5": 10}))
    assert only == {n: 0.1 * (10 if n[0] == "5" else 2.0 if n[0] == "1" else 1.0) for n in only}


class Reversed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head, self.first = nn.Linear(8, 3), nn.Linear(6, 8)

    def forward(self, x: Any) -> Any:
        return self.head(self.first(x))


def test_an_example_says_in_which_order_layers_run() -> None:
    batch = next(iter(loader(8, 4)))  # inputs, targets, positions: its first part is what the forward takes
    assert rates(set_up(Reversed(), 0.5, example=batch))["first.weight"] == 0.05
    assert rates(set_up(Reversed(), 0.5))["first.weight"] == 0.1


@pytest.mark.parametrize("form", FORMS)
def test_it_is_the_optimizer_built_with_these_groups(form: Any) -> None:
    def run(by_callback: bool) -> Any:
        seed, model = Seed(0), deep()
        groups = [{"params": [*model[0].parameters(), *model[1].parameters()], "lr": 0.01 * 0.25},
                  {"params": model[3].parameters(), "lr": 0.01 * 0.5}, {"params": model[5].parameters()}]  # fmt: skip
        optimizer = torch.optim.AdamW(model.parameters() if by_callback else groups, lr=0.01)
        schedule = Schedule(lambda optimizer, total: OPTIM.CosineAnnealingLR(optimizer, total))
        loop = Loop(model, optimizer, [seed, schedule, Warmup(3), *([LayerwiseRate(0.5)] if by_callback else [])])
        form(loop, loss_fn, loader(50, 8), epochs=2)
        return bits(loop)

    assert_same_bits(run(True), run(False))


def test_against_a_loop_in_plain_torch() -> None:
    model, data = deep(), list(loader(40, 8, shuffle=False))
    groups = [{"params": [*model[0].parameters(), *model[1].parameters()], "lr": 0.1 * 0.25},
              {"params": model[3].parameters(), "lr": 0.1 * 0.5}, {"params": model[5].parameters(), "lr": 0.1}]  # fmt: skip
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    scheduler = OPTIM.StepLR(optimizer, 2, 0.3)
    for batch in data:
        optimizer.zero_grad()
        loss_fn(model, batch)["loss"].backward()
        optimizer.step()
        scheduler.step()
    mine = deep()
    schedule = Schedule(lambda optimizer, total: OPTIM.StepLR(optimizer, 2, 0.3))
    loop = Loop(mine, torch.optim.SGD(mine.parameters(), lr=0.1, momentum=0.9), [schedule, LayerwiseRate(0.5)])
    loop.fit(loss_fn, data, epochs=1)
    for p, q in zip(model.parameters(), mine.parameters(), strict=True):
        assert torch.equal(p, q)


BUILDS: dict[str, Any] = {
    "step": lambda o, n: OPTIM.StepLR(o, 2, 0.5),
    "multi": lambda o, n: OPTIM.MultiStepLR(o, [2, 4], 0.5),
    "constant": lambda o, n: OPTIM.ConstantLR(o, 0.5, 3),
    "linear": lambda o, n: OPTIM.LinearLR(o, 0.1, 1.0, n),
    "exponential": lambda o, n: OPTIM.ExponentialLR(o, 0.8),
    "cosine": lambda o, n: OPTIM.CosineAnnealingLR(o, n),
    "restarts": lambda o, n: OPTIM.CosineAnnealingWarmRestarts(o, 3),
    "polynomial": lambda o, n: OPTIM.PolynomialLR(o, n, 2.0),
    "lambda": lambda o, n: OPTIM.LambdaLR(o, lambda t: 0.9**t),
    "multiplicative": lambda o, n: OPTIM.MultiplicativeLR(o, lambda t: 0.9),
    "sequential": lambda o, n: OPTIM.SequentialLR(o, [OPTIM.LinearLR(o, 0.1, 1.0, 3), OPTIM.ExponentialLR(o, 0.9)], [3]),
    "chained": lambda o, n: OPTIM.ChainedScheduler([OPTIM.ConstantLR(o, 0.5, 3), OPTIM.ExponentialLR(o, 0.9)]),
    "cycle": lambda o, n: OPTIM.OneCycleLR(o, [g["lr"] for g in o.param_groups], n),
    "cyclic": lambda o, n: OPTIM.CyclicLR(o, [g["lr"] / 9 for g in o.param_groups], [g["lr"] for g in o.param_groups], 3,
                                          cycle_momentum=False),
}  # fmt: skip


@pytest.mark.parametrize("name", BUILDS)
@pytest.mark.parametrize("first", [True, False])
def test_every_scheduler_of_torch_keeps_the_ratios(name: str, first: bool) -> None:
    model, seen = deep(), []

    class Watch(Warmup):
        def on_step_end(self, state: Any) -> None:
            seen.append(state.rates)

    callbacks = [LayerwiseRate(0.5), Schedule(BUILDS[name])]
    loop = Loop(model, adamw(model, 0.125), [*(callbacks if first else callbacks[::-1]), Watch(0)])
    loop.fit(loss_fn, loader(50, 8), epochs=1)
    assert len(seen) == 7
    assert len({row[-1] for row in seen}) > 1
    for row in seen:
        assert row == [pytest.approx(row[-1] * f, rel=1e-12) for f in (0.25, 0.5, 1.0)]


@pytest.mark.parametrize("name", BUILDS)
@pytest.mark.parametrize("first", [True, False])
def test_every_scheduler_of_torch_gives_the_rates_of_groups_made_by_hand(tmp_path: Any, name: str, first: bool) -> None:
    data, model = list(loader(56, 8, shuffle=False)), deep()
    layers = [[*model[0].parameters(), *model[1].parameters()], [*model[3].parameters()], [*model[5].parameters()]]
    given = torch.optim.AdamW([{"params": p, "lr": 0.125 * f} for p, f in zip(layers, (0.25, 0.5, 1.0), strict=True)])
    scheduler, plain = BUILDS[name](given, 7), list[list[float]]()
    for _ in data:
        plain.append([group["lr"] for group in given.param_groups])
        given.step()
        scheduler.step()

    def run(folder: Any, kill: int | None = None) -> tuple[list[list[float]], Any]:
        seen, mine = list[list[float]](), deep()

        class Watch(Callback):
            def on_step_end(self, state: State) -> None:
                seen.append(state.rates)

        parts = [LayerwiseRate(0.5), Schedule(BUILDS[name])]
        more = [Watch(), Checkpoint(folder, every=1), KillAt(kill)]
        loop = Loop(mine, adamw(mine, 0.125), [*(parts if first else parts[::-1]), *more], resume=folder)
        with contextlib.suppress(Killed):
            loop.fit(loss_fn, data, epochs=1)
        return seen, torch.load(next(folder.glob("step-00000007/state.pt")))["optimizer"] if kill is None else None

    whole, saved = run(tmp_path / "whole")
    assert whole == plain
    before, _ = run(tmp_path / "killed", 4)
    after, again = run(tmp_path / "killed")
    assert [*before[:3], *after] == plain
    same(again, saved)


@pytest.mark.filterwarnings("ignore:.*not taken, as strict=False allows", "ignore:Schedule does not take its state")
@pytest.mark.parametrize("first", [True, False])
def test_another_scheduler_that_begins_anew_begins_at_the_layers_rates(tmp_path: Any, first: bool) -> None:
    def run(rate: float, build: Any, steps: int) -> Any:
        model, parts = deep(), [LayerwiseRate(0.5), Schedule(build)]
        parts = [*(parts if first else parts[::-1]), Checkpoint(tmp_path)]
        loop = Loop(model, adamw(model, rate), parts, resume=tmp_path, strict=False)
        return loop.fit(loss_fn, loader(16, 8, shuffle=False), steps=steps).rates

    assert run(0.125, BUILDS["exponential"], 4) == [pytest.approx(0.125 * f * 0.8**3) for f in (0.25, 0.5, 1)]
    assert run(0.25, BUILDS["step"], 7) == [pytest.approx(0.25 * f * 0.5) for f in (0.25, 0.5, 1)]


def test_a_scheduler_that_goes_on_by_last_epoch_finds_what_it_asks_for() -> None:
    model = deep()
    schedule = Schedule(lambda o, n: OPTIM.LambdaLR(o, lambda t: 0.5**t, last_epoch=1))
    state = Loop(model, adamw(model, 0.125), [LayerwiseRate(0.5), schedule]).fit(loss_fn, loader(8, 8), epochs=1)
    assert state.rates == [0.125 * f * 0.25 for f in (0.25, 0.5, 1.0)]


@pytest.mark.parametrize("build", [lambda o, n: OPTIM.OneCycleLR(o, 0.1, n), lambda o, n: OPTIM.CyclicLR(
    o, 0.01, 0.1, cycle_momentum=False)])  # fmt: skip
@pytest.mark.parametrize("first", [True, False])
def test_a_scheduler_that_writes_one_rate_over_all_is_refused(build: Any, first: bool) -> None:
    model = deep()
    callbacks = [LayerwiseRate(0.5), Schedule(build)]
    loop = Loop(model, adamw(model), callbacks if first else callbacks[::-1])
    with pytest.raises(ValueError, match=r"a scheduler wrote the rate .* over all layers' own.*take a list"):
        loop.fit(loss_fn, loader(50, 8), epochs=1)


def shaping() -> list[Any]:
    return [LayerwiseRate(0.5, rules={"^5": 2.0}), WeightDecay({r"^3\.": 0.3}, default=lambda depth: 0.05 + 0.1 * depth),
            Schedule(lambda o, n: OPTIM.CosineAnnealingLR(o, n, eta_min=0.1 * o.param_groups[0]["lr"]))]  # fmt: skip


def whole(order: Any, form: Any, folder: Any = None, kill: int | None = None, resume: Any = None) -> Any:
    seed, model = Seed(0), deep()
    given = torch.optim.AdamW([*list(model.parameters())[3:], *list(model.parameters())[:3]], lr=0.01)
    more = [] if folder is None else [Checkpoint(folder, every=1, keep=None), KillAt(kill)]
    parts = shaping()
    loop = Loop(model, given, [seed, *more, *(parts[i] for i in order)], resume=resume)
    form(loop, loss_fn, loader(40, 8), loader(16, 8, shuffle=False), epochs=2)
    names = {p: n for n, p in model.named_parameters()}
    groups = [{k: [names[p] for p in v] if k == "params" else v for k, v in g.items()} for g in given.param_groups]
    return bits(loop), groups


def test_beside_weight_decay_and_a_schedule_in_any_order_to_the_bit() -> None:
    runs = [whole(order, FORMS[i % 2]) for i, order in enumerate(itertools.permutations(range(3)))]
    for found, groups in runs[1:]:
        assert_same_bits(found, runs[0][0])
        assert groups == runs[0][1]
        assert [list(g) for g in groups] == [list(g) for g in runs[0][1]]
    assert len(runs[0][1]) == 6  # three layers, with decay and without
    order = [name for group in runs[0][1] for name in group["params"]]
    assert order[0] == "1.bias"  # the first that the optimizer was given


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_killed_at_any_update_and_resumed_it_has_the_same_bits(tmp_path: Any, order: Any) -> None:
    reference, groups = whole(order, built_in)
    for at in range(1, 11):
        folder = tmp_path / str(at)
        with pytest.raises(Killed):
            whole(order, by_hand, folder, at)
        again = whole(order, built_in, folder, None, folder)
        assert_same_bits(again[0], reference)
        assert again[1] == groups


def test_around_a_loop_of_ones_own() -> None:
    def run(mine: bool) -> Any:
        model = deep()
        optimizer = adamw(model)
        if not mine:
            LayerwiseRate(0.5).on_setup(State(model, optimizer))
        loop = Loop(model, optimizer, [LayerwiseRate(0.5)] if mine else [])
        with loop:
            for batch in loader(40, 8, shuffle=False):
                optimizer.zero_grad()
                loss_fn(model, batch)["loss"].backward()
                with loop.updating():
                    optimizer.step()
        assert len({g["lr"] for g in optimizer.param_groups}) == 3
        return bits(loop)

    assert_same_bits(run(True), run(False))


def test_entered_again_after_a_failed_entry_it_multiplies_once(tmp_path: Any) -> None:
    model = deep()
    loop = Loop(model, adamw(model, 0.1), [LayerwiseRate(0.5)], resume=tmp_path / "missing.pt")
    for _ in range(2):
        with pytest.raises(Exception, match="missing"), loop:
            pass
    assert [g["lr"] for g in loop.state.optimizer.param_groups] == [0.025, 0.05, 0.1]


def test_rates_that_are_tensors_get_one_each() -> None:
    model, rate = deep(), torch.tensor(0.1)
    state = set_up(model, 0.5, optimizer=torch.optim.AdamW(model.parameters(), lr=rate))
    groups = state.optimizer.param_groups
    assert [g["lr"].item() for g in groups] == [pytest.approx(0.1 * f) for f in (0.25, 0.5, 1.0)]
    assert groups[2]["lr"] is rate
    tensors = [g[k] for g in groups for k in ("lr", "initial_lr")]
    assert len({id(t) for t in tensors}) == 6
    LayerwiseRate(0.5).on_before_optimizer_step(state)  # reads nothing


def test_other_settings_survive_and_outsiders_keep_their_rate() -> None:
    model, scale = deep(), nn.Parameter(torch.ones(1))
    optimizer = torch.optim.AdamW([{"params": model.parameters(), "betas": (0.8, 0.9)}, {"params": [scale], "lr": 0.7}], lr=0.1)
    state = set_up(model, 0.5, optimizer=optimizer)
    assert [(g["lr"], g["betas"][0]) for g in optimizer.param_groups] == [(0.025, 0.8), (0.05, 0.8), (0.1, 0.8), (0.7, 0.9)]
    assert state.optimizer is optimizer


def test_a_scheduler_or_an_earlier_loop_before_it_is_refused() -> None:
    model = deep()
    optimizer = adamw(model)
    OPTIM.StepLR(optimizer, 1)
    with pytest.raises(ValueError, match=r"a scheduler was built on these groups; build it as Schedule\(lambda"):
        set_up(model, 0.5, optimizer=optimizer)
    assert len(optimizer.param_groups) == 1
    optimizer = adamw(model)
    set_up(model, 0.5, optimizer=optimizer)
    with pytest.raises(ValueError, match="earlier Loop's LayerwiseRate set their rates: then build the optimizer anew"):
        set_up(model, 0.5, optimizer=optimizer)
    with pytest.raises(ValueError, match="LayerwiseRate and LayerwiseRate both own"):
        Loop(model, adamw(model), [LayerwiseRate(0.5), LayerwiseRate(0.5).named("b")])


def test_another_decay_than_the_checkpoints_is_named(tmp_path: Any) -> None:
    def run(decay: float, resume: Any = None) -> None:
        model = deep()
        loop = Loop(model, adamw(model), [LayerwiseRate(decay), Checkpoint(tmp_path)], resume=resume)
        loop.fit(loss_fn, loader(16, 8), epochs=1 if resume is None else 2)

    run(0.5)
    with pytest.raises(ValueError, match=r"lr of parameter group 1 is 0.0025 here and 0.005 in the checkpoint's program"):
        run(0.25, tmp_path)


def test_tensorboard_shows_each_groups_rate(tmp_path: Any) -> None:
    model = deep()
    loop = Loop(model, adamw(model, 0.1), [TensorBoard(tmp_path, every=1), LayerwiseRate(0.5)])
    loop.fit(loss_fn, loader(16, 8), epochs=1)
    events = EventAccumulator(str(tmp_path)).Reload()
    for i, rate in enumerate((0.025, 0.05, 0.1)):
        assert [e.value for e in events.Scalars(f"rate/group{i}")] == [pytest.approx(rate)] * 2


def test_table() -> None:
    layered = LayerwiseRate(0.5, rules={r"1\.bias": 1.0})
    with pytest.raises(RuntimeError, match=r"LayerwiseRate.table\(\) runs after on_setup"):
        layered.table()
    model = deep()
    layered.on_setup(State(model, adamw(model)))
    assert layered.table().splitlines() == [
        "| layer | factor | names |", "| --- | --- | --- |", "| 0 | 0.25 | {0,1}.weight, 0.bias |", "| 0 | 1 | 1.bias |",
        "| 1 | 0.5 | 3.weight, 3.bias |", "| 2 | 1 | 5.weight, 5.bias |"]  # fmt: skip


@pytest.mark.parametrize("bad", [0, 0.0, -0.5, 1.5, math.nan, math.inf, "0.5", None, True, torch.tensor(0.5)])
def test_bad_factors(bad: Any) -> None:
    with pytest.raises(ValueError, match=r"decay must be a factor above 0 and at most 1, not .*requires_grad_\(False\)"):
        LayerwiseRate(bad)
    if bad != 1.5:
        with pytest.raises(ValueError, match=r"rules\['x'\] must be a factor above 0"):
            LayerwiseRate(0.5, rules={"x": bad})


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"decay=1.0 changes no layer's rate and there are no rules; give decay=0.75"):
        LayerwiseRate()
    with pytest.raises(ValueError, match="or leave example out"):
        LayerwiseRate(rules={"x": 0.5}, example=1)
    with pytest.raises(TypeError, match=r"rules must map expressions or module classes to factors, not 0\.5"):
        LayerwiseRate(0.5, rules=0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="neither an expression nor a module class"):
        LayerwiseRate(0.5, rules={"(": 0.5})
    with pytest.raises(ValueError, match=r"rules has 'heat', which matches nothing; the closest are head"):
        set_up(Reversed(), 0.5, rules={"heat": 0.5})
    with pytest.raises(ValueError, match="decides nothing, since rules before it match"):
        set_up(Reversed(), 0.5, rules={"head": 0.5, "head.bias": 0.1})
    with pytest.raises(ValueError, match=r"the model is one layer, so decay=0.5 changes nothing; give rules"):
        set_up(nn.Linear(2, 2), 0.5)
    with pytest.raises(ValueError, match="does not run on example"):
        set_up(net(), 0.5, example=torch.zeros(2, 5))
