"""A model as torch's wrappers share it between ranks: DDP's whole copies, or the shards of `fully_shard` (FSDP2)."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Container, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parameter import is_lazy

from .redo import overlapping, put_buffer
from .store.named import cleaner

if TYPE_CHECKING:
    from .state import State


def fsdp1(model: nn.Module) -> bool:
    """Tell whether the model is wrapped in FullyShardedDataParallel."""
    return any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules())


def sharded(model: nn.Module) -> bool:
    """Tell whether `fully_shard` has a part of the model."""
    return any(hasattr(type(m), "set_requires_gradient_sync") for m in model.modules())


def part(x: Any) -> Any:
    """Return what this rank holds of a tensor, without its graph."""
    return x.detach().to_local() if hasattr(x, "to_local") else x.detach()


def reals(x: Any) -> Any:
    """Return the same of a tensor, of a complex one the pairs of reals that it is to an optimizer."""
    return torch.view_as_real(part(x)) if x.is_complex() else part(x)


def reshard(model: nn.Module) -> None:
    """Have `fully_shard` let go of whole parameters, which it keeps where no backward followed a forward."""
    fsdp: list[Any] = [module for module in model.modules() if hasattr(type(module), "set_requires_gradient_sync")]
    for module in fsdp:
        module.reshard()


def wrapping(model: nn.Module) -> set[Any]:
    """Return what makes a model shared between ranks: DDP modules, and parameters that are sharded."""
    reshard(model)
    found: set[Any] = {m for m in model.modules() if isinstance(m, nn.parallel.DistributedDataParallel)}
    return found | {p for p in model.parameters() if hasattr(p, "device_mesh")}


def check_mesh(model: nn.Module, world: int) -> None:
    """Raise ValueError for a model that is averaged over other ranks than all, or that lies on the host between its forwards."""
    ddp = {name: m for name, m in model.named_modules() if isinstance(m, nn.parallel.DistributedDataParallel)}
    for name, module in ddp.items():
        if (count := dist.get_world_size(module.process_group)) != world:
            raise ValueError(f"{name or 'the model'} is averaged over a process group of {count} of the {world} ranks, and the "
                             "weights of a step's samples are over all; leave process_group out")  # fmt: skip
    parameters: list[tuple[str, Any]] = [*model.named_parameters()]
    for name, p in parameters:
        if hasattr(p, "device_mesh") and p.device_mesh.device_type != p.device.type:
            raise ValueError(f"{name} lies on the {p.device.type} and is used on {p.device_mesh.device_type}, as "
                             "fully_shard(offload_policy=CPUOffloadPolicy()) has it, which hookloop does not follow; leave "
                             "offload_policy out")  # fmt: skip


def frozen(model: Any) -> set[Any]:
    """Return the parameters that were frozen when DDP was built, which it never averages."""
    found = {p for p in model.parameters() if not p.requires_grad} if hasattr(model, "reducer") else set()
    if found and model._get_ddp_logging_data()["num_parameter_tensors"] == len(model._module_parameters):
        return set()  # frozen since
    return found


def check_shared(state: State) -> None:
    """Raise ValueError for parameters that each rank would train apart, and for frozen ones that DDP would wait for."""
    wrapper: Any = state.model
    trained = [p for group in state.optimizer.param_groups for p in group["params"] if p.requires_grad]
    if state.ranks.sharded:
        reshard(wrapper)
        apart, waited = [p for p in trained if not hasattr(p, "device_mesh")], set()
    else:
        inside = {*wrapper._module_parameters} - state.ranks.frozen
        apart, waited = [p for p in trained if p not in inside], {p for p in inside if not p.requires_grad}
        if wrapper.find_unused_parameters or wrapper.static_graph:
            waited = set()
    names = {p: name for name, p in wrapper.named_parameters()}
    if apart:
        shown = ", ".join(names.get(p, "a parameter outside of the model") for p in apart[:5])
        raise ValueError(f"{shown} would be trained by each rank apart: DistributedDataParallel averages what it held, and was not "
                         "frozen, when it was built, fully_shard what it cut up; put all that is trained into the model, with "
                         "requires_grad=True, before it is wrapped")  # fmt: skip
    if waited:
        shown = ", ".join([name for p, name in names.items() if p in waited][:5])
        raise ValueError(f"{shown} were frozen (as Unfreeze does) after DistributedDataParallel was built, which would wait for "
                         "their gradients: wrap with DistributedDataParallel(model, find_unused_parameters=True), or freeze them "
                         "before")  # fmt: skip


def reducing(model: Any, last: bool, alone: bool) -> contextlib.AbstractContextManager[Any]:
    """Return the context of a micro-batch in which ranks average their gradients in a step's last backward only.

    `alone`: nothing at all is exchanged, not even DDP's buffers, so that a rank may fail without the others missing it.
    """
    if hasattr(model, "set_requires_gradient_sync"):  # FSDP2
        model.set_requires_gradient_sync(last and not alone)
    if alone and hasattr(model, "require_forward_param_sync"):
        model.require_forward_param_sync = False
    return model.no_sync() if (alone or not last) and hasattr(model, "no_sync") else contextlib.nullcontext()


@contextlib.contextmanager
def each_alone(state: State) -> Iterator[None]:
    """Keep DDP from sending buffers in an evaluation, where ranks run as many forwards as each has; rank 0's are sent once."""
    model: Any = state.model
    syncs = state.ranks.together and hasattr(model, "require_forward_param_sync")
    if syncs and model.broadcast_buffers:
        for buffer in (*model.module.buffers(), *(() if state.eval_model is None else state.eval_model.buffers())):
            sent = buffer.contiguous()  # as nccl wants it
            dist.broadcast(sent, 0)
            if sent is not buffer and not overlapping(buffer):
                buffer.copy_(sent)
    before = getattr(model, "require_forward_param_sync", None)
    if syncs:
        model.require_forward_param_sync = False
    try:
        yield
    finally:
        if syncs:
            model.require_forward_param_sync = before
        if state.ranks.sharded:
            reshard(model)


def unsaved_buffers(model: nn.Module) -> dict[str, Any]:
    """Return a copy, on the host, of the buffers that a model's state dict leaves out."""
    kept = model.state_dict(keep_vars=True).keys()
    return {n: b.detach().to("cpu", copy=True) for n, b in model.named_buffers() if n not in kept and dense(b)}


def dense(x: Any) -> bool:
    """Tell whether a tensor holds plain numbers, whole on this rank."""
    odd = is_lazy(x) or x.is_meta or x.is_nested or x.is_quantized or hasattr(x, "device_mesh")
    return x.layout == torch.strided and not odd


def own_buffers(state: State, given: dict[str, Any]) -> dict[str, Any]:
    """Return what a rank saves of its buffers beside the state dict, for a resumed run to go on with.

    Those that nobody makes the same on all ranks (FSDP2 never does, DDP does with `broadcast_buffers`), and of those that the
    state dict leaves out what is no longer as the program gave it.
    """
    alike = not state.ranks.together or getattr(state.model, "broadcast_buffers", False)
    kept = state.model.state_dict(keep_vars=True).keys()
    found = {
        n: b.detach() for n, b in state.model.named_buffers() if not hasattr(b, "device_mesh") and not (alike and n in kept)
    }
    own = {n: b for n, b in found.items() if n in kept or (dense(b) and not (n in given and torch.equal(b.cpu(), given[n])))}
    clean, here = cleaner(state.model), {n for n, _ in state.model.named_buffers()}
    return {clean(n): b for n, b in {**own, **{n: None for n in given if n not in here}}.items()}


def load_buffers(state: State, saved: dict[str, Any], skip: Container[str] = ()) -> None:
    """Take them back, also into empty places and in other shapes, but for those in `skip`; warn of what finds no place."""
    modules, clean = state.model.named_modules(), cleaner(state.model)
    places = {clean(f"{path}.{n}" if path else n): (m._buffers, n) for path, m in modules for n in m._buffers}
    lost = list[str]()
    with torch.no_grad():
        for name, kept in saved.items():
            place = places.get(name) or places.get(clean(name))  # formats of before have the wrapped model's names
            if place is not None and name not in skip:
                put_buffer(*place, kept, state.device)
            elif place is None and kept is not None:
                lost.append(name)
    if lost:
        warnings.warn(f"the checkpoint holds buffers that the model has no place for, so they begin as the program gives them: "
                      f"{', '.join(sorted(lost)[:8])}", stacklevel=3)  # fmt: skip


def check_gradients(state: State, had: set[Any]) -> None:
    """Raise RuntimeError for parameters that took no part in a step, where ranks would wait for them, or lost a gradient."""
    missing = [p for group in state.optimizer.param_groups for p in group["params"] if p.grad is None and p.requires_grad]
    wrapper: Any = state.model
    sharded = state.ranks.sharded
    may_lack = sharded or getattr(wrapper, "find_unused_parameters", True) or getattr(wrapper, "static_graph", False)
    lost = missing if not may_lack else [p for p in missing if sharded and p in had]
    if lost:
        named = {p: name for name, p in state.model.named_parameters()}
        names = ", ".join([str(named.get(p)) for p in lost][:8])
        if may_lack:
            raise RuntimeError(f"{names} had a gradient in an earlier step and have none in this one: a backward was cut off, "
                               "and fully_shard drops what it had; go on from the last checkpoint (of parts that are left "
                               "out on purpose add 0 * p.sum() to the loss)")  # fmt: skip
        raise RuntimeError(f"{names} took no part in the loss, and the ranks would wait for their gradients: freeze them, or "
                           "wrap with DistributedDataParallel(model, find_unused_parameters=True)")  # fmt: skip
    if sharded and len(missing) < len(state.places):
        had.update(p for group in state.optimizer.param_groups for p in group["params"] if p.grad is not None)
