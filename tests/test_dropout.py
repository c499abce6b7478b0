"""Dropout: set for good, by epochs, by the share of the run; each against a loop that sets it by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FORMS, KillAt, Killed, adamw, assert_same_bits, bits, built_in, loader, loss_fn, net
from torch import nn

from hookloop.callbacks import Checkpoint, Dropout, GradientAccumulation, Seed, Warmup
from hookloop.loop import Callback, Loop, State


class Values(Callback):
    def __init__(self) -> None:
        self.seen: list[tuple[int, int, float]] = []

    def on_micro_end(self, state: State) -> None:
        if state.micro.training:
            self.seen.append((state.epoch, state.step, state.model[2].p))


def run(form: Any, p: Any, *more: Callback, **kwargs: Any) -> tuple[Loop, list[Any]]:
    first = Seed(3)
    model = net(seed=5)
    assert isinstance(model[2], nn.Dropout)
    loop = Loop(model, adamw(model), [first, Dropout(p), values := Values(), *more], **kwargs)
    form(loop, loss_fn, loader(40, 8), loader(8, 8), epochs=4)
    return loop, values.seen


@pytest.mark.parametrize("form", FORMS)
def test_each_step_has_the_value_asked_for(form: Any) -> None:
    before = net()[2].p
    assert {p for *_, p in run(form, 0.7)[1]} == {0.7}
    assert run(form, {1: 0.25, 3: 0.0})[1] == [(i // 5, i, (before, 0.25, 0.25, 0.0)[i // 5]) for i in range(20)]
    assert [p for *_, p in run(form, lambda done: 0.5 * (1 - done))[1]] == [0.5 * (1 - i / 20) for i in range(20)]


@pytest.mark.parametrize("form", FORMS)
def test_it_is_the_loop_that_sets_it_by_hand(form: Any) -> None:
    class ByHand(Callback):
        def on_step_start(self, state: State) -> None:
            state.model[2].p = 0.6 if state.epoch < 2 else 0.0

    first = Seed(3)
    model = net(seed=5)
    hand = Loop(model, adamw(model), [first, ByHand()])
    form(hand, loss_fn, loader(40, 8), loader(8, 8), epochs=4)
    assert_same_bits(bits(hand), bits(run(form, {0: 0.6, 2: 0.0})[0]))


def test_what_was_there_comes_back_also_after_an_error() -> None:
    before = net()[2].p
    assert run(built_in, 0.7)[0].state.model[2].p == before
    model = net()
    with pytest.raises(ZeroDivisionError):
        Loop(model, adamw(model), [Dropout(0.7)]).fit(lambda m, b: 1 / 0, loader(), epochs=1)
    assert model[2].p == before


def test_it_is_logged() -> None:
    assert run(built_in, {0: 0.5})[0].state.metrics["dropout"] == 0.5


class Many(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.1)
        self.rnn = nn.LSTM(4, 4, 2, dropout=0.2)
        self.block = nn.Sequential(nn.Dropout(0.3), nn.Dropout2d(0.4), nn.AlphaDropout(0.5))
        self.head = nn.Linear(4, 3)

    def values(self) -> list[float]:
        return [self.attention.dropout, self.rnn.dropout, *(m.p for m in self.block)]


@pytest.mark.parametrize(("modules", "expected"), [
    (None, [0.6] * 5), ("attention", [0.6, 0.2, 0.3, 0.4, 0.5]), ([nn.LSTM, nn.Dropout2d], [0.1, 0.6, 0.3, 0.6, 0.5]),
    (nn.Sequential, [0.1, 0.2, 0.6, 0.6, 0.6]), (r"block\.[02]", [0.1, 0.2, 0.6, 0.4, 0.6]),
])  # fmt: skip
def test_all_that_drops_is_found_and_chosen(modules: Any, expected: list[float]) -> None:
    model = Many()
    state, own = State(model, torch.optim.SGD(model.parameters(), lr=0.1)), Dropout(0.6, modules)
    before = model.values()
    own.on_fit_start(state)
    own.on_step_start(state)
    assert model.values() == expected
    own.on_fit_end(state)
    assert model.values() == before


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_a_recurrent_net_drops_between_its_layers_alone(kind: Any) -> None:
    one, two = kind(6, 4), kind(6, 4, 2)
    with pytest.raises(ValueError, match="has no dropout to set"):
        run_with(one, Dropout(0.9))
    with pytest.raises(ValueError, match="modules has '0', which matches nothing"):
        run_with(nn.ModuleList([one, two]), Dropout(0.9, "0"))
    run_with(nn.ModuleList([one, two]), own := Dropout(0.9))
    own.on_step_start(State(two, torch.optim.SGD(two.parameters(), lr=0.1)))
    assert (one.dropout, two.dropout) == (0, 0.9)
    x = torch.randn(5, 3, 6)
    assert not torch.equal(two(x)[0], two(x)[0])


@pytest.mark.parametrize("kill", [1, 11])
@pytest.mark.parametrize("p", [{0: 0.6, 2: 0.1}, lambda done: 0.5 * done])
def test_killed_and_resumed_it_is_the_same_run(p: Any, kill: int, tmp_path: Path) -> None:
    def go(folder: Path, at: int | None) -> Loop:
        return run(built_in, p, GradientAccumulation(2), Warmup(3), Checkpoint(folder, every=1), KillAt(at), resume=folder)[0]

    expected = go(tmp_path / "a", None)
    if kill < expected.state.step:
        with pytest.raises(Killed):
            go(tmp_path / "b", kill)
    assert_same_bits(bits(expected), bits(go(tmp_path / "b", None)))


@pytest.mark.parametrize("p", [-0.1, 1.0, math.nan, True, "0.5", None, {}, {-1: 0.1}, {0: 1.5}, {0.5: 0.1}, {True: 0.1}])
def test_bad_values(p: Any) -> None:
    with pytest.raises(ValueError, match="p must"):
        Dropout(p)


def test_a_function_is_tried_when_it_is_given() -> None:
    with pytest.raises(ValueError, match=r"p\(1\) must be a probability from 0 to below 1, not 1.5"):
        Dropout(lambda done: 1.5 * done)
    with pytest.raises(ValueError, match=r"p\(0.5\) must be .* not 'half'"):
        Dropout(lambda done: "half" if done == 0.5 else 0.0)  # type: ignore[arg-type, return-value]


def test_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="modules has 'blok', which matches nothing; the closest are"):
        run_with(Many(), Dropout(0.1, "blok"))
    with pytest.raises(ValueError, match="has no dropout to set"):
        run_with(nn.Linear(6, 3), Dropout(0.1))
    with pytest.raises(ValueError, match="modules has 3, neither an expression nor a module class"):
        Dropout(0.1, [3])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"modules has Dropout\(.*, neither an expression nor a module class"):
        Dropout(0.1, nn.Dropout())  # type: ignore[arg-type]
    model = net()
    with pytest.raises(ValueError, match="needs the run's length, which is not known: give steps="):
        Loop(model, adamw(model), [Dropout(lambda done: 0.1)]).fit(loss_fn, iter(list(loader())), epochs=1)
    with pytest.raises(ValueError, match=r"p\(0\) must be a probability from 0 to below 1, not 2"):
        Loop(model, adamw(model), [Dropout(lambda done: 2)]).fit(loss_fn, loader(), epochs=1)


@pytest.mark.parametrize(("one", "other", "name"), [
    (None, None, "attention"), (None, nn.Dropout2d, "block.1"), ("rnn", [nn.LSTM, nn.Dropout], "rnn"), ("block", None, "block.0"),
])  # fmt: skip
def test_two_that_set_the_same_are_refused(one: Any, other: Any, name: str) -> None:
    model = Many()
    both = [Dropout(0.1, one), Dropout(0.4, other).named("second")]
    loop = Loop(model, torch.optim.SGD(model.parameters(), lr=0.1), both)
    with pytest.raises(ValueError, match=rf"Dropout and second both decide '{name}', and the last would win"):
        loop.fit(lambda model, b: model.head.weight.sum(), loader(), epochs=1)


def test_two_that_set_others_stand_side_by_side() -> None:
    model, seen = Many(), []

    class Watch(Callback):
        def on_step_end(self, state: State) -> None:
            seen.append(model.values())

    both = [Dropout(0.6, "rnn"), Dropout(0.7, "block").named("second"), Watch()]
    loop = Loop(model, torch.optim.SGD(model.parameters(), lr=0.1), both)
    for epochs in (1, 2):  # also where it is entered again
        loop.fit(lambda model, b: model.head.weight.sum(), loader(8), epochs=epochs)
    assert seen == [[0.1, 0.6, 0.7, 0.7, 0.7]] * 2


def run_with(model: nn.Module, own: Callback) -> None:
    own.on_fit_start(State(model, torch.optim.SGD(model.parameters(), lr=0.1)))
