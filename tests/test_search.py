"""Search: every trial once, whoever is killed; what fails is recorded; what is chance is marked."""

from __future__ import annotations

import csv
import fcntl
import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from helpers import loader, loss_fn, net
from searching import GRID, RANGES, leaves, number, poison, train, vanishes

from hookloop.callbacks import Checkpoint, TensorBoard
from hookloop.callbacks.prune import MetricMissing
from hookloop.loop import Loop
from hookloop.loop.study import grid_search, integers, log_uniform, random_search, refine, search, uniform, when
from hookloop.loop.study.searched import Row, Searched, holm
from hookloop.loop.study.storage import Lock, Trials, opened, place

optuna = pytest.importorskip("optuna")
pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
HERE = Path(__file__).parent


def start(*arguments: Any, **more: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE), **more}
    return subprocess.Popen([sys.executable, str(HERE / "searching.py"), *map(str, arguments)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, env=environment)  # fmt: skip


def ended(process: subprocess.Popen[str]) -> list[Any]:
    out, err = process.communicate(timeout=150)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])  # type: ignore[no-any-return]


def rows(found: Any) -> list[Any]:
    return [[row.number, row.state, row.settings, list(row.values)] for row in found.trials]


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, Any]:
    return {"grid": rows(grid_search(train, GRID, prune=False)), "random": rows(random_search(train, RANGES, 12, prune=False))}


def test_a_grid_visits_each_point_once(undisturbed: Any) -> None:
    seen = [tuple(row[2].values()) for row in undisturbed["grid"]]
    assert sorted(seen) == sorted((r, s, d) for r in GRID["rate"] for s in GRID["size"] for d in GRID["decay"])
    assert {row[1] for row in undisturbed["grid"]} == {"complete"}


def test_a_grid_visits_each_point_once_where_two_processes_make_its_trials_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    make = optuna.Study.enqueue_trial

    def by_two(study: Any, *arguments: Any) -> None:
        make(study, *arguments)
        make(study, *arguments)

    monkeypatch.setattr(optuna.Study, "enqueue_trial", by_two)
    found = grid_search(number, {"x": [1, 2, 3], "y": [4, 5]}, prune=False)
    assert [tuple(row.settings.values()) for row in found.trials] == [(x, y) for x in (1, 2, 3) for y in (4, 5)]


@pytest.mark.parametrize("method", ["grid", pytest.param("random", marks=pytest.mark.slow)])
def test_two_jobs_give_the_same_trials_to_the_bit(method: str, undisturbed: Any, tmp_path: Path) -> None:
    more = {} if method == "grid" else {"trials": 12}
    found = search(train, GRID if method == "grid" else RANGES, method, storage=tmp_path, jobs=2, prune=False, **more)  # type: ignore[arg-type]
    assert rows(found) == undisturbed[method]


@pytest.mark.parametrize(
    ("method", "processes"),
    [pytest.param(*case, marks=pytest.mark.slow) for case in (("grid", 2), ("grid", 4), ("random", 4))],
)
def test_several_processes_one_killed_in_the_midst_of_a_trial(
    method: str, processes: int, undisturbed: Any, tmp_path: Path
) -> None:
    """Its trial is taken up, under its number; none is lost, none run by two, none counted twice."""
    notes = tmp_path / "notes"
    notes.mkdir()
    running = [start(method, tmp_path, "slowly", 12, NOTES=str(notes)) for _ in range(processes)]
    victim, mine = running[0], notes / str(running[0].pid)
    while not mine.exists() or not mine.read_text():
        assert victim.poll() is None, victim.communicate()[1]
        time.sleep(0.01)
    victim.kill()
    assert [ended(process) for process in running[1:]] == [undisturbed[method]] * (processes - 1)
    begun = Counter(int(line) for path in notes.iterdir() for line in path.read_text().split())
    cut = int(mine.read_text().split()[-1])
    assert {number for number, times in begun.items() if times > 1} <= {cut}
    assert victim.communicate()[0] == ""


@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_hp2_killed_again_and_again_it_ends_the_same(kills: int, undisturbed: Any, tmp_path: Path) -> None:
    """At random instants from the beginning of the first trial of each start: in trials, and between them."""
    clock, notes = random.Random(0), tmp_path / "notes"
    notes.mkdir()
    for _ in range(kills):
        process = start("random", tmp_path, "slowly", 12, NOTES=str(notes))
        while not (notes / str(process.pid)).exists():
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.005)
        time.sleep(clock.uniform(0.0, 1.2 / kills))
        process.kill()
        process.communicate()
    assert ended(start("random", tmp_path, "slowly", 12, NOTES=str(notes))) == undisturbed["random"]
    begun = Counter(int(line) for path in notes.iterdir() for line in path.read_text().split())
    assert set(begun) == set(range(12))
    assert sum(begun.values()) <= 12 + kills


def test_hp5_started_again_it_goes_on_and_never_beyond_its_trials(tmp_path: Path) -> None:
    calls: list[int] = []

    def once(settings: Any, callbacks: Any) -> float:
        calls.append(settings.number)
        return float(settings["x"])

    space = {"x": uniform(0, 1)}
    first = random_search(once, space, 5, storage=tmp_path, prune=False)
    again = random_search(once, space, 5, storage=tmp_path, prune=False)
    assert calls == [0, 1, 2, 3, 4]
    assert rows(first) == rows(again)
    more = random_search(once, space, 8, storage=tmp_path, prune=False)
    assert calls == list(range(8))
    assert rows(more)[:5] == rows(first)
    assert rows(more) == rows(random_search(once, space, 8, prune=False))
    assert len(random_search(once, space, 3, storage=tmp_path, prune=False).trials) == 3


def test_tpe_learns_and_is_the_same_again(tmp_path: Path) -> None:
    def bowl(settings: Any, callbacks: Any) -> float:
        return float((math.log10(settings["rate"]) + 3) ** 2)

    space = {"rate": log_uniform(1e-8, 1.0)}
    found = [search(bowl, space, "tpe", 40, storage=storage, prune=False) for storage in (None, tmp_path)]
    assert rows(found[0]) == rows(found[1])
    late = [row.mean for row in found[0].trials[20:]]
    assert sum(late) < sum(row.mean for row in random_search(bowl, space, 40, prune=False).trials[20:]) / 2


@pytest.mark.parametrize("url", [False, True])
def test_hp1_a_trial_that_fails_is_recorded_and_the_search_goes_on(url: bool, tmp_path: Path) -> None:
    def fails(settings: Any, callbacks: Any) -> float:
        if settings["x"] == 1:
            raise RuntimeError("no luck")
        if settings["x"] == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return math.nan if settings["x"] == 3 else float(settings["x"])

    storage = f"sqlite:///{tmp_path}/a.db" if url else tmp_path
    found = grid_search(fails, {"x": [0, 1, 2, 3, 4]}, storage=storage, prune=False)
    assert [(row.state, row.error) for row in found.trials] == [
        ("complete", ""), ("fail", "RuntimeError: no luck"),
        ("fail", "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"),
        ("fail", "val_loss is nan"), ("complete", ""),
    ]  # fmt: skip
    assert "failed: 1: RuntimeError: no luck" in str(found)
    assert "2 complete, 3 fail, of 5 trials." in str(found)
    assert found.best.number == 0
    assert grid_search(fails, {"x": [0, 1, 2, 3, 4]}, mode="max", prune=False).best.number == 4


def test_a_train_that_ends_as_an_objective_of_optunas_was_pruned() -> None:
    def prunes(settings: Any, callbacks: Any) -> float:
        if settings["x"] == 2:
            raise optuna.TrialPruned
        return float(settings["x"])

    assert [row.state for row in grid_search(prunes, {"x": [1, 2, 3]}, prune=False).trials] == [
        "complete",
        "pruned",
        "complete",
    ]


def test_where_all_fail_the_search_says_so(tmp_path: Path) -> None:
    def fails(settings: Any, callbacks: Any) -> float:
        return float(settings["y"])

    with pytest.raises(RuntimeError, match="every trial failed, the first with KeyError: 'y'"):
        grid_search(fails, {"x": [0, 1]}, storage=tmp_path, prune=False)
    held = json.loads((tmp_path / "results.json").read_text())["trials"]
    assert [row["error"] for row in held] == ["KeyError: 'y'"] * 2


def test_hp2_a_trial_that_takes_its_process_with_it_is_given_up(tmp_path: Path) -> None:
    found = grid_search(poison, {"x": [0, 1, 2, 3]}, storage=tmp_path, jobs=2, tries=2, interval=0.5, prune=False)
    assert [row.state for row in found.trials] == ["complete", "complete", "complete", "fail"]
    assert found.trials[3].error == "its process was gone 2 times; look at the memory that it takes"


def test_what_a_process_of_the_search_ends_with_is_told_or_made_good(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="SystemExit: no data"):
        grid_search(leaves, {"x": [0, 1]}, storage=tmp_path / "a", jobs=2, prune=False)
    found = grid_search(vanishes, {"x": [0, 1, 2]}, storage=tmp_path / "b", jobs=2, tries=1, prune=False)
    assert [row.state for row in found.trials] == ["complete", "fail", "complete"]


@pytest.mark.parametrize("name", [*(pytest.param(s, marks=pytest.mark.slow) for s in ("SIGINT", "SIGTERM")), "SIGKILL"])
def test_the_processes_of_a_search_end_with_it_and_give_their_trials_back(name: str, tmp_path: Path) -> None:
    """None goes on alone, and no trial is held to have ended its process itself, which would count against it."""
    notes = tmp_path / "notes"
    notes.mkdir()
    process = start("jobs", tmp_path, "endless", 3, NOTES=str(notes))
    while len(list(notes.iterdir())) < 2:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    process.send_signal(signal.Signals[name])
    process.communicate(timeout=20)  # they hold its pipes, too
    trials = shared(False, tmp_path, 3).all()
    assert [(trial.state.name, trial.user_attrs.get("tries", 0)) for trial in trials] == [("WAITING", 0)] * 3


def test_hp2_elsewhere_a_trial_is_gone_after_two_intervals_without_a_sign() -> None:
    """A process of another machine can't be asked: its sign must change."""
    study = optuna.create_study()
    trials = Trials(study, 1, interval=0.2, tries=3)
    trials.add()
    found = trials.claim()
    for beat in range(6):
        study._storage.set_trial_user_attr(found._trial_id, "lease", {"host": "elsewhere", "pid": 1, "began": 1, "beat": beat})
        trials.free()
        assert study.trials[0].state.name == "RUNNING"
        time.sleep(0.1)
    assert trials.claim() is None
    time.sleep(0.45)
    trials.free()
    assert study.trials[0].state.name == "WAITING"
    assert trials.claim().number == 0


def shared(url: bool, folder: Path, total: int) -> Trials:
    storage = f"sqlite:///{folder}/a.db" if url else str(folder)
    study = optuna.create_study(storage=opened(storage), study_name="search", load_if_exists=True)
    return Trials(study, total, 30.0, 5, storage)


@pytest.mark.parametrize("url", [False, True])
def test_no_trial_is_taken_by_two_at_once(url: bool, tmp_path: Path) -> None:
    """Neither one that waits nor one whose process is gone: four see it at the same moment."""
    ours = [shared(url, tmp_path, 12) for _ in range(4)]
    ours[0].add()
    gone = ours[0].take()
    ours[0].storage.set_trial_user_attr(gone._trial_id, "lease", {"host": place(), "pid": 2**22 + 1, "began": 1})
    taken, together = list[int](), threading.Barrier(4)

    def takes(trials: Trials) -> None:
        for _ in range(4):
            together.wait()
            if (found := trials.take()) is not None:
                taken.append(found.number)
                trials.storage.set_trial_user_attr(found._trial_id, "lease", {"host": "elsewhere"})

    threads = [threading.Thread(target=takes, args=(trials,)) for trials in ours]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == list(range(12))


def test_who_frees_a_trial_is_not_overtaken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or it would take from another what that one took up meanwhile."""
    one, other = shared(False, tmp_path, 1), shared(False, tmp_path, 1)
    one.add()
    gone, taken = one.take(), list[Any]()
    one.storage.set_trial_user_attr(gone._trial_id, "lease", {"host": place(), "pid": 2**22 + 1, "began": 1})
    look, thread = one._gone, threading.Thread(target=lambda: taken.append(other.take()))

    def slowly(found: Any) -> bool:
        answer = look(found)
        thread.start()
        thread.join(0.2)
        return answer

    monkeypatch.setattr(one, "_gone", slowly)
    taken.append(one.take())
    thread.join()
    assert sorted(found is None for found in taken) == [False, True]


def test_a_trial_that_could_not_be_given_back_is_taken_up_in_the_same_process(tmp_path: Path) -> None:
    """The disk is full when a trial ends; called again from the same notebook, the search must not wait for itself."""
    trials = shared(False, tmp_path, 1)
    trials.add()
    full = OSError(28, "No space left on device")

    def fills() -> None:
        with pytest.MonkeyPatch.context() as patch, trials.leased(trials.take()):
            patch.setattr(trials.storage._backend, "append_logs", Mock(side_effect=full))
            raise full

    with pytest.raises(OSError, match="No space left"):
        fills()
    with trials.leased(again := shared(False, tmp_path, 1).take()):
        assert again.number == 0
        assert shared(False, tmp_path, 1).take() is None


def test_the_lock_is_let_go_where_a_loaders_process_holds_its_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.touch()
    lock = Lock(path)
    lock.acquire()
    forked = os.dup(lock._file.fileno())
    lock.release()
    with open(path, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(forked)


@pytest.mark.parametrize("storage", ["a", "sqlite:///a.db"])
def test_train_may_change_the_working_directory(storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path)

    def moves(settings: Any, callbacks: Any) -> float:
        os.chdir(tmp_path / "b")
        return float(settings["x"])

    assert len(grid_search(moves, {"x": [1, 2]}, storage=storage, prune=False).ranked) == 2
    assert list((tmp_path / "b").iterdir()) == []
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="storage='file' is a file; give a folder, or a database as sqlite:///file"):
        grid_search(number, {"x": [1]}, storage="file")


@pytest.mark.slow
def test_memory_comes_back_after_each_of_fifty_trials() -> None:
    """To a MiB, where a model is four, in failing trials too; large blocks each from the system, so that what is freed shows."""
    process = start("memory", "", "", 50, MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536")
    sizes, alive = ended(process)
    assert len(sizes) == 50
    assert max(sizes[5:]) - min(sizes[5:]) <= 2**20
    assert alive == 1


def test_ctrl_c_leaves_the_trial_to_be_taken_up(tmp_path: Path) -> None:
    interrupts = iter([False, True, False, False, False])

    def stops(settings: Any, callbacks: Any) -> float:
        if next(interrupts):
            raise KeyboardInterrupt
        return float(settings["x"])

    with pytest.raises(KeyboardInterrupt):
        grid_search(stops, {"x": [0, 1, 2]}, storage=tmp_path, prune=False)
    study = optuna.load_study(study_name="search", storage=optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(tmp_path / "trials.journal"))))  # fmt: skip
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "WAITING", "WAITING"]
    found = grid_search(stops, {"x": [0, 1, 2]}, storage=tmp_path, prune=False)
    assert [row.mean for row in found.trials] == [0, 1, 2]
    assert [trial.number for trial in found.study.trials] == [0, 1, 2]


def test_a_run_that_was_left_early_ends_the_search_and_not_the_trial(tmp_path: Path) -> None:
    grid = {**GRID, "rate": [1e-2]}
    undisturbed = grid_search(train, grid, prune=False)

    def early(settings: Any, callbacks: Any) -> Any:
        found = train(settings, callbacks)
        if settings.number == 1 and not (tmp_path / "heard").exists():
            (tmp_path / "heard").touch()
            found.leave("SIGUSR1")
            assert found.leaving
        return found

    with pytest.raises(RuntimeError, match=r"trial 1 was left early \(SIGUSR1\)"):
        grid_search(early, grid, storage=tmp_path, prune=False)
    assert rows(grid_search(early, grid, storage=tmp_path, prune=False)) == rows(undisturbed)


def test_a_trial_that_was_cut_off_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    seen: list[int] = []

    def resumes(settings: Any, callbacks: Any) -> Any:
        model = net(seed=3)
        loop = Loop(model, torch.optim.AdamW(model.parameters(), lr=settings["rate"]),
                    [*callbacks, Checkpoint(settings.folder, every=1)], resume=settings.folder)  # fmt: skip
        with loop:
            for _ in loop.epochs(2):
                for step in loop.steps(loader(30, 8)):
                    if not seen and loop.state.step == 6:
                        seen.append(6)
                        raise KeyboardInterrupt
                    for micro in step:
                        with micro:
                            micro.backward(loss_fn)
                    loop.update()
                loop.validate(loss_fn, loader(20, 8, shuffle=False))
        seen.append(loop.optimizer_steps)
        return loop.state

    with pytest.raises(KeyboardInterrupt):
        grid_search(resumes, {"rate": [1e-2]}, storage=tmp_path / "a")
    cut = grid_search(resumes, {"rate": [1e-2]}, storage=tmp_path / "a")
    whole = grid_search(resumes, {"rate": [1e-2]}, storage=tmp_path / "b")
    assert seen == [6, 2, 8]
    assert rows(cut) == rows(whole)
    assert cut.trials[0].scores == whole.trials[0].scores == {"0": {"4": cut.trials[0].scores["0"]["4"], "8": cut.best.mean}}


def test_every_trial_is_on_record(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = random_search(train, RANGES, 3, storage=tmp_path, seeds=2, prune=False)
    held = json.loads((tmp_path / "results.json").read_text())
    for row, kept in zip(found.trials, held["trials"], strict=True):
        assert kept["settings"] == row.settings
        assert kept["seeds"] == [0, 1]
        assert kept["versions"]["torch"] == torch.__version__
        assert [len(scores) for scores in kept["scores"].values()] == [2, 2]
        assert [list(scores.values())[-1] for scores in kept["scores"].values()] == kept["values"] == list(row.values)
        assert kept["seconds"] > 0
        for seed in (0, 1):
            events = EventAccumulator(str(tmp_path / f"trial-{row.number:05}-seed-{seed}")).Reload()
            assert events.Scalars("val/loss")[-1].value == pytest.approx(row.values[seed])
            plugin = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
            assert b"decay" in plugin
    with open(tmp_path / "results.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [float(line["val_loss"]) for line in lines] == [row.mean for row in found.trials]
    assert (tmp_path / "results.md").read_text().rstrip() == found.table(None)
    assert (tmp_path / "importance.png").read_bytes().startswith(b"\x89PNG")
    assert sum(found.importance().values()) == pytest.approx(1.0)


def test_tables_hold_what_is_not_finite_none_and_missing_apart(tmp_path: Path) -> None:
    """JSON has no NaN, which half its readers refuse."""
    space = {"clip": [None, 1.0, math.inf], "naïve": ["λ"], "more": when("clip", 1.0, [2])}
    found = grid_search(lambda s, c: math.nan if s["clip"] is None else s["clip"], space, storage=tmp_path, prune=False)
    assert [row.state for row in found.trials] == ["fail", "complete", "fail"]
    held = json.loads((tmp_path / "results.json").read_text("utf-8"), parse_constant=pytest.fail)["trials"]
    assert [(row["settings"]["clip"], row["values"]) for row in held] == [(None, ["nan"]), (1.0, [1.0]), ("inf", ["inf"])]
    with open(tmp_path / "results.csv", newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert [(line["clip"], line["more"], line["naïve"]) for line in lines] == [
        ("None", "", "λ"),
        ("1.0", "2", "λ"),
        ("inf", "", "λ"),
    ]
    with pytest.raises(ValueError, match="count must be a whole number, at least 1, not -1"):
        found.table(-1)


def test_without_a_spread_the_table_says_so() -> None:
    found = grid_search(lambda s, c: s["x"] + (s["x"] > 1) * s.seed, {"x": [0.0, 1.0, 2.0]}, seeds=3, prune=False)
    assert "The same with every seed: 0, 1. Does train build all anew? Without a spread nothing tells chance" in str(found)


def test_importance_of_a_long_list_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    found = grid_search(number, {"x": list(range(13))}, storage=tmp_path, prune=False)
    with pytest.raises(ValueError, match="'x' is a list of 13 values, and the time that fANOVA takes doubles with each"):
        found.importance()
    assert (tmp_path / "results.md").exists()
    assert not (tmp_path / "importance.png").exists()


def test_what_chance_could_have_done_is_marked() -> None:
    clock = random.Random(0)

    def noisy(settings: Any, callbacks: Any) -> float:
        return settings["x"] + clock.gauss(0, 0.1)

    found = grid_search(noisy, {"x": [0.0, 0.01, 5.0]}, seeds=5, prune=False)
    assert found.best.number in (0, 1)
    marks = {line.split(" | ")[1]: line for line in str(found).splitlines() if line.startswith("| ") and "trial" not in line}
    chance = {x for x, line in marks.items() if "may be chance" in line}
    assert chance == {"0.01" if found.best.number == 0 else "0"}
    assert "Of 2 others 1 may be behind the best by chance alone" in str(found)
    assert "nothing tells chance from gain" in str(grid_search(noisy, {"x": [0.0, 1.0]}, prune=False))


def test_importance_is_the_share_of_the_variation_that_a_setting_explains() -> None:
    """Of 2x + y the variances are as 4 to 1; a measure of what the best few have in common would say otherwise."""
    space = {"x": uniform(0, 1), "y": uniform(0, 1), "n": [1], "more": when("n", 1, [1])}
    found = random_search(lambda s, c: 2 * s["x"] + s["y"], space, 60, prune=False)
    shares = found.importance()
    assert shares["x"] == pytest.approx(0.8, abs=0.1)
    assert shares["y"] == pytest.approx(0.2, abs=0.1)
    assert shares == found.importance()


def test_a_picture_that_cannot_be_drawn_costs_no_search(tmp_path: Path) -> None:
    found = random_search(lambda s, c: 1e308 * s["x"], {"x": uniform(0, 1)}, 4, storage=tmp_path, prune=False)
    assert found.best.state == "complete"
    assert not (tmp_path / "importance.png").exists()


def test_holms_correction() -> None:
    """Holm 1979; the example of the R manual's p.adjust: 0.01, 0.02, 0.03, 0.04 give 0.04, 0.06, 0.06, 0.06."""
    assert holm({1: 0.03, 2: 0.01, 3: 0.04, 4: 0.02}, 4) == pytest.approx({2: 0.04, 4: 0.06, 1: 0.06, 3: 0.06})
    assert holm({1: 0.01, 2: 0.03}, 6) == pytest.approx({1: 0.06, 2: 0.15})
    assert holm({}, 0) == {}


def test_where_all_settings_are_alike_one_search_in_twenty_at_most_says_otherwise() -> None:
    """The best of twelve is the luckiest: against it the unlucky look worse than against any one that was named beforehand."""
    luck = random.Random(1)

    def row(number: int) -> Row:
        return Row(number, "complete", {}, tuple(range(10)), tuple(luck.gauss(0, 1) for _ in range(10)), {}, 1.0, None, "", {})

    searches = [Searched("val_loss", "min", tuple(map(row, range(12))), None) for _ in range(100)]
    assert sum(min(found.chances().values()) < 0.05 for found in searches) <= 5


@pytest.mark.parametrize("kind", [True, "median", "halving", "hyperband", optuna.pruners.ThresholdPruner(upper=1.3)])
def test_hopeless_trials_end_early_and_whole(kind: Any, tmp_path: Path) -> None:
    """A rate of 10 is hopeless; the pruned run's files are closed, and its checkpoint can be read."""
    from hookloop.loop import store

    def many(settings: Any, callbacks: Any) -> Any:
        model = net(seed=3)
        board = [c for c in callbacks if isinstance(c, TensorBoard)]
        loop = Loop(model, torch.optim.SGD(model.parameters(), lr=settings["rate"]),
                    [*callbacks, Checkpoint(settings.folder, every=4)])  # fmt: skip
        state = loop.fit(loss_fn, loader(30, 8), loader(20, 8, shuffle=False), epochs=6)
        assert board[0]._events.file is None
        found = store.read(settings.folder)
        assert found is not None
        assert found.state["progress"]["step"] == state.step
        return state

    space = {"rate": [0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 10.0, 20.0]}
    found = grid_search(many, space, storage=tmp_path, prune=kind)
    states = [row.state for row in found.trials]
    assert "pruned" in states
    if kind != "hyperband":
        assert states[-2:] == ["pruned", "pruned"]
    for row in found.trials:
        assert (len(row.scores["0"]) < 6) == (row.state == "pruned")
        assert row.state != "fail"


def test_refine_goes_through_what_was_best_more_finely() -> None:
    space = {"rate": log_uniform(1e-6, 1.0), "size": integers(16, 256, multiple_of=16), "width": [32, 64, 128, 256],
             "act": ["relu", "gelu", "tanh"], "more": {"p": when("act", "gelu", uniform(0, 1))}}  # fmt: skip

    def bowl(settings: Any, callbacks: Any) -> float:
        return float((math.log10(settings["rate"]) + 3) ** 2 + abs(settings["width"] - 64) / 64 + (settings["act"] != "gelu"))

    first = random_search(bowl, space, 200, prune=False)
    finer = refine(first, space, keep=5)
    assert 1e-6 < finer["rate"].low < 1e-3 < finer["rate"].high < 1.0
    assert finer["rate"].log
    assert {row.settings["width"] for row in first.ranked[:5]} <= set(finer["width"])
    assert finer["act"] == ["gelu"]
    assert finer["size"].low >= 16
    assert finer["size"].high <= 256
    assert finer["size"].low % 16 == finer["size"].high % 16 == 0
    second = random_search(bowl, finer, 200, prune=False)
    assert second.best.mean < first.best.mean
    assert sum(row.mean for row in second.trials) < sum(row.mean for row in first.trials) / 3
    grid = {"rate": [1e-4, 1e-3, 1e-2], "size": [16, 32, 64], "kind": [True, False]}
    one = grid_search(lambda s, c: abs(math.log10(s["rate"]) + 3) + s["size"] / 16 + s["kind"], grid, prune=False)
    near = refine(one, grid, keep=1)
    assert near["rate"] == pytest.approx([10**-3.5, 1e-3, 10**-2.5])
    assert near["size"] == [16, 23]
    assert near["kind"] == [False]
    with pytest.raises(ValueError, match="space has no 'size', which the search had"):
        refine(one, {"rate": [1.0], "kind": [True]})
    with pytest.raises(TypeError, match="found must be what search returned"):
        refine(3, grid)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="keep must be"):
        refine(one, grid, keep=0)


def test_refine_lets_go_of_what_hangs_on_a_value_that_is_gone() -> None:
    sgd = {"momentum": [0.5, 0.9], "nesterov": when("sgd.momentum", 0.9, [True])}
    space = {"kind": ["adamw", "sgd"], "sgd": when("kind", "sgd", sgd),
             "adamw": when("kind", "adamw", {"beta": [0.9, 0.99]}), "layers": [1, 2, 4], "width": when("layers", 2, uniform(0, 1)),
             "depth": integers(1, 100), "more": when("depth", 100, [1])}  # fmt: skip
    found = random_search(lambda s, c: s["depth"] - s["layers"] - 100 * (s["kind"] == "adamw"), space, 40, prune=False)
    finer = refine(found, space, keep=1)
    assert list(finer) == ["kind", "adamw", "layers", "depth"]
    assert (finer["kind"], finer["layers"]) == (["adamw"], [found.best.settings["layers"]])
    assert random_search(lambda s, c: s["adamw"]["beta"], finer, 3, prune=False).best.state == "complete"


@pytest.mark.parametrize(("first", "second"), [([1, 2, 3], [1, 2]), (["a"], ["b"]), (["a"], [1.0]), (["a"], uniform(0, 1)),
                                               ([3.0], uniform(0, 1)), ([3], integers(2, 8, 2))])  # fmt: skip
def test_refine_with_the_space_of_another_search(first: Any, second: Any) -> None:
    found = grid_search(lambda s, c: 0.0, {"x": first[::-1]}, prune=False)
    with pytest.raises(ValueError, match=rf"space\['x'\] does not hold {first[-1]!r}, which the search had; give the space"):
        refine(found, {"x": second}, keep=1)


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "method": ({"method": "grit"}, ValueError, "method must be one of 'grid', 'random', 'tpe', not 'grit'"),
    "no trials": ({"trials": None}, ValueError, "trials"),
    "zero trials": ({"trials": 0}, ValueError, "trials must be a whole number, at least 1, not 0"),
    "grid with trials": ({"method": "grid", "trials": 5}, ValueError, "a grid says its trials itself, 2 here"),
    "jobs": ({"jobs": 10_000, "storage": "x"}, ValueError, r"jobs=10000 is more than the \d+ cores"),
    "jobs in memory": ({"jobs": 2}, ValueError, "jobs=2 share their trials through a storage: give storage="),
    "jobs in SQLite's memory": ({"jobs": 2, "storage": "sqlite://"}, ValueError, "jobs=2 share their trials through a storage"),
    "huge seed": ({"seed": 2**64}, ValueError, r"seed must be from 0 to 2\*\*64 - 1, not 18446744073709551616"),
    "no jobs": ({"jobs": 0}, ValueError, "jobs must be a whole number, at least 1, not 0"),
    "seeds": ({"seeds": 0}, ValueError, "seeds must be a whole number, at least 1, not 0"),
    "seed": ({"seed": "0"}, ValueError, "seed must be"),
    "prune": ({"prune": "best"}, ValueError, "prune must be"),
    "mode": ({"mode": "least"}, ValueError, "mode must be 'min' or 'max', not 'least'"),
    "metric": ({"metric": ""}, ValueError, "metric must be the name of a metric"),
    "train": ({"train": 3}, TypeError, "train must be a function of settings and callbacks, not 3"),
    "train of one": ({"train": lambda settings: 1.0}, TypeError, "train must take two arguments, settings and callbacks"),
    "storage": ({"storage": 3}, ValueError, "storage must be the path of a folder, a database's URL, or None, not 3"),
    "interval": ({"interval": 0}, ValueError, "interval must be"),
    "tries": ({"tries": 0}, ValueError, "tries must be"),
    "name": ({"name": ""}, ValueError, "name must be"),
    "name of a path": ({"name": "a/b"}, ValueError, "name must be a string that can name a folder, not 'a/b'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_settings(name: str) -> None:
    change, kind, text = BAD[name]
    with pytest.raises(kind, match=text):
        search(**{"train": number, "space": {"x": [1, 2]}, "trials": 2, **change})


def test_a_metric_that_never_comes_ends_the_search() -> None:
    for prune in (False, True):
        with pytest.raises(MetricMissing, match="val_acc"):
            grid_search(train, GRID, metric="val_acc", prune=prune)
    with pytest.raises(MetricMissing, match=r"metric='val_loss' is not among what train gave: a, b"):
        grid_search(lambda s, c: {"a": 1.0, "b": 2.0}, {"x": [1]}, prune=False)
    with pytest.raises(TypeError, match="train returned None"):
        grid_search(lambda s, c: None, {"x": [1]}, prune=False)


def test_a_storage_of_another_search_is_refused(tmp_path: Path) -> None:
    random_search(number, {"x": uniform(0, 1)}, 2, storage=tmp_path, prune=False)
    for space, more in (
        ({"x": uniform(0, 2)}, {}),
        ({"x": uniform(0, 1)}, {"seed": 1}),
        ({"x": uniform(0, 1)}, {"mode": "max"}),
    ):
        with pytest.raises(ValueError, match="holds another search"):
            random_search(number, space, 2, storage=tmp_path, prune=False, **more)
    other = random_search(number, {"x": uniform(0, 2), "y": [1]}, 2, storage=tmp_path, name="other", prune=False)
    assert len(other.trials) == 2
    with pytest.raises(ValueError, match="holds another search"):  # drawn in another order, its draws are others
        random_search(number, {"y": [1], "x": uniform(0, 2)}, 4, storage=tmp_path, name="other", prune=False)


def test_two_searches_in_one_folder_have_runs_and_tables_of_their_own(tmp_path: Path) -> None:
    """Or the second would go on from the checkpoints of the first."""
    folders: list[Path] = []

    def notes(settings: Any, callbacks: Any) -> float:
        folders.append(settings.folder)
        return 1.0

    for name in ({}, {"name": "a"}, {"name": "b"}):
        grid_search(notes, {"x": [1]}, storage=tmp_path, prune=False, **name)
    assert folders == [tmp_path / "trial-00000", tmp_path / "a" / "trial-00000", tmp_path / "b" / "trial-00000"]
    assert all((folder.parent / "results.json").exists() for folder in folders)


def test_jobs_need_what_other_processes_find(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"jobs=2 starts processes, which need train, and what it holds, to be found by name"):
        grid_search(lambda s, c: 1.0, {"x": [1, 2]}, storage=tmp_path, jobs=2, prune=False)


@pytest.mark.parametrize("length", [1, 2**21])
def test_a_journal_that_was_cut_off_in_a_line_is_mended(length: int, tmp_path: Path) -> None:
    first = random_search(number, {"x": uniform(0, 1)}, 2, storage=tmp_path, prune=False)
    with open(tmp_path / "trials.journal", "ab") as file:
        file.write(b'{"op_code":5,"worker_id":"' + b"1" * length)
    again = random_search(number, {"x": uniform(0, 1)}, 4, storage=tmp_path, prune=False)
    assert rows(again)[:2] == rows(first)
    assert len(rows(again)) == 4


@pytest.mark.slow
def test_hp3_eight_processes_share_fifty_trials(tmp_path: Path) -> None:
    running = [start("grid", tmp_path, "number", 50) for _ in range(8)]
    found = [ended(process) for process in running]
    assert found == [[[i, "complete", {"x": i}, [float(i)]] for i in range(50)]] * 8


def test_without_optuna_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match=r"a search runs on Optuna: pip install 'hookloop\[search\]'"):
        grid_search(number, {"x": [1]})
