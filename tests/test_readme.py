"""What the README shows is run as it stands, and what it claims to list is all there is."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

import hookloop.callbacks
from hookloop.callbacks import GradientAccumulation, MicroBatch, Warmup
from hookloop.loop import Callback, Loop, State
from hookloop.loop.callback import HOOKS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def snippet(name: str) -> str:
    found = re.search(rf"<!-- {name} -->\n```\w+\n(.*?)```", README, re.S)
    assert found
    return found[1]


def test_token_weights_are_exact_on_a_tiny_transformer() -> None:
    """The README's loop, with micro-batches of any size, gives the gradient of one mean over all its tokens."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=17, n_positions=12, n_embd=8, n_layer=1, n_head=2, resid_pdrop=0.0,
                                     embd_pdrop=0.0, attn_pdrop=0.0)  # fmt: skip

    def batch(lengths: list[int]) -> dict[str, torch.Tensor]:
        ids = torch.randint(0, 17, (len(lengths), 12))
        labels = torch.where(torch.arange(12) < torch.tensor(lengths)[:, None], ids, -100)
        return {"input_ids": ids, "labels": labels}

    train_loader = [batch([12, 3]), batch([2, 2]), batch([7, 12]), batch([1, 5]), batch([9, 4])]
    val_loader = [batch([12, 12, 2]), batch([3])]
    seen: list[list[torch.Tensor]] = []

    class Gradients(Callback):
        def on_before_optimizer_step(self, state: State) -> None:
            seen.append([g.clone() for g in state.grads])

    def run(micro: Any) -> Any:
        model = transformers.GPT2LMHeadModel(config).double()
        torch.manual_seed(1)
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.2)
        space = {"model": model, "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-3), "train_loader": train_loader,
                 "val_loader": val_loader, "GradientAccumulation": GradientAccumulation, "Warmup": Warmup,
                 "MicroBatch": lambda size: MicroBatch(micro),
                 "Loop": lambda m, o, callbacks, **kw: Loop(m, o, [*callbacks, Gradients()], **kw)}  # fmt: skip
        exec(snippet("tokens"), space)
        return space

    space = run("auto")
    model, state = space["model"], space["loop"].state
    assert state.step == state.total_steps == 4
    first = {k: torch.cat([b[k] for b in train_loader[:4]]) for k in ("input_ids", "labels")}
    torch.manual_seed(1)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    model.zero_grad()
    model(**first).loss.backward()
    for found, p in zip(seen[0], model.parameters(), strict=True):
        assert torch.linalg.norm(found - p.grad) <= 1e-6 * torch.linalg.norm(p.grad)  # its loss is float32
    whole, seen[:] = [*seen], []
    run(1)
    for a, b in zip(whole, seen, strict=True):
        for x, y in zip(a, b, strict=True):
            assert torch.linalg.norm(x - y) <= 1e-5 * torch.linalg.norm(x)  # after steps that differed so


def test_a_process_that_a_search_starts_finds_train_in_the_file_and_starts_no_search(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(snippet("search"))
    pytest.importorskip("optuna")
    found = runpy.run_path(str(tmp_path / "mine.py"), run_name="__mp_main__")  # as torch's and Python's own spawn does
    assert callable(found["train"])
    assert "found" not in found


def test_it_lists_every_callback_and_every_hook_in_order() -> None:
    table = README.split("## Callbacks")[1].split("## Write")[0]
    public = {name: getattr(hookloop.callbacks, name) for name in hookloop.callbacks.__all__}
    assert set(re.findall(r"^\| `(\w+)\(", table, re.M)) == {
        n for n, c in public.items() if not isinstance(c, type) or issubclass(c, Callback)
    }
    assert not [n for n, c in public.items() if isinstance(c, type) and f"`{n}" not in README]
    hooks = README.split("## Hooks")[1].split("**What happens")[0]
    assert tuple(re.findall(r"^\| `(on_\w+)`", hooks, re.M)) == HOOKS


def test_the_callback_it_shows_works() -> None:
    space: dict[str, Any] = {"Callback": Callback}
    exec(re.search(r"## Write a callback\n\n```python\n(.*?)```", README, re.S)[1], space)  # type: ignore[index]
    model = torch.nn.Linear(1, 1)
    state = State(model, torch.optim.SGD(model.parameters(), lr=0.5))
    space["Watch"]().on_step_end(state)
    assert state.metrics["lr"] == 0.5


def test_every_callback_docstring_says_what_it_does_and_raises() -> None:
    for name in hookloop.callbacks.__all__:
        text = getattr(hookloop.callbacks, name).__doc__
        assert text
        assert name == "Progress" or re.search(r"[Rr]aises|Exact", text), name


def test_sizes_stay_small() -> None:
    for file in (file for part in ("callbacks", "loop", "benchmarks", "examples") for file in ROOT.glob(f"{part}/**/*.py")):
        lines = len(file.read_text().splitlines())
        assert lines <= (120 if file.parent.name == "callbacks" else 300), f"{file.name}: {lines}"
    assert len(HOOKS) <= 12


def test_loop_knows_no_callback() -> None:
    for file in ROOT.glob("loop/*.py"):
        assert not re.search(r"(from|import) +[\w.]*callbacks\b", file.read_text()), file.name
