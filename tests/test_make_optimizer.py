"""make_optimizer: torch's own optimizer, with the groups that it should have."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import pytest
import torch
from helpers import FORMS, Samples, assert_same_bits, bits, loader, loss_fn, net
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hookloop.callbacks import Seed, WeightDecay, make_optimizer
from hookloop.callbacks.make_optimizer import OPTIMIZERS
from hookloop.loop import Loop


def names(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    found = {id(p): name for name, p in model.named_parameters()}
    return {found[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_is_the_loop_written_out(name: str) -> None:
    """Torch's optimizer on groups split by hand, over 9 updates, to the bit."""
    made, plain = net(noise=False), net(noise=False)
    optimizer = make_optimizer(made, name, lr=0.02, weight_decay=0.1)
    kind, more = OPTIMIZERS[name], {"nesterov": True, "momentum": 0.9} if name == "nesterov" else {}
    groups = [{"params": [plain[0].weight, plain[2].weight], "weight_decay": 0.1},
              {"params": [plain[0].bias, plain[2].bias], "weight_decay": 0.0}]  # fmt: skip
    other = kind(groups, lr=0.02, **more)
    for model, one in ((made, optimizer), (plain, other)):
        for i in range(9):
            x, y = Samples(9).x[i : i + 4], Samples(9).y[i : i + 4]
            nn.functional.cross_entropy(model(x), y).backward()
            one.step()
            one.zero_grad()
    assert type(optimizer) is kind
    for a, b in zip(made.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_without_arguments_it_has_torchs_defaults(name: str) -> None:
    if name == "nesterov":
        return
    model = net()
    plain = {k: v for k, v in OPTIMIZERS[name](model.parameters()).param_groups[0].items() if k != "params"}
    first = make_optimizer(model, name).param_groups[0]
    assert {k: first[k] for k in plain} == plain
    assert inspect.signature(OPTIMIZERS[name]).parameters["weight_decay"].default == first["weight_decay"]


def test_what_decays_is_what_weight_decay_says() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(5, 4), nn.Linear(4, 5)
            self.head.weight = self.embed.weight
            self.ln_f, self.norm1, self.biased_fc = nn.LayerNorm(4), nn.BatchNorm2d(4), nn.Linear(4, 4)
            self.frozen = nn.Linear(4, 4).requires_grad_(False)

    model = Model()
    optimizer = make_optimizer(model, "adamw", lr=1e-3, weight_decay=0.3)
    found = names(model, optimizer)
    assert {name for name, decay in found.items() if decay} == {"embed.weight", "biased_fc.weight"}
    assert set(found) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(found)  # the tied one once
    assert len(optimizer.param_groups) == 2
    other = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    with Loop(model, other, [WeightDecay(default=0.3)]):
        assert names(model, other) == found
    with warnings.catch_warnings(action="error"), Loop(model, optimizer, []):
        pass


def test_with_no_decay_there_is_one_group() -> None:
    assert len(make_optimizer(net(), "sgd", lr=0.1).param_groups) == 1


@pytest.mark.parametrize("form", FORMS)
def test_in_a_loop(form: Any) -> None:
    def run(by_name: bool) -> Any:
        seed, model = Seed(0), net()
        optimizer = make_optimizer(model, "adamw", lr=1e-2, weight_decay=0.3) if by_name else torch.optim.AdamW(
            model.parameters(), lr=1e-2)  # fmt: skip
        loop = Loop(model, optimizer, [seed, *([] if by_name else [WeightDecay(default=0.3)])])
        form(loop, loss_fn, loader(), epochs=2)
        return bits(loop)

    assert_same_bits(run(True), run(False))


def test_options_and_kinds_of_rate_reach_the_optimizer() -> None:
    rate = torch.tensor(0.1)
    optimizer = make_optimizer(net(), "Adam", rate, 0.0, betas=(0.8, 0.9), foreach=False)
    group = optimizer.param_groups[0]
    assert (group["betas"], group["foreach"], group["lr"] is rate) == ((0.8, 0.9), False, True)
    assert make_optimizer(net(), "nesterov", 0.1, momentum=0.5).param_groups[0]["momentum"] == 0.5


def test_on_the_cpu_it_is_not_fused_unless_asked() -> None:
    assert all(group.get("fused") is None for group in make_optimizer(net(), "adamw").param_groups)
    assert make_optimizer(net(), "adamw", fused=True).param_groups[0]["fused"] is True


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_on_a_gpu_it_is_fused_where_it_can_be(name: str) -> None:
    model = net(noise=False).cuda()
    optimizer = make_optimizer(model, name, lr=0.01)
    can = name in ("adamw", "adam", "sgd")
    assert bool(optimizer.param_groups[0].get("fused")) == can
    assert not make_optimizer(model, name, foreach=True).param_groups[0].get("fused")
    model(torch.randn(4, 6, device="cuda")).sum().backward()
    optimizer.step()
    half = nn.ModuleList([nn.Linear(2, 2).cuda(), nn.Linear(2, 2)])
    assert not make_optimizer(half, name).param_groups[0].get("fused")


def test_on_a_gpu_momentum_is_not_fused_which_fails_for_a_layer_that_joins_later() -> None:
    with FakeTensorMode():
        model = nn.ParameterList([nn.Parameter(torch.empty(2, 2, device="cuda"))])
        made = [make_optimizer(model, "adamw"), make_optimizer(model, "sgd"), make_optimizer(model, "sgd", momentum=0.9)]
        made += [make_optimizer(model, "nesterov"), make_optimizer(model, "nesterov", fused=True)]
        made.append(make_optimizer(model, "adagrad"))  # up to torch 2.11 its fused form is the CPU's alone
    assert [bool(o.param_groups[0]["fused"]) for o in made] == [True, True, False, False, True, False]


@pytest.mark.parametrize(
    ("arguments", "options", "error", "says"),
    [
        (("adamv",), {}, ValueError, "name must be one of 'adamw', 'adam',.*'nesterov'.*not 'adamv'; the closest is 'adam'"),
        ((torch.optim.SGD,), {}, ValueError, "name must be one of"),
        (("adamw",), {"beta": 1}, TypeError, "AdamW has no option 'beta'; the closest is 'betas', there are betas, eps, ams"),
        (("sgd",), {"params": []}, TypeError, "SGD has no option 'params'"),
        (("adamw", 0.1, -1), {}, ValueError, "weight_decay must be a finite decay, at least 0, not -1"),
        (("adamw", 0.1, True), {}, ValueError, "weight_decay must be a finite decay, at least 0, not True"),
        (("adamw", -0.1), {}, ValueError, "lr must be a finite rate, at least 0, a tensor of one, or None for .* not -0.1"),
        *[(("adamw", lr), {}, ValueError, f"lr must be .* not {lr!r}") for lr in ("0.1", True, float("inf"), float("nan"))],
        *[
            (("sgd", 0.1), {"momentum": m}, ValueError, f"momentum must be finite, not {m}")
            for m in (float("nan"), float("inf"))
        ],
        (("nesterov",), {"nesterov": False}, ValueError, "name is 'nesterov' and nesterov=False; name 'sgd'"),
    ],
)
def test_bad_arguments(arguments: Any, options: Any, error: Any, says: str) -> None:
    with pytest.raises(error, match=says):
        make_optimizer(net(), *arguments, **options)


def test_bad_models() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, whose modules say what decays, not generator"):
        make_optimizer(net().parameters(), "sgd")  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match="Sequential, has no parameter that requires gradients, so there is nothing to optimize"
    ):
        make_optimizer(net().requires_grad_(False), "sgd")
    with pytest.raises(ValueError, match="have no shape yet; run one batch through the model"):
        make_optimizer(nn.LazyLinear(2), "sgd")
