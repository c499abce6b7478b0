"""Memory that runs out, everywhere that it can: what is redone leaves no trace, and what can't be says so."""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FORMS, adamw, assert_same_bits, bits, built_in, by_hand, loader, loss_fn, net
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy

from hookloop.callbacks import Checkpoint, GradientAccumulation, Metrics, MicroBatch, Seed
from hookloop.loop import Callback, Loop, State
from hookloop.loop.store import list_checkpoints

TEXT = "CUDA out of memory. Tried to allocate 2.00 GiB"


class Faults(TorchDispatchMode):
    """Counts operations while `armed`; those numbered in `at` fail as an allocator does: `late`, with their work done."""

    def __init__(self, at: Collection[int] = (), late: bool = False, error: Callable[[str], Exception] | None = None) -> None:
        super().__init__()
        self.at, self.late, self.error = at, late, error or torch.OutOfMemoryError
        self.armed, self.count, self.raised = False, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        hit = False
        if self.armed and func is not torch.ops.aten.detach.default:  # which takes no memory
            self.count += 1
            hit = self.count in self.at
        if hit and not self.late:
            self.fail()
        result = func(*args, **(kwargs or {}))
        if hit:
            self.fail()
        return result

    def fail(self) -> None:
        self.armed = False
        self.raised += 1
        raise self.error(TEXT)


class Arm(Callback):
    """Arms faults for the forwards and backwards of one step, or of evaluation: from the loss until `on_micro_end`."""

    def __init__(self, faults: Faults, step: int = 1, training: bool = True) -> None:
        self.faults, self.step, self.training = faults, step, training
        self.sizes: list[Any] = []

    def loss(self, model: nn.Module, batch: Any) -> Any:
        state = self._loop().state
        self.faults.armed = model.training == self.training and (not self.training or state.step == self.step)
        outputs = loss_fn(model, batch)
        self.faults.armed &= self.training  # evaluation has no backward
        return outputs

    def on_micro_end(self, state: State) -> None:
        self.faults.armed = False

    def on_step_end(self, state: State) -> None:
        self.sizes.append((state.micro_batch_size, state.eval_micro_batch_size))


class From(Callback):
    """Uses a micro-batch from a given step on: what a run that met an out-of-memory there must equal."""

    owns = ("micro_batch_size",)

    def __init__(self, step: int, size: int) -> None:
        self.step, self.size = step, size

    def on_step_start(self, state: State) -> None:
        state.micro_batch_size = self.size if state.step >= self.step else None


def trained(form: Any, seeded: bool, own: Callback, faults: Faults) -> tuple[dict[str, torch.Tensor], Arm]:
    """Three updates of two batches of 8 (the last of one): BatchNorm, dropout, AdamW; faults in the second update."""
    torch.manual_seed(11)
    seed, arm = [Seed(2)] if seeded else [], Arm(faults)
    model = net(seed=2)
    loop = Loop(model, adamw(model), [*seed, own, GradientAccumulation(2), arm])
    torch.manual_seed(11)
    with faults:
        form(loop, arm.loss, loader(40, 8), epochs=1)
    return bits(loop), arm


@pytest.mark.parametrize(("form", "seeded"), [(by_hand, False), (built_in, True),
    pytest.param(by_hand, True, marks=pytest.mark.slow), pytest.param(built_in, False, marks=pytest.mark.slow)])  # fmt: skip
def test_oo1_at_every_operation_of_a_step_of_several_batches(form: Any, seeded: bool) -> None:
    """Forward or backward, of the first batch or of the second, whose first has gone through: the run of half the size."""
    expected, _ = trained(form, seeded, From(1, 4), Faults())
    n, faults = 0, Faults()
    while n == 0 or faults.raised:
        n += 1
        faults = Faults({n})
        found, arm = trained(form, seeded, MicroBatch("auto"), faults)
        if faults.raised:
            assert [size for size, _ in arm.sizes] == [None, 4, 4]
            assert_same_bits(found, expected)
    assert n > 60  # operations, all of which failed once
    assert faults.count == n - 1


@pytest.mark.parametrize("form", FORMS)
def test_oo1_again_and_again_in_one_step(form: Any) -> None:
    """At 8 samples, then at some operation at 4: the run of micro-batches of 2."""
    expected, _ = trained(form, True, From(1, 2), Faults())
    for first, then in [(1, 1), (3, 2), (11, 17), (20, 40), (35, 60), (50, 5)]:
        faults = Faults({first, first + then})
        found, arm = trained(form, True, MicroBatch("auto"), faults)
        assert faults.raised == 2
        assert [size for size, _ in arm.sizes] == [None, 2, 2]
        assert_same_bits(found, expected)


@pytest.mark.parametrize("form", FORMS)
def test_oo3_at_every_operation_of_a_validation(form: Any) -> None:
    """Its own size shrinks, the numbers stay the means over all samples, and training never hears of it."""

    def run(faults: Faults) -> Any:
        arm, model = Arm(faults, training=False), net(torch.float64)
        loop = Loop(model, adamw(model), [Seed(3), MicroBatch("auto"), arm])
        with faults:
            state = form(loop, arm.loss, loader(24, 8, torch.float64), loader(17, 12, torch.float64, shuffle=False), epochs=2)
        return bits(loop), {name: state.metrics[name] for name in ("val_loss", "val_accuracy")}, arm.sizes

    expected, metrics, sizes = run(Faults())
    assert sizes == [(None, None)] * 6
    n, faults = 0, Faults()
    while n == 0 or faults.raised:
        n += 1
        faults = Faults({n})
        found, numbers, sizes = run(faults)
        if faults.raised:
            assert_same_bits(found, expected)
            assert numbers == pytest.approx(metrics, rel=1e-12)
            assert sizes[:3] == [(None, None)] * 3
            assert sizes[3:] in ([(None, half)] * 3 for half in (None, 6, 3))  # None: it failed in the last validation
    assert n > 30


def test_oo4_one_sample_is_too_much_says_what_was_tried_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    def run(folder: Path | None, fails_from: int | None) -> Loop:
        torch.manual_seed(5)
        model = net(noise=False)
        own = [Checkpoint(folder, every=1)] if folder else []
        loop = Loop(model, adamw(model), [Seed(1), MicroBatch("auto"), *own], resume=folder)

        def loss(model: nn.Module, batch: Any) -> Any:
            outputs = loss_fn(model, batch)
            if fails_from is not None and loop.state.step >= fails_from:
                raise torch.OutOfMemoryError(TEXT)
            return outputs

        built_in(loop, loss, loader(40, 8), epochs=1)
        return loop

    with pytest.raises(torch.OutOfMemoryError, match=r"too small for one sample \(sizes tried: 8, 4, 2, 1\)"):
        run(tmp_path, 3)
    assert [place.name for place in list_checkpoints(tmp_path)][-1].endswith("3")
    assert_same_bits(bits(run(tmp_path, None)), bits(run(None, None)))


class Raises(Callback):
    """Runs out of memory in one hook (or in `state_dict`), once."""

    def __init__(self, hook: str, training: bool = True, step: int = 1) -> None:
        self.hook, self.training, self.step, self.left = hook, training, step, 1
        setattr(self, hook, self._fail)
        if hook == "state_dict":
            self.load_state_dict = lambda state: None

    def _fail(self, state: State | None = None) -> dict[str, Any]:
        state = self._loop().state
        right = state.step >= self.step and (state.micro is None or state.micro.training == self.training)
        if right and self.left:
            self.left -= 1
            raise torch.OutOfMemoryError(TEXT)
        return {}


def small(*callbacks: Callback, **given: Any) -> Loop:
    model = net(seed=2)
    return Loop(model, adamw(model), [Seed(2), MicroBatch("auto"), *callbacks], **given)


def notes_of(error: BaseException) -> str:
    return "\n".join(getattr(error, "__notes__", ()))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("hook", ["on_setup", "on_fit_start", "on_epoch_start", "on_step_start", "on_micro_end",
    "on_before_optimizer_step", "on_step_end", "on_validation_end", "on_epoch_end", "on_fit_end"])  # fmt: skip
def test_oo5_in_a_callbacks_hook(form: Any, hook: str) -> None:
    """No retry, since what the hook has done already isn't known: the error says whose, which and when."""
    step = {"on_setup": 0, "on_fit_start": 0, "on_epoch_start": 0}.get(hook, 1)
    own = Raises(hook, step=step)
    loop = small(own)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        form(loop, loss_fn, loader(24, 8), loader(8, 8), epochs=1)
    assert f"in Raises.{hook} at step " in notes_of(caught.value)
    assert loop.state.micro_batch_size is None


def test_oo5_in_on_micro_end_of_a_validation() -> None:
    with pytest.raises(torch.OutOfMemoryError) as caught:
        built_in(small(Raises("on_micro_end", training=False)), loss_fn, loader(24, 8), loader(8, 8), epochs=1)
    assert "in Raises.on_micro_end at step 3" in notes_of(caught.value)


def test_oo5_in_on_exception() -> None:
    """The first error wins, and tells of the second."""

    def loss(model: nn.Module, batch: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory in forward")

    with pytest.raises(torch.OutOfMemoryError, match="in forward") as caught:
        built_in(small(Raises("on_exception", step=0)), loss, loader(24, 8), epochs=1)
    assert "while handling it: OutOfMemoryError" in notes_of(caught.value)
    assert "in Raises.on_exception at step 0" in notes_of(caught.value)


class Hungry(MeanMetric):
    """A metric that runs out of memory in `update` or in `compute`."""

    def __init__(self, where: str, **given: Any) -> None:
        super().__init__(**given)
        self.where = where

    def update(self, preds: Any, target: Any) -> None:
        if self.where == "update":
            raise torch.OutOfMemoryError(TEXT)
        super().update(target.double())

    def compute(self) -> Any:
        if self.where == "compute":
            raise torch.OutOfMemoryError(TEXT)
        return super().compute()


@pytest.mark.parametrize(("where", "training", "phase"), [
    ("update", False, "in Metrics.on_micro_end at step 3"), ("update", True, "in Metrics.on_step_end at step 1"),
    ("compute", False, "hungry"), ("compute", True, "hungry"),
])  # fmt: skip
def test_oo5_in_a_metric(where: str, training: bool, phase: str) -> None:
    """A metric's own state can't be put back: the error says where it arose."""
    loop = small(Metrics({"hungry": Hungry(where)}, training=training))
    with pytest.raises(torch.OutOfMemoryError) as caught:
        built_in(loop, loss_fn, loader(24, 8), None if training else loader(8, 8), epochs=1)
    assert phase in notes_of(caught.value)


def test_oo5_a_metric_counts_a_redone_step_once() -> None:
    """Of training too, and whatever micro-batch failed."""
    values = []
    for faults in (Faults(), Faults({3}), Faults({45})):
        arm = Arm(faults)
        metric: Metric = MulticlassAccuracy(num_classes=3, average="micro")
        torch.manual_seed(0)
        model = net(noise=False)
        loop = Loop(
            model,
            adamw(model),
            [Seed(2), MicroBatch("auto"), GradientAccumulation(2), arm, Metrics({"acc": metric}, training=True)],
        )
        with faults:
            state = built_in(loop, arm.loss, loader(40, 8), loader(8, 8), epochs=1)
        values.append(state.metrics["train_acc"])
        assert faults.raised == len(faults.at)
    assert values[1:] == pytest.approx([values[0]] * 2, abs=1e-6)


class Far(torch.Tensor):
    """A tensor that lies on another device, whose transfer fails the first times."""

    failures = 0
    moved = 0

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("meta")

    def to(self, *args: Any, **kwargs: Any) -> Any:
        Far.moved += 1
        if Far.failures:
            Far.failures -= 1
            raise torch.OutOfMemoryError(TEXT)
        return self.as_subclass(torch.Tensor)


@pytest.mark.parametrize("form", FORMS)
def test_oo5_in_a_batchs_transfer(form: Any) -> None:
    """It is part of the micro-batch: redone in halves, in training and in validation."""
    x, y = torch.randn(8, 6), torch.randint(0, 3, (8,))
    batch = (x.as_subclass(Far), y)

    def run(data: Any, own: Callback) -> tuple[Any, State]:
        model = net(seed=2)
        loop = Loop(model, adamw(model), [Seed(2), own])
        return bits(loop), form(loop, loss_fn, [data, data], epochs=1)

    Far.failures, Far.moved = 2, 0
    found, state = run(batch, MicroBatch("auto"))
    expected, _ = run((x, y), From(0, 2))
    assert Far.moved == 2 + 4 + 4
    assert state.micro_batch_size == 2
    assert_same_bits(found, expected)
    loop = small()
    Far.failures = 1
    state = form(loop, loss_fn, [(x, y)], [batch], epochs=1)
    assert (state.micro_batch_size, state.eval_micro_batch_size) == (None, 4)


def test_oo5_in_a_checkpoints_gathering(tmp_path: Path) -> None:
    """The checkpoint before it is whole, nothing half written lies beside it, and it goes on to the same bits."""
    with pytest.raises(torch.OutOfMemoryError):
        built_in(small(Raises("state_dict", step=2), Checkpoint(tmp_path, every=1)), loss_fn, loader(40, 8), epochs=1)
    assert [place.name[-1] for place in tmp_path.iterdir()] == ["1"]
    resumed, through = small(Checkpoint(tmp_path, every=1), resume=tmp_path), small()
    for loop in (resumed, through):
        built_in(loop, loss_fn, loader(40, 8), epochs=1)
    assert_same_bits(bits(resumed), bits(through))


def test_oo5_in_a_checkpoints_gathering_is_said(tmp_path: Path) -> None:
    with pytest.raises(torch.OutOfMemoryError) as caught:
        built_in(small(Raises("state_dict", step=2), Checkpoint(tmp_path, every=1)), loss_fn, loader(40, 8), epochs=1)
    assert "checkpoint" in notes_of(caught.value).lower()


@pytest.mark.parametrize("error", [
    ValueError("CUDA out of memory. Tried to allocate 2.00 GiB"), ValueError("out of memory"),
    RuntimeError("the queue is out of memory slots"), MemoryError("out of memory"), KeyError("CUDA out of memory"),
])  # fmt: skip
@pytest.mark.parametrize("where", ["training", "validation", "update"])
def test_oo6_words_in_another_error_are_no_lack_of_memory(error: Exception, where: str) -> None:
    """It passes through as it is: raised once, nothing redone, not even with rollback."""
    calls = 0

    def fail() -> None:
        nonlocal calls
        calls += 1
        raise error

    def loss(model: nn.Module, batch: Any) -> Any:
        if where != "update" and model.training == (where == "training"):
            fail()
        return loss_fn(model, batch)

    model = net()
    optimizer = adamw(model)
    if where == "update":
        optimizer.register_step_post_hook(lambda *_: fail())
    loop = Loop(model, optimizer, [MicroBatch("auto", on_step_oom="rollback")])
    with pytest.raises(type(error)) as caught:
        built_in(loop, loss, loader(16, 8), loader(8, 8), epochs=1)
    assert caught.value is error
    assert calls == 1
    assert loop.state.micro_batch_size is loop.state.eval_micro_batch_size is None


class Alive(Faults):
    """Also remembers the memory of whatever the armed operations made."""

    def __init__(self, at: Collection[int] = ()) -> None:
        super().__init__(at)
        self.made: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        armed = self.armed
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if armed:
            for made in torch.utils._pytree.tree_leaves(result):
                if isinstance(made, torch.Tensor):
                    ref = StorageWeakRef(made.untyped_storage())
                    self.made[ref.cdata] = ref
        return result

    def alive(self, known: Collection[torch.Tensor]) -> int:
        kept = {x.untyped_storage()._cdata for x in known}
        return sum(not ref.expired() and ref.cdata not in kept for ref in self.made.values())


@pytest.fixture
def no_gc() -> Iterator[None]:
    """What only the cycle collector would free counts as held."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def held_after(form: Any, training: bool, n: int) -> tuple[Alive, list[tuple[int, int]]]:
    """Let the n-th operation fail; return how much memory the try had taken, and how much of it the next one finds alive."""
    faults, model, found = Alive({n}), net(seed=2), list[tuple[int, int]]()
    arm = Arm(faults, training=training)

    def loss(model: nn.Module, batch: Any) -> Any:
        if faults.raised and not found:
            # torch's own: the CPU's queue of a failed backward lives until the next one on this thread; a device's doesn't
            torch.ones((), requires_grad=True).backward()
            found.append((len(faults.made), faults.alive([*model.state_dict().values(), *batch[:2]])))
        if not model.training:
            faults.made.clear()  # the means of micro-batches before it are kept
        try:
            faults.armed = model.training == training and (not training or loop.state.step == arm.step)
            hidden = model[0](batch[0])
            return arm.loss(model, batch) | {"hidden": hidden}
        except torch.OutOfMemoryError as error:
            told = error  # a cycle through this frame, and with it what it holds, as careless code makes one
            told.add_note("in the loss")
            raise

    loop = Loop(model, adamw(model), [MicroBatch("auto"), *([GradientAccumulation(2)] if training else []), arm])
    with faults:
        form(loop, loss, loader(40, 8), loader(20, 8), epochs=1)
    return faults, found


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.usefixtures("no_gc")
def test_oo7_no_memory_of_a_failed_try_is_held_when_the_next_begins(form: Any, training: bool) -> None:
    """By the storages themselves: activations, what backward saved, gradients; wherever in the step it failed."""
    n, most = 1, 0
    while True:
        faults, found = held_after(form, training, n)
        if not faults.raised:
            break
        made, alive = found[0]
        assert alive == 0, n
        most, n = max(most, made), n + 4
    assert most > (40 if training else 10)


@pytest.mark.parametrize("form", FORMS)
def test_oo8_a_storm_of_errors(form: Any, caplog: pytest.LogCaptureFixture) -> None:
    """In each third step: one retry each, in halves; each change is logged once, the size never grows back, and it ends."""
    caplog.set_level(logging.DEBUG, "hookloop")
    struck: list[int] = []
    arm, model = Arm(Faults()), net(noise=False)

    def loss(model: nn.Module, batch: Any) -> Any:
        step, outputs = loop.state.step, loss_fn(model, batch)
        if step % 3 == 2 and step not in struck:
            struck.append(step)
            raise torch.OutOfMemoryError(TEXT)
        return outputs

    loop = Loop(model, adamw(model), [Seed(0), MicroBatch("auto"), arm])
    with pytest.raises(torch.OutOfMemoryError, match=r"one sample \(sizes tried: 16, 8, 4, 2, 1\)"):
        form(loop, loss, loader(20 * 16, 16), epochs=1)
    assert struck == [2, 5, 8, 11, 14]
    assert [size for size, _ in arm.sizes] == [None] * 2 + [8] * 3 + [4] * 3 + [2] * 3 + [1] * 3
    told = [r.getMessage() for r in caplog.records if r.name == "hookloop"]
    assert told == [
        f"step {s}: {n} samples ran out of memory; {n // 2} from here on" for s, n in zip(struck, (16, 8, 4, 2), strict=False)
    ]


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False),
    "adamw foreach": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=True, amsgrad=True),
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9, weight_decay=0.1, foreach=False),
    "sgd foreach": lambda model: torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9, weight_decay=0.1, foreach=True),
}


def stepping(kind: str, faults: Faults, own: Callback, folder: Path | None = None, at: int = 0, after: Any = None) -> Loop:
    """A Loop of 3 updates whose optimizer meets the faults in the update numbered `at`; entered by `go`."""
    model = net(seed=4)
    optimizer = OPTIMIZERS[kind](model)

    def arm(*_: Any) -> None:
        faults.armed = loop.state.step == at

    def disarm(*_: Any) -> None:
        faults.armed = False
        if after is not None:
            after()

    optimizer.register_step_pre_hook(arm)
    optimizer.register_step_post_hook(disarm)
    save = [] if folder is None else [Checkpoint(folder, every=1)]
    loop = Loop(model, optimizer, [Seed(6), own, *save], resume=folder)
    return loop


def go(loop: Loop, faults: Faults, form: Any = built_in) -> Loop:
    with faults:
        form(loop, loss_fn, loader(24, 8), epochs=1)
    return loop


def every_operation(kind: str, late: bool) -> Iterator[tuple[Faults, int]]:
    """Faults at each operation of the first optimizer step and of the third, until none is left."""
    for at in (0, 2):
        n, faults = 0, Faults()
        while n == 0 or faults.raised:
            n += 1
            faults = Faults({n}, late)
            yield faults, at
        assert n > 4  # it had operations


LONG = pytest.mark.slow
OO2 = pytest.mark.parametrize(("kind", "late"), [
    ("adamw", True), ("adamw foreach", False), ("sgd", False), ("sgd foreach", True), pytest.param("adamw", False, marks=LONG),
    pytest.param("adamw foreach", True, marks=LONG), pytest.param("sgd", True, marks=LONG),
    pytest.param("sgd foreach", False, marks=LONG),
])  # fmt: skip


@OO2
def test_oo2_in_the_optimizers_step_ends_the_run_and_the_checkpoint_stands(tmp_path: Path, kind: str, late: bool) -> None:
    """At each of its operations, before or after its work is done: what is on disk goes on to the undisturbed run's bits."""
    expected = bits(go(stepping(kind, Faults(), MicroBatch("auto")), Faults()))
    checked = 0
    for i, (faults, at) in enumerate(every_operation(kind, late)):
        folder = tmp_path / str(i)
        loop = stepping(kind, faults, MicroBatch("auto"), folder, at)
        told = ""
        try:
            go(loop, faults)
        except torch.OutOfMemoryError as error:
            told = notes_of(error)
        if not faults.raised:
            assert loop.state.step == 3
            continue
        assert "in the optimizer's step, which can't be redone" in told
        assert "last checkpoint" in told
        assert loop.state.step == at
        with pytest.raises(RuntimeError, match=r"may be half updated.*resumes from the last checkpoint"):
            go(loop, Faults())
        assert [place.name[-1] for place in list_checkpoints(folder)] == [str(n) for n in range(1, at + 1)]
        if i % 5 == 0:
            resumed = go(stepping(kind, Faults(), MicroBatch("auto"), folder), Faults())
            assert_same_bits(bits(resumed), expected)
            checked += 1
    assert checked > 2


@OO2
@pytest.mark.parametrize("size", ["auto", pytest.param(4, marks=LONG)])
def test_oo2_rollback_repeats_the_update(kind: str, late: bool, size: Any) -> None:
    """The same bits as a run that nothing disturbed, whatever was done of the update already."""
    expected = bits(go(stepping(kind, Faults(), MicroBatch(size)), Faults()))
    for faults, at in every_operation(kind, late):
        loop = go(stepping(kind, faults, MicroBatch(size, on_step_oom="rollback"), at=at), faults)
        assert_same_bits(bits(loop), expected)
        assert (loop.state.step, loop.state.samples, loop.state.skipped) == (3, 24, 0)


@pytest.mark.parametrize("form", FORMS)
def test_oo2_rollback_several_times_in_one_update(form: Any) -> None:
    expected = bits(go(stepping("adamw", Faults(), MicroBatch("auto")), Faults(), form))
    faults = Faults({3, 3 + 9, 3 + 9 + 20}, late=True)
    loop = go(stepping("adamw", faults, MicroBatch("auto", on_step_oom="rollback"), at=1), faults, form)
    assert faults.raised == 3
    assert_same_bits(bits(loop), expected)


@pytest.mark.parametrize("size", ["auto", 4])
def test_oo2_rollback_gives_up_where_it_always_fails(tmp_path: Path, size: Any) -> None:
    faults = Faults(range(1, 1000))
    loop = stepping("adamw", faults, MicroBatch(size, on_step_oom="rollback"), tmp_path, at=1)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        go(loop, faults)
    assert 2 <= faults.raised <= 5
    assert notes_of(caught.value).count("which can't be redone") == 1
    with pytest.raises(RuntimeError, match="may be half updated"):
        go(loop, Faults())
    expected = bits(go(stepping("adamw", Faults(), MicroBatch(size)), Faults()))
    assert_same_bits(
        bits(go(stepping("adamw", Faults(), MicroBatch(size, on_step_oom="rollback"), tmp_path), Faults())), expected
    )


def test_oo2_an_update_cut_off_is_not_trained_on_nor_saved_by_who_catches_its_error(tmp_path: Path) -> None:
    faults = Faults({5}, error=lambda text: ValueError("shapes differ"))
    loop, at = stepping("adamw", faults, MicroBatch("auto"), tmp_path, at=1), list[int]()

    def train() -> None:
        with faults, loop:
            for _ in loop.epochs(1):
                for step in loop.steps(loader(24, 8)):
                    for one in step:
                        with one:
                            one.backward(loss_fn)
                    with contextlib.suppress(ValueError):
                        loop.update()
                    at.append(loop.state.step)

    with pytest.raises(RuntimeError, match="may be half updated"):
        train()
    assert at == [1, 1]
    assert [place.name[-1] for place in list_checkpoints(tmp_path)] == ["1"]


def test_oo2_around_a_loop_of_ones_own_nor(tmp_path: Path) -> None:
    """There an error before the optimizer did anything is the program's own, and it may go on."""
    model = net()
    optimizer, at = adamw(model), list[int]()
    loop = Loop(model, optimizer, [Checkpoint(tmp_path, every=1, keep=None)])

    def train() -> None:
        with loop:
            for number, batch in enumerate(loader(40, 8)):
                loss_fn(model, batch)["loss"].backward()
                with contextlib.suppress(ValueError), loop.updating():
                    if number == 1:
                        raise ValueError("before")
                    optimizer.step()
                    if number == 3:
                        raise ValueError("behind")
                at.append(loop.state.step)

    with pytest.raises(RuntimeError, match="may be half updated"):
        train()
    assert at == [1, 1, 2, 2]
    assert [place.name[-1] for place in list_checkpoints(tmp_path)] == ["1", "2"]


@pytest.mark.parametrize("error", [ValueError, RuntimeError, KeyError])
def test_oo2_another_error_in_the_optimizers_step_passes_through(error: Any) -> None:
    """Also with rollback: repeating it would hide a fault that isn't memory's."""
    faults = Faults({5}, error=lambda text: error("shapes differ"))
    loop = stepping("adamw", faults, MicroBatch("auto", on_step_oom="rollback"))
    with pytest.raises(error, match="shapes differ") as caught:
        go(loop, faults)
    assert faults.raised == 1
    assert "half updated" in notes_of(caught.value)
    with pytest.raises(RuntimeError, match="may be half updated"):
        go(loop, Faults())


def test_oo2_rollback_with_a_scaler_and_rate_factors() -> None:
    """What surrounds the update, gradients unscaled once and rates multiplied once, is not done again."""

    class Factors(Callback):
        def on_before_optimizer_step(self, state: State) -> None:
            state.scale_rate(0.5)
            state.scale_gradients(0.25)

    def run(faults: Faults, own: Callback) -> dict[str, torch.Tensor]:
        model = net(seed=4)
        optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(1e-2), foreach=False)
        optimizer.register_step_pre_hook(lambda *_: setattr(faults, "armed", loop.state.step == 1))
        optimizer.register_step_post_hook(lambda *_: setattr(faults, "armed", False))
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        loop = Loop(model, optimizer, [Seed(6), own, Factors()], scaler=scaler)
        go(loop, faults)
        assert optimizer.param_groups[0]["lr"].item() == pytest.approx(1e-2)
        return bits(loop) | {"scale": torch.tensor(scaler.get_scale())}

    expected = run(Faults(), MicroBatch("auto"))
    for n in range(1, 60, 7):
        faults = Faults({n}, late=True)
        assert_same_bits(run(faults, MicroBatch("auto", on_step_oom="rollback")), expected)
        assert faults.raised == 1


class Langevin(torch.optim.SGD):
    """Adds noise to the weights; runs out of memory once, in its second step, having drawn."""

    faults: Any = iter([])  # which, unlike a number, does not come back with the update
    steps = 0

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                p.data.add_(torch.randn_like(p), alpha=0.01)
        if self.steps == 1 and next(self.faults, None):
            raise torch.OutOfMemoryError(TEXT)
        self.steps += 1
        return super().step(closure)


@pytest.mark.parametrize("seeded", [True, False])
def test_oo2_rollback_with_an_optimizer_that_draws(seeded: bool) -> None:
    def run(left: int) -> dict[str, torch.Tensor]:
        model = net(seed=4)
        optimizer = Langevin(model.parameters(), lr=1e-2)
        optimizer.faults = iter([1] * left)
        torch.manual_seed(1)
        seed = [Seed(1)] if seeded else []
        return bits(go(Loop(model, optimizer, [*seed, MicroBatch("auto", on_step_oom="rollback")]), Faults()))

    assert_same_bits(run(1), run(0))


def test_oo2_no_room_for_the_copy_that_a_rollback_needs() -> None:
    class NoRoom(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if where == [1, "update"] and func is torch.ops.aten.empty_like.default:
                raise RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried")
            return func(*args, **(kwargs or {}))

    class Where(Callback):
        def on_before_optimizer_step(self, state: State) -> None:
            where[:] = [state.step, "update"]

        def on_step_end(self, state: State) -> None:
            where[:] = []

    where: list[Any] = []
    expected = bits(go(stepping("adamw", Faults(), MicroBatch("auto")), Faults()))
    model = net(seed=4)
    optimizer = OPTIMIZERS["adamw"](model)
    loop = Loop(model, optimizer, [Seed(6), MicroBatch("auto", on_step_oom="rollback"), Where()])
    with NoRoom(), pytest.raises(RuntimeError, match="can't allocate memory"):
        built_in(loop, loss_fn, loader(24, 8), epochs=1)
    where.clear()
    go(loop, Faults())
    assert loop.state.samples == 24
    assert_same_bits(bits(loop), expected)


INTERRUPTIONS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "zero_grad": lambda optimizer: optimizer.zero_grad(),
    "zero_grad in place": lambda optimizer: optimizer.zero_grad(set_to_none=False),
    "step": lambda optimizer: optimizer.step(),
}


@pytest.mark.parametrize("kind", ["adamw", "adamw fused", "sgd foreach"])
@pytest.mark.parametrize(("act", "micro", "where"), [
    (act, micro, where)
    for act, micros in {"zero_grad": 3, "zero_grad in place": 2, "step": 3}.items() for micro in range(micros)
    for where in ("callback", "callback built in", "body", "body after", "body before", "loss_fn")
    if micro or act == "step" or where not in ("body before", "loss_fn")  # else there is nothing to clear
])  # fmt: skip
def test_am5_a_step_that_someone_else_interrupts(kind: str, act: str, micro: int, where: str) -> None:
    """Gradients cleared or weights stepped between the micro-batches of a step, by a callback or in the loop's body."""
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True) if kind == "adamw fused" else OPTIMIZERS[kind](model)

    def interrupt(at: str, number: int) -> None:
        if at == where.removesuffix(" built in") and loop.state.step == 1 and number == micro:
            INTERRUPTIONS[act](optimizer)

    class Interrupts(Callback):
        def on_micro_end(self, state: State) -> None:
            assert state.micro is not None
            interrupt("callback", state.micro.number)

    def interrupting(model: nn.Module, batch: Any) -> Any:
        interrupt("loss_fn", number[0])
        return loss_fn(model, batch)

    number = [0]

    def hand() -> None:
        with loop:
            for _ in loop.epochs(1):
                for step in loop.steps(loader(36, 12)):
                    for one in step:
                        number[0] = one.number
                        with one:
                            interrupt("body before", one.number)
                            one.backward(interrupting)
                            interrupt("body", one.number)
                        interrupt("body after", one.number)
                    loop.update()

    loop = Loop(model, optimizer, [MicroBatch(4), Interrupts()])
    with pytest.raises(RuntimeError, match="a step was interrupted"):
        built_in(loop, loss_fn, loader(36, 12), epochs=1) if where == "callback built in" else hand()
    assert loop.state.step == 1


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("inside", [True, False])
def test_am5_a_backward_of_ones_own_beside_that_of_a_cut_step(first: bool, inside: bool) -> None:
    """Each micro-batch would add it in whole, so that another cut would train something else."""

    def aux(model: nn.Module, batch: Any) -> Any:
        (0.1 * sum(p.square().sum() for p in model.parameters())).backward()  # type: ignore[union-attr]
        return loss_fn(model, batch)

    model = net()
    loop = Loop(model, adamw(model), [MicroBatch(4)])

    def train() -> None:
        with loop:
            for _ in loop.epochs(1):
                for step in loop.steps(loader(36, 12)):
                    for one in step:
                        with one:
                            if first and not inside:
                                aux(model, one.batch)
                            one.backward(aux if inside else loss_fn)
                            if not first and not inside:
                                aux(model, one.batch)
                    loop.update()

    with pytest.raises(RuntimeError, match="a step was interrupted"):
        train()
    assert loop.state.step == 0


def test_am5_an_error_behind_the_backward_that_the_body_catches() -> None:
    """The micro-batch counts, and of what it gave no graph is kept."""
    model = net()
    with Loop(model, adamw(model)) as loop:
        for _ in loop.epochs(1):
            for step in loop.steps(loader(36, 12)):
                for one in step:
                    with contextlib.suppress(KeyError), one:
                        one.backward(loss_fn)
                        raise KeyError("mine")
                loop.update()
                assert sorted((name, x.requires_grad) for name, x in loop.state.metrics.items()) == [
                    ("accuracy", False), ("loss", False)]  # fmt: skip
    assert loop.state.step == 3


@pytest.mark.parametrize("size", [4, 12])
def test_am5_gradients_zeroed_in_place_by_a_callback_after_the_last_micro_batch(size: int) -> None:
    class Interrupts(Callback):
        def on_micro_end(self, state: State) -> None:
            if state.micro is not None and state.micro.number == 12 // size - 1:
                state.optimizer.zero_grad(set_to_none=False)

    model = net()
    with pytest.raises(RuntimeError, match="a step was interrupted"):
        built_in(Loop(model, adamw(model), [MicroBatch(size), Interrupts()]), loss_fn, loader(36, 12), epochs=1)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_am5_what_is_no_interruption(kind: str) -> None:
    """Clipping and scaling gradients in place before the update, zero_grad around a step, looking at gradients in hooks."""

    class Looks(Callback):
        def on_micro_end(self, state: State) -> None:
            self.norm = state.grad_norm, [p.grad.norm() for p in state.model.parameters()]

        def on_step_start(self, state: State) -> None:
            state.optimizer.zero_grad()

        def on_step_end(self, state: State) -> None:
            state.optimizer.zero_grad(set_to_none=False)

    model = net()
    optimizer = OPTIMIZERS[kind](model)
    loop = Loop(model, optimizer, [MicroBatch(4), Looks()])
    with loop:
        for _ in loop.epochs(1):
            for step in loop.steps(loader(36, 12)):
                optimizer.zero_grad()
                for one in step:
                    with one:
                        one.backward(loss_fn)
                total = nn.utils.clip_grad_norm_(model.parameters(), 0.01)
                nn.utils.clip_grad_value_(model.parameters(), 0.001)
                for p in model.parameters():
                    p.grad.mul_(0.5)  # type: ignore[union-attr]
                    p.grad = p.grad * 1.0  # type: ignore[operator]
                loop.update()
                assert total > 0.01
    assert loop.state.step == 3


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [1, 4])
def test_am7_batch_norm_meets_one_sample(form: Any, size: int) -> None:
    """Cut to one sample, or left with one at the end: torch's error with three ways out, before the weights change."""
    model = net()
    loop = Loop(model, adamw(model), [Seed(0), MicroBatch(size)])
    before = {name: p.clone() for name, p in model.named_parameters()}
    data = [(torch.randn(n, 6), torch.randint(0, 3, (n,))) for n in ((4,) if size == 1 else (1, 4))]
    with pytest.raises(ValueError, match="Expected more than 1 value per channel") as caught:
        form(loop, loss_fn, data, epochs=1)
    told = notes_of(caught.value)
    assert "micro-batch of 1 sample" in told
    assert all(way in told for way in ("at least 2", "drop_last=True", "GroupNorm"))
    assert_same_bits(dict(model.named_parameters()), before)
    assert loop.state.step == 0
    assert not loop.state.optimizer.state


def test_am7_one_sample_in_validation_is_fine() -> None:
    model = net()
    state = built_in(Loop(model, adamw(model), [MicroBatch(4)]), loss_fn, loader(24, 8), loader(5, 1), epochs=1)
    assert state.metrics["val_loss"] > 0


class History(torch.optim.SGD):
    """Keeps lists of tensors in its state, as Shampoo-like optimizers do, and counts; runs out of memory in the middle once."""

    def __init__(self, params: Any, faults: Any) -> None:
        super().__init__(params, lr=1e-2)
        self.faults, self.seen = faults, {"tensors": 0}

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for i, p in enumerate(group["params"]):
                past = self.state[p].setdefault("past", [torch.zeros_like(p)])
                past[0].add_(p.grad)
                past.append(p.grad.clone())
                self.seen["tensors"] += 1
                p.data.sub_(0.01 * past[0] + 0.001 * len(past) + 0.001 * self.seen["tensors"])
                if i == 2 and len(past) == 3 and next(self.faults, None):
                    raise torch.OutOfMemoryError(TEXT)


def test_oo2_rollback_of_state_in_lists_and_attributes() -> None:
    def run(*given: int) -> dict[str, torch.Tensor]:
        model, faults = net(seed=4), iter(given)
        optimizer = History(model.parameters(), faults)
        loop = go(Loop(model, optimizer, [Seed(1), MicroBatch("auto", on_step_oom="rollback")]), Faults())
        assert not [*faults]
        return {n: x.clone() for n, x in loop.state.model.state_dict().items()}

    assert_same_bits(run(1), run())


class Lazy(nn.Module):
    """Makes a buffer from the first batch that it meets."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)
        self.register_buffer("mean", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.mean is None:
            self.mean = x.mean(0)
        return self.linear(x - self.mean)


@pytest.mark.filterwarnings("ignore:2 parameters require gradients but are in no group")
def test_oo1_puts_back_what_the_optimizer_does_not_hold_and_buffers_made_by_the_forward() -> None:
    """Gradients of another optimizer's parameters are those of one try; a lazy buffer is the redone step's."""

    def run(fails: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(2)
        model = nn.Sequential(Lazy(), nn.Linear(3, 3))
        calls = [0]

        def loss(model: nn.Module, batch: Any) -> Any:
            calls[0] += 1
            if fails and calls[0] == 2:
                raise torch.OutOfMemoryError(TEXT)
            return loss_fn(model, batch)

        optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
        auto = MicroBatch("auto")
        auto.train = 8 if fails else 4
        built_in(Loop(model, optimizer, [auto]), loss, loader(16, 16, shuffle=False), steps=1)
        grads = {f"grad {n}": p.grad.clone() for n, p in model[1].named_parameters() if p.grad is not None}
        assert grads
        return {**{n: x.clone() for n, x in model.state_dict().items()}, **grads}

    assert_same_bits(run(True), run(False))
