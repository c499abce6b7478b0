"""Train on handwritten digits with any number of ranks; the same script, the same samples an update, the same callbacks.

    python examples/distributed.py
    torchrun --nproc-per-node 2 examples/distributed.py                      # gloo on the CPU, nccl where there are GPUs
    torchrun --nproc-per-node 2 examples/distributed.py --shard              # weights and optimizer state in shards (FSDP2)
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # else ranks that start again look for those that died (pytorch #135712)
    torchrun --standalone --nproc-per-node 2 --max-restarts 20 examples/distributed.py       # goes on if a rank dies

Stop it whenever you like and start it again with another number of ranks: each sample of the epoch is still used once.
"""

from __future__ import annotations

import argparse
import hashlib
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from hookloop.callbacks import Checkpoint, ClipGradients, Metrics, Preemption, Progress, Schedule, Seed, TensorBoard, Warmup
from hookloop.loop import Loop

SAMPLES = 48  # an update, over all ranks


def ranks() -> tuple[int, int, torch.device]:
    """Join the ranks that torchrun started; alone without it."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if "WORLD_SIZE" not in os.environ:
        return 0, 1, device
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(seconds=60))
    return dist.get_rank(), dist.get_world_size(), device


def data(rank: int, world: int) -> tuple[DataLoader[Any], DataLoader[Any]]:
    if SAMPLES % world:
        raise SystemExit(f"{SAMPLES} samples an update can't be dealt out to {world} ranks evenly; take 1, 2, 3, 4, 6 or 8")
    x, y = load_digits(return_X_y=True)
    images, labels = torch.tensor(x / 16.0, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(y)
    train, val = TensorDataset(images[:1440], labels[:1440]), TensorDataset(images[1440:], labels[1440:])
    ours = DistributedSampler(train, world, rank)  # in one process too, so that a run may go on with two
    return (DataLoader(train, SAMPLES // world, sampler=ours),
            DataLoader(val, 64, sampler=DistributedSampler(val, world, rank, shuffle=False)))  # fmt: skip


def build() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(16 * 4 * 4, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 10),
    )  # fmt: skip


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    images, labels = batch
    logits = model(images)
    return {"loss": nn.functional.cross_entropy(logits, labels), "preds": logits, "target": labels}


def fingerprint(model: nn.Module) -> str:
    """Two models with the same fingerprint have the same bits."""
    digest = hashlib.sha256()
    for p in model.parameters():
        whole: Tensor = p.full_tensor() if hasattr(p, "full_tensor") else p  # type: ignore[operator]
        digest.update(whole.detach().to("cpu").contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shard", action="store_true", help="shard the model (fully_shard) instead of copying it (DDP)")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("runs/distributed"), help="checkpoints and TensorBoard files")
    told = parser.parse_args()
    rank, world, device = ranks()
    seed = Seed(0)  # the same on all ranks: it gives each its own streams, and all one order of the data
    model: nn.Module = build().to(device)
    if world > 1:
        model = fully_shard(model) if told.shard else DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    callbacks = [
        seed, Warmup(20), Schedule("cosine"), ClipGradients(1.0), Preemption(),
        Metrics({"accuracy": MulticlassAccuracy(10, average="micro").to(device)}),
        TensorBoard(told.folder, every=10), Checkpoint(told.folder, every=10), Progress(),
    ]  # fmt: skip
    train, val = data(rank, world)
    state = Loop(model, optimizer, callbacks, resume=told.folder).fit(loss_fn, train, val, epochs=told.epochs)
    print_of = fingerprint(model)  # on every rank, since of a sharded model each holds a part
    if rank == 0:
        rows = {"ranks": world, "updates": state.step, "validation accuracy": f"{state.metrics['val_accuracy']:.2%}",
                "validation loss": f"{state.metrics['val_loss']:.6f}", "fingerprint": print_of}  # fmt: skip
        print("\n".join(f"{name:<20} {value}" for name, value in rows.items()))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
