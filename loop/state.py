"""What a hook receives: where training stands, the plan for the next step, what the last one gave."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .factors import Asked, Factor, checked, multiply, put_back, rates_of
from .goal import logged, number, plain
from .groups import Group, check_rated, own_rates
from .micro_end import MicroEnd
from .ranks import Ranks
from .step import Eager

if TYPE_CHECKING:
    from torch.amp import GradScaler
    from torch.optim import Optimizer

    from .store import Contents


@dataclass(eq=False)
class State:
    """Where training stands; a callback can be driven by one without any loop: `State(model, optimizer)`."""

    model: nn.Module
    optimizer: Optimizer
    scaler: GradScaler | None = None
    eval_model: nn.Module | None = None
    loader: Any = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    rank: int = 0
    world: int = 1
    ranks: Ranks = field(default_factory=Ranks)
    # progress: updates applied, updates skipped, epochs ended, samples seen
    step: int = 0
    skipped: int = 0
    epoch: int = 0
    samples: int = 0
    total_steps: int | None = None
    epoch_samples: int | None = None
    # plan
    seed: int | None = None
    batch_size: int | None = None
    accumulate: int = 1
    micro_batch_size: int | None = None
    eval_micro_batch_size: int | None = None
    least_micros: int = 1  # micro-batches that the next update is cut into at least; back to 1 before each on_step_start
    keep_before_update: bool = False  # weights, gradients and optimizer state, so that an update can be repeated
    keep_buffers: bool = False  # from a step's start, so that an update that is skipped leaves none changed
    layer_rates: dict[Tensor, Any] = field(default_factory=dict)  # that a callback gave: initial_lr is no scheduler's then
    runner: Any = field(default_factory=Eager)
    autocast: Callable[[], Any] | None = None  # that of each forward; the Loop's
    # outcome
    metrics: dict[str, Any] = field(default_factory=dict)
    rates: list[Any] = field(default_factory=list)
    decays: list[Any] = field(default_factory=list)  # as the last update used them, empty where they are the groups' own
    micro: MicroEnd | None = None
    exception: Exception | None = None
    update_size: int = 0  # samples of the update at hand
    micro_size: int = 0  # and of its largest micro-batch
    skip_reason: str | None = None
    stop_reason: str | None = None
    reported: set[str] = field(default_factory=set)  # names in metrics that the last report gave
    of_update: set[str] = field(default_factory=set)  # names in metrics that updates' own outputs gave
    reported_at: int = -1
    writers: list[Callable[[State, list[str], Callable[[], Contents]], bool]] = field(default_factory=list)
    # a writer that is given no reasons waits for its last save, and tells whether it is on the disk
    checks: list[Callable[[State], None]] = field(default_factory=list)  # run when gradients are as the optimizer gets them
    before: list[Callable[[State], None]] = field(default_factory=list)  # before a step's first forward, once hooks have run
    after: list[Callable[[State], None]] = field(default_factory=list)  # of each applied update, once hooks have run
    before_save: list[Callable[[State], None]] = field(default_factory=list)  # and at the end: raise or go back
    accepts: list[Callable[[Optimizer], None]] = field(default_factory=list)  # raise for one that could not take over
    exchanged: list[Callable[[State], None]] = field(default_factory=list)  # told when another optimizer has
    along: dict[str, tuple[Callable[[], Any], Callable[[Any], None]]] = field(default_factory=dict)  # kept with the weights
    run: str | None = field(default_factory=lambda: uuid.uuid4().hex)  # which run this is, over all restarts; None: not known
    given_loss: Any = None  # what loop.updating was given
    saved: str | None = None  # the last checkpoint, named beside an error
    spent: float = 0.0  # seconds of earlier entries, and what this one's began at
    since: float | None = None
    strict: bool = True  # whether a resume refuses what does not fit
    at_enter: list[Callable[[], None]] = field(default_factory=list)  # the first thing when it is entered again
    at_exit: list[Callable[[BaseException | None], None]] = field(default_factory=list)  # the last thing, once per entry

    def __post_init__(self) -> None:
        own_rates(self.optimizer)
        self.places = {p: i for i, p in enumerate([p for g in self.optimizer.param_groups for p in g["params"]])}
        self.rates = rates_of(self.optimizer)
        self._rate_factors: list[Asked] = []
        self._decay_factors: list[Asked] = []
        self._grad_factors: list[float | Tensor] = []
        self._grad_norm: Tensor | None = None
        self._grads_open = True
        self._skip: str | None = None
        self._doubt: Callable[[], str | None] | None = None
        self._saves: list[str] = []
        self._due: list[str] = []  # saves that all ranks agreed on
        self._stop: str | None = None  # asked for on this rank
        self._logged: dict[str, Any] = {}
        self._evaluating = False
        self._leave_at, self._leave_reason = math.inf, ""

    @property
    def seconds(self) -> float:
        """Time spent inside `with loop:`, also by the runs that this one goes on from."""
        return self.spent + (0.0 if self.since is None else time.monotonic() - self.since)

    def stop(self, reason: str) -> None:
        """End training after this step, for all ranks; the first reason stands."""
        if self.ranks.together:  # one that stops alone would be waited for
            self._stop = self._stop or reason
        else:
            self.stop_reason = self.stop_reason or reason

    def leave(self, reason: str, at: float = -math.inf) -> None:
        """End training after this step, once `time.monotonic()` says `at`: no validation follows, one under way is broken off.

        The earliest stands; the same reason again moves its time.
        """
        if at < self._leave_at or reason == self._leave_reason:
            self._leave_at, self._leave_reason = at, reason

    @property
    def leaving(self) -> bool:
        """Whether it is time to leave."""
        if self.ranks.together:
            return self.ranks.leaves
        if self._leave_at == math.inf or time.monotonic() < self._leave_at:
            return False
        self.stop(self._leave_reason)
        return True

    @property
    def left(self) -> bool:
        """Whether training was left early, by `leave`."""
        return self.stop_reason is not None and self.stop_reason == self._leave_reason

    def skip(self, reason: str) -> None:
        """Leave this update out, on all ranks: no optimizer step, no count; `reason` stands in `state.skip_reason`."""
        self._skip = reason

    def skip_where(self, bad: Tensor, reason: Callable[[], str | None]) -> None:
        """Leave this update out where `bad`, a 0-d bool on the device, holds; `reason()` reads it: why, None where it doesn't.

        A fused optimizer leaves it out on the device, and `reason` is asked once its work is queued; for any other, and
        where a momentum would begin, from memory that a step left out never fills, it is asked at once.
        """
        groups = self.optimizer.param_groups
        begun = all(self.optimizer.state.get(p) for g in groups if g.get("momentum") for p in g["params"] if p.grad is not None)
        fused = getattr(self.optimizer, "_step_supports_amp_scaling", False) and all(g.get("fused") for g in groups)
        if begun and fused and self.scaler is None:
            self.optimizer.found_inf, self._doubt = bad.float(), reason  # type: ignore[attr-defined]
        elif (why := reason()) is not None:
            self.skip(why)

    def settle(self) -> bool:
        """Return whether the update that was just queued was applied."""
        doubt, self._doubt = self._doubt, None
        if doubt is None:
            return True
        if vars(self.optimizer).pop("found_inf", None) is None:
            raise RuntimeError("a GradScaler stepped the optimizer, and took its verdict for this Loop's: give it to "
                               "Loop(scaler=) too")  # fmt: skip
        self.skip_reason = doubt()
        return self.skip_reason is None

    def save(self, reason: str) -> None:
        """Have a checkpoint written at the next point where one is whole, once every callback's hook has run."""
        if not self.writers:
            raise RuntimeError(f"state.save({reason!r}): nothing here writes checkpoints; add Checkpoint(folder)")
        self._saves.append(reason)

    def log(self, name: str, value: float | Tensor | Callable[[], Any]) -> None:
        """Put a number or 0-d tensor into `state.metrics`; a function is called when metrics are next reported.

        The function gives one number, or a mapping of names to several, which then stand under these in place of `name`.
        """
        value = plain(value)
        if not (callable(value) or isinstance(value, int | float) or (isinstance(value, Tensor) and not value.dim())):
            raise TypeError(f"log({name!r}) takes a number, a 0-d tensor or a function that gives one, not {value!r:.60}")
        if isinstance(value, int) and value.bit_length() > 1023:
            raise OverflowError(
                f"log({name!r}): an integer of {value.bit_length()} bits is beyond all floats; log its logarithm"
            )
        self._logged[name] = value
        if not callable(value) and not self._evaluating:
            self.given({name: value})
            self.of_update.discard(name)

    def given(self, metrics: Mapping[str, Any]) -> None:
        """Put what an update gave into `metrics`; what was reported under such a name before is the past."""
        self.metrics.update(metrics)
        self.reported.difference_update(metrics)

    def report(self, metrics: Mapping[str, Any]) -> None:
        """Put metrics (single numbers), and then what functions were logged, into `state.metrics` as floats, for the last ones."""
        if odd := [name for name in metrics if not isinstance(name, str)]:
            raise TypeError(f"metrics must map names to numbers; {odd[0]!r} is no name")
        found = {name: number(name, value) for name, value in metrics.items()}
        functions = {name: value for name, value in self._logged.items() if callable(value)}
        for name in self.reported:
            self.metrics.pop(name, None)
        self.metrics.update(found)
        self.reported = set(found)
        more = logged(functions, found, "it is reported")
        self.metrics.update(more)
        self.reported, self.reported_at, self._logged = {*found, *more}, self.step, {}

    def scale_rate(self, factor: float, group: Group | int | None = None) -> None:
        """Multiply the rate of this update (of one parameter group, or all) by `factor`; it is put back after."""
        check_rated(self.optimizer)
        self._rate_factors.append((self._group(group), checked("scale_rate", factor)))

    def scale_decay(self, factor: Factor, group: Group | int | None = None) -> None:
        """Multiply the weight decay of this update, as `scale_rate` does the rate; a function is given the rate it uses."""
        self._decay_factors.append((self._group(group), factor if callable(factor) else checked("scale_decay", factor)))

    def _group(self, group: Group | int | None) -> Group | None:
        return self.optimizer.param_groups[group] if isinstance(group, int) else group

    def scale_gradients(self, factor: float | Tensor) -> None:
        """Multiply all gradients of this update by a number or 0-d tensor, once every callback has said its factor."""
        self._grad_factors.append(factor)

    @property
    def grads(self) -> list[Tensor]:
        """The gradients of all parameters that the optimizer holds."""
        return [p.grad for g in self.optimizer.param_groups for p in g["params"] if p.grad is not None]

    @property
    def grad_norm(self) -> Tensor | None:
        """The 2-norm of the gradients before clipping, computed when first asked for in `on_before_optimizer_step`."""
        if self._grad_norm is None and self._grads_open:
            norm: Any = nn.utils.get_total_norm([values_of(grad) for grad in self.grads])
            self._grad_norm = norm.full_tensor() if self.ranks.sharded else norm
        return self._grad_norm

    def drop_factors(self, ask: bool = False) -> None:
        """Forget what callbacks asked for in an update that is skipped; with `ask` it is this one, and who doubted it reads why."""
        doubt, self._doubt = self._doubt, None
        if ask:
            self.skip_reason = self._skip
            if doubt is not None:
                doubt()
        vars(self.optimizer).pop("found_inf", None)
        self._rate_factors, self._decay_factors, self._grad_factors, self._grads_open, self._skip = [], [], [], False, None

    def apply_gradient_factors(self) -> None:
        """Multiply the gradients by the product of what callbacks asked for; sorted, so that their order is free."""
        factors, self._grad_factors = self._grad_factors, []
        self._grads_open = False
        if not factors or not (grads := self.grads):
            return
        factor = factors[0]
        if len(factors) > 1:
            each = [f if isinstance(f, Tensor) else torch.full((), f, device=grads[0].device) for f in factors]
            factor = torch.stack([f.to(grads[0].device, torch.float64) for f in each]).sort().values.prod()
        by_device: dict[torch.device, list[Tensor]] = {}
        for grad in grads:
            by_device.setdefault(grad.device, []).append(grad)
        for device, some in by_device.items():
            torch._foreach_mul_(some, factor.to(device) if isinstance(factor, Tensor) else factor)

    def apply_rates(self) -> list[Any] | None:
        """Multiply every group's rate and decay by its factors in sorted order; return what `restore_rates` puts back."""
        groups, rates, decays = self.optimizer.param_groups, self._rate_factors, self._decay_factors
        before = multiply(groups, rates, decays) if rates or decays else None
        self._rate_factors, self._decay_factors = [], []
        self.rates, self.decays = rates_of(self.optimizer), [g.get("weight_decay") for g in groups] if decays else []
        return before

    def restore_rates(self, before: list[Any] | None) -> None:
        """Put them back, so that whatever scheduler the user has never meets a factor."""
        if before is not None:
            put_back(self.optimizer.param_groups, before)


def values_of(x: Tensor) -> Tensor:
    """Return what a tensor holds, also a sparse one."""
    if not x.is_sparse:
        return x
    values = x.coalesce().values()
    return values if values.numel() else values.new_zeros(1)
