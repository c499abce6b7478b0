"""The same training over several seeds: how far a metric spreads, and whether two settings differ by more than chance."""

from __future__ import annotations

import inspect
import math
import operator
import statistics
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..checks import say
from ..goal import number
from ..state import State


@dataclass(frozen=True)
class Sample:
    """A metric's value for each seed, of one setting."""

    name: str
    seeds: tuple[int, ...]
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean over seeds."""
        return statistics.fmean(self.values)

    @property
    def std(self) -> float:
        """The standard deviation over seeds, with n - 1."""
        return statistics.stdev(self.values)

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Return the confidence interval of the mean, by Student's t."""
        if not self.std:
            return self.mean, self.mean
        low, high = stats().ttest_1samp(self.values, 0.0).confidence_interval(level)
        return float(low), float(high)


@dataclass(frozen=True)
class Difference:
    """How far two settings' means are apart (`b` less `a`), and whether that is more than chance (Welch 1947)."""

    a: Sample
    b: Sample

    @property
    def value(self) -> float:
        """The difference of the means."""
        return self.b.mean - self.a.mean

    @property
    def p(self) -> float:
        """The chance of a difference at least this large, either way, where there is none."""
        if not (self.a.std or self.b.std):
            return float(self.value == 0)
        return float(self._welch().pvalue)

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Return the confidence interval of the difference."""
        if not (self.a.std or self.b.std):
            return self.value, self.value
        low, high = self._welch().confidence_interval(level)
        return float(low), float(high)

    def _welch(self) -> Any:
        return stats().ttest_ind(self.b.values, self.a.values, equal_var=False)


@dataclass(frozen=True)
class Repeats:
    """One Sample a setting; printed as a Markdown table, each setting after the first with its difference from the first."""

    metric: str
    samples: tuple[Sample, ...]

    def __getitem__(self, name: str) -> Sample:
        found = {sample.name: sample for sample in self.samples}
        if name not in found:
            raise KeyError(f"no setting is named {name!r}; there are: {', '.join(found)}")
        return found[name]

    def difference(self, a: str, b: str) -> Difference:
        """Return how far `b` is above `a`."""
        return Difference(self[a], self[b])

    def __str__(self) -> str:
        heads = (
            cell(self.metric),
            "seeds",
            "mean",
            "standard deviation",
            "95% interval",
            "difference",
            "its 95% interval",
            "p (Welch)",
        )
        lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        for sample in self.samples:
            low, high = sample.interval()
            name, count = cell(sample.name), str(len(sample.seeds))
            cells = [name, count, f"{sample.mean:.6g}", f"{sample.std:.3g}", f"{low:.6g} .. {high:.6g}"]
            if sample is not self.samples[0]:
                apart = Difference(self.samples[0], sample)
                low, high = apart.interval()
                cells += [f"{apart.value:+.3g}", f"{low:+.3g} .. {high:+.3g}", f"{apart.p:.2g}"]
            lines.append(f"| {' | '.join(cells + [''] * (8 - len(cells)))} |")
        return "\n".join(lines)


def repeat(run: Callable[[int], Any] | Mapping[str, Callable[[int], Any]], seeds: int | Iterable[int] = 5,
           metric: str = "val_loss") -> Repeats:  # fmt: skip
    """Train with `run(seed)` once for each seed and return how `metric` spreads; for a mapping of settings, each so.

    `run` builds all anew (`Seed(seed)` first) and returns what `fit` does, the state; or a mapping of metrics, or the number
    itself. `seeds`: how many, counted from 0, or which. Five seeds find differences of about two standard deviations and
    more. What had ended before an error or Ctrl-C stands in a note of it. Raises, before any training, TypeError or ValueError
    for a setting, seeds or a name that can't be; ValueError for a metric that is not there or not finite, and for a run that
    was left early, as Preemption does.
    """
    stats()  # before hours of training
    if not isinstance(metric, str) or not metric:
        raise ValueError(f"metric must be the name of a metric, such as 'val_loss', not {metric!r}")
    chosen, settings = seeds_of(seeds), settings_of(run)
    found: dict[str, list[float]] = {}
    for name, one in settings.items():
        found[name] = []
        for seed in chosen:
            try:
                found[name].append(value(one(seed), metric, name, seed))
            except BaseException as error:
                say(error, f"in {name} with seed {seed}; {metric} of what had ended: {found}")  # hours may lie in these
                raise
        if len(set(found[name])) == 1:
            warnings.warn(f"{name} gave {metric}={found[name][0]} with every seed: does it build all anew, and use its seed? "
                          "Without a spread nothing tells chance from gain", stacklevel=2)  # fmt: skip
    return Repeats(metric, tuple(Sample(name, chosen, tuple(values)) for name, values in found.items()))


def integer(x: Any) -> int | None:
    """Return an integer of any library as Python's; None for what is none."""
    if isinstance(x, bool) or "bool" in str(getattr(x, "dtype", "")):
        return None
    try:
        return operator.index(x)
    except TypeError:
        return None


def seeds_of(seeds: Any) -> tuple[int, ...]:
    """Return the seeds that are asked for, by number or one by one."""
    count = None if getattr(seeds, "shape", ()) else integer(seeds)
    if count is None and (not isinstance(seeds, Iterable) or getattr(seeds, "shape", None) == ()):
        raise ValueError(f"seeds must be how many (a whole number), or which (a list of them), not {seeds!r}")
    given = list(seeds if count is None else range(count))
    chosen = [integer(seed) for seed in given]
    if odd := [seed for seed, found in zip(given, chosen, strict=True) if found is None]:
        raise ValueError(f"seeds must be whole numbers, not {odd[0]!r}")
    if len(set(chosen)) < 2 or len(set(chosen)) < len(chosen):
        raise ValueError(f"seeds must be at least two different ones, not {seeds!r}")
    return tuple([seed for seed in chosen if seed is not None])


def settings_of(run: Any) -> dict[str, Callable[[int], Any]]:
    """Return the functions to be trained with, by name."""
    settings = dict(run) if isinstance(run, Mapping) else {getattr(run, "__name__", "run"): run}
    if not settings:
        raise ValueError("run is an empty mapping; give it settings: name -> function of a seed")
    for name, one in settings.items():
        if not isinstance(name, str) or not name:
            raise TypeError(f"run must name each setting by a string that is not empty, such as 'baseline', not {name!r}")
        if not callable(one):
            raise TypeError(f"run must be a function of a seed, or a mapping of names to such functions, not {one!r:.60}")
        try:
            inspect.signature(one).bind(0)
        except TypeError as error:
            raise TypeError(f"{name} must take one argument, the seed: {error}") from None
        except ValueError:  # a function in C that says nothing of its arguments
            continue
    return settings


def cell(text: str) -> str:
    """Return a text as a cell of a Markdown table."""
    return text.replace("|", r"\|").replace("\r", r"\r").replace("\n", r"\n")


def value(found: Any, metric: str, name: str, seed: int) -> float:
    """Return the metric that a run ended with."""
    if found is None:
        raise TypeError(f"{name} returned None with seed {seed}; return what fit returned, or the metric")
    if isinstance(found, State) and found.left:
        raise ValueError(f"{name} with seed {seed} was left early ({found.stop_reason}), so that its {metric} is none of a whole "
                         "run; let it go on from its checkpoint, or run it again")  # fmt: skip
    metrics = found.metrics if isinstance(found, State) else found
    if isinstance(metrics, Mapping):
        if metric not in metrics:
            raise ValueError(f"metric={metric!r} is not among what {name} gave with seed {seed}: {sorted(map(str, metrics))}")
        metrics = metrics[metric]
    if not math.isfinite(it := number(metric, metrics)):
        raise ValueError(f"{metric} is {it} in {name} with seed {seed}: a spread of it means nothing")
    return it


def stats() -> Any:
    """Return scipy's tests."""
    try:
        import scipy.stats
    except ImportError:
        raise ImportError("what tells chance from gain needs scipy: pip install 'hookloop[study]'") from None
    return scipy.stats
