"""Digests of tensors and of whatever holds them, computed where they lie: integer sums, the same in whatever order they run."""

from __future__ import annotations

import dataclasses
import datetime
import enum
import functools
import hashlib
import numbers
import pathlib
import random
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .batch import length
from .rng import generators

CHUNK = 2**20  # elements at a time: eight bytes for each are held meanwhile
ODD = -7046029254386353131  # 2**64 / golden ratio, as a signed integer
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}  # halves: an odd factor moves a top bit nowhere
VALUES = (numbers.Number, str, bytes, bytearray, range, slice, datetime.date, datetime.time, datetime.timedelta,
          pathlib.PurePath, uuid.UUID, enum.Enum, type(None), type(...))  # fmt: skip
Whole = TypeVar("Whole", Tensor, int)


def signed(x: int) -> int:
    """Return an integer as int64 holds it."""
    return (x + 2**63) % 2**64 - 2**63


def mixed(x: Whole) -> Whole:
    """Return int64 numbers, each of whose bits hangs on every bit of theirs."""
    x = (x ^ (x >> 31)) * ODD
    x = x if isinstance(x, Tensor) else signed(x)
    return x ^ (x >> 29)


def factor(place: Whole) -> Whole:
    """Return an odd number that looks random for each place."""
    return mixed(mixed(place + 1)) | 1


def told(*things: Any) -> int:
    """Return 64 bits, none of which is linear in theirs, from numbers and text."""
    return int.from_bytes(hashlib.blake2b(repr(things).encode(), digest_size=8).digest(), "little", signed=True)


@functools.cache
def factors(device: torch.device) -> Tensor:
    """Return the factors of the places in a chunk."""
    return factor(torch.arange(CHUNK, dtype=torch.int64, device=device))


def rows(x: Tensor) -> Tensor:
    """Return one int64 for each row (entry of the first dimension) of a strided tensor, from its bits and no other row's."""
    x = torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
    if not x.numel():
        return torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
    found, wide = [], x.numel() // x.shape[0]
    for block in x.split(max(1, CHUNK // (wide * -(-x.element_size() // 4)))):
        flat = block.resolve_neg().contiguous().as_strided((block.shape[0], wide), (wide, 1))  # one number may have any stride
        words = flat if flat.dtype == torch.bool else flat.view(WORDS[flat.element_size()])
        sums: Tensor | None = None
        for part in words.split(CHUNK, dim=1):
            more = (part.to(torch.int64) * factors(x.device)[: part.shape[1]]).sum(1)
            sums = more if sums is None else mixed(sums) + more
        found += [] if sums is None else [sums]
    return found[0] if len(found) == 1 else torch.cat(found)


def sparse_rows(x: Tensor) -> Tensor:
    """As `rows`, of a sparse tensor: sums over its entries, whose order and number are free, so that nothing is sorted."""
    x = x if x.layout == torch.sparse_coo else x.to_sparse_coo()
    at, values = x._indices(), x._values()
    entries = mixed(mixed(rows(values) + mixed(mixed(rows(at[1:].t()) + 1))))
    return torch.zeros(x.shape[0], dtype=torch.int64, device=x.device).index_add_(0, at[0], entries)


def jagged_rows(x: Any) -> Tensor:
    """As `rows`, of a jagged tensor, whose lengths a device need not tell the host."""
    offsets, lengths = x.offsets(), x.lengths()
    lengths = offsets.diff() if lengths is None else lengths
    values = x.values().movedim(x._ragged_idx - 1, 0)
    place = torch.arange(values.shape[0], device=values.device)
    row = (torch.searchsorted(offsets, place, right=True) - 1).clamp(max=max(0, x.size(0) - 1))
    within = place - offsets[row]
    entries = mixed(mixed(rows(values) + 1)) * factor(within) * (within < lengths[row])
    found: Tensor = factor(lengths.to(torch.int64)).index_add(0, row, entries)
    return found


def each(x: Tensor) -> Tensor:
    """As `rows`, of a tensor in any layout."""
    if x.layout == torch.jagged:
        return jagged_rows(x)
    if x.is_nested:
        parts = [told(*kind(part)) + one(part) for part in x.unbind()]
        return torch.stack(parts) if parts else torch.zeros(0, dtype=torch.int64, device=x.device)
    return rows(x) if x.layout == torch.strided else sparse_rows(x)


def one(x: Tensor) -> Tensor:
    """Return one int64 from all the bits of a tensor."""
    if x.layout != torch.strided and not x.dim():
        x = x.to_dense()
    if x.layout == torch.strided and not x.is_nested:
        return rows(x[None])[0]
    found = each(x)
    return (mixed(mixed(found)) * factor(torch.arange(found.shape[0], device=x.device))).sum()


def kind(x: Tensor) -> tuple[Any, ...]:
    """Return what a tensor's bits do not say: type, layout, shape (-1 where it varies)."""
    if x.is_nested and x.layout == torch.strided:
        return str(x.dtype), "nested", (x.size(0),)
    return str(x.dtype), str(x.layout), tuple([n if isinstance(n, int) else -1 for n in x.shape])


class Digest:
    """A sum of the hashes of all that is added, each taken and summed where its tensor lies, so that no device is waited for.

    With `size` samples from place `start` on, each sample is hashed by itself and counts times its place's factor; what
    belongs to no sample counts times the sum of these factors. So the sums over cuts are that of the whole, in any cut.
    """

    def __init__(self, size: int | None = None, start: int = 0) -> None:
        self.size, self.start, self.known = size, start, 0
        self.sums: dict[torch.device, Tensor] = {}
        self.waiting: dict[torch.device, list[Tensor]] = {}  # to be mixed together: many tensors are small
        places = () if size is None else factor(torch.arange(start, start + size, device="cpu")).tolist()
        self.weight = 1 if size is None else signed(sum(places))

    @torch.no_grad()
    def add(self, x: Any, key: int = 0) -> Digest:
        """Add a tensor, a value, or a container of them, nested as it may be; of other objects only the type counts."""
        self._add(x, key, self.weight, self.size, root=True)
        for device, parts in self.waiting.items():
            self._sum(mixed(mixed(torch.stack(parts))).sum(), device)
        self.waiting.clear()
        return self

    def total(self, device: torch.device) -> Tensor:
        """Return the sum, an int64 on a device."""
        found, known = self.sums.get(device, torch.zeros((), dtype=torch.int64, device=device)), self.known
        for place, part in self.sums.items():
            if place.type == "cpu" != device.type:
                known += int(part)  # a number on the host: a copy of it to the device would wait
            elif place != device:
                found = found + part.to(device, non_blocking=place.type == device.type)
        return found + signed(known)

    def _add(self, x: Any, key: int, weight: int, size: int | None, root: bool = False) -> None:
        x = plain(x)
        if isinstance(x, Tensor):
            self._add_tensor(x, key, weight, size)
        elif (kids := children(x)) is None:
            self.known += told(key, shown(x)) * weight
        elif not kids:
            self.known += told(key, "empty", type(x).__qualname__) * weight
        elif size is not None and samples(x, size, root):
            for place, kid in enumerate(x, self.start):
                self._add(kid, key, factor(place), None)
        else:
            for name, kid in kids:
                self._add(kid, told(key, shown(name)), weight, size)

    def _add_tensor(self, x: Tensor, key: int, weight: int, size: int | None) -> None:
        dtype, layout, shape = kind(x)
        split = size is not None and bool(shape) and shape[0] == size
        about = told(key, dtype, layout, split, shape[1:] if split else shape)
        if x.is_meta:
            self.known += about * weight
            return
        if split:
            places = torch.arange(self.start, self.start + x.size(0), device=x.device)
            found = (mixed(mixed(each(x) + about)) * factor(places)).sum()
        elif weight == 1:
            self.waiting.setdefault(x.device, []).append(one(x) + about)
            return
        else:
            found = mixed(mixed(one(x) + about)) * weight
        self._sum(found, x.device)

    def _sum(self, found: Tensor, device: torch.device) -> None:
        self.sums[device] = self.sums[device] + found if device in self.sums else found


def children(x: Any) -> list[tuple[Any, Any]] | None:
    """Return what a container holds by key or position; None for what is none."""
    if isinstance(x, Mapping):
        return list(x.items())
    if isinstance(x, Sequence) and not isinstance(x, str | bytes | bytearray | range | memoryview):
        return list(enumerate(x))
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        return [(f.name, getattr(x, f.name)) for f in dataclasses.fields(x)]
    return None


def samples(x: Any, size: int, root: bool) -> bool:
    """Tell whether a container holds one entry a sample, and not columns, each of as many entries as the batch has samples."""
    if not isinstance(x, Sequence) or hasattr(x, "_fields") or len(x) != size:
        return False
    if root:  # a batch of two in two columns is told by any of them
        return all(length(kid) != size for kid in x)
    return not (all(length(kid) == size for kid in x) and any(hasattr(kid, "shape") for kid in x))


def plain(x: Any) -> Any:
    """Return what holds numbers in a form of its own as strided tensors, lists, numbers, or mappings of them."""
    if isinstance(x, Tensor):
        return plain_tensor(x)
    numpy = sys.modules.get("numpy")
    if numpy is None or not hasattr(type(x), "__array_interface__"):  # of itself a dict with attributes may have any, or raise
        return x
    if isinstance(x, numpy.ma.MaskedArray):
        return {"values": x.filled(), "mask": numpy.ma.getmaskarray(x)}
    x = numpy.asarray(x)
    if x.dtype.names:
        return {name: x[name] for name in x.dtype.names}
    wide = x.dtype.kind != "V" and x.dtype.itemsize > (16 if x.dtype.kind == "c" else 8)  # longer than torch has
    if not x.ndim or wide or x.dtype.kind not in "biufcmMV":
        found = x.tolist()
        return repr(found) if isinstance(found, numpy.generic) else found
    x = x.astype(x.dtype.newbyteorder("="), order="C")
    if x.dtype.kind in "mMV":
        return {"type": str(x.dtype), "values": x.view("u1" if x.dtype.kind == "V" else "i8")}
    return torch.from_numpy(x)


def plain_tensor(x: Any) -> Any:
    """Return the same for a tensor; one on the meta device stays what it is, a nested or sparse one too."""
    if is_lazy(x):
        return f"without a shape yet, {x.dtype}"
    if x.is_meta:
        return x
    if x.is_quantized:
        names = ["q_scale", "q_zero_point"]
        if "per_channel" in str(x.qscheme()):
            names = ["q_per_channel_scales", "q_per_channel_zero_points", "q_per_channel_axis"]
        return {"values": x.int_repr(), "type": str(x.dtype), **{name: getattr(x, name)() for name in names}}
    if torch.masked.is_masked_tensor(x):
        return {"values": x.get_data(), "mask": x.get_mask()}
    if x.is_mkldnn:
        return x.to_dense()
    if x.layout == torch.jagged:
        return x.detach()
    if is_traceable_wrapper_subclass(x):
        return {name: getattr(x, name) for name in x.__tensor_flatten__()[0]}
    found = x.detach()
    return found if type(found) is Tensor else found.as_subclass(Tensor)


def shown(x: Any) -> str:
    """Return a value as text, which no address stands in; of what is no value its type."""
    if isinstance(x, Set):
        return str(sorted(map(shown, x)))
    if isinstance(x, int) and not isinstance(x, bool | enum.Enum):
        return f"{x:x}"  # in tens no more than 4,300 digits are allowed
    return repr(x) if isinstance(x, VALUES) else type(x).__qualname__


def whole(x: Any, device: torch.device) -> Tensor:
    """Return one int64 from all that a tensor, value or container holds."""
    return Digest().add(x).total(device)


def of_batch(batch: Any, size: int, start: int, device: torch.device) -> Tensor:
    """Return one int64 from a batch whose samples stand at `start` and after: sums over cuts are that of the whole."""
    return Digest(size, start).add(batch).total(device)


def of_generators(device: torch.device, host: bool = True) -> int:
    """Return a digest of the state of torch's global generators, and with `host` of Python's and NumPy's."""
    found = [generator.get_state().numpy().tobytes() for generator in generators(device)]
    return told(found, *(host_states() if host else ()))


def host_states() -> Iterator[Any]:
    """Yield the states of Python's generator, and of NumPy's if it was imported."""
    yield random.getstate()
    if numpy := sys.modules.get("numpy"):
        name, keys, *rest = numpy.random.get_state()
        yield name, keys.tobytes(), rest


def short(x: Tensor) -> Tensor:
    """Return 24 bits of a digest as a float32, which holds each of them exactly, as TensorBoard's files do."""
    return (mixed(mixed(x)) & 0xFFFFFF).float()
