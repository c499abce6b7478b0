"""ClipGradients alone and in the loop: the bits of `clip_grad_norm_`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import FORMS, adamw, assert_same_bits, bits, loader, loss_fn, net
from torch import nn

from hookloop.callbacks import ClipGradients, GradientAccumulation
from hookloop.loop import Callback, Loop, State


@pytest.mark.parametrize("norm", [1e-3, 0.5, 1e9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_equals_torch_bitwise(norm: float, dtype: torch.dtype) -> None:
    ours, theirs = net(dtype, noise=False), net(dtype, noise=False)
    for model in (ours, theirs):
        model(torch.ones(4, 6, dtype=dtype)).square().sum().backward()
    state = State(ours, adamw(ours))
    ClipGradients(norm).on_before_optimizer_step(state)
    before = state.grad_norm
    state.apply_gradient_factors()
    assert torch.equal(before, nn.utils.clip_grad_norm_(theirs.parameters(), norm))
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("form", FORMS)
def test_in_the_loop_it_clips_what_the_step_adds_up_to(form: Any) -> None:
    torch.manual_seed(0)
    ours = net(noise=False)
    loop = Loop(ours, adamw(ours), [ClipGradients(0.1), GradientAccumulation(3)])
    form(loop, loss_fn, loader(48, 8, shuffle=False), epochs=2)
    theirs = net(noise=False)
    optimizer = adamw(theirs)
    for _ in range(2):
        for i, batch in enumerate(loader(48, 8, shuffle=False)):
            if i % 3 == 0:
                optimizer.zero_grad()
            loss = loss_fn(theirs, batch)["loss"]
            loss.backward(torch.tensor(8 / 24))
            if i % 3 == 2:
                nn.utils.clip_grad_norm_(theirs.parameters(), 0.1)
                optimizer.step()
    assert_same_bits(bits(loop), {**bits(loop), **theirs.state_dict()})


def test_factors_in_any_order_give_the_same_bits() -> None:
    class Factor(Callback):
        def __init__(self, factor: float) -> None:
            self.factor = factor

        def on_before_optimizer_step(self, state: State) -> None:
            state.scale_gradients(self.factor)

    def run(order: int) -> Any:
        torch.manual_seed(0)
        model = net(noise=False)
        callbacks = [Factor(0.3), ClipGradients(0.1), Factor(0.7).named("b"), Factor(1.1).named("c")][::order]
        loop = Loop(model, adamw(model), callbacks)
        loop.fit(loss_fn, loader(shuffle=False), epochs=1)
        return bits(loop)

    assert_same_bits(run(1), run(-1))


def test_a_model_without_gradients_is_left_alone() -> None:
    model = net()
    state = State(model, adamw(model))
    ClipGradients(1.0).on_before_optimizer_step(state)
    state.apply_gradient_factors()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("norm", [0, -1.0, float("inf"), float("nan"), True, "1", None])
def test_bad_arguments(norm: Any) -> None:
    with pytest.raises(ValueError, match="norm must be a finite number above 0"):
        ClipGradients(norm)
