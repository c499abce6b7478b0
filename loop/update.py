"""The end of a step: gradients final, the optimizer's update under its rates, what was applied or skipped counted."""

from __future__ import annotations

import traceback
from typing import Any

from torch import Tensor

from .checks import say
from .redo import BeforeUpdate
from .rng import Streams
from .session import Session
from .step import Step
from .wants import decide
from .wrapped import check_gradients


class Updates(Session):
    """What `loop.update` and `loop.updating` share."""

    def _gradients_final(self, any_backward: bool, reads: bool = False) -> bool:
        """Unscale, let callbacks see and scale the gradients; return whether the update is to be applied.

        `reads`: tell the other ranks, on the way, whether this one has data for another step.
        """
        state, together = self.state, self.state.ranks.together
        if state.scaler is not None and any_backward:
            state.scaler.unscale_(state.optimizer)
            verdicts = state.scaler._found_inf_per_device(state.optimizer).values()
            if any([verdict.tolist() for verdict in verdicts]):  # the one read that GradScaler.step makes anyway
                state.skip("the scaler found gradients that are not finite")
            decide(state, "applies an update")
        if together and any_backward:
            check_gradients(state, self.had)
        alone = together and state.scaler is None and any_backward  # nobody knows yet of a skip that this rank wants
        if state._skip is None or alone:  # and in these hooks all may have to compute together, as a sharded gradient's norm
            state._grad_norm, state._grads_open = None, True
            if self.hooks["on_before_optimizer_step"]:
                self._run("on_before_optimizer_step")
        if together:
            more = reads and self._read_unless_leaving(self.feed.more, True)
            self._more = any(row[0] for row in decide(state, "applies an update", more))
        if state._skip is None:
            state.apply_gradient_factors()
            for check in state.checks:
                check(state)
        if (skipped := state._skip) is not None:
            state.drop_factors(ask=True)
        return skipped is None

    def _updated(self, step: Step) -> bool:
        """Run the optimizer's step; return whether it is done, or was put back to be repeated."""
        state = self.state
        kept = BeforeUpdate(state) if state.keep_before_update else None
        step.updated = True
        if self.streams is not None:  # an optimizer may draw too
            self.streams.begin(state.step + state.skipped, Streams.UPDATE)
        try:
            state.runner.update(self)
            return True
        except BaseException as error:
            if kept is not None and isinstance(error, Exception) and self.redoes(error, None):
                traceback.clear_frames(error.__traceback__)
                kept.put_back()
                return False
            self._cut_off(error)
            raise

    def _cut_off(self, error: BaseException) -> None:
        """Have nobody go on behind an update that an error cut off."""
        self._torn = True
        say(error, "in the optimizer's step, which can't be redone: weights may be half updated; go on from the last "
                       "checkpoint")  # fmt: skip

    def _count(self, samples: int, metrics: dict[str, Any], weight: float | Tensor) -> None:
        state = self.state
        state.step += 1
        state.samples += samples
        state.skip_reason, self._skips = None, 0
        state.given(metrics)
        state.of_update.update(metrics)
        if "loss" in metrics:
            self.train_loss.add(metrics["loss"], weight)
        try:
            if self.hooks["on_step_end"]:
                self._run("on_step_end")
        finally:
            for act in state.after:
                act(state)
        if state._saves or state._due:
            try:
                if self._phase == "inside" and self.stopped and not state.leaving:
                    self.feed.more()  # as steps does next: whether the epoch has ended belongs to what is saved
            finally:
                self._flush()

    def _count_skipped(self, samples: int) -> None:
        state, self._skips = self.state, self._skips + 1
        state.skipped += 1
        state.samples += samples
        if self._skips >= self.max_skips:
            raise RuntimeError(f"{self._skips} updates in a row were skipped (max_skips={self.max_skips}); the last "
                               f"because {state.skip_reason}")  # fmt: skip
