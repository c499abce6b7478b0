"""A copy of a model that trains on: paired with it by name, kept of its structure."""

from __future__ import annotations

import copy
import warnings
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..loop.redo import keeps_more
from ..loop.wrapped import sharded

Kind = TypeVar("Kind")
Pairs = list[tuple[Tensor, Tensor]]


def check_whole(model: nn.Module) -> None:
    """Refuse a model that can't be copied."""
    if sharded(model):
        raise ValueError("Average would copy the model, and torch copies none that fully_shard cut up: share it with "
                         "DistributedDataParallel, or leave Average out")  # fmt: skip


class Detached(TorchFunctionMode):
    """Has `copy.deepcopy` copy what torch refuses to: tensors that a forward computed, without their graph."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            return args[0].detach().clone()
        return func(*args, **(kwargs or {}))


def copied(x: Kind) -> Kind:
    """Return a copy of a model, also of one that keeps what a forward computed (`self.hidden = ...`)."""
    with Detached():
        return copy.deepcopy(x)


def fits(amiss: dict[str, str]) -> bool:
    """Tell whether nothing is amiss with a saved copy; warn of what is, as `strict=False` allows."""
    if amiss:
        warnings.warn(f"Average begins anew, since what it saved does not fit: {'; '.join(amiss.values())}", stacklevel=3)
    return not amiss


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's parameters and buffers."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def paired(mine: nn.Module, model: nn.Module) -> Pairs | None:
    """Return a copy's parameters and buffers with the model's; None where the model has other parameters or modules now."""
    held, theirs = tensors(mine), tensors(model)
    if [(name, x.shape) for name, x in held.items()] != [(name, x.shape) for name, x in theirs.items()]:
        if built(mine) != built(model):
            return None
        regrow(mine, model)
        held = tensors(mine)
    return [(x, theirs[name]) for name, x in held.items()]


def built(model: nn.Module) -> tuple[list[str], list[Any]]:
    """Return the names of a model's modules, and names and shapes of its parameters."""
    return [name for name, _ in model.named_modules()], [(name, p.shape) for name, p in model.named_parameters()]


def regrow(mine: nn.Module, model: nn.Module) -> None:
    """Replace a copy's buffers whose place in the model holds another shape now, or was empty, or is, or is gone."""
    for held, theirs in zip(mine.modules(), model.modules(), strict=True):
        for name in held._buffers.keys() - theirs._buffers.keys():
            delattr(held, name)
        for name, x in theirs._buffers.items():
            if getattr(held._buffers.get(name), "shape", None) != getattr(x, "shape", None):
                kept = name not in theirs._non_persistent_buffers_set
                held.register_buffer(name, x if x is None else x.detach().clone(), kept)


@torch.no_grad()
def carried(old: nn.Module, new: nn.Module, model: nn.Module) -> Pairs:
    """Pair a new copy of a model that is built otherwise now, with what the old one held by the same names; warn of the rest."""
    held = tensors(old)
    fits = {name: x for name, x in tensors(new).items() if name in held and held[name].shape == x.shape}
    for name, x in fits.items():
        x.copy_(held[name])
    anew = [name for name, _ in new.named_parameters() if name not in fits]
    gone = [name for name, _ in old.named_parameters() if name not in fits]
    warnings.warn(f"Average: of the model's parameters {', '.join(anew) or 'none'} came and {', '.join(gone) or 'none'} went; "
                  "the average of those that came begins as they are now, that of all others goes on", stacklevel=2)  # fmt: skip
    return paired(new, model) or []


@torch.no_grad()
def take_extra_states(mine: nn.Module, model: nn.Module) -> None:
    """Copy what modules keep beside parameters and buffers, where they say what that is and take it back (`get_extra_state`)."""
    for held, theirs in zip(mine.modules(), model.modules(), strict=True):
        if keeps_more(theirs):
            held.set_extra_state(copied(theirs.get_extra_state()))
