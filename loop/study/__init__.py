"""What looks at, or runs, many loops."""

from .check import check_mean
from .compare import compare
from .find_rate import find_rate, try_rates
from .repeat import repeat

__all__ = ["check_mean", "compare", "find_rate", "repeat", "try_rates"]
