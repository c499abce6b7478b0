"""DynamicBatchSize: batches that grow while training goes on."""

from __future__ import annotations

import logging
import math
import types
from collections.abc import Callable, Mapping
from typing import Any

from ..loop.callback import HOOKS, Callback
from ..loop.checks import among, whole
from ..loop.goal import Goal
from ..loop.state import State
from .batch_policies import Epochs, Plateau, Policy

log = logging.getLogger("hookloop")
RATES = {"none": lambda ratio: 1.0, "linear": lambda ratio: ratio, "sqrt": math.sqrt}


def grown(initial: int, maximum: int, growth: float, k: int, multiple_of: int = 1) -> int:
    """Return the batch size after k growths: floor(initial * growth**k / m) * m, from `initial` up to `maximum`."""
    if k * math.log(growth) > math.log(maximum + multiple_of) - math.log(initial) + 1:
        return maximum  # far beyond, where a float's power would overflow
    product = math.floor(initial * growth**k / multiple_of) * multiple_of
    return max(initial, min(maximum, product))


def in_turn(hook: str) -> Callable[[DynamicBatchSize, State], None]:
    """Return the hook that runs the policy's, then the callback's own."""

    def run(self: DynamicBatchSize, state: State) -> None:
        getattr(self.policy, hook)(state)
        getattr(type(self), hook)(self, state)

    return run


class DynamicBatchSize(Callback):
    """Grows the batch size by a factor, when its policy says so, up to `maximum` samples.

    `every`: the policy. A number: so many epochs. `Steps(n)`: so many updates. A table `{epoch: size}`, or
    `Steps({step: size})`: these sizes, from there on. A metric's name or `Goal`: each time its patience is used up, where
    a schedule would divide the rate (Smith et al. 2018, https://arxiv.org/abs/1711.00489). `NoiseScale()`: while the
    gradients' noise asks for more. The size is honoured to the sample whatever the loader's own batch is, and each sample
    is still used once an epoch. The unrounded product grows; sizes are its multiples of `multiple_of`, but for the first,
    `initial`, and the last, which is `maximum`, or what an epoch holds where that is less, as it is. With
    `GradientAccumulation(n)` an update holds n such batches; with `MicroBatch("auto")` a batch beyond memory is cut.
    `scale_lr`: the rate's factor for a batch grown r times: "none" 1, "linear" r, "sqrt" its root. Sizes are per rank.
    Raises ValueError for bad settings; a `maximum` that no epoch holds is clamped, and the log says so.
    """

    owns, planned = ("batch_size",), True

    def __init__(self, initial: int, maximum: int, growth: float = 1.5,
                 every: int | str | Goal | Mapping[int, int] | Policy = 1, multiple_of: int = 1,
                 scale_lr: str = "none") -> None:  # fmt: skip
        for name, value in (("initial", initial), ("maximum", maximum), ("multiple_of", multiple_of)):
            whole(name, value, 1, none=False)
        if maximum < initial:
            raise ValueError(f"maximum must be at least initial, {initial}, not {maximum}")
        if multiple_of > maximum:
            raise ValueError(f"multiple_of={multiple_of} is more than maximum={maximum}, so that the batch would never grow")
        if isinstance(growth, bool) or not isinstance(growth, int | float) or not 1 < growth < math.inf:
            raise ValueError(f"growth must be a factor above 1, not {growth!r}")
        among("scale_lr", scale_lr, tuple(RATES))
        policy: Any = every
        if isinstance(every, str | Goal) and every not in ("step", "epoch"):  # which no program means as a metric here
            policy = Plateau(every)
        elif isinstance(every, int | Mapping):
            policy = Epochs(every)
        elif not isinstance(every, Policy):
            raise ValueError("every must be a number of epochs, a table, a metric's name or Goal, or a policy such as "
                             f"Steps(100), not {every!r}")  # fmt: skip
        for position, size in (policy.table or {}).items():
            if size > maximum or size % multiple_of:
                raise ValueError(f"the table's size {size}, from {position} on, must be a multiple of {multiple_of} and at most "
                                 f"maximum={maximum}")  # fmt: skip
        if policy.table and growth != 1.5:
            raise ValueError(f"growth={growth} has no use beside a table of sizes; leave it out")
        self.initial, self.maximum, self.growth, self.multiple_of = initial, maximum, growth, multiple_of
        self.policy, self.rate = policy, RATES[scale_lr]
        self.measured, self.watches = policy.measured, policy.watches
        for hook in HOOKS:  # a policy's hooks run as this callback's own, before them
            theirs = getattr(policy, hook, None)
            if theirs is not None and getattr(type(policy), hook) is not getattr(Callback, hook):
                vars(self)[hook] = types.MethodType(in_turn(hook), self)

    def on_fit_start(self, state: State) -> None:
        """Say where the bound is an epoch's."""
        if state.epoch_samples is not None and state.epoch_samples < self.maximum:
            log.warning("maximum=%d is more than the %d samples of an epoch, which is where batches stop growing",
                        self.maximum, state.epoch_samples)  # fmt: skip

    def on_step_start(self, state: State) -> None:
        """Plan the next update."""
        most = min(self.maximum, max(self.initial, state.epoch_samples or self.maximum))
        state.batch_size = min(
            most, self.policy.size(state, lambda k: grown(self.initial, most, self.growth, k, self.multiple_of))
        )

    def on_before_optimizer_step(self, state: State) -> None:
        """Scale this update's rate with the batch."""
        if (factor := self.rate((state.batch_size or self.initial) / self.initial)) != 1.0:
            state.scale_rate(factor)

    def state_dict(self) -> dict[str, Any]:
        """Return the policy's state."""
        return dict(self.policy.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        self.policy.load_state_dict(state)
