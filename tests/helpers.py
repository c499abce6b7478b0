"""What the tests share: small problems, both forms of the loop, and what to compare two runs by."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from hookloop.loop import Callback, Loop, State

torch.set_num_threads(1)  # tests share the cores; two of torch's threads each would wait for one another


class Samples(Dataset):
    """`count` samples of 6 features, 3 classes and their own position; counts what is read."""

    def __init__(self, count: int, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(7)
        self.x = torch.randn(count, 6, generator=generator, dtype=dtype)
        self.y = torch.randint(0, 3, (count,), generator=generator)
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> Any:
        self.read.append(i)
        return self.x[i], self.y[i], i


class Reported(Callback):
    """Keeps what each report gave for a metric."""

    def __init__(self, metric: str) -> None:
        self.metric, self.seen = metric, list[float]()

    def on_validation_end(self, state: State) -> None:
        self.seen.append(state.metrics[self.metric])


def loss_fn(model: nn.Module, batch: Any) -> Any:
    logits = model(batch[0])
    loss = nn.functional.cross_entropy(logits, batch[1])
    return {
        "loss": loss,
        "accuracy": (logits.argmax(1) == batch[1]).to(loss.dtype).mean(),
        "preds": logits,
        "target": batch[1],
    }


def with_losses(model: Any, batch: Any) -> Any:
    found = loss_fn(model, batch)
    return {**found, "losses": nn.functional.cross_entropy(found["preds"].detach(), batch[1], reduction="none")}


def net(dtype: torch.dtype = torch.float32, noise: bool = True, seed: int = 3) -> nn.Sequential:
    torch.manual_seed(seed)
    extra = [nn.BatchNorm1d(12), nn.Dropout(0.3)] if noise else []
    return nn.Sequential(nn.Linear(6, 12), *extra, nn.ReLU(), nn.Linear(12, 3)).to(dtype)


def adamw(model: nn.Module, lr: float = 1e-2) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=lr)


def loader(count: int = 50, batch_size: int = 8, dtype: torch.dtype = torch.float32, **kwargs: Any) -> DataLoader:
    return DataLoader(Samples(count, dtype), batch_size=batch_size, **{"shuffle": True, **kwargs})


def stateful_loader(dataset: Any, batch_size: int, **kwargs: Any) -> Any:
    """torchdata's; without it the test is skipped."""
    torchdata = pytest.importorskip("torchdata.stateful_dataloader")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "'set_vital' is deprecated")  # torch's word on what torchdata calls
        return torchdata.StatefulDataLoader(dataset, batch_size, **kwargs)


def by_hand(loop: Loop, loss: Any, train: Any, val: Any = None, *, epochs: int | None = None, steps: int | None = None) -> Any:
    """The hand-written form, as the README shows it."""
    with loop:
        for _ in loop.epochs(epochs, steps=steps):
            for step in loop.steps(train):
                for micro in step:
                    with micro:
                        micro.backward(loss)
                loop.update()
            loop.validate(loss, val)
    return loop.state


def built_in(loop: Loop, loss: Any, train: Any, val: Any = None, *, epochs: int | None = None, steps: int | None = None) -> Any:
    return loop.fit(loss, train, val, epochs=epochs, steps=steps)


FORMS = [by_hand, built_in]


class Killed(BaseException):
    """What stands for a kill where no process need die."""


class KillAt(Callback):
    """Ends the run without a word at a step's end, before that step's save."""

    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_step_end(self, state: State) -> None:
        if state.step == self.step:
            raise Killed


def bits(loop: Loop) -> dict[str, torch.Tensor]:
    """Weights, buffers and optimizer state, to be compared bit by bit."""
    found = {name: value.clone() for name, value in loop.state.model.state_dict().items()}
    for i, state in loop.state.optimizer.state_dict()["state"].items():
        found |= {f"optimizer.{i}.{k}": v.clone() for k, v in state.items() if isinstance(v, torch.Tensor)}
    return found


def assert_same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, f"differ: {different}"


def same(a: Any, b: Any, path: str = "") -> None:
    """Whatever a checkpoint may hold is the same, to the bit, in the same order."""
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert list(a) == list(b), path
        for key in a:
            same(a[key], b[key], f"{path}[{key!r}]")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            same(x, y, f"{path}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    else:
        assert a == b, path


class Patient:
    """A trial of a search that is never hopeless."""

    def report(self, value: float, step: int) -> None:
        """Take it."""

    def should_prune(self) -> bool:
        return False
