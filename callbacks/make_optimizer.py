"""make_optimizer: one of torch's optimizers by name, its parameter groups as they should be."""

from __future__ import annotations

import inspect
import math
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from ..loop.decay import decide
from ..loop.groups import regroup

KINDS = ("AdamW", "Adam", "NAdam", "RAdam", "Adamax", "SGD", "RMSprop", "Adagrad", "Adadelta", "Lion")
OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    name.lower(): getattr(torch.optim, name) for name in KINDS if hasattr(torch.optim, name)
} | {"nesterov": torch.optim.SGD}
FUSED = ("AdamW", "Adam", "SGD")  # on a GPU, in every torch from 2.10 on


def make_optimizer(model: nn.Module, name: str, lr: float | Tensor | None = None, weight_decay: float | None = None,
                   **options: Any) -> torch.optim.Optimizer:  # fmt: skip
    """Return a torch optimizer of `name` for the parameters of `model` that require gradients, each held once.

    `name`: "adamw", "adam", "nadam", "radam", "adamax", "sgd", "nesterov" (SGD with it, momentum 0.9 unless given),
    "rmsprop", "adagrad", "adadelta". `lr`, `weight_decay`: None is torch's own default of that optimizer. Biases, norms of
    every kind and parameters with ndim <= 1 do not decay (`WeightDecay`'s rule), so there are at most two groups. `options`
    go to the optimizer; Adam, AdamW and SGD are fused where all parameters lie on a GPU, unless they say `fused` or
    `foreach` (not on the CPU, where the fused form rounds otherwise, nor SGD with momentum, which then takes no layer that is
    unfrozen later). Frozen parameters are left out. Raises TypeError or ValueError, with the names there are, for another name
    or option, and for a model with nothing to train.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, whose modules say what decays, not {type(model).__name__}")
    kind = OPTIMIZERS.get(str(name).lower())
    if not isinstance(name, str) or kind is None:
        near = get_close_matches(str(name).lower(), OPTIMIZERS, 1, 0)
        raise ValueError(f"name must be one of {', '.join(map(repr, OPTIMIZERS))}, not {name!r}; the closest is {near[0]!r}")
    known = [k for k in inspect.signature(kind).parameters if k not in ("params", "lr", "weight_decay")]
    for option, value in options.items():
        if isinstance(value, float) and not math.isfinite(value):  # which torch's own checks let pass for some
            raise ValueError(f"{option} must be finite, not {value!r}")
        if option not in known:
            near = get_close_matches(option, known, 1, 0)
            raise TypeError(
                f"{kind.__name__} has no option {option!r}; the closest is {near[0]!r}, there are {', '.join(known)}"
            )
    if weight_decay is not None and (
        isinstance(weight_decay, bool) or not isinstance(weight_decay, int | float) or not 0 <= weight_decay < math.inf
    ):
        raise ValueError(f"weight_decay must be a finite decay, at least 0, not {weight_decay!r}")
    if not (lr is None or isinstance(lr, Tensor)) and (
        isinstance(lr, bool) or not isinstance(lr, int | float) or not 0 <= lr < math.inf
    ):
        raise ValueError(f"lr must be a finite rate, at least 0, a tensor of one, or None for torch's own default, not {lr!r}")
    if name.lower() == "nesterov":
        if not options.setdefault("nesterov", True):
            raise ValueError("name is 'nesterov' and nesterov=False; name 'sgd' for SGD without it")
        options.setdefault("momentum", 0.9)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError(f"the model, a {type(model).__name__}, has no parameter that requires gradients, so there is nothing to "
                         "optimize")  # fmt: skip
    decay = inspect.signature(kind).parameters["weight_decay"].default if weight_decay is None else weight_decay
    groups = regroup([{"params": parameters, "weight_decay": decay}], {"weight_decay": decide(model, {}, decay, exempt=True)})
    if lr is not None:
        options["lr"] = lr
    # torch's fused momentum fails where a parameter has its first gradient after others, as a layer unfrozen later
    chosen = options.get("momentum") or not options.keys().isdisjoint(("fused", "foreach", "differentiable"))
    if kind.__name__ in FUSED and not chosen and all(p.is_cuda and p.is_floating_point() for p in parameters):
        options["fused"] = True
    options["weight_decay"] = decay
    return kind(groups, **options)
