"""What lasts under several ranks: checkpoints that are not the same, first weights, metrics of an interrupted epoch, the store."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import many
import pytest
import torch
import torch.distributed as dist
from helpers import Samples, built_in, loss_fn, net
from torch.utils.data import DataLoader, DistributedSampler
from torchmetrics import MaxMetric, SumMetric
from torchmetrics.aggregation import CatMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC
from torchmetrics.regression import PearsonCorrCoef
from torchmetrics.retrieval import RetrievalMAP
from torchmetrics.wrappers import Running

from hookloop.callbacks import Average, Checkpoint, EarlyStopping, Metrics, NonFinite, Seed
from hookloop.loop import Callback, Goal, Loop, State

GLOBAL = 12


def run(rank: int, world: int, folder: str, end: int, metrics: Any = None, rate: float = 0.1) -> Any:
    """A run of GLOBAL samples an update up to update `end`; what it reported at its epochs' ends, and its weights."""
    seed, data, seen = Seed(0), Samples(53, torch.float64), list[float]()
    model: Any = net(torch.float64, noise=False)
    model = many.wrap(model, "ddp") if world > 1 else model
    place = Path(folder)

    class Keep(Callback):
        def on_validation_end(self, state: State) -> None:
            seen.append(float(state.metrics.get("train_kept", 0.0)))

    more = [] if metrics is None else [Metrics({"kept": metrics}, training=True)]
    loop = Loop(model, torch.optim.SGD(model.parameters(), lr=rate), [seed, *more, Keep(), Checkpoint(place)], resume=place)
    built_in(loop, loss_fn, DataLoader(data, GLOBAL // world, sampler=DistributedSampler(data, world, rank)), steps=end)
    return seen, many.weights(model)


def apart(rank: int, world: int, folder: str, end: int) -> Any:
    return run(rank, world, f"{folder}/{rank}", end)


@pytest.mark.slow
def test_dd5_checkpoints_of_one_name_and_two_contents_are_not_one(tmp_path: Path) -> None:
    """Folders of two machines, each with a step-3 of a run of its own: ranks would drift apart for good, without a word."""
    for rank in range(2):
        many.values(run, 2, str(tmp_path / str(rank)), 3, None, 0.1 + rank)
    for error in many.errors(apart, 2, str(tmp_path), 6):
        assert "step-00000003" in error
        assert "a folder that all ranks see" in error


@pytest.mark.slow
def test_dd5_the_newest_that_is_one_is_taken(tmp_path: Path) -> None:
    many.values(run, 2, str(tmp_path / "0"), 2)
    shutil.copytree(tmp_path / "0", tmp_path / "1")
    for rank in range(2):
        many.values(run, 2, str(tmp_path / str(rank)), 3)  # alike, and written twice
    whole = many.values(run, 2, str(tmp_path / "whole"), 5)
    for _, weights in many.values(apart, 2, str(tmp_path), 5):
        many.close(weights, whole[0][1])


def drawn(rank: int, world: int, how: str) -> Any:
    """The weights of a new model as all ranks have them, and what a rank draws once it trains."""
    seed = Seed(3)
    model = many.wrap(torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 2)), how)
    found = many.weights(model)
    with Loop(model, torch.optim.SGD(model.parameters(), lr=0.1), [seed]):
        return found, float(torch.rand(()))


@pytest.mark.parametrize("how", many.WRAPS)
def test_a_seed_gives_the_same_first_weights_on_any_number_of_ranks(how: str) -> None:
    Seed(3)
    alone = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 2)).state_dict()
    (found, a), (_, b) = many.values(drawn, 2, how)
    assert not [name for name in alone if not torch.equal(alone[name], found[name])]
    assert a != b


@pytest.mark.parametrize(
    "worlds", [(2, 1), pytest.param((1, 2), marks=pytest.mark.slow)], ids=lambda worlds: "-".join(map(str, worlds))
)
@pytest.mark.parametrize("metric", [MulticlassAccuracy(3, average="micro")], ids=["sum"])
def test_rs6_training_metrics_hold_each_sample_once_whatever_the_ranks(tmp_path: Path, worlds: tuple[int, int],
                                                                       metric: Any) -> None:  # fmt: skip
    (expected, _), *_ = many.values(run, worlds[0], str(tmp_path / "whole"), 5, metric)
    many.values(run, worlds[0], str(tmp_path / "changed"), 3, metric)
    found = many.values(run, worlds[1], str(tmp_path / "changed"), 5, metric)
    assert [each[0] for each in found] == [pytest.approx(expected, rel=1e-6)] * worlds[1]


def test_rs6_states_of_a_metric_are_joined_or_refused() -> None:
    mine = Metrics({"all": CatMetric()}, training=True)
    states: list[Any] = [{"all": {"": [{"value": [torch.tensor([float(i)])]}, {"_update_count": 1}]}} for i in range(2)]
    both = [torch.tensor([0.0]), torch.tensor([1.0])]
    assert mine.joined(states, True) == {"all": {"": [{"value": both}, {"_update_count": 2}]}}
    ((other, _),) = mine.joined(states, False)["all"].values()
    assert [x.shape for x in other["value"]] == [(0,)]
    assert mine.joined([{"all": {"": [{"value": []}, {"_update_count": 0}]}}], False)["all"][""][0] == {"value": []}
    before: list[Any] = [{"all": [{"value": [torch.tensor([float(i)])]}, 1]} for i in range(2)]  # of an older checkpoint
    assert mine.joined(before, True) == mine.joined(states, True)


def taken_up(rank: int, world: int, states: list[Any]) -> Any:
    """What a metric is over all ranks, of which the first alone has something."""
    mine = Metrics({"auc": MulticlassAUROC(3), "all": CatMetric()}, training=True)
    mine.load_state_dict(mine.joined(states, rank == 0))
    return float(mine.training["auc"].compute()), mine.training["all"].compute().tolist()


def test_rs6_lists_of_a_metric_are_gathered_where_the_first_rank_alone_has_any() -> None:
    """As in a run that was cut off in its epoch's validation."""
    alone = Metrics({"auc": MulticlassAUROC(3), "all": CatMetric()}, training=True)
    alone.training["auc"].update(torch.randn(9, 3), torch.arange(9) % 3)
    alone.training["all"].update(torch.tensor(4.0))
    expected = float(alone.training["auc"].compute()), 4.0
    assert many.values(taken_up, 2, [alone.state_dict()]) == [expected] * 2


def test_rs6_lists_that_are_sent_one_by_one_are_for_one_process() -> None:
    mine = Metrics({"of": RetrievalMAP()}, training=True)
    mine.training["of"].update(torch.tensor([0.2, 0.7]), torch.tensor([0, 1]), torch.tensor([0, 0]))
    assert len(mine.joined([mine.state_dict()] * 2, True)["of"][""][0]["preds"]) == 2
    with pytest.raises(ValueError, match=r"'of', whose indexes is a list; resume with as many, or with one"):
        mine.joined([mine.state_dict()] * 2, False)


def test_rs6_each_metric_inside_a_metric_is_joined_by_itself() -> None:
    make = lambda: Metrics({"of": MaxMetric() + 2 * Running(SumMetric(), 2)}, training=True)
    ranks, mine = [make(), make()], make()
    for i, rank in enumerate(ranks):
        for value in (10.0 * i + 1, 10.0 * i + 2, 10.0 * i + 4):
            rank.training["of"].update(torch.tensor(value))
    mine.load_state_dict(mine.joined([rank.state_dict() for rank in ranks], True))
    assert mine.training["of"].compute() == 14 + 2 * (2 + 4 + 12 + 14)
    mine.training["of"].update(torch.tensor(100.0))  # the window goes on where the ranks' stood
    assert mine.training["of"].compute() == 100 + 2 * (4 + 14 + 100)
    other = make()
    other.load_state_dict(other.joined([rank.state_dict() for rank in ranks], False))
    assert other.state_dict()["of"]["metric_a"][0] == MaxMetric().metric_state
    ranks[0] = make()  # one that was fed nothing stands in no window
    mine = make()
    mine.load_state_dict(mine.joined([rank.state_dict() for rank in ranks], True))
    assert mine.training["of"].compute() == 14 + 2 * (12 + 14)
    no_sum = Metrics({"of": PearsonCorrCoef() * 2}, training=True)
    with pytest.raises(ValueError, match=r"'of', whose metric_a\.mean_x is no sum; resume with as many"):
        no_sum.joined([no_sum.state_dict()] * 2, True)


KEEPS: dict[str, Any] = {
    "stop": lambda: EarlyStopping(Goal("val_loss", mode="max", patience=99), restore_best=True),
    "average": lambda: Average("ema", 0.8),
    "rollback": lambda: NonFinite("rollback", every=3),
}


def keeps(rank: int, world: int, folder: str, what: str, how: str) -> list[Any]:
    """Statistics of which each rank has its own, after a whole run and after one that was resumed."""
    found, data = list[Any](), Samples(24)

    class Spoil(Callback):
        def on_before_optimizer_step(self, state: State) -> None:
            if state.step + state.skipped == 4 and rank == 0 and what == "rollback":
                next(state.model.parameters()).grad.fill_(float("nan"))  # type: ignore[union-attr]

    for place, ends in ((f"{folder}/whole", [6]), (f"{folder}/cut", [4, 6])):
        for end in ends:
            seed, model = Seed(0), torch.nn.Sequential(torch.nn.Linear(6, 12), torch.nn.BatchNorm1d(12), torch.nn.Linear(12, 3))
            shared = many.wrap(model, how, **({"broadcast_buffers": False} if how == "ddp" else {}))
            callbacks = [seed, keep := KEEPS[what](), Spoil(), Checkpoint(place)]
            loop = Loop(shared, torch.optim.SGD(shared.parameters(), lr=0.1), callbacks, resume=place)
            train = DataLoader(data, 4, sampler=DistributedSampler(data, world, rank))
            val = DataLoader(data, 6, sampler=DistributedSampler(data, world, rank, shuffle=False))
            state = built_in(loop, loss_fn, train, val, steps=end)
        kept = many.weights(keep.model) if what == "average" else {}
        found.append((state.metrics["val_loss"], state.skipped, many.weights(shared), kept))
    return found


@pytest.mark.parametrize(("what", "how"), [("stop", "fsdp"), ("average", "ddp"), ("rollback", "ddp")])
def test_statistics_in_what_a_callback_keeps_are_each_ranks_own_after_a_resume(tmp_path: Path, what: str, how: str) -> None:
    ranks = many.values(keeps, 2, str(tmp_path), what, how)
    for whole, resumed in ranks:
        assert whole[:2] == resumed[:2] == (ranks[0][0][0], what == "rollback")
        for a, b in zip(whole[2:], resumed[2:], strict=True):
            assert [name for name in a if not torch.equal(a[name], b[name])] == []
    one, other = (rank[0][3 if what == "average" else 2] for rank in ranks)
    name = next(name for name in one if "running_mean" in name)
    assert not torch.equal(one[name], other[name]), "else there is nothing to tell apart"


def stale(rank: int, world: int) -> None:
    """A second life under the store of a first, in which rank 0 failed; here rank 1 ends without a word."""
    store = dist.distributed_c10d._get_default_store()
    for place in ("hookloop/1", "hookloop/2"):
        store.set(f"{place}/failed/1", "rank 0 failed: KeyError: 'long ago'")
        store.set(f"{place}/alive/1", "")
        store.add(f"{place}/failures", 1)
    model = many.wrap(net(noise=False), "ddp")

    class Leave(Callback):
        def on_step_end(self, state: State) -> None:
            if rank == 1:
                raise ValueError("just now")

    data = Samples(24)
    Loop(model, torch.optim.SGD(model.parameters(), lr=0.1), [Leave()]).fit(
        loss_fn, DataLoader(data, 4, sampler=DistributedSampler(data)), epochs=1
    )


def test_dd3_an_error_of_the_life_before_is_not_told_as_this_ones() -> None:
    """The store of torchrun's agent stays as it is when the ranks are started again."""
    for error in many.errors(stale, 2):
        assert "just now" in error
        assert "long ago" not in error


def sharded_apart(rank: int, world: int, folder: str) -> None:
    model = many.wrap(net(noise=False), "fsdp")
    data = Samples(24)
    steps = list[int]()

    class Count(Callback):
        def on_step_end(self, state: State) -> None:
            steps.append(state.step)

    try:
        Loop(model, torch.optim.SGD(model.parameters(), lr=0.1), [Count(), Checkpoint(f"{folder}/{rank}")]).fit(
            loss_fn, DataLoader(data, 4, sampler=DistributedSampler(data)), epochs=1
        )
    finally:
        assert not steps


def hide(folder: str, rank: int) -> None:
    """Have this rank see no folder of rank 0's, as on another machine."""
    import os

    access = os.access
    os.access = lambda path, *mode: (rank == 0 or f"{folder}/0" not in str(path)) and access(path, *mode)  # type: ignore[assignment]


def sharded_on_two_machines(rank: int, world: int, folder: str) -> None:
    hide(folder, rank)
    sharded_apart(rank, world, folder)


def test_dd4_shards_that_would_go_to_two_folders_are_refused_at_the_start(tmp_path: Path) -> None:
    """And not at the first save, after hours of training."""
    for error in many.errors(sharded_on_two_machines, 2, str(tmp_path)):
        assert "another folder on rank 1" in error
        assert "all ranks share" in error
