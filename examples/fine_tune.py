"""Fine-tune a net that knows the digits 0 to 4 on a few samples of 5 to 9, against training on these from scratch.

The digits of scikit-learn stand somewhere in a larger picture, so that there is something to know beforehand: that the place
does not matter. Both are trained alike, once for each of ten seeds, each with samples of its own; the rest of 5 to 9 tells
how good they are. Only the new head trains at first, the layers below it join later, each with a smaller rate than the one
above it; the rest is a small rate, warmup and early stopping.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from digits import loss_fn
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from hookloop.callbacks import (
    EarlyStopping,
    LayerwiseRate,
    Metrics,
    Seed,
    TensorBoard,
    Unfreeze,
    Warmup,
    WeightDecay,
    make_optimizer,
)
from hookloop.loop import Callback, Goal, Loop
from hookloop.loop.rules import Rule
from hookloop.loop.study import repeat

FEW = 5  # samples of each new digit to train on, and as many to stop by
# Chosen on seeds 10 to 14, and not moved since: of the rate, from each layer to the one below it; and what joins when.
DECAY = 0.75
PLAN: dict[int, Rule] = {0: r"^11\.", 10: nn.Linear, 20: "."}


def build() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(64 * 3 * 3, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


def samples(seed: int) -> list[DataLoader[Any]]:
    """All of 0 to 4; of 5 to 9 a few to train on, as many to stop by, and the rest."""
    x, y = load_digits(return_X_y=True)
    images, labels = torch.zeros(len(x), 1, 12, 12), torch.tensor(y)
    places = torch.randint(0, 5, (len(x), 2), generator=torch.Generator().manual_seed(seed))
    for image, digit, (top, left) in zip(images, torch.tensor(x / 16.0).view(-1, 8, 8), places.tolist(), strict=True):
        image[0, top : top + 8, left : left + 8] = digit
    new = (labels >= 5).nonzero().flatten()
    few, rest = train_test_split(new, train_size=10 * FEW, random_state=seed, stratify=labels[new])
    train, stop = train_test_split(few, train_size=5 * FEW, random_state=seed, stratify=labels[few])
    parts = [TensorDataset(images[part], labels[part]) for part in (labels < 5, train, stop, rest)]
    return [*(DataLoader(part, 32, shuffle=True) for part in parts[:2]), *(DataLoader(part, 200) for part in parts[2:])]


def train(model: nn.Module, seed: Seed, more: list[Callback], loaders: tuple[Any, Any], epochs: int) -> Loop:
    accuracy, optimizer = (
        Metrics({"accuracy": MulticlassAccuracy(10, average="micro")}),
        make_optimizer(model, "adamw", lr=3e-3),
    )
    loop = Loop(model, optimizer, [seed, WeightDecay(default=0.01), Warmup(10), accuracy, *more])
    loop.fit(loss_fn, *loaders, epochs=epochs)
    return loop


def run(name: str, number: int, folder: Path) -> dict[str, float]:
    seed = Seed(number)  # first of all, so that it covers the initial weights
    model = build()
    old, few, stop, rest = samples(number)
    callbacks = [
        EarlyStopping(Goal("val_loss", patience=10), restore_best=True),
        TensorBoard(folder / f"{name}-{number}", every=5),
    ]
    if name == "fine-tuned":
        train(model, seed, [], (old, None), epochs=6)
        seed = Seed(number)
        model[-1] = nn.Linear(64, 10)
        callbacks += [LayerwiseRate(DECAY), Unfreeze(PLAN)]
    loop = train(model, seed, callbacks, (few, stop), epochs=60)
    return {"test_accuracy": loop.evaluate(loss_fn, rest)["val_accuracy"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--folder", type=Path, default=Path("runs/fine_tune"), help="TensorBoard files, a run a seed")
    given = parser.parse_args()
    names = ("from scratch", "fine-tuned")
    found = repeat(
        {name: lambda seed, name=name: run(name, seed, given.folder) for name in names}, given.seeds, "test_accuracy"
    )
    gain = found.difference(*names)
    low, high = gain.interval()
    rows = {
        **{
            name: f"{found[name].mean:.2%} of what was not trained on, standard deviation {found[name].std:.2%}"
            for name in names
        },
        "gain": f"{gain.value:+.2%}, 95% interval {low:+.2%} .. {high:+.2%}, p = {gain.p:.2g} (Welch)",
        "look at it with": f"tensorboard --logdir {given.folder}",
    }
    print(found)
    print("\n".join(f"{name:<20} {value}" for name, value in rows.items()))


if __name__ == "__main__":
    main()
