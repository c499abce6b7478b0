"""What must be put back before a step is redone (generators, module buffers), or an update (weights, optimizer state)."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from .batch import leaves
from .chunk import Chunk
from .rng import generators, restore, snapshot

if TYPE_CHECKING:
    from .state import State

CHANGING = (dict, list, set, deque)  # containers that a step may change in place


class Snapshot:
    """Kept from a step's start: buffers by name, since a forward may fill or rebind them (BatchNorm bumps no version)."""

    def __init__(self, state: State, seeded: bool = False, host: bool = False) -> None:
        """`seeded`: torch's generators are, for each micro-batch, so that they need not be kept; `host`: Python's, NumPy's too."""
        self.device, self.host = state.device if host else None, dict[str, Any]()
        self.generators, self.model = [] if seeded else generators(state.device), shaped(state.model)
        ours = {p for group in state.optimizer.param_groups for p in group["params"]}
        self.outside = [p for p in state.model.parameters() if p.requires_grad and p not in ours]

    def take(self, chunks: list[Chunk]) -> None:
        """Remember the moment before a step's first forward."""
        self.owners = [module._buffers for module in modules(self.model)]
        held = [(owner, [*owner.items()]) for owner in self.owners if owner]
        self.buffers = [(owner, [(name, b, None if b is None else b.clone()) for name, b in found]) for owner, found in held]
        self.grads = [(p, p.grad, None if p.grad is None else p.grad.clone()) for p in self.outside]
        self.host = {} if self.device is None else snapshot(self.device)
        self.states = [generator.get_state() for generator in self.generators]
        found = [(path, x) for chunk in chunks for path, x in leaves(chunk.data) if isinstance(x, Tensor)]
        self.versions = [(path, x, x._version) for path, x in found if not x.is_inference()]

    def put_back(self, error: Exception | None) -> None:
        """Go back to that moment; raises RuntimeError if the batch itself was changed in place."""
        for path, x, version in self.versions:
            if x._version != version:
                raise RuntimeError(f"the step can't be redone: {path} was changed in place by the forward; "
                                   "change a copy of it instead") from error  # fmt: skip
        self.put_back_buffers()
        with torch.no_grad():
            for p, grad, copy in self.grads:
                p.grad = grad
                if grad is not None and copy is not None:
                    grad.copy_(copy)
        for generator, state in zip(self.generators, self.states, strict=True):
            generator.set_state(state)
        if self.device is not None:
            restore(self.host, self.device)

    @torch.no_grad()
    def put_back_buffers(self) -> None:
        """Undo what the step's forwards did to buffers."""
        for owner in self.owners:
            owner.clear()  # of what came by since, too
        for owner, found in self.buffers:
            for name, buffer, kept in found:
                owner[name] = buffer
                if buffer is None or kept is None or overlapping(buffer):  # which nobody can have written to
                    continue
                if buffer.shape == kept.shape:
                    buffer.copy_(kept)
                else:
                    buffer.set_(kept.clone())  # type: ignore[call-overload]


class BeforeUpdate:
    """A copy, on the host, of what an optimizer's step changes, so that one that failed half way can be put back.

    All that lies in its attributes, in containers and other optimizers in these too, as in one that wraps another.
    """

    def __init__(self, state: State) -> None:
        self.grads = [(p, p.grad) for group in state.optimizer.param_groups for p in group["params"]]
        found = within([state.optimizer, state.optimizer.state, state.optimizer.param_groups, self.grads], {})
        own = [x for x in found if isinstance(x, torch.Generator)]
        self.streams = [(generator, generator.get_state()) for generator in (*generators(state.device), *own)]
        self.containers = [(x, dict(x) if isinstance(x, dict) else [*x]) for x in found if isinstance(x, CHANGING)]
        self.copies = [(x, host_copy(x.detach())) for x in found if isinstance(x, Tensor) and not overlapping(x)]

    def put_back(self) -> None:
        """Go back to that moment."""
        for container, kept in self.containers:
            container.clear()
            (container.update if isinstance(container, dict | set) else container.extend)(kept)
        with torch.no_grad():
            for x, copy in self.copies:
                x.copy_(copy)
        for p, grad in self.grads:
            p.grad = grad
        for generator, drawn in self.streams:
            generator.set_state(drawn)


def within(x: Any, found: dict[int, Any]) -> Collection[Any]:
    """Return, each once, the containers, tensors and generators in nested containers and optimizers."""
    x = vars(x) if isinstance(x, Optimizer) else x
    if id(x) not in found and isinstance(x, (*CHANGING, tuple, Tensor, torch.Generator)):
        found[id(x)] = x
        if not isinstance(x, Tensor | torch.Generator):
            for value in x.values() if isinstance(x, dict) else x:
                within(value, found)
    return found.values()


def overlapping(x: Tensor) -> bool:
    """Tell whether several places of a tensor are one in memory, as in an expanded one."""
    return (
        x.layout == torch.strided
        and not x.is_nested
        and any(n > 1 and not step for n, step in zip(x.shape, x.stride(), strict=True))
    )


def put_buffer(owner: dict[str, Tensor | None], name: str, kept: Tensor | None, device: torch.device) -> None:
    """Fill a buffer where it is, or put another in its place where that is of another shape."""
    buffer = owner[name]
    if kept is None or buffer is None or buffer.shape != kept.shape:
        owner[name] = None if kept is None else kept.to(device if buffer is None else buffer.device, copy=True)
    elif not overlapping(buffer):  # which nobody can have written to
        buffer.copy_(kept)


def shaped(model: nn.Module) -> nn.Module:
    """Refuse a model with lazy modules that have no shape yet: what their first forward makes could not be undone."""
    if lazy := [name for name, x in (*model.named_parameters(), *model.named_buffers()) if is_lazy(x)]:
        raise ValueError(f"{lazy[0]} has no shape yet, so a step could not be undone; run one batch through the model before "
                         "training")  # fmt: skip
    return model


def modules(model: nn.Module) -> list[nn.Module]:
    """Return what `model.modules()` gives, which also makes up the name of each, five times as dear, for each step to ask."""
    found = {model: None}
    queue = [model]
    for module in queue:
        for child in module._modules.values():
            if child is not None and child not in found:
                found[child] = None
                queue.append(child)
    return queue


def tensors(x: Any) -> Iterator[Tensor]:
    """Yield every tensor in nested containers."""
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, dict | list | tuple):
        for value in x.values() if isinstance(x, dict) else x:
            yield from tensors(value)


def host_copy(x: Tensor) -> Tensor:
    """Return a copy on the host, queued behind the work that makes `x` where that lies on a device."""
    pinned = x.device.type in ("cuda", "xpu")
    return torch.empty_like(x, device="cpu", pin_memory=pinned).copy_(x, non_blocking=pinned)


def keeps_more(module: nn.Module) -> bool:
    """Tell whether a module says what it keeps beside parameters and buffers, and takes it back."""
    kind = type(module)
    return kind.get_extra_state is not nn.Module.get_extra_state and kind.set_extra_state is not nn.Module.set_extra_state
