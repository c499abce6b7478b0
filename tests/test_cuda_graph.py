"""CUDAGraph: replayed is as written, to the bit; on the CPU with a recorder in the graphs' place, for real in test_gpu.py."""

from __future__ import annotations

import itertools
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import FORMS, KillAt, Killed, assert_same_bits, bits, built_in, loader, loss_fn, net
from recorder import SETS, AsWritten, Recording, aligned
from test_sizes import Fake
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from hookloop.callbacks import (
    Checkpoint,
    CUDAGraph,
    Dropout,
    GradientAccumulation,
    MicroBatch,
    NonFinite,
    Schedule,
    Seed,
    Warmup,
)
from hookloop.callbacks import cuda_graph as module
from hookloop.loop import Callback, Loop, State, graph


@pytest.fixture(autouse=True)
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "Recording", Recording)
    monkeypatch.setattr(module, "supported", lambda device: True)
    monkeypatch.setattr(Recording, "count", 0)


KINDS = {
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=1e-2, fused=True),
    "sgd": lambda ps: torch.optim.SGD(ps, lr=1e-2, momentum=0.9, fused=True),
    "adagrad": lambda ps: torch.optim.Adagrad(ps, lr=1e-2, fused=True),
}


def run(form: Any, graphs: Callback | None, *callbacks: Callback, kind: str = "adamw", model: Any = None, data: Any = None,
        loss: Any = aligned, epochs: int = 3, **kwargs: Any) -> Loop:  # fmt: skip
    val = loader(20, 8, shuffle=False) if loss is aligned else None
    seed = Seed(3)
    model = net(seed=5) if model is None else model
    loop = Loop(model, KINDS[kind](model.parameters()), [seed, graphs or AsWritten(), *callbacks], **kwargs)
    form(loop, loss, loader(50, 8) if data is None else data, val, epochs=epochs)
    return loop


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SETS)
def test_replayed_is_as_written(name: str, kind: str, tmp_path: Path) -> None:
    """Dropout and BatchNorm in the model, all rates and metrics too; the forms in turns."""
    form = FORMS[([*SETS].index(name) + [*KINDS].index(kind)) % 2]
    loops = []
    for i, graphs in enumerate((None, CUDAGraph(2, graphs=16))):
        folder = tmp_path / str(i)
        loops.append(run(form, graphs, *SETS[name](folder), kind=kind))
    expected, found = loops
    assert_same_bits(bits(expected), bits(found))
    for name in ("loss", "train_loss", "val_loss", "val_accuracy"):
        assert float(expected.state.metrics.get(name, 0)) == float(found.state.metrics.get(name, 0))
    assert [float(r) for r in expected.state.rates] == [float(r) for r in found.state.rates]
    assert expected.optimizer_steps == found.optimizer_steps == found.state.step
    assert Recording.count > 1


def test_two_thirds_are_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's Python code runs while warming up and while recording; that of hooks each time."""
    calls, hooks = [0], [0]

    def loss(model: Any, batch: Any) -> Any:
        calls[0] += model.training
        return aligned(model, batch)

    class Watch(Callback):
        def on_before_optimizer_step(self, state: Any) -> None:
            hooks[0] += 1

    loop = run(built_in, CUDAGraph(3), Watch(), data=loader(64, 8), loss=loss)
    assert (loop.state.step, hooks[0], calls[0]) == (24, 24, 4)
    assert Recording.count == 2


def test_how_much_is_dropped_is_recorded_anew() -> None:
    """Python reads it while recording only."""
    found = bits(run(built_in, CUDAGraph(2), Dropout({0: 0.5, 1: 0.0, 2: 0.2})))
    assert_same_bits(bits(run(built_in, None, Dropout({0: 0.5, 1: 0.0, 2: 0.2}))), found)
    assert Recording.count == 6


@pytest.mark.parametrize("warmup", [1, 2, 5])
def test_the_steps_before_count(warmup: int) -> None:
    expected = run(built_in, None, GradientAccumulation(2))
    assert_same_bits(bits(expected), bits(run(built_in, CUDAGraph(warmup), GradientAccumulation(2))))


def test_outputs_are_kept_by_whoever_keeps_them() -> None:
    """A replay writes where the one before wrote; what hooks and metrics hold is a copy."""

    class Keep(Callback):
        def __init__(self) -> None:
            self.seen: list[Any] = []

        def on_micro_end(self, state: Any) -> None:
            if state.micro.training:
                self.seen.append((state.micro.outputs["preds"], state.micro.outputs["loss"], state.metrics.get("loss")))

    kept = Keep(), Keep()
    run(built_in, None, kept[0])
    run(built_in, CUDAGraph(2), kept[1])
    for (a, b, c), (x, y, z) in zip(kept[0].seen, kept[1].seen, strict=True):
        assert torch.equal(a, x)
        assert torch.equal(b, y)
        assert c is z is None or torch.equal(c, z)


class Change(Callback):
    """Does something at one update's start."""

    def __init__(self, step: int, act: Any, hook: str = "on_step_start") -> None:
        setattr(self, hook, lambda state: act(state) if state.step == step else None)


def freeze(state: Any) -> None:
    state.model[0].requires_grad_(False)


def thaw_mode(state: Any) -> None:
    state.model[1].eval()


def move_weights(state: Any) -> None:
    for p in state.model.parameters():
        p.data = p.data * 0.5


CHANGES: dict[str, Any] = {
    "memory of weights": (move_weights, 2),
    "a buffer replaced": (lambda s: setattr(s.model[1], "running_var", s.model[1].running_var * 0.5), 2),
    "decay": (lambda s: s.optimizer.param_groups[0].update(weight_decay=0.3), 1),
    "betas": (lambda s: s.optimizer.param_groups[0].update(betas=(0.5, 0.9)), 1),
    "rate in place": (lambda s: s.optimizer.param_groups[0]["lr"].mul_(0.5), 0),
    "rate replaced": (lambda s: s.optimizer.param_groups[0].update(lr=torch.tensor(0.004)), 1),
    "rate as a number": (lambda s: s.optimizer.param_groups[0].update(lr=0.004), 0),
    "frozen": (freeze, 2),
    "mode": (thaw_mode, 2),
    "loaded": (lambda s: s.optimizer.load_state_dict(s.optimizer.state_dict()), 1),
    "weights": (lambda s: s.model.load_state_dict({k: v * 0.5 for k, v in s.model.state_dict().items()}), 0),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_changes_is_recorded_anew(what: str) -> None:
    act, more = CHANGES[what]
    expected = run(built_in, None, Change(9, act), data=loader(48, 8))
    before = Recording.count
    found = run(built_in, CUDAGraph(2), Change(9, act), data=loader(48, 8))
    assert_same_bits(bits(expected), bits(found))
    assert Recording.count - before == 2 + more


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_a_rate_given_as_a_tensor_goes_to_the_device(kind: Any) -> None:
    """Where the update reads it; on the host it would be a number in the recorded launch."""
    model = nn.Linear(2, 2, device="meta")  # which is not the host
    optimizer = kind(model.parameters(), lr=torch.tensor(0.1))
    optimizer.param_groups[0]["fused"] = True
    state = State(model, optimizer, device=torch.device("meta"))
    runner = graph.Graphs(state, 3, 8)
    for _ in range(2):
        runner.begin(SimpleNamespace(state=state))  # type: ignore[arg-type]
        rate = optimizer.param_groups[0]["lr"]
        assert rate.device == state.device
        assert optimizer.param_groups[0].get("capturable") is (True if kind is torch.optim.AdamW else None)
        runner.begin(SimpleNamespace(state=state))  # type: ignore[arg-type]
        assert optimizer.param_groups[0]["lr"] is rate
        optimizer.param_groups[0]["lr"] = torch.tensor(0.2)  # as what was saved on the host may bring it


def test_rates_given_as_tensors_are_filled_in_place() -> None:
    """Those of all groups, and with it their counts of steps are on the device."""
    loops = []
    for graphs in (None, CUDAGraph(2)):
        model = net(seed=5)
        groups = [{"params": list(layer.parameters()), "lr": torch.tensor(0.01)} for layer in (model[:2], model[4])]
        loop = Loop(model, torch.optim.AdamW(groups, fused=True), [Seed(3), graphs or AsWritten(), Warmup(20)])
        loops.append(loop)
        built_in(loop, aligned, loader(48, 8), epochs=4)
    assert_same_bits(bits(loops[0]), bits(loops[1]))
    assert all(group["capturable"] for group in loops[1].state.optimizer.param_groups)
    assert Recording.count == 2


def test_rates_that_a_program_sets_as_numbers_are_filled_in_place() -> None:
    """Each update has another, and none is recorded anew."""

    class Falls(Callback):
        def on_step_start(self, state: Any) -> None:
            state.optimizer.param_groups[0]["lr"] = 0.01 / (1 + state.step)

    expected = run(built_in, None, Falls(), data=loader(96, 8), epochs=4)
    assert_same_bits(bits(expected), bits(run(built_in, CUDAGraph(2), Falls(), data=loader(96, 8), epochs=4)))
    assert Recording.count == 2


@pytest.mark.parametrize("how", ["replaced", "in place", "none"])
def test_gradients_that_a_callback_changes(how: str) -> None:
    def act(state: Any) -> None:
        p = state.model[0].weight
        if how == "in place":
            p.grad.mul_(0.5)
        else:
            p.grad = p.grad * 0.5 if how == "replaced" else None

    change = Change(9, act, "on_before_optimizer_step")
    expected = run(built_in, None, change)
    change = Change(9, act, "on_before_optimizer_step")
    assert_same_bits(bits(expected), bits(run(built_in, CUDAGraph(2), change)))


class Branches(nn.Module):
    """A layer that short sequences do not reach, and one that nothing reaches."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.short, self.long, self.out = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.embed(x).mean(1)
        return self.out(self.short(h) if x.shape[1] < 5 else self.long(h))


def texts(lengths: Any) -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randint(0, 9, (4, n), generator=generator), torch.randint(0, 3, (4,), generator=generator), ["a"])
            for n in lengths]  # fmt: skip


def cross_entropy(model: Any, batch: Any) -> Any:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize("kind", ["adamw", "adagrad"])  # torch's fused SGD fails where only some momenta have begun
def test_shapes_that_reach_other_parameters(kind: str) -> None:
    """What has no gradient in a step gets no decay and no momentum in it."""
    lengths = [3, 6, 3, 6, 3, 6, 4, 7] * 4
    loops = [run(built_in, one, GradientAccumulation(1 + i % 2), kind=kind, model=Branches(), data=texts(lengths),
                 loss=cross_entropy) for i in (0, 1) for one in (None, CUDAGraph(2))]  # fmt: skip
    assert_same_bits(bits(loops[0]), bits(loops[1]))
    assert_same_bits(bits(loops[2]), bits(loops[3]))


def test_the_shape_used_longest_ago_is_dropped() -> None:
    data = texts([3, 4, 5, 6] * 3)
    expected = run(built_in, None, model=Branches(), data=data, loss=cross_entropy, epochs=1)
    found = run(built_in, graphs := CUDAGraph(1, graphs=3), model=Branches(), data=data, loss=cross_entropy, epochs=1)
    assert_same_bits(bits(expected), bits(found))
    assert graphs.graphs == 3


class Heads(nn.Module):
    """One for each task, over what they share."""

    def __init__(self, count: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shared, self.heads = nn.Linear(6, 8), nn.ModuleList([nn.Linear(8, 3) for _ in range(count)])

    def forward(self, x: torch.Tensor, task: int) -> torch.Tensor:
        return self.heads[task](self.shared(x))


def of_task(model: Any, batch: Any) -> Any:
    return nn.functional.cross_entropy(model(batch[0].clone(), batch[2]), batch[1])


def tasks(count: int, updates: int) -> list[Any]:
    return [(x, y, i % count) for i, (x, y, _) in enumerate([*loader(48, 8)] * (updates // 6))]


@pytest.mark.parametrize(("count", "most"), [(2, 8), (3, 3)])
def test_updates_in_turns_are_recorded_once_each(count: int, most: int) -> None:
    """Each has gradients of its own."""
    data = tasks(count, 24)
    expected = run(built_in, None, model=Heads(count), data=data, loss=of_task, epochs=1)
    found = run(built_in, CUDAGraph(1, graphs=most), model=Heads(count), data=data, loss=of_task, epochs=1)
    assert_same_bits(bits(expected), bits(found))
    assert Recording.count == 2 * count


def test_no_end_of_updates_is_an_error() -> None:
    """Each would wait for the device."""

    class Falls(Callback):
        def on_step_start(self, state: Any) -> None:
            state.optimizer.param_groups[0]["weight_decay"] = 0.1 / (1 + state.step)

    said = r"has recorded 8 updates, keeps 2, and replayed only 8: settings .*Fill a rate in place .*CUDAGraph\(graphs=8\)"
    with pytest.raises(RuntimeError, match=said):
        run(built_in, CUDAGraph(1, graphs=2), Falls(), data=loader(96, 8))


@pytest.mark.parametrize("what", ["lengths", "words", "functions"])
def test_no_end_of_shapes_is_an_error(what: str) -> None:
    """As is all that a recording would hold fast: a batch's words, a function made anew each time."""
    data = [(x, y, [str(i // 2)] if what == "words" else ["a"])
            for i, (x, y, _) in enumerate(texts([3 + (i // 2 if what == "lengths" else 0) for i in range(60)]))]  # fmt: skip
    model = Branches()
    loop = Loop(model, KINDS["adamw"](model.parameters()), [CUDAGraph(1, graphs=2)])

    def train() -> None:
        with loop:
            for _ in loop.epochs(1):
                for number, step in enumerate(loop.steps(data)):
                    if what != "functions" or not number % 2:
                        one = (lambda m, b: cross_entropy(m, b)) if what == "functions" else cross_entropy
                    for micro in step:
                        with micro:
                            micro.backward(one)
                    loop.update()

    with pytest.raises(
        RuntimeError, match=r"has recorded 8 micro-batches, keeps 2, and replayed only \d+: .*Pad to a few lengths.*graphs=8"
    ):
        train()


class Shapes:
    """Holds tensors, and tells their shapes only, as the batches of torch_geometric do."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x

    def __repr__(self) -> str:
        return f"Shapes(x={[*self.x.shape]})"


OPAQUE: dict[str, Any] = {
    "Shapes": Shapes,
    "PackedSequence": lambda x: pack_sequence([*x]),
    "ndarray": lambda x: np.arange(2000.0) + len(x),
}


@pytest.mark.parametrize("kind", OPAQUE)
def test_what_can_not_be_seen_into_is_refused(kind: str) -> None:
    """Its repr may be the same where what it holds is not, and the first would be replayed for all."""
    data = [(x, y, {"more": [OPAQUE[kind](x), "a"] if kind == "Shapes" else OPAQUE[kind](x)}) for x, y, _ in texts([3] * 9)]
    said = rf"can't see into batch\[2\]\['more'\] \({kind}\), .*give tensors in its place .*or leave CUDAGraph out"
    with pytest.raises(ValueError, match=said):
        run(built_in, CUDAGraph(2), model=Branches(), data=data, loss=cross_entropy)


def test_containers_and_values_tell_batches_apart() -> None:
    """A function may go by any of it, so each is recorded by itself."""
    mores: list[Any] = [[], (), {}, None, 1, True, 1.0, "1", b"1", ["a", 1], ["a", 1.0], ("a", 1), {"a": 1}, torch.float16]
    data = [(x, y, mores[i % len(mores)]) for i, (x, y, _) in enumerate(texts([3] * 4 * len(mores)))]

    def loss(model: Any, batch: Any) -> Any:
        return cross_entropy(model, batch) * (2 + [repr(more) for more in mores].index(repr(batch[2])))

    expected = run(built_in, None, model=Branches(), data=data, loss=loss, epochs=1)
    found = run(built_in, CUDAGraph(2, graphs=16), model=Branches(), data=data, loss=loss, epochs=1)
    assert_same_bits(bits(expected), bits(found))
    assert Recording.count == len(mores) + 1


class Centre(nn.Module):
    """Takes a running mean off, which it keeps in one of two ways."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = 0.9 * self.mean + 0.1 * x.mean(0)
        if not self.in_place:
            self.mean = mean
        elif self.training:
            self.mean.copy_(mean)
        return x - self.mean


def test_a_buffer_that_is_rebound_is_refused() -> None:
    """No replay would change what the model holds; before the recording the model is as written."""
    data = [*loader(48, 8, shuffle=False)]

    def one(graphs: Any, model: Any) -> Loop:
        return run(built_in, graphs, model=nn.Sequential(model, net(seed=5)), data=data)

    assert_same_bits(bits(one(None, Centre(in_place=True))), bits(one(CUDAGraph(2), Centre(in_place=True))))
    model = Centre(in_place=False)
    said = r"another tensor in the place of the buffer 0\.mean, .*fill it in place \(copy_, lerp_\)"
    with pytest.raises(ValueError, match=said):
        one(CUDAGraph(5), model)
    mean = torch.zeros(6)
    for x, *_ in data[:5]:
        mean = 0.9 * mean + 0.1 * x.mean(0)
    assert torch.equal(model.mean, mean)


def test_a_buffer_that_is_filled_in_place_by_out_is_not_rebound() -> None:
    """As by torch's spectral norm, which assigns it too."""

    def one(graphs: Callback | None) -> Loop:
        torch.manual_seed(0)
        layers = [nn.utils.parametrizations.spectral_norm(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 3)]
        return run(built_in, graphs, model=nn.Sequential(*layers))

    assert_same_bits(bits(one(None)), bits(one(CUDAGraph(2))))


def reads(model: Any, batch: Any) -> Any:
    loss = cross_entropy(model, batch)
    if loss > 100.0:  # a line of the user's
        loss = loss * 0
    return loss


def test_a_loss_that_waits_names_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "OURS", (*graph.OURS, sys.modules["recorder"].__file__))
    with pytest.raises(RuntimeError) as caught:
        run(built_in, CUDAGraph(2), model=Branches(), data=texts([3] * 9), loss=reads)
    [note] = [note for note in caught.value.__notes__ if "could not record" in note]
    assert f"could not record loss_fn, {__file__} line " in note
    assert "if loss > 100.0:  # a line of the user's: nothing in it may wait for the device" in note
    assert "keep a tensor with its history from an earlier step (self.aux = ...): detach it once it is used" in note


def test_what_was_computed_by_hand_can_not_be_replayed() -> None:
    model = Branches()
    loop = Loop(model, KINDS["adamw"](model.parameters()), [CUDAGraph()])

    def train() -> None:
        with loop:
            for _ in loop.epochs(1):
                for step in loop.steps(texts([3])):
                    for micro in step:
                        with micro:
                            micro.backward(cross_entropy(model, micro.batch))

    with pytest.raises(TypeError, match=r"needs the function and not its result: micro\.backward\(loss_fn\)"):
        train()


@pytest.mark.parametrize(("optimizer", "says"), [
    (lambda ps: torch.optim.SGD(ps, lr=0.1), r"can't record SGD.*SGD\(\.\.\., fused=True\)"),
    (lambda ps: torch.optim.Adafactor(ps), r"can't record Adafactor.*take one that has capturable="),
    (lambda ps: torch.optim.SparseAdam(ps), r"can't record SparseAdam"),
])  # fmt: skip
def test_optimizers_that_read_are_refused(optimizer: Any, says: str) -> None:
    model = Branches()
    with pytest.raises(ValueError, match=says):
        built_in(Loop(model, optimizer(list(model.parameters())), [CUDAGraph()]), cross_entropy, texts([3]), epochs=1)


def test_a_scaler_is_refused() -> None:
    model = Branches()
    scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(ValueError, match=r"can't record a GradScaler.*autocast=torch\.bfloat16"):
        built_in(
            Loop(model, KINDS["adamw"](model.parameters()), [CUDAGraph()], scaler=scaler), cross_entropy, texts([3]), epochs=1
        )


def test_sparse_gradients_are_refused() -> None:
    model = nn.Sequential(nn.EmbeddingBag(9, 3, sparse=True))
    with pytest.raises(ValueError, match=r"sparse gradient of a parameter of shape \(9, 3\): give its embedding sparse=False"):
        built_in(
            Loop(model, torch.optim.SGD(model.parameters(), fused=True), [CUDAGraph()]), cross_entropy, texts([3]), epochs=1
        )


def test_around_a_loop_there_is_nothing_to_replay() -> None:
    model = Branches()
    loop = Loop(model, KINDS["adamw"](model.parameters()), [CUDAGraph()])
    with pytest.raises(ValueError, match=r"CUDAGraph needs to decide state\.runner"), loop, loop.updating():
        pass


def test_without_a_gpu_it_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    model, other = net(seed=5), net(seed=5)
    loop = Loop(model, KINDS["adamw"](model.parameters()), [Seed(1), CUDAGraph()])
    with pytest.warns(UserWarning, match="CUDAGraph does nothing on cpu: steps run as written"):
        built_in(loop, loss_fn, loader(), epochs=1)
    built_in(loop, loss_fn, loader(), epochs=2)  # where a second warning would be an error
    plain = Loop(other, KINDS["adamw"](other.parameters()), [Seed(1)])
    built_in(plain, loss_fn, loader(), epochs=2)
    assert_same_bits(bits(plain), bits(loop))
    assert isinstance(loop.state.optimizer.param_groups[0]["lr"], float)


@pytest.mark.parametrize("kill", [1, 4, 7, 12])
def test_killed_and_resumed_it_is_the_same_run(kill: int, tmp_path: Path) -> None:
    """Warming up again draws and computes the same; also from a checkpoint of a run without it."""

    def go(folder: Path, kill: int | None, graphs: Callback | None) -> Loop:
        cosine = Schedule(lambda o, total: torch.optim.lr_scheduler.CosineAnnealingLR(o, total))
        return run(built_in, graphs, Warmup(4), cosine, Checkpoint(folder, every=2), KillAt(kill), resume=folder)

    expected = go(tmp_path / "a", None, None)
    for first, second in ((CUDAGraph(2), CUDAGraph(2)), (None, CUDAGraph(2)), (CUDAGraph(2), None)):
        folder = tmp_path / f"{first is None}{second is None}"
        with pytest.raises(Killed):
            go(folder, kill, first)
        assert_same_bits(bits(expected), bits(go(folder, None, second)))


@pytest.mark.parametrize("action", ["skip", "rollback"])
def test_updates_that_are_left_out(action: str) -> None:
    """The verdict reaches a recorded update; going back gives the optimizer other tensors, so it is recorded anew."""

    def spoil(state: Any) -> None:
        if state.step + state.skipped in (1, 6, 9):
            state.model[0].weight.grad[0, 0] = torch.nan

    class Spoil(Callback):
        def on_before_optimizer_step(self, state: Any) -> None:
            spoil(state)

    expected = run(built_in, None, Spoil(), NonFinite(action, every=3))
    found = run(built_in, CUDAGraph(2), Spoil(), NonFinite(action, every=3))
    assert_same_bits(bits(expected), bits(found))
    assert (found.state.step, found.state.skipped) == (expected.state.step, 3)


def test_autocast() -> None:
    expected = run(built_in, None, autocast=torch.bfloat16)
    assert_same_bits(bits(expected), bits(run(built_in, CUDAGraph(2), autocast=torch.bfloat16)))


def test_parameters_that_come_later() -> None:
    def grow(state: Any) -> None:
        state.model[4].requires_grad_(True)
        state.optimizer.add_param_group({"params": list(state.model[4].parameters()), "lr": 0.02})

    def one(graphs: Callback | None) -> Loop:
        model = net(seed=5)
        model[4].requires_grad_(False)
        loop = Loop(model, KINDS["adamw"](list(model[:4].parameters())), [Seed(2), graphs or AsWritten(), Change(5, grow)])
        built_in(loop, aligned, loader(48, 8), epochs=3)
        return loop

    assert_same_bits(bits(one(None)), bits(one(CUDAGraph(2))))


def test_entered_again_it_warms_up_anew() -> None:
    def one(graphs: Callback | None) -> Loop:
        model = net(seed=5)
        loop = Loop(model, KINDS["adamw"](model.parameters()), [Seed(2), graphs or AsWritten()])
        for epochs in (2, 4):
            loop.fit(aligned, loader(48, 8), epochs=epochs)
        return loop

    expected = one(None)
    before = Recording.count
    found = one(CUDAGraph(2))
    assert_same_bits(bits(expected), bits(found))
    assert Recording.count - before == 4
    assert not found.state.runner.micros


def test_out_of_memory_while_recording_is_redone_smaller() -> None:
    calls = [0]

    def loss(model: Any, batch: Any) -> Any:
        calls[0] += 1
        if len(batch[0]) == 8 and calls[0] == 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return aligned(model, batch)

    found = run(built_in, CUDAGraph(3), MicroBatch("auto"), data=loader(64, 8, shuffle=False), loss=loss, epochs=3)
    assert found.state.step == 24


class Pools(Recording):
    """Refuses, as torch's allocator does, a pool whose graphs are all gone."""

    uses: dict[Any, int] = {}  # noqa: RUF012

    def __init__(self, run: Any, pool: Any) -> None:
        assert self.uses.get(pool) != 0, "use_count > 0 INTERNAL ASSERT FAILED at CUDACachingAllocator.cpp"
        self.uses[pool] = self.uses.get(pool, 0) + 1
        weakref.finalize(self, self.gone, pool)
        super().__init__(run, pool)

    @classmethod
    def gone(cls, pool: Any) -> None:
        cls.uses[pool] -= 1


@pytest.mark.parametrize("what", ["one graph", "out of memory"])
def test_a_pool_is_not_used_again_once_its_graphs_are_gone(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither where the only shape is dropped for another, nor where the first recording failed."""
    handles, calls = itertools.count(), [0]
    monkeypatch.setattr(graph, "Recording", Pools)
    monkeypatch.setattr(Pools, "uses", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(handles))

    def loss(model: Any, batch: Any) -> Any:
        calls[0] += 1
        if what == "out of memory" and calls[0] == 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return cross_entropy(model, batch)

    data = [(x, y) for x, y, _ in texts([3] * 4 + [6] * 20 if what == "one graph" else [5] * 30)]
    graphs = CUDAGraph(3, graphs=1 if what == "one graph" else 8)
    more = GradientAccumulation(8) if what == "one graph" else MicroBatch("auto")
    found = run(built_in, graphs, more, model=Branches(), data=data, loss=loss, epochs=1)
    assert found.state.runner.replayed > 8
    assert len(Pools.uses) == next(handles) == 2
    assert not any(Pools.uses.values())  # all was given back


class Private(Fake):
    """A device's memory with a pool for graphs, whose room nothing else has while one of them is alive."""

    recording, alive, private, short = False, 0, 0, 0

    def run(self, batch: Any) -> None:
        need = int(self.took(batch))
        if (max(self.private, need) if self.recording else self.private + need) > self.total:
            self.short += 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.private = max(self.private, need) if self.recording else self.private
        super().run(batch)

    def gone(self) -> None:
        self.alive -= 1
        self.private = self.private if self.alive else 0


@pytest.mark.parametrize("accumulate", [1, 3])
def test_what_runs_as_written_beside_graphs_gets_their_memory(accumulate: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The short last batch of an epoch, in a step by itself or with others: sizes and bits are those of the run without."""
    loops, memories = [], []

    class Pooled(Recording):
        def __init__(self, run: Any, pool: Any) -> None:
            memory = memories[-1]
            memory.recording, memory.alive = True, memory.alive + 1
            weakref.finalize(self, memory.gone)
            try:
                super().__init__(run, pool)
            finally:
                memory.recording = False

    def loss(model: Any, batch: Any) -> Any:
        if model.training:
            memories[-1].run(batch[0])
        return aligned(model, batch)

    monkeypatch.setattr(graph, "Recording", Pooled)
    for graphs in (None, CUDAGraph()):
        memories.append(memory := Private(lambda batch: 40 + 3 * len(batch), 400))
        own = MicroBatch("auto", memory=memory, target="memory", multiple_of=1)
        more = [GradientAccumulation(accumulate)] if accumulate > 1 else []
        data = loader(560, 100)
        loops.append(run(built_in, graphs, own, *more, data=data, loss=loss, epochs=12))
    sizes = [loop.state.micro_batch_size for loop in loops]
    assert sizes[0] == sizes[1] > 100
    assert_same_bits(bits(loops[0]), bits(loops[1]))
    assert 1 <= memories[1].short <= 6  # at most once for each time that a shape warms up
    assert loops[1].state.runner.replayed > 30


def test_a_replay_takes_no_memory_anew_so_it_is_not_measured() -> None:
    memory = Fake(lambda batch: 40 + 3 * len(batch), 400)
    own = MicroBatch("auto", memory=memory, target="memory", multiple_of=1)

    def loss(model: Any, batch: Any) -> Any:
        memory.run(batch[0])
        return aligned(model, batch)

    found = run(built_in, CUDAGraph(2), own, data=loader(64, 8, shuffle=False), loss=loss, epochs=12)
    assert found.state.runner.replayed > 64
    assert {n: set(took) for n, took in own.sizes.took.items()} == {n: {40 + 3 * n} for n in own.sizes.took}


@pytest.mark.parametrize("bad", [{"warmup": 0}, {"warmup": 1.5}, {"graphs": 0}, {"graphs": None}, {"warmup": True}])
def test_bad_arguments(bad: Any) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        CUDAGraph(**bad)
