"""One step: the data of one update, its micro-batches, and what each goes through."""

from __future__ import annotations

import itertools
import traceback
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer

from . import batch as batches
from . import rehearsal
from .checks import say
from .chunk import Chunk, piece
from .guards import back_to_train, name_devices, name_sparse
from .outputs import checked, detached, singles, weight_of, weighted
from .redo import Snapshot
from .share import among_ranks, silenced
from .wrapped import reducing

if TYPE_CHECKING:
    from .session import Session


ZERO_GRAD = Optimizer.zero_grad
GONE = Chunk(None)


class Eager:
    """Runs micro-batches and updates as written, one operation after another (`state.runner`)."""

    written = 0  # micro-batches so far

    def begin(self, loop: Session) -> None:
        """Clear the gradients."""
        clear_gradients(loop.state.optimizer)

    def backward(self, loop: Session, loss: Any, batch: Any, factor: Any) -> dict[str, Any]:
        """Run `loss(model, batch)` if it is a function, then backward with the weight `factor`; return the outputs."""
        self.written += 1
        outputs = checked(loop.forward(loss, loop.state.model, batch) if callable(loss) else loss)
        scaler, loss = loop.state.scaler, outputs["loss"]
        scaled = loss if scaler is None else scaler.scale(loss)
        if loop._step is not None:  # last thing before it adds to them
            loop._step.check_untouched(between=True)
        if factor is None:
            scaled.backward()
        elif isinstance(factor, Tensor) or factor:
            scaled.backward(loop.constant(factor, loss))
        else:
            with silenced(loss, loop.state.model):
                scaled.backward(loop.constant(factor, loss))
        return outputs

    def give_back(self) -> bool:
        """Give back memory that a micro-batch as written could not use and ran out of; tell whether its step may be redone."""
        return False

    def update(self, loop: Session) -> None:
        """Apply the gradients."""
        try:
            loop.state.optimizer.step()
        except RuntimeError as error:
            name_sparse(error, loop.state)
            raise


class Micro:
    """One micro-batch: `with micro: micro.backward(loss_fn)`."""

    _batch: Any = None
    _before: Snapshot | None = None
    _reducing: Any = None
    _open = False
    stand_in = False  # which leaves no trace
    outputs: dict[str, Any] | None = None

    def __init__(self, step: Step, number: int, chunk: Chunk, weight: float | Tensor, factor: Any, last: bool = True) -> None:
        self._step, self.number, self._chunk, self.weight, self._factor = step, number, chunk, weight, factor
        self._last = last

    @property
    def batch(self) -> Any:
        """The batch, on the model's device."""
        if self._batch is None:
            self._batch = batches.move(self._chunk.data, self._step.loop.state.device)
        return self._batch

    def backward(self, loss: Any) -> None:
        """Run `loss(model, batch)` and its backward, weighted; also takes a loss that you computed."""
        if not self._open:
            raise RuntimeError("micro.backward must run inside `with micro:`, once")
        loop, self._open = self._step.loop, False
        batch = None
        if callable(loss):
            batch = self.batch
        else:  # backward runs outside of autocast
            loop.leave_autocast()
        self.outputs = loop.state.runner.backward(loop, loss, batch, self._factor)
        if not self._last or self._step._held is None:
            self._step.hold()

    def __enter__(self) -> Micro:
        if self._open or self.outputs is not None:
            raise RuntimeError("a micro-batch may be entered once: its gradient would count twice")
        loop, self._open = self._step.loop, True
        if loop.modes and not loop.state.model.training:
            back_to_train(loop)
        if loop.state.ranks.together:  # around all of the body, since a forward of the user's own may stand in it
            self._reducing = reducing(loop.state.model, self._last, self._step.rehearsal)
            self._reducing.__enter__()
            if self.stand_in:
                self._before = Snapshot(loop.state, seeded=True)
                self._before.take([])
        if loop.streams is not None:
            loop.streams.begin(loop.state.step + loop.state.skipped, self.number)
        if loop.autocast is not None:  # for a forward of the user's own in the body
            loop.open_autocast()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        step, self._open = self._step, False
        if step.loop.autocast is not None:
            step.loop.leave_autocast()
        if self._reducing is not None:
            self._reducing.__exit__(kind, error, trace)
        if self._before is not None:
            self._before.put_back_buffers()
        if error is None:
            if self.outputs is not None:
                if step.loop.hooks["on_micro_end"] and not self.stand_in and step.back_to is None:
                    step.check_untouched(between=not self._last)  # else the next backward, or loop.update(), looks
                    step.hold()
                    outputs = {name: batches.walk(value, detached) for name, value in self.outputs.items()}
                    share = None if self._last and self.number == 0 else self._factor
                    step.loop.micro_end(self._chunk, self.batch, outputs, self.weight, self.number, True, share)
                    step.check_untouched(between=True)
                self.outputs, self._batch = singles(self.outputs), None
            return False
        if self.outputs is not None:  # whoever goes on behind the error
            self.outputs = singles(self.outputs)
        if isinstance(error, Exception) and rehearsal.redoes(step, error, self._chunk.size or 0):
            step.fail(error)
            traceback.clear_frames(trace)  # its locals hold the failed graph, and with it the memory
            self.outputs = self._batch = None
            return True
        if isinstance(error, RuntimeError) and "expect_autograd_hooks_" in str(error):
            say(error, "DistributedDataParallel(static_graph=True) must average its very first backward, which several "
                           "micro-batches, or the rehearsal of MicroBatch('auto'), leave out: take static_graph out")  # fmt: skip
        elif isinstance(error, ValueError) and "more than 1 value per channel" in str(error):
            say(error, f"BatchNorm met a micro-batch of {self._chunk.size} sample(s): cut at least 2, leave a short last batch "
                           "out (drop_last=True), or use GroupNorm or LayerNorm")  # fmt: skip
        else:
            name_devices(error, step.loop.state.model, self._chunk.data if self._batch is None else self._batch)
        return False


class Step:
    """The data of one update; iterating it gives the micro-batches, again from the first when a redo is asked for."""

    _held: tuple[Tensor, Tensor, int] | None = None
    _micros: list[Micro] | None = None
    _before = size = largest = 0
    back_to: Snapshot | None = None  # after a pass that only arranges DDP's buckets
    complete = updated = taken = _redo = rehearsal = False

    def __init__(self, loop: Session, chunks: list[Chunk]) -> None:
        self.loop, self.chunks = loop, chunks
        self.done: list[Micro] = []
        for chunk in chunks:
            if chunk.size is None:
                chunk.size = loop.measure(chunk.data)
            self.size += chunk.size
        self.weight: Any = self.size

    def begin(self) -> bool:
        """Agree with the other ranks on this step, let callbacks look; return False where the run is to end instead."""
        state = self.loop.state
        if state.ranks.together:
            self._micros = among_ranks(self, self._cut(), "begins a step")
            if self._micros is None:
                return False
        for act in state.before:
            act(state)
        return True

    def __iter__(self) -> Iterator[Micro]:
        loop, state = self.loop, self.loop.state
        while not self.complete:
            state.runner.begin(loop)  # clears gradients, here, not after the update: whatever was left, a step starts anew
            self.done, self._redo, self._held, self._before = [], False, None, loop.optimizer_steps
            if loop.snapshot is not None:
                loop.snapshot.take(self.chunks)
                self.taken = True
            micros, self._micros = self._micros, None
            if micros is None:
                micros = self._cut() if not state.ranks.together else among_ranks(self, self._cut(), "redoes a step") or []
            if state.ranks.together:
                self.rehearsal = rehearsal.is_new(self)
                self.back_to = rehearsal.rearranges(self)
            for micro in micros:
                yield micro
                if self._redo:
                    break
                if micro.outputs is None:
                    raise RuntimeError("a micro-batch went by without micro.backward(loss_fn)")
                self.done.append(micro)
            if self.rehearsal and not self._redo and rehearsal.agreed(self):
                self.fail(None)  # what was rehearsed is now run, for all to average
            if self.back_to is not None and not self._redo:
                self.back_to.put_back(None)
                self._redo = True
            self.complete = not self._redo

    def _cut(self) -> list[Micro]:
        loop, parts, limit = self.loop, self.chunks, self.loop.state.micro_batch_size
        if len(parts) < (least := loop.state.least_micros):
            limit = min(-(-self.size // least), limit or self.size) or 1
        if limit is not None:
            parts = [piece(c, a, b, loop.cut) for c in parts for a, b in batches.equal_cuts(c.size or 0, limit)]
        loop.state.update_size = loop.state.micro_size = self.size
        if len(parts) == 1 and loop.weigh is None and self.size:  # what follows in short, for most steps are this
            return [Micro(self, 0, parts[0], self.size, None)]
        # a part whose weight is known to be 0 is left out: its mean loss is 0/0
        if loop.weigh is None:
            weighed: list[tuple[Chunk, Any]] = [(part, part.size) for part in parts if part.size]
        else:
            every = [(part, weight_of(loop, part)) for part in parts]
            weighed = [(part, w) for part, w in every if isinstance(w, Tensor) or w > 0]
            self.weight = sum(weight for _, weight in weighed)
        loop.state.micro_size = max([part.size or 0 for part, _ in weighed], default=0)
        if len(weighed) == 1:
            return [Micro(self, 0, *weighed[0], None)]
        if not weighed and not loop.state.ranks.together:
            loop.state.skip("the weights of the whole step sum to 0")
        last = len(weighed) - 1
        return [Micro(self, i, part, w, w / self.weight, i == last) for i, (part, w) in enumerate(weighed)]

    def hold(self) -> None:
        """Remember a gradient as this micro-batch left it."""
        if self._held is None:
            groups = self.loop.state.optimizer.param_groups
            p = next((p for g in groups for p in g["params"] if p.grad is not None), None)
        else:
            p = self._held[0]
        if p is not None and (grad := p.grad) is not None:
            self._held = p, grad, grad._version

    def check_untouched(self, between: bool = False) -> None:
        """Raise RuntimeError where someone else cleared or changed this step's gradients, or ran the optimizer."""
        if self._held is None:
            return
        p, grad, version = self._held
        changed = (p.grad is not grad or grad._version != version) if between else p.grad is None  # clipped by hand is fine
        if changed or self.loop.optimizer_steps != self._before:
            raise RuntimeError("a step was interrupted: between its backwards and loop.update() something else cleared or "
                               "changed its gradients, or ran the optimizer (zero_grad or optimizer.step in a callback or in "
                               "the loop's body: leave both to loop.update(); a backward of your own: return its term as part "
                               "of the loss)")  # fmt: skip

    def fail(self, error: Exception | None) -> None:
        """Go back to where the step began, so that it can be redone in other cuts."""
        self._redo = True
        if self.loop.snapshot is not None and self.taken:
            self.loop.snapshot.put_back(error)

    def release(self) -> dict[str, Any]:
        """Let the data go, and return the weighted mean over the step of the loss and of every other single number."""
        done, self.done, self.chunks = self.done, [], []  # micro-batches point back here: a cycle would keep the data
        together = self.loop.state.ranks.together
        if done and together:
            self.loop.stand_in = done[-1]._chunk
        for micro in done:
            micro._chunk = GONE
        if together:
            done = [micro for micro in done if not micro.stand_in]
        if len(done) == 1:
            return done[0].outputs or {}
        outputs, means = [micro.outputs or {} for micro in done], dict[str, Any]()
        shares = [micro.weight / self.weight for micro in done]
        for name in dict.fromkeys(itertools.chain.from_iterable(outputs)):
            gave, by = [one[name] for one in outputs if name in one], shares
            if len(gave) < len(done):  # the mean over those that gave it
                mine = [micro.weight for one, micro in zip(outputs, done, strict=True) if name in one]
                by = [w / sum(mine) for w in mine]
            means[name] = weighted(gave, by)
        return means


def clear_gradients(optimizer: Optimizer) -> None:
    """Do what torch's own `zero_grad()` does without the profiler's range around it, which costs more than a small step."""
    if getattr(optimizer.zero_grad, "__func__", None) is not ZERO_GRAD:
        optimizer.zero_grad()  # one that does it its own way
    else:
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = None
