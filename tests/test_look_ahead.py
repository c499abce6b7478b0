"""What a rate finder leaves behind: nothing, to the bit, wherever it is called and however it ends."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import FORMS, Samples, adamw, assert_same_bits, bits, loader, loss_fn, net, same
from torch import nn
from torch.utils.data import DataLoader, RandomSampler

from hookloop.callbacks import (
    Checkpoint,
    ClipGradients,
    DynamicBatchSize,
    GradientAccumulation,
    MicroBatch,
    NoiseScale,
    Schedule,
    Seed,
    Warmup,
)
from hookloop.loop import Callback, Goal, Loop
from hookloop.loop.store import list_checkpoints
from hookloop.loop.study import find_rate, try_rates

pytestmark = pytest.mark.filterwarnings("ignore:find_rate")  # labels drawn at random are hard to learn


class Broken(Exception):
    """An error of the user's own."""


def breaks_at(call: int) -> Any:
    """A loss_fn that raises at its n-th call."""
    calls = []

    def loss(model: nn.Module, batch: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            raise Broken
        return loss_fn(model, batch)

    return loss


class Look(Callback):
    """Sweeps at a step's end, an epoch's end or a validation's, on the loader that the run uses."""

    def __init__(self, hook: str, step: int, way: Any) -> None:
        self.step, self.way, self.looked = step, way, 0
        setattr(self, hook, self.look)

    def look(self, state: Any) -> None:
        if state.step >= self.step and not self.looked:
            self.looked = 1
            self.way(self._loop(), state.loader)


def sweep(loop: Loop, data: Any) -> None:
    assert len(find_rate(loop, loss_fn, data, 1e-4, 10.0, 25).rates) > 5


def sweep_that_breaks(loop: Loop, data: Any) -> None:
    with pytest.raises(Broken):
        find_rate(loop, breaks_at(9), data, 1e-4, 10.0, 25)


def tries(loop: Loop, data: Any) -> None:
    try_rates(loop, loss_fn, data, [1e-3, 100.0], 6)


WAYS = [sweep, sweep_that_breaks, tries]
OPTIMIZERS = {"sgd": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9), "adamw": lambda ps: torch.optim.AdamW(ps, lr=0.01),
              "tensor": lambda ps: torch.optim.AdamW(ps, lr=torch.tensor(0.01), amsgrad=True)}  # fmt: skip


def run(form: Any, folder: Path, look: Any, way: Any, kind: str, seeded: bool, data: dict[str, Any]) -> Any:
    random.seed(1)
    np.random.seed(1)
    first, model = [Seed(5)] if seeded else [], net(seed=5)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR
    shaping = [Warmup(0.3), Schedule(lambda o, n: cosine(o, n)), GradientAccumulation(2), ClipGradients(0.5), MicroBatch(5)]
    watch = Look(*look, way) if look else None
    loop = Loop(model, OPTIMIZERS[kind](model.parameters()),
                [*first, *([watch] if watch else []), *shaping, Checkpoint(folder, every=2, keep=None)])  # fmt: skip
    if seeded and "generator" in data:
        data = {**data, "generator": torch.Generator().manual_seed(3)}
    train = loader(50, 8, **data)
    if way and look is None:
        before = bits(loop), copy.deepcopy(torch.get_rng_state()), random.getstate(), np.random.get_state()[1].copy()
        way(loop, train)
        assert_same_bits(before[0], bits(loop))
        assert torch.equal(before[1], torch.get_rng_state())
        assert before[2] == random.getstate()
        assert (before[3] == np.random.get_state()[1]).all()
        assert all(p.grad is None for p in model.parameters())
        assert not loop.state.optimizer.state
    form(loop, loss_fn, train, loader(20, 8, shuffle=False), epochs=3)
    assert not watch or watch.looked
    found = []
    for checkpoint in list_checkpoints(folder):  # position, generators, every callback's state, at each second update
        found.append(
            (torch.load(checkpoint / "model.pt", weights_only=True), torch.load(checkpoint / "state.pt", weights_only=True))
        )
    assert len(found) > 4
    return bits(loop), found


CASES = [
    (None, sweep, "adamw", True, {}), (None, sweep_that_breaks, "sgd", False, {}), (None, tries, "tensor", True, {}),
    (("on_step_end", 3), sweep, "sgd", True, {}), (("on_step_end", 5), sweep, "adamw", False, {"generator": 1}),
    (("on_step_end", 3), sweep_that_breaks, "tensor", False, {}), (("on_step_end", 6), tries, "sgd", False, {}),
    (("on_epoch_end", 1), sweep, "tensor", True, {}), (("on_validation_end", 5), sweep_that_breaks, "adamw", True, {}),
    (("on_epoch_start", 4), tries, "adamw", False, {}), (("on_step_start", 2), sweep, "sgd", True, {}),
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("number", range(len(CASES)))
def test_a_run_after_it_is_a_run_without_it(form: Any, number: int, tmp_path: Path) -> None:
    look, way, kind, seeded, data = CASES[number]
    if "generator" in data:
        data = {"generator": torch.Generator().manual_seed(3)}
    a = run(form, tmp_path / "a", look, way, kind, seeded, dict(data))
    if "generator" in data:
        data = {"generator": torch.Generator().manual_seed(3)}
    b = run(form, tmp_path / "b", None, None, kind, seeded, dict(data))
    assert_same_bits(a[0], b[0])
    for (model, state), (other, beside) in zip(a[1], b[1], strict=True):
        same(model, other)
        same(state, beside)


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("look", [None, ("on_step_end", 3)])
def test_with_workers(persistent: bool, look: Any, tmp_path: Path) -> None:
    data = {"num_workers": 1, "persistent_workers": persistent}
    a = run(FORMS[1], tmp_path / "a", look, sweep, "adamw", True, data)
    b = run(FORMS[1], tmp_path / "b", None, None, "adamw", True, data)
    assert_same_bits(a[0], b[0])
    same(a[1][-1], b[1][-1])


def test_a_sampler_that_draws_while_it_is_iterated_goes_on_where_it_stood() -> None:
    """With replacement it draws 32 at a time from the generator it was given, which a second iteration moves."""

    def one(step: int | None) -> Any:
        data, model = Samples(100), net()
        sampler = RandomSampler(data, replacement=True, generator=torch.Generator().manual_seed(2))
        loop = Loop(model, adamw(model), [] if step is None else [Look("on_step_end", step, sweep)])
        loop.fit(loss_fn, DataLoader(data, batch_size=8, sampler=sampler), epochs=2)
        return bits(loop)

    assert_same_bits(one(None), one(2))


def test_around_a_loop_of_ones_own_and_between_two_runs() -> None:
    def one(looks: bool) -> Any:
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        loop, train = Loop(model, optimizer, [Warmup(4)]), loader(50, 8)
        with loop:
            for batch in train:
                loss_fn(model, batch)["loss"].backward()
                if looks:
                    before = [p.grad.clone() for p in model.parameters()]
                    sweep(loop, loader(50, 8))  # gradients of the user's own come back too
                    assert all(map(torch.equal, before, [p.grad for p in model.parameters()]))
                with loop.updating():
                    optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
        return bits(loop), [g["lr"] for g in optimizer.param_groups], vars(optimizer).keys()

    a, b = one(True), one(False)
    assert_same_bits(a[0], b[0])
    assert a[1:] == b[1:]


def test_what_only_a_forward_changes_comes_back_with_modes_and_a_scheduler_is_none_the_wiser() -> None:
    class Odd(nn.Module):
        """A weight that forwards move, a buffer, and state of its own."""

        def __init__(self) -> None:
            super().__init__()
            self.inner, self.frozen, self.count = net(), nn.Linear(2, 2).requires_grad_(False), 0

        def forward(self, x: torch.Tensor) -> Any:
            if self.training:
                self.count += 1
                self.frozen.weight.mul_(1.5)
            return self.inner(x)

        def get_extra_state(self) -> Any:
            return {"count": self.count}

        def set_extra_state(self, state: Any) -> None:
            self.count = state["count"]

    model = Odd()
    model.eval()
    model.inner[1].train()
    optimizer = torch.optim.AdamW(model.inner.parameters(), lr=0.1)
    torch.optim.lr_scheduler.StepLR(optimizer, 2)
    loop = Loop(model, optimizer)
    modes, weights = [m.training for m in model.modules()], {k: copy.deepcopy(v) for k, v in model.state_dict().items()}
    counted = loop.optimizer_steps
    known = {k: v for k, v in vars(optimizer).items() if k not in ("state", "param_groups")}
    sweep(loop, loader())
    assert modes == [m.training for m in model.modules()]
    same(
        {k: v for k, v in model.state_dict().items() if "extra" not in k},
        {k: v for k, v in weights.items() if "extra" not in k},
    )
    assert model.count == 0
    assert (loop.optimizer_steps, not optimizer.state) == (counted, True)
    assert known == {k: v for k, v in vars(optimizer).items() if k not in ("state", "param_groups")}


def test_an_extra_state_that_its_module_does_not_take_back_is_no_error() -> None:
    class Told(nn.Sequential):
        def get_extra_state(self) -> Any:
            return {"version": 2}

    model = Told(*net())
    weights = copy.deepcopy(model.state_dict())
    sweep(Loop(model, adamw(model)), loader())
    same(dict(model.state_dict()), dict(weights))


class Ahead(torch.optim.Optimizer):
    """As is widely copied: wraps another optimizer, goes half way back to slow weights at each third step, and counts."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        super().__init__(base.param_groups, dict(base.defaults))
        self.base, self.param_groups, self.seen, self.log = base, base.param_groups, {"steps": 0}, []
        self.slow = [[p.detach().clone() for p in group["params"]] for group in base.param_groups]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.base.step()
        self.seen["steps"] += 1
        self.log.append(self.param_groups[0]["lr"])
        if self.seen["steps"] % 3 == 0:
            for group, slow in zip(self.param_groups, self.slow, strict=True):
                for p, q in zip(group["params"], slow, strict=True):
                    p.copy_(q.lerp_(p, 0.5))


@pytest.mark.parametrize("way", WAYS)
def test_what_an_optimizer_keeps_outside_its_state_comes_back(way: Any) -> None:
    def one(looks: bool) -> Any:
        model = net()
        optimizer = Ahead(adamw(model))
        loop = Loop(model, optimizer, [Look("on_step_end", 4, way)] if looks else [])
        if looks:
            way(loop, loader())  # before it has state
        loop.fit(loss_fn, loader(), epochs=2)
        return bits(loop), optimizer.base.state_dict(), optimizer.slow, optimizer.seen, optimizer.log

    a, b = one(True), one(False)
    assert_same_bits(a[0], b[0])
    same(a[1:], b[1:])


@pytest.mark.parametrize("way", WAYS)
def test_a_scaler_keeps_its_scale_and_its_count(way: Any) -> None:
    def one(looks: bool) -> Any:
        model = net()
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=5)
        loop = Loop(model, adamw(model), [Look("on_step_end", 3, way)] if looks else [], scaler=scaler)
        if looks:
            way(loop, loader())  # before it has a scale on the device
        loop.fit(loss_fn, loader(), epochs=2)
        return bits(loop), scaler.state_dict()

    a, b = one(True), one(False)
    assert_same_bits(a[0], b[0])
    assert a[1] == b[1]


def test_an_update_holds_what_the_runs_next_one_holds() -> None:
    def sizes(*callbacks: Callback, **more: Any) -> list[int]:
        seen = []

        def loss(model: nn.Module, batch: Any) -> Any:
            seen.append(len(batch[0]))
            return loss_fn(model, batch)

        model = net()
        find_rate(Loop(model, adamw(model), callbacks), loss, loader(48, 8), 1e-7, 1e-6, 10, **more)
        return seen

    assert sizes() == [8] * 10
    assert sizes(GradientAccumulation(3)) == [8] * 30
    assert sizes(DynamicBatchSize(12, 24, every=1)) == [12] * 10
    for policy in (NoiseScale(), Goal("val_loss")):
        assert sizes(DynamicBatchSize(12, 24, every=policy)) == [12] * 10
    assert sizes(GradientAccumulation(3), micro_batch_size=6) == [4] * 60


def test_cuts_and_weights_change_no_loss() -> None:
    def loss(model: nn.Module, batch: Any) -> Any:
        each, weights = nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none"), batch[1] + 1
        return (each * weights).sum() / weights.sum()

    def losses(limit: int | None) -> Any:
        model = net(torch.float64, noise=False)
        loop = Loop(model, torch.optim.SGD(model.parameters(), lr=1.0), weigh=lambda b: (b[1] + 1).sum())
        data = loader(48, 8, torch.float64, shuffle=False)
        return find_rate(loop, loss, data, 1e-3, 3.0, 20, micro_batch_size=limit).losses

    assert losses(None) == pytest.approx(losses(3), rel=1e-10)
    assert losses(None) != losses(3)


@pytest.mark.parametrize("way", [find_rate, try_rates])
def test_what_can_not_be_put_back_is_refused(way: Any) -> None:
    model = net()
    loop = Loop(model, adamw(model))
    more = {} if way is find_rate else {"rates": [0.1]}

    class Own(list):  # type: ignore[type-arg]
        def load_state_dict(self, state: Any) -> None: ...

    with pytest.raises(TypeError, match=r"takes a Loop, not Sequential"):
        way(model, loss_fn, loader(), **more)
    with pytest.raises(TypeError, match="loss_fn must be a function of model and batch, not 3"):
        way(loop, 3, loader(), **more)
    with pytest.raises(TypeError, match=r"loader must give batches.*wrap it: DataLoader"):
        way(loop, loss_fn, Samples(8), **more)
    with pytest.raises(TypeError, match=r"loader is an iterator \(list_iterator\).*can be iterated again"):
        way(loop, loss_fn, iter([]), **more)
    with pytest.raises(TypeError, match=r"a Own, keeps its own position.*DataLoader of its own"):
        way(loop, loss_fn, Own(), **more)
    with pytest.raises(ValueError, match=r"the loader \(list\) gives 0 batches; give it data"):
        way(loop, loss_fn, [], **more)
    loop.state.world = 2
    with pytest.raises(RuntimeError, match="runs in one process, and here are 2 ranks"):
        way(loop, loss_fn, loader(), **more)
    loop.state.world = 1
    frozen = Loop(model, torch.optim.SGD(model.parameters(), lr=0.0))
    with pytest.raises(ValueError, match=r"every rate in SGD is 0.*build it with rates above 0"):
        way(frozen, loss_fn, loader(), **more)
    with loop:
        for _ in loop.epochs(1):
            for step in loop.steps(loader(16, 8)):
                with pytest.raises(RuntimeError, match=r"inside a step.*after loop.update\(\)"):
                    way(loop, loss_fn, loader(), **more)
                for micro in step:
                    with micro:
                        micro.backward(loss_fn)
                loop.update()

        def inside(model: nn.Module, batch: Any) -> Any:
            with pytest.raises(RuntimeError, match="inside an evaluation"):
                way(loop, loss_fn, loader(), **more)
            return loss_fn(model, batch)

        loop.evaluate(inside, loader(8, 8))


def test_what_weighs_nothing_is_left_out_as_the_run_leaves_it_out() -> None:
    def losses(data: Any, weigh: Any) -> Any:
        model = net(noise=False)
        return find_rate(Loop(model, adamw(model), weigh=weigh), loss_fn, data, 1e-4, 1.0, 12).losses

    data = [*loader(96, 8, shuffle=False)]
    padded = [batch for pair in zip(data, data, strict=True) for batch in (pair[0], [pair[1][0] * 0, *pair[1][1:]])]
    assert losses(padded, lambda b: len(b[0]) * bool(b[0].any())) == losses(data, None)
    with pytest.raises(ValueError, match="the weights of 100 updates in a row sum to 0: look at weigh= and the data"):
        losses(data, lambda b: 0)
