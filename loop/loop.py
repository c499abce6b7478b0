"""The loop: `fit`, the verbs that it is written on, and `updating` for a loop that already exists.

One update, in order, with the hooks where they run:

    steps    on_step_start; saves asked for are written; the update's data is gathered
    step     gradients cleared; the data cut into micro-batches and weighed
    micro    streams seeded; batch moved; forward, backward; on_micro_end
             (an error: on_exception, and where one answers True, all from "gradients cleared" again)
    update   gradients unscaled; on_before_optimizer_step; gradient factors applied; rate factors applied;
             streams seeded; optimizer.step; rates put back; scaler.update; counted; on_step_end; saves asked for are written
             (a skipped update: nothing after the decision but scaler.update and its count)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from .around import check_rates, given, left_out, moved
from .checks import check_end, check_loader, check_validation, whole
from .evaluate import evaluate
from .guards import left_in_eval, warn_once
from .mean import Mean
from .rng import restore
from .saves import log
from .state import State
from .step import Step
from .update import Updates
from .wants import decide


class Loop(Updates):
    """Trains `model` with `optimizer`, running callbacks at every hook; see `fit`, or write the loop by hand.

    `autocast`: a dtype, or a function giving a context, for forward only. `scaler`: a `torch.amp.GradScaler`.
    `weigh(batch)`: what a micro-batch's mean loss is a mean over, a number or 0-d tensor (default: its samples, the
    first dimension of its first tensor); called on the batch as the loader yields it. `cut(batch, start, stop)`: for
    batches that hookloop can't cut; no two are then joined. `size(batch)`: how many samples a batch holds, where that is not
    the first dimension of its first tensor (a tuple of images, time before samples). `resume`: a checkpoint, or a folder of
    them: the newest good one, a fresh start if there is none; with `strict=False` what fits, and a warning that lists the
    rest. `max_skips`: skipped updates in a row that end the run. Raises TypeError or ValueError for what could only go
    wrong later: an optimizer that needs a closure, callbacks that share a key or a setting, a misspelt hook.
    """

    def fit(self, loss_fn: Callable[[nn.Module, Any], Any], train_loader: Iterable[Any], val_loader: Any = None, *,
            epochs: int | None = None, steps: int | None = None, validate_every: int | None = None) -> State:  # fmt: skip
        """Train until `epochs` passes or `steps` updates are done (counted from the run's first) and return the state.

        `loss_fn(model, batch)` returns the mean loss, or a mapping with "loss". A model whose root is in eval mode is
        put into train mode. Validation runs at each epoch's end, or every `validate_every` updates instead.
        """
        whole("validate_every", validate_every, 1)
        check_end(epochs, steps)
        check_loader("train_loader", train_loader)
        check_validation(self.callbacks, val_loader)

        def validate_if_due() -> None:
            step = self.state.step
            if validate_every is not None and step and step % validate_every == 0 and self.validated_at != step:
                self.validate(loss_fn, val_loader)

        with self:
            epochs_left = self.epochs(epochs, steps=steps)
            self.begin(train_loader)
            self.feed.constant = True
            validate_if_due()  # a checkpoint falls between an update and its validation
            for _ in epochs_left:
                for step in self.steps(train_loader):
                    for micro in step:
                        with micro:
                            micro.backward(loss_fn)
                    self.update()
                    validate_if_due()
                if validate_every is None:
                    self.validate(loss_fn, val_loader)
        return self.state

    def begin(self, loader: Iterable[Any]) -> None:
        """Do what the first `loop.steps(loader)` does before it reads; by hand, to make up for a validation that was cut off."""
        if self._end == (None, None):
            raise RuntimeError(
                "loop.begin must run inside `with loop:`, after loop.epochs was called, which says the run's end"
            )
        self._begin(loader)
        self._put_back_streams()

    def epochs(self, count: int | None = None, *, steps: int | None = None) -> Iterator[int]:
        """Yield epoch numbers until `count` passes or `steps` updates are done, both counted from the run's first."""
        check_end(count, steps)
        if not self._entered:
            raise RuntimeError("loop.epochs must run inside `with loop:`")
        self._end = (count, steps)
        return self._epochs()

    def _put_back_streams(self) -> None:
        """Have what the program draws from here on go on as in the run that was saved."""
        if self.rng_to_restore is not None:
            restore(self.rng_to_restore, self.state.device)
            self.rng_kept, self.rng_to_restore = self.rng_to_restore, None

    def _epochs(self) -> Iterator[int]:
        self._put_back_streams()
        while (self._goes_on("ends an epoch") or self._may_validate) and (
            self._end[0] is None or self.state.epoch < self._end[0]
        ):
            self._phase = ""
            yield self.state.epoch
            self._check_closed()
            if self._phase == "inside":  # left by a break, the generator still held somewhere
                self._phase, self._pass = "left" if self.stopped else "exhausted", None
            if self._phase == "exhausted":
                self.state.epoch += 1
                self._run("on_epoch_end")
                self._flush()
            elif not self.stopped:
                raise RuntimeError("an epoch went by without a step: iterate loop.steps(loader) in each (of two Loops in one zip, "
                                   "with strict=True: else the second is not asked where the first has no step left)")  # fmt: skip
        self._over = True

    @property
    def _may_validate(self) -> bool:
        """Whether a run that its `steps=` end is entered where its epoch may be at its end, and the validation cut off."""
        state, feed = self.state, self.feed
        cut_off = not (self._phase or state.leaving or state.stop_reason) and feed.epoch == state.epoch
        return cut_off and all(row[0] for row in decide(state, "ends an epoch", feed.left is None and not feed.again))

    def steps(self, loader: Iterable[Any]) -> Iterator[Step]:
        """Yield the steps of one epoch, each with one update's data, to end with `loop.update()`; a break ends the epoch."""
        state, feed, together = self.state, self.feed, self.state.ranks.together
        self._pass = this = object()
        try:
            self._open_epoch(loader)
            self._phase = "inside"
            while not self.stopped:
                if state._saves:  # what was asked for since the update, before anything else is read
                    self._flush()
                if not (self._more if together else feed.more()):
                    break
                if self.hooks["on_step_start"]:
                    self._plan()
                if state._saves:
                    self._flush()
                plan = state.batch_size, state.accumulate
                chunks = self._read_unless_leaving(feed.gather, [], *plan) if together else feed.gather(*plan)
                self._step = step = Step(self, chunks)
                if not step.begin():
                    break
                yield step
                if not step.updated:
                    self._check_closed()
                self._check_whole()
            if state.leaving:  # at once: what the user's program does after this may take long
                self._save_last()
            if state._saves or state._due:
                self._flush()
            self._phase = "left" if state.leaving or (self._more if together else feed.more()) else "exhausted"
        except Exception as error:
            if not (feed.failed and state.leaving):
                raise
            self._phase = "left"  # the signal that asks to leave may have ended the loader's workers too
            log.warning("reading data failed while leaving (%s): %r", state.stop_reason, error)
        except GeneratorExit:
            if self._pass is this:
                ended = self._step is not None and self._step.updated and not self.stopped
                self._phase = "exhausted" if ended else "left"
            raise

    def update(self) -> None:
        """Apply the step's gradients under this update's rates, or skip it; callbacks hear of what was applied."""
        step, state = self._step, self.state
        if step is None or step.updated:
            raise RuntimeError("loop.update() without a step: it runs once in each `for step in loop.steps(loader)`")
        if not step.complete:
            raise RuntimeError("loop.update() before every micro-batch went backward: `for micro in step` must run to its end")
        step.check_untouched()
        applied = self._gradients_final(bool(step.done), reads=True)
        if applied:
            before = state.apply_rates()
            try:
                while not self._updated(step):
                    pass
            finally:
                state.restore_rates(before)
        applied = self._settle(applied)
        step.updated = True  # not before: a hook that raises leaves a step to be done again
        if state.scaler is not None and step.done:
            state.scaler.update()
        means = step.release()
        if applied:
            self._count(step.size, means, step.weight)
        else:
            self._count_skipped(step.size)

    @contextlib.contextmanager
    def updating(self, loss: Tensor | float | None = None, samples: int = 0) -> Iterator[None]:
        """Run callbacks around `optimizer.step()` in a loop of your own; `loss` is what TensorBoard and others show.

        Several ranks must come here equally often: one whose data end earlier is waited for, until the group's timeout.
        A scheduler of yours steps after it: inside, rates hold this update's factors, and changing them is a RuntimeError.
        A resumed run has all but the place of such a scheduler and that in the data, which `state.step` and `state.samples` tell.
        With `scaler=` gradients are unscaled first. A skipped update takes the gradients away (`p.grad = None`), so
        that the optimizer's step does nothing.
        """
        if self._phase == "inside":
            raise RuntimeError("loop.updating inside loop.steps would apply the step twice; loop.update() applies it")
        shown = given(loss, samples)
        self._check_whole()
        self._begin(None)
        left_in_eval(self)
        self.state.given_loss = shown.get("loss")
        if self.state._saves:  # before this update changes what they are to hold
            self._flush()
        if applied := self._gradients_final(True):
            optimizer, before = self.state.optimizer, self.state.apply_rates()
            stood = moved(optimizer, self.optimizer_steps)
            try:
                try:
                    yield
                except BaseException as error:
                    if moved(optimizer, self.optimizer_steps) != stood:
                        self._cut_off(error)
                    self.state.ranks.fail(error)  # whoever catches it is an update apart from the others
                    raise
                if before is not None:
                    check_rates(self.state)
            finally:
                self.state.restore_rates(before)
            if moved(optimizer, self.optimizer_steps) == stood and hasattr(optimizer, "_optimizer_step_post_hooks"):
                warn_once(self, "idle", "the optimizer made no step inside `with loop.updating():`, which counts an update all "
                                        "the same; call optimizer.step() there (a GradScaler goes to Loop(scaler=))")  # fmt: skip
        else:
            with left_out(self.state.optimizer):
                yield
        if self._settle(applied):
            self._count(samples, shown, samples or 1)
        else:
            self._count_skipped(samples)
        self._goes_on("applies an update")
        self._before_forward()

    def evaluate(self, loss_fn: Callable[[nn.Module, Any], Any], loader: Any) -> dict[str, float]:
        """Return `val_loss` and `val_<name>` over a loader, `val_<loader>_<name>` over a mapping of loaders."""
        return self._evaluate(loss_fn, loader) or {}

    def _evaluate(self, loss_fn: Callable[[nn.Module, Any], Any], loader: Any,
                  may_leave: bool = False) -> dict[str, float] | None:  # fmt: skip
        found: dict[str, float] = {}
        if isinstance(loader, Mapping):
            self.state.ranks.alike("ends an evaluation", {"the order of the validation loaders": [*loader]})
        for name, one in loader.items() if isinstance(loader, Mapping) else (("", loader),):
            part = evaluate(self, loss_fn, one, f"val_{name}_" if name else "val_", may_leave)
            if part is None:
                return None
            if twice := sorted(found.keys() & part.keys()):
                raise ValueError(f"the validation loader {name!r} gives {twice[0]!r}, and so does one before it: rename a loader, "
                                 "or what loss_fn returns")  # fmt: skip
            found |= part
        return found

    def validate(self, loss_fn: Callable[[nn.Module, Any], Any], loader: Any = None) -> None:
        """Evaluate and report; without a loader report the epoch's mean `train_loss`; nothing once stopped inside."""
        self._check_closed()
        self._goes_on("evaluates")
        if self.state.leaving:
            self._phase = "left"  # entered again, or resumed, the run validates here
        if self._phase == "left" or (self._phase == "inside" and self.state.stop_reason is not None):
            return
        if loader is None:
            found: dict[str, Any] | None = {"train_loss": self.state.ranks.means({"": self.train_loss})[""]}
            if self.state.loader is None:  # around a loop of the user's own nothing else tells where an epoch begins
                self.train_loss = Mean()
        else:
            found = self._evaluate(loss_fn, loader, may_leave=True)
        if found is None:
            self._phase = "left"
        else:
            self.validated_at = self.state.step
            self.report(found)

    def report(self, metrics: Mapping[str, Any]) -> None:
        """Put metrics (single numbers) into `state.metrics` as floats and tell callbacks."""
        state = self.state
        if not (self._entered and (self._begun or self._over or self.stopped)):
            raise RuntimeError("loop.report before the first loop.steps or loop.updating; loop.evaluate may run at any time")
        if state.loader is not None and state.leaving:  # as in validate
            self._phase = "left"
            return
        self.rng_kept = None  # what callbacks draw from here on stands
        state.report(metrics)
        state.metrics |= state.ranks.averaged({name: state.metrics[name] for name in sorted(state.reported)})
        if not self._begun:  # of a run that had ended before callbacks, which heard of no start, have heard all
            return
        self._run("on_validation_end")
        if state.loader is None:  # around a loop of the user's own the next forward may change buffers
            self._written, self._saved_at = {}, -1  # none of these saves holds what callbacks made of the report
            self._goes_on("reports")
            self._flush()
