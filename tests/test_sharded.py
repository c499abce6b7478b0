"""Checkpoints of a model sharded by FSDP2: written once by all ranks, read by any number; real processes over gloo."""

from __future__ import annotations

import contextlib
import datetime
import functools
import io
import json
import multiprocessing as mp
import os
import pickle
import resource
import shutil
import signal
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from hookloop.callbacks import Checkpoint
from hookloop.loop import State, store
from hookloop.loop.store import manifest

FORK = mp.get_context("forkserver")
FORK.set_forkserver_preload(["torch.distributed.fsdp", "torch.distributed.checkpoint", "hookloop.callbacks"])
LIMIT = 40


class Ranks:
    """What a run's ranks are asked for."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world, self.first = rank, world, rank == 0
        self.host: Any = dist.new_group(backend="gloo")

    def exchange(self, kind: str, thing: Any) -> list[Any]:
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, (kind, thing), group=self.host)
        assert {one for one, _ in found} == {kind}, "ranks are at different places"
        return [one for _, one in found]


def rank_main(act: Callable[..., Any], rank: int, world: int, port: int, out: str, arguments: Any) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", rank=rank, world_size=world, timeout=datetime.timedelta(seconds=15))
        found: Any = act(Ranks(rank, world), *arguments)
    except BaseException:
        found = {"error": traceback.format_exc()}
    torch.save(found, f"{out}/{rank}.pt")
    os._exit(0)  # a failed collective may leave threads that a plain exit would wait for


def run(world: int, tmp: Path, act: Callable[..., Any], *arguments: Any, dies: int | None = None) -> list[Any]:
    """Run it on so many ranks, and return what it gave on each; a rank that `dies` gives nothing."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    out = tmp / f"ranks-{time.monotonic_ns()}"
    out.mkdir()
    ranks = [FORK.Process(target=rank_main, args=(act, rank, world, port, str(out), arguments)) for rank in range(world)]
    for process in ranks:
        process.start()
    end = time.monotonic() + LIMIT
    for process in ranks:
        process.join(max(end - time.monotonic(), 0.1))
    hung = [i for i, process in enumerate(ranks) if process.is_alive()]
    for i in hung:
        ranks[i].kill()
    assert not hung, f"ranks {hung} hang"
    found = [torch.load(out / f"{rank}.pt") for rank in range(world) if rank != dies]
    errors = [one["error"] for one in found if isinstance(one, dict) and "error" in one]
    assert not errors, errors[0]
    return found


def net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def split(model: nn.Sequential) -> nn.Sequential:
    """Two groups: the root is not sharded again after a forward."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model[1], mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    weights, biases = ([p for name, p in model.named_parameters() if kind in name] for kind in ("weight", "bias"))
    return torch.optim.AdamW([{"params": weights, "weight_decay": 0.1}, {"params": biases, "weight_decay": 0.0}], lr=0.05)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """The same data on every rank, so that any number of ranks trains alike."""
    for i in steps:
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(i))
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def contents(model: nn.Module, optimizer: torch.optim.Optimizer) -> store.Contents:
    named = store.Named(model, optimizer)
    best = {name: x.detach().to("cpu", copy=True) for name, x in named.model_state().items()}
    callbacks = {"EarlyStopping": {"best": 1.5, "weights": None}, "Own": {"deep": [1, (best["3.bias"], {"a": 2})]}}
    settings = named.options()
    state = {"optimizer": named.optimizer_state(), "settings": settings, "again": settings, "callbacks": callbacks}
    return store.Contents(3, named.model_state(), state, {("EarlyStopping", "weights"): best})


def whole(x: Any) -> Any:
    """Plain data, of which nothing is sharded."""
    if isinstance(x, dict):
        return {key: whole(one) for key, one in x.items()}
    return x.full_tensor().clone() if store.is_sharded(x) else x.clone() if isinstance(x, torch.Tensor) else x


def held(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    named = store.Named(model, optimizer)
    return whole({"model": named.model_state(), "optimizer": named.optimizer_state()["state"]})


def local(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """What lies on this rank."""
    named = store.Named(model, optimizer)
    found = [*named.model_state().values(), *(x for one in named.optimizer_state()["state"].values() for x in one.values())]
    return [x.to_local() if store.is_sharded(x) else x for x in found]


def same(a: Any, b: Any, where: str = "") -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            same(a[key], b[key], f"{where} {key}")
    elif isinstance(a, torch.Tensor):
        assert not any(map(store.is_sharded, (a, b))), where
        assert a.dtype == b.dtype, where
        assert torch.equal(a, b), where
    else:
        assert a == b, where


def take(found: store.Found, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """As a resume does."""
    named = store.Named(model, optimizer)
    store.fill(found, named.layout())
    saved, settings = found.state["optimizer"], found.state["settings"]
    amiss = named.model_misfits(found.model), named.rounded(found.model)
    assert not any((*amiss, named.optimizer_misfits(saved, settings, named.options())))
    named.load_model(found.model)
    named.load_optimizer(saved, settings, named.options())


def write(ranks: Ranks, folder: str) -> Any:
    """Train, save, read it back into a model of other weights, and train on: the same bits on each rank."""
    model = split(net(0))
    optimizer = adamw(model)
    train(model, optimizer, range(3))
    with torch.no_grad():
        model(torch.ones(2, 6))  # as an evaluation does, which leaves FSDP2's root whole
    path = store.write_together(Path(folder), contents(model, optimizer), ["epoch"], {}, ranks)
    assert ranks.exchange("path", str(path)) == [str(path)] * ranks.world
    full, after = held(model, optimizer), [x.clone() for x in local(model, optimizer)]
    again = split(net(1))
    other, found = adamw(again), store.read(path)
    assert found is not None
    take(found, again, other)
    assert all(map(torch.equal, local(again, other), after))
    best = found.state["callbacks"]["EarlyStopping"]["weights"]
    assert all(map(store.is_sharded, (best["1.weight"], found.state["optimizer"]["state"]["1.weight"]["exp_avg"])))
    same(whole(best), full["model"])
    for one, its in ((model, optimizer), (again, other)):
        one.train()
        train(one, its, range(3, 5))
    assert all(map(torch.equal, local(again, other), local(model, optimizer)))
    return {"saved": full, "later": held(model, optimizer), "bytes": sum(x.nbytes for x in after)}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A checkpoint of two ranks, and what they held."""
    folder = tmp_path_factory.mktemp("two")
    return folder / "run" / "step-00000003", run(2, folder, write, str(folder / "run"))[0]


def test_ranks_write_once_and_read_the_same_bits(two: tuple[Path, Any]) -> None:
    """The rest is asserted in `write`, by each rank."""
    checkpoint, _ = two
    assert sorted(p.name for p in checkpoint.parent.iterdir()) == [checkpoint.name]
    names = {str(p.relative_to(checkpoint)) for p in checkpoint.rglob("*") if p.is_file()} - {manifest.NAME}
    assert names == {"model.pt", "state.pt", "shards/.metadata", "shards/__0_0.distcp", "shards/__1_0.distcp"}
    assert names == json.loads((checkpoint / manifest.NAME).read_text())["files"].keys()
    assert str(checkpoint.parent).encode() not in b"".join((checkpoint / name).read_bytes() for name in names)


def test_one_process_reads_what_ranks_wrote(two: tuple[Path, Any]) -> None:
    checkpoint, held_then = two
    found = store.read(checkpoint)
    assert found is not None
    store.fill(found)
    same(dict(found.model), held_then["saved"]["model"])
    same(found.state["callbacks"]["EarlyStopping"], {"best": 1.5, "weights": held_then["saved"]["model"]})
    same(found.state["optimizer"]["state"], held_then["saved"]["optimizer"])
    one, (deep, other) = found.state["callbacks"]["Own"]["deep"]
    assert (one, other) == (1, {"a": 2})
    same(deep, held_then["saved"]["model"]["3.bias"])
    assert list(found.model) == list(net(0).state_dict())
    assert found.model._metadata == net(0).state_dict()._metadata  # type: ignore[attr-defined]
    model = net(1)
    optimizer, found = adamw(model), store.read(checkpoint)
    assert found is not None
    take(found, model, optimizer)
    same(held(model, optimizer), held_then["saved"])


def test_torch_alone_reads_the_shards(two: tuple[Path, Any]) -> None:
    """Under the names of its own flattening."""
    from torch.distributed.checkpoint import load

    model = {
        name: torch.zeros_like(x) for name, x in net(1).state_dict().items() if "running" not in name and "num_" not in name
    }
    with pytest.warns(UserWarning, match="single process"):
        load({"model": model}, checkpoint_id=two[0] / "shards")
    same(model, {name: x for name, x in two[1]["saved"]["model"].items() if name in model})


def reads(ranks: Ranks, checkpoint: str, later: bool) -> Any:
    model = split(net(1))
    optimizer, found = adamw(model), store.read(checkpoint)
    assert found is not None
    take(found, model, optimizer)
    then = held(model, optimizer)
    train(model, optimizer, range(3, 5))
    return then, held(model, optimizer)


def test_ranks_read_what_one_process_wrote(tmp_path: Path) -> None:
    model = net(0)
    optimizer = adamw(model)
    train(model, optimizer, range(3))
    store.write(tmp_path / "run", contents(model, optimizer), ["epoch"], {})
    then = held(model, optimizer)
    train(model, optimizer, range(3, 5))
    later = held(model, optimizer)
    for found, further in run(2, tmp_path, reads, str(tmp_path / "run"), True):
        same(found, then)
        for name, x in later["model"].items():
            torch.testing.assert_close(further["model"][name], x)


@pytest.mark.slow
@pytest.mark.parametrize(("wrote", "read"), [(2, 4), (4, 2), (4, 3), (1, 2), (4, 1)])
def test_any_number_of_ranks_reads_what_any_other_wrote(wrote: int, read: int, tmp_path: Path) -> None:
    """Four ranks share three and five rows: some hold none."""
    first = run(wrote, tmp_path, write, str(tmp_path / "run"))[0]
    for found, further in run(read, tmp_path, reads, str(tmp_path / "run"), True):
        same(found, first["saved"])
        for name, x in first["later"]["model"].items():
            torch.testing.assert_close(further["model"][name], x)


def odd(ranks: Ranks, checkpoint: str, folder: str) -> None:
    """Into a wider model, into one of another type, and state of another type than its parameter's."""
    torch.manual_seed(1)
    wide = split(nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3)))
    named, found = store.Named(wide, adamw(wide)), store.read(checkpoint)
    assert found is not None
    store.fill(found, named.layout())
    amiss = named.model_misfits(found.model)
    assert list(amiss) == ["1.bias", "1.weight", "3.weight"]
    assert amiss["1.weight"] == "1.weight is (7, 6) here and (5, 6) in the checkpoint"
    before = whole(named.model_state())
    named.load_model(found.model, amiss)
    now, saved = whole(named.model_state()), whole(found.model)
    same(now, {name: before[name] if name in amiss else x for name, x in saved.items()})

    double = split(net(1).double())
    optimizer, found = adamw(double), store.read(checkpoint)
    named = store.Named(double, optimizer)
    assert found is not None
    store.fill(found, named.layout())
    rounded = named.rounded(found.model)
    assert rounded["1.weight"] == "1.weight is torch.float64 here and torch.float32 in the checkpoint"
    named.load_model(found.model)
    named.load_optimizer(found.state["optimizer"], found.state["settings"], named.options(), rounded=rounded)
    same(whole(named.model_state()), {name: x.double() if x.is_floating_point() else x for name, x in saved.items()})
    state = optimizer.state[double[1].weight]
    same(whole(state["exp_avg"]), whole(found.state["optimizer"]["state"]["1.weight"]["exp_avg"]).double())
    state["exp_avg"] = state["exp_avg"].float() / 3
    path = store.write_together(Path(folder), contents(double, optimizer), ["epoch"], {}, ranks)
    again = split(net(2).double())
    other, found = adamw(again), store.read(path)
    assert found is not None
    take(found, again, other)
    same(held(again, other), held(double, optimizer))
    assert other.state[again[1].weight]["exp_avg"].dtype == torch.float32


def test_what_does_not_fit_is_named_and_state_keeps_its_type(two: tuple[Path, Any], tmp_path: Path) -> None:
    run(2, tmp_path, odd, str(two[0]), str(tmp_path / "run"))


# Damage


SHARDS = ("shards/__0_0.distcp", "shards/__1_0.distcp", "shards/.metadata")


def copied(two: tuple[Path, Any], folder: Path) -> Path:
    return Path(shutil.copytree(two[0], folder / two[0].name))


@pytest.mark.parametrize("file", SHARDS)
@pytest.mark.parametrize("kind", ["missing", "shorter", "longer", "a bit", "a folder"])
def test_a_damaged_shard_is_refused_by_name(two: tuple[Path, Any], kind: str, file: str, tmp_path: Path) -> None:
    checkpoint = copied(two, tmp_path)
    path = checkpoint / file
    content = bytearray(path.read_bytes())
    path.unlink()
    if kind == "a bit":
        content[len(content) // 2] ^= 1
    if kind == "a folder":
        path.mkdir()
    elif kind != "missing":
        path.write_bytes({"shorter": content[:-1], "longer": content + b"x"}.get(kind, content))
    with pytest.raises(manifest.Damaged, match=path.name):
        store.read(checkpoint)
    assert not store.readable(checkpoint)
    with pytest.raises(RuntimeError, match="no checkpoint can be read"):
        store.read(tmp_path)


def resign(checkpoint: Path) -> None:
    """Give it a manifest that matches what its files are now: its digests are no defence then."""
    old = json.loads((checkpoint / manifest.NAME).read_text())
    names = {name: manifest.entry(checkpoint / name) for name in old["files"]}
    (checkpoint / manifest.NAME).write_text(manifest.render(old["step"], old["reasons"], names, old["beside"]))


class Evil:
    """Pickled as a call."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return Path.touch, (self.canary,)


def test_no_code_in_the_index_of_the_shards_is_run(two: tuple[Path, Any], tmp_path: Path) -> None:
    """Torch's own reader does run it; here it is never loaded."""
    from torch.distributed.checkpoint import FileSystemReader

    checkpoint, canary = copied(two, tmp_path), tmp_path / "CANARY"
    (checkpoint / "shards/.metadata").write_bytes(pickle.dumps(Evil(canary)))
    resign(checkpoint)
    found = store.read(checkpoint)
    assert found is not None
    store.fill(found)
    same(dict(found.model), two[1]["saved"]["model"])
    assert not canary.exists()
    with contextlib.suppress(AttributeError):
        FileSystemReader(checkpoint / "shards").read_metadata()
    assert canary.exists()


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle", "noise"])
def test_no_code_in_a_shard_is_run(two: tuple[Path, Any], form: str, tmp_path: Path) -> None:
    """Every tensor of the second rank's file takes it in the place of its numbers."""
    checkpoint, canary, data = copied(two, tmp_path), tmp_path / "CANARY", io.BytesIO()
    if form == "pickle":
        data.write(pickle.dumps(Evil(canary)))
    elif form == "noise":
        data.write(b"\x80" * 100)
    else:
        torch.save(Evil(canary), data, _use_new_zipfile_serialization=form == "zip")
    (checkpoint / SHARDS[1]).write_bytes(data.getvalue())
    for name in ("model.pt", "state.pt"):
        content = torch.load(checkpoint / name, weights_only=True)
        for placeholder in placeholders(content):
            for chunk in placeholder["chunks"]:
                if chunk[2] in SHARDS[1]:
                    chunk[3:] = [0, len(data.getvalue())]
        torch.save(content, checkpoint / name)
    resign(checkpoint)
    found = store.read(checkpoint)
    assert found is not None
    with pytest.raises(manifest.Damaged, match=r"__1_0\.distcp"):
        store.fill(found)
    assert not canary.exists()
    if form != "noise":
        data.seek(0)
        pickle.load(data) if form == "pickle" else torch.load(data, weights_only=False)
        assert canary.exists()


def placeholders(x: Any) -> list[Any]:
    if isinstance(x, dict) and "(in shards)" in x:
        return [x]
    inside = x.values() if isinstance(x, dict) else x if isinstance(x, list | tuple) else ()
    return [one for part in inside for one in placeholders(part)]


FORGED: dict[str, Callable[[Any], Any]] = {
    "a file elsewhere": lambda p: p["chunks"][0].__setitem__(2, "../../secret.pt"),
    "an absolute file": lambda p: p["chunks"][0].__setitem__(2, "/etc/passwd"),
    "no chunk": lambda p: p["chunks"].clear(),
    "a smaller chunk": lambda p: p["chunks"][0].__setitem__(1, [1, 1]),
    "another shape": lambda p: p.__setitem__("shape", [7, 7]),
    "a shape of words": lambda p: p.__setitem__("shape", ["x"]),
    "a huge shape": lambda p: p.__setitem__("shape", [2**62, 2**62]),
    "no type": lambda p: p.__setitem__("dtype", None),
    "a type of words": lambda p: p.__setitem__("dtype", "float32"),
    "no chunks": lambda p: p.pop("chunks"),
    "chunks that are a number": lambda p: p.__setitem__("chunks", 3),
    "beyond the file": lambda p: p["chunks"][0].__setitem__(3, 10**9),
    "offsets beyond it": lambda p: p["chunks"][0].__setitem__(0, [10**6, 0]),
}  # fmt: skip


@pytest.mark.parametrize("what", FORGED)
def test_a_wrong_placeholder_is_refused_by_name(two: tuple[Path, Any], what: str, tmp_path: Path) -> None:
    checkpoint = copied(two, tmp_path)
    content = torch.load(checkpoint / "model.pt", weights_only=True)
    FORGED[what](content["1.weight"])
    torch.save(content, checkpoint / "model.pt")
    torch.save({"secret": torch.ones(5, 6)}, tmp_path / "secret.pt")
    resign(checkpoint)
    found = store.read(checkpoint)
    assert found is not None
    with pytest.raises(
        manifest.Damaged, match=rf"{checkpoint.name}/(model\.pt was not written by hookloop|shards/__0_0\.distcp)"
    ):
        store.fill(found)


@pytest.mark.parametrize("name", ["shards/../../x.pt", "shards/x.pt", "more.pt", "/etc/passwd"])
def test_a_manifest_of_other_files_is_refused_by_name(two: tuple[Path, Any], name: str, tmp_path: Path) -> None:
    checkpoint = copied(two, tmp_path)
    old = json.loads((checkpoint / manifest.NAME).read_text())
    files = {**old["files"], name: old["files"]["model.pt"]}
    (checkpoint / manifest.NAME).write_text(manifest.render(old["step"], old["reasons"], files, old["beside"]))
    with pytest.raises(manifest.Damaged, match=r"names files that no checkpoint has"):
        store.read(checkpoint)


# A rank that fails


def said(act: Callable[[], Any]) -> str:
    """What it raised."""
    try:
        return f"nothing, but gave {act()}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def fails(ranks: Ranks, folder: str) -> Any:
    """Each kind of failure in a row, after which the ranks are still in step, and a save goes well."""
    model, found, place = split(net(0)), dict[str, str](), Path(folder)
    optimizer = adamw(model)
    train(model, optimizer, range(1))
    write = functools.partial(store.write_together, reasons=["epoch"], known={}, ranks=ranks)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def bounded(rank: int, limit: int) -> None:
        old = resource.getrlimit(resource.RLIMIT_FSIZE)
        if ranks.rank == rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
        try:
            write(place, contents(model, optimizer))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)

    def partial() -> None:
        from torch.distributed.tensor import DTensor, Partial

        one: Any = model[1].weight
        bad = DTensor.from_local(torch.ones(2), one.device_mesh, [Partial()], run_check=False)
        store.Contents(3, {"sum": bad}, {}).check()

    def unlike() -> None:
        found = contents(model, optimizer)
        if ranks.rank == 1:
            found.model["more"] = found.model["0.weight"]
        write(place, found)

    def elsewhere() -> None:
        (place / str(ranks.rank)).mkdir()
        os.chdir(place / str(ranks.rank))
        write(Path("/proc/self/cwd/run"), contents(model, optimizer))  # as on two machines

    def both() -> None:
        def act() -> None:
            raise OSError(5, "the disk is broken") if ranks.first else KeyError("mine")

        store.sharded._all(ranks, act)

    write(place / "ok", contents(model, optimizer))
    for kind, act in {"second rank's shard": lambda: bounded(1, 4000), "first rank's shard": lambda: bounded(0, 4000),
                      "the state": lambda: bounded(0, os.path.getsize(place / "ok/step-00000003/shards/__0_0.distcp")),
                      "no folder": lambda: write(Path(__file__), contents(model, optimizer)),
                      "unlike": unlike, "elsewhere": elsewhere, "partial": partial, "both": both}.items():  # fmt: skip
        if kind == "the state":  # larger than a shard
            model.register_buffer("large", torch.zeros(100_000))
        found[kind] = said(act)
        if kind == "the state":
            del model.large
        assert ranks.exchange("in step", kind) == [kind] * ranks.world
        if ranks.first:
            left = [str(p) for p in place.rglob("*") if p.is_file() and "ok" not in p.parts]
            assert not left, (kind, left)
        dist.barrier()
    store.Contents(3, contents(model, optimizer).model, {}).check()
    assert "step-00000003" in said(lambda: write(place, contents(model, optimizer)))
    return found


def test_a_rank_that_fails_ends_the_save_for_all(tmp_path: Path) -> None:
    first, second = run(2, tmp_path, fails, str(tmp_path / "run"))
    for kind, file in (
        ("second rank's shard", "__1_0.distcp"),
        ("first rank's shard", "__0_0.distcp"),
        ("the state", "model.pt"),
    ):
        assert first[kind] == second[kind], kind
        assert first[kind].startswith("OSError: [Errno 27] File too large in writing "), first[kind]
        assert file in first[kind]
    assert first["no folder"] == second["no folder"] == f"FileExistsError: [Errno 17] File exists: '{__file__}'"
    assert first["unlike"] == second["unlike"] == "RuntimeError: ranks 0 and 1 hold different sharded tensors: model.more"
    for said_there in (first["elsewhere"], second["elsewhere"]):
        assert (
            "is another folder on rank 1 than on rank 0: give Checkpoint one on a file system that all ranks share"
            in said_there
        )
    assert (first["both"], second["both"]) == ("RuntimeError: rank 1 failed to save: KeyError('mine')", "KeyError: 'mine'")
    assert first["partial"].startswith("TypeError: can't save model['sum'] is a DTensor whose parts are yet to be summed")


def dies(ranks: Ranks, folder: str) -> Any:
    """The second rank is killed while it writes."""
    model = split(net(0))
    optimizer = adamw(model)
    train(model, optimizer, range(1))
    write = functools.partial(store.write_together, reasons=["epoch"], known={}, ranks=ranks)
    write(Path(folder), contents(model, optimizer))
    if ranks.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))  # whose signal ends a process that heeds it
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    return said(lambda: write(Path(folder), contents(model, optimizer)))


def test_a_rank_that_dies_leaves_nothing_that_could_be_read(tmp_path: Path) -> None:
    start = time.monotonic()
    (first,) = run(2, tmp_path, dies, str(tmp_path / "run"), dies=1)
    assert first.startswith("RuntimeError"), first
    assert time.monotonic() - start < 30
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["step-00000003"]
    assert store.read(tmp_path / "run") is not None


# Without a sharded tensor


def plainly(ranks: Ranks, folder: str) -> Any:
    model = net(0)
    optimizer = adamw(model)
    train(model, optimizer, range(3))
    made = contents(model, optimizer), contents(model, optimizer)
    if ranks.first:
        store.write(Path(folder) / "plain", made[0], ["epoch"], {})
    path = store.write_together(Path(folder) / "all", made[1], ["epoch"], {}, ranks)
    refused = said(lambda: store.write_together(Path(__file__), made[1], ["epoch"], {}, ranks))
    return str(path), refused


def test_a_model_that_is_not_sharded_is_written_by_the_first_rank_alone(tmp_path: Path) -> None:
    (path, refused), other = run(2, tmp_path, plainly, str(tmp_path))
    assert (path, refused) == other == (str(tmp_path / "all/step-00000003"), refused)
    assert refused.startswith("FileExistsError")
    both = [{p.relative_to(tmp_path / part): p.read_bytes() for p in (tmp_path / part).rglob("*") if p.is_file()}
            for part in ("plain", "all")]  # fmt: skip
    assert both[0] == both[1]
    assert len(both[0]) == 4  # with the best weights beside it


class Alone:
    """One process, without a process group."""

    first, host = True, None

    def exchange(self, kind: str, thing: Any) -> list[Any]:
        return [thing]


def test_one_process_writes_the_plain_files(tmp_path: Path) -> None:
    model = net(0)
    made, known = contents(model, adamw(model)), dict[Any, Any]()
    ways = {"plain": store.write(tmp_path / "plain", made, ["epoch"], {}),
            "all": store.write_together(tmp_path / "all", made, ["epoch"], known, Alone())}  # fmt: skip
    both = [
        {p.relative_to(tmp_path / part): p.read_bytes() for p in (tmp_path / part).rglob("*") if p.is_file()} for part in ways
    ]
    assert both[0] == both[1]
    assert list(known) == [("EarlyStopping", "weights")]
    assert ways["all"] == tmp_path / "all/step-00000003"
    with pytest.raises(FileExistsError, match="test_sharded"):
        store.write_together(Path(__file__), made, ["epoch"], {}, Alone())


# Copies, and what is refused


def copies(ranks: Ranks) -> Any:
    model = split(net(0))
    optimizer = adamw(model)
    train(model, optimizer, range(1))
    made = store.Copies()
    then = contents(model, optimizer)
    kept, before = made.of({"model": then.model, "optimizer": then.state["optimizer"]["state"]}), held(model, optimizer)
    made.wait()
    train(model, optimizer, range(1, 3))
    same(whole(kept["model"]), before["model"])
    same(whole(kept["optimizer"]), before["optimizer"])
    same(whole(then.beside["EarlyStopping", "weights"]), before["model"])
    with torch.no_grad():
        assert not torch.equal(whole(dict(model.state_dict()))["0.weight"], before["model"]["0.weight"])
    model(torch.ones(2, 6))
    named = store.Named(model, optimizer)
    assert not named.outside, "an evaluation left the root whole"
    return said(lambda: Checkpoint("x", background=True).on_setup(State(model, optimizer)))


def test_copies_of_sharded_tensors_stay_and_a_save_behind_them_is_refused(tmp_path: Path) -> None:
    for refused in run(2, tmp_path, copies):
        assert refused.startswith("ValueError: background=True can't save a sharded model (fully_shard)"), refused
