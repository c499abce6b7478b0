"""Recordings, the last of them, and what they hold fast, by which one is told from another."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .batch import children, leaves
from .redo import modules

if TYPE_CHECKING:
    from .state import State

VALUES = (str, int, float, type(None), bytes, complex, torch.dtype, torch.device)  # what their repr tells in full


T = TypeVar("T")


class Last(OrderedDict[Any, T]):
    """The `most` recordings of one `kind` that were used last, by what they hold fast."""

    def __init__(self, most: int, kind: str) -> None:
        super().__init__()
        self.most, self.kind, self.recorded, self.replayed = most, kind, 0, 0

    def find(self, key: Any) -> T | None:
        """Return a recording, which is the last used from now on."""
        found = self.get(key)
        if found is not None:
            self.move_to_end(key)
        return found

    def make_room(self, why: str) -> None:
        """Leave room for one more; raises RuntimeError, with `why` and what helps, where too few of so many were replayed."""
        self.recorded += 1
        if self.recorded > 4 * self.most and self.replayed < 8 * self.recorded:
            raise RuntimeError(f"CUDAGraph has recorded {self.recorded - 1} {self.kind}, keeps {self.most}, and replayed only "
                               f"{self.replayed}: {why}, or have it keep more: CUDAGraph(graphs={4 * self.most})")  # fmt: skip
        while len(self) >= self.most:
            self.popitem(last=False)

    def give_back(self) -> None:
        """Drop all, which count as not recorded."""
        self.recorded -= len(self)
        self.clear()


def facts(model: nn.Module) -> list[Any]:
    """Return what a recording holds fast of a model: modes, how much is dropped, what is frozen."""
    every = modules(model)
    held = [fact for m in every for fact in (m.training, *map(vars(m).get, ("p", "dropout")))]
    frozen = [p.requires_grad for m in every for p in m._parameters.values() if p is not None]
    return [fact for fact in held if isinstance(fact, int | float)] + frozen


def addresses(model: nn.Module) -> list[int]:
    """Return where a model's parameters and buffers lie; nothing where some have no memory yet, or none that is known."""
    found = [x for m in modules(model) for held in (m._parameters, m._buffers) for x in held.values() if x is not None]
    with contextlib.suppress(RuntimeError, ValueError):
        return [x.data_ptr() for x in found]
    return []


def buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's buffers, each by all its names."""
    return dict(model.named_buffers(remove_duplicate=False))


def rebound(model: nn.Module, before: dict[str, Tensor]) -> list[str]:
    """Return the names by which a model holds other buffers than before, which are put back."""
    now = buffers(model)
    found = [name for name in before | now if before.get(name) is not now.get(name)]
    for name in found:
        owner, _, key = name.rpartition(".")
        model.get_submodule(owner)._buffers[key] = before.get(name)
    return found


def settings(state: State) -> list[Any]:
    """Return what a recorded update holds fast, tensors by their ids."""
    held: list[Any] = []
    for group in state.optimizer.param_groups:
        for name, value in group.items():
            if name != "params":
                held.append(id(value) if isinstance(value, Tensor) else value if isinstance(value, Hashable) else repr(value))
        held += [id(p) for p in group["params"] if p.grad is not None]
    return held


def signature(x: Any, path: str = "batch") -> tuple[Any, ...]:
    """Return what tells one shape of micro-batch from another: containers, tensors' shapes and types, and all other values.

    Raises ValueError for what may hold more than can be compared.
    """
    if isinstance(x, Tensor):
        return type(x), x.shape, x.dtype, x.stride()
    if isinstance(x, VALUES):
        return type(x), repr(x)
    kids = children(x)
    if kids is not None:
        return type(x), tuple([(key, signature(kid, f"{path}[{key!r}]")) for key, kid in kids.items()])
    if isinstance(x, list | tuple) and not isinstance(x, PackedSequence):
        return type(x), tuple([signature(value, path) for value in x])
    raise ValueError(f"CUDAGraph can't see into {path} ({type(x).__name__}), and would replay what it held while "
                     "recording: give tensors in its place (in dicts, lists, tuples or dataclasses), or leave CUDAGraph "
                     "out")  # fmt: skip


def describe(batch: Any) -> str:
    """Return a batch's shapes in words."""
    found = [f"{path} {tuple(x.shape)}" if isinstance(x, Tensor) else f"{path} = {x!r:.40}" for path, x in leaves(batch)]
    return ", ".join(found[:6])
