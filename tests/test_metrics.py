"""Metrics: torchmetrics over validation and training, equal to what torchmetrics gives by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FORMS, Samples, adamw, assert_same_bits, bits, built_in, loader, loss_fn, net
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
    MulticlassROC,
)
from torchmetrics.wrappers import ClasswiseWrapper, LambdaInputTransformer, MinMaxMetric, Running

from hookloop.callbacks import Checkpoint, GradientAccumulation, Metrics, MicroBatch, Seed
from hookloop.loop import Callback, Loop, State


def two() -> dict[str, Any]:
    return {"acc": MulticlassAccuracy(3), "auroc": MulticlassAUROC(3)}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [None, 5])
def test_validation_equals_torchmetrics_on_the_whole_set(form: Any, size: int | None) -> None:
    model = net()
    callbacks = [Metrics(two()), *([MicroBatch(size)] if size else [])]
    state = form(Loop(model, adamw(model), callbacks), loss_fn, loader(), loader(40, 16), epochs=2)
    model.eval()
    data = Samples(40)
    for name, metric in two().items():
        with torch.no_grad():
            assert state.metrics[f"val_{name}"] == pytest.approx(float(metric(model(data.x), data.y)), rel=1e-6)


@pytest.mark.parametrize("given", [
    MulticlassAccuracy(3), {"accuracy_of": MulticlassAccuracy(3)},
    MetricCollection({"accuracy_of": MulticlassAccuracy(3), "f1": MulticlassF1Score(3)}),
])  # fmt: skip
def test_forms_of_the_argument(given: Any) -> None:
    model = net()
    state = built_in(Loop(model, adamw(model), [Metrics(given)]), plain, loader(), {"a": loader(), "b": loader(9)}, epochs=1)
    name = "accuracy" if isinstance(given, MulticlassAccuracy) else "accuracy_of"
    assert {f"val_a_{name}", f"val_b_{name}"} <= state.metrics.keys()
    assert state.metrics[f"val_a_{name}"] != state.metrics[f"val_b_{name}"]


def plain(model: Any, batch: Any) -> Any:
    found = loss_fn(model, batch)
    return {k: found[k] for k in ("loss", "preds", "target")}


class Keep(Callback):
    """What training's outputs were, in the epoch."""

    def __init__(self) -> None:
        self.pairs: list[Any] = []
        self.expected: list[float] = []

    def on_micro_end(self, state: State) -> None:
        if state.micro.training:
            self.pairs.append((state.micro.outputs["preds"], state.micro.outputs["target"]))

    def on_epoch_end(self, state: State) -> None:
        preds, target = (torch.cat(part) for part in zip(*self.pairs, strict=True))
        self.expected.append(float(MulticlassAccuracy(3)(preds, target)))
        self.pairs = []


def test_training_is_of_the_epoch() -> None:
    model, keep, reported = net(), Keep(), []

    class Reported(Callback):
        def on_epoch_end(self, state: State) -> None:
            reported.append(state.metrics["train_acc"])

    callbacks = [Reported(), Metrics(two(), training=True), keep, GradientAccumulation(2)]
    built_in(Loop(model, adamw(model), callbacks), loss_fn, loader(), loader(), epochs=3)
    assert reported == pytest.approx(keep.expected, rel=1e-6)


@pytest.mark.parametrize("order", [1, -1])
def test_a_watcher_reads_it_whatever_the_order(order: int) -> None:
    from hookloop.callbacks import EarlyStopping

    model = net()
    callbacks = [Metrics(two()), EarlyStopping("val_auroc", mode="max", patience=99)][::order]
    state = built_in(Loop(model, adamw(model), callbacks), loss_fn, loader(), loader(), epochs=2)
    assert callbacks[::order][1].tracker.best >= state.metrics["val_auroc"]


def test_watching_is_free_and_a_redo_is_not_counted_twice() -> None:
    def run(watch: list[Callback]) -> Any:
        failed = []

        def loss(model: Any, batch: Any) -> Any:
            if model.training and len(batch[0]) > 3:
                failed.append(1)
                raise torch.OutOfMemoryError("CUDA out of memory")
            return loss_fn(model, batch)

        seed, model = Seed(1), net(seed=1)
        loop = Loop(model, adamw(model), [*watch, seed, MicroBatch("auto"), GradientAccumulation(2)])
        state = built_in(loop, loss, loader(48), loader(), epochs=1)
        assert failed
        return bits(loop), state

    keep = Keep()
    watched, state = run([Metrics(two(), training=True)])
    assert_same_bits(watched, run([])[0])
    assert 0 <= state.metrics["train_acc"] <= 1
    metric = Metrics(two(), training=True)
    run([metric, keep])
    assert int(metric.training["acc"].update_count) == 0  # reset at the epoch's end


def test_training_metric_survives_a_resume(tmp_path: Path) -> None:
    def run(folder: Path, *ends: int) -> Any:
        for end in ends:
            seed, model = Seed(1), net(seed=1)
            callbacks = [seed, Metrics(two(), training=True), Checkpoint(folder)]
            state = built_in(Loop(model, adamw(model), callbacks, resume=folder), loss_fn, loader(), loader(), steps=end)
        return state.metrics["train_acc"], state.metrics["train_auroc"]

    assert run(tmp_path / "a", 7) == run(tmp_path / "b", 2, 5, 7)


def made() -> dict[str, Any]:
    return {
        "of_two": 100 * (MulticlassAccuracy(3) + MulticlassF1Score(3)) / 2,
        "wrapped": LambdaInputTransformer(MulticlassAccuracy(3), transform_target=lambda target: 2 - target),
        "window": Running(MulticlassAccuracy(3), 3),
    }


def test_metrics_made_of_metrics_survive_a_resume(tmp_path: Path) -> None:
    """Their state lies in the metrics inside them, and a window's place in a number beside it."""

    def run(folder: Path, *ends: int) -> Any:
        for end in ends:
            seed, model = Seed(1), net(seed=1)
            callbacks = [seed, Metrics(made(), training=True), Checkpoint(folder)]
            state = built_in(Loop(model, adamw(model), callbacks, resume=folder), loss_fn, loader(), loader(), steps=end)
        return [state.metrics[f"train_{name}"] for name in made()]

    assert run(tmp_path / "a", 7) == run(tmp_path / "b", 2, 5, 7)


class Killed(Callback):
    """Ends the run in the validation after an update, at which a checkpoint was written before."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_micro_end(self, state: State) -> None:
        if state.micro is not None and not state.micro.training and state.step == self.at:
            raise KeyboardInterrupt


def test_metrics_made_of_metrics_are_reported_at_an_epochs_end_that_is_resumed(tmp_path: Path) -> None:
    """A window counts what it was fed in a number of its own."""

    def run(folder: Path, at: int = -1) -> Any:
        seed, model = Seed(1), net(seed=1)
        callbacks = [seed, Metrics(made(), training=True), Checkpoint(folder, every=7), Killed(at)]
        state = built_in(Loop(model, adamw(model), callbacks, resume=folder), loss_fn, loader(), loader(), steps=7)
        return [state.metrics[f"train_{name}"] for name in made()]

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "a", 7)
    assert (tmp_path / "a" / "step-00000007").is_dir()
    assert run(tmp_path / "a") == run(tmp_path / "b")


class Times(Metric):
    """The mean of the predicted classes times a setting that is kept in a private number, as a count is."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self._k, self._batches = k, 7
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, preds: torch.Tensor, target: torch.Tensor) -> None:
        self.total += preds.argmax(1).sum() * self._k
        self._batches += 1

    def compute(self) -> torch.Tensor:
        return self.total / self._batches

    def reset(self) -> None:
        super().reset()
        self._batches = 0


def test_a_metrics_setting_is_the_programs_and_its_count_the_checkpoints(tmp_path: Path) -> None:
    def run(k: int, end: int) -> Metrics:
        seed, model = Seed(1), net(seed=1)
        metrics = Metrics({"times": Times(k)}, training=True)
        loop = Loop(model, adamw(model), [seed, metrics, Checkpoint(tmp_path)], resume=tmp_path)
        built_in(loop, loss_fn, loader(), steps=end)  # of 7 updates an epoch
        return metrics

    assert run(5, 3).state_dict()["times"][""][1] == {"_update_count": 3, "_batches": 10}
    assert vars(run(2, 5).training["times"]).items() >= {"_k": 2, "_update_count": 5, "_batches": 12}.items()
    assert vars(run(2, 7).training["times"]).items() >= {"_k": 2, "_update_count": 0, "_batches": 0}.items()
    assert run(3, 9).state_dict()["times"][""][1] == {"_update_count": 2, "_batches": 2}


def test_a_metric_that_was_never_fed_reports_nothing() -> None:
    model = net()
    with Loop(model, adamw(model), [Metrics({"times": Times(5)}, training=True)]) as loop:
        loop.epochs(1)
        loop.begin(loader())
        loop.validate(loss_fn, loader())  # as a program that resumes does where one was due
        assert "val_times" in loop.state.metrics
        assert "train_times" not in loop.state.metrics


def test_what_a_checkpoint_holds_of_a_training_metric_is_of_the_same_metric(tmp_path: Path) -> None:
    fed, mine = (Metrics({"acc": MulticlassAccuracy(3)}, training=True) for _ in range(2))
    fed.training["acc"].update(torch.tensor([0, 1, 2, 2]), torch.tensor([0, 1, 2, 0]))
    metric = fed.training["acc"]
    mine.load_state_dict({"acc": [dict(metric.metric_state), metric.update_count]})  # as an older checkpoint has it
    assert mine.training["acc"].compute() == metric.compute()
    mine.load_state_dict(fed.state_dict())
    other = Metrics({"acc": 100 * MulticlassAccuracy(3)}, training=True)
    with pytest.raises(ValueError, match="'acc' is made of itself, metric_b here and of itself in the checkpoint"):
        other.load_state_dict(fed.state_dict())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["loss", "acc"])
def test_a_name_that_loss_fn_gives_too_is_an_error(form: Any, name: str) -> None:
    def lf(model: Any, batch: Any) -> Any:
        found = loss_fn(model, batch)
        return {"acc": found["loss"].detach(), **found}

    model = net()
    loop = Loop(model, adamw(model), [Metrics({name: MulticlassAccuracy(3)})])
    with pytest.raises(ValueError, match=rf"'val_{name}' is given twice: loss_fn returns '{name}', and a callback"):
        form(loop, lf, loader(), loader(), epochs=1)
    assert f"val_{name}" not in loop.state.metrics
    model = net()
    training = Metrics({name: MulticlassAccuracy(3)}, training=True)
    loop = Loop(model, adamw(model), [training])
    if name == "loss":
        with pytest.raises(ValueError, match="'train_loss' is given twice: it is reported, and a callback, such as Metrics"):
            form(loop, lf, loader(), epochs=1)
    else:  # beside each other: what the last step gave, and the epoch's
        metrics = form(loop, lf, loader(), epochs=1).metrics
        assert metrics["acc"] == metrics["loss"]
        assert 0 <= metrics["train_acc"] <= 1


class Counted(MulticlassAccuracy):
    """The accuracy of each class, which knows how often it was computed."""

    def __init__(self) -> None:
        super().__init__(3, average=None)
        self.computed: list[int] = []

    def compute(self) -> torch.Tensor:
        self.computed.append(1)
        return super().compute()


def several() -> dict[str, Metric]:
    return {
        "each": Counted(),
        "acc": ClasswiseWrapper(MulticlassAccuracy(3, average=None), labels=["cat", "dog", "emu"], prefix="acc_"),
        "m": MinMaxMetric(MulticlassAccuracy(3)),
        "wise": ClasswiseWrapper(MulticlassAccuracy(3, average=None)),
    }


NAMES = {"each_0", "each_1", "each_2", "acc_cat", "acc_dog", "acc_emu", "m_raw", "m_max", "m_min",
         *(f"wise_multiclassaccuracy_{i}" for i in range(3))}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_several_numbers_of_a_metric_are_reported_by_name(form: Any) -> None:
    """As torchmetrics gives them by hand, over validation and training, computed once a report."""
    model, seen = net(), []

    class Watch(Callback):
        def on_micro_end(self, state: State) -> None:
            if state.micro.training:
                seen.append((state.micro.outputs["preds"], state.micro.outputs["target"]))

    metrics = Metrics(MetricCollection(several(), compute_groups=False), training=True)
    state = form(Loop(model, adamw(model), [metrics, Watch()]), plain, loader(), loader(40, 16), epochs=1)
    assert state.reported == {"val_loss", *(f"{split}_{name}" for split in ("val", "train") for name in NAMES)}
    data, whole = Samples(40), MulticlassAccuracy(3, average=None)
    with torch.no_grad():
        expected = {"val": whole(model.eval()(data.x), data.y)}
    expected["train"] = MulticlassAccuracy(3, average=None)(*(torch.cat(part) for part in zip(*seen, strict=True)))
    for split, three in expected.items():
        for i, animal in enumerate(("cat", "dog", "emu")):
            for name in (f"each_{i}", f"acc_{animal}", f"wise_multiclassaccuracy_{i}"):
                assert state.metrics[f"{split}_{name}"] == pytest.approx(float(three[i]), rel=1e-6)
        assert state.metrics[f"{split}_m_raw"] == state.metrics[f"{split}_m_max"] == state.metrics[f"{split}_m_min"]
        assert state.metrics[f"{split}_m_raw"] == pytest.approx(float(three.mean()), rel=1e-6)
    assert len(metrics.validation["each"].computed) == len(metrics.training["each"].computed) == 1


def test_names_of_several_numbers_that_collide_are_an_error() -> None:
    def run(metrics: Metrics, lf: Any = plain) -> None:
        model = net()
        built_in(Loop(model, adamw(model), [metrics]), lf, loader(), loader(), epochs=1)

    each = {"each": MulticlassAccuracy(3, average=None)}
    with pytest.raises(ValueError, match="'val_each_0' is given twice: callbacks, such as Metrics, log two metrics"):
        run(Metrics({**each, "each_0": MulticlassAccuracy(3)}))
    with pytest.raises(ValueError, match="'val_each_0' is given twice: loss_fn returns 'each_0', and a callback"):
        run(Metrics(each), lambda m, b: {**plain(m, b), "each_0": torch.tensor(1.0)})
    run(Metrics(each), lambda m, b: {**plain(m, b), "each": torch.tensor(1.0)})


def test_errors() -> None:
    with pytest.raises(TypeError, match=r"must be a torchmetrics\.Metric, not int"):
        Metrics({"acc": 3})
    with pytest.raises(TypeError, match="metrics must be a Metric"):
        Metrics([MulticlassAccuracy(3)])
    with pytest.raises(TypeError, match="metrics must be a Metric"):
        Metrics({})
    model = net()
    loop = Loop(model, adamw(model), [Metrics(two())])
    with pytest.raises(KeyError, match="Metrics needs loss_fn to return 'preds' and 'target'"):
        built_in(loop, lambda m, b: loss_fn(m, b)["loss"], loader(), loader(), epochs=1)
    words = r"Metrics can't report 'm': MulticlassConfusionMatrix computes a Tensor of shape \(3, 3\); give one that computes"
    with pytest.raises(TypeError, match=words):
        Metrics({"m": MulticlassConfusionMatrix(3)})
    with pytest.raises(TypeError, match=r"Metrics can't report 'roc': MulticlassROC computes a tuple"):
        Metrics(MetricCollection({"roc": MulticlassROC(3, thresholds=5)}), training=True)
    model = net()
    loop = Loop(model, adamw(model), [Metrics({"roc": MulticlassROC(3)})])  # which can't be told from one of numbers unfed
    with pytest.raises(TypeError, match=r"Metrics can't report 'roc': MulticlassROC computes a tuple"):
        built_in(loop, loss_fn, loader(), loader(), epochs=1)
