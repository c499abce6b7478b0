"""One step: the data of one update, its micro-batches, and what each goes through."""

from __future__ import annotations

import numbers
import traceback
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

from torch import Tensor

from . import batch as batches
from .feed import Chunk, piece
from .rng import mix, seed_host

if TYPE_CHECKING:
    from .life import Life


class Eager:
    """Runs micro-batches and updates as written, one operation after another (`state.runner`)."""

    def backward(self, loop: Life, loss: Any, batch: Any, factor: Any) -> dict[str, Any]:
        """Run `loss(model, batch)` under autocast if it is a function, then backward; return the outputs."""
        if callable(loss):
            loss = loop.forward(loss, loop.state.model, batch)
        outputs = checked(loss)
        scaler, loss = loop.state.scaler, outputs["loss"]
        (loss if scaler is None else scaler.scale(loss)).backward(gradient=loop.constant(factor, loss))
        return outputs

    def update(self, loop: Life) -> None:
        """Apply the gradients."""
        loop.state.optimizer.step()


def checked(outputs: Any, training: bool = True) -> dict[str, Any]:
    """Return what `loss_fn` gave as a dict with "loss"; raises TypeError or ValueError where that is no mean loss."""
    if not isinstance(outputs, Tensor):
        if not isinstance(outputs, Mapping):
            raise TypeError(f"loss_fn returned {type(outputs).__name__}; return the mean loss, a scalar tensor, "
                            'or a mapping that holds it as "loss"')  # fmt: skip
        if "loss" not in outputs:
            raise ValueError(f'loss_fn returned a mapping without "loss"; it holds {sorted(map(str, outputs))}')
    found = {"loss": outputs} if isinstance(outputs, Tensor) else dict(outputs)
    loss = found["loss"]
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"the loss is a {type(loss).__name__}, not a tensor; return what the criterion gave, not .item()"
        )
    if loss.dim() or loss.is_complex():
        raise ValueError(
            f"the loss has shape {tuple(loss.shape)} and type {loss.dtype}; return one real number: loss.mean()"
        )
    if training and not loss.requires_grad:
        raise ValueError("the loss has requires_grad=False, so nothing can be learnt from it; "
                         "is it detached, under no_grad, or are all parameters frozen?")  # fmt: skip
    return found


def weight_of(loop: Life, chunk: Chunk) -> float | Tensor:
    """Return what this micro-batch's mean loss is a mean over; a tensor only where the batch lies on a device."""
    if loop.weigh is None:
        return chunk.size or 0
    weight = loop.weigh(chunk.data)
    if isinstance(weight, Tensor):
        if weight.dim():
            raise ValueError(f"weigh must return a number or a 0-d tensor, not shape {tuple(weight.shape)}; sum it")
        if weight.device.type != "cpu":
            return weight.detach()
        weight = weight.tolist()
    if not isinstance(weight, numbers.Real) or not 0 <= weight < float("inf"):
        raise ValueError(f"weigh must return a finite number that is at least 0, not {weight!r}")
    return float(weight)


class Micro:
    """One micro-batch: `with micro: micro.backward(loss_fn)`."""

    __slots__ = ("_batch", "_chunk", "_factor", "_open", "_step", "number", "outputs", "weight")

    def __init__(self, step: Step, number: int, chunk: Chunk, weight: float | Tensor, factor: Any) -> None:
        self._step, self.number, self._chunk, self.weight, self._factor = step, number, chunk, weight, factor
        self.outputs: dict[str, Any] | None = None
        self._open, self._batch = False, None

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
        self.outputs = loop.state.runner.backward(loop, loss, self.batch if callable(loss) else None, self._factor)

    def __enter__(self) -> Micro:
        loop, self._open = self._step.loop, True
        if loop.seed_base is not None:  # so that nothing else that draws can move the training stream
            key = mix(loop.seed_base, (loop.state.step + loop.state.skipped) * 65536 + self.number)
            for generator in loop.generators:
                generator.manual_seed(key)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self._open, loop = False, self._step.loop
        if error is None and self.outputs is not None:
            self.outputs = {k: batches.walk(v, detached) for k, v in self.outputs.items()}
            if loop.hooks["on_micro_end"]:
                loop.micro_end(self._chunk, self.batch, self.outputs, self.weight, self.number, training=True)
            self._batch = None
        elif isinstance(error, Exception) and loop.redoes(error, self._chunk.size or 0, training=True):
            self._step.failed(error)
            traceback.clear_frames(trace)  # its locals hold the failed graph, and with it the memory
            self._batch = None
            return True
        return False


def detached(x: Any, path: str) -> Any:
    """Return a tensor without its graph, anything else as it is."""
    return x.detach() if isinstance(x, Tensor) else x


class Step:
    """The data of one update; iterating it gives the micro-batches, again from the first when a redo is asked for."""

    def __init__(self, loop: Life, chunks: list[Chunk]) -> None:
        self.loop = loop
        self.chunks = [c if c.size is not None else Chunk(c.data, c.index, loop.measure(c.data)) for c in chunks]
        self.size = sum(chunk.size or 0 for chunk in self.chunks)
        self.weight: Any = 0.0
        self.done: list[Micro] = []
        self.complete = self.updated = self._redo = False

    def __iter__(self) -> Iterator[Micro]:
        loop = self.loop
        while not self.complete:
            loop.state.optimizer.zero_grad()
            self.done, self._redo = [], False
            if loop.seed_base is not None:
                seed_host(mix(loop.seed_base, -1 - loop.state.step - loop.state.skipped))
            if loop.snapshot is not None:
                loop.snapshot.take(self.chunks)
            for micro in self._cut():
                yield micro
                if self._redo:
                    break
                if micro.outputs is None:
                    raise RuntimeError("a micro-batch went by without micro.backward(loss_fn)")
                self.done.append(micro)
            self.complete = not self._redo

    def _cut(self) -> list[Micro]:
        limit, parts = self.loop.state.micro_batch_size, self.chunks
        if limit is not None:
            parts = [piece(c, a, b, self.loop.cut) for c in parts for a, b in batches.equal_cuts(c.size or 0, limit)]
        pairs = [(part, weight_of(self.loop, part)) for part in parts]
        pairs = [(part, weight) for part, weight in pairs if isinstance(weight, Tensor) or weight > 0]
        self.weight = sum(weight for _, weight in pairs)
        if not pairs:
            self.loop.state.skip("the weights of the whole step sum to 0")
        factors: list[Any] = [None] if len(pairs) == 1 else [weight / self.weight for _, weight in pairs]
        return [Micro(self, i, part, weight, factors[i]) for i, (part, weight) in enumerate(pairs)]

    def failed(self, error: Exception) -> None:
        """Go back to where the step began, so that it can be redone in other cuts."""
        self.done, self._redo = [], True
        assert self.loop.snapshot is not None
        self.loop.snapshot.put_back(error)

    def means(self) -> dict[str, Any]:
        """Return the weighted mean over the step of the loss and of every other single number."""
        if len(self.done) == 1:
            return {k: v for k, v in (self.done[0].outputs or {}).items() if single(v)}
        total: dict[str, Any] = {}
        for micro in self.done:
            for name, value in (micro.outputs or {}).items():
                if single(value):
                    total[name] = total.get(name, 0) + value * (micro.weight / self.weight)
        return total


def single(value: Any) -> bool:
    """Tell whether an output is one number, to be averaged and logged."""
    return (isinstance(value, Tensor) and not value.dim()) or type(value) in (int, float)
