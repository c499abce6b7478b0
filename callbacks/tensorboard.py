"""TensorBoard: what training did, as curves to look at while it runs."""

import contextlib
import os
import time
from typing import Any

import torch

from ..loop.callback import Callback
from ..loop.events import Events
from ..loop.groups import as_text, describe
from ..loop.state import State


class TensorBoard(Callback):
    """Writes TensorBoard curves at the first and every `every`-th applied update and at each report, over `state.step`.

    `train/<name>` (the loss, and every other number of a step), `rate/group<i>` (what the update used), `decay/group<i>`,
    `batch/size`, `batch/micro_size`, `batch/accumulate`, `batch/grad_norm` (`grad_norm=True`), `speed/samples_per_s` (since the
    last such point or report), `speed/seconds` (of the run, inside `with loop`), `memory/device_gib` (peak) or
    `memory/process_gib`, `progress/epoch`, `progress/samples`, `progress/skipped`, `val/<name>` for a reported `val_<name>`,
    `report/<name>` for any other; the table `parameter_groups`; for HParams the optimizer's settings, batch size, accumulation,
    seed and your `settings`. A run goes on without overlap after a kill, and hides what others in its folder hold from its
    first step on: give other writers their own. Rank 0 writes. Raises ValueError for bad settings and a folder that another
    TensorBoard writes, OSError at the start for one that can't be written; what fails later is one warning: training goes on.
    """

    def __init__(self, folder: str | os.PathLike[str], every: int = 50, grad_norm: bool = False,
                 settings: dict[str, Any] | None = None) -> None:  # fmt: skip
        if not isinstance(folder, str | os.PathLike) or not os.fspath(folder) or "://" in str(folder):
            raise ValueError(f"folder must be the path of a local folder, such as 'runs/a', not {folder!r}")
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ValueError(f"every must be a whole number of updates, at least 1, not {every!r}")
        if bad := {k: v for k, v in (settings or {}).items() if not isinstance(v, int | float | str)}:
            raise ValueError(f"settings must hold numbers, strings and bools; make strings of {bad!r}")
        self.every, self.grad_norm, self.settings = every, grad_norm, dict(settings or {})
        self._events, self._mark, self._reported = Events(folder), (0, 0, 0.0), dict[str, str]()

    def on_setup(self, state: State) -> None:
        """Ask to be told of updates once every other callback has logged what it has to say."""
        state.after = [*state.after, self.after_step]

    def on_fit_start(self, state: State) -> None:
        """Open a file that goes on from this step; at a run's first, with the table of parameter groups."""
        if state.rank == 0:
            self._events.open(state.step)
            self._mark = (state.step, state.samples, time.perf_counter())
            self._reported |= self._reports(state)
            if state.step == 0:
                self._events.text("parameter_groups", as_text(describe(state.optimizer, state.model)))

    def on_before_optimizer_step(self, state: State) -> None:
        """Have the norm computed for an update that will be logged."""
        if self.grad_norm and self._due(state.step + 1):
            _ = state.grad_norm

    def after_step(self, state: State) -> None:
        """Log what is due, write what has arrived."""
        self._events.step = state.step
        if self._due(state.step) and self._events.file is not None:
            self._log(state)
        elif self._events.host.pending:
            self._events.drain()

    def _due(self, step: int) -> bool:
        return step % self.every == 0 or step == 1

    def _log(self, state: State) -> None:
        groups, (step, samples, since), now = state.optimizer.param_groups, self._mark, time.perf_counter()
        given = {name: value for name, value in sorted(state.metrics.items()) if name not in state.reported}
        used, self._mark = state.samples - samples, (state.step, state.samples, now)
        seen = used / max(1, state.step - step) / state.accumulate if used else None  # around a loop of your own
        size = state.batch_size or getattr(state.loader, "batch_size", None) or seen
        self._events.put(state.step, {
            **{f"train/{name}": value for name, value in given.items()},
            **{f"rate/group{i}": rate for i, rate in enumerate(state.rates or [g["lr"] for g in groups])},
            **{f"decay/group{i}": decay for i, decay in enumerate(state.decays or [g.get("weight_decay") for g in groups])},
            "batch/size": size, "batch/micro_size": state.micro_size or size,
            "batch/accumulate": state.accumulate, "batch/grad_norm": state.grad_norm if self.grad_norm else None,
            "speed/samples_per_s": used / max(now - since, 1e-9) if used else None, "speed/seconds": state.seconds,
            **memory(state.device),
            "progress/epoch": state.epoch, "progress/samples": state.samples, "progress/skipped": state.skipped,
        })  # fmt: skip

    def on_validation_end(self, state: State) -> None:
        """Log what was reported."""
        if self._events.file is not None:
            self._reported |= (found := self._reports(state))
            self._events.put(state.step, {tag: state.metrics[name] for name, tag in found.items()}, all=True)
            self._mark = (state.step, state.samples, time.perf_counter())

    def _reports(self, state: State) -> dict[str, str]:
        return {n: f"val/{n[4:]}" if n.startswith("val_") else f"report/{n}" for n in sorted(state.reported)}

    def on_fit_end(self, state: State) -> None:
        """Write what is pending, and the settings for the HParams page beside the last values of what was reported."""
        size = state.batch_size or getattr(state.loader, "batch_size", None)
        found = {**getattr(state.optimizer, "defaults", {}), "optimizer": type(state.optimizer).__name__,
                 "batch_size": size, "accumulate": state.accumulate, "seed": state.seed, **self.settings}  # fmt: skip
        with contextlib.closing(self._events):
            self._events.hparams(found, self._reported.values() or ["train/loss"])

    def state_dict(self) -> dict[str, Any]:
        """Return, once all that is pending is on the disk, what a file that continues this one needs."""
        state = self._events.state_dict()
        return state if state["step"] or state["kept"] else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        self._events.load_state_dict(state)


def memory(device: torch.device) -> dict[str, float]:
    """Return GiB: an accelerator's peak, else what this process holds; the host counts both, so nothing waits."""
    if peak := getattr(getattr(torch, device.type, None), "max_memory_allocated", None):
        return {"memory/device_gib": peak(device) / 2**30}
    with contextlib.suppress(OSError), open("/proc/self/statm") as file:
        return {"memory/process_gib": int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**30}
    return {}  # only Linux has that file
