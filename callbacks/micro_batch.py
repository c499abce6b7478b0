"""MicroBatch: how many samples go through the model at once."""

import logging
from typing import Any

from ..loop.callback import Callback
from ..loop.checks import among, say
from ..loop.memory import memory_of, out_of_memory, too_small
from ..loop.sizes import Sizes, check
from ..loop.state import State

EVERY = 16  # updates between two looks at memory, once the size is found
log = logging.getLogger("hookloop")


class MicroBatch(Callback):
    """Puts at most `size` samples through one forward, in equal cuts, without changing any gradient or batch size.

    `"auto"` measures what the first updates take at growing sizes and goes to the largest predicted to fit under `headroom`
    of what the process may hold, in multiples of `multiple_of` (where it is that large); with `target="throughput"` it stops
    where a doubling gains less than 3% samples/s, with `"memory"` nowhere. It looks again every 16 updates. Where memory
    runs out all the same, the step is redone from its own data in halves (at a number it is an error), gradients cleared,
    torch's generators and module buffers put back: the run equals one that used the smaller size from that step on. Where a
    device reports no memory (the CPU) it starts with whole batches and only halves. Beside CUDAGraph a step is first redone at
    the same size without the graphs, whose memory nothing else can use. Validation shrinks a size of its own.
    `on_step_oom="rollback"` keeps weights, gradients and optimizer state on the host before each update, and repeats one
    that ran out of memory. BatchNorm's statistics are those of each micro-batch. Times differ between runs, and so may
    sizes; "memory" takes none. `memory`: what measures (None: the device). Raises ValueError when misused.
    """

    owns, planned, of_rank = ("micro_batch_size",), True, True
    _open: Any = None  # the step being measured
    _timed: Any = None  # one whose time the device has not told yet

    def __init__(self, size: int | str, *, headroom: float = 0.9, multiple_of: int = 16, target: str = "throughput",
                 on_step_oom: str = "raise", memory: Any = None) -> None:  # fmt: skip
        check(size, headroom, multiple_of, target, memory)
        among("on_step_oom", on_step_oom, ("raise", "rollback"))
        self.headroom, self.on_step_oom, self.auto, self.memory = headroom, on_step_oom, size == "auto", memory
        self.train = self.evaluation = None if isinstance(size, str) else size
        self.sizes, self.settled = Sizes(multiple_of, target == "throughput"), False
        self._base, self._undone, self._tried = 0, 0, list[int]()
        if not self.auto and on_step_oom == "raise":  # a fixed size looks at nothing, nor keeps what a redo needs
            self.idle_hooks = (MicroBatch.on_step_start, MicroBatch.on_before_optimizer_step, MicroBatch.on_exception)

    def on_setup(self, state: State) -> None:
        """Set the sizes, find what measures."""
        self.memory = self.memory or (memory_of(state.device) if self.auto else None)
        state.keep_before_update = self.on_step_oom == "rollback"
        MicroBatch.on_fit_start(self, state)

    def on_fit_start(self, state: State) -> None:
        """Set the sizes, which may be restored ones."""
        state.micro_batch_size, state.eval_micro_batch_size = self.train, self.evaluation

    def on_step_start(self, state: State) -> None:
        """Go to another size, where the updates before tell one."""
        memory, timed, self._undone = self.memory, self._timed, 0
        if memory is None:
            return
        if timed and (seconds := memory.seconds(*timed[2:])) is not None:
            self._timed = None
            self.sizes.timing(timed[0], timed[1] / max(seconds, 1e-9))
        if state.step % EVERY and (state.step > 2 * EVERY if state.ranks.together else self.settled or self._timed):
            return
        self._base, now = memory.allocated(), self.train
        size, self.settled = self.sizes.choose(now, self.sizes.last, self.headroom * memory.capacity() - self._base)
        self.train = state.ranks.smallest(size)
        if self.train != now:
            log.info("step %d: micro-batches of %d samples, after %s", state.step, self.train, now)
            MicroBatch.on_fit_start(self, state)
        memory.reset()
        self._open = memory.retries(), self.sizes.throughput and memory.mark(), state.runner.written

    def on_before_optimizer_step(self, state: State) -> None:
        """Take in what the micro-batches took."""
        memory, opened, self._open = self.memory, self._open, None
        if opened is not None and state.micro_size:  # else this rank only took part in what others trained
            if memory.retries() > opened[0]:  # it fitted in pieces only
                self.sizes.fail(state.micro_size, memory.capacity() - self._base)
            if state.runner.written > opened[2]:  # a replay takes no memory anew
                self.sizes.measured(state.micro_size, memory.peak() - self._base, self._base)
            if self.sizes.throughput:
                self._timed = state.micro_size, state.update_size, opened[1], memory.mark()

    def on_exception(self, state: State) -> bool:
        """Have a step that ran out of memory redone in halves, or the update repeated."""
        micro, error = state.micro, state.exception
        if error is None or not out_of_memory(error):
            return False
        if micro is None:  # in the optimizer's step, which was put back
            self._undone += 1
            return self._undone <= 3
        if micro.training and state.runner.give_back():
            self._open = None
            return True
        self._tried.append(micro.size)
        if micro.size <= 1 or not self.auto:
            say(error, too_small(self._tried, state.device))
            return False
        half = (micro.size + 1) // 2
        log.warning("step %d: %d samples ran out of memory; %d from here on", state.step, micro.size, half)
        if not micro.training:
            self.evaluation = half
        else:
            self.sizes.fail(micro.size, self.memory.capacity() - self._base if self.memory else 0)
            self.train, self._open, self.settled = half, None, False
        MicroBatch.on_fit_start(self, state)
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return the sizes found, and what was measured on the way."""
        return {"found": [self.train, self.evaluation, self.settled], "sizes": self.sizes.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back; a given size is the argument's."""
        if self.auto:
            self.sizes.load_state_dict(state["sizes"])
            self.train, self.evaluation, self.settled = state["found"]
