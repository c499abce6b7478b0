"""What a torchmetric holds, with the metrics that it is made of: kept, put back, joined over ranks."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch

from ..loop.batch import move

if TYPE_CHECKING:
    from torchmetrics import Metric


def parts(metric: Metric) -> dict[str, Metric]:
    """Return a metric and those inside it, as in arithmetic on metrics and in wrappers, by their names there."""
    from torchmetrics import Metric

    return {name: part for name, part in metric.named_modules() if isinstance(part, Metric)}


def counts(metric: Metric) -> dict[str, dict[str, int]]:
    """Return the private whole numbers of a metric and those inside it: what they count, and what they were given."""
    return {
        name: {key: n for key, n in vars(part).items() if key.startswith("_") and type(n) is int}
        for name, part in parts(metric).items()
    }


def fed(metric: Metric, given: dict[str, dict[str, int]]) -> bool:
    """Tell whether anything was put in since the last reset, which leaves what arithmetic itself counts as it was.

    A window counts in a number of its own, and nothing where torchmetrics does: so does one that is not as it was `given`.
    """
    from torchmetrics.metric import CompositionalMetric

    mine, now = parts(metric), counts(metric)
    return any(n and (key == "_update_count" or n != given.get(name, {}).get(key))
               for name in mine if not isinstance(mine[name], CompositionalMetric) for key, n in now[name].items())  # fmt: skip


def held(metric: Metric, given: dict[str, dict[str, int]]) -> dict[str, list[Any]]:
    """Return what a metric and those inside it hold, how often each was fed, and where in its window it stands.

    `given`: their `counts` before; one that is as it was then may be a setting, which the program gives.
    """
    now = counts(metric)
    return {name: [dict(part.metric_state), {key: n for key, n in now[name].items()
                                             if key == "_update_count" or n != given.get(name, {}).get(key)}]
            for name, part in parts(metric).items()}  # fmt: skip


def by_part(saved: Any) -> dict[str, list[Any]]:
    """Return what was kept, also where only of the metric itself: its state, and how often it was fed."""
    return saved if isinstance(saved, dict) else {"": [saved[0], {"_update_count": saved[1]}]}


def put_back(what: str, metric: Metric, saved: Any, given: dict[str, dict[str, int]]) -> None:
    """Take back what `held` gave, beside what they were `given`; raises ValueError for what a metric of other parts gave."""
    mine = parts(metric)
    if isinstance(saved, dict) and saved.keys() != mine.keys():
        raise ValueError(f"the training metric {what} is made of {built(mine)} here and of {built(saved)} in the checkpoint")
    for name, (state, counted) in by_part(saved).items():
        for key, value in {**move(state, mine[name].device), **given.get(name, {}), **counted}.items():
            setattr(mine[name], key, value)


def built(names: Any) -> str:
    """Return the names of parts as text."""
    return ", ".join([name or "itself" for name in names])


def joined(what: str, metric: Metric, saved: list[Any], first: bool) -> dict[str, list[Any]]:
    """Return what all ranks' held, for the first; the others begin with nothing."""
    found: dict[str, list[Any]] = {}
    every = [by_part(each) for each in saved]
    for name, part in parts(metric).items():
        if ranks := [each[name] for each in every if name in each]:
            called = {key: f"{what}, whose {name}{name and '.'}{key}" for key in part._reductions}
            state = {key: together(called[key], [rank[0][key] for rank in ranks], reduce)
                     for key, reduce in part._reductions.items()}  # fmt: skip
            if not first:
                state = {key: nothing(called[key], state[key], copy.deepcopy(default), part._reductions[key])
                         for key, default in part._defaults.items()}  # fmt: skip
            counted = {key: [rank[1][key] for rank in ranks if key in rank[1]] for one in ranks for key in one[1]}
            # places in a window are those of each rank, and only how often it was fed adds up
            numbers = {key: sum(each) if key == "_update_count" else max(each) for key, each in counted.items()}
            found[name] = [state, numbers]
    return found


def together(what: str, parts: list[Any], reduce: Any) -> Any:
    """Return a metric's state over all ranks; raises ValueError for one that could not be told from a single rank's."""
    if isinstance(parts[0], list):  # what is concatenated may be single numbers, and has a dimension then
        return [torch.atleast_1d(x) if concatenated(reduce) else x for part in parts for x in part]
    if getattr(reduce, "__name__", "") not in ("dim_zero_sum", "dim_zero_max", "dim_zero_min"):
        raise ValueError(f"another number of ranks can't take up the training metric {what} is no sum; resume with as many")
    return reduce(torch.stack(parts))


def nothing(what: str, of_first: Any, default: Any, reduce: Any) -> Any:
    """Return what a rank beside the first begins with; raises ValueError for what could not be sent beside the first's."""
    if not isinstance(of_first, list) or not of_first:
        return default
    if not concatenated(reduce):  # sent one by one, so that all ranks would need as many
        raise ValueError(f"several ranks can't take up the training metric {what} is a list; resume with as many, or with one")
    return [of_first[0][:0]]


def concatenated(reduce: Any) -> bool:
    """Tell whether a list is sent to the other ranks as one tensor."""
    return getattr(reduce, "__name__", "") == "dim_zero_cat"
