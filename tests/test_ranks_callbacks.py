"""Every callback across ranks: two ranks with half of each batch train as one does with all of it, and decide alike."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import many
import pytest
import torch
from helpers import FORMS, Patient, Reported, Samples, built_in, net, with_losses
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from hookloop.callbacks import (
    Average,
    Checkpoint,
    ClipGradients,
    DecaySchedule,
    Diagnose,
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
from hookloop.loop import Callback, Goal, Loop, State

BATCHES, EPOCHS, EACH = 5, 4, 8  # EACH: samples of a batch on each of two ranks

CALLBACKS: dict[str, Callable[[Path], Callback]] = {
    "Average": lambda folder: Average("ema", 0.8, start=4),
    "Checkpoint": lambda folder: Checkpoint(folder / "saved", every=3, best="val_loss"),
    "ClipGradients": lambda folder: ClipGradients(0.3),
    "DecaySchedule": lambda folder: DecaySchedule("rate"),
    "Diagnose": lambda folder: Diagnose(),
    "EarlyStopping": lambda folder: EarlyStopping("val_loss", patience=2, min_delta=0.5, restore_best=True),
    "Fingerprint": lambda folder: Fingerprint(5),
    "GradientAccumulation": lambda folder: GradientAccumulation({0: 1, 2: 2}),
    "HardExamples": lambda folder: HardExamples(4, every=3, folder=folder),
    "Initialize": lambda folder: Initialize({torch.nn.Linear: "kaiming_uniform"}),
    "LayerwiseRate": lambda folder: LayerwiseRate(0.7),
    "Metrics": lambda folder: Metrics({"acc": MulticlassAccuracy(3, average="micro")}, training=True),
    "MicroBatch": lambda folder: MicroBatch(5),
    "MicroBatch auto": lambda folder: MicroBatch("auto"),
    "NonFinite stop": lambda folder: NonFinite(),
    "NonFinite skip": lambda folder: NonFinite("skip"),
    "NonFinite rollback": lambda folder: NonFinite("rollback", every=4),
    "Preemption": lambda folder: Preemption(on_signal="return"),
    "Progress": lambda folder: Progress(every=0.001),
    "Prune": lambda folder: Prune(Patient()),
    "Schedule": lambda folder: Schedule("cosine", end=0.1),
    "Schedule plateau": lambda folder: Schedule("plateau", on="val_loss", patience=0, threshold=0.5),
    "SwitchOptimizer": lambda folder: SwitchOptimizer(
        lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9), at=Epochs(2), rate=0.02
    ),
    "TensorBoard": lambda folder: TensorBoard(folder / "board", every=2, grad_norm=True),
    "Unfreeze": lambda folder: Unfreeze({1: r"^0\."}),
    "Warmup": lambda folder: Warmup(0.3),
    "WeightDecay": lambda folder: WeightDecay({torch.nn.Linear: 0.1}),
}


def loader(rank: int, world: int, first: int = 0) -> DataLoader[Any]:
    """Return a rank's share of each batch, which one process alone has whole."""
    batches = [range(first + 16 * i + 16 * rank // world, first + 16 * i + 16 * (rank + 1) // world) for i in range(BATCHES)]
    return DataLoader(Samples(200, torch.float64), batch_sampler=[list(batch) for batch in batches])


def trained(rank: int, world: int, how: str, name: str, folder: str) -> Any:
    """Train with one callback in both forms; return weights, what was reported and the counts of each."""
    found = []
    for form in FORMS:
        place = Path(folder) / form.__name__
        place.mkdir(exist_ok=True, parents=True)
        model: Any = net(torch.float64, noise=False)
        if how != "plain":
            model = many.wrap(model, how)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
        reported = Reported("val_loss")
        loop = Loop(model, optimizer, [Seed(2), CALLBACKS[name](place), reported])
        form(loop, with_losses, loader(rank, world), loader(rank, world, 100), epochs=EPOCHS)
        state = loop.state
        found.append((many.weights(model), reported.seen, (state.step, state.epoch, state.skipped, state.stop_reason)))
    return found


@pytest.mark.parametrize("how", many.WRAPS)
def test_cut_with_every_callback(tmp_path: Path, how: str) -> None:
    """Two ranks with 8 samples each and one callback are one rank with 16."""
    failed = []
    for name in CALLBACKS:
        expected = many.values(trained, 1, "plain", name, str(tmp_path / name / "one"), group=False)[0]
        ended = many.run(trained, 2, how, name, str(tmp_path / name / "two"))
        for rank, one in enumerate(ended):
            if one.error or one.code:
                failed.append(f"{name}, rank {rank}: {one.error or one.said or one.code}")
                continue
            for form, (weights, reported, counts), (others, other_reported, other_counts) in zip(
                FORMS, one.value, expected, strict=True
            ):
                say = f"{name}, rank {rank}, {form.__name__}"
                try:
                    many.close(weights, others, where=say)
                except AssertionError as error:
                    failed.append(str(error).splitlines()[0])
                if reported != pytest.approx(other_reported, rel=1e-12):
                    failed.append(f"{say}: reported {reported}, not {other_reported}")
                if counts[:3] != other_counts[:3] or (counts[3] is None) != (other_counts[3] is None):
                    failed.append(f"{say}: {counts}, not {other_counts}")
    assert not failed, "\n" + "\n".join(failed)


class Sizes(Callback):
    """Keeps how many samples each update had, and how many its largest micro-batch."""

    def __init__(self) -> None:
        self.seen: list[tuple[int | None, int | None]] = []

    def on_step_end(self, state: State) -> None:
        self.seen.append((state.batch_size, state.micro_batch_size))


DECIDING: dict[str, Callable[[Path], Callback]] = {
    "noise": lambda folder: DynamicBatchSize(2, 12, growth=2, every=NoiseScale()),
    "goal": lambda folder: DynamicBatchSize(2, 12, growth=2, every=Goal("val_loss", patience=1, min_delta=0.2)),
    "time": lambda folder: Checkpoint(folder / "saved", every=timedelta(microseconds=1), keep=None),
}


def decides(rank: int, world: int, how: str, folder: str) -> Any:
    """Ranks whose data differ in kind: rank 1's labels are noise, so that each alone would decide otherwise."""
    found = {}
    for name, make in DECIDING.items():
        data: Any = loader(rank, world)
        if rank:
            data.dataset.y = data.dataset.y[torch.randperm(200)]
        model, sizes = many.wrap(net(torch.float64, noise=False), how), Sizes()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        built_in(
            Loop(model, optimizer, [Seed(2), make(Path(folder)), sizes]), with_losses, data, loader(rank, world, 100), epochs=8
        )
        found[name] = sizes.seen, many.weights(model)
    return found


@pytest.mark.parametrize("how", many.WRAPS)
def test_es5_batches_grow_alike_and_time_passes_alike(tmp_path: Path, how: str) -> None:
    """Growth by the gradients' noise and by a metric, and checkpoints by the clock."""
    first, second = many.values(decides, 2, how, str(tmp_path))
    for name in DECIDING:
        assert first[name][0] == second[name][0], name
        assert all(torch.equal(value, second[name][1][n]) for n, value in first[name][1].items()), name
    assert len(set(first["goal"][0])) > 1
