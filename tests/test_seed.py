"""Seed: rows SD1 to SD3, and what may not move the training stream."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import FORMS, Samples, adamw, assert_same_bits, bits, by_hand, loader, loss_fn, net
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from hookloop.callbacks import ClipGradients, GradientAccumulation, Seed, TensorBoard, Warmup
from hookloop.loop import Callback, Loop, State, rng


class Micro(Callback):
    owns = ("micro_batch_size",)

    def __init__(self, size: int) -> None:
        self.size = size

    def on_step_start(self, state: Any) -> None:
        state.micro_batch_size = self.size


class Draws(Callback):
    """Draws from every global generator in every hook."""

    def draw(self, state: Any) -> None:
        random.random(), random.gauss(0, 1), np.random.rand(3), np.random.randn(), torch.rand(5), torch.randperm(3)

    on_setup = on_fit_start = on_epoch_start = on_step_start = on_micro_end = on_before_optimizer_step = draw
    on_step_end = on_validation_end = on_epoch_end = on_fit_end = draw


class Reseeds(Draws):
    """Sets every global generator to the same place in every hook."""

    def draw(self, state: Any) -> None:
        random.seed(1), np.random.seed(1), torch.manual_seed(1)

    on_setup = on_fit_start = on_epoch_start = on_step_start = on_micro_end = on_before_optimizer_step = draw
    on_step_end = on_validation_end = on_epoch_end = on_fit_end = draw


class Noisy(Samples):
    """Augments each sample from all three generators."""

    def __getitem__(self, i: int) -> Any:
        x, y, i = super().__getitem__(i)
        return x + 0.1 * random.random() + 0.1 * float(np.random.rand()) + 0.1 * torch.rand(6), y, i


def mixing(model: nn.Module, batch: Any) -> Any:
    """A loss that draws from all three generators, as mixup and layer drop do; of two normal numbers one is kept for later."""
    factor = 1 + 0.1 * (random.gauss(0, 1) + float(np.random.randn()) + float(torch.rand(())))
    return loss_fn(model, (batch[0] * factor, batch[1]))


def train(seed: int = 5, *, form: Any = by_hand, extra: tuple[Callback, ...] = (), val: bool = True, before: Any = None,
          loss: Any = loss_fn, data: Any = None, first: bool = False) -> dict[str, Tensor]:  # fmt: skip
    seeded = Seed(seed)
    model = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Dropout(0.3), nn.ReLU(), nn.Linear(12, 3))
    shaping = [Warmup(4), GradientAccumulation(2), Micro(4), ClipGradients(0.5)]
    order = [*extra, seeded, *shaping] if first else [seeded, *shaping, *extra]
    loop = Loop(model, adamw(model), order)
    if before is not None:
        before()
    data = DataLoader(Noisy(48), 8, shuffle=True) if data is None else data
    form(loop, loss, data, loader(20, 8, shuffle=True) if val else None, epochs=2)
    return bits(loop)


def disturb() -> None:
    random.random(), np.random.rand(3), torch.rand(5)


@pytest.mark.parametrize("form", FORMS)
def test_sd1_the_same_seed_is_the_same_run_and_another_is_another(form: Any) -> None:
    expected = train(form=form)
    disturb()
    assert_same_bits(expected, train(form=form, before=disturb))
    other = train(6, form=form)
    assert not any(torch.equal(expected[name], other[name]) for name in ("0.weight", "4.weight", "1.running_mean"))


def test_sd1_both_forms_are_one() -> None:
    assert_same_bits(*(train(form=form) for form in FORMS))


def test_sd1_the_seed_alone_decides_not_what_was_constructed_first() -> None:
    """Only the initial weights come from the moment of construction; all else from the seed."""

    def one(early: bool) -> dict[str, Tensor]:
        seeded = Seed(5) if early else None
        model = net()
        if seeded is None:
            disturb()
            seeded = Seed(5)
            disturb()
        loop = Loop(model, adamw(model), [seeded])
        loop.fit(loss_fn, DataLoader(Noisy(48), 8, shuffle=True), epochs=1)
        return bits(loop)

    assert_same_bits(one(True), one(False))


def test_seeds_every_generator_when_constructed() -> None:
    def drawn(seed: int) -> Any:
        Seed(seed)
        return random.random(), float(np.random.rand()), float(torch.rand(())), nn.Linear(2, 2).weight.tolist()

    first = drawn(3)
    disturb()
    assert drawn(3) == first
    assert all(a != b for a, b in zip(drawn(4), first, strict=True))


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("other", [Draws, Reseeds])
def test_another_callback_that_draws_moves_nothing(other: Any, first: bool) -> None:
    assert_same_bits(train(), train(extra=(other(),), first=first))


@pytest.mark.parametrize("first", [False, True])
def test_another_callback_that_draws_moves_no_loss_that_draws(first: bool) -> None:
    """Not Python's and NumPy's draws of a second micro-batch either."""
    assert_same_bits(train(loss=mixing), train(loss=mixing, extra=(Draws(),), first=first))


def test_another_callback_that_draws_moves_no_optimizer_that_draws() -> None:
    """Langevin noise, stochastic rounding: an optimizer may draw too."""

    class Langevin(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            super().step()
            for group in self.param_groups:
                for p in group["params"]:
                    p.add_(torch.randn_like(p), alpha=1e-3 * (random.gauss(0, 1) + float(np.random.randn())))

    def one(*extra: Callback) -> dict[str, Tensor]:
        seeded, model = Seed(5), nn.Linear(6, 3)
        loop = Loop(model, Langevin(model.parameters(), lr=0.1), [seeded, *extra])
        loop.fit(loss_fn, loader(48, 8), epochs=1)
        return bits(loop)

    assert_same_bits(one(), one(Draws()))


class Stream(IterableDataset):
    """Draws its samples from the global generators, as an augmented stream does."""

    def __iter__(self) -> Iterator[Any]:
        data = Samples(48)
        for i in range(48):
            x, y, i = data[i]
            yield x + 0.1 * random.random() + 0.1 * float(np.random.rand()) + 0.1 * torch.rand(6), y, i


@pytest.mark.parametrize("workers", [0, 1])
def test_another_callback_that_draws_moves_no_stream_of_data(workers: int) -> None:
    """An IterableDataset that augments in this process draws nothing that others could move."""

    def data() -> DataLoader:
        return DataLoader(Stream(), 8, num_workers=workers)

    assert_same_bits(train(data=data()), train(data=data(), extra=(Draws(),)))
    assert_same_bits(train(data=data()), train(data=data(), val=False))


class Lazy(Sequence[Any]):
    """Loads, and augments, each batch as it is asked for it."""

    loaded = 0

    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: Any) -> Any:
        if i >= len(self):
            raise IndexError
        self.loaded += 1
        x, y, _ = next(iter(DataLoader(Noisy(8), 8)))
        return x + i, y


def test_a_sequence_that_loads_as_it_is_asked_is_loaded_once_and_moved_by_nobody() -> None:
    data = Lazy()
    expected = train(data=data, val=False)
    assert data.loaded == 6 * 2  # two epochs, none to find out how long they are
    assert_same_bits(expected, train(data=Lazy(), val=False, extra=(Draws(),)))


def test_validation_moves_nothing() -> None:
    """Not its absence, not a loss that draws in it, not more of it."""
    expected = train(loss=mixing)
    assert_same_bits(expected, train(loss=mixing, val=False))
    seeded = Seed(5)
    model = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Dropout(0.3), nn.ReLU(), nn.Linear(12, 3))
    loop = Loop(model, adamw(model), [seeded, Warmup(4), GradientAccumulation(2), Micro(4), ClipGradients(0.5)])
    with loop:
        for _ in loop.epochs(2):
            for step in loop.steps(DataLoader(Noisy(48), 8, shuffle=True)):
                for micro in step:
                    with micro:
                        micro.backward(mixing)
                loop.evaluate(mixing, DataLoader(Noisy(20), 8, shuffle=True))
                loop.update()
                loop.validate(mixing, DataLoader(Noisy(20), 8, shuffle=True))
    assert_same_bits(expected, bits(loop))


def test_validation_repeats_itself() -> None:
    """With a Seed, validation at one step draws the same noise whenever it is asked."""
    seeded, model = Seed(5), net()
    loop = Loop(model, adamw(model), [seeded])
    loop.fit(loss_fn, loader(20, 8), epochs=1)
    found = []
    for _ in range(2):
        disturb()
        found.append(loop.evaluate(mixing, DataLoader(Noisy(20), 8)))
    assert found[0] == found[1]


def test_workers_and_persistent_workers_change_nothing() -> None:
    expected = train()
    for kwargs in ({"num_workers": 1}, {"num_workers": 2, "persistent_workers": True}):
        assert_same_bits(expected, train(data=DataLoader(Noisy(48), 8, shuffle=True, **kwargs)))


# Noise


class Masks(nn.Module):
    """Keeps what a dropout layer drew."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.seen, self.drawn = nn.Linear(6, 3), list[Any](), list[Any]()

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.functional.dropout(torch.ones(64), 0.5, self.training)
        if self.training:
            self.seen.append(tuple(mask.tolist()))
            self.drawn.append((random.random(), float(np.random.rand())))
        return self.layer(x) * mask.mean()


def masks(seed: int = 5, rank: int = 0, micro: int = 3) -> Masks:
    seeded, model = Seed(seed), Masks()
    loop = Loop(model, adamw(model), [seeded, Micro(micro), GradientAccumulation(2)])
    loop.fit(lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1]), loader(48, 6), epochs=2)
    return model


def test_dropout_differs_between_steps_and_micro_batches() -> None:
    found = masks()
    assert len(found.seen) == 2 * 16
    assert len(set(found.seen)) == len(set(found.drawn)) == 32
    assert not set(found.seen) & set(masks(6).seen)


def test_dropout_differs_after_a_skipped_update() -> None:
    """A skipped update counts as one: its noise does not come again."""

    class Skips(Callback):
        def on_before_optimizer_step(self, state: State) -> None:
            state.skip("always")

    seeded, model = Seed(5), Masks()
    loop = Loop(model, adamw(model), [seeded, Skips()])
    loop.fit(lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1]), loader(48, 6), epochs=1)
    assert (loop.state.step, loop.state.skipped) == (0, 8)
    assert len(set(model.seen)) == 8


def test_a_redone_step_draws_the_same_noise() -> None:
    fails = [True]

    class Redo(Callback):
        def on_exception(self, state: State) -> bool:
            return True

    def loss(model: Any, batch: Any) -> Any:
        out = nn.functional.cross_entropy(model(batch[0]), batch[1])
        if fails and len(model.seen) == 3:
            fails.clear()
            model.seen.pop()
            model.drawn.pop()
            raise RuntimeError("once")
        return out

    def one(*extra: Callback) -> Masks:
        seeded, model = Seed(5), Masks()
        Loop(model, adamw(model), [seeded, *extra]).fit(loss, loader(48, 6), epochs=1)
        return model

    redone = one(Redo())
    assert not fails
    plain = one()
    assert (redone.seen, redone.drawn) == (plain.seen, plain.drawn)


# Ranks


def order_and_noise() -> Any:
    order: list[int] = []

    class Order(Callback):
        def on_micro_end(self, state: Any) -> None:
            order.extend(state.micro.index)

    seeded, model = Seed(5), Masks()
    loop = Loop(model, adamw(model), [seeded, Order()])
    loop.fit(lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1]), loader(48, 6), epochs=2)
    return order, model.seen, model.drawn, (loop.state.rank, loop.state.world)


def test_ranks_draw_distinct_noise_and_share_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = order_and_noise()
    monkeypatch.setenv("WORLD_SIZE", "4")
    found = []
    for rank in range(4):
        monkeypatch.setenv("RANK", str(rank))
        found.append(order_and_noise())
    assert [one[3] for one in found] == [(rank, 4) for rank in range(4)]
    assert all(one[0] == alone[0] for one in found)
    assert found[0][:3] == alone[:3]
    for what in (1, 2):
        assert len({x for one in found for x in one[what]}) == 4 * 16
    assert order_and_noise() == found[3]


# Settings


@pytest.mark.parametrize("seed", [True, False, None, 1.0, 1.5, "3", [1], torch.tensor(3)])
def test_sd3_what_is_no_whole_number_is_refused(seed: Any) -> None:
    with pytest.raises(TypeError, match=r"seed must be a whole number from 0 to 2\*\*64 - 1"):
        Seed(seed)


@pytest.mark.parametrize("seed", [-1, -(2**63), 2**64, 2**70])
def test_sd3_what_is_out_of_range_is_refused(seed: int) -> None:
    before = random.getstate()
    with pytest.raises(ValueError, match=rf"from 0 to 2\*\*64 - 1, not {seed}"):
        Seed(seed)
    assert random.getstate() == before


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1])
def test_sd3_the_whole_range_works(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_same_bits(train(seed), train(seed))
    monkeypatch.setenv("RANK", "3")
    train(seed)


def test_sd3_seeds_that_agree_in_32_bits_are_others() -> None:
    assert not torch.equal(train(1)["0.weight"], train(2**32 + 1)["0.weight"])
    first = masks(1)
    second = masks(2**32 + 1)
    assert not set(first.drawn) & set(second.drawn)


def test_another_seed_refuses_a_saved_run() -> None:
    for seed in (3, 2**64 - 1):
        saved = Seed(seed).state_dict()
        Seed(seed).load_state_dict(saved)
        with pytest.raises(ValueError, match=rf"Seed\({seed}\), not Seed\(4\)"):
            Seed(4).load_state_dict(saved)


@pytest.fixture
def _determinism() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    config = os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.backends.cudnn.benchmark = before[1]
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    if config is not None:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = config


@pytest.mark.usefixtures("_determinism")
def test_sd2_deterministic_turns_it_on_and_says_what_it_costs() -> None:
    with pytest.warns(UserWarning, match="deterministic=True.*slower.*raise"):
        Seed(3, deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.benchmark
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


@pytest.mark.usefixtures("_determinism")
def test_sd2_deterministic_keeps_the_users_workspace() -> None:
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":16:8"
    with pytest.warns(UserWarning, match="deterministic=True"):
        Seed(3, deterministic=True)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


@pytest.mark.usefixtures("_determinism")
def test_sd2_deterministic_too_late_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(RuntimeError, match="CUBLAS_WORKSPACE_CONFIG=:4096:8"):
        Seed(3, deterministic=True)
    assert not torch.are_deterministic_algorithms_enabled()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    with pytest.warns(UserWarning, match="deterministic=True"):
        Seed(3, deterministic=True)


def test_without_deterministic_nothing_global_is_set() -> None:
    Seed(3)
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_seed_is_driven_by_a_state_alone() -> None:
    model = net()
    state = State(model, adamw(model))
    Seed(7).on_setup(state)
    assert state.seed == 7


@pytest.mark.parametrize("form", [list, torch.tensor])
def test_a_saved_state_gives_the_same_draws_as_tensors_and_as_the_lists_of_older_checkpoints(form: Any) -> None:
    def draws() -> list[float]:
        return [random.gauss(0, 1), np.random.normal(), torch.rand(()).item()]

    draws()  # so that a second normal number is kept
    state, expected = rng.as_plain(rng.snapshot(torch.device("cpu"))), draws()
    state["python"][1], state["numpy"][1] = form(state["python"][1].tolist()), form(state["numpy"][1].tolist())
    rng.restore(state, torch.device("cpu"))
    assert draws() == expected


@pytest.mark.parametrize("observes", [False, True])
def test_around_a_loop_that_exists_nothing_is_drawn(observes: bool, tmp_path: Path) -> None:
    """Without a callback that trains, the user's own stream of random numbers is as if no Loop were there."""
    ends = []
    for with_loop in (False, True):
        model = net()
        optimizer = adamw(model)
        loop = Loop(model, optimizer, [TensorBoard(tmp_path)] if observes else []) if with_loop else None
        torch.manual_seed(4)
        with loop or contextlib.nullcontext():
            for batch in loader(32):
                optimizer.zero_grad()
                loss = loss_fn(model, batch)["loss"]
                loss.backward()
                with loop.updating(loss=loss.detach()) if loop else contextlib.nullcontext():
                    optimizer.step()
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*ends)


@pytest.mark.parametrize("other", [0, 1])
def test_two_loops_of_one_seed_in_one_body_are_warned_of_once(other: int, caplog: pytest.LogCaptureFixture) -> None:
    data, drawn = list(loader(24, shuffle=False)), []
    loops = [Loop(model := net(), adamw(model), [Seed(number)]) for number in (0, other)]
    for epochs in (1, 2):
        with loops[0], loops[1]:
            for _ in zip(loops[0].epochs(epochs), loops[1].epochs(epochs), strict=True):
                for pair in zip(loops[0].steps(data), loops[1].steps(data), strict=True):
                    for loop, step in zip(loops, pair, strict=True):
                        for micro in step:
                            with micro:
                                drawn.append(float(torch.rand(())))
                                micro.backward(loss_fn)
                        loop.update()
    assert [a == b for a, b in itertools.pairwise(drawn)][::2] == [other == 0] * 6
    said = [line for line in caplog.messages if "train with Seed(0)" in line and "Seed(0) and Seed(1)" in line]
    assert len(said) == (other == 0)


def test_two_loops_of_one_seed_one_after_the_other_are_not_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        loop = Loop(model := net(), adamw(model), [Seed(0)])
        loop.fit(loss_fn, loader(24), epochs=1)
    assert not caplog.messages
