"""Several ranks on one machine: real processes over gloo, started cheaply, each of which sends back what it ended with.

`run` starts `worker(rank, world, *args)` once a rank, under what torchrun would have set, and returns one `Ended` a rank. A
rank that hangs is a failure of the test, which shows where every rank stands; none outlives its test.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import functools
import multiprocessing as mp
import os
import pickle
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

LIMIT = 60.0  # seconds that all ranks of one test may take
QUIET = 10.0  # and that one of them waits for the others within a collective
WRAPS = ("ddp", "fsdp")

context = mp.get_context("forkserver")
context.set_forkserver_preload(["many_preload"])


@functools.cache
def serve() -> None:
    """Start the fork server, where its modules can be found: it does not take over sys.path before it imports them."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *([before] if before else [])])
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


@dataclass
class Ended:
    """How a rank ended: what its worker returned or raised (`error`: type, text and notes), after how many seconds."""

    value: Any = None
    error: str = ""
    seconds: float = 0.0
    code: int | None = None  # exit status; below 0 the signal
    said: str = ""  # on stdout and stderr


def run(worker: Callable[..., Any], world: int, *args: Any, limit: float = LIMIT, quiet: float = QUIET, group: bool = True,
        agent: bool = True, measured: bool = True) -> list[Ended]:  # fmt: skip
    """Return how `world` ranks ended.

    `quiet`: the process group's timeout; without `group` there is none. `agent`: the store by which ranks meet outlives them,
    as torchrun's does; without it rank 0 keeps it, as in a program that starts its processes itself. `measured`: ranks may be
    covered as the test is.
    """
    serve()
    store = dist.TCPStore("127.0.0.1", 0, world, is_master=True, wait_for_workers=False)
    port = store.port
    if not agent:
        del store
    with tempfile.TemporaryDirectory() as folder:
        ranks = [Rank(worker, rank, world, args, port, agent, Path(folder), quiet if group else None, limit, measured)
                 for rank in range(world)]  # fmt: skip
        try:
            end, pending = time.monotonic() + limit, list(ranks)
            while pending and (ready := wait([rank.pipe for rank in pending], max(0.0, end - time.monotonic()))):
                for rank in [rank for rank in pending if rank.pipe in ready]:
                    rank.receive()
                    pending.remove(rank)
            if pending:
                told = "\n".join(f"--- rank {rank.rank}: {rank.state}\n{rank.said}" for rank in ranks)
                pytest.fail(f"ranks {[rank.rank for rank in pending]} of {world} hang after {limit:g} s\n{told}", pytrace=False)
            return [rank.ended() for rank in ranks]
        finally:
            for rank in ranks:
                rank.close()


def values(worker: Callable[..., Any], world: int, *args: Any, **kwargs: Any) -> list[Any]:
    """Return what each rank's worker returned; a rank that raised, or died, is a failure."""
    found = run(worker, world, *args, **kwargs)
    bad = [
        f"rank {i} (exit status {one.code}): {one.error}\n{one.said}" for i, one in enumerate(found) if one.error or one.code
    ]
    if bad:
        pytest.fail("\n".join(bad), pytrace=False)
    return [one.value for one in found]


def errors(worker: Callable[..., Any], world: int, *args: Any, within: float = 30.0, **kwargs: Any) -> list[str]:
    """Return what each rank's worker raised, none later than `within` seconds; a rank that raised nothing is a failure."""
    found = run(worker, world, *args, **kwargs)
    for i, one in enumerate(found):
        assert one.error, f"rank {i} raised nothing: {one}"
        assert one.seconds < within, f"rank {i} took {one.seconds:.1f} s: {one.error}"
    return [one.error for one in found]


class Rank:
    """One process, as its starter sees it."""

    def __init__(self, worker: Any, rank: int, world: int, args: Any, port: int, agent: bool, folder: Path,
                 quiet: float | None, limit: float, measured: bool) -> None:  # fmt: skip
        self.rank, self.path, self.result = rank, folder / f"{rank}.txt", Ended()
        self.path.touch()
        self.pipe, theirs = context.Pipe(duplex=False)
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port,
                       "MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": agent, "GLOO_SOCKET_IFNAME": "lo"}  # fmt: skip
        environment = {name: str(value) for name, value in environment.items()}
        coverage = sys.modules.get("coverage")
        if measured and coverage and getattr(coverage.Coverage.current(), "_started", False):  # a test may not be counted
            environment["MANY_COVERED"] = "1"
        self.process = context.Process(
            target=child, args=(theirs, worker, args, environment, str(self.path), quiet, limit), daemon=True
        )
        self.process.start()
        theirs.close()

    @property
    def said(self) -> str:
        return self.path.read_text(errors="replace")

    @property
    def state(self) -> str:
        return self.result.error or ("ended" if self.process.exitcode is not None else "running")

    def receive(self) -> None:
        with contextlib.suppress(EOFError):  # it died
            self.result = pickle.loads(self.pipe.recv_bytes())

    def ended(self) -> Ended:
        self.process.join(10)
        self.result.code, self.result.said = self.process.exitcode, self.said
        return self.result

    def close(self) -> None:
        if self.process.exitcode is None:
            self.process.kill()
        self.process.join(10)
        self.pipe.close()


def covered() -> Any:
    """Measure what a rank runs, where its test's own process is measured; a rank that is killed tells nothing."""
    if "MANY_COVERED" not in os.environ:
        return None
    import coverage

    root = Path(__file__).parents[1]
    measured = coverage.Coverage(str(root / ".coverage"), data_suffix=True, config_file=str(root / "pyproject.toml"))
    measured.start()
    return measured


def child(pipe: Connection, worker: Any, args: Any, environment: dict[str, str], path: str, quiet: float | None,
          limit: float) -> None:  # fmt: skip
    """What runs in a rank's process."""
    os.environ.update(environment)
    said = os.open(path, os.O_WRONLY | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    faulthandler.dump_traceback_later(limit - 3, file=sys.stderr)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the fork server ignores it
    torch.set_num_threads(1)
    measured = covered()
    start = time.monotonic()
    try:
        if quiet is not None:
            dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=quiet))
            dist.barrier()  # a rank that ends at once would close the connections that another is yet to make
        ended = Ended(worker(int(environment["RANK"]), int(environment["WORLD_SIZE"]), *args))
    except BaseException as error:
        ended = Ended(error="\n".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())]))
        if not isinstance(error, Exception) or os.environ.get("MANY_TRACES"):
            sys.excepthook(type(error), error, error.__traceback__)
    ended.seconds = time.monotonic() - start
    sys.stdout.flush()
    sys.stderr.flush()
    if measured is not None:
        measured.stop()
        with contextlib.suppress(Exception):  # a test may have filled this rank's disk
            measured.save()
    pipe.send_bytes(pickle.dumps(ended))
    pipe.close()
    os._exit(0)  # a failed collective may leave threads that a plain exit would wait for


def may_have_children() -> None:
    """Let this rank's loaders start workers, which outlive it by moments where it is killed."""
    mp.current_process()._config["daemon"] = False  # type: ignore[attr-defined]


# --------------------------------------------------------------------------------------------------- models on several ranks


def wrap(model: nn.Module, how: str, **kwargs: Any) -> nn.Module:
    """Return the model as the program would wrap it: "ddp", or "fsdp" for fully_shard of each layer with weights and of all."""
    if how == "ddp":
        return DistributedDataParallel(model, **kwargs)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh, **kwargs)
    return fully_shard(model, mesh=mesh, **kwargs)


def whole(x: Any) -> Any:
    """Return a copy of a tensor with what all ranks hold of it; all must ask."""
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return all weights and buffers, whole, by the names that they have without DDP."""
    return {name.removeprefix("module."): whole(value) for name, value in model.state_dict().items()}


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return weights, buffers and optimizer state, whole, to be compared bit by bit."""
    found = weights(model)
    for i, state in optimizer.state_dict()["state"].items():
        found |= {f"optimizer.{i}.{name}": whole(value) for name, value in state.items() if isinstance(value, torch.Tensor)}
    return found


def sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], relative: float = 1e-12,
          where: str = "") -> None:  # fmt: skip
    """The same names, and values that differ by no more than rounding of what the largest of them is."""
    assert a.keys() == b.keys()
    for name in a:
        scale = max(float(b[name].abs().max()), 1e-3)
        far = float((a[name] - b[name]).abs().max()) / scale
        assert far <= relative, f"{where} {name}: off by {far:.3g} of its largest"
