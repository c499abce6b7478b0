"""What torchrun starts for test_elastic.py: a short run with a checkpoint every few updates, that tells its end by a digest."""

from __future__ import annotations

import datetime
import hashlib
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from hookloop.callbacks import Checkpoint, GradientAccumulation, Seed, Warmup
from hookloop.loop import Callback, Loop, State

PACE = 0.02  # seconds an update takes at least, so that a kill may come between any two


class Pace(Callback):
    def on_step_end(self, state: State) -> None:
        time.sleep(PACE)


def whole(x: Any) -> torch.Tensor:
    return (x.full_tensor() if hasattr(x, "full_tensor") else x).detach().contiguous()


def train(rank: int, world: int, folder: str, how: str, steps: int) -> str:
    """Return a digest of all weights and of the optimizer's state after so many updates."""
    seed = Seed(0)
    model: Any = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, 4))
    if how == "ddp":
        model = DistributedDataParallel(model)
    else:
        from torch.distributed.fsdp import fully_shard  # slow to import

        model = fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    draw = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(203, 8, generator=draw), torch.randint(0, 4, (203,), generator=draw))
    loader = DataLoader(data, 5, sampler=DistributedSampler(data, world, rank))
    callbacks = [seed, Warmup(10), GradientAccumulation(2), Pace(), Checkpoint(folder, every=5)]
    Loop(model, optimizer, callbacks, resume=folder).fit(
        lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1]), loader, steps=steps
    )
    digest = hashlib.sha256()
    for p in model.parameters():
        for x in (p, *(value for _, value in sorted(optimizer.state[p].items()))):
            digest.update(whole(x).numpy().tobytes())
    return digest.hexdigest()


def main() -> None:
    folder, how, steps = sys.argv[1:]
    torch.set_num_threads(1)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    (Path(folder) / f"life-{os.environ['TORCHELASTIC_RESTART_COUNT']}-{rank}-{os.getpid()}").touch()
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=20))
    found = train(rank, world, f"{folder}/run", how, int(steps))
    if rank == 0:
        (Path(folder) / "end.txt").write_text(found)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
