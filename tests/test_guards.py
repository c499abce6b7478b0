"""What goes wrong around a step without an error of its own: modes, what is trained, devices, sparse gradients, callbacks."""

from __future__ import annotations

import copy
import dataclasses
import gc
import os
import random
import re
import time
import types
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import FORMS, Samples, adamw, assert_same_bits, bits, built_in, by_hand, loader, loss_fn, net
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from hookloop.callbacks import (
    Checkpoint,
    ClipGradients,
    EarlyStopping,
    GradientAccumulation,
    Metrics,
    MicroBatch,
    NoiseScale,
    NonFinite,
    Preemption,
    Progress,
    Schedule,
    Seed,
    TensorBoard,
    WeightDecay,
)
from hookloop.loop import Callback, Loop, State
from hookloop.loop.callback import HOOKS
from hookloop.loop.store import list_checkpoints


class At(Callback):
    """Does something in one hook."""

    def __init__(self, hook: str, act: Any) -> None:
        setattr(self, hook, act)


def make(*callbacks: Callback, model: Any = None, **kwargs: Any) -> Loop:
    model = net(noise=False) if model is None else model
    return Loop(model, adamw(model), callbacks, **kwargs)


def val() -> DataLoader:
    return loader(10, 4, shuffle=False)


def notes(error: BaseException) -> list[str]:
    return getattr(error, "__notes__", [])


# ST6


class BoomError(Exception):
    pass


class Boom(Callback):
    """Raises in one hook, from the third update on."""

    def __init__(self, hook: str) -> None:
        def act(self: Any, state: Any) -> None:
            if state.step >= 2 or hook in ("on_setup", "on_fit_start"):
                raise BoomError(hook)

        setattr(self, hook, types.MethodType(act, self))


class Ends(Callback):
    def __init__(self) -> None:
        self.ended = 0

    def on_fit_end(self, state: Any) -> None:
        self.ended += 1


class EndsBadly(Callback):
    def on_fit_end(self, state: Any) -> None:
        raise OSError("while ending")


def open_files(folder: Path) -> list[str]:
    found = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")]
    return [path for path in found if path.startswith(str(folder))]


def fails_at(place: str, workers: int) -> tuple[Any, Any]:
    """A loss and data that fail in the third update."""

    class Data(Samples):
        def __getitem__(self, i: int) -> Any:
            if place == "data" and i == 20:
                raise BoomError(place)
            return super().__getitem__(i)

    def loss(model: Any, batch: Any) -> Any:
        if place == "loss" and 20 in batch[2]:
            raise BoomError(place)
        return loss_fn(model, batch)

    return loss, DataLoader(Data(50), 8, num_workers=workers)


def forward_fails(model: Any) -> None:
    count = [0]

    def hook(module: Any, args: Any) -> None:
        count[0] += 1
        if count[0] == 3:
            raise BoomError("forward")

    model.register_forward_pre_hook(hook)


STEPS = ["on_epoch_start", "on_step_start", "on_micro_end", "on_before_optimizer_step", "on_step_end", "on_validation_end",
         "on_epoch_end", "on_fit_end"]  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("place", ["forward", "loss", "data", "worker", "on_setup", "on_fit_start", *STEPS])
def test_st6_whatever_raises_files_are_closed_and_the_checkpoint_stands(
    place: str, first: bool, form: Any, tmp_path: Path
) -> None:
    """The user's own error comes first, with its traceback, and then what failed while ending; a new run goes on."""
    hook, model, ends = place if place in HOOKS else "", net(noise=False), Ends()
    loss, data = fails_at("data" if place == "worker" else place, 2 if place == "worker" else 0)
    if place == "forward":
        forward_fails(model)
    ours = [Checkpoint(tmp_path / "c", every=1, background=True), TensorBoard(tmp_path / "t"), Progress(every=0.01)]
    theirs = [*([Boom(hook)] if hook else []), ends, EndsBadly()]
    loop = make(*(theirs + ours if first else ours + theirs), model=model)
    with pytest.raises(BoomError) as caught:
        form(loop, loss, data, val(), epochs=2)
    assert caught.traceback[-1].name in ("act", "hook", "loss", "__getitem__") or place == "worker"
    early = place in ("on_setup", "on_fit_start")
    ending = notes(caught.value)[-1 if early else -2 :]
    assert ending[0].startswith("then, while ending: OSError: while ending")
    assert not hook or notes(caught.value)[0].startswith(f"in Boom.{hook} at step")
    assert ends.ended == 1
    del caught
    gc.collect()
    assert not open_files(tmp_path)
    assert not model[0].weight.grad_fn
    assert [m.training for m in model] == [True] * 3
    steps = {int(path.name[5:13]) for path in list_checkpoints(tmp_path / "c")} if not early else {0}
    assert max(steps) in ((0,) if early else (1, 2, 7, 14))
    if not early:
        assert ending[1] == f"the last checkpoint is {max(list_checkpoints(tmp_path / 'c'))}"
        again = make(
            Checkpoint(tmp_path / "c", every=1), TensorBoard(tmp_path / "t"), Ends(), resume=tmp_path / "c", strict=False
        )
        with warnings.catch_warnings(record=True):  # of the callbacks that are gone
            state = form(again, loss_fn, loader(50, 8, shuffle=False), val(), epochs=2)
        assert state.step == 14


@dataclasses.dataclass(frozen=True)
class FrozenError(Exception):
    """One that takes no notes."""

    text: str


@pytest.mark.parametrize("hook", ["on_step_end", "on_fit_end", "on_micro_end"])
def test_st6_an_error_that_takes_no_notes(hook: str) -> None:
    def act(state: Any) -> None:
        raise FrozenError("x")

    loop = make(At(hook, act), ends := Ends())
    for _ in range(2):
        with pytest.raises(FrozenError):
            loop.fit(loss_fn, loader(16, 8), epochs=1)
    assert ends.ended == 2


# ST7


class Leaves(Callback):
    """Switches the model's mode in one hook and forgets to switch back."""

    def __init__(self, hook: str, training: bool, watch: Any = None) -> None:
        def act(state: Any) -> None:
            if hook != "on_micro_end" or state.micro.training is not training:
                (state.model if watch is None else watch).train(training)

        setattr(self, hook, act)


HOOKS_BETWEEN = ["on_epoch_start", "on_step_start", "on_micro_end", "on_before_optimizer_step", "on_step_end",
                 "on_validation_end", "on_epoch_end"]  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("hook", HOOKS_BETWEEN)
def test_st7_left_in_eval_mode_it_trains_as_it_was(hook: str, form: Any) -> None:
    """The same bits as without; a layer that the user froze stays in eval mode; one warning."""

    def run(*more: Callback) -> dict[str, Tensor]:
        seed, model, modes = Seed(1), net(), []
        model[1].eval()
        loop = make(seed, MicroBatch(5), *more, model=model)

        def loss(model: Any, batch: Any) -> Any:
            if torch.is_grad_enabled():
                modes.append([m.training for m in model])
            return loss_fn(model, batch)

        form(loop, loss, loader(50, 8), val(), epochs=2)
        assert modes == [[True, False, True, True, True]] * len(modes)
        return bits(loop)

    expected = run()
    with pytest.warns(UserWarning, match="left in eval mode: model.training was False after step") as seen:
        found = run(Leaves(hook, False))
    assert len(seen) == 1
    assert_same_bits(expected, found)


def test_st7_the_loops_body_leaves_it_in_eval_mode() -> None:
    loop, data = make(), loader(20, 8)

    def run() -> None:
        with loop:
            for _ in loop.epochs(2):
                for step in loop.steps(data):
                    for micro in step:
                        with micro:
                            assert loop.state.model.training
                            micro.backward(loss_fn)
                    loop.update()
                    loop.state.model.eval()

    with pytest.warns(UserWarning, match="after step 1, so its modules were put back") as seen:
        run()
    assert len(seen) == 1


@pytest.mark.parametrize("own", [True, False])
def test_st7_put_into_train_mode_inside_an_evaluation(own: bool) -> None:
    """The same metrics, one warning; also for the model that is evaluated in place of the trained one."""

    def run(*more: Callback) -> dict[str, float]:
        loop = make(Seed(1), *more, model=model)
        loop.state.eval_model = None if own else ema
        built_in(loop, loss_fn, loader(20, 8), val(), epochs=1)
        assert all(m.training for m in model)
        return {k: v for k, v in loop.state.metrics.items() if k.startswith("val_")}

    model, ema = net(), net(seed=9)
    kept = copy.deepcopy(model.state_dict())
    expected = run()
    model.load_state_dict(kept)
    with pytest.warns(UserWarning, match="put into train mode: model.training was True inside the evaluation after") as seen:
        assert run(Leaves("on_micro_end", True, None if own else ema)) == expected
    assert len(seen) == 1


def test_st7_a_model_that_decides_its_own_mode_is_left_alone() -> None:
    class Always(nn.Linear):
        def train(self, mode: bool = True) -> Any:
            return super().train(self.mode)

    for mode in (True, False):
        model = Always(6, 3)
        model.mode = mode
        built_in(make(model=model.train()), loss_fn, loader(20, 8), val(), epochs=1)
        assert model.training is mode


def test_st7_a_part_left_in_train_mode_is_meant() -> None:
    """At the start no warning; later the root alone goes back."""
    model, seen = net(), []
    model.eval()
    model[0].train()
    watch = At("on_micro_end", lambda s: s.micro.training and seen.append([s.model.training, *(m.training for m in s.model)]))

    def half(state: Any) -> None:
        if state.step == 1:
            state.model.eval()[2].train()

    loop = make(watch, At("on_step_end", half).named("half"), model=model)
    with pytest.warns(UserWarning, match="left in eval mode") as warned:
        loop.fit(loss_fn, loader(16, 8), epochs=1)
    assert len(warned) == 1
    assert seen == [[True, True, False, False, False, False], [True, False, False, True, False, False]]


def test_st7_modes_that_a_hook_changes_are_the_ones_put_back() -> None:
    """A layer unfrozen in the second epoch, and the model left in eval mode in it."""

    def unfreeze(state: Any) -> None:
        state.model[1].train(state.epoch == 1)

    seen: list[Any] = []
    model = net()
    loop = make(At("on_epoch_start", unfreeze), Leaves("on_step_end", False),
                At("on_micro_end", lambda s: s.micro.training and seen.append([m.training for m in s.model])).named("c"),
                model=model)  # fmt: skip
    with pytest.warns(UserWarning, match="left in eval mode"):
        loop.fit(loss_fn, loader(16, 8), epochs=2)
    assert seen == [[True, False, True, True, True]] * 2 + [[True] * 5] * 2


def test_st7_around_a_loop_it_is_said_and_left() -> None:
    """Once, and not where it was in eval mode all along."""

    def run(ever: bool) -> list[bool]:
        model, seen = net(noise=False), []
        loop = make(model=model.train(ever))
        with loop:
            for number, batch in enumerate(loader(32, 8)):
                if number == 1:
                    model.eval()
                loss_fn(model, batch)["loss"].backward()
                seen.append(model.training)
                with loop.updating():
                    loop.state.optimizer.step()
        return seen

    with pytest.warns(UserWarning, match="the model is in eval mode in the update after step 1, and was in train mode") as seen:
        assert run(True) == [True, False, False, False]
    assert len(seen) == 1
    assert run(False) == [False] * 4


# ST8


@pytest.mark.parametrize("form", FORMS)
def test_st8_a_model_without_parameters(form: Any) -> None:
    other = net()
    with pytest.raises(ValueError, match="the model, a ReLU, has no parameters, so nothing would be trained"):
        form(Loop(nn.ReLU(), adamw(other)), loss_fn, loader(), epochs=1)


@pytest.mark.parametrize("form", FORMS)
def test_st8_all_parameters_frozen(form: Any) -> None:
    data = Samples(20)
    loop = make(model=net(noise=False).requires_grad_(False))
    with pytest.raises(ValueError, match=r"all 4 parameters in AdamW are frozen \(requires_grad=False\), so nothing"):
        form(loop, loss_fn, DataLoader(data, 5), epochs=1)
    assert loop.state.step == 0


def test_st8_all_parameters_frozen_around_a_loop() -> None:
    """A loop of one's own may freeze and unfreeze at any time, as those of a GAN do."""
    loop = make(model=net().requires_grad_(False))
    with loop, loop.updating():
        loop.state.optimizer.step()
    assert loop.state.step == 1


@pytest.mark.parametrize("hook", ["on_setup", "on_fit_start", "on_epoch_start"])
def test_st8_unfrozen_by_a_callback_in_time(hook: str) -> None:
    loop = make(At(hook, lambda s: s.model.requires_grad_(True) and None), model=net().requires_grad_(False))
    assert loop.fit(loss_fn, loader(20, 8), epochs=1).step == 3


# ST10


class Halves(nn.Module):
    """Its second half lies on "meta", as a layer that was left behind."""

    def __init__(self, buffer: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 4), nn.Linear(4, 3)
        if buffer:
            self.register_buffer("shift", torch.zeros(3, device="meta"))
        else:
            self.b.to("meta")

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)) + getattr(self, "shift", 0.0)


def two_devices(error: BaseException) -> str:
    [note] = [note for note in notes(error) if note.startswith("devices: ")]
    return note


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("buffer", [False, True])
def test_st10_a_part_of_the_model_on_another_device(form: Any, buffer: bool) -> None:
    loop = make(model=Halves(buffer))
    with pytest.raises(RuntimeError, match="device") as caught:
        form(loop, loss_fn, loader(20, 8), epochs=1)
    there = "shift" if buffer else "b.weight"
    assert two_devices(caught.value) == (
        f"devices: a.weight is on cpu, {there} is on meta, batch[0] is on cpu; move all of the model to one device before "
        "the optimizer is built: model.to(device)"
    )
    with pytest.raises(RuntimeError, match="device") as caught:
        loop.evaluate(loss_fn, val())
    assert f"{there} is on meta, batch[0] is on cpu" in two_devices(caught.value)


@pytest.mark.parametrize("form", FORMS)
def test_st10_a_loss_that_makes_a_tensor_elsewhere(form: Any) -> None:
    def loss(model: Any, batch: Any) -> Any:
        return (model(batch[0]) + torch.ones(3, device="meta")).mean()

    with pytest.raises(RuntimeError, match="device") as caught:
        form(make(), loss, loader(20, 8), epochs=1)
    assert two_devices(caught.value) == (
        "devices: 0.weight is on cpu, batch[0] is on cpu; a tensor that the loss function or the forward makes must be made "
        "there: device=x.device"
    )


def test_st10_a_batch_that_is_not_moved() -> None:
    """By hand, on tensors of the program's own."""
    model = net(noise=False).to("meta")
    loop = make(model=model)

    def run() -> None:
        with loop:
            for _ in loop.epochs(1):
                for step in loop.steps(loader(20, 8)):
                    for micro in step:
                        with micro:
                            micro.backward(model(torch.ones(2, 6)).sum())

    with pytest.raises(RuntimeError, match="device") as caught:
        run()
    assert two_devices(caught.value).startswith(
        "devices: 0.weight is on meta, batch[0] is on cpu; have the batch on the device"
    )


def test_st10_other_errors_get_no_note() -> None:
    model = Halves(True)
    for text in ("mat1 and mat2 shapes cannot be multiplied", "CUDA error: device-side assert triggered",
                 "CUDA out of memory. GPU 0 has a total capacity of 79 GiB",
                 "Input type (float) and weight type (c10::Half) should be same"):  # fmt: skip

        def loss(model: Any, batch: Any, text: str = text) -> Any:
            raise RuntimeError(text)

        with pytest.raises(RuntimeError) as caught:
            Loop(model, adamw(model)).fit(loss, loader(20, 8), epochs=1)
        assert not [note for note in notes(caught.value) if "devices" in note]


# OP5


LOST = "parameters require gradients but are in no group of AdamW, so this Loop does not train them"


@pytest.mark.parametrize("form", FORMS)
def test_op5_parameters_in_no_group(form: Any) -> None:
    model = nn.Sequential(*[nn.Linear(6, 6) for _ in range(4)], nn.Linear(6, 3))
    loop = Loop(model, torch.optim.AdamW(model[4].parameters()))
    with pytest.warns(UserWarning, match=LOST) as seen:
        form(loop, loss_fn, loader(20, 8), val(), epochs=2)
    assert len(seen) == 1
    assert str(seen[0].message).startswith(f"8 {LOST}: {{0,1,2}}.weight, {{0,1}}.bias, ...; give them to it (optimizer.add_")


@pytest.mark.parametrize("form", FORMS)
def test_op5_replaced_after_the_optimizer_was_built(form: Any) -> None:
    """At an epoch's start, as a resized embedding or an adapter; each once; add_param_group is the remedy."""

    def grow(state: Any) -> None:
        if state.epoch in (1, 3):
            state.model[0] = nn.Linear(6, 12)
        if state.epoch in (2, 4):
            state.optimizer.add_param_group({"params": list(state.model[0].parameters())})

    loop = make(At("on_epoch_start", grow))
    with pytest.warns(UserWarning, match=f"2 {LOST}: 0.weight, 0.bias; give") as seen:
        form(loop, loss_fn, loader(20, 8), epochs=5)
    assert len(seen) == 2


def test_op5_around_a_loop() -> None:
    model = net(noise=False)
    loop = Loop(model, torch.optim.AdamW(model[0].parameters()))

    def run() -> None:
        with loop:
            for batch in loader(20, 8):
                loss_fn(model, batch)["loss"].backward()
                with loop.updating():
                    loop.state.optimizer.step()

    with pytest.warns(UserWarning, match=f"2 {LOST}: 2.weight, 2.bias") as seen:
        run()
    assert len(seen) == 1


@pytest.mark.parametrize("kind", ["frozen", "tied", "compiled", "parallel", "added in on_setup"])
def test_op5_no_false_alarm(kind: str) -> None:
    model: Any = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3))
    optimizer, callbacks = adamw(model), []
    if kind == "frozen":
        model[0].requires_grad_(False)
        optimizer = torch.optim.AdamW(model[1:].parameters())
    elif kind == "tied":
        model[1].weight = model[0].weight
        optimizer = torch.optim.AdamW([model[1].weight, model[0].bias, model[1].bias, *model[2].parameters()])
    elif kind == "compiled":
        model = torch.compile(model, backend="eager")
    elif kind == "parallel":
        model = nn.DataParallel(model)
    else:
        optimizer = torch.optim.AdamW(model[:2].parameters())
        callbacks = [At("on_setup", lambda s: s.optimizer.add_param_group({"params": list(s.model[2].parameters())}))]
    Loop(model, optimizer, callbacks).fit(loss_fn, loader(20, 8), val(), epochs=1)


def test_op5_names_without_what_wrappers_add() -> None:
    inner = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3))
    loop = Loop(nn.DataParallel(inner), torch.optim.AdamW(inner[1].parameters()))
    with pytest.warns(UserWarning, match=f"2 {LOST}: 0.weight, 0.bias; give"):
        loop.fit(loss_fn, loader(20, 8), epochs=1)


@pytest.mark.parametrize("whole", [True, False])
def test_op5_two_optimizers_in_two_loops(whole: bool) -> None:
    """A GAN as the README has it, each Loop given its own part or both given all of it."""
    gan = nn.ModuleDict({"g": nn.Linear(6, 6), "d": nn.Linear(6, 1)})
    loops = {k: Loop(gan if whole else gan[k], torch.optim.AdamW(gan[k].parameters())) for k in "dg"}
    d, g = loops["d"], loops["g"]
    with d, g:
        for _ in d.epochs(2):
            for step in d.steps(loader(20, 8)):
                gan["d"].requires_grad_(True)
                for micro in step:
                    with micro:
                        fake = gan["g"](torch.randn(8, 6)).detach()
                        micro.backward(gan["d"](fake).mean() - gan["d"](micro.batch[0]).mean())
                d.update()
                gan["d"].requires_grad_(False)  # also at an epoch's start: no reason to refuse
                g.state.optimizer.zero_grad()
                gan["d"](gan["g"](torch.randn(8, 6))).mean().backward()
                with g.updating():
                    g.state.optimizer.step()
    assert (d.state.step, g.state.step) == (6, 6)


# OP8


class Words(nn.Module):
    """An embedding whose gradient is sparse, and two layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.embed, self.fc, self.out = nn.Embedding(12, 6, sparse=True), nn.Linear(6, 5), nn.Linear(5, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.fc(self.embed(x).mean(1)).tanh())


def texts() -> list[Any]:
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randint(0, 12, (6, 4), generator=generator), torch.randint(0, 3, (6,), generator=generator)) for _ in range(6)
    ]


def cross_entropy(model: Any, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def clip_by_hand(parameters: list[Tensor], limit: float) -> None:
    norm = torch.stack([p.grad.to_dense().pow(2).sum() for p in parameters]).sum().sqrt()
    for p in parameters:
        p.grad = p.grad * min(1.0, limit / (float(norm) + 1e-6))


def close(a: nn.Module, b: nn.Module, atol: float = 1e-7) -> None:
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=0, atol=atol), (name, (p - q).abs().max())


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("micro", [None, 2])
def test_op8_sgd_with_sparse_gradients(momentum: float, micro: int | None) -> None:
    """Decay of the dense, a limit on the norm and a factor on the rate, by hand and by callbacks."""
    model, rate, limit, decay = Words(), 0.5, 0.2, 0.1
    factor = At("on_before_optimizer_step", lambda s: s.scale_rate(0.5) or s.scale_gradients(0.8))
    callbacks = [WeightDecay({"embed": 0.0}, default=decay), ClipGradients(limit), factor]
    loop = Loop(model, torch.optim.SGD(model.parameters(), lr=rate, momentum=momentum),
                [*callbacks, *([MicroBatch(micro)] if micro else [])])  # fmt: skip
    loop.fit(cross_entropy, texts(), epochs=3)
    hand = Words()
    parameters = list(hand.parameters())
    buffers = [torch.zeros_like(p) for p in parameters]
    for batch in texts() * 3:
        hand.zero_grad()
        cross_entropy(hand, batch).backward()
        clip_by_hand(parameters, limit)
        with torch.no_grad():
            for p, buffer in zip(parameters, buffers, strict=True):
                grad = 0.8 * p.grad.to_dense() + (decay * p if p.ndim > 1 and p is not hand.embed.weight else 0.0)
                buffer.mul_(momentum).add_(grad)
                p -= rate * 0.5 * buffer
    close(model, hand)


def test_op8_sparse_adam() -> None:
    """Beside an AdamW for the rest, in two Loops; it has no decay, and WeightDecay says so."""
    model, limit = Words(), 0.05
    sparse = torch.optim.SparseAdam([model.embed.weight], lr=0.1)
    dense = torch.optim.AdamW([*model.fc.parameters(), *model.out.parameters()], lr=0.1)
    a = Loop(model, sparse, [ClipGradients(limit)])
    b = Loop(nn.ModuleList([model.fc, model.out]), dense, [WeightDecay(default=0.3), ClipGradients(limit)])
    hand = Words()
    hands = [torch.optim.SparseAdam([hand.embed.weight], lr=0.1),
             torch.optim.AdamW([{"params": [hand.fc.weight, hand.out.weight], "weight_decay": 0.3},
                                {"params": [hand.fc.bias, hand.out.bias], "weight_decay": 0.0}], lr=0.1)]  # fmt: skip
    with a, b:
        for batch in texts():
            model.zero_grad()
            cross_entropy(model, batch).backward()
            for loop in (a, b):
                with loop.updating():
                    loop.state.optimizer.step()
    for batch in texts():
        hand.zero_grad()
        cross_entropy(hand, batch).backward()
        for parameters in ([hand.embed.weight], [*hand.fc.parameters(), *hand.out.parameters()]):
            clip_by_hand(parameters, limit)
        for optimizer in hands:
            optimizer.step()
    close(model, hand)
    only = nn.Embedding(4, 2, sparse=True)
    with pytest.raises(ValueError, match="SparseAdam has no weight_decay; take an optimizer that has one"):
        Loop(only, torch.optim.SparseAdam(only.parameters()), [WeightDecay()]).__enter__()


def test_op8_decay_of_what_is_sparse_names_it() -> None:
    model = Words()
    loop = Loop(model, torch.optim.SGD(model.parameters(), lr=0.1), [WeightDecay(default=0.1)])
    with pytest.raises(RuntimeError, match="sparse") as caught:
        loop.fit(cross_entropy, texts(), epochs=1)
    assert notes(caught.value)[0].startswith("the gradient of embed.weight is sparse, and torch's optimizers give no decay")
    assert "WeightDecay({'embed.weight': 0.0})" in notes(caught.value)[0]


def test_op8_noise_scale_and_non_finite_see_sparse_gradients() -> None:
    model = Words()
    scale = NoiseScale(2)
    loop = Loop(model, torch.optim.SGD(model.parameters(), lr=0.1), [scale, NonFinite(), MicroBatch(3)])
    assert "noise_scale" in loop.fit(cross_entropy, texts(), epochs=1).metrics


CUDA = torch.cuda.is_available()
on_gpu = pytest.param({"capturable": True}, marks=[pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="no accelerator")])


@pytest.mark.parametrize("variant", [{}, {"foreach": True}, {"foreach": False}, {"fused": True}, {"amsgrad": True}, on_gpu])
@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_op8_adamw_decays_as_written(variant: Any, factor: float) -> None:
    """p -= rate * decay * p, then Adam's step, with the update's rate: in every implementation of it."""
    device = "cuda" if "capturable" in variant else "cpu"
    model, rate, limit = net(torch.float64, noise=False).to(device), 0.05, 0.3
    rates = At("on_before_optimizer_step", lambda s: s.scale_rate(factor))
    loop = Loop(model, torch.optim.AdamW(model.parameters(), lr=rate, **variant),
                [WeightDecay({r"^2\.": 0.5}, default=0.1), ClipGradients(limit), rates])  # fmt: skip
    data = [(x.to(device), y.to(device)) for x, y, _ in loader(50, 8, torch.float64, shuffle=False)]
    loop.fit(cross_entropy, data, epochs=2)
    hand = net(torch.float64, noise=False).to(device)
    parameters = dict(hand.named_parameters())
    m, v, peak = ({n: torch.zeros_like(p) for n, p in parameters.items()} for _ in range(3))
    for t, batch in enumerate(data * 2, 1):
        hand.zero_grad()
        cross_entropy(hand, batch).backward()
        clip_by_hand(list(parameters.values()), limit)
        with torch.no_grad():
            for n, p in parameters.items():
                p *= 1 - rate * factor * {"0.weight": 0.1, "2.weight": 0.5}.get(n, 0.0)
                m[n] = 0.9 * m[n] + 0.1 * p.grad
                v[n] = 0.999 * v[n] + 0.001 * p.grad**2
                peak[n] = torch.maximum(peak[n], v[n])
                second = peak[n] if variant.get("amsgrad") else v[n]
                p -= rate * factor * (m[n] / (1 - 0.9**t)) / ((second / (1 - 0.999**t)).sqrt() + 1e-8)
    close(model, hand, atol=2e-5 if "capturable" in variant else 1e-7)  # whose corrections torch computes in float32


# CB6


def plain(form: Any, *callbacks: Callback) -> dict[str, Tensor]:
    loop = make(Seed(1), *callbacks, model=net(seed=5))
    form(loop, loss_fn, loader(50, 8), val(), epochs=2)
    return bits(loop)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("how", ["filled", "replaced"])
def test_cb6_gradients_changed_before_the_update_are_applied(how: str, form: Any) -> None:
    def halve(state: Any) -> None:
        for p in state.model.parameters():
            if how == "filled":
                p.grad.mul_(0.5)
            else:
                p.grad = p.grad * 0.5

    factor = At("on_before_optimizer_step", lambda s: s.scale_gradients(0.5))
    assert_same_bits(plain(form, At("on_before_optimizer_step", halve)), plain(form, factor))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("micro", [None, 3])
def test_cb6_what_on_micro_end_shows_may_be_changed(micro: int | None, form: Any) -> None:
    """Batch and outputs have done their work, so nothing is trained on the change."""
    last: list[float] = []

    def spoil(state: Any) -> None:
        state.micro.batch[0].fill_(9.0)
        state.micro.batch[1].zero_()
        state.micro.outputs["preds"].zero_()
        state.micro.outputs.clear()
        last.append(float(state.metrics.get("loss", 0.0)))

    cut = [MicroBatch(micro)] if micro else []
    changed = plain(form, At("on_micro_end", spoil), *cut)
    assert_same_bits(changed, plain(form, *[MicroBatch(micro)] if micro else []))
    assert all(np.isfinite(last))


def test_cb6_a_batch_changed_in_place_is_not_redone() -> None:
    """Out of memory in the second micro-batch: the first, which a callback changed, would be trained on as changed."""
    failed: list[int] = []

    def loss(model: Any, batch: Any) -> Any:
        if len(batch[0]) == 4 and 4 in batch[2] and not failed:
            failed.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss_fn(model, batch)

    spoil = At("on_micro_end", lambda s: s.micro.batch[0].zero_() is None)
    loop = make(spoil, Halves4(), model=net(noise=False))
    with pytest.raises(RuntimeError, match=r"can't be redone: batch\[0\] was changed in place"):
        loop.fit(loss, loader(24, 8, shuffle=False), epochs=1)


class Halves4(Callback):
    """Micro-batches of 4, of 2 after an error."""

    def on_step_start(self, state: Any) -> None:
        state.micro_batch_size = 4

    def on_exception(self, state: Any) -> bool:
        state.micro_batch_size = 2
        return True


def test_cb6_gradients_changed_between_micro_batches_are_an_error() -> None:
    spoil = At("on_micro_end", lambda s: s.model[0].weight.grad.zero_() is None)
    with pytest.raises(RuntimeError, match="something else cleared or changed its gradients"):
        make(GradientAccumulation(2), spoil).fit(loss_fn, loader(24, 8), epochs=1)


# CB7


def generators() -> tuple[Any, ...]:
    kind, keys, *rest = np.random.get_state()
    return random.getstate(), torch.get_rng_state().tolist(), kind, keys.tolist(), *rest


class Quiet:
    """Asserts of every hook of a callback that it leaves all generators as they were."""

    def __init__(self, callback: Callback) -> None:
        self.ran: set[str] = set()
        for hook in HOOKS:
            method = getattr(callback, hook)
            if getattr(method, "__func__", None) is not getattr(Callback, hook):
                setattr(callback, hook, self.wrap(hook, method))

    def wrap(self, hook: str, method: Any) -> Any:
        def run(state: Any) -> Any:
            before = generators()
            answer = method(state)
            assert generators() == before, f"{hook} drew random numbers"
            self.ran.add(hook)
            return answer

        return run


def watchers(folder: Path) -> list[Callback]:
    return [
        TensorBoard(folder / "t", every=1, grad_norm=True), Progress(every=0.0001), Checkpoint(folder / "c", every=2),
        Metrics({"acc": MulticlassAccuracy(3)}, training=True), NoiseScale(2), NonFinite(), EarlyStopping("val_loss", patience=9),
        Preemption(on_signal="return"),
    ]  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("which", range(8))
def test_cb7_no_watcher_moves_a_generator(which: int, form: Any, tmp_path: Path) -> None:
    watcher = watchers(tmp_path)[which]
    quiet = Quiet(watcher)
    loop = make(watcher, model=net())  # no Seed: whatever were drawn would move the training
    form(loop, loss_fn, loader(48, 8), val(), epochs=2)
    assert quiet.ran


# CB8


class Sleeps(Callback):
    def __init__(self, hook: str, seconds: float, evaluating: bool = False, sampled: bool = False) -> None:
        def act(state: Any) -> None:
            if sampled and (state.step + 2) % 97 > 3:
                return
            if state.step >= 95 and (hook != "on_micro_end" or state.micro.training is not evaluating):
                time.sleep(seconds)

        self.act = act
        setattr(type(self), hook, lambda self, state: self.act(state))


def sleeps(*args: Any) -> Callback:
    return type("Sleeps", (Sleeps,), {})(*args)


@pytest.mark.parametrize("hook", ["on_step_start", "on_micro_end", "on_before_optimizer_step", "on_step_end"])
def test_cb8_a_slow_callback_is_named_once(hook: str, caplog: pytest.LogCaptureFixture) -> None:
    loop = make(sleeps(hook, 0.1, False, True))  # long, since what else this machine does may make an update long too
    before = loop.hooks
    loop.fit(loss_fn, loader(80, 8), steps=320)
    [said] = [r.getMessage() for r in caplog.records]
    assert re.match(rf"Sleeps\.{hook} takes \d+% of an update's \d+ ms; call it less often", said)
    assert loop.hooks is before


@pytest.mark.parametrize(("callback", "steps"), [
    (("on_step_end", 0.006), 190), (("on_step_end", 0.002), 320), (("on_validation_end", 0.01), 320),
    (("on_micro_end", 0.01, True), 320),
])  # fmt: skip
def test_cb8_no_false_alarm(callback: Any, steps: int, caplog: pytest.LogCaptureFixture) -> None:
    """One sample alone, few milliseconds, what runs outside updates and in evaluations."""
    make(sleeps(*callback)).fit(loss_fn, loader(160, 8), loader(4, 4), steps=steps, validate_every=20)
    assert not caplog.records


@pytest.mark.parametrize("around", [True, False])
def test_cb8_a_short_run_is_watched_too(around: bool, caplog: pytest.LogCaptureFixture) -> None:
    """From its ninth update on, also around a loop of the user's own."""

    class Slow(Callback):
        def on_step_end(self, state: Any) -> None:
            time.sleep(0.05)

    loop, data = make(Slow()), loader(160, 8)
    if around:
        with loop:
            for batch in data:
                loss_fn(loop.state.model, batch)["loss"].backward()
                with loop.updating():
                    loop.state.optimizer.step()
    else:
        loop.fit(loss_fn, data, epochs=1)
    [said] = [r.getMessage() for r in caplog.records]
    assert said.startswith("Slow.on_step_end takes ")


def test_cb8_an_error_in_a_sampled_update_still_names_its_callback() -> None:
    class Late(Callback):
        def on_step_end(self, state: Any) -> None:
            if state.step == 100:
                raise BoomError

    loop = make(Late())
    with pytest.raises(BoomError) as caught:
        by_hand(loop, loss_fn, loader(80, 8), steps=120)
    assert notes(caught.value) == ["in Late.on_step_end at step 100"]


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("hook", ["on_step_end", "on_epoch_end", "on_validation_end"])
def test_what_has_happened_all_hear_of_also_where_one_fails(hook: str, first: bool) -> None:
    """Entered again, the run ends as one in which nothing failed, wherever the callback that failed stands."""

    class Fails(Callback):
        def __init__(self, at: int) -> None:
            self.at = at
            setattr(self, hook, self.fail)

        def fail(self, state: State) -> None:
            if state.step == self.at:
                self.at = -1
                raise ConnectionError("the log's server is away")

    class Counts(Callback):
        def __init__(self) -> None:
            self.heard = 0
            setattr(self, hook, self.hear)

        def hear(self, state: State) -> None:
            self.heard += 1

    def run(at: int) -> tuple[float, int, Any]:
        model = net(noise=False)
        optimizer = adamw(model)
        steps = Schedule(lambda o, total: torch.optim.lr_scheduler.StepLR(o, 1, 0.9), on="epoch" if "epoch" in hook else "step")
        counts = Counts()
        watch: list[Callback] = [steps, counts]
        loop = Loop(model, optimizer, [Seed(0), *([Fails(at), *watch] if first else [*watch, Fails(at)])])
        if at >= 0:
            with pytest.raises(ConnectionError, match="server is away"):
                built_in(loop, loss_fn, loader(32), loader(8), epochs=3)
        built_in(loop, loss_fn, loader(32), loader(8), epochs=3)
        return optimizer.param_groups[0]["lr"], counts.heard, bits(loop)

    whole, again = run(-1), run(8)
    assert again[:2] == (whole[0], whole[1] + ("validation" in hook)), "a validation is done again, for all"
    assert_same_bits(again[2], whole[2])
