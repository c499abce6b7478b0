"""What looks at, or runs, many loops."""

from .check import check_mean
from .compare import compare
from .find_rate import find_rate, try_rates
from .folds import cross_validate
from .preview import preview
from .refine import refine
from .repeat import repeat
from .search import grid_search, random_search, search
from .space import integers, log_uniform, uniform, when

__all__ = ["check_mean", "compare", "cross_validate", "find_rate", "grid_search", "integers", "log_uniform", "preview",
           "random_search", "refine", "repeat", "search", "try_rates", "uniform", "when"]  # fmt: skip
