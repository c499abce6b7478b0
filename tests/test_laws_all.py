"""The laws over all callbacks at once: any order, any subset of observers, and no wait for a device in a step."""

from __future__ import annotations

import contextlib
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FORMS, Patient, adamw, assert_same_bits, bits, built_in, by_hand, loader, loss_fn, net, same, with_losses
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torchmetrics.classification import MulticlassAccuracy

from hookloop.callbacks import (
    Average,
    Checkpoint,
    ClipGradients,
    DecaySchedule,
    Diagnose,
    Dropout,
    DynamicBatchSize,
    EarlyStopping,
    Epochs,
    Fingerprint,
    GradientAccumulation,
    HardExamples,
    Initialize,
    LayerwiseRate,
    Metrics,
    MicroBatch,
    NoiseScale,
    NonFinite,
    Preemption,
    Progress,
    Prune,
    Schedule,
    Seed,
    SwitchOptimizer,
    TensorBoard,
    Unfreeze,
    Warmup,
    WeightDecay,
)
from hookloop.loop import Callback, Loop
from hookloop.loop.host import HostCopy
from hookloop.loop.store import list_checkpoints


def shaping() -> list[Callback]:
    return [
        Warmup(0.3), Schedule("cosine", end=0.1), GradientAccumulation({0: 1, 2: 2}),
        DynamicBatchSize(6, 13, scale_lr="sqrt"), MicroBatch(5), ClipGradients(0.3), WeightDecay({torch.nn.Linear: 0.1}),
        LayerwiseRate(0.7), DecaySchedule("rate"), Average("ema", 0.8, start=4),
        Initialize({torch.nn.Linear: "kaiming_uniform"}), Unfreeze({1: r"^0\."}), Dropout({0: 0.2, 2: 0.1}),
        SwitchOptimizer(lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9), at=Epochs(2), rate=0.02),
        EarlyStopping("val_accuracy", mode="max", patience=9, restore_best=True),
    ]  # fmt: skip


def watching(folder: Path) -> list[Callback]:
    return [TensorBoard(folder, every=2, grad_norm=True), Progress(every=0.001), Checkpoint(folder, every=3, keep=None),
            Metrics({"acc": MulticlassAccuracy(3)}, training=True), NonFinite("rollback", every=4),
            Fingerprint(5), Diagnose(), HardExamples(4, every=3, folder=folder), Prune(Patient())]  # fmt: skip


def run(form: Any, callbacks: list[Callback], resume: Path | None = None) -> Any:
    seed, model = Seed(5), net(seed=5)
    loop = Loop(model, adamw(model), [seed, *callbacks], resume=resume)
    form(loop, with_losses, loader(50, 8), loader(20, 8, shuffle=False), epochs=3)
    return loop, bits(loop)


def saved(folder: Path) -> list[Any]:
    found = []
    for checkpoint in list_checkpoints(folder):
        state = torch.load(checkpoint / "state.pt", weights_only=True)
        found.append((checkpoint.name, torch.load(checkpoint / "model.pt", weights_only=True), state))
    return found


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("reference")
    return run(built_in, shaping())[1], run(built_in, [*shaping(), *watching(folder)])[1], saved(folder), folder


def test_watching_is_free(reference: Any, tmp_path: Path) -> None:
    assert_same_bits(reference[0], reference[1])
    for i, one in enumerate(watching(tmp_path)):
        assert_same_bits(reference[0], run(FORMS[i % 2], [one, *shaping()])[1])


@pytest.mark.parametrize("number", range(6))
def test_cb5_any_order_trains_and_saves_the_same(reference: Any, tmp_path: Path, number: int) -> None:
    hand, folder = number % 2, tmp_path
    callbacks = [*shaping(), *watching(folder)]
    order = list(range(len(callbacks)))
    random.Random(number).shuffle(order)
    found = run(by_hand if hand else built_in, [callbacks[i] for i in order])[1]
    assert_same_bits(reference[0], found)
    mine = saved(folder)
    assert len(mine) == len(reference[2]) > 5
    for a, b in zip(reference[2], mine, strict=True):
        for state in (a[2], b[2]):
            state["callbacks"].pop("TensorBoard", None)  # holds seconds and bytes of memory
        same(a, b)
        assert a[0] == b[0]


def test_resumed_from_each_checkpoint_it_ends_the_same(reference: Any, tmp_path: Path) -> None:
    """Also in another order and form; the switch, the unfreezing and the growth lie before some and after others."""
    for i, checkpoint in enumerate(list_checkpoints(reference[3])[:-1]):
        shutil.copytree(checkpoint, tmp_path / f"{i}" / checkpoint.name)
        for beside in reference[3].glob("*.pt"):
            shutil.copy(beside, tmp_path / f"{i}")
        callbacks = [*shaping(), *watching(tmp_path / f"{i}")]
        random.Random(i).shuffle(callbacks)
        assert_same_bits(reference[0], run(FORMS[i % 2], callbacks, resume=tmp_path / f"{i}")[1])
        a, b = reference[2][-1], saved(tmp_path / f"{i}")[-1]
        for state in (a[2], b[2]):
            state["callbacks"].pop("TensorBoard", None)
            state.pop("seconds", None)
        same(a, b)


@given(st.sets(st.integers(0, 14)), st.integers(1, 60), st.integers(1, 12))
@settings(max_examples=15, deadline=None)
def test_by_hand_is_built_in_for_any_subset(which: set[int], count: int, size: int) -> None:
    def one(form: Any) -> Any:
        seed, model = Seed(5), net(seed=5, noise=False).insert(1, torch.nn.Dropout(0.3))
        loop = Loop(model, adamw(model), [seed, *(c for i, c in enumerate(shaping()) if i in which)])
        form(loop, loss_fn, loader(count, size), loader(20, 8, shuffle=False), epochs=3)
        return bits(loop), loop.state

    (a, state), (b, other) = one(built_in), one(by_hand)
    assert_same_bits(a, b)
    assert state.step == other.step == state.total_steps


class Reads(TorchDispatchMode):
    """Counts what brings a number from a tensor to Python: `.item()`, `float()`, `bool()`, `if tensor:`."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
            torch.ops.aten.equal.default,
        ):
            self.count += 1
        return func(*args, **(kwargs or {}))


OPTIMIZERS = {"sgd": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9), "adamw": lambda ps: torch.optim.AdamW(ps, lr=0.1)}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_no_callback_adds_a_read_to_a_step(kind: str, tmp_path: Path) -> None:
    """AdamW reads its own step counters, which lie on the host here; nothing else reads anything."""

    def reads(callbacks: list[Callback]) -> float:
        model = net()
        loop, mode = Loop(model, OPTIMIZERS[kind](model.parameters()), callbacks), Reads()
        with loop:
            for _ in loop.epochs(1):
                for step in loop.steps(loader(60, 4, shuffle=False)):
                    watched = 4 <= loop.state.step < 12  # after what is set up once, before the loggers' interval
                    with mode if watched else contextlib.nullcontext():
                        for micro in step:
                            with micro:
                                micro.backward(lambda m, b: torch.nn.functional.cross_entropy(m(b[0]), b[1]))
                        loop.update()
        return mode.count / (min(loop.state.step, 12) - 4)

    quiet = [TensorBoard(tmp_path, every=500), Progress(every=1e6), Checkpoint(tmp_path, every=500), Fingerprint(500),
             Diagnose()]  # fmt: skip
    bare = reads([])
    assert (bare > 0) == (kind == "adamw")
    rest = [c for c in shaping()[5:] if not isinstance(c, Unfreeze)]  # AdamW counts no steps of what is frozen
    assert bare == reads([Seed(0), *shaping()[:4], MicroBatch("auto"), *rest, *quiet])


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_step_reads_nothing_back(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On "meta" tensors have no values: whatever would bring one to Python raises, with every callback there is."""
    monkeypatch.setattr(HostCopy, "put", lambda self, about, values, most_dims=0: None)  # a copy that nobody waits for
    with torch.device("meta"):
        model = torch.nn.Sequential(
            torch.nn.Linear(6, 12), torch.nn.BatchNorm1d(12), torch.nn.Dropout(0.1), torch.nn.Linear(12, 3)
        )
        data = [(torch.empty(4, 6), torch.empty(4, dtype=torch.int64))] * 9

    def loss(model: Any, batch: Any) -> Any:
        preds = model(batch[0])
        return {"loss": torch.nn.functional.cross_entropy(preds, batch[1]), "preds": preds, "target": batch[1]}

    quiet = [TensorBoard(tmp_path, every=500), Progress(every=1e6), Checkpoint(tmp_path, every=500), Fingerprint(500), NonFinite(),
             Diagnose(), Metrics({"acc": MulticlassAccuracy(3)}), Preemption(on_signal="return")]  # fmt: skip
    planned = (
        shaping()[:4] if kind == "adamw" else [Warmup(5), GradientAccumulation(2), DynamicBatchSize(6, 13, every=NoiseScale(2))]
    )
    loop = Loop(model, OPTIMIZERS[kind](model.parameters()), [Seed(0), *planned, *shaping()[4:-1], *quiet])
    with loop:
        for _ in loop.epochs(3):
            for step in loop.steps(data):
                for micro in step:
                    with micro:
                        micro.backward(loss)
                loop.update()
    assert loop.state.step > 8
    with pytest.raises(RuntimeError, match="meta"):
        float(loop.state.metrics["loss"])
