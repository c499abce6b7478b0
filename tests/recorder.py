"""A stand-in for CUDA graphs on the CPU: the operations that a function ran, run again without its Python code.

As on a device, what is replayed reads and writes the very memory that was there while recording, so a number that Python
computed, a branch that it took and a tensor that it made anew are held fast.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from helpers import loss_fn
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hookloop.callbacks import (
    Checkpoint,
    ClipGradients,
    DynamicBatchSize,
    EarlyStopping,
    Fingerprint,
    GradientAccumulation,
    MicroBatch,
    NoiseScale,
    NonFinite,
    Progress,
    Schedule,
    TensorBoard,
    Warmup,
    WeightDecay,
)
from hookloop.loop import Callback, graph
from hookloop.loop.step import Eager

READS = ("_local_scalar_dense", "aten.nonzero", "aten.equal", "aten.is_nonzero", "masked_select")


class Operations(TorchDispatchMode):
    """Notes what runs, and keeps what was there before wherever that writes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, Any, Any, list[Any]]] = []
        self.made: dict[int, Any] = {}
        self.kept: dict[int, tuple[Any, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in str(func) for name in READS):
            raise RuntimeError("operation not permitted when stream is capturing")
        given = {**dict(zip((a.name for a in func._schema.arguments), args, strict=False)), **(kwargs or {})}
        for argument in func._schema.arguments:
            value = given.get(argument.name)
            writes = argument.alias_info is not None and argument.alias_info.is_write
            if writes or ("batch_norm" in str(func) and argument.name.startswith("running")):  # its schema does not tell
                for x in tree_leaves(value):
                    storage = x.untyped_storage()
                    if storage.data_ptr() not in self.made:
                        self.kept.setdefault(storage.data_ptr(), (storage, storage.clone()))
        found = func(*args, **(kwargs or {}))
        outs = tree_leaves(found)
        before = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in outs:
            if isinstance(x, Tensor) and (where := x.untyped_storage().data_ptr()) not in before | self.kept.keys():
                self.made[where] = x.untyped_storage()
        self.seen.append((func, args, kwargs or {}, outs))
        return found


class Recording:
    """Like `hookloop.loop.graph.Recording`: nothing that was recorded has happened until `replay`."""

    count = 0

    def __init__(self, run: Callable[[], Any], pool: Any) -> None:
        Recording.count += 1
        generator = torch.get_rng_state()
        operations = Operations()
        try:
            with operations:
                self.found = run()
        finally:
            for storage, copy in operations.kept.values():
                storage.copy_(copy)
            torch.set_rng_state(generator)
        self.operations, self.made = operations.seen, operations.made

    @torch.no_grad()
    def replay(self) -> None:
        """Run it."""
        for func, args, kwargs, outs in self.operations:
            for old, new in zip(outs, tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.detach().copy_(new)


class Tensors(Eager):
    """As written, with the settings that CUDAGraph gives an optimizer."""

    def begin(self, loop: Any) -> None:
        if not isinstance(loop.state.optimizer.param_groups[-1]["lr"], torch.Tensor):
            graph.on_device(loop.state.optimizer, loop.state.device)
        super().begin(loop)


def aligned(model: Any, batch: Any) -> Any:
    """In memory of its own: a cut from the middle of a batch is not aligned, and there matrix products round differently."""
    return loss_fn(model, [x.clone() for x in batch])


class AsWritten(Callback):
    owns = ("runner",)

    def on_setup(self, state: Any) -> None:
        state.runner = Tensors()


SETS: dict[str, Any] = {
    "none": lambda folder: [],
    "warmup and schedule": lambda folder: [
        Warmup(5), Schedule(lambda o, total: torch.optim.lr_scheduler.CosineAnnealingLR(o, total))],
    "accumulation": lambda folder: [GradientAccumulation(3)],
    "growing batch": lambda folder: [DynamicBatchSize(6, 24, scale_lr="sqrt")],
    "micro-batches": lambda folder: [MicroBatch(3)],
    "decay": lambda folder: [WeightDecay({"^0": 0.2}, default=0.1)],
    "clipping": lambda folder: [ClipGradients(0.3)],
    "early stopping": lambda folder: [EarlyStopping("val_loss", patience=1, min_delta=10.0, restore_best=True)],
    "watching": lambda folder: [TensorBoard(folder / "t", every=1, grad_norm=True), Progress(every=0.001), Fingerprint(1),
                                Checkpoint(folder / "c", every=2), NoiseScale(2), GradientAccumulation(2)],
    "not finite": lambda folder: [NonFinite("rollback", every=2)],
    "all": lambda folder: [s for name in ("warmup and schedule", "accumulation", "growing batch", "micro-batches", "decay",
                                          "clipping", "early stopping") for s in SETS[name](folder)],
}  # fmt: skip
