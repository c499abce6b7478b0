"""torchrun --max-restarts: ranks killed at random moments, all started again, and the run ends as if nothing had been."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import elastic
import many
import pytest

PROGRAM = Path(elastic.__file__)


def lives(folder: Path, attempt: int) -> list[int]:
    """Return the processes of a life, once all have begun it."""
    found = [int(path.name.split("-")[3]) for path in sorted(folder.glob(f"life-{attempt}-*"))]
    return found if len(found) == 2 else []


@pytest.mark.timeout(600)
@pytest.mark.slow
@pytest.mark.parametrize(("how", "kills"), [("ddp", 1), ("ddp", 20), ("fsdp", 20)])
def test_ranks_killed_at_random_moments_end_with_the_same_bits(tmp_path: Path, how: str, kills: int) -> None:
    """One rank is killed 0 to 1.5 s after it began: while ranks meet, read a checkpoint, train, or write one."""
    steps, limit, draw = 20 + 35 * kills, 40 + 20 * kills, random.Random(kills)
    whole = many.values(elastic.train, 2, str(tmp_path / "whole"), how, steps, limit=30 + steps * 0.1)
    folder = tmp_path / "killed"
    folder.mkdir()
    # Where the agent's store is shared, ranks that start again read the addresses of those before them (pytorch #135712).
    environment = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts",
               str(2 * kills), str(PROGRAM), str(folder), how, str(steps)]  # fmt: skip
    said, end, killed = tmp_path / "said.txt", time.monotonic() + limit, 0
    with said.open("w") as file:
        agent = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
    try:
        attempt = 0
        while agent.poll() is None and time.monotonic() < end:
            if killed < kills and (ranks := lives(folder, attempt)):
                time.sleep(draw.uniform(0, 1.5))
                with contextlib.suppress(ProcessLookupError):  # it fell with another
                    os.kill(draw.choice(ranks), signal.SIGKILL)
                    killed += 1
                attempt += 1
            time.sleep(0.02)
        assert agent.poll() == 0, said.read_text()[-6000:]
    finally:
        if agent.poll() is None:
            agent.kill()
            for path in folder.glob("life-*"):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(path.name.split("-")[3]), signal.SIGKILL)
    assert killed == kills
    assert [(folder / "end.txt").read_text()] * 2 == whole
