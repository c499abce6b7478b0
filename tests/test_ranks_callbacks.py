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
from torch.utils.data import DataLoader, Subset
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.wrappers import MinMaxMetric

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

BATCHES, EPOCHS = 5, 3

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
    size = 16 // world
    mine = [first + 16 * i + size * rank + j for i in range(BATCHES) for j in range(size)]
    return DataLoader(Subset(Samples(200, torch.float64), mine), size)


def trained(rank: int, world: int, how: str, name: str, folder: str) -> Any:
    """Train with one callback; return weights, what was reported, and the counts."""
    place = Path(folder)
    place.mkdir(exist_ok=True, parents=True)
    model: Any = net(torch.float64, noise=False)
    if how != "plain":
        looks = {"find_unused_parameters": True} if (how, name) == ("ddp", "Unfreeze") and "refused" not in folder else {}
        model = many.wrap(model, how, **looks)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    reported = Reported("val_loss")
    loop = Loop(model, optimizer, [Seed(2), CALLBACKS[name](place), reported])
    form = FORMS[[*CALLBACKS].index(name) % 2]
    form(loop, with_losses, loader(rank, world), loader(rank, world, 100), epochs=EPOCHS)
    state = loop.state
    return many.weights(model), reported.seen, (state.step, state.epoch, state.skipped, state.stop_reason is None)


def trained_in_turn(rank: int, world: int, how: str, names: list[str], folder: str) -> dict[str, Any]:
    found = {}
    for name in names:
        try:
            found[name] = trained(rank, world, how, name, str(Path(folder) / name))
        except Exception as error:
            error.add_note(f"with {name}")
            raise
    return found


def check(folder: Path, how: str, names: list[str], world: int) -> None:
    expected = many.values(trained_in_turn, 1, "plain", names, str(folder / "one"), group=False)[0]
    failed = []
    ranks = many.values(trained_in_turn, world, how, names, str(folder / "many"), limit=30.0 + 5 * len(names))
    for rank, found in enumerate(ranks):
        for name in names:
            (weights, reported, counts), alone = found[name], expected[name]
            try:
                many.close(weights, alone[0], where=f"{name}, rank {rank}:")
            except AssertionError as error:
                failed.append(str(error).splitlines()[0])
            if (reported, counts) != (pytest.approx(alone[1], rel=1e-12), alone[2]):
                failed.append(f"{name}, rank {rank}: reported {reported}, {counts}, not {alone[1]}, {alone[2]}")
    assert not failed, "\n" + "\n".join(failed)


REFUSED = {("fsdp", "Average")}  # shown below
QUICK = ["ClipGradients", "EarlyStopping", "Initialize", "SwitchOptimizer", "WeightDecay"]


@pytest.mark.parametrize(("how", "names", "world"), [
    ("ddp", [*CALLBACKS], 2), ("fsdp", QUICK, 2),
    pytest.param("fsdp", [*CALLBACKS], 2, marks=pytest.mark.slow),
    pytest.param("ddp", [*CALLBACKS], 4, marks=pytest.mark.slow),
], ids=["ddp", "fsdp", "fsdp, all", "ddp, 4"])  # fmt: skip
@pytest.mark.timeout(300)
def test_cut_with_each_callback(tmp_path: Path, how: str, names: list[str], world: int) -> None:
    """Ranks that share each batch are one rank that has it whole: weights, reports and decisions."""
    check(tmp_path, how, [name for name in names if (how, name) not in REFUSED], world)


@pytest.mark.parametrize(("how", "name", "words"), [
    ("ddp", "Unfreeze", ("0.weight", "find_unused_parameters=True")), ("fsdp", "Average", ("Average", "fully_shard")),
])  # fmt: skip
def test_refused_at_the_start_by_name(tmp_path: Path, how: str, name: str, words: tuple[str, ...]) -> None:
    for error in many.errors(trained, 2, how, name, str(tmp_path / "refused")):
        assert error.startswith("ValueError"), error
        assert all(word in error for word in words), error


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
        if (name, how) == ("noise", "fsdp"):
            continue  # refused
        data: Any = loader(rank, world)
        if rank:
            data.dataset.dataset.y = data.dataset.dataset.y[torch.randperm(200)]
        model, sizes = many.wrap(net(torch.float64, noise=False), how), Sizes()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        built_in(
            Loop(model, optimizer, [Seed(2), make(Path(folder)), sizes]), with_losses, data, loader(rank, world, 100), epochs=8
        )
        found[name] = sizes.seen, many.weights(model)
    return found


class Asks(Callback):
    def __init__(self, who: bool) -> None:
        self.who = who

    def on_step_end(self, state: State) -> None:
        if self.who and state.step == 2:
            state.save("mine")


def two_checkpoints(rank: int, world: int, how: str, folder: str) -> list[list[str]]:
    model = many.wrap(net(torch.float64, noise=False), how)
    saves = [Checkpoint(Path(folder) / "often", 1, keep=None), Checkpoint(Path(folder) / "rare", 3, keep=None).named("rare")]
    loop = Loop(model, torch.optim.SGD(model.parameters(), lr=0.1), [Seed(2), *saves, Asks(rank == 1)])
    built_in(loop, with_losses, loader(rank, world), steps=4)
    return [sorted(path.name for path in save.folder.glob("step-*")) for save in saves]


@pytest.mark.parametrize("how", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_each_of_two_checkpoints_keeps_its_own_intervals(tmp_path: Path, how: str) -> None:
    """And writes what one rank alone asks for."""
    expected = [[f"step-{step:08d}" for step in steps] for steps in ((1, 2, 3, 4), (2, 3, 4))]
    assert many.values(two_checkpoints, 2, how, str(tmp_path)) == [expected] * 2


@pytest.mark.parametrize("how", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_es5_batches_grow_alike_and_time_passes_alike(tmp_path: Path, how: str) -> None:
    """Growth by the gradients' noise and by a metric, and checkpoints by the clock."""
    first, second = many.values(decides, 2, how, str(tmp_path))
    for name in first:
        assert first[name][0] == second[name][0], name
        assert all(torch.equal(value, second[name][1][n]) for n, value in first[name][1].items()), name
    assert len(set(first["goal"][0])) > 1


def of_each_class(rank: int, world: int) -> dict[str, float]:
    both = {"each": MulticlassAccuracy(3, average=None), "m": MinMaxMetric(MulticlassAccuracy(3))}
    if rank == 0:
        Metrics(both)  # on one rank alone, which waits for no other
    model = many.wrap(net(torch.float64, noise=False), "ddp")
    loop = Loop(model, torch.optim.SGD(model.parameters(), lr=0.1), [Seed(2), Metrics(both, training=True)])
    state = built_in(loop, with_losses, loader(rank, world), loader(rank, world, 100), epochs=1)
    return {name: state.metrics[name] for name in state.reported if "each" in name or "m_" in name}


def test_several_numbers_of_a_metric_are_over_all_ranks() -> None:
    first, second = many.values(of_each_class, 2)
    assert first == second
    for split in ("val", "train"):
        mean = sum(first[f"{split}_each_{i}"] for i in range(3)) / 3
        assert mean == pytest.approx(first[f"{split}_m_raw"], rel=1e-6)
    assert len(first) == 12
