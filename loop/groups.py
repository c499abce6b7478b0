"""The parameter groups of an optimizer: what they hold, as rows and as a table, and how they are split and joined."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedParameter as lazy

from .store import inner

if TYPE_CHECKING:
    from .state import State

Group = dict[str, Any]


def fold(names: list[str]) -> str:
    """Join names that differ in their first number only: h.0.weight and h.1.weight give h.{0,1}.weight."""
    found: dict[tuple[str, str], list[str]] = {}
    for head, number, tail in (re.findall(r"^(?:(.*?\.)??(\d+)(?=\.|$))?(.*)", name)[0] for name in names):
        found.setdefault((head, tail), []).append(number)
    return ", ".join(a + (f"{{{','.join(n)}}}" if n[0] and n[1:] else n[0]) + b for (a, b), n in found.items())


def describe(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> list[dict[str, Any]]:
    """Return one row a parameter group, its names folded; reading a rate that lies on a device waits for it."""
    names, groups = {p: name for name, p in model.named_parameters()}, optimizer.param_groups
    return [{"group": i, "lr": None if g["lr"] is None else float(g["lr"]),
             "weight_decay": g.get("weight_decay"), "tensors": len(g["params"]),
             "parameters": sum(0 if isinstance(p, lazy) else p.numel() for p in g["params"]),
             "names": fold([names.get(p, "(not in the model)") for p in g["params"]])}
            for i, g in enumerate(groups)]  # fmt: skip


def as_text(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    cells = [[f"{v:.6g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in [list(rows[0]), ["---"] * len(rows[0]), *cells])


def own_rates(optimizer: torch.optim.Optimizer) -> None:
    """Give each group a tensor of its own: torch gives all of them the one it got, which each factor would meet again."""
    shared = set[int]()
    for group in optimizer.param_groups:
        if id(group["lr"]) in shared:
            group["lr"] = group["lr"].clone()
        if isinstance(group["lr"], torch.Tensor):
            shared.add(id(group["lr"]))


def put(group: dict[str, Any], settings: dict[str, Any]) -> None:
    """Write settings into a group; a tensor is filled in place, since a captured step reads it."""
    for name, value in settings.items():
        if isinstance(group.get(name), torch.Tensor):
            group[name].copy_(torch.as_tensor(value))
        else:
            group[name] = value


def regroup(groups: list[Group], changes: Mapping[str, Mapping[Tensor, Any]], places: Mapping[Tensor, int] = {}) -> list[Group]:
    """Return the groups split by new settings and those with equal ones joined; what `changes` lacks keeps its group's.

    `places`: parameter -> where it stood at first. Groups and what they hold stand in that order, so that of several
    callbacks that split them any may come first.
    """
    new: dict[Any, Group] = {}
    found = [(places.get(p, len(places)), p, i, group) for group in groups for i, p in enumerate(group["params"])]
    for p, i, group in {p: (p, i, group) for _, p, i, group in sorted(found, key=lambda one: one[0])}.values():
        lists = [k for k in ("params", "param_names") if k in group]
        own = {k: v for k, v in group.items() if k not in lists} | {k: new[p] for k, new in changes.items() if p in new}
        values = {k: str(v.tolist()) if isinstance(v, Tensor) else v for k, v in sorted(own.items())}
        equal = tuple((k, v if isinstance(v, Hashable) else id(v)) for k, v in values.items())
        if equal not in new:
            # two groups that shared a rate's tensor would each scale it
            taken = {id(v) for g in new.values() for v in g.values()}
            settings = {k: v.clone() if isinstance(v, Tensor) and id(v) in taken else v for k, v in sorted(own.items())}
            new[equal] = {**{k: [] for k in lists}, **settings}
        for k in lists:
            new[equal][k].append(group[k][i])
    return list(new.values())


def set_groups(state: State, changes: Mapping[str, Mapping[Tensor, Any]]) -> None:
    """Give parameters other settings; raises ValueError where a scheduler was built on what would change."""
    groups = state.optimizer.param_groups
    new = regroup(groups, changes, state.places)
    moved = "lr" in changes or [set(group["params"]) for group in groups] != [set(group["params"]) for group in new]
    if moved and not state.layer_rates and any("initial_lr" in group for group in groups):
        raise ValueError("a scheduler was built on these groups; build it as Schedule(lambda optimizer, total_steps: ...). (Or an "
                         "earlier Loop's LayerwiseRate set their rates: then build the optimizer anew.)")  # fmt: skip
    for path, one in inner(state.optimizer).items():
        if one.param_groups is not groups and any(group is mine for group in groups for mine in one.param_groups):
            kind = f"{type(state.optimizer).__name__} keeps a {type(one).__name__} in {path}"
            raise ValueError(f"{kind}, whose list of parameter groups is another than its own and would hold on to those that are "
                             f"split now; have both hold one list, or give the groups these settings yourself")  # fmt: skip
    groups[:] = new
    state.layer_rates |= {p: r.clone() if isinstance(r, Tensor) else r for p, r in changes.get("lr", {}).items()}


def check_rated(optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer that sets its rates by itself, which nothing can scale or schedule."""
    if any(group["lr"] is None for group in optimizer.param_groups):
        raise ValueError(f"{type(optimizer).__name__} sets its rates by itself (lr=None), so they can't be scaled, scheduled or "
                         "handed on; give it lr= (transformers' Adafactor: lr=1e-3, relative_step=False), or leave out what "
                         "would")  # fmt: skip


def check_readable(optimizer: torch.optim.Optimizer) -> None:
    """Refuse rates that can't be followed in each update."""
    check_rated(optimizer)
    if any(isinstance(group["lr"], Tensor) for group in optimizer.param_groups):
        raise ValueError("DecaySchedule('rate') would read rates that are tensors in each update; give lr as a number, or "
                         "take another schedule")  # fmt: skip


def check_decays(optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer without weight decay."""
    if any("weight_decay" not in group for group in optimizer.param_groups):
        raise ValueError(f"{type(optimizer).__name__} has no weight_decay; take an optimizer that has one, such as AdamW")
