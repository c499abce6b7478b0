"""Train a small convolutional net on scikit-learn's handwritten digits, with every callback switched on.

Stop it with Ctrl-C whenever you like and start it again with the same command: it ends with the same weights.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from hookloop.callbacks import (
    Checkpoint,
    ClipGradients,
    DynamicBatchSize,
    EarlyStopping,
    GradientAccumulation,
    Metrics,
    MicroBatch,
    Progress,
    Schedule,
    Seed,
    TensorBoard,
    Warmup,
    WeightDecay,
)
from hookloop.loop import Callback, Goal, Loop, State

EPOCHS = 30


def data() -> tuple[DataLoader[Any], DataLoader[Any]]:
    x, y = load_digits(return_X_y=True)
    parts = train_test_split(x, y, test_size=0.2, random_state=0, stratify=y)
    x_train, x_val = (torch.tensor(part / 16.0, dtype=torch.float32).view(-1, 1, 8, 8) for part in parts[:2])
    y_train, y_val = (torch.tensor(part) for part in parts[2:])
    train = DataLoader(TensorDataset(x_train, y_train), batch_size=32, shuffle=True)
    return train, DataLoader(TensorDataset(x_val, y_val), batch_size=120)


def build() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * 4 * 4, 10),
    )  # fmt: skip


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    images, labels = batch
    logits = model(images)
    return {"loss": nn.functional.cross_entropy(logits, labels), "preds": logits, "target": labels}


def callbacks(folder: Path) -> list[Callback]:
    return [
        WeightDecay({nn.Linear: 0.05}, default=0.01),  # biases and norms stay at 0
        Warmup(20),
        Schedule(lambda optimizer, total: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)),
        GradientAccumulation({0: 1, 10: 2}),
        DynamicBatchSize(32, 128, growth=1.5, every=3),
        MicroBatch(64),
        ClipGradients(1.0),
        Metrics({"accuracy": MulticlassAccuracy(10, average="micro")}),
        EarlyStopping("val_loss", patience=5, restore_best=True),
        TensorBoard(folder, every=10),
        Checkpoint(folder, every=20, best=Goal("val_accuracy", mode="max")),
        Progress(),
    ]


def fingerprint(model: nn.Module) -> str:
    """Two models with the same fingerprint have the same bits."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode() + value.detach().to("cpu").contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def arguments() -> tuple[int, Path]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("runs/digits"), help="checkpoints and TensorBoard files")
    found = parser.parse_args()
    return found.seed, found.folder


class Clock(Callback):
    """What a callback of your own looks like."""

    def on_fit_start(self, state: State) -> None:
        self.time, self.samples = time.perf_counter(), state.samples

    def on_fit_end(self, state: State) -> None:
        self.speed = (state.samples - self.samples) / (time.perf_counter() - self.time)


def closing_table(loop: Loop, val: DataLoader[Any], clock: Clock, folder: Path) -> None:
    state = loop.state
    rows = {
        "stopped because": state.stop_reason or "all epochs were done",
        "validation accuracy": f"{loop.evaluate(loss_fn, val)['val_accuracy']:.2%}",
        "epochs / updates": f"{state.epoch} / {state.step}",
        "samples per second": f"{clock.speed:,.0f}",
        "fingerprint": fingerprint(state.model),
        "look at it with": f"tensorboard --logdir {folder}",
    }
    print("\n".join(f"{name:<20} {value}" for name, value in rows.items()))


def main() -> None:
    number, folder = arguments()
    seed = Seed(number)  # first of all, so that it covers the model's initial weights
    model = build().to("cuda" if torch.cuda.is_available() else "cpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    train, val = data()
    clock = Clock()
    loop = Loop(model, optimizer, [seed, *callbacks(folder), clock], resume=folder)
    loop.fit(loss_fn, train, val, epochs=EPOCHS)
    closing_table(loop, val, clock, folder)


if __name__ == "__main__":
    main()
