"""What a step must put back before it is redone: torch's generators and the module buffers that a forward changes."""

from __future__ import annotations

import torch
from torch import Tensor

from .batch import leaves
from .feed import Chunk
from .rng import generators
from .state import State


class Snapshot:
    """Kept from a step's start; which buffers a forward changes (BatchNorm's, say) is compared once, after the first."""

    def __init__(self, state: State) -> None:
        self.generators = generators(state.device)
        self.buffers = list({id(b): b for b in state.model.buffers()}.values())
        self.kept: list[Tensor] = []
        self.compared = False

    def take(self, chunks: list[Chunk]) -> None:
        """Remember the moment before a step's first forward."""
        if not self.compared and self.kept:
            changed = [not torch.equal(a, b) for a, b in zip(self.buffers, self.kept, strict=True)]
            self.buffers = [b for b, moved in zip(self.buffers, changed, strict=True) if moved]
            self.compared = True
        self.kept = [buffer.clone() for buffer in self.buffers]
        self.states = [generator.get_state() for generator in self.generators]
        found = [(path, x) for chunk in chunks for path, x in leaves(chunk.data) if isinstance(x, Tensor)]
        self.versions = [(path, x, x._version) for path, x in found if not x.is_inference()]

    def put_back(self, error: Exception) -> None:
        """Go back to that moment; raises RuntimeError if the batch itself was changed in place."""
        for path, x, version in self.versions:
            if x._version != version:
                raise RuntimeError(f"the step can't be redone: {path} was changed in place by the forward; "
                                   "change a copy of it instead") from error  # fmt: skip
        for buffer, kept in zip(self.buffers, self.kept, strict=True):
            buffer.copy_(kept)
        self.kept = []  # which buffers change is told by a whole step only
        for generator, state in zip(self.generators, self.states, strict=True):
            generator.set_state(state)
