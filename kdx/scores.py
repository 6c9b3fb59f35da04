"""Statistics over runs and images."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats


class Interval(NamedTuple):
    """A mean with the ends of its interval, and the number of values behind it."""

    mean: float
    low: float
    high: float
    n: int

    def __format__(self, spec: str) -> str:
        return f"{self.mean:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


def mean_interval(values: ArrayLike, level: float = 0.95) -> Interval:
    """Mean of ``values`` (n,) with Student's t interval.

    Over folds of one data set the values share training images, so the interval is too narrow
    for a statement about new data; say so where it is shown.
    """
    x = np.asarray(values, dtype=float)
    if x.ndim != 1 or len(x) < 2 or np.isnan(x).any():
        raise ValueError(f"expected at least 2 values (n,) without NaN, got {x.shape} with {np.isnan(x).sum()} NaN")
    half = stats.t.ppf((1 + level) / 2, len(x) - 1) * stats.sem(x)
    return Interval(x.mean(), x.mean() - half, x.mean() + half, len(x))
