"""What a hook is shown of one micro-batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(slots=True)
class MicroEnd:
    """One micro-batch that went through the model, as `on_micro_end` sees it."""

    batch: Any
    outputs: dict[str, Any]  # detached; always holds "loss"
    weight: float | Tensor
    index: list[Any] | None  # positions in the data set, None where unknown
    training: bool
    number: int  # 0 is the first micro-batch of this step's try, or of this evaluation
    size: int
    share: float | Tensor | None = None  # its weight over the step's; None where it is a rank's whole step, or in evaluation
    split: str = "train"  # in evaluation "val", or "val_<name>" of a mapping's loader
