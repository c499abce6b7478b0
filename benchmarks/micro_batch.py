"""What `MicroBatch("auto")` finds on a GPU, against a sweep over every size: a 12-layer, 768-wide, 512-token transformer.

Memory is capped, so that a batch is many micro-batches. Each size of the sweep trains a few updates by the same loop, and
the best is what `auto` is measured against: its throughput once it has decided, the updates it took to decide, and how
often memory ran out on the way (counted in the log, since such a step is redone). Needs a CUDA device.

    python benchmarks/micro_batch.py [--gib 24] [--batch 256] [--layers 12] [--width 768] [--tokens 512]
"""

from __future__ import annotations

import argparse
import gc
import logging
import time
from typing import Any

import torch
from machine import machine
from torch import nn

from hookloop.callbacks import MicroBatch
from hookloop.loop import Callback, Loop

VOCABULARY = 50304


class Transformer(nn.Module):
    """A decoder: embeddings, causal pre-norm blocks, a head over the vocabulary."""

    def __init__(self, layers: int, width: int, tokens: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, width), nn.Embedding(tokens, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * layers))
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(layers))
        self.out = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)) for _ in range(layers)
        )
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        for i, (qkv, out, mlp) in enumerate(zip(self.qkv, self.out, self.mlp, strict=True)):
            q, k, v = (t.unflatten(-1, (-1, 64)).transpose(1, 2) for t in qkv(self.norms[2 * i](x)).chunk(3, dim=-1))
            x = x + out(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
            x = x + mlp(self.norms[2 * i + 1](x))
        return self.head(x)


def loss_fn(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1).float(), ids[:, 1:].flatten())


class Count(logging.Handler):
    """Counts the times that memory ran out."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.errors = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.errors += "ran out of memory" in record.getMessage()


def train(arguments: Any, callbacks: list[Callback], updates: int, timed: int) -> tuple[float, list[int]]:
    """Return the samples/s of the last `timed` updates, and the micro-batch size of each update."""
    torch.manual_seed(0)
    model = Transformer(arguments.layers, arguments.width, arguments.tokens).cuda()
    loop = Loop(model, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True), callbacks, autocast=torch.bfloat16)
    ids = torch.randint(0, VOCABULARY, (arguments.batch, arguments.tokens + 1)).pin_memory()
    sizes, start = [], 0.0
    with loop:
        for _ in loop.epochs(steps=updates):
            for step in loop.steps([ids] * updates):
                if loop.state.step == updates - timed:
                    torch.cuda.synchronize()
                    start = time.perf_counter()
                for micro in step:
                    with micro:
                        micro.backward(loss_fn)
                loop.update()
                sizes.append(loop.state.micro_size)
    torch.cuda.synchronize()
    return timed * arguments.batch / (time.perf_counter() - start), sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {"gib": 24, "batch": 256, "layers": 12, "width": 768, "tokens": 512, "step": 16, "timed": 3}
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark measures a CUDA device's memory, and there is none here")
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, arguments.gib * 2**30 / total))
    print(f"{machine()}\n{arguments.layers} layers x {arguments.width}, {arguments.tokens} tokens, batch {arguments.batch}, at "
          f"most {arguments.gib} GiB\n\n| micro-batch | samples/s |\n|---|---|")  # fmt: skip
    rates: dict[int, float] = {}
    sizes = [2, 4, 8, *range(arguments.step, arguments.batch + 1, arguments.step)]
    for size in sizes:
        try:
            rates[size] = train(arguments, [MicroBatch(size)], 1 + arguments.timed, arguments.timed)[0]
        except torch.OutOfMemoryError:
            print(f"| {size} | out of memory |")
            break
        finally:
            gc.collect()
            torch.cuda.empty_cache()
        print(f"| {size} | {rates[size]:.1f} |", flush=True)
    for target in ("throughput", "memory"):
        logging.getLogger("hookloop").addHandler(count := Count())
        rate, ran = train(arguments, [MicroBatch("auto", target=target)], 10 + arguments.timed, arguments.timed)
        decided = next(i for i in range(len(ran)) if len(set(ran[i:])) == 1)
        print(f"| auto, {target}: {ran[-1]} | {rate:.1f}: {rate / max(rates.values()):.3f} of the best; decided after {decided} "
              f"updates, {count.errors} out of memory; sizes {ran[: decided + 1]} |", flush=True)  # fmt: skip
        logging.getLogger("hookloop").removeHandler(count)
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
