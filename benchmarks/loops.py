"""The loops that a user writes: by hand, compiled, and the same step replayed as CUDA graphs; nothing here is hookloop's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from workloads import ACCUMULATE, EVERY, NORM, Job, forward, rate, two_groups


def write(writer: SummaryWriter, update: int, loss: Any, accuracy: Any, rates: list[Any]) -> None:
    writer.add_scalar("train/loss", float(loss), update)
    writer.add_scalar("train/accuracy", float(accuracy) / ACCUMULATE, update)
    for i, value in enumerate(rates):
        writer.add_scalar(f"rate/group{i}", float(value), update)


def hand_written(job: Job, clip: bool = False, mode: str | None = None) -> None:
    """Run the loop that all others are compared with; `mode` is that of torch.compile."""
    model = job.build()
    net = model if mode is None else torch.compile(model, mode=mode)
    optimizer = job.optimizer(two_groups(model))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    keep = mode == "reduce-overhead"  # its graphs own what they return: gradients need tensors of their own
    if keep:
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
    losses: Any = 0.0
    accuracies: Any = 0.0
    with SummaryWriter(job.folder) as writer:
        for i, given in enumerate(job.source()):
            batch = [part.to(job.device, non_blocking=True) for part in given]
            with job.autocast():
                outputs = forward(net, batch)
            loss = outputs["loss"] / ACCUMULATE
            loss.backward()
            losses = losses + loss.detach()
            accuracies = accuracies + outputs["accuracy"]
            if (i + 1) % ACCUMULATE:
                continue
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), NORM)
            optimizer.step()
            rates = [group["lr"] for group in optimizer.param_groups]
            schedule.step()
            optimizer.zero_grad(set_to_none=not keep)
            if (update := (i + 1) // ACCUMULATE) % EVERY == 0:
                write(writer, update, losses, accuracies, rates)
            losses = accuracies = 0.0
            job.watch.tick()


def compiled(job: Job, mode: str) -> None:
    """Run the hand-written loop with a compiled model, and leave nothing of it behind."""
    torch.compiler.reset()
    try:
        hand_written(job, mode=mode)
    finally:
        torch.compiler.reset()


class Replayed:
    """Forward with backward of a micro-batch, and the update, as two CUDA graphs.

    Rates, sums and the micro-batch are tensors that the graphs read. Recording trains one update on its first batch.
    """

    def __init__(self, job: Job, first: Any, clip: bool) -> None:
        self.job, self.model, self.clip = job, job.build(), clip
        groups = [{**group, "lr": torch.tensor(job.workload.lr, device=job.device)} for group in two_groups(self.model)]
        self.optimizer = job.optimizer(groups, capturable=True)
        self.rates: list[Any] = [group["lr"] for group in self.optimizer.param_groups]
        self.batch = [part.to(job.device, copy=True) for part in first]
        self.loss, self.accuracy, self.shown_loss, self.shown_accuracy = torch.zeros(4, device=job.device).unbind()
        self.parameters = list(self.model.parameters())
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.micro()
            self.grads = [p.grad for p in self.parameters if p.grad is not None]
            self.update()
        torch.cuda.current_stream().wait_stream(side)
        self.micro_graph, self.update_graph = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.micro_graph, capture_error_mode="thread_local"):
            self.micro()
        with torch.cuda.graph(self.update_graph, pool=self.micro_graph.pool(), capture_error_mode="thread_local"):
            self.update()

    def micro(self) -> None:
        with self.job.autocast():
            outputs = forward(self.model, self.batch)
        loss = outputs["loss"] / ACCUMULATE
        loss.backward()
        self.loss.add_(loss.detach())
        self.accuracy.add_(outputs["accuracy"])

    def update(self) -> None:
        if self.clip:
            nn.utils.clip_grad_norm_(self.parameters, NORM)
        self.optimizer.step()
        torch._foreach_zero_(self.grads)
        self.shown_loss.copy_(self.loss)
        self.shown_accuracy.copy_(self.accuracy)
        self.loss.zero_()
        self.accuracy.zero_()

    def take(self, batch: tuple[Tensor, ...]) -> None:
        for mine, part in zip(self.batch, batch, strict=True):
            mine.copy_(part, non_blocking=True)
        self.micro_graph.replay()


def replayed(job: Job, clip: bool = False) -> None:
    """Run the hand-written loop's step, with the same duties, as graphs."""
    step: Replayed | None = None
    with SummaryWriter(job.folder) as writer:
        for i, batch in enumerate(job.source()):
            step = step or Replayed(job, batch, clip)
            step.take(batch)
            if (i + 1) % ACCUMULATE:
                continue
            update = (i + 1) // ACCUMULATE
            if rate(update - 2) < 1.0:  # the one before was still rising
                for lr in step.rates:
                    lr.fill_(job.workload.lr * rate(update - 1))
            step.update_graph.replay()
            if update % EVERY == 0:
                write(writer, update, step.shown_loss, step.shown_accuracy, step.rates)
            job.watch.tick()
