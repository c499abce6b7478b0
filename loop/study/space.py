"""What a search chooses from: lists, ranges, and settings that exist only beside others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

LARGEST = 2.0**1023  # of a range's ends, so that its width is a number too
Settings = dict[str, Any]  # flat: "optimizer.rate" for {"optimizer": {"rate": ...}}


@dataclass(frozen=True)
class Choice:
    """One of these values."""

    values: tuple[Any, ...]

    def suggest(self, trial: Any, name: str) -> Any:
        """Ask a trial for one."""
        return trial.suggest_categorical(name, self.values)


@dataclass(frozen=True)
class Range:
    """A number from `low` to `high`: even in itself, or with `log` in its logarithm; `step`: whole multiples of it."""

    low: float
    high: float
    log: bool = False
    step: int | None = None

    def suggest(self, trial: Any, name: str) -> Any:
        """Ask a trial for one."""
        if self.step is not None:
            return trial.suggest_int(name, int(self.low), int(self.high), step=self.step)
        return trial.suggest_float(name, self.low, self.high, log=self.log)

    @property
    def values(self) -> tuple[Any, ...]:
        """All there are of a whole number; raises ValueError for a continuous range."""
        if self.step is None:
            raise ValueError("is a continuous range, of which a grid has no points; give a list of values, or method='random'")
        return tuple(range(int(self.low), int(self.high) + 1, self.step))


@dataclass(frozen=True)
class When:
    """A setting that exists only where another one has a value."""

    name: str
    value: Any
    what: Any


def uniform(low: float, high: float) -> Range:
    """A number from `low` to `high`, each as likely as any; raises ValueError for what is no range."""
    return Range(*bounds(low, high, -LARGEST))


def log_uniform(low: float, high: float) -> Range:
    """A number from `low` to `high`, each order of magnitude as likely as any, for rates and decays; `low` is above 0."""
    return Range(*bounds(low, high, 0.0), log=True)


def integers(low: int, high: int, multiple_of: int = 1) -> Range:
    """A whole number from `low` to `high`, both included, or only multiples of `multiple_of`, for batch sizes."""
    for name, value in (("low", low), ("high", high), ("multiple_of", multiple_of)):
        if isinstance(value, bool) or not isinstance(value, int) or (name == "multiple_of" and value < 1):
            raise ValueError(f"{name} must be a whole number{', at least 1' * (name == 'multiple_of')}, not {value!r}")
    first, last = -(-low // multiple_of) * multiple_of, high // multiple_of * multiple_of
    if first > last:
        raise ValueError(f"integers({low}, {high}, multiple_of={multiple_of}) holds no number; give a wider range")
    return Range(first, last, step=multiple_of)


def when(name: str, value: Any, what: Any) -> When:
    """`what` (a list, a range or a dict of them), where the setting `name` is `value`, and elsewhere no such setting.

    `name` is a key of the space, "optimizer.kind" for one inside another dict. (`{"optimizer": ["adamw", "sgd"], "momentum":
    when("optimizer", "sgd", [0.9, 0.99])}`)
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"name must be that of a setting, not {name!r}")
    return When(name, value, what)


def bounds(low: Any, high: Any, above: float) -> tuple[float, float]:
    """Return them as floats; raises ValueError for what is no range."""
    for name, value in (("low", low), ("high", high)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not above < value < LARGEST:
            raise ValueError(f"{name} must be a finite number{' above 0' * (above == 0)}, not {value!r}")
    if not low < high:
        raise ValueError(f"low must be below high, not {low!r} and {high!r}; a list of one value is a constant")
    return float(low), float(high)


class Space:
    """A space that was checked: what each setting may be, those first on which others hang."""

    def __init__(self, space: Any) -> None:
        if not isinstance(space, Mapping) or not space:
            raise ValueError(f"space must map names of settings to lists or ranges, and hold at least one, not {space!r:.60}")
        self.axes: dict[str, Choice | Range] = {}
        self.conditions: dict[str, list[tuple[str, Any]]] = {}
        self._add(space, "", [])
        done: dict[str, None] = {}
        while len(done) < len(self.axes):
            ready = [n for n in self.axes if n not in done and all(name in done for name, _ in self.conditions[n])]
            if not ready:
                odd = next(n for n in self.axes if n not in done)
                raise ValueError(f"space[{odd!r}] hangs on {self.conditions[odd][0][0]!r}, which is no setting that stands without "
                                 f"it; there are {', '.join(self.axes)}")  # fmt: skip
            done |= dict.fromkeys(ready)
        self.axes = {name: self.axes[name] for name in done}
        for name, hangs in self.conditions.items():
            for other, value in hangs:
                axis = self.axes[other]
                if isinstance(axis, Range) and axis.step is None:
                    raise ValueError(f"space[{name!r}] exists when {other!r} is {value!r}, and that is a continuous range; give a "
                                     "list or integers(...) there")  # fmt: skip
                if value not in axis.values:
                    raise ValueError(f"space[{name!r}] exists when {other!r} is {value!r}, which it never is")

    def _add(self, space: Mapping[str, Any], prefix: str, hangs: list[tuple[str, Any]]) -> None:
        for key, what in space.items():
            if not isinstance(key, str) or not key or "." in key:
                raise ValueError(f"space must name settings by strings without a dot, not {key!r}")
            self._take(prefix + key, what, hangs)

    def _take(self, name: str, what: Any, hangs: list[tuple[str, Any]]) -> None:
        if isinstance(what, When):
            self._take(name, what.what, [*hangs, (what.name, what.value)])
        elif isinstance(what, Mapping):
            if not what:
                raise ValueError(f"space[{name!r}] is empty; give it settings, or leave it out")
            self._add(what, f"{name}.", hangs)
        else:
            self.axes[name], self.conditions[name] = axis(name, what), hangs

    def exists(self, name: str, settings: Mapping[str, Any]) -> bool:
        """Tell whether a setting exists beside these."""
        return all(other in settings and settings[other] == value for other, value in self.conditions[name])

    def suggest(self, trial: Any) -> Settings:
        """Return a trial's settings."""
        found = Settings()
        for name, what in self.axes.items():
            if self.exists(name, found):
                found[name] = what.suggest(trial, name)
        return found

    def points(self) -> Iterator[Settings]:
        """Go through all points of a grid, each once."""
        for name, what in self.axes.items():
            try:
                _ = what.values
            except ValueError as error:
                raise ValueError(f"space[{name!r}] {error}") from None
        yield from self._beyond({}, list(self.axes))

    def _beyond(self, found: Settings, names: list[str]) -> Iterator[Settings]:
        while names and not self.exists(names[0], found):
            names = names[1:]
        if not names:
            yield found
            return
        for value in self.axes[names[0]].values:
            yield from self._beyond({**found, names[0]: value}, names[1:])

    def text(self) -> list[str]:
        """Return each setting's law in words, in the order in which they are drawn, which tells one space from another."""
        return [f"{name}: {what!r} {self.conditions[name] or ''}".strip() for name, what in self.axes.items()]


def axis(name: str, what: Any) -> Choice | Range:
    """Return what one setting may be; raises ValueError or TypeError for what is none."""
    if isinstance(what, Range):
        return what
    if not isinstance(what, list | tuple):
        raise TypeError(f"space[{name!r}] must be a list of values, a range such as log_uniform(1e-5, 1e-1), a dict of settings, "
                        f"or when(...), not {what!r:.60}")  # fmt: skip
    if not what:
        raise ValueError(f"space[{name!r}] is an empty list; give it values")
    for value in what:
        if not (value is None or isinstance(value, bool | int | float | str)) or value != value:
            raise TypeError(f"space[{name!r}] holds {value!r:.60}; a value must be a number, a string, True, False or None, that a "
                            "file can hold: give names, and look up what they stand for in train")  # fmt: skip
    if len({*what}) < len(what):
        raise ValueError(f"space[{name!r}] holds a value twice: {list(what)!r}; 1, 1.0 and True are equal to Python, and no record "
                         "could tell them apart: give names")  # fmt: skip
    return Choice(tuple(what))


def nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return flat settings as the space had them: "a.b" inside "a"."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        *path, last = name.split(".")
        place = found
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    return found
