"""A loop that was there before hookloop, with callbacks dropped in around its optimizer step."""

from __future__ import annotations

import torch
from digits import Clock, arguments, build, closing_table, data, loss_fn
from torchmetrics.classification import MulticlassAccuracy

from hookloop.callbacks import (
    ClipGradients,
    EarlyStopping,
    Metrics,
    Progress,
    Schedule,
    Seed,
    TensorBoard,
    Warmup,
    WeightDecay,
)
from hookloop.loop import Loop

EPOCHS = 12


def main() -> None:
    number, folder = arguments()
    seed = Seed(number)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    train, val = data()
    clock = Clock()
    loop = Loop(model, optimizer, [
        seed, WeightDecay({torch.nn.Linear: 0.05}, default=0.01), Warmup(20), ClipGradients(1.0),
        Schedule(lambda optimizer, total: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * len(train))),
        Metrics({"accuracy": MulticlassAccuracy(10, average="micro")}), EarlyStopping("val_loss", patience=5),
        TensorBoard(folder, every=10), Progress(), clock,
    ])  # fmt: skip
    with loop:
        for _ in range(EPOCHS):
            if loop.stopped:  # asked first: a run that had stopped may be started again
                break
            for images, labels in train:
                loss = loss_fn(model, (images.to(device), labels.to(device)))["loss"]
                loss.backward()
                with loop.updating(loss=loss.detach(), samples=len(images)):
                    optimizer.step()
                optimizer.zero_grad()
            loop.validate(loss_fn, val)
    closing_table(loop, val, clock, folder)


if __name__ == "__main__":
    main()
