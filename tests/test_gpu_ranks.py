"""Several ranks that share one accelerator, over gloo, since nccl wants one each; skipped without one."""

from __future__ import annotations

from typing import Any

import many
import pytest
import torch
from helpers import Reported, built_in, loss_fn, net
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hookloop.callbacks import ClipGradients, GradientAccumulation, MicroBatch, NonFinite, Seed, Warmup
from hookloop.loop import Loop

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")]


def trained(rank: int, world: int) -> Any:
    """Train on a part of each batch of 32; `weigh` counts on the device, as where a loader gives its tensors."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(6, 32, 6, generator=generator).double().cuda(), torch.randint(0, 3, (6, 32), generator=generator).cuda()
    mine = slice(32 // world * rank, 32 // world * (rank + 1))
    model: nn.Module = net(torch.float64, noise=False).cuda()
    model = DistributedDataParallel(model, device_ids=[0]) if world > 1 else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    callbacks = [Seed(0), GradientAccumulation(2), MicroBatch(5), Warmup(3), ClipGradients(0.5), NonFinite("skip"),
                 reported := Reported("train_loss")]  # fmt: skip
    loop = Loop(model, optimizer, callbacks, weigh=lambda batch: torch.as_tensor(float(len(batch[0])), device="cuda"))
    built_in(loop, loss_fn, [(a[mine], b[mine]) for a, b in zip(x, y, strict=True)], epochs=3)
    return {name: value.cpu() for name, value in many.weights(model).items()}, reported.seen


def test_two_ranks_are_one() -> None:
    expected = many.values(trained, 1, group=False, limit=120)[0]
    for weights, reported in many.values(trained, 2, limit=180, quiet=60):
        many.close(weights, expected[0])
        assert reported == pytest.approx(expected[1], rel=1e-12)
