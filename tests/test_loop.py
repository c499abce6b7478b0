"""The verbs and their errors, the hooks and their order, and what a Loop is built from."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import math
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import FORMS, Samples, adamw, assert_same_bits, bits, built_in, by_hand, loader, loss_fn, net
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader

from hookloop.callbacks import (
    Checkpoint,
    ClipGradients,
    DecaySchedule,
    Diagnose,
    GradientAccumulation,
    LayerwiseRate,
    MicroBatch,
    NonFinite,
    Progress,
    Schedule,
    Seed,
    SwitchOptimizer,
    TensorBoard,
    Warmup,
    WeightDecay,
)
from hookloop.loop import Callback, Goal, Loop, State
from hookloop.loop.study import preview

HOOKS = ["on_setup", "on_fit_start", "on_epoch_start", "on_step_start", "on_exception", "on_micro_end",
         "on_before_optimizer_step", "on_step_end", "on_validation_end", "on_epoch_end", "on_fit_end"]  # fmt: skip


class Record(Callback):
    """Writes down every hook that runs."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def count(self, hook: str) -> int:
        return self.seen.count(hook)

    def without(self, *hooks: str) -> list[str]:
        return [hook for hook in self.seen if hook not in hooks]


def _recording(hook: str) -> Any:
    def method(self: Record, state: State) -> None:
        evaluating = hook == "on_micro_end" and not state.micro.training
        self.seen.append("evaluation" if evaluating else hook)

    return method


for _hook in HOOKS:
    setattr(Record, _hook, _recording(_hook))


class At(Callback):
    """Does something in one hook; each has a key of its own."""

    count = itertools.count()

    def __init__(self, hook: str, act: Any) -> None:
        self.key = f"At {next(self.count)}"
        setattr(self, hook, act)


class StopAt(Callback):
    def __init__(self, *steps: int) -> None:
        self.steps = steps

    def on_step_end(self, state: Any) -> None:
        if state.step in self.steps:
            state.stop(f"at {state.step}")


def make(*callbacks: Callback, **kwargs: Any) -> Loop:
    model = net(noise=False)
    return Loop(model, adamw(model), callbacks, **kwargs)


def train() -> DataLoader:
    return loader(20, 8)


def val() -> DataLoader:
    return loader(10, 4, shuffle=False)


def one_step(loop: Loop, step: Any) -> None:
    for micro in step:
        with micro:
            micro.backward(loss_fn)
    loop.update()


# Hooks


STEP = ["on_step_start", "on_micro_end", "on_before_optimizer_step", "on_step_end"]


@pytest.mark.parametrize("form", FORMS)
def test_hooks_run_in_the_order_of_the_table(form: Any) -> None:
    record = Record()
    form(make(record), loss_fn, train(), val(), epochs=2)
    epoch = ["on_epoch_start", *STEP * 3, *["evaluation"] * 3, "on_validation_end", "on_epoch_end"]
    assert record.seen == ["on_setup", "on_fit_start", *epoch * 2, "on_fit_end"]


@pytest.mark.parametrize("form", FORMS)
def test_hooks_of_accumulated_steps_without_a_validation_loader(form: Any) -> None:
    record = Record()
    form(make(GradientAccumulation(2), At("on_fit_start", micro_of(3)), record), loss_fn, train(), epochs=1)
    first = ["on_step_start", *["on_micro_end"] * 6, "on_before_optimizer_step", "on_step_end"]
    second = ["on_step_start", *["on_micro_end"] * 2, "on_before_optimizer_step", "on_step_end"]
    assert record.seen == ["on_setup", "on_fit_start", "on_epoch_start", *first, *second, "on_validation_end",
                           "on_epoch_end", "on_fit_end"]  # fmt: skip


def micro_of(size: int) -> Any:
    def act(state: State) -> None:
        state.micro_batch_size = size

    return act


@pytest.mark.parametrize("form", FORMS)
def test_what_holds_in_each_hook(form: Any) -> None:
    """The middle column of the hook table."""
    data = train()
    checks: dict[str, int] = {}

    class Holds(Callback):
        def check(self, hook: str) -> None:
            checks[hook] = checks.get(hook, 0) + 1

        def on_setup(self, state: Any) -> None:
            assert state.loader is None
            assert state.micro is None
            self.check("setup")

        def on_fit_start(self, state: Any) -> None:
            assert (state.loader, state.total_steps, state.model.training) == (data, 6, True)
            self.check("fit")

        def on_epoch_start(self, state: Any) -> None:
            assert state.step == 3 * state.epoch
            self.check("epoch")

        def on_step_start(self, state: Any) -> None:
            self.read, self.before = len(data.dataset.read), state.step
            self.weight = state.model[0].weight.clone()

        def on_micro_end(self, state: Any) -> None:
            assert not any(t.requires_grad for t in state.micro.outputs.values())
            assert set(state.micro.outputs) == {"loss", "accuracy", "preds", "target"}
            if state.micro.training:
                assert torch.equal(state.micro.batch[0], data.dataset.x[state.micro.index])
                self.check("micro")

        def on_before_optimizer_step(self, state: Any) -> None:
            assert state.micro is None
            assert all(p.grad is not None for p in state.model.parameters())
            self.norm = torch.nn.utils.get_total_norm(state.grads)
            assert torch.equal(self.norm, state.grad_norm)
            assert torch.equal(state.model[0].weight, self.weight)

        def on_step_end(self, state: Any) -> None:
            assert state.step == self.before + 1
            assert torch.equal(self.norm, state.grad_norm)
            assert state.rates == [0.01]
            assert not torch.equal(state.model[0].weight, self.weight)
            assert math.isfinite(float(state.metrics["loss"]))
            self.check("step")

        def on_validation_end(self, state: Any) -> None:
            assert isinstance(state.metrics["val_loss"], float)
            assert state.epoch == self.before // 3

        def on_epoch_end(self, state: Any) -> None:
            assert state.step == 3 * state.epoch
            self.check("epoch end")

        def on_fit_end(self, state: Any) -> None:
            assert state.micro is None
            assert (state.step, state.epoch, state.samples, state.stop_reason) == (6, 2, 40, None)
            self.check("end")

    form(make(Holds()), loss_fn, data, val(), epochs=2)
    assert checks == {"setup": 1, "fit": 1, "epoch": 2, "micro": 6, "step": 6, "epoch end": 2, "end": 1}


def test_hooks_read_no_data_before_the_step_starts() -> None:
    """The plan may change before the step's data is gathered: at most one loader batch was read ahead."""
    data, reads = train(), []
    make(At("on_step_start", lambda state: reads.append(len(data.dataset.read)))).fit(loss_fn, data, epochs=1)
    assert reads == [8, 16, 20]


@pytest.mark.parametrize("form", FORMS)
def test_on_setup_once_in_a_life_on_fit_start_once_an_entry(form: Any) -> None:
    record = Record()
    loop, data = make(record), train()
    for epochs in (1, 2, 2, 3):
        form(loop, loss_fn, data, epochs=epochs)
    assert [record.count(h) for h in ("on_setup", "on_epoch_start", "on_epoch_end", "on_fit_end")] == [1, 3, 3, 4]
    assert record.count("on_fit_start") == (4 if form is built_in else 3)  # by hand at the first loop.steps


@pytest.mark.parametrize("form", FORMS)
def test_epochs_and_steps_are_absolute(form: Any) -> None:
    loop, data = make(), train()
    assert form(loop, loss_fn, data, epochs=10).step == 30
    assert form(loop, loss_fn, data, epochs=10).step == 30
    assert form(loop, loss_fn, data, steps=31).step == 31
    assert form(loop, loss_fn, data, epochs=11).step == 33
    assert form(loop, loss_fn, data, epochs=11, steps=40).step == 33
    assert form(loop, loss_fn, data, epochs=20, steps=34).step == 34
    assert (loop.state.epoch, loop.state.stop_reason) == (11, None)


@pytest.mark.parametrize("form", FORMS)
def test_nothing_to_do(form: Any) -> None:
    for end in ({"epochs": 0}, {"steps": 0}):
        record = Record()
        loop = make(record)
        before = bits(loop)
        assert form(loop, loss_fn, train(), val(), **end).step == 0
        assert record.without("on_fit_start") == ["on_setup", "on_fit_end"]
        assert_same_bits(before, bits(loop))


# Stops


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("loaders", [True, False])
def test_stopped_inside_an_epoch_neither_validates_nor_ends_it(form: Any, loaders: bool) -> None:
    record = Record()
    state = form(make(StopAt(2, 5), record), loss_fn, train(), val() if loaders else None, epochs=3)
    assert (state.step, state.epoch, state.stop_reason) == (2, 0, "at 2")
    assert not {"on_validation_end", "on_epoch_end", "evaluation"} & set(record.seen)
    assert record.seen[-1] == "on_fit_end"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("by", ["callback", "steps"])
def test_stopped_in_the_last_step_of_an_epoch_does_both(form: Any, by: str) -> None:
    record = Record()
    loop = make(record, *([StopAt(3)] if by == "callback" else []))
    state = form(loop, loss_fn, train(), val(), **({"epochs": 3} if by == "callback" else {"steps": 3}))
    assert (state.step, state.epoch) == (3, 1)
    assert state.stop_reason == ("at 3" if by == "callback" else None)
    assert record.seen[-6:] == [*["evaluation"] * 3, "on_validation_end", "on_epoch_end", "on_fit_end"]


@pytest.mark.parametrize("form", FORMS)
def test_stopped_by_steps_inside_an_epoch(form: Any) -> None:
    record = Record()
    loop = make(record)
    data = train()
    state = form(loop, loss_fn, data, val(), steps=4)
    assert (state.step, state.epoch, state.stop_reason) == (4, 1, None)
    assert (record.count("on_validation_end"), record.count("on_epoch_end")) == (1, 1)
    state = form(loop, loss_fn, data, val(), epochs=2)
    assert (record.count("on_validation_end"), record.count("on_epoch_end")) == (2, 2)


@pytest.mark.parametrize("form", FORMS)
def test_stopped_in_validation_still_ends_the_epoch(form: Any) -> None:
    record = Record()
    state = form(make(At("on_validation_end", lambda s: s.stop("good")), record), loss_fn, train(), val(), epochs=3)
    assert (state.step, state.epoch, state.stop_reason) == (3, 1, "good")
    assert record.seen[-3:] == ["on_validation_end", "on_epoch_end", "on_fit_end"]


def test_the_first_reason_stands_and_a_new_entry_forgets_it() -> None:
    loop = make(StopAt(2), At("on_step_end", lambda s: s.stop("mine") if s.step == 2 else None))
    data = train()
    assert loop.fit(loss_fn, data, epochs=2).stop_reason == "at 2"
    assert loop.stopped
    assert loop.fit(loss_fn, data, epochs=2).stop_reason is None
    assert loop.state.step == 6


@pytest.mark.parametrize("end", [{"epochs": 3}, {"steps": 9}])
def test_validate_every(end: Any) -> None:
    at: list[int] = []
    loop = make(At("on_validation_end", lambda s: at.append(s.step)), record := Record())
    loop.fit(loss_fn, train(), val(), validate_every=2, **end)
    assert at == [2, 4, 6, 8]
    assert record.count("on_epoch_end") == 3


def test_validate_every_with_entries_and_skips() -> None:
    """Once at each multiple, also where the run was stopped there or the next update was skipped."""
    at: list[int] = []
    skips = iter([False, False, True, False, True, True, False, False, False, False, False, False])
    loop = make(At("on_validation_end", lambda s: at.append(s.step)),
                At("on_before_optimizer_step", lambda s: s.skip("now") if next(skips) else None))  # fmt: skip
    data = train()
    for steps in (1, 2, 3, 6):
        loop.fit(loss_fn, data, val(), validate_every=2, steps=steps)
    assert at == [2, 4, 6]


def test_validate_every_beside_a_report_of_a_callbacks_own() -> None:
    seen: list[int] = []
    loop = make(At("on_step_end", lambda s: loop.report({"mine": 1.0}) if s.step % 2 == 0 else None),
                At("on_validation_end", lambda s: seen.append(s.step) if "val_loss" in s.reported else None))  # fmt: skip
    loop.fit(loss_fn, train(), val(), validate_every=4, steps=9)
    assert seen == [4, 8]


@pytest.mark.parametrize("names", [("a", "a_b"), ("a_b", "a")])
def test_two_validation_loaders_that_give_one_name_are_an_error(names: tuple[str, str]) -> None:
    def loss(model: nn.Module, batch: Any) -> Any:
        return {**(found := loss_fn(model, batch)), "b_loss": 2 * found["loss"].detach()}

    with pytest.raises(
        ValueError, match=rf"the validation loader '{names[1]}' gives 'val_a_b_loss', and so does one before it"
    ):
        make().evaluate(loss, {name: val() for name in names})


# Errors of the verbs


def test_update_without_a_step() -> None:
    loop = make()
    with pytest.raises(RuntimeError, match=r"loop\.update\(\) without a step.*loop\.steps"):
        loop.update()
    with loop:
        for _ in loop.epochs(1):
            for step in loop.steps(train()):
                one_step(loop, step)
                with pytest.raises(RuntimeError, match=r"loop\.update\(\) without a step"):
                    loop.update()
    assert loop.state.step == 3


@pytest.mark.parametrize("part", [0, 1])
def test_update_before_every_micro_batch_went_backward(part: int) -> None:
    def run() -> None:
        with make(At("on_fit_start", micro_of(4))) as loop:
            for _ in loop.epochs(1):
                for step in loop.steps(train()):
                    for micro in itertools.islice(step, part):
                        with micro:
                            micro.backward(loss_fn)
                    loop.update()

    with pytest.raises(RuntimeError, match=r"loop\.update\(\) before every micro-batch went backward"):
        run()


def in_first_step(act: Any, **kwargs: Any) -> Loop:
    with make(**kwargs) as loop:
        for _ in loop.epochs(1):
            for step in loop.steps(train()):
                act(loop, step)
    return loop


def test_backward_outside_with_micro() -> None:
    def bare(loop: Loop, step: Any) -> None:
        for micro in step:
            micro.backward(loss_fn)

    def after(loop: Loop, step: Any) -> None:
        for micro in step:
            with micro:
                micro.backward(loss_fn)
            micro.backward(loss_fn)

    for act in (bare, after):
        with pytest.raises(RuntimeError, match=r"micro\.backward must run inside `with micro:`"):
            in_first_step(act)


def test_backward_twice() -> None:
    def twice(loop: Loop, step: Any) -> None:
        for micro in step:
            with micro:
                micro.backward(loss_fn)
                micro.backward(loss_fn)

    def entered_twice(loop: Loop, step: Any) -> None:
        for micro in step:
            for _ in range(2):
                with micro:
                    micro.backward(loss_fn)
        loop.update()

    for act in (twice, entered_twice):
        with pytest.raises(RuntimeError, match="once"):
            in_first_step(act)


def test_a_micro_batch_without_backward() -> None:
    def forgets(loop: Loop, step: Any) -> None:
        for micro in step:
            with micro:
                loss_fn(loop.state.model, micro.batch)
        loop.update()

    def never_enters(loop: Loop, step: Any) -> None:
        for _ in step:
            pass
        loop.update()

    for act in (forgets, never_enters, lambda loop, step: list(step)):
        with pytest.raises(RuntimeError, match=r"without micro\.backward"):
            in_first_step(act)


def test_a_step_left_by_break() -> None:
    def run(depth: int) -> None:
        with make() as loop:
            for _ in loop.epochs(1):
                for step in loop.steps(train()):
                    for micro in step:
                        with micro:
                            micro.backward(loss_fn)
                    if depth < 3:
                        break
                if depth == 1:
                    break

    for depth in (1, 2, 3):
        with pytest.raises(RuntimeError, match=r"a step was left before loop\.update\(\)"):
            run(depth)


def test_an_error_of_the_users_is_not_covered_up_by_an_open_step() -> None:
    def fails(loop: Loop, step: Any) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        in_first_step(fails)


def test_steps_outside_epochs() -> None:
    loop = make()
    with pytest.raises(RuntimeError, match=r"loop\.steps must run inside .*loop\.epochs"):
        next(iter(loop.steps(train())))
    with loop, pytest.raises(RuntimeError, match=r"loop\.steps must run inside .*loop\.epochs"):
        next(iter(loop.steps(train())))
    with pytest.raises(RuntimeError, match=r"loop\.epochs must run inside `with loop:`"):
        loop.epochs(1)


def test_an_epoch_without_steps() -> None:
    def empty() -> None:
        with make() as loop:
            for _ in loop.epochs(2):
                pass

    with pytest.raises(RuntimeError, match="an epoch went by without"):
        empty()


def test_two_passes_in_one_epoch() -> None:
    def two() -> None:
        data = train()
        with make() as loop:
            for _ in loop.epochs(2):
                for _ in range(2):
                    for step in loop.steps(data):
                        one_step(loop, step)

    with pytest.raises(RuntimeError, match=r"second loop\.steps"):
        two()


def test_entered_twice() -> None:
    loop = make()
    with loop, pytest.raises(RuntimeError, match="entered already"), loop:
        pass
    with pytest.raises(RuntimeError, match="entered already"), loop:
        loop.fit(loss_fn, train(), epochs=1)
    assert loop.fit(loss_fn, train(), epochs=1).step == 3


@pytest.mark.parametrize("form", FORMS)
def test_no_end_is_an_error(form: Any) -> None:
    with pytest.raises(ValueError, match="epochs= or steps="):
        form(make(), loss_fn, train())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["epochs", "steps"])
@pytest.mark.parametrize("value", [-1, 1.5, "3", True, math.inf])
def test_bad_ends(form: Any, name: str, value: Any) -> None:
    loop = make()
    with pytest.raises((ValueError, TypeError), match=rf"{name} must be a whole number.*{value!r}"):
        form(loop, loss_fn, train(), **{name: value})
    assert loop.state.step == 0


@pytest.mark.parametrize("value", [0, -1, 1.5, "3", True])
def test_bad_validate_every(value: Any) -> None:
    with pytest.raises(ValueError, match=rf"validate_every must be a whole number.*{value!r}"):
        make().fit(loss_fn, train(), epochs=1, validate_every=value)


@pytest.mark.parametrize("value", [0, -3, 2.5, None, True])
def test_bad_max_skips(value: Any) -> None:
    with pytest.raises(ValueError, match=rf"max_skips must be a whole number.*{value!r}"):
        make(max_skips=value)


def test_a_break_between_updates_ends_the_epoch() -> None:
    record, data, seen = Record(), train(), list[int]()
    loop = make(record)
    with loop:
        for epoch in loop.epochs(3):
            for step in loop.steps(data):
                one_step(loop, step)
                if epoch == 1:
                    break
            loop.validate(loss_fn, val())
            seen.append(loop.state.step)
    assert seen == [3, 4, 7]
    assert [record.count(h) for h in ("on_epoch_start", "on_validation_end", "on_epoch_end")] == [3, 3, 3]
    assert loop.state.epoch == 3
    read = data.dataset.read
    assert sorted(read[:20]) == sorted(read[-20:]) == list(range(20))
    assert len(read) == 20 + 8 + 20


@pytest.mark.parametrize("how", ["kept", "islice", "zip"])
def test_a_pass_left_early_in_other_ways_ends_the_epoch_too(how: str) -> None:
    record, data = Record(), train()
    loop = make(record)
    with loop:
        for _ in loop.epochs(2):
            if how == "kept":
                steps = loop.steps(data)
                for step in steps:
                    one_step(loop, step)
                    break
            elif how == "islice":
                for step in itertools.islice(loop.steps(data), 1):
                    one_step(loop, step)
            else:
                for _, step in zip(range(1), loop.steps(data), strict=False):
                    one_step(loop, step)
    assert (loop.state.step, loop.state.epoch, record.count("on_epoch_end")) == (2, 2, 2)


def test_a_break_out_of_epochs_leaves_the_position() -> None:
    loop, data, record = make(record := Record()), train(), record
    with loop:
        for _ in loop.epochs(3):
            for step in loop.steps(data):
                one_step(loop, step)
            break
    assert loop.state.step == 3
    assert loop.fit(loss_fn, data, epochs=2).step == 6
    assert loop.state.epoch == 2
    assert record.count("on_epoch_end") == 2


def test_a_loss_computed_by_the_user() -> None:
    """micro.backward(loss) is micro.backward(loss_fn)."""
    loops = [make(Seed(3), GradientAccumulation(2)) for _ in range(2)]
    built_in(loops[0], loss_fn, train(), epochs=2)
    with loops[1] as loop:
        for _ in loop.epochs(2):
            for step in loop.steps(train()):
                for micro in step:
                    with micro:
                        micro.backward(loss_fn(loop.state.model, micro.batch)["loss"])
                loop.update()
    assert_same_bits(bits(loops[0]), bits(loops[1]))


# Losses


def _losses() -> dict[str, tuple[Any, type[Exception], str]]:
    def of(act: Any) -> Any:
        return lambda model, batch: act(nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none"))

    return {
        "vector": (of(lambda loss: loss), ValueError, r"shape \(8,\).*loss\.mean\(\)"),
        "one element": (of(lambda loss: loss.mean().view(1)), ValueError, r"shape \(1,\)"),
        "none": (lambda model, batch: None, TypeError, "NoneType"),
        "int": (lambda model, batch: 3, TypeError, "int"),
        "item": (of(lambda loss: loss.mean().item()), TypeError, "float"),
        "item in a mapping": (of(lambda loss: {"loss": loss.mean().item()}), TypeError, r"float.*\.item\(\)"),
        "none in a mapping": (lambda model, batch: {"loss": None}, TypeError, "NoneType"),
        "detached": (of(lambda loss: loss.mean().detach()), ValueError, "requires_grad=False"),
        "constant": (lambda model, batch: torch.tensor(1.0), ValueError, "requires_grad=False"),
        "complex": (of(lambda loss: loss.mean() * (1 + 1j)), ValueError, "complex"),
        "without loss": (of(lambda loss: {"losses": loss.mean(), "acc": 1}), ValueError, r"\"loss\".*acc.*losses"),
        "tuple": (of(lambda loss: (loss.mean(), 1)), TypeError, "tuple"),
        "list": (of(lambda loss: [loss.mean()]), TypeError, "list"),
        "long": (of(lambda loss: torch.tensor(3)), ValueError, "requires_grad=False"),
    }


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", _losses())
def test_st1_bad_losses_are_named_before_backward(form: Any, kind: str) -> None:
    loss, error, match = _losses()[kind]
    loop = make()
    with pytest.raises(error, match=match):
        form(loop, loss, loader(16, 8), epochs=1)
    assert all(p.grad is None for p in loop.state.model.parameters())
    assert loop.state.step == 0


def test_st1_bad_losses_given_by_hand() -> None:
    for loss, error in ((None, TypeError), (3.0, TypeError), (torch.zeros(2, requires_grad=True), ValueError)):

        def act(loop: Loop, step: Any, loss: Any = loss) -> None:
            for micro in step:
                with micro:
                    micro.backward(loss)

        with pytest.raises(error, match="loss"):
            in_first_step(act)


@pytest.mark.parametrize("kind", ["vector", "none", "int", "item", "without loss", "tuple", "complex"])
def test_st1_bad_losses_in_evaluation(kind: str) -> None:
    loss, error, match = _losses()[kind]
    with pytest.raises(error, match=match):
        make().evaluate(loss, loader(16, 8))


@pytest.mark.parametrize("weight", [-1, math.nan, math.inf, "3", None, torch.ones(3), torch.tensor(-1)])
def test_st1_bad_weights(weight: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="weigh must return"):
        make(weigh=lambda batch: weight).fit(loss_fn, train(), epochs=1)


# Evaluation


def exact(model: nn.Module, data: Samples) -> tuple[float, float]:
    with torch.no_grad():
        logits = model.eval()(data.x)
    return (float(nn.functional.cross_entropy(logits, data.y)), float((logits.argmax(1) == data.y).double().mean()))


@given(st.integers(1, 40), st.integers(1, 17), st.one_of(st.none(), st.integers(1, 9)))
@settings(max_examples=40, deadline=None)
def test_val_loss_is_the_loss_over_the_whole_set(count: int, size: int, micro: int | None) -> None:
    loop = Loop(model := net(torch.float64), adamw(model))
    loop.state.eval_micro_batch_size = micro
    found = loop.evaluate(loss_fn, loader(count, size, torch.float64, shuffle=False))
    loss, accuracy = exact(model, Samples(count, torch.float64))
    assert found.keys() == {"val_loss", "val_accuracy"}
    assert found["val_loss"] == pytest.approx(loss, rel=1e-12)
    assert found["val_accuracy"] == pytest.approx(accuracy, rel=1e-12)


def test_val_loss_by_tokens() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(9, 5, 6, dtype=torch.float64), torch.randint(0, 3, (9, 5))
    for row in range(9):
        y[row, row % 6 :] = -100
    y[3:6] = -100  # a whole batch without a token takes no part

    def token_loss(model: Any, batch: Any) -> Any:
        return nn.functional.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())

    model = net(torch.float64, noise=False)
    for form in (lambda n: n, float, int, lambda n: n.to(torch.int32)):
        loop = Loop(model, adamw(model), weigh=lambda b, form=form: form((b[1] != -100).sum()))
        found = loop.evaluate(token_loss, [(x[i : i + 3], y[i : i + 3]) for i in range(0, 9, 3)])
        assert found["val_loss"] == pytest.approx(token_loss(model, (x, y)).item(), rel=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_a_mapping_of_loaders(form: Any) -> None:
    reported: list[Any] = []
    loop = Loop(model := net(torch.float64), adamw(model), [At("on_validation_end", lambda s: reported.append(s.metrics))])
    each = {"near": loader(10, 4, torch.float64), "far": loader(7, 3, torch.float64)}
    form(loop, loss_fn, loader(20, 8, torch.float64), each, epochs=1)
    loss, accuracy = exact(model, Samples(7, torch.float64))
    assert {n for n in reported[0] if n.startswith("val")} == {
        "val_near_loss", "val_near_accuracy", "val_far_loss", "val_far_accuracy"}  # fmt: skip
    assert reported[0]["val_far_loss"] == pytest.approx(loss, rel=1e-12)
    assert reported[0]["val_far_accuracy"] == pytest.approx(accuracy, rel=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_without_a_validation_loader_the_mean_train_loss_is_reported(form: Any) -> None:
    """It is the mean over the epoch's samples of the loss that each step saw."""
    steps: list[tuple[float, int, int]] = []
    found: list[float] = []

    class Watch(Callback):
        def on_micro_end(self, state: Any) -> None:
            steps.append((float(state.micro.outputs["loss"]), state.micro.size, state.epoch))

        def on_validation_end(self, state: Any) -> None:
            found.append(state.metrics["train_loss"])

    model = net(torch.float64, noise=False)
    loop = Loop(model, adamw(model), [GradientAccumulation(2), At("on_fit_start", micro_of(3)), Watch()])
    form(loop, loss_fn, loader(701, 5, torch.float64), epochs=2)
    for epoch in range(2):
        mine = [(loss, size) for loss, size, e in steps if e == epoch]
        expected = math.fsum(loss * size for loss, size in mine) / 701
        assert found[epoch] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_single_numbers_of_a_step_are_averaged_by_weight(form: Any) -> None:
    """The metrics of a step don't hang on how it was cut; what is no single number is left out."""

    def run(micro: int | None) -> list[Any]:
        seen: list[Any] = []
        model = net(torch.float64, noise=False)
        loop = Loop(model, torch.optim.SGD(model.parameters(), lr=0.1), [
            At("on_fit_start", micro_of(micro)), At("on_step_end", lambda s: seen.append(dict(s.metrics)))])  # fmt: skip

        def loss(model: Any, batch: Any) -> Any:
            return {**loss_fn(model, batch), "size": 2.5, "name": "text"}

        form(loop, loss, loader(20, 8, torch.float64, shuffle=False), epochs=1)
        return seen

    for whole, cut in zip(run(None), run(3), strict=True):
        assert whole.keys() == cut.keys() == {"loss", "accuracy", "size"}
        for name in whole:
            assert float(whole[name]) == pytest.approx(float(cut[name]), rel=1e-12)


def test_an_output_of_some_micro_batches_only_is_averaged_over_those() -> None:
    seen: list[float] = []
    loop = make(At("on_fit_start", micro_of(4)), At("on_step_end", lambda s: seen.append(float(s.metrics["rare"]))))

    def loss(model: Any, batch: Any) -> Any:
        return {"loss": loss_fn(model, batch)["loss"], **({"rare": 3.0} if 0 in batch[2] else {})}

    loop.fit(loss, loader(8, 8, shuffle=False), epochs=1)
    assert seen == [3.0]
    assert loop.evaluate(loss, loader(8, 4, shuffle=False))["val_rare"] == 3.0


@pytest.mark.parametrize("fails", [False, True])
def test_evaluation_leaves_modes_gradients_and_generators_alone(fails: bool) -> None:
    model = net()
    model[1].eval()  # a norm that the user froze
    model[2].train()
    modes = [m.training for m in model.modules()]
    model[0].weight.requires_grad_(False)
    loop = Loop(model, adamw(model))
    seen: list[bool] = []

    def loss(model: Any, batch: Any) -> Any:
        seen.extend(m.training for m in model.modules())
        assert not torch.is_grad_enabled()
        torch.rand(3)
        if fails and len(seen) > 12:
            raise KeyError("mine")
        return loss_fn(model, batch)

    torch.manual_seed(8)
    state, buffers = torch.get_rng_state(), {k: v.clone() for k, v in model.state_dict().items()}
    if fails:
        with pytest.raises(KeyError, match="mine"):
            loop.evaluate(loss, loader(20, 4))
    else:
        first = loop.evaluate(loss, loader(20, 4))
        assert first == pytest.approx(loop.evaluate(loss, loader(20, 4)))
    assert not any(seen)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(state, torch.get_rng_state())
    assert torch.is_grad_enabled()
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, buffers[k]) for k, v in model.state_dict().items())


def test_evaluation_measures_the_eval_model_if_there_is_one() -> None:
    loop = Loop(model := net(torch.float64), adamw(model))
    loop.state.eval_model = other = net(torch.float64, seed=9)
    found = loop.evaluate(loss_fn, loader(11, 4, torch.float64))
    assert found["val_loss"] == pytest.approx(exact(other, Samples(11, torch.float64))[0], rel=1e-12)
    assert model.training


@pytest.mark.parametrize(("loaders", "match"), [(list, "val loader gave 0 batches"),
                                                (lambda: {"far": []}, "val_far loader gave 0 batches")])  # fmt: skip
def test_an_empty_validation_loader_is_an_error(loaders: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make().evaluate(loss_fn, loaders())


@pytest.mark.parametrize("form", FORMS)
def test_validation_that_weighs_nothing_is_an_error(form: Any) -> None:
    """Also beside a loader that weighs something: nothing is left out of a report without a word."""
    good, masked = next(iter(loader(4, 4))), (torch.randn(4, 6), torch.full((4,), -100), torch.arange(4))
    loop = make(weigh=lambda b: (b[1] != -100).sum())
    with pytest.raises(ValueError, match=r"weights of the val loader's batches sum to 0.* look at weigh= and at the data"):
        loop.evaluate(loss_fn, [masked, masked])
    with pytest.raises(ValueError, match="weights of the val_far loader's batches sum to 0"):
        form(loop, loss_fn, [good], {"near": [good], "far": [masked]}, epochs=1)
    assert not loop.state.reported
    assert loop.evaluate(loss_fn, [masked, good]) == loop.evaluate(loss_fn, [good])


def test_a_model_in_eval_mode_is_put_into_train_mode_and_frozen_parts_stay() -> None:
    modes: list[list[bool]] = []
    watch = At("on_step_end", lambda s: modes.append([m.training for m in s.model]))
    model = net()
    model.eval()
    Loop(model, adamw(model), [watch]).fit(loss_fn, loader(20, 10), val(), epochs=1)
    assert modes == [[True] * 5] * 2
    modes.clear()
    model = net()
    model[1].eval()
    watch = At("on_step_end", lambda s: modes.append([m.training for m in s.model]))
    Loop(model, adamw(model), [watch]).fit(loss_fn, loader(20, 10), val(), epochs=2)
    assert modes == [[True, False, True, True, True]] * 4


# Metrics, report, log


@contextlib.contextmanager
def begun(loop: Loop) -> Any:
    """A Loop that has made one update, so that its callbacks have started."""
    with loop:
        for _ in loop.epochs(1):
            for step in loop.steps(train()):
                for micro in step:
                    with micro:
                        micro.backward(loss_fn)
                loop.update()
                loop.state.metrics.clear()
                yield loop
                break


def test_report_before_anything_has_started_is_an_error() -> None:
    with make() as loop, pytest.raises(RuntimeError, match=r"loop\.report before the first loop\.steps"):
        loop.report({"a": 1.0})


def test_report_puts_floats_and_replaces_what_it_reported_before() -> None:
    loop = make(record := Record())
    with begun(loop):
        loop.report({"a": torch.tensor(1.5), "b": 2})
        assert loop.state.metrics == {"a": 1.5, "b": 2.0}
        assert all(type(v) is float for v in loop.state.metrics.values())
        loop.report({"b": torch.tensor([3.0])})
        assert loop.state.metrics == {"b": 3.0}
    assert record.count("on_validation_end") == 2


@pytest.mark.parametrize("value", [torch.zeros(2), "0.5", None, [1.0], torch.tensor(1j), {"a": 1.0}])
def test_es3_report_of_what_is_no_number_is_an_error(value: Any) -> None:
    loop = make(record := Record())
    with begun(loop), pytest.raises(TypeError, match="'score' must be one number"):
        loop.report({"score": value})
    assert record.count("on_validation_end") == 0


@pytest.mark.parametrize("value", [torch.tensor(1.0), torch.tensor(1), torch.tensor([[1.0]]), True, 1, Fraction(1), np.int64(1),
                                   torch.tensor(1.0, requires_grad=True)])  # fmt: skip
def test_es3_report_of_a_number_of_another_kind(value: Any) -> None:
    with begun(make()) as loop:
        loop.report({"score": value})
    assert loop.state.metrics == {"score": 1.0}
    assert type(loop.state.metrics["score"]) is float


def test_log_numbers_and_functions() -> None:
    asked: list[int] = []
    seen: list[Any] = []

    class Logs(Callback):
        def on_step_end(self, state: Any) -> None:
            state.log("now", state.step * 10)
            state.log("tensor", torch.tensor(float(state.step)))
            state.log("later", lambda: asked.append(state.step) or 7)
            assert state.metrics["now"] == state.step * 10
            assert "later" not in state.metrics or asked

        def on_validation_end(self, state: Any) -> None:
            seen.append(dict(state.metrics))

    make(Logs()).fit(loss_fn, train(), val(), epochs=2)
    assert asked == [3, 6]
    assert [(m["now"], float(m["tensor"]), m["later"]) for m in seen] == [(30, 3.0, 7.0), (60, 6.0, 7.0)]


NUMBERS = {"double": (np.float64(0.5), 0.5), "single": (np.float32(0.25), 0.25), "whole": (np.int64(3), 3),
           "half": (np.float16(2.0), 2.0), "fraction": (Fraction(1, 4), 0.25)}  # fmt: skip
OTHERS = {"flag": True, "numpy's flag": np.bool_(True), "complex": 1j, "array": np.ones(2)}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("micro", [None, 3])
def test_numbers_that_are_not_pythons_own_are_averaged_and_logged_as_those_that_are(
    form: Any, micro: int | None, tmp_path: Path
) -> None:
    class Logs(Callback):
        def on_step_end(self, state: Any) -> None:
            for name, (value, _) in NUMBERS.items():
                state.log(f"my {name}", value)
            seen.append({name: state.metrics[name] for name in (*expected, *mine)})

        def on_micro_end(self, state: Any) -> None:
            if not state.micro.training:
                state.log("logged", np.float32(0.5))

    def loss(model: Any, batch: Any) -> Any:
        return {**loss_fn(model, batch), **{name: value for name, (value, _) in NUMBERS.items()}, **OTHERS}

    expected, seen = {name: value for name, (_, value) in NUMBERS.items()}, list[Any]()
    mine = {f"my {name}": value for name, value in expected.items()}
    loop = make(At("on_fit_start", micro_of(micro)), Logs(), Checkpoint(tmp_path, every=1))
    form(loop, loss, loader(20, 8), loader(20, 8), epochs=1)
    assert seen == [expected | mine] * 3
    assert {type(value) for each in seen for value in each.values()} == {float, int}
    assert {k: loop.state.metrics[k] for k in loop.state.metrics if k.startswith("val_")}.items() >= (
        {f"val_{name}": value for name, value in expected.items()} | {"val_logged": 0.5}).items()  # fmt: skip
    assert not {name for name in loop.state.metrics if name.removeprefix("val_") in OTHERS}
    assert type(mine["my whole"]) is type(loop.state.metrics["my whole"]) is int


@pytest.mark.parametrize("value", [np.ones(2), np.bool_(True), 1j, "1"])
def test_log_of_what_is_no_number_is_an_error(value: Any) -> None:
    with pytest.raises(TypeError, match=r"log\('x'\) takes a number"):
        make().state.log("x", value)


def test_log_in_evaluation_is_a_metric_of_that_loader() -> None:
    """It is reported behind the loader's prefix, and leaves what training logged under that name alone."""

    class Logs(Callback):
        def __init__(self) -> None:
            self.count = 0

        def on_micro_end(self, state: Any) -> None:
            self.count += 1
            if state.micro.training:
                state.log("score", 1.0)
            else:
                state.log("score", 5.0)
                state.log("lazy", lambda: 9.0)

    loop = make(Logs())
    loop.fit(loss_fn, train(), {"a": val(), "b": val()}, epochs=1)
    metrics = loop.state.metrics
    assert (metrics["val_a_score"], metrics["val_b_score"], metrics["val_a_lazy"]) == (5.0, 5.0, 9.0)
    assert metrics["score"] == 1.0
    assert "lazy" not in metrics


class Looks(Callback):
    """Evaluates for each micro-batch that went through, or failed, and redoes what failed."""

    def __init__(self, loss: Any) -> None:
        self.loss = loss

    def look(self, state: State) -> None:
        assert state.micro is not None
        if state.micro.training:
            with contextlib.suppress(KeyError):
                self._loop().evaluate(self.loss, val())

    def on_micro_end(self, state: State) -> None:
        self.look(state)

    def on_exception(self, state: State) -> bool:
        self.look(state)
        return isinstance(state.exception, ArithmeticError)


class Sees(Callback):
    def __init__(self) -> None:
        self.ended, self.failed = list[Any](), list[Any]()

    def on_micro_end(self, state: State) -> None:
        self.ended.append(state.micro and (state.micro.training, state.micro.number))

    def on_exception(self, state: State) -> None:
        self.failed.append((state.micro and state.micro.training, str(state.exception)))


@pytest.mark.parametrize("fails", [None, ArithmeticError, KeyError])
def test_a_hook_may_evaluate_and_those_behind_it_see_what_they_would_have_seen(fails: Any) -> None:
    calls = dict.fromkeys(("training", "evaluation"), 0)

    def faulty(kind: str, at: int, error: Any) -> Any:
        def loss(model: Any, batch: Any) -> Any:
            calls[kind] += 1
            if error is not None and calls[kind] == at:
                raise error(kind)
            return loss_fn(model, batch)

        return loss

    looks, sees = Looks(faulty("evaluation", 2, fails)), Sees()
    loop = make(looks, sees, At("on_fit_start", micro_of(4)))
    loop.fit(faulty("training", 2, ArithmeticError), loader(16, 8), epochs=1)
    assert [micro for micro in sees.ended if micro is None or micro[0]] == [
        (True, 0), (True, 0), (True, 1), (True, 0), (True, 1)]  # fmt: skip
    assert sees.failed == ([(False, str(fails("evaluation")))] if fails else []) + [(True, "training")]
    assert loop.state.micro is loop.state.exception is None


def test_numbers_that_the_program_fills_anew_are_averaged_as_they_were() -> None:
    """As the static outputs of a CUDA graph of the user's own are."""
    model, held = nn.Linear(1, 1), torch.zeros((), dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    data = [torch.full((1, 1), float(i)) for i in range(1, 5)]

    def loss(model: nn.Module, batch: Any) -> Any:
        held.copy_(batch.sum())
        return {"loss": model(batch).sum() if model.training else held, "held": held}

    state = Loop(model, optimizer, [GradientAccumulation(4)]).fit(loss, data, data, epochs=1)
    assert {name: float(state.metrics[name]) for name in ("held", "val_held", "val_loss")} == {
        "held": 2.5, "val_held": 2.5, "val_loss": 2.5
    }  # fmt: skip
    with Loop(model, optimizer) as loop:
        for batch in data:
            held.copy_(batch.sum())
            with loop.updating(loss=held, samples=1):
                optimizer.step()
        assert float(loop.train_loss.value()) == 2.5


def test_metrics_of_a_step_stay_tensors_and_do_not_grow() -> None:
    loop = make()
    loop.fit(loss_fn, train(), val(), epochs=3)
    assert set(loop.state.metrics) == {"loss", "accuracy", "val_loss", "val_accuracy"}
    assert isinstance(loop.state.metrics["loss"], Tensor)
    assert not loop.state.metrics["loss"].requires_grad


# Rates


def test_several_parameter_groups() -> None:
    model = net(noise=False)
    base = [0.1, 0.02]
    optimizer = torch.optim.SGD([{"params": model[0].parameters(), "lr": base[0]},
                                 {"params": model[2].parameters(), "lr": base[1]}])  # fmt: skip
    rates: list[Any] = []

    class Halves(Callback):
        def on_before_optimizer_step(self, state: Any) -> None:
            state.scale_rate(0.5, group=1)
            state.scale_rate(0.25, group=state.optimizer.param_groups[0])

    loop = Loop(model, optimizer, [Warmup(4), Halves(), At("on_step_end", lambda s: rates.append(list(s.rates)))])
    loop.fit(loss_fn, train(), epochs=2)
    for step, found in enumerate(rates):
        factor = min(1.0, (step + 1) / 4)
        assert found == pytest.approx([base[0] * factor * 0.25, base[1] * factor * 0.5], rel=1e-15)
    assert [group["lr"] for group in optimizer.param_groups] == base


def test_a_tensor_rate_is_filled_in_place_and_put_back() -> None:
    model = net(noise=False)
    rate = torch.tensor(0.1, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    assert optimizer.param_groups[0]["lr"] is rate
    used: list[Any] = []
    seen: list[float] = []
    optimizer.register_step_pre_hook(lambda o, *_: seen.append(float(o.param_groups[0]["lr"])))
    loop = Loop(model, optimizer, [Warmup(4), At("on_step_end", lambda s: used.append(s.rates))])
    loop.fit(loss_fn, train(), epochs=2)
    assert optimizer.param_groups[0]["lr"] is rate
    assert float(rate) == 0.1
    expected = [0.1 * min(1.0, (t + 1) / 4) for t in range(6)]
    assert seen == pytest.approx(expected, rel=1e-15)
    assert [float(r[0]) for r in used] == pytest.approx(expected, rel=1e-15)


def test_rates_of_the_last_update_stay_what_they_were() -> None:
    """state.rates keeps what was used, also where the rate is a tensor that a scheduler fills later."""
    model = net(noise=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.1))
    loop = Loop(model, optimizer)
    loop.fit(loss_fn, train(), epochs=1)
    optimizer.param_groups[0]["lr"].fill_(0.05)
    assert float(loop.state.rates[0]) == pytest.approx(0.1)


def test_the_users_scheduler_never_meets_a_factor() -> None:
    model = net(noise=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    rates: list[float] = []
    loop = Loop(model, optimizer, [Warmup(4), At("on_step_end", lambda s: rates.append(s.rates[0]) or scheduler.step())])
    loop.fit(loss_fn, train(), epochs=2)
    assert rates == pytest.approx([0.1 * 0.9**t * min(1.0, (t + 1) / 4) for t in range(6)], rel=1e-12)


@pytest.mark.parametrize("factor", [-0.1, math.nan, math.inf])
def test_bad_rate_factors(factor: float) -> None:
    model = net()
    with pytest.raises(ValueError, match="scale_rate: factor must be finite"):
        State(model, adamw(model)).scale_rate(factor)


def test_an_error_leaves_the_rate_and_no_factor_behind() -> None:
    """A Loop that is entered again after an error in an update goes on with that update's rate, not its square."""
    for hook in ("on_before_optimizer_step", "optimizer"):
        fails = [True]

        def fail(*args: Any, fails: list[bool] = fails) -> None:
            if fails:
                fails.clear()
                raise KeyError("mine")

        model, rates = net(noise=False), []
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        callbacks = [Warmup(8), ClipGradients(0.01), At("on_step_end", lambda s, rates=rates: rates.append(s.rates[0]))]
        if hook == "optimizer":
            optimizer.register_step_pre_hook(fail)
        else:
            callbacks.append(At(hook, fail))
        loop, data = Loop(model, optimizer, callbacks), train()
        with pytest.raises(KeyError, match="mine"):
            loop.fit(loss_fn, data, epochs=1)
        assert optimizer.param_groups[0]["lr"] == 0.1
        if hook == "optimizer":  # which may have changed some weights and not others
            with pytest.raises(RuntimeError, match="half updated"):
                loop.fit(loss_fn, data, steps=3)
            continue
        loop.fit(loss_fn, data, steps=3)
        assert rates == pytest.approx([0.1 * (t + 1) / 8 for t in range(3)], rel=1e-12)


# Skips and saves


@pytest.mark.parametrize("form", FORMS)
def test_a_skipped_update_calls_nothing_and_changes_nothing(form: Any) -> None:
    skip_at = {1, 4, 5}
    rates: list[float] = []
    tried: list[int] = []
    frozen: list[Any] = []
    record = Record()

    def maybe(state: State) -> None:
        if len(tried) in skip_at:
            state.skip(f"try {len(tried)}")
            frozen.append(bits(loop))
        tried.append(state.step)

    def check(state: State) -> None:
        if frozen:
            assert_same_bits(frozen.pop(), bits(loop))

    loop = make(At("on_before_optimizer_step", maybe), record, At("on_step_start", check), Warmup(8),
                At("on_step_end", lambda s: rates.append(s.rates[0])))  # fmt: skip
    state = form(loop, loss_fn, train(), epochs=3)
    assert (state.step, state.skipped, state.epoch, state.samples) == (6, 3, 3, 60)
    assert tried == [0, 1, 1, 2, 3, 3, 3, 4, 5]
    assert record.count("on_step_end") == 6
    assert rates == pytest.approx([0.01 * (t + 1) / 8 for t in range(6)], rel=1e-12)


def test_the_skip_reason_stands_until_the_next_update() -> None:
    reasons: list[Any] = []
    tries = itertools.count()
    loop = make(At("on_before_optimizer_step", lambda s: s.skip("mine") if next(tries) in (0, 1) else None),
                At("on_step_start", lambda s: reasons.append(s.skip_reason)),
                At("on_step_end", lambda s: reasons.append(("end", s.skip_reason))))  # fmt: skip
    loop.fit(loss_fn, train(), epochs=1)
    assert reasons == [None, "mine", "mine", ("end", None)]
    assert loop.state.skip_reason is None


@pytest.mark.parametrize("form", FORMS)
def test_max_skips_in_a_row_end_the_run(form: Any) -> None:
    tries = itertools.count()
    loop = make(At("on_before_optimizer_step", lambda s: s.skip("mine") if next(tries) not in (2,) else None),
                record := Record(), max_skips=3)  # fmt: skip
    with pytest.raises(RuntimeError, match=r"3 updates in a row were skipped \(max_skips=3\).*mine"):
        form(loop, loss_fn, train(), epochs=9)
    assert (loop.state.step, loop.state.skipped) == (1, 5)
    assert record.count("on_fit_end") == 1


@pytest.mark.parametrize("form", FORMS)
def test_a_step_that_weighs_nothing_is_skipped(form: Any) -> None:
    data = [(torch.randn(4, 6), torch.full((4,), -100), torch.arange(4)) for _ in range(2)]
    data.insert(1, (torch.randn(4, 6), torch.tensor([0, -100, 2, 1]), torch.arange(4)))
    loop = make(weigh=lambda b: (b[1] != -100).sum())
    state = form(loop, lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1]), data, epochs=1)
    assert (state.step, state.skipped) == (1, 2)
    assert "weights" in (state.skip_reason or "")


def test_save_without_a_checkpoint_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"state\.save\('mine'\).*Checkpoint"):
        make(At("on_step_end", lambda s: s.save("mine"))).fit(loss_fn, train(), epochs=1)


# Around a loop of the user's own


def steps_of(data: list[Any], model: nn.Module, optimizer: Any, loop: Loop | None, warm: int = 0, clip: float = 0) -> None:
    """A loop as people write it; with a Loop around the update, or with warmup and clipping written out."""
    import contextlib

    for x, y, _ in data:
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        if loop is None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
            rate = optimizer.param_groups[0]["lr"]
            optimizer.param_groups[0]["lr"] = rate * min(1.0, (len(optimizer.done) + 1) / warm)
        with contextlib.nullcontext() if loop is None else loop.updating(loss=loss.detach(), samples=len(x)):
            optimizer.step()
        if loop is None:
            optimizer.param_groups[0]["lr"] = rate
            optimizer.done.append(1)
        optimizer.zero_grad()
        if loop is not None and loop.stopped:
            break


@pytest.mark.parametrize("kind", [torch.optim.AdamW, functools.partial(torch.optim.SGD, momentum=0.9)])
def test_around_by_hand_and_written_out_give_the_same_bits(kind: Any) -> None:
    data = list(loader(50, 8, shuffle=False)) * 3
    found = []
    for form in ("written out", "around", "by hand", "built in"):
        model = net(noise=False)
        optimizer = kind(model.parameters(), lr=0.05)
        loop = Loop(model, optimizer, [] if form == "written out" else [Warmup(10), ClipGradients(0.3)])
        if form == "written out":
            optimizer.done = []
            steps_of(data, model, optimizer, None, 10, 0.3)
        elif form == "around":
            with loop:
                steps_of(data, model, optimizer, loop)
            assert (loop.state.step, loop.state.samples) == (21, 150)
        else:
            (by_hand if form == "by hand" else built_in)(loop, loss_fn, data, epochs=1)
        found.append(bits(loop))
    for other in found[1:]:
        assert_same_bits(found[0], other)


def test_around_runs_its_hooks_and_stops() -> None:
    data = list(loader(50, 8))
    around = set(HOOKS) - {"on_epoch_start", "on_step_start", "on_exception", "on_epoch_end"}
    record = type("Around", (Callback,), {hook: getattr(Record, hook) for hook in around})()
    record.seen = []
    told: list[Any] = []
    loop = make(record, StopAt(3), At("on_fit_start", lambda s: told.append((s.loader, s.total_steps))))
    with loop:
        steps_of(data, loop.state.model, loop.state.optimizer, loop)
        loop.report({"score": 1.0})
    assert loop.state.step == 3
    assert record.seen == ["on_setup", "on_fit_start", *["on_before_optimizer_step", "on_step_end"] * 3,
                           "on_validation_end", "on_fit_end"]  # fmt: skip
    assert told == [(None, None)]


def test_around_validates_with_the_loops_own_verbs() -> None:
    loop = make(ClipGradients(1.0))
    with loop:
        steps_of(list(loader(20, 8)), loop.state.model, loop.state.optimizer, loop)
        loop.validate(loss_fn, val())
        assert "val_loss" in loop.state.metrics
        loop.validate(loss_fn)
        assert math.isfinite(loop.state.metrics["train_loss"])


def test_around_refuses_by_name_what_shapes_the_step() -> None:
    for callback, hook in ((GradientAccumulation(2), "on_step_start"), (Record(), "on_epoch_end"),
                           (At("on_epoch_start", lambda s: None), "on_epoch_start")):  # fmt: skip
        loop = make(Warmup(3), callback)
        before = bits(loop)
        with pytest.raises(ValueError, match=rf"{type(callback).__name__} needs .*{hook}.*loop\.fit"), loop:
            steps_of(list(loader(20, 8)), loop.state.model, loop.state.optimizer, loop)
        assert_same_bits(before, bits(loop))


def test_around_skips_take_the_gradients_away() -> None:
    tries = itertools.count()
    loop = make(At("on_before_optimizer_step", lambda s: s.skip("mine") if next(tries) == 1 else None), max_skips=2)
    model, optimizer = loop.state.model, loop.state.optimizer
    before = None
    with loop:
        for x, y, _ in loader(20, 8):
            nn.functional.cross_entropy(model(x), y).backward()
            now = bits(loop)
            with loop.updating():
                optimizer.step()
            optimizer.zero_grad()
            if loop.state.skipped and before is None:
                before = now
                assert_same_bits(now, bits(loop))
    assert (loop.state.step, loop.state.skipped) == (2, 1)
    assert before is not None


def test_around_after_a_fit_knows_no_loader_and_no_end() -> None:
    told: list[Any] = []
    loop = make(At("on_fit_start", lambda s: told.append((s.loader is None, s.total_steps))))
    loop.fit(loss_fn, train(), epochs=1)
    with loop:
        steps_of(list(loader(20, 8)), loop.state.model, loop.state.optimizer, loop)
    assert told == [(False, 3), (True, None)]
    assert loop.state.step == 6


def test_around_outside_with_loop() -> None:
    loop = make()
    with pytest.raises(RuntimeError, match="with loop"), loop.updating():
        pass


def test_around_an_error_in_the_body_puts_the_rate_back() -> None:
    loop = make(Warmup(10))
    optimizer = loop.state.optimizer

    def run() -> None:
        with loop, loop.updating():
            assert optimizer.param_groups[0]["lr"] == pytest.approx(0.001)
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        run()
    assert optimizer.param_groups[0]["lr"] == 0.01
    assert loop.state.step == 0


def test_around_each_report_is_of_the_losses_since_the_last() -> None:
    reported: list[float] = []
    loop = make(At("on_validation_end", lambda s: reported.append(s.metrics["train_loss"])))
    with loop:
        for epoch in range(3):
            for i in range(4):
                loss_fn(loop.state.model, next(iter(train())))["loss"].backward()
                with loop.updating(loss=float(10 * epoch + i), samples=8):
                    loop.state.optimizer.step()
            loop.validate(loss_fn)
    assert reported == [1.5, 11.5, 21.5]


def test_around_a_scheduler_inside_is_an_error_where_rates_hold_factors() -> None:
    """It would be put back, without a word, with the factors; with none it may stand where it likes."""
    for callbacks in ((), (Warmup(5),)):
        loop = make(*callbacks)
        optimizer = loop.state.optimizer
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)

        def run(loop: Loop = loop, optimizer: Any = optimizer, scheduler: Any = scheduler) -> None:
            with loop:
                for x, y, _ in train():
                    nn.functional.cross_entropy(loop.state.model(x), y).backward()
                    with loop.updating():
                        optimizer.step()
                        scheduler.step()

        if callbacks:
            with pytest.raises(
                RuntimeError, match=r"rate was changed from 0\.002 to 0\.\d+ inside.*scheduler\.step\(\) after it"
            ):
                run()
        else:
            run()
            assert optimizer.param_groups[0]["lr"] == 0.01 / 2 ** len(train())


def test_around_an_update_without_an_optimizers_step_is_told_once() -> None:
    loop = make()

    def run() -> None:
        with loop:
            for _ in range(3):
                with loop.updating():
                    pass

    with pytest.warns(UserWarning, match=r"made no step inside `with loop\.updating") as told:
        run()
    assert len(told) == 1


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # torch's own, in compiling
@pytest.mark.parametrize("how", ["written out", "compiled"])
def test_around_a_step_of_another_making_is_seen(how: str) -> None:
    model = net(noise=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    compiled = torch.compile(optimizer.step, backend="eager") if how == "compiled" else None
    with Loop(model, optimizer) as loop:
        for batch in loader(20, 8):
            loss_fn(model, batch)["loss"].backward()
            with loop.updating():  # which warns where it sees none, and warnings are errors here
                if compiled is not None:
                    compiled()
                else:
                    with torch.no_grad():
                        for p in model.parameters():
                            p.sub_(p.grad, alpha=0.1)
            optimizer.zero_grad()
    assert loop.state.step == 3


def test_around_a_resumed_run_says_that_it_does_not_know_its_place(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for resume in (None, tmp_path):
        model = net(noise=False)
        loop = Loop(model, adamw(model), [Checkpoint(tmp_path, every=1)], resume=resume)
        for _ in range(2):
            with loop:
                steps_of(list(loader(20, 8)), model, loop.state.optimizer, loop)
        said = [line for line in caplog.messages if "resumed after 6 updates" in line and "yours to find" in line]
        assert len(said) == (resume is not None)


# Two Loops


def test_two_loops_around_one_body() -> None:
    """A GAN's two optimizers: each Loop counts, warms up and clips its own."""
    torch.manual_seed(0)
    one, two = nn.Linear(2, 2), nn.Linear(2, 1)
    a = Loop(one, torch.optim.SGD(one.parameters(), lr=0.1), [Warmup(4)])
    b = Loop(two, torch.optim.SGD(two.parameters(), lr=0.1), [Warmup(2), ClipGradients(0.1), StopAt(3)])
    with a, b:
        for step in range(6):
            for loop, sign in ((a, 1.0), (b, -1.0)):
                if loop is b and step % 2:
                    continue
                a.state.optimizer.zero_grad()
                b.state.optimizer.zero_grad()
                (sign * two(one(torch.randn(4, 2))).mean()).backward()
                with loop.updating():
                    loop.state.optimizer.step()
    assert (a.state.step, b.state.step) == (6, 3)
    assert b.stopped
    assert not a.stopped
    assert a.state.rates == [0.1]


def test_two_loops_by_hand_in_one_body() -> None:
    """Interleaved step by step, each trains what it trains alone."""
    loops = [make(Seed(s), Warmup(3), GradientAccumulation(2)) for s in (1, 2)]
    alone = [make(Seed(s), Warmup(3), GradientAccumulation(2)) for s in (1, 2)]
    for loop in alone:
        loop.fit(loss_fn, loader(40, 8), epochs=2)
    data = [loader(40, 8), loader(40, 8)]
    with loops[0], loops[1]:
        for _ in zip(*(loop.epochs(2) for loop in loops), strict=True):
            for pair in zip(*(loop.steps(d) for loop, d in zip(loops, data, strict=True)), strict=True):
                for loop, step in zip(loops, pair, strict=True):
                    one_step(loop, step)
    for mine, expected in zip(loops, alone, strict=True):
        assert mine.state.epoch == 2
        assert_same_bits(bits(mine), bits(expected))


# What a Loop is built from


def test_op7_lbfgs_is_refused_by_name() -> None:
    model = net()
    with pytest.raises(TypeError, match=r"LBFGS needs a closure.*take another"):
        Loop(model, torch.optim.LBFGS(model.parameters()))


def test_op6_what_is_no_optimizer_is_refused() -> None:
    model = net()
    good = adamw(model)
    for bad, match in (
        ([good, adamw(model)], "a list; one Loop has one optimizer"),
        ((good,), "one Loop has one optimizer"),
        (torch.optim.AdamW, "AdamW.*with its parameters"),
        (functools.partial(torch.optim.SGD, lr=0.1), "partial.*with its parameters"),
        (None, "must be a torch optimizer, not None"),
        ("adamw", "must be a torch optimizer, not 'adamw'"),
        (torch.optim.lr_scheduler.ExponentialLR(good, 0.9), "must be a torch optimizer"),
    ):
        with pytest.raises(TypeError, match=match):
            Loop(model, bad)


class Relative(torch.optim.Optimizer):
    """Sets its rates by itself, as transformers' Adafactor(lr=None, relative_step=True) does."""

    def __init__(self, params: Any, **settings: Any) -> None:
        super().__init__(params, {"lr": None, "weight_decay": 0.0, **settings})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in [p for group in self.param_groups for p in group["params"]]:
            steps = self.state[p]["step"] = self.state[p].get("step", 0) + 1
            p.sub_(p.grad, alpha=0.1 * steps**-0.5)


def test_an_optimizer_that_sets_its_rates_by_itself_trains_beside_all_that_watch(tmp_path: Path) -> None:
    def go(folder: Path, epochs: int) -> Any:
        model = net(noise=False)
        own = [
            TensorBoard(folder / "curves", every=1),
            Diagnose(),
            Progress(),
            NonFinite("rollback", factor=1.0),
            ClipGradients(1.0),
        ]
        own += [WeightDecay(default=0.1), DecaySchedule("linear", steps=5), Checkpoint(folder)]
        loop = Loop(model, Relative(model.parameters()), own, resume=folder)
        return loop.fit(loss_fn, train(), loader(), epochs=epochs), bits(loop)

    go(tmp_path / "a", 1)
    state, found = go(tmp_path / "a", 2)
    assert (state.step, state.rates) == (6, [None, None])
    assert_same_bits(found, go(tmp_path / "b", 2)[1])
    model = net()
    shown = preview([WeightDecay(default=0.1)], train(), epochs=1, optimizer=Relative(model.parameters()), model=model)
    assert shown.rates is None
    assert "Relative sets its rates by itself" in str(shown)


@pytest.mark.parametrize("scales", [
    lambda: Warmup(4), lambda: Schedule("cosine"), lambda: LayerwiseRate(0.5), lambda: NonFinite("rollback"),
    lambda: DecaySchedule("rate"), lambda: SwitchOptimizer(lambda groups: torch.optim.SGD(groups, lr=0.1), at=2),
])  # fmt: skip
def test_what_scales_rates_refuses_an_optimizer_that_sets_them_by_itself(scales: Any) -> None:
    model = net(noise=False)
    with pytest.raises(ValueError, match=r"Relative sets its rates by itself \(lr=None\).*lr=1e-3, relative_step=False"):
        Loop(model, Relative(model.parameters(), weight_decay=0.1), [scales()]).fit(loss_fn, train(), epochs=2)


def test_rates_are_asked_for_by_name() -> None:
    model = net()
    optimizer = Relative(model.parameters())
    del optimizer.param_groups[0]["lr"]
    with pytest.raises(
        ValueError, match=r"Relative has parameter groups without 'lr'; give them one .*None if it sets its rates"
    ):
        Loop(model, optimizer)


class Inherits(torch.optim.Optimizer):
    """Wraps another optimizer without torch's set-up, as accelerate's does."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner

    param_groups = property(lambda self: self.inner.param_groups)  # type: ignore[assignment]
    state = property(lambda self: self.inner.state)  # type: ignore[assignment]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.inner.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)


class Passes(Inherits):
    """And passes on its state."""

    def state_dict(self) -> Any:
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: Any) -> None:
        self.inner.load_state_dict(state_dict)


def test_a_wrapper_without_torchs_set_up_is_as_what_it_wraps_or_refused(tmp_path: Path) -> None:
    def go(wrapped: Any, epochs: int, *own: Callback, **more: Any) -> Any:
        model = net(noise=False)
        loop = Loop(model, wrapped(adamw(model)), [Warmup(4), NonFinite("rollback"), *own], **more)
        loop.fit(loss_fn, train(), epochs=epochs)
        return bits(loop)

    go(Passes, 1, Checkpoint(tmp_path))
    assert_same_bits(go(Passes, 2), go(lambda optimizer: optimizer, 2))
    assert_same_bits(go(Passes, 2, Checkpoint(tmp_path), resume=tmp_path), go(lambda optimizer: optimizer, 2))
    with pytest.raises(TypeError, match=r"Inherits can't tell its state.*call super\(\)\.__init__ there"):
        go(Inherits, 1)


def test_an_optimizer_of_the_users_own() -> None:
    class Sign(torch.optim.Optimizer):
        def __init__(self, params: Any, lr: float) -> None:
            super().__init__(params, {"lr": lr})

        @torch.no_grad()
        def step(self) -> None:  # type: ignore[override]
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(p.grad.sign(), alpha=group["lr"])

    model = net()
    loop = Loop(model, Sign(model.parameters(), 1e-3), [Warmup(4), ClipGradients(1.0)])
    assert loop.fit(loss_fn, train(), epochs=1).step == 3


@pytest.mark.parametrize("kind", ["Adam", "Adagrad", "RMSprop", "Rprop", "ASGD", "Adadelta", "NAdam", "RAdam", "Adamax"])
def test_torchs_optimizers_train(kind: str) -> None:
    model = net(noise=False)
    loop = Loop(model, getattr(torch.optim, kind)(model.parameters(), lr=1e-3), [Warmup(4)])
    assert loop.fit(loss_fn, train(), epochs=1).step == 3


@pytest.mark.parametrize("model", [None, nn.Linear, lambda x: x])
def test_what_is_no_model_is_refused(model: Any) -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        Loop(model, adamw(net()))


def test_cb3_hooks_that_would_never_run() -> None:
    for name, near in (("on_train_stepend", "on_step_end"), ("on_epoch_ends", "on_epoch_end"), ("on_stepend", "on_step_end"),
                       ("on_before_optimiser_step", "on_before_optimizer_step"), ("on_fit_begin", "on_fit_")):  # fmt: skip
        wrong = type("Wrong", (Callback,), {name: lambda self, state: None})
        with pytest.raises(TypeError, match=rf"Wrong\.{name} is no hook.*{near}"):
            make(wrong())


def test_cb3_wrong_signatures() -> None:
    for method, name in ((lambda self: None, "on_step_end"), (lambda self, state, loss: None, "on_step_end"),
                         (lambda self, *, state: None, "on_fit_end"), (lambda self: None, "on_exception")):  # fmt: skip
        wrong = type("Wrong", (Callback,), {name: method})
        with pytest.raises(TypeError, match=rf"Wrong\.{name} must take one argument, state"):
            make(wrong())
    for method in (lambda self, state, more=1: None, lambda self, *args: None, lambda *args, **kwargs: None):
        make(type("Right", (Callback,), {"on_step_end": method})())


def test_cb3_state_that_is_saved_and_not_taken_back_is_refused() -> None:
    half = {"state_dict": lambda self: {"n": 1}, "load_state_dict": lambda self, state: None}
    for name, lacks in (("state_dict", "load_state_dict"), ("load_state_dict", "state_dict")):
        with pytest.raises(TypeError, match=rf"Half overrides one of state_dict and load_state_dict alone.*write {lacks} too"):
            make(type("Half", (Callback,), {name: half[name]})())
        make(type("Inherits", (type("Whole", (Callback,), half),), {name: half[name]})())


def test_cb4_what_is_no_callback_instance() -> None:
    with pytest.raises(TypeError, match=r"no Callback instance; write GradientAccumulation\(\.\.\.\)"):
        make(GradientAccumulation)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="no Callback instance"):
        make(print)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="no Callback instance"):
        make(None)  # type: ignore[arg-type]


def test_cb4_the_same_instance_twice() -> None:
    warmup = Warmup(3)
    with pytest.raises(ValueError, match="the same Warmup stands in callbacks twice"):
        make(warmup, Record(), warmup)
    with pytest.raises(ValueError, match="the same Warmup stands in callbacks twice"):
        make(warmup, warmup.named("second"))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_hooks_set_on_the_instance_run_the_copy(copied: Any) -> None:
    class Slotted(MicroBatch):
        __slots__ = ("seen",)

    auto = Slotted("auto")
    auto.seen = 3
    other = copied(auto)
    assert other.on_step_start.__self__ is other.on_exception.__self__ is other
    assert (other.seen, other.auto, auto.on_step_start.__self__) == (3, True, auto)


def test_cb4_two_of_one_class_need_names() -> None:
    with pytest.raises(ValueError, match=r"two callbacks have the key 'Warmup'.*Warmup\(\.\.\.\)\.named\("):
        make(Warmup(3), Warmup(5))
    rates: list[float] = []
    loop = make(Warmup(2), Warmup(4).named("second"), At("on_step_end", lambda s: rates.append(s.rates[0])))
    loop.fit(loss_fn, train(), epochs=2)
    factors = [min(1.0, (t + 1) / 2) * min(1.0, (t + 1) / 4) for t in range(6)]
    assert rates == pytest.approx([0.01 * f for f in factors], rel=1e-12)


def test_one_callback_alone_is_a_list_of_one() -> None:
    model = net()
    assert len(Loop(model, adamw(model), Warmup(3)).callbacks) == 1  # type: ignore[arg-type]
    model = net()
    assert len(Loop(model, adamw(model), (c for c in [Warmup(3)])).callbacks) == 1


def test_cb4_in_two_loops_at_once() -> None:
    warmup = Warmup(3)
    first = make(warmup)
    with pytest.raises(ValueError, match="Warmup belongs to another Loop"):
        make(warmup)
    assert first.fit(loss_fn, train(), epochs=1).step == 3


def test_a_loop_is_gone_with_its_last_reference_and_a_used_callback_stays_used() -> None:
    """No cycle keeps a Loop alive, nor its model's memory; what a callback learnt there must not go on elsewhere."""
    import gc
    import weakref

    gc.disable()
    try:
        warmup, unused = Warmup(3), Warmup(3)
        loop = make(warmup)
        loop.fit(loss_fn, train(), val(), epochs=1)
        gone = weakref.ref(loop.state.model)
        del loop
        assert gone() is None
        with pytest.raises(ValueError, match="belongs to another Loop"):
            make(warmup)
        make(unused)
        make(unused)
    finally:
        gc.enable()


def test_a_loop_that_was_refused_keeps_no_callback() -> None:
    """A notebook holds the last error, and with it the frame of the construction that failed."""
    warmup = Warmup(3)
    for bad in ({"autocast": torch.float64}, {"autocast": "bf16"}, {"max_skips": 0}):
        with pytest.raises((ValueError, TypeError)) as held:
            make(warmup, **bad)
        assert held.tb is not None
        make_again = make(warmup)
        del make_again
        import gc

        gc.collect()


def test_op9_two_owners_of_one_setting() -> None:
    owner = type("Sizes", (Callback,), {"owns": ("batch_size", "accumulate")})
    for pair in ((owner(), GradientAccumulation(2)), (GradientAccumulation(2), owner())):
        first, second = (type(c).__name__ for c in pair)
        with pytest.raises(ValueError, match=rf"{first} and {second} both own state\.accumulate"):
            make(*pair)


def test_a_hook_on_the_instance_runs_too() -> None:
    ran: list[int] = []
    callback = Warmup(3)
    callback.on_step_end = lambda state: ran.append(state.step)  # type: ignore[method-assign,assignment]
    make(callback).fit(loss_fn, train(), epochs=1)
    assert ran == [1, 2, 3]


# Errors in hooks


class BoomError(Exception):
    pass


class Boom(Callback):
    pass


def booming(*hooks: str) -> Callback:
    def raises(hook: str) -> Any:
        def method(self: Any, state: Any) -> None:
            raise BoomError(hook)

        return method

    return type("Boom", (Boom,), {hook: raises(hook) for hook in hooks})()


def failing(model: Any, batch: Any) -> Any:
    raise ValueError("the forward failed")


def notes(error: BaseException) -> str:
    return "\n".join(getattr(error, "__notes__", []))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("hook", [h for h in HOOKS if h != "on_exception"])
@pytest.mark.parametrize("first", [True, False])
def test_cb1_an_error_in_a_hook(form: Any, hook: str, first: bool) -> None:
    """It surfaces as it is with a note that says where; the others' on_fit_end runs once; the loader is given back."""
    record, data = Record(), train()
    sampler = data.batch_sampler
    loop = make(*((booming(hook), record) if first else (record, booming(hook))))
    with pytest.raises(BoomError, match=hook) as caught:
        form(loop, loss_fn, data, val(), epochs=2)
    assert notes(caught.value).count(f"in Boom.{hook}") == 1
    assert record.count("on_fit_end") == 1
    assert record.seen[-1] == "on_fit_end"
    assert data.batch_sampler is sampler
    assert loop.state.micro is None
    with pytest.raises(BoomError, match=hook):  # it can be entered again
        form(loop, loss_fn, data, val(), epochs=3)
    assert data.batch_sampler is sampler


@pytest.mark.parametrize("form", FORMS)
def test_cb2_an_error_while_an_error_is_handled(form: Any) -> None:
    """The first error wins; what on_exception raised is attached as a note."""
    record, data = Record(), train()
    sampler = data.batch_sampler
    with pytest.raises(ValueError, match="the forward failed") as caught:
        form(make(booming("on_exception"), record), failing, data, epochs=1)
    assert "BoomError" in notes(caught.value)
    assert "Boom.on_exception" in notes(caught.value)
    assert record.count("on_fit_end") == 1
    assert data.batch_sampler is sampler


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("hook", ["on_step_start", "on_step_end", "on_validation_end", "on_fit_start"])
def test_cb2_an_error_in_a_hook_and_then_in_the_end(form: Any, hook: str) -> None:
    record, data = Record(), train()
    sampler = data.batch_sampler

    def ends(state: Any) -> None:
        raise OSError("while ending")

    loop = make(At("on_fit_end", ends), booming(hook), record)
    with pytest.raises(BoomError, match=hook) as caught:
        form(loop, loss_fn, data, val(), epochs=1)
    assert f"in Boom.{hook}" in notes(caught.value)
    assert "OSError: while ending" in notes(caught.value)
    assert record.count("on_fit_end") == 1
    assert data.batch_sampler is sampler


def test_cb2_two_errors_in_the_end() -> None:
    record = Record()

    def ends(state: Any) -> None:
        raise OSError("second")

    loop = make(booming("on_fit_end"), At("on_fit_end", ends), record)
    with pytest.raises(BoomError, match="on_fit_end") as caught:
        loop.fit(loss_fn, train(), epochs=1)
    assert "OSError: second" in notes(caught.value)
    assert record.count("on_fit_end") == 1


@pytest.mark.parametrize("form", FORMS)
def test_st6_an_error_in_the_forward_surfaces_as_it_is(form: Any) -> None:
    record, data = Record(), train()
    sampler = data.batch_sampler
    with pytest.raises(ValueError, match="the forward failed") as caught:
        form(make(record), failing, data, epochs=1)
    assert caught.traceback[-1].name == "failing"
    assert record.seen == ["on_setup", "on_fit_start", "on_epoch_start", "on_step_start", "on_exception", "on_fit_end"]
    assert data.batch_sampler is sampler


def test_an_interrupt_is_no_exception_to_redo() -> None:
    record = Record()

    def interrupted(model: Any, batch: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(record).fit(interrupted, train(), epochs=1)
    assert record.count("on_exception") == 0
    assert record.count("on_fit_end") == 1


# A callback without a Loop


def test_a_callback_is_driven_by_a_state_alone() -> None:
    model = nn.Linear(2, 1)
    state = State(model, torch.optim.SGD(model.parameters(), lr=0.1))
    model(torch.ones(3, 2)).sum().backward()
    clip, warmup = ClipGradients(0.5), Warmup(10)
    for callback in (clip, warmup):
        callback.on_setup(state)
        callback.on_fit_start(state)
        callback.on_before_optimizer_step(state)
    assert float(state.grad_norm) == pytest.approx(math.sqrt(27))
    before = state.apply_rates()
    state.apply_gradient_factors()
    assert state.rates == [pytest.approx(0.01)]
    assert float(nn.utils.get_total_norm(state.grads)) == pytest.approx(0.5, rel=1e-5)
    state.restore_rates(before)
    assert state.optimizer.param_groups[0]["lr"] == 0.1


def test_goal_and_the_rest_are_public() -> None:
    import hookloop.loop

    assert sorted(hookloop.loop.__all__) == ["Callback", "Goal", "Loop", "State"]
    assert Goal("val_loss").metric == "val_loss"
    hooks = [name for name in vars(Callback) if name.startswith("on_")]
    assert sorted(hooks) == sorted(HOOKS)
    assert len(hooks) <= 12


def test_the_smallest_callback_is_three_lines() -> None:
    seen: list[int] = []

    class Print(Callback):
        def on_step_end(self, state: State) -> None:
            seen.append(state.step)

    make(Print()).fit(loss_fn, train(), epochs=1)
    assert seen == [1, 2, 3]


def endless() -> Iterator[Any]:
    while True:
        yield from loader(20, 8)


def test_memory_is_not_kept_between_steps() -> None:
    """No batch, output or graph of a step outlives it."""
    import gc
    import weakref

    kept: list[Any] = []

    def loss(model: Any, batch: Any) -> Any:
        found = loss_fn(model, batch)
        kept.append((weakref.ref(found["preds"]), weakref.ref(batch[0])))
        return found

    gc.disable()
    try:
        alive: list[int] = []
        counts = lambda s: alive.append(sum(p() is not None for p, _ in kept))
        loop = make(At("on_step_start", counts), At("on_fit_start", micro_of(3)))
        loop.fit(loss, endless(), steps=6)
    finally:
        gc.enable()
    assert alive == [0] * 6
