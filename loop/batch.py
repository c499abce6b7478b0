"""Batches of any structure: their size, an equal cut of them, several joined, moved to a device."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

Cut = Callable[[Any, int, int], Any]
Size = Callable[[Any], int | None]
BY_IDENTITY: Any = object.__eq__
REMEDY = "give Loop(..., cut=fn(batch, start, stop))"


def children(x: Any) -> dict[Any, Any] | None:
    """Return what a container holds by key or position; None for a leaf."""
    if isinstance(x, Tensor | str | bytes | PackedSequence):
        return None
    if isinstance(x, Mapping):
        return dict(x)
    if isinstance(x, list | tuple):
        holds = any(isinstance(v, Tensor | list | tuple) or children(v) is not None for v in x)
        plain = not hasattr(x, "_fields") and not holds
        return None if plain and x else dict(enumerate(x))
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        return {f.name: getattr(x, f.name) for f in dataclasses.fields(x)}
    return None


def rebuild(x: Any, parts: dict[Any, Any]) -> Any:
    """Return a container like `x` that holds `parts`."""
    if type(x) is dict:
        return parts
    if isinstance(x, list | tuple):
        return type(x)(parts.values()) if type(x) in (list, tuple) else filled(x, [*parts.values()])
    if isinstance(x, Mapping) and not hasattr(type(x), "__setitem__"):
        return x if unchanged(dict(x), parts) else anew(type(x), parts)
    new = copy.copy(x)
    for key, part in parts.items():
        if isinstance(x, Mapping):
            new[key] = part
        else:
            object.__setattr__(new, key, part)
    return new


def unchanged(a: Any, b: Any) -> bool:
    """Tell whether two hold the very same leaves in the same plain dicts, lists and tuples."""
    if a is b:
        return True
    if type(a) is not type(b) or type(a) not in (dict, list, tuple) or len(a) != len(b):
        return False
    return all(map(unchanged, *((a.values(), b.values()) if type(a) is dict else (a, b))))


def anew(kind: Any, parts: dict[Any, Any]) -> Any:
    """Return a mapping that can only be filled when it is made, or a plain dict where its kind takes no dict for that."""
    try:
        new = kind(parts)
        return new if new.keys() == parts.keys() and all(new[key] is part for key, part in parts.items()) else parts
    except Exception:  # whatever a constructor of other arguments raises
        return parts


def filled(x: Any, parts: list[Any]) -> Any:
    """Return a list or tuple of a kind of its own that holds `parts`, with what its constructor makes of them, else a copy.

    Attributes that the constructor does not make of what `x` holds are the program's own, and come along.
    """
    with contextlib.suppress(Exception):  # whatever a constructor of other arguments raises
        new, again = (kind_of(x)(y) for y in (parts, [*x]))
        if len(new) == len(parts) and all(map(operator.is_, new, parts)):
            for name, value in vars(x).items() if hasattr(x, "__dict__") else ():
                if name not in vars(again) or not same(vars(again)[name], value):
                    setattr(new, name, value)
            return new
    if isinstance(x, list):
        new = copy.copy(x)
        new[:] = parts
        return new
    new = tuple.__new__(type(x), parts)
    if hasattr(x, "__dict__"):
        vars(new).update(vars(x))
    return new


def kind_of(x: Any) -> Callable[[list[Any]], Any]:
    """Return what makes another such list or tuple of its parts."""
    kind = type(x)
    return (lambda parts: kind(*parts)) if hasattr(x, "_fields") else kind


def same(a: Any, b: Any, met: set[tuple[int, int]] | None = None) -> bool:
    """Tell whether two attributes are the same, in whatever holds their numbers; what shows no difference is."""
    met = set() if met is None else met
    if a is b or type(a) is not type(b) or (id(a), id(b)) in met:
        return type(a) is type(b)
    with contextlib.suppress(Exception):  # several numbers have no truth, and a comparison of one's own may raise
        if getattr(a, "shape", None) != getattr(b, "shape", None):
            return False
        if bool(a == b):
            return True
    met.add((id(a), id(b)))  # which may hold itself
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(same(a[key], b[key], met) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y, met) for x, y in zip(a, b, strict=True))
    if hasattr(a, "__qualname__"):  # a function that is made anew is its code
        return getattr(a, "__code__", a) is getattr(b, "__code__", b)
    if type(a).__eq__ is BY_IDENTITY or dataclasses.is_dataclass(a):
        return not hasattr(a, "__dict__") or same(vars(a), vars(b), met)
    with contextlib.suppress(Exception):
        equal: Any = (a == b) | ((a != a) & (b != b))  # nor is NaN any difference
        return bool(equal.all() if hasattr(equal, "all") else equal)
    return True


def walk(x: Any, leaf: Callable[[Any, str], Any], path: str = "batch") -> Any:
    """Return the same structure with every leaf replaced by `leaf(value, path)`."""
    kids = children(x)
    if kids is None:
        return leaf(x, path)
    return rebuild(x, {key: walk(kid, leaf, f"{path}[{key!r}]") for key, kid in kids.items()})


def leaves(x: Any) -> list[tuple[str, Any]]:
    """Return every leaf with its path."""
    found: list[tuple[str, Any]] = []
    walk(x, lambda value, path: found.append((path, value)))
    return found


def move(x: Any, device: torch.device) -> Any:
    """Return the batch with every tensor on the device; anything else passes through."""
    if isinstance(x, Tensor):
        return x if x.device == device else x.to(device, non_blocking=device.type != "cpu")  # what the host reads must be there
    if type(x) in (tuple, list):
        return type(x)([move(v, device) for v in x])
    if isinstance(x, PackedSequence):
        return x.to(device)  # type: ignore[arg-type]
    kids = children(x)
    return x if kids is None else rebuild(x, {key: move(kid, device) for key, kid in kids.items()})


def length(x: Any) -> int | None:
    """Return how many samples a leaf holds, None where it belongs to the batch as a whole."""
    if isinstance(x, Tensor):
        return x.size(0) if x.dim() else None
    if isinstance(x, list | tuple) and not isinstance(x, PackedSequence):
        return len(x)
    if isinstance(x, Mapping):  # one with attributes may have any, or raise
        return None
    shape = getattr(x, "shape", None)
    return int(shape[0]) if isinstance(shape, tuple) and shape else None


def size(batch: Any) -> int | None:
    """Return the first dimension of the first tensor (else array, else plain list); None where there is none."""
    if isinstance(batch, Tensor):
        return batch.size(0) if batch.dim() else None
    if type(batch) in (tuple, list) and batch and isinstance(batch[0], Tensor) and batch[0].dim():
        return int(batch[0].size(0))
    found = [value for _, value in leaves(batch)]
    found.sort(key=lambda v: (not isinstance(v, Tensor), isinstance(v, list | tuple)))
    return next((n for n in map(length, found) if n is not None), None)


def cut(batch: Any, start: int, stop: int, total: int, by: Cut | None = None) -> Any:
    """Return samples start..stop of a batch of `total`; raises TypeError or ValueError naming what can't be cut."""
    if start == 0 and stop == total:
        return batch
    if by is not None:
        return by(batch, start, stop)

    def leaf(x: Any, path: str) -> Any:
        n = length(x)
        if n is None:
            if x is None or isinstance(x, Tensor | complex | float | int | str | bytes) or getattr(x, "shape", None) == ():
                return x
            raise TypeError(f"{path} is a {type(x).__name__}, which hookloop can't cut: {REMEDY}")
        if n != total:
            raise ValueError(f"{path} holds {n} where the batch holds {total} samples: {REMEDY}, and size=fn(batch) where it holds "
                             f"another number than {total}")  # fmt: skip
        if isinstance(x, Tensor) and x.is_nested:
            return torch.nested.as_nested_tensor(list(x.unbind()[start:stop]), layout=x.layout)
        if isinstance(x, Tensor) and x.layout != torch.strided:
            rows = (x if x.layout == torch.sparse_coo else x.to_sparse_coo()).narrow_copy(0, start, stop - start)
            return rows if x.layout == torch.sparse_coo else rows.to_sparse(layout=x.layout)
        return x[start:stop]

    return walk(batch, leaf)


def equal_cuts(total: int, limit: int | None) -> list[tuple[int, int]]:
    """Return the fewest (start, stop) of at most `limit` samples, equal to within one: 33 under 32 is 17 and 16."""
    count = 1 if limit is None else max(1, -(-total // limit))
    edges = [total // count * i + min(i, total % count) for i in range(count + 1)]
    return list(itertools.pairwise(edges))


def join(parts: Sequence[Any], sizes: Sequence[int | None] = ()) -> Any | None:
    """Return several batches as one, or None where a leaf differs in kind, dtype or trailing shape, or goes by no sample."""
    sizes = sizes or [size(part) for part in parts]
    first = parts[0]
    if len(parts) == 1:
        return first
    kids = [children(part) for part in parts]
    if kids[0] is not None:
        if any(k is None or k.keys() != kids[0].keys() for k in kids) or len({type(part) for part in parts}) > 1:
            return None
        joined = {key: join([k[key] for k in kids if k is not None], sizes) for key in kids[0]}
        lost = any(v is None and any(k[key] is not None for k in kids if k is not None) for key, v in joined.items())
        return None if lost else rebuild(first, joined)
    if isinstance(first, Tensor | list | tuple) and [length(p) for p in parts] != list(sizes):
        return first if all(p is first for p in parts) else None
    if all(isinstance(p, Tensor) and p.layout == torch.strided and not p.is_nested and p.dim() for p in parts):
        same = all((p.dtype, p.shape[1:], p.device) == (first.dtype, first.shape[1:], first.device) for p in parts)
        if not same:
            return None
        if not first.is_pinned():
            return torch.cat(list(parts))
        return torch.cat(list(parts), out=torch.empty(0, dtype=first.dtype, pin_memory=True))
    if all(type(p) is type(first) is list or type(p) is type(first) is tuple for p in parts):
        return type(first)(v for p in parts for v in p)
    same_value = isinstance(first, bool | int | float | str) and all(type(p) is type(first) and p == first for p in parts)
    return first if same_value or all(p is first for p in parts) else None


def measure(data: Any, weigh: Callable[[Any], Any] | None, by: Size = size) -> int:
    """Return a batch's number of samples, or its weight where it shows none; raises TypeError naming the remedy."""
    if (found := by(data)) is not None:
        return found
    if weigh is not None:
        return int(weigh(data))
    raise TypeError(f"no leaf of this {type(data).__name__} shows how many samples it holds: put a tensor with a batch "
                    "dimension into it, or give Loop(..., size=fn(batch)), and where batches are to be cut "
                    "cut=fn(batch, start, stop)")  # fmt: skip


def in_doubt(batch: Any, measure: Callable[[Any], int]) -> str | None:
    """Return what to say of a batch whose first tensor seems to be one sample among others beside it; None of any other."""
    kids = children(batch) or {}
    firsts = {key: next((x for _, x in leaves(kid) if isinstance(x, Tensor) and x.dim()), None) for key, kid in kids.items()}
    key, first = next(((key, x) for key, x in firsts.items() if x is not None), (None, None))
    held = kids.get(key)
    if first is None or not isinstance(held, list | tuple) or hasattr(held, "_fields") or len(held) == first.size(0):
        return None
    n, count = int(first.size(0)), len(held)
    known = {k: {m for _, v in leaves(x) if (m := length(v)) is not None} for k, x in kids.items()}
    beside = [k for k, x in kids.items() if k != key and length(x) == count and known[k] != {n}]
    # views of the same samples hold as many each, and so does what is theirs, as labels
    views = known[key] == {n} != {1} and any(n in known[k] for k in kids if k not in (key, *beside))
    if not beside or views or measure(batch) != n:
        return None
    return (f"a batch counts as {n} samples, which is the first dimension of its first tensor, but that lies in batch[{key!r}], "
            f"which holds {count}, as batch[{beside[0]!r}] does: if these are the samples, give Loop(..., size=fn(batch)), and "
            "where batches are to be cut cut=fn(batch, start, stop)")  # fmt: skip


def counted(by: Callable[[Any], int]) -> Size:
    """Return a user's `size`, whose answers are whole numbers."""

    def found(batch: Any) -> int:
        answer = by(batch)
        if isinstance(answer, bool) or not hasattr(answer, "__index__") or operator.index(answer) < 0:
            raise ValueError(f"size must return how many samples a batch holds, a whole number, at least 0, not {answer!r:.60}")
        return operator.index(answer)

    return found


def complete(cut: Cut, measure: Callable[[Any], int]) -> Cut:
    """Return a user's `cut`, whose pieces hold the samples asked for: else some would be lost, or used twice, without a word."""

    def found(batch: Any, start: int, stop: int) -> Any:
        part = cut(batch, start, stop)
        if (holds := measure(part)) != stop - start:
            raise ValueError(f"cut(batch, {start}, {stop}) gave a batch of {holds} samples, not of {stop - start}: have it return "
                             "just these, and where a batch's samples are not the first dimension of its first tensor, say how "
                             "many it holds: Loop(..., cut=cut, size=fn(batch))")  # fmt: skip
        return part

    return found
