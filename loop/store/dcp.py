"""Shards written and read by torch.distributed.checkpoint; imported where there are some, since that takes long."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed import get_rank
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict_saver import save as save_all
from torch.distributed.tensor import Replicate
from torch.distributed.tensor import empty as empty_sharded

from . import disk, manifest
from .sharded import KEY

if TYPE_CHECKING:
    from .sharded import Ranks


class Files(FileSystem):
    """Files that tell of a full disk in its own words; `made`: those that this rank wrote."""

    def __init__(self) -> None:
        self.made: list[Path] = []

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        """Open one."""
        self.made.append(Path(path))
        with disk.opened(Path(path)) as sink:
            yield sink

    def mkdir(self, path: Any) -> None:
        """Make the folder of the shards, in the draft that the first rank made."""
        if not Path(path).parent.is_dir():
            raise ValueError(f"{Path(path).parent.parent} is another folder on rank {get_rank()} than on rank 0: give Checkpoint "
                             "one on a file system that all ranks share")  # fmt: skip
        Path(path).mkdir(exist_ok=True)

    def rename(self, path: Any, new_path: Any) -> None:
        """Rename one."""
        super().rename(path, new_path)
        self.made.append(Path(new_path))


class Writer(FileSystemWriter):
    """Writes the shards of this rank."""

    def __init__(self, place: Path) -> None:
        super().__init__(place, sync_files=False)  # a file is flushed where it is closed
        self.fs = self.files = Files()

    def storage_meta(self) -> StorageMeta | None:
        """Return nothing: a path and a random number would be in the checkpoint."""
        return None


def save(place: Path, shards: dict[str, tuple[Tensor, dict[str, Any]]], ranks: Ranks) -> dict[str, Any]:
    """Write the shards, as all ranks do, say in the placeholders where each lies, and return manifest entries of this rank's."""
    writer = Writer(place)
    try:
        index = save_all({name: tensor for name, (tensor, _) in shards.items()}, storage_writer=writer,
                         planner=DefaultSavePlanner(flatten_state_dict=False), process_group=ranks.host)  # fmt: skip
    except CheckpointException as error:  # which is no Exception, and holds that of each rank
        raise error.failures[min(error.failures)][0] from None
    for name, (_, placeholder) in shards.items():
        for chunk in index.state_dict_metadata[name].chunks:
            at = index.storage_data[MetadataIndex(name, chunk.offsets)]
            placeholder["chunks"].append([[*chunk.offsets], [*chunk.sizes], at.relative_path, at.offset, at.length])
    disk.sync(place)
    return {path.name: manifest.entry(path) for path in writer.files.made if path.exists()}


class Wanted:
    """Tensors to read from a folder that holds these files."""

    def __init__(self, place: Path, files: set[str]) -> None:
        self.place, self.files = place, files
        self.tensors: dict[str, Tensor] = {}
        self.index, self.at = Metadata({}), dict[MetadataIndex, _StorageInfo]()

    def add(self, placeholder: dict[str, Any], like: Any) -> Tensor:
        """Return the tensor that will be read, laid out as `like` is, or whole; its numbers come with `read`."""
        name, shape, dtype = placeholder[KEY], torch.Size(placeholder["shape"]), placeholder["dtype"]
        chunks = list[ChunkStorageMetadata]()
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"{name} is of type {dtype!r}")
        for offsets, sizes, file, start, length in placeholder["chunks"]:
            if file not in self.files:
                raise ValueError(f"{name} would be read from {file!r}, which is no file of it")
            if not all(0 <= at <= at + size <= of for at, size, of in zip(offsets, sizes, shape, strict=True)):
                raise ValueError(f"{name} has a part beyond its shape")
            chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
            self.at[MetadataIndex(name, offsets)] = _StorageInfo(file, start, length)
        if sum(math.prod(chunk.sizes) for chunk in chunks) != shape.numel():
            raise ValueError(f"{name} is not whole")
        self.index.state_dict_metadata[name] = TensorStorageMetadata(TensorProperties(dtype=dtype), shape, chunks)
        if like is None:
            made = torch.empty(shape, dtype=dtype)
        else:  # what is kept in another shape than its parameter's may have no dimension to be cut in
            fits = len(shape) == like.ndim
            placements = like.placements if fits else [Replicate()] * like.device_mesh.ndim
            made = empty_sharded(shape, dtype=dtype, device_mesh=like.device_mesh, placements=placements).cpu()
        self.tensors[name] = made
        return made

    def read(self) -> None:
        """Read them all; raises Damaged, naming the file."""
        reader, planner = FileSystemReader(self.place), DefaultLoadPlanner(flatten_state_dict=False)
        files = reader.fs = Reads()
        planner.set_up_planner(self.tensors, self.index, True)
        self.index.storage_data = self.at
        reader.set_up_storage_reader(self.index, True)
        try:
            reader.read_data(planner.create_local_plan(), planner).wait()
        except (OSError, MemoryError):
            raise
        except Exception:  # torch's words advise to load it with code and all
            place = files.path or self.place
            raise manifest.Damaged(f"{place} does not hold the tensors that it should, and was not loaded") from None


class Reads(FileSystem):
    """Files to read; `path`: the last that was opened."""

    path: Path | None = None

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        """Open one."""
        self.path = Path(path)
        with self.path.open(mode) as file:
            yield file
