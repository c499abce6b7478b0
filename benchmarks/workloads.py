"""What throughput.py trains: an MLP, a small GPT and a ResNet-18, in plain torch, and the MLP from a DataLoader with workers.

`forward(model, batch)` is the same function for every loop: mean loss, accuracy (of tokens for the GPT), and what it is
computed from. Batches of the first three lie on the device; those of the last are read by worker processes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from watch import Watch

ACCUMULATE, WARMUP, EVERY = 4, 100, 50  # micro-batches an update, updates of rising rates, updates between writes
DECAY, NORM, DISTINCT = 0.01, 1.0, 8  # of weights, what is clipped to, batches that lie on the device


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(*parts.unbind(0), is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    def __init__(self, layers: int, width: int, heads: int, length: int, words: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.register_buffer("index", torch.arange(length), persistent=False)
        for p in self.parameters():
            if p.ndim > 1:
                nn.init.normal_(p, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens) + self.places(self.index)
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.words.weight)  # tied


class Residual(nn.Module):
    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after)
        self.conv2, self.norm2 = nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after)
        changes = before != after or stride != 1
        short = [nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after)] if changes else []
        self.short = nn.Sequential(*short)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.short(x))


def resnet(width: int, classes: int) -> nn.Module:
    """Return a ResNet-18 in its form for 32 x 32 images: a stem of 3 x 3, no pooling behind it."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    before = width
    for stage in range(4):
        for stride in (1 if stage == 0 else 2, 1):
            layers.append(Residual(before, width * 2**stage, stride))
            before = width * 2**stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes))


def mlp(width: int, classes: int) -> nn.Module:
    hidden = [layer for _ in range(4) for layer in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(width, classes))


def forward(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    logits = model(batch[0]).flatten(0, -2)
    target = batch[1].flatten()
    preds = logits.detach().argmax(-1)
    loss = F.cross_entropy(logits, target)
    return {"loss": loss, "accuracy": (preds == target).float().mean(), "preds": preds, "target": target}


def rate(update: int) -> float:
    """Return the factor of an update's rate, counted from 0."""
    return min(1.0, (update + 1) / WARMUP)


@dataclass(frozen=True)
class Workload:
    name: str
    title: str
    model: Callable[[], nn.Module]
    inputs: tuple[int, ...]  # of one sample; two numbers (length, words) where samples are tokens
    batch: int
    classes: int
    warm: int  # updates before a timed run, and in it
    updates: int
    autocast: torch.dtype | None = None
    workers: int = 0
    lr: float = 1e-3
    tokens: bool = False

    def samples(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        if self.tokens:
            seen = torch.randint(0, self.classes, (count, self.inputs[0] + 1), generator=generator)
            return seen[:, :-1].contiguous(), seen[:, 1:].contiguous()
        inputs = torch.randn(count, *self.inputs, generator=generator)
        return inputs, torch.randint(0, self.classes, (count,), generator=generator)


class Resident:
    """Batches that lie on the device, given again and again."""

    def __init__(self, batches: list[Any], count: int) -> None:
        self.batches, self.count = batches, count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Any]:
        return (self.batches[i % len(self.batches)] for i in range(self.count))


@dataclass(frozen=True)
class Job:
    """One run of one loop: what it trains on which device, the watch that it ticks after each update, a folder to write to."""

    workload: Workload
    device: torch.device
    watch: Watch
    folder: str

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        return self.workload.model().to(self.device)

    def optimizer(self, groups: Any, **more: Any) -> torch.optim.AdamW:
        fused = {"fused": True} if self.device.type == "cuda" else {}
        return torch.optim.AdamW(groups, lr=self.workload.lr, weight_decay=DECAY, **fused, **more)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        dtype = self.workload.autocast
        return contextlib.nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)

    def source(self, times: int = 1) -> Iterable[Any]:
        """Return the run's loader batches, `times` as large and as many fewer."""
        load, generator = self.workload, torch.Generator().manual_seed(1)
        size, count = load.batch * times, self.watch.total * ACCUMULATE // times
        if load.workers:
            held = TensorDataset(*load.samples(size * count, generator))
            return DataLoader(held, size, shuffle=True, num_workers=load.workers, pin_memory=self.device.type == "cuda",
                              generator=generator)  # fmt: skip
        drawn = [load.samples(load.batch, generator) for _ in range(DISTINCT)]  # joined: the same samples in either form
        joined = [[torch.cat(parts) for parts in zip(*drawn[i : i + times], strict=True)] for i in range(0, DISTINCT, times)]
        return Resident([tuple(part.to(self.device) for part in batch) for batch in joined], count)


def two_groups(model: nn.Module) -> list[dict[str, Any]]:
    flat = [p for p in model.parameters() if p.ndim <= 1]
    rest = [p for p in model.parameters() if p.ndim > 1]
    return [{"params": rest, "weight_decay": DECAY}, {"params": flat, "weight_decay": 0.0}]


def workloads(quick: bool) -> dict[str, Workload]:
    workers, bf16 = min(4, os.cpu_count() or 1), torch.bfloat16
    full = [
        Workload("mlp", "MLP 4x256, batch 128, fp32", lambda: mlp(256, 10), (256,), 128, 10, 30, 200),
        Workload("gpt", "GPT 12x768, 16x512 tokens, bf16", lambda: GPT(12, 768, 12, 512, 50257), (512,), 16, 50257, 20, 50,
                 bf16, lr=3e-4, tokens=True),
        Workload("resnet", "ResNet-18, 256x3x32x32, bf16", lambda: resnet(64, 10), (3, 32, 32), 256, 10, 20, 50, bf16),
        Workload("loader", f"MLP 4x256 from a DataLoader with {workers} workers", lambda: mlp(256, 10), (256,), 128, 10, 30,
                 200, workers=workers),
    ]  # fmt: skip
    if not quick:
        return {load.name: load for load in full}
    small: dict[str, dict[str, Any]] = {
        "mlp": {"model": lambda: mlp(16, 4), "inputs": (16,), "batch": 8, "classes": 4},
        "gpt": {"model": lambda: GPT(2, 16, 2, 8, 32), "inputs": (8,), "batch": 4, "classes": 32},
        "resnet": {"model": lambda: resnet(4, 4), "inputs": (3, 8, 8), "batch": 4, "classes": 4},
        "loader": {"model": lambda: mlp(16, 4), "inputs": (16,), "batch": 8, "classes": 4, "workers": 1},
    }
    return {n: replace(load, title=f"{n}, shrunk", warm=2, updates=3, **small[n]) for load in full for n in [load.name]}
