"""Checkpoints of which each rank holds a part: DTensors go to `shards/`, once, and a placeholder says where each lies.

A placeholder stands in `model.pt` and `state.pt` and is plain data, so that a reader unpickles nothing that could run
code: torch's own index of the shards, `.metadata`, is written for other tools and never read here.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from . import disk, manifest
from .disk import Contents
from .plain import is_sharded
from .read import Found

KEY = "(in shards)"  # of a placeholder: the tensor's name there
FOLDER = "shards"
Places = tuple[Any, ...]


class Ranks(Protocol):
    """What is asked of a run's ranks; with one process `exchange` gives what it was given, alone."""

    @property
    def first(self) -> bool: ...  # noqa: D102
    @property
    def host(self) -> Any: ...  # noqa: D102  # the group of all ranks that talks over the host
    def exchange(self, kind: str, thing: Any) -> list[Any]: ...  # noqa: D102


def write_together(folder: Path, contents: Contents, reasons: Sequence[str], known: dict[tuple[str, str], Any],
                   ranks: Ranks) -> Path:  # fmt: skip
    """Write a checkpoint once, whole or not at all, as all ranks do at the same moment; return its folder, the same on all.

    Without a DTensor in it the first rank writes it alone, as `write` does. Where a rank fails, all raise: its OSError, or
    RuntimeError naming the rank and its error; RuntimeError too where ranks hold different DTensors.
    """
    contents, shards = split(contents)
    steps = disk.writing(folder, contents, reasons, known) if ranks.first else None
    try:
        began = _all(ranks, lambda: (steps and str(next(steps)), [*shards]))
        for rank, (_, names) in enumerate(began):
            if unlike := set(names) ^ set(began[0][1]):
                raise RuntimeError(f"ranks 0 and {rank} hold different sharded tensors: {', '.join(sorted(unlike)[:4])}")
        files: dict[str, Any] = {}
        if shards:
            from .dcp import save

            place = Path(began[0][0]) / FOLDER
            for made in _all(ranks, lambda: save(place, shards, ranks)):
                files |= {f"{FOLDER}/{name}": entry for name, entry in made.items()}
        return Path(_all(ranks, lambda: steps and str(disk.finish(steps, files)))[0])
    finally:
        if steps is not None:
            steps.close()


def check_same_folder(folder: Path, ranks: Ranks) -> None:
    """Raise ValueError, on all ranks, where one can't write where the first does: else the first save would tell, and late."""
    with tempfile.TemporaryDirectory(dir=folder) if ranks.first else contextlib.nullcontext("") as probe:
        there = ranks.exchange("begins training", probe)[0]
        seen = ranks.exchange("begins training", os.access(there, os.W_OK))
    if not all(seen):
        raise ValueError(f"{folder} is another folder on rank {seen.index(False)} than on rank 0, or can't be written there: give "
                         "Checkpoint one on a file system that all ranks share")  # fmt: skip


def _all(ranks: Ranks, act: Callable[[], Any]) -> list[Any]:
    """Do it, and return what it gave on each rank; raise where it failed on any.

    An OSError is raised by all ranks or by none: a run may go on from a full disk, and then all ranks must.
    """
    made, error = None, None
    try:
        made = act()
    except BaseException as mine:
        error = mine
    parts: list[Any] = []
    if isinstance(error, OSError):
        parts = [error.errno, error.strerror or str(error), *([str(error.filename)] if error.filename else [])]
    found = ranks.exchange("saves", (made, None if error is None else (repr(error), parts)))
    failed = [rank for rank, (_, about) in enumerate(found) if about is not None]
    if not failed:
        return [one for one, _ in found]
    first = next((rank for rank in failed if not found[rank][1][1]), failed[0])
    said, parts = found[first][1]
    if error is not None and isinstance(error, OSError) == bool(parts):
        raise error
    raise OSError(*parts) if parts else RuntimeError(f"rank {first} failed to save: {said}")


def split(contents: Contents) -> tuple[Contents, dict[str, tuple[Tensor, dict[str, Any]]]]:
    """Return it with placeholders where DTensors stand, and, by name, each of these with its placeholder.

    What is kept in a file beside the checkpoints, and holds some, moves into the checkpoint itself.
    """
    shards: dict[str, tuple[Tensor, dict[str, Any]]] = {}

    def out(x: Any, path: Places) -> Any:
        if not is_sharded(x):
            return x
        name = ".".join(map(str, path))  # as torch's own flattening has it
        while name in shards:
            name += "'"
        shards[name] = x.detach(), {KEY: name, "shape": [*x.shape], "dtype": x.dtype, "chunks": []}
        return shards[name][1]

    model, state, beside = mapped(contents.model, out, ("model",)), mapped(contents.state, out), dict(contents.beside)
    for (key, name), content in contents.beside.items():
        before = len(shards)
        inside = mapped(content, out, ("callbacks", key, name))
        if len(shards) > before:
            del beside[key, name]
            state["callbacks"][key][name] = inside  # the dicts are copies
    return replace(contents, model=model, state=state, beside=beside) if shards else contents, shards


def fill(found: Found, layout: Callable[[str], Any] = lambda name: None) -> None:
    """Read what stands in a checkpoint's shards, as DTensors that lie as `layout(name of the parameter)` does, or whole.

    Each process reads what it needs, and sends no message, so that any number of ranks reads what any other wrote.
    What is read lies in host memory. Raises Damaged, naming the file, for shards that can't be what was written.
    """
    names = {name for name in found.about["files"] if name not in disk.FILES}
    if not names:
        return
    from .dcp import Wanted

    wanted = Wanted(found.place / FOLDER, {name.removeprefix(f"{FOLDER}/") for name in names})

    def take(x: Any, path: Places) -> Any:
        if type(x) is not dict or KEY not in x:
            return x
        near = (layout(key) for key in reversed(path) if isinstance(key, str))
        return wanted.add(x, next(filter(is_sharded, near), None))

    made = []
    for file, part in zip(disk.FILES, (found.model, found.state), strict=True):
        try:
            made.append(mapped(part, take))
        except (KeyError, TypeError, ValueError) as error:
            raise manifest.Damaged(f"{found.place / file} was not written by hookloop: {error!r}") from None
    wanted.read()
    found.model, found.state = made


def laid(x: Any, like: Any) -> Any:
    """Return plain data with tensors of the shape of `like` cut as it is; every rank holds them whole, and sends no message."""
    if not is_sharded(like):
        return x
    from torch.distributed.tensor import distribute_tensor

    def cut(x: Any, path: Places) -> Any:
        if is_sharded(x) or not isinstance(x, Tensor) or x.shape != like.shape:
            return x
        return distribute_tensor(x, like.device_mesh, like.placements, src_data_rank=None).clone()  # lets go of the whole

    return mapped(x, cut)


def filled_by(fill: Callable[[Tensor], Any], p: Any) -> None:
    """Fill a parameter; a sharded one with its part of what the whole would be, however many ranks share it."""
    fill(whole := p.full_tensor() if is_sharded(p) else p)
    if whole is not p:
        p.copy_(laid(whole, p))


def mapped(x: Any, change: Callable[[Any, Places], Any], path: Places = ()) -> Any:
    """Return plain data with what `change` makes of each entry, which it is given with the keys that lead there."""
    if (changed := change(x, path)) is not x:
        return changed
    if type(x) in (dict, OrderedDict):
        copy = type(x)((key, mapped(value, change, (*path, key))) for key, value in x.items())
        if type(x) is OrderedDict:
            vars(copy).update(vars(x))  # a state dict's versions of modules
        return copy
    return type(x)(mapped(value, change, (*path, i)) for i, value in enumerate(x)) if type(x) in (list, tuple) else x
