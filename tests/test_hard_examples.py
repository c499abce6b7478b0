"""HardExamples against a list of every loss there was: exact windows, whatever is cut, redone, skipped or killed."""

from __future__ import annotations

import csv
import itertools
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FORMS, KillAt, Killed, adamw, assert_same_bits, bits, built_in, loader, net
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    SequentialSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from hookloop.callbacks import (
    Checkpoint,
    DynamicBatchSize,
    EarlyStopping,
    GradientAccumulation,
    HardExamples,
    MicroBatch,
    Seed,
    TensorBoard,
)
from hookloop.loop import Callback, Loop, State
from hookloop.loop.hardest import grid, hardest, pictures_of
from hookloop.loop.micro_end import MicroEnd


def loss_fn(model: nn.Module, batch: Any) -> Any:
    losses = nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")
    return {"loss": losses.mean(), "losses": losses}


class All(Callback):
    """Every sample and loss of updates that were applied, and of validations that were reported."""

    def __init__(self) -> None:
        self.open: dict[str, list[Any]] = {}
        self.steps: list[list[Any]] = []  # by update
        self.ends: list[int] = []  # of epochs
        self.reports: list[dict[str, list[Any]]] = []

    def on_micro_end(self, state: State) -> None:
        assert state.micro is not None
        assert state.micro.index is not None
        if state.micro.number == 0:
            self.open[state.micro.split] = []
        self.open[state.micro.split] += zip(state.micro.index, state.micro.outputs["losses"].tolist(), strict=True)

    def on_step_end(self, state: State) -> None:
        self.steps.append(self.open.pop("train"))

    def on_epoch_end(self, state: State) -> None:
        self.ends.append(state.step)

    def on_validation_end(self, state: State) -> None:
        self.reports.append(self.open)
        self.open = {}


def expected(windows: list[tuple[int, list[Any]]], k: int) -> list[tuple[int, float, int, int]]:
    """What of the last of these windows (its end, its samples) is to be listed."""
    times: dict[int, int] = {}
    rows: list[tuple[int, float, int, int]] = []
    for end, pairs in windows:
        largest: dict[int, float] = {}
        for position, loss in pairs:
            largest[position] = max(loss, largest.get(position, -math.inf))
        first = sorted(largest.items(), key=lambda pair: (-pair[1], pair[0]))[:k]
        times |= {position: times.get(position, 0) + 1 for position, _ in first}
        rows = [(position, loss, times[position], end) for position, loss in first]
    return rows


def windows_of(seen: All, every: int | None) -> list[tuple[int, list[Any]]]:
    count = len(seen.steps)
    ends = seen.ends if every is None else list(range(every, count + 1, every))
    return [(b, [*itertools.chain(*seen.steps[a:b])]) for a, b in itertools.pairwise([0, *ends])]


def rows(hard: HardExamples, split: str) -> list[tuple[Any, ...]]:
    return [tuple(row) for row in hard.examples[split]]


def run(form: Any, callbacks: list[Callback], *, size: int = 8, epochs: int = 3, val: Any = None, noise: bool = True,
        **kw: Any) -> Any:  # fmt: skip
    seed, model = Seed(5), net(seed=5, noise=noise)
    loop = Loop(model, adamw(model), [seed, *callbacks], **kw)
    val = loader(20, 8, shuffle=False) if val is None else val
    form(loop, loss_fn, loader(50, size), val, epochs=epochs)
    return loop


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("every", [None, 4, 1])
@pytest.mark.parametrize("k", [1, 5, 70])
def test_the_largest_of_each_window(form: Any, every: int | None, k: int) -> None:
    seen, hard = All(), HardExamples(k, every)
    run(form, [hard, seen])
    assert rows(hard, "train") == expected(windows_of(seen, every), k)
    assert rows(hard, "val") == expected([(end, r["val"]) for end, r in zip(seen.ends, seen.reports, strict=True)], k)
    assert len(hard.examples["train"]) == min(k, {None: 50, 4: 32, 1: 2}[every])  # of 7 updates an epoch the last holds 2
    assert len(hard.examples["val"]) == min(k, 20)
    if (every, k) == (None, 5):
        assert {row.times for row in hard.examples["train"]} > {1}  # some stay hard


CUTS: dict[str, Any] = {
    "cut": lambda: [MicroBatch(3)], "accumulated": lambda: [GradientAccumulation(3)],
    "grown": lambda: [DynamicBatchSize(5, 13, growth=1.7, every=1)],
    "all": lambda: [DynamicBatchSize(6, 13), GradientAccumulation({0: 1, 1: 2}), MicroBatch(4)],
}  # fmt: skip


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("size", [1, 7, 64])
def test_batches_cuts_and_accumulation_of_any_size(cut: str, size: int) -> None:
    for every in (None, 3):
        seen, hard = All(), HardExamples(6, every)
        run(built_in, [*CUTS[cut](), hard, seen], size=size, epochs=2, noise=False)
        found = windows_of(seen, every)
        if every is None:
            assert [sorted(position for position, _ in pairs) for _, pairs in found] == [[*range(50)]] * 2
        if found:
            assert rows(hard, "train") == expected(found, 6)


numbers = st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.5, -1.0])


@given(st.lists(st.lists(st.tuples(st.integers(0, 6), numbers), min_size=1, max_size=9), max_size=5), st.integers(1, 9))
@settings(max_examples=200, deadline=None)
def test_driven_without_a_loop(updates: list[list[tuple[int, float]]], k: int) -> None:
    """Any samples, some again and with equal losses, in any order and number."""
    model = net()
    state, hard = State(model, adamw(model)), HardExamples(k)
    hard.on_fit_start(state)
    for pairs in updates:
        losses = torch.tensor([loss for _, loss in pairs])
        state.micro = MicroEnd(
            None, {"loss": losses.mean(), "losses": losses}, len(pairs), [p for p, _ in pairs], True, 0, len(pairs)
        )
        hard.on_micro_end(state)
        state.step += 1
        hard.on_step_end(state)
    hard.on_epoch_end(state)
    hard.on_fit_end(state)
    assert rows(hard, "train") == expected([(state.step, [*itertools.chain(*updates)])], k) if updates else not hard.examples


def test_what_is_not_a_number_is_hardest_of_all() -> None:
    losses, positions, places = hardest(torch.tensor([1.0, math.nan, math.inf, 5.0, 9.0]), torch.tensor([4, 3, 2, 1, -1]), 4)
    assert positions.tolist() == [3, 2, 1, 4]
    assert places.tolist() == [1, 2, 3, 0]
    assert losses[1:].tolist() == [math.inf, 5.0, 1.0]
    assert losses[0].isnan()
    losses, positions, _ = hardest(torch.tensor([1.0, 2.0, math.nan]), torch.tensor([7, 7, 7]), 3)
    assert positions.tolist() == [7, -1, -1]
    assert losses[0].isnan()


@pytest.mark.parametrize("replacement", [True, False])
def test_a_sampler_that_gives_a_sample_twice(replacement: bool) -> None:
    model, seen, hard = net(), All(), HardExamples(9)
    data = loader(12, 4).dataset
    sampler = WeightedRandomSampler([1.0] * 12, 12 + 12 * replacement, replacement=replacement)
    Loop(model, adamw(model), [Seed(0), seen, hard]).fit(loss_fn, DataLoader(data, 5, sampler=sampler), epochs=2)
    [_, (_, last)] = windows_of(seen, None)
    assert (len({position for position, _ in last}) < len(last)) == replacement
    assert rows(hard, "train") == expected(windows_of(seen, None), 9)


def test_a_redone_step_counts_once() -> None:
    failed = []

    def out_of_memory(model: nn.Module, batch: Any) -> Any:
        if model.training and len(batch[0]) > 4 and 9 in batch[2]:
            failed.append(1)
            raise torch.OutOfMemoryError("pretended")
        return loss_fn(model, batch)

    model, seen, hard = net(noise=False), All(), HardExamples(8, every=2)
    loop = Loop(model, adamw(model), [Seed(5), MicroBatch("auto"), GradientAccumulation(3), hard, seen])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loop.fit(out_of_memory, loader(50, 8), epochs=3)
    assert failed
    assert sorted(position for position, _ in itertools.chain(*seen.steps[:3])) == [*range(50)]
    assert rows(hard, "train") == expected(windows_of(seen, 2), 8)


def test_a_skipped_update_leaves_no_trace() -> None:
    class Skip(Callback):
        def on_before_optimizer_step(self, state: State) -> None:
            if (state.step + state.skipped) % 3 == 1:
                state.skip("one of three")

    for every in (None, 3):
        seen, hard = All(), HardExamples(40, every)
        loop = run(built_in, [Skip(), hard, seen])
        assert loop.state.skipped == 7
        assert rows(hard, "train") == expected(windows_of(seen, every), 40)


def test_in_any_order_it_changes_and_finds_the_same(tmp_path: Path) -> None:
    bare = run(built_in, [MicroBatch(5), EarlyStopping(patience=9)])
    found = []
    for number, order in enumerate(itertools.permutations(range(3))):
        hard = HardExamples(7, 5, tmp_path / str(number))
        callbacks = [MicroBatch(5), EarlyStopping(patience=9), hard]
        assert_same_bits(bits(bare), bits(run(built_in, [callbacks[i] for i in order])))
        found.append((hard.examples, (tmp_path / str(number) / "hard_examples.csv").read_text()))
    assert found == found[:1] * 6


@pytest.mark.parametrize("every", [None, 4])
def test_killed_at_each_update_and_resumed(tmp_path: Path, every: int | None) -> None:
    def hold(folder: Path) -> list[Callback]:
        return [GradientAccumulation(2), MicroBatch(5), HardExamples(6, every, folder), Checkpoint(folder, every=1)]

    def state(loop: Any) -> Any:
        [hard] = [c for c in loop.callbacks if isinstance(c, HardExamples)]
        return hard.examples, hard._times

    whole = run(built_in, hold(tmp_path / "whole"), epochs=2)
    for step in range(1, whole.state.step + 1):
        folder = tmp_path / str(step)
        with pytest.raises(Killed):
            run(FORMS[step % 2], [KillAt(step), *hold(folder)], epochs=2)
        again = run(built_in, hold(folder), epochs=2, resume=folder)
        assert state(again) == state(whole)
        assert_same_bits(bits(again), bits(whole))
        assert (folder / "hard_examples.csv").read_bytes() == (tmp_path / "whole/hard_examples.csv").read_bytes()
        assert shown(folder)[0] == shown(tmp_path / "whole")[0]


def test_entered_again_it_goes_on() -> None:
    seen, hard = All(), HardExamples(6, every=5)
    seed, model = Seed(5), net(seed=5)
    loop = Loop(model, adamw(model), [seed, hard, seen])
    for steps in (3, 7, 12):
        loop.fit(loss_fn, loader(50, 8), steps=steps)
        whole = windows_of(seen, 5)
        assert rows(hard, "train") == expected(whole or [(3, [*itertools.chain(*seen.steps)])], 6)


def shown(folder: Path) -> tuple[dict[str, list[tuple[int, bytes]]], Any]:
    """Tables (each once a step) and pictures as TensorBoard reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder / "hard_examples"), size_guidance={"images": 0, "tensors": 0})
    reader.Reload()
    tags = reader.Tags()
    text = {tag: {e.step: e.tensor_proto.string_val[0] for e in reader.Tensors(tag)} for tag in sorted(tags["tensors"])}
    return {tag: sorted(found.items()) for tag, found in text.items()}, {tag: reader.Images(tag) for tag in tags["images"]}


def test_files(tmp_path: Path) -> None:
    """The table as CSV and in TensorBoard beside a run's own curves, which stay."""
    hard = HardExamples(3, folder=tmp_path)
    run(
        built_in,
        [hard, TensorBoard(tmp_path, every=1)],
        val={"a": loader(20, 8, shuffle=False), "b": loader(9, 4, shuffle=False)},
    )
    with open(tmp_path / "hard_examples.csv", newline="") as file:
        table = [*csv.DictReader(file)]
    assert [row["split"] for row in table] == ["train"] * 3 + ["val_a"] * 3 + ["val_b"] * 3
    for row, example in zip(table, itertools.chain(*(hard.examples[split] for split in sorted(hard.examples))), strict=True):
        assert (int(row["position"]), float(row["loss"]), int(row["times"]), int(row["step"])) == example
    text, pictures = shown(tmp_path)
    assert [(tag, [step for step, _ in found]) for tag, found in text.items()] == [
        (f"hard_examples/{split}/text_summary", [7, 14, 21]) for split in ("train", "val_a", "val_b")
    ]
    last = text["hard_examples/train/text_summary"][-1][1].decode()
    assert f"| {hard.examples['train'][0].position} | {hard.examples['train'][0].loss:.6g} |" in last
    assert not pictures
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(tmp_path))
    reader.Reload()
    assert len(reader.Scalars("train/loss")) == 21


def test_pictures_are_those_of_the_examples(tmp_path: Path) -> None:
    import io

    import numpy as np
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(30, 1, 4, 5, generator=generator), torch.randint(0, 3, (30,), generator=generator)
    model = nn.Sequential(nn.Flatten(), nn.Linear(20, 3))
    hard = HardExamples(5, folder=tmp_path)
    train = DataLoader(TensorDataset(x, y), 8, shuffle=True)
    Loop(model, adamw(model), [Seed(0), MicroBatch(3), hard]).fit(loss_fn, train, DataLoader(TensorDataset(x, y), 7), epochs=2)
    _, pictures = shown(tmp_path)
    for split in ("train", "val"):
        [_, last] = pictures[f"hard_examples/{split}"]
        drawn = np.asarray(Image.open(io.BytesIO(last.encoded_image_string)))
        want = (grid(x[[row.position for row in hard.examples[split]]]) * 255).byte()
        assert drawn.shape[:2] == (2 * 6, 3 * 7)
        assert np.abs(drawn.reshape(12, 21, -1)[..., 0].astype(int) - want[0].numpy().astype(int)).max() <= 1


def test_the_grid_stretches_each_picture() -> None:
    picture = grid(torch.stack([torch.tensor([[[0.0, 1.0]]]), torch.tensor([[[5.0, 25.0]]]), torch.full((1, 1, 2), math.nan)]))
    assert picture.shape == (1, 6, 8)
    assert picture[0, 1].tolist() == [0, 0, 1, 0, 0, 0, 1, 0]
    assert not picture[0, 3:].any()


@pytest.mark.parametrize(("batch", "found"), [
    ((torch.zeros(4, 3, 2, 2), torch.zeros(4)), True), ({"y": torch.zeros(4), "x": torch.zeros(4, 1, 2, 2)}, True),
    ((torch.zeros(4, 2, 2, 2),), False), ((torch.zeros(5, 3, 2, 2),), False), (torch.zeros(4, 3), False), (None, False),
])  # fmt: skip
def test_what_is_a_picture(batch: Any, found: bool) -> None:
    assert (pictures_of(batch, 4) is not None) == found


def test_pictures_of_several_sizes_are_left_out(tmp_path: Path) -> None:
    class Sizes(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 8

        def __getitem__(self, i: int) -> Any:
            return torch.full((1, 2 + i // 4, 2), float(i)), i % 2

    model, hard = nn.Linear(1, 2), HardExamples(3, folder=tmp_path)
    of = lambda model, batch: loss_fn(lambda x: model(x.mean((1, 2, 3))[:, None]), batch)
    Loop(model, adamw(model), [hard]).fit(of, DataLoader(Sizes(), 4), epochs=1)
    assert len(hard.examples["train"]) == 3
    assert not shown(tmp_path)[1]


def test_an_evaluation_that_is_not_reported_is_none_of_it() -> None:
    model, hard = net(), HardExamples(4)
    loop, other = Loop(model, adamw(model), [Seed(0), hard]), loader(30, 8, shuffle=False)
    with loop:
        for _ in loop.epochs(1):
            for step in loop.steps(loader()):
                for micro in step:
                    with micro:
                        micro.backward(loss_fn)
                loop.update()
                loop.evaluate(loss_fn, other)
        loop.evaluate(loss_fn, other)
    assert list(hard.examples) == ["train"]
    loop.evaluate(loss_fn, other)
    assert list(hard.examples) == ["train"]


@pytest.mark.parametrize(("arguments", "message"), [
    ({"k": 0}, r"k \(samples\) must be a whole number, at least 1, not 0"), ({"k": 2.5}, "not 2.5"), ({"k": True}, "not True"),
    ({"k": None}, "not None"), ({"k": 3, "every": 0}, r"every \(updates, None for an epoch\) must be a whole number"),
    ({"k": 3, "every": "epoch"}, "not 'epoch'"), ({"k": 3, "folder": ""}, "folder must be the path of a folder"),
    ({"k": 3, "folder": 3}, "or None, not 3"),
])  # fmt: skip
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HardExamples(**arguments)


def plain(model: nn.Module, batch: Any) -> Any:
    return loss_fn(model, batch)["loss"]


@pytest.mark.parametrize(("loss", "kind", "message"), [
    (plain, KeyError, r"to return each sample's loss, of shape \(n,\), as 'losses' beside 'loss'; it returned loss"),
    (lambda m, b: {"loss": plain(m, b), "losses": plain(m, b)}, ValueError, r"'losses' must hold one loss for each of the 8 "
     r"samples, shape \(8,\), not shape \(\); with reduction='none'"),
    (lambda m, b: {"loss": plain(m, b), "losses": m(b[0])}, ValueError, r"not shape \(8, 3\)"),
    (lambda m, b: {"loss": plain(m, b), "losses": [1.0] * 8}, ValueError, "not list"),
])  # fmt: skip
def test_what_loss_fn_lacks_is_said_at_the_first_step(loss: Any, kind: Any, message: str) -> None:
    model = net()
    loop = Loop(model, adamw(model), [HardExamples(3)])
    with pytest.raises(kind, match=message):
        loop.fit(loss, loader(), epochs=1)
    assert loop.state.step == 0


def test_unknown_positions_are_said_at_the_first_step() -> None:
    model = net()
    loop = Loop(model, adamw(model), [HardExamples(3)])
    with pytest.raises(ValueError, match=r"positions in the data set \(train\), which are not known here: give a DataLoader"):
        loop.fit(loss_fn, [*loader()], epochs=1)
    assert loop.state.step == 0
    with pytest.raises(
        ValueError, match=r"\(val\), which are not known here: give a DataLoader with batch_size= and shuffle=False"
    ):
        loop.evaluate(loss_fn, loader())


@pytest.mark.parametrize("collate", [
    lambda batch: torch.stack([x for x in batch if x[0] % 5]),  # what can't be read is left out
    lambda batch: torch.cat([torch.stack(batch)] * 2),  # two views of each
])  # fmt: skip
@pytest.mark.parametrize("cut", [
    list, lambda: [GradientAccumulation(2)], lambda: [DynamicBatchSize(3, 3)], lambda: [MicroBatch(2)],
])  # fmt: skip
def test_a_batch_of_other_samples_than_were_drawn_names_no_wrong_ones(collate: Any, cut: Any) -> None:
    seen: list[tuple[Any, list[float]]] = []

    class See(Callback):
        def on_micro_end(self, state: State) -> None:
            assert state.micro is not None
            seen.append((state.micro.index, state.micro.batch[:, 0].tolist()))

    def run(watch: Callback) -> None:
        model = nn.Linear(1, 1)
        batches = DataLoader(list(torch.arange(25.0)[:, None]), 5, shuffle=True, collate_fn=collate)
        Loop(model, adamw(model), [Seed(0), *cut(), watch]).fit(hold_position, batches, epochs=1)

    run(See())
    assert any(index is None for index, _ in seen)
    assert all(index is None or index == held for index, held in seen)
    with pytest.raises(ValueError, match=r"\(train\), which are not known here.* collate_fn must leave out and add no sample"):
        run(HardExamples(3))


def hold_position(model: nn.Module, batch: Any) -> Any:
    return {"loss": model(batch).mean(), "losses": batch[:, 0]}


@pytest.mark.parametrize("more", [{}, {"drop_last": True}])
@pytest.mark.parametrize(("count", "world"), [(20, 1), (20, 3), (4, 3)])
def test_an_evaluation_of_a_ranks_part_in_order_names_its_positions(count: int, world: int, more: dict[str, bool]) -> None:
    """No sample that torch's sampler repeats for some of the ranks is among them."""
    data, found = list(torch.arange(float(count))[:, None]), list[int]()
    for rank in range(world):
        part = DataLoader(data, 3, sampler=DistributedSampler(data, world, rank, shuffle=False, **more))
        model, hard = nn.Linear(1, 1), HardExamples(20)
        Loop(model, adamw(model), [hard]).fit(hold_position, DataLoader(data, 3), part, epochs=1)
        assert all(row.position == row.loss for row in hard.examples["val"])
        found += [row.position for row in hard.examples["val"]]
    assert sorted(found) == list(range(count // world * world if more else count))


@pytest.mark.parametrize("shuffle", [True, False])
def test_an_evaluation_by_another_order_of_a_ranks_part_names_none(shuffle: bool) -> None:
    class Own(DistributedSampler):
        def __iter__(self) -> Any:
            return iter([*super().__iter__()][::-1])

    data, model = list(torch.arange(20.0)[:, None]), nn.Linear(1, 1)
    sampler = (DistributedSampler if shuffle else Own)(data, 1, 0, shuffle=shuffle)
    with pytest.raises(ValueError, match=r"\(val\), which are not known here: .* and shuffle=False, in order"):
        Loop(model, adamw(model), [HardExamples(3)]).fit(
            hold_position, DataLoader(data, 3), DataLoader(data, 3, sampler=sampler), epochs=1
        )


class Backwards(BatchSampler):
    """Batches by an order of its own, as one that joins samples of about one length."""

    def __iter__(self) -> Any:
        return iter([*super().__iter__()][::-1])


@pytest.mark.parametrize("settings", [
    {"batch_sampler": Backwards(SequentialSampler(range(20)), 8, False), "batch_size": 1, "shuffle": None},
    {"in_order": False},
])  # fmt: skip
def test_an_evaluation_in_another_order_is_not_taken_for_one_in_order(settings: Any) -> None:
    model = net()
    loop = Loop(model, adamw(model), [HardExamples(3)])
    with pytest.raises(ValueError, match=r"\(val\), which are not known here: .* and shuffle=False, in order"):
        loop.fit(loss_fn, loader(), loader(20, **{"shuffle": False, **settings}), epochs=1)


def test_around_a_loop_it_is_refused_by_name() -> None:
    model = net()
    loop = Loop(model, adamw(model), [HardExamples(3)])
    with pytest.raises(ValueError, match="HardExamples needs on_epoch_end"), loop, loop.updating():
        pass


def test_windows_of_another_size_are_refused(tmp_path: Path) -> None:
    run(built_in, [HardExamples(3), Checkpoint(tmp_path)], epochs=1)
    with pytest.raises(ValueError, match="the checkpoint's has k=3, every=None, not 4 and None; give the same"):
        run(built_in, [HardExamples(4), Checkpoint(tmp_path)], resume=tmp_path)


def test_a_folder_that_cant_be_written_is_said_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="can't write"):
        run(built_in, [HardExamples(3, folder=tmp_path / "file")])


def test_a_relative_folder_stays_where_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    hard = HardExamples(3, folder="run")
    monkeypatch.chdir(tmp_path / "elsewhere")
    run(built_in, [hard], epochs=1)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"hard_examples", "hard_examples.csv"}
    assert not [*Path().iterdir()]


def test_a_table_that_cant_be_replaced_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "hard_examples.csv" / "x").mkdir(parents=True)
    with pytest.warns(UserWarning, match="HardExamples can't write .*hard_examples.csv"):
        assert run(built_in, [HardExamples(3, folder=tmp_path)], epochs=1).state.step == 7


class Reads(TorchDispatchMode):
    """Counts what brings a value from a tensor to Python."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        self.count += func in (aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default)
        return func(*args, **(kwargs or {}))


def test_a_step_reads_nothing_back(tmp_path: Path) -> None:
    """Neither by what Python asks nor, on "meta" where tensors hold no values, at all."""
    x, y = torch.randn(40, 1, 6, 6), torch.randint(0, 3, (40,))
    for device in ("cpu", "meta"):
        model = nn.Sequential(nn.Flatten(), nn.Linear(36, 3)).to(device)
        hard = HardExamples(5, folder=tmp_path / device)
        loop, mode = Loop(model, torch.optim.SGD(model.parameters(), 0.1), [hard, MicroBatch(3)]), Reads()
        loop.__enter__()
        for _ in loop.epochs(1):
            for number, step in enumerate(loop.steps(DataLoader(TensorDataset(x, y), 8))):
                if number == 1:
                    mode.__enter__()
                for micro in step:
                    with micro:
                        micro.backward(loss_fn)
                loop.update()
                if number == 3:
                    mode.__exit__(None, None, None)
                    break
            break
        assert mode.count == 0
        assert loop.state.step == 4
        if device == "cpu":
            loop.__exit__(None, None, None)
            assert len(hard.examples["train"]) == 5
        else:
            hard._events.close()  # type: ignore[union-attr]


def test_pictures_of_a_window_that_was_cut_off_come_back(tmp_path: Path) -> None:
    x, y = torch.randn(30, 3, 4, 4, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 3

    def one(folder: Path, *more: Callback, **kw: Any) -> list[bytes]:
        seed, model = Seed(0), nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
        callbacks = [*more, seed, HardExamples(6, folder=folder), Checkpoint(folder / "saved", every=1)]
        Loop(model, adamw(model), callbacks, **kw).fit(loss_fn, DataLoader(TensorDataset(x, y), 4, shuffle=True), epochs=2)
        return [found.encoded_image_string for found in shown(folder)[1]["hard_examples/train"]]

    whole = one(tmp_path / "whole")
    assert len(whole) == len({*whole}) == 2
    with pytest.raises(Killed):
        one(tmp_path / "cut", KillAt(13))  # of 8 updates an epoch
    assert one(tmp_path / "cut", resume=tmp_path / "cut/saved") == whole
