"""check_mean tells a mean over samples from a loss whose samples see each other, and trains nothing."""

from __future__ import annotations

from typing import Any

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_weights_own_rounding_is_no_fault_of_the_loss(dtype: torch.dtype) -> None:
    model, data = net().to(dtype), Samples(33)

    def in_types(loss: Any) -> Any:
        return lambda model, batch: loss(lambda x: model(x.to(dtype)).float(), batch)

    loop = Loop(model, adamw(model))
    assert check_mean(loop, in_types(loss_fn), (data.x, data.y)) < 0.01
    for loss in (contrastive, summed):
        with pytest.raises(ValueError, match="no mean over samples"):
            check_mean(loop, in_types(loss), (data.x, data.y))
    if dtype is not torch.float32:
        with pytest.raises(ValueError, match="no mean over samples"):
            check_mean(loop, in_types(loss_fn), (data.x, data.y), 1e-5)


def test_autocast_is_off_where_the_weights_are_finer() -> None:
    model, data = net(), Samples(33)
    plain, mixed = Loop(model, adamw(model)), Loop(model, adamw(model), autocast=torch.bfloat16)
    assert check_mean(mixed, loss_fn, (data.x, data.y)) == check_mean(plain, loss_fn, (data.x, data.y)) < 1e-6
    with pytest.raises(RuntimeError) as error:
        check_mean(mixed, loss_fn, (data.x.bfloat16(), data.y))
    assert "without the Loop's autocast=" in " ".join(error.value.__notes__)
    coarse = net().bfloat16()  # which takes float32 only under autocast
    assert check_mean(Loop(coarse, adamw(coarse), autocast=torch.bfloat16), loss_fn, (data.x, data.y)) < 0.02


def test_both_parts_of_a_complex_gradient_are_compared() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(4, 4, dtype=torch.cfloat), torch.randn(8, 4)
    loop = Loop(model, torch.optim.Adam(model.parameters()))

    def loss(model: Any, x: torch.Tensor) -> torch.Tensor:
        return model(x.cfloat()).abs().square().mean()

    def by_size(model: Any, x: torch.Tensor) -> torch.Tensor:
        return loss(model, x) + torch.view_as_real(model.weight)[..., 1].sum() * len(x)

    assert check_mean(loop, loss, x) < 1e-6
    with pytest.raises(ValueError, match="no mean over samples"):
        check_mean(loop, by_size, x)


def test_what_weighs_nothing_is_left_out_as_in_training() -> None:
    model, data, mask = net(), Samples(8), torch.arange(8) < 4

    def masked(model: Any, batch: Any) -> torch.Tensor:
        losses = nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")
        return (losses * batch[2]).sum() / batch[2].sum()

    loop = Loop(model, adamw(model), weigh=lambda batch: batch[2].sum())
    assert check_mean(loop, masked, (data.x, data.y, mask)) < 1e-6
    with pytest.raises(ValueError, match="the weights of batch sum to 0"):
        check_mean(loop, masked, (data.x, data.y, mask & False))
    with pytest.raises(ValueError, match="gradient of batch, or of its cuts, is not finite"):
        check_mean(loop, masked, (data.x * torch.nan, data.y, mask))
