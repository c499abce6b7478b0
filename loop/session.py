"""What surrounds a Loop's steps: it is built and checked, entered and restored, saved, left with everything closed."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import sys
import time
import weakref
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from . import batch as batches
from . import rng
from .alike import as_longest, check_alike, given
from .around import check_around
from .callback import Callback
from .checks import autocast_context, check_loader, check_optimizer, check_parameters, flag, refuse, say, whole
from .chunk import Chunk
from .dispatch import check, note, table
from .epoch import announce, open_data
from .exchange import follow
from .feed import Feed
from .forward import Forward
from .guards import check_noise, check_trained, modes_of, to_train
from .mean import Mean
from .plan import count_steps, update_samples
from .ranks import Ranks
from .redo import Snapshot
from .resume import restore
from .saves import Saves
from .state import State
from .step import Step
from .store import Named
from .wants import decide
from .wrapped import check_shared, unsaved_buffers, wrapping

log = logging.getLogger("hookloop")


class Session(Saves, Forward):
    """What `with loop:` opens and closes, and what the verbs of `Loop` stand on."""

    alive: ClassVar[weakref.WeakSet[Session]] = weakref.WeakSet()  # what a GAN's other Loop trains is not forgotten here

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, callbacks: Iterable[Callback] = (), *,
                 resume: str | os.PathLike[str] | None = None,
                 autocast: torch.dtype | Callable[[], contextlib.AbstractContextManager[Any]] | None = None,
                 scaler: torch.amp.GradScaler | None = None, weigh: Callable[[Any], float | Tensor] | None = None,
                 cut: batches.Cut | None = None, size: Callable[[Any], int] | None = None,
                 max_skips: int = 100, strict: bool = True) -> None:  # fmt: skip
        check_optimizer(optimizer)
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
        whole("max_skips", max_skips, 1, none=False)
        flag("strict", strict)
        for name, value in (("weigh", weigh), ("cut", cut), ("size", size)):
            if value is not None and not callable(value):
                raise TypeError(f"{name} must be a function, not {value!r}")
        if scaler is not None and not hasattr(scaler, "is_enabled"):
            raise TypeError(f"scaler must be a torch.amp.GradScaler, not {scaler!r}")
        if not isinstance(callbacks, Iterable | Callback):
            raise TypeError(f"callbacks must be a list of callbacks, not {callbacks!r}")
        self.callbacks = tuple(callbacks) if not isinstance(callbacks, Callback) else (callbacks,)
        check(self.callbacks)
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.state = State(model, optimizer, scaler if scaler is not None and scaler.is_enabled() else None, device=device)
        self.state.ranks, self.state.strict = Ranks.of(model), strict
        self.state.rank, self.state.world = self.state.ranks.rank, self.state.ranks.world
        self.stand_in: Chunk | None = None  # for a rank whose data have ended
        self._more = False  # whether any rank has data for another step
        self.had = set[Tensor]()  # parameters that had a gradient
        self.hooks = table(self.callbacks)
        self.autocast = self.state.autocast = autocast_context(autocast, device)
        self.weigh, self.max_skips, self.resume = weigh, max_skips, resume
        self.size = batches.size if size is None else batches.counted(size)
        self.measure = functools.partial(batches.measure, weigh=weigh, by=self.size)
        self.cut = None if cut is None else batches.complete(cut, self.measure)
        self.feed, self.train_loss = Feed(self.cut, self.measure, strict), Mean()
        self.feed.ranks, self.feed.rereads = self.state.ranks.count, self.state.ranks.together
        self.seed: int | None = None
        self.promised: int | None = None  # samples of an update, by the checkpoint
        self.given = given(self.callbacks)
        self.wrapping: set[Any]  # what shares the model between ranks
        self.settings: list[dict[str, Any]]  # of the parameter groups, as the program gave them
        self.given_buffers: dict[str, Tensor]  # and the buffers that the state dict leaves out
        self.streams: rng.Streams | None = None
        self.rng_to_restore: dict[str, Any] | None = None
        self.rng_kept: dict[str, Any] | None = None  # the same once restored, until its epoch goes on
        self.modes: dict[nn.Module, bool] = {}  # of the model's modules while it trains
        self.warned = set()
        self._constants: dict[Any, Tensor] = {}
        self._step: Step | None = None
        self._skips = 0
        self.optimizer_steps = 0
        follow(weakref.ref(self), self.state)
        self.arranged = False  # whether DDP's buckets are as they stay
        self.proven = 0  # the largest micro-batch that went through on all ranks
        self._was_set_up = self._entered = self._begun = self._over = False
        self._phase = ""  # of the epoch: '' outside, 'inside', then 'exhausted' or 'left' before its data ended
        self._pass: object = None
        for callback in self.callbacks:  # last: a construction that failed keeps none
            if callback._used or (callback._loop is not None and callback._loop() is not None):
                raise ValueError(f"{type(callback).__name__} belongs to another Loop; callbacks keep state, make a new one")
        for callback in self.callbacks:
            callback._loop = weakref.ref(self)
        self.alive.add(self)

    def __enter__(self) -> Self:
        if self._entered:
            raise RuntimeError("this Loop is entered already")
        self._check_whole()
        state = self.state
        self._entered, self._begun, self._step, self._end, self._phase = True, False, None, (None, None), ""
        self._over = False
        state.since, state.stop_reason, state._leave_at, state._leave_reason = time.monotonic(), None, math.inf, ""
        state._stop, state._due = None, []
        state.drop_factors()
        if state.scaler is not None:  # an error between unscaling and the update would leave it marked as unscaled
            state.scaler._per_optimizer_states.pop(id(state.optimizer), None)
        try:
            state.ranks.enter()
            if not self._was_set_up:
                for callback in self.callbacks:
                    callback._used = True
                check_parameters(state.model, state.optimizer)
                state.writers, state.checks, state.before, state.after, state.accepts = [], [], [], [], []  # of one that failed
                state.before_save = []
                state.exchanged = [functools.partial(follow, weakref.ref(self))]
                self._run("on_setup")
                self.settings, self.wrapping = Named(state.model, state.optimizer).options(), wrapping(state.model)
                self.given_buffers = unsaved_buffers(state.model)
                if self.resume is not None:
                    restore(self, self.resume, state.strict)
                self._was_set_up = True
            acts, state.at_enter = state.at_enter, []
            for act in acts:
                act()
            decide(state, "enters `with loop:`")  # a stop that stands from before stands for all
            self._before_forward()
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise
        return self

    def _begin(self, loader: Any) -> None:
        """Do, once per entry, what must wait until data and end are known."""
        if self._begun:
            return
        if not self._entered:
            raise RuntimeError("this must run inside `with loop:`")
        state, self._begun = self.state, True
        state.loader, state.total_steps, state.epoch_samples = loader, None, None
        check_alike(self)
        if loader is None:
            check_around(self.callbacks)
            if state.step and state.step == self._saved_at:
                log.warning(
                    "resumed after %d updates: in a loop of your own the place in its data is yours to find", state.step
                )
        else:
            check_loader("train_loader", loader)
            if not state.model.training:
                to_train(state.model)
        self.modes = modes_of(state.model)
        if loader is not None:
            state.total_steps = count_steps(self.callbacks, state, *self._end, self.size)
            as_longest(state)
            self.feed.attach(loader)
            self._check_promised()
        if state.seed is not None:
            self.seed = state.seed
        elif self.seed is None:  # one draw, as iterating a DataLoader makes, says this run's order
            with rng.isolated(state.device) if loader is None else contextlib.nullcontext():  # that stream is the user's alone
                drawn, own = int(torch.empty((), dtype=torch.int64).random_()), getattr(loader, "generator", None)
            self.seed = own.initial_seed() if isinstance(own, torch.Generator) else drawn
            self.seed = state.ranks.exchange("begins training", self.seed)[0]
        if state.seed is not None:
            check_noise(self)
            self.streams = rng.Streams(rng.derive(state.seed, "step", state.rank), state.device)
        if loader is not None and self.snapshot is None and (self.hooks["on_exception"] or state.keep_buffers):
            self.snapshot = Snapshot(state, self.streams is not None)
        resumed = self.rng_to_restore is not None or self.rng_kept is not None  # what is drawn here, that run had drawn before
        with rng.isolated(state.device) if resumed else contextlib.nullcontext():
            self._run("on_fit_start")
        if loader is None:  # else before each epoch
            check_trained(self)
            if state.ranks.together:
                check_shared(state)

    def _check_promised(self) -> None:
        """Refuse, once after a restore, updates of another size than the checkpoint's run would make here."""
        promised, self.promised = self.promised, None
        here = None if promised is None else update_samples(self.callbacks, self.state)
        count = self.state.ranks.count
        if here is not None and promised is not None and here * count != promised:
            remedy = f"; give each of {count} ranks {promised / count:g}" if promised % count == 0 else (
                f"; take a number of ranks that divides {promised}")  # fmt: skip
            refuse(f"an update holds {here * count} samples here and {promised} in the checkpoint's run (ranks times batch size "
                   f"times accumulation){remedy if count > 1 else ''}", self.state.strict)  # fmt: skip

    def _open_epoch(self, loader: Any) -> None:
        """Bring the loader to where the run stands."""
        if not self._entered or self._end == (None, None):
            raise RuntimeError("loop.steps must run inside `with loop:` and `for epoch in loop.epochs(...)`")
        self._begin(loader)
        self._check_closed()
        if self._phase:
            raise RuntimeError("a second loop.steps in one epoch: each loop.epochs gives one pass over the loader")
        if self.feed.epoch != self.state.epoch:
            self.train_loss = Mean()
        announce(self, loader)  # before workers, or a batch read ahead, hold what it changes in the data
        open_data(self, loader)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        problems: list[BaseException] = []

        def attempt(act: Callable[[], Any], hook: Any = None) -> None:
            try:
                act()
            except BaseException as problem:
                problems.append(problem)
                if hook is not None:
                    note(problem, hook, "on_fit_end", self.state.step)

        if error is None:
            attempt(self._check_closed)
        if error is None and not problems:  # after an error, not every callback's hook has run: the last save stands
            attempt(self._save_and_leave)
        if error is not None or problems:
            self.state.ranks.fail(error or problems[0])
        self.state._saves, self.state._due = [], []
        if error is None and not problems and self.state.step and self.state.reported_at < 0:
            for who, name in ((type(c).__name__, name) for c in self.callbacks for name in c.watches):
                log.warning("%s watched %r, but nothing was reported in %d updates, so it did nothing: the run ended before "
                            "a validation, or loop.validate was never called", who, name, self.state.step)  # fmt: skip
        for method in self.hooks["on_fit_end"]:
            attempt(functools.partial(method, self.state), method)
        if self._step is not None and not self._step.updated:
            self.feed.again = self._step.chunks  # entered again, the run goes on with this very step
            self._torn |= self.state.ranks.sharded  # fully_shard adds up a step's gradients where nobody can clear them
            attempt(functools.partial(self._step.fail, None))
            self._step.release()
        if error is not None and self.feed.blames(error):
            say(error, f"after step {self.state.step}")
        attempt(self.feed.detach)
        self._entered, self._step, self.state.micro = False, None, None
        self.state.spent, self.state.since = self.state.seconds, None
        first = error
        if first is None and not problems:
            attempt(lambda: self.state.ranks.agree("leaves `with loop:`"))  # whether all could
        acts, self.state.at_exit = self.state.at_exit, []
        for act in acts[::-1]:
            attempt(functools.partial(act, error or next(iter(problems), None)))
        for problem in problems:
            if first is None:
                first = problem
            elif problem is not first:
                say(first, f"then, while ending: {type(problem).__name__}: {problem}")
        if first is not None:
            self.state.ranks.fail(first)
        if isinstance(first, Exception) and self.state.saved is not None:
            say(first, f"the last checkpoint is {self.state.saved}")
        if error is None and first is not None:
            raise first

    def _save_and_leave(self) -> None:
        decide(self.state, "leaves `with loop:`")
        self._save_last()
        self._flush()

    def _check_closed(self) -> None:
        if self._step is not None and not self._step.updated:
            self.feed.again, self._step = self._step.chunks, None
            raise RuntimeError("a step was left before loop.update(): each `for step in loop.steps(loader)` must end with "
                               "it, and a break may only follow it")  # fmt: skip
