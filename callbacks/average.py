"""Average: an average of the weights, which validation uses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn, get_swa_multi_avg_fn

from ..loop.callback import Callback
from ..loop.checks import among, share, whole
from ..loop.state import State
from ..loop.store import Named


class Average(Callback):
    """Keeps an average of the weights, validates with it, and leaves the training of the weights themselves alone.

    `kind`: "ema", exponential with `decay`, or "swa", the mean of all since `start`; taken after each `every`-th applied
    update from update `start` on (below 1: a share of the run). `batch_norm`: "average" treats running statistics as weights,
    "measure" sends the update's last micro-batch through the averaged model by `forward(model, batch)` (`model(batch[0])`).
    `model` is the averaged model, None before the first; EarlyStopping keeps and restores what was validated, so averaged
    weights. Raises ValueError for bad settings, and for a share where the run's length is not known.
    (Polyak and Juditsky 1992; Izmailov et al. 2018, https://arxiv.org/abs/1803.05407)
    """

    optional = ("on_micro_end",)

    def __init__(self, kind: str = "ema", decay: float = 0.999, *, start: float = 0, every: int = 1,
                 batch_norm: str = "average", forward: Callable[[nn.Module, Any], Any] | None = None) -> None:  # fmt: skip
        among("kind", kind, ("ema", "swa"))
        among("batch_norm", batch_norm, ("average", "measure"))
        share("decay", decay)
        whole("every", every, 1, none=False)
        if not (isinstance(start, float) and 0 < start < 1):
            whole("start", start, 0, none=False)
        self.start, self.every, self.batch_norm, self.count = start, every, batch_norm, 0
        self.forward = forward or first_argument
        self.model: nn.Module | None = None
        self._average = get_ema_multi_avg_fn(decay) if kind == "ema" else get_swa_multi_avg_fn()
        self._batch: Any = None
        self._saved: dict[str, Any] | None = None
        self._from: int | None = start if isinstance(start, int) else None

    def on_fit_start(self, state: State) -> None:
        """Turn a share into updates, and go on with the average that was saved."""
        if self._from is None:
            if state.total_steps is None:
                raise ValueError(f"start={self.start} is a share of the run, whose length is not known: give steps= to fit or "
                                 "epochs, or start as a whole number of updates")  # fmt: skip
            self._from = int(self.start * state.total_steps)
        if self._saved is not None:
            self._make(state)
            Named(self.model or state.model, state.optimizer).load_model(self._saved)
            self._saved = None

    def _make(self, state: State) -> None:
        self.model = copy.deepcopy(getattr(state.model, "_orig_mod", state.model)).requires_grad_(False).eval()
        state.eval_model = self.model

    def on_micro_end(self, state: State) -> None:
        """Have the last batch at hand, where it is to be measured."""
        if self.batch_norm == "measure" and state.micro is not None and state.micro.training and self._due(state.step + 1):
            self._batch = state.micro.batch

    def _due(self, step: int) -> bool:
        return step > (self._from or 0) and (step - (self._from or 0)) % self.every == 0

    @torch.no_grad()
    def on_step_end(self, state: State) -> None:
        """Take the weights in."""
        batch, self._batch = self._batch, None
        if not self._due(state.step):
            return
        if self.model is None:
            self._make(state)
        else:
            leave = {id(x) for m in norms(self.model) for x in m.buffers() if self.batch_norm == "measure"}
            both = [(a, b) for a, b in zip(tensors(self.model), tensors(state.model), strict=True) if id(a) not in leave]
            floats = [(a, b) for a, b in both if a.is_floating_point() or a.is_complex()]
            self._average([a for a, _ in floats], [b for _, b in floats], self.count)
            for a, b in both:
                if not (a.is_floating_point() or a.is_complex()):
                    a.copy_(b)
        self.count += 1
        if batch is not None and self.model is not None and (found := norms(self.model)):
            for module in found:
                module.train()
            self.forward(self.model, batch)
            self.model.eval()

    def state_dict(self) -> dict[str, Any]:
        """Return the average and of how many."""
        return {"count": self.count, "from": self._from,
                "model": self._saved if self.model is None else dict(self.model.state_dict())}  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        self.count, self._saved = state["count"], state["model"]
        self._from = self._from if isinstance(self.start, int) else state["from"]


def tensors(model: nn.Module) -> list[Tensor]:
    """Return a model's parameters and buffers."""
    return [*model.parameters(), *model.buffers()]


def norms(model: nn.Module) -> list[nn.Module]:
    """Return the modules that keep running statistics."""
    return [m for m in model.modules() if getattr(m, "running_mean", None) is not None]


def first_argument(model: nn.Module, batch: Any) -> Any:
    """Run the model on the first entry of a batch, as torch's `update_bn` does."""
    if not isinstance(batch, list | tuple):
        raise ValueError(f"Average can't tell what of a {type(batch).__name__} the model takes: give forward=fn(model, batch)")
    return model(batch[0])
