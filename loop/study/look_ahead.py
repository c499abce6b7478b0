"""Updates tried on a Loop's model and data, and taken back: what looks ahead leaves no trace."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader

from .. import batch as batches
from ..checks import check_loader
from ..chunk import Chunk, piece
from ..feed import Feed
from ..groups import check_rated, put
from ..guards import to_train
from ..loop import Loop
from ..order import apart, extent
from ..outputs import checked, weight_of
from ..redo import BeforeUpdate, Snapshot, host_copy, keeps_more
from ..rng import derive, isolated
from ..state import State
from ..step import clear_gradients

LossFn = Callable[[nn.Module, Any], Any]


def check_free(loop: Any, loss_fn: Any, loader: Any, who: str) -> None:
    """Refuse what could not be put back: a Loop inside a step, several ranks, data that can't be begun again."""
    if not isinstance(loop, Loop):
        raise TypeError(f"{who} takes a Loop, not {loop!r:.60}")
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be a function of model and batch, not {loss_fn!r:.60}")
    check_loader("loader", loader)
    if loop._torn:
        raise RuntimeError(f"{who}: an error cut this Loop's optimizer off inside a step; build model, optimizer and Loop anew")
    if loop._step is not None and not loop._step.updated:
        raise RuntimeError(f"{who} inside a step, whose gradients are under way: call it before `with loop:`, between epochs, or "
                           "after loop.update()")  # fmt: skip
    if loop.state._evaluating:
        raise RuntimeError(f"{who} inside an evaluation: call it before or after")
    if loop.state.world > 1:
        raise RuntimeError(f"{who} runs in one process, and here are {loop.state.world} ranks: call it in a program of one")
    if isinstance(loader, Iterator):
        raise TypeError(f"loader is an iterator ({type(loader).__name__}), and what is read from it is gone; give what can be "
                        "iterated again, such as a DataLoader")  # fmt: skip
    if callable(getattr(loader, "load_state_dict", None)):
        raise TypeError(f"loader, a {type(loader).__name__}, keeps its own position, which a look ahead would move; give a "
                        "DataLoader of its own over the same data")  # fmt: skip


@contextlib.contextmanager
def untouched(loop: Loop, loader: Any) -> Iterator[None]:
    """Let the body train the model, and put back whatever that changes: a copy of it lies on the host meanwhile."""
    state, model, optimizer, scaler = loop.state, loop.state.model, loop.state.optimizer, loop.state.scaler
    modes, counted = [(m, m.training) for m in model.modules()], loop.optimizer_steps
    around, before = Snapshot(state), BeforeUpdate(state)
    around.take([])
    trained = {p for group in optimizer.param_groups for p in group["params"]}
    others = [(p, host_copy(p.detach())) for p in model.parameters() if p not in trained]  # a forward may change them
    extra = [(m, copy.deepcopy(m.get_extra_state())) for m in model.modules() if keeps_more(m)]
    scale = {} if scaler is None else copy.deepcopy(scaler.state_dict())
    workers = loader._iterator if isinstance(loader, DataLoader) else None
    with isolated(state.device), apart(loader, derive(loop.seed or 0, "trial", state.epoch)):
        try:
            if isinstance(loader, DataLoader):
                loader._iterator = None  # persistent workers, and the epoch they are in, stay the run's
            vars(optimizer).pop("found_inf", None)
            if not model.training:
                to_train(model)
            yield
        finally:
            before.put_back()
            around.put_back(None)
            for p, kept in others:
                p.detach().copy_(kept)
            for module, held in extra:
                module.set_extra_state(held)
            for module, training in modes:
                module.training = training
            if scaler is not None:
                scaler._per_optimizer_states.pop(id(optimizer), None)
                scaler.load_state_dict(scale)
            if isinstance(loader, DataLoader):
                loader._iterator = workers
            loop.optimizer_steps = counted


class LookAhead:
    """Updates of the size that the run's next one has, each at a rate that is given; inside `untouched`."""

    def __init__(self, loop: Loop, loss_fn: LossFn, loader: Any, micro_batch_size: int | None) -> None:
        self.loop, self.loss_fn, self.shares = loop, loss_fn, shares(loop.state)
        self.limit = micro_batch_size or loop.state.micro_batch_size
        self.size, self.accumulate = planned(loop, loader)
        self.feed = Feed(loop.cut, loop.measure, True)
        self.feed.loader, self.feed._source = loader, endless(loader)

    def __enter__(self) -> LookAhead:
        return self

    def __exit__(self, *error: Any) -> None:
        self.feed._source.close()  # type: ignore[attr-defined]  # with the workers that serve it

    def update(self, rate: float) -> float:
        """Do one update, the largest group's rate at `rate`, unless the loss is not finite; return the loss before it."""
        state, optimizer, scaler = self.loop.state, self.loop.state.optimizer, self.loop.state.scaler
        for group, share in zip(optimizer.param_groups, self.shares, strict=True):
            put(group, {"lr": rate * share})
        clear_gradients(optimizer)
        loss = self._backward(state)
        if math.isfinite(loss):
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
        return loss

    def _data(self) -> list[tuple[Chunk, Any]]:
        """Return the micro-batches of the next update that is no 0/0, which the run would skip, with their weights."""
        loop = self.loop
        for _ in range(loop.max_skips):
            chunks = self.feed.gather(self.size, self.accumulate)
            for chunk in chunks:
                chunk.size = loop.measure(chunk.data) if chunk.size is None else chunk.size
            if self.limit is not None:
                chunks = [piece(c, a, b, loop.cut) for c in chunks for a, b in batches.equal_cuts(c.size or 0, self.limit)]
            weighed = [(chunk, weight_of(loop, chunk)) for chunk in chunks]
            if found := [(chunk, w) for chunk, w in weighed if isinstance(w, Tensor) or w > 0]:
                return found
        raise ValueError(f"the weights of {loop.max_skips} updates in a row sum to 0: look at weigh= and the data")

    def _backward(self, state: State) -> float:
        loop, weighed = self.loop, self._data()
        whole, total = sum(weight for _, weight in weighed), 0.0
        for chunk, weight in weighed:
            loss = checked(loop.forward(self.loss_fn, state.model, batches.move(chunk.data, state.device)))["loss"]
            share = weight / whole
            (loss if state.scaler is None else state.scaler.scale(loss)).backward(loop.constant(share, loss))
            total += float(loss.detach() * share)
        return total


def shares(state: State) -> list[float]:
    """Return each group's rate over the largest one's, schedules aside; raises ValueError where all rates are 0."""
    check_rated(state.optimizer)
    rates = [float(group.get("initial_lr", group["lr"])) for group in state.optimizer.param_groups]
    if not max(rates) > 0:
        raise ValueError(f"every rate in {type(state.optimizer).__name__} is 0, which says no ratio of the groups' rates; build it "
                         "with rates above 0 (which ones does not matter, their ratio does)")  # fmt: skip
    return [rate / max(rates) for rate in rates]


def planned(loop: Loop, loader: Any) -> tuple[int | None, int]:
    """Return batch size and accumulation of the run's next update, as far as they follow from settings."""
    state = loop.state
    shape = [c for c in loop.callbacks if {"batch_size", "accumulate"} & set(c.owns)]
    # What measures has planned already, or says how it begins: a copy of it, for to ask may move it on.
    shape = [copy.deepcopy(c) if c.measured else c for c in shape if state.batch_size is None or not c.measured]
    shadow = State(state.model, state.optimizer, loader=loader, step=state.step, epoch=state.epoch,
                   epoch_samples=extent(loader, size=loop.size)[1] if shape else None, batch_size=state.batch_size,
                   accumulate=state.accumulate)  # fmt: skip
    for callback in shape:
        callback.on_step_start(shadow)
    return shadow.batch_size, shadow.accumulate


def endless(loader: Iterable[Any]) -> Iterator[Any]:
    """Yield a loader's batches, pass after pass."""
    while True:
        count = 0
        for count, data in enumerate(loader, 1):  # noqa: B007
            yield data
        if not count:
            raise ValueError(f"the loader ({type(loader).__name__}) gives 0 batches; give it data")
