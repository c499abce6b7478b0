"""Time of an AdamW step by its parameter groups: one a parameter, hookloop's merged groups, and two; fused and foreach.

    python benchmarks/optimizer_groups.py [--quick] [--repetitions N] [--steps N] [--out FOLDER]

One group a parameter is what the usual recipe for decay by layer makes; here they have two distinct settings (weights
decay, vectors do not). The merged groups are what `WeightDecay` makes of those; the two groups are written by hand. The
parameters have the shapes of GPT-2-small (124M) and of ResNet-50, with gradients that stay. Each is built once; in each
repetition all three take their steps one after another, and the device is waited for at the ends of each. Ratios are to
the two groups of the same repetition. The form of the result is that of throughput.py (see report.py), a step in place
of a micro-batch; without a GPU torch has one thread. `--quick` shrinks the shapes: its times mean nothing.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import report
import torch
from machine import header
from torch import nn
from watch import END, both, count, wait

from hookloop.callbacks import WeightDecay
from hookloop.loop import State

DECAY, BASE = 0.01, "two groups"
Shape = tuple[int, ...]


def gpt2() -> list[Shape]:
    """Return the shapes of GPT-2-small: 148 of them, 124 million numbers; the output layer is the embedding."""
    width = 768
    attention: list[Shape] = [(width, 3 * width), (3 * width,), (width, width), (width,)]
    mlp: list[Shape] = [(width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    norm: list[Shape] = [(width,), (width,)]
    return [(50257, width), (1024, width), *[shape for _ in range(12) for shape in norm + attention + norm + mlp], *norm]


def resnet50() -> list[Shape]:
    """Return the shapes of ResNet-50: 161 of them, 26 million numbers."""
    found: list[Shape] = [(64, 3, 7, 7), (64,), (64,)]
    before = 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        width = 64 * 2**stage
        for block in range(blocks):
            convolutions = [(width, before, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            convolutions += [(4 * width, before, 1, 1)] if block == 0 else []  # on the way around
            found += [shape for conv in convolutions for shape in (conv, (conv[0],), (conv[0],))]
            before = 4 * width
    return [*found, (1000, before), (1000,)]


def shrunk(shapes: list[Shape]) -> list[Shape]:
    return [tuple(min(4, size) for size in shape) for shape in shapes]


def model_of(shapes: list[Shape], device: torch.device) -> nn.Module:
    """Return a module with these parameters, and gradients on them."""
    torch.manual_seed(0)
    held = nn.ParameterList([nn.Parameter(torch.randn(shape, device=device)) for shape in shapes])
    for p in held.parameters():
        p.grad = torch.randn_like(p)
    return held


def decay(p: nn.Parameter) -> float:
    return DECAY if p.ndim > 1 else 0.0


def optimizers(model: nn.Module, form: str) -> dict[str, torch.optim.Optimizer]:
    each = list(model.parameters())

    def adamw(groups: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, lr=1e-6, fused=form == "fused", foreach=form == "foreach")

    def single() -> torch.optim.Optimizer:
        return adamw([{"params": [p], "weight_decay": decay(p)} for p in each])

    WeightDecay(default=DECAY).on_setup(State(model, merged := single()))
    if len(merged.param_groups) != 2:
        raise RuntimeError(f"{len(merged.param_groups)} merged groups, where there are two settings")
    two = [{"params": [p for p in each if decay(p) == value], "weight_decay": value} for value in (DECAY, 0.0)]
    return {BASE: adamw(two), "hookloop's merged groups": merged, "one group a parameter": single()}


def timed(optimizer: torch.optim.Optimizer, steps: int, device: torch.device) -> float:
    """Return microseconds a step."""
    wait(device)
    start = time.perf_counter()
    for _ in range(steps):
        optimizer.step()
    wait(device)
    return (time.perf_counter() - start) / steps * 1e6


def profiled(optimizer: torch.optim.Optimizer, steps: int) -> dict[str, float]:
    with both() as profile:
        for _ in range(steps):
            optimizer.step()
        with torch.profiler.record_function(END):
            pass
    return count(profile, steps)


def measure(title: str, shapes: list[Shape], form: str, repetitions: int, steps: int, device: torch.device) -> dict[str, Any]:
    found = optimizers(model_of(shapes, device), form)
    rows = {name: report.row(name, "written" if name == BASE else "ours", BASE) for name in found}
    for optimizer in found.values():
        timed(optimizer, 3, device)  # makes its state
    for _ in range(repetitions):
        for name, optimizer in found.items():
            rows[name]["us"].append(timed(optimizer, steps, device))
    if device.type == "cuda":
        for name, optimizer in found.items():
            rows[name].update(profiled(optimizer, 4))
    report.fill_ratios(list(rows.values()))
    return {"title": f"{title}, {form}", "baseline": BASE, "part": "step", "steps": steps, "left_out": {}, "errors": {},
            "runs": list(rows.values())}  # fmt: skip


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--repetitions", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--out", type=Path)
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> int:
    words = sys.argv[1:] if given is None else given
    asked, gpu = arguments(words), torch.cuda.is_available()
    if asked.out is not None:
        report.pyplot()
    if not gpu:
        torch.set_num_threads(1)
    found = report.result("optimizer-groups", " ".join(["python benchmarks/optimizer_groups.py", *words]), asked.quick)
    print(header(found["machine"]) + "\n", flush=True)
    device = torch.device("cuda" if gpu else "cpu")
    repetitions = asked.repetitions or (2 if asked.quick else 9)
    steps = asked.steps or (3 if asked.quick or not gpu else 50)
    for name, title, shapes in (("gpt2", "GPT-2-small (124M)", gpt2()), ("resnet50", "ResNet-50", resnet50())):
        used = shrunk(shapes) if asked.quick else shapes
        for form in ("fused", "foreach"):
            part = measure(title + (", shrunk" if asked.quick else ""), used, form, repetitions, steps, device)
            found["workloads"][f"{name}-{form}"] = part
            if asked.out is not None:  # what was measured outlasts a run that is ended
                written = report.save(found, asked.out)
    print(report.markdown(found))
    if asked.out is not None:
        print(f"written: {written}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
