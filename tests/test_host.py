"""Numbers brought to the host without a wait."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hookloop.loop.host import HostCopy


def test_captured_as_it_is_now() -> None:
    host, loss = HostCopy(), torch.tensor(2.0, requires_grad=True)
    host.put(("a", 1), {"loss": loss, "count": 3})
    with torch.no_grad():
        loss.add_(5)
    host.put(("a", 2), {"loss": loss})
    assert host.take() == [(("a", 1), {"loss": 2.0, "count": 3.0}), (("a", 2), {"loss": 7.0})]
    assert host.take() == host.take(all=True) == []


def test_what_is_a_number() -> None:
    host = HostCopy()
    host.put(None, {
        "bool": True, "half": torch.tensor(0.5, dtype=torch.bfloat16), "long": torch.tensor(7), "yes": torch.tensor(True),
        "numpy": np.float32(1.5), "nan": torch.tensor(math.nan), "inf": -math.inf,
        "vector": torch.ones(1), "text": "x", "none": None, "complex": torch.tensor(1j), "list": [1],
    })  # fmt: skip
    [(_, found)] = host.take()
    assert list(found) == ["bool", "half", "long", "yes", "numpy", "nan", "inf"]
    assert {type(v) for v in found.values()} == {float}
    assert math.isnan(found.pop("nan"))
    assert list(found.values()) == [1.0, 0.5, 7.0, 1.0, 1.5, -math.inf]


class Late:
    """An event that the device has not come to."""

    def __init__(self) -> None:
        self.arrived, self.waits = False, 0

    def query(self) -> bool:
        return self.arrived

    def synchronize(self) -> None:
        self.waits, self.arrived = self.waits + 1, True


def test_what_has_not_arrived_stays_and_keeps_its_place() -> None:
    host, events = HostCopy(), [Late(), Late()]
    for i, event in enumerate(events):
        host.put(i, {"x": i})
        host.pending[-1][2].append(event)  # type: ignore[arg-type]
    assert host.take() == []
    events[1].arrived = True
    assert host.take() == []
    events[0].arrived = True
    host.put(2, {"x": 2})
    host.pending[-1][2].append(Late())  # type: ignore[arg-type]
    assert [about for about, _ in host.take()] == [0, 1]
    assert [event.waits for event in events] == [0, 0]  # to wait for what is there is a call to the device too
    assert [about for about, _ in host.take(all=True)] == [2]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_wait_on_a_gpu() -> None:
    host = HostCopy()
    x = torch.ones(4096, 4096, device="cuda")
    values: dict[str, Any] = {"warm": (x @ x / 4096).mean()}  # kernels are loaded at their first use, which may wait
    host.put(0, values)  # the first pinned buffer is made, which may wait
    host.take(all=True)
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(50):
            x = x @ x / 4096
        loss = x.mean()
        host.put(1, {"loss": loss, "rate": 0.1, "cpu": torch.tensor(3.0)})
        assert host.take() == []  # the products are still running
        loss.add_(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert host.take(all=True) == [(1, {"loss": pytest.approx(1.0), "rate": 0.1, "cpu": 3.0})]


def test_nothing_is_read_back_when_put(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake CUDA tensor holds no value, so that whatever reads it fails."""
    made: list[Any] = []

    class Event(Late):
        def __init__(self, device: str) -> None:
            super().__init__()
            made.append(device)

        def record(self, stream: Any) -> None:
            made.append(stream)

    pinned, empty = [], torch.empty
    monkeypatch.setattr(torch, "Event", Event)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(torch, "empty", lambda *a, pin_memory=None, **k: (pinned.append(pin_memory), empty(*a, **k))[1])
    host = HostCopy()
    with FakeTensorMode():
        values = {"loss": torch.ones((), device="cuda"), "cpu": torch.ones(())}
        pinned.clear()
        host.put(1, values)
    assert made == ["cuda", "stream of cuda:0"]
    assert pinned == [True, False]
    assert host.take() == []
