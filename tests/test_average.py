"""Average: the formulas, what is validated and restored with it, and where it stands after a kill."""

from __future__ import annotations

import contextlib
import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import FORMS, KillAt, Killed, adamw, assert_same_bits, bits, built_in, loader, loss_fn, net
from torch import nn
from torch.nn.utils import prune

from hookloop.callbacks import Average, Checkpoint, EarlyStopping, GradientAccumulation, MicroBatch, NonFinite, Seed, Unfreeze
from hookloop.loop import Callback, Loop, State


class Weights(Callback):
    """All weights and buffers after each update."""

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_step_end(self, state: State) -> None:
        self.seen.append({k: v.clone() for k, v in state.model.state_dict().items()})


def run(form: Any, *own: Callback, epochs: int = 4, wrap: Any = lambda model: model, **kwargs: Any) -> Loop:
    first = Seed(3)
    model = wrap(net(seed=5))
    loop = Loop(model, adamw(model), [first, *own], **kwargs)
    form(loop, loss_fn, loader(40, 8), loader(16, 8, shuffle=False), epochs=epochs)
    return loop


def close(average: Average, expected: dict[str, torch.Tensor]) -> None:
    assert average.model is not None
    for name, x in average.model.state_dict().items():
        assert torch.allclose(x.double(), expected[name].double(), rtol=1e-5, atol=1e-7), name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("start", "every"), [(0, 1), (5, 1), (0.5, 1), (3, 4)])
def test_the_mean_of_all_since(start: float, every: int, form: Any) -> None:
    average, weights = Average("swa", start=start, every=every), Weights()
    run(form, average, weights)
    first = int(start * 20) if isinstance(start, float) else start
    taken = weights.seen[first + every - 1 :: every]
    assert average.count == len(taken)
    expected = {name: sum(one[name].double() for one in taken) / len(taken) if x.is_floating_point() else taken[-1][name]
                for name, x in taken[0].items()}  # fmt: skip
    close(average, expected)


@pytest.mark.parametrize("form", FORMS)
def test_the_exponential_mean(form: Any) -> None:
    average, weights = Average(decay=0.9, start=2, every=3), Weights()
    run(form, average, weights)
    taken = weights.seen[4::3]
    expected = {k: v.double() for k, v in taken[0].items()}
    for one in taken[1:]:
        expected = {k: 0.9 * v + 0.1 * one[k].double() if one[k].is_floating_point() else one[k] for k, v in expected.items()}
    close(average, expected)


def test_training_is_left_alone_in_any_order() -> None:
    expected = run(built_in)
    models = []
    for order in itertools.permutations(range(3)):
        average = Average(decay=0.5)
        own: list[Callback] = [average, NonFinite("skip"), GradientAccumulation(1)]
        found = run(built_in, *(own[i] for i in order))
        assert_same_bits(bits(expected), bits(found))
        models.append(average.model.state_dict())  # type: ignore[union-attr]
        assert_same_bits(models[0], models[-1])


@pytest.mark.parametrize("form", FORMS)
def test_validation_is_of_the_average(form: Any) -> None:
    average = Average(decay=0.5)
    loop = run(form, average)
    assert loop.state.eval_model is average.model
    assert loop.evaluate(loss_fn, loader(16, 8, shuffle=False))["val_loss"] == loop.state.metrics["val_loss"]
    loop.state.eval_model = None
    assert loop.evaluate(loss_fn, loader(16, 8, shuffle=False))["val_loss"] != loop.state.metrics["val_loss"]


def test_before_the_first_the_weights_themselves_are_validated() -> None:
    expected, found = run(built_in), run(built_in, average := Average(start=100))
    assert average.model is None
    assert expected.state.metrics["val_loss"] == found.state.metrics["val_loss"]


def test_early_stopping_leaves_with_what_was_validated() -> None:
    reports: list[float] = []

    class Reports(Callback):
        def on_validation_end(self, state: State) -> None:
            reports.append(state.metrics["val_loss"])

    own = [Average(decay=0.9), EarlyStopping("val_loss", patience=9, restore_best=True), Reports()]
    loop = run(built_in, *own)
    assert reports[-1] != min(reports)
    assert loop.evaluate(loss_fn, loader(16, 8, shuffle=False))["val_loss"] == min(reports)
    loop.fit(loss_fn, loader(40, 8), loader(16, 8, shuffle=False), epochs=5)
    again, reports[:] = reports[:], []
    once = run(built_in, Average(decay=0.9), EarlyStopping("val_loss", patience=9, restore_best=True), Reports(), epochs=5)
    assert (reports, bits(once).keys()) == (again, bits(loop).keys())
    assert_same_bits(bits(once), bits(loop))


@pytest.mark.parametrize("form", FORMS)
def test_statistics_of_the_average_are_measured(form: Any) -> None:
    """Each time with the update's last micro-batch, as torch's BatchNorm does with its momentum."""
    average, weights, batches = Average("swa", batch_norm="measure"), Weights(), []

    class Keep(Callback):
        def on_micro_end(self, state: State) -> None:
            if state.micro.training and state.micro.number == 1:
                batches.append(state.micro.batch[0].clone())

    run(form, average, weights, Keep(), MicroBatch(4))
    hand = net(seed=5)
    hand.load_state_dict(weights.seen[0])
    hand.eval()
    for count, (one, batch) in enumerate(zip(weights.seen, batches, strict=True)):
        with torch.no_grad():
            for p, (name, _) in zip(hand.parameters(), hand.named_parameters(), strict=True):
                p.copy_(p + (one[name] - p) / (count + 1) if count else one[name])
            hand[1].train()
            hand(batch)
            hand[1].eval()
    close(average, hand.state_dict())


def test_what_is_measured_draws_from_no_stream_of_training_and_runs_under_its_autocast() -> None:
    seen: list[Any] = []

    def forward(model: nn.Module, batch: Any) -> Any:
        seen.append(nn.functional.linear(batch[0], model[0].weight).dtype)
        return model(batch[0] + torch.randn_like(batch[0]) + random.random() + np.random.random())

    def trained(*own: Callback) -> Any:
        model = net()
        random.seed(0)
        np.random.seed(0)
        loop = Loop(model, adamw(model), own, autocast=torch.bfloat16)
        loop.fit(loss_fn, loader(40, 8), epochs=2)
        return bits(loop), torch.rand(3), random.random(), np.random.random()

    (alone, *streams), (beside, *others) = trained(), trained(Average(batch_norm="measure", forward=forward))
    assert_same_bits(alone, beside)
    assert torch.equal(streams[0], others[0])
    assert streams[1:] == others[1:]
    assert seen == [torch.bfloat16] * 10


@pytest.mark.parametrize("batch_norm", ["average", "measure"])
@pytest.mark.parametrize("kill", [1, pytest.param(4, marks=pytest.mark.slow), 11])
def test_killed_and_resumed_it_is_the_same_average(kill: int, batch_norm: str, tmp_path: Path) -> None:
    def go(folder: Path, at: int | None) -> tuple[Loop, Average]:
        average = Average("swa", start=0.2, every=2, batch_norm=batch_norm)
        return run(
            built_in, average, Checkpoint(folder, every=1), KillAt(at), EarlyStopping(patience=9), resume=folder
        ), average

    (expected, one), folder = go(tmp_path / "a", None), tmp_path / "b"
    with pytest.raises(Killed):
        go(folder, kill)
    found, other = go(folder, None)
    assert_same_bits(bits(expected), bits(found))
    assert_same_bits(dict(one.model.state_dict()), dict(other.model.state_dict()))  # type: ignore[union-attr]
    assert expected.state.metrics["val_loss"] == found.state.metrics["val_loss"]
    assert one.count == other.count


def test_around_a_loop_and_without_one() -> None:
    model = net(seed=5)
    average = Average(decay=0.5)
    loop = Loop(model, adamw(model), [average])
    with loop:
        for batch in loader(40, 8):
            loss_fn(model, batch)["loss"].backward()
            with loop.updating():
                loop.state.optimizer.step()
            loop.state.optimizer.zero_grad()
    assert average.count == 5
    state, alone = State(model, adamw(model)), Average("swa")
    alone.on_fit_start(state)
    for step in range(3):
        state.step = step + 1
        alone.on_step_end(state)
    assert alone.count == 3


def low(dtype: torch.dtype, *own: Callback, epochs: int = 3, **kwargs: Any) -> Loop:
    """Training in a type of few bits, beside a layer in float32."""
    first = Seed(3)
    model = net(seed=5).to(dtype)
    model[4].float()
    forward = model[4].forward
    model[4].forward = lambda x: forward(x.float())
    loop = Loop(model, torch.optim.SGD(model.parameters(), lr=0.1), [first, *own], **kwargs)
    loop.fit(lambda m, b: loss_fn(m, (b[0].to(dtype), b[1])), loader(160, 8), loader(16, 8, shuffle=False), epochs=epochs)
    return loop


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_the_mean_of_weights_of_few_bits_does_not_stand_still(kind: str, dtype: torch.dtype) -> None:
    """A step of it is below what they can hold beside their values: the mean in float64, rounded once."""
    average, weights = Average(kind, decay=0.999), Weights()
    low(dtype, average, weights)
    assert average.model is not None
    expected = {name: x.double() for name, x in weights.seen[0].items()}
    for count, one in enumerate(weights.seen[1:], 1):
        part = 0.001 if kind == "ema" else 1 / (count + 1)
        expected = {name: x.lerp(one[name].double(), part) for name, x in expected.items()}
    moved = 0
    for name, x in average.model.state_dict().items():
        if x.is_floating_point():
            assert x.dtype == weights.seen[0][name].dtype
            assert torch.allclose(x.double(), expected[name], rtol=torch.finfo(x.dtype).eps, atol=1e-7), name
            moved += int((x != weights.seen[0][name]).sum())
    assert moved > 20


@pytest.mark.parametrize("how", ["killed", "rolled back"])
def test_the_mean_of_weights_of_few_bits_goes_on_to_the_bit(how: str, tmp_path: Path) -> None:
    def go(folder: Path, at: int | None) -> dict[str, torch.Tensor]:
        own = [average := Average("swa"), Checkpoint(folder, every=1), KillAt(at)]
        more = [Spoil(), NonFinite("rollback", every=10, factor=1)] if how == "rolled back" else []
        low(torch.bfloat16, *own, *more, epochs=1, resume=folder)
        assert average.model is not None
        return {**average.model.state_dict(), **{f"wide {name}": x for name, x in average.state_dict()["wide"].items()}}

    expected = go(tmp_path / "a", None)
    assert sum(name.startswith("wide") for name in expected) == 6
    with pytest.raises(Killed):
        go(tmp_path / "b", 11)
    assert_same_bits(expected, go(tmp_path / "b", None))


def test_the_mean_of_weights_of_few_bits_from_a_checkpoint_of_before() -> None:
    old = low(torch.bfloat16, Average("swa"), epochs=1).callbacks[-1].state_dict()
    again, weights = Average("swa"), Weights()
    again.load_state_dict({name: value for name, value in old.items() if name != "wide"})
    low(torch.bfloat16, again, weights, epochs=1)
    assert again.count == 2 * old["count"] == 40
    for name, x in again.state_dict()["wide"].items():
        expected = old["model"][name].double()
        for count, one in enumerate(weights.seen, 20):
            expected = expected.lerp(one[name].double(), 1 / (count + 1))
        assert torch.allclose(x.double(), expected, atol=1e-6), name


class Masked(nn.Module):
    """A mask by infinities, and a number that each forward sets anew."""

    def __init__(self) -> None:
        super().__init__()
        self.body = net(seed=5)
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf, 0.0]))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.seen += x.mean().detach()
        return self.body(x)


@pytest.mark.parametrize("kind", ["ema", "swa"])
@pytest.mark.parametrize("batch_norm", ["average", "measure"])
def test_buffers_that_are_no_statistics_are_copied(kind: str, batch_norm: str) -> None:
    """The mean of an infinity with itself is NaN."""
    model, average = Masked(), Average(kind, batch_norm=batch_norm)
    Loop(model, adamw(model), [average]).fit(loss_fn, loader(40, 8), epochs=1)
    for name in ("mask", "seen"):
        assert torch.equal(average.model.get_buffer(name), model.get_buffer(name))  # type: ignore[union-attr]
    assert not torch.equal(average.model.get_buffer("body.1.running_mean"), model.body[1].running_mean)  # type: ignore[union-attr]


class Keeps(nn.Module):
    """What it computed last, in attributes and a list, positions that grow with the batch, and a buffer filled late."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.hidden, self.all = net(seed=5), None, list[Any]()
        self.register_buffer("positions", torch.zeros(1))
        self.register_buffer("late", None)
        self.old = torch.nn.utils.weight_norm(nn.Linear(3, 3))  # whose weight is computed in each forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > len(self.positions):
            self.register_buffer("positions", torch.arange(float(len(x))), persistent=False)
            self.late = torch.ones(len(x)) if len(x) > 4 else None
        self.hidden = self.body(x) + 0 * self.positions[: len(x), None]
        self.all.append(self.hidden)
        return self.old(self.hidden)


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_what_a_model_computes_and_regrows(kind: str) -> None:
    model, average, weights = Keeps(), Average(kind, decay=0.5), Weights()
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
    data = [(part, torch.zeros(len(part), dtype=torch.long)) for part in x.split([2, 3, 5, 6])]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loop = Loop(model, optimizer, [average, weights])
    state = loop.fit(lambda model, b: nn.functional.cross_entropy(model(b[0]), b[1]), data, data, epochs=2)
    assert average.model is not None
    assert average.count == state.step == 8
    for name in ("positions", "late"):
        assert torch.equal(average.model.get_buffer(name), model.get_buffer(name))
    assert "positions" not in average.model.state_dict()
    expected = weights.seen[0]["body.0.weight"]
    for count, one in enumerate(weights.seen[1:], 1):
        w = one["body.0.weight"]
        expected = 0.5 * expected + 0.5 * w if kind == "ema" else expected + (w - expected) / (count + 1)
    assert torch.allclose(average.model.state_dict()["body.0.weight"], expected)


class Prunes(Callback):
    """Prunes by torch's own function, in the middle of a run, which renames a parameter; `undo` makes that permanent."""

    def __init__(self, undo: bool) -> None:
        self.undo = undo

    def on_epoch_end(self, state: State) -> None:
        if state.epoch == 1:
            prune.l1_unstructured(state.model[0], "weight", 0.5)
        elif state.epoch == 2 and self.undo:
            prune.remove(state.model[0], "weight")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("undo", [False, True])
@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_a_model_that_is_pruned_in_the_run_is_validated_pruned(kind: str, undo: bool, bias: bool) -> None:
    """By name: by place, square layers without a bias mix up in silence."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6, bias=bias), nn.Tanh(), nn.Linear(6, 3))
    average, weights = Average(kind, decay=0.5), Weights()
    loop = Loop(model, torch.optim.SGD(model.parameters(), lr=0.1), [Prunes(undo), average, weights])
    with (
        pytest.warns(UserWarning, match=r"of the model's parameters 0\.weight_orig came and 0\.weight went"),
        pytest.warns(UserWarning, match=r"0\.weight came and 0\.weight_orig went") if undo else contextlib.nullcontext(),
    ):
        loop.fit(lambda model, b: nn.functional.cross_entropy(model(b[0]), b[1]), loader(40, 8), loader(8, 8), epochs=4)
    assert average.model is not None
    assert loop.state.eval_model is average.model
    held = dict(average.model.state_dict())
    assert held.keys() == model.state_dict().keys()
    if not undo:
        assert int((model[0].weight == 0).sum()) == 18
        assert torch.equal(average.model[0].weight == 0, model[0].weight == 0)  # type: ignore[index]
    expected = weights.seen[0]
    for count, one in enumerate(weights.seen[1:], 1):
        before = {name: expected.get(name, x) for name, x in one.items()}
        expected = {name: 0.5 * (before[name] + x) if kind == "ema" else before[name] + (x - before[name]) / (count + 1)
                    for name, x in one.items()}  # fmt: skip
    for name in held:
        assert torch.allclose(held[name], expected[name], atol=1e-6), name


class Tempered(nn.Module):
    """A temperature that is no buffer, and a tensor beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.extra = net(seed=5), {"heat": 1.0, "seen": torch.zeros(1)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x) / self.extra["heat"]

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


def test_extra_states_of_modules_are_copied_along() -> None:
    class Anneal(Callback):
        def on_step_start(self, state: State) -> None:
            state.model.extra["heat"] = 0.9**state.step
            state.model.extra["seen"] += 1

        def on_step_end(self, state: State) -> None:
            assert average.model is None or average.model.extra is not state.model.extra

    model, average = Tempered(), Average(decay=0.5, every=2)
    state = Loop(model, adamw(model), [Anneal(), average]).fit(loss_fn, loader(40, 8), loader(8, 8), epochs=2)
    assert average.model is not None
    assert state.step == 10
    assert average.model.extra == model.extra == {"heat": 0.9**9, "seen": torch.tensor([10.0])}


def test_an_extra_state_that_its_module_does_not_take_back_is_left_alone() -> None:
    class Told(Tempered):
        set_extra_state = nn.Module.set_extra_state

    model, average = Told(), Average(decay=0.5)
    Loop(model, adamw(model), [average]).fit(loss_fn, loader(40, 8), loader(8, 8), epochs=1)
    assert average.model is not None
    assert average.model.extra is not model.extra


def test_what_a_frozen_norm_keeps_is_not_measured() -> None:
    average, before = Average("swa", batch_norm="measure"), net(seed=5)[1].running_mean
    run(built_in, average, Unfreeze({9: "^1"}))
    assert torch.equal(average.model[1].running_mean, before)  # type: ignore[index, union-attr]


def test_around_a_loop_there_is_no_batch_to_measure_with() -> None:
    model = net()
    with pytest.raises(ValueError, match="saw no micro-batch of this update, as around your loop"), \
            Loop(model, adamw(model), [Average(batch_norm="measure")]) as loop, loop.updating():  # fmt: skip
        loop.state.optimizer.step()
    Loop(model := net(noise=False), adamw(model), [Average(batch_norm="measure")]).fit(loss_fn, loader(8, 8), epochs=1)


def test_a_wrapped_model_resumes_its_average_also_without_the_wrapper(tmp_path: Path) -> None:
    expected = Average(decay=0.5)
    run(built_in, expected)
    for i, wraps in enumerate([(nn.DataParallel, None), (None, nn.DataParallel), (nn.DataParallel, nn.DataParallel)]):
        for epochs, wrap in zip((2, 4), wraps, strict=True):
            average = Average(decay=0.5)
            run(built_in, average, Checkpoint(tmp_path / f"{i}"), epochs=epochs, wrap=wrap or nn.Module.train,
                resume=tmp_path / f"{i}")  # fmt: skip
        assert_same_bits(dict(expected.model.state_dict()), dict(average.model.state_dict()))  # type: ignore[union-attr]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("epochs", [4, 5])
def test_resumed_it_is_what_is_evaluated_before_the_first_step_too(epochs: int, form: Any, tmp_path: Path) -> None:
    val, found = loader(16, 8, shuffle=False), []

    class Restored(Loop):
        def epochs(self, *args: Any, **kwargs: Any) -> Any:
            found.append(self.evaluate(loss_fn, val)["val_loss"])
            return super().epochs(*args, **kwargs)

    first = run(form, Average("swa", start=5), Checkpoint(tmp_path))
    again, model = Average("swa", start=5), net(seed=5)
    loop = Restored(model, adamw(model), [Seed(3), again, Checkpoint(tmp_path)], resume=tmp_path)
    form(loop, loss_fn, loader(40, 8), val, epochs=epochs)
    assert found == [first.state.metrics["val_loss"]]
    assert again.model is loop.state.eval_model
    assert again.count == 15 + 5 * (epochs - 4)


def test_an_average_of_another_kind_is_refused_and_one_saved_before_it_was_told_is_taken(tmp_path: Path) -> None:
    run(built_in, Average(), Checkpoint(tmp_path), epochs=1)
    average = Average("swa")
    with pytest.raises(ValueError, match="Average does not take its state: it averages by 'swa' here and by 'ema' in the"):
        run(built_in, average, epochs=2, resume=tmp_path)
    assert (average.count, average.model) == (0, None)
    with pytest.warns(UserWarning, match="Average does not take its state"):
        run(built_in, average := Average("swa"), epochs=2, resume=tmp_path, strict=False)
    assert average.count == 5
    old = run(built_in, average := Average("swa"), epochs=1).callbacks[-1].state_dict()
    other = Average()
    other.load_state_dict({name: value for name, value in old.items() if name != "kind"})
    assert other.count == average.count == 5


def test_it_is_in_the_checkpoint_for_a_program_without_hookloop(tmp_path: Path) -> None:
    loop = run(built_in, average := Average(decay=0.9), folder := Checkpoint(tmp_path))
    found = torch.load(max(folder.folder.glob("step-*")) / "state.pt", weights_only=True)["callbacks"]["Average"]["model"]
    assert_same_bits(dict(average.model.state_dict()), found)  # type: ignore[union-attr]
    loop.state.model.load_state_dict(found)


def test_it_begins_anew_where_layers_do_not_fit(tmp_path: Path) -> None:
    run(built_in, Average("swa"), Checkpoint(tmp_path), epochs=1)
    model, average = net(), Average("swa")
    model[4] = nn.Linear(12, 5)
    loop = Loop(model, adamw(model), [Seed(3), average, Checkpoint(tmp_path)], resume=tmp_path, strict=False)
    with pytest.warns(UserWarning, match=r"begins anew, since what it saved does not fit: 4\.bias is \(5,\) here"), \
            pytest.warns(UserWarning, match="not taken"):  # fmt: skip
        loop.fit(loss_fn, loader(40, 8), epochs=2)
    assert average.count == 5


class Spoil(Callback):
    """Weights that are not finite after the 14th update, once."""

    def on_step_end(self, state: State) -> None:
        if state.step == 14 and not state.skipped:
            with torch.no_grad():
                state.model[0].weight.fill_(torch.nan)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("start", [0, 12])
def test_it_goes_back_with_the_weights(start: int, form: Any) -> None:
    """The mean of those that an update started from, and of no other."""
    average, weights = Average("swa", start=start), Weights()
    loop = run(form, average, weights, Spoil(), NonFinite("rollback", every=10))
    taken = [one for step, one in enumerate(weights.seen, 1) if start < step and not 10 < step <= 14]
    assert (loop.state.skipped, loop.state.metrics["averaged"]) == (1, len(taken))
    close(average, {name: sum(one[name].double() for one in taken) / len(taken) if x.is_floating_point() else taken[-1][name]
                    for name, x in taken[0].items()})  # fmt: skip


@pytest.mark.parametrize("batch_norm", ["average", "measure"])
def test_killed_before_it_goes_back_it_is_the_same_average(batch_norm: str, tmp_path: Path) -> None:
    found = []
    for i, at in enumerate((None, 12)):
        for kill in (at, None)[at is None :]:
            average = Average("swa", batch_norm=batch_norm)
            own = [average, Spoil(), NonFinite("rollback", every=10), Checkpoint(tmp_path / f"{i}", every=1), KillAt(kill)]
            with contextlib.suppress(Killed):
                loop = run(FORMS[i], *own[:: 1 - 2 * (kill is None and i)], resume=tmp_path / f"{i}")
        found.append((bits(loop), dict(average.model.state_dict())))  # type: ignore[union-attr]
    for a, b in zip(*found, strict=True):
        assert_same_bits(a, b)
    assert [c.scale for c in own if isinstance(c, NonFinite)] == [0.5]  # once, before the save


def test_only_one_is_validated() -> None:
    model = net()
    with pytest.raises(ValueError, match="Average and Average both own"):
        Loop(model, adamw(model), [Average(), Average("swa").named("second")])


@pytest.mark.parametrize("bad", [{"kind": "mean"}, {"decay": 0}, {"decay": 1.5}, {"decay": True}, {"every": 0}, {"start": -1},
                                 {"start": 1.5}, {"batch_norm": "refresh"}, {"decay": 1.0}, {"forward": 3},
                                 {"forward": lambda model, batch: None}])  # fmt: skip
def test_bad_arguments(bad: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError), match=next(iter(bad))):
        Average(**bad)


def test_what_can_not_be_told() -> None:
    model = nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3))
    data = [{"x": torch.randn(8, 6)}] * 3
    loop = Loop(model, adamw(model), [Average(batch_norm="measure")])
    with pytest.raises(ValueError, match=r"can't tell what of a dict the model takes: give forward=fn\(model, batch\)"):
        loop.fit(lambda m, b: m(b["x"]).square().mean(), data, epochs=1)
    model = net()
    with pytest.raises(ValueError, match=r"start=0\.5 .*: give a whole number of updates, or steps= to fit or epochs, where"):
        Loop(model, adamw(model), [Average(start=0.5)]).fit(loss_fn, iter(list(loader())), epochs=1)
