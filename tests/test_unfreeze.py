"""Unfreeze: what trains from which epoch on, against a loop that freezes by hand."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FORMS, KillAt, Killed, adamw, assert_same_bits, bits, built_in, loader, loss_fn, net
from torch import nn

from hookloop.callbacks import Checkpoint, LayerwiseRate, NonFinite, Seed, Unfreeze, Warmup, WeightDecay
from hookloop.loop import Callback, Loop, State

PLAN: Any = {0: r"^4\.", 1: [nn.BatchNorm1d], 3: "."}


def run(form: Any, *own: Callback, epochs: int = 5, **kwargs: Any) -> Loop:
    first = Seed(3)
    model = net(seed=5)
    loop = Loop(model, adamw(model), [first, *own], **kwargs)
    form(loop, loss_fn, loader(40, 8), loader(8, 8), epochs=epochs)
    return loop


class ByHand(Callback):
    """The same, written out for this net."""

    def on_epoch_start(self, state: State) -> None:
        for i, begins in ((0, 3), (1, 1), (4, 0)):
            for p in state.model[i].parameters():
                p.requires_grad_(state.epoch >= begins)
        state.model[1].train(state.epoch >= 1)


@pytest.mark.parametrize("form", FORMS)
def test_it_is_the_loop_that_freezes_by_hand(form: Any) -> None:
    for epochs in (1, 2, 3, 4, 5):
        assert_same_bits(bits(run(form, ByHand(), epochs=epochs)), bits(run(form, Unfreeze(PLAN), epochs=epochs)))


@pytest.mark.parametrize("form", FORMS)
def test_what_is_frozen_has_no_gradient_no_state_and_its_statistics_stay(form: Any) -> None:
    seen: list[Any] = []

    class Look(Callback):
        def on_before_optimizer_step(self, state: State) -> None:
            seen.append((state.epoch, [p.grad is not None for p in state.model.parameters()], state.model[1].training))

    first = Seed(3)
    model = net(seed=5)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    loop = Loop(model, adamw(model), [first, Unfreeze(PLAN), Look()])
    form(loop, loss_fn, loader(40, 8), loader(8, 8), epochs=1)
    after = model.state_dict()
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["4.weight", "4.bias"]
    assert set(loop.state.optimizer.state) == set(model[4].parameters())
    form(loop, loss_fn, loader(40, 8), loader(8, 8), epochs=4)
    trained = {epoch: (grads, mode) for epoch, grads, mode in seen}
    assert trained == {0: ([False] * 4 + [True] * 2, False), 1: ([False] * 2 + [True] * 4, True),
                       2: ([False] * 2 + [True] * 4, True), 3: ([True] * 6, True)}  # fmt: skip
    assert loop.state.metrics["frozen"] == 0


def test_what_no_rule_matches_trains_all_along() -> None:
    model = net(seed=5)
    loop = Loop(model, adamw(model), [Unfreeze({2: "^0"})])
    loop.fit(loss_fn, loader(), epochs=1)
    assert [p.requires_grad for p in model.parameters()] == [False] * 2 + [True] * 4


def test_in_any_order_of_the_callbacks() -> None:
    found = []
    for order in [*itertools.permutations(range(4))][::5]:  # each callback is first in one, and last in one
        own: list[Callback] = [Unfreeze(PLAN), WeightDecay(), Warmup(8), NonFinite("skip")]
        found.append(bits(run(built_in, *(own[i] for i in order))))
        assert_same_bits(found[0], found[-1])


@pytest.mark.parametrize("kill", [1, 4, 5, 6, 14, 15, 16, 24])
def test_killed_and_resumed_it_is_the_same_run(kill: int, tmp_path: Path) -> None:
    def go(folder: Path, at: int | None) -> Loop:
        return run(built_in, Unfreeze(PLAN), Checkpoint(folder, every=1), KillAt(at), resume=folder)

    expected = go(tmp_path / "a", None)
    with pytest.raises(Killed):
        go(tmp_path / "b", kill)
    assert_same_bits(bits(expected), bits(go(tmp_path / "b", None)))


@pytest.mark.parametrize(("plan", "says"), [
    ({}, "plan must map epochs to rules"), ("layer4", "plan must map epochs to rules"), ({-1: "a"}, "not -1"),
    ({1.5: "a"}, "not 1.5"),    ({0: 3}, r"plan\[0\] has 3, neither"), ({0: []}, r"plan\[0\] holds no rule"),
    ({0: "("}, r"plan\[0\] has '\('"), ({0: None}, r"plan\[0\] has None, neither"),
])  # fmt: skip
def test_bad_plans(plan: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Unfreeze(plan)


@pytest.mark.parametrize("affine", [True, False])
def test_statistics_stay_where_a_validation_of_the_users_own_ends_with_train(affine: bool) -> None:
    """Also those of a norm without parameters, which its own name decides."""
    model = net(seed=5)
    model[1] = nn.BatchNorm1d(12, affine=affine)
    loop, seen = Loop(model, adamw(model), [Unfreeze({0: "^4", 1: "^[01]"})]), []
    with loop:
        for _ in loop.epochs(2):
            for step in loop.steps(loader()):
                for micro in step:
                    with micro:
                        micro.backward(loss_fn)
                loop.update()
                model.eval()
                model.train()
            seen.append(bool(model[1].running_mean.any()))
    assert seen == [False, True]


def test_two_that_plan_the_same_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Unfreeze and second both decide '4\.weight', and the last would win"):
        run(built_in, Unfreeze({1: "4"}), Unfreeze({2: "weight"}).named("second"))
    run(built_in, Unfreeze({1: "4"}), Unfreeze({2: "^1"}).named("second"))


def test_plans_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"plan leaves nothing to train before epoch 2; give epoch 0 rules of its own"):
        run(built_in, Unfreeze({2: "."}))
    with pytest.raises(ValueError, match=r"plan\[1\] has 'haed', which matches nothing; the closest are"):
        run(built_in, Unfreeze({1: "haed"}))
    with pytest.raises(ValueError, match=r"plan\[2\] decides nothing: epochs before it match all that it does"):
        run(built_in, Unfreeze({0: ".", 2: "^4"}))
    model = net()
    with pytest.raises(ValueError, match=r"plan unfreezes 0\.weight, 0\.bias, which the optimizer does not hold"):
        Loop(model, torch.optim.SGD(model[4].parameters(), lr=0.1), [Unfreeze({2: "^0"})]).fit(loss_fn, loader(), epochs=1)
    with pytest.raises(ValueError, match=r"Unfreeze needs on_epoch_start"), Loop(model, adamw(model), [Unfreeze(PLAN)]) as loop, \
            loop.updating():  # fmt: skip
        pass


def lazy() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.LazyLinear(3))
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def test_a_lazy_layer_may_train_at_once_and_is_named_where_it_is_to_wait() -> None:
    model, optimizer = lazy()
    Loop(model, optimizer, [Unfreeze({0: "2", 1: "."})]).fit(loss_fn, loader(16, 8), epochs=2)
    assert model[2].weight.shape == (3, 5)
    model, optimizer = lazy()
    with pytest.raises(ValueError, match=r"\['2.weight', '2.bias'\] have no shape yet; run one batch"):
        Loop(model, optimizer, [Unfreeze({0: "0", 1: "2"})]).fit(loss_fn, loader(16, 8), epochs=2)


def test_a_fused_momentum_that_would_begin_later_is_refused() -> None:
    def go(plan: Any, groups: Any = None, epochs: int = 2, more: Any = (), **options: Any) -> int:
        model = net(seed=5)
        optimizer = torch.optim.SGD(groups(model) if groups else model.parameters(), lr=0.1, **options)
        return Loop(model, optimizer, [Unfreeze(plan), *more]).fit(loss_fn, loader(16, 8), epochs=epochs).step

    momentum: Any = {"momentum": 0.9, "fused": True}
    with pytest.raises(ValueError, match=r"parameter group 0 of SGD holds .* at epochs 0, 1, .*build it with fused=False"):
        go({0: "^4", 1: "."}, **momentum)
    for options in ({"momentum": 0.9}, {"fused": True}):
        assert go({0: "^4", 1: "."}, **options) == 4
    # what joins at once may: a group for each epoch, also where another callback makes it, and what the program froze for good
    three: Any = lambda m: [{"params": m[i].parameters()} for i in (0, 1, 4)]
    assert go({0: "^4", 1: "^[01]"}, three, **momentum) == 4
    assert go({0: "^4", 1: "^1", 2: "^0"}, epochs=3, more=[LayerwiseRate(0.5, rules={"^0": 0.1, "^1": 0.2})], **momentum) == 6
    assert go({0: "^[14]"}, lambda m: [*m[0].requires_grad_(False).parameters(), *m[1:].parameters()], **momentum) == 4
