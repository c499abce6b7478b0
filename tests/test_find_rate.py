"""find_rate: the losses of a sweep written out by hand, what it suggests, what it draws."""

from __future__ import annotations

import math
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import adamw, loader, loss_fn, net
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from hookloop.loop import Loop
from hookloop.loop.study import find_rate, try_rates
from hookloop.loop.study.find_rate import Found, ema, noise_of, suggest


def problem(seed: int = 0) -> tuple[nn.Module, list[Any]]:
    """A line to be fitted, in batches of 16."""
    torch.manual_seed(seed)
    x = torch.randn(20, 16, 4)
    y = x @ torch.tensor([1.0, -2.0, 3.0, 0.5]) + 0.01 * torch.randn(20, 16)
    return nn.Linear(4, 1), list(zip(x, y, strict=True))


def square(model: nn.Module, batch: Any) -> torch.Tensor:
    return (model(batch[0]).squeeze(1) - batch[1]).square().mean()


def test_the_sweep_is_the_one_written_by_hand_and_groups_keep_their_ratio() -> None:
    def groups(model: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD([{"params": [model.weight], "lr": 0.1}, {"params": [model.bias], "lr": 0.4}], momentum=0.5)

    model, data = problem()
    found = find_rate(Loop(model, groups(model)), square, data, 1e-5, 10.0, 40)
    other, data = problem()
    optimizer, losses = groups(other), []
    for i in range(len(found.rates)):
        rate = 1e-5 * (10.0 / 1e-5) ** (i / 39)
        assert found.rates[i] == rate
        optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = rate * (0.1 / 0.4), rate
        optimizer.zero_grad()
        loss = square(other, data[i % 20])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert found.losses == tuple(losses)
    assert found.smoothed == tuple(ema(losses[: i + 1], 0.9) for i in range(len(losses)))
    assert found.diverged == found.rates[-1] < 10.0
    assert found.smoothed[-1] > 4 * min(found.smoothed)
    assert all(b <= 4 * min(found.smoothed[: i + 1]) for i, b in enumerate(found.smoothed[:-1]))


def test_what_it_suggests_trains_and_what_diverged_does_not() -> None:
    """For a quadratic the largest rate that SGD can use is 2 over the largest curvature: known, so the sweep can be judged."""
    model, data = problem()
    loop = Loop(model, torch.optim.SGD(model.parameters(), lr=1.0))
    found = find_rate(loop, square, data, 1e-5, 10.0, 100)
    x = torch.cat([torch.cat([x, torch.ones(16, 1)], 1) for x, _ in data])
    limit = 2 / float(torch.linalg.eigvalsh(2 * x.T @ x / len(x))[-1])
    assert found.valley is not None
    assert found.steepest is not None
    assert found.diverged is not None
    assert limit / 200 < found.valley < limit
    assert limit / 200 < found.steepest < limit
    assert limit < found.diverged < 10 * limit
    tried = try_rates(loop, square, data, found, 40)
    low, fitting, high = (tried.losses[name] for name in ("too low", "fitting", "too high"))
    assert tried.rates == {"too low": found.valley / 100, "fitting": found.valley, "too high": found.diverged}
    assert low[0] == fitting[0] == high[0]  # one start, one order of data
    assert fitting[-1] < 0.2 * low[-1] < low[0] < max(high)
    assert str(tried).startswith(f"too low ({found.valley / 100:.3g}): loss {low[0]:.4g} to ")
    assert (
        str(found)
        == f"valley {found.valley:.3g}, steepest descent {found.steepest:.3g}; the loss diverged at {found.diverged:.3g}"
    )


def test_it_ends_at_a_loss_that_is_not_finite() -> None:
    model, data = problem()
    loop = Loop(model, torch.optim.SGD(model.parameters(), lr=1.0))
    with pytest.warns(UserWarning, match="it diverged at 2.15e"):
        found = find_rate(loop, square, data, 1e-3, 1e300, 10)
    assert len(found.rates) == len(found.losses) == len(found.smoothed) == 2
    assert all(map(math.isfinite, found.losses))
    assert found.diverged == pytest.approx(1e-3 * 1e303 ** (2 / 9))
    tried = try_rates(loop, square, data, {"fine": 0.01, "wild": 1e30}, 12)
    assert (len(tried.losses["fine"]), len(tried.losses["wild"])) == (12, 1)


def test_a_loss_below_0_diverges_by_its_size_too() -> None:
    model, data = problem()
    loop = Loop(model, torch.optim.SGD(model.parameters(), lr=1.0))
    found = find_rate(loop, lambda m, b: square(m, b) - 20, data, 1e-5, 10.0, 100)
    assert found.diverged is not None
    least = min(found.smoothed)
    assert least < -19
    assert found.smoothed[-1] > least + 3 * abs(least)


@pytest.mark.parametrize("offset", [0.0, 12.0, 14.0, 15.0, 50.0])
def test_where_it_ends_does_not_hang_on_where_the_loss_is_0(offset: float) -> None:
    """A likelihood's loss may begin beside 0, where a multiple of its size is less than its noise."""
    model, data = problem()
    loop = Loop(model, torch.optim.SGD(model.parameters(), lr=1.0))
    found = find_rate(loop, lambda m, b: square(m, b) - offset, data, 1e-5, 10.0, 100)
    assert found.diverged is not None
    assert 1.0 < found.diverged < 4.0
    assert found.valley == pytest.approx(0.0248, rel=0.01)


def test_rates_in_a_list_are_named_in_full() -> None:
    model, data = problem()
    loop = Loop(model, torch.optim.SGD(model.parameters(), lr=1.0))
    rates = [1.0231929e-05, 1.0231929e-06, 0.0001234, 0.0001238, *np.logspace(-3, -1, 3)]
    tried = try_rates(loop, square, data, rates, 2)
    assert tried.rates == {str(rate): rate for rate in rates}
    assert len(tried.losses) == 7


def test_a_curve_that_is_known() -> None:
    rates = [10.0 ** (i / 10 - 5) for i in range(60)]
    curve = [2.0 - 1.5 / (1 + math.exp(-(i - 30) / 3)) if i < 48 else 0.5 + (i - 48) ** 2 for i in range(60)]
    steepest, valley = suggest(rates, curve)
    assert steepest in (rates[30], rates[29], rates[31])
    assert valley == pytest.approx(rates[30], rel=0.3)
    assert suggest(rates, curve, noise=0.6) == (None, None)
    assert suggest(rates, [1.0 + i for i in range(60)]) == (None, None)
    assert suggest([], []) == (None, None)


def test_the_smoothed_loss_is_not_pulled_towards_where_its_mean_began() -> None:
    assert ema([3.0], 0.98) == pytest.approx(3.0, rel=1e-12)
    assert ema([3.0] * 50, 0.98) == pytest.approx(3.0, rel=1e-12)
    assert ema([1.0, 2.0], 0.5) == pytest.approx((0.25 * 1 + 0.5 * 2) / 0.75)
    torch.manual_seed(0)
    assert noise_of((torch.randn(4000) * 0.3 + torch.linspace(0, 9, 4000)).tolist()) == pytest.approx(0.3, rel=0.05)


def test_a_high_first_batch_is_no_fall() -> None:
    """The mean of the first few losses is hardly smoothed: what one batch has more than the next is noise there."""
    model, data = problem()
    data[0] = (data[0][0], data[0][1] * 3)
    found = find_rate(Loop(model, torch.optim.SGD(model.parameters(), lr=1.0)), square, data, 1e-7, 10.0, 100)
    assert found.smoothed[0] > 2 * found.smoothed[9]
    assert found.steepest is not None
    assert found.valley is not None
    assert 1e-3 < found.valley < 1.0
    assert 1e-3 < found.steepest < 1.0


@pytest.mark.parametrize(("steps", "smooth"), [(10, 0.9), (20, 0.9), (40, 0.98)])
def test_a_short_sweep_finds_a_rate_too(steps: int, smooth: float) -> None:
    """Half of it or more would be gone before the loss is smoothed."""
    for seed in range(3):
        model, data = problem(seed)
        data = data[:1] * steps  # without noise
        found = find_rate(Loop(model, torch.optim.SGD(model.parameters(), 0.1)), square, data, 1e-4, 1.0, steps, smooth)
        assert found.valley is not None
        assert found.steepest is not None
        assert found.rates[steps // 5] < min(found.valley, found.steepest) < max(found.valley, found.steepest) < 1.0


@pytest.mark.parametrize(("steps", "smooth", "least"), [(100, 0.9, 12), (20, 0.9, 16), (40, 0.98, 12)])
def test_noise_of_small_batches_is_seldom_taken_for_a_fall(steps: int, smooth: float, least: int) -> None:
    """Two smoothed losses, of which each has its noise, are further apart than one of them is from its mean."""
    found = []
    for seed in range(20):
        torch.manual_seed(seed)
        noise = (1 + torch.randn(100) * 0.3).tolist()
        model = nn.Linear(1, 1)
        loop = Loop(model, torch.optim.SGD(model.parameters(), lr=1.0))
        batches = [torch.tensor([[x]]) for x in noise]
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found.append(find_rate(loop, lambda m, b: m(b).sum() * 0 + b.sum(), batches, 1e-7, 1e-3, steps, smooth).valley)
        assert bool(said) == (found[-1] is None)
    assert found.count(None) >= least
    assert all(valley is None or valley > 1e-6 for valley in found)


def test_nothing_to_be_learnt_is_said() -> None:
    model, data = problem()
    noise = [(x, torch.randn(16)) for x, _ in data]
    loop = Loop(model, torch.optim.SGD(model.parameters(), lr=1.0))
    with pytest.warns(
        UserWarning, match=r"no rate from 1e-09 to 1e-07 lowered the loss beyond its noise; it did not diverge; look"
    ):
        found = find_rate(loop, square, noise, 1e-9, 1e-7, 30)
    assert (found.steepest, found.valley, found.diverged) == (None, None, None)
    with pytest.raises(ValueError, match="rates has no valley to start from: no rate from"):
        try_rates(loop, square, noise, found)


def test_pictures_are_files_and_in_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    model, data = problem()
    loop = Loop(model, torch.optim.SGD(model.parameters(), lr=1.0))
    found = find_rate(loop, square, data, 1e-5, 10.0, 60)
    tried = try_rates(loop, square, data, found, 20)
    for one, name in ((found, "found"), (tried, "tried")):
        one.save(tmp_path / f"{name}.png")
        written = (tmp_path / f"{name}.png").read_bytes()
        assert written.startswith(b"\x89PNG")
        one.to_tensorboard(tmp_path / name, step=7)
        events = EventAccumulator(str(tmp_path / name)).Reload()
        (image,) = events.Images(name)
        assert image.step == 7
        assert image.encoded_image_string.startswith(b"\x89PNG")
        (words,) = events.Tensors(f"{name}/text_summary")
        assert words.tensor_proto.string_val[0].decode() == str(one)
        assert struct.unpack(">II", image.encoded_image_string[16:24]) == (image.width, image.height) == (640, 400)
    (axes,) = found.figure().axes
    assert axes.get_xscale() == "log"
    lines = {line.get_label(): line for line in axes.lines}
    assert tuple(lines["loss"].get_ydata()) == found.losses
    assert tuple(lines["smoothed"].get_ydata()) == found.smoothed
    assert lines[f"valley {found.valley:.2g}"].get_xdata() == [found.valley] * 2
    (axes,) = tried.figure().axes
    assert [tuple(line.get_ydata()) for line in axes.lines] == list(tried.losses.values())
    Found((0.1, 0.2), (1.0, 1.0), (1.0, 1.0), None, None, None).figure()  # a flat one
    with pytest.raises(ValueError, match=r"path must end in .png, not 'a.pdf'"):
        found.save("a.pdf")


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"figures need matplotlib: pip install 'hookloop\[study\]'"):
        Found((0.1,), (1.0,), (1.0,), None, None, None).figure()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"start": 1.0, "end": 1.0}, "start must be below end, not start=1.0 and end=1.0"),
        ({"start": 11.0}, "start must be below end, not start=11.0"),
        ({"start": 0.0}, "start must be a finite rate above 0, not 0.0"),
        ({"start": True}, "start must be a finite rate above 0, not True"),
        ({"end": math.inf}, "end must be a finite rate above 0, not inf"),
        ({"end": "1"}, "end must be a finite rate above 0, not '1'"),
        ({"steps": 9}, "steps must be .*10, not 9"),
        ({"steps": 20.0}, "steps must be .*not 20.0"),
        ({"smooth": 1.0}, "smooth must be at least 0 and below 1, not 1.0"),
        ({"smooth": math.nan}, "smooth must be at least 0 and below 1, not nan"),
        ({"micro_batch_size": 0}, "micro_batch_size must be .*not 0"),
    ],
)
def test_bad_arguments(more: Any, message: str) -> None:
    model = net()
    with pytest.raises((ValueError, TypeError), match=message):
        find_rate(Loop(model, adamw(model)), loss_fn, loader(), **more)


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ([], "rates must be what find_rate returned, name -> rate, or a list of rates, not \\[\\]"),
        ("0.1", "rates must be what find_rate returned"),
        (0.1, "rates must be what find_rate returned"),
        (b"12", "rates must be what find_rate returned"),
        ([0.1, -1.0], r"rates\['-1.0'\] must be a finite rate above 0, not -1.0"),
        ({"high": math.nan}, r"rates\['high'\] must be a finite rate above 0, not nan"),
    ],
)
def test_bad_rates(rates: Any, message: str) -> None:
    model = net()
    with pytest.raises((ValueError, TypeError), match=message):
        try_rates(Loop(model, adamw(model)), loss_fn, loader(), rates)


def test_a_loss_that_is_not_finite_at_once() -> None:
    model, data = problem()
    loop, before = Loop(model, torch.optim.SGD(model.parameters(), lr=1.0)), model.weight.clone()
    bad = [(x, y * math.nan) for x, y in data]
    with pytest.raises(ValueError, match="the loss is nan before the first update, so no rate is to blame"):
        find_rate(loop, square, bad)
    with pytest.raises(ValueError, match="the loss is nan before the first update, so no rate is to blame"):
        try_rates(loop, square, bad, [0.1])
    assert torch.equal(before, model.weight)
