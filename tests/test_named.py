"""State by name: what wrappers add to names goes, what a user chose stays, and no value is rounded on its way."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import adamw, assert_same_bits, built_in, loader, loss_fn, net, same
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

from hookloop.callbacks import Average, Checkpoint, EarlyStopping, NonFinite, Schedule, Seed, WeightDecay
from hookloop.loop import Callback, Goal, Loop, State
from hookloop.loop.kept import keep, put_back
from hookloop.loop.store import Named, inner, list_checkpoints

NAMES = ["0.weight", "0.bias", "2.weight", "2.bias"]


def plain_net() -> nn.Sequential:
    return net(noise=False)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


def compiled_part(model: nn.Module) -> nn.Module:
    model[2] = compiled(model[2])  # type: ignore[index, operator]
    return model


def parallel_part(model: nn.Module) -> nn.Module:
    model[2] = DataParallel(model[2])  # type: ignore[index, operator]
    return model


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "bare": lambda m: m, "DataParallel": DataParallel, "DDP": DistributedDataParallel, "compiled": compiled,
    "compiled part": compiled_part, "parallel part": parallel_part, "compiled DDP": lambda m: compiled(DistributedDataParallel(m)),
    "DDP of compiled": lambda m: DistributedDataParallel(compiled(m)), "twice": lambda m: DataParallel(DataParallel(m)),
    "whole and part": lambda m: DataParallel(parallel_part(m)), "compiled of compiled part": lambda m: compiled(compiled_part(m)),
}  # fmt: skip


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_names_are_those_of_the_bare_model(wrapper: str, group: None) -> None:
    bare = plain_net()
    values = {name: value.clone() for name, value in bare.state_dict().items()}
    model = WRAPPERS[wrapper](bare)
    if wrapper != "bare":
        assert [*model.state_dict()] != NAMES
    named = Named(model, sgd(model))
    assert named.names == [NAMES]
    assert [*named.tensors] == NAMES
    assert named.outside == {}
    found = named.model_state()
    assert [*found] == NAMES
    assert_same_bits(dict(found), values)
    assert named.model_misfits(values) == {}
    assert [*named.optimizer_state()["groups"][0]["params"]] == NAMES


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_weights_and_state_go_into_a_wrapped_model_and_out_again(wrapper: str, group: None) -> None:
    source = plain_net()
    optimizer = adamw(source)
    for p in source.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    saved, state = Named(source, optimizer).model_state(), Named(source, optimizer).optimizer_state()
    model = WRAPPERS[wrapper](net(noise=False, seed=9))
    target = Named(model, adamw(model))
    target.load_model(saved, {})
    options = target.options()
    target.load_optimizer(state, options, options, {})
    assert_same_bits(dict(target.model_state()), dict(saved))
    same(target.optimizer_state()["state"], state["state"])


class Own(nn.Module):
    """Submodules of the user's own that are called as wrappers call theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(6, 4)
        self.inner = nn.Module()
        self.inner.module = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner.module(self.module(x).relu())  # type: ignore[no-any-return, operator]


@pytest.mark.parametrize("wrapper", ["bare", "DataParallel", "DDP", "compiled", "compiled DDP", "DDP of compiled", "twice"])
def test_a_submodule_called_module_keeps_its_name(wrapper: str, group: None) -> None:
    model = WRAPPERS[wrapper](Own())
    named = Named(model, sgd(model))
    names = ["module.weight", "module.bias", "inner.module.weight", "inner.module.bias"]
    assert [*named.model_state()] == names
    assert named.names == [names]


def test_a_wrapped_submodule_called_module_keeps_its_name() -> None:
    model = Own()
    model.module = DataParallel(model.module)  # type: ignore[assignment]
    assert [*Named(model, sgd(model)).model_state()] == [
        "module.weight",
        "module.bias",
        "inner.module.weight",
        "inner.module.bias",
    ]


def test_a_submodule_called_as_compile_calls_its_own_keeps_its_name() -> None:
    """Only what a compiled module adds goes: else two parameters could come under one name, and one be lost."""
    model = nn.Module()
    model._orig_mod, model.weight = nn.Linear(2, 2), nn.Parameter(torch.ones(2))
    named = Named(model, sgd(model))
    assert len(named.model_state()) == 3
    assert len(named.tensors) == 3


def run(wrapper: str, folder: Path | None, steps: int, seed: int = 3) -> Any:
    """Train some steps more, and return weights and state by name."""
    model = WRAPPERS[wrapper](net(noise=False, seed=seed))
    save = [] if folder is None else [Checkpoint(folder, every=1, keep=None)]
    loop = Loop(model, adamw(model), [Seed(4), *save], resume=folder)
    built_in(loop, loss_fn, loader(), steps=steps)
    named = Named(model, loop.state.optimizer)
    return copy.deepcopy((dict(named.model_state()), named.optimizer_state()["state"], loop.state.samples))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile looks at it
@pytest.mark.parametrize("wrapper", [w for w in WRAPPERS if w != "bare"])
def test_a_checkpoint_of_a_wrapped_model_resumes_in_a_bare_one_and_back(wrapper: str, group: None, tmp_path: Path) -> None:
    """Bitwise the run that was never wrapped; `model.pt` is the bare model's state dict."""
    expected = run("bare", None, 9)
    run(wrapper, tmp_path, 3)
    plain_net().load_state_dict(torch.load(list_checkpoints(tmp_path)[-1] / "model.pt", weights_only=True))
    run("bare", tmp_path, 6, seed=8)
    same(run(wrapper, tmp_path, 9, seed=9), expected)


@pytest.mark.parametrize(
    ("first", "then"), [("DataParallel", "bare"), ("bare", "DataParallel"), ("compiled", "bare"), ("bare", "bare")]
)
def test_best_weights_of_a_wrapped_model_come_back_in_a_bare_one(first: str, then: str, tmp_path: Path) -> None:
    """What EarlyStopping keeps goes by the bare model's names too: the best report is the first, before the resume."""

    def once(wrapper: str, folder: Path | None, epochs: int) -> Any:
        model = WRAPPERS[wrapper](net(noise=False))
        save = [] if folder is None else [Checkpoint(folder, every=1)]
        early = EarlyStopping(Goal("score", patience=9), restore_best=True)
        loop = Loop(model, adamw(model), [Seed(4), early, *save], resume=folder)
        with loop:
            for epoch in loop.epochs(epochs):
                for step in loop.steps(loader()):
                    for micro in step:
                        with micro:
                            micro.backward(loss_fn)
                    loop.update()
                loop.report({"score": float(epoch)})
        return copy.deepcopy(dict(Named(model, loop.state.optimizer).model_state()))

    expected = once("bare", None, 4)
    once(first, tmp_path, 2)
    same(once(then, tmp_path, 4), expected)


class WithTemperature(Callback):
    """Pulls a parameter that the optimizer holds and the model does not."""

    def __init__(self, temperature: nn.Parameter) -> None:
        self.temperature = temperature

    def on_before_optimizer_step(self, state: State) -> None:
        self.temperature.grad = self.temperature.detach() - 0.3
        for p in state.model.parameters():
            assert p.grad is not None
            p.grad *= self.temperature.detach()


def test_a_parameter_that_the_model_does_not_hold(tmp_path: Path) -> None:
    """Saved and restored with its state, to the bit."""

    def once(folder: Path | None, steps: int, start: float = 1.0) -> Any:
        model, temperature = plain_net(), nn.Parameter(torch.tensor(start))
        optimizer = torch.optim.AdamW(
            [{"params": [*model.parameters()]}, {"params": [temperature], "weight_decay": 0.0}], lr=0.05
        )
        save = [] if folder is None else [Checkpoint(folder, every=1)]
        loop = Loop(model, optimizer, [Seed(4), WithTemperature(temperature), *save], resume=folder)
        built_in(loop, loss_fn, loader(), steps=steps)
        assert [*Named(model, optimizer).outside] == ["(group 1, tensor 0, not in the model)"]
        return copy.deepcopy((dict(model.state_dict()), temperature.data, optimizer.state_dict()["state"]))

    expected = once(None, 8)
    assert expected[1] != 1.0
    once(tmp_path, 3)
    once(tmp_path, 5, start=99.0)
    same(once(tmp_path, 8, start=-99.0), expected)


def test_a_parameter_outside_of_another_shape_is_named(tmp_path: Path) -> None:
    def build(count: int) -> Loop:
        model = plain_net()
        optimizer = torch.optim.SGD([{"params": [*model.parameters()]}, {"params": [nn.Parameter(torch.ones(count))]}], lr=0.1)
        return Loop(model, optimizer, [Seed(4), Checkpoint(tmp_path)], resume=tmp_path)

    built_in(build(2), loss_fn, loader(), steps=1)
    with pytest.raises(
        ValueError, match=r"\(group 1, tensor 0, not in the model\) is \(3,\) here and \(2,\) in the checkpoint"
    ):
        build(3).__enter__()


class Tied(nn.Module):
    """A head that is the first layer, under a name that comes first in the alphabet and last in the model."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 6, bias=False)
        self.out = nn.Linear(6, 3)
        self.again = nn.Linear(6, 6, bias=False)
        self.again.weight = self.body.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.again(self.body(x).tanh()).tanh())  # type: ignore[no-any-return]


def test_tied_parameters(tmp_path: Path) -> None:
    """One entry of state under the smallest name, both names in the model's file, tied after the resume."""

    def once(folder: Path | None, steps: int) -> Any:
        torch.manual_seed(steps)
        model = Tied()
        with torch.no_grad():
            for i, p in enumerate(model.parameters()):
                nn.init.normal_(p, generator=torch.Generator().manual_seed(i))
        save = [] if folder is None else [Checkpoint(folder, every=1)]
        loop = Loop(model, adamw(model), [Seed(4), *save], resume=folder)
        built_in(loop, loss_fn, loader(), steps=steps)
        named = Named(model, loop.state.optimizer)
        assert named.names == [["again.weight", "out.weight", "out.bias"]]
        assert [*named.model_state()] == ["body.weight", "out.weight", "out.bias", "again.weight"]
        assert model.again.weight is model.body.weight
        return copy.deepcopy((dict(model.state_dict()), named.optimizer_state()["state"]))

    expected = once(None, 7)
    once(tmp_path, 3)
    same(once(tmp_path, 7), expected)


class Wide(torch.optim.Optimizer):
    """Momentum in float32 (and in float64 inside a dict and a list) of parameters of any type, and a note of its own."""

    def __init__(self, params: Any, lr: float = 0.1, deep: bool = True) -> None:
        self.deep = deep
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p, dtype=torch.float32)
                    state["master"] = p.detach().float()
                    if self.deep:
                        state["deep"] = {
                            "one": torch.zeros((), dtype=torch.float64),
                            "list": [torch.zeros(2, dtype=torch.float64)],
                        }
                    state["count"] = torch.zeros((), dtype=torch.int64)
                state["momentum"].mul_(0.9).add_(p.grad.float())
                state["count"] += 1
                factor = 1.0
                if self.deep:
                    state["deep"]["one"] += p.grad.double().sum() / 3
                    state["deep"]["list"][0] += p.grad.double().mean() / 7
                    factor += 1e-3 * state["deep"]["one"].item()
                state["master"].add_(state["momentum"], alpha=-group["lr"] * factor)
                p.copy_(state["master"])


class Half(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = net(torch.bfloat16, noise=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x.bfloat16()).float()  # type: ignore[no-any-return]


@pytest.mark.parametrize("deep", [False, True])
def test_state_of_a_wider_type_is_not_rounded(deep: bool, tmp_path: Path) -> None:
    """torch's own load_state_dict rounds it to the parameter's type."""

    def once(folder: Path | None, steps: int) -> Any:
        model = Half()
        save = [] if folder is None else [Checkpoint(folder, every=1)]
        loop = Loop(model, Wide(model.parameters(), deep=deep), [Seed(4), *save], resume=folder)
        built_in(loop, loss_fn, loader(), steps=steps)
        return copy.deepcopy((dict(model.state_dict()), Named(model, loop.state.optimizer).optimizer_state()["state"]))

    expected = once(None, 8)
    momentum = expected[1]["inner.0.weight"]["momentum"]
    assert momentum.dtype == torch.float32
    assert not torch.equal(momentum, momentum.bfloat16().float())
    once(tmp_path, 3)
    same(once(tmp_path, 8), expected)


@pytest.mark.parametrize("what", ["momentum", "count", "one", "list"])
def test_each_value_of_state_comes_back_in_its_own_type(what: str) -> None:
    model = Half()
    optimizer = Wide(model.parameters())
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    named = Named(model, optimizer)
    saved = copy.deepcopy(named.optimizer_state())
    other = Half()
    target = Named(other, Wide(other.parameters()))
    target.load_optimizer(saved, target.options(), target.options(), {})
    pick = {"momentum": lambda s: s["momentum"], "count": lambda s: s["count"], "one": lambda s: s["deep"]["one"],
            "list": lambda s: s["deep"]["list"][0]}[what]  # fmt: skip
    for name, p in target.tensors.items():
        found, expected = pick(target.optimizer.state[p]), pick(saved["state"][name])
        assert found.dtype == expected.dtype, name
        assert torch.equal(found, expected), name


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_bfloat16_parameters_under_torchs_own_optimizers(momentum: float, tmp_path: Path) -> None:
    def once(folder: Path | None, steps: int) -> Any:
        model = Half()
        save = [] if folder is None else [Checkpoint(folder, every=1)]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)
        loop = Loop(model, optimizer, [Seed(4), *save], resume=folder)
        built_in(loop, loss_fn, loader(), steps=steps)
        return copy.deepcopy((dict(model.state_dict()), Named(model, optimizer).optimizer_state()["state"]))

    expected = once(None, 6)
    once(tmp_path, 3)
    same(once(tmp_path, 6), expected)


def test_a_rate_that_is_a_tensor_is_filled_in_place() -> None:
    """The very same object, which a captured step reads, holds the saved value; one that is a number stays one."""
    source = plain_net()
    values = [torch.tensor(0.125), torch.tensor(0.5)]

    def split(m: nn.Sequential, rates: list[Any]) -> torch.optim.Optimizer:
        groups = [{"params": [*layer.parameters()], "lr": rate} for layer, rate in zip((m[0], m[2]), rates, strict=True)]
        return torch.optim.AdamW(groups, foreach=False)

    saved = Named(source, split(source, values)).optimizer_state()
    model = plain_net()
    rates = [torch.tensor(9.0), torch.tensor(8.0)]
    optimizer = split(model, rates)
    named = Named(model, optimizer)
    options = named.options()
    named.load_optimizer(saved, options, options, {})
    for group, rate, value in zip(optimizer.param_groups, rates, values, strict=True):
        assert group["lr"] is rate
        assert torch.equal(rate, value)
    assert values[0] is not rates[0]
    plain = plain_net()
    numbers = split(plain, [9.0, 8.0])
    named = Named(plain, numbers)
    named.load_optimizer(saved, named.options(), named.options(), {})
    same([group["lr"] for group in numbers.param_groups], [0.125, 0.5])
    back = Named(plain, numbers).optimizer_state()
    rates = [torch.tensor(9.0), torch.tensor(8.0)]
    optimizer = split(model, rates)
    named = Named(model, optimizer)
    named.load_optimizer(back, named.options(), named.options(), {})
    assert [group["lr"] is rate for group, rate in zip(optimizer.param_groups, rates, strict=True)] == [True, True]
    assert [rate.item() for rate in rates] == [0.125, 0.5]


class Ahead(torch.optim.Optimizer):
    """Wraps another optimizer, and goes half way back to slow weights at each third step."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        super().__init__(base.param_groups, dict(base.defaults))
        self.base, self.param_groups, self.count = base, base.param_groups, 0
        self.slow = [p.detach().clone() for group in base.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.base.step()
        self.count += 1
        if self.count % 3 == 0:
            for p, q in zip([p for group in self.param_groups for p in group["params"]], self.slow, strict=True):
                p.copy_(q.lerp_(p, 0.5))


class Saved(Ahead):
    """One that passes on what the other keeps."""

    def state_dict(self) -> Any:
        return {**self.base.state_dict(), "slow": self.slow, "count": self.count}

    def load_state_dict(self, saved: Any) -> None:
        self.base.load_state_dict({name: saved[name] for name in ("state", "param_groups")})
        self.param_groups, self.count, self.slow = self.base.param_groups, saved["count"], [q.clone() for q in saved["slow"]]


class Layout(Saved):
    """One that gives all of it in a layout of its own."""

    def state_dict(self) -> Any:
        return {"all": super().state_dict()}


class Forgets(Saved):
    """One that does not take it back."""

    def load_state_dict(self, saved: Any) -> None:
        self.slow = saved["slow"]


class Several(torch.optim.Optimizer):
    """Keeps several optimizers, one for each of its groups, in a tuple."""

    def __init__(self, model: nn.Module) -> None:
        matrices, rest = ([p for p in model.parameters() if (p.ndim == 2) == which] for which in (True, False))
        super().__init__([{"params": matrices}, {"params": rest}], {"lr": 0.01})
        kinds: Any = (lambda groups: torch.optim.SGD(groups, momentum=0.9), torch.optim.AdamW)
        self.opts = tuple(kind([group]) for kind, group in zip(kinds, self.param_groups, strict=True))

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for one in self.opts:
            one.step()


class Sharp(torch.optim.Optimizer):
    """Keeps state of its own under the parameters whose momentum another optimizer keeps, as SAM does."""

    def __init__(self, params: Any, **settings: Any) -> None:
        super().__init__(params, settings)
        self.base = torch.optim.SGD(self.param_groups, **settings)
        self.param_groups = self.base.param_groups

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in [p for group in self.param_groups for p in group["params"]]:
            p.grad.add_(self.state[p].get("old", 0 * p), alpha=0.01)
            self.state[p]["old"] = p.clone()
        self.base.step()

    def load_state_dict(self, saved: Any) -> None:
        super().load_state_dict(saved)
        self.base.param_groups = self.param_groups


class Sorts(Several):
    """Remembers which parameters are whose, in containers that are held many times, and by themselves."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.whose: dict[str, Any] = {str(i): [*group["params"]] for i, group in enumerate(self.param_groups)}
        for _ in range(16):
            self.whose = {"here": self.whose, "there": self.whose}
        self.whose["itself"] = self.whose


class Shares(Several):
    """Shares its state with the one that it keeps."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.opts = (torch.optim.SGD(self.param_groups, momentum=0.9),)
        self.opts[0].state = self.state


def tensor_betas(model: nn.Module) -> torch.optim.Optimizer:
    betas = (torch.tensor(0.8), torch.tensor(0.99))
    return torch.optim.Adam(model.parameters(), lr=0.01, betas=betas, foreach=False)  # type: ignore[arg-type]


class Records(torch.optim.SGD):
    """Keeps a list in its groups, which grows."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group.setdefault("past", []).append(group["lr"])
            group["weight_decay"] = 0.01 * len(group["past"])
        return super().step(closure)


@pytest.mark.parametrize("optimizer", [
    lambda m: Saved(adamw(m)), lambda m: Records([{"params": m.parameters(), "past": []}], lr=0.1),
    lambda m: Records(m.parameters(), lr=0.1), lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, betas=[0.8, 0.99]),
    Several, Sorts, Shares, lambda m: Sharp(m.parameters(), lr=0.1, momentum=0.9), lambda m: tensor_betas(m),
], ids=["wraps", "list", "new list", "list for a tuple", "several", "sorts", "shares", "sharp", "tensors in a tuple"])  # fmt: skip
def test_layouts_of_a_users_own_resume_to_the_same_bits(optimizer: Any, tmp_path: Path) -> None:
    def go(folder: Path, epochs: int) -> Any:
        seed, model = Seed(0), plain_net()
        schedule = Schedule(lambda optimizer, steps: LambdaLR(optimizer, lambda t: 1 / (1 + t)))
        loop = Loop(model, optimizer(model), [seed, schedule, Checkpoint(folder)], resume=folder)
        built_in(loop, loss_fn, loader(), epochs=epochs)
        return model.state_dict(), loop.state.optimizer.state_dict()

    go(tmp_path / "a", 1)
    found = go(tmp_path / "a", 2)
    same(found, go(tmp_path / "b", 2))


def test_state_of_a_wrapped_optimizer_that_would_be_lost_is_an_error(tmp_path: Path) -> None:
    def go(optimizer: Any) -> None:
        model = plain_net()
        built_in(Loop(model, optimizer(adamw(model)), [Checkpoint(tmp_path)], resume=tmp_path), loss_fn, loader(), epochs=1)

    with pytest.raises(
        ValueError, match=r"can't save .*Ahead: it keeps a AdamW in \.base, whose state .* \.count, \.slow\[0\]"
    ):
        go(Ahead)
    with pytest.raises(
        ValueError, match=r"can't save .*Layout: its state_dict\(\) lacks 'state' and 'param_groups' and gives 'all'"
    ):
        go(Layout)
    assert not list_checkpoints(tmp_path)
    go(Forgets)
    with pytest.raises(ValueError, match=r"Forgets did not take exp_avg, exp_avg_sq, step of 0.weight"):
        go(Forgets)


@pytest.mark.parametrize("build", [Several, Shares, lambda m: Sharp(m.parameters(), lr=0.1, momentum=0.9)])
def test_a_rollback_is_exact_for_optimizers_inside_of_another(build: Any) -> None:
    """State, also of one that had none yet, and the groups that they share."""
    model = plain_net()
    state = State(model, build(model))

    def go(rates: list[float]) -> Any:
        for i, rate in enumerate(rates):
            for group in state.optimizer.param_groups:
                group["lr"] = rate
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
            state.optimizer.step()
        return copy.deepcopy((dict(model.state_dict()), Named(model, state.optimizer).optimizer_state()))

    for before in ([], [0.1, 0.2]):
        go(before)
        kept = keep(state)
        assert kept is not None
        wanted = go([0.3, 0.1])
        put_back(state, kept)
        same(go([0.3, 0.1]), wanted)
    for one in inner(state.optimizer).values():
        for name in ("momentum_buffer", "exp_avg"):
            next(iter(one.state.values())).get(name, torch.zeros(())).fill_(torch.nan)
    assert keep(state) is None


def test_an_optimizer_inside_of_another_kind_is_named(tmp_path: Path) -> None:
    def go(kind: Any, **more: Any) -> Any:
        model = plain_net()
        optimizer = Sharp(model.parameters(), lr=0.1, momentum=0.9)
        optimizer.base = kind(optimizer.param_groups)
        return built_in(Loop(model, optimizer, [Checkpoint(tmp_path)], resume=tmp_path, **more), loss_fn, loader(), epochs=1)

    go(lambda groups: torch.optim.SGD(groups, momentum=0.9))
    with pytest.raises(ValueError, match=r"the optimizer has AdamW in \.base here and SGD in the checkpoint"):
        go(torch.optim.AdamW)
    with pytest.warns(UserWarning, match=r"the optimizer has AdamW in \.base here"):
        go(torch.optim.AdamW, strict=False)


def test_groups_can_not_be_split_where_an_optimizer_inside_would_keep_them_whole() -> None:
    model = plain_net()
    loop = Loop(model, Several(model), [WeightDecay(default=0.1)])
    with pytest.raises(ValueError, match=r"Several keeps a SGD in \.opts\[0\], whose list of parameter groups is another"):
        built_in(loop, loss_fn, loader(), epochs=1)


def test_a_tensor_rate_that_the_program_changed_stands() -> None:
    model = plain_net()
    saved = Named(model, torch.optim.SGD(model.parameters(), lr=torch.tensor(0.25))).optimizer_state()
    rate = torch.tensor(0.75)
    named = Named(model, torch.optim.SGD(model.parameters(), lr=rate))
    named.load_optimizer(saved, [{"lr": 0.25}], named.options(), {})
    assert named.optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == 0.75


def test_settings_that_were_saved_as_numbers_are_tensors_where_the_program_has_them_so() -> None:
    """As checkpoints of before have those in tuples."""
    model = plain_net()
    saved = Named(model, tensor_betas(model)).optimizer_state()
    assert [type(beta) for beta in saved["groups"][0]["betas"]] == [torch.Tensor, torch.Tensor]
    saved["groups"][0]["betas"] = tuple(beta.item() for beta in saved["groups"][0]["betas"])
    named = Named(model, tensor_betas(model))
    named.load_optimizer(saved, named.options(), named.options(), {})
    same(named.optimizer.param_groups[0]["betas"], (torch.tensor(0.8), torch.tensor(0.99)))


class Lazy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.last = nn.LazyLinear(8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x).relu())  # type: ignore[no-any-return]


@pytest.mark.parametrize("before", [False, True])
def test_lazy_modules(before: bool, tmp_path: Path) -> None:
    """A checkpoint goes into a lazy module that has seen data, and into one that has no shape yet."""

    def once(folder: Path | None, steps: int, unseen: bool) -> Any:
        model = Lazy()
        if not unseen:
            model(torch.zeros(1, 6))
        save = [] if folder is None else [Checkpoint(folder, every=1)]
        loop = Loop(model, adamw(model), [Seed(4), *save], resume=folder)
        with loop:
            if steps > 3 and folder is not None:
                assert tuple(model.first.weight.shape) == (8, 6)
        built_in(loop, loss_fn, loader(), steps=steps)
        named = Named(model, loop.state.optimizer)
        return copy.deepcopy((dict(model.state_dict()), named.optimizer_state()["state"]))

    expected = once(None, 7, False)
    once(tmp_path, 3, False)
    same(once(tmp_path, 7, before), expected)


def test_a_lazy_module_without_a_shape_in_the_checkpoint_too() -> None:
    """Neither has seen data: nothing misfits, and nothing is lost."""
    model = Lazy()
    named = Named(model, adamw(model))
    assert named.model_misfits(dict(Lazy().state_dict())) == {}
    named.load_model(Lazy().state_dict(), {})
    assert model(torch.zeros(1, 6)).shape == (1, 3)


class SavesAtStart(Callback):
    def on_step_start(self, state: State) -> None:
        if state.step == 0:
            state.save("start")


def test_a_save_before_a_lazy_module_has_a_shape_says_so(tmp_path: Path) -> None:
    """What can't be loaded again is not written: an error that names the parameter, at the save."""
    model = Lazy()
    loop = Loop(model, adamw(model), [SavesAtStart(), Checkpoint(tmp_path)])
    with pytest.raises(TypeError, match=r"first\.weight"):
        built_in(loop, loss_fn, loader(), steps=1)
    assert list_checkpoints(tmp_path) == []


@pytest.mark.parametrize("misfit", ["shape", "missing", "alone"])
def test_what_does_not_fit_is_left_as_it_is(misfit: str) -> None:
    source, model = plain_net(), net(noise=False, seed=9)
    optimizer = adamw(source)
    for p in source.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    saved, state = dict(Named(source, optimizer).model_state()), Named(source, optimizer).optimizer_state()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    if misfit == "shape":
        saved["2.bias"] = torch.ones(4)
    elif misfit == "missing":
        del saved["2.bias"]
    else:
        saved["9.bias"] = torch.ones(4)
    named = Named(model, adamw(model))
    skip = named.model_misfits(saved)
    assert skip == {"shape": {"2.bias": "2.bias is (3,) here and (4,) in the checkpoint"},
                    "missing": {"2.bias": "2.bias is missing in the checkpoint, and (3,) here"},
                    "alone": {"9.bias": "9.bias is in the checkpoint alone, as (4,)"}}[misfit]  # fmt: skip
    named.load_model(saved, skip)
    named.load_optimizer(state, named.options(), named.options(), skip)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name] if name in skip else saved[name]), name
    assert [*named.optimizer_state()["state"]] == [name for name in NAMES if name not in skip]


class Quantized(nn.Module):
    """Weights quantized by torch's own module, whose buffers get a shape in its first forward, and are loaded in that shape."""

    def __init__(self, inputs: int = 6) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.weight = nn.Parameter(torch.randn(3, inputs))
        self.quantize = torch.ao.quantization.default_per_channel_weight_fake_quant()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.quantize(self.weight))


def test_modules_that_load_other_shapes_by_themselves_resume_to_the_same_bits(tmp_path: Path) -> None:
    def once(folder: Path | None, steps: int, *kinds: Any) -> Any:
        model, own = Quantized(), [kind() for kind in kinds]
        save = [] if folder is None else [Checkpoint(folder, every=1)]
        loop = Loop(model, sgd(model), [Seed(4), *own, *save], resume=folder)
        built_in(loop, loss_fn, loader(), steps=steps)
        return copy.deepcopy((dict(model.state_dict()), Named(model, loop.state.optimizer).optimizer_state()["state"]))

    for kinds in ([], [lambda: Average("ema"), lambda: NonFinite("rollback", every=1)]):
        folder = tmp_path / str(len(kinds))
        once(folder, 3, *kinds)
        same(once(folder, 7, *kinds), once(None, 7, *kinds))
    model = Quantized(5)
    loop, before = Loop(model, sgd(model), [Seed(4)], resume=tmp_path / "0"), copy.deepcopy(dict(model.state_dict()))
    with pytest.raises(ValueError, match=r"does not fit: weight is \(3, 5\) here and \(3, 6\) in the checkpoint\. Put"), loop:
        pass
    same(dict(model.state_dict()), before)


class Interpolates(nn.Linear):
    """Makes what it loads fit itself, so that the optimizer's state would not."""

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        state_dict[prefix + "weight"] = state_dict[prefix + "weight"][:, : self.in_features]
        super()._load_from_state_dict(state_dict, prefix, *args)


class Rebinds(nn.Linear):
    """Puts a parameter of the saved shape in the place of the one that the optimizer holds."""

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self.weight = nn.Parameter(state_dict[prefix + "weight"])
        super()._load_from_state_dict(state_dict, prefix, *args)


class Reaches(nn.Linear):
    """Does so in a function that no copy of it takes along."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.register_load_state_dict_pre_hook(lambda module, saved, prefix, *args: setattr(
            self.weight, "data", torch.zeros_like(saved[prefix + "weight"])))  # fmt: skip


@pytest.mark.parametrize("kind", [Interpolates, Rebinds, Reaches])
def test_shapes_that_modules_make_fit_in_ways_that_an_optimizer_does_not_are_misfits(kind: Any) -> None:
    model = kind(4, 3)
    before = copy.deepcopy(dict(model.state_dict()))
    found = Named(model, sgd(model)).model_misfits(dict(kind(6, 3).state_dict()))
    assert found == {"weight": "weight is (3, 4) here and (3, 6) in the checkpoint"}
    same(dict(model.state_dict()), before)


def test_versions_of_modules_are_kept_under_clean_names() -> None:
    """A state dict's versions tell a module's loading code which format it meets."""
    model = net()
    wanted = model.state_dict()._metadata
    assert wanted["1"] == {"version": 2}
    wrapped = DataParallel(model)
    found = Named(wrapped, adamw(wrapped)).model_state()
    assert found._metadata["1"] == {"version": 2}  # type: ignore[attr-defined]
    data = io.BytesIO()
    torch.save(found, data)
    data.seek(0)
    assert torch.load(data, weights_only=True)._metadata["1"] == {"version": 2}


def test_loading_copies(tmp_path: Path) -> None:
    """Neither weights nor state go on sharing memory with what was read."""
    source = plain_net()
    optimizer = adamw(source)
    for p in source.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    saved, state = Named(source, optimizer).model_state(), copy.deepcopy(Named(source, optimizer).optimizer_state())
    kept = copy.deepcopy(dict(saved))
    model = plain_net()
    named = Named(model, adamw(model))
    named.load_model(saved, {})
    named.load_optimizer(state, named.options(), named.options(), {})
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    same(dict(saved), kept)
