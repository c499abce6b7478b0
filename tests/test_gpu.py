"""What only a real accelerator shows; skipped without one."""

from __future__ import annotations

import gc
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same_bits, bits, built_in, by_hand, loader, loss_fn, net
from recorder import SETS, AsWritten, aligned
from torch import nn

from hookloop.callbacks import (
    Average,
    Checkpoint,
    ClipGradients,
    CUDAGraph,
    DecaySchedule,
    Diagnose,
    Dropout,
    DynamicBatchSize,
    Fingerprint,
    GradientAccumulation,
    HardExamples,
    LayerwiseRate,
    MicroBatch,
    NonFinite,
    Schedule,
    Seed,
    SwitchOptimizer,
    TensorBoard,
    Unfreeze,
    Warmup,
    WeightDecay,
)
from hookloop.loop import Loop, store
from hookloop.loop.graph import Recording
from hookloop.loop.study import find_rate

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")]


def make(folder: Path | None = None, *more: Any, **kwargs: Any) -> Loop:
    seed, model = Seed(5), net(seed=5).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    shaping = [
        Warmup(5),
        GradientAccumulation(2),
        DynamicBatchSize(6, 12),
        MicroBatch("auto", target="memory"),  # times differ between two runs
        ClipGradients(0.3),
        WeightDecay(),
    ]
    watching = [] if folder is None else [TensorBoard(folder, every=3, grad_norm=True), Checkpoint(folder, every=4)]
    return Loop(model, optimizer, [seed, *shaping, *watching, *more], **kwargs)


def test_by_hand_is_built_in_and_watching_is_free(tmp_path: Path) -> None:
    runs = [(built_in, None), (by_hand, None), (built_in, tmp_path)]
    found = []
    for form, folder in runs:
        loop = make(folder)
        form(loop, loss_fn, loader(50, 8), loader(20), epochs=3)
        found.append(bits(loop))
    assert_same_bits(found[0], found[1])
    assert_same_bits(found[0], found[2])


def cross_entropy(model: Any, batch: Any) -> dict[str, torch.Tensor]:
    losses = nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")
    return {"loss": losses.mean(), "losses": losses.detach()}


def train_watched(loop: Loop, after: int = 2, size: int = 8) -> None:
    """Train; whatever synchronises in a step raises."""
    with loop:
        for _ in loop.epochs(2):
            for step in loop.steps(loader(96, size, pin_memory=True)):
                watched = loop.state.step > after  # what is set up once lies behind
                torch.cuda.set_sync_debug_mode("error" if watched else "default")
                try:
                    for micro in step:
                        with micro:
                            micro.backward(cross_entropy)
                    loop.update()
                finally:
                    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_a_step_waits_for_nothing(autocast: Any) -> None:
    """Pinned batches, every shaping callback: whatever synchronises in a step raises."""
    train_watched(make(autocast=autocast))


def test_oo13_a_real_lack_of_memory_is_redone_in_smaller_cuts(caplog: pytest.LogCaptureFixture) -> None:
    """The device's own allocator refuses the whole batch; the step is done all the same, and memory comes back."""
    model = nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 1)).cuda()
    auto = MicroBatch("auto")
    auto.train = 2**17  # where it would begin with 2
    loop = Loop(model, torch.optim.SGD(model.parameters(), lr=0.1), [auto])
    data = [torch.randn(2**17, 1024) for _ in range(3)]  # half a GiB each, and as much again for each activation
    torch.cuda.empty_cache()
    free = torch.cuda.memory_allocated() + 1.2 * 2**30
    torch.cuda.set_per_process_memory_fraction(free / torch.cuda.get_device_properties(0).total_memory)
    try:
        state = built_in(loop, lambda m, b: m(b).square().mean(), data, epochs=1)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert state.step == 3
    assert [record for record in caplog.records if "ran out of memory" in record.message]
    assert state.micro_batch_size is not None
    assert state.micro_batch_size < 2**17


@pytest.mark.parametrize("target", ["memory", "throughput"])
def test_the_size_that_fits_is_found_with_no_lack_of_memory(target: str, caplog: pytest.LogCaptureFixture) -> None:
    """Under a cap of 2 GiB: each sample takes some MiB, a batch far more than there is."""
    model = nn.Sequential(*[layer for _ in range(16) for layer in (nn.Linear(1024, 1024), nn.GELU())]).cuda()
    loop = Loop(model, torch.optim.AdamW(model.parameters(), fused=True), [MicroBatch("auto", target=target)])
    data = [torch.randn(2048, 16, 1024).pin_memory()] * 48
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(2 * 2**30 / torch.cuda.get_device_properties(0).total_memory)
    sizes: list[int] = []
    try:
        with loop:
            for _ in loop.epochs(1):
                for step in loop.steps(data):
                    for micro in step:
                        with micro:
                            micro.backward(lambda m, b: m(b).square().mean())
                    loop.update()
                    sizes.append(loop.state.micro_size)
        peak = torch.cuda.max_memory_allocated()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert not [record for record in caplog.records if "ran out of memory" in record.message]
    assert len(set(sizes[-8:])) == 1, sizes
    assert 16 <= sizes[-1] < 2048
    if target == "memory":
        assert peak > 0.6 * 2 * 2**30, (peak, sizes)  # equal cuts may leave a third unused
        assert peak <= 0.95 * 2 * 2**30, (peak, sizes)


def test_a_save_in_the_background_waits_for_no_step_and_is_of_one_moment(tmp_path: Path) -> None:
    """Asked for while the device is still at work, changed right after: the copies are of the moment of asking."""
    state = {"x": torch.zeros(1 << 24, device="cuda"), "halves": torch.ones(8, device="cuda")}
    state["view"] = state["halves"][2:4]
    copies = store.Copies()
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(50):
            state["x"] += 1
        found = copies.of(state)
        state["x"] += 1
        state["halves"].zero_()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    copies.wait()
    assert found["x"].device.type == "cpu"
    assert found["x"].eq(50).all()
    assert found["view"].tolist() == [1.0, 1.0]
    assert found["view"].untyped_storage().data_ptr() == found["halves"].untyped_storage().data_ptr()


@pytest.mark.parametrize("background", [False, True])
def test_a_run_on_a_gpu_resumes_to_the_same_bits(background: bool, tmp_path: Path) -> None:
    whole = make()
    built_in(whole, loss_fn, loader(50, 8), loader(20), epochs=3)
    for steps in (5, 11, None):
        loop = make(None, Checkpoint(tmp_path, every=2, background=background), resume=tmp_path)
        built_in(loop, loss_fn, loader(50, 8), loader(20), **({"epochs": 3} if steps is None else {"steps": steps}))
    assert_same_bits(bits(whole), bits(loop))


WAITLESS: dict[str, Any] = {
    "NonFinite": lambda folder: NonFinite(),
    "Fingerprint": lambda folder: Fingerprint(1),
    "an exponential average": lambda folder: Average("ema", 0.9),
    "an average with measured norms": lambda folder: Average("swa", every=2, batch_norm="measure"),
    "decay by progress": lambda folder: DecaySchedule("cosine"),
    "decay by the rate": lambda folder: DecaySchedule("rate"),
    "rates by layer": lambda folder: LayerwiseRate(0.75),
    "a curve by name": lambda folder: Schedule("cosine"),
    "dropout": lambda folder: Dropout(lambda done: 0.3 * done),
    "unfreezing": lambda folder: Unfreeze({1: "^0"}),
    "diagnosis": lambda folder: Diagnose(),
    "hard examples": lambda folder: HardExamples(4, every=5, folder=folder),
    "a rate to hand over": lambda folder: SwitchOptimizer(
        lambda g: torch.optim.SGD(g, lr=0.1, momentum=0.9), rate="swats", every=99
    ),
    "a switch": lambda folder: SwitchOptimizer(lambda g: torch.optim.SGD(g, lr=0.1), at=2),
}


@pytest.mark.parametrize("name", WAITLESS)
def test_a_step_with_it_waits_for_nothing(name: str, tmp_path: Path) -> None:
    seed, model = Seed(5), net(seed=5).cuda()
    train_watched(Loop(model, torch.optim.AdamW(model.parameters(), fused=True), [seed, WAITLESS[name](tmp_path)]), after=3)


def test_a_sweep_of_the_rate_leaves_no_trace() -> None:
    found = []
    for look in (False, True):
        loop, data = make(), loader(50, 8)
        if look:
            with warnings.catch_warnings(action="ignore"):  # noise has nothing to learn
                find_rate(loop, loss_fn, data, 1e-5, 1.0, steps=20)
        built_in(loop, loss_fn, data, epochs=2)
        found.append(bits(loop))
    assert_same_bits(*found)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("action", ["stop", "skip", "rollback"])
def test_st2_what_is_not_finite_on_a_device(action: str, fused: bool) -> None:
    """As on the CPU, but that "stop" may raise one update later."""
    tries = 0

    def odd(model: Any, batch: Any) -> Any:
        nonlocal tries
        found = loss_fn(model, batch)
        tries += model.training
        return {**found, "loss": found["loss"] * (float("nan") if tries == 6 and model.training else 1.0)}

    seed, model = Seed(5), net(seed=5).cuda()
    loop = Loop(model, torch.optim.AdamW(model.parameters(), fused=fused), [seed, NonFinite(action, every=2)])
    if action == "stop":
        with pytest.raises(FloatingPointError, match=r"not finite in update 6: the loss, the gradient of 0\.weight"):
            built_in(loop, odd, loader(), epochs=2)
        assert loop.state.step in (5, 6, 7)
        return
    built_in(loop, odd, loader(), epochs=2)
    assert (loop.state.step, loop.state.skipped) == (13, 1)
    assert all(value.isfinite().all() for value in bits(loop).values())


# CUDAGraph


def graphed(graphs: Any, *callbacks: Any, autocast: Any = None, kind: str = "adamw", **kwargs: Any) -> Loop:
    seed, model = Seed(5), net(seed=5).cuda()
    optimizer = (torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True) if kind == "fused" else
                 torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9, fused=True) if kind == "sgd" else
                 torch.optim.AdamW(model.parameters(), lr=1e-2))  # fmt: skip
    return Loop(model, optimizer, [seed, graphs or AsWritten(), *callbacks], autocast=autocast, **kwargs)


@pytest.mark.parametrize("kind", ["adamw", "fused", "sgd"])
@pytest.mark.parametrize("name", SETS)
def test_replayed_on_a_device_is_as_written(name: str, kind: str, tmp_path: Path) -> None:
    loops = []
    for i, graphs in enumerate((None, CUDAGraph(graphs=16))):
        loop = graphed(graphs, *SETS[name](tmp_path / str(i)), kind=kind)
        built_in(loop, aligned, loader(96, 8), loader(20, 8, shuffle=False), epochs=4)
        loops.append(loop)
    assert_same_bits(bits(loops[0]), bits(loops[1]))
    assert loops[0].state.step == loops[1].state.step
    assert loops[1].state.runner.replayed > 0


def test_replayed_in_half_precision_is_as_written() -> None:
    loops = [graphed(graphs, autocast=torch.bfloat16) for graphs in (None, CUDAGraph())]
    for loop in loops:
        built_in(loop, aligned, loader(96, 8), epochs=3)
    assert_same_bits(bits(loops[0]), bits(loops[1]))


def test_a_replayed_step_waits_for_nothing() -> None:
    """Once recorded, which waits."""
    train_watched(graphed(CUDAGraph(2), Warmup(50), ClipGradients(0.3), GradientAccumulation(2)), after=6)


def test_a_loss_that_waits_is_named_while_recording() -> None:
    def loss(model: Any, batch: Any) -> Any:
        found = cross_entropy(model, batch)["loss"]
        return found * 2 if found.item() > 1e9 else found  # this line

    with pytest.raises(RuntimeError) as caught:
        built_in(graphed(CUDAGraph(2)), loss, loader(96, 8), epochs=1)
    [note] = [note for note in caught.value.__notes__ if "could not record" in note]
    assert f"{__file__} line " in note
    assert "# this line: nothing in it may wait for the device" in note
    assert float(torch.ones(3, device="cuda").sum()) == 3  # the device goes on
    assert torch.rand(3, device="cuda").lt(1).all()
    held = torch.cuda.memory_reserved()
    torch.empty(1 << 28, device="cuda", dtype=torch.uint8)
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= held  # and so does its memory


def test_memory_that_recording_takes() -> None:
    """At most a tenth of the eager peak for one shape."""
    peaks, x = [], torch.ones(64, 64, device="cuda", requires_grad=True)
    (x @ x).sum().backward()
    Recording(lambda: (x @ x).sum().backward(), None)  # its stream has a workspace of its own, which stays
    for graphs in (None, CUDAGraph()):
        gc.collect()  # the frames of what torch imports at an optimizer's first use hold that optimizer
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        model = nn.Sequential(*[layer for _ in range(8) for layer in (nn.Linear(1024, 1024), nn.GELU())]).cuda()
        loop = Loop(model, torch.optim.AdamW(model.parameters(), fused=True), [graphs or AsWritten()])
        built_in(loop, lambda m, b: m(b).square().mean(), [torch.randn(8192, 1024)] * 12, epochs=1)
        peaks.append(torch.cuda.max_memory_reserved())
        del loop, model
    assert peaks[1] <= 1.1 * peaks[0]
