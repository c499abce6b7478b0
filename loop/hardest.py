"""The samples with the largest losses, chosen on the device that holds them; and their pictures in one."""

from __future__ import annotations

import csv
import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .batch import leaves
from .micro_end import MicroEnd

Held = dict[str, Tensor]  # "losses", "positions" (-1: none yet) and, where there are such, "pictures"


class Example(NamedTuple):
    """A sample's position in the data set, its loss, in how many windows it was among the k, and when the last one ended."""

    position: int
    loss: float
    times: int
    step: int


def hardest(losses: Tensor, positions: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return losses, positions and places of the k largest losses: NaN first, ties by position, a sample met twice once.

    Negative positions count as no sample; where others are fewer than k, the rest is -1. Waits for no device.
    """
    by_loss = losses.argsort(descending=True, stable=True)
    places = by_loss[positions[by_loss].argsort(stable=True)]  # of equal positions, now neighbours, the larger loss leads
    where = positions[places]
    out = torch.cat([where[:1] < 0, (where[1:] == where[:-1]) | (where[1:] < 0)])
    ranked = losses[places].masked_fill(out, -math.inf)
    top = ranked.argsort(descending=True, stable=True)[:k]
    return ranked[top], where.masked_fill(out, -1)[top], places[top]


def merged(held: Held | None, new: Held, k: int) -> Held:
    """Return the k hardest of what is held and what is new; pictures are kept as long as all have one shape."""
    if held is None:
        held = {name: x.new_zeros((k, *x.shape[1:])) for name, x in new.items()}
        held["positions"].fill_(-1)
    held = {name: x.to(new["losses"].device) for name, x in held.items()}  # restored ones lie on the host
    both = {name: torch.cat([held[name], new[name]]) for name in ("losses", "positions")}
    losses, positions, places = hardest(both["losses"], both["positions"], k)
    found = {"losses": losses, "positions": positions}
    if "pictures" in held and "pictures" in new and held["pictures"].shape[1:] == new["pictures"].shape[1:]:
        old, fresh = held["pictures"][places.clamp(max=k - 1)], new["pictures"][(places - k).clamp(min=0)]
        found["pictures"] = torch.where((places < k).view(-1, 1, 1, 1), old, fresh)
    return found


def samples_of(micro: MicroEnd, pictures: bool) -> Held:
    """Return a micro-batch's losses, positions and pictures; raises KeyError or ValueError for what is missing."""
    if "losses" not in micro.outputs:
        raise KeyError(f"HardExamples needs loss_fn to return each sample's loss, of shape (n,), as 'losses' beside 'loss'; it "
                       f"returned {', '.join(micro.outputs)}")  # fmt: skip
    if (shape := getattr(losses := micro.outputs["losses"], "shape", None)) != (micro.size,):
        what = type(losses).__name__ if shape is None else f"shape {tuple(shape)}"
        raise ValueError(f"'losses' must hold one loss for each of the {micro.size} samples, shape ({micro.size},), not {what}; "
                         "with reduction='none', and a mean over all but the first dimension")  # fmt: skip
    try:
        positions = torch.tensor(micro.index, dtype=torch.int64, pin_memory=losses.device.type == "cuda")
    except (TypeError, ValueError, RuntimeError):
        remedy = (
            "shuffle=False, in order" if not micro.training else "a data set that has a length and is read by whole numbers"
        )
        raise ValueError(f"HardExamples needs the samples' positions in the data set ({micro.split}), which are not known here: "
                         f"give a DataLoader with batch_size= and {remedy}; its collate_fn must leave out and add no sample"
                         ) from None  # fmt: skip
    found = {"losses": losses.to(torch.promote_types(losses.dtype, torch.float32)),
             "positions": positions.to(losses.device, non_blocking=True)}  # fmt: skip
    seen = pictures_of(micro.batch, micro.size) if pictures else None
    return found if seen is None else {**found, "pictures": seen}


def pictures_of(batch: Any, size: int) -> Tensor | None:
    """Return the first tensor of a batch that holds `size` grey or colour pictures (n, 1 or 3, H, W); None without one."""
    found = [x for _, x in leaves(batch) if isinstance(x, Tensor) and x.layout == torch.strided and not x.is_nested]
    return next((x for x in found if x.dim() == 4 and x.size(0) == size and x.size(1) in (1, 3)), None)


def grid(pictures: Tensor) -> Tensor:
    """Return pictures (n, C, H, W) row by row in one (C, ., .), each stretched from its own darkest to its lightest."""
    pictures = torch.nan_to_num(pictures.float())
    low, high = pictures.amin((1, 2, 3), keepdim=True), pictures.amax((1, 2, 3), keepdim=True)
    pictures = torch.nn.functional.pad((pictures - low) / (high - low).clamp_min(1e-12), (1, 1, 1, 1))
    count, channels, height, width = pictures.shape
    columns = math.ceil(math.sqrt(count))
    pictures = torch.cat([pictures, pictures.new_zeros(-count % columns, channels, height, width)])
    rows = pictures.view(-1, columns, channels, height, width).permute(2, 0, 3, 1, 4)
    return rows.reshape(channels, -1, columns * width)


def as_text(rows: list[Example]) -> str:
    """Return examples as a Markdown table."""
    lines = [" | ".join(Example._fields), " | ".join("---" for _ in Example._fields)]
    return "\n".join(f"| {line} |" for line in [*lines, *(" | ".join(f"{x:.6g}" for x in row) for row in rows)])


def write(path: Path, examples: Mapping[str, list[Example]]) -> None:
    """Write all splits as one CSV, whole or not at all; what fails is a warning."""
    lines = [(split, *row) for split, rows in sorted(examples.items()) for row in rows]
    try:
        with open(beside := path.with_suffix(".part"), "w", newline="") as file:
            csv.writer(file).writerows([("split", *Example._fields), *lines])
        os.replace(beside, path)
    except OSError as error:
        warnings.warn(f"HardExamples can't write {str(path)!r}: {error}", stacklevel=2)
