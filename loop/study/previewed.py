"""A preview, as arrays, a Markdown table and a picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..groups import as_text
from .pictures import Picture, empty

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SAMPLES = ("batch_size", "update_size", "micro_batch_size")


@dataclass(frozen=True, eq=False)
class Preview(Picture):
    """What each update of a run will use: one row an update, one column a parameter group where there are several.

    `rates`, `decays`: float64, as the optimizer gets them. `epochs`: that of each update, from 0. `batch_size`: samples
    that are asked for; `update_size`: those that the update then holds, over `accumulate` batches; `micro_batch_size`:
    the most that go through the model at once. None is what a run measures, or what hangs on a length that the loader does
    not tell, and `unknown` says why.
    """

    epochs: Tensor
    rates: Tensor | None
    decays: Tensor | None
    batch_size: Tensor | None
    update_size: Tensor | None
    micro_batch_size: Tensor | None
    accumulate: Tensor | None
    names: tuple[str, ...]
    unknown: dict[str, str]
    left_out: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.epochs)

    @property
    def groups(self) -> int:
        """How many parameter groups there are."""
        return max([len(self.names), 1, *(x.shape[1] for x in (self.rates, self.decays) if x is not None)])

    def rows(self, count: int = 12) -> list[int]:
        """Return the updates that a table shows, from 0: `count` over the run, and each at which a planned size changes."""
        if not len(self):
            return []
        planned = [x for x in (self.batch_size, self.accumulate) if x is not None]
        changed = {int(t) + 1 for x in planned for t in (x[1:] != x[:-1]).nonzero()}
        return sorted(
            {round(x) for x in torch.linspace(0, len(self) - 1, max(2, count), dtype=torch.float64).tolist()} | changed
        )

    def table(self, count: int = 12) -> str:
        """Return a Markdown table of about `count` updates, numbered as `state.step` counts them, with what is not known."""
        found = []
        for t in self.rows(count):
            row: dict[str, Any] = {"step": t + 1, "epoch": int(self.epochs[t])}
            for name, values in (("rate", self.rates), ("decay", self.decays)):
                row |= {f"{name} {i}": "?" if values is None else float(values[t, i]) for i in range(self.groups)}
            row |= {name: "?" if (x := getattr(self, name)) is None else int(x[t]) for name in (*SAMPLES, "accumulate")}
            found.append(row)
        if not found:
            return "no update"
        notes = [f"group {i}: {name}" for i, name in enumerate(self.names)] + self.notes
        return "\n".join([as_text(found), "", *notes]).strip()

    @property
    def notes(self) -> list[str]:
        """What is not known, or may be missed, in words."""
        notes = [f"{name} not known: {why}" for name, why in self.unknown.items()]
        return notes + [f"{name} is left out: it may change updates and says no planned = True" for name in self.left_out]

    __str__ = table

    def figure(self) -> Figure:
        """Return a matplotlib figure: rates, decays, sizes and accumulation over updates."""
        figure = empty(10, 8)
        panels = figure.subplots(4, 1, sharex=True, height_ratios=(3, 1.5, 2, 1))
        at = range(1, len(self) + 1)
        for panel, label, values in ((panels[0], "rate", self.rates), (panels[1], "weight decay", self.decays)):
            panel.set_ylabel(label)
            if values is None:
                panel.text(0.5, 0.5, "not known", transform=panel.transAxes, ha="center")
            for groups, column in alike(values):
                panel.plot(at, column, label=f"group{'s' * (len(groups) > 1)} {', '.join(map(str, groups))}")
        for name in SAMPLES:
            if (sizes := getattr(self, name)) is not None:
                panels[2].step(
                    at, sizes.tolist(), where="mid", label=name.replace("_", " "), lw=2.5 if name == "batch_size" else 1
                )
        panels[2].set_ylabel("samples")
        if self.accumulate is not None:
            panels[3].step(at, self.accumulate.tolist(), where="mid")
        panels[3].set(ylabel="accumulate", xlabel="update")
        for panel in panels:
            panel.set_ylim(bottom=0)
            panel.grid(alpha=0.3)
            if panel.get_legend_handles_labels()[0]:
                panel.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
        if self.notes:
            figure.supxlabel("\n".join(self.notes), fontsize="small")
        return figure


def alike(values: Tensor | None) -> list[tuple[list[int], list[float]]]:
    """Return columns with their numbers, those that are equal as one, so that no line hides another."""
    found: list[tuple[list[int], Tensor]] = []
    for i, column in enumerate([] if values is None else values.T):
        same = next((numbers for numbers, other in found if torch.equal(other, column)), None)
        if same is None:
            found.append(([i], column))
        else:
            same.append(i)
    return [(numbers, column.tolist()) for numbers, column in found]
