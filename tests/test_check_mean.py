"""check_mean tells a mean over samples from a loss whose samples see each other, and trains nothing."""

from __future__ import annotations

import pytest
import torch
from helpers import Samples, adamw, assert_same_bits, bits, loss_fn, net
from torch import nn

from hookloop.loop import Loop
from hookloop.loop.study import check_mean


def contrastive(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    a = nn.functional.normalize(model(batch[0]), dim=1)
    return nn.functional.cross_entropy(a @ a.T, torch.arange(len(a)))


def summed(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="sum")


def test_tells_means_from_others_and_changes_nothing() -> None:
    model, data = net(), Samples(33)
    loop = Loop(model, adamw(model))
    before, stream = bits(loop), torch.random.get_rng_state()
    assert check_mean(loop, loss_fn, (data.x, data.y)) < 1e-6
    for loss in (contrastive, summed):
        with pytest.raises(ValueError, match="no mean over samples"):
            check_mean(loop, loss, (data.x, data.y))
    assert_same_bits(before, bits(loop))
    assert torch.equal(stream, torch.random.get_rng_state())
    assert model.training
    assert all(p.grad is None for p in model.parameters())


class Counts(nn.Module):
    """Embeds a whole number with sparse gradients, and counts its samples in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(3, 3, sparse=True)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("last", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += len(x)
        self.last = x
        return self.embed(x)


def test_sparse_gradients_are_compared_and_buffers_are_put_back() -> None:
    torch.manual_seed(0)
    model, y = Counts(), Samples(33).y
    loop = Loop(model, torch.optim.SparseAdam(model.parameters()))
    count = model.count
    assert check_mean(loop, loss_fn, (y, y)) < 1e-6
    with pytest.raises(ValueError, match="no mean over samples"):
        check_mean(loop, contrastive, (y, y))
    assert (model.count is count, count.item(), model.last) == (True, 0.0, None)


@pytest.mark.parametrize("count", [0, 1])
def test_a_batch_that_cant_be_cut_is_refused(count: int) -> None:
    model, data = net(), Samples(33)
    with pytest.raises(ValueError, match=rf"batch holds {count} sample\(s\), which can't be cut in two; give at least 2"):
        check_mean(Loop(model, adamw(model)), contrastive, (data.x[:count], data.y[:count]))
