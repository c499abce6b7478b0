"""Several ranks agree on one size before a step is redone; real processes, gloo on one machine."""

from __future__ import annotations

import random
from typing import Any

import many
import numpy as np
import pytest
import torch
from helpers import adamw, bits, built_in, by_hand, loss_fn, net
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hookloop.callbacks import DynamicBatchSize, GradientAccumulation, MicroBatch, Seed, Steps
from hookloop.loop import Callback, Loop, State

BATCH, STEPS, AT = 8, 5, 2


class Resize(Callback):
    """The run that used the smaller size from that step on."""

    owns = ("micro_batch_size",)

    def on_step_start(self, state: State) -> None:
        state.micro_batch_size = 4 if state.step >= AT else None


def data(rank: int, count: int = 2 * STEPS) -> list[Any]:
    generator = torch.Generator().manual_seed(rank)
    make = lambda: (torch.randn(BATCH, 6, generator=generator), torch.randint(0, 3, (BATCH,), generator=generator))
    return [make() for _ in range(count)]


class Backward(torch.autograd.Function):
    """Runs out of memory on its way back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        raise torch.OutOfMemoryError("CUDA out of memory (made up)")


def own_loss(loop: Loop, loss: Any, train: Any, *, steps: int) -> None:
    """By hand, with a loss that the loop's body computes."""
    with loop:
        for _ in loop.epochs(steps=steps):
            for step in loop.steps(train):
                for micro in step:
                    with micro:
                        micro.backward(loss(loop.state.model, micro.batch))
                loop.update()


def train(rank: int, world: int, kind: str, form: str) -> dict[str, Any]:
    seed = Seed(3)
    model = DistributedDataParallel(net())
    size: Callback = Resize() if kind == "smaller from the start" else MicroBatch("auto")
    grows = DynamicBatchSize(4, 8, growth=2, every=Steps(AT))  # at this step a size is new, and rehearsed
    loop, calls = Loop(model, adamw(model), [seed, grows, GradientAccumulation(2), size]), [0]

    def loss(model: nn.Module, batch: Any) -> Any:
        state = loop.state
        if rank == 1 and state.step == (AT + 1 if kind == "proven size" else AT):
            calls[0] += 1
            if kind == "forward" and len(batch[0]) > 4 and calls[0] == 2:
                raise torch.OutOfMemoryError("CUDA out of memory (made up)")
            if kind == "error" and calls[0] == 2:
                raise KeyError("mine")
            if kind == "backward" and len(batch[0]) > 4 and calls[0] == 1:
                return Backward.apply(loss_fn(model, batch)["loss"])
            if kind == "proven size" and calls[0] == 2:
                return Backward.apply(loss_fn(model, batch)["loss"])
        return loss_fn(model, batch)

    {"by hand": by_hand, "built in": built_in, "own loss": own_loss}[form](loop, loss, data(rank), steps=STEPS)
    return {"bits": bits(loop), "size": loop.state.micro_batch_size, "step": loop.state.step}


def same(a: Any, b: Any) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(torch.as_tensor(a[name]), torch.as_tensor(b[name])), name


@pytest.mark.parametrize(("kind", "form"), [
    ("forward", "built in"), ("forward", "own loss"), ("backward", "by hand"),
    *[pytest.param(*other, marks=pytest.mark.slow)
      for other in (("forward", "by hand"), ("backward", "built in"), ("backward", "own loss"))],
])  # fmt: skip
def test_oo10_all_ranks_redo_the_step_at_one_size(kind: str, form: str) -> None:
    """Whichever rank ran out of memory before the backward that they share."""
    expected, found = many.values(train, 2, "smaller from the start", form), many.values(train, 2, kind, form)
    for rank in range(2):
        assert (found[rank].get("size"), found[rank].get("step")) == (4, STEPS), found[rank]
        same(found[rank]["bits"], expected[rank]["bits"])
    weights = [{n: x for n, x in one["bits"].items() if "running" not in n and "num_batches" not in n} for one in found]
    same(*weights)


def test_oo10_an_error_of_one_rank_ends_all() -> None:
    first, second = many.errors(train, 2, "error", "built in", within=20)
    assert "RankFailed: rank 1 failed: KeyError: 'mine'" in first
    assert second.startswith("KeyError: 'mine'")


def test_oo11_the_backward_that_ranks_share_is_not_redone() -> None:
    first, second = many.errors(train, 2, "proven size", "built in")
    assert "one of them alone can't redo it" in second
    assert "rank 1" in first


def draws(rank: int, world: int) -> tuple[list[Any], list[Any]]:
    hook, body = [], []

    class Draws(Callback):
        def on_epoch_start(self, state: State) -> None:
            hook.append(drawn())

    def drawn() -> Any:
        return float(torch.rand(())), float(np.random.rand()), random.random()

    seed = Seed(3)
    model = DistributedDataParallel(net())
    loop = Loop(model, adamw(model), [seed, Draws()])
    with loop:
        for _ in loop.epochs(2):
            for step in loop.steps(data(rank)):
                body.append(drawn())
                for micro in step:
                    with micro:
                        micro.backward(loss_fn)
                loop.update()
    return hook, body


def test_sd1_ranks_draw_alike_where_an_epoch_begins_and_apart_inside_it() -> None:
    (hook, body), (other_hook, other_body) = many.values(draws, 2)
    assert hook == other_hook
    assert not {x for one in body for x in one} & {x for one in other_body for x in one}
