"""The examples as a user runs them: real processes, real files, one of them interrupted, one from the wheel."""

from __future__ import annotations

import functools
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hookloop.callbacks import ClipGradients, EarlyStopping, Seed, TensorBoard, Warmup
from hookloop.loop import Loop

ROOT = Path(__file__).parents[1]
LIMIT = 500  # seconds a process may take, beside whatever else computes
STARTED: list[subprocess.Popen[str]] = []
pytestmark = pytest.mark.timeout(3 * LIMIT)


@pytest.fixture(autouse=True)
def none_left() -> Iterator[None]:
    """What a failed test leaves running would slow the others."""
    yield
    while STARTED:
        with STARTED.pop() as process:
            process.terminate()


def launch(command: list[str], cwd: Path, **more: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONWARNINGS": "error", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    STARTED.append(subprocess.Popen(command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                    text=True, **more))  # fmt: skip
    return STARTED[-1]


def start(example: str, folder: Path, *more: str, python: str = sys.executable, cwd: Path = ROOT) -> subprocess.Popen[str]:
    command = [python, str(ROOT / "examples" / example), "--folder", str(folder), *more]
    hears = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background job would ignore Ctrl-C
    return launch(command, cwd, preexec_fn=hears)


def torchrun(ranks: int, folder: Path, *more: str) -> subprocess.Popen[str]:
    rendezvous = ("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0")  # a port that is free
    return launch([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), *rendezvous,
                   str(ROOT / "examples" / "distributed.py"), "--folder", str(folder), *more], ROOT)  # fmt: skip


def table(process: subprocess.Popen[str]) -> dict[str, str]:
    out, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, err
    return dict(re.split(r"\s{2,}", line, maxsplit=1) for line in out.splitlines() if re.search(r"\s{2,}", line))


def tags(folder: Path) -> set[str]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder))
    reader.Reload()
    return set(reader.Tags()["scalars"])


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from what git knows, and beside it `venv` with it alone and what it needs."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    listing = ["git", "ls-files", "-co", "--exclude-standard"]
    for name in subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines():
        if (ROOT / name).is_file() and not name.startswith("tests"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source)]
    subprocess.run(build, check=True, capture_output=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
    fresh = next((folder / "venv").glob("lib/python*/site-packages"))
    found = next(folder.glob("*.whl"))
    zipfile.ZipFile(found).extractall(fresh)
    here = Path(torch.__file__).parents[1]  # what hookloop needs, but no hookloop: a path in a .pth runs no other .pth
    (fresh / "dependencies.pth").write_text(f"{here}\n")
    return found


@pytest.fixture(scope="module")
def digits(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The run that nobody stopped, of what the wheel holds."""
    folder, venv = tmp_path_factory.mktemp("digits"), wheel.parent / "venv"
    python = str(venv / "bin/python")
    where = subprocess.run([python, "-c", "import hookloop.loop; print(hookloop.loop.__file__)"], cwd=folder,
                           capture_output=True, text=True, check=True)  # fmt: skip
    assert Path(where.stdout.strip()).is_relative_to(venv)
    return {"folder": folder, "table": table(start("digits.py", folder, python=python, cwd=folder))}


def test_the_wheel_holds_every_file(wheel: Path) -> None:
    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("hookloop/")}
    files = [
        *ROOT.glob("loop/**/*.py"),
        *ROOT.glob("callbacks/*.py"),
        ROOT / "loop/py.typed",
        ROOT / "callbacks/py.typed",
    ]
    assert held == {f"hookloop/{file.relative_to(ROOT).as_posix()}" for file in files}


def test_digits_of_the_wheel_is_above_98_percent(digits: Any) -> None:
    assert float(digits["table"]["validation accuracy"].rstrip("%")) > 98
    assert {"stopped because", "epochs / updates", "samples per second"} <= digits["table"].keys()
    assert digits["table"]["look at it with"] == f"tensorboard --logdir {digits['folder']}"


@pytest.mark.slow
def test_digits_again_in_an_empty_folder_and_with_another_seed(digits: Any, tmp_path: Path) -> None:
    same, other = start("digits.py", tmp_path / "a"), start("digits.py", tmp_path / "b", "--seed", "1")
    assert table(same)["fingerprint"] == digits["table"]["fingerprint"]
    assert table(other)["fingerprint"] != digits["table"]["fingerprint"]


@pytest.mark.parametrize("example", ["by_hand.py", pytest.param("digits.py", marks=pytest.mark.slow)])
@pytest.mark.parametrize("after", ["step-00000220", pytest.param("step-00000060", marks=pytest.mark.slow)])
def test_stopped_with_ctrl_c_and_started_again_it_ends_with_the_same_fingerprint(
    digits: Any, tmp_path: Path, example: str, after: str
) -> None:
    """The same command twice, the first left with Ctrl-C once that checkpoint is there."""
    first = start(example, tmp_path)
    while first.poll() is None and not (tmp_path / after).exists():
        time.sleep(0.02)
    first.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in first.communicate(timeout=LIMIT)[1]
    assert table(start(example, tmp_path))["fingerprint"] == digits["table"]["fingerprint"]
    assert tags(tmp_path) == tags(digits["folder"])


@pytest.mark.slow
def test_by_hand_ends_with_the_same_fingerprint(digits: Any, tmp_path: Path) -> None:
    assert table(start("by_hand.py", tmp_path))["fingerprint"] == digits["table"]["fingerprint"]


def test_around_is_above_98_percent_with_the_same_tags(digits: Any, tmp_path: Path) -> None:
    assert float(table(start("around.py", tmp_path))["validation accuracy"].rstrip("%")) > 98
    assert tags(tmp_path) == tags(digits["folder"])


@pytest.mark.parametrize("kind", [(), pytest.param(("--shard",), marks=pytest.mark.slow)])
def test_distributed_is_the_same_script_on_one_process_and_on_two(tmp_path: Path, kind: tuple[str, ...]) -> None:
    """As many updates, as good; and what two ranks trained, one process reads."""
    alone, two = (
        start("distributed.py", tmp_path / "one", "--epochs", "2"),
        torchrun(2, tmp_path / "two", "--epochs", "2", *kind),
    )
    found = [table(alone), table(two)]
    assert [one["ranks"] for one in found] == ["1", "2"]
    assert [one["updates"] for one in found] == ["60", "60"]
    assert min(float(one["validation accuracy"].rstrip("%")) for one in found) > 75
    assert table(start("distributed.py", tmp_path / "two", "--epochs", "2"))["fingerprint"] == found[1]["fingerprint"]
    assert tags(tmp_path / "one") == tags(tmp_path / "two")


@pytest.mark.slow
def test_fine_tuning_is_better_than_from_scratch(tmp_path: Path) -> None:
    """By how much is for Welch's test to say: the gain, its interval, and a run a seed to look at."""
    found = table(start("fine_tune.py", tmp_path, "--seeds", "3"))
    gain, low, high, p = re.fullmatch(r"(\S+)%, 95% interval (\S+)% .. (\S+)%, p = (\S+) \(Welch\)", found["gain"]).groups()  # type: ignore[union-attr]
    assert 0 < float(gain) < float(high)
    assert (float(low) > 0) == (float(p) < 0.05)
    means = [float(found[name].split("%")[0]) for name in ("from scratch", "fine-tuned")]
    assert means[1] - means[0] == pytest.approx(float(gain), abs=0.011)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"{n}-{i}" for n in ("fine-tuned", "from scratch") for i in range(3)
    ]
    assert {"rate/group0", "rate/group3", "val/loss", "val/accuracy"} <= tags(tmp_path / "fine-tuned-0")
    assert "rate/group3" not in tags(tmp_path / "from scratch-0")


@pytest.mark.slow
def test_a_search_beats_digits_own_settings_or_says_that_chance_may_have_done_it(tmp_path: Path) -> None:
    out, err = start("search.py", tmp_path, "--jobs", "2").communicate(timeout=LIMIT)
    assert "complete" in out, err
    lines = [line for line in out.splitlines() if line.startswith("| ") and ("digits.py:" in line or "found:" in line)]
    assert len(lines) == 2
    best, other = (line.split(" | ") for line in lines)
    beaten = "found:" in best[1] and float(other[4]) < 0.05
    assert beaten or "may be chance" in lines[1]
    for name in ("coarse", "fine", "test"):
        assert (tmp_path / name / "results.json").exists()
    assert {"trial-00000", "trial-00011"} <= {path.name for path in (tmp_path / "coarse").iterdir()}
    again, err = start("search.py", tmp_path, "--jobs", "2").communicate(timeout=LIMIT)
    assert again == out, err


def test_two_loops_in_one_body(tmp_path: Path) -> None:
    """A small GAN: two optimizers, two Loops, each with callbacks of its own; it learns the mean of what it sees."""
    seed = Seed(0)
    generator = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1))
    critic = nn.Sequential(nn.Linear(1, 16), nn.ReLU(), nn.Linear(16, 1))
    g_adam = torch.optim.Adam(generator.parameters(), lr=5e-3, betas=(0.5, 0.9))
    c_adam = torch.optim.Adam(critic.parameters(), lr=5e-3, betas=(0.5, 0.9))
    g_loop = Loop(generator, g_adam, [seed, Warmup(20), ClipGradients(1.0), TensorBoard(tmp_path / "g", every=10)])
    c_loop = Loop(critic, c_adam, [Warmup(10), TensorBoard(tmp_path / "c", every=10), EarlyStopping("gap", patience=99)])
    bce = nn.functional.binary_cross_entropy_with_logits
    ones, zeros = torch.ones(64, 1), torch.zeros(64, 1)
    with g_loop, c_loop:
        for _ in range(300):
            real, noise = torch.randn(64, 1) * 0.5 + 3, torch.randn(64, 4)
            loss = bce(critic(real), ones) + bce(critic(generator(noise).detach()), zeros)
            c_adam.zero_grad()
            loss.backward()
            with c_loop.updating(loss=loss.detach(), samples=64):
                c_adam.step()
            loss = bce(critic(generator(noise)), ones)
            g_adam.zero_grad()
            loss.backward()
            with g_loop.updating(loss=loss.detach(), samples=64):
                g_adam.step()
        c_loop.report({"gap": generator(torch.randn(999, 4)).detach().mean() - 3})
    assert abs(c_loop.state.metrics["gap"]) < 1
    assert g_loop.state.step == c_loop.state.step == 300
    assert g_loop.state.rates == c_loop.state.rates == [5e-3]
    assert tags(tmp_path / "g") >= {"train/loss", "rate/group0", "speed/samples_per_s"} <= tags(tmp_path / "c")
