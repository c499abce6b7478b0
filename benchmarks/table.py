"""Writes the README's benchmark tables from the results in benchmarks/results, between two comments; nothing is typed.

    python benchmarks/table.py [--readme README.md] [--results benchmarks/results]

Of each benchmark, machine and workload the newest result counts; a `--quick` one never does. Where a benchmark has none
from a GPU, that is said, with the command that fills it in. Run twice, it changes nothing the second time.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from machine import header
from report import goals, median, spread

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- benchmarks: written by benchmarks/table.py -->\n", "<!-- /benchmarks -->\n"
TITLES = {"throughput": "Throughput", "optimizer-groups": "Parameter groups of AdamW"}
COMMANDS = {"throughput": "throughput.py --peers", "optimizer-groups": "optimizer_groups.py"}
SINGLE = (" alone", ", all but ")  # in the result itself; too many rows for a README
Machine = tuple[str, str, int]


def newest(folder: Path) -> dict[str, dict[Machine, dict[str, Any]]]:
    """Return benchmark -> machine -> result, with the newest of each workload."""
    found: dict[str, dict[Machine, dict[str, Any]]] = {name: {} for name in TITLES}
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    for one in sorted(results, key=lambda result: result["date"]):
        if not one["quick"]:
            where = one["machine"]
            machines = found[one["benchmark"]]
            before = machines.get(key := (where["device"], where["cpu"], where["cores"]), {"workloads": {}})
            loads = {name: {**load, "date": one["date"][:10], "machine": where} for name, load in one["workloads"].items()}
            machines[key] = {**one, "workloads": before["workloads"] | loads}
    return found


def table(result: dict[str, Any]) -> list[str]:
    """Return one machine's table: a column a workload, a row a loop."""
    loads = list(result["workloads"].values())
    names = dict.fromkeys(one["name"] for load in loads for one in load["runs"])
    lines = [f"| | {' | '.join(load['title'] for load in loads)} |", f"|---|{'---|' * len(loads)}"]
    for name in names:
        if any(part in name for part in SINGLE):
            continue
        cells = []
        for load in loads:
            one = next((one for one in load["runs"] if one["name"] == name), None)
            if one is None:
                cells.append("-")
            elif name == load["baseline"]:
                cells.append(f"1 ({median(one['us'])} us a {load['part']})")
            else:
                cells.append(spread(one["ratio"]) + ("" if one["against"] == load["baseline"] else "*"))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    if any(one["against"] != load["baseline"] for load in loads for one in load["runs"]):
        lines += ["", "*: over the hand-written loop that clips too."]
    return lines


def section(benchmark: str, machines: dict[Machine, dict[str, Any]]) -> list[str]:
    lines = [f"### {TITLES[benchmark]}", ""]
    for result in machines.values():
        loads = list(result["workloads"].values())
        dates = ", ".join(dict.fromkeys(load["date"] for load in loads))
        what = f"Time over that of: {loads[0]['baseline']}, in the same round; median (range)"
        heads = "; ".join(dict.fromkeys(header(load["machine"]) for load in loads))
        lines += [f"{what}. {dates}, {heads}.", "", *table(result), ""]
        lines += [f"- {load['title']}: {text}" for load in loads for text in goals(load)] + [""]
    if not any(result["machine"]["gpu"] for result in machines.values()):
        command = f"python benchmarks/{COMMANDS[benchmark]} --out benchmarks/results && python benchmarks/table.py"
        lines += [f"Not yet measured on a GPU; this fills it in: `{command}`", ""]
    return lines


def write(readme: Path, results: Path) -> None:
    """Put the tables in; raises ValueError where the two comments are not there, once each and in order."""
    text = readme.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{readme} must hold {BEGIN.strip()!r} and behind it {END.strip()!r}, each once on a line of its own")
    head, rest = text.split(BEGIN)
    lines = [line for name, machines in newest(results).items() for line in section(name, machines)]
    readme.write_text(head + BEGIN + "\n" + "\n".join(lines) + END + rest.split(END)[1])


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    asked = parser.parse_args(given)
    write(asked.readme, asked.results)


if __name__ == "__main__":
    main()
