"""What hostile reading and killing once broke: each stays mended."""

from __future__ import annotations

import copy
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Samples, adamw, assert_same_bits, bits, built_in, loader, loss_fn, net, same
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler
from torchmetrics.classification import MulticlassAccuracy

from hookloop.callbacks import (
    Checkpoint,
    DynamicBatchSize,
    EarlyStopping,
    GradientAccumulation,
    Metrics,
    MicroBatch,
    NonFinite,
    Schedule,
    Seed,
    SwitchOptimizer,
)
from hookloop.loop import Callback, Goal, Loop, State
from hookloop.loop.callback import HOOKS
from hookloop.loop.dispatch import overridden
from hookloop.loop.store import list_checkpoints


def make(*callbacks: Callback, **kwargs: Any) -> Loop:
    seed, model = Seed(0), net(seed=1)
    return Loop(model, adamw(model), [seed, *callbacks], **kwargs)


def test_a_finished_command_run_again_changes_nothing(tmp_path: Path) -> None:
    names = []
    for _ in range(7):
        built_in(make(Checkpoint(tmp_path), resume=tmp_path), loss_fn, loader(), epochs=2)
        names.append([p.name for p in list_checkpoints(tmp_path)])
    assert names == [["step-00000007", "step-00000014"]] * 7


def test_killed_between_an_update_and_its_report(tmp_path: Path) -> None:
    """What watches a number that is logged in a step, or a training metric, finds it after a resume too."""

    class Logs(Callback):
        def on_step_end(self, state: State) -> None:
            state.log("own", state.metrics["accuracy"])

    class Die(Callback):
        def on_micro_end(self, state: State) -> None:
            if not state.micro.training and state.step == 7:
                raise KeyboardInterrupt

    def go(folder: Path, *more: Callback) -> Loop:
        watching = [Metrics({"acc": MulticlassAccuracy(3)}, training=True), EarlyStopping(Goal("train_acc", "max", 9)),
                    EarlyStopping(Goal("own", "max", 9)).named("step's own"), Logs()]  # fmt: skip
        loop = make(Checkpoint(folder, every=1), *watching, *more, resume=folder)
        built_in(loop, loss_fn, loader(), loader(20), epochs=3)
        return loop

    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "a", Die())
    with pytest.warns(UserWarning, match="not taken"), pytest.raises(KeyError, match="'accuracy', which was not reported"):
        built_in(make(EarlyStopping("accuracy"), resume=tmp_path / "a", strict=False), loss_fn, loader(), loader(20), epochs=3)
    again, whole = go(tmp_path / "a"), go(tmp_path / "b")
    assert_same_bits(bits(again), bits(whole))
    same(*([c.state_dict() for c in loop.callbacks[2:5]] for loop in (again, whole)))


@pytest.mark.parametrize("where", ["data", "on_before_optimizer_step"])
def test_an_error_that_is_survived_costs_no_sample(where: str) -> None:
    class Data(Samples):
        def __getitem__(self, i: int) -> Any:
            if where == "data" and len(self.read) == 20 and not failed:
                failed.append(1)
                raise OSError("network")
            return super().__getitem__(i)

    class Fails(Callback):
        def on_before_optimizer_step(self, state: State) -> None:
            if where != "data" and state.step == 1 and not failed:
                failed.append(1)
                raise OSError("network")

    failed: list[int] = []
    loop, train = make(GradientAccumulation(4), Fails()), DataLoader(Data(50), 8, shuffle=True)
    with pytest.raises(OSError, match="network"):
        built_in(loop, loss_fn, train, epochs=1)
    assert built_in(loop, loss_fn, train, epochs=1).samples == 50
    whole = make(GradientAccumulation(4), Callback())
    built_in(whole, loss_fn, DataLoader(Samples(50), 8, shuffle=True), epochs=1)
    for a, b in zip(loop.state.model.parameters(), whole.state.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("sizes", "n"), [([2, 1] * 10, 2), ([3, 2, 2, 2], 1), ([2] * 7 + [1] * 6, 2)])
def test_told_in_advance_for_batches_of_any_size(sizes: list[int], n: int) -> None:
    class Ragged:
        def __len__(self) -> int:
            return len(sizes)

        def __iter__(self) -> Any:
            rows = iter(range(sum(sizes)))
            return iter([[next(rows) for _ in range(size)] for size in sizes])

    model = net(noise=False)
    loop = Loop(model, adamw(model), [GradientAccumulation(n)])
    state = built_in(loop, loss_fn, DataLoader(Samples(sum(sizes)), batch_sampler=Ragged()), epochs=2)
    assert state.step == state.total_steps


class Rebinds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(6, 3), nn.BatchNorm1d(6)
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.mean(0).detach()
        return self.layer(self.norm(x - self.mean))


def test_out_of_memory_puts_back_buffers_that_are_rebound_or_change_late() -> None:
    def run(fails: bool) -> Any:
        class Thaw(Callback):
            owns = () if fails else ("micro_batch_size",)

            def on_step_start(self, state: State) -> None:
                model.norm.train(state.epoch > 0)
                if not fails and state.epoch:
                    state.micro_batch_size = 4

        def loss(m: Any, batch: Any) -> Any:
            found = nn.functional.cross_entropy(m(batch[0]), batch[1])
            if fails and m.training and loop.state.epoch and len(batch[0]) > 4:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return found

        torch.manual_seed(0)
        model = Rebinds()
        loop = Loop(model, adamw(model), [Seed(0), Thaw(), *([MicroBatch("auto")] if fails else [])])
        built_in(loop, loss, loader(48), epochs=2)
        return bits(loop)

    assert_same_bits(run(True), run(False))


def test_an_entry_that_trains_nothing_keeps_the_last_weights() -> None:
    def run(between: bool) -> Any:
        loop = make(EarlyStopping(patience=50, restore_best=True))
        built_in(loop, loss_fn, loader(), loader(20), epochs=4)
        if between:
            with loop:
                loop.evaluate(loss_fn, loader(20))
            with pytest.raises(ValueError, match="when to end"):
                loop.fit(loss_fn, loader(), loader(20))
        built_in(loop, loss_fn, loader(), loader(20), epochs=6)
        return bits(loop)

    assert_same_bits(run(True), run(False))


@pytest.mark.parametrize("seeded", [True, False])
@pytest.mark.parametrize("bulk", [True, False])
def test_augmentation_in_workers_resumes_to_the_same_bits(seeded: bool, bulk: bool, tmp_path: Path) -> None:
    class Noise(Samples):
        def __getitem__(self, i: Any) -> Any:
            x = self.x[i]
            return x + torch.randn(x.shape), self.y[i]

    def run(folder: Path, *ends: int) -> Any:
        for end in ends:
            torch.manual_seed(3)
            seed, data = [Seed(0)] if seeded else [], Noise(50)
            batches = {"batch_size": None, "sampler": BatchSampler(RandomSampler(data), 8, False)} if bulk else {}
            train = DataLoader(data, num_workers=2, **(batches or {"batch_size": 8, "shuffle": True}))
            model = net(seed=1)
            torch.manual_seed(4)
            loop = Loop(model, adamw(model), [*seed, Checkpoint(folder)], resume=folder)
            built_in(loop, loss_fn, train, steps=end)
        return bits(loop)

    assert_same_bits(run(tmp_path / "a", 9), run(tmp_path / "b", 4, 9))


def test_another_loader_in_each_epoch_resumes(tmp_path: Path) -> None:
    loaders = [loader(32), loader(50)]

    def run(folder: Path, dies: bool) -> Any:
        loop = make(Checkpoint(folder), resume=folder)
        with loop:
            for epoch in loop.epochs(2):
                for step in loop.steps(loaders[epoch]):
                    for micro in step:
                        with micro:
                            if dies and epoch == 1:
                                raise KeyboardInterrupt
                            micro.backward(loss_fn)
                    loop.update()
        return bits(loop)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "a", True)
    assert_same_bits(run(tmp_path / "a", False), run(tmp_path / "b", False))


@pytest.mark.parametrize("name", ["step-7", "step-00000007x", "latest", "step-00000014/model", "afile", "foreign.pt"])
def test_resume_that_names_nothing_is_no_fresh_start(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    built_in(make(Checkpoint(folder)), loss_fn, loader(), epochs=2)
    (tmp_path / "afile").touch()
    torch.save({}, tmp_path / "foreign.pt")
    place = tmp_path / name if name in ("afile", "foreign.pt") else folder / name
    with pytest.raises((FileNotFoundError, ValueError), match=r"no such checkpoint|is no checkpoint"):
        built_in(make(resume=place), loss_fn, loader(), epochs=3)
    shutil.rmtree(folder)
    assert built_in(make(resume=folder), loss_fn, loader(), epochs=1).step == 7


@pytest.mark.parametrize(("act", "says"), [
    (lambda loop: loop.fit(loss_fn, Samples(20), epochs=1), "wrap it: DataLoader"),
    (lambda loop: loop.fit(loss_fn, None, epochs=1), "train_loader must give batches"),
    (lambda loop: loop.fit(loss_fn, loader(), 3, epochs=1), "val_loader must give batches"),
    (lambda loop: loop.fit(loss_fn, loader(), {}, epochs=1), "empty mapping"),
    (lambda loop: loop.__enter__().updating(samples="8").__enter__(), "samples must be"),
    (lambda loop: loop.__enter__().updating(loss=torch.ones(2)).__enter__(), "0-d tensor"),
    (lambda loop: loop.state.log("a", "b"), "takes a number"),
    (lambda loop: loop.state.report({3: 1.0}), "3 is no name"),
])  # fmt: skip
def test_what_a_hurried_user_gives(act: Any, says: str) -> None:
    with pytest.raises((TypeError, ValueError), match=says):
        act(make())


@pytest.mark.parametrize(("kwargs", "says"), [
    ({"weigh": 3}, "weigh must be a function"), ({"cut": 3}, "cut must be a function"), ({"scaler": "x"}, "scaler must be"),
    ({"callbacks": None}, "callbacks must be a list"),
])  # fmt: skip
def test_loop_arguments(kwargs: Any, says: str) -> None:
    model = net()
    with pytest.raises(TypeError, match=says):
        Loop(model, adamw(model), **kwargs)


def test_an_optimizer_of_another_model_is_refused() -> None:
    model = net()
    with pytest.raises(ValueError, match="none of the 6 tensors in AdamW is a parameter of the model"):
        Loop(copy.deepcopy(model), adamw(model)).fit(loss_fn, loader(), epochs=1)


def test_val_metrics_need_a_val_loader_and_say_so_at_once() -> None:
    train = loader()
    for watcher in (EarlyStopping("val_loss"), DynamicBatchSize(4, 8, every=Goal("val_loss"))):
        with pytest.raises(ValueError, match="watches 'val_loss', but no val_loader"):
            make(watcher).fit(loss_fn, train, epochs=1)
    assert not train.dataset.read


@pytest.mark.parametrize(("field", "value", "owns", "says"), [
    ("accumulate", 0, ("accumulate",), "state.accumulate must be a whole number, at least 1, not 0"),
    ("batch_size", 8.0, ("batch_size",), "state.batch_size must be"), ("micro_batch_size", 0, (), "state.micro_batch_size"),
    ("batch_size", 4, (), "does not name it in owns"), ("batch_size", 4, ("batchsize",), "owns must be a tuple"),
    ("batch_size", 4, "batch_size", "owns must be a tuple"),
])  # fmt: skip
def test_plans_that_cannot_be(field: str, value: Any, owns: Any, says: str) -> None:
    class Plan(Callback):
        def on_step_start(self, state: State) -> None:
            setattr(state, field, value)

    Plan.owns = owns
    with pytest.raises(ValueError, match=says):
        make(Plan()).fit(loss_fn, loader(), epochs=1)


def test_hooks_that_could_never_run() -> None:
    class Async(Callback):
        async def on_step_end(self, state: State) -> None: ...

    class Yields(Callback):
        def on_step_end(self, state: State) -> Any:
            yield

    class Elsewhere(Callback):
        def on_train_batch_end(self, state: State) -> None: ...

    for callback, says in (
        (Async(), "async or a generator"),
        (Yields(), "async or a generator"),
        (Elsewhere(), "is on_step_end"),
    ):
        with pytest.raises(TypeError, match=says):
            make(callback)


def test_what_shapes_the_step_is_refused_around() -> None:
    says = r"MicroBatch needs to decide state\.micro_batch_size"
    with make(MicroBatch(2)) as loop, pytest.raises(ValueError, match=says), loop.updating():
        pass


def test_updating_inside_steps_is_refused() -> None:
    loop = make()
    with loop:
        for _ in loop.epochs(1):
            for step in loop.steps(loader(8)):
                for micro in step:
                    with micro:
                        micro.backward(loss_fn)
                with pytest.raises(RuntimeError, match="would apply the step twice"), loop.updating():
                    loop.state.optimizer.step()
                loop.update()
    assert loop.state.step == 1


def counted(kind: Any) -> Any:
    """A subclass that overrides every hook, to count its runs, and leaves the rest to the class."""

    def hook(name: str) -> Any:
        def run(self: Any, state: State) -> Any:
            self.ran[name] = self.ran.get(name, 0) + 1
            return getattr(super(found, self), name)(state)

        return run

    found: Any = type("Counted", (kind,), {"ran": {}, **{name: hook(name) for name in HOOKS}})
    return found


HOLDERS: Any = {  # what leaves hooks idle, or did
    "by step": (Schedule, ("cosine",), {}),
    "by epoch": (Schedule, (lambda o, n: torch.optim.lr_scheduler.ExponentialLR(o, 0.5), "epoch"), {}),
    "by metric": (Schedule, ("plateau", "val_loss"), {"patience": 0, "threshold": 9.0}),
    "fixed": (MicroBatch, (3,), {}),
    "auto": (MicroBatch, ("auto",), {}),
    "repeated": (MicroBatch, (3,), {"on_step_oom": "rollback"}),
    "stop": (NonFinite, (), {}),
    "rollback": (NonFinite, ("rollback",), {"every": 2}),
    "at a plateau": (SwitchOptimizer, (lambda groups: torch.optim.SGD(groups, lr=0.1), Goal("val_loss", "max", 1)), {}),
    "projected": (SwitchOptimizer, (lambda groups: torch.optim.SGD(groups, lr=0.1), 6, "swats"), {}),
    "grows": (DynamicBatchSize, (2, 8), {"every": Goal("val_loss", "max", 1)}),
}


@pytest.mark.parametrize("case", HOLDERS)
def test_a_subclass_that_overrides_a_hook_is_run_and_may_leave_the_work_to_the_class(case: str) -> None:
    kind, args, options = HOLDERS[case]
    ends = []
    for each in (kind, counted(kind)):
        loop = make(callback := each(*args, **options))
        loop.fit(loss_fn, loader(24, generator=torch.Generator().manual_seed(1)), loader(16, shuffle=False), epochs=4)
        ends.append((bits(loop), loop.state.rates, loop.state.step))
    assert_same_bits(ends[0][0], ends[1][0])
    assert ends[0][1:] == ends[1][1:]
    steps = dict.fromkeys(("on_step_start", "on_before_optimizer_step", "on_step_end"), loop.state.step)
    expected = dict.fromkeys(("on_setup", "on_fit_start", "on_fit_end"), 1)
    expected |= dict.fromkeys(("on_epoch_start", "on_epoch_end", "on_validation_end"), 4)
    assert {hook: count for hook, count in callback.ran.items() if hook != "on_micro_end"} == expected | steps


IDLE: Any = {
    "by epoch": {"on_step_end", "on_validation_end"},
    "fixed": {"on_step_start", "on_before_optimizer_step", "on_exception"},
    "repeated": set(),
    "at a plateau": {"on_before_optimizer_step", "on_step_end"},
    "projected": {"on_validation_end"},
}


@pytest.mark.parametrize("case", IDLE)
def test_what_an_instance_does_without_it_takes_no_part_in_nor_does_a_copy(case: str) -> None:
    kind, args, options = HOLDERS[case]
    made = kind(*args, **options)
    copies = [made, copy.copy(made), copy.deepcopy(made)]
    if case == "fixed":  # the others hold a function without a name
        copies.append(pickle.loads(pickle.dumps(made)))
    own = {hook for hook in HOOKS if getattr(kind, hook) is not getattr(Callback, hook)}
    for each in copies:
        assert overridden(each) == own - IDLE[case]
        loop = make(each)
        assert {hook for hook in HOOKS if loop.hooks[hook]} == own - IDLE[case]
    assert overridden(counted(kind)(*args, **options)) == set(HOOKS)


def test_callbacks_can_be_copied() -> None:
    used = Schedule(lambda optimizer, total: torch.optim.lr_scheduler.ConstantLR(optimizer))
    make(used)
    make(copy.copy(used))
    with pytest.raises(ValueError, match="key must be a string"):
        used.named(3)
