"""SwitchOptimizer: the run is the one written out by hand, in any order, killed anywhere, with whatever holds the optimizer."""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FORMS, KillAt, Killed, assert_same_bits, bits, built_in, loader, loss_fn, net
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, ReduceLROnPlateau
from torch.utils._python_dispatch import TorchDispatchMode

from hookloop.callbacks import (
    Checkpoint,
    ClipGradients,
    EarlyStopping,
    Epochs,
    LayerwiseRate,
    NonFinite,
    Schedule,
    Seed,
    Steps,
    SwitchOptimizer,
    TensorBoard,
    Warmup,
    WeightDecay,
    make_optimizer,
)
from hookloop.callbacks.swats import projected_rate, settle, sgd_rate
from hookloop.loop import Callback, Goal, Loop, State
from hookloop.loop.exchange import exchange
from hookloop.loop.graph import Graphs


def sgd(groups: Any) -> Any:
    return SGD(groups, lr=0.1, momentum=0.9)


def cosine(optimizer: Any, total: Any) -> Any:
    return CosineAnnealingLR(optimizer, total)


def batches(count: int = 50) -> Any:
    return loader(count, 8, shuffle=False)


# --- the loop written out


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("at", "rate", "update"),
    [(5, None, 5), (Steps(9), 0.03, 9), (Epochs(2), 0.03, 14), (1, None, 1)],
)
def test_it_is_the_loop_written_out(form: Any, at: Any, rate: Any, update: int) -> None:
    model, other = net(noise=False), net(noise=False)
    switch = SwitchOptimizer(sgd, at=at, rate=rate)
    first = Adam(model.parameters(), lr=0.01)
    loop = Loop(model, first, [Warmup(8), switch, Schedule(cosine)])
    form(loop, loss_fn, batches(), epochs=3)

    optimizer: Any = Adam(other.parameters(), lr=0.01)
    scheduler = CosineAnnealingLR(optimizer, 21)
    for step, batch in enumerate(itertools.chain(*[batches()] * 3)):
        if step == update:
            optimizer = SGD(other.parameters(), lr=rate or 0.1, momentum=0.9)
            scheduler = CosineAnnealingLR(optimizer, 21 - update)
        optimizer.zero_grad()
        loss_fn(other, batch)["loss"].backward()
        kept = optimizer.param_groups[0]["lr"]
        optimizer.param_groups[0]["lr"] = kept * (min(step + 1, 8) / 8)
        optimizer.step()
        optimizer.param_groups[0]["lr"] = kept
        scheduler.step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    assert type(loop.state.optimizer) is SGD
    assert loop.state.step == 21
    assert not first.state  # its memory is free, though the variable is still held
    assert loop.state.metrics["switched"] == 1


def written_out(tolerance: float, updates: int, at: int | None = None) -> Any:
    """Algorithm 1 of the paper on Adam's own formulas, in float64; returns model, the update of the switch, the rate."""
    model = net(torch.float64, noise=False)
    xs = list(model.parameters())
    m, a, v = ([torch.zeros_like(x) for x in xs] for _ in range(3))
    mean, sgd_phase, found, k = 0.0, False, (None, None), 0
    for batch in itertools.islice(itertools.chain(*[loader(50, 8, torch.float64, shuffle=False)] * 9), updates):
        k += 1
        model.zero_grad()
        loss_fn(model, batch)["loss"].backward()
        g = [x.grad for x in xs]
        if sgd_phase:
            for x, y, z in zip(xs, v, g, strict=True):
                y.mul_(0.9).add_(z)
                x.data -= (1 - 0.9) * found[1] * y
            continue
        p = []
        for i, z in enumerate(g):
            m[i] = 0.9 * m[i] + 0.1 * z
            a[i] = 0.999 * a[i] + 0.001 * z * z
            p.append(-0.01 * (m[i] / (1 - 0.9**k)) / ((a[i] / (1 - 0.999**k)).sqrt() + 1e-8))
            xs[i].data += p[-1]
        gamma = sum((y * y).sum() for y in p) / -sum((y * z).sum() for y, z in zip(p, g, strict=True))
        mean = 0.999 * mean + 0.001 * gamma.item()
        unbiased = mean / (1 - 0.999**k)
        if k == at or (at is None and k > 1 and abs(unbiased - gamma.item()) < tolerance):
            sgd_phase, found = True, (k, unbiased)
    return model, *found


@pytest.mark.parametrize("at", [None, 4])
@pytest.mark.parametrize("tolerance", [0.02, 0.01])
def test_swats_is_the_papers_algorithm(at: int | None, tolerance: float) -> None:
    expected, update, rate = written_out(tolerance, 35, at)
    assert update is not None
    assert 1 < update < 30
    model = net(torch.float64, noise=False)
    switch = SwitchOptimizer(sgd, at, "swats", tolerance=tolerance, every=1)
    seen: list[int] = []

    class Watch(Callback):
        def on_step_end(self, state: State) -> None:
            if isinstance(state.optimizer, SGD):
                seen.append(state.step)

    loop = Loop(model, Adam(model.parameters(), lr=0.01), [Watch(), switch])
    built_in(loop, loss_fn, loader(50, 8, torch.float64, shuffle=False), epochs=5)
    assert seen[0] == update + 1
    assert switch.used == pytest.approx(rate, rel=1e-10)
    assert loop.state.optimizer.param_groups[0]["lr"] == switch.used * (1 - 0.9)
    for a, b in zip(model.parameters(), expected.parameters(), strict=True):
        assert (a - b).abs().max() < 1e-10


class Half(Callback):
    """A factor on the second group's rate alone, from the third update on."""

    def on_before_optimizer_step(self, state: State) -> None:
        if state.step > 1:
            state.scale_rate(0.5, 1)


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("factors", [(Warmup(40),), (Half(),), (Half(), Warmup(40))])
def test_what_multiplied_the_rate_multiplies_the_projected_one_once(factors: Any, as_tensor: bool) -> None:
    """From SGD to SGD nothing changes at the switch."""
    found = []
    for switch in (SwitchOptimizer(lambda groups: SGD(groups, lr=1.0), 10, "swats"), None):
        model = net(torch.float64, noise=False)
        first, *others = model.parameters()
        optimizer = SGD(
            [{"params": [first]}, {"params": others}], lr=torch.tensor(0.01, dtype=torch.float64) if as_tensor else 0.01
        )
        used: list[list[float]] = []

        class Watch(Callback):
            def on_step_end(self, state: State) -> None:
                used.append([float(rate) for rate in state.rates])  # noqa: B023

        callbacks = [*copy.deepcopy(factors), Watch(), *([switch] if switch else [])]
        built_in(Loop(model, optimizer, callbacks), loss_fn, loader(50, 8, torch.float64, shuffle=False), steps=16)
        found.append(used)
        assert switch is None or switch.used == pytest.approx(0.01)
    for a, b in zip(*found, strict=True):
        assert a == pytest.approx(b)


def test_swats_takes_complex_parameters_as_pairs_of_reals() -> None:
    class Complex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 3, dtype=torch.complex128, generator=torch.Generator().manual_seed(0)))

    x = torch.randn(6, 8, 4, dtype=torch.complex128, generator=torch.Generator().manual_seed(1))

    def run(switch: list[Any]) -> Any:
        model = Complex()
        loop = Loop(model, Adam(model.parameters(), lr=0.01), switch)
        built_in(loop, lambda model, b: (b @ model.w).abs().square().mean(), [*x], epochs=1)
        return model

    run([switch := SwitchOptimizer(lambda groups: SGD(groups, lr=1.0), 5, "swats")])
    model, mean = Complex(), 0.0
    optimizer = Adam(model.parameters(), lr=0.01)
    for b in x[:5]:
        optimizer.zero_grad()
        (b @ model.w).abs().square().mean().backward()
        old = model.w.detach().clone()
        optimizer.step()
        p, g = torch.view_as_real(model.w.detach() - old), torch.view_as_real(model.w.grad)
        mean = 0.999 * mean + 0.001 * float((p * p).sum() / -(p * g).sum())
    assert switch.used == pytest.approx(mean / (1 - 0.999**5))


@pytest.mark.parametrize("every", [1, 3, 10])
def test_what_had_settled_is_looked_at_with_a_delay_that_is_always_the_same(every: int) -> None:
    model = net(torch.float64, noise=False)
    switch = SwitchOptimizer(sgd, rate="swats", tolerance=0.02, every=every)
    steps: list[int] = []

    class Watch(Callback):
        def on_step_end(self, state: State) -> None:
            if switch.switched:
                steps.append(state.step)

    loop = Loop(model, Adam(model.parameters(), lr=0.01), [switch, Watch()])
    built_in(loop, loss_fn, loader(50, 8, torch.float64, shuffle=False), epochs=5)
    update, rate = written_out(0.02, 35)[1:]
    put = -(-update // every) * every  # the first update after it that is looked at
    assert steps[0] == put + every - 1 + 1
    assert switch.used == pytest.approx(rate, rel=1e-10)  # of the update that it settled at


def test_cores_alone() -> None:
    steps, grads = [torch.tensor([-1.0, 0.0]), torch.tensor([-2.0])], [torch.tensor([2.0, 5.0]), torch.tensor([4.0])]
    rate = projected_rate(steps, grads)
    assert rate == 5 / 10
    for p, g in zip(steps, grads, strict=True):  # SGD's own steps have SGD's rate
        assert projected_rate([-0.3 * g], [g]).item() == pytest.approx(0.3)
        assert p.shape == g.shape
    zero = torch.zeros((), dtype=torch.float64)
    mean, unbiased, agree = settle(zero, rate, 1, 0.999, 1e-9)
    assert (unbiased.item(), agree.item()) == (pytest.approx(0.5, rel=1e-12), False)  # never at the first
    assert settle(mean, rate, 2, 0.999, 1e-9)[2]
    assert not settle(mean, rate + 0.01, 2, 0.999, 1e-9)[2]
    for odd in (torch.inf, torch.nan):  # p.g = 0 leaves the mean, as the paper does
        assert settle(mean, zero + odd, 2, 0.999, 1e-9)[0] == mean
    below = settle(zero, -rate, 1, 0.999, 1e-9)[0]
    assert not settle(below, -rate, 2, 0.999, 1e-9)[2]
    assert sgd_rate(2.0)({"momentum": 0.5}) == 1.0


def test_a_plateau() -> None:
    model = net(noise=False)
    switch = SwitchOptimizer(sgd, at=Goal("val_loss", patience=2))
    kinds: list[str] = []

    class Watch(Callback):
        def on_validation_end(self, state: State) -> None:
            kinds.append(type(state.optimizer).__name__)

    with Loop(model, Adam(model.parameters()), [switch, Watch()]) as loop:
        for epoch in loop.epochs(6):
            for step in loop.steps(batches(16)):
                for micro in step:
                    with micro:
                        micro.backward(loss_fn)
                loop.update()
            loop.report({"val_loss": [3.0, 2.0, 2.0, 2.5, 1.0, 0.5][epoch]})
    assert kinds == ["Adam"] * 4 + ["SGD"] * 2


# --- any order, killed anywhere


def callbacks(at: Any, rate: Any, more: Any = ()) -> list[Callback]:
    return [SwitchOptimizer(sgd, at, rate, tolerance=0.05, every=2), Schedule(cosine), Warmup(12), WeightDecay({"0": 0.05}),
            ClipGradients(0.5), NonFinite("rollback", every=4), *more]  # fmt: skip


WAYS = [(5, None), (Epochs(1), 0.02), ("val_loss", 0.02), (6, "swats"), (None, "swats")]


def run(order: Any, at: Any, rate: Any, more: Any = (), resume: Any = None, form: Any = built_in) -> Any:
    seed, model = Seed(0), net()
    found = callbacks(at, rate, more)
    order = range(len(found)) if order is None else order
    loop = Loop(model, AdamW(model.parameters(), lr=1e-2), [seed, *(found[i] for i in order)], resume=resume)
    form(loop, loss_fn, loader(40, 8), loader(16, 8, shuffle=False), epochs=3)
    return loop


@pytest.mark.parametrize(("at", "rate"), WAYS)
def test_any_order_and_both_forms(at: Any, rate: Any) -> None:
    first = run(None, at, rate)
    assert type(first.state.optimizer) is (SGD if at != "val_loss" else AdamW)
    orders = list(itertools.permutations(range(6)))
    for i, order in enumerate(random.Random(1).sample(orders, 5)):
        other = run(order, at, rate, form=FORMS[i % 2])
        assert_same_bits(bits(first), bits(other))
        assert first.state.optimizer.param_groups[0]["lr"] == other.state.optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize(("at", "rate"), WAYS)
def test_killed_at_each_update_and_resumed(at: Any, rate: Any, tmp_path: Path) -> None:
    at = Goal("val_loss", patience=1, min_delta=10.0) if at == "val_loss" else at
    whole = run(None, at, rate)
    assert type(whole.state.optimizer) is SGD
    for kill in range(2, 15):
        folder = tmp_path / str(kill)
        with pytest.raises(Killed):  # before the save of that update, so that it goes on from the one before
            run(None, at, rate, [Checkpoint(folder, every=kill - 1, keep=1), KillAt(kill)])
        order = list(range(8))
        random.Random(kill).shuffle(order)
        again = run(order, at, rate, [Checkpoint(folder, every=99), KillAt(None)], folder)
        assert_same_bits(bits(whole), bits(again))
        assert again.state.rates == whole.state.rates
        assert type(again.state.optimizer) is SGD


# --- what it takes over


def groups_of(optimizer: Any, to: Any = sgd, **options: Any) -> Any:
    model = options.pop("model")
    state = State(model, optimizer)
    switch = SwitchOptimizer(to, **{"at": 1, **options})
    switch.on_setup(state)
    switch.on_fit_start(state)
    switch.on_step_start(state)
    assert state.optimizer is optimizer
    state.step = 1
    switch.on_step_start(state)
    return state.optimizer.param_groups


def test_driven_without_a_loop() -> None:
    model = net()
    groups = groups_of(make_optimizer(model, "adamw", 1e-3, 0.2), model=model, rate=0.5)
    assert [(g["weight_decay"], g["lr"], g["momentum"]) for g in groups] == [(0.2, 0.5, 0.9), (0.0, 0.5, 0.9)]
    rate = torch.tensor(0.1)
    groups = groups_of(make_optimizer(model, "adamw", 1e-3, 0.2), lambda g: SGD(g, lr=rate), model=model)
    assert groups[0]["lr"] is not groups[1]["lr"]  # or each factor would meet it twice


def test_a_decay_of_the_optimizers_own_is_not_handed_over() -> None:
    model = net()
    assert [g["weight_decay"] for g in groups_of(AdamW(model.parameters()), model=model)] == [0]
    both = groups_of(AdamW(model.parameters()), lambda g: SGD(g, lr=0.1, weight_decay=5e-4), model=model)
    assert [g["weight_decay"] for g in both] == [5e-4]


def test_ratios_of_rates_stay() -> None:
    model = net()
    parts = [{"params": model[0].parameters(), "lr": 0.01}, {"params": [*model.parameters()][2:], "lr": 0.04}]
    groups = groups_of(Adam(parts), model=model, rate=0.2)
    assert [g["lr"] for g in groups] == [0.05, 0.2]
    parts = [{"params": model[0].parameters(), "lr": 0.01}, {"params": [*model.parameters()][2:], "lr": 0.04}]
    with pytest.raises(ValueError, match=r"to joins parameters whose rates differ now \(\[0.01, 0.04\]\) in one group"):
        groups_of(Adam(parts), lambda g: SGD([p for one in g for p in one["params"]], lr=0.1), model=model)


def test_decays_that_differ_are_not_joined() -> None:
    model = net()
    with pytest.raises(
        ValueError, match=r"to joins parameters whose decays differ \(\[0.0, 0.2\]\) in one group.*change their d"
    ):
        groups_of(
            make_optimizer(model, "adamw", 1e-3, 0.2), lambda g: sgd([p for one in g for p in one["params"]]), model=model
        )


@pytest.mark.parametrize(("first", "then"), [(torch.tensor(1e-2), 0.1), (1e-2, torch.tensor(0.1))])
def test_rates_of_layers_are_those_of_the_new_optimizer_when_resumed(first: Any, then: Any, tmp_path: Path) -> None:
    def run(more: Any, resume: Any = None) -> Any:
        model, rate = net(), copy.deepcopy(first)
        switch = SwitchOptimizer(lambda groups: SGD(groups, lr=copy.deepcopy(then), momentum=0.9), 3)
        own = [Seed(0), LayerwiseRate(0.7), switch, Schedule("linear"), *more]
        loop = Loop(model, AdamW(model.parameters(), lr=rate), own, resume=resume)
        built_in(loop, loss_fn, batches(), epochs=1)
        return loop

    whole = run([])
    with pytest.raises(Killed):
        run([Checkpoint(tmp_path, every=4, keep=1), KillAt(5)])
    again = run([Checkpoint(tmp_path, every=9), KillAt(None)], tmp_path)
    assert_same_bits(bits(whole), bits(again))
    kinds = [[type(group["lr"]) for group in loop.state.optimizer.param_groups] for loop in (whole, again)]
    assert kinds[0] == kinds[1] == [type(then)] * 2


def test_ratios_are_of_the_rates_that_the_program_gave_also_when_resumed(tmp_path: Path) -> None:
    def run(more: Any, resume: Any = None) -> Any:
        model = net()
        parts = [{"params": model[0].parameters(), "lr": 0.01}, {"params": [*model.parameters()][2:], "lr": 0.04}]
        floor = Schedule("plateau", on="val_loss", patience=0, threshold=9.0, min_lr=0.01)  # where both rates end
        loop = Loop(model, Adam(parts), [Seed(0), SwitchOptimizer(sgd, 25), floor, *more], resume=resume)
        built_in(loop, loss_fn, batches(), batches(16), epochs=4)
        return loop

    whole = run([])
    assert whole.state.rates == [0.025, 0.1]
    with pytest.raises(Killed):
        run([Checkpoint(tmp_path, every=26, keep=1), KillAt(27)])
    assert_same_bits(bits(whole), bits(run([Checkpoint(tmp_path, every=99), KillAt(None)], tmp_path)))


def test_nothing_is_read_from_the_device_in_a_step() -> None:
    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    model, mode = net(noise=False), Reads()
    switch = SwitchOptimizer(sgd, rate="swats", tolerance=1e-12, every=4)
    with Loop(model, SGD(model.parameters(), lr=0.1), [switch]) as loop:
        for _ in loop.epochs(1):
            for step in loop.steps(loader(120, 8, shuffle=False)):  # few: the mode makes hooks slow, which is warned of
                with mode if loop.state.step > 1 else contextlib.nullcontext():
                    for micro in step:
                        with micro:
                            micro.backward(lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1]))
                    loop.update()
    assert switch.projected.count == 15  # type: ignore[union-attr]
    assert mode.count == 0


def test_a_skipped_update_is_not_measured() -> None:
    class Skip(Callback):
        def on_before_optimizer_step(self, state: State) -> None:
            if state.step == 3 and not state.skipped:
                state.skip("once")

    model = net()
    switch = SwitchOptimizer(sgd, 99, "swats")
    loop = Loop(model, Adam(model.parameters()), [switch, Skip()])
    built_in(loop, loss_fn, batches(64), epochs=1)
    assert (loop.state.step, loop.state.skipped, switch.projected.count) == (7, 1, 7)  # type: ignore[union-attr]


def test_rollback_goes_back_to_the_new_optimizer(caplog: pytest.LogCaptureFixture) -> None:
    class Spoil(Callback):
        def on_before_optimizer_step(self, state: State) -> None:
            if state.step == 6 and not state.skipped:
                state.grads[0].fill_(torch.nan)

    model = net(noise=False)
    loop = Loop(model, Adam(model.parameters()), [SwitchOptimizer(sgd, 5), NonFinite("rollback", every=4), Spoil()])
    built_in(loop, loss_fn, batches(80), epochs=1)
    assert loop.state.skipped == 1
    assert "back to the weights of update 5" in caplog.text  # not of 4, with Adam's state
    assert {k for held in loop.state.optimizer.state.values() for k in held} == {"momentum_buffer"}


def test_replayed_steps_begin_anew() -> None:
    model = net()
    state = State(model, Adam(model.parameters()))
    graphs = Graphs(state, 3, 8)
    graphs.updates, graphs.update_graphs["key"], graphs.stepped = 7, object(), set(model.parameters())
    new = sgd(model.parameters())
    exchange(state, new)
    assert (graphs.updates, len(graphs.update_graphs), graphs.stepped) == (0, 0, set())
    graphs.stepped = set(model.parameters())
    new.load_state_dict(new.state_dict())
    assert not graphs.stepped


def test_the_scaler_goes_on() -> None:
    model = net()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=3)
    loop = Loop(model, Adam(model.parameters(), lr=0.01), [SwitchOptimizer(sgd, 3)], scaler=scaler)
    built_in(loop, loss_fn, batches(), epochs=1)
    assert (type(loop.state.optimizer), loop.state.step, scaler.get_scale()) == (SGD, 7, 16.0)


def test_best_weights_come_back_from_before_the_switch() -> None:
    model = net(noise=False)
    stop = EarlyStopping("val_loss", patience=9, restore_best=True)
    loop = Loop(model, Adam(model.parameters()), [SwitchOptimizer(lambda g: SGD(g, lr=50.0), Epochs(1)), stop])
    built_in(loop, loss_fn, batches(), loader(20, shuffle=False), epochs=3)
    again = loop.evaluate(loss_fn, loader(20, shuffle=False))
    assert again["val_loss"] == pytest.approx(stop.tracker.best)


def test_tensorboard_shows_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "hookloop")
    model = net()
    loop = Loop(model, Adam(model.parameters(), lr=0.01), [SwitchOptimizer(sgd, 4, "swats"), TensorBoard(tmp_path, every=1)])
    built_in(loop, loss_fn, batches(), epochs=1)
    events = EventAccumulator(str(tmp_path)).Reload()
    shown = {tag: [e.value for e in events.Scalars(tag)] for tag in ("train/switched", "rate/group0", "train/swats_rate")}
    assert shown["train/switched"] == [0, 0, 0, 0, 1, 1, 1]
    assert shown["rate/group0"] == pytest.approx([0.01] * 4 + [shown["train/swats_rate"][3] * 0.1] * 3)
    assert "SGD takes over after update 4, at the rates [0.0" in caplog.text


# --- what is refused


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ((SGD, 3), TypeError, r"to must be a function such as lambda groups: SGD\(groups, lr=0.1, momentum=0.9\), not <class"),
        ((sgd(net().parameters()), 3), TypeError, "to must be a function"),
        ((sgd,), ValueError, r"at=None waits for the projected rate to settle, so it goes with rate='swats'; else say at="),
        ((sgd, 0), ValueError, "at must be a whole number, at least 1, not 0"),
        ((sgd, True), ValueError, "at must be a whole number, at least 1, not True"),
        ((sgd, 2.5), ValueError, "at must be a whole number"),
        ((sgd, ""), ValueError, "metric must be the name of a metric"),
        ((sgd, Epochs({3: 4})), ValueError, r"at must be one position, such as Epochs\(3\), not the table \{3: 4\}"),
        ((sgd, 3, 0), ValueError, "rate must be finite and above 0, 'swats', or None for the rate that to gives, not 0"),
        ((sgd, 3, True), ValueError, "rate must be finite"),
        ((sgd, 3, "swat"), ValueError, "rate must be finite and above 0, 'swats'"),
        ((sgd, 3, float("inf")), ValueError, "rate must be finite"),
    ],
)
def test_bad_arguments(arguments: Any, error: Any, says: str) -> None:
    with pytest.raises(error, match=says):
        SwitchOptimizer(*arguments)


@pytest.mark.parametrize(("name", "value"), [("tolerance", 0), ("tolerance", True), ("every", 0), ("every", 1.5)])
def test_bad_settings_of_swats(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} must be"):
        SwitchOptimizer(sgd, rate="swats", **{name: value})


LATER = [
    (lambda g: None, {}, TypeError, "optimizer must be a torch optimizer, not None"),
    (lambda g: torch.optim.LBFGS([p for x in g for p in x["params"]]), {}, TypeError, "LBFGS needs a closure"),
    (lambda g: SGD(g[0]["params"][:1], lr=1.0), {}, ValueError, "to gives a SGD of 1 parameters, which are not the 4"),
    (lambda g: SGD(net(noise=False).parameters(), lr=1.0), {}, ValueError, "of 4 parameters, which are not the 4 that are"),
    (lambda g: torch.optim.Rprop(g), {}, ValueError, "decays of their own, and Rprop has no weight_decay; leave them out"),
    (
        lambda g: SGD(g, lr=1.0, weight_decay=5e-4),
        {},
        ValueError,
        r"to gives weight_decay=0.0005, which no group.*\(0.0, 0.3\)",
    ),
    (lambda g: Adam(g, lr=1.0), {"rate": "swats"}, ValueError, "rate='swats' is one of SGD without dampening, and to gives"),
    (lambda g: torch.optim.RMSprop(g), {"rate": "swats"}, ValueError, "rate='swats' is one of SGD without dampening"),
    (lambda g: SGD(g, momentum=0.5, dampening=0.5), {"rate": "swats"}, ValueError, "rate='swats' is one of SGD without damp"),
]


@pytest.mark.parametrize(("to", "options", "error", "says"), LATER)
def test_what_cannot_take_over_is_said_at_the_start(to: Any, options: Any, error: Any, says: str) -> None:
    model = net(noise=False)
    loop = Loop(model, AdamW(model.parameters()), [SwitchOptimizer(to, 99, **options), WeightDecay(default=0.3)])
    with pytest.raises(error, match=says):
        built_in(loop, loss_fn, batches(), epochs=1)
    assert loop.state.step == 0


def test_a_schedule_that_the_new_optimizer_cannot_have_is_said_at_the_start() -> None:
    model = net()
    adagrad = SwitchOptimizer(lambda groups: torch.optim.Adagrad(groups), 3)
    loop = Loop(model, Adam(model.parameters()), [adagrad, Schedule("one_cycle")])
    with pytest.raises(ValueError, match="must support momentum or beta1") as found:
        built_in(loop, loss_fn, batches(), epochs=1)
    assert loop.state.step == 0
    assert "in building the scheduler for Adagrad, which is to take over" in found.value.__notes__


def test_the_first_optimizer_again_is_refused() -> None:
    model = net()
    first = Adam(model.parameters())
    with pytest.raises(ValueError, match="to gives the Adam that trains already; it must build another"):
        built_in(Loop(model, first, [SwitchOptimizer(lambda g: first, 3)]), loss_fn, batches(), epochs=1)


def test_a_scheduler_of_the_first_optimizer_is_refused() -> None:
    model = net()
    first = Adam(model.parameters())
    for more in ([Schedule(ReduceLROnPlateau(first), on="val_loss")], [Schedule(LambdaLR(first, lambda t: 1.0))], []):
        says = r"can't follow to another optimizer: Schedule\(lambda" if not hasattr(first.step, "__wrapped__") else "a sched"
        with pytest.raises(ValueError, match=says):  # the last: one that the user steps
            built_in(Loop(model, first, [*more, SwitchOptimizer(sgd, 3)]), loss_fn, batches(), batches(), epochs=1)


def test_around_a_loop_of_ones_own_it_is_refused_by_name() -> None:
    model = net()
    for at in (3, "val_loss"):
        loop = Loop(model, Adam(model.parameters()), [SwitchOptimizer(sgd, at)])
        says = r"SwitchOptimizer needs to decide state.optimizer, which does not run"
        with pytest.raises(ValueError, match=says), loop, loop.updating():
            pass


def test_two_are_refused() -> None:
    model = net()
    with pytest.raises(ValueError, match=r"SwitchOptimizer and SwitchOptimizer both own state.optimizer; keep one"):
        Loop(model, Adam(model.parameters()), [SwitchOptimizer(sgd, 3), SwitchOptimizer(sgd, 5).named("b")])


# --- resumed by another program


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    found = tmp_path_factory.mktemp("switched")
    model = net()
    loop = Loop(model, Adam(model.parameters()), [SwitchOptimizer(sgd, 3, 0.1), Checkpoint(found)])
    built_in(loop, loss_fn, batches(), epochs=1)
    return found


def again(folder: Any, callbacks: Any, **options: Any) -> Loop:
    model = net()
    return Loop(model, Adam(model.parameters()), [*callbacks, Checkpoint(folder)], resume=folder, **options)


@pytest.mark.parametrize(
    ("callbacks", "says"),
    [
        ([], "the optimizer is Adam here and SGD in the checkpoint.*SwitchOptimizer has state in the checkpoint"),
        ([SwitchOptimizer(sgd, 3, 0.2)], "lr of parameter group 0 is 0.2 here and 0.1 in the checkpoint's program"),
        ([SwitchOptimizer(lambda g: SGD(g, momentum=0.5), 3, 0.1)], "momentum of parameter group 0 is 0.5 here and 0.9"),
        ([SwitchOptimizer(lambda g: torch.optim.NAdam(g), 3, 0.1)], "the optimizer is NAdam here and SGD in the checkpoint"),
        ([SwitchOptimizer(sgd, "train_loss", 0.1)], "SwitchOptimizer does not take its state: at= or rate= is not of the kind"),
        ([SwitchOptimizer(lambda g: None, 3, 0.1)], "SwitchOptimizer does not take its state: TypeError: optimizer must be"),
    ],
)
def test_another_program_is_told_what_differs(folder: Path, callbacks: Any, says: str) -> None:
    loop = again(folder, callbacks)
    first = loop.state.optimizer
    with pytest.raises(ValueError, match=says):
        built_in(loop, loss_fn, batches(), epochs=2)
    assert loop.state.optimizer is first  # nothing was changed
    assert not [c for c in callbacks if c.switched]


def test_a_switch_later_than_the_checkpoint_stands(folder: Path) -> None:
    loop = again(folder, [SwitchOptimizer(sgd, 99, 0.1)])
    built_in(loop, loss_fn, batches(), epochs=2)
    assert type(loop.state.optimizer) is SGD


def test_not_strict_takes_what_fits(folder: Path) -> None:
    loop = again(folder, [SwitchOptimizer(sgd, 3, 0.2)], strict=False)
    with pytest.warns(UserWarning, match="lr of parameter group 0 is 0.2"):
        built_in(loop, loss_fn, batches(), epochs=2)
    assert loop.state.optimizer.param_groups[0]["lr"] == 0.2


def test_state_of_a_switch_needs_a_model() -> None:
    switch = SwitchOptimizer(sgd, 3)
    with pytest.raises(RuntimeError, match="of a run that had switched runs after on_setup"):
        switch.load_state_dict({**switch.state_dict(), "switched": True})
