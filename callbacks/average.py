"""Average: an average of the weights, which validation uses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn, get_swa_multi_avg_fn

from ..loop.callback import Callback
from ..loop.depth import bare
from ..loop.state import State
from ..loop.store import Named
from .averaged import check, first_argument, measure, take_in, to_measure
from .model_copy import carried, check_whole, copied, fits, paired


class Average(Callback):
    """Keeps an average of the weights, validates with it, and leaves the training of the weights themselves alone.

    `kind`: "ema", exponential with `decay`, or "swa", the mean of all since `start`; taken after each `every`-th applied
    update from update `start` on (below 1: a share of the run). `batch_norm`: "average" treats running statistics as weights,
    "measure" sends the update's last micro-batch through the averaged model by `forward(model, batch)` (`model(batch[0])`);
    norms in eval mode while training, other buffers and modules' extra states are copied; plain attributes stay as they were
    at the first, so what is annealed belongs into a buffer. Of weights of fewer than 4 bytes the mean is taken in float32, and
    rounded. `model` is the averaged model, None before the first; EarlyStopping keeps and restores what was validated, so
    averaged weights. A checkpoint holds them in `state.pt`, as `["callbacks"]["Average"]["model"]`: its `model.pt` is what
    trains on. Raises ValueError for bad settings and unknown ends.
    (Polyak and Juditsky 1992; Izmailov et al. 2018, https://arxiv.org/abs/1803.05407)
    """

    owns = ("validated weights",)

    def __init__(self, kind: str = "ema", decay: float = 0.999, *, start: float = 0, every: int = 1,
                 batch_norm: str = "average", forward: Callable[[nn.Module, Any], Any] | None = None) -> None:  # fmt: skip
        check(kind, decay, start, every, batch_norm, forward)
        self.kind, self.start, self.every, self.count = kind, start, every, 0
        self.batch_norm, self.forward = batch_norm, forward or first_argument
        self.model: nn.Module | None = None
        self._named: Named | None = None
        self._wide: dict[str, Tensor] = {}  # the means that the averaged model, of a type of few bits, holds rounded
        self._average = get_ema_multi_avg_fn(decay) if kind == "ema" else get_swa_multi_avg_fn()
        self._batch: tuple[int, Any] = -1, None  # the update's last, and which try of an update it was
        self._saved: dict[str, Any] | None = None
        self._from: int | None = start if isinstance(start, int) else None

    def on_setup(self, state: State) -> None:
        """Go back with the weights, where they go back: it is not to hold any that were given up."""
        check_whole(state.model)
        state.at_enter.append(lambda: self._go_on(state))  # an evaluation may come before on_fit_start

        def put(saved: dict[str, Any]) -> None:
            self.count, self._wide = saved["count"], saved.get("wide", {})
            if saved["model"] is None:
                self.model = self._named = state.eval_model = None
            elif self._named is not None:
                self._named.load_model(saved["model"])

        state.along[self.key] = self.state_dict, put

    def on_fit_start(self, state: State) -> None:
        """Turn a share into updates."""
        if self._from is None:
            if state.total_steps is None:
                raise ValueError(f"start={self.start} is a share of the run, whose length is not known: give a whole number "
                                 "of updates, or steps= to fit or epochs, where one of them runs it")  # fmt: skip
            self._from = int(self.start * state.total_steps)
        self._go_on(state)

    def _go_on(self, state: State) -> None:
        saved, self._saved = self._saved, None
        if saved is not None and fits(Named(state.model, state.optimizer).model_misfits(saved)):
            self._make(state).load_model(saved)
        elif saved is not None:
            self.count, self._wide = 0, {}

    def _make(self, state: State) -> Named:
        self.model = state.eval_model = copied(bare(state.model)).requires_grad_(False).eval()
        self._named = Named(self.model, state.optimizer)
        return self._named

    def on_micro_end(self, state: State) -> None:
        """Have the last batch at hand, where it is to be measured."""
        if self.batch_norm == "measure" and state.micro is not None and state.micro.training and self._due(state.step + 1):
            self._batch = state.step + state.skipped, state.micro.batch

    def _due(self, step: int) -> bool:
        return step > (self._from or 0) and (step - (self._from or 0)) % self.every == 0

    def on_step_end(self, state: State) -> None:
        """Take the weights in."""
        (of, batch), self._batch = self._batch, (-1, None)
        batch = batch if of + 1 == state.step + state.skipped else None  # not that of an update that was skipped
        if not self._due(state.step):
            return
        first, model = self._named is None, bare(state.model)
        average = (self._named or self._make(state)).model
        if (pairs := paired(average, model)) is None:  # pruned, say
            pairs = carried(average, average := self._make(state).model, model)
        norms = to_measure(average, model) if self.batch_norm == "measure" else []
        if not first and self._named is not None:
            self._wide = take_in(self._average, self._named, model, pairs, self.count, norms, self._wide)
        self.count += 1
        state.log("averaged", self.count)
        if norms and (batch is not None or state.loader is None):  # a rank without data measures nothing
            measure(state, self.forward, average, norms, batch)

    def state_dict(self) -> dict[str, Any]:
        """Return the average, of how many, and of what kind."""
        model = self._saved if self._named is None else dict(self._named.model_state())
        return {"kind": self.kind, "count": self.count, "from": self._from, "model": model, "wide": self._wide}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back; raises ValueError for an average of another kind."""
        if (kind := state.get("kind", self.kind)) != self.kind:  # the one goes on from no value of the other
            raise ValueError(f"it averages by {self.kind!r} here and by {kind!r} in the checkpoint")
        self.count, self._saved, self._wide = state["count"], state["model"], copied(state.get("wide", {}))
        self._from = self._from if isinstance(self.start, int) else state["from"]
