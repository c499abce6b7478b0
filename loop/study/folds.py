"""Cross-validation: one training a fold, each from new, and how far a metric spreads over them."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import os
import statistics
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Subset

from ...callbacks.checkpoint import Checkpoint
from ...callbacks.tensorboard import TensorBoard
from ..callback import Callback
from ..checks import flag, say, whole
from ..goal import number
from ..loop import Loop
from ..order import length
from ..rng import derive, isolated
from .repeat import Sample, cell, integer, stats

OPTIONS = ("autocast", "cut", "max_skips", "weigh")
OURS = ("dataset", "batch_size", "shuffle", "sampler", "batch_sampler", "generator")  # of a DataLoader's settings
Built = tuple[torch.nn.Module, torch.optim.Optimizer, Iterable[Callback]]


@dataclass(frozen=True)
class Fold:
    """The positions in the data set that one fold trains on and validates on."""

    train: tuple[int, ...]
    val: tuple[int, ...]


@dataclass(frozen=True)
class Folds(Sample):
    """A metric's value on each fold (`seeds` are the folds' numbers); printed as a Markdown table.

    `metrics` holds all that each fold reported.
    """

    folds: tuple[Fold, ...]
    metrics: tuple[dict[str, float], ...]

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Return the confidence interval of the mean: Student's, widened since folds share most of what they train on.

        (Nadeau and Bengio 2003, https://doi.org/10.1023/A:1024068626366: 1/k + validated/trained in place of 1/k)
        """
        share = statistics.fmean(len(fold.val) / len(fold.train) for fold in self.folds)
        error = self.std * math.sqrt(1 / len(self.values) + share)
        half = float(stats().t.ppf((1 + level) / 2, len(self.values) - 1)) * error
        return self.mean - half, self.mean + half

    def __str__(self) -> str:
        low, high = self.interval()
        lines = [f"| fold | trained on | validated on | {cell(self.name)} |", "|---" * 4 + "|"]
        for one, fold, found in zip(self.seeds, self.folds, self.values, strict=True):
            lines.append(f"| {one} | {len(fold.train)} | {len(fold.val)} | {found:.6g} |")
        spread = f"standard deviation {self.std:.3g}, 95% interval {low:.6g} .. {high:.6g}"
        return "\n".join([*lines, f"| mean | | | {self.mean:.6g} ({spread}) |"])


def cross_validate(build: Callable[[int], Built], dataset: Dataset[Any], splitter: Any, *, loss_fn: Callable[[Any, Any], Any],
                   epochs: int, batch_size: int = 32, metric: str = "val_loss", folder: str | os.PathLike[str] | None = None,
                   groups: Any = None, stratify: Any = None, val_dataset: Dataset[Any] | None = None, shuffle: bool = True,
                   loading: Mapping[str, Any] | None = None, seed: int = 0, **options: Any) -> Folds:  # fmt: skip
    """Train on each fold that `splitter` gives, from new, and return how `metric` spreads, of each model as training left it.

    `build(fold)` returns a new (model, optimizer, callbacks). `splitter`: scikit-learn's, or any object with
    `split(X, y, groups)`; X are the positions, y the labels `stratify`, `groups` the groups, one a sample. `val_dataset`: the
    same samples without augmentation. `shuffle`: what is trained on, within its fold. `loading`: more settings of both
    DataLoaders (`drop_last` of the one to train on alone). `seed`: what a fold draws begins at (seed, fold), so that none hangs
    on another. `options`: `autocast`, `cut`, `max_skips` and `weigh`, as Loop takes them. With a `folder`, each fold is a
    TensorBoard run with checkpoints in `fold-<n>`, and the same call, started again after whatever ended it, reads the folds
    that are done from `fold-<n>.json` and goes on with the open one, to the same bits. EarlyStopping on the same samples
    flatters the metric. Raises TypeError or ValueError, before any training, for bad settings, folds that are empty or
    overlap, and a folder of other folds; later for what `build` gives twice, a fold that was left early, and a metric that is
    not there or not finite.
    """
    stats()  # before hours of training
    for name, count in (("epochs", epochs), ("batch_size", batch_size), ("seed", seed)):
        whole(name, count, int(name != "seed"), none=False)
    flag("shuffle", shuffle)
    if not isinstance(metric, str) or not metric:
        raise ValueError(f"metric must be the name of a metric, such as 'val_loss', not {metric!r}")
    for name, function in (("build", build), ("loss_fn", loss_fn)):
        if not callable(function):
            raise TypeError(f"{name} must be a function, not {function!r:.60}")
    if unknown := sorted(options.keys() - set(OPTIONS)):
        raise TypeError(f"cross_validate has no setting {unknown[0]!r}; of Loop's it takes {', '.join(OPTIONS)}, since one object "
                        "for all folds would carry over what it has seen")  # fmt: skip
    if folder is not None and (not isinstance(folder, str | os.PathLike) or not os.fspath(folder)):
        raise ValueError(f"folder must be the path of a folder, such as 'runs/folds', or None, not {folder!r}")
    loading = loading_of(loading)
    folds = folds_of(dataset, splitter, stratify, groups)
    if folder is not None and folds_of(dataset, splitter, stratify, groups) != folds:
        raise ValueError("splitter gives other folds each time it is asked, so that no run could go on: give it a number as "
                         "random_state")  # fmt: skip
    if val_dataset is not None and length(val_dataset) != length(dataset):
        raise ValueError(f"val_dataset has {length(val_dataset)} samples, dataset {length(dataset)}; give the same samples")
    places = [None if folder is None else Path(folder).absolute() / f"fold-{i}" for i in range(len(folds))]
    about = [{"epochs": epochs, "batch_size": batch_size, "seed": seed, "shuffle": shuffle, "trains on": digest(fold.train),
              "validates on": digest(fold.val)} for fold in folds]  # fmt: skip
    known = [None if place is None else read(place, settings) for place, settings in zip(places, about, strict=True)]
    seen = dict[int, weakref.ref[Any]]()
    found: list[dict[str, float]] = []
    for i, (fold, place, metrics) in enumerate(zip(folds, places, known, strict=True)):
        try:
            if metrics is None:
                if place is not None:
                    write(place, about[i])
                train = DataLoader(Subset(dataset, fold.train), batch_size, shuffle=shuffle, **loading)
                val = DataLoader(Subset(val_dataset or dataset, fold.val), batch_size, **{**loading, "drop_last": False})
                with isolated(torch.accelerator.current_accelerator() or torch.device("cpu"), derive(seed, "fold", i)):
                    metrics = trained(new(build, i, place, seen, options), loss_fn, train, val, epochs)
                one(metrics, metric)
                if place is not None:
                    write(place, {**about[i], "metrics": metrics})
            found.append({**metrics, metric: one(metrics, metric)})
        except BaseException as error:
            say(error, f"in fold {i}; {metric} of the folds that had ended: {[each[metric] for each in found]}")
            raise
    return Folds(metric, tuple(range(len(folds))), tuple(each[metric] for each in found), folds, tuple(found))


def loading_of(given: Any) -> dict[str, Any]:
    """Return more settings of DataLoaders, checked."""
    if given is not None and not isinstance(given, Mapping):
        raise TypeError(f"loading must map names of a DataLoader's settings to values, such as num_workers, not {given!r:.60}")
    loading = dict(given or {})
    known = sorted(inspect.signature(DataLoader).parameters.keys() - set(OURS))
    if odd := [name for name in loading if name not in known]:
        raise TypeError(f"loading can't hold {odd[0]!r}; it takes {', '.join(known)}, since one sampler or generator for all folds "
                        "would carry over what it has drawn (seed= says the order)")  # fmt: skip
    return loading


def folds_of(dataset: Any, splitter: Any, stratify: Any, groups: Any) -> tuple[Fold, ...]:
    """Return the positions that a splitter gives, checked."""
    if not callable(getattr(splitter, "split", None)) or isinstance(splitter, str | bytes | type):
        raise TypeError(f"splitter must have split(X, y, groups), as scikit-learn's KFold(5) has, not {splitter!r:.60}")
    if not (total := length(dataset)):
        raise ValueError(f"dataset, a {type(dataset).__name__}, must hold samples and tell how many: len(dataset)")
    for name, each in (("stratify", stratify), ("groups", groups)):
        if each is not None and length(each) != total:
            raise ValueError(f"{name} must hold one for each of the {total} samples, not {length(each)}")
    try:
        pairs = [(part(train), part(val)) for train, val in splitter.split(list(range(total)), stratify, groups)]
    except (TypeError, ValueError) as error:
        say(error, f"from {type(splitter).__name__}.split; labels are given as stratify=, groups as groups=")
        raise
    if len(pairs) < 2:
        raise ValueError(f"splitter gives {len(pairs)} fold(s); a spread needs two at least")
    for i, (train, val) in enumerate(pairs):
        if not train or not val:
            raise ValueError(f"fold {i} has {len(train)} samples to train on and {len(val)} to validate on; it needs both")
        if odd := sorted({p for p in (*train, *val) if not 0 <= p < total}):
            raise ValueError(f"fold {i} holds position {odd[0]}, and the data set has 0 to {total - 1}")
        if both := sorted({*train} & {*val}):
            raise ValueError(f"fold {i} validates on {len(both)} samples that it trains on, such as {both[0]}")
    return tuple(Fold(train, val) for train, val in pairs)


def part(positions: Any) -> tuple[int, ...]:
    """Return positions as integers."""
    given = positions.tolist() if hasattr(positions, "tolist") else list(positions)
    if odd := [p for p in given if integer(p) is None]:
        raise TypeError(f"splitter must give positions, whole numbers, not {odd[0]!r}")
    return tuple(map(int, given))


def new(build: Any, i: int, place: Path | None, seen: dict[int, weakref.ref[Any]], options: Mapping[str, Any]) -> Loop:
    """Return the Loop of a fold; raises TypeError for what is none, ValueError for what an earlier fold has trained."""
    built = build(i)
    good = isinstance(built, tuple | list) and len(built) == 3 and isinstance(built[2], Iterable)
    if not good or not isinstance(built[0], torch.nn.Module) or not hasattr(built[1], "param_groups"):
        raise TypeError(f"build must return (model, optimizer, callbacks), not {built!r:.60}")
    model, optimizer, callbacks = built[0], built[1], [*built[2]]
    inside = [*model.named_parameters(), *model.named_buffers()]
    named = [("model", model), ("optimizer", optimizer), *((type(c).__name__, c) for c in callbacks), *inside]
    for name, thing in named:
        if (before := seen.get(id(thing))) is not None and before() is thing:
            raise ValueError(f"build gave fold {i} the {name} of an earlier fold, which has seen other samples; make all anew")
    seen.update({id(thing): weakref.ref(thing) for _, thing in named})
    if place is None:
        return Loop(model, optimizer, callbacks, **options)
    saves = [c for c in callbacks if isinstance(c, Checkpoint)] or [Checkpoint(place)]
    if odd := [c.folder for c in saves if not Path(c.folder).absolute().is_relative_to(place.absolute())]:
        raise ValueError(
            f"build gave fold {i} a Checkpoint of {str(odd[0])!r}, which other folds could go on from; give it {str(place)!r}"
        )
    shows = [c for c in callbacks if isinstance(c, TensorBoard)] or [TensorBoard(place)]
    callbacks = [*(c for c in callbacks if c not in saves and c not in shows), *saves, *shows]
    return Loop(model, optimizer, callbacks, resume=saves[0].folder, **options)


def trained(loop: Loop, loss_fn: Any, train: Any, val: Any, epochs: int) -> dict[str, float]:
    """Train a fold, and return what was last reported, with validation's figures of the model that training left."""
    state = loop.fit(loss_fn, train, val, epochs=epochs)
    if state.left:
        raise ValueError(f"the fold was left early ({state.stop_reason}), so there is no result; call it again, with a folder it "
                         "goes on")  # fmt: skip
    return {name: float(state.metrics[name]) for name in state.reported} | loop.evaluate(loss_fn, val)


def one(metrics: Mapping[str, float], metric: str) -> float:
    """Return the metric of a fold."""
    if metric not in metrics:
        raise ValueError(f"metric={metric!r} is not among what was reported: {', '.join(sorted(metrics))}")
    if not math.isfinite(found := number(metric, metrics[metric])):
        raise ValueError(f"{metric} is {found}: a spread of it means nothing")
    return found


def digest(positions: tuple[int, ...]) -> str:
    """Return what tells one choice of samples from another."""
    return f"{len(positions)} samples, {hashlib.sha256(repr(positions).encode()).hexdigest()[:16]}"


def read(place: Path, about: Mapping[str, Any]) -> dict[str, float] | None:
    """Return what a finished fold reported; None for one that is open, ValueError for one of other settings."""
    path = place.with_suffix(".json")
    if not path.exists():
        if place.exists() and any(place.iterdir()):
            raise ValueError(f"{place} holds files of another run; give another folder")
        return None
    try:
        found = dict(json.loads(path.read_text()))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it with {place}, and the fold is trained anew") from None
    if odd := [
        f"{name}: {value} here and {found.get(name)} there" for name, value in about.items() if found.get(name) != value
    ]:
        raise ValueError(f"{path} is of other folds ({'; '.join(odd)}); give the same settings, or another folder")
    metrics: dict[str, float] | None = found.get("metrics")
    return metrics


def write(place: Path, content: Mapping[str, Any]) -> None:
    """Write what is known of a fold, whole or not at all."""
    place.mkdir(parents=True, exist_ok=True)
    with open(beside := place.with_suffix(".part"), "w") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(place.with_suffix(".json"))
