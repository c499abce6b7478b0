"""What the parameter groups of an optimizer hold, as rows and as a table."""

import re
from typing import Any

import torch
from torch.nn.parameter import UninitializedParameter as lazy


def fold(names: list[str]) -> str:
    """Join names that differ in their first number only: h.0.weight and h.1.weight give h.{0,1}.weight."""
    found: dict[tuple[str, str], list[str]] = {}
    for head, number, tail in (re.findall(r"^(?:(.*?\.)??(\d+)(?=\.|$))?(.*)", name)[0] for name in names):
        found.setdefault((head, tail), []).append(number)
    return ", ".join(a + (f"{{{','.join(n)}}}" if n[0] and n[1:] else n[0]) + b for (a, b), n in found.items())


def describe(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> list[dict[str, Any]]:
    """Return one row a parameter group, its names folded; reading a rate that lies on a device waits for it."""
    names, groups = {p: name for name, p in model.named_parameters()}, optimizer.param_groups
    return [{"group": i, "lr": float(g["lr"]), "weight_decay": g.get("weight_decay"), "tensors": len(g["params"]),
             "parameters": sum(0 if isinstance(p, lazy) else p.numel() for p in g["params"]),
             "names": fold([names.get(p, "(not in the model)") for p in g["params"]])}
            for i, g in enumerate(groups)]  # fmt: skip


def as_text(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    cells = [[f"{v:.6g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in [list(rows[0]), ["---"] * len(rows[0]), *cells])


def put(group: dict[str, Any], settings: dict[str, Any]) -> None:
    """Write settings into a group; a tensor is filled in place, since a captured step reads it."""
    for name, value in settings.items():
        if isinstance(group.get(name), torch.Tensor):
            group[name].copy_(value)
        else:
            group[name] = value
