"""The peers of throughput.py, each with the hand-written loop's duties, written as its own documentation has it.

A peer is imported where it runs. Each takes batches that lie on the device as they are, moves others itself, and writes
loss, accuracy and rates to TensorBoard every 50 updates with its own logger, where it has one; checkpoints, progress bars
and checks that the hand-written loop does not make are switched off.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from loops import write
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from workloads import ACCUMULATE, EVERY, Job, forward, rate, two_groups

BF16 = torch.bfloat16


def prepared(job: Job) -> tuple[nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    model = job.build()
    optimizer = job.optimizer(two_groups(model))
    return model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rate)


def lightning(job: Job) -> None:
    import lightning as L
    from lightning.pytorch.callbacks import LearningRateMonitor
    from lightning.pytorch.loggers import TensorBoardLogger

    model, optimizer, schedule = prepared(job)

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Any, index: int) -> Any:
            outputs = forward(self.model, batch)
            self.log_dict({"loss": outputs["loss"].detach(), "accuracy": outputs["accuracy"]})
            return outputs["loss"]

        def configure_optimizers(self) -> Any:
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    class Tick(L.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
            if (index + 1) % ACCUMULATE == 0:
                job.watch.tick()

    trainer = L.Trainer(
        accelerator="gpu" if job.device.type == "cuda" else "cpu", devices=1, accumulate_grad_batches=ACCUMULATE,
        precision="bf16-mixed" if job.workload.autocast == BF16 else "32-true", max_epochs=1, log_every_n_steps=EVERY,
        logger=TensorBoardLogger(job.folder), callbacks=[LearningRateMonitor("step"), Tick()], enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(Module(), job.source())


def accelerate(job: Job) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)  # one process, many runs
    accelerator = Accelerator(mixed_precision="bf16" if job.workload.autocast == BF16 else "no", cpu=job.device.type == "cpu",
                              gradient_accumulation_steps=ACCUMULATE, log_with="tensorboard", project_dir=job.folder)  # fmt: skip
    accelerator.init_trackers("run")
    loader = job.source()
    model, optimizer, schedule = accelerator.prepare(*prepared(job))
    if job.workload.workers:
        loader = accelerator.prepare(loader)
    losses: Any = 0.0
    accuracies: Any = 0.0
    update = 0
    for batch in loader:
        with accelerator.accumulate(model):
            with accelerator.autocast():
                outputs = forward(model, batch)
            accelerator.backward(outputs["loss"])
            losses, accuracies = losses + outputs["loss"].detach(), accuracies + outputs["accuracy"]
            rates = [group["lr"] for group in optimizer.param_groups]
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            update += 1
            if update % EVERY == 0:
                found = {"loss": float(losses) / ACCUMULATE, "accuracy": float(accuracies) / ACCUMULATE}
                accelerator.log({**found, **{f"rate{i}": value for i, value in enumerate(rates)}}, step=update)
            losses = accuracies = 0.0
            job.watch.tick()
    accelerator.end_training()


def transformers(job: Job) -> None:
    from accelerate.state import AcceleratorState
    from transformers import Trainer, TrainerCallback, TrainingArguments

    AcceleratorState._reset_state(True)
    model, optimizer, schedule = prepared(job)

    class Ours(Trainer):
        seen: Any = 0.0

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **more: Any) -> Any:
            with self.compute_loss_context_manager():
                outputs = forward(model, [part.to(job.device, non_blocking=True) for part in inputs])
            self.seen = self.seen + outputs["accuracy"]
            return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

        def get_train_dataloader(self) -> Any:
            return loader

        def log(self, logs: dict[str, float], *more: Any, **named: Any) -> None:
            if "loss" in logs:
                logs["accuracy"], self.seen = float(self.seen) / ACCUMULATE / EVERY, 0.0
            super().log(logs, *more, **named)

    class Tick(TrainerCallback):
        def on_step_end(self, *given: Any, **more: Any) -> None:
            job.watch.tick()

    loader, bf16 = job.source(), job.workload.autocast == BF16
    settings = TrainingArguments(
        job.folder, gradient_accumulation_steps=ACCUMULATE, max_steps=job.watch.total, logging_steps=EVERY, bf16=bf16,
        report_to="tensorboard", save_strategy="no", disable_tqdm=True, max_grad_norm=0.0, logging_nan_inf_filter=False,
        use_cpu=job.device.type == "cpu", per_device_train_batch_size=job.workload.batch,
    )  # fmt: skip
    Ours(model, settings, train_dataset=[0], optimizers=(optimizer, schedule), callbacks=[Tick()]).train()


def ignite(job: Job) -> None:
    from ignite.engine import Engine, Events
    from ignite.handlers.tensorboard_logger import OptimizerParamsHandler, OutputHandler, TensorboardLogger

    model, optimizer, schedule = prepared(job)
    sums: dict[str, Any] = {"loss": 0.0, "accuracy": 0.0}

    def train(engine: Engine, given: Any) -> dict[str, Any]:
        batch = [part.to(job.device, non_blocking=True) for part in given]
        with job.autocast():
            outputs = forward(model, batch)
            loss = outputs["loss"] / ACCUMULATE
        loss.backward()
        first = engine.state.iteration % ACCUMULATE == 1
        for name, value in (("loss", loss.detach()), ("accuracy", outputs["accuracy"] / ACCUMULATE)):
            sums[name] = value if first else sums[name] + value
        if engine.state.iteration % ACCUMULATE == 0:
            optimizer.step()
            optimizer.zero_grad()
        return sums

    trainer = Engine(train)
    update, written = (Events.ITERATION_COMPLETED(every=ACCUMULATE * n) for n in (1, EVERY))
    trainer.add_event_handler(update, lambda engine: schedule.step())
    with TensorboardLogger(log_dir=job.folder) as logger:
        logger.attach(trainer, OutputHandler("train", output_transform=lambda sums: sums), written)
        logger.attach(trainer, OptimizerParamsHandler(optimizer), written)
        trainer.add_event_handler(update, lambda engine: job.watch.tick())
        trainer.run(job.source(), max_epochs=1)


def torchtnt(job: Job) -> None:
    from torchtnt.framework.auto_unit import AutoUnit
    from torchtnt.framework.train import train
    from torchtnt.utils.loggers import TensorBoardLogger

    model, optimizer, schedule = prepared(job)
    logger = TensorBoardLogger(job.folder)

    class Unit(AutoUnit):  # type: ignore[type-arg, misc]
        seen: Any = 0.0

        def compute_loss(self, state: Any, data: Any) -> Any:
            outputs = forward(self.module, data)
            return outputs["loss"], outputs["accuracy"]

        def configure_optimizers_and_lr_scheduler(self, module: Any) -> Any:
            return optimizer, schedule

        def on_train_step_end(self, state: Any, data: Any, step: int, results: Any) -> None:
            self.seen = self.seen + torch.stack((results.loss.detach(), results.outputs))
            if (step + 1) % ACCUMULATE:
                return
            if (update := (step + 1) // ACCUMULATE) % EVERY == 0:
                loss, accuracy = self.seen.tolist()
                logger.log_dict({"loss": loss / ACCUMULATE, "accuracy": accuracy / ACCUMULATE}, update)
                logger.log_dict({f"rate{i}": group["lr"] for i, group in enumerate(optimizer.param_groups)}, update)
            self.seen = 0.0
            job.watch.tick()

    unit = Unit(module=model, device=job.device, precision="bf16" if job.workload.autocast == BF16 else None,
                step_lr_interval="step", gradient_accumulation_steps=ACCUMULATE)  # fmt: skip
    train(unit, job.source(), max_epochs=1)
    logger.close()


def fastai(job: Job) -> None:
    from fastai.callback.core import Callback
    from fastai.callback.fp16 import AMPMode, MixedPrecision
    from fastai.callback.schedule import ParamScheduler
    from fastai.callback.training import GradientAccumulation
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner, Recorder
    from fastai.optimizer import OptimWrapper

    model, optimizer, _ = prepared(job)
    mixed = [MixedPrecision(amp_mode=AMPMode.BF16)] if job.workload.autocast == BF16 else []

    class Duties(Callback):  # type: ignore[misc]
        order = 100
        loss = accuracy = 0.0

        def after_loss(self) -> None:
            preds = self.learn.pred.detach().flatten(0, -2).argmax(-1)
            self.accuracy = self.accuracy + (preds == self.learn.yb[0].flatten()).float().mean()

        def after_batch(self) -> None:
            self.loss = self.loss + self.learn.loss_grad.detach()
            if (self.learn.iter + 1) % ACCUMULATE:
                return
            if (update := (self.learn.iter + 1) // ACCUMULATE) % EVERY == 0:
                write(writer, update, self.loss, self.accuracy, [group["lr"] for group in optimizer.param_groups])
            self.loss = self.accuracy = 0.0
            job.watch.tick()

    def loss(logits: Any, target: Any) -> Any:
        return nn.functional.cross_entropy(logits.flatten(0, -2), target.flatten())

    source, updates = job.source(), job.watch.total
    rises = ParamScheduler({"lr": lambda pct: job.workload.lr * rate(int(pct * updates + 1e-6))})
    learner = Learner(DataLoaders(source, [], device=job.device), model, loss_func=loss, lr=job.workload.lr,
                      opt_func=lambda *given, **more: OptimWrapper(opt=optimizer))  # fmt: skip
    learner.remove_cbs([cb for cb in learner.cbs if isinstance(cb, Recorder)])  # it reads the loss of each batch
    with SummaryWriter(job.folder) as writer, learner.no_bar():
        learner.fit(1, cbs=[GradientAccumulation(ACCUMULATE * job.workload.batch), rises, *mixed, Duties()])


def composer(job: Job) -> None:
    from composer import Callback, Trainer
    from composer.loggers import TensorboardLogger
    from composer.models import ComposerModel

    model, optimizer, schedule = prepared(job)

    class Wrapped(ComposerModel):  # type: ignore[misc]
        accuracy: Any = 0.0

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, batch: Any) -> Any:
            return forward(self.model, batch)

        def loss(self, outputs: Any, batch: Any) -> Any:
            self.accuracy = self.accuracy + outputs["accuracy"]
            return outputs["loss"]

    class Duties(Callback):  # type: ignore[misc]
        def batch_end(self, state: Any, logger: Any) -> None:
            if int(state.timestamp.batch) % EVERY == 0:  # it has written the loss itself
                logger.log_metrics({"accuracy": float(wrapped.accuracy) / ACCUMULATE})
                logger.log_metrics({f"rate{i}": group["lr"] for i, group in enumerate(optimizer.param_groups)})
            wrapped.accuracy = 0.0
            job.watch.tick()

    wrapped, size = Wrapped(), job.workload.batch
    trainer = Trainer(
        model=wrapped, train_dataloader=job.source(ACCUMULATE), optimizers=optimizer, schedulers=schedule,
        step_schedulers_every_batch=True, max_duration=f"{job.watch.total}ba", device_train_microbatch_size=size,
        precision="amp_bf16" if job.workload.autocast == BF16 else "fp32", callbacks=[Duties()], progress_bar=False,
        loggers=[TensorboardLogger(log_dir=job.folder, flush_interval=EVERY)], log_to_console=False,
        device="gpu" if job.device.type == "cuda" else "cpu",
    )  # fmt: skip
    trainer.fit()
    trainer.close()


PEERS: dict[str, Callable[[Job], None]] = {
    "Lightning": lightning, "accelerate": accelerate, "transformers Trainer": transformers, "Ignite": ignite,
    "torchtnt": torchtnt, "fastai": fastai, "Composer": composer,
}  # fmt: skip
PACKAGES = {  # the module, then what is installed
    "Lightning": ("lightning", "lightning"), "accelerate": ("accelerate", "accelerate"),
    "transformers Trainer": ("transformers", "transformers"), "Ignite": ("ignite", "pytorch-ignite"),
    "torchtnt": ("torchtnt", "torchtnt"), "fastai": ("fastai", "fastai"), "Composer": ("composer", "mosaicml"),
}  # fmt: skip
