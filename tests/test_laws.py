"""The laws of the loop, each in both forms where it applies."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from helpers import FORMS, Samples, adamw, assert_same_bits, bits, built_in, by_hand, loader, loss_fn, net
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader

from hookloop.callbacks import ClipGradients, GradientAccumulation, Seed, Warmup
from hookloop.loop import Callback, Loop

few = settings(max_examples=25, deadline=None)


class Plan(Callback):
    """Sets the plan from a function of the state, as any user's callback may."""

    owns = ("batch_size", "accumulate", "micro_batch_size")

    def __init__(self, plan: Any) -> None:
        self.plan = plan

    def on_step_start(self, state: Any) -> None:
        state.batch_size, state.accumulate, state.micro_batch_size = self.plan(state)


class Gradients(Callback):
    """Keeps what the optimizer is about to see."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def on_before_optimizer_step(self, state: Any) -> None:
        self.seen.append(torch.cat([g.flatten() for g in state.grads]))


def gradients(form: Any, train: Any, plan: Any, weigh: Any = None, loss: Any = loss_fn) -> tuple[list[torch.Tensor], Any]:
    model, seen = net(torch.float64, noise=False), Gradients()
    loop = Loop(model, torch.optim.SGD(model.parameters(), lr=0.0), [Plan(plan), seen], weigh=weigh)
    return seen.seen, form(loop, loss, train, epochs=1)


@pytest.mark.parametrize("form", FORMS)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 12), st.integers(1, 4), st.integers(1, 9))
@few
def test_cut(form: Any, count: int, loader_batch: int, batch: int, accumulate: int, micro: int) -> None:
    """Any loader batch, batch, accumulation and micro-batch give the gradient of the samples' plain mean."""
    data = Samples(count, torch.float64)
    seen, state = gradients(form, DataLoader(data, loader_batch), lambda s: (batch, accumulate, micro))
    assert len(seen) == math.ceil(count / (batch * accumulate)) == state.step
    model = net(torch.float64, noise=False)
    for i, found in enumerate(seen):
        rows = slice(i * batch * accumulate, (i + 1) * batch * accumulate)
        model.zero_grad()
        nn.functional.cross_entropy(model(data.x[rows]), data.y[rows]).backward()
        expected = torch.cat([p.grad.flatten() for p in model.parameters()])
        assert torch.linalg.norm(found - expected) <= 1e-12 * torch.linalg.norm(expected)


@pytest.mark.parametrize("form", FORMS)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=24), st.integers(1, 5), st.integers(1, 3), st.integers(1, 5))
@few
def test_cut_by_tokens(form: Any, tokens: list[int], batch: int, accumulate: int, micro: int) -> None:
    """A loss that is a mean over tokens is weighted by tokens, however the batch is cut; no tokens, no part in it."""
    torch.manual_seed(1)
    x, y = torch.randn(len(tokens), 5, 6, dtype=torch.float64), torch.randint(0, 3, (len(tokens), 5))
    for row, n in enumerate(tokens):
        y[row, n:] = -100

    def token_loss(model: Any, b: Any) -> Any:
        return nn.functional.cross_entropy(model(b[0]).flatten(0, 1), b[1].flatten())

    train = [(x[i : i + 3], y[i : i + 3]) for i in range(0, len(tokens), 3)]
    seen, state = gradients(form, train, lambda s: (batch, accumulate, micro), lambda b: (b[1] != -100).sum(), token_loss)
    model, size, at = net(torch.float64, noise=False), batch * accumulate, iter(seen)
    for start in range(0, len(tokens), size):
        rows = slice(start, start + size)
        if not sum(tokens[rows]):
            continue
        model.zero_grad()
        token_loss(model, (x[rows], y[rows])).backward()
        expected = torch.cat([p.grad.flatten() for p in model.parameters()])
        assert torch.linalg.norm(next(at) - expected) <= 1e-12 * torch.linalg.norm(expected)
    assert next(at, None) is None
    assert state.step + state.skipped == math.ceil(len(tokens) / size)


@pytest.mark.parametrize("form", FORMS)
@given(st.integers(1, 60), st.integers(1, 9), st.lists(st.integers(1, 13), min_size=1, max_size=5), st.integers(1, 3),
       st.booleans())  # fmt: skip
@few
def test_one_pass_and_told_in_advance(form: Any, count: int, size: int, sizes: list[int], accumulate: int, drop: bool) -> None:
    """Over any schedule of batch sizes each sample is used once an epoch, in as many updates as were told."""
    if drop and count < size:
        count += size

    class Seen(Callback):
        def __init__(self) -> None:
            self.read: list[list[int]] = []
            self.told: set[Any] = set()

        def on_epoch_start(self, state: Any) -> None:
            self.read.append([])
            self.told.add(state.total_steps)

        def on_micro_end(self, state: Any) -> None:
            assert state.micro.index == state.micro.batch[2].tolist()
            self.read[-1] += state.micro.index

    class Grow(Plan):
        owns = ("batch_size", "accumulate")

        def on_step_start(self, state: Any) -> None:
            state.batch_size, state.accumulate = sizes[state.step % len(sizes)], accumulate

    seen, model = Seen(), net()
    train = loader(count, size, drop_last=drop)
    state = form(Loop(model, adamw(model), [Grow(None), seen]), noiseless, train, epochs=3)
    used = count // size * size if drop else count
    assert [len(r) for r in seen.read] == [used] * 3
    assert all(len(set(r)) == used for r in seen.read)
    assert used == 1 or used < 5 or seen.read[0] != seen.read[1]
    assert seen.told == {state.step}
    assert state.samples == 3 * used


def noiseless(model: nn.Module, batch: Any) -> Any:
    model[1].eval()  # BatchNorm refuses a single sample in training
    return loss_fn(model, batch)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("count", "size", "n"), [(50, 8, 3), (24, 8, 1), (24, 8, 5), (7, 8, 2), (33, 4, {0: 1, 1: 4, 2: 2})])
def test_told_in_advance_by_batches(form: Any, count: int, size: int, n: Any) -> None:
    model = net()
    loop = Loop(model, adamw(model), [GradientAccumulation(n)])
    state = form(loop, noiseless, loader(count, size), epochs=3)
    assert state.step == state.total_steps


def run(form: Any, callbacks: Any, **kwargs: Any) -> tuple[Loop, Any]:
    seed = Seed(5)
    model = net(seed=5)
    loop = Loop(model, adamw(model), [seed, *callbacks()])
    form(loop, loss_fn, loader(50, 8, **kwargs), loader(20, 8, shuffle=False), epochs=3)
    return loop, bits(loop)


def shaping() -> list[Callback]:
    return [Warmup(0.5), GradientAccumulation({0: 1, 1: 3}), ClipGradients(0.3)]


def test_by_hand_is_built_in() -> None:
    assert_same_bits(run(built_in, shaping)[1], run(by_hand, shaping)[1])


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_order_of_shaping_callbacks(order: tuple[int, ...]) -> None:
    def permuted() -> list[Callback]:
        return [shaping()[i] for i in order]

    assert_same_bits(run(built_in, shaping)[1], run(built_in, permuted)[1])


@pytest.mark.parametrize("workers", [{"num_workers": 2}, {"num_workers": 1, "persistent_workers": True}])
def test_workers_change_nothing(workers: Any) -> None:
    assert_same_bits(run(built_in, shaping)[1], run(built_in, shaping, **workers)[1])
