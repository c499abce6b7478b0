"""Which process this is among several, and what all agree on (how gradients become one: wrapped.py, share.py).

Ranks are kept in step by two exchanges on the host an update, of 64 bytes a rank: before a step's first forward (is there
data, of what weight; does anyone want to stop, leave or save) and before the optimizer's update (does anyone want to skip it;
is there more data). What one rank wants alone is therefore done by all, at the same point, and one that fails ends all.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import time
import traceback
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .checks import say
from .wrapped import check_mesh, frozen, fsdp1, sharded, wrapping

if TYPE_CHECKING:
    from .mean import Mean

WIDTH = 8  # numbers of 8 bytes in a message
PATIENCE = 5.0  # seconds in which those who still can say so, once the ranks have lost one another
log = logging.getLogger("hookloop")
PLACES = ("fails", "enters `with loop:`", "begins training", "begins a pass over its data", "begins a step", "redoes a step",
          "rehearses a step", "applies an update", "evaluates", "ends an evaluation", "reports", "ends an epoch", "saves",
          "leaves `with loop:`", "chooses a size", "prunes")  # fmt: skip


class Prefix(logging.Filter):
    """Says in each line of the log which rank writes it."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def filter(self, record: logging.LogRecord) -> bool:
        """Put the rank before the text."""
        record.msg = f"[rank {self.rank}] {record.msg}"
        return True


class RankFailed(RuntimeError):
    """Another rank failed, and all end with it."""


def rank_and_world() -> tuple[int, int]:
    """Return this process's rank and how many there are: torch.distributed's, else torchrun's, else (0, 1)."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


# The one that talks over the host, by the name of the process group that it goes with; held here alone.
groups: dict[str, Any] = {}


@atexit.register
def close_group() -> None:
    """End the host's group: its threads, alive at the interpreter's end, would end that in an abort."""
    for name in [*groups]:
        group = groups.pop(name)
        if group in dist.distributed_c10d._world.pg_map:
            dist.destroy_process_group(group)


def host_group(world: Any) -> Any:
    """Return a group of all ranks that talks over the host, one for each life of the process group, with its patience."""
    name, alive = world.group_name, dist.distributed_c10d._world.pg_map
    if groups.get(name) not in alive:  # names begin anew with a process group
        timeouts = [world._get_backend(torch.device(kind)).options._timeout for kind in ("cuda", "xpu", "cpu")
                    if kind in str(dist.get_backend_config(world))]  # fmt: skip
        close_group()
        groups[name] = dist.new_group(backend="gloo", timeout=timeouts[0] if timeouts else None)
    return groups[name]


class Ranks:
    """The ranks that train one model; of one process alone every answer is its own."""

    entries = 0  # of Loops, the same on all ranks

    def __init__(self, rank: int = 0, world: int = 1, together: bool = False, shards: bool = False) -> None:
        self.rank, self.world, self.together, self.first = rank, world, together, rank == 0 or not together
        self.count = world if together else 1  # of those that share the model
        self.unread = set[str]()  # checkpoints that not all ranks can read
        self.over = False  # the ranks have lost one another
        self.leaves = False  # all leave
        self.sharded = shards  # by FSDP2, whose every forward is a message
        self.micros = 1  # of this step, on the rank that has most of them
        self.coupled = False  # every forward of training is a message, of SyncBatchNorm too
        self.frozen = set[Any]()  # parameters that DDP does not average
        self._place = ""

    @classmethod
    def of(cls, model: nn.Module) -> Ranks:
        """Return the ranks that share `model`; raises ValueError for a model that shares nothing, or by what can't be exact."""
        rank, world = rank_and_world()
        if fsdp1(model):
            raise ValueError("model is wrapped in FullyShardedDataParallel (FSDP1), which torch itself has given up; shard it "
                             "with torch.distributed.fsdp.fully_shard(model)")  # fmt: skip
        if world == 1:
            return cls(rank, world, shards=sharded(model))
        if not (dist.is_available() and dist.is_initialized()):
            log.warning("WORLD_SIZE=%d says that there are other processes, but torch.distributed is not initialised: each trains "
                        "a model of its own; call torch.distributed.init_process_group() before Loop", world)  # fmt: skip
            return cls(rank, world)
        if not wrapping(model):
            raise ValueError(f"model is not shared between the {world} ranks, so that each would train one of its own: wrap it "
                             "(torch.nn.parallel.DistributedDataParallel(model), or fully_shard(model)) and give the wrapped one "
                             "to the optimizer and to Loop; to train apart, start without init_process_group")  # fmt: skip
        if not any(hasattr(model, name) for name in ("no_sync", "set_requires_gradient_sync")):
            raise ValueError(f"parts of the model are shared between the {world} ranks, but not the {type(model).__name__} around "
                             "them, whose other parameters would be trained apart: wrap the whole "
                             "(DistributedDataParallel(model)), or call fully_shard(model) after its parts")  # fmt: skip
        check_mesh(model, world)
        found = cls(rank, world, True, sharded(model))
        found.coupled = found.sharded or any(isinstance(m, nn.SyncBatchNorm) for m in model.modules())
        found.frozen = frozen(model)
        return found

    @property
    def host(self) -> Any:
        """What the ranks talk over; None for one process alone."""
        return host_group(dist.group.WORLD) if self.together else None

    def enter(self) -> None:
        """Begin to talk."""
        if self.together:
            self.over = self.leaves = False
            Ranks.entries += 1
            self._place = f"hookloop/{Ranks.entries}"
            # An agent's store outlives a restart, and so do the words of those that failed before it.
            self._place += f"/{self.agree('enters `with loop:`', time.time())[0][0]}"
            for old in [f for f in log.filters if isinstance(f, Prefix)]:
                log.removeFilter(old)
            log.addFilter(Prefix(self.rank))

    def agree(self, kind: str, *numbers: float) -> list[list[float]]:
        """Return what every rank says here, in rank order; all must ask at the same point. No device is waited for.

        Raises RankFailed on all ranks once one has failed, RuntimeError where they are at different points.
        """
        if not self.together:
            return [[*numbers]]
        if self.over:
            raise RankFailed("the ranks have lost one another; build process group and Loop anew, or start the program again")
        with self._or_lost():
            rows = self._gathered([PLACES.index(kind), *numbers])
        if len({row[0] for row in rows}) > 1:
            self.over = True
            said = ", ".join(f"rank {r} {PLACES[int(row[0])]}" for r, row in enumerate(rows))
            raise RuntimeError(f"the ranks are at different points: {said}; each must run the same verbs equally often")
        return [row[1:] for row in rows]

    def _gathered(self, numbers: list[float]) -> list[list[float]]:
        """Return the rows of all ranks.

        By dissemination: in a round each hands on all that it has heard, so that log2(world) rounds do, where gloo's own
        all_gather takes world - 1 (Bruck et al. 1997, https://doi.org/10.1109/71.642949).
        """
        table, have = torch.zeros(self.world, WIDTH, dtype=torch.float64), 1
        table[0, : len(numbers)] = torch.tensor(numbers, dtype=torch.float64)
        group = self.host
        while have < self.world:
            more = min(have, self.world - have)
            ahead, behind = (self.rank + have) % self.world, (self.rank - have) % self.world
            for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, table[:more], behind, group),
                                                dist.P2POp(dist.irecv, table[have : have + more], ahead, group)]):  # fmt: skip
                work.wait()
            have += more
        return table.roll(self.rank, 0).tolist()

    def exchange(self, kind: str, thing: Any) -> list[Any]:
        """Return a plain object of every rank, in rank order."""
        self.agree(kind)
        found = [thing]
        if self.together:
            found = [None] * self.world
            with self._or_lost():
                dist.all_gather_object(found, thing, group=self.host)
        return found

    def smallest(self, value: int, kind: str = "chooses a size") -> int:
        """Return the smallest value that any rank gives."""
        return int(min(row[0] for row in self.agree(kind, value)))

    def total(self, x: Tensor) -> Tensor:
        """Return the sum of a tensor over all ranks, on its device, behind the work that is queued there."""
        if self.together:
            x = x.detach().clone()
            dist.all_reduce(x)
        return x

    def all(self, good: Tensor) -> Tensor:
        """Return whether a 0-d bool holds on all ranks, on its device."""
        return self.total(good.logical_not().float()) == 0 if self.together else good

    def means(self, found: Mapping[str, Mean]) -> dict[str, Any]:
        """Return weighted means over the values of all ranks."""
        if not self.together:
            return {name: mean.value() for name, mean in found.items()}
        every = self.exchange("ends an evaluation", {name: mean.sums() for name, mean in found.items()})
        names = dict.fromkeys(name for each in every for name in each)
        sums = {name: [sum(each[name][i] for each in every if name in each) for i in (0, 1)] for name in names}
        return {name: total / weight if weight else float("nan") for name, (total, weight) in sums.items()}

    def averaged(self, found: dict[str, float], kind: str = "reports") -> dict[str, float]:
        """Return numbers that each rank made by itself as their mean; raises ValueError where one lacks a name."""
        if not self.together:
            return found
        every = self.exchange(kind, found)
        for r, each in enumerate(every):
            if odd := sorted({name for one in every for name in one} - each.keys()):
                self.over = True  # all see it: nobody needs to be told
                raise ValueError(f"rank {r} does not report {odd[0]!r}, as others do; every rank must report the same metrics")
        columns = {name: [each[name] for each in every] for name in found}
        return {name: sum(values) / self.world if len({*values}) > 1 else values[0] for name, values in columns.items()}

    def alike(self, kind: str, mine: dict[str, Any]) -> None:
        """Raise ValueError on all ranks, with both values, where two describe their run differently."""
        every = self.exchange(kind, mine)
        for r, other in enumerate(every):
            for name in {**every[0], **other}:
                if (a := every[0].get(name)) != (b := other.get(name)):
                    self.over = True
                    raise ValueError(f"{name} is {a!r:.300} on rank 0 and {b!r:.300} on rank {r}; give all ranks the same")

    def fail(self, error: BaseException) -> None:
        """Let the others end too, with this rank's error; say of one that only follows from another's whose it was."""
        if not self.together or self.over:
            return
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error)):
            say(error, self._lost())
            return
        self.over, notes = True, "; ".join(getattr(error, "__notes__", ()))
        text = f"rank {self.rank} failed: {type(error).__name__}: {error}{f' ({notes})' if notes else ''}"
        with contextlib.suppress(Exception):
            store = dist.distributed_c10d._get_default_store()
            store.set(f"{self._place}/failed/{store.add(f'{self._place}/failures', 1)}", text)
            self._withdraw(store)

    @contextlib.contextmanager
    def _or_lost(self) -> Iterator[None]:
        """Raise RankFailed for a connection that ends."""
        try:
            yield
        except RuntimeError as error:
            traceback.clear_frames(error.__traceback__)  # a group's connections are closed when nothing holds it any more
            raise RankFailed(self._lost(any(word in str(error).lower() for word in ("timed out", "timeout")))) from error

    def _withdraw(self, store: Any, gone: Collection[int] = ()) -> None:
        """Let those who wait for this rank hear that it is out, after its mark that it is no dead one."""
        store.set(f"{self._place}/out/{self.rank}", "")
        close_group()
        end = time.monotonic() + PATIENCE
        while self.first and self._present(store) - {*gone} and time.monotonic() < end:
            time.sleep(0.02)  # the store may end with the process of rank 0, and the others have yet to read it

    def _present(self, store: Any) -> set[int]:
        """Return the other ranks that have not withdrawn."""
        return {r for r in range(self.world) if r != self.rank and not store.check([f"{self._place}/out/{r}"])}

    def _ended(self, rank: int) -> bool:
        """Return whether the connection to a rank is closed; what is sent to one that is there takes no waiting."""
        try:
            dist.isend(torch.zeros(1), rank, next(iter(groups.values())), tag=1)
        except RuntimeError:
            return True
        return False

    def _lost(self, waited: bool = False) -> str:
        """Return why the ranks have lost one another: the first error of any, or who is gone without a word."""
        self.over = True
        with contextlib.suppress(Exception):
            store = dist.distributed_c10d._get_default_store()
            first, end, gone, inside = f"{self._place}/failed/1", time.monotonic() + PATIENCE, set[int](), {self.rank}
            if waited and not store.check([first]):  # its own connections are closed then, and tell nothing of the others'
                store.set(first, f"rank {self.rank} heard nothing from another for longer than the timeout given to "
                                 "init_process_group, as while that one writes a large save; give it a longer one")  # fmt: skip
            while inside and not gone and time.monotonic() < end:
                closed = {r for r in self._present(store) if self._ended(r)}
                gone = closed & (inside := self._present(store))  # who withdraws says so, and what ails it, before it closes
                if store.check([first]):
                    text = str(store.get(first).decode())
                    self._withdraw(store, gone)
                    return text
                time.sleep(0.05)
            self._withdraw(store, gone)
            if gone:
                return f"{', '.join(f'rank {r}' for r in sorted(gone))} ended, or was killed, without a word"
            return "the connection between the ranks broke, or one took longer than the timeout given to init_process_group"
        return "rank 0 ended, or was killed, without a word, and with it the store that all ranks share"
