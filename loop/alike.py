"""What must be the same on all ranks, compared before the first step: else they would train apart, or wait for each other."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .batch import leaves
from .reshard import first_batch_digest
from .shape import shape
from .store import Named
from .wrapped import wrapping

if TYPE_CHECKING:
    from .callback import Callback
    from .session import Session
    from .state import State


def check_alike(loop: Session) -> None:
    """Raise ValueError, on all ranks, with both values where they differ, or for a model wrapped since the Loop was entered."""
    state = loop.state
    if not state.ranks.together or "alike" in loop.warned:
        return
    loop.warned.add("alike")
    if wrapping(state.model) != loop.wrapping:
        raise ValueError("the model was wrapped or sharded after `with loop:` was entered, when callbacks had grouped or "
                         "changed its parameters: wrap it first, then build the optimizer, then Loop")  # fmt: skip
    named = Named(state.model, state.optimizer)
    found: dict[str, Any] = {
        "the seed": state.seed,
        "the model": {name: (tuple(x.shape), str(x.dtype)) for name, x in named.model_state().items() if hasattr(x, "shape")},
        "what is trained": [named.clean(name) for name, p in state.model.named_parameters() if p.requires_grad],
        "the optimizer": (named.kind, named.names, named.options()),
        "callbacks": [callback.key for callback in loop.callbacks],
        **loop.given,
        "epochs= and steps=": loop._end,
        "max_skips": loop.max_skips,
        "the step": (state.step, state.epoch),
    }
    if state.loader is not None:
        about = shape(state.loader)
        found |= {"the loader's sampler": about.get("sampler"), "the loader's batch size": about.get("size")}
    for name in ("the model", "the optimizer"):  # rank 0's name is the first that differs, not all of them
        found |= {f"{name}: {key}": value for key, value in parts(found.pop(name))}
    state.ranks.alike("begins training", found)


def given(callbacks: Iterable[Callback]) -> dict[str, Any]:
    """Return what callbacks of ours were given that trains differently: one of the user's may count, or look, by rank."""
    ours = [c for c in callbacks if type(c).__module__.split(".")[0] == __name__.split(".")[0]]
    return {f"{c.key}.{name}": value for c in ours for name, value in vars(c).items()
            if not name.startswith("_") and isinstance(value, bool | int | float)}  # fmt: skip


def parts(x: Any) -> list[tuple[str, Any]]:
    """Return what of a description can be told by a name of its own."""
    if isinstance(x, dict):
        return [*x.items()]
    kind, names, options = x
    return [("kind", kind), *((f"group {i}", group) for i, group in enumerate(zip(names, options, strict=True)))]


def as_longest(state: State) -> None:
    """Count the updates, and the samples of an epoch, of the rank that has most: the others take part in all of them."""
    if state.ranks.together:
        rows = state.ranks.agree("begins training", *(-1 if x is None else x for x in (state.total_steps, state.epoch_samples)))
        steps, samples, *_ = zip(*rows, strict=True)
        state.total_steps = None if min(steps) < 0 else int(max(steps))
        state.epoch_samples = None if min(samples) < 0 else int(max(samples))


def check_apart(loop: Session) -> None:
    """Warn, at a run's first data, where ranks read the same: each sample would count as often as there are ranks."""
    if "apart" in loop.warned:
        return
    loop.warned.add("apart")
    left = loop.feed.left
    told = left is not None and any(isinstance(x, Tensor) for _, x in leaves(left.data))
    every = loop.state.ranks.exchange("begins a pass over its data", first_batch_digest(left.data) if left and told else None)
    if loop.state.ranks.first and None not in every and len({*every}) == 1:
        warnings.warn(f"all {len(every)} ranks read the same first batch, so that each sample counts {len(every)} times: give the "
                      "loader sampler=torch.utils.data.DistributedSampler(dataset)", stacklevel=2)  # fmt: skip
