"""Means with intervals, over batches or over folds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import special, stats

from kdx.inference import two_factor


class Interval(NamedTuple):
    """A mean with the ends of its interval, and the number of values behind it."""

    mean: float
    low: float
    high: float
    n: int

    def __format__(self, spec: str) -> str:
        return f"{self.mean:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


def mean_interval(values: ArrayLike, level: float = 0.95) -> Interval:
    """Mean of ``values`` (n,) with Student's t interval; all NaN if one of them is.

    Over folds of one data set the values share training images, so the interval is too narrow
    for a statement about new data; say so where it is shown.
    """
    x = np.asarray(values, dtype=float)
    if x.ndim != 1 or len(x) < 2:
        raise ValueError(f"expected at least 2 values (n,), got {x.shape}")
    mean, half = float(x.mean()), float(stats.t.ppf((1 + level) / 2, len(x) - 1) * stats.sem(x))
    return Interval(mean, mean - half, mean + half, len(x))


def mean_of_known(values: ArrayLike) -> Interval:
    """:func:`mean_interval` of those values that are not NaN; all NaN if fewer than two are left."""
    x = np.asarray(values, dtype=float)
    known = x[~np.isnan(x)]
    return mean_interval(known) if len(known) > 1 else Interval(np.nan, np.nan, np.nan, len(known))


def share_interval(values: ArrayLike, level: float = 0.95, method: str = "wilson") -> Interval:
    """The share of ``values`` (n,) that are true, with an interval that stays within 0 and 1; NaN of no values.

    Args:
        values: bool (n,).
        level: Of the interval.
        method: ``"wilson"``, or ``"exact"`` (Clopper & Pearson 1934), which never covers less often than stated.
    """
    x = np.asarray(values, dtype=bool)
    if not len(x):
        return Interval(np.nan, np.nan, np.nan, 0)
    if method == "exact":
        low, high = exact_interval(int(x.sum()), len(x), level)
    else:
        ends = stats.binomtest(int(x.sum()), len(x)).proportion_ci(level, method=method)
        low, high = float(ends.low), float(ends.high)
    return Interval(float(x.mean()), low, high, len(x))


def exact_interval(found: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """The interval of Clopper & Pearson for a share of which ``found`` of ``n`` were seen, as quantiles of beta
    distributions: scipy's own searches for each end."""
    tail = (1 - level) / 2
    low = special.betaincinv(found, n - found + 1, tail) if found else 0.0
    high = special.betaincinv(found + 1, n - found, 1 - tail) if found < n else 1.0
    return float(low), float(high)


def over_folds(table: pd.DataFrame, by: Sequence[str] = ("network", "stage")) -> pd.DataFrame:
    """A score table with a column ``fold``, averaged over the folds of each group.

    Returns:
        the columns ``by``, in order of appearance, with value, low, high, p (the largest of any fold: small if the
        score is there in all of them), floor, folds. The 95 % interval is over folds and batches
        (:func:`kdx.inference.two_factor`) if the table has the scores of the batches in ``parts``, as those of
        :class:`kdx.Scorer` have; otherwise it is a t interval over folds, and leaves out that these share images. A
        group of one fold keeps its interval, which is over batches.
    """
    rows = []
    for names, group in table.groupby(list(by), sort=False):
        if group["fold"].duplicated().any():
            raise ValueError(f"expected one row a fold and {', '.join(by)}, got {len(group)} of {names}")
        row: dict[str, Any] = dict(zip(by, names, strict=True))
        row |= group.iloc[0][["value", "low", "high"]].to_dict()
        if len(group) > 1 and "parts" in group:
            estimate = two_factor(np.stack(list(group["parts"])))
            row |= dict(zip(("value", "low", "high"), (estimate.mean, *estimate.interval()), strict=True))
        elif len(group) > 1:
            row |= dict(zip(("value", "low", "high"), mean_interval(group["value"]), strict=False))
        rows.append(row | {"p": group["p"].max(skipna=False), "floor": group["floor"].max(), "folds": len(group)})
    return pd.DataFrame(rows)


def by_fold(table: pd.DataFrame, by: Sequence[str] = ("network", "stage")) -> dict[tuple[Any, ...], pd.DataFrame]:
    """The scores of single batches in a table of :class:`kdx.Scorer`, or of bootstrap samples, with a column ``fold``.

    Returns:
        Values of ``by`` -> fold x batch. Differences of two are paired by fold and batch; a fold that one of them
        lacks is NaN there.
    """
    return {
        names: pd.DataFrame(np.stack(list(group["parts"])), index=pd.Index(group["fold"], name="fold"))
        for names, group in table.groupby(list(by), sort=False)
    }
