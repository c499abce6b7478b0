"""MicroBatch: how many samples go through the model at once."""

from __future__ import annotations

from typing import Any

import torch

from ..loop.callback import Callback
from ..loop.state import State

TEXTS = ("CUDA out of memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED",
         "HIP out of memory", "XPU out of memory", "MPS backend out of memory", "DefaultCPUAllocator: can't allocate memory",
         "DefaultCPUAllocator: not enough memory")  # fmt: skip


def out_of_memory(error: BaseException | None) -> bool:
    """Tell whether an error, or what it was raised from, is a device's or the CPU allocator's lack of memory."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError):
            return True
        if isinstance(error, RuntimeError) and any(text in str(error) for text in TEXTS):
            return True
        error = error.__cause__
    return False


class MicroBatch(Callback):
    """Puts at most `size` samples through one forward, in equal cuts, without changing any gradient.

    `"auto"` starts with whole batches and halves when memory runs out: the step is redone from its own data, with
    gradients cleared and torch's generators and the module buffers that a forward changes put back, so that the run
    equals one that used the smaller size from that step on. Validation shrinks a size of its own. BatchNorm's
    statistics are those of each micro-batch. Raises ValueError for a bad size; where memory is too small for one
    sample, the error says so.
    """

    owns = ("micro_batch_size",)

    def __init__(self, size: int | str) -> None:
        if size != "auto" and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise ValueError(f"size must be a whole number of samples, at least 1, or 'auto', not {size!r}")
        self.train: int | None = None if size == "auto" else size  # type: ignore[assignment]
        self.evaluation = self.train
        if size == "auto":  # an instance's hook: a fixed size needs no snapshot at each step's start
            self.on_exception = self._halve  # type: ignore[method-assign]

    def on_setup(self, state: State) -> None:
        """Set the sizes."""
        self._write(state)

    def on_fit_start(self, state: State) -> None:
        """Set the restored ones."""
        self._write(state)

    def _write(self, state: State) -> None:
        state.micro_batch_size, state.eval_micro_batch_size = self.train, self.evaluation

    def _halve(self, state: State) -> bool:
        micro = state.micro
        if micro is None or not out_of_memory(state.exception):
            return False
        if micro.size <= 1 and state.exception is not None:
            state.exception.add_note("memory is too small for one sample: use a smaller model or input, activation "
                                     "checkpointing or a lower precision")  # fmt: skip
            return False
        if micro.training:
            self.train = (micro.size + 1) // 2
        else:
            self.evaluation = (micro.size + 1) // 2
        self._write(state)
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return the sizes found."""
        return {"train": self.train, "evaluation": self.evaluation}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take sizes found back; given ones are the argument's."""
        if "on_exception" in self.__dict__:
            self.train, self.evaluation = state["train"], state["evaluation"]
