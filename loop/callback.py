"""What a callback is: the hooks it may override, the settings it owns, the state it saves."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, ClassVar, Self

if TYPE_CHECKING:
    from .state import State

Method = Callable[["State"], Any]
HOOKS = ("on_setup", "on_fit_start", "on_epoch_start", "on_step_start", "on_exception", "on_micro_end",
         "on_before_optimizer_step", "on_step_end", "on_validation_end", "on_epoch_end", "on_fit_end")  # fmt: skip
# Around a loop of the user's own, where steps, epochs and data are not ours, only these run.
AROUND = {"on_setup", "on_fit_start", "on_micro_end", "on_before_optimizer_step", "on_step_end", "on_validation_end",
          "on_fit_end"}  # fmt: skip


class Callback:
    """Does one thing to training: override any hook; each takes the `State` and is named by what holds when it runs.

    `owns`: the plan fields (`"batch_size"`, `"accumulate"`, `"micro_batch_size"`) that it alone decides. One that owns
    `batch_size` or `accumulate` decides in `on_step_start` from `state.step`, `state.epoch` and settings alone, so that
    `state.total_steps` is known in advance, or says `measured = True`. `optional`: hooks it can do without around a
    loop of the user's own. `key`: its name in checkpoints.
    """

    owns: ClassVar[tuple[str, ...]] = ()
    optional: tuple[str, ...] = ()
    measured: bool = False
    key: str = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "key" not in cls.__dict__:
            cls.key = cls.__name__

    def named(self, key: str) -> Self:
        """Give this callback another key in checkpoints, which a second one of the same class needs."""
        self.key = key
        return self

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, as plain data: numbers, strings, tensors, and dicts and lists of them."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""

    def on_setup(self, state: State) -> None:
        """Once in a Loop's life, before anything is restored; the model and parameter groups may change."""

    def on_fit_start(self, state: State) -> None:
        """Restored; `state.loader` and `state.total_steps` are known (both None around a loop of your own)."""

    def on_epoch_start(self, state: State) -> None:
        """The loader is about to be iterated, also when resuming inside an epoch."""

    def on_step_start(self, state: State) -> None:
        """A step will follow, its data not gathered yet; the plan may change."""

    def on_exception(self, state: State) -> bool | None:
        """`state.exception` ended a forward or backward; returning True redoes the step under the changed plan."""

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


def overridden(callback: Callback) -> set[str]:
    """Return the hooks that this callback overrides, in its class or on the instance."""
    methods = {hook: getattr(callback, hook) for hook in HOOKS}
    return {
        hook for hook, method in methods.items() if getattr(method, "__func__", None) is not getattr(Callback, hook)
    }


def check(callbacks: Iterable[Callback]) -> None:
    """Refuse what could only go wrong later: no callback, a misspelt hook, shared keys or settings."""
    keys: dict[str, Callback] = {}
    owners: dict[str, Callback] = {}
    for callback in callbacks:
        name = type(callback).__name__
        if not isinstance(callback, Callback):
            hint = f"; write {callback.__name__}(...)" if inspect.isclass(callback) else ""
            raise TypeError(f"callbacks holds {callback!r}, which is no Callback instance{hint}")
        for attribute in dir(callback):
            if attribute.startswith("on_") and attribute not in HOOKS and callable(getattr(callback, attribute)):
                near = (difflib.get_close_matches(attribute, HOOKS, 1, 0) or HOOKS)[0]
                raise TypeError(f"{name}.{attribute} is no hook and would never run; the closest hook is {near}")
        for hook in overridden(callback):
            try:
                inspect.signature(getattr(callback, hook)).bind(None)
            except TypeError as error:
                raise TypeError(f"{name}.{hook} must take one argument, state: {error}") from None
        if keys.get(callback.key) is callback:
            raise ValueError(f"the same {name} stands in callbacks twice")
        if callback.key in keys:
            raise ValueError(f"two callbacks have the key {callback.key!r}; name one: {name}(...).named('second')")
        keys[callback.key] = callback
        for setting in callback.owns:
            if setting in owners:
                first = type(owners[setting]).__name__
                raise ValueError(f"{first} and {name} both own state.{setting}; keep one of them")
            owners[setting] = callback


def table(callbacks: Iterable[Callback]) -> dict[str, tuple[Method, ...]]:
    """Return hook -> the methods that override it, in list order; built once, so an unused hook costs nothing."""
    return {hook: tuple(getattr(c, hook) for c in callbacks if hook in overridden(c)) for hook in HOOKS}
