"""What a step must put back before it is redone: torch's generators and the module buffers that a forward changes."""

from __future__ import annotations

import torch
from torch import Tensor

from .batch import leaves
from .feed import Chunk
from .rng import generators
from .state import State


class Snapshot:
    """Kept from a step's start: buffers by name, since a forward may fill or rebind them (BatchNorm bumps no version)."""

    def __init__(self, state: State) -> None:
        self.generators, self.model = generators(state.device), state.model

    def take(self, chunks: list[Chunk]) -> None:
        """Remember the moment before a step's first forward."""
        held = [(m._buffers, name, b) for m in self.model.modules() for name, b in m._buffers.items() if b is not None]
        self.buffers = [(owner, name, buffer, buffer.clone()) for owner, name, buffer in held]
        self.states = [generator.get_state() for generator in self.generators]
        found = [(path, x) for chunk in chunks for path, x in leaves(chunk.data) if isinstance(x, Tensor)]
        self.versions = [(path, x, x._version) for path, x in found if not x.is_inference()]

    def put_back(self, error: Exception) -> None:
        """Go back to that moment; raises RuntimeError if the batch itself was changed in place."""
        for path, x, version in self.versions:
            if x._version != version:
                raise RuntimeError(f"the step can't be redone: {path} was changed in place by the forward; "
                                   "change a copy of it instead") from error  # fmt: skip
        with torch.no_grad():
            for owner, name, buffer, kept in self.buffers:
                buffer.copy_(kept)
                owner[name] = buffer
        for generator, state in zip(self.generators, self.states, strict=True):
            generator.set_state(state)
