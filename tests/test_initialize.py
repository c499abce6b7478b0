"""Initialize: which parameters are drawn, how, when, and from which stream."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FORMS, KillAt, Killed, adamw, assert_same_bits, bits, built_in, loader, loss_fn, net
from torch import nn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

from hookloop.callbacks import Checkpoint, Initialize, NonFinite, Seed, WeightDecay
from hookloop.loop import Callback, Loop, State


def fives(p: torch.Tensor) -> None:
    p.fill_(5.0)


def start(model: nn.Module, own: Initialize, seed: int | None = None) -> None:
    state = State(model, torch.optim.SGD(model.parameters(), lr=0.1))
    state.seed = seed
    own.on_fit_start(state)


def test_classes_and_expressions_decide() -> None:
    model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 2, bias=False))
    before = {name: p.clone() for name, p in model.named_parameters()}
    start(model, Initialize({r"^3\.": "ones_", nn.Linear: fives, nn.LayerNorm: "zeros"}, bias=None))
    after = dict(model.named_parameters())
    assert torch.equal(after["3.weight"], torch.ones(2, 3))
    assert torch.equal(after["1.weight"], torch.full((3, 3), 5.0))
    assert torch.equal(after["2.weight"], torch.zeros(3))
    for name in ("0.weight", "1.bias", "2.bias"):
        assert torch.equal(after[name], before[name])
    start(model, Initialize({nn.Linear: "kaiming_uniform"}, bias="ones"))
    assert torch.equal(after["1.bias"], torch.ones(3))


def test_the_draws_are_those_of_torch() -> None:
    model, other = nn.Linear(3, 4), nn.Linear(3, 4)
    torch.manual_seed(7)
    nn.init.kaiming_normal_(other.weight)
    torch.manual_seed(7)
    start(model, Initialize({nn.Linear: "kaiming_normal"}))
    assert torch.equal(model.weight, other.weight)
    assert not model.bias.any()


def test_with_a_seed_each_draws_by_its_name_and_nothing_moves() -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 4), nn.Linear(3, 4))

    torch.manual_seed(1)
    before, models = torch.get_rng_state(), []
    for seed, rules in ((3, {nn.Linear: "normal"}), (3, {"1": "normal", "0": "normal"}), (4, {nn.Linear: "normal"})):
        models.append(make())
        torch.set_rng_state(before)
        start(models[-1], Initialize(rules), seed)
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(models[0][0].weight, models[1][0].weight)
    assert torch.equal(models[0][1].weight, models[1][1].weight)
    assert not torch.equal(models[0][0].weight, models[0][1].weight)
    assert not torch.equal(models[0][0].weight, models[2][0].weight)


def test_tied_weights_are_drawn_once() -> None:
    calls: list[int] = []
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    start(model, Initialize({nn.Linear: lambda p: calls.append(p.numel())}))
    assert calls == [9]


def test_of_the_rules_for_a_tied_weight_the_first_decides_whatever_its_names_order() -> None:
    def tied() -> nn.Module:
        model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 4), nn.Embedding(4, 3))
        model[1].weight = model[0].weight
        return model

    for rules, first in (({nn.Linear: "zeros", nn.Embedding: "ones"}, 0.0), ({nn.Embedding: "ones", r"1\.bias": "zeros"}, 1.0),
                         ({r"^1\.w": "zeros", nn.Embedding: "ones", nn.Linear: "ones"}, 0.0)):  # fmt: skip
        model = tied()
        start(model, Initialize(rules, bias="zeros"))
        assert (model[0].weight.unique().tolist(), model[2].weight.unique().tolist()) == ([first], [1.0])
    before = (model := tied()[:2])[0].weight.clone()
    for rules in ({nn.Linear: "zeros", nn.Embedding: "ones"}, {nn.Embedding: "ones", r"1\.weight": "zeros"}):
        with pytest.raises(ValueError, match=r"rules has .*(Embedding|1.*weight).*, which decides nothing"):
            start(model, Initialize(rules))
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("form", FORMS)
def test_in_any_order_of_the_callbacks_and_before_the_first_step_only(form: Any) -> None:
    found = []
    for order in itertools.permutations(range(3)):
        first = Seed(3)
        model = net(seed=5)
        own: list[Callback] = [Initialize({nn.Linear: "orthogonal"}), WeightDecay(), NonFinite("rollback")]
        loop = Loop(model, adamw(model), [first, *(own[i] for i in order)])
        form(loop, loss_fn, loader(), epochs=1)
        form(loop, loss_fn, loader(), epochs=2)
        found.append(bits(loop))
        assert_same_bits(found[0], found[-1])
    first = Seed(3)
    model = net(seed=5)
    start(model, Initialize({nn.Linear: "orthogonal"}), 3)
    other = Loop(model, adamw(model), [first, WeightDecay()])
    form(other, loss_fn, loader(), epochs=2)
    assert_same_bits(found[0], bits(other))


@pytest.mark.parametrize("kill", [1, 5, 9])
def test_a_resumed_run_is_not_drawn_anew(kill: int, tmp_path: Path) -> None:
    def go(folder: Path, at: int | None) -> Loop:
        first = Seed(3)
        model = net(seed=5)
        own = [first, Initialize({nn.Linear: "normal"}), Checkpoint(folder, every=1), KillAt(at)]
        loop = Loop(model, adamw(model), own, resume=folder)
        built_in(loop, loss_fn, loader(), epochs=2)
        return loop

    expected = go(tmp_path / "a", None)
    with pytest.raises(Killed):
        go(tmp_path / "b", kill)
    assert_same_bits(bits(expected), bits(go(tmp_path / "b", None)))


@pytest.mark.parametrize(("rules", "says"), [
    ({nn.Linear: "kaiming"}, r"'kaiming', which is neither a function nor one of torch\.nn\.init's; the closest are kaiming"),
    ({nn.Linear: 3}, "3, which is neither"), ({3: "zeros"}, "rules has 3, neither an expression nor"),
    ({"(": "zeros"}, "rules has"), ({}, "rules holds no rule"),
])  # fmt: skip
def test_bad_rules(rules: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Initialize(rules)


def test_padding_stays_0() -> None:
    model = nn.Sequential(nn.Embedding(4, 3, padding_idx=1), nn.EmbeddingBag(4, 3, padding_idx=2))
    start(model, Initialize({nn.Embedding: "trunc_normal", "1": fives}))
    assert [i for layer in model for i in range(4) if not layer.weight[i].any()] == [1, 2]


def test_a_compiled_model_draws_the_same_by_the_same_rules() -> None:
    rules, models = Initialize({r"^0\.": "normal", nn.Linear: "normal"}).rules, [net(seed=5), net(seed=9)]
    start(models[0], Initialize(rules), 3)
    start(torch.compile(models[1], backend="eager"), Initialize(rules), 3)
    for layer in (0, 4):
        assert_same_bits(dict(models[0][layer].state_dict()), dict(models[1][layer].state_dict()))


def test_around_a_loop_it_comes_too_late_and_says_so() -> None:
    model = net()
    loss_fn(model, next(iter(loader())))["loss"].backward()
    with pytest.raises(ValueError, match="behind their first backward, as around a loop of your own; do it before"), \
            Loop(model, adamw(model), [Initialize({nn.Linear: "normal"})]) as loop, loop.updating():  # fmt: skip
        pass
    before = model[0].weight.clone()
    loop.fit(loss_fn, loader(), epochs=0)  # in time now
    assert not torch.equal(before, model[0].weight)


def test_ranks_draw_the_same_or_nothing() -> None:
    model = net()
    state = State(model, adamw(model), world=2)
    with pytest.raises(ValueError, match=r"other weights on each rank; add Seed\(0\)"):
        Initialize({nn.Linear: "normal"}).on_fit_start(state)


@pytest.mark.parametrize(
    "rules", [{nn.Sequential: "zeros"}, {nn.Linear: "zeros", "^0": "ones"}, {nn.Linear: "zeros", "4.b": fives}]
)
def test_a_rule_that_decides_nothing(rules: Any) -> None:
    with pytest.raises(ValueError, match=r"rules has .*, which decides nothing"):
        start(net(), Initialize(rules))


@pytest.mark.parametrize("norm", [weight_norm, spectral_norm, orthogonal])
def test_a_weight_that_is_computed_is_refused_by_class_and_drawn_by_name(norm: Any) -> None:
    """To draw its biases alone, as if the weight had been drawn too, would say nothing of it."""
    model = nn.Sequential(nn.Linear(3, 3), norm(nn.Linear(3, 3)))
    before = {name: p.clone() for name, p in model.named_parameters()}
    source = next(name for name in before if "parametrizations" in name)
    with pytest.raises(
        ValueError, match=rf"rules has .*Linear.*, but {source} computes what it draws there.*before it is param"
    ):
        start(model, Initialize({nn.Linear: "xavier_uniform"}))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    start(model, Initialize({"parametrizations": "ones", nn.Linear: "zeros"}))
    assert {float(p.detach().unique()) for name, p in model.named_parameters() if "parametrizations" in name} == {1.0}
    assert not any(p.any() for name, p in model.named_parameters() if "parametrizations" not in name)
    with pytest.raises(ValueError, match=rf"but {source.removeprefix('1.')} computes"):
        start(norm(nn.Linear(3, 3)), Initialize({nn.Linear: "zeros"}))


def test_two_that_draw_the_same_are_refused() -> None:
    model = net()
    both = [Initialize({nn.Linear: "ones"}), Initialize({r"^0\.bias": "ones"}).named("second")]
    with pytest.raises(ValueError, match=r"Initialize and second both decide '0\.bias', and the last would win"):
        Loop(model, adamw(model), both).fit(loss_fn, loader(), epochs=1)


def test_what_does_not_fit_the_model() -> None:
    with pytest.raises(ValueError, match=r"rules has 'wieght', which matches nothing; the closest are weight"):
        start(nn.Linear(2, 2), Initialize({"wieght": "zeros"}))
    with pytest.raises(ValueError, match=r"weight of shape \(3,\) can't be drawn so: Fan in.*give its layer another"):
        start(nn.LayerNorm(3), Initialize({nn.LayerNorm: "xavier_uniform"}))
    with pytest.raises(ValueError, match="bias gives 0, which is neither"):
        Initialize({nn.Linear: "zeros"}, bias=0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="rules must map"):
        Initialize("zeros")  # type: ignore[arg-type]


def test_a_lazy_layer_is_named() -> None:
    with pytest.raises(ValueError, match=r"\['1.weight'\] have no shape yet; run one batch through the model"):
        start(nn.Sequential(nn.Linear(6, 5), nn.LazyLinear(3)), Initialize({nn.Linear: "kaiming_normal"}, bias=None))
