"""What a process does in a search: it claims trials, runs each, and records how that ended."""

from __future__ import annotations

import gc
import itertools
import logging
import math
import platform
import statistics
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...callbacks.prune import MetricMissing, Prune
from ...callbacks.seed import Seed
from ...callbacks.tensorboard import TensorBoard
from ..callback import Callback
from ..checks import among
from ..goal import Goal
from ..goal import number as number_of
from ..rng import derive
from ..state import State
from .space import Space, nested
from .storage import Trials, alone, engine, is_url, opened

log = logging.getLogger("hookloop")
NAME = "search"
Train = Callable[[Any, list[Callback]], Any]
PRUNERS = {"median": "MedianPruner", "halving": "SuccessiveHalvingPruner", "hyperband": "HyperbandPruner"}


class Settings(dict[str, Any]):
    """A trial's settings, nested as the space is; beside them its `number`, its `seed`, and a `folder` that stays the same.

    `folder` is where this run writes (None without a storage folder): a trial that was cut off goes on from there, where train
    gives it to Checkpoint and to `Loop(..., resume=)`.
    """

    number: int
    seed: int
    folder: Path | None


class Scores(Callback):
    """Keeps what each report gave for the metric."""

    def __init__(self, metric: str) -> None:
        self.metric, self.found = metric, dict[str, float]()

    def on_validation_end(self, state: State) -> None:
        """Keep it."""
        if self.metric in state.reported:
            self.found[str(state.step)] = float(state.metrics[self.metric])

    def state_dict(self) -> dict[str, Any]:
        """Return them."""
        return {"found": self.found}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        self.found = dict(state["found"])


@dataclass(frozen=True)
class Job:
    """What a process needs to take part in a search."""

    train: Train
    space: Any
    method: str
    total: int
    goal: Goal
    storage: Any
    name: str
    seeds: tuple[int, ...]
    prune: Any
    seed: int
    interval: float
    tries: int


def pruner(prune: Any) -> Any:
    """Return Optuna's pruner of that name; raises ValueError for what is none."""
    pruners = engine().pruners
    if isinstance(prune, pruners.BasePruner):
        return prune
    if isinstance(prune, bool):
        return pruners.MedianPruner() if prune else pruners.NopPruner()
    among("prune", prune, tuple(PRUNERS))
    return getattr(pruners, PRUNERS[prune])()


def study_of(job: Job) -> Any:
    """Return the study of a search, made if it is missing; raises ValueError for one of other settings."""
    optuna, direction = engine(), {"min": "minimize", "max": "maximize"}[job.goal.mode]
    mine = {"space": Space(job.space).text(), "method": job.method, "metric": job.goal.metric, "mode": job.goal.mode,
            "seeds": list(job.seeds), "seed": job.seed}  # fmt: skip
    talks = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(max(talks, optuna.logging.WARNING))  # that a study was made is no news here
    try:
        if folder_of(job.storage) is not None:
            Path(job.storage).mkdir(parents=True, exist_ok=True)
        with alone(job.storage):  # or two make a database's tables at once, or each takes the study for its own
            study = optuna.create_study(storage=opened(job.storage), study_name=job.name, direction=direction,
                                        load_if_exists=True, pruner=pruner(job.prune))  # fmt: skip
            if (there := study.user_attrs.get("search")) is None:
                study.set_user_attr("search", mine)
    finally:
        optuna.logging.set_verbosity(talks)
    if there is not None and (odd := [f"{k}: {there.get(k)} there, {v} here" for k, v in mine.items() if there.get(k) != v]):
        raise ValueError(f"storage {str(job.storage)!r} holds another search ({'; '.join(odd)}); give the same settings, or "
                         "another storage or name=")  # fmt: skip
    return study


def trials_of(job: Job, study: Any) -> Trials:
    """Return a search's trials."""
    return Trials(study, job.total, job.interval, job.tries, job.storage)


def work(job: Job, study: Any) -> None:
    """Run trials until none is left, here or anywhere."""
    trials, space, collected = trials_of(job, study), Space(job.space), time.monotonic()
    while True:
        if (found := trials.take()) is not None:
            with trials.leased(found):
                run(job, study, space, found)
            if torch.cuda.is_initialized():
                gc.collect()
                torch.cuda.empty_cache()
            elif time.monotonic() - collected > 1:  # it takes a tenth of a second, and short trials hold little
                gc.collect()
                collected = time.monotonic()
        elif trials.open():
            time.sleep(min(0.5, job.interval / 4))
        else:
            return


def run(job: Job, study: Any, space: Space, found: Any) -> None:
    """Run one trial, over all its seeds, and record how it ended."""
    optuna, began = engine(), time.monotonic()
    study.sampler = sampler(job, space, found.number)
    trial = optuna.trial.Trial(study, found._trial_id)
    flat, values, scores, error, pruned = space.suggest(trial), list[float](), dict[str, Any](), "", False
    trace = ""
    for seed in job.seeds:
        watch = Scores(job.goal.metric)
        settings, callbacks = given(job, found.number, flat, seed)
        prune = Prune(trial, job.goal.metric) if job.prune is not False and seed == job.seeds[0] else None
        try:
            ended = job.train(settings, [*callbacks, watch, *([] if prune is None else [prune])])
        except MetricMissing:
            raise
        except optuna.TrialPruned:  # as an objective of Optuna's own says it
            pruned = True
        except Exception as problem:
            error = "".join(traceback.format_exception_only(problem)).strip()
            trace = "".join(traceback.format_exception(problem))[-4000:]
            traceback.clear_frames(problem.__traceback__)  # they hold the model
        else:
            pruned = prune is not None and prune.pruned
            if not pruned:
                values.append(result(ended, job.goal.metric, found.number))
                error = "" if math.isfinite(values[-1]) else f"{job.goal.metric} is {values[-1]}"
            ended = None
        scores[str(seed)] = watch.found
        if pruned or error:
            break
    about = {"seeds": list(job.seeds), "values": values, "scores": scores, "seconds": time.monotonic() - began, "error": error,
             "traceback": trace, "versions": {"torch": str(torch.__version__), "python": platform.python_version()}}  # fmt: skip
    states = optuna.trial.TrialState
    state = states.FAIL if error else states.PRUNED if pruned else states.COMPLETE
    try:
        for name, what in about.items():
            trial.set_user_attr(name, what)
        study.tell(trial, statistics.fmean(values) if state == states.COMPLETE else None, state=state)
    except (optuna.exceptions.UpdateFinishedTrialError, ValueError):
        if study._storage.get_trial(found._trial_id).state == states.RUNNING:
            raise
        log.warning("trial %d was taken up by another process meanwhile, whose word counts", found.number)
    if error:
        log.warning("trial %d failed: %s", found.number, error)


def sampler(job: Job, space: Space, number: int) -> Any:
    """Return what says a trial's settings: anew for each, so that they hang on nobody's before it, and a grid's on its number."""
    key = derive(job.seed, "trial", number) & 0xFFFFFFFF
    samplers = engine().samplers
    drawn = samplers.TPESampler(seed=key) if job.method == "tpe" else samplers.RandomSampler(seed=key)
    if job.method != "grid":
        return drawn
    with warnings.catch_warnings(action="ignore"):  # Optuna calls it experimental, and a user can't help it
        return samplers.PartialFixedSampler(next(itertools.islice(space.points(), number, None)), drawn)


def given(job: Job, number: int, flat: Mapping[str, Any], seed: int) -> tuple[Settings, list[Callback]]:
    """Return what train is handed for one seed."""
    settings, callbacks = Settings(nested(flat)), list[Callback]([Seed(seed)])
    settings.number, settings.seed, settings.folder = number, seed, None
    if (folder := folder_of(job.storage, job.name)) is not None:
        settings.folder = folder / (f"trial-{number:05}" + (f"-seed-{seed}" if job.seeds[1:] else ""))
        shown = {name: what if isinstance(what, int | float | str) else str(what) for name, what in flat.items()}
        callbacks.append(TensorBoard(settings.folder, settings=shown))
    return settings, callbacks


def folder_of(storage: Any, name: str = NAME) -> Path | None:
    """Return the folder of a search's runs and tables, one inside the storage's for another name; None for database and memory."""
    return None if storage is None or is_url(storage) else Path(storage) / ("" if name == NAME else name)


def result(ended: Any, metric: str, trial: int) -> float:
    """Return the metric that train ended with; raises for what no trial can be blamed for."""
    if isinstance(ended, State) and ended.left:
        raise RuntimeError(f"trial {trial} was left early ({ended.stop_reason}); called again with its storage, the search goes on "
                           "with it")  # fmt: skip
    if ended is None:
        raise TypeError("train returned None; return what fit returned, or the metric")
    metrics = ended.metrics if isinstance(ended, State) else ended
    if isinstance(metrics, Mapping):
        if metric not in metrics:
            there = ", ".join(sorted(map(str, metrics))) or "nothing"
            raise MetricMissing(f"metric={metric!r} is not among what train gave: {there}")
        metrics = metrics[metric]
    return number_of(metric, metrics)
