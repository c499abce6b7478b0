"""What `Diagnose` says of runs whose ill is known: trained on scikit-learn's digits, recorded as curves, judged as a table.

python benchmarks/diagnose.py [--record] [--file tests/data/diagnose.json]

With `--record` it trains (five seeds a kind, some minutes on two cores) and writes what the callback saw at each report; without,
it judges the file's curves. The rules were tuned on seeds 0 to 2; seeds 3 and 4 tell how they do on runs that they never saw.
"""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hookloop.callbacks import Diagnose, Schedule, Seed
from hookloop.callbacks.loss_curve import Point
from hookloop.callbacks.verdicts import verdict
from hookloop.loop import Loop

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from digits import data, loss_fn

FILE = Path(__file__).resolve().parents[1] / "tests" / "data" / "diagnose.json"
REPORTS, SEEDS, TUNED = 12, 5, 3
# kind -> what differs from the healthy run, and what there is to be said
RUNS: dict[str, tuple[dict[str, Any], str]] = {
    "healthy": ({}, ""),
    "healthy, cosine": ({"schedule": "cosine"}, ""),
    "healthy, begun trained": ({"trained": 400, "rate": 1e-3, "batch": 8, "every": 180}, ""),
    "width 1": ({"width": 1, "every": 180}, "underfitting"),
    "50 samples": ({"samples": 50}, "overfitting"),
    "rate x 100": ({"rate": 0.3}, "rate_too_high"),
    "rate / 100": ({"rate": 3e-5}, "rate_too_low"),
    "batch 2": ({"batch": 2, "every": 718}, "noise"),
    "rate decayed too early": ({"schedule": "early"}, "plateau"),
}  # fmt: skip


def build(width: int) -> nn.Module:
    # the example's net, of any width
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Dropout(0.3), nn.Linear(2 * width * 4 * 4, 10),
    )  # fmt: skip


def schedule(kind: str) -> Schedule:
    if kind == "cosine":
        return Schedule(lambda optimizer, total: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total))
    return Schedule(lambda optimizer, total: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1.0 if t < 8 else 1e-3))


def record(seed: int, width: int = 32, samples: int | None = None, rate: float = 3e-3, batch: int = 32,
           every: int = 45, schedule_: str | None = None, trained: int = 0) -> dict[str, Any]:  # fmt: skip
    torch.set_num_threads(1)
    first, (train, val), diagnose = Seed(seed), data(), Diagnose()
    tensors = train.dataset.tensors  # type: ignore[attr-defined]
    train = DataLoader(TensorDataset(*[x[:samples] for x in tensors]), batch_size=batch, shuffle=True, drop_last=batch == 2)
    model = build(width)
    if trained:
        Loop(model, torch.optim.AdamW(model.parameters(), lr=3e-3), [Seed(seed)]).fit(loss_fn, train, steps=trained)
    loop = Loop(model, torch.optim.AdamW(model.parameters(), lr=rate),
                [first, diagnose, *([schedule(schedule_)] if schedule_ else [])])  # fmt: skip
    loop.fit(loss_fn, train, val, steps=REPORTS * every, validate_every=every)
    rounded = [[point.step, *[float(f"{x:.4g}") for x in point[1:]]] for point in diagnose.points]  # type: ignore[arg-type]
    return {"first": float(f"{diagnose.first:.4g}"), "points": rounded}


def one(job: tuple[str, int]) -> dict[str, Any]:
    options = dict(RUNS[job[0]][0])
    options["schedule_"] = options.pop("schedule", None)
    return record(job[1], **options)


def judged(curves: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return, for each kind, the verdict that is right, those at the end by seed, and every verdict on the way."""
    rows = []
    for kind, seeds in curves.items():
        ends, ways = [], []
        for curve in seeds:
            points = [Point(*point) for point in curve["points"]]
            found = [verdict(points[: i + 1], curve["first"]) for i in range(len(points))]
            said = ["" if one is None else one.kind for one in found]
            ends.append(said[-1])
            ways.append(said)
        rows.append({"kind": kind, "right": RUNS[kind][1], "ends": ends, "ways": ways})
    return rows


def as_table(rows: list[dict[str, Any]], which: range) -> str:
    """Return the verdicts at the end, and how many on the way were right, silent or wrong, for these seeds."""
    lines = [
        "| runs | what there is to say | said at the end, by seed | right on the way | silent | wrong |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        ends = ", ".join(row["ends"][seed] or "nothing" for seed in which)
        said = [one for seed in which for one in row["ways"][seed]]
        right, silent = said.count(row["right"]), said.count("") if row["right"] else 0
        lines.append(f"| {row['kind']} | {row['right'] or 'nothing'} | {ends} | {right} of {len(said)} | {silent} | "
                     f"{len(said) - right - silent} |")  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--only", nargs="*", choices=list(RUNS), help="the kinds to record anew")
    parser.add_argument("--held-out", action="store_true", help="show the seeds that the rules were not tuned on")
    parser.add_argument("--file", type=Path, default=FILE)
    given = parser.parse_args()
    curves = json.loads(given.file.read_text()) if given.file.exists() else {}
    if given.record:
        jobs = [(kind, seed) for kind in given.only or RUNS for seed in range(SEEDS)]
        with ProcessPoolExecutor(2) as pool:
            found = dict(zip(jobs, pool.map(one, jobs), strict=True))
        curves |= {kind: [found[kind, seed] for seed in range(SEEDS)] for kind in dict.fromkeys(kind for kind, _ in jobs)}
        given.file.parent.mkdir(exist_ok=True)
        blocks = (f"{json.dumps(kind)}: [\n" + ",\n".join(map(json.dumps, curves[kind])) + "]" for kind in RUNS)
        given.file.write_text("{\n" + ",\n".join(blocks) + "\n}\n")
        return
    print(as_table(judged(curves), range(TUNED, SEEDS) if given.held_out else range(TUNED)))


if __name__ == "__main__":
    main()
