"""What a study found, as a picture: in a file, and in TensorBoard beside its words."""

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
        """Write the figure and `str` into a TensorBoard folder of their own, such as "runs/a/rate"; a run's hides others."""
        from tensorboard.compat.proto.summary_pb2 import Summary
        from torch.utils.tensorboard.summary import text

        made, tag = self.figure(), type(self).__name__.lower()
        width, height = (round(float(x) * 100) for x in made.get_size_inches())
        image = Summary.Image(height=height, width=width, colorspace=4, encoded_image_string=png(made))
        with EventFile(Path(folder).absolute(), 0) as file:
            file.add(step, time.time(), {}, [Summary(value=[Summary.Value(tag=tag, image=image)]), text(tag, str(self))])


def empty(width: float, height: float) -> Figure:
    """Return a figure of so many inches; raises ImportError that names the extra."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("figures need matplotlib: pip install 'hookloop[study]'") from None
    return Figure(figsize=(width, height), layout="constrained")


def figure(x: str, y: str) -> tuple[Figure, Any]:
    """Return an empty figure and its axes."""
    made = empty(6.4, 4.0)
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
