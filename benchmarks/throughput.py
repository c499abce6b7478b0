"""Time a micro-batch takes in the hand-written loop, in hookloop with each set of callbacks, as CUDA graphs, and in peers.

    python benchmarks/throughput.py [--quick] [--peers] [--workloads mlp gpt resnet loader] [--variants main]
                                    [--repetitions N] [--updates N] [--out FOLDER]

Workloads: an MLP 4x256 with batches of 128 in fp32; a GPT of 12 layers x 768 with 16 sequences of 512 tokens and a
ResNet-18 with 256 images of 3x32x32, both under bf16 autocast; the MLP again from a DataLoader with workers, where the
others take batches that lie on the device.

Duties, the same for the hand-written loop, "hookloop, the same duties", the graphs by hand and the peers: gradients of 4
micro-batches an update; AdamW (fused on a GPU) in two groups, decay 0.01 and, for vectors, 0; rates that rise over 100
updates; loss and accuracy (of tokens) of each micro-batch, and, every 50 updates, loss, accuracy and rates to
TensorBoard. None clips gradients but what says so, and all sets of callbacks that hold ClipGradients: these are held
against the hand-written loop that clips too. "No callback", and each alone, do fewer of the duties than the hand-written
loop (though always 4 micro-batches an update), all callbacks do more: a cosine schedule, checks of finiteness, the
noise scale, checkpoints, early stopping, progress; none falls due in the timed part but what has an interval within it.

Each run builds all anew, trains some updates, waits for the device, trains the timed ones and waits again; there is no
other wait. Without a GPU torch has one thread. Runs are interleaved: all once, then all again. Reported are the median
and the range of the ratio to the hand-written loop's time of the same round; on a GPU also the peak of reserved memory,
and, from a short profiled run of its own, kernels and graphs launched, copies and waits, a micro-batch. `--quick`
shrinks all shapes and counts: its times mean nothing, its exit status does. `--variants` takes parts of names, or
`main`: all but each alone and all but one. A peer that fails is an error below the table; any other run that fails also
ends in exit status 1, behind the table.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib.util
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import report
import torch
from loops import compiled, hand_written, replayed
from machine import header
from ours import DUTIES, ours, sets
from peers import PACKAGES, PEERS
from watch import PROFILED, Watch, quiet
from workloads import ACCUMULATE, Job, Workload, workloads

BASE, CLIPS = "hand-written", "hand-written, clipping"
SINGLE = (" alone", ", all but ")


@dataclass(frozen=True)
class Variant:
    name: str
    kind: str
    run: Callable[[Job], None]
    against: str = BASE
    gpu: bool = False  # needs one


def variants(peers: bool) -> list[Variant]:
    """Return every run, the hand-written loops first, since all others are held against them."""
    found = [Variant(BASE, "written", hand_written)]
    found.append(Variant(CLIPS, "written", functools.partial(hand_written, clip=True)))
    for name, names in sets().items():
        against = CLIPS if "ClipGradients" in names else BASE
        found.append(Variant(name, "ours", functools.partial(ours, names=names), against))
    graphed = {"hookloop, the same duties, CUDAGraph()": (DUTIES, BASE), report.GRAPHED: (sets()[report.ALL], CLIPS)}
    for name, (names, against) in graphed.items():
        found.append(Variant(name, "ours", functools.partial(ours, names=names, graphs=True), against, gpu=True))
    found.append(Variant("CUDA graphs by hand", "graph", replayed, gpu=True))
    found.append(Variant(report.BY_HAND, "graph", functools.partial(replayed, clip=True), CLIPS, gpu=True))
    found.append(Variant("torch.compile", "compiled", functools.partial(compiled, mode="default")))
    reduced = functools.partial(compiled, mode="reduce-overhead")
    found.append(Variant("torch.compile, reduce-overhead", "compiled", reduced, gpu=True))
    return found + [Variant(name, "peer", run) for name, run in PEERS.items() if peers]


def left_out(found: Iterable[Variant], chosen: list[str], quick: bool, gpu: bool) -> dict[str, str]:
    """Return why a run is not made; what was not asked for goes without a word."""
    why: dict[str, str] = {}
    for one in found:
        single = any(text in one.name for text in SINGLE)
        asked = not chosen or any(text in one.name for text in chosen) or ("main" in chosen and not single)
        if not asked and one.name not in (BASE, CLIPS):
            why[one.name] = ""
        elif one.gpu and not gpu:
            why[one.name] = "left out: needs a GPU"
        elif one.kind == "compiled" and quick:
            why[one.name] = "left out of --quick: compiling alone takes longer"
        elif one.kind == "peer" and importlib.util.find_spec(PACKAGES[one.name][0]) is None:
            why[one.name] = "left out: not installed"
    return why


def once(one: Variant, load: Workload, device: torch.device, timed: int, profiled: bool = False) -> Watch:
    """Make a run; raises RuntimeError where it ends before its last update."""
    if load.workers or device.type == "cuda":  # workers of the run before end with its loader
        gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    watch = Watch(device, load.warm, timed, profiled)
    with tempfile.TemporaryDirectory() as folder, quiet():
        one.run(Job(load, device, watch, folder))
    if not watch.ended:
        raise RuntimeError(f"it ended after {watch.done} of {watch.total} updates")
    return watch


def note(row: dict[str, Any], watch: Watch, load: Workload, device: torch.device) -> None:
    """Add a round's figures to a row."""
    micros = watch.timed * ACCUMULATE
    row["us"].append(watch.seconds / micros * 1e6)
    row["samples_per_s"] = [*(row["samples_per_s"] or []), micros * load.batch / watch.seconds]
    if device.type == "cuda":
        row["memory_mib"] = [*(row["memory_mib"] or []), watch.reserved / 2**20]


def measure(
    load: Workload, found: list[Variant], skipped: dict[str, str], repetitions: int, timed: int
) -> Iterator[dict[str, Any]]:
    """Yield a workload's part of the result (see report.py) after each round, and with the profiled runs' counts."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    errors: dict[str, str] = {}
    rows = {one.name: report.row(one.name, one.kind, one.against) for one in found if one.name not in skipped}
    runs = [one for one in found if one.name in rows]

    def attempt(one: Variant, profiled: bool) -> None:
        try:
            watch = once(one, load, device, PROFILED if profiled else timed, profiled)
            if profiled:
                rows[one.name].update(watch.counts(ACCUMULATE))
            else:
                note(rows[one.name], watch, load, device)
        except Exception as error:
            if one.name in (BASE, CLIPS):
                raise
            errors[one.name] = f"failed with {type(error).__name__}: {' '.join(str(error).split())[:300]}"
            print(f"{load.name}, {one.name} {errors[one.name]}", file=sys.stderr, flush=True)
            del rows[one.name]

    def so_far() -> dict[str, Any]:
        report.fill_ratios(list(rows.values()))
        shown = {name: why for name, why in skipped.items() if why}
        return {"title": load.title, "baseline": BASE, "part": "micro-batch", "batch": load.batch, "accumulate": ACCUMULATE,
                "warm": load.warm, "updates": timed, "left_out": shown, "errors": errors, "runs": list(rows.values())}  # fmt: skip

    for _ in range(repetitions):
        for one in runs:
            if one.name in rows:
                attempt(one, profiled=False)
        yield so_far()
    if device.type == "cuda":
        for one in runs:
            if one.name in rows:
                attempt(one, profiled=True)
        yield so_far()


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--workloads", nargs="+", choices=list(workloads(False)), default=list(workloads(False)))
    parser.add_argument("--variants", nargs="+", default=[])
    parser.add_argument("--repetitions", type=int)
    parser.add_argument("--updates", type=int, help="timed in a run, in place of the workload's own number")
    parser.add_argument("--out", type=Path)
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> int:
    words = sys.argv[1:] if given is None else given
    asked, gpu = arguments(words), torch.cuda.is_available()
    if asked.out is not None:
        report.pyplot()  # that it is missing is better known before
    if not gpu:
        torch.set_num_threads(1)  # threads that wait for one another on shared cores would be all that is measured
    packages = tuple(package for peer in PACKAGES.values() for package in peer[1:]) if asked.peers else ()
    found = report.result("throughput", " ".join(["python benchmarks/throughput.py", *words]), asked.quick, packages)
    print(header(found["machine"]) + "\n", flush=True)
    every = variants(asked.peers)
    skipped = left_out(every, asked.variants, asked.quick, gpu)
    failed, some = False, sorted(set(asked.workloads)) != sorted(workloads(False))
    for name in asked.workloads:
        load = workloads(asked.quick)[name]
        repetitions = asked.repetitions or (1 if asked.quick else 5)
        for part in measure(load, every, skipped, repetitions, asked.updates or load.updates):
            found["workloads"][name] = part
            if asked.out is not None:  # what was measured outlasts a run that is ended
                written = report.save(found, asked.out, "-" + "-".join(asked.workloads) if some else "")
        failed |= any(one.kind != "peer" and one.name in part["errors"] for one in every)
    print(report.markdown(found))
    if asked.out is not None:
        print(f"written: {written}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
