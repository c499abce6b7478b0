"""WeightDecay: which parameter decays, in which group, and what that does to the weights."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from helpers import FORMS, adamw, assert_same_bits, bits, loader, loss_fn, net
from torch import nn

from hookloop.callbacks import Checkpoint, ClipGradients, GradientAccumulation, Seed, Warmup
from hookloop.callbacks.weight_decay import WeightDecay, decide
from hookloop.loop import Callback, Loop, State
from hookloop.loop.groups import as_text, describe, fold, regroup


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.fc, self.biased_fc = nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 4)


class TinyRMSNorm(nn.Module):
    """A norm of a user's own, with a matrix for a scale, as some are."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, 4))


class Model(nn.Module):
    """Everything that a rule by name gets wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.ln_f = nn.LayerNorm((2, 4))
        self.final = TinyRMSNorm()
        self.temperature = nn.Parameter(torch.ones(()))
        self.bias = nn.Parameter(torch.ones(2, 4))
        self.head = nn.Linear(4, 5, bias=False)


def decays(state: State) -> dict[str, float]:
    """Return name -> decay; each parameter stands in one group, once."""
    of = {p: g["weight_decay"] for g in state.optimizer.param_groups for p in g["params"]}
    assert len(of) == sum(len(g["params"]) for g in state.optimizer.param_groups)
    return {name: of[p] for name, p in state.model.named_parameters()}


def set_up(model: nn.Module, *args: Any, optimizer: Any = None, **kwargs: Any) -> State:
    state = State(model, optimizer or torch.optim.AdamW(model.parameters(), lr=0.1))
    WeightDecay(*args, **kwargs).on_setup(state)
    return state


WEIGHTS = {"embed.weight", "head.weight"} | {f"blocks.{i}.{n}.weight" for i in (0, 1) for n in ("fc", "biased_fc")}


def test_biases_norms_and_vectors_are_exempt_by_kind_and_not_by_name() -> None:
    state = set_up(Model(), default=0.3)
    found = decays(state)
    assert {name for name, decay in found.items() if decay == 0.3} == WEIGHTS
    assert {name for name, decay in found.items() if decay == 0.0} == found.keys() - WEIGHTS
    assert len(state.optimizer.param_groups) == 2
    assert set(decays(set_up(Model(), default=0.3, exempt=False)).values()) == {0.3}


@pytest.mark.parametrize(
    "norm",
    [nn.BatchNorm1d(4), nn.BatchNorm2d(4), nn.BatchNorm3d(4), nn.SyncBatchNorm(4), nn.LayerNorm((3, 4)), nn.GroupNorm(2, 4),
     nn.InstanceNorm1d(4, affine=True), nn.InstanceNorm2d(4, affine=True), nn.RMSNorm((3, 4)), TinyRMSNorm(),
     type("LayerNorm2d", (nn.Linear,), {})(4, 4), type("Mine", (TinyRMSNorm,), {})()],
)  # fmt: skip
def test_every_kind_of_norm(norm: nn.Module) -> None:
    state = set_up(nn.ModuleDict({"inner": norm}), optimizer=torch.optim.SGD(norm.parameters(), lr=1.0))
    assert set(decays(state).values()) == {0.0}


def test_a_norm_around_a_linear_does_not_exempt_it() -> None:
    """AdaLayerNorm of diffusers, PreNorm of many a transformer."""
    wrapper = type("PreNorm", (nn.Sequential,), {})(nn.LayerNorm(4), nn.Linear(4, 4))
    assert decays(set_up(wrapper)) == {"0.weight": 0.0, "0.bias": 0.0, "1.weight": 0.01, "1.bias": 0.0}


def test_the_first_match_wins() -> None:
    rules = {r"blocks\.0\.fc": 0.1, Block: 0.2, "fc": 0.9, nn.Embedding: 0.0, "weight$": 0.4}
    del rules["fc"]  # Block is around every fc, so this one would decide nothing
    found = decays(set_up(Model(), rules, default=0.5))
    assert found["blocks.0.fc.weight"] == 0.1
    assert found["blocks.0.biased_fc.weight"] == found["blocks.1.fc.weight"] == 0.2
    assert found["embed.weight"] == 0.0
    assert found["head.weight"] == 0.4
    assert {found[n] for n in found.keys() - WEIGHTS} == {0.0}


def test_a_rule_decides_for_exempt_ones_only_when_asked() -> None:
    rules: Any = {nn.LayerNorm: 0.2, "bias": 0.3}
    found = decays(set_up(Model(), rules, exempt=False))
    assert found["ln_f.weight"] == found["ln_f.bias"] == found["blocks.0.norm1.bias"] == 0.2
    assert found["blocks.0.fc.bias"] == found["bias"] == found["blocks.0.biased_fc.weight"] == 0.3
    assert found["temperature"] == 0.01
    zero = decays(set_up(Model(), {nn.LayerNorm: 0.0}))  # says what is so anyhow
    assert zero["ln_f.weight"] == 0.0


def test_a_decay_may_be_a_function_of_depth() -> None:
    found = decays(set_up(Model(), {"embed": 0.7, Block: lambda depth: 1.0 + depth}, default=lambda depth: 0.5 * depth))
    names = {n: found[n] for n in WEIGHTS}
    assert names.pop("embed.weight") == 0.7
    # the embedding, two blocks, the head, which the norms after the blocks do not come between
    assert names == {"blocks.0.fc.weight": 1 + 1 / 3, "blocks.0.biased_fc.weight": 1 + 1 / 3, "blocks.1.fc.weight": 1 + 2 / 3,
                     "blocks.1.biased_fc.weight": 1 + 2 / 3, "head.weight": 0.5}  # fmt: skip
    assert {found[n] for n in found.keys() - WEIGHTS} == {0.0}


@pytest.mark.parametrize("bad", [-1.0, math.nan, None, True, "1", torch.ones(())])
def test_a_function_of_depth_that_gives_no_decay(bad: Any) -> None:
    with pytest.raises(ValueError, match=r"a function of depth must give a finite decay, at least 0, not .* as it does at 0"):
        set_up(Model(), default=lambda depth: bad)


def test_the_root_itself_may_be_a_rule() -> None:
    assert decays(set_up(nn.Linear(3, 2), {nn.Linear: 0.7})) == {"weight": 0.7, "bias": 0.0}
    assert decays(set_up(nn.Linear(3, 2), {nn.Module: 0.7}))["weight"] == 0.7


def test_a_reference_update_by_hand() -> None:
    """Decoupled decay: p * (1 - lr * decay) - lr * Adam's step, which at first is the gradient's sign."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2)).double()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    state = set_up(model, {r"^2\.": 0.5}, default=0.2, optimizer=torch.optim.AdamW(model.parameters(), lr=0.1, eps=0.0))
    model(torch.randn(5, 4, dtype=torch.float64)).square().sum().backward()
    state.optimizer.step()
    for name, p in model.named_parameters():
        decay = {"0.weight": 0.2, "2.weight": 0.5}.get(name, 0.0)
        assert p.grad is not None
        expected = before[name] * (1 - 0.1 * decay) - 0.1 * p.grad.sign()
        assert torch.allclose(p.detach(), expected, rtol=1e-12, atol=1e-12), name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["fused", "foreach", "for"])
def test_in_a_loop_it_is_the_optimizer_built_with_these_groups(form: Any, kind: str) -> None:
    """Also with a fused AdamW: merged groups, bitwise those that a careful user writes."""
    options = {"fused": {"fused": True}, "foreach": {"foreach": True}, "for": {"foreach": False}}[kind]

    def run(by_callback: bool) -> Any:
        seed = Seed(0)
        model = net()
        own: dict[bool, list[Any]] = {True: [model[0].weight, model[4].weight], False: []}
        own[False] = [p for p in model.parameters() if all(p is not q for q in own[True])]
        groups = [{"params": own[True], "weight_decay": 0.4}, {"params": own[False], "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(model.parameters() if by_callback else groups, lr=0.05, **options)
        callbacks = [seed, Warmup(3), GradientAccumulation(2), *([WeightDecay(default=0.4)] if by_callback else [])]
        loop = Loop(model, optimizer, callbacks)
        form(loop, loss_fn, loader(50, 8), epochs=2)
        assert len(optimizer.param_groups) == 2
        return bits(loop)

    assert_same_bits(run(True), run(False))


def test_equal_settings_join_and_other_settings_survive() -> None:
    model = Model()
    weights = dict(model.named_parameters())
    blocks, rest = (
        [p for n, p in weights.items() if "blocks" in n],
        [p for n, p in weights.items() if "blocks" not in n],
    )
    special = [rest.pop()]
    optimizer = torch.optim.AdamW(
        [{"params": blocks, "weight_decay": 0.9}, {"params": rest}, {"params": special, "lr": 0.5, "mine": [1]}],
        lr=0.1,
        betas=(0.8, 0.9),
    )
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    held = {p: optimizer.state[p] for p in model.parameters()}
    listed = optimizer.param_groups
    state = set_up(model, optimizer=optimizer)
    assert optimizer.param_groups is listed
    assert [(g["weight_decay"], g["lr"], g.get("mine"), g["betas"]) for g in listed] == [
        (0.0, 0.1, None, (0.8, 0.9)), (0.01, 0.1, None, (0.8, 0.9)), (0.01, 0.5, [1], (0.8, 0.9))]  # fmt: skip
    assert all(optimizer.state[p] is held[p] for p in held)
    order = [p for g in listed for p in g["params"]]
    zero = [p for p in blocks + rest if decays(state)[next(n for n, q in weights.items() if q is p)] == 0.0]
    assert [id(p) for p in order[: len(zero)]] == [id(p) for p in zero]  # the order that they had
    WeightDecay().on_setup(state)  # again: nothing to do
    assert [id(p) for g in optimizer.param_groups for p in g["params"]] == [id(p) for p in order]


def test_names_of_a_named_optimizer_follow_their_parameters() -> None:
    model = Model()
    optimizer = torch.optim.AdamW(model.named_parameters())
    set_up(model, {"embed": 0.5}, optimizer=optimizer)
    names = {p: n for n, p in model.named_parameters()}
    for group in optimizer.param_groups:
        assert group["param_names"] == [names[p] for p in group["params"]]
    assert len(optimizer.param_groups) == 3
    optimizer.load_state_dict(optimizer.state_dict())


def test_groups_that_shared_a_rates_tensor_each_get_their_own() -> None:
    """State multiplies each group's rate for an update: a tensor that two groups share would be multiplied twice."""
    model, rate = Model(), torch.tensor(0.1)
    optimizer = torch.optim.AdamW([{"params": [p]} for p in model.parameters()], lr=rate)
    assert optimizer.param_groups[0]["lr"] is optimizer.param_groups[1]["lr"]
    state = set_up(model, optimizer=optimizer)
    rates = [g["lr"] for g in optimizer.param_groups]
    assert len(rates) == 2
    assert rates[0] is rate
    assert rates[1] is not rate
    state.scale_rate(0.5)
    before = state.apply_rates()
    assert [float(r) for r in rates] == [pytest.approx(0.05)] * 2
    state.restore_rates(before)
    assert [r.item() for r in rates] == [rate.item()] * 2
    one, two = torch.tensor(0.1), torch.tensor(0.1)
    linear = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    groups = [{"params": m.parameters(), "lr": lr} for m, lr in zip(linear, (one, two), strict=True)]
    # tensors of one value are equal settings, as numbers are
    assert len(set_up(nn.ModuleList(linear), optimizer=torch.optim.AdamW(groups)).optimizer.param_groups) == 1


# --- the rows of FAULTS.md


def test_op1_rule_that_matches_nothing() -> None:
    with pytest.raises(ValueError, match=r"rules has 'embd', which matches nothing; the closest are .*embed\.weight"):
        set_up(Model(), {"embd": 0.0})
    with pytest.raises(ValueError, match=r"EmbeddingBag.*matches nothing; the closest are Embedding, "):
        set_up(Model(), {nn.EmbeddingBag: 0.0})


def test_op1_rule_that_matches_everything() -> None:
    assert set(decays(set_up(Model(), {"": 0.3})).values()) == {0.0, 0.3}
    assert set(decays(set_up(Model(), {"": 0.3}, exempt=False)).values()) == {0.3}


def test_op1_rules_that_overlap() -> None:
    assert decays(set_up(Model(), {r"0\.fc": 0.1, "fc": 0.2}))["blocks.0.fc.weight"] == 0.1
    with pytest.raises(ValueError, match=r"rules has '0\\\\.fc', which decides nothing, since rules before it.*put it first"):
        set_up(Model(), {"fc": 0.2, r"0\.fc": 0.1})


def test_op1_rule_that_meets_only_what_is_exempt() -> None:
    for rule in (nn.LayerNorm, r"fc\.bias", "temperature", TinyRMSNorm):
        with pytest.raises(ValueError, match=r"decides only biases, norms and vectors, kept at 0.0 unless exempt=False"):
            set_up(Model(), {rule: 0.1})


@pytest.mark.parametrize("bad", [-0.1, math.nan, math.inf, "0.1", None, True, torch.tensor(0.1)])
def test_op2_decay_that_is_none(bad: Any) -> None:
    with pytest.raises(ValueError, match="default must be a finite decay, at least 0, not"):
        WeightDecay(default=bad)
    with pytest.raises(ValueError, match=r"rules\['embed'\] must be a finite decay, at least 0, not"):
        WeightDecay({"embed": bad})


@pytest.mark.parametrize("bad", ["(embed", "*", nn.Linear(1, 1), 3, None, int])
def test_op2_rule_that_is_no_expression(bad: Any) -> None:
    with pytest.raises(ValueError, match=r"rules has .*, neither an expression nor a module class"):
        WeightDecay({bad: 0.1})


@pytest.mark.parametrize("bad", [0.01, ["embed"], None])
def test_op2_rules_that_are_no_mapping(bad: Any) -> None:
    with pytest.raises(TypeError, match=r"rules must map expressions or module classes to decays.*see default="):
        WeightDecay(bad)


@pytest.mark.parametrize("form", FORMS)
def test_op3_frozen_ones_get_neither_decay_nor_state_and_train_when_unfrozen(form: Any) -> None:
    class Unfreeze(Callback):
        def on_epoch_end(self, state: Any) -> None:
            model[0].weight.requires_grad_(True)

    seed, model = Seed(0), net()
    model[0].weight.requires_grad_(False)
    frozen = model[0].weight.clone()
    optimizer = adamw(model)
    loop = Loop(model, optimizer, [seed, WeightDecay({"^0": 0.3}), Unfreeze()])
    form(loop, loss_fn, loader(50, 8), epochs=1)
    assert torch.equal(model[0].weight, frozen)
    assert model[0].weight not in optimizer.state
    form(loop, loss_fn, loader(50, 8), epochs=2)
    assert not torch.equal(model[0].weight, frozen)
    assert decays(loop.state)["0.weight"] == 0.3


def test_op3_frozen_later_stays() -> None:
    model = net()
    loop = Loop(model, adamw(model), [WeightDecay(default=0.5)])
    loop.fit(loss_fn, loader(50, 8), epochs=1)
    model[0].weight.requires_grad_(False)
    frozen = model[0].weight.clone()
    loop.fit(loss_fn, loader(50, 8), epochs=2)
    assert torch.equal(model[0].weight, frozen)


def test_op3_trainable_but_not_in_the_optimizer() -> None:
    model = Model()
    optimizer = torch.optim.AdamW(model.blocks.parameters())
    with pytest.raises(ValueError, match=r"not in the optimizer: \['temperature', 'bias', 'embed.weight'\] of 7"):
        set_up(model, optimizer=optimizer)
    model.requires_grad_(False).blocks.requires_grad_(True)
    assert decays_held(set_up(model, optimizer=optimizer)) == {0.0, 0.01}


def decays_held(state: State) -> set[float]:
    return {g["weight_decay"] for g in state.optimizer.param_groups}


def test_op3_frozen_ones_outside_the_optimizer_may_be_matched() -> None:
    model = Model()
    model.embed.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    state = set_up(model, {"embed": 0.3}, optimizer=optimizer)
    assert all(p is not model.embed.weight for g in state.optimizer.param_groups for p in g["params"])


def test_op4_tied_ones_are_counted_once_by_any_of_their_names() -> None:
    for rule in ("^embed", "^head", nn.Embedding, nn.Linear):
        model = Model()
        model.head.weight = model.embed.weight
        state = set_up(model, {rule: 0.3})
        assert decays(state)["embed.weight"] == 0.3
        assert sum(len(g["params"]) for g in state.optimizer.param_groups) == len(list(model.parameters()))
    shared = nn.ModuleList([block := Block(), block])
    assert decays(set_up(shared, {r"^1\.fc": 0.3}))["0.fc.weight"] == 0.3


def test_op4_listed_twice_in_the_optimizer_it_stands_once() -> None:
    linear = nn.Linear(2, 2)
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = torch.optim.SGD([linear.weight, linear.bias, linear.weight], lr=1.0)
    state = set_up(linear, optimizer=optimizer)
    assert [len(g["params"]) for g in state.optimizer.param_groups] == [1, 1]


def test_op4_tied_to_a_norm_is_exempt() -> None:
    model = nn.ModuleDict({"fc": nn.Linear(4, 1, bias=False), "final": TinyRMSNorm()})
    model["final"].scale = model["fc"].weight
    assert decays(set_up(model)) == {"fc.weight": 0.0}


def test_op9_decay_and_warmup_and_clip_in_any_order() -> None:
    def run(order: Any) -> Any:
        seed = Seed(0)
        model = net()
        callbacks = [WeightDecay({"^0": 0.3}), Warmup(5), ClipGradients(0.1)]
        loop = Loop(model, adamw(model), [seed, *(callbacks[i] for i in order)])
        loop.fit(loss_fn, loader(50, 8), epochs=2)
        return bits(loop)

    runs = [run(order) for order in itertools.permutations(range(3))]
    for other in runs[1:]:
        assert_same_bits(other, runs[0])


# --- what would go wrong later


@pytest.mark.parametrize("scheduler", [True, False])
def test_a_scheduler_built_before_is_refused_where_groups_change(scheduler: bool) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    if not scheduler:
        optimizer.param_groups[0]["initial_lr"] = 1e-3
    else:
        torch.optim.lr_scheduler.StepLR(optimizer, 1)
    before = [dict(g) for g in optimizer.param_groups]
    with pytest.raises(ValueError, match=r"a scheduler was built on these.*Schedule\(lambda optimizer, total_steps: ...\)"):
        set_up(model, optimizer=optimizer)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [g["weight_decay"] for g in before]


def test_a_scheduler_built_on_the_same_groups_is_kept() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    weights, biases = [model[0].weight, model[1].weight], [model[0].bias, model[1].bias]
    optimizer = torch.optim.AdamW([{"params": biases}, {"params": weights}], lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda t: 0.5**t, lambda t: 1.0])
    set_up(model, {"^1": 0.01}, optimizer=optimizer)
    optimizer.step()
    scheduler.step()
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.05, 0.0), (0.1, 0.01)]
    # as many groups, but other ones: each scheduler's function would act on what it was not made for
    optimizer = torch.optim.AdamW([{"params": model[0].parameters()}, {"params": model[1].parameters()}], lr=0.1)
    torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda t: 0.5**t, lambda t: 1.0])
    with pytest.raises(ValueError, match="a scheduler was built"):
        set_up(model, optimizer=optimizer)


def test_an_optimizer_without_decay_is_named() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="Rprop has no weight_decay; take an optimizer that has one, such as AdamW"):
        set_up(model, optimizer=torch.optim.Rprop(model.parameters()))


def test_a_lazy_parameter_is_named() -> None:
    model = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(ValueError, match=r"\['0.weight', '0.bias'\] have no shape yet; run one batch through"):
        set_up(model)
    assert "| 0 |" in as_text(describe(torch.optim.AdamW(model.parameters()), model))


def test_parameters_outside_the_model_keep_their_decay() -> None:
    model, scale = nn.Linear(2, 2), nn.Parameter(torch.ones(2, 2))
    optimizer = torch.optim.AdamW([{"params": model.parameters()}, {"params": [scale], "weight_decay": 0.7}])
    state = set_up(model, optimizer=optimizer)
    assert [g["weight_decay"] for g in optimizer.param_groups if any(p is scale for p in g["params"])] == [0.7]
    assert "(not in the model)" in as_text(describe(optimizer, state.model))


@pytest.mark.parametrize("at", [3, 9])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Any, at: int) -> None:
    class Stop(Callback):
        def on_step_end(self, state: Any) -> None:
            if state.step == at and stopping:
                state.save("here")
                state.stop("here")

    def run(resume: Any = None) -> Any:
        seed = Seed(0)
        model = net()
        callbacks = [seed, WeightDecay({"^0": 0.3}), Stop(), Checkpoint(tmp_path)]
        loop = Loop(model, adamw(model), callbacks, resume=resume)
        loop.fit(loss_fn, loader(50, 8), epochs=2)
        return bits(loop), decays(loop.state)

    stopping = False
    whole = run()
    stopping = True
    (tmp_path / "cut").mkdir()
    tmp_path = tmp_path / "cut"
    run()
    stopping = False
    resumed = run(tmp_path)
    assert_same_bits(resumed[0], whole[0])
    assert resumed[1] == whole[1]


def test_two_would_each_decide_all_groups_and_are_refused() -> None:
    model = net()
    with pytest.raises(ValueError, match="WeightDecay and WeightDecay both own weight decay of all groups"):
        Loop(model, adamw(model), [WeightDecay(default=0.1), WeightDecay(default=0.5).named("second")])


def test_table() -> None:
    decay = WeightDecay({"embed": 0.5})
    with pytest.raises(RuntimeError, match=r"WeightDecay.table\(\) runs after on_setup"):
        decay.table()
    model = Model()
    with Loop(model, torch.optim.AdamW(model.parameters(), lr=0.003), [decay]):
        lines = decay.table().splitlines()
    assert lines[0] == "| group | lr | weight_decay | tensors | parameters | names |"
    assert lines[1] == "| --- | --- | --- | --- | --- | --- |"
    rows = {line.split(" | ")[2]: line for line in lines[2:]}
    assert rows.keys() == {"0.0", "0.5", "0.01"} or rows.keys() == {"0", "0.5", "0.01"}
    assert "| 0.003 | 0.5 | 1 | 20 | embed.weight |" in rows["0.5"]
    assert "blocks.{0,1}.biased_fc.weight" in rows["0.01"]
    assert "blocks.{0,1}.norm1.weight" in (rows.get("0") or rows["0.0"])


def test_fold() -> None:
    names = ["h.0.w", "h.1.w", "h.3.a.0.w", "wte.w", "0.w", "2.w", "emb2.w", "p.0", "p.1", "x.7", "a", "a"]
    assert fold(names) == "h.{0,1}.w, h.3.a.0.w, wte.w, {0,2}.w, emb2.w, p.{0,1}, x.7, a"


def test_cores_alone() -> None:
    model = nn.Linear(2, 2)
    assert list(decide(model, {}, 0.5, True).values()) == [0.5, 0.0]
    groups: Any = [{"params": [model.weight, model.bias], "lr": 1.0, "weight_decay": 9}]
    new = regroup(groups, {"weight_decay": {model.weight: 0.5}})
    assert [(g["params"], g["weight_decay"], g["lr"]) for g in new] == [
        ([model.weight], 0.5, 1.0),
        ([model.bias], 9, 1.0),
    ]
    assert groups[0]["params"][0] is model.weight


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_models_of_hugging_face(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    if name == "gpt2":
        config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=11, n_positions=16)
    else:
        config = transformers.LlamaConfig(
            hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=11
        )
    model = transformers.AutoModelForCausalLM.from_config(config)
    state = set_up(model, {"wte|embed_tokens": 0.0}, default=0.1)
    found = decays(state)
    exempt = {n for n, d in found.items() if d == 0.0}
    matrices = {n for n, p in model.named_parameters() if p.ndim == 2}
    embedding = {n for n in found if "wte" in n or "embed_tokens" in n}
    assert exempt == (found.keys() - matrices) | embedding
    assert {n for n in found if "ln_" in n or "norm" in n} <= exempt
    assert len(state.optimizer.param_groups) == 2
    if name == "gpt2":  # wte and lm_head are one parameter, which the rule on wte decides
        assert found["transformer.wpe.weight"] == 0.1
        assert model.lm_head.weight is model.transformer.wte.weight
