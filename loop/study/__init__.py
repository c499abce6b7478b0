"""What looks at, or runs, many loops."""

from .check import check_mean

__all__ = ["check_mean"]
