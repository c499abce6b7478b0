"""Hyper-parameter search over whole trainings: every trial is recorded, and what it tells is told apart from chance."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Mapping
from typing import Any

from ..checks import among, whole
from ..goal import Goal
from .jobs import spread
from .repeat import stats
from .searched import Searched, gathered
from .space import Space
from .storage import engine, in_memory, located
from .worker import NAME, Job, Train, folder_of, pruner, study_of, trials_of, work


def search(train: Train, space: Mapping[str, Any], method: str = "random", trials: int | None = None, metric: str = "val_loss",
           mode: str = "min", storage: str | os.PathLike[str] | None = None, seeds: int = 1, jobs: int = 1, prune: Any = True, *,
           seed: int = 0, name: str = NAME, interval: float = 30.0, tries: int = 25) -> Searched:  # fmt: skip
    """Train with settings drawn from a space, each over `seeds` seeds, record all of it, and say what beats what beyond chance.

    `train(settings, callbacks)` builds a model, trains it in a Loop with its own callbacks and these (Seed, TensorBoard, what
    keeps scores and prunes), and returns the state, a mapping of metrics, of which the last value counts, or the number itself.
    What it changes in the process itself, such as torch's default dtype, stays for the trials after it: set that in each.
    `space`: name -> a list, `uniform`, `log_uniform`, `integers`, `when(...)`, or a dict of these. `method`: "grid" (every
    point once; `trials` is not given), "random", or "tpe". `prune`: True or "median", "halving", "hyperband", a pruner of
    Optuna's, or False, which alone leaves a run's end to no other run's speed. `storage`: a folder,
    made if it is missing, that holds trials, runs and tables, or a database's URL; any number of processes may search in one
    at once, several searches each by a `name` (in a folder then a folder of its own in it), and one that is started again goes
    on: a trial whose process is gone (told by its number on the same machine, elsewhere by two `interval` seconds without a
    sign) is run again under its number, up to `tries` times. `seed` says every draw: the same trials come out, in any number
    of processes. A trial that raises, runs out of memory or ends not finite is recorded, and the search goes on. `jobs`
    processes run here, each with its share of the cores; what is started as `__main__` needs the usual guard then. Raises
    TypeError or ValueError for bad settings and for a storage that holds another search, KeyError for a metric that never
    comes, RuntimeError where every trial failed.
    (Bergstra and Bengio 2012; TPE: Bergstra et al. 2011; the engine: Akiba et al. 2019, https://arxiv.org/abs/1907.10902)
    """
    engine()
    checked, goal, storage = Space(space), Goal(metric, mode), located(storage)
    pruner(prune)
    among("method", method, ("grid", "random", "tpe"))
    for argument, number in (("seeds", seeds), ("jobs", jobs), ("tries", tries)):
        whole(argument, number, 1, none=False)
    points = list(checked.points()) if method == "grid" else None
    if points is not None and trials not in (None, len(points)):
        raise ValueError(f"a grid says its trials itself, {len(points)} here: leave trials={trials!r} out")
    if points is None:
        whole("trials", trials, 1, none=False)
    if jobs > (cores := len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1):
        raise ValueError(f"jobs={jobs} is more than the {cores} cores that there are")
    if jobs > 1 and (storage is None or in_memory(storage)):
        raise ValueError(f"jobs={jobs} share their trials through a storage: give storage=, a folder")
    if not callable(train):
        raise TypeError(f"train must be a function of settings and callbacks, not {train!r:.60}")
    try:
        inspect.signature(train).bind({}, [])
    except TypeError as error:
        raise TypeError(f"train must take two arguments, settings and callbacks: {error}") from None
    except ValueError:  # a function in C tells nothing
        pass
    whole("seed", seed, 0, none=False)
    if seed + seeds > 2**64:
        raise ValueError(f"seed must be from 0 to 2**64 - {seeds}, not {seed}")
    if isinstance(interval, bool) or not isinstance(interval, int | float) or not 0 < interval < math.inf:
        raise ValueError(f"interval must be a finite number of seconds above 0, not {interval!r}")
    if not isinstance(name, str) or name in ("", ".", "..") or os.path.basename(name) != name:
        raise ValueError(f"name must be a string that can name a folder, not {name!r}")
    if seeds > 1:
        stats()
    total = trials if points is None else len(points)
    job = Job(train, space, method, total or 0, goal, storage, name, tuple(range(seed, seed + seeds)), prune, seed, float(interval),
              tries)  # fmt: skip
    study = study_of(job)
    own = trials_of(job, study)
    own.add()
    if jobs == 1:
        work(job, study)
    else:
        spread(job, study, jobs, cores)
    found = gathered(study, own.all(), metric, mode)
    if (folder := folder_of(storage, name)) is not None:
        folder.mkdir(exist_ok=True)
        found.write(folder)
    if found.trials and all(row.state == "fail" for row in found.trials):
        raise RuntimeError(f"every trial failed, the first with {found.trials[0].error}")
    return found


def grid_search(train: Train, space: Mapping[str, Any], **options: Any) -> Searched:
    """Train once with each point of a space of lists; the rest is as in `search`."""
    return search(train, space, "grid", **options)


def random_search(train: Train, space: Mapping[str, Any], trials: int, **options: Any) -> Searched:
    """Train with `trials` settings drawn at random, which finds more than a grid where few settings matter; see `search`."""
    return search(train, space, "random", trials, **options)
