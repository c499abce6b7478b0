"""torch.compile beside callbacks: the same bits, and nothing compiles again when rates, factors and decay change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FORMS, adamw, assert_same_bits, loader, loss_fn, net
from torch._dynamo.testing import CompileCounter

from hookloop.callbacks import (
    Checkpoint,
    ClipGradients,
    Dropout,
    EarlyStopping,
    Fingerprint,
    GradientAccumulation,
    Initialize,
    LayerwiseRate,
    MicroBatch,
    NonFinite,
    Progress,
    Schedule,
    Seed,
    TensorBoard,
    Unfreeze,
    Warmup,
    WeightDecay,
)
from hookloop.loop import Callback, Loop


def callbacks(folder: Path) -> list[Callback]:
    return [
        Warmup(5), Schedule(lambda o, total: torch.optim.lr_scheduler.CosineAnnealingLR(o, total)), GradientAccumulation(2),
        MicroBatch(4), ClipGradients(0.3), WeightDecay(), EarlyStopping("val_loss", patience=9), NonFinite("skip"),
        Fingerprint(3), TensorBoard(folder, every=3), Progress(every=1e6), Checkpoint(folder, every=4),
    ]  # fmt: skip


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("form", FORMS)
def test_a_compiled_model_compiles_once_for_training_and_once_for_validation(form: Any, tmp_path: Path) -> None:
    counter, found = CompileCounter(), []
    for compiled in (False, True):
        first = Seed(3)
        model = net(seed=5)
        trained: Any = torch.compile(model, backend=counter) if compiled else model
        loop = Loop(trained, adamw(model), [first, *callbacks(tmp_path / str(compiled))])
        form(loop, loss_fn, loader(64, 8), loader(16, 4, shuffle=False), epochs=4)
        found.append(dict(model.state_dict()))
    assert_same_bits(*found)
    assert counter.frame_count == 2


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # torch's own
@pytest.mark.filterwarnings("ignore:Schedule goes on with a length of 2")  # what is compiled, not the rates, is looked at
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_a_compiled_update_with_a_tensor_for_a_rate_compiles_once(kind: str, tmp_path: Path) -> None:
    """A schedule and warmup fill the tensor; a rate that is a number would be compiled in."""
    counter, found = CompileCounter(), []
    for compiled in (False, True):
        first = Seed(3)
        model, rate = net(seed=5, noise=False), torch.tensor(1e-2)
        make: Any = torch.optim.AdamW if kind == "adamw" else torch.optim.SGD
        optimizer = make(model.parameters(), lr=rate)
        loop = Loop(model, optimizer, [first, *callbacks(tmp_path / str(compiled))])
        loop.fit(loss_fn, loader(64, 8), loader(16, 4), steps=2)
        if compiled:
            optimizer.step = torch.compile(optimizer.step, backend=counter)
        loop.fit(loss_fn, loader(64, 8), loader(16, 4), steps=4)
        count = counter.frame_count
        state = loop.fit(loss_fn, loader(64, 8), loader(16, 4), steps=16)
        assert counter.frame_count == count
        assert (count > 0) == compiled
        found.append(dict(model.state_dict()))
    assert state.step == 16
    for name, x in found[0].items():
        assert torch.allclose(x, found[1][name], rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("wrap", ["whole", "a layer"])
def test_rules_go_by_the_names_of_the_bare_model(wrap: str) -> None:
    def run(compiled: bool) -> Any:
        seed, model = Seed(0), net()
        inner: Any = model
        if compiled and wrap == "whole":
            model = torch.compile(model, backend="eager")
        elif compiled:
            inner[0] = torch.compile(inner[0], backend="eager")
        own = [Initialize({r"^0\.weight$": "xavier_uniform"}), WeightDecay({r"^0\.weight$": 0.3}, exempt=False),
               LayerwiseRate(rules={"^4": 0.5}), Unfreeze({0: "^4", 1: "^0.[wb]"}), Dropout(0.1, modules=["^2$"])]  # fmt: skip
        loop = Loop(model, adamw(model), [seed, *own])
        loop.fit(loss_fn, loader(), epochs=2)
        return [*inner.state_dict().values()]

    assert all(map(torch.equal, run(True), run(False)))
