"""Real processes, really killed: the digits example ends with the same weights and curves, however often it dies."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def start(folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "examples/digits.py"), "--folder", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    reader.Reload()
    tags = [tag for tag in reader.Tags()["scalars"] if not tag.startswith(("speed/", "memory/"))]
    return {tag: [(event.step, event.value) for event in reader.Scalars(tag)] for tag in tags}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_again_and_again(tmp_path: Path) -> None:
    whole = start(tmp_path / "whole")
    expected = re.search(r"fingerprint +(\w+)", whole.communicate(timeout=200)[0])
    assert expected
    clock, kills, out = random.Random(0), 0, ""
    for _ in range(100):
        process = start(tmp_path / "killed")
        before = time.monotonic()
        try:
            out = process.communicate(timeout=clock.uniform(4.0, 9.0))[0]
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kills += 1
            print(f"killed after {time.monotonic() - before:.2f} s")
            continue
        break
    found = re.search(r"fingerprint +(\w+)", out)
    assert found
    print(f"{kills} kills")
    assert kills >= 2
    assert found[1] == expected[1]
    assert curves(tmp_path / "killed") == curves(tmp_path / "whole")
