"""Effects over folds and images: estimates of two factors, and tests of several that hold jointly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, special, stats

SMALLEST = 1e-15  # a p-value below it is given as this


class Estimate(NamedTuple):
    r"""A mean whose error has independent parts, such as that of folds and that of images.

    An interval adds the parts as variances, each with its own quantile of Student's t,

    .. math:: h^2 = \sum_j t_{1-\alpha,\,\nu_j}^2\, e_j^2,

    which, for normal variables, never covers less often than stated (Banerjee 1960). Satterthwaite's single t is
    shorter, but with the two degrees of freedom of three folds its error is up to three times what is stated, as far
    out as several tests at once need it.

    Attributes:
        mean: The estimate.
        parts: Standard error and degrees of freedom of each part; NaN where a value is missing.
        least: The same of images alone, for these very folds: h is not below its :math:`t\,e`.
    """

    mean: float
    parts: tuple[tuple[float, int], ...]
    least: tuple[float, int] = (0.0, 1)

    def __format__(self, spec: str) -> str:
        """Mean and 95 % interval."""
        low, high = self.interval()
        return f"{self.mean:{spec}} [{low:{spec}}, {high:{spec}}]"

    @property
    def certain(self) -> bool:
        """Whether the values do not vary at all. Their interval has no width and proves nothing."""
        return all(error == 0 for error, _ in (*self.parts, self.least))

    def half(self, alpha: float) -> float:
        """Distance of the mean from its one-sided limit at level ``alpha``, below 0.5."""
        *halves, least = (abs(special.stdtrit(df, alpha)) * error for error, df in (*self.parts, self.least))
        return max(math.hypot(*halves), least)

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Both ends of the two-sided interval."""
        half = self.half((1 - level) / 2)
        return self.mean - half, self.mean + half

    def p_above(self, bound: float = 0.0) -> float:
        """One-sided p of the hypothesis that the true mean is ``bound`` or less; NaN for :attr:`certain` values."""
        distance = abs(self.mean - bound)
        if self.certain or np.isnan(distance):
            return np.nan
        p = SMALLEST
        if self.half(SMALLEST) > distance:
            p = math.exp(
                optimize.brentq(lambda x: self.half(math.exp(x)) - distance, math.log(SMALLEST), math.log(0.5))
            )
        return p if self.mean > bound else 1 - p

    def p_below(self, bound: float = 0.0) -> float:
        """One-sided p of the hypothesis that the true mean is ``bound`` or more; NaN for :attr:`certain` values."""
        return 1 - self.p_above(bound)

    def detectable(self, alpha: float = 0.025, power: float = 0.8) -> float:
        """The smallest true mean, roughly, that a one-sided test at ``alpha`` finds with this power."""
        return self.half(alpha) + self.half(1 - power)


def two_factor(values: ArrayLike, ratio: float | None = None) -> Estimate:
    r"""The mean over folds and images, as a statement about other folds *and* other images.

    Folds that are scored on the same images share the error of these images, which no number of folds makes smaller.
    And folds share training images, so their means vary less than networks trained on other images would; the factor
    of Nadeau & Bengio (2003) makes up for this. With k folds, m images, :math:`s^2` the variance of the fold means and
    :math:`\hat\sigma_I^2` the variance component of images (two-way analysis of variance, 0 if negative),

    .. math:: e_F^2 = \Big(\frac 1k + \frac{n_\text{held out}}{n_\text{training}}\Big) s^2, \qquad
              e_I^2 = \hat\sigma_I^2 / m.

    :math:`s^2` also holds what an image does in one fold only. It is not taken off: with few folds, the difference
    would often be 0 by chance, and its intervals would be too narrow. Fold means that happen to be equal, as counts may
    be, say nothing of images; so the interval is at least as wide as that of images for these very folds.

    Args:
        values: (folds, images), or in place of images batches of them or parts from bootstrap samples
            (:func:`bootstrap_parts`): column i is the same images in every fold. (folds,) where each fold has images of
            its own. (1, images) leaves folds out; the estimate is then about this one network.
        ratio: Held-out over training images of a fold; None for :math:`1/(k-1)`, as in k-fold cross-validation; 0 for
            repetitions that share nothing.

    Returns:
        The estimate. All NaN if a value is.

    Raises:
        ValueError: Fewer than two values to compare.
    """
    x = np.asarray(values, dtype=float)
    if x.ndim not in (1, 2) or max(x.shape) < 2 or (x.ndim == 2 and x.shape[1] < 2):
        raise ValueError(f"values: expected (folds, images) or (folds,), two or more to compare, got {x.shape}")
    k, mean = len(x), float(x.mean())
    if np.isnan(mean):
        return Estimate(np.nan, ((np.nan, 1),))
    parts, least = [], (0.0, 1)
    if k > 1:
        shared = 1 / (k - 1) if ratio is None else ratio
        of_fold = x if x.ndim == 1 else x.mean(1)
        parts.append((float(np.sqrt((1 / k + shared) * of_fold.var(ddof=1))), k - 1))
    if x.ndim == 2:
        parts.append(_image_error(x[None]))
        least = float(stats.sem(x.mean(0))), x.shape[1] - 1
    noise = 1e-12 * np.abs(x).max()
    *parts, least = ((error if error > noise else 0.0, df) for error, df in (*parts, least))
    return Estimate(mean, tuple(parts), least)


def known_images(values: ArrayLike) -> NDArray[np.float64]:
    """The columns of (folds, images) without NaN; all of them if fewer than two would be left, so that what is
    estimated from them is NaN."""
    x = np.asarray(values, dtype=float)
    known = x[:, ~np.isnan(x).any(0)]
    return known if known.shape[1] > 1 else x


def tukey(values: ArrayLike, level: float = 0.95, ratio: float | None = None) -> float:
    """The half-width of intervals for the differences of n networks that hold jointly, all n(n - 1)/2 of them.

    Tukey's studentised range takes the place of t, and both parts of the error are pooled over networks: it is assumed
    that all networks vary alike over folds. One that varies more makes the intervals of the others too wide, and its
    own too narrow. As with :func:`two_factor`, they are at least as wide as those of images for these very folds.

    Args:
        values: (n, folds, images) or (n, folds), with n, folds >= 2 and otherwise as for :func:`two_factor`.
        level: Of all intervals at once.
        ratio: As for :func:`two_factor`.

    Returns:
        The half-width, about the differences of the means.

    Raises:
        ValueError: Another shape.
    """
    x = np.asarray(values, dtype=float)
    if x.ndim not in (2, 3) or min(x.shape[:2]) < 2:
        raise ValueError(f"values: expected (networks, folds) or (networks, folds, images), got {x.shape}")
    n, k = x.shape[:2]
    shared = 1 / (k - 1) if ratio is None else ratio
    of_fold = _centred(x if x.ndim == 2 else x.mean(2), 0, 1)
    df = (n - 1) * (k - 1)
    parts, least = [(float(np.sqrt((1 / k + shared) * (of_fold**2).sum() / df)), df)], []
    if x.ndim == 3:
        x = x - x.mean(0)
        parts.append(_image_error(x))
        least = [_image_error(x.mean(1, keepdims=True))]
    widths = [math.hypot(*(_studentised_range(level, n, df) * error for error, df in of)) for of in (parts, least)]
    return float(np.max(widths))  # NaN if one is


def holm(p: Sequence[float] | NDArray[np.float64]) -> NDArray[np.float64]:
    """Holm's adjusted p-values: those up to alpha hold jointly, with familywise error alpha; NaN stays NaN, and counts
    among the tests."""
    x = np.asarray(p, dtype=float)
    order = x.argsort()  # NaN last
    steps = np.minimum(x[order] * np.arange(len(x), 0, -1), 1)
    adjusted = np.empty_like(x)
    adjusted[order] = np.maximum.accumulate(steps)
    return adjusted


def ratio_values(above: ArrayLike, below: ArrayLike) -> NDArray[np.float64]:
    """Values per fold and batch whose mean within a fold is a ratio of two means, to first order (the delta method).

    Args:
        above: (folds, batches), the numerator.
        below: (folds, batches), the denominator.

    Returns:
        (folds, batches); NaN in a fold where the denominator's mean is not positive.
    """
    x, y = np.asarray(above, dtype=float), np.asarray(below, dtype=float)
    scale = y.mean(1, keepdims=True)
    scale = np.where(scale > 0, scale, np.nan)
    ratio = x.mean(1, keepdims=True) / scale
    return ratio + (x - ratio * y) / scale


def jackknife(whole: ArrayLike, without: ArrayLike) -> NDArray[np.float64]:
    r"""The parts of blocks, or of folds, in a statistic: what the jackknife calls pseudo-values (Tukey 1958).

    With T the statistic of all and :math:`T_{-b}` that without block b of B, the part of a block is

    .. math:: T_b = T + (B - 1) \Big( \frac 1B \sum_j T_{-j} - T_{-b} \Big).

    The mean of the parts is T, and their variance over B estimates its variance.

    Args:
        whole: (...), of all blocks.
        without: (blocks, ...), without each.

    Returns:
        (blocks, ...).

    Examples:
        >>> jackknife(2.0, [2.5, 2.0, 1.5]).tolist()  # the mean of 1, 2 and 3
        [1.0, 2.0, 3.0]
    """
    x = np.asarray(without, dtype=float)
    return np.asarray(whole, dtype=float) + (len(x) - 1) * (x.mean(0) - x)


def bootstrap_parts(whole: ArrayLike, drawn: ArrayLike) -> NDArray[np.float64]:
    r"""Parts of a statistic that is no mean, such as a count of what exceeds a threshold, from B bootstrap samples.

    With T the statistic of all images and :math:`T^*_b` that of a set of them that was drawn with replacement, they are

    .. math:: T_b = T + \sqrt B \Big(T^*_b - \frac 1B \sum_j T^*_j\Big).

    Their mean is T, and its variance, as that of a mean of B images, is that of the :math:`T^*_b`: the bootstrap's
    estimate (Efron 1979). :func:`two_factor` takes them if the sets of images are the same in all folds.
    :func:`jackknife` needs less computation, but overstates the variance of statistics that change in steps.

    Args:
        whole: (...), of all images.
        drawn: (B, ...), of each set of images.

    Returns:
        (B, ...).

    Examples:
        >>> bootstrap_parts(2.0, [1.0, 1.0, 3.0, 3.0]).tolist()
        [0.0, 0.0, 4.0, 4.0]
    """
    x = np.asarray(drawn, dtype=float)
    return np.asarray(whole, dtype=float) + np.sqrt(len(x)) * (x - x.mean(0))


def _image_error(x: NDArray[np.float64]) -> tuple[float, int]:
    """Standard error of images in a mean over (n, folds, images), with its degrees of freedom; the n, if several, sum
    to 0, and their components are pooled."""
    n, k, m = x.shape
    free = max(n - 1, 1)
    df = free * (m - 1)
    of_image = _centred(x.mean(1), 1)
    total = k * (of_image**2).sum() / df
    rest = (_centred(x, 1, 2) ** 2).sum() / (df * (k - 1)) if k > 1 else 0.0
    return float(np.sqrt(max(total - rest, 0.0) / (k * m))), df


def _centred(x: NDArray[np.float64], *axes: int) -> NDArray[np.float64]:
    for axis in axes:
        x = x - x.mean(axis, keepdims=True)
    return x


@lru_cache
def _studentised_range(level: float, n: int, df: int) -> float:
    return float(stats.studentized_range.ppf(level, n, df))
