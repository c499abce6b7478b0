"""Digests of tensors, computed where they lie: integer sums, so the same bits give the same digest in whatever order they run."""

from __future__ import annotations

import random
import sys
import zlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .batch import leaves
from .rng import generators

CHUNK = 2**20  # elements at a time: eight bytes for each are held meanwhile
ODD = -7046029254386353131  # 2**64 / golden ratio, as a signed integer
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}  # halves: an odd factor moves a top bit nowhere
_factors: dict[torch.device, Tensor] = {}


def mixed(x: Tensor) -> Tensor:
    """Return int64 numbers, each of whose bits hangs on every bit of theirs."""
    x = (x ^ (x >> 31)) * ODD
    return x ^ (x >> 29)


def factors(device: torch.device) -> Tensor:
    """Return odd numbers that look random, one for each place in a chunk."""
    if device not in _factors:
        _factors[device] = mixed(mixed(torch.arange(1, CHUNK + 1, dtype=torch.int64, device=device))) | 1
    return _factors[device]


def rows(x: Tensor, count: int) -> Tensor:
    """Return one int64 for each of `count` equal parts of a tensor, from all of its bits."""
    x = x.detach()
    x = torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
    flat = x.contiguous().reshape(count, -1)
    words = flat if flat.dtype == torch.bool else flat.view(WORDS[flat.element_size()])
    found = torch.zeros(count, dtype=torch.int64, device=x.device)
    for part in words.split(max(1, CHUNK // count), dim=1):
        found = mixed(found) + (part.to(torch.int64) * factors(x.device)[: part.shape[1]]).sum(1)
    return found


def whole(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """Return one int64 from all the bits of some tensors, in their order."""
    found = torch.zeros((), dtype=torch.int64, device=device)
    for x in tensors:
        x = x.to_sparse_coo().coalesce() if x.layout not in (torch.strided, torch.sparse_coo) else x
        parts = [x.coalesce().indices(), x.coalesce().values()] if x.is_sparse else [x]
        for part in parts:
            if part.numel():
                found = mixed(found) + rows(part, 1)[0].to(device)
    return found


def of_batch(batch: Any, size: int, start: int, device: torch.device) -> Tensor:
    """Return one int64 from the samples of a batch that stand at `start` and after: sums over cuts are that of the whole.

    What has no sample dimension counts once, with the first cut; of objects that are no numbers or text only the type does.
    """
    found = torch.zeros((), dtype=torch.int64, device=device)
    for path, x in leaves(batch):
        key, x = zlib.crc32(path.encode()), plain(x)
        if isinstance(x, Tensor) and (x.is_sparse or x.is_nested):
            parts = [x.coalesce().indices(), x.coalesce().values()] if x.is_sparse else list(x.unbind())
            found = found + mixed(whole(parts, device) + key) * (2 * start + 1)
        elif isinstance(x, Tensor) and x.numel():
            count = size if x.dim() and x.shape[0] == size else 1
            if count == size or start == 0:
                places = torch.arange(start, start + count, dtype=torch.int64, device=x.device) * 2 + 1
                found = found + (mixed(rows(x, count) + key) * places).sum().to(device)
        elif isinstance(x, list | tuple) and len(x) == size:
            found = found + sum(text(one, key) * (2 * place + 1) for place, one in enumerate(x, start))
        elif not isinstance(x, Tensor) and start == 0:
            for one in x if isinstance(x, list | tuple) else [x]:
                key = text(one, key)
            found = found + key
    return found


def plain(x: Any) -> Any:
    """Return NumPy's arrays and numbers as tensors, lists or numbers."""
    if type(x).__module__ != "numpy" or not hasattr(x, "tolist"):
        return x
    if x.ndim and x.dtype.kind in "biufc" and x.dtype.itemsize <= (16 if x.dtype.kind == "c" else 8):
        return torch.from_numpy(x.astype(x.dtype.newbyteorder("="), order="C"))
    return x.tolist()


def text(x: Any, key: int) -> int:
    """Return a checksum of a number or text, of anything else one of its type."""
    x = plain(x)
    return zlib.crc32(
        (repr(x) if isinstance(x, int | float | complex | str | bytes | None) else type(x).__qualname__).encode(), key
    )


def of_generators(device: torch.device) -> int:
    """Return a digest of the state of every global generator."""
    found = zlib.crc32(repr(random.getstate()).encode())
    if numpy := sys.modules.get("numpy"):
        kind, keys, *rest = numpy.random.get_state()
        found = zlib.crc32(repr((kind, rest)).encode(), zlib.crc32(keys.tobytes(), found))
    for generator in generators(device):
        found = zlib.crc32(generator.get_state().numpy().tobytes(), found)
    return found


def short(x: Tensor) -> Tensor:
    """Return 24 bits of a digest as a float32, which holds each of them exactly, as TensorBoard's files do."""
    return (mixed(mixed(x)) & 0xFFFFFF).float()
