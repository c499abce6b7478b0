"""Checkpoints that are damaged, hostile, or of another program: found out by name, run no code, and leave the run exact."""

from __future__ import annotations

import builtins
import collections
import contextlib
import copy
import enum
import functools
import io
import itertools
import json
import operator
import os
import pathlib
import pickle
import random
import shutil
import subprocess
import sys
import threading
import time
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import KillAt, Killed, adamw, assert_same_bits, bits, built_in, by_hand, loader, loss_fn, net, same
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hookloop.callbacks import Checkpoint, EarlyStopping, GradientAccumulation, MicroBatch, Schedule, Seed, Warmup
from hookloop.loop import Callback, Goal, Loop, State, store
from hookloop.loop.store import list_checkpoints, manifest

Bits = dict[str, torch.Tensor]


def make(folder: Path | None, kill: int | None = None, extra: Any = (), seed: bool = True, **kwargs: Any) -> Loop:
    model = net(seed=5)
    save = [] if folder is None else [Checkpoint(folder, every=1, keep=None)]
    first = [Seed(5)] if seed else []
    callbacks = [*first, Warmup(4), EarlyStopping("val_loss", patience=9, restore_best=True), *save, KillAt(kill), *extra]
    return Loop(model, adamw(model), callbacks, **{"resume": folder, **kwargs})


def train(loop: Loop, epochs: int = 3) -> Bits:
    """Three updates an epoch; the best weights are those of each epoch's end so far."""
    built_in(loop, loss_fn, loader(24, 8), loader(16, 8, shuffle=False), epochs=epochs)
    return bits(loop)


@pytest.fixture(scope="module")
def expected() -> Bits:
    return train(make(None))


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Killed at the end of step 8: checkpoints of steps 1 to 7; epochs end at 3 and 6, each with new best weights."""
    folder = tmp_path_factory.mktemp("killed")
    with pytest.raises(Killed):
        train(make(folder, 8))
    names = [f"step-{s:08d}{more}" for s in range(1, 8) for more in (("", ".2") if s in (3, 6) else ("",))]
    assert [p.name for p in list_checkpoints(folder)] == names
    assert len(list(folder.glob("weights-*.pt"))) == 2
    return folder


def copied(source: Path, target: Path) -> Path:
    shutil.copytree(source, target, dirs_exist_ok=True)
    return target


def beside(checkpoint: Path) -> list[str]:
    return [*json.loads((checkpoint / manifest.NAME).read_text())["beside"]]


def files(checkpoint: Path) -> dict[str, Path]:
    """Every file that a checkpoint needs, by what it is."""
    found = {name: checkpoint / name for name in (manifest.NAME, "model.pt", "state.pt")}
    return found | dict(zip(["weights"], [checkpoint.parent / name for name in beside(checkpoint)], strict=True))


def resign(checkpoint: Path, beside: dict[str, Path] | None = None) -> None:
    """Give a checkpoint a manifest that matches what its files are now: its digests are no defence then."""
    names = {p.name: manifest.entry(p) for p in sorted(checkpoint.glob("*.pt"))}
    old = json.loads((checkpoint / manifest.NAME).read_text())
    aside = {name: manifest.entry(checkpoint.parent / name) for name in old["beside"] if (checkpoint.parent / name).is_file()}
    aside |= {name: manifest.entry(path) for name, path in (beside or {}).items()}
    text = manifest.render(old["step"], old["reasons"], names, aside)
    (checkpoint / manifest.NAME).write_text(text)


def edited(checkpoint: Path, change: Callable[[Any], Any], file: str = "state.pt") -> None:
    """Rewrite a file of a checkpoint with other content, and its manifest with it."""
    content = torch.load(checkpoint / file, weights_only=True)
    torch.save(change(content) or content, checkpoint / file)
    resign(checkpoint)


# CK7, CK8, CK9, CK10: damage

CUTS: dict[str, Callable[[bytes], bytes] | None] = {
    "empty": lambda b: b"",
    "one byte": lambda b: b[:1],
    "half": lambda b: b[: len(b) // 2],
    "all but one": lambda b: b[:-1],
    "missing": None,
}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("file", [manifest.NAME, "model.pt", "state.pt", "weights"])
def test_ck7_cut_or_missing(file: str, cut: str, killed: Path, expected: Bits, tmp_path: Path) -> None:
    """The one before is used, with a warning that names both, and the run ends with the undisturbed run's bits."""
    folder = copied(killed, tmp_path)
    newest = list_checkpoints(folder)[-1]
    path, change = files(newest)[file], CUTS[cut]
    if change is None:
        path.unlink()
    else:
        path.write_bytes(change(path.read_bytes()))
    used = list_checkpoints(folder)[-3 if file == "weights" else -2]  # two checkpoints need the file beside them
    with pytest.warns(UserWarning, match="resumed from") as caught:
        found = train(make(folder))
    assert len(caught) == 1
    text = str(caught[0].message)
    assert text.startswith(f"resumed from {used}, since a newer one can't be read: {path} ")
    assert "missing" in text if cut == "missing" else "damaged" in text or "bytes, not the" in text
    assert_same_bits(expected, found)
    assert all(store.readable(p) for p in list_checkpoints(folder))  # the run came by those steps again
    assert (folder / f"unreadable-{newest.name}").is_dir()


@pytest.mark.parametrize("file", [manifest.NAME, "model.pt", "state.pt", "weights"])
def test_ck7_the_one_that_was_asked_for_by_name(file: str, killed: Path, tmp_path: Path) -> None:
    """Where a checkpoint is named, no other is taken."""
    folder = copied(killed, tmp_path)
    newest = list_checkpoints(folder)[-1]
    path = files(newest)[file]
    path.write_bytes(path.read_bytes()[:-1])
    loop = make(folder, resume=newest)
    before = bits(loop)
    with pytest.raises(manifest.Damaged) as error:
        loop.__enter__()
    assert str(error.value).startswith(f"{path} ")
    assert_same_bits(before, bits(loop))


def test_ck8_one_flipped_bit_anywhere(killed: Path, tmp_path: Path) -> None:
    """1000 flips over all files of a checkpoint: 1000 rejected, each naming the file; whole again, it is read."""
    folder, draw = copied(killed, tmp_path), random.Random(8)
    newest = list_checkpoints(folder)[-1]
    whole = {path: path.read_bytes() for path in files(newest).values()}
    assert len(whole) == 4
    rejected = collections.Counter[Path]()
    for _ in range(1000):
        path = draw.choice([*whole])
        bit = draw.randrange(8 * len(whole[path]))
        damaged = bytearray(whole[path])
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(manifest.Damaged) as error:
            store.read(newest)
        assert str(error.value).startswith(f"{path} ")
        rejected[path] += 1
        path.write_bytes(whole[path])
    assert rejected.total() == 1000
    assert min(rejected.values()) > 200
    assert store.read(newest) is not None


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_ck8_every_bit_of_the_manifest(every: int, killed: Path, tmp_path: Path) -> None:
    """Also those that would leave the same values, such as another white space."""
    folder = copied(killed, tmp_path)
    newest = list_checkpoints(folder)[-1]
    path = newest / manifest.NAME
    whole = path.read_bytes()
    for bit in range(0, 8 * len(whole), every):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(manifest.Damaged) as error:
            store.read(newest)
        assert str(error.value).startswith(f"{path} ")


def test_ck8_flips_while_resuming(killed: Path, expected: Bits, tmp_path: Path) -> None:
    """What a run does with one: it names the file, goes on from the checkpoint before, and ends with the same bits."""
    draw = random.Random(9)
    for i in range(12):
        folder = copied(killed, tmp_path / str(i))
        newest = list_checkpoints(folder)[-1]
        path = [*files(newest).values()][i % 4]
        damaged = bytearray(path.read_bytes())
        bit = draw.randrange(8 * len(damaged))
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.warns(UserWarning, match=f"resumed from .*{path.name} is damaged"):
            found = train(make(folder))
        assert_same_bits(expected, found)


def swap(a: Path, b: Path) -> None:
    aside = a.with_name("aside")
    a.rename(aside)
    b.rename(a)
    aside.rename(b)


@pytest.mark.parametrize("names", [("model.pt",), ("state.pt",), ("manifest.json",), ("model.pt", "state.pt"),
                                   ("model.pt", "manifest.json"), ("state.pt", "manifest.json"), ()])  # fmt: skip
def test_ck9_swapped_between_two_checkpoints(names: tuple[str, ...], killed: Path, expected: Bits, tmp_path: Path) -> None:
    """Files of one step in the folder of another, or (none named) the folders under each other's names: both rejected."""
    folder = copied(killed, tmp_path)
    *_, before, a, b = list_checkpoints(folder)
    assert store.step_of(a) != store.step_of(b)
    for name in names:
        swap(a / name, b / name)
    if not names:
        swap(a, b)
    for one in (a, b):
        with pytest.raises(manifest.Damaged, match=f"{one.name}/"):
            store.read(one)
    with pytest.warns(UserWarning, match="resumed from") as caught:
        found = train(make(folder))
    text = str(caught[0].message)
    assert text.startswith(f"resumed from {before}, since")
    assert f"{a}/" in text
    assert f"{b}/" in text
    assert_same_bits(expected, found)


def test_ck9_a_manifest_of_another_step(killed: Path, tmp_path: Path) -> None:
    """A manifest that is whole in itself; a folder that says a step that never was."""
    folder = copied(killed, tmp_path)
    *_, a, b = list_checkpoints(folder)
    shutil.copy(a / manifest.NAME, b / manifest.NAME)
    with pytest.raises(
        manifest.Damaged, match=f"manifest.json is that of step {store.step_of(a)}, in a folder of another name"
    ):
        store.read(b)
    other = a.rename(folder / "step-00000099")
    with pytest.raises(manifest.Damaged, match="is that of step 6, in a folder of another name"):
        store.read(other)


def test_ck9_files_beside_swapped(killed: Path, tmp_path: Path) -> None:
    folder = copied(killed, tmp_path)
    swap(*folder.glob("weights-*.pt"))
    with pytest.warns(UserWarning, match=r"resumed from .*step-00000003, since"):  # the newest that needs neither
        found = store.read(folder)
    assert found is not None
    assert found.place.name == "step-00000003"


def test_ck9_two_of_one_step_under_each_others_names(killed: Path, expected: Bits, tmp_path: Path) -> None:
    """Before and after the validation of step 6, both of that step: whichever is taken, the run is the same."""
    folder = copied(killed, tmp_path)
    shutil.rmtree(folder / "step-00000007")
    swap(folder / "step-00000006", folder / "step-00000006.2")
    assert_same_bits(expected, train(make(folder)))


@pytest.mark.parametrize("strict", [True, False])
def test_ck10_all_bad(strict: bool, killed: Path, tmp_path: Path) -> None:
    """One error that lists each checkpoint's file and reason, in a folder left as it was; never a fresh start."""
    folder = copied(killed, tmp_path)
    all_of_them = list_checkpoints(folder)
    for i, one in enumerate(all_of_them):
        name = (manifest.NAME, "model.pt", "state.pt")[i % 3]
        data = (one / name).read_bytes()
        if i % 2:
            (one / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        else:
            (one / name).unlink()
    there = sorted(str(p) for p in folder.rglob("*"))
    loop = make(folder, strict=strict)
    before, seed = bits(loop), torch.get_rng_state()
    with pytest.raises(RuntimeError, match="none is a reason to start afresh") as error:
        train(loop)
    for i, one in enumerate(all_of_them):
        name = (manifest.NAME, "model.pt", "state.pt")[i % 3]
        assert f"{one / name} is {'damaged' if i % 2 else 'missing'}" in str(error.value)
    assert loop.state.step == 0
    assert_same_bits(before, bits(loop))
    assert torch.equal(seed, torch.get_rng_state())
    assert sorted(str(p) for p in folder.rglob("*")) == there


# CK11, CK12: what would run code

CANARY = "CANARY"


class Reduces:
    """Pickled as a call."""

    def __init__(self, call: Any, *arguments: Any, state: Any = None) -> None:
        self.parts = (call, arguments) if state is None else (call, arguments, state)

    def __reduce__(self) -> Any:
        return self.parts


class Raw:
    """An opcode stream of its own, put in as it stands."""

    def __init__(self, code: bytes) -> None:
        self.code = code


def python(canary: str) -> str:
    return f"open({canary!r}, 'w').close()"


PAYLOADS: dict[str, Callable[[str], Any]] = {
    "os.system": lambda c: Reduces(os.system, f"touch {c}"),
    "exec": lambda c: Reduces(builtins.exec, python(c)),
    "eval": lambda c: Reduces(builtins.eval, f"__import__('pathlib').Path({c!r}).touch()"),
    "pathlib": lambda c: Reduces(pathlib.Path.touch, Reduces(pathlib.Path, c)),
    "open": lambda c: Reduces(builtins.open, c, "w"),
    "popen": lambda c: Reduces(subprocess.Popen, ["touch", c]),
    "getattr chain": lambda c: Reduces(builtins.getattr, Reduces(builtins.__import__, "os"), "system"),
    "methodcaller": lambda c: Reduces(operator.methodcaller("touch"), Reduces(pathlib.Path, c)),
    "partial": lambda c: Reduces(functools.partial(os.system, f"touch {c}")),
    "map": lambda c: Reduces(builtins.list, Reduces(builtins.map, os.system, [f"touch {c}"])),
    "compile": lambda c: Reduces(builtins.exec, Reduces(builtins.compile, python(c), "x", "exec")),
    "_load_from_bytes": lambda c: Reduces(torch.storage._load_from_bytes, legacy(Reduces(os.system, f"touch {c}"))),
    "torch.load": lambda c: Reduces(torch.load, Reduces(io.BytesIO, legacy(Reduces(os.system, f"touch {c}")))),
    "rebuild from type": lambda c: Reduces(torch._tensor._rebuild_from_type_v2, os.system, torch.Tensor, (f"touch {c}",), {}),
    "state of a tensor": lambda c: Reduces(torch._tensor._rebuild_from_type_v2, torch.Tensor, torch.Tensor, (),
                                           {"x": Reduces(os.system, f"touch {c}")}),
    "state of OrderedDict": lambda c: Reduces(OrderedDict, state={"x": Reduces(os.system, f"touch {c}")}),
    "key of a dict": lambda c: {Reduces(os.system, f"touch {c}"): 1},
    "module's class": lambda c: Reduces(nn.Linear, 2, 2),
    "numpy object": lambda c: np.array([Reduces(os.system, f"touch {c}")], dtype=object),
    "odd module": lambda c: Raw(b"\x80\x02cthis\ns\n."),
    "dotted name": lambda c: Raw(b"\x80\x04\x8c\x05torch\x8c\x12serialization.os\x93."),
    "dotted old name": lambda c: Raw(b"\x80\x02ctorch.serialization\nos.system\n(S'touch " + c.encode() + b"'\ntR."),
    "INST": lambda c: Raw(b"(S'touch " + c.encode() + b"'\nios\nsystem\n."),
    "OBJ": lambda c: Raw(b"(cos\nsystem\nS'touch " + c.encode() + b"'\no."),
    "NEWOBJ_EX": lambda c: Raw(b"\x80\x04\x8c\x0asubprocess\x8c\x05Popen\x93]\x8c\x05touch\x8c" + bytes([len(c)]) + c.encode()
                               + b"\x86\x85}\x92."),
    "extension code": lambda c: Raw(b"\x80\x02\x82\x01."),
}  # fmt: skip


def legacy(x: Any) -> bytes:
    data = io.BytesIO()
    torch.save(x, data, _use_new_zipfile_serialization=False)
    return data.getvalue()


def zipped(x: Any) -> bytes:
    """A file of torch.save; an opcode stream takes the place of the one inside."""
    data = io.BytesIO()
    if not isinstance(x, Raw):
        torch.save(x, data)
        return data.getvalue()
    writer = torch._C.PyTorchFileWriter(data)
    writer.write_record("data.pkl", x.code, len(x.code))
    writer.write_record("byteorder", b"little", 6)
    writer.write_end_of_file()
    return data.getvalue()


def scripted(x: Any) -> bytes:
    """An archive of TorchScript, which holds code."""
    data = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), data)  # type: ignore[no-untyped-call]
    return data.getvalue()


def into(checkpoint: Path, place: str, evil: Any) -> None:
    """Put it at a place of a checkpoint, which then holds all else as it was, and a manifest that fits."""
    state, model = (torch.load(checkpoint / name, weights_only=True) for name in ("state.pt", "model.pt"))
    if place == "callback":
        state["callbacks"]["EarlyStopping"]["best"] = {"deep": [1, (2, evil)]}
    elif place == "rng":
        state["rng"]["python"][2] = evil
    elif place == "optimizer":
        state["optimizer"]["state"]["0.weight"]["exp_avg"] = evil
    elif place == "model":
        model["0.weight"] = evil
    torch.save(model, checkpoint / "model.pt")
    torch.save(state, checkpoint / "state.pt")


def corpus(source: Path, folder: Path) -> dict[str, tuple[str, str]]:
    """Write one folder for each way in; return folder -> its canary and the file that is bad."""
    found: dict[str, tuple[str, str]] = {}

    def start() -> tuple[Path, str]:
        target = folder / str(len(found))
        shutil.copytree(source / "step-00000007", target / "step-00000007")
        for one in beside(source / "step-00000007"):
            shutil.copy(source / one, target / one)
        return target / "step-00000007", str(folder / f"{CANARY}-{len(found)}")

    def done(checkpoint: Path, canary: str, file: str) -> None:
        resign(checkpoint)
        store.disk.verify(checkpoint)
        assert not Path(canary).exists(), "the payload ran while it was made"
        found[str(checkpoint.parent)] = canary, file

    places = ("callback", "rng", "optimizer", "model")
    for i, (name, payload) in enumerate(PAYLOADS.items()):
        for place in places if name in ("os.system", "exec", "eval", "pathlib") else places[i % 4 : i % 4 + 1]:
            checkpoint, canary = start()
            evil, file = payload(canary), "model.pt" if place == "model" else "state.pt"
            if isinstance(evil, Raw):
                (checkpoint / file).write_bytes(zipped(evil))
            else:
                into(checkpoint, place, evil)
            done(checkpoint, canary, file)
    writers: dict[str, Callable[[Any], bytes]] = {"zip": zipped, "legacy": legacy, "script": scripted,
        **{f"pickle {p}": functools.partial(pickle.dumps, protocol=p) for p in range(6)}}  # fmt: skip
    for file, write in itertools.product(("model.pt", "state.pt", "weights"), writers.values()):
        checkpoint, canary = start()
        path = files(checkpoint)[file]
        path.write_bytes(write({"0.weight": Reduces(os.system, f"touch {canary}")}))
        done(checkpoint, canary, path.name)
    return found


@pytest.fixture(scope="module")
def hostile(killed: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    return corpus(killed, tmp_path_factory.mktemp("hostile"))


def test_ck11_the_corpus_is_dangerous(killed: Path, tmp_path: Path) -> None:
    """Files made the same way do run code where a plain unpickler loads them: the tests below can fail."""
    made = corpus(killed, tmp_path)
    for place, (_, file) in made.items():
        path = Path(place) / "step-00000007" / file
        with warnings.catch_warnings(), contextlib.suppress(Exception):
            warnings.simplefilter("ignore")
            torch.load(path if path.exists() else Path(place) / file, weights_only=False)
    time.sleep(0.3)  # a process that was started may take a moment
    assert sum(os.path.exists(canary) for canary, _ in made.values()) >= 0.6 * len(made)


def test_ck11_no_code_runs_on_resume(hostile: dict[str, tuple[str, str]]) -> None:
    """Through the Loop, strict or not: an error, nothing of the run changed, and no canary."""
    for place, (canary, _) in hostile.items():
        for strict in (True, False):
            loop = make(Path(place), strict=strict)
            before = bits(loop)
            with pytest.raises(RuntimeError, match="no checkpoint can be read") as error:
                loop.__enter__()
            assert f"{place}/" in str(error.value)
            assert not os.path.exists(canary), place
            assert_same_bits(before, bits(loop))


def test_ck11_the_error_names_the_file(hostile: dict[str, tuple[str, str]]) -> None:
    """And advises nobody to load it with code allowed."""
    for place, (_, file) in hostile.items():
        with pytest.raises(RuntimeError, match="no checkpoint can be read") as error:
            make(Path(place)).__enter__()
        assert file in str(error.value)
        assert "weights_only` set to `False`" not in str(error.value)
        with pytest.raises(Exception, match=file) as direct:
            make(Path(place), resume=Path(place) / "step-00000007").__enter__()
        assert "weights_only` set to `False`" not in str(direct.value)


WATCHED = """
import builtins, json, sys, warnings
warnings.simplefilter("error")
import torch
from hookloop.loop import store
good, found = sys.argv[1], json.load(sys.stdin)
assert store.read(good) is not None  # whatever torch imports late is imported now
watching, seen = False, []

def hook(event, arguments):
    if not watching:
        return
    if event == "open":
        path, mode, flags = arguments
        if (isinstance(mode, str) and set(mode) & set("wax+")) or (mode is None and flags & 3):
            seen.append((event, str(path)))
    elif event == "import" or event in ("exec", "compile") or event.startswith(("os.system", "os.exec", "os.posix_spawn",
            "os.spawn", "os.fork", "subprocess.", "socket.", "shutil.", "ctypes.", "pty.", "os.remove", "os.rename")):
        seen.append((event, str(arguments)[:200]))

sys.addaudithook(hook)
results = {}
for folder in found:
    seen.clear()
    watching = True
    try:
        outcome = "read" if store.read(folder) is not None else "fresh"
    except Exception as error:
        outcome = type(error).__name__
    watching = False
    results[folder] = outcome, list(seen)
print(json.dumps(results))
"""


def watched(good: Path, folders: list[str], **environment: str) -> dict[str, tuple[str, list[Any]]]:
    """Read each in a process that notes imports, code, files written and processes started."""
    process = subprocess.run([sys.executable, "-c", WATCHED, str(good)], input=json.dumps(folders), text=True,
                             capture_output=True, timeout=150, env={**os.environ, **environment})  # fmt: skip
    assert process.returncode == 0, process.stderr[-2000:]
    return {k: (outcome, seen) for k, (outcome, seen) in json.loads(process.stdout).items()}


@pytest.mark.parametrize("environment", [{}, {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}])
def test_ck11_watched_by_the_interpreter(environment: dict[str, str], hostile: Any, killed: Path) -> None:
    """No import, no code object run, no file written, no process: also where torch is told to allow everything."""
    found = watched(killed, [*hostile], **environment)
    assert found == {place: ("RuntimeError", []) for place in hostile}
    assert not [canary for canary, _ in hostile.values() if os.path.exists(canary)]


class Keeps(Callback):
    """State of any kind, given back as it came."""

    def __init__(self, content: dict[str, Any] | None = None) -> None:
        self.content = content or {"x": 0}

    def state_dict(self) -> dict[str, Any]:
        return dict(self.content)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.content = state


NAMING = {
    "_target_": "os.system", "_args_": ["touch CANARY"], "__reduce__": ["os.system", ["touch CANARY"]],
    "__class__": "antigravity.Fly", "py/object": "this.That", "class_path": "antigravity.Fly", "module": "antigravity",
    "import": "idlelib.idle", "format": "{0.__init__.__globals__}{x!r:>{y}} %s %n %(x)d ${x} \x00 \ud800",
    "yaml": "!!python/object/apply:os.system ['touch CANARY']", "__setstate__": "this", "__dict__": {"x": 1},
}  # fmt: skip


def test_ck12_data_that_name_code_are_data(killed: Path, tmp_path: Path) -> None:
    """They come to the callback as they are; nothing is imported, in a process that watches for it either."""
    keeps = Keeps()
    with pytest.raises(Killed):
        train(make(tmp_path, 3, [keeps]))
    newest = list_checkpoints(tmp_path)[-1]

    def change(state: Any) -> None:
        state["callbacks"]["Keeps"] = NAMING
        state["metrics"] |= {"{0.__class__} %s": 1.0, "_target_": 2.0}

    edited(newest, change)
    again = Keeps()
    loop = make(None, extra=[again], resume=tmp_path)
    with loop:
        same(again.content, NAMING)
        assert loop.state.metrics["_target_"] == 2.0
    assert not {"antigravity", "idlelib.idle"} & set(sys.modules)
    assert watched(killed, [str(tmp_path)]) == {str(tmp_path): ("read", [])}


def test_ck12_names_in_messages_are_text(killed: Path, tmp_path: Path) -> None:
    """Format strings where a message repeats what the checkpoint says."""
    folder = copied(killed, tmp_path)
    newest = list_checkpoints(folder)[-1]
    odd = "{0.__class__.__init__.__globals__} %s %(x)d ${HOME}"
    edited(newest, lambda state: state["callbacks"].update({odd: {"x": 1}}))
    edited(newest, lambda model: model.update({odd: torch.ones(1)}), "model.pt")
    with pytest.raises(ValueError, match="does not fit") as error:
        make(folder, resume=newest).__enter__()
    assert f"{odd} is in the checkpoint alone" in str(error.value)
    assert f"{odd} has state in the checkpoint and is not in callbacks" in str(error.value)


def outside(folder: Path, name: str, entry: Any, where: str) -> Path:
    """Let the newest checkpoint's manifest, and state, name a file elsewhere; the digests all fit."""
    newest = list_checkpoints(folder)[-1]
    old = json.loads((newest / manifest.NAME).read_text())
    listed = dict(old["files"])
    aside = dict(old["beside"])
    if where == "files":
        listed[name] = entry
    else:
        aside = {name: entry}
        state = torch.load(newest / "state.pt", weights_only=True)
        state["beside"] = [["EarlyStopping", "weights", name]]
        torch.save(state, newest / "state.pt")
        listed["state.pt"] = manifest.entry(newest / "state.pt")
    (newest / manifest.NAME).write_text(manifest.render(old["step"], old["reasons"], listed, aside))
    return newest


OPENED = """
import json, signal, sys
from hookloop.loop import store
newest, names = json.load(sys.stdin)
opened, results = [], {}
store.read(newest[0] + "/../step-00000001")

class Hangs(BaseException):
    pass

def ring(number, frame):
    raise Hangs

signal.signal(signal.SIGALRM, ring)
sys.addaudithook(lambda event, arguments: opened.append(str(arguments[0])) if event == "open" else None)
for place, name in zip(newest, names):
    opened.clear()
    signal.alarm(2)
    try:
        store.read(place)
        outcome = "taken"
    except Exception as error:
        outcome = "refused" if name in str(error) else "refused, unnamed"
    except Hangs:
        outcome = "hangs"
    signal.alarm(0)
    results[place] = outcome, any(name in path for path in opened)
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def elsewhere(killed: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[str, bool]]:
    """What comes of checkpoints whose manifest names files elsewhere, and whether these were opened."""
    places, names = {}, []
    for i, (name, where) in enumerate(ELSEWHERE):
        root = tmp_path_factory.mktemp(f"elsewhere{i}")
        folder, secret = copied(killed, root / "runs" / "a"), root / "secret.pt"
        shutil.copy(next(folder.glob("weights-*.pt")), secret)
        os.mkfifo(root / "pipe")
        up = "../../" if where == "beside" else "../../../"
        path = {"secret": f"{up}secret.pt", "absolute": str(secret), "device": "/dev/zero", "pipe": str(root / "pipe")}[name]
        entry = {"bytes": 0, "sha256": "0" * 64} if name in ("device", "pipe") else manifest.entry(secret)
        places[str(outside(folder, path, entry, where))] = name, where
        names.append(Path(path).name)
    process = subprocess.run([sys.executable, "-c", OPENED], input=json.dumps([[*places], names]), text=True,
                             capture_output=True, timeout=100)  # fmt: skip
    assert process.returncode == 0, process.stderr[-2000:]
    return {places[place]: tuple(result) for place, result in json.loads(process.stdout).items()}


ELSEWHERE = [(name, where) for name in ("secret", "absolute", "device", "pipe") for where in ("files", "beside")]


@pytest.mark.parametrize(("name", "where"), ELSEWHERE)
def test_ck12_a_manifest_that_names_files_elsewhere(name: str, where: str, elsewhere: Any) -> None:
    """Refused by name, and not so much as opened: a device would be read forever, a pipe waited for."""
    assert elsewhere[name, where] == ("refused", False)


@pytest.mark.parametrize("change", [
    lambda s: s.pop("progress"), lambda s: s.update(callbacks=[]), lambda s: s.update(optimizer="os.system"),
    lambda s: s.update(beside=[["Nobody", "weights", "x"]]), lambda s: s.update(beside="x"), lambda s: s.pop("beside"),
    lambda s: s.update(rng=None), lambda s: ["not", "a", "dict"],
])  # fmt: skip
def test_ck12_content_of_another_make_is_an_error(change: Any, killed: Path, tmp_path: Path) -> None:
    """A checkpoint whose digests fit, but which hookloop did not write."""
    folder = copied(killed, tmp_path)
    newest = list_checkpoints(folder)[-1]
    edited(newest, lambda state: changed if isinstance(changed := change(state), list) else state)
    loop = make(folder, resume=newest)
    with pytest.raises(Exception):  # noqa: B017, PT011
        loop.__enter__()


# CK14, CK15, CK16, CK17: other programs


class Net(nn.Module):
    """Layers of its own choice, in an order of its own; each starts with values that its name decides."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        self.layers = [*layers]
        for name, layer in layers.items():
            for i, p in enumerate(layer.parameters()):
                nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(1000 * i + sum(map(ord, name))))
            setattr(self, name, layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name in sorted(self.layers):
            x = torch.tanh(getattr(self, name)(x))
        return x


def layers(order: Iterable[str] = "abcd", **other: nn.Module) -> Net:
    made = {"a": nn.Linear(6, 8), "b": nn.Linear(8, 8), "c": nn.Linear(8, 8), "d": nn.Linear(8, 3)} | other
    return Net(**{name: made[name] for name in order})


def saved(folder: Path, model: nn.Module, optimizer: Any, callbacks: Any = (), steps: int = 4) -> Any:
    """Run some steps with checkpoints; return weights and optimizer state by name."""
    loop = Loop(model, optimizer, [Seed(1), *callbacks, Checkpoint(folder, every=1, keep=None)], resume=folder)
    built_in(loop, loss_fn, loader(32, 8), steps=steps)
    return by_name(loop)


def by_name(loop: Loop) -> Any:
    named = store.Named(loop.state.model, loop.state.optimizer)
    return copy.deepcopy((dict(sorted(named.model_state().items())), dict(sorted(named.optimizer_state()["state"].items()))))


def test_ck14_another_model_names_everything_at_once(tmp_path: Path) -> None:
    """Missing, extra, renamed, of other shape: all named with their shapes, and nothing is changed."""
    saved(tmp_path, model := layers(), adamw(model), [keeps := Keeps({"x": 1})])
    other = layers("abxe", b=nn.Linear(8, 5), x=nn.Linear(5, 5), e=nn.Linear(5, 3))
    optimizer = adamw(other)
    (other.a.weight.sum() * 2).backward()
    optimizer.step()
    keeps = Keeps({"x": 7})
    loop = Loop(other, optimizer, [Seed(1), keeps, Warmup(3), Checkpoint(tmp_path)], resume=tmp_path)
    before, callbacks = bits(loop), copy.deepcopy([c.state_dict() for c in loop.callbacks])
    settings = copy.deepcopy(optimizer.state_dict()["param_groups"])
    generators = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    with pytest.raises(ValueError, match="does not fit") as error:
        loop.__enter__()
    assert (torch.equal(generators[0], torch.get_rng_state()), random.getstate()) == (True, generators[1])
    assert np.random.get_state()[1].tolist() == generators[2]
    text = str(error.value)
    for says in ("b.weight is (5, 8) here and (8, 8) in the checkpoint", "b.bias is (5,) here and (8,) in the checkpoint",
                 "x.weight is missing in the checkpoint", "x.bias is missing in the checkpoint", "e.weight is missing",
                 "c.weight is in the checkpoint alone", "c.bias is in the checkpoint alone", "d.weight is in the checkpoint alone",
                 "strict=False"):  # fmt: skip
        assert says in text
    assert "a.weight" not in text
    assert_same_bits(before, bits(loop))
    same([c.state_dict() for c in loop.callbacks], callbacks)
    same(optimizer.state_dict()["param_groups"], settings)
    assert (loop.state.step, loop.state.samples, loop.state.epoch) == (0, 0, 0)


def test_ck14_missing_and_extra_come_with_their_shapes(tmp_path: Path) -> None:
    saved(tmp_path, model := layers(), adamw(model))
    other = layers("abxd", x=nn.Linear(8, 8, bias=False))
    with pytest.raises(ValueError, match="does not fit") as error:
        Loop(other, adamw(other), [Seed(1), Checkpoint(tmp_path)], resume=tmp_path).__enter__()
    parts = str(error.value).split("; ")
    for name in ("x.weight", "c.weight"):  # "Error lists first differences by name and shape"
        assert any(name in part and "(8, 8)" in part for part in parts), name


def test_ck14_many_differences_are_counted(tmp_path: Path) -> None:
    saved(tmp_path, model := layers(), adamw(model))
    other = Net(**{f"z{i:02d}": nn.Linear(6, 6) for i in range(20)})
    with pytest.raises(ValueError, match="does not fit") as error:
        Loop(other, adamw(other), [Seed(1)], resume=tmp_path).__enter__()
    text = str(error.value)
    assert sum(f"z{i:02d}." in text for i in range(20)) >= 6
    assert "; and 28 more" in text  # 40 missing and 8 alone in the checkpoint


def test_ck14_not_strict_takes_what_fits(tmp_path: Path) -> None:
    weights, state = saved(tmp_path, model := layers(), adamw(model))
    other = layers(["a", "b", "cx", "d"], b=nn.Linear(8, 5), cx=nn.Linear(5, 8))
    fresh = {name: value.clone() for name, value in other.state_dict().items()}
    loop = Loop(other, adamw(other), [Seed(1)], resume=tmp_path, strict=False)
    with pytest.warns(UserWarning, match="not taken") as caught:
        loop.__enter__()
    with_it = by_name(loop)
    assert len(caught) == 1
    text = str(caught[0].message)
    for says in (
        "b.weight is (5, 8) here and (8, 8) in the checkpoint",
        "cx.weight is missing",
        "c.bias is in the checkpoint alone",
    ):
        assert says in text
    assert "a.weight" not in text
    assert "d.bias" not in text
    fits = {"a.weight", "a.bias", "d.weight", "d.bias"}
    for name, value in other.state_dict().items():
        assert torch.equal(value, weights[name] if name in fits else fresh[name]), name
    assert set(with_it[1]) == fits
    same(with_it[1], {name: state[name] for name in sorted(fits)})
    assert loop.state.step == 4
    assert loop.state.samples == 32
    loop.__exit__(None, None, None)
    built_in(loop, loss_fn, loader(32, 8), steps=6)
    assert loop.state.step == 6


OPTIMIZERS: dict[str, tuple[Callable[[Net], Any], str]] = {
    "class": (lambda m: torch.optim.SGD(m.parameters(), lr=1e-2), "the optimizer is SGD here and AdamW in the checkpoint"),
    "lr": (
        lambda m: torch.optim.AdamW(m.parameters(), lr=2e-2),
        "lr of parameter group 0 is 0.02 here and 0.01 in the checkpoint's program",
    ),
    "decay": (
        lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2, weight_decay=0.3),
        "weight_decay of parameter group 0 is 0.3 here and 0.01 in the checkpoint's program",
    ),
    "betas": (
        lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2, betas=(0.8, 0.99)),
        "betas of parameter group 0 is [0.8, 0.99] here and [0.9, 0.999] in the checkpoint's program",
    ),
    "groups": (
        lambda m: torch.optim.AdamW(
            [{"params": [*m.a.parameters()]}, {"params": [p for n, p in m.named_parameters() if n[0] != "a"]}], lr=1e-2
        ),
        "the optimizer has 2 parameter groups here and 1 in the checkpoint",
    ),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_ck15_another_optimizer_is_named(kind: str, tmp_path: Path) -> None:
    saved(tmp_path, model := layers(), adamw(model))
    build, says = OPTIMIZERS[kind]
    other = layers()
    loop = Loop(other, build(other), [Seed(1)], resume=tmp_path)
    before = bits(loop)
    with pytest.raises(ValueError, match="does not fit") as error:
        loop.__enter__()
    assert says in str(error.value)
    assert_same_bits(before, bits(loop))


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_ck15_not_strict_the_programs_change_stands(kind: str, tmp_path: Path) -> None:
    """What the program changed is as the program says, all else as the checkpoint says, and the run goes on."""
    halved = lambda: Schedule(lambda optimizer, total: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5))
    weights, state = saved(tmp_path, model := layers(), adamw(model), [halved()])
    build, says = OPTIMIZERS[kind]
    other = layers()
    optimizer = build(other)
    mine = copy.deepcopy(optimizer.param_groups[0])
    loop = Loop(
        other,
        optimizer,
        [Seed(1), *([halved()] if kind != "groups" else [Schedule(halved()._function)])],
        resume=tmp_path,
        strict=False,
    )
    with pytest.warns(UserWarning, match="not taken") as caught:
        loop.__enter__()
    assert len(caught) == 1
    assert says in str(caught[0].message)
    found = by_name(loop)
    same(found[0], weights)
    same(found[1], {} if kind == "class" else state)
    assert loop.state.step == 4
    group = optimizer.param_groups[0]
    if kind not in ("class", "groups"):
        assert group["lr"] == (0.02 if kind == "lr" else 0.01 / 16)
    for option in ("weight_decay", "betas") if kind != "class" else ():
        assert group[option] == mine[option]
    loop.__exit__(None, None, None)


def test_ck15_a_parameter_in_another_group(tmp_path: Path) -> None:
    def split(model: Net, first: str) -> Any:
        one, two = ([p for n, p in model.named_parameters() if (n[0] in first) == inside] for inside in (True, False))
        return torch.optim.AdamW([{"params": one, "weight_decay": 0.5}, {"params": two, "weight_decay": 0.0}], lr=1e-2)

    _, state = saved(tmp_path, model := layers(), split(model, "ab"))
    other = layers()
    with pytest.raises(ValueError, match="does not fit") as error:
        Loop(other, split(other, "a"), [Seed(1)], resume=tmp_path).__enter__()
    assert "b.weight is in parameter group 1 here and 0 in the checkpoint" in str(error.value)
    assert "b.bias is in parameter group 1 here and 0 in the checkpoint" in str(error.value)
    other = layers()
    loop = Loop(other, split(other, "a"), [Seed(1)], resume=tmp_path, strict=False)
    with pytest.warns(UserWarning, match="b.bias is in parameter group 1 here"):
        loop.__enter__()
    same(by_name(loop)[1], state)
    assert [group["weight_decay"] for group in loop.state.optimizer.param_groups] == [0.5, 0.0]
    loop.__exit__(None, None, None)


def test_ck15_a_parameter_that_the_optimizer_no_longer_holds(tmp_path: Path) -> None:
    saved(tmp_path, model := layers(), adamw(model))
    other = layers()
    part = torch.optim.AdamW([p for n, p in other.named_parameters() if n[0] != "c"], lr=1e-2)
    with pytest.raises(
        ValueError, match=r"the optimizer holds c\.weight in the checkpoint alone.*c\.bias in the checkpoint alone"
    ):
        Loop(other, part, [Seed(1)], resume=tmp_path).__enter__()


@pytest.mark.parametrize("built", ["function", "scheduler", "tensor"])
def test_ck15_what_a_schedule_did_is_no_difference(built: str, tmp_path: Path) -> None:
    """Rates that a scheduler moved come back, to the same bits, whether or not the rate is a tensor."""

    def run(folder: Path, steps: int) -> Any:
        model = layers()
        lr: Any = torch.tensor(1e-2) if built == "tensor" else 1e-2
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, foreach=False)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR
        schedule = Schedule(cosine(optimizer, 9) if built == "scheduler" else lambda optimizer, total: cosine(optimizer, 9))
        return saved(folder, model, optimizer, [schedule], steps)

    expected = run(tmp_path / "a", 8)
    run(tmp_path / "b", 3)
    run(tmp_path / "b", 5)
    same(run(tmp_path / "b", 8), expected)


@pytest.mark.parametrize("flags", [{"foreach": True}, {"foreach": False}, {"fused": True}])
def test_ck15_how_a_step_is_computed_is_no_difference(flags: dict[str, bool], tmp_path: Path) -> None:
    """Not refused, and the program's own choice stands; state and settings come back to the bit."""
    weights, state = saved(tmp_path, model := layers(), torch.optim.AdamW(model.parameters(), lr=1e-2))
    other = layers()
    optimizer = torch.optim.AdamW(other.parameters(), lr=1e-2, **flags)
    loop = Loop(other, optimizer, [Seed(1)], resume=tmp_path)
    with loop:
        same(by_name(loop), (weights, state))
        for name, value in flags.items():
            assert optimizer.param_groups[0][name] is value
    built_in(loop, loss_fn, loader(32, 8), steps=6)
    assert loop.state.step == 6


@pytest.mark.parametrize("named", [False, True])
def test_ck16_layers_registered_in_another_order(named: bool, tmp_path: Path) -> None:
    """State is matched by name: the run whose program swaps two layers of one shape ends with the same bits."""

    def run(folder: Path, order: str, steps: int) -> Any:
        model = layers(order)
        parameters: Any = model.named_parameters() if named else model.parameters()
        return saved(folder, model, torch.optim.AdamW(parameters, lr=1e-2), steps=steps)

    expected = run(tmp_path / "a", "abcd", 7)
    run(tmp_path / "b", "abcd", 3)
    run(tmp_path / "b", "acbd", 5)
    same(run(tmp_path / "b", "dbca", 7), expected)
    state = torch.load(list_checkpoints(tmp_path / "b")[-1] / "state.pt", weights_only=True)
    assert not torch.equal(
        state["optimizer"]["state"]["b.weight"]["exp_avg"], state["optimizer"]["state"]["c.weight"]["exp_avg"]
    )


def test_ck16_names_given_to_the_optimizer_or_not(tmp_path: Path) -> None:
    """An optimizer that knows names and one that does not take over from one another."""

    def run(folder: Path, named: bool, steps: int) -> Any:
        model = layers()
        parameters: Any = model.named_parameters() if named else model.parameters()
        return saved(folder, model, torch.optim.AdamW(parameters, lr=1e-2), steps=steps)

    expected = run(tmp_path / "a", False, 6)
    run(tmp_path / "b", True, 2)
    run(tmp_path / "b", False, 4)
    same(run(tmp_path / "b", True, 6), expected)


class Counts(Callback):
    """Counts steps, and moves a weight of its own by the count, so that a lost one shows in the bits."""

    def __init__(self, unit: int = 1) -> None:
        self.count, self.unit = 0, unit

    def on_step_end(self, state: State) -> None:
        self.count += self.unit
        with torch.no_grad():
            [*state.model.parameters()][self.unit % 4].add_(self.count * 1e-3)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


def counted(folder: Path, callbacks: list[Callback], steps: int, **kwargs: Any) -> Any:
    model = layers()
    loop = Loop(model, adamw(model), [Seed(1), *callbacks, Checkpoint(folder, every=1)], resume=folder, **kwargs)
    built_in(loop, loss_fn, loader(32, 8), steps=steps)
    return by_name(loop)


def test_ck17_added_starts_fresh_with_one_warning(tmp_path: Path) -> None:
    counted(tmp_path, [Warmup(2)], 3)
    added = Counts()
    with pytest.warns(UserWarning, match="starts fresh") as caught:
        counted(tmp_path, [Warmup(2), added], 5)
    assert len(caught) == 1
    assert "step-00000003 holds no state of Counts: it starts fresh at step 3" in str(caught[0].message)
    assert added.count == 2


def test_ck17_removed_is_an_error_that_names_it(tmp_path: Path) -> None:
    counted(tmp_path, [Counts(), Counts(10).named("ten")], 3)
    with pytest.raises(
        ValueError, match=r"ten has state in the checkpoint and is not in callbacks \(Seed, Counts, Checkpoint\)"
    ):
        counted(tmp_path, [Counts()], 5)
    kept = Counts()
    with pytest.warns(UserWarning, match="not taken") as caught:
        counted(tmp_path, [kept], 5, strict=False)
    assert len(caught) == 1
    assert "not taken, as strict=False allows: ten has state in the checkpoint and is not in callbacks" in str(
        caught[0].message
    )
    assert kept.count == 5


def test_ck17_any_order_and_two_of_one_class_are_exact(tmp_path: Path) -> None:
    """Identity is the key, not the place in the list."""
    make = lambda: [Counts(), Counts(10).named("ten"), Warmup(4), Schedule(
        lambda optimizer, total: torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)), GradientAccumulation(1)]  # fmt: skip
    expected = counted(tmp_path / "whole", make(), 6)
    for i, order in enumerate([(4, 3, 2, 1, 0), (1, 0, 2, 3, 4), (2, 4, 1, 3, 0)]):
        folder = tmp_path / str(i)
        counted(folder, make(), 3)
        callbacks = [make()[j] for j in order]
        same(counted(folder, callbacks, 6), expected)
        assert sorted(c.count for c in callbacks if isinstance(c, Counts)) == [6, 60]


def test_ck17_a_renamed_key_is_another_callback(tmp_path: Path) -> None:
    """Error for the old key; with strict=False the new one starts afresh, and both are named."""
    counted(tmp_path, [Counts().named("old")], 3)
    with pytest.raises(ValueError, match=r"old has state in the checkpoint and is not in callbacks \(Seed, new, Checkpoint\)"):
        counted(tmp_path, [Counts().named("new")], 5)
    renamed = Counts().named("new")
    with pytest.warns(UserWarning, match="not taken|starts fresh") as caught:
        counted(tmp_path, [renamed], 5, strict=False)
    assert [("old has state" in str(w.message), "holds no state of new" in str(w.message)) for w in caught] == [
        (True, False),
        (False, True),
    ]
    assert renamed.count == 2


# CK19, CK22: what can be stored


class Tagged(torch.Tensor):
    pass


class Word(str):
    __slots__ = ()


class Colour(enum.IntEnum):
    RED = 1


def with_attribute(value: Any) -> torch.Tensor:
    x = torch.ones(2)
    x.note = value  # type: ignore[attr-defined]
    return x


Pair = collections.namedtuple("Pair", "a b")

ODD: dict[str, tuple[Any, str]] = {
    "numpy scalar": (np.float32(1.0), "numpy.float32"),
    "numpy float64": (np.float64(1.0), "numpy.float64"),
    "numpy array": (np.ones(2), "numpy.ndarray"),
    "path": (Path("x"), "pathlib."),
    "lambda": (lambda: 0, "builtins.function"),
    "function": (loss_fn, "builtins.function"),
    "set": ({1}, "builtins.set"),
    "frozenset": (frozenset({1}), "builtins.frozenset"),
    "defaultdict": (defaultdict(int, a=1), "collections.defaultdict"),
    "counter": (collections.Counter("a"), "collections.Counter"),
    "deque": (collections.deque([1]), "collections.deque"),
    "tensor subclass": (torch.ones(2).as_subclass(Tagged), "Tagged"),
    "attribute of a tensor": (with_attribute(Path("x")), "pathlib."),
    "namedtuple": (Pair(1, 2), "Pair"),
    "enum": (Colour.RED, "Colour"),
    "str subclass": (Word("x"), "Word"),
    "module": (nn.Linear(1, 1), "Linear"),
    "generator": (torch.Generator(), "Generator"),
    "object": (object(), "builtins.object"),
    "class": (dict, "builtins.type"),
    "bytearray": (bytearray(b"x"), "builtins.bytearray"),
    "fraction": (Fraction(1, 2), "fractions.Fraction"),
    "range": (range(3), "builtins.range"),
}


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("kind", ODD)
def test_ck19_state_that_can_not_be_stored(kind: str, background: bool, tmp_path: Path) -> None:
    """At the first save, by the callback's key and the place in its state; of that save nothing is left."""
    value, says = ODD[kind]
    model, keeps = layers(), Keeps({"fine": 1, "deep": [0, {"bad": value}]}).named("mine")
    loop = Loop(model, adamw(model), [Checkpoint(tmp_path, every=2, background=background), keeps])
    with pytest.raises(TypeError, match=r"can't save state\['callbacks'\]\['mine'\]\['deep'\]\[1\]\['bad'\]") as error:
        built_in(loop, loss_fn, loader(64, 8), steps=7)
    assert says in str(error.value)
    assert loop.state.step == 2
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("background", [False, True])
def test_ck19_keys_of_dicts_too(background: bool, tmp_path: Path) -> None:
    model = layers()
    loop = Loop(model, adamw(model), [Checkpoint(tmp_path, background=background), Keeps({"by": {Path("x"): 1}})])
    with pytest.raises(TypeError, match=r"can't save state\['callbacks'\]\['Keeps'\]\['by'\] key .* is a pathlib"):
        built_in(loop, loss_fn, loader(16, 8), steps=2)


def whole_number(bits: int) -> int:
    return (1 << bits) - 1


@pytest.mark.parametrize("value", [whole_number(2039), -whole_number(2039), whole_number(2040), whole_number(3000),
                                   -whole_number(9000)], ids=lambda v: f"{v.bit_length()} bits")  # fmt: skip
def test_ck19_numbers_of_any_size_load_again_or_are_refused(value: int) -> None:
    if store.plain({"x": value}):
        same(reloaded({"x": value}), {"x": value})


@pytest.mark.parametrize("value", [b"", [b"", b"x"], {b"": 1}], ids=repr)
def test_ck19_empty_bytes_load_again_or_are_refused(value: Any) -> None:
    if store.plain({"x": value}):
        same(reloaded({"x": value}), {"x": value})


def test_ck19_what_an_ordered_dict_carries_is_looked_at_too() -> None:
    """torch stores the attributes of an OrderedDict, such as a state dict's versions."""
    content = OrderedDict(a=1)
    content.place = Path("x")  # type: ignore[attr-defined]
    if store.plain(content):
        reloaded(content)


@pytest.mark.parametrize("background", [False, True])
def test_ck19_one_memory_seen_as_two_dtypes(background: bool, tmp_path: Path) -> None:
    """torch stores one dtype for each memory: refused at the first save, by name, or stored and read again."""
    x, model = torch.arange(4.0), layers()
    keeps = Keeps({"x": x, "bytes": x.view(torch.uint8)}).named("mine")
    loop = Loop(model, adamw(model), [Checkpoint(tmp_path, every=1, background=background), keeps])
    with pytest.raises(TypeError, match=r"\['callbacks'\]\['mine'\]"):
        built_in(loop, loss_fn, loader(64, 8), steps=3)
    assert loop.state.step == 1


def reloaded(x: Any) -> Any:
    data = io.BytesIO()
    torch.save(x, data)
    data.seek(0)
    return torch.load(data, weights_only=True, map_location="cpu")


def raw(x: torch.Tensor) -> Any:
    """The bits of a tensor of any kind."""
    if x.is_meta:
        return None
    if x.is_nested:
        return [raw(part) for part in x.unbind()]
    if x.layout == torch.sparse_coo:
        return raw(x._indices()), raw(x._values()), x.is_coalesced()
    if x.layout == torch.sparse_csr:
        return raw(x.crow_indices()), raw(x.col_indices()), raw(x.values())
    if x.is_quantized:
        return raw(x.int_repr()), x.q_scale(), x.q_zero_point()
    return (
        x.detach()
        .resolve_conj()
        .resolve_neg()
        .reshape(-1)
        .clone(memory_format=torch.contiguous_format)
        .view(torch.uint8)
        .tolist()
        if x.numel()
        else []
    )


def alike(a: Any, b: Any) -> None:
    """Tensors of one kind, dtype, shape, strides and bits; and what `same` says of all else."""
    if isinstance(a, torch.Tensor):
        assert isinstance(b, torch.Tensor)
        assert (a.dtype, a.layout, a.is_meta, a.is_quantized) == (b.dtype, b.layout, b.is_meta, b.is_quantized)
        if not a.is_nested:
            assert a.shape == b.shape
        lazily = any(x.is_quantized or x.is_conj() or x.is_neg() for x in (a, b))  # a copy may lay these out anew
        if a.layout == torch.strided and not a.is_nested and not lazily:
            assert a.stride() == b.stride()
        assert raw(a) == raw(b)
    elif isinstance(a, dict):
        alike([*a], [*b])  # a key may be nan, which is found by no look-up
        alike([*a.values()], [*b.values()])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            alike(x, y)
    else:
        assert type(a) is type(b)
        assert repr(a) == repr(b)  # which tells -0.0 from 0.0, and finds nan equal


def tensors() -> dict[str, Any]:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(6, 4, generator=draw)
    z = torch.complex(x, x + 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        csr, quantized = x.relu().to_sparse_csr(), torch.quantize_per_tensor(x, 0.1, 3, torch.qint8)
        nested = torch.nested.nested_tensor([x[:2], x[:3]])
    return {
        "0-dim": torch.tensor(1.5),
        "empty": torch.empty(0),
        "empty of a shape": torch.empty(0, 3, 0),
        "not contiguous": x.t(),
        "steps": x[::2, 1::2],
        "offset": x[2:4],
        "expanded": x[:1].expand(5, 4),
        "meta": torch.empty(3, 2, device="meta"),
        "coo": x.relu().to_sparse(),
        "coo twice": torch.sparse_coo_tensor([[0, 0]], [1.0, 2.0], (3,), check_invariants=True),
        "csr": csr,
        "complex": z,
        "conj": z.conj(),
        "negative": z.conj().imag,
        "bf16": x.bfloat16(),
        "fp16": x.half(),
        "fp64": x.double(),
        "int8": x.to(torch.int8),
        "uint8": x.abs().to(torch.uint8),
        "uint16": x.abs().to(torch.uint16),
        "uint64": x.abs().to(torch.uint64),
        "bool": x > 0,
        "fp8 e4m3": x.to(torch.float8_e4m3fn),
        "fp8 e5m2": x.to(torch.float8_e5m2),
        "nan": torch.tensor([float("nan"), -0.0, float("inf")]),
        "quantized": quantized,
        "nested": nested,
        "parameter": nn.Parameter(x.clone()),
        "asks for gradients": x.clone().requires_grad_(),
        "not a leaf": (x.clone().requires_grad_() * 2).relu(),
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    }


KINDS = [*tensors()]


def through(folder: Path, content: Any, snapshot: bool) -> Any:
    """Write and read, from memory or from a snapshot of it."""
    if snapshot:
        copies = store.Copies()
        content = copies.of(content)
        copies.wait()
    contents = store.Contents(3, {"w": content}, {"callbacks": {"X": {"x": content, "y": None}}}, {("X", "y"): content})
    contents.check()
    place = store.write(folder, contents, ["step"], {})
    found = store.read(place)
    assert found is not None
    alike(found.model["w"], found.state["callbacks"]["X"]["x"])
    alike(found.model["w"], found.state["callbacks"]["X"]["y"])
    return found.model["w"]


@pytest.mark.filterwarnings(
    "ignore:TypedStorage is deprecated", "ignore:Sparse CSR tensor", "ignore:.*quantize", "ignore:The PyTorch API of nested"
)
@pytest.mark.parametrize("snapshot", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_ck22_a_tensor_of_any_kind(kind: str, snapshot: bool, tmp_path: Path) -> None:
    x = tensors()[kind]
    found = through(tmp_path, {"x": x, "more": [1, (x, "text")]}, snapshot)
    alike(found, {"x": x, "more": [1, (x, "text")]})
    if not x.is_meta and x.numel() and x.layout == torch.strided and not x.is_nested:
        assert found["x"].data_ptr() == found["more"][1][0].data_ptr() or (
            snapshot and (x.is_quantized or x.is_conj() or x.is_neg())
        )


@pytest.mark.parametrize("snapshot", [False, True])
def test_ck22_what_shares_memory_shares_it_again(snapshot: bool, tmp_path: Path) -> None:
    base = torch.randn(8, 4)
    other = torch.randn(3)
    parts = {
        "base": base,
        "again": base,
        "row": base[3],
        "column": base[:, 1],
        "flat": base.view(-1)[5:9],
        "other": [other, (other[1:],)],
        "parameter": nn.Parameter(base),
    }
    found = through(tmp_path, parts, snapshot)
    alike(found, parts)
    start = found["base"].untyped_storage().data_ptr()
    for name in ("again", "row", "column", "flat", "parameter"):
        assert found[name].untyped_storage().data_ptr() == start, name
        assert found[name].storage_offset() == parts[name].storage_offset()
    assert found["again"].data_ptr() == found["base"].data_ptr()
    assert found["other"][1][0].data_ptr() == found["other"][0].data_ptr() + 4
    assert found["other"][0].untyped_storage().data_ptr() != start
    found["row"].fill_(7)
    assert found["base"][3].tolist() == [7, 7, 7, 7]


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor", "ignore:.*quantize", "ignore:The PyTorch API of nested")
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("meta", "empty", "empty of a shape")])
def test_ck22_a_snapshot_is_not_reached_by_what_comes_after(kind: str) -> None:
    x = tensors()[kind]
    before, copies = raw(x), store.Copies()
    taken = copies.of({"x": [x]})
    copies.wait()
    with torch.no_grad():
        if x.layout == torch.sparse_coo:
            x._values().zero_()
        elif x.layout == torch.sparse_csr:
            x.values().zero_()
        elif x.is_quantized:
            x.copy_(torch.full(x.shape, 2.0))
        elif x.is_nested:
            x.zero_()
        else:
            x.untyped_storage().fill_(0)
            x.untyped_storage().copy_(torch.full((x.untyped_storage().nbytes(),), 85, dtype=torch.uint8).untyped_storage())
    assert raw(x) != before
    assert raw(taken["x"][0]) == before


@pytest.mark.parametrize("snapshot", [False, True])
def test_ck22_tied_weights_through_a_run(snapshot: bool, tmp_path: Path) -> None:
    """A head that is the embedding: one tensor in the file, and tied again when read."""
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Tanh(), nn.Linear(6, 6, bias=False))
    model[2].weight = model[0].weight
    loop = Loop(model, adamw(model), [Seed(1), Checkpoint(tmp_path, every=1, background=snapshot)], resume=tmp_path)
    built_in(loop, loss_fn, loader(32, 8), steps=3)
    content = torch.load(list_checkpoints(tmp_path)[-1] / "model.pt", weights_only=True)
    assert [*content] == ["0.weight", "2.weight"]
    assert content["0.weight"].data_ptr() == content["2.weight"].data_ptr()
    assert torch.equal(content["0.weight"], model[0].weight)


@pytest.mark.parametrize("background", [False, True])
def test_ck22_in_the_background_the_same_is_written(background: bool, tmp_path: Path) -> None:
    """A parameter stays one, what asks for gradients asks again, what a tensor carries comes along."""
    content = {
        "parameter": nn.Parameter(torch.ones(2)),
        "asks": torch.ones(2, requires_grad=True),
        "carries": with_attribute([1, "x"]),
    }
    model = layers()
    loop = Loop(model, adamw(model), [Keeps(content), Checkpoint(tmp_path, background=background)])
    built_in(loop, loss_fn, loader(32, 8), steps=1)
    found = torch.load(list_checkpoints(tmp_path)[-1] / "state.pt", weights_only=True)["callbacks"]["Keeps"]
    assert type(found["parameter"]) is nn.Parameter
    assert found["asks"].requires_grad
    assert vars(found["carries"]) == {"note": [1, "x"]}


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int8, torch.bool, torch.complex64,
          torch.float8_e4m3fn, torch.uint8]  # fmt: skip


@st.composite
def any_tensor(draw: Any) -> torch.Tensor:
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    seed = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    x = torch.randn(shape, generator=seed).to(draw(st.sampled_from(DTYPES)))
    if draw(st.booleans()) and x.dim() > 1:
        x = x.transpose(0, 1)
    if draw(st.booleans()) and x.dim() and x.shape[0] > 1:
        x = x[1:]
    if draw(st.integers(0, 9)) == 0:
        x.note = draw(st.one_of(st.integers(), st.text(max_size=3), st.lists(st.floats(), max_size=2)))  # type: ignore[attr-defined]
    return nn.Parameter(x, requires_grad=False) if draw(st.integers(0, 9)) == 0 else x


SINGLES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-(2**2000), 2**2000), st.floats(), st.complex_numbers(),
    st.text(st.characters(codec=None, categories=None), max_size=9), st.binary(min_size=1, max_size=9), st.sampled_from(DTYPES),
    st.lists(st.integers(0, 5), max_size=3).map(torch.Size), st.sampled_from(["cpu", "cuda:1", "meta", "mps"]).map(torch.device),
)  # fmt: skip
ODD_ONES = st.sampled_from([value for value, _ in ODD.values()])
VALUES = st.recursive(
    st.one_of(SINGLES, any_tensor()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.lists(inner, max_size=4).map(tuple), st.dictionaries(SINGLES, inner, max_size=4),
        st.dictionaries(SINGLES, inner, max_size=4).map(OrderedDict), inner.map(lambda x: [x, x]),
    ), max_leaves=12)  # fmt: skip


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(VALUES)
def test_ck22_whatever_is_plain_loads_again(value: Any) -> None:
    """With torch.load(weights_only=True), equal in all its parts."""
    assert store.plain(value)
    found = reloaded(value)
    alike(value, found)
    copies = store.Copies()
    taken = copies.of(value)
    copies.wait()
    alike(value, taken)


@settings(max_examples=60, deadline=None)
@given(VALUES, ODD_ONES, st.sampled_from(["list", "tuple", "dict", "ordered", "key"]))
def test_ck22_nothing_else_is_plain(value: Any, odd: Any, where: str) -> None:
    """However deep it stands; what pickles by a name that torch does not know would not load."""
    held: dict[str, Callable[[], Any]] = {
        "list": lambda: [value, odd],
        "tuple": lambda: ({"x": [odd]}, value),
        "dict": lambda: {"a": value, "b": odd},
        "ordered": lambda: OrderedDict(a=[odd, value]),
        "key": lambda: {odd if odd.__hash__ else Path("x"): value},
    }
    assert not store.plain(held[where]())


# CK23, CK24: saves at odd moments


class SavesInside(Callback):
    """Asks for a save after the first micro-batch of some updates."""

    def __init__(self, *at: int) -> None:
        self.at = at
        self.asked: list[int] = []

    def on_micro_end(self, state: State) -> None:
        assert state.micro is not None
        if state.micro.training and state.micro.number == 0 and state.step in self.at:
            self.asked.append(state.step)
            state.save("inside")


@pytest.mark.parametrize("form", [built_in, by_hand])
@pytest.mark.parametrize("background", [False, True])
def test_ck23_a_save_inside_an_accumulation_falls_at_its_end(background: bool, form: Any, tmp_path: Path) -> None:
    """Three batches an update, each cut in two: the save asked for in the first is the one of the whole update."""

    def run(folder: Path | None, kill: int | None, *at: int) -> Any:
        model = net(seed=5)
        inside = SavesInside(*at)
        save = [] if folder is None else [Checkpoint(folder, keep=None, background=background), inside]
        loop = Loop(model, adamw(model), [Seed(5), GradientAccumulation(3), MicroBatch(4), *save, Kill(kill)], resume=folder)
        with contextlib.suppress(Killed):
            form(loop, loss_fn, loader(72, 8), epochs=2)
        return loop, inside

    class Kill(Callback):
        """In the middle of the update after."""

        def __init__(self, step: int | None) -> None:
            self.step = step

        def on_micro_end(self, state: State) -> None:
            assert state.micro is not None
            if state.step == self.step and state.micro.number == 2:
                raise Killed

    expected, _ = run(None, None)
    assert expected.state.step == 6
    for step in (0, 1, 3, 4):
        folder = tmp_path / str(step)
        _, inside = run(folder, step + 1, step)
        assert inside.asked == [step]
        newest = list_checkpoints(folder)[-1]
        assert newest.name == f"step-{step + 1:08d}"
        assert json.loads((newest / manifest.NAME).read_text())["reasons"] == ["inside"]
        content = store.read(newest)
        assert content is not None
        assert content.state["progress"]["step"] == step + 1
        assert content.state["progress"]["samples"] == 24 * (step + 1)
        found, _ = run(folder, None)
        assert_same_bits(bits(expected), bits(found))
        assert (found.state.step, found.state.samples) == (expected.state.step, expected.state.samples)


class InPlace(Callback):
    """State that holds tensors which each step changes where they are, two of them in one memory."""

    def __init__(self) -> None:
        self.both = torch.zeros(4)
        self.state = {"both": self.both, "part": self.both[2:], "deep": [(torch.zeros(()), "x")], "steps": 0}

    def on_step_end(self, state: State) -> None:
        self.both += 1
        self.state["deep"][0][0].add_(1)  # type: ignore[index]
        self.state["steps"] += 1  # type: ignore[operator]

    def state_dict(self) -> dict[str, Any]:
        return self.state  # the very same dict each time

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state, self.both = state, state["both"]


class Lets(Callback):
    """Asks for a save, and lets it go on, which was held back, six updates later."""

    def __init__(self, event: threading.Event) -> None:
        self.event, self.held = event, False

    def on_step_end(self, state: State) -> None:
        if state.step == 4:
            state.save("asked")
        if state.step == 10:
            self.held = any(thread.name == "hookloop checkpoint" for thread in threading.enumerate())
            self.event.set()


@pytest.mark.parametrize("at", ["first fsync", "last fsync", "every fsync"])
def test_ck24_weights_change_while_a_save_is_held_back(at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six updates run while the disk holds back the save of step 4: what it writes is all of step 4."""

    def run(folder: Path, background: bool, event: threading.Event) -> Lets:
        model, lets = net(seed=5), Lets(event)
        loop = Loop(model, torch.optim.AdamW(model.parameters(), lr=1e-2, amsgrad=True), [Seed(5), InPlace(), lets,
                    Schedule(lambda optimizer, total: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)),
                    Checkpoint(folder, keep=None, background=background)])  # fmt: skip
        built_in(loop, loss_fn, loader(120, 8), steps=11)
        return lets

    run(tmp_path / "now", False, threading.Event())
    event, real, calls = threading.Event(), os.fsync, list[bool]()

    def slow(handle: int) -> None:
        calls.append(event.is_set())
        background = threading.current_thread().name == "hookloop checkpoint"
        if background and (at == "every fsync" or len(calls) == (2 if at == "first fsync" else 3)):
            assert event.wait(60)
        real(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", slow)
        lets = run(tmp_path / "held", True, event)
    assert lets.held
    names = [f"step-{step:08d}" for step in (4, 11)]
    for folder in ("now", "held"):
        assert [p.name for p in list_checkpoints(tmp_path / folder)] == names
    for name, step in zip(names, (4, 11), strict=True):
        now, held = (store.read(tmp_path / folder / name) for folder in ("now", "held"))
        assert now is not None
        assert held is not None
        same(dict(held.model), dict(now.model))
        same(held.state, now.state)
        assert held.state["progress"]["step"] == step
        assert {one["step"].item() for one in held.state["optimizer"]["state"].values()} == {step}
        mine = held.state["callbacks"]["InPlace"]
        found = mine["both"].tolist(), mine["part"].tolist(), mine["deep"][0][0].item(), mine["steps"]
        assert found == ([step] * 4, [step] * 2, step, step)
        assert mine["part"].data_ptr() == mine["both"].data_ptr() + 8
        assert held.state["callbacks"]["Schedule"]["state"]["last_epoch"] == step


# ES7


def scores(loop: Loop, values: list[float]) -> Bits:
    """Report scores by hand, one an epoch."""
    with loop:
        for epoch in loop.epochs(len(values)):
            for step in loop.steps(loader(24, 8)):
                for micro in step:
                    with micro:
                        micro.backward(loss_fn)
                loop.update()
            loop.report({"score": values[epoch]})
    return bits(loop)


def stopping(folder: Path | None, restore: bool, kill: int | None, **kwargs: Any) -> Loop:
    model = net(seed=5)
    save = [] if folder is None else [Checkpoint(folder, every=1, keep=2)]
    early = EarlyStopping(Goal("score", patience=9), restore_best=restore)
    return Loop(model, adamw(model), [Seed(5), early, *save, KillAt(kill)], resume=folder, **kwargs)


SCORES = [1.0, 3.0, 2.0, 4.0]


def test_es7_the_file_of_the_best_weights_was_removed(tmp_path: Path) -> None:
    """The error names it; with strict=False the run goes on, says so, and leaves with the weights of its end."""
    best, last = scores(stopping(None, True, None), SCORES), scores(stopping(None, False, None), SCORES)
    assert not torch.equal(best["0.weight"], last["0.weight"])
    with pytest.raises(Killed):
        scores(stopping(tmp_path, True, 8), SCORES)
    (file,) = tmp_path.glob("weights-*.pt")
    copied(tmp_path, aside := tmp_path.with_name("aside"))
    assert_same_bits(best, scores(stopping(aside, True, None), SCORES))  # with the file: the best come back
    file.unlink()
    loop = stopping(tmp_path, True, None)
    before = bits(loop)
    with pytest.raises(RuntimeError, match=f"{file} is missing.*strict=False") as error:
        scores(loop, SCORES)
    assert str(error.value).count(str(file)) == len(list_checkpoints(tmp_path)) == 2
    assert_same_bits(before, bits(loop))
    with pytest.raises(Exception, match=f"{file} is missing"):
        scores(named(tmp_path), SCORES)
    with pytest.warns(UserWarning, match="is missing") as caught:
        found = scores(stopping(tmp_path, True, None, strict=False), SCORES)
    assert len(caught) == 1
    assert f"EarlyStopping's weights: {file} is missing" in str(caught[0].message)
    assert_same_bits(last, found)


def named(folder: Path) -> Loop:
    """A Loop that asks for the newest checkpoint by its name."""
    model = net(seed=5)
    early = EarlyStopping(Goal("score", patience=9), restore_best=True)
    return Loop(model, adamw(model), [Seed(5), early, KillAt(None)], resume=list_checkpoints(folder)[-1])


def test_es7_a_later_best_is_kept_again(tmp_path: Path) -> None:
    """Without the file the best value still stands: only what is better than it becomes the best."""
    values = [2.0, 3.0, 1.0, 4.0]
    expected = scores(stopping(None, True, None), values)
    with pytest.raises(Killed):
        scores(stopping(tmp_path, True, 5), values)
    (file,) = tmp_path.glob("weights-*.pt")
    file.unlink()
    with pytest.warns(UserWarning, match=file.name):
        found = scores(stopping(tmp_path, True, None, strict=False), values)
    assert_same_bits(expected, found)
    assert [p.name != file.name for p in tmp_path.glob("weights-*.pt")] == [True]


@pytest.mark.parametrize("strict", [True, False])
def test_es7_a_damaged_file_is_as_good_as_none(strict: bool, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        scores(stopping(tmp_path, True, 8), SCORES)
    (file,) = tmp_path.glob("weights-*.pt")
    file.write_bytes(file.read_bytes()[:-3])
    if strict:
        with pytest.raises(RuntimeError, match=f"{file} holds"):
            scores(stopping(tmp_path, True, None), SCORES)
    else:
        with pytest.warns(UserWarning, match=f"EarlyStopping's weights: {file} holds"):
            found = scores(stopping(tmp_path, True, None, strict=False), SCORES)
        assert_same_bits(scores(stopping(None, False, None), SCORES), found)


# OP11


class FailsAt(TorchDispatchMode):
    """Fails at the n-th operation while armed; `late`: with its work done."""

    def __init__(self, n: int, late: bool) -> None:
        super().__init__()
        self.n, self.late, self.armed, self.count, self.raised = n, late, False, 0, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += self.armed
        hit = self.armed and self.count == self.n
        if hit and not self.late:
            self.fail()
        result = func(*args, **(kwargs or {}))
        if hit:
            self.fail()
        return result

    def fail(self) -> None:
        self.armed, self.raised = False, True
        raise RuntimeError("the device is lost")


STEPS: dict[str, Callable[[Any], Any]] = {
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "AdamW one by one": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=False),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "SGD foreach": lambda p: torch.optim.SGD(p, lr=1e-1, momentum=0.9, foreach=True),
    "SGD one by one": lambda p: torch.optim.SGD(p, lr=1e-1, momentum=0.9, foreach=False),
}
AT = 3  # the update that fails, counted from 0


def broken(kind: str, folder: Path | None, n: int = 0, late: bool = False) -> tuple[Loop, FailsAt]:
    """A run whose update number AT fails at its n-th operation."""
    model, fault = net(seed=5), FailsAt(n, late)
    optimizer = STEPS[kind](model.parameters())
    save = [] if folder is None else [Checkpoint(folder, every=2)]
    loop = Loop(model, optimizer, [Seed(5), Warmup(6), *save], resume=folder)
    optimizer.register_step_pre_hook(lambda *about: setattr(fault, "armed", loop.state.step == AT))
    optimizer.register_step_post_hook(lambda *about: setattr(fault, "armed", False))
    return loop, fault


def check_op11(kind: str, n: int, late: bool, folder: Path, expected: Bits) -> bool:
    """Break, be refused, resume, compare; False where the step has no such operation."""
    loop, fault = broken(kind, folder, n, late)
    with fault, contextlib.ExitStack() as stack:
        if fails := n <= operations(kind):
            stack.enter_context(pytest.raises(RuntimeError, match="the device is lost"))
        built_in(loop, loss_fn, loader(40, 8), epochs=2)
    assert fault.raised is fails
    if not fails:
        return False
    assert loop.state.step == AT
    assert [p.name for p in list_checkpoints(folder)] == ["step-00000002"]
    with pytest.raises(RuntimeError, match="cut this Loop's optimizer off inside a step"):
        built_in(loop, loss_fn, loader(40, 8), epochs=2)
    again, _ = broken(kind, folder)
    built_in(again, loss_fn, loader(40, 8), epochs=2)
    assert_same_bits(expected, bits(again))
    return True


@functools.cache
def operations(kind: str) -> int:
    """How many operations the update has."""
    loop, fault = broken(kind, None)
    with fault:
        built_in(loop, loss_fn, loader(40, 8), epochs=1)
    return fault.count


def undisturbed(kind: str) -> Bits:
    loop, _ = broken(kind, None)
    built_in(loop, loss_fn, loader(40, 8), epochs=2)
    return bits(loop)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("kind", STEPS)
def test_op11_a_step_that_raises_midway(kind: str, late: bool, tmp_path: Path) -> None:
    """The run ends with that error and is not entered again; one that resumes ends with the undisturbed run's bits."""
    expected, count = undisturbed(kind), operations(kind)
    assert count >= 1
    for n in sorted({1, count // 2, count - 1, count} - {0}):
        assert check_op11(kind, n, late, tmp_path / str(n), expected)
    assert not check_op11(kind, count + 1, late, tmp_path / "none", expected)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("kind", STEPS)
def test_op11_at_every_operation(kind: str, late: bool, tmp_path: Path) -> None:
    expected, n = undisturbed(kind), 0
    while check_op11(kind, n + 1, late, tmp_path / str(n), expected):
        n += 1
    assert n == operations(kind)


@pytest.mark.parametrize("late", [False, True])
def test_op11_half_an_update_is_really_half(late: bool) -> None:
    """What the tests above guard against: some weights are moved, others are not."""
    loop, fault = broken("SGD one by one", None, operations("SGD one by one") // 2, late)
    kept: Bits = {}
    loop.state.optimizer.register_step_pre_hook(lambda *about: kept.update(bits(loop)))
    with fault, pytest.raises(RuntimeError, match="the device is lost") as error:
        built_in(loop, loss_fn, loader(40, 8), epochs=1)
    assert any("can't be redone" in note for note in error.value.__notes__)
    moved = [not torch.equal(kept[name], p) for name, p in loop.state.model.named_parameters()]
    assert any(moved)
    assert not all(moved)
