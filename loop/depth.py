"""The layers of a model from its input to its head: by the order of registration, or by the order in which they run."""

from __future__ import annotations

import copy
import inspect
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

Layer = list[nn.Parameter]
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)  # of these very types: a subclass may be a layer
NORM = re.compile(r"Norm([123]d)?$")  # any library's: LayerNorm, BatchNorm2d, SyncBatchNorm, LlamaRMSNorm


def is_norm(module: nn.Module) -> bool:
    """Tell whether a module is a norm: by the names of its classes, whoever wrote it."""
    return any(NORM.search(c.__name__) for c in type(module).__mro__)


def layers(model: nn.Module) -> list[Layer]:
    """Return the model's layers, from the first to the head, each as its parameters; a parameter stands in one, once.

    They are the leaves of the module tree in the order of registration, but: blocks are one layer each, that is the
    outermost modules of a class that the model holds at least twice (with a sequence of blocks inside only where they are
    elements of a sequence themselves); embeddings outside of blocks are one layer together, the first; a norm belongs to
    the layer before it; parameters that a larger module owns itself belong to the first layer inside it. A layer whose
    parameters all stand in one before it (a tied head) is none.
    """
    model, found, embeddings, loose = bare(model), list[Layer](), list[nn.Parameter](), list[nn.Parameter]()
    of = Counter(type(module) for module in model.modules())

    def visit(module: nn.Module, listed: bool) -> None:
        inner = [child for child in module.children() if next(child.parameters(), None) is not None]
        own = list(module.parameters(recurse=False))
        plain = type(module) in CONTAINERS
        if inner and (plain or module is model or of[type(module)] < 2 or (not listed and holds_blocks(module, of))):
            loose.extend(own)
            for child in inner:
                visit(child, plain)
        elif isinstance(module, nn.Embedding | nn.EmbeddingBag):
            embeddings.extend(own)
        elif not inner and is_norm(module):
            (found[-1] if found else embeddings or loose).extend(own)
        else:
            found.append([*loose, *module.parameters()])
            loose.clear()

    visit(model, False)
    seen, result = set[nn.Parameter](), list[Layer]()
    for layer in [embeddings, *found, loose]:  # left over: what nothing came after
        if mine := [p for p in dict.fromkeys(layer) if p not in seen]:
            result.append(mine)
            seen.update(mine)
    return result


def holds_blocks(module: nn.Module, of: Mapping[type, int]) -> bool:
    """Tell whether a sequence inside a module holds two modules of one class that have modules of their own."""
    sequences = [m for m in module.modules() if type(m) in CONTAINERS]
    return any(max(Counter(type(c) for c in s.children() if next(c.children(), None) is not None).values(), default=0) > 1
               for s in sequences)  # fmt: skip


def bare(model: nn.Module) -> nn.Module:
    """Return a model without what wraps it."""
    wrapped: Any = model
    while (wraps := isinstance(wrapped, DataParallel | DistributedDataParallel)) or hasattr(wrapped, "_orig_mod"):
        wrapped = wrapped.module if wraps else wrapped._orig_mod
    return wrapped  # type: ignore[no-any-return]


def depths(model: nn.Module) -> dict[Tensor, float]:
    """Return parameter -> its layer's depth, from 0 for the first to 1 for the head, by the order of registration."""
    found = layers(model)
    return {p: i / max(1, len(found) - 1) if found[1:] else 1.0 for i, layer in enumerate(found) for p in layer}


class Uses(TorchDispatchMode):
    """Notes when each tensor is first used."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.first: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, Tensor):
                self.first.setdefault(id(x), len(self.first))
        return func(*args, **(kwargs or {}))


def as_run(model: nn.Module, found: list[Layer], example: Any) -> list[Layer]:
    """Return the layers in the order in which a forward first uses them; those that it never uses join the last.

    The forward runs in eval mode on a copy of the model on the "meta" device, without values. Raises ValueError where it
    can't.
    """
    model, uses = bare(model), Uses()
    try:
        memo = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
        copied = copy.deepcopy(model, {**memo, **{id(b): b.detach().to("meta") for b in model.buffers()}}).eval()
        for module in copied.modules():
            vars(module).update({k: on_meta(v) for k, v in vars(module).items() if isinstance(v, Tensor)})
        args, kwargs = arguments(copied, tree_map(on_meta, example))
        with torch.no_grad(), uses:
            copied(*args, **kwargs)
    except Exception as error:
        raise ValueError(f"the model does not run on example without values (on the 'meta' device): {type(error).__name__}: "
                         f"{error}; give what its forward takes, but no mask that it reads, or give rules") from error  # fmt: skip
    when = {p: uses.first.get(id(memo[id(p)])) for p in model.parameters()}
    firsts = [min([first for p in layer if (first := when[p]) is not None], default=None) for layer in found]
    ran = sorted((first, i) for i, first in enumerate(firsts) if first is not None)
    if not ran:
        raise ValueError("the model used none of its parameters on example; give what its forward takes")
    order = [list(found[i]) for _, i in ran]
    order[-1].extend(p for layer, first in zip(found, firsts, strict=True) if first is None for p in layer)
    return order


def on_meta(x: Any) -> Any:
    """Return a tensor's shape and type alone."""
    return x.detach().to("meta") if isinstance(x, Tensor) else x


def arguments(model: nn.Module, batch: Any) -> tuple[list[Any], dict[str, Any]]:
    """Return what of a batch a forward takes: a mapping's entries that it names, a tuple's first parts, or all."""
    parameters = list(inspect.signature(model.forward).parameters.values())
    if isinstance(batch, Mapping):
        names = {p.name for p in parameters}
        every = any(p.kind is p.VAR_KEYWORD for p in parameters)
        return [], {name: value for name, value in batch.items() if every or name in names}
    if not isinstance(batch, list | tuple):
        return [batch], {}
    many = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    places = sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)
    return list(batch if many else batch[:places]), {}
