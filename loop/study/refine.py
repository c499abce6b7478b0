"""A finer space around the best of a search: coarse first, fine second."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ..checks import whole
from .searched import Searched
from .space import Choice, Range, Space, When


def refine(found: Searched, space: Mapping[str, Any], keep: int = 5) -> dict[str, Any]:
    """Return the space that a second search goes through: around the best `keep` trials of the first, more finely.

    A range shrinks to what the best lie in, and on either side to their mean distance beyond that (a twentieth of the range at
    least), never beyond the first one's ends. A list of numbers becomes the best values, the values between these, and the
    midpoints to their neighbours, geometric where all are above 0. A list of anything else, or on whose values other settings
    hang, keeps what is among the best; what hangs on a value that is gone goes with it. A setting that none of the best has
    stays as it was otherwise. Raises ValueError for a search of another space, RuntimeError for one without a complete trial.
    """
    whole("keep", keep, 1, none=False)
    if not isinstance(found, Searched):
        raise TypeError(f"found must be what search returned, not {found!r:.60}")
    checked, best = Space(space), [found.best, *found.ranked[1:keep]]
    if odd := sorted({name for row in best for name in row.settings} - checked.axes.keys()):
        raise ValueError(f"space has no {odd[0]!r}, which the search had; give the space that was searched")
    named = {other for hangs in checked.conditions.values() for other, _ in hangs}
    finer: dict[str, Choice | Range] = {}
    for name, axis in checked.axes.items():
        values = [row.settings[name] for row in best if name in row.settings]
        if odd := [v for v in values if not holds(axis, v)]:
            raise ValueError(
                f"space[{name!r}] does not hold {odd[0]!r}, which the search had; give the space that was searched"
            )
        if all(other in finer and value in finer[other].values for other, value in checked.conditions[name]):
            finer[name] = (axis if not values else narrowed(axis, values) if isinstance(axis, Range)
                           else among(axis, values, name in named))  # fmt: skip
    return rebuilt(space, "", finer)  # type: ignore[no-any-return]


def holds(axis: Choice | Range, value: Any) -> bool:
    """Tell whether a setting may be this."""
    if isinstance(axis, Choice) or axis.step is not None:
        return value in axis.values
    return isinstance(value, int | float) and axis.low <= value <= axis.high


def narrowed(axis: Range, values: Sequence[float]) -> Range:
    """Return a range around these values."""
    to, back = (math.log, math.exp) if axis.log else (float, float)
    places, low, high = [to(v) for v in values], to(axis.low), to(axis.high)
    margin = max((max(places) - min(places)) / max(1, len(places) - 1), (high - low) / 20)
    low, high = max(low, min(places) - margin), min(high, max(places) + margin)
    if axis.step is None:
        return Range(max(axis.low, back(low)), min(axis.high, back(high)), axis.log)
    step = axis.step
    return Range(int(axis.low + (low - axis.low) // step * step), int(axis.low - (axis.low - high) // step * step), step=step)


def among(axis: Choice, values: Sequence[Any], named: bool) -> Choice:
    """Return a list around these values, or of these values alone where they are no numbers, or conditions name them."""
    if named or any(isinstance(v, bool) or not isinstance(v, int | float) for v in axis.values):
        return Choice(tuple(v for v in axis.values if v in values))
    ordered = sorted(axis.values)
    first, last = ordered.index(min(values)), ordered.index(max(values))
    near: list[Any] = ordered[max(0, first - 1) : last + 2]
    middle = statistics.geometric_mean if near[0] > 0 else statistics.fmean
    between = [middle([a, b]) for a, b in itertools.pairwise(near)]
    if all(isinstance(v, int) for v in near):
        between = [round(v) for v in between]
    inside = [v for v in near if min(values) <= v <= max(values)]
    return Choice(tuple(sorted({*inside, *between})))


def rebuilt(space: Any, name: str, finer: Mapping[str, Any]) -> Any:
    """Return a space of the same shape with these axes."""
    if isinstance(space, When):
        return When(space.name, space.value, rebuilt(space.what, name, finer))
    if isinstance(space, Mapping):
        inside = {key: (f"{name}.{key}".lstrip("."), what) for key, what in space.items()}
        return {key: rebuilt(what, at, finer) for key, (at, what) in inside.items() if any(part(axis, at) for axis in finer)}
    axis = finer[name]
    return list(axis.values) if isinstance(axis, Choice) else axis


def part(name: str, whole: str) -> bool:
    """Tell whether a setting is this one, or in it."""
    return f"{name}.".startswith(f"{whole}.")
