"""Cross-validation: the splitter's samples and no others, each fold from new, and resumed to the bit."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from helpers import KillAt, Killed, Samples, adamw, assert_same_bits, bits, loss_fn, net
from sklearn.model_selection import GroupKFold, KFold, LeaveOneOut, ShuffleSplit, StratifiedKFold, TimeSeriesSplit
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from hookloop.callbacks import Checkpoint, EarlyStopping, Schedule, Seed, TensorBoard
from hookloop.loop import Callback, Loop, State
from hookloop.loop.study import cross_validate
from hookloop.loop.study.folds import Folds

DATA = Samples(46)
LABELS = DATA.y
GROUPS = torch.arange(46) // 4 % 7


class Seen(Callback):
    """Which samples each update's and each validation's micro-batches held, by what the samples say of themselves."""

    def __init__(self) -> None:
        self.train: list[list[int]] = []
        self.val: set[int] = set()

    def on_epoch_start(self, state: State) -> None:
        self.train.append([])

    def on_micro_end(self, state: State) -> None:
        assert state.micro is not None
        if state.micro.training:
            self.train[-1] += state.micro.batch[2].tolist()
        else:
            self.val |= {*state.micro.batch[2].tolist()}


def build(fold: int, *more: Callback) -> Any:
    seed, model = Seed(fold), net(seed=fold, noise=False)
    return model, adamw(model), [seed, *more]


def validate(splitter: Any = None, build: Any = build, data: Any = DATA, **kw: Any) -> Folds:
    settings = {"loss_fn": loss_fn, "epochs": 2, "batch_size": 8, **kw}
    return cross_validate(build, data, splitter or KFold(3), **settings)


def test_each_value_is_that_of_a_loop_of_its_own() -> None:
    found = validate(metric="val_accuracy")
    for fold, (train, val) in enumerate(KFold(3).split(range(46))):
        model, optimizer, callbacks = build(fold)
        state = Loop(model, optimizer, callbacks).fit(
            loss_fn,
            DataLoader(Subset(DATA, train.tolist()), 8, shuffle=True),
            DataLoader(Subset(DATA, val.tolist()), 8),
            epochs=2,
        )
        assert found.metrics[fold] == {name: state.metrics[name] for name in ("val_loss", "val_accuracy")}
        assert found.values[fold] == state.metrics["val_accuracy"]
        assert found.folds[fold].train == tuple(train.tolist())
    assert (found.name, found.seeds) == ("val_accuracy", (0, 1, 2))


class Own:
    """A splitter that is not scikit-learn's."""

    def split(self, X: Any, y: Any = None, groups: Any = None) -> Any:
        assert (len(X), y, groups) == (46, None, None)
        return [([0, 1, 2, 3], [9]), (np.arange(20, 30), torch.tensor([1, 45]))]


SPLITTERS = {
    "k-fold": (KFold(4, shuffle=True, random_state=1), {}), "stratified": (StratifiedKFold(3), {"stratify": LABELS}),
    "grouped": (GroupKFold(3), {"groups": GROUPS}), "time": (TimeSeriesSplit(4), {}), "own": (Own(), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", SPLITTERS)
def test_the_samples_of_a_fold_are_the_splitters(name: str) -> None:
    splitter, kw = SPLITTERS[name]
    seen: list[Seen] = []

    def watched(fold: int) -> Any:
        seen.append(Seen())
        return build(fold, seen[-1])

    found = validate(splitter, watched, **kw)
    pairs = [*splitter.split(range(46), kw.get("stratify"), kw.get("groups"))]
    assert len(pairs) == len(seen) == len(found.folds)
    for (train, val), one in zip(pairs, seen, strict=True):
        assert [sorted(epoch) for epoch in one.train] == [sorted(map(int, train))] * 2
        assert one.val == {*map(int, val)}
        assert one.train[0] != one.train[1]  # shuffled
        if name == "time":
            assert max(one.train[0] + one.train[1]) < min(one.val)
        if name == "grouped":
            assert not {*GROUPS[one.train[0]].tolist()} & {*GROUPS[[*one.val]].tolist()}
        if name == "stratified":
            counts = torch.bincount(LABELS[[*one.val]], minlength=3)
            assert (counts - torch.bincount(LABELS) / 3).abs().max() < 1


def test_time_is_never_shuffled_across_folds_nor_within_if_asked() -> None:
    seen = [Seen(), Seen(), Seen()]
    validate(TimeSeriesSplit(3), lambda fold: build(fold, seen[fold]), shuffle=False)
    for one in seen:
        assert one.train[0] == one.train[1] == sorted(one.train[0])
        assert max(one.train[0]) < min(one.val)


def test_validation_may_have_samples_of_its_own() -> None:
    x, y = DATA.x, DATA.y
    other = TensorDataset(x + 100, y, torch.arange(46))
    seen = [Seen(), Seen()]
    validate(KFold(2), lambda fold: build(fold, seen[fold]), val_dataset=other)
    assert seen[0].val == {*range(23)}
    assert validate(KFold(2), val_dataset=other).values != validate(KFold(2)).values
    with pytest.raises(ValueError, match="val_dataset has 45 samples, dataset 46"):
        validate(val_dataset=Subset(DATA, range(45)))


def test_the_interval_against_the_formula() -> None:
    found = validate(KFold(4))
    values = np.array(found.values)
    assert found.mean == pytest.approx(values.mean())
    assert found.std == pytest.approx(values.std(ddof=1))
    share = np.mean([len(fold.val) / len(fold.train) for fold in found.folds])
    half = scipy.stats.t.ppf(0.95, 3) * found.std * (1 / 4 + share) ** 0.5
    assert found.interval(0.9) == pytest.approx((found.mean - half, found.mean + half))
    lines = str(found).splitlines()
    assert lines[0] == "| fold | trained on | validated on | val_loss |"
    assert lines[2] == f"| 0 | 34 | 12 | {found.values[0]:.6g} |"
    assert lines[-1].startswith(f"| mean | | | {found.mean:.6g} (standard deviation {found.std:.3g}, 95% interval ")
    assert len({line.count("|") for line in lines}) == 1


def unseeded(fold: int, *more: Callback) -> Any:
    model = nn.Sequential(nn.Linear(6, 12), nn.Dropout(0.3), nn.Linear(12, 3))
    return model, adamw(model), more


def test_no_fold_hangs_on_another_nor_on_the_program() -> None:
    class Last:
        def split(self, X: Any, y: Any = None, groups: Any = None) -> Any:
            folds = [*KFold(3).split(X)]
            return [([0, 1], [2]), *folds[1:]]

    torch.manual_seed(1)
    before = torch.get_rng_state()
    found = validate(build=unseeded)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert validate(build=unseeded).values == found.values
    assert validate(Last(), unseeded).values[1:] == found.values[1:]
    assert validate(build=unseeded, seed=1).values != found.values


@pytest.mark.parametrize("make", [build, unseeded])
def test_killed_at_each_update_and_started_again(tmp_path: Path, make: Any) -> None:
    """Two folds of 2 x 3 updates; what is done is not built again, and what is open goes on."""
    built: list[int] = []
    ends: dict[str, Any] = {}

    class Keep(Callback):
        def on_fit_end(self, state: State) -> None:
            ends["last"] = bits(Loop(state.model, state.optimizer)) if state.step == 6 else None

    def at(kill: tuple[int, int] | None) -> Any:
        def one(fold: int) -> Any:
            built.append(fold)
            rates = Schedule(lambda o, total: torch.optim.lr_scheduler.CosineAnnealingLR(o, total))
            return make(fold, rates, Keep(), *([KillAt(kill[1])] if kill and kill[0] == fold else []))

        return one

    whole = validate(KFold(2), at(None), folder=tmp_path / "whole")
    assert whole.values == validate(KFold(2), at(None)).values
    last = ends["last"]
    for fold in range(2):
        for step in range(1, 7):
            folder = tmp_path / f"{fold}-{step}"
            with pytest.raises(Killed) as killed:
                validate(KFold(2), at((fold, step)), folder=folder)
            assert (
                killed.value.__notes__[-1] == f"in fold {fold}; val_loss of the folds that had ended: {[*whole.values[:fold]]}"
            )
            built.clear()
            again = validate(KFold(2), at(None), folder=folder)
            assert built == [*range(fold, 2)]
            assert again == whole
            assert_same_bits(ends["last"], last)
    built.clear()
    assert validate(KFold(2), at(None), folder=tmp_path / "whole") == whole
    assert not built


def test_a_fold_that_died_before_its_result_was_written(tmp_path: Path) -> None:
    whole = validate(KFold(2), folder=tmp_path)
    path = tmp_path / "fold-1.json"
    content = json.loads(path.read_text())
    del content["metrics"]
    path.write_text(json.dumps(content))
    assert validate(KFold(2), folder=tmp_path) == whole
    assert json.loads(path.read_text())["metrics"] == whole.metrics[1]


def test_one_tensorboard_run_a_fold(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

    found = validate(KFold(3), folder=tmp_path)
    runs = EventMultiplexer().AddRunsFromDirectory(str(tmp_path))
    runs.Reload()
    assert sorted(runs.Runs()) == ["fold-0", "fold-1", "fold-2"]
    for fold in range(3):
        curve = runs.Scalars(f"fold-{fold}", "val/loss")
        assert [point.step for point in curve] == [4, 8]
        assert curve[-1].value == pytest.approx(found.values[fold])


def test_the_metric_is_of_the_model_as_training_left_it() -> None:
    def best(fold: int) -> Any:
        model, _, callbacks = build(fold)
        return model, adamw(model, 0.3), [*callbacks, EarlyStopping(patience=9, restore_best=True), Low()]

    lowest: list[float] = []

    class Low(Callback):
        def __init__(self) -> None:
            self.values: list[float] = []

        def on_validation_end(self, state: State) -> None:
            self.values.append(state.metrics["val_loss"])

        def on_fit_end(self, state: State) -> None:
            lowest.append(min(self.values))
            assert lowest[-1] < self.values[-1]

    assert list(validate(KFold(2), best, epochs=6).values) == lowest


def test_callbacks_of_the_programs_own_for_what_a_folder_gives(tmp_path: Path) -> None:
    def own(fold: int) -> Any:
        place = tmp_path / f"fold-{fold}"
        return build(fold, Checkpoint(place / "saved", every=1), TensorBoard(place / "curves", every=1))

    found = validate(KFold(2), own, folder=tmp_path)
    assert found == validate(KFold(2))
    assert (tmp_path / "fold-1/saved/step-00000006").is_dir()
    shared = lambda fold: build(fold, Checkpoint(tmp_path / "all"))
    with pytest.raises(
        ValueError, match=r"build gave fold 0 a Checkpoint of '.*all', which other folds could go on from; give it"
    ):
        validate(KFold(2), shared, folder=tmp_path / "other")


def test_what_an_earlier_fold_has_trained_is_refused() -> None:
    model = net(noise=False)
    layers = [nn.Linear(6, 12), nn.Linear(12, 3)]
    callback = Seen()

    def same_layers(fold: int) -> Any:
        fresh = nn.Sequential(*layers)
        return fresh, adamw(fresh), []

    with pytest.raises(ValueError, match="build gave fold 1 the model of an earlier fold, which has seen other samples"):
        validate(build=lambda fold: (model, adamw(model), []))
    with pytest.raises(ValueError, match=r"build gave fold 1 the 0\.weight of an earlier fold"):
        validate(build=same_layers)
    with pytest.raises(ValueError, match="build gave fold 1 the Seen of an earlier fold"):
        validate(build=lambda fold: build(fold, callback))
    optimizer = adamw(net())
    with pytest.raises(ValueError, match="none of the 6 tensors in AdamW is a parameter of the model"):
        validate(build=lambda fold: (net(), optimizer, []))
    with pytest.raises(ValueError, match="the same Seed stands in callbacks twice"):
        validate(build=lambda fold: (net(), adamw(net()), [seed := Seed(0), seed]))


def test_a_relative_folder_stays_where_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)

    def moving(fold: int) -> Any:
        monkeypatch.chdir(tmp_path / "elsewhere")
        return build(fold)

    validate(KFold(2), moving, epochs=1, folder="folds")
    assert sorted(path.name for path in (tmp_path / "folds").iterdir()) == ["fold-0", "fold-0.json", "fold-1", "fold-1.json"]
    assert not [*Path().iterdir()]


class Gives:
    def __init__(self, *pairs: Any) -> None:
        self.pairs = pairs

    def split(self, X: Any, y: Any = None, groups: Any = None) -> Any:
        return list(self.pairs)


GOOD = ([0, 1], [2])


@pytest.mark.parametrize(("what", "kind", "says"), [
    ({"splitter": 5}, TypeError, r"splitter must have split\(X, y, groups\), as scikit-learn's KFold\(5\) has, not 5"),
    ({"splitter": "5"}, TypeError, "not '5'"), ({"splitter": KFold}, TypeError, "splitter must have split"),
    ({"splitter": Gives(GOOD)}, ValueError, r"splitter gives 1 fold\(s\); a spread needs two"),
    ({"splitter": Gives(GOOD, ([], [1]))}, ValueError, "fold 1 has 0 samples to train on and 1 to validate on"),
    ({"splitter": Gives(GOOD, ([1], []))}, ValueError, "fold 1 has 1 samples to train on and 0 to validate on"),
    ({"splitter": Gives(GOOD, ([1, 2], [2, 3]))}, ValueError, "fold 1 validates on 1 samples that it trains on, such as 2"),
    ({"splitter": Gives(GOOD, ([1, 2], [46]))}, ValueError, "fold 1 holds position 46, and the data set has 0 to 45"),
    ({"splitter": Gives(GOOD, ([-1, 2], [4]))}, ValueError, "fold 1 holds position -1"),
    ({"splitter": Gives(GOOD, ([1.0, 2], [4]))}, TypeError, "splitter must give positions, whole numbers, not 1.0"),
    ({"splitter": Gives(GOOD, (np.array([True, False]), [4]))}, TypeError, "not True"),
    ({"splitter": GroupKFold(3)}, ValueError, "groups"),
    ({"splitter": KFold(99)}, ValueError, "splits"),
    ({"stratify": [1, 2]}, ValueError, "stratify must hold one for each of the 46 samples, not 2"),
    ({"groups": 3}, ValueError, "groups must hold one for each of the 46 samples, not None"),
    ({"data": iter([])}, ValueError, "dataset, a list_iterator, must hold samples"),
    ({"data": []}, ValueError, "must hold samples"), ({"epochs": 0}, ValueError, "epochs must be a whole number, at least 1"),
    ({"batch_size": 0}, ValueError, "batch_size must"), ({"seed": -1}, ValueError, "seed must be a whole number, at least 0"),
    ({"shuffle": 1}, TypeError, "shuffle must be True or False"), ({"metric": ""}, ValueError, "metric must be the name"),
    ({"folder": ""}, ValueError, "folder must be the path of a folder, such as 'runs/folds', or None, not ''"),
    ({"folder": 5}, ValueError, "folder must be .* not 5"), ({"loading": 5}, TypeError, "loading must map names .* not 5"),
    ({"loading": {"nonsense": 1}}, TypeError, "loading can't hold 'nonsense'; it takes collate_fn, drop_last"),
    ({"loading": {"shuffle": False}}, TypeError, "loading can't hold 'shuffle'"),
    ({"loading": {"generator": torch.Generator()}}, TypeError, "'generator'.* one sampler or generator for all folds would carry"),
    ({"build": 3}, TypeError, "build must be a function"), ({"loss_fn": None}, TypeError, "loss_fn must be a function"),
    ({"scaler": 1}, TypeError, "no setting 'scaler'; of Loop's it takes"), ({"resume": "x"}, TypeError, "no setting 'resume'"),
])  # fmt: skip
def test_bad_arguments_are_said_before_any_training(what: dict[str, Any], kind: Any, says: str) -> None:
    with pytest.raises(kind, match=says):
        validate(**{"build": lambda fold: pytest.fail("built"), **what})


def test_labels_that_are_missing_are_asked_for() -> None:
    with pytest.raises((TypeError, ValueError)) as error:
        validate(StratifiedKFold(3))
    assert error.value.__notes__ == ["from StratifiedKFold.split; labels are given as stratify=, groups as groups="]


@pytest.mark.parametrize("given", [None, 3, (1, 2), (1, 2, 3), (None, None, []), (nn.Linear(1, 1), None, [])])
def test_what_build_must_return(given: Any) -> None:
    with pytest.raises(TypeError, match=r"build must return \(model, optimizer, callbacks\), not"):
        validate(build=lambda fold: given)


def test_a_metric_that_is_not_there_or_not_finite(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="metric='val_acc' is not among what was reported: val_accuracy, val_loss"):
        validate(metric="val_acc", folder=tmp_path)
    assert "metrics" not in json.loads((tmp_path / "fold-0.json").read_text())
    bad = lambda model, batch: loss_fn(model, batch)["loss"] * (1.0 if model.training else float("nan"))
    with pytest.raises(ValueError, match="val_loss is nan: a spread of it means nothing"):
        validate(loss_fn=bad)


def test_a_fold_that_is_left_goes_on(tmp_path: Path) -> None:
    class Leave(Callback):
        def on_step_end(self, state: State) -> None:
            if state.step == 5 and leave:
                state.leave("asked")

    leave = [True]
    whole = validate(KFold(2))
    with pytest.raises(ValueError, match=r"the fold was left early \(asked\)"):
        validate(KFold(2), lambda fold: build(fold, Leave()), folder=tmp_path)
    leave.clear()
    assert validate(KFold(2), lambda fold: build(fold, Leave()), folder=tmp_path) == whole


def test_a_folder_of_other_folds_is_refused(tmp_path: Path) -> None:
    validate(KFold(2), folder=tmp_path)
    with pytest.raises(ValueError, match=re.escape("is of other folds (epochs: 3 here and 2 there)")):
        validate(KFold(2), folder=tmp_path, epochs=3)
    with pytest.raises(ValueError, match=r"trains on: 23 samples, \w{16} here and 23 samples, \w{16} there"):
        validate(KFold(2, shuffle=True, random_state=0), folder=tmp_path)
    with pytest.raises(ValueError, match="give it a number as random_state"):
        validate(ShuffleSplit(2), folder=tmp_path / "new")
    assert len(validate(ShuffleSplit(2)).values) == 2
    for damage in ("{", "[1]", "null"):
        (tmp_path / "fold-1.json").write_text(damage)
        with pytest.raises(
            ValueError, match=r"fold-1\.json is damaged \(.*\); delete it with .*fold-1, and the fold is trained"
        ):
            validate(KFold(2), folder=tmp_path)
    (tmp_path / "old/fold-0").mkdir(parents=True)
    (tmp_path / "old/fold-0/x").write_text("")
    with pytest.raises(ValueError, match="holds files of another run"):
        validate(KFold(2), folder=tmp_path / "old")


def test_settings_reach_the_loop_and_the_loaders() -> None:
    weighed: list[int] = []
    plain = validate(KFold(2))
    assert validate(KFold(2), weigh=lambda b: weighed.append(len(b[0])) or len(b[0])).values == plain.values
    assert sum(weighed[:3]) == 23
    weighed.clear()
    short = validate(KFold(2), loading={"drop_last": True}, weigh=lambda b: weighed.append(len(b[0])) or len(b[0]))
    assert short.values != plain.values
    assert sum(weighed) == 2 * (2 * 16 + 3 * 23)  # trained in whole batches, validated on every sample


def test_positions_may_be_a_list_of_numpys_numbers() -> None:
    found = validate(Gives(([*np.arange(5)], [*np.arange(5, 9)]), (torch.arange(5, 9), (0, 1))))
    assert [fold.val for fold in found.folds] == [(5, 6, 7, 8), (0, 1)]


def test_leave_one_out() -> None:
    found = validate(LeaveOneOut(), data=Subset(DATA, range(5)), epochs=1)
    assert [fold.val for fold in found.folds] == [(i,) for i in range(5)]
