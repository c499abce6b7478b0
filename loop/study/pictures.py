"""Figures, as files and in TensorBoard."""

from __future__ import annotations

import io
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..events import EventFile

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Picture:
    """What can be drawn; it needs matplotlib (`pip install 'hookloop[study]'`)."""

    def figure(self) -> Figure:
        """Return a matplotlib figure."""
        raise NotImplementedError

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the figure as a PNG file."""
        if Path(path).suffix.lower() != ".png":
            raise ValueError(f"path must end in .png, not {os.fspath(path)!r}")
        Path(path).write_bytes(png(self.figure()))

    def to_tensorboard(self, folder: str | os.PathLike[str], step: int = 0) -> None:
        """Write the figure as an image into a TensorBoard folder of its own, such as "runs/a/rate"; a run's hides others."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        made = self.figure()
        width, height = (round(float(x) * 100) for x in made.get_size_inches())
        image = Summary.Image(height=height, width=width, colorspace=4, encoded_image_string=png(made))
        value = Summary.Value(tag=type(self).__name__.lower(), image=image)
        with EventFile(Path(folder).absolute(), 0) as file:
            file.add(step, time.time(), {}, [Summary(value=[value])])


def figure(x: str, y: str) -> tuple[Figure, Any]:
    """Return an empty figure and its axes; raises ImportError that names the extra."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("figures need matplotlib: pip install 'hookloop[study]'") from None
    made = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = made.add_subplot()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    return made, axes


def png(made: Figure) -> bytes:
    """Return a figure as the bytes of a PNG file, 100 pixels an inch."""
    held = io.BytesIO()
    made.savefig(held, format="png", dpi=100)
    return held.getvalue()
