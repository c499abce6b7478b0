"""What a callback is: the hooks it may override, the settings it owns, the state it saves."""

from __future__ import annotations

from types import MethodType
from typing import TYPE_CHECKING, Any, ClassVar, Self

if TYPE_CHECKING:
    from .state import State

HOOKS = ("on_setup", "on_fit_start", "on_epoch_start", "on_step_start", "on_exception", "on_micro_end",
         "on_before_optimizer_step", "on_step_end", "on_validation_end", "on_epoch_end", "on_fit_end")  # fmt: skip


class Callback:
    """Does one thing to training: override any hook; each takes the `State` and is named by what holds when it runs.

    `owns`: the plan fields (`"batch_size"`, `"accumulate"`, `"micro_batch_size"`) that it alone decides, or in words what
    else only one callback may decide. One that owns `batch_size` or `accumulate` decides in `on_step_start` from
    `state.step`, `state.epoch` and settings alone, so that `state.total_steps` is known in advance, or says `measured =
    True`. `optional`: hooks it can do without around a loop of the user's own. `planned`: its hooks go by position and
    settings alone, and change nothing but the plan, rates and decays, so that `study.preview` may run them without data.
    `key`: its name in checkpoints. `watches`: metrics that it can't do without. `beside`: entries of its state that seldom
    change, replaced when they do: each is written once, to a file beside the checkpoints that hold it. `of_rank`: of several
    ranks each saves a state of its own, not the first alone. `idle_hooks`: methods of the class that this instance does
    without, so that it takes no part in these hooks and costs nothing there; what a subclass overrides runs all the same.
    """

    owns: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    measured: bool = False
    planned: bool = False
    key: str = ""
    watches: tuple[str, ...] = ()
    idle_hooks: tuple[Any, ...] = ()
    beside: ClassVar[tuple[str, ...]] = ()
    of_rank: ClassVar[bool] = False
    _loop: Any = None
    _used: bool = False
    _decides: frozenset[Any] = frozenset()  # modules or parameters, that no other of its kind may decide

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "key" not in cls.__dict__:
            cls.key = cls.__name__

    def named(self, key: str) -> Self:
        """Give this callback another key in checkpoints, which a second one of the same class needs."""
        if not isinstance(key, str) or not key:
            raise ValueError(f"key must be a string that is not empty, not {key!r}")
        self.key = key
        return self

    def __getstate__(self) -> Any:
        state = object.__getstate__(self)  # a copy belongs to no Loop
        return {k: v for k, v in state.items() if k not in ("_loop", "_used", "_decides")} if isinstance(state, dict) else state

    def __setstate__(self, state: Any) -> None:
        held, slots = state if isinstance(state, tuple) else (state, {})
        for name, value in slots.items():
            setattr(self, name, value)
        vars(self).update(held or {})
        for name in vars(self).keys() & {*HOOKS}:  # one that was set on the instance runs the copy, not what was copied
            if isinstance(hook := vars(self)[name], MethodType) and type(hook.__self__) is type(self):
                vars(self)[name] = MethodType(hook.__func__, self)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, as plain data: numbers, strings, tensors, and dicts and lists of them."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""

    def joined(self, states: list[dict[str, Any]], first: bool) -> dict[str, Any]:
        """Return what a rank, the first or another, takes of the states that another number of ranks saved (`of_rank`)."""
        return states[0]

    def on_setup(self, state: State) -> None:
        """Once in a Loop's life, before anything is restored; the model and parameter groups may change."""

    def on_fit_start(self, state: State) -> None:
        """Restored; `state.loader` and `state.total_steps` are known (both None around a loop of your own)."""

    def on_epoch_start(self, state: State) -> None:
        """The loader is about to be iterated, also when resuming inside an epoch."""

    def on_step_start(self, state: State) -> None:
        """A step will follow, its data not gathered yet; the plan may change."""

    def on_exception(self, state: State) -> bool | None:
        """`state.exception` ended a forward and backward (an update, where `state.micro` is None); True redoes it."""

    def on_micro_end(self, state: State) -> None:
        """`state.micro` went forward and backward (in evaluation: forward); it is None outside this hook."""

    def on_before_optimizer_step(self, state: State) -> None:
        """Gradients are final: summed, weighted, unscaled."""

    def on_step_end(self, state: State) -> None:
        """The update was applied and counted, and `state.metrics` describes it; a skipped update calls nothing."""

    def on_validation_end(self, state: State) -> None:
        """`state.metrics` holds validation results."""

    def on_epoch_end(self, state: State) -> None:
        """The loader is exhausted, validation (if any) done, and `state.epoch` counts the epoch."""

    def on_fit_end(self, state: State) -> None:
        """Training ended, also after an error."""
