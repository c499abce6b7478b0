"""What must be the same on all ranks, compared before the first step: else they would train apart, or wait for each other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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
        **{f"{c.key}.{name}": value for c in loop.callbacks for name, value in settings(c)},
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


def settings(callback: Callback) -> list[tuple[str, Any]]:
    """Return what a callback of ours was given that trains differently: one of the user's may count, or look, by rank."""
    ours = type(callback).__module__.split(".")[0] == __name__.split(".")[0]
    held = vars(callback).items() if ours else ()
    return [(name, value) for name, value in held if not name.startswith("_") and isinstance(value, bool | int | float)]


def parts(x: Any) -> list[tuple[str, Any]]:
    """Return what of a description can be told by a name of its own."""
    if isinstance(x, dict):
        return [*x.items()]
    kind, names, options = x
    return [("kind", kind), *((f"group {i}", group) for i, group in enumerate(zip(names, options, strict=True)))]


def longest(state: State, steps: int | None) -> int | None:
    """Return the updates of the rank that has most: the others take part in all of them."""
    if not state.ranks.together:
        return steps
    every = [row[0] for row in state.ranks.agree("begins training", -1 if steps is None else steps)]
    return None if min(every) < 0 else int(max(every))
