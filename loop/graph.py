"""Micro-batches and updates recorded once and launched again from then on (`state.runner`)."""

from __future__ import annotations

import contextlib
import gc
import logging
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .batch import leaves, walk
from .checks import say
from .signature import Last, addresses, buffers, describe, facts, rebound, settings, signature
from .step import Eager, clear_gradients

if TYPE_CHECKING:
    from .session import Session
    from .state import State

log = logging.getLogger("hookloop")
OURS = (str(Path(__file__).parent), str(Path(torch.__file__).parent))


class Recording:
    """What a function launches on the device, as a CUDA graph; `found` is what it returned, filled anew by each `replay`."""

    def __init__(self, run: Callable[[], Any], pool: Any) -> None:
        self.graph, stream, failed = torch.cuda.CUDAGraph(), torch.cuda.current_stream(), None
        collects = gc.isenabled()
        gc.disable()  # another graph that is freed while this one is recorded would end the recording
        try:
            with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):  # a loader's thread may pin memory
                try:
                    self.found = run()
                except BaseException as error:
                    failed = error
                    raise
        except BaseException as error:
            torch.cuda.set_stream(stream)  # where the capture can't be ended either, torch leaves its own
            end_capture(pool)
            raise (failed or error) from None
        finally:
            failed = None  # it holds this frame
            if collects:
                gc.enable()
        self.replay = self.graph.replay


def end_capture(pool: Any) -> None:
    """Undo what a capture that failed leaves behind up to torch 2.11: memory that is never given back, generators that wait."""
    with contextlib.suppress(Exception):  # where torch has ended it
        torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
    with contextlib.suppress(Exception), torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.zeros((), device="cuda")


class Static:
    """A recorded micro-batch and the memory that it reads."""

    def __init__(self, batch: Any, like: Tensor) -> None:
        self.batch = walk(batch, lambda x, path: x.clone() if isinstance(x, Tensor) else x)
        self.inputs = [x for _, x in leaves(self.batch) if isinstance(x, Tensor)]
        self.factor = torch.ones_like(like, requires_grad=False)
        self.weight: float | None = 1.0  # what the factor holds, where the host knows
        self.recording: Any = None

    def fill(self, batch: Any, factor: Any) -> None:
        """Take another micro-batch's data, and its weight."""
        for mine, (_, x) in zip(self.inputs, (pair for pair in leaves(batch) if isinstance(pair[1], Tensor)), strict=True):
            mine.copy_(x, non_blocking=True)
        factor = 1.0 if factor is None else factor
        if isinstance(factor, Tensor):
            self.factor.copy_(factor)
            self.weight = None
        elif factor != self.weight:
            self.factor.fill_(factor)
            self.weight = factor


class Graphs(Eager):
    """Runs each shape of micro-batch, and the update, `warmup` times as written, and replays a recording from then on.

    Gradients stay in the tensors that the first updates made, so that every recording adds to the same ones. What a
    recording holds fast and can change (a group's settings, which parameters have gradients, modes of modules, the loaded
    state of the optimizer) is compared, and recorded anew where it did. `most` shapes are kept, the last used, and as many
    updates.
    """

    def __init__(self, state: State, warmup: int, most: int) -> None:
        self.warmup = warmup
        self.pool: Any = None
        self.micros, self.update_graphs = Last[Static](most, "micro-batches"), Last[Any](most, "updates")
        self.seen, self.like = Counter[Any](), dict[Any, Tensor]()
        self.grads: dict[Tensor, Tensor] = {}
        self.given = dict[Any, frozenset[Tensor]]()  # which parameters a shape's backward gives gradients to
        self.used: list[frozenset[Tensor]] = []  # in this step
        self.stepped: set[Tensor] = set()  # have been through an update that was no replay, so their state is there
        self.about, self.places = list[Any](), list[int]()
        self.found_inf: Tensor | None = None
        self.crowded = False  # the last micro-batch ran as written beside recordings, whose memory only they can use
        self.plain = False  # this step runs as written, for that memory was given back
        self.take(state)
        state.exchanged.append(self.take)

    @property
    def replayed(self) -> int:
        """How many micro-batches were."""
        return self.micros.replayed

    def take(self, state: State) -> None:
        """Begin to run an optimizer's updates."""
        self.updates, self.rates = 0, list[Tensor]()
        self.forget_update()
        state.optimizer.register_load_state_dict_post_hook(lambda optimizer: self.forget_update())

    def forget_update(self) -> None:
        """Record updates anew: their optimizer holds other tensors now."""
        self.update_graphs.clear()
        self.stepped.clear()

    def forget(self) -> None:
        """Record all anew, and give the memory back."""
        for held in (self.micros, self.seen, self.given, self.like):  # each by the loss function, which may hold anything
            held.clear()
        self.forget_update()

    def give_back(self) -> bool:
        """Give back the memory of recordings that a micro-batch as written ran out of, and run the step as written."""
        crowded, self.crowded = self.crowded, False
        if crowded:
            log.warning("CUDAGraph gives back the memory of its graphs, for a step to run as written; they are recorded again")
            self.plain = True
            self.micros.give_back()
            self.update_graphs.give_back()
        return crowded

    def begin(self, loop: Session) -> None:
        """Clear the gradients, those that recordings add to by zeros in their place."""
        state, self.used = loop.state, []
        if (about := facts(state.model)) != self.about:
            self.forget()
            self.about = about
        if (places := addresses(state.model)) != self.places:  # what runs as written may find others, but no recording does
            self.micros.clear()
            self.update_graphs.clear()
            self.places = places
        groups = state.optimizer.param_groups
        if not all(reads_nothing(group, state.device) for group in groups):
            for group, rate in zip(groups, self.rates, strict=False):
                if not isinstance(group["lr"], Tensor):  # a program sets it as it would without graphs
                    group["lr"] = rate.fill_(group["lr"])
            if not all(reads_nothing(group, state.device) for group in groups):
                on_device(state.optimizer, state.device)
                self.rates = [group["lr"] for group in groups]
        clear_gradients(state.optimizer)
        for p, grad in self.grads.items():
            p.grad = grad
        if self.grads:
            torch._foreach_zero_(list(self.grads.values()))

    def backward(self, loop: Session, loss: Any, batch: Any, factor: Any) -> dict[str, Any]:
        """Run `loss(model, batch)` and its backward with the weight `factor`, or replay them; return the outputs."""
        if not callable(loss):
            raise TypeError("CUDAGraph replays loss_fn, so it needs the function and not its result: micro.backward(loss_fn)")
        if loop._step is not None:  # before a recording, which counts as a change of the gradients though it only notes it
            loop._step.check_untouched(between=True)
        key = (loss, signature(batch))
        static, self.crowded = self.micros.find(key), False
        if static is None:
            if self.seen[key] < self.warmup or self.plain:
                return self._as_written(loop, loss, batch, factor, key)
            static = self._record(loop, loss, batch, key)
        self.used.append(self.given[key])
        self.micros.replayed += 1
        static.fill(batch, factor)
        static.recording.replay()
        found: dict[str, Any] = static.recording.found
        return {name: walk(value, lambda x, path: x.clone() if isinstance(x, Tensor) else x) for name, value in found.items()}

    def _as_written(self, loop: Session, loss: Any, batch: Any, factor: Any, key: Any) -> dict[str, Any]:
        before = {p: grad._version for p, grad in self.grads.items()}
        self.crowded = bool(self.micros or self.update_graphs)
        outputs = super().backward(loop, loss, batch, factor)
        held = {p: p.grad for g in loop.state.optimizer.param_groups for p in g["params"] if p.grad is not None}
        if sparse := [p for p, grad in held.items() if grad.is_sparse]:
            raise ValueError(f"CUDAGraph can't record the sparse gradient of a parameter of shape {tuple(sparse[0].shape)}: give "
                             "its embedding sparse=False, or leave CUDAGraph out")  # fmt: skip
        self.given[key] = frozenset(p for p, grad in held.items() if before.get(p) != grad._version)
        self.grads |= held
        self.used.append(self.given[key])
        self.like[key] = outputs["loss"].detach()
        self.seen[key] += 1
        return outputs

    def _record(self, loop: Session, loss: Any, batch: Any, key: Any) -> Static:
        self.micros.make_room(f"the last is of {describe(batch)}. Pad to a few lengths, leave out of the batch what is no tensor, "
                              "give the same loss_fn each time")  # fmt: skip
        static = Static(batch, self.like[key])

        def run() -> dict[str, Any]:
            outputs = super(Graphs, self).backward(loop, loss, static.batch, static.factor)
            return {k: walk(v, lambda x, path: x.detach() if isinstance(x, Tensor) else x) for k, v in outputs.items()}

        before = buffers(loop.state.model)
        static.recording = self._recording(run, "loss_fn")
        if other := rebound(loop.state.model, before):
            raise ValueError(f"CUDAGraph can't replay a forward that puts another tensor in the place of the buffer {other[0]}, "
                             "which would stand still from then on: fill it in place (copy_, lerp_), or leave CUDAGraph "
                             "out")  # fmt: skip
        self.micros[key] = static
        return static

    def _recording(self, run: Callable[[], Any], what: str) -> Any:
        if not (self.micros or self.update_graphs) and torch.cuda.is_available():
            self.pool = torch.cuda.graph_pool_handle()  # torch takes none again whose graphs are all gone
        try:
            return Recording(run, self.pool)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            say(error, f"CUDAGraph could not record {what}{where(error)}: nothing in it may wait for the device (.item(), "
                       "float(), bool() or `if` of a tensor, .cpu(), nonzero), nor hang on values; keep it on the device "
                       "(torch.where). Nor may the model or the program keep a tensor with its history from an earlier step "
                       "(self.aux = ...): detach it once it is used, or leave CUDAGraph out")  # fmt: skip
            raise

    def update(self, loop: Session) -> None:
        """Apply the gradients, as written or by replay."""
        state, optimizer, self.plain = loop.state, loop.state.optimizer, False
        if any(len(some) < len(self.grads) for some in self.used):  # zeros are there for what has no gradient in this step
            for p in self.grads.keys() - frozenset().union(*self.used):
                p.grad = None
        for p, grad in self.grads.items():
            if p.grad is not None and p.grad is not grad:  # a callback put another in its place
                p.grad = grad.copy_(p.grad)
        if (verdict := getattr(optimizer, "found_inf", None)) is not None:
            self.found_inf = verdict.clone() if self.found_inf is None else self.found_inf.copy_(verdict)
            optimizer.found_inf = self.found_inf  # type: ignore[attr-defined]
        key = (verdict is not None, *settings(state))
        if (found := self.update_graphs.find(key)) is None:
            held = {p for group in optimizer.param_groups for p in group["params"] if p.grad is not None}
            if self.updates < self.warmup or not self.stepped >= held:
                self.updates, self.stepped = self.updates + 1, self.stepped | held
                super().update(loop)
                return
            self.update_graphs.make_room("settings of parameter groups, or which parameters have gradients, change all the time. "
                                         "Fill a rate in place (group['lr'].fill_(...)), keep the other settings")  # fmt: skip
            alive = held, [x for group in optimizer.param_groups for x in group.values()]  # their ids are in the key
            self.update_graphs[key] = found = self._recording(optimizer.step, "the optimizer's step"), alive
        else:
            loop.optimizer_steps += 1  # its post-hook ran when it was recorded
        self.update_graphs.replayed += 1
        found[0].replay()


def reads_nothing(group: dict[str, Any], device: torch.device) -> bool:
    """Tell whether the step of an optimizer reads neither this group's rate nor a count of steps on the host."""
    return isinstance(rate := group["lr"], Tensor) and rate.device == device and bool(group.get("capturable", True))


def on_device(optimizer: Optimizer, device: torch.device) -> None:
    """Have an optimizer read nothing on the host in its step: what counts and what scales it are tensors on the device."""
    optimizer._warned_capturable_if_run_uncaptured = True  # torch warns of the first steps
    for group in optimizer.param_groups:
        if "capturable" in group:
            group["capturable"] = True
        group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32).to(device, copy=True)
    for held in optimizer.state.values():
        if isinstance(step := held.get("step"), Tensor):
            held["step"] = step.to(device)


def where(error: BaseException) -> str:
    """Return the last line of the user's own program in a traceback."""
    for frame in traceback.extract_tb(error.__traceback__)[::-1]:
        if not frame.filename.startswith(OURS):
            return f", {frame.filename} line {frame.lineno}: {(frame.line or '').strip()}"
    return ""
