"""The benchmarks: the README's tables come from the committed results, and a result has the fields that report.py says."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import hookloop.callbacks
from hookloop.loop import Callback

torch.set_num_threads(1)  # threads on shared cores would wait for one another
ROOT = Path(__file__).parents[1]
README, RESULTS = ROOT / "README.md", ROOT / "benchmarks" / "results"
MODULES = ("ours", "optimizer_groups", "report", "table", "throughput", "watch", "workloads")
FIELDS = {"name", "kind", "against", "us", "ratio", "samples_per_s", "memory_mib", "launches", "copies", "synchronisations"}


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})


@pytest.fixture
def undrawn(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.report, "pyplot", lambda: None)
    monkeypatch.setattr(bench.report, "chart", lambda found, path: None)


def result_in(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("*.json")
    found = json.loads(path.read_text())
    assert path.name.startswith(f"{found['date'][:10]}-{slug(found['machine']['device'])}-{found['benchmark']}")
    assert path.with_suffix(".md").exists()
    return found


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def check(found: dict[str, Any], rounds: int) -> None:
    assert {"benchmark", "date", "command", "quick", "machine", "workloads"} == found.keys()
    assert {"device", "gpu", "cpu", "cores", "driver", "cuda", "python", "torch", "versions"} == found["machine"].keys()
    for load in found["workloads"].values():
        assert {"title", "baseline", "part", "left_out", "errors", "runs"} <= load.keys()
        assert not load["errors"]
        by_name = {one["name"]: one for one in load["runs"]}
        assert by_name[load["baseline"]]["ratio"] == [1.0] * rounds
        for one in load["runs"]:
            assert one.keys() == FIELDS
            assert len(one["us"]) == len(one["ratio"]) == rounds
            against = by_name[one["against"]]["us"]
            assert one["ratio"] == [a / b for a, b in zip(one["us"], against, strict=True)]
            assert all(value > 0 for value in one["us"])


def test_the_readme_is_what_the_results_give(bench: Any, tmp_path: Path) -> None:
    """Typed figures would differ; written again, nothing changes."""
    copy = tmp_path / "README.md"
    shutil.copy(README, copy)
    for _ in range(2):
        bench.table.write(copy, RESULTS)
        assert copy.read_text() == README.read_text()
    inside = README.read_text().split(bench.table.BEGIN)[1].split(bench.table.END)[0]
    typed = re.sub(r"\d\.\d{3} \(", "0.123 (", inside, count=1)
    assert typed != inside
    copy.write_text(README.read_text().replace(inside, typed))
    bench.table.write(copy, RESULTS)
    assert copy.read_text() == README.read_text()
    copy.write_text("no place for it")
    with pytest.raises(ValueError, match="each once"):
        bench.table.write(copy, RESULTS)


def test_committed_results_have_the_fields_and_are_no_quick_ones() -> None:
    assert {json.loads(path.read_text())["benchmark"] for path in RESULTS.glob("*.json")} == {"throughput", "optimizer-groups"}
    for path in RESULTS.glob("*.json"):
        found = json.loads(path.read_text())
        check(found, len(next(iter(found["workloads"].values()))["runs"][0]["us"]))
        assert not found["quick"]
        assert path.name.startswith(f"{found['date'][:10]}-{slug(found['machine']['device'])}-{found['benchmark']}")


def test_the_newest_of_each_workload_counts(bench: Any, tmp_path: Path) -> None:
    source = json.loads(next(RESULTS.glob("*throughput*.json")).read_text())
    mlp, loader = (source["workloads"][name] for name in ("mlp", "loader"))

    def put(name: str, date: str, workloads: Any, **more: Any) -> None:
        machine = {**source["machine"], **more.pop("machine", {})}
        found = {**source, "date": date, "workloads": workloads, "machine": machine, **more}
        (tmp_path / f"{name}.json").write_text(json.dumps(found))

    put("b", "2030-01-01T00:00:00+00:00", {"mlp": {**mlp, "title": "old"}, "loader": loader})
    put("a", "2030-01-02T00:00:00+00:00", {"mlp": {**mlp, "title": "new"}})
    put("c", "2030-01-03T00:00:00+00:00", {"mlp": {**mlp, "title": "quick"}}, quick=True)
    (found,) = bench.table.newest(tmp_path)["throughput"].values()
    assert [load["title"] for load in found["workloads"].values()] == ["new", loader["title"]]
    text = "\n".join(bench.table.section("throughput", bench.table.newest(tmp_path)["throughput"]))
    assert "Not yet measured on a GPU" in text
    put("d", "2030-01-01T00:00:00+00:00", {"mlp": mlp}, machine={"device": "NVIDIA X", "gpu": True, "driver": "1", "cuda": "2"})
    text = "\n".join(bench.table.section("throughput", bench.table.newest(tmp_path)["throughput"]))
    assert "Not yet measured on a GPU" not in text
    assert "NVIDIA X, driver 1, CUDA 2" in text


def test_a_tiny_run_has_the_documented_fields(bench: Any, undrawn: None, tmp_path: Path, capsys: Any) -> None:
    names = ["the same duties", "all callbacks", "CUDA", "compile"]
    given = ["--quick", "--workloads", "mlp", "--repetitions", "2", "--out", str(tmp_path), "--variants", *names]
    assert bench.throughput.main(given) == 0
    found = result_in(tmp_path)
    check(found, 2)
    load = found["workloads"]["mlp"]
    expected = {"hand-written", "hand-written, clipping", "hookloop, the same duties", "hookloop, all callbacks"}
    assert expected <= {one["name"] for one in load["runs"]}
    if not torch.cuda.is_available():
        assert "needs a GPU" in load["left_out"]["CUDA graphs by hand"]
        assert "CUDA graphs by hand: left out: needs a GPU" in capsys.readouterr().out
    assert "--quick" in load["left_out"]["torch.compile"]


def test_a_tiny_run_of_the_groups(bench: Any, undrawn: None, tmp_path: Path) -> None:
    assert bench.optimizer_groups.main(["--quick", "--out", str(tmp_path)]) == 0
    found = result_in(tmp_path)
    check(found, 2)
    assert set(found["workloads"]) == {f"{model}-{form}" for model in ("gpt2", "resnet50") for form in ("fused", "foreach")}
    assert sum(map(math.prod, bench.optimizer_groups.gpt2())) == 124_439_808
    assert sum(map(math.prod, bench.optimizer_groups.resnet50())) == 25_557_032


@pytest.mark.slow
def test_a_tiny_run_on_ranks(tmp_path: Path) -> None:
    command = [sys.executable, str(RESULTS.parent / "scaling.py"), "--quick", "--out", str(tmp_path / "found.json")]
    out = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert out.count("| 2 | ") == out.count("| 1 | ") == 2
    assert json.loads((tmp_path / "found.json").read_text())["results"].keys() == {"1", "2"}


def test_whole_rounds_outlast_a_run_that_is_ended(bench: Any, undrawn: None, monkeypatch: pytest.MonkeyPatch,
                                                 tmp_path: Path) -> None:  # fmt: skip
    once, begun = bench.throughput.once, itertools.count(1)

    def ended(*given: Any) -> Any:
        if next(begun) > 5:  # two runs a round: both of the third are missing, or one
            raise KeyboardInterrupt
        return once(*given)

    monkeypatch.setattr(bench.throughput, "once", ended)
    given = ["--quick", "--workloads", "mlp", "--repetitions", "3", "--out", str(tmp_path), "--variants", "no such"]
    with pytest.raises(KeyboardInterrupt):
        bench.throughput.main(given)
    check(result_in(tmp_path), 2)


def test_a_failure_is_reported_behind_the_table(bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def fails(job: Any) -> None:
        raise RuntimeError("no luck")

    monkeypatch.setitem(bench.ours.CALLBACKS, "Progress", fails)
    given = ["--quick", "--workloads", "mlp", "--variants", "Progress alone"]
    assert bench.throughput.main(given) == 1
    assert "- hookloop, Progress alone: failed with RuntimeError: no luck" in capsys.readouterr().out
    monkeypatch.setattr(bench.throughput, "PEERS", {"Lightning": fails})
    monkeypatch.setattr(bench.throughput, "PACKAGES", {"Lightning": ("torch", "torch")})
    assert bench.throughput.main(["--quick", "--peers", "--workloads", "mlp", "--variants", "Lightning"]) == 0
    assert "- Lightning: failed with RuntimeError: no luck" in capsys.readouterr().out


def test_every_callback_is_measured(bench: Any) -> None:
    public = {name: getattr(hookloop.callbacks, name) for name in hookloop.callbacks.__all__}
    kinds = {name for name, kind in public.items() if isinstance(kind, type) and issubclass(kind, Callback)}
    apart = {"Dropout", "Initialize", "Unfreeze", "Prune"}  # these change the model, or act at reports, not in the step
    assert {*bench.ours.CALLBACKS, *bench.ours.ALONE, "CUDAGraph", "HardExamples"} == kinds - apart  # it wants positions


def test_the_same_duties_train_the_same_weights(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the end of the timed part there is nothing: all weights are those of the same number of updates."""
    kept: list[Any] = []
    build = bench.workloads.Job.build
    monkeypatch.setattr(bench.workloads.Job, "build", lambda job: kept.append(build(job)) or kept[-1])
    runs = {one.name: one for one in bench.throughput.variants(peers=False)}
    for name, load in bench.workloads.workloads(True).items():
        if name == "loader":
            continue  # Seed draws its order
        kept.clear()
        for ours, by_hand in (("the same duties", "hand-written"), ("all callbacks", "hand-written, clipping")):
            for run in (by_hand, f"hookloop, {ours}"):
                bench.throughput.once(runs[run], load, torch.device("cpu"), 4)
            for a, b in zip(*(model.parameters() for model in kept[-2:]), strict=True):
                assert torch.linalg.norm(a - b) <= 1e-5 * torch.linalg.norm(a), (name, ours)


def test_the_chart(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        with pytest.raises(SystemExit, match=r"hookloop\[benchmarks\]"):
            bench.throughput.main(["--quick", "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())
    pytest.importorskip("matplotlib")
    source = json.loads(next(RESULTS.glob("*throughput*.json")).read_text())
    bench.report.chart(source, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
