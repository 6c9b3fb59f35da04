"""Ridge regression of one network's features on another's at the same place, from sums over images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import reduce
from operator import add

import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor

from kdx.intervals import Interval

RIDGES = tuple(10 ** (i / 2) for i in range(-12, 9))  # 1e-6 to 1e4, of the mean variance of the regressors
MATTERS = 0.001  # of the variance: a gain that is worth a warning


class FitWarning(UserWarning):
    """A regression that would be another with more images, or with other ridge strengths."""


@dataclass(frozen=True)
class Moments:
    """Sums and products over images and places of explained features y and regressors x, in float64.

    Those of disjoint sets of images add up, so features need not be kept. Regressors of several networks are one x with
    the channels of all.

    Attributes:
        n: Number of images times places.
        x: (k given,).
        y: (k explained,).
        xx: (k given, k given).
        xy: (k given, k explained).
        yy: Sum of the squares of y, a scalar.
    """

    n: int
    x: Tensor
    y: Tensor
    xx: Tensor
    xy: Tensor
    yy: Tensor

    @classmethod
    def of(cls, of: Tensor, given: Tensor) -> Moments:
        """Of features or logits (n, k, ...); ``given`` is brought to the grid of ``of``."""
        y, x = (t.transpose(1, -1).flatten(0, -2).double() for t in (of, resample(given, of)))
        return cls(len(x), x.sum(0), y.sum(0), x.T @ x, x.T @ y, y.square().sum())

    def __add__(self, other: Moments) -> Moments:
        return Moments(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        return self.x / self.n, self.y / self.n

    def about(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """xx, xy and yy, per place, of the distances from the points x and y."""
        (mean_x, mean_y), n = self.means, self.n
        xx = self.xx / n - torch.outer(mean_x, x) - torch.outer(x, mean_x - x)
        xy = self.xy / n - torch.outer(mean_x, y) - torch.outer(x, mean_y - y)
        return xx, xy, self.yy / n - ((2 * mean_y - y) * y).sum()


@dataclass(frozen=True)
class Regression:
    """A fitted ridge regression.

    Attributes:
        weights: (k given, k explained).
        intercept: (k explained,).
        spread: Mean squared distance of the explained features from their mean, summed over channels, per place.
        limited: The strength is the smallest or largest of ``RIDGES``, and beyond it the share of the variance that is
            left over would still have fallen noticeably.
    """

    weights: Tensor
    intercept: Tensor
    spread: float
    limited: bool

    @classmethod
    def fit(cls, parts: Sequence[Moments]) -> Regression:
        """Regress y on x over two or more disjoint parts, with the strength of ``RIDGES`` that best predicts each part
        from the others."""
        errors = torch.stack([found[0] for found in held_out_errors(parts)]).sum(0)
        best = int(errors.argmin())
        gain = errors[{0: 1, len(RIDGES) - 1: -2}.get(best, best)] - errors[best]
        whole = reduce(add, parts)
        mean_x, mean_y = whole.means
        xx, xy, yy = whole.about(mean_x, mean_y)
        strength = RIDGES[best] * xx.diagonal().mean()
        if strength > 0:
            weights = torch.linalg.solve(xx + strength * torch.eye(len(xx), dtype=xx.dtype, device=xx.device), xy)
        else:  # nothing varies, so nothing can be predicted from it
            weights = torch.zeros_like(xy)
        varies = yy > 1e-9 * whole.yy / whole.n
        limited = bool(varies and gain > MATTERS * whole.n * yy)
        return cls(weights.float(), (mean_y - mean_x @ weights).float(), float(yy), limited)

    def left_over(self, of: Tensor, given: Tensor) -> Tensor:
        """The part of ``of`` that ``given`` does not predict, both (n, k, ...)."""
        predicted = torch.einsum("nk...,kj->nj...", resample(given, of), self.weights)
        return of - predicted - self.intercept.view(-1, *[1] * (of.ndim - 2))


def resample(given: Tensor, of: Tensor) -> Tensor:
    """Features (n, k, h, w) on the grid of others; logits (n, k) are left as they are."""
    if given.shape[2:] == of.shape[2:]:
        return given
    return F.interpolate(given, of.shape[2:], mode="bilinear", antialias=True, align_corners=False)


def held_out_errors(parts: Sequence[Moments]) -> list[tuple[Tensor, Tensor]]:
    """How well regressions on all other parts predict each part.

    Returns:
        For each part, the summed squared errors (ridges,) and the summed squared distance from the others' mean, which
        is the error without regressors.
    """
    return [_errors(reduce(add, [*parts[:i], *parts[i + 1 :]]), part) for i, part in enumerate(parts)]


def _errors(known: Moments, other: Moments) -> tuple[Tensor, Tensor]:
    """With the covariance of the regressors in its own basis, all strengths cost little more than one."""
    means = known.means
    xx, xy, _ = known.about(*means)
    values, vectors = torch.linalg.eigh(xx)
    cross = vectors.T @ xy  # (k given, k explained)
    xx_other, xy_other, yy_other = other.about(*means)
    linear = (cross * (vectors.T @ xy_other)).sum(1)
    quadratic = (vectors.T @ xx_other @ vectors) * (cross @ cross.T)
    strengths = values.new_tensor(RIDGES)[:, None] * values.mean()
    shrunk = 1 / (values.clamp(min=0) + strengths) if values.mean() > 0 else values.new_zeros(len(RIDGES), len(values))
    errors = yy_other - 2 * shrunk @ linear + ((shrunk @ quadratic) * shrunk).sum(1)
    return other.n * errors, other.n * yy_other


def share_left(folds: Sequence[Moments]) -> Interval:
    """The share of y's variance that x does not predict, by cross-fitting.

    Each fold is predicted by the regression on all others, with the strength that is best for the other folds. The
    variance over J folds is multiplied by 1 / J + 1 / (J - 1), since their regressions share images (Nadeau & Bengio
    2003), so the 95 % t interval holds for other images to fit and to predict.

    Args:
        folds: Two or more, of about equal size.

    Returns:
        The share, with its interval and the number of folds; NaN where y does not vary.
    """
    errors, spreads = (torch.stack(found) for found in zip(*held_out_errors(folds), strict=True))
    chosen = (errors.sum(0) - errors).argmin(1)
    left, n = errors.gather(1, chosen[:, None])[:, 0], len(folds)
    if not spreads.sum() > 0:
        return Interval(math.nan, math.nan, math.nan, n)
    share = float(left.sum() / spreads.sum())
    around = (left - share * spreads) / spreads.mean()  # the ratio of two sums, linearised
    half = float(stats.t.ppf(0.975, n - 1) * around.std() * math.sqrt(1 / n + 1 / (n - 1)))
    return Interval(share, share - half, share + half, n)
