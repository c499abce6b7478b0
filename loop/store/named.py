"""Weights and optimizer state by qualified parameter name: a checkpoint fits a model, not an order of its layers."""

from __future__ import annotations

import copy
import math
import sys
from collections import OrderedDict
from collections.abc import Callable, Container, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from .adapted import adapted
from .inner import check_inner, silent, together
from .plain import plain
from .sharded import laid

# How a step is computed, not what: the program's own stands, also on another device.
IMPLEMENTATION = ("foreach", "fused", "capturable", "differentiable")


def outsider(group: int, number: int, given: str | None) -> str:
    """Return the name of a tensor that the model does not hold."""
    return f"(not in the model) {given}" if given else f"(group {group}, tensor {number}, not in the model)"


def shape(x: Any) -> Any:
    """Return a tensor's shape, None for one of a lazy module that has none yet."""
    return tuple(x.shape) if isinstance(x, Tensor) and not hasattr(x, "materialize") else None


def cleaner(model: nn.Module) -> Callable[[str], str]:
    """Return what gives a name of the wrapped model as the bare model has it."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")  # without it nothing is compiled, and it is slow to import
    wrappers = {DataParallel: "module.", DistributedDataParallel: "module.",
                getattr(dynamo, "OptimizedModule", None): "_orig_mod."}  # fmt: skip
    found = [(f"{path}." if path else "", part) for path, m in model.named_modules()
             for kind, part in wrappers.items() if kind is not None and isinstance(m, kind)]  # fmt: skip
    wrapped = sorted(found, key=lambda one: len(one[0]), reverse=True)

    def clean(name: str) -> str:
        for path, part in wrapped:  # the innermost first, while the names of those around it still stand
            if name.startswith(path + part):
                name = path + name[len(path + part) :]
        return name

    return clean


class Named:
    """A model and its optimizer, seen by names without what wrappers add (DDP's `module.`, compile's `_orig_mod.`)."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer, self.clean = model, optimizer, cleaner(model)
        fsdp: list[Any] = [module for module in model.modules() if hasattr(module, "set_requires_gradient_sync")]
        for module in fsdp:  # its root is left whole by an evaluation, and has other tensors then than the optimizer
            module.reshard()
        # The smallest name of a tied tensor, whichever was registered first; a tensor that the model does not hold goes by
        # the name that the optimizer was given, or else by its place.
        aliases = {self.clean(name): p for name, p in model.named_parameters(remove_duplicate=False)}
        names = {id(aliases[name]): name for name in sorted(aliases, reverse=True)}
        self.names = [[names.get(id(p)) or outsider(i, j, given) for j, (p, given) in enumerate(
                       zip(g["params"], g.get("param_names") or [None] * len(g["params"]), strict=True))]
                      for i, g in enumerate(optimizer.param_groups)]  # fmt: skip
        self.tensors = {n: p for ns, g in zip(self.names, optimizer.param_groups, strict=True)
                        for n, p in zip(ns, g["params"], strict=True)}  # fmt: skip
        inside = set(names.values())
        self.outside = {name: p for name, p in self.tensors.items() if name not in inside}
        package = type(optimizer).__module__.partition(".")[0]
        self.kind = type(optimizer).__qualname__ if package == "torch" else f"{package}.{type(optimizer).__qualname__}"

    def model_state(self) -> dict[str, Any]:
        """Return the model's state dict under clean names."""
        state = self.model.state_dict()
        found = OrderedDict((self.clean(name), value) for name, value in state.items())
        if versions := getattr(state, "_metadata", None):
            found._metadata = OrderedDict((self.clean(name), value) for name, value in versions.items())  # type: ignore[attr-defined]
        return found

    def layout(self) -> Callable[[str], Any]:
        """Return what gives the tensor that goes by a name here, None where there is none."""
        return {**self.model_state(), **self.tensors}.get

    def options(self) -> list[dict[str, Any]]:
        """Return each group's settings as the program gave them: the rate before a scheduler touched it."""
        return [{k: value(v) for k, v in {**group, "lr": group.get("initial_lr", group.get("lr"))}.items()
                 if k not in ("params", "param_names", *IMPLEMENTATION) and plain(value(v))}
                for group in self.optimizer.param_groups]  # fmt: skip

    def optimizer_state(self) -> dict[str, Any]:
        """Return the optimizer's state dict by names, with the tensors that it holds and the model does not."""
        packed = self._packed()
        groups = [{k: v if k == "params" else kept(v) for k, v in group.items()} for group in packed["param_groups"]]
        by_id = {k: n for ns, g in zip(self.names, groups, strict=True) for n, k in zip(ns, g["params"], strict=True)}
        for names, group in zip(self.names, groups, strict=True):
            group.pop("param_names", None)
            group["params"] = names
        return {
            "kind": self.kind,
            "groups": groups,
            "state": {by_id[k]: v for k, v in packed["state"].items() if k in by_id},
            "loose": {k: v for k, v in packed["state"].items() if k not in by_id},
            "more": {k: v for k, v in packed.items() if k not in ("state", "param_groups")},
            "outside": {name: p.detach() for name, p in self.outside.items()},
            "inner": self._inner_state(),
        }

    def _packed(self) -> dict[str, Any]:
        """Return the optimizer's own state dict; raises ValueError for one that names cannot be given to."""
        packed = self.optimizer.state_dict()
        if lost := [key for key in ("state", "param_groups") if key not in packed]:
            raise ValueError(f"can't save {self.kind}: its state_dict() lacks {' and '.join(map(repr, lost))} and gives "
                             f"{', '.join(map(repr, packed))}; have it give both as torch.optim.Optimizer's does, of all its "
                             "parameter groups, and whatever else it keeps beside them, and load_state_dict take that")  # fmt: skip
        return packed

    def _inner_state(self) -> dict[str, Any]:
        """Return the state of optimizers inside that the state dict leaves out; their groups are the outer one's."""
        found = {}
        for path, one in silent(self.optimizer).items():
            if one.state is not self.optimizer.state and (
                any(one.state.values()) or type(one).state_dict is not torch.optim.Optimizer.state_dict
            ):
                check_inner(self.kind, self.optimizer, path, one)
                state = Named(self.model, one).optimizer_state()
                found[path] = {**state, "groups": [{"params": group["params"]} for group in state["groups"]]}
        return found

    def model_misfits(self, saved: dict[str, Any]) -> dict[str, str]:
        """Return, by name, what of a saved model can't be loaded into this one."""
        mine = self.model_state()
        found = {n: f"{n} is missing in the checkpoint, and {shape(mine[n])} here" for n in mine if n not in saved}
        found |= {n: f"{n} is in the checkpoint alone, as {shape(saved[n])}" for n in saved if n not in mine}
        other = dict[str, str]()
        for name in mine.keys() & saved.keys():
            here, there = shape(mine[name]), shape(saved[name])
            if here is not None and here != there:
                other[name] = f"{name} is {here} here and {there} in the checkpoint"
        taken = adapted(self.model, self.clean, other, saved) if other else ()
        found |= {name: text for name, text in other.items() if name not in taken}
        return {name: found[name] for name in sorted(found)}

    def rounded(self, saved: dict[str, Any]) -> dict[str, str]:
        """Return, by name, what can be loaded only in another type than it was saved in."""
        both = {n: (x, saved[n]) for n, x in self.model_state().items() if n in saved}
        both = {n: (x, y) for n, (x, y) in both.items() if isinstance(x, Tensor) and isinstance(y, Tensor)}
        return {n: f"{n} is {x.dtype} here and {y.dtype} in the checkpoint" for n, (x, y) in both.items() if x.dtype != y.dtype}

    def _counterparts(self, saved: dict[str, Any]) -> list[int | None]:
        """Return for each group the saved one that shares most of its parameters, None where none shares any."""
        there = [set(group["params"]) for group in saved["groups"]]
        shared = [[len(group & set(names)) for group in there] for names in self.names]
        return [counts.index(max(counts)) if any(counts) else None for counts in shared]

    def optimizer_misfits(self, saved: dict[str, Any], before: list[dict[str, Any]], now: list[dict[str, Any]],
                          skip: Container[str] = ()) -> list[str]:  # fmt: skip
        """Return what of a saved optimizer does not fit; `before` and `now`: settings as the two programs gave them."""
        if self.kind != saved["kind"]:
            return [f"the optimizer is {self.kind} here and {saved['kind']} in the checkpoint"]
        mine = {path: Named(self.model, one).kind for path, one in silent(self.optimizer).items()}
        others = [f"the optimizer has {mine.get(path, 'none')} in {path} here and {one['kind']} in the checkpoint"
                  for path, one in saved.get("inner", {}).items() if mine.get(path) != one["kind"]]  # fmt: skip
        there = {name: i for i, group in enumerate(saved["groups"]) for name in group["params"]}
        here = {name: i for i, names in enumerate(self.names) for name in names}
        found = others + [f"the optimizer holds {name} {where} alone"
                 for one, other, where in ((here, there, "here"), (there, here, "in the checkpoint"))
                 for name in one if name not in other and name not in skip]  # fmt: skip
        found += [f"{name} is in parameter group {i} here and {there[name]} in the checkpoint" for name, i in here.items()
                  if there.get(name, i) != i]  # fmt: skip
        found += [f"{name} is {shape(p)} here and {shape(saved['outside'][name])} in the checkpoint"
                  for name, p in self.outside.items() if shape(saved["outside"].get(name, p)) != shape(p)]  # fmt: skip
        if len(before) != len(now):
            found.append(f"the optimizer has {len(now)} parameter groups here and {len(before)} in the checkpoint")
        for i, j in enumerate(self._counterparts(saved)):
            old, new = before[j] if j is not None and j < len(before) else {}, now[i]
            found += [f"{option} of parameter group {i} is {new[option]!r} here and {old[option]!r} in the checkpoint's program"
                      for option in changed(old, new)]  # fmt: skip
            if structural(old, new):
                found.append(f"so the optimizer's state of parameter group {i} would begin anew")
        return found

    def load_model(self, saved: dict[str, Any], skip: Container[str] = ()) -> None:
        """Load weights and buffers, but for those in `skip`."""
        mine = self.model.state_dict()
        # A module may take what is no tensor as it is, and go on in what is saved.
        held = {n: saved[c] for n in mine if (c := self.clean(n)) in saved and c not in skip}
        fits = OrderedDict((n, laid(x, mine[n]) if isinstance(x, Tensor) else copy.deepcopy(x)) for n, x in held.items())
        fits._metadata = getattr(mine, "_metadata", None)  # type: ignore[attr-defined]
        self.model.load_state_dict(fits, strict=False)

    def load_optimizer(self, saved: dict[str, Any], before: list[dict[str, Any]], now: list[dict[str, Any]],
                       skip: Iterable[str] = (), rounded: Container[str] = ()) -> None:  # fmt: skip
        """Load state by name, but for those in `skip`, and settings by group, but for those that the program changed.

        `rounded`: parameters that are of another type now, whose state is rounded with them.
        """
        packed, groups = self._packed(), self.optimizer.param_groups
        wrapped = silent(self.optimizer)
        alike = [one for one in wrapped.values() if one.state is self.optimizer.state]
        lists = [(one, [*one.param_groups]) for one in (self.optimizer, *wrapped.values())] if wrapped else []
        rates = [group["lr"] for group in groups]
        ids = {name: k for names, g in zip(self.names, packed["param_groups"], strict=True)
               for name, k in zip(names, g["params"], strict=True)}  # fmt: skip
        outside = {name: p for name, p in self.outside.items() if shape(saved["outside"].get(name)) == shape(p)}
        skip = {*skip, *(self.outside.keys() - outside.keys())}
        for i, j in enumerate(self._counterparts(saved)):
            if j is not None:
                old, new = before[j] if j < len(before) else {}, now[i]
                own = {"params", "param_names", *IMPLEMENTATION, *changed(old, new)}
                mine = packed["param_groups"][i]
                mine.update({k: like(v, mine.get(k, v)) for k, v in saved["groups"][j].items() if k not in own})
                skip |= set(self.names[i]) if structural(old, new) else set()
        theirs = {
            name: laid(one, self.tensors[name]) for name, one in saved["state"].items() if name in ids and name not in skip
        }
        state = {ids[name]: one for name, one in theirs.items()}
        self.optimizer.load_state_dict({**packed, **saved["more"], "state": {**packed["state"], **saved["loose"], **state}})
        taken = self.optimizer.state_dict()["state"]  # what one that wraps another gives is the inner one's state
        for name, one in theirs.items():
            held = self.optimizer.state.get(self.tensors[name]) or taken.get(ids[name], {})
            if lost := one.keys() - held.keys():
                raise ValueError(f"load_state_dict of {self.kind} did not take {', '.join(sorted(map(str, lost)))} of {name}, "
                                 "which its state_dict gave")  # fmt: skip
            if name not in rounded:
                held.update(unrounded(held, one))
        for path, inside in saved.get("inner", {}).items():
            if path in wrapped and (one := Named(self.model, wrapped[path])).kind == inside["kind"]:
                none: list[dict[str, Any]] = [{}] * len(one.names)
                one.load_optimizer(inside, none, none, skip, rounded)
        together(self.optimizer, lists, alike)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            if isinstance(rate, Tensor):  # a captured step reads this very tensor
                group["lr"] = rate.copy_(torch.as_tensor(group["lr"]))
            elif isinstance(group["lr"], Tensor):
                group["lr"] = group["lr"].tolist()
        with torch.no_grad():
            for name, p in outside.items():
                p.copy_(laid(saved["outside"][name], p))


def changed(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return the settings in which two programs differ, but for the rounding of a rate that one of them keeps as a tensor."""
    return sorted(k for k in new.keys() & old.keys() if new[k] != old[k] and not (
        isinstance(new[k], float) and isinstance(old[k], float) and math.isclose(new[k], old[k], rel_tol=1e-6)))  # fmt: skip


def structural(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Tell whether a setting was turned on or off, so that the optimizer keeps other state than it did."""
    return any(k not in ("lr", "initial_lr", "weight_decay") and bool(old[k]) != bool(new[k]) for k in changed(old, new))


def unrounded(held: Any, exact: Any) -> Any:
    """Return loaded optimizer state in the types in which it was saved: torch rounds it to the parameter's."""
    if isinstance(exact, Tensor):
        return exact.to(held.device) if isinstance(held, Tensor) and held.dtype != exact.dtype else held
    if isinstance(exact, dict):
        return {key: unrounded(held[key], one) for key, one in exact.items()}
    if isinstance(exact, list | tuple):
        return type(exact)(unrounded(a, b) for a, b in zip(held, exact, strict=True))
    return held


def value(x: Any) -> Any:
    """Return settings as plain numbers, in lists, so that they compare."""
    if isinstance(x, Tensor) or type(x).__module__ == "numpy":
        return x.tolist()
    return [value(v) for v in x] if isinstance(x, list | tuple) else x


def kept(x: Any) -> Any:
    """Return settings to be saved: tensors, lists and tuples as they are, NumPy's numbers as plain ones."""
    if isinstance(x, list | tuple):
        return (list if isinstance(x, list) else tuple)(map(kept, x))
    return x.tolist() if type(x).__module__ == "numpy" else x


def like(x: Any, mine: Any) -> Any:
    """Return a saved setting as a tensor where the program has one, also inside of a list or tuple: a step rounds by its type."""
    if isinstance(x, list | tuple) and isinstance(mine, list | tuple) and len(x) == len(mine):
        return type(x)(like(a, b) for a, b in zip(x, mine, strict=True))
    if isinstance(mine, Tensor) and isinstance(x, Tensor | float | int):
        return torch.as_tensor(x, dtype=mine.dtype, device=mine.device)
    return x
