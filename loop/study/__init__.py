"""What looks at, or runs, many loops."""

from .check import check_mean
from .compare import compare
from .find_rate import find_rate, try_rates
from .folds import cross_validate
from .preview import preview
from .repeat import repeat

__all__ = ["check_mean", "compare", "cross_validate", "find_rate", "preview", "repeat", "try_rates"]
