"""A preview is what a run of the same callbacks then uses, at each update, with ==."""

from __future__ import annotations

import copy
import itertools
import random
import warnings
from typing import Any

import pytest
import torch
from helpers import FORMS, Samples, adamw, loader, loss_fn, net
from test_schedule import BUILDERS
from torch import nn
from torch.optim import lr_scheduler as lrs
from torch.utils.data import DataLoader, IterableDataset

from hookloop.callbacks import (
    Average,
    ClipGradients,
    DecaySchedule,
    Diagnose,
    Dropout,
    DynamicBatchSize,
    EarlyStopping,
    Epochs,
    GradientAccumulation,
    Initialize,
    LayerwiseRate,
    MicroBatch,
    NoiseScale,
    Policy,
    Schedule,
    Seed,
    Steps,
    SwitchOptimizer,
    TensorBoard,
    Unfreeze,
    Warmup,
    WeightDecay,
)
from hookloop.callbacks.rate_curves import CURVES
from hookloop.loop import Callback, Goal, Loop, State
from hookloop.loop.study import preview

ARRAYS = ("rates", "decays", "epochs", "batch_size", "update_size", "micro_batch_size", "accumulate")
SCHEDULES: dict[str, dict[str, Any]] = {
    "linear": {"end": 0.1}, "cosine": {"end": 0.1, "after": 0.2}, "polynomial": {"power": 2}, "one_cycle": {},
    "cosine_restarts": {"cycles": 3, "growth": 2}, "wsd": {"decay": 0.4}, "inverse_sqrt": {"after": 3},
}  # fmt: skip


class Used(Callback):
    """What each update of a run really used."""

    def __init__(self) -> None:
        self.rows: dict[str, list[Any]] = {name: [] for name in ARRAYS}

    def on_step_start(self, state: State) -> None:
        size = state.batch_size or getattr(state.loader, "batch_size", None)
        self.now = state.epoch, size

    def on_step_end(self, state: State) -> None:
        self.rows["decays"].append(state.decays or [g["weight_decay"] for g in state.optimizer.param_groups])
        size = state.batch_size or getattr(state.loader, "batch_size", None)
        values = ([float(r) for r in state.rates], state.epoch, size, state.update_size, state.micro_size, state.accumulate)
        for name, value in zip(("rates", "epochs", *ARRAYS[3:]), values, strict=True):
            self.rows[name].append(value)


def run(
    callbacks: Any, train: Any, form: Any = FORMS[1], model: Any = None, optimizer: Any = None, **end: Any
) -> dict[str, Any]:
    model = model or net()
    optimizer = optimizer or adamw(model, 0.1)
    used = Used()
    loop = Loop(model, optimizer, [*callbacks, used])
    form(loop, loss_fn, train, **end)
    assert loop.state.step == len(used.rows["rates"]) > 0
    return used.rows


def told(callbacks: Any, train: Any, model: Any = None, optimizer: Any = None, **end: Any) -> dict[str, Any]:
    model = model or net()
    found = preview(callbacks, train, optimizer=optimizer or adamw(model, 0.1), model=model, **end)
    assert not found.left_out
    return {name: None if (x := getattr(found, name)) is None else x.tolist() for name in ARRAYS}


SHAPES: dict[str, Any] = {
    "none": list,
    "accumulation": lambda: [GradientAccumulation(3)],
    "a table of accumulation": lambda: [GradientAccumulation({0: 1, 1: 4})],
    "growth": lambda: [DynamicBatchSize(5, 33, growth=1.7, scale_lr="sqrt")],
    "growth by updates": lambda: [DynamicBatchSize(5, 33, every=Steps(2), multiple_of=3, scale_lr="linear"), MicroBatch(6)],
    "a table of sizes": lambda: [DynamicBatchSize(4, 64, every={0: 4, 1: 11}), GradientAccumulation(2), MicroBatch(5)],
    "a table by updates": lambda: [DynamicBatchSize(4, 64, every=Steps({0: 7, 4: 60})), MicroBatch(7)],
    "micro-batches": lambda: [MicroBatch(3)],
    "noise is watched": lambda: [NoiseScale(2), MicroBatch(6)],
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_what_a_run_uses_in_any_order(shape: str, name: str) -> None:
    def callbacks() -> list[Callback]:
        return [*SHAPES[shape](), Schedule(name, **SCHEDULES[name]), Warmup(0.3), WeightDecay({"^0": 0.3}), Seed(0)]

    number = list(SHAPES).index(shape) * 7 + list(SCHEDULES).index(name)
    orders = [list(range(len(callbacks()))) for _ in range(2)]
    for i, order in enumerate(orders):
        random.Random(2 * number + i).shuffle(order)
    expected = run([callbacks()[i] for i in orders[0]], loader(50, 8), FORMS[number % 2], net(noise=False), epochs=3)
    for order in orders:
        found = told([callbacks()[i] for i in order], loader(50, 8), net(noise=False), epochs=3)
        for column in ARRAYS:
            assert found[column] == expected[column], column


@pytest.mark.parametrize("schedule", ["linear", "cosine", "rate"])
@pytest.mark.parametrize("at", [4, Epochs(2), None])
def test_layers_decay_and_a_switch_are_what_a_run_uses(schedule: str, at: Any) -> None:
    def callbacks() -> list[Callback]:
        shape = [
            *SHAPES["growth"](),
            Schedule("cosine", end=0.1),
            Warmup(0.3),
            WeightDecay({"^0": 0.3}, lambda depth: depth / 10),
        ]
        layers = [LayerwiseRate(0.7), DecaySchedule(schedule), Dropout({1: 0.1}), Unfreeze({1: "^0"}), Average(), Diagnose(),
                  Initialize({torch.nn.Linear: "orthogonal"})]  # fmt: skip
        sgd = SwitchOptimizer(lambda groups: torch.optim.SGD(groups, momentum=0.9), at=at or 1, rate=0.02)
        found = [Seed(0), *shape, *layers, *([sgd] if at else [])]
        random.Random(f"{schedule}{at}").shuffle(found)
        return found

    model = net()
    expected = run(callbacks(), loader(50, 8), FORMS[schedule == "rate"], epochs=3)
    assert told(callbacks(), loader(50, 8), epochs=3) == expected
    with pytest.raises(ValueError, match=r"rules|layer") as caught:
        preview(callbacks(), loader(50, 8), optimizer=adamw(model), epochs=3)
    assert caught.value.__notes__ == ["in a preview without model=, whose names and layers rules go by"]


def test_a_switch_that_a_run_decides_is_named() -> None:
    sgd = SwitchOptimizer(lambda groups: torch.optim.SGD(groups, lr=0.1), at=Goal("val_loss"))
    model = net()
    found = preview([Warmup(3), sgd], loader(50, 8), epochs=2, optimizer=adamw(model), model=model)
    assert found.rates is None
    assert found.decays is None
    assert found.unknown == dict.fromkeys(("rates", "decays"), "SwitchOptimizer decides by what a run measures")
    found = preview([SwitchOptimizer(lambda g: torch.optim.SGD(g, lr=0.1), rate="swats")], loader(50, 8), epochs=1)
    assert found.unknown == dict.fromkeys(("rates", "decays"), "SwitchOptimizer decides by what a run measures")
    assert found.table().splitlines()[2].split(" | ")[2:4] == ["?", "?"]
    assert [t.get_text() for axis in found.figure().axes[:2] for t in axis.texts] == ["not known"] * 2


def test_a_switch_to_other_groups_is_refused() -> None:
    model = net()
    joined = SwitchOptimizer(lambda groups: torch.optim.SGD([p for g in groups for p in g["params"]], lr=0.1), at=3)
    groups = [{"params": [p], "weight_decay": 0.0} for p in model.parameters()]
    with pytest.raises(ValueError, match=r"has 1 parameter groups, and the one before it 6"):
        preview([joined], loader(50, 8), epochs=2, optimizer=torch.optim.AdamW(groups, weight_decay=0.0), model=model)


def test_every_name_of_a_curve_is_compared() -> None:
    assert CURVES.keys() <= SCHEDULES.keys()


@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("instance", [False, True])
@pytest.mark.parametrize("name", [n for n in BUILDERS if n not in ("ReduceLROnPlateau", "LambdaLR a group")])
def test_every_scheduler_of_torch(name: str, instance: bool, tensor: bool) -> None:
    def given() -> Any:
        model = net(noise=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.1) if tensor else 0.1, momentum=0.9)
        build = BUILDERS[name]
        schedule = Schedule(build(optimizer, 14) if instance else build)
        return {"callbacks": [schedule, Warmup(4)], "model": model, "optimizer": optimizer, "train": loader(50, 8), "epochs": 2}

    assert told(**given()) == run(**given())


def test_schedules_by_epoch() -> None:
    def callbacks() -> list[Callback]:
        return [Schedule(lambda o, n: lrs.ExponentialLR(o, 0.5), on="epoch"), Warmup(3)]

    assert told(callbacks(), loader(50, 8), epochs=3) == run(callbacks(), loader(50, 8), epochs=3)


class Uneven(torch.utils.data.Sampler[list[int]]):
    """Batches of other sizes each."""

    def __iter__(self) -> Any:
        return iter([[0, 1, 2], [3], [4, 5, 6, 7, 8], [9, 10]])

    def __len__(self) -> int:
        return 4


def in_batches(*sizes: int) -> list[Any]:
    return [(torch.zeros(n, 6), torch.zeros(n, dtype=torch.int64)) for n in sizes]


LOADERS: dict[str, Any] = {
    "drop_last": lambda: loader(50, 8, drop_last=True),
    "exact": lambda: loader(48, 8),
    "one short": lambda: loader(3, 8),
    "a batch sampler": lambda: DataLoader(Samples(11), batch_sampler=Uneven()),
    "a list": lambda: in_batches(4, 4, 7, 1, 3),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("which", LOADERS)
@pytest.mark.parametrize("end", [{"epochs": 2}, {"steps": 3}, {"epochs": 4, "steps": 9}])
def test_every_kind_of_loader_and_end(which: str, shape: str, end: Any) -> None:
    def callbacks() -> list[Callback]:
        return [*SHAPES[shape](), Schedule("linear"), Warmup(0.5)]

    expected = run(callbacks(), LOADERS[which](), model=net(noise=False), **end)
    found = told(callbacks(), LOADERS[which](), model=net(noise=False), **end)
    if not isinstance(expected["batch_size"][0], int):  # such a loader has no size of its own
        expected["batch_size"] = found["batch_size"]
    assert found == expected


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(Samples(50))


class Counted(Stream):
    def __len__(self) -> int:
        return 50


PASSES: dict[str, Any] = {  # by what a stream leaves unknown, beside update and micro-batch sizes
    "none": ((), list), "accumulation": ((), SHAPES["accumulation"]), "micro-batches": ((), SHAPES["micro-batches"]),
    "a table of accumulation": (("accumulate",), SHAPES["a table of accumulation"]),
    "growth": (("rates", "batch_size"), SHAPES["growth"]), "growth by updates": ((), SHAPES["growth by updates"]),
    "epochs beyond its end": ((), lambda: [GradientAccumulation({90: 2})]),
    "a scheduler by epochs": (("rates",), lambda: [Schedule(lambda o, n: lrs.StepLR(o, 1, 0.5), on="epoch")]),
}  # fmt: skip


@pytest.mark.parametrize("shape", PASSES)
@pytest.mark.parametrize("counted", [False, True])
def test_of_a_stream_what_hangs_on_where_it_ends_is_unknown_and_all_else_what_a_run_uses(shape: str, counted: bool) -> None:
    def callbacks() -> list[Callback]:
        own = PASSES[shape][1]()
        return own if shape == "a scheduler by epochs" else [*own, Schedule("cosine"), Warmup(0.5)]

    stream = DataLoader(Counted() if counted else Stream(), batch_size=8)
    expected = run(callbacks(), stream, model=net(noise=False), steps=20)
    found = preview(callbacks(), stream, steps=20, optimizer=adamw(net(), 0.1), model=net(noise=False))
    by_batches = counted and not any("batch_size" in c.owns for c in callbacks())  # passes are counted in batches then
    unknown = {"update_size", "micro_batch_size"} | (set() if by_batches else set(PASSES[shape][0]))
    assert set(found.unknown) == unknown
    why = "does not tell its batches' sizes" if by_batches else f"tells no {'number of samples' if counted else 'length'}"
    assert set(found.unknown.values()) == {f"the loader {why}"}
    for name in {*ARRAYS} - unknown - (set() if by_batches else {"epochs"}):
        assert getattr(found, name).tolist() == expected[name], name
    assert "?" in found.table()
    assert found.figure().axes


def test_a_stream_that_tells_batches_and_no_samples_needs_an_end_where_batch_sizes_go_by_samples() -> None:
    counted = DataLoader(Counted(), batch_size=8)
    with pytest.raises(ValueError, match=r"^the loader tells no number of samples, so nothing says when .*: give steps="):
        preview([DynamicBatchSize(4, 16)], counted, epochs=3)
    assert len(preview([Warmup(4)], counted, epochs=3)) == 3 * 7


def test_a_loader_that_tells_no_sizes() -> None:
    class Batches:
        def __init__(self, count: int | None) -> None:
            self.count = count

        def __iter__(self) -> Any:
            return iter(loader(50, 8))

        def __len__(self) -> int:
            if self.count is None:
                raise TypeError("no length")
            return self.count

    for count, end in ((7, {"epochs": 2}), (None, {"steps": 5})):
        expected = run([Warmup(4), GradientAccumulation({1: 2})], Batches(count), **end)
        found = preview([Warmup(4), GradientAccumulation({1: 2})], Batches(count), **end, optimizer=adamw(net(), 0.1))
        assert found.rates is not None
        assert found.rates.tolist() == expected["rates"]
        assert (None if found.accumulate is None else found.accumulate.tolist()) == (expected["accumulate"] if count else None)
        assert found.update_size is found.batch_size is found.micro_batch_size is None
        why = "does not tell its batches' sizes" if count else "tells no length"
        assert found.unknown["update_size"] == f"the loader {why}"
        assert "update_size not known: the loader" in found.table()
    with pytest.raises(ValueError, match=r"the loader tells no length.*give steps=, or a list of batches"):
        preview([Warmup(4)], Batches(None), epochs=1)


def test_nothing_given_is_used_up() -> None:
    model = net(noise=False)
    optimizer = adamw(model, 0.1)
    callbacks = [WeightDecay({"^0": 0.3}), Warmup(0.3), Schedule("one_cycle"), DynamicBatchSize(5, 33), TensorBoard("never")]
    train = loader(50, 8)
    before = copy.deepcopy(
        [optimizer.state_dict(), [{k: v for k, v in vars(c).items() if k != "_events"} for c in callbacks[:4]]]
    )
    weights, stream = [p.clone() for p in model.parameters()], torch.get_rng_state()
    ids = [id(p) for g in optimizer.param_groups for p in g["params"]]
    first = preview(callbacks, train, epochs=2, optimizer=optimizer, model=model)
    assert str(before[0]) == str(optimizer.state_dict())
    assert [set(vars(c)) for c in callbacks[:4]] == [set(c) for c in before[1]]
    assert ids == [id(p) for g in optimizer.param_groups for p in g["params"]]
    assert all(map(torch.equal, weights, model.parameters()))
    assert torch.equal(stream, torch.get_rng_state())
    assert train.dataset.read == []
    loop = Loop(model, optimizer, callbacks[:4])  # a preview in between, of callbacks that a Loop holds already
    second = preview(loop.callbacks, train, epochs=2, optimizer=optimizer, model=model)
    used = run(copy.deepcopy(callbacks[:4]), loader(50, 8), model=net(noise=False), epochs=2)
    assert first.rates is not None
    assert second.rates is not None
    assert first.rates.tolist() == second.rates.tolist() == used["rates"]
    loop.fit(loss_fn, train, epochs=1)
    with pytest.raises(ValueError, match="WeightDecay has run already, and would be previewed from where it stands"):
        preview(loop.callbacks, train, epochs=2)


def test_a_model_on_its_way_is_not_copied() -> None:
    """The optimizer's state stays where it is, and a parameter is never copied."""

    class Dear(nn.Parameter):
        def __deepcopy__(self, memo: Any) -> Any:
            raise AssertionError("a parameter was copied")

    model = nn.Linear(3, 2)
    model.weight = Dear(model.weight.data)
    optimizer = adamw(model, 0.1)
    model(torch.zeros(1, 3)).sum().backward()
    optimizer.step()
    found = preview([Warmup(4), WeightDecay()], loader(), epochs=1, optimizer=optimizer, model=model)
    assert found.decays.tolist()[0] == [0.01, 0.0]


def test_without_an_optimizer_rates_are_factors() -> None:
    found = preview([Warmup(4)], loader(50, 8), epochs=1)
    assert found.rates is not None
    assert found.rates.tolist() == [[0.25], [0.5], [0.75], [1.0], [1.0], [1.0], [1.0]]
    assert len(found) == 7
    found = preview([WeightDecay()], loader(50, 8), epochs=1, model=net())
    assert found.decays[0].tolist() == [0.01, 0.0]
    assert found.names == ("{0,4}.weight", "{0,1,4}.bias, 1.weight")


def test_what_is_measured_is_unknown_by_name() -> None:
    callbacks = [Schedule("plateau", on="val_loss"), MicroBatch("auto"), Warmup(3), GradientAccumulation(2), EarlyStopping()]
    found = preview(callbacks, loader(50, 8), epochs=2)
    assert found.rates is None
    assert found.micro_batch_size is None
    assert found.unknown == {"rates": "Schedule decides by what a run measures",
                             "micro_batch_size": "MicroBatch decides by what a run measures"}  # fmt: skip
    assert found.update_size is not None
    assert found.update_size.tolist() == [16, 16, 16, 2] * 2
    text = found.table()
    assert "rates not known: Schedule decides by what a run measures" in text
    assert text.splitlines()[2].split(" | ")[2] == "?"
    assert found.figure() is not None


@pytest.mark.parametrize("every", [NoiseScale(), Goal("val_loss")])
def test_a_batch_size_that_is_measured_is_refused(every: Any) -> None:
    with pytest.raises(ValueError, match=r"DynamicBatchSize's sizes hang on what a run measures, .*give a table of sizes"):
        preview([DynamicBatchSize(4, 16, every=every)], loader(50, 8), epochs=2)


def test_a_policy_of_ones_own() -> None:
    class Odd(Policy):
        def size(self, state: State, grow: Any) -> int:
            return 3 + state.step % 4

    def callbacks() -> list[Callback]:
        return [DynamicBatchSize(3, 9, every=Odd()), Schedule("linear")]

    assert told(callbacks(), loader(50, 8), epochs=2) == run(callbacks(), loader(50, 8), epochs=2)


def test_callbacks_of_ones_own() -> None:
    class Half(Callback):
        def on_before_optimizer_step(self, state: State) -> None:
            if state.step % 2:
                state.scale_rate(0.5, 0)

    class Wane(Half):
        planned = True

        def on_step_start(self, state: State) -> None:
            for group in state.optimizer.param_groups:
                group["weight_decay"] = 0.1 / (1 + state.step)

    class Sizes(Callback):
        owns = ("batch_size",)

        def on_step_start(self, state: State) -> None:
            state.batch_size = 3

    class Watch(Callback):
        def on_step_end(self, state: State) -> None:
            state.log("x", 1.0)

    found = preview([Half(), Warmup(3), ClipGradients(1.0), Watch()], loader(50, 8), epochs=1)
    assert found.left_out == ("Half",)
    assert "Half is left out: it may change updates and says no planned = True" in found.table()
    assert told([Wane(), Warmup(3)], loader(50, 8), epochs=2) == run([Wane(), Warmup(3)], loader(50, 8), epochs=2)
    with pytest.raises(ValueError, match="Sizes's sizes are known to no preview, since it says no planned = True"):
        preview([Sizes()], loader(50, 8), epochs=1)


def test_a_callback_that_stops_by_plan() -> None:
    class StopAt(Callback):
        planned = True

        def on_step_end(self, state: State) -> None:
            if state.step == 9:
                state.stop("enough")

    assert len(preview([StopAt(), Warmup(3)], loader(50, 8), epochs=4)) == 9


def test_the_table_shows_where_sizes_change() -> None:
    found = preview([GradientAccumulation({0: 1, 2: 3}), Warmup(3)], loader(80, 8), epochs=3, optimizer=adamw(net(), 0.5))
    lines = found.table(count=3).splitlines()
    assert lines[0] == "| step | epoch | rate 0 | decay 0 | batch_size | update_size | micro_batch_size | accumulate |"
    rows = [line.strip("| ").split(" | ") for line in lines[2:]]
    assert [row[0] for row in rows] == ["1", "13", "21", "24"]
    assert rows[2] == ["21", "2", "0.5", "0.01", "8", "24", "8", "3"]
    assert rows[3] == ["24", "2", "0.5", "0.01", "8", "8", "8", "3"]
    assert str(found) == found.table()
    assert preview([], loader(), steps=0).table() == "no update"


def test_the_picture(tmp_path: Any) -> None:
    model = net()
    callbacks = [WeightDecay({"^0": 0.3}), Warmup(0.3), Schedule("cosine"), DynamicBatchSize(5, 33), MicroBatch(6)]
    found = preview(callbacks, loader(50, 8), epochs=3, optimizer=adamw(model), model=model)
    found.save(tmp_path / "preview.png")
    assert (tmp_path / "preview.png").read_bytes().startswith(b"\x89PNG")
    rates, decays, sizes, accumulate = found.figure().axes
    assert found.rates is not None
    assert [
        line.get_ydata().tolist() if hasattr(line.get_ydata(), "tolist") else list(line.get_ydata()) for line in rates.lines
    ] == [found.rates[:, 0].tolist()]
    assert [t.get_text() for t in rates.get_legend().texts] == ["groups 0, 1, 2"]
    assert [t.get_text() for t in decays.get_legend().texts] == ["group 0", "group 1", "group 2"]
    assert [t.get_text() for t in sizes.get_legend().texts] == ["batch size", "update size", "micro batch size"]
    assert list(rates.lines[0].get_xdata()) == list(range(1, len(found) + 1))
    assert accumulate.get_xlabel() == "update"


def test_in_tensorboard(tmp_path: Any) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = preview([Warmup(3), Schedule("wsd")], loader(50, 8), epochs=2)
    found.to_tensorboard(tmp_path / "preview")
    events = EventAccumulator(str(tmp_path / "preview")).Reload()
    [image] = events.Images("preview")
    assert image.encoded_image_string.startswith(b"\x89PNG")
    width, height = (int.from_bytes(image.encoded_image_string[i : i + 4], "big") for i in (16, 20))
    assert (image.width, image.height) == (width, height)
    [text] = events.Tensors("preview/text_summary")
    assert text.tensor_proto.string_val[0].decode() == found.table()


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    found = preview([Warmup(3)], loader(50, 8), epochs=1)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"figures need matplotlib: pip install 'hookloop\[study\]'"):
        found.figure()


def test_bad_arguments() -> None:
    def kept(x: Any) -> Any:
        warmup = Warmup(3)
        warmup.hold = x  # type: ignore[attr-defined]
        return warmup

    with pytest.raises(ValueError, match="nothing says when to end: give epochs= or steps="):
        preview([Warmup(3)], loader())
    with pytest.raises(TypeError, match="loader must give batches when iterated"):
        preview([Warmup(3)], Samples(3), epochs=1)
    for empty in ([], loader(5, 8, drop_last=True)):
        with pytest.raises(ValueError, match="the loader gives 0 batches; give it more data or a smaller batch"):
            preview([Warmup(3)], empty, epochs=1)
    with pytest.raises(TypeError, match="no Callback instance"):
        preview([Warmup], loader(), epochs=1)  # type: ignore[list-item]
    with pytest.raises(ValueError, match="both own"):
        preview([GradientAccumulation(2), GradientAccumulation(3).named("x")], loader(), epochs=1)
    with pytest.raises(TypeError, match="optimizer is a list"):
        preview([Warmup(3)], loader(), epochs=1, optimizer=[])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Warmup can't be copied, and a preview may not use up what it is given"):
        preview([kept(iter(i for i in range(3)))], loader(), epochs=1)
    with pytest.raises(ValueError, match=r"rules has 'no such', which matches nothing"):
        preview([WeightDecay({"no such": 0.1})], loader(), epochs=1, model=net())
    with warnings.catch_warnings(action="error"):
        assert len(preview(Warmup(3), loader(50, 8), epochs=1)) == 7


def test_permutations_of_five() -> None:
    def callbacks() -> list[Callback]:
        return [
            Warmup(0.3),
            Schedule("cosine"),
            WeightDecay({"^0": 0.3}),
            DynamicBatchSize(5, 33, scale_lr="sqrt"),
            MicroBatch(6),
        ]

    found = [told([callbacks()[i] for i in order], loader(50, 8), epochs=2) for order in itertools.permutations(range(5))]
    assert all(other == found[0] for other in found[1:])
