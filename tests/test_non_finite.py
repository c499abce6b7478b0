"""NonFinite: what is not finite stops the run, is left out, or sends it back, each to the bit."""

from __future__ import annotations

import copy
import itertools
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FORMS, KillAt, Killed, assert_same_bits, bits, built_in
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from hookloop.callbacks import Checkpoint, ClipGradients, GradientAccumulation, MicroBatch, NonFinite, Schedule, Warmup
from hookloop.callbacks import non_finite as module
from hookloop.loop import Callback, Loop, State
from hookloop.loop.batch import move
from hookloop.loop.finite import finite as finite_numbers
from hookloop.loop.finite import numbers_of
from hookloop.loop.host import HostCopy

NAN, INF = math.nan, math.inf
COUNT = 6  # batches, each an update
FAULTS = ["loss", "gradient", "parameter", "buffer"]
NAMED = {"loss": "the loss", "gradient": "the gradient of emb.weight", "parameter": "emb.weight itself",
         "buffer": "buffer bn.running_var"}  # fmt: skip
MAIN = ["adamw", "fused", "momentum", "sparse"]
WHEN = [0, COUNT // 2, COUNT - 1]
KINDS = {
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=0.01),
    "fused": lambda ps: torch.optim.AdamW(ps, lr=0.01, fused=True),
    "fused with a tensor rate": lambda ps: torch.optim.AdamW(ps, lr=torch.tensor(0.01), fused=True),
    "momentum": lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9),
    "fused momentum": lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9, fused=True),
    "sparse": lambda ps: torch.optim.SparseAdam(ps, lr=0.01),
    "sparse sgd": lambda ps: torch.optim.SGD(ps, lr=0.05),
}


def finite(tensors: list[torch.Tensor]) -> torch.Tensor:
    found = [x for x in map(numbers_of, tensors) if x is not None]
    assert len(found) == len(tensors)
    return finite_numbers(found)


class Net(nn.Module):
    """An embedding, a BatchNorm, a linear layer, and what has no say: an unused parameter and an empty one."""

    def __init__(self, sparse: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.emb = nn.Embedding(9, 4, sparse=sparse)
        self.bn = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 3)
        self.unused = nn.Parameter(torch.ones(2))
        self.empty = nn.Parameter(torch.ones(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.bn(self.emb(x).mean(1))) + self.empty.sum()


def form_of(*numbers: Any) -> Any:
    """Take both forms of the loop in turns over a table of cases: half of them show it as well."""
    return FORMS[sum(n if isinstance(n, int) else [*KINDS, *FAULTS].index(n) for n in numbers) % 2]


def made(kind: str) -> tuple[Net, torch.optim.Optimizer]:
    model = Net(kind.startswith("sparse"))
    if kind == "sparse":  # SparseAdam takes nothing else
        for p in (*model.bn.parameters(), *model.head.parameters(), model.empty, model.unused):
            p.requires_grad_(False)
    return model, KINDS[kind](model.emb.parameters() if kind == "sparse" else model.parameters())


def batches(count: int = COUNT, size: int = 8) -> list[Any]:
    generator = torch.Generator().manual_seed(5)
    return [(torch.randint(0, 9, (size, 3), generator=generator), torch.randint(0, 3, (size,), generator=generator))
            for _ in range(count)]  # fmt: skip


def clean(model: Any, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


class Faulty:
    """A loss that breaks one thing in the given tries, counted by the forwards in training."""

    def __init__(self, fault: str, tries: Any, value: float = NAN) -> None:
        self.fault, self.tries, self.value, self.count = fault, set(tries), value, 0

    def __call__(self, model: Any, batch: Any) -> torch.Tensor:
        if not model.training:
            return clean(model, batch)
        now, self.count = self.count in self.tries, self.count + 1
        if now and self.fault == "parameter":
            with torch.no_grad():
                model.emb.weight[batch[0][0, 0], 1] = self.value
        loss = clean(model, batch)
        if now and self.fault == "gradient":
            held = model.emb.weight.register_hook(lambda grad: (held.remove(), self.spoilt(grad))[1])
        if now and self.fault == "buffer":
            model.bn.running_var.data[2] = self.value  # backward holds it
        return loss + self.value if now and self.fault == "loss" else loss  # its gradients stay finite

    def spoilt(self, grad: torch.Tensor) -> torch.Tensor:
        if grad.is_sparse:
            values = grad._values().clone()
            values[0, 1] = self.value
            return torch.sparse_coo_tensor(grad._indices(), values, grad.shape, check_invariants=True)
        grad = grad.clone()
        grad[1, 1] = self.value
        return grad


def reference(kind: str, bad: Any = (), action: str = "skip", every: int = 100, factor: float = 0.5,
              data: Any = None, warmup: int = 4) -> tuple[dict[str, Any], list[Any]]:  # fmt: skip
    """A loop written out, to which the bad tries never happen: bits as `helpers.bits` gives them, and each update's rate."""
    model, optimizer = made(kind)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.7)
    step, scale, rates = 0, 1.0, []
    kept = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    for number, batch in enumerate(batches() if data is None else data):
        group = optimizer.param_groups[0]
        if number in bad and action == "skip":
            continue
        if number in bad:
            before, scale = copy.deepcopy(group["lr"]), scale * factor
            model.load_state_dict(kept[0])
            optimizer.load_state_dict(copy.deepcopy(kept[1]))
            optimizer.param_groups[0]["lr"] = before
            continue
        optimizer.zero_grad()
        clean(model, batch).backward()
        before = group["lr"].clone() if isinstance(group["lr"], torch.Tensor) else group["lr"]
        group["lr"] = before * math.prod(sorted([min(1.0, (step + 1) / warmup), scale]))
        rates.append(float(group["lr"]))
        optimizer.step()
        group["lr"] = before
        scheduler.step()
        step += 1
        if step % every == 0:
            kept = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    held = Loop(model, optimizer)
    return bits(held) | {"rate": torch.as_tensor(optimizer.param_groups[0]["lr"])}, rates


class Rates(Callback):
    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_step_end(self, state: State) -> None:
        self.rates.append(float(state.rates[0]))


class Held(Callback):
    """Holds the optimizer's groups, as callbacks and schedulers may: nothing exchanges them."""

    def on_fit_start(self, state: State) -> None:
        self.groups = [*state.optimizer.param_groups]

    def on_fit_end(self, state: State) -> None:
        assert all(a is b for a, b in zip(self.groups, state.optimizer.param_groups, strict=True))


def around() -> list[Callback]:
    return [Warmup(4), Schedule(lambda optimizer, _: torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.7))]


def result(loop: Loop) -> dict[str, Any]:
    return bits(loop) | {"rate": torch.as_tensor(loop.state.optimizer.param_groups[0]["lr"])}


def without(found: dict[str, Any], *words: str) -> dict[str, Any]:
    return {name: x for name, x in found.items() if not any(word in name for word in words)}


def run(form: Any, kind: str, loss: Any, *callbacks: Callback, data: Any = None, **kwargs: Any) -> tuple[Loop, list[float]]:
    model, optimizer = made(kind)
    loop = Loop(model, optimizer, [*around(), rates := Rates(), *callbacks], **kwargs)
    form(loop, loss, batches() if data is None else data, epochs=1)
    return loop, rates.rates


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("fault", ["loss", "gradient", "buffer"])
def test_st2_skip_is_the_run_without_that_update(kind: str, when: int, fault: str, caplog: Any) -> None:
    form = form_of(kind, when, fault)
    value = {0: NAN, COUNT - 1: -INF}.get(when, INF)
    loop, rates = run(form, kind, Faulty(fault, {when}, value), NonFinite("skip"))
    expected, expected_rates = reference(kind, {when})
    assert_same_bits(result(loop), expected)
    assert rates == expected_rates
    state = loop.state
    assert (state.step, state.skipped, state.samples, state.epoch) == (COUNT - 1, 1, COUNT * 8, 1)
    text = f"not finite in update {when + 1}: {NAMED[fault]}; the update is skipped"
    assert [r.getMessage() for r in caplog.records] == [text]


@pytest.mark.parametrize("kind", MAIN)
@pytest.mark.parametrize("every", [2])
@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("fault", FAULTS)
def test_st2_rollback_is_the_run_from_the_last_kept(kind: str, every: int, when: int, fault: str, caplog: Any) -> None:
    form = form_of(kind, when, fault)
    loop, rates = run(form, kind, Faulty(fault, {when}), NonFinite("rollback", every=every), Held())
    expected, expected_rates = reference(kind, {when}, "rollback", every)
    assert_same_bits(result(loop), expected)
    assert rates == expected_rates
    assert (loop.state.step, loop.state.skipped, loop.state.samples) == (COUNT - 1, 1, COUNT * 8)
    [record] = caplog.records
    text = record.getMessage()
    assert text.startswith(f"not finite in update {when + 1}: ")
    assert NAMED[fault] in text
    assert text.endswith(f"; back to the weights of update {when // every * every}, rates times 0.5")


@pytest.mark.parametrize("kind", MAIN)
@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("fault", FAULTS)
def test_st2_stop_leaves_weights_and_checkpoint_whole(kind: str, when: int, fault: str, tmp_path: Path) -> None:
    form = FORMS[(when + FAULTS.index(fault)) % 2]
    model, optimizer = made(kind)
    loop = Loop(model, optimizer, [*around(), NonFinite(), Checkpoint(tmp_path, every=1)])
    with pytest.raises(FloatingPointError, match=f"not finite in update {when + 1}: .*{NAMED[fault]}"):
        form(loop, Faulty(fault, {when}), batches(), epochs=1)
    assert loop.state.step == when
    expected, _ = reference(kind, data=batches()[:when])
    # Its forwards ran: buffers are what they made of them, and a spoilt weight is still there.
    hidden = ("bn.", "emb.weight") if fault == "parameter" else ("bn.running", "num_batches")
    assert_same_bits(without(result(loop), *hidden), without(expected, *hidden))
    model, optimizer = made(kind)
    again = Loop(model, optimizer, [*around(), NonFinite(), Checkpoint(tmp_path, every=1)], resume=tmp_path)
    form(again, clean, batches(), epochs=1)
    assert_same_bits(result(again), reference(kind)[0])


@pytest.mark.parametrize("action", ["stop", "skip", "rollback"])
@pytest.mark.parametrize("kind", KINDS)
def test_st2_where_all_is_finite_it_changes_nothing(kind: str, action: str, caplog: Any) -> None:
    form = form_of(kind, len(action))
    loop, rates = run(form, kind, clean, NonFinite(action, every=2))
    expected, expected_rates = reference(kind)
    assert_same_bits(result(loop), expected)
    assert rates == expected_rates
    assert not caplog.records
    assert not [name for name in vars(loop.state.optimizer) if name in ("found_inf", "grad_scale")]


@pytest.mark.parametrize("form", FORMS)
def test_st2_without_it_nothing_is_checked(form: Any) -> None:
    loop, _ = run(form, "adamw", Faulty("gradient", {2}))
    assert loop.state.step == COUNT
    assert not loop.state.model.emb.weight.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("every", "bad"), [(3, (1, 2, 4)), (100, (1, 3, 5)), (2, (0, 3, 4)), (2, (2, 4)), (1, (2, 3))])
def test_st2_several_rollbacks_to_what_was_kept_once(kind: str, every: int, bad: Any) -> None:
    """What the optimizer does to the state put back does not reach what is kept."""
    loop, rates = run(built_in, kind, Faulty("gradient", bad), NonFinite("rollback", every=every, factor=0.25))
    expected, expected_rates = reference(kind, bad, "rollback", every, 0.25)
    assert_same_bits(result(loop), expected)
    assert rates == expected_rates


@pytest.mark.parametrize("kind", KINDS)
def test_st2_rollback_without_a_lower_rate(kind: str) -> None:
    loop, rates = run(built_in, kind, Faulty("gradient", {3}), NonFinite("rollback", factor=1, every=2))
    expected, expected_rates = reference(kind, {3}, "rollback", 2, 1.0)
    assert_same_bits(result(loop), expected)
    assert rates == expected_rates


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("action", ["skip", "rollback"])
@pytest.mark.parametrize("kind", ["adamw", "fused", "sparse sgd"])
def test_st2_one_micro_batch_spoils_its_update_alone(form: Any, kind: str, action: str) -> None:
    """Accumulation, and MicroBatch: the fault is in the second of three forwards of the second update."""
    for fault in ("loss", "gradient", "buffer"):
        data, counts = batches(9), []
        for faulty, dropped in ((Faulty(fault, {4}), ()), (clean, range(3, 6))):
            left = [b for i, b in enumerate(data) if i not in dropped]
            model, optimizer = made(kind)
            loop = Loop(model, optimizer, [GradientAccumulation(3), NonFinite(action, every=1, factor=1)])
            state = form(loop, faulty, left, epochs=1)
            counts.append((state.step, state.skipped, bits(loop)))
        assert [c[:2] for c in counts] == [(2, 1), (2, 0)]
        assert_same_bits(counts[0][2], counts[1][2])
        counts = []
        for faulty, dropped in ((Faulty(fault, {3}), ()), (clean, [1])):
            left = [b for i, b in enumerate(batches(4)) if i not in dropped]
            model, optimizer = made(kind)
            loop = Loop(model, optimizer, [MicroBatch(4), NonFinite(action, every=1, factor=1)])
            state = form(loop, faulty, left, epochs=1)
            counts.append((state.step, state.skipped, bits(loop)))
        assert [c[:2] for c in counts] == [(3, 1), (3, 0)]
        assert_same_bits(counts[0][2], counts[1][2])


def test_st2_large_losses_of_micro_batches_are_no_false_alarm() -> None:
    """Each is finite, though their sum is not."""
    model, optimizer = made("adamw")
    loop = Loop(model, optimizer, [GradientAccumulation(3), NonFinite()])
    state = built_in(loop, lambda m, b: clean(m, b) * 0 + 3e38, batches(), epochs=1)
    assert (state.step, state.skipped) == (2, 0)


def test_st2_a_loss_of_validation_is_not_an_update_s() -> None:
    def loss(model: Any, batch: Any) -> Any:
        return clean(model, batch) if model.training else torch.tensor(NAN)

    model, optimizer = made("adamw")
    state = built_in(Loop(model, optimizer, [NonFinite()]), loss, batches(), batches(2), epochs=2)
    assert state.step == 2 * COUNT


def test_st2_a_step_redone_after_out_of_memory_forgets_the_failed_try() -> None:
    """The failed try had met a NaN before the memory ran out; the redone step meets none."""
    calls: list[int] = []

    def loss(model: Any, batch: Any) -> Any:
        calls.append(len(batch[0]))
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return clean(model, batch) + (NAN if len(calls) == 1 else 0)

    model, optimizer = made("adamw")
    state = built_in(
        Loop(model, optimizer, [MicroBatch("auto"), GradientAccumulation(2), NonFinite()]), loss, batches(2), epochs=1
    )
    assert (state.step, state.skipped) == (1, 0)
    assert calls == [8, 8, 4, 4, 4, 4]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["adamw", "fused"])
@pytest.mark.parametrize("action", ["skip", "rollback"])
def test_st2_beside_a_scaler(form: Any, kind: str, action: str) -> None:
    """Gradients are the scaler's to skip, and then nothing rolls back; a loss and buffers are NonFinite's."""
    for fault in ("gradient", "loss"):
        model, optimizer = made(kind)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=99)
        loop = Loop(model, optimizer, [own := NonFinite(action, every=1)], scaler=scaler)
        state = form(loop, Faulty(fault, {3}, INF), batches(), epochs=1)
        assert (state.step, state.skipped) == (COUNT - 1, 1)
        assert scaler.get_scale() == (2.0 if fault == "gradient" else 4.0)
        assert own.scale == (0.5 if fault == "loss" and action == "rollback" else 1.0)
        model, optimizer = made(kind)
        other = Loop(model, optimizer)
        form(other, clean, [b for i, b in enumerate(batches()) if i != 3], epochs=1)
        if own.scale == 1.0:
            hidden = ("bn.running", "num_batches") if (fault, action) == ("gradient", "rollback") else ("nothing",)
            assert_same_bits(without(bits(loop), *hidden), without(bits(other), *hidden))
        else:
            assert not torch.equal(bits(loop)["emb.weight"], bits(other)["emb.weight"])


class Late(HostCopy):
    """Nothing arrives before it is waited for: the slowest of devices."""

    def take(self, all: bool = False) -> list[Any]:
        return super().take(all) if all else []


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["fused"])
@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("saves", [None, 1, 3])
def test_st4_a_verdict_that_arrives_late_stops_before_the_next_update(
    form: Any, kind: str, when: int, saves: int | None, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(module, "HostCopy", Late)
    model, optimizer = made(kind)
    saving = [Checkpoint(tmp_path, every=saves)] if saves else []
    loop = Loop(model, optimizer, [*around(), *saving, NonFinite()])
    with pytest.raises(FloatingPointError, match=f"not finite in update {when + 1}: the gradient of emb.weight"):
        form(loop, Faulty("gradient", {when}), batches(), epochs=1)
    assert loop.state.step == when + 1  # no more than the one
    if saves:
        held = [torch.load(path, weights_only=True) for path in tmp_path.glob("*/model.pt")]
        assert len(held) == min(3, when // saves)
        assert all(x.isfinite().all() for one in held for x in one.values())
        model, optimizer = made(kind)
        again = Loop(model, optimizer, [*around(), Checkpoint(tmp_path, every=saves), NonFinite()], resume=tmp_path)
        form(again, clean, batches(), epochs=1)
        assert_same_bits(result(again), reference(kind)[0])


def test_st4_a_late_verdict_names_the_gradients_of_its_own_update(monkeypatch: Any) -> None:
    """The next update has gradients of other parameters."""
    monkeypatch.setattr(module, "HostCopy", Late)
    a, b, c = (nn.Parameter(torch.ones(1)) for _ in range(3))
    model = nn.ParameterDict({"a": a, "b": b, "c": c})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state, own = State(model, optimizer), NonFinite()
    b.grad, c.grad = torch.tensor([NAN]), torch.ones(1)
    own._check(state)
    a.grad, b.grad = torch.ones(1), None
    with pytest.raises(FloatingPointError, match=r"update 1: the gradient of b$"):
        own._check(state)


@pytest.mark.parametrize("action", ["skip", "rollback"])
@pytest.mark.parametrize("kind", KINDS)
def test_st4_a_late_verdict_skips_and_rolls_back_the_same(kind: str, action: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "HostCopy", Late)
    loop, rates = run(built_in, kind, Faulty("gradient", {0, 3}), NonFinite(action, every=2))
    expected, expected_rates = reference(kind, {0, 3}, action, 2)
    assert_same_bits(result(loop), expected)
    assert rates == expected_rates


class Reads(TorchDispatchMode):
    """Notes each operation that brings a number to the host; `tolist` of a tensor there is none."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in str(func) for name in ("_local_scalar_dense", "nonzero", "is_nonzero", "aten.equal", "masked_select")):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("kind", "action"), [("fused", "stop"), ("fused", "skip"), ("fused", "rollback"), ("momentum", "stop")]
)
def test_st4_an_update_reads_one_verdict_and_nothing_else(kind: str, action: str, monkeypatch: Any) -> None:
    class Watched(HostCopy):
        taken = 0

        def take(self, all: bool = False) -> list[Any]:
            found = super().take(all)
            type(self).taken += len(found)
            return found

    def reads(*callbacks: Callback) -> tuple[list[str], int]:
        model, optimizer = made(kind)
        Watched.taken, seen = 0, []
        with Loop(model, optimizer, callbacks) as loop:
            for _ in loop.epochs(1):
                for step in loop.steps(batches()):
                    with Reads() as mode:
                        for micro in step:
                            with micro:
                                micro.backward(clean)
                        loop.update()
                    seen += mode.seen
        return seen, Watched.taken

    monkeypatch.setattr(module, "HostCopy", Watched)
    assert reads(NonFinite(action)) == (reads()[0], COUNT)


def test_st4_the_verdict_is_reached_where_the_numbers_lie(monkeypatch: Any) -> None:
    """Tensors of the meta device have no data: whatever read one would raise."""
    put: list[Any] = []
    monkeypatch.setattr(HostCopy, "put", lambda self, about, values, **_: put.append(values["good"]))
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    for p in model.parameters():
        p.grad = torch.empty_like(p)
    for action in ("stop", "skip"):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer._step_supports_amp_scaling = True
        optimizer.param_groups[0]["fused"] = True
        state = State(model, optimizer)
        own = NonFinite(action)
        own._buffers = {"1.running_mean", "1.running_var"}
        own._check(state)
        assert put[-1].shape == (6,)
        assert put[-1].is_meta
        assert getattr(optimizer, "found_inf", put[-1]).is_meta
        assert hasattr(optimizer, "found_inf") == (action == "skip")
    with pytest.raises(NotImplementedError, match="meta"):
        put[-1].any().tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("when", WHEN)
def test_st4_a_nan_weight_from_outside_can_not_be_skipped(kind: str, when: int) -> None:
    form = form_of(kind, when)
    model, optimizer = made(kind)
    loop = Loop(model, optimizer, [*around(), NonFinite("skip", patience=2)])
    data = [(x.clone().fill_(4), y) for x, y in batches(COUNT + 1)]  # all of them meet that row
    with pytest.raises(FloatingPointError, match=r"emb\.weight itself.*\(2 bad updates in a row: patience=2\)"):
        form(loop, Faulty("parameter", {when}), data, epochs=1)
    assert (loop.state.step, loop.state.skipped) == (when, 1)
    expected, _ = reference(kind, data=data[:when])
    hidden = ("bn.", "emb.weight", *(["optimizer"] if when == 0 else []))  # a fused one has made its state, of zeros
    assert_same_bits(without(result(loop), *hidden), without(expected, *hidden))
    assert not any(x.any() for name, x in bits(loop).items() if name.startswith("optimizer") and when == 0)
    seen = int((~loop.state.model.emb.weight.isfinite()).sum())
    assert seen == 1  # the one that was put there


def test_st4_a_spoilt_weight_is_named_among_many_gradients() -> None:
    model = nn.Sequential(*[nn.Linear(3, 3) for _ in range(20)])
    with torch.no_grad():
        model[7].bias[1] = NAN
    data = [(torch.randn(4, 3), torch.randint(0, 3, (4,)))]
    with pytest.raises(FloatingPointError, match=r"update 1: .*7\.bias itself.* and \d+ more"):
        built_in(Loop(model, torch.optim.SGD(model.parameters(), lr=0.1), [NonFinite()]), clean, data, epochs=1)


def test_st4_rollback_with_nothing_good_to_go_back_to(caplog: Any) -> None:
    """Weights that are not finite from the start are never kept."""
    model, optimizer = made("adamw")
    with torch.no_grad():
        model.head.bias[0] = NAN
    own = NonFinite("rollback", patience=3)
    with pytest.raises(FloatingPointError, match=r"head\.bias itself.*3 bad updates in a row"):
        built_in(Loop(model, optimizer, [own]), clean, batches(), epochs=1)
    assert own.state_dict()["kept"] is None
    entry, first, *rest = [r.getMessage() for r in caplog.records]
    assert entry == first == "nothing new is kept to roll back to: after update 0 head.bias is not finite"
    assert [text.rpartition("; ")[2] for text in rest] == ["the update is skipped"] * 2


@pytest.mark.parametrize("action", ["skip", "rollback"])
@pytest.mark.parametrize("kind", ["adamw", "fused"])
@pytest.mark.parametrize("persistent", [True, False])
def test_st4_a_mask_of_minus_infinity_is_no_fault(kind: str, action: str, persistent: bool) -> None:
    """A buffer that was not finite when training began (an attention mask) is as its author wants it."""
    found = []
    for masked in (True, False):
        model, optimizer = made(kind)
        if masked:
            model.register_buffer("mask", torch.full((3, 3), -INF).triu(1), persistent=persistent)
        state = built_in(
            loop := Loop(model, optimizer, [NonFinite(action, every=2)]), Faulty("gradient", {3}), batches(), epochs=1
        )
        assert (state.step, state.skipped) == (COUNT - 1, 1)
        found.append(without(bits(loop), "mask"))
    assert_same_bits(*found)
    model, optimizer = made(kind)
    model.register_buffer("mask", torch.full((3, 3), -INF).triu(1), persistent=persistent)
    with pytest.raises(FloatingPointError, match=r"(?m)update 4: buffer bn\.running_var$"):
        built_in(Loop(model, optimizer, [NonFinite()]), Faulty("buffer", {3}), batches(), epochs=1)


class Masked(nn.Module):
    """Two heads on one embedding, of which a parameter that both hold masks a class."""

    def __init__(self, frozen: bool) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.emb, self.one, self.two = nn.Embedding(9, 4), nn.Linear(4, 3), nn.Linear(4, 3)
        self.mask = nn.Parameter(torch.tensor([0.0, 0.0, -INF]), requires_grad=not frozen)
        self.one.mask = self.mask

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.emb(x).mean(1)
        return (self.one(x) + self.one.mask).softmax(-1) + (self.two(x) + self.mask).softmax(-1)


@pytest.mark.parametrize("action", ["skip", "rollback", "stop"])
def test_st4_a_weight_that_is_a_mask_is_no_fault(action: str, caplog: Any) -> None:
    """It is not named as one, and kept with the others; what makes it NaN is."""
    seen: dict[int, Any] = {}

    class Look(Callback):
        def on_step_start(self, state: State) -> None:
            seen[state.step + state.skipped] = state.model.emb.weight.tolist()

    class Break(Callback):
        def on_step_start(self, state: State) -> None:
            if state.step == 3:
                state.model.mask.data[0] = NAN

    for frozen in (False, True):
        model = Masked(frozen)
        loop = Loop(model, torch.optim.SGD(model.parameters(), lr=0.1), [NonFinite(action, every=2, factor=1), Look()])
        beside = "" if frozen else "; mask held infinities before the first step"
        text = f"not finite in update 4: the gradient of emb.weight{beside}"
        if action == "stop":
            with pytest.raises(FloatingPointError) as caught:
                built_in(loop, Faulty("gradient", {3}), batches(), epochs=1)
            assert str(caught.value) == text
            model = Masked(frozen)
            loop = Loop(model, torch.optim.SGD(model.parameters(), lr=0.1), [NonFinite(), Break()])
            with pytest.raises(FloatingPointError, match=r"update 4: mask itself, the loss"):
                built_in(loop, clean, batches(), epochs=1)
            continue
        built_in(loop, Faulty("gradient", {3}), batches(), epochs=1)
        assert (loop.state.step, loop.state.skipped) == (COUNT - 1, 1)
        assert model.mask[2] == -INF
        end = "; back to the weights of update 2, rates times 1" if action == "rollback" else "; the update is skipped"
        assert [r.getMessage() for r in caplog.records] == [text + end]
        assert seen[4] == seen[2 if action == "rollback" else 3] != seen[1]
        caplog.clear()


@pytest.mark.parametrize("kind", ["adamw", "fused"])
def test_st4_rollback_of_a_buffer_that_is_in_no_checkpoint(kind: str) -> None:
    model, optimizer = made(kind)
    model.register_buffer("seen", torch.zeros(2), persistent=False)
    kept = []

    def loss(m: Any, batch: Any) -> Any:
        kept.append(m.seen.tolist())
        m.seen += 1
        return clean(m, batch) * (NAN if len(kept) == 4 else 1)

    state = built_in(Loop(model, optimizer, [NonFinite("rollback", every=2)]), loss, batches(), epochs=1)
    assert (state.step, state.skipped) == (COUNT - 1, 1)
    assert [row[0] for row in kept] == [0, 1, 2, 3, 2, 3]


def test_st4_a_buffer_broken_before_the_step_is_put_back_broken() -> None:
    """skip undoes what the step did; what came from elsewhere stays, is named, and ends the run."""

    class Break(Callback):
        def on_step_start(self, state: State) -> None:
            if state.step == 2:
                state.model.bn.running_mean[0] = NAN

    model, optimizer = made("adamw")
    with pytest.raises(FloatingPointError, match=r"update 3: buffer bn\.running_mean \(2 bad"):
        built_in(Loop(model, optimizer, [NonFinite("skip", patience=2), Break()]), clean, batches(), epochs=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64])
def test_st4_finite_to_the_last_number(dtype: torch.dtype) -> None:
    """At any place of any size; and the largest finite number is finite."""
    most = torch.finfo(dtype).max
    for size in (1, 2, 7, 33, 130):
        for value, good in ((NAN, False), (INF, False), (-INF, False), (most, True), (-most, True), (0.0, True)):
            for place in {0, size // 2, size - 1}:
                x = torch.full((size,), most * (1 + 1j) if dtype.is_complex else most, dtype=dtype)
                x[place] = value
                assert finite([torch.ones(3), x, torch.ones(2, dtype=dtype)]).tolist() == [True, good, True]
                assert finite([x]).tolist() == [good]
                x = x.reshape(1, size).t()
                assert finite([x]).tolist() == [good]


def test_st4_finite_of_sparse_gradients() -> None:
    def sparse(rows: list[int], values: torch.Tensor) -> torch.Tensor:
        return torch.sparse_coo_tensor(torch.tensor([rows], dtype=torch.long), values, (5, 2), check_invariants=True)

    empty, large = sparse([], torch.zeros(0, 2)), torch.full((2, 2), 3e38)
    bad = sparse([1, 2], torch.tensor([[1.0, 1.0], [1.0, NAN]]))
    twice, once = sparse([1, 1], large), sparse([1, 2], large)  # the optimizer adds them
    assert finite([empty, twice, once, bad]).tolist() == [True, False, True, False]
    assert finite([empty]).tolist() == [True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.complex64])
@pytest.mark.parametrize("action", ["skip", "rollback"])
def test_st4_weights_of_other_types(dtype: torch.dtype, action: str) -> None:
    def make() -> Any:
        torch.manual_seed(0)
        model = nn.Linear(3, 2, dtype=dtype)
        model.register_buffer("counts", torch.zeros(2, dtype=torch.int64))
        return model, torch.optim.AdamW(model.parameters(), lr=0.1)

    data = [torch.randn(4, 3, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(5)]
    found = []
    for bad in (True, False):
        model, optimizer = make()
        tries = iter(range(9))

        def loss(m: Any, x: Any, tries: Any = tries, bad: bool = bad) -> Any:
            value = m(x).abs().square().mean()
            return value * NAN if next(tries) == 2 and bad else value

        loop = Loop(model, optimizer, [NonFinite(action, every=1, factor=1)])
        state = built_in(loop, loss, [x for i, x in enumerate(data) if bad or i != 2], epochs=1)
        assert (state.step, state.skipped) == (4, bad)
        found.append(bits(loop))
    assert_same_bits(*found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("action", ["skip", "rollback"])
def test_st5_so_many_in_a_row_end_the_run(kind: str, action: str, caplog: Any) -> None:
    form = form_of(kind, len(action))
    model, optimizer = made(kind)
    loop = Loop(model, optimizer, [*around(), own := NonFinite(action, 3, every=1)])
    with pytest.raises(FloatingPointError, match=r"in update 3: the gradient.* \(3 bad updates in a row: patience=3\)"):
        form(loop, Faulty("gradient", {0, 1, 4, 5, 6}), batches(8), epochs=1)  # two, then three
    assert (loop.state.step, loop.state.skipped, own.row) == (2, 4, 3)
    assert len(caplog.records) == 4
    hidden = ("bn.running", "num_batches")  # the forward of the one that raised
    expected, _ = reference(kind, {0, 1, 4, 5}, action, 1, data=batches(8)[:6])
    assert_same_bits(without(result(loop), *hidden), without(expected, *hidden))


@pytest.mark.parametrize("action", ["skip", "rollback"])
def test_st5_patience_of_one(action: str) -> None:
    loop = Loop(*made("adamw"), [NonFinite(action, 1)])
    with pytest.raises(FloatingPointError, match="1 bad updates in a row"):
        built_in(loop, Faulty("loss", {1}), batches(), epochs=1)
    assert (loop.state.step, loop.state.skipped) == (1, 0)


@pytest.mark.parametrize(("kind", "every"), [("adamw", 1), ("fused", 1), ("fused", 3), ("fused momentum", 3), ("sparse", 3)])
@pytest.mark.parametrize("action", ["skip", "rollback"])
def test_st2_killed_and_resumed_it_is_the_same_run(action: str, kind: str, every: int, tmp_path: Path) -> None:
    """Faults at tries 2, 3 and 7 of 12; killed at each update, so before, between and after."""
    bad, count = {2, 3, 7}, 12
    data = batches(count)

    def loss(model: Any, batch: Any) -> Any:  # by the data, since a resumed run counts its forwards anew
        tried = next(i for i, (x, _) in enumerate(data) if torch.equal(x, batch[0]))
        return clean(model, batch) + (NAN if tried in bad else 0)

    def go(folder: Path, kill: int | None) -> Any:
        model, optimizer = made(kind)
        own = NonFinite(action, every=2)
        loop = Loop(model, optimizer, [*around(), own, Checkpoint(folder, every=every), KillAt(kill)], resume=folder)
        built_in(loop, loss, data, epochs=1)
        return loop, own

    whole, own = go(tmp_path / "whole", None)
    expected, _ = reference(kind, bad, action, 2, data=data)
    assert_same_bits(result(whole), expected)
    for kill in range(1, count - len(bad) + 1):
        folder = tmp_path / str(kill)
        with pytest.raises(Killed):
            go(folder, kill)
        again, other = go(folder, None)
        assert_same_bits(result(again), expected)
        assert (again.state.step, again.state.skipped, again.state.samples) == (9, 3, 96)
        assert (other.scale, other.row) == (own.scale, own.row)


def test_st5_the_row_goes_on_after_a_restart(tmp_path: Path) -> None:
    """A save asked for before the next step falls within a row."""

    class Save(Callback):
        def on_step_start(self, state: State) -> None:
            if state.skipped == 2:
                raise Killed
            state.save("asked")

    saving = [NonFinite("skip", 3), Checkpoint(tmp_path), Save()]
    with pytest.raises(Killed):
        built_in(Loop(*made("adamw"), saving), Faulty("loss", range(6)), batches(), epochs=1)
    loop = Loop(*made("adamw"), [NonFinite("skip", 3), Checkpoint(tmp_path)], resume=tmp_path)
    with pytest.raises(FloatingPointError, match=r"in update 1: the loss .3 bad updates in a row"):
        built_in(loop, Faulty("loss", range(6)), batches(), epochs=1)
    assert loop.state.skipped == 2  # one before the save, one after, and the one that ended it


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("action", ["stop", "skip", "rollback"])
@pytest.mark.parametrize("when", WHEN)
def test_st2_around_a_loop_of_your_own(kind: str, action: str, when: int) -> None:
    fault = ["gradient", "buffer"][([*KINDS].index(kind) + when) % 2]
    model, optimizer = made(kind)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.7)
    loss_fn, loop = Faulty(fault, {when}, INF), Loop(model, optimizer, [Warmup(4), NonFinite(action, every=2)])
    seen: list[bool] = []

    def train() -> None:
        with loop:
            for batch in batches():
                optimizer.zero_grad()
                loss = loss_fn(model, batch)
                loss.backward()
                done = loop.state.step
                with loop.updating(loss, len(batch[0])):
                    seen.append(all(p.grad is None for p in model.parameters()))
                    optimizer.step()
                if loop.state.step > done:
                    scheduler.step()

    if action == "stop":
        with pytest.raises(FloatingPointError, match=f"update {when + 1}: {NAMED[fault]}"):
            train()
        expected, _ = reference(kind, data=batches()[:when])
        hidden = ("bn.running", "num_batches")
        assert_same_bits(without(result(loop), *hidden), without(expected, *hidden))
        return
    train()
    expected, _ = reference(kind, {when}, action, 2)
    assert_same_bits(result(loop), expected)
    assert (loop.state.step, loop.state.skipped) == (COUNT - 1, 1)
    fresh_momentum = kind == "fused momentum" and when == 0
    assert seen[when] == ("fused" not in kind or fresh_momentum)
    assert not any(seen[:when] + seen[when + 1 :])


@pytest.mark.parametrize("kind", ["adamw", "fused"])
def test_st2_driven_without_a_loop(kind: str) -> None:
    model, optimizer = made(kind)
    state, own = State(model, optimizer), NonFinite("skip", 2)
    own.on_setup(state)
    own.on_fit_start(state)
    before = copy.deepcopy(model.state_dict())
    loss = Faulty("gradient", {0, 1})
    loss(model, batches()[0]).backward()
    own._check(state)
    if kind == "fused":
        optimizer.step()
        assert not state.settle()
        assert "emb.weight" in state.skip_reason
    else:
        assert "emb.weight" in state._skip
    assert torch.equal(before["emb.weight"], model.emb.weight)
    state.drop_factors()

    def again() -> None:
        own._check(state)
        state.settle()

    with pytest.raises(FloatingPointError, match="2 bad updates"):
        again()
    state = State(model, optimizer)
    NonFinite().on_setup(state)
    with pytest.raises(FloatingPointError, match=r"update 1: the gradient of emb\.weight"):
        state.checks[0](state)


@pytest.mark.parametrize("action", ["stop", "skip", "rollback"])
def test_st4_what_stopped_the_run_is_no_mask_when_it_is_entered_again(action: str) -> None:
    model, optimizer = made("adamw")
    loop = Loop(model, optimizer, [NonFinite(action, patience=1)])
    for _ in range(2):
        with pytest.raises(FloatingPointError, match=r"buffer bn\.running_var"):
            built_in(loop, Faulty("buffer", {0}, INF), batches(), epochs=1)
    assert loop.state.step == 0


@pytest.mark.parametrize("action", ["skip", "rollback"])
def test_st2_around_a_loop_a_compiled_model_compiles_no_more(action: str) -> None:
    """Once for training and once for validation, with and without."""
    counts = []
    for own in ([], [NonFinite(action, every=2)]):
        torch._dynamo.reset()
        counter = CompileCounter()
        model, optimizer = made("adamw")
        compiled: Any = torch.compile(model, backend=counter)
        with Loop(compiled, optimizer, own) as loop:
            for batch in batches() * 2:
                clean(compiled, batch).backward()
                with loop.updating():
                    optimizer.step()
                optimizer.zero_grad()
                compiled.eval()
                with torch.no_grad():
                    clean(compiled, batch)
                compiled.train()
        counts.append(counter.frame_count)
    assert counts == [2, 2]


@pytest.mark.parametrize("kind", ["adamw", "fused"])
@pytest.mark.parametrize("scheduled", [True, False])
def test_st2_a_closure_does_not_make_a_skipped_update_after_all(kind: str, scheduled: bool) -> None:
    model, optimizer = made(kind)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0) if scheduled else None
    step, calls = optimizer.step, [0]
    loop = Loop(model, optimizer, [NonFinite("skip")])
    with loop:
        for number, batch in enumerate(batches(4)):

            def closure(number: int = number, batch: Any = batch) -> Any:
                calls[0] += 1
                optimizer.zero_grad()
                loss = clean(model, batch) * (NAN if number == 2 else 1)
                loss.backward()
                return loss

            closure()
            before = bits(loop)
            with loop.updating(samples=8):
                optimizer.step(closure)
            if number == 2:
                assert_same_bits(without(bits(loop), "bn."), without(before, "bn."))
    assert (loop.state.step, loop.state.skipped) == (3, 1)
    assert calls[0] == (8 if kind == "fused" else 7)
    assert optimizer.step == step
    assert scheduler is None or scheduler.optimizer is optimizer


def test_st2_a_scaler_that_the_loop_was_not_given_is_named() -> None:
    model, optimizer = made("fused")
    scaler, loop = torch.amp.GradScaler("cpu"), Loop(model, optimizer, [NonFinite("skip")])

    def train() -> None:
        with loop:
            scaler.scale(clean(model, batches(1)[0])).backward()
            with loop.updating():
                scaler.step(optimizer)

    with pytest.raises(RuntimeError, match=r"a GradScaler stepped the optimizer.*Loop\(scaler=\)"):
        train()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("action", ["skip", "rollback"])
def test_st2_groups_that_are_not_all_fused(form: Any, action: str) -> None:
    found = []
    for bad in (True, False):
        model, _ = made("adamw")
        groups = [
            {"params": model.head.parameters()},
            {"params": [*model.emb.parameters(), *model.bn.parameters()], "fused": False},
        ]
        loop = Loop(model, torch.optim.AdamW(groups, lr=0.01, fused=True), [NonFinite(action, every=1, factor=1)])
        model.unused.requires_grad_(False)
        model.empty.requires_grad_(False)
        data = batches() if bad else [b for i, b in enumerate(batches()) if i != 3]
        form(loop, Faulty("gradient", {3} if bad else ()), data, epochs=1)
        assert loop.state.skipped == bad
        found.append(bits(loop))
    assert_same_bits(*found)


class Odd(nn.Module):
    """A layer, and a buffer that its forward treats in its own way."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.how, self.count = nn.Linear(4, 4), how, 0
        first = {"none": None, "grows": torch.zeros(1), "resized": torch.zeros(1), "expanded": torch.ones(1, 4).expand(8, 4),
                 "csr": torch.eye(4).to_sparse_csr(), "coo": torch.eye(4).to_sparse_coo(), "meta": torch.ones(2, device="meta"),
                 "eight": torch.ones(4).to(torch.float8_e4m3fn)}  # fmt: skip
        if how in first:
            self.register_buffer("b", first[how])
        if how == "frozen eight":
            self.frozen = nn.Parameter(torch.ones(4).to(torch.float8_e4m3fn), requires_grad=False)

    def get_extra_state(self) -> Any:
        return {"calls": [self.count]}

    def set_extra_state(self, state: Any) -> None:
        self.count = state["calls"][0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.how == "extra":
            self.count += 1
        elif self.how == "none" and self.b is None:
            self.b = x.mean(0).detach()
        elif self.how == "new" and "b" not in self._buffers:
            self.register_buffer("b", x.mean(0).detach())
        elif self.how == "grows":
            self.b = torch.cat([self.b, x.mean().detach().view(1)])
        elif self.how == "resized":
            self.b.resize_(len(self.b) + 1)[-1] = x.detach().mean()
        return self.fc(x)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("action", ["stop", "skip", "rollback"])
@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("how", ["none", "new", "grows", "resized", "expanded", "csr", "coo", "meta", "eight", "frozen eight"])
def test_st4_buffers_and_weights_of_every_kind(how: str, action: str, form: Any) -> None:
    """Filled late, made by the forward, of another size each time, or of a type without arithmetic."""
    data = list(torch.randn(5, 8, 4, generator=torch.Generator().manual_seed(1)))
    found = []
    for bad in ({0, 3}, ()):
        model = Odd(how)
        broken = [x * NAN if i in bad else x for i, x in enumerate(data) if bad or i not in (0, 3)]
        loop = Loop(model, torch.optim.AdamW(model.fc.parameters(), lr=0.1), [NonFinite(action, every=1, factor=1)])
        if bad and action == "stop":
            with pytest.raises(FloatingPointError, match=r"update 1: the loss, the gradient of fc\.weight"):
                form(loop, lambda m, x: m(x).square().mean(), broken, epochs=1)
            return
        form(loop, lambda m, x: m(x).square().mean(), broken, epochs=1)
        assert (loop.state.step, loop.state.skipped) == (3, 2 if bad else 0)
        state = {**loop.state.model.state_dict(), **dict(loop.state.model.named_buffers())}
        found.append({k: x.to_dense() if x.layout != torch.strided else x.float() for k, x in state.items()
                      if isinstance(x, torch.Tensor) and not x.is_meta})  # fmt: skip
    assert_same_bits(*found)


def test_st4_extra_state_that_is_kept_is_not_trained_on() -> None:
    """After each of two rollbacks to update 0 it is that of update 0."""
    model, seen = Odd("extra"), []

    def loss(m: Any, x: Any) -> Any:
        seen.append(m.count)
        return m(x).square().mean() * (NAN if len(seen) in (3, 5) else 1)

    built_in(Loop(model, torch.optim.SGD(model.parameters(), lr=0.1), [NonFinite("rollback")]), loss, list(torch.randn(6, 4, 4)),
             epochs=1)  # fmt: skip
    assert seen == [0, 1, 2, 0, 1, 0]


def test_st4_around_a_loop_a_loss_that_is_an_integer() -> None:
    model, optimizer = made("adamw")
    with Loop(model, optimizer, [NonFinite()]) as loop:
        clean(model, batches(1)[0]).backward()
        with loop.updating(torch.tensor(3)):
            optimizer.step()
    assert loop.state.step == 1


def test_st2_resumed_with_another_action(tmp_path: Path) -> None:
    """Nothing is rolled back to what an earlier program kept; lowered rates are not taken over unsaid."""

    def go(action: str, bad: Any, steps: int, strict: bool = True) -> Loop:
        model, optimizer = made("adamw")
        own = [NonFinite(action, every=2), Checkpoint(tmp_path, every=1, keep=1)]
        loop = Loop(model, optimizer, own, resume=tmp_path, strict=strict)
        loop.fit(Faulty("gradient", bad), batches(12), steps=steps)
        return loop

    before = go("rollback", (), 5)
    loop = go("skip", {0}, 6)
    assert (loop.state.step, loop.state.skipped) == (6, 1)
    assert not torch.equal(loop.state.model.head.weight, before.state.model.head.weight)
    go("rollback", {0}, 7)
    with pytest.raises(
        ValueError, match=r"NonFinite.*action='skip', and rollbacks before it have multiplied the rates by 0\.5"
    ):
        go("skip", (), 8)
    with pytest.warns(UserWarning, match="multiplied the rates by"):
        loop = go("skip", (), 8, strict=False)
    assert loop.state.rates == [0.01]


@pytest.mark.parametrize("first", [True, False])
def test_st2_what_is_kept_is_what_a_step_began_with(first: bool) -> None:
    """Whatever callbacks do to weights, wherever they stand in the list; and what is done between two fits."""

    class Sets(Callback):
        value = 0.25

        def on_fit_start(self, state: State) -> None:
            nn.init.constant_(state.model.head.weight, self.value)

        def on_step_end(self, state: State) -> None:
            state.model.head.weight.data.clamp_(0.2, 0.3)

    model, optimizer = made("adamw")
    own, sets = NonFinite("rollback"), Sets()
    loop = Loop(model, optimizer, [own, sets] if first else [sets, own])
    for fit, value in ((0, 0.25), (1, 0.5)):
        sets.value = value
        seen: list[Any] = []

        def loss(m: Any, batch: Any, seen: list[Any] = seen) -> Any:
            seen.append(m.head.weight.detach().clone())
            return clean(m, batch) * (NAN if len(seen) == 4 else 1)

        loop.fit(loss, batches(), epochs=fit + 1)
        assert torch.equal(seen[4], torch.full((3, 4), value))


@pytest.mark.filterwarnings("ignore:.*")
def test_st2_a_layer_changed_since_is_kept_anew(tmp_path: Path) -> None:
    def go(classes: int, loss: Any, steps: int) -> Loop:
        model, _ = made("adamw")
        model.head = nn.Linear(4, classes)
        own = [NonFinite("rollback", every=4), Checkpoint(tmp_path, every=1)]
        loop = Loop(model, torch.optim.AdamW(model.parameters(), lr=0.01), own, resume=tmp_path, strict=False)
        loop.fit(loss, batches(12), steps=steps)
        return loop

    go(3, clean, 5)
    loop = go(5, Faulty("gradient", {1}), 8)
    assert (loop.state.step, loop.state.skipped) == (8, 1)


def test_st2_nothing_to_look_at() -> None:
    """No gradient, no buffer: no verdict."""
    model = nn.Linear(2, 2)
    state = State(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for action in ("stop", "skip", "rollback"):
        own = NonFinite(action)
        own.on_fit_start(state)
        own._check(state)
        own.on_step_end(state)
        own.on_fit_end(state)
    assert state._skip is None


@pytest.mark.parametrize("kind", ["adamw", "fused", "momentum"])
@pytest.mark.parametrize("action", ["skip", "rollback"])
def test_st2_the_order_of_callbacks_is_free(kind: str, action: str) -> None:
    """Clipping by the norm, warm-up and a schedule beside it; the norm of a bad update is read too, and drops nothing."""
    found = []
    for order in itertools.permutations(range(4)):
        made_here = [*around(), ClipGradients(0.05), NonFinite(action, every=2)]
        model, optimizer = made(kind)
        loop = Loop(model, optimizer, [made_here[i] for i in order])
        built_in(loop, Faulty("gradient", {0, 3}, INF), batches(), epochs=1)
        found.append(result(loop))
        assert_same_bits(found[0], found[-1])
    assert all(x.isfinite().all() for x in found[0].values())


@pytest.mark.parametrize("kind", ["adamw", "fused"])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("action", ["stop", "rollback"])
@pytest.mark.parametrize("fault", ["gradient", "loss"])
def test_st2_another_s_skip_of_the_same_update(fault: str, action: str, kind: str, first: bool) -> None:
    """What is left out anyway has no verdict, and the next update none of its loss."""

    class Skip(Callback):
        def on_before_optimizer_step(self, state: State) -> None:
            if state.step + state.skipped == 3:
                state.skip("not this one")

    own = NonFinite(action, every=2)
    loop, rates = run(built_in, kind, Faulty(fault, {3}), *([Skip(), own] if first else [own, Skip()]))
    expected, expected_rates = reference(kind, {3})
    hidden = ("bn.running", "num_batches")  # its forward ran, and only action="skip" undoes what that did
    assert_same_bits(without(result(loop), *hidden), without(expected, *hidden))
    assert rates == expected_rates
    assert (own.row, own.scale) == (0, 1.0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["adamw", "fused"])
@pytest.mark.parametrize("first", [True, False])
def test_st4_gradients_are_judged_as_the_optimizer_gets_them(form: Any, kind: str, first: bool) -> None:
    """A callback's factor is among what may spoil them."""

    class Scale(Callback):
        def on_before_optimizer_step(self, state: State) -> None:
            state.scale_gradients(torch.tensor(INF if state.step + state.skipped == 3 else 1.0))

    own = NonFinite("skip")
    loop, rates = run(form, kind, clean, *([Scale(), own] if first else [own, Scale()]))
    expected, expected_rates = reference(kind, {3})
    assert_same_bits(result(loop), expected)
    assert rates == expected_rates
    assert loop.state.skipped == 1


def test_st4_optimizer_state_that_is_not_finite_is_not_kept(caplog: Any) -> None:
    """Finite gradients whose squares are not: what is kept stays what it was."""

    class Large(Callback):
        def on_before_optimizer_step(self, state: State) -> None:
            if state.step == 3:
                state.model.head.bias.grad.fill_(1e30)

    loop, _ = run(built_in, "adamw", Faulty("gradient", {5}), Large(), NonFinite("rollback", every=2))
    texts = [r.getMessage() for r in caplog.records]
    assert texts[0] == "nothing new is kept to roll back to: after update 4 the optimizer's state of head.bias is not finite"
    assert "back to the weights of update 2, rates times 0.5" in texts[1]
    assert all(x.isfinite().all() for x in result(loop).values())


@pytest.mark.parametrize("kind", ["adamw", "fused"])
@pytest.mark.parametrize("as_tensor", [True, False])
def test_st4_around_a_loop_a_loss_that_is_given_is_judged(kind: str, as_tensor: bool) -> None:
    model, optimizer = made(kind)
    loop, found = Loop(model, optimizer, [NonFinite("skip")]), []
    with loop:
        for number, batch in enumerate(batches()):
            optimizer.zero_grad()
            loss = clean(model, batch)
            loss.backward()
            told = torch.tensor(NAN) if number == 2 else loss.detach()
            before = bits(loop)
            with loop.updating(told if as_tensor else float(told)):
                optimizer.step()
            found.append(loop.state.skip_reason)
            if number == 2:
                assert_same_bits(without(bits(loop), "bn."), without(before, "bn."))
    assert found == [None, None, "not finite in update 3: the loss", None, None, None]


@pytest.mark.parametrize("action", ["stop", "skip", "rollback"])
def test_st4_buffers_without_data_or_with_eight_bits(action: str) -> None:
    """Of a type that has no arithmetic, a cache that no checkpoint holds, or made at the first forward, which can't be undone."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.bn = nn.LazyBatchNorm1d(affine=False)
            self.register_buffer("eight", torch.ones(3).to(torch.float8_e4m3fn))
            self.register_buffer("cache", torch.full((2,), NAN), persistent=False)
            self.register_buffer("none", None)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.bn(self.fc(x))

    model = Odd()
    data = list(torch.randn(5, 6, 4))

    def train() -> Any:
        loop = Loop(model, torch.optim.AdamW(model.parameters()), [NonFinite(action, every=1)])
        return built_in(loop, lambda m, x: m(x).square().mean(), data, epochs=1)

    if action != "stop":
        with pytest.raises(ValueError, match=r"bn\.running_mean has no shape yet.*run one batch through the model before"):
            train()
        model(data[0])
    assert (train().step, train().skipped) == (5, 0)


def test_st2_train_loss_and_reasons(caplog: Any) -> None:
    model, optimizer = made("fused")
    reasons: list[Any] = []

    class See(Callback):
        def on_step_start(self, state: State) -> None:
            reasons.append(state.skip_reason)

    loop = Loop(model, optimizer, [NonFinite("skip"), See()])
    state = built_in(loop, Faulty("loss", {2}), batches(), epochs=1)
    assert reasons == [None] * 3 + ["not finite in update 3: the loss"] + [None] * 2
    assert math.isfinite(state.metrics["train_loss"])
    assert {(r.name, r.levelno) for r in caplog.records} == {("hookloop", logging.WARNING)}


@pytest.mark.parametrize(("args", "about"), [
    ({"action": "halt"}, "action"), ({"action": None}, "action"), ({"action": ["stop"]}, "action"),
    ({"patience": 0}, "patience"), ({"patience": 1.5}, "patience"), ({"patience": None}, "patience"),
    ({"patience": True}, "patience"), ({"every": 0}, "every"), ({"every": None}, "every"), ({"every": "1"}, "every"),
    ({"factor": 0}, "factor"), ({"factor": 1.01}, "factor"), ({"factor": -0.5}, "factor"), ({"factor": True}, "factor"),
    ({"factor": NAN}, "factor"), ({"factor": "half"}, "factor"), ({"factor": None}, "factor"),
])  # fmt: skip
def test_bad_arguments(args: Any, about: str) -> None:
    with pytest.raises((ValueError, TypeError), match=about):
        NonFinite(**args)


def test_the_default_is_stop() -> None:
    assert (NonFinite().action, NonFinite().patience) == ("stop", 10)


def test_the_verdict_is_the_devices_where_only_the_loss_lies_on_the_host() -> None:
    """A copy to the host that nobody waits for is not there yet when it is read."""
    with FakeTensorMode():
        held = [torch.ones(()), torch.ones(3, device="cuda"), torch.ones(3, device="cuda", dtype=torch.float16)]
        assert finite_numbers(held).device.type == "cuda"
        assert move([held[1]], torch.device("cpu"))[0].device.type == "cpu"


@pytest.mark.parametrize("action", ["stop", "skip", "rollback"])
def test_an_update_that_a_scaler_leaves_out_leaves_no_infinity_in_buffers(action: str, tmp_path: Path) -> None:
    """Neither in what is validated nor in a checkpoint: the scaler's verdict comes before any of NonFinite's."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    data = [(torch.randn(4, 4), torch.randn(4, 1)) for _ in range(4)]
    data[-1][0][2, 1] = torch.inf
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    loop = Loop(model, torch.optim.SGD(model.parameters(), lr=0.01), [NonFinite(action), Checkpoint(tmp_path)], scaler=scaler)
    state = built_in(loop, lambda model, batch: (model(batch[0]) - batch[1]).square().mean(), data, data[:2], epochs=1)
    assert (state.step, state.skipped) == (3, 1)
    assert math.isfinite(state.metrics["val_loss"])
    saved = torch.load(next(tmp_path.glob("step-*")) / "model.pt", weights_only=True)
    assert all(value.isfinite().all() for value in saved.values())


class Steep(nn.Linear):
    """One weight, whose gradient is the batch's mean: with a rate of 1000 one batch moves it by 1, the other to -infinity."""

    def __init__(self) -> None:
        super().__init__(1, 1, bias=False)
        nn.init.zeros_(self.weight)


FLAT, CLIFF = torch.full((4, 1), 1e-3), torch.full((4, 1), 1e36)


def steep(form: Any, data: Any, *callbacks: Callback) -> State:
    model = Steep()
    loop = Loop(model, torch.optim.SGD(model.parameters(), lr=1000), callbacks)
    form(loop, lambda m, x: m(x).mean(), data, epochs=1)
    return loop.state


def saved(folder: Path) -> dict[int, float]:
    return {int(path.name[5:13]): torch.load(path / "model.pt")["weight"].item() for path in sorted(folder.glob("step-*"))}


@pytest.mark.parametrize("action", ["stop", "skip"])
@pytest.mark.parametrize("form", FORMS)
def test_st2_weights_that_finite_gradients_spoil_are_not_saved(form: Any, action: str, tmp_path: Path) -> None:
    data = [FLAT, FLAT, CLIFF, FLAT]
    with pytest.raises(FloatingPointError, match=r"^not finite after update 3: weight itself\n") as caught:
        steep(form, data, NonFinite(action), Checkpoint(tmp_path, every=1, keep=None))
    assert saved(tmp_path) == {1: pytest.approx(-1), 2: pytest.approx(-2)}
    assert caught.value.__notes__ == [f"the last checkpoint is {tmp_path / 'step-00000002'}"]


@pytest.mark.parametrize("form", FORMS)
def test_st2_weights_that_finite_gradients_spoil_are_not_saved_but_rolled_back(form: Any, tmp_path: Path, caplog: Any) -> None:
    for order in (1, -1):
        folder = tmp_path / str(order)
        own = [NonFinite("rollback", every=1), Checkpoint(folder, every=1, keep=None)]
        state = steep(form, [FLAT, FLAT, CLIFF, FLAT], *own[::order])
        assert (state.step, state.skipped) == (4, 0)
        assert saved(folder) == {step: pytest.approx(w) for step, w in {1: -1, 2: -2, 3: -2, 4: -2.5}.items()}
        assert [r.getMessage() for r in caplog.records] == [
            "not finite after update 3: weight itself; back to the weights of update 2, rates times 0.5"]  # fmt: skip
        caplog.clear()


@pytest.mark.parametrize("form", FORMS)
def test_st2_weights_that_the_last_update_spoils_are_not_left_with(form: Any) -> None:
    for action in ("stop", "skip"):
        with pytest.raises(FloatingPointError, match="not finite after update 2: weight itself"):
            steep(form, [FLAT, CLIFF], NonFinite(action))
    assert steep(form, [FLAT, CLIFF], NonFinite("rollback", every=1)).model.weight.item() == pytest.approx(-1)


@pytest.mark.parametrize("form", FORMS)
def test_st5_an_update_that_spoilt_the_weights_ends_no_row(form: Any, tmp_path: Path) -> None:
    """Its own verdict was good: only the next update, or a save, shows what it did."""
    own = NonFinite("rollback", 3, every=1, factor=1)
    with pytest.raises(FloatingPointError, match=r"in update 4: weight itself, .*\(3 bad updates in a row: patience=3\)"):
        steep(form, [CLIFF] * 10, own)
    with pytest.raises(FloatingPointError, match=r"after update 3: weight itself \(3 bad updates in a row: patience=3\)"):
        steep(form, [CLIFF] * 10, NonFinite("rollback", 3, every=1, factor=1), Checkpoint(tmp_path, every=1))
    assert saved(tmp_path) == {1: 0.0, 2: 0.0}
    # one that is good ends it
    state = steep(form, [CLIFF, FLAT, FLAT, FLAT] * 5, own := NonFinite("rollback", 2, every=1, factor=1))
    assert (state.step, state.skipped, own.row) == (15, 5, 0)


@pytest.mark.parametrize("action", ["stop", "skip", "rollback"])
def test_st4_a_weight_that_holds_infinities_by_design_may_be_saved(action: str, tmp_path: Path) -> None:
    model, optimizer = made("adamw")
    with torch.no_grad():
        model.unused[0] = -INF
    state = built_in(Loop(model, optimizer, [NonFinite(action), Checkpoint(tmp_path, every=2)]), clean, batches(), epochs=1)
    assert (state.step, state.skipped) == (COUNT, 0)
    assert torch.load(tmp_path / f"step-{COUNT:08}" / "model.pt")["unused"][0] == -INF
