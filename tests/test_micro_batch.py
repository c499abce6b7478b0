"""MicroBatch: equal cuts, and an out-of-memory that leaves no trace in the training."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from helpers import FORMS, adamw, assert_same_bits, bits, built_in, loader, loss_fn, net
from torch.utils._python_dispatch import TorchDispatchMode

from hookloop.callbacks import DynamicBatchSize, GradientAccumulation, MicroBatch, Seed
from hookloop.callbacks.micro_batch import out_of_memory
from hookloop.loop import Callback, Loop, State


class Sizes(Callback):
    def __init__(self) -> None:
        self.rows: list[Any] = []

    def on_step_end(self, state: State) -> None:
        self.rows.append((state.step, state.micro_batch_size, state.eval_micro_batch_size))


@pytest.mark.parametrize(
    ("size", "expected"), [(32, [17, 16]), (33, [33]), (11, [11, 11, 11]), (10, [9, 8, 8, 8]), (1, [1] * 33)]
)
def test_equal_cuts(size: int, expected: list[int]) -> None:
    seen: list[int] = []

    class See(Callback):
        def on_micro_end(self, state: State) -> None:
            seen.append(state.micro.size)

    model = net(noise=False)
    built_in(Loop(model, adamw(model), [MicroBatch(size), See()]), loss_fn, loader(33, 33), epochs=1)
    assert seen == expected


def limited(fits: int, error: Any = torch.OutOfMemoryError, where: str = "training", log: Any = None) -> Any:
    """A loss whose forward fails above `fits` samples, having drawn, normalised and held memory before it does."""

    def loss(model: Any, batch: Any) -> Any:
        held = model(batch[0])
        if log is not None:
            log.append(weakref.ref(held))
        if len(batch[0]) > fits and (where == "both" or model.training == (where == "training")):
            raise error("CUDA out of memory. Tried to allocate 2.00 GiB")
        return loss_fn(model, batch)

    return loss


class SetAt(Callback):
    """Uses the smaller micro-batch from a given step on: what a run that met an out-of-memory must equal."""

    owns = ("micro_batch_size",)

    def on_step_start(self, state: State) -> None:
        state.micro_batch_size = 4


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seeded", [True, False])
def test_oo1_a_run_that_ran_out_of_memory_is_the_run_with_smaller_cuts(form: Any, seeded: bool) -> None:
    """Dropout, BatchNorm's buffers, weights, optimizer: the same bits; the effective batch never changed."""

    def run(loss: Any, callback: Callback) -> Any:
        torch.manual_seed(11)
        seed = [Seed(2)] if seeded else []
        model = net(seed=2)
        loop = Loop(model, adamw(model), [*seed, callback, GradientAccumulation(2)])
        torch.manual_seed(11)
        state = form(loop, loss, loader(50, 16), epochs=2)
        return bits(loop), state

    found, state = run(limited(5), MicroBatch("auto"))
    expected, other = run(loss_fn_twice, SetAt())
    assert_same_bits(found, expected)
    assert state.micro_batch_size == 4
    assert state.step == other.step


def loss_fn_twice(model: Any, batch: Any) -> Any:
    model(batch[0])  # as `limited` does
    return loss_fn(model, batch)


def test_oo3_validation_shrinks_a_size_of_its_own() -> None:
    def run(loss: Any) -> Any:
        model, sizes = net(torch.float64), Sizes()
        state = built_in(Loop(model, adamw(model), [MicroBatch("auto"), sizes]), loss, loader(48, 16, torch.float64),
                         loader(33, 33, torch.float64, shuffle=False), epochs=2)  # fmt: skip
        return state, sizes.rows

    torch.manual_seed(0)
    state, rows = run(limited(9, where="validation"))
    torch.manual_seed(0)
    whole, _ = run(loss_fn_twice)
    assert rows[0] == (1, None, None)
    assert rows[-1] == (6, None, 9)
    for name in ("val_loss", "val_accuracy"):
        assert state.metrics[name] == pytest.approx(whole.metrics[name], rel=1e-12)


def test_oo4_one_sample_is_too_much() -> None:
    model = net(noise=False)
    with pytest.raises(torch.OutOfMemoryError, match="too small for one sample"):
        built_in(Loop(model, adamw(model), [MicroBatch("auto")]), limited(0), loader(), epochs=1)


@pytest.mark.parametrize(("error", "expected"), [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"), True),
    (torch.OutOfMemoryError("Allocation on device"), True),
    (RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB (GPU 0)"), True),
    (RuntimeError("CUDA error: out of memory"), True),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
    (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
    (RuntimeError("HIP out of memory. Tried to allocate"), True),
    (RuntimeError("MPS backend out of memory (MPS allocated: 17 GB)"), True),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"), True),
    (RuntimeError("CUDA error: device-side assert triggered"), False),
    (RuntimeError("we ran out of memory cards"), False),
    (ValueError("CUDA out of memory"), False),
    (MemoryError(), False),
    (KeyError("x"), False),
])  # fmt: skip
def test_oo6_what_counts_as_out_of_memory(error: Exception, expected: bool) -> None:
    assert out_of_memory(error) is expected
    wrapped = ValueError("while training")
    wrapped.__cause__ = error
    assert out_of_memory(wrapped) is expected


def test_oo6_the_installed_allocator_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert out_of_memory(caught.value)


@pytest.mark.parametrize("error", [ValueError, RuntimeError])
def test_every_other_error_passes_through(error: Any) -> None:
    def loss(model: Any, batch: Any) -> Any:
        raise error("shapes differ")

    model = net()
    with pytest.raises(error, match="shapes differ"):
        built_in(Loop(model, adamw(model), [MicroBatch("auto")]), loss, loader(), epochs=1)


def test_oo7_nothing_of_the_failed_try_stays_alive() -> None:
    log: list[Any] = []
    alive: list[int] = []

    def watching(model: Any, batch: Any) -> Any:
        alive.append(sum(ref() is not None for ref in log))
        return inner(model, batch)

    inner = limited(5, log=log)
    model = net()
    built_in(Loop(model, adamw(model), [MicroBatch("auto")]), watching, loader(32, 16), epochs=1)
    assert len(alive) > 4
    assert max(alive) == 0


class FailAt(TorchDispatchMode):
    """Fails as the allocator does at the n-th operation."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.left = n

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left == 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return func(*args, **(kwargs or {}))


def test_oo1_at_every_operation_of_forward_and_backward() -> None:
    """Whatever operation of a step's forwards and backwards fails, the step is the one of half the micro-batch."""

    def run(n: int | None) -> Any:
        seed, model = Seed(2), net(seed=2)
        own = MicroBatch("auto") if n is not None else SetAt()
        loop, mode = Loop(model, adamw(model), [seed, own]), None
        with loop:
            for _ in loop.epochs(1):
                for step in loop.steps(loader(24, 8)):
                    for micro in step:
                        with micro:
                            if n is not None and loop.state.step == 1 and mode is None:
                                mode = FailAt(n)
                                with mode:
                                    micro.backward(loss_fn)
                            else:
                                micro.backward(loss_fn)
                    loop.update()
                    if n is not None and loop.state.step == 2 and mode.left > 0:
                        return None
        return bits(loop)

    def expected() -> Any:
        class From2(SetAt):
            def on_step_start(self, state: State) -> None:
                state.micro_batch_size = None if state.step == 0 else 4

        seed, model = Seed(2), net(seed=2)
        loop = Loop(model, adamw(model), [seed, From2()])
        built_in(loop, loss_fn, loader(24, 8), epochs=1)
        return bits(loop)

    reference, count = expected(), 0
    while (found := run(count + 1)) is not None:
        assert_same_bits(found, reference)
        count += 1
    assert count > 20


def test_st11_a_batch_changed_in_place_is_not_redone() -> None:
    def loss(model: Any, batch: Any) -> Any:
        batch[0].mul_(2)
        return limited(4)(model, batch)

    model = net()
    with pytest.raises(RuntimeError, match=r"can't be redone: batch\[0\] was changed in place"):
        built_in(Loop(model, adamw(model), [MicroBatch("auto")]), loss, loader(), epochs=1)


def test_size_found_is_saved() -> None:
    first = MicroBatch("auto")
    model = net()
    loop = Loop(model, adamw(model), [first, DynamicBatchSize(16, 16)])
    built_in(loop, limited(5), loader(), epochs=1)
    second = MicroBatch("auto")
    second.load_state_dict(first.state_dict())
    state = State(model, adamw(model))
    second.on_setup(state)
    assert state.micro_batch_size == 4
    given = MicroBatch(7)
    given.load_state_dict(first.state_dict())
    given.on_fit_start(state)
    assert (state.micro_batch_size, state.eval_micro_batch_size) == (7, 7)


@pytest.mark.parametrize("size", [0, -1, 1.5, True, "big", None])
def test_bad_arguments(size: Any) -> None:
    with pytest.raises(ValueError, match="size must be"):
        MicroBatch(size)
