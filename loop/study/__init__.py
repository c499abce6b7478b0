"""What looks at, or runs, many loops."""

from .check import check_mean
from .compare import compare
from .repeat import repeat

__all__ = ["check_mean", "compare", "repeat"]
