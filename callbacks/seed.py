"""Seed: the same seed gives the same run, to the bit, whoever else draws random numbers."""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch

from ..loop.callback import Callback
from ..loop.checks import flag
from ..loop.rng import derive, seed_everything
from ..loop.state import State


class Seed(Callback):
    """Makes a run repeatable: seeds when constructed, so that it covers the model's initial weights built after it.

    In training, every micro-batch's forward, the order of each epoch and each loader batch's augmentation (in any number
    of workers) draw from streams of their own, derived from `seed` and the position; validation, logging or another
    callback that draws can't move them. Ranks draw distinct noise and share one order of data. Two Loops in one body (a
    GAN) draw the same noise in each step unless each has a number of its own. A generator that you gave the loader or its
    sampler is seeded anew for each epoch. Around a loop of your own it seeds when constructed and keeps validation apart;
    what your loop draws is yours.

    `deterministic=True` turns on `torch.use_deterministic_algorithms` and cuDNN's deterministic mode: some operations
    get slower (10% to several times on a GPU), and those that have no deterministic form raise an error.
    Raises TypeError or ValueError for a seed that is no whole number from 0 to 2**64 - 1, and RuntimeError where
    `deterministic=True` comes too late for CUBLAS_WORKSPACE_CONFIG.
    """

    def __init__(self, seed: int, deterministic: bool = False) -> None:
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise TypeError(f"seed must be a whole number from 0 to 2**64 - 1, not {seed!r}")
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed must be from 0 to 2**64 - 1, not {seed}")
        flag("deterministic", deterministic)
        self.seed, self.deterministic = seed, deterministic
        if deterministic:
            if torch.cuda.is_initialized() and "CUBLAS_WORKSPACE_CONFIG" not in os.environ:
                raise RuntimeError("deterministic=True must come before the first use of CUDA: construct Seed first, or "
                                   "set CUBLAS_WORKSPACE_CONFIG=:4096:8 in the environment")  # fmt: skip
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
            torch.backends.cudnn.benchmark = False
            warnings.warn("deterministic=True: some operations get slower, those without a deterministic form raise",
                          stacklevel=2)  # fmt: skip
        seed_everything(seed)  # on all ranks alike: what is built next, and sharded, is one model

    def on_setup(self, state: State) -> None:
        """Give the loop its seed, and each rank its own noise."""
        state.seed = self.seed
        if state.rank:
            seed_everything(derive(self.seed, "rank", state.rank))

    def state_dict(self) -> dict[str, Any]:
        """Return the seed as text, since it may need more than the 63 bits of a plain integer."""
        return {"seed": str(self.seed)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Refuse to continue a run of another seed."""
        if state["seed"] != str(self.seed):
            raise ValueError(f"the checkpoint was made with Seed({state['seed']}), not Seed({self.seed}); "
                             "resume with that seed, or start afresh in another folder")  # fmt: skip
