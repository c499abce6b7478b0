"""Evaluation: the one way of measuring a model, which leaves training as it found it."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import IterableDataset, Sampler
from torch.utils.data.dataloader import _BaseDataLoaderIter

from . import batch as batches
from .checks import say
from .chunk import Chunk, piece
from .goal import logged, number
from .guards import back_to_eval, modes_of, name_devices
from .mean import Mean
from .memory import out_of_memory
from .order import apart
from .outputs import as_now, checked, detached, single, weight_of
from .reading import STOPPED, explain, in_sequence, miscounted, shut_down
from .rng import derive, isolated
from .share import shortened
from .state import State
from .wants import decide, wants
from .wrapped import each_alone

if TYPE_CHECKING:
    from .session import Session


def evaluate(loop: Session, loss_fn: Any, loader: Any, prefix: str, may_leave: bool = False) -> dict[str, float] | None:
    """Return the weighted means of what `loss_fn` gives, and what callbacks logged, each name behind `prefix`.

    `may_leave`: None once the run is to be left.
    """
    state = loop.state
    if loop.sampling is not None:  # a callback that evaluates is not slow by itself
        loop.hooks, loop.sampling = loop.sampling[1], None
    model = state.model if state.eval_model is None else state.eval_model
    if model is state.model:
        loop.modes = modes_of(model) or loop.modes
    modes = [(module, module.training) for module in model.modules()]
    seed = None if state.seed is None else derive(state.seed, "validation", state.step, state.rank)
    means: dict[str, Mean] = {}
    if loop.feed.loader is loader and not loop.feed.lends():
        raise ValueError("the training loader can't be evaluated on while its persistent workers serve training, or its own "
                         "state_dict says where training stands; give a loader of its own over the same data")  # fmt: skip
    outer, state._logged, state._evaluating = state._logged, {}, True
    key = None if loop.seed is None else derive(loop.seed, "validation", state.step, state.rank)
    with isolated(state.device, seed), apart(loader, key), torch.no_grad(), each_alone(state), loop.evaluating():
        try:
            model.eval()
            count = 0
            read = None
            for place, data in enumerate(_read(loader, state, may_leave)):
                read = Chunk(data, in_sequence(loader, place) if loop.hooks["on_micro_end"] else None)
                count = _one_batch(loop, loss_fn, model, read, count, means, prefix.rstrip("_"))
            if not count and not (may_leave and (state.leaving or wants(state)["leave"])):
                raise ValueError(f"the {prefix.rstrip('_')} loader gave 0 batches; give it data, or leave it out")
            while state.ranks.together and any(row[0] for row in decide(state, "evaluates", False)):
                if state.ranks.sharded and read is not None:  # others wait for this rank's part of the weights
                    part = shortened(loop, read, state.eval_micro_batch_size)
                    loop.forward(loss_fn, model, batches.move(part.data, state.device))
            if may_leave and state.leaving:
                return None
            found: dict[str, Any] = state.ranks.means(means)
            if count and not found:  # of all ranks: every loss_fn gives a loss, which is taken wherever the weight is above 0
                raise ValueError(f"the weights of the {prefix.rstrip('_')} loader's batches sum to 0, so that there is no mean to "
                                 "report; look at weigh= and at the data, or leave the loader out")  # fmt: skip
            more = logged(state._logged, found, "loss_fn returns {!r}", prefix)
            found |= state.ranks.averaged(more, "ends an evaluation")
        finally:
            state._logged, state._evaluating = outer, False
            for module, training in modes:
                module.training = training
    return {prefix + name: number(prefix + name, value) for name, value in found.items()}


def _read(loader: Any, state: State, may_leave: bool) -> Iterator[Any]:
    """Yield batches; with `may_leave` until the run is to be left, and then also where the loader's workers are gone."""
    number = 0
    source: Iterator[Any] = iter(())
    try:
        source = iter(loader)
        for number, data in enumerate(source, 1):  # noqa: B007
            if may_leave and state.leaving:
                return
            yield data
    except Exception as error:
        if may_leave and (state.leaving or (state.ranks.together and wants(state)["leave"])):
            return
        explain(error, loader, source, f"batch {number} of an evaluation after step {state.step}", in_sequence(loader, number))
        if not getattr(loader, "persistent_workers", False):
            shut_down(source)
        raise
    counts = isinstance(source, _BaseDataLoaderIter) and not isinstance(loader.dataset, IterableDataset)
    if counts and (text := miscounted(loader, number)):
        sampler = getattr(loader.batch_sampler, "sampler", None)
        if number < len(loader) and type(sampler).__module__ == Sampler.__module__:
            if not loader.persistent_workers:
                shut_down(source)
            raise RuntimeError(f"{text} in an evaluation: {STOPPED}")
        warnings.warn(f"{text} in an evaluation", stacklevel=2)


def _one_batch(loop: Session, loss_fn: Any, model: Any, read: Chunk, count: int, means: dict[str, Mean], split: str) -> int:
    state, start, total = loop.state, 0, loop.measure(read.data)
    read.size = total
    while start < total:
        a, b = batches.equal_cuts(total - start, state.eval_micro_batch_size)[0]
        chunk = piece(read, start + a, start + b, loop.cut)
        if model.training:
            back_to_eval(loop, model)
        decide(state, "evaluates", True)
        batch = chunk.data
        try:
            batch = batches.move(chunk.data, state.device)
            outputs = checked(loop.forward(loss_fn, model, batch), training=False)
        except Exception as error:
            if state.ranks.sharded and out_of_memory(error):
                say(error, "in an evaluation of a sharded model, in whose forward the ranks depend on one another: one of them "
                           "alone can't redo it; give smaller batches")  # fmt: skip
            if state.ranks.sharded or not loop.redoes(error, b - a, training=False):
                name_devices(error, model, batch)
                raise
            traceback.clear_frames(error.__traceback__)
            continue
        outputs = {name: batches.walk(value, detached) for name, value in outputs.items()}
        weight = weight_of(loop, chunk)
        for name, value in outputs.items():
            if single(value) and (isinstance(weight, torch.Tensor) or weight > 0):
                means.setdefault(name, Mean()).add(as_now(value) if isinstance(value, torch.Tensor) else value, weight)
        loop.micro_end(chunk, batch, outputs, weight, count, False, split=split)
        start, count = start + b - a, count + 1
    return count
