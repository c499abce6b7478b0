"""Time study.preview takes for 100,000 updates of two parameter groups, by what plans them.

python benchmarks/preview.py
"""

from __future__ import annotations

import time

import torch
from machine import machine
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hookloop.callbacks import DecaySchedule, MicroBatch, Schedule, Warmup, WeightDecay
from hookloop.loop.study import preview

SETS = {
    "warmup, cosine": lambda: [Warmup(0.05), Schedule("cosine", end=0.1), MicroBatch(8)],
    "one_cycle": lambda: [Schedule("one_cycle")],
    "warmup, cosine, decay linear": lambda: [Warmup(0.05), Schedule("cosine"), DecaySchedule("linear")],
    "warmup, cosine, decay by the rate": lambda: [Warmup(0.05), Schedule("cosine"), DecaySchedule("rate")],
}


def main() -> None:
    torch.set_num_threads(1)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    train = DataLoader(TensorDataset(torch.zeros(640_000, 1)), batch_size=32)
    print(machine(), "\n\n| planned by | seconds, the least of 5 |\n|---|---|", sep="")
    for name, callbacks in SETS.items():
        took = []
        for _ in range(5):
            start = time.perf_counter()
            found = preview([WeightDecay(), *callbacks()], train, epochs=5, optimizer=torch.optim.AdamW(model.parameters()),
                            model=model)  # fmt: skip
            took.append(time.perf_counter() - start)
            assert found.rates is not None
            assert found.rates.shape == (100_000, 2)
        print(f"| {name} | {min(took):.2f} |")


if __name__ == "__main__":
    main()
