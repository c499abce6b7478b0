"""Which methods run at which hook, checked and built once, so that an unused hook costs nothing; and how they are run."""

from __future__ import annotations

import difflib
import inspect
import logging
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from .callback import HOOKS, Callback
from .checks import say, whole
from .micro_end import MicroEnd
from .state import State

log = logging.getLogger("hookloop")

if TYPE_CHECKING:
    from .chunk import Chunk

Method = Callable[[State], Any]
PLAN = ("batch_size", "accumulate", "micro_batch_size")
OWNED = (*PLAN, "runner", "optimizer")
ELSEWHERE = {
    "on_train_batch_start": "on_step_start", "on_train_batch_begin": "on_step_start", "on_step_begin": "on_step_start",
    "on_train_batch_end": "on_step_end", "on_pre_optimizer_step": "on_before_optimizer_step", "on_evaluate": "on_validation_end",
    "on_test_end": "on_validation_end", "on_train_begin": "on_fit_start", "on_train_start": "on_fit_start",
    "on_train_end": "on_fit_end", "on_epoch_begin": "on_epoch_start", "on_train_epoch_start": "on_epoch_start",
    "on_train_epoch_end": "on_epoch_end",
}  # fmt: skip
# Around a loop of the user's own, where steps, epochs and data are not ours, only these run.
AROUND = {"on_setup", "on_fit_start", "on_micro_end", "on_before_optimizer_step", "on_step_end", "on_validation_end",
          "on_fit_end"}  # fmt: skip
# What these tell of has happened: where one callback fails, those behind it hear of it too, or would miss it for good.
AFTER = ("on_step_end", "on_validation_end", "on_epoch_end")
SAVES = ("state_dict", "load_state_dict")
STEP = ("on_step_start", "on_micro_end", "on_before_optimizer_step", "on_step_end")  # a part of each update


def overridden(callback: Callback) -> set[str]:
    """Return the hooks that this callback overrides, in its class or on the instance, and does not leave idle."""
    functions = {hook: getattr(getattr(callback, hook), "__func__", None) for hook in HOOKS}
    return {hook for hook, function in functions.items() if function not in (getattr(Callback, hook), *callback.idle_hooks)}


def check(callbacks: Iterable[Callback]) -> None:
    """Refuse what could only go wrong later: no callback, a misspelt hook, state saved only, shared keys or settings."""
    keys: dict[str, Callback] = {}
    owners: dict[str, Callback] = {}
    for callback in callbacks:
        name = type(callback).__name__
        if not isinstance(callback, Callback):
            hint = f"; write {callback.__name__}(...)" if inspect.isclass(callback) else ""
            raise TypeError(f"callbacks holds {callback!r}, which is no Callback instance{hint}")
        for attribute in dir(callback):
            if attribute.startswith("on_") and attribute not in HOOKS and callable(getattr(callback, attribute)):
                near = ELSEWHERE.get(attribute) or (difflib.get_close_matches(attribute, HOOKS, 1, 0) or HOOKS)[0]
                raise TypeError(f"{name}.{attribute} is no hook and would never run; the closest hook is {near}")
        if isinstance(callback.owns, str) or any(o.isidentifier() and o not in OWNED for o in callback.owns):
            raise ValueError(f"{name}.owns must be a tuple of names among {', '.join(OWNED)}, not {callback.owns!r}")
        for hook in overridden(callback):
            if inspect.iscoroutinefunction(getattr(callback, hook)) or inspect.isgeneratorfunction(getattr(callback, hook)):
                raise TypeError(f"{name}.{hook} is async or a generator, so calling it would run nothing; write a plain def")
            try:
                inspect.signature(getattr(callback, hook)).bind(None)
            except TypeError as error:
                raise TypeError(f"{name}.{hook} must take one argument, state: {error}") from None
        lacks = [m for m in SAVES if getattr(getattr(callback, m), "__func__", None) is getattr(Callback, m)]
        if len(lacks) == 1:
            raise TypeError(f"{name} overrides one of {' and '.join(SAVES)} alone, so a resumed run would begin its state anew; "
                            f"write {lacks[0]} too")  # fmt: skip
        if keys.get(callback.key) is callback:
            raise ValueError(f"the same {name} stands in callbacks twice")
        if callback.key in keys:
            raise ValueError(f"two callbacks have the key {callback.key!r}; name one: {name}(...).named('second')")
        keys[callback.key] = callback
        for setting in callback.owns:
            if setting in owners:
                first = type(owners[setting]).__name__
                raise ValueError(f"{first} and {name} both own {'state.' * (setting in OWNED)}{setting}; keep one of them")
            owners[setting] = callback


def table(callbacks: Iterable[Callback]) -> dict[str, tuple[Method, ...]]:
    """Return hook -> the methods that override it, in list order; built once, so an unused hook costs nothing."""
    return {hook: tuple(getattr(c, hook) for c in callbacks if hook in overridden(c)) for hook in HOOKS}


def note(error: BaseException, method: Any, hook: str, step: int) -> None:
    """Say in which callback's hook an error arose."""
    say(error, f"in {type(getattr(method, '__self__', None)).__name__}.{hook} at step {step}")


class Timed:
    """A hook's method that adds up the seconds it takes, evaluations aside."""

    def __init__(self, method: Any, hook: str) -> None:
        self.method, self.__self__, self.spent = method, getattr(method, "__self__", None), 0.0
        self.name = f"{getattr(self.__self__, 'key', 'a callback')}.{hook}"

    def __call__(self, state: State) -> Any:
        """Run it."""
        start = time.perf_counter()
        answer = self.method(state)
        self.spent += 0.0 if state._evaluating else time.perf_counter() - start
        return answer


class Dispatch:
    """Runs the hooks of a Loop's callbacks."""

    state: State
    callbacks: tuple[Callback, ...]
    hooks: dict[str, tuple[Method, ...]]
    measure: Callable[[Any], int]
    warned: set[Any]
    sampling: tuple[float, dict[str, tuple[Method, ...]]] | None = None  # since when an update is timed, and the plain hooks
    slow: tuple[str, ...] = ()  # in the last sample

    def sample(self) -> None:
        """Time the hooks of some updates, and warn, once each, of what was slow in two of them running."""
        step, sampling = self.state.step, self.sampling
        if sampling is None:
            if step % 97 != 96 and step not in (8, 16):  # a prime, which meets nobody's interval time and again
                return
            self.sampling = time.perf_counter(), self.hooks
            self.hooks = {hook: tuple([Timed(method, hook) for method in self.hooks[hook]]) for hook in self.hooks}
            return
        took = time.perf_counter() - sampling[0]
        all_timed = [timed for hook in STEP for timed in self.hooks[hook] if isinstance(timed, Timed)]
        found = {timed.name: timed.spent for timed in all_timed if timed.spent > max(0.005, 0.2 * took)}
        before, self.hooks, self.sampling, self.slow = self.slow, sampling[1], None, tuple(found)
        for name in (set(before) & found.keys()) - self.warned:  # logged: an error where warnings are errors would be too much
            self.warned.add(name)
            log.warning("%s takes %.0f%% of an update's %.0f ms; call it less often, or keep what it computes on the device, "
                        "without .item()", name, 100 * found[name] / took, 1000 * took)  # fmt: skip

    def _run(self, hook: str) -> bool:
        state, answered, first = self.state, False, None
        for method in self.hooks[hook]:
            try:
                if method(state):
                    answered = True
            except BaseException as error:
                note(error, method, hook, state.step)
                if hook not in AFTER:
                    raise
                if first is None:
                    first = error
                else:
                    say(first, f"then, in the same hook: {type(error).__name__}: {error}")
        if first is not None:
            try:
                raise first
            finally:
                first = None  # its traceback holds this frame: a cycle would keep the Loop, and its workers
        return answered

    def _plan(self) -> None:
        """Let callbacks plan the next update; refuse a plan that can't be, or that its callback does not own."""
        state, before = self.state, self._plan_fields()
        state.least_micros = 1
        self._run("on_step_start")
        if (after := self._plan_fields()) == before:
            return
        for name, value, old in zip(PLAN, after, before, strict=True):
            if value != old:
                whole(f"state.{name}", value, 1, none=name != "accumulate")
                if name != "micro_batch_size" and not any(name in callback.owns for callback in self.callbacks):
                    raise ValueError(f"state.{name} was set to {value!r} by a callback that does not name it in owns, so that "
                                     f"state.total_steps ({state.total_steps}) is wrong: owns = ({name!r},)")  # fmt: skip

    def _plan_fields(self) -> tuple[Any, ...]:
        return self.state.batch_size, self.state.accumulate, self.state.micro_batch_size

    def redoes(self, error: Exception, size: int | None, training: bool = True) -> bool:
        """Ask every callback about a failed forward and backward of `size` samples, or a failed update (None)."""
        if not self.hooks["on_exception"]:
            return False
        before, self.state.exception = (self.state.exception, self.state.micro), error  # a hook may evaluate
        self.state.micro = None if size is None else MicroEnd(None, {}, size, None, training, 0, size)
        try:
            return self._run("on_exception")
        except Exception as problem:  # the first error wins
            places = "; ".join(getattr(problem, "__notes__", ()))
            say(error, f"then, while handling it: {type(problem).__name__}: {problem} ({places})")
            return False
        finally:
            self.state.exception, self.state.micro = before

    def micro_end(self, chunk: Chunk, batch: Any, outputs: dict[str, Any], weight: Any, number: int, training: bool,
                  share: Any = None, split: str = "train") -> None:  # fmt: skip
        """Show callbacks one micro-batch that went through."""
        size = chunk.size if chunk.size is not None else self.measure(chunk.data)
        index = None if chunk.index is None or len(chunk.index) != size else chunk.index  # a collate_fn may leave some out
        before = self.state.micro
        self.state.micro = MicroEnd(batch, outputs, weight, index, training, number, size, share, split)
        try:
            self._run("on_micro_end")
        finally:
            self.state.micro = before  # a hook that evaluates is inside another one's
