"""A benchmark's result as JSON, as Markdown and as a chart; throughput.py, optimizer_groups.py and table.py share it.

A result is a dict: `benchmark`, `date` (UTC), `command`, `quick`, `machine` (device, gpu, cpu, cores, driver, cuda, python,
torch, versions) and `workloads`, by name: `title`, `baseline` (the run whose time of the same round is 1), `part` (what a
time is of: a micro-batch or a step), `left_out` and `errors` (name to reason), settings of the run, and `runs`, one each:

    name                                 kind          written, ours, graph, compiled or peer
    against                              the run that its ratios are to (the baseline, or that with clipping)
    us, ratio                            one number a round: microseconds a part, and that over `against`'s of this round
    samples_per_s                        one number a round, or null
    memory_mib                           peak of reserved device memory, one number a round, or null
    launches, copies, synchronisations   a part, from a profiled run of its own, or null
"""

from __future__ import annotations

import json
import statistics
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from machine import facts, header, slug

COUNTS = ("launches", "copies", "synchronisations")
ALL, GRAPHED = "hookloop, all callbacks", "hookloop, all callbacks, CUDAGraph()"
BY_HAND = "CUDA graphs by hand, clipping"


def result(benchmark: str, command: str, quick: bool, packages: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return an empty result."""
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return {"benchmark": benchmark, "date": date, "command": command, "quick": quick, "machine": facts(packages),
            "workloads": {}}  # fmt: skip


def row(name: str, kind: str, against: str) -> dict[str, Any]:
    return {"name": name, "kind": kind, "against": against, "us": [], "ratio": [], "samples_per_s": None, "memory_mib": None,
            **dict.fromkeys(COUNTS)}  # fmt: skip


def fill_ratios(rows: list[dict[str, Any]]) -> None:
    """Divide each round's time by that of the run which it is held against, in the same round."""
    by_name = {found["name"]: found for found in rows}
    for found in rows:
        found["ratio"] = [a / b for a, b in zip(found["us"], by_name[found["against"]]["us"], strict=True)]


def spread(values: list[float] | None, digits: int = 3) -> str:
    """Return the median with its range."""
    if not values:
        return "-"
    middle = f"{statistics.median(values):.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def median(values: list[float] | None) -> str:
    return f"{statistics.median(values):,.0f}" if values else "-"


def markdown(found: dict[str, Any]) -> str:
    """Return a result as text: a table a workload, and below it the figures that have a goal."""
    lines = [f"`{found['command']}`, {found['date'][:10]}: {header(found['machine'])}", ""]
    for load in found["workloads"].values():
        part, clips = load["part"], any(one["against"] != load["baseline"] for one in load["runs"])
        lines += [f"### {load['title']}", "", f"| | ratio: median (range) | us a {part} | samples/s | peak MiB | launches "
                  "| copies | synchronisations |", "|---|---|---|---|---|---|---|---|"]  # fmt: skip
        for one in load["runs"]:
            counts = [f"{one[kind]:.1f}" if one[kind] is not None else "-" for kind in COUNTS]
            mark = "*" if one["against"] != load["baseline"] else ""
            lines.append(f"| {one['name']} | {spread(one['ratio'])}{mark} | {median(one['us'])} | "
                         f"{median(one['samples_per_s'])} | {median(one['memory_mib'])} | {' | '.join(counts)} |")  # fmt: skip
        if clips:
            lines += ["", "*: it clips, so its ratio is to the hand-written loop that clips too"]
        lines += [""] + [f"- {name}: {why}" for kind in ("left_out", "errors") for name, why in load[kind].items()]
        lines += [f"- {text}" for text in goals(load)] + [""]
    return "\n".join(lines)


def goals(load: dict[str, Any]) -> list[str]:
    """Return the figures that are to be reached, beside what was found."""
    runs, lines = {one["name"]: one for one in load["runs"]}, list[str]()
    if groups := [runs[name] for name in ("hookloop's merged groups", "two groups") if name in runs][:2]:
        lines.append(f"merged groups over two groups: {spread(groups[0]['ratio'])}; goal at most 1.03")
    peers = [one for one in load["runs"] if one["kind"] == "peer"]
    if ALL in runs:
        lines.append(f"all callbacks over the hand-written loop: {spread(runs[ALL]['ratio'])}; goal at most 1.02")
        if peers:
            least = min(statistics.median(one["ratio"]) for one in peers)
            lines.append(f"least of the peers: {least:.3f}; goal: all callbacks below it")
    if ALL in runs and runs[ALL]["synchronisations"] is not None:
        added = runs[ALL]["synchronisations"] - runs[runs[ALL]["against"]]["synchronisations"]
        lines.append(f"synchronisations added a micro-batch by all callbacks: {added:.2f}; goal 0")
    if GRAPHED in runs:
        lines.append(f"all callbacks with CUDAGraph() over the hand-written loop: {spread(runs[GRAPHED]['ratio'])}")
    if GRAPHED in runs and BY_HAND in runs:
        over = [a / b for a, b in zip(runs[GRAPHED]["us"], runs[BY_HAND]["us"], strict=True)]
        lines.append(f"all callbacks with CUDAGraph() over the graphs by hand: {spread(over)}; goal at most 1.05")
    if GRAPHED in runs and ALL in runs and runs[ALL]["memory_mib"]:
        more = max(runs[GRAPHED]["memory_mib"]) / max(runs[ALL]["memory_mib"])
        lines.append(f"peak memory with CUDAGraph() over that without: {more:.3f}; goal at most 1.1")
    return lines


def pyplot() -> Any:
    """Return matplotlib's pyplot, or end with what to install."""
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("--out draws a chart, which needs matplotlib: pip install 'hookloop[benchmarks]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def chart(found: dict[str, Any], path: Path) -> None:
    """Draw the median ratios, with their ranges, as bars."""
    plot, loads = pyplot(), list(found["workloads"].values())
    tall = max(len(load["runs"]) for load in loads)
    figure, axes = plot.subplots(1, len(loads), figsize=(6 * len(loads), 1.5 + 0.22 * tall), squeeze=False)
    colours = {"written": "tab:gray", "ours": "tab:blue", "graph": "tab:green", "compiled": "tab:purple", "peer": "tab:orange"}
    for axis, load in zip(axes[0], loads, strict=True):
        runs = load["runs"][::-1]
        middle = [statistics.median(one["ratio"]) for one in runs]
        low = [m - min(one["ratio"]) for m, one in zip(middle, runs, strict=True)]
        high = [max(one["ratio"]) - m for m, one in zip(middle, runs, strict=True)]
        axis.barh([one["name"] for one in runs], middle, xerr=[low, high], color=[colours[one["kind"]] for one in runs])
        axis.axvline(1.0, color="black", linewidth=0.8)
        axis.tick_params(axis="y", labelsize=7)
        axis.set_title(load["title"], fontsize=9)
        axis.set_xlabel(f"time a {load['part']} over: {load['baseline']}")
    figure.suptitle(header(found["machine"]), fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plot.close(figure)


def save(found: dict[str, Any], folder: Path, part: str = "") -> Path:
    """Write JSON, Markdown and chart, named after date, device and benchmark; `part` names the workloads, if not all."""
    folder.mkdir(parents=True, exist_ok=True)
    quick = "-quick" if found["quick"] else ""
    name = f"{found['date'][:10]}-{slug(found['machine']['device'])}-{found['benchmark']}{part}{quick}"
    (folder / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    (folder / f"{name}.md").write_text(markdown(found))
    chart(found, folder / f"{name}.png")
    return folder / f"{name}.json"
