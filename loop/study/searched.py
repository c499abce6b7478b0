"""What a search found: every trial, what beats what beyond chance, what mattered, as tables, files and a picture."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checks import whole
from .pictures import Picture, figure
from .repeat import Difference, Sample, cell
from .storage import engine

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEVEL = 0.05
MOST = 12  # values of a list: each is a column of its own to fANOVA, whose time doubles with every one (6 s with 12)


@dataclass(frozen=True)
class Row:
    """A trial: its settings, flat ("a.b" inside "a"), and how it ended ("complete", "pruned", "fail", "running", "waiting").

    `values`: the metric for each of `seeds`; `scores`: seed -> update -> what a validation gave; `seconds`, and when it `began`.
    """

    number: int
    state: str
    settings: dict[str, Any]
    seeds: tuple[int, ...]
    values: tuple[float, ...]
    scores: dict[str, dict[str, float]]
    seconds: float | None
    began: str | None
    error: str
    versions: dict[str, str]

    @property
    def sample(self) -> Sample:
        """The metric over seeds."""
        return Sample(f"trial {self.number}", self.seeds, self.values)

    @property
    def mean(self) -> float:
        """The metric's mean over seeds."""
        return self.sample.mean


@dataclass(frozen=True, eq=False)
class Searched(Picture):
    """A search's trials by number; printed as a Markdown table, the best first.

    With several seeds each is held against the best (Welch's test), and those that chance alone could have put behind it are
    marked. The best was picked for being the best, so that the chances are corrected for all pairs of trials (Holm 1979):
    where all settings are alike, at most one search in twenty leaves any unmarked. `study` is Optuna's own.
    """

    metric: str
    mode: str
    trials: tuple[Row, ...]
    study: Any

    @property
    def ranked(self) -> list[Row]:
        """The complete trials, the best first."""
        whole = [row for row in self.trials if row.state == "complete"]
        return sorted(whole, key=lambda row: row.mean if self.mode == "min" else -row.mean)

    @property
    def best(self) -> Row:
        """The best trial; raises RuntimeError where none is complete."""
        if not (ranked := self.ranked):
            errors = [row.error for row in self.trials if row.error]
            raise RuntimeError(
                f"no trial is complete, of {len(self.trials)}; the last error: {errors[-1] if errors else 'none'}"
            )
        return ranked[0]

    def chances(self) -> dict[int, float]:
        """Return trial -> the chance of a difference from the best as large as this where there is none, for all pairs."""
        ranked = self.ranked
        if not ranked or len(ranked[0].values) < 2:
            return {}
        found = {row.number: Difference(ranked[0].sample, row.sample).p for row in ranked[1:]}
        return holm(found, len(ranked) * (len(ranked) - 1) // 2)

    def table(self, count: int | None = 20) -> str:
        """Return a Markdown table of the best `count` trials (None: all) and of how the others ended."""
        ranked, chances = self.ranked, self.chances()
        if count is not None:
            whole("count", count, 1, none=False)
        names = list(dict.fromkeys(name for row in self.trials for name in row.settings))
        several = bool(ranked) and len(ranked[0].values) > 1
        heads = ["trial", *map(cell, names), cell(self.metric), *(["95% interval", "p", "chance?"] if several else [])]
        lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        for row in ranked[:count]:
            settings = [shown(row.settings[name]) if name in row.settings else "" for name in names]
            cells = [str(row.number), *map(cell, settings), f"{row.mean:.6g}"]
            if several:
                low, high = row.sample.interval()
                p = chances.get(row.number)
                cells += [f"{low:.6g} .. {high:.6g}", "best" if p is None else f"{p:.2g}",
                          "" if p is None or p < LEVEL else "may be chance"]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join([*lines, "", *self._notes(several, chances)])

    __str__ = table

    def _notes(self, several: bool, chances: Mapping[int, float]) -> list[str]:
        states = [row.state for row in self.trials]
        notes = [", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)) + f", of {len(states)} trials."]
        if several:
            alike = sum(p >= LEVEL for p in chances.values())
            notes.append(
                f"Of {len(chances)} others {alike} may be behind the best by chance alone (Welch's test, Holm's correction for all "
                "pairs)."
            )
            if flat := [row.number for row in self.ranked if not row.sample.std]:
                notes.append(f"The same with every seed: {', '.join(map(str, flat))}. Does train build all anew? Without a spread "
                             "nothing tells chance from gain.")  # fmt: skip
        else:
            notes.append("One seed a setting: nothing tells chance from gain; give seeds=5.")
        errors: dict[str, list[int]] = {}
        for row in self.trials:
            if row.error:
                errors.setdefault(row.error, []).append(row.number)
        return notes + [f"failed: {', '.join(map(str, which))}: {error}" for error, which in errors.items()]

    def importance(self) -> dict[str, float]:
        """Return how much of the metric's variation each setting explains, largest first (Hutter et al. 2014, fANOVA).

        Of settings that every complete trial has, and over the whole space, not the best of it. Raises ImportError without
        scikit-learn, ValueError or RuntimeError for too few trials, ValueError for a list of more than 12 values.
        """
        optuna = engine()
        axes = {name: axis for trial in self.study.get_trials(deepcopy=False) for name, axis in trial.distributions.items()}
        if long := [name for name, axis in axes.items() if len(getattr(axis, "choices", ())) > MOST]:
            raise ValueError(f"{long[0]!r} is a list of {len(axes[long[0]].choices)} values, and the time that fANOVA takes "
                             f"doubles with each; give up to {MOST}, or a range (uniform, log_uniform, integers)")  # fmt: skip
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)  # Optuna's default has changed; this one draws trees
        found = optuna.importance.get_param_importances(self.study, evaluator=evaluator)
        return {name: float(share) for name, share in found.items()}

    def figure(self) -> Figure:
        """Return the importance of each setting as a matplotlib figure."""
        found = self.importance()
        made, axes = figure(f"share of the variation of {self.metric}", "")
        axes.barh(list(found)[::-1], list(found.values())[::-1])
        return made

    def write(self, folder: Path) -> None:
        """Write results.md, results.csv and results.json into a folder, and importance.png where it can be computed."""
        rows = [asdict(row) for row in self.trials]
        replace(folder / "results.md", self.table(None) + "\n")
        held = plain({"metric": self.metric, "mode": self.mode, "trials": rows})
        replace(folder / "results.json", json.dumps(held, indent=1, allow_nan=False))
        names = list(dict.fromkeys(name for row in self.trials for name in row.settings))
        out = csv.writer(file := io.StringIO(newline=""))
        out.writerow(["trial", "state", *names, self.metric, "seconds", "error"])
        for row in self.trials:
            settings = [str(row.settings[name]) if name in row.settings else "" for name in names]
            out.writerow([row.number, row.state, *settings, row.mean if row.values else "", row.seconds, row.error])
        replace(folder / "results.csv", file.getvalue())
        with (
            contextlib.suppress(ImportError, ValueError, RuntimeError, AssertionError),
            warnings.catch_warnings(action="ignore"),
        ):
            self.save(folder / "importance.png")  # where there are trials enough, no giants, and matplotlib


def gathered(study: Any, trials: Sequence[Any], metric: str, mode: str) -> Searched:
    """Return what the storage holds of a search."""
    rows = []
    for found in trials:
        about = found.user_attrs
        rows.append(Row(found.number, found.state.name.lower(), dict(found.params), tuple(about.get("seeds", ())),
                        tuple(about.get("values", ())), about.get("scores", {}), about.get("seconds"),
                        None if found.datetime_start is None else found.datetime_start.isoformat(timespec="seconds"),
                        about.get("error", ""), about.get("versions", {})))  # fmt: skip
    return Searched(metric, mode, tuple(rows), study)


def holm(chances: Mapping[int, float], count: int) -> dict[int, float]:
    """Return chances that hold together with others, `count` in all: the smallest times `count`, the next times one less.

    None is below one before it. The others, which are not looked at, act as if they were the largest.
    """
    least, found = 0.0, dict[int, float]()
    for i, (number, p) in enumerate(sorted(chances.items(), key=lambda item: (math.isnan(item[1]), item[1]))):
        found[number] = least = max(least, min(1.0, p * (count - i)))
    return found


def replace(path: Path, text: str) -> None:
    """Write a file whole: other processes end the same search, and write it too."""
    (beside := path.with_name(f"{path.name}.{os.getpid()}")).write_bytes(text.encode())
    os.replace(beside, path)


def plain(found: Any) -> Any:
    """Return what JSON can say: it has no word for infinities and NaN, which become "inf", "-inf" and "nan"."""
    if isinstance(found, Mapping):
        return {key: plain(what) for key, what in found.items()}
    if isinstance(found, list | tuple):
        return [plain(what) for what in found]
    return str(float(found)) if isinstance(found, float) and not math.isfinite(found) else found


def shown(value: Any) -> str:
    """Return a setting as a table has it."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
