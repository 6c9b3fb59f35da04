"""Ridge regression of one network's features on another's at the same place, from sums over images."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import reduce
from itertools import accumulate
from operator import add
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from kdx.inference import ratio_values
from kdx.intervals import Interval, mean_interval

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
        return cls.among((of, given), {"": (0, 1)})[""]

    @classmethod
    def among(cls, features: Sequence[Tensor], questions: Mapping[str, Sequence[int]]) -> dict[str, Moments]:
        """Name -> moments, from one pass over the features or logits (n, k, ...) of several networks.

        Args:
            features: Of each network.
            questions: Name -> the network that is explained, to whose grid the others are brought, and those that are
                given.
        """
        ends = list(accumulate(f.shape[1] for f in features))
        channels = [torch.arange(end - f.shape[1], end) for f, end in zip(features, ends, strict=True)]
        grids: dict[torch.Size, tuple[int, Tensor, Tensor]] = {}
        found = {}
        for name, (explained, *given) in questions.items():
            target = features[explained]
            if (grid := target.shape[2:]) not in grids:
                rows = torch.cat([resample(f, target) for f in features], 1).movedim(1, -1).flatten(0, -2).double()
                grids[grid] = len(rows), rows.sum(0), rows.T @ rows
            n, total, products = grids[grid]
            x, y = torch.cat([channels[i] for i in given]), channels[explained]
            of_x = products[x]
            found[name] = cls(n, total[x], total[y], of_x[:, x], of_x[:, y], products.diagonal()[y].sum())
        return found

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

    def ridge(self, strength: float) -> Tensor:
        """Weights (k given, k explained) of the ridge regression with an intercept, for a strength relative to the mean
        variance of the regressors; 0 where none of them varies."""
        xx, xy, _ = self.about(*self.means)
        penalty = strength * xx.diagonal().mean()
        if not penalty > 0:
            return torch.zeros_like(xy)
        return torch.linalg.solve(xx + penalty * torch.eye(len(xx), dtype=xx.dtype, device=xx.device), xy)

    def first(self, k: int) -> Moments:
        """With the first k regressors alone."""
        return Moments(self.n, self.x[:k], self.y, self.xx[:k, :k], self.xy[:k], self.yy)

    def others(self, k: int) -> Moments:
        """The regressors after the first k, explained by the first k."""
        xx = self.xx
        return Moments(self.n, self.x[:k], self.x[k:], xx[:k, :k], xx[:k, k:], xx[k:, k:].diagonal().sum())

    def beyond(self, known: Moments, of_y: Tensor, of_others: Tensor) -> Moments:
        """What the first k regressors leave over of y, explained by what they leave over of the other regressors.

        Args:
            known: Moments about whose means the weights were fitted.
            of_y: Weights (k, k explained).
            of_others: Weights (k, k given - k).
        """
        k = len(of_y)
        (mean_x, mean_y), (own_x, own_y) = known.means, self.means
        xx, xy, yy = self.about(mean_x, mean_y)
        known_xx, cross = xx[:k, :k], xx[:k, k:]
        shared = of_others.T @ cross
        left_xx = xx[k:, k:] - shared - shared.T + of_others.T @ known_xx @ of_others
        left_xy = xy[k:] - of_others.T @ xy[:k] - cross.T @ of_y + of_others.T @ known_xx @ of_y
        left_yy = yy - 2 * (of_y * xy[:k]).sum() + (of_y * (known_xx @ of_y)).sum()
        x = own_x[k:] - mean_x[k:] - (own_x[:k] - mean_x[:k]) @ of_others
        y = own_y - mean_y - (own_x[:k] - mean_x[:k]) @ of_y
        return Moments(self.n, *(self.n * part for part in (x, y, left_xx, left_xy, left_yy)))


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
        errors = torch.stack([found.held_out for found in held_out_errors(parts)]).sum(0)
        best = int(errors.argmin())
        gain = errors[{0: 1, len(RIDGES) - 1: -2}.get(best, best)] - errors[best]
        whole = reduce(add, parts)
        mean_x, mean_y = whole.means
        yy = whole.about(mean_x, mean_y)[2]
        weights = whole.ridge(RIDGES[best])
        varies = yy > 1e-9 * whole.yy / whole.n
        limited = bool(varies and gain > MATTERS * whole.n * yy)
        return cls(weights.float(), (mean_y - mean_x @ weights).float(), float(yy), limited)

    def predict(self, given: Tensor) -> Tensor:
        """The explained features (n, k explained, ...) for regressors (n, k given, ...)."""
        predicted = torch.einsum("nk...,kj->nj...", given, self.weights)
        return predicted + self.intercept.view(-1, *[1] * (given.ndim - 2))

    def left_over(self, of: Tensor, given: Tensor) -> Tensor:
        """The part of ``of`` that ``given`` does not predict, both (n, k, ...)."""
        return of - self.predict(resample(given, of))


@dataclass(frozen=True)
class Beyond:
    """What one network predicts of another beyond a third, see :func:`errors_beyond`.

    Attributes:
        of_given: Regression of the predicting network on the third.
        of_left: Regression of what the third leaves over of the one on what it leaves over of the other.
    """

    of_given: Regression
    of_left: Regression

    @classmethod
    def fit(cls, parts: Sequence[Moments], k: int) -> Beyond:
        """Of y on the regressors after the first k, beyond these."""
        whole = reduce(add, parts)
        first, given = Regression.fit([p.first(k) for p in parts]), Regression.fit([p.others(k) for p in parts])
        weights = (first.weights.double(), given.weights.double())
        return cls(given, Regression.fit([part.beyond(whole, *weights) for part in parts]))

    def __call__(self, first: Tensor, given: Tensor) -> Tensor:
        """The prediction (n, k explained, ...) from the features of the third and of the predicting network, all on one
        grid."""
        return self.of_left.predict(self.of_given.left_over(given, first))


def resample(given: Tensor, of: Tensor) -> Tensor:
    """Features (n, k, h, w) on the grid of others; logits (n, k) are left as they are."""
    if given.shape[2:] == of.shape[2:]:
        return given
    return F.interpolate(given, of.shape[2:], mode="bilinear", antialias=True, align_corners=False)


class Errors(NamedTuple):
    """How well regressions on some images predict others.

    Attributes:
        held_out: Summed squared errors on the others (ridges,).
        alone: Likewise without regressors, that is the squared distances from the mean of the fitted, a scalar.
        fitted: Summed squared errors on the fitted images (ridges,), scaled to the number of the others.
    """

    held_out: Tensor
    alone: Tensor
    fitted: Tensor


def held_out_errors(parts: Sequence[Moments]) -> list[Errors]:
    """How well regressions on all other parts predict each part."""
    return [_errors(known, part) for known, part in _against_others(parts)]


def _against_others(parts: Sequence[Moments], others: Sequence[Moments] = ()) -> Iterator[tuple[Moments, Moments]]:
    """All others, and the part; by halves, which takes few sums, and no difference, which would lose small parts."""
    if len(parts) == 1:
        yield reduce(add, others), parts[0]
        return
    half = len(parts) // 2
    for some, rest in ((parts[:half], parts[half:]), (parts[half:], parts[:half])):
        yield from _against_others(some, [*others, reduce(add, rest)])


def _errors(known: Moments, other: Moments) -> Errors:
    """With the covariance of the regressors in its own basis, all strengths cost little more than one."""
    means = known.means
    xx, xy, yy = known.about(*means)
    values, vectors = torch.linalg.eigh(xx)
    cross = vectors.T @ xy  # (k given, k explained)
    xx_other, xy_other, yy_other = other.about(*means)
    linear = (cross * (vectors.T @ xy_other)).sum(1)
    quadratic = (vectors.T @ xx_other @ vectors) * (cross @ cross.T)
    strengths = values.new_tensor(RIDGES)[:, None] * values.mean()
    shrunk = 1 / (values.clamp(min=0) + strengths) if values.mean() > 0 else values.new_zeros(len(RIDGES), len(values))
    held_out = yy_other - 2 * shrunk @ linear + ((shrunk @ quadratic) * shrunk).sum(1)
    fitted = yy - (shrunk * (2 - shrunk * values)) @ cross.square().sum(1)
    return Errors(other.n * held_out, other.n * yy_other, other.n * fitted)


def share(of: Tensor, whole: Tensor) -> tuple[Interval, NDArray[np.float64]]:
    """The ratio of two sums over J folds (folds,), each of which is predicted by a regression on all others.

    The variance over folds is multiplied by 1 / J + 1 / (J - 1), since their regressions share images (Nadeau & Bengio
    2003), so the t interval holds for other images to fit and to predict.

    Returns:
        The share with its 95 % interval and the number of folds, and values (J,) of which this is the mean with its
        t interval: those of the folds, to first order, moved away from their mean as that factor asks. So differences
        of two networks' values have the interval that they need, too. NaN where the whole is 0.
    """
    n = len(whole)
    if not whole.sum() > 0:
        return Interval(math.nan, math.nan, math.nan, n), np.full(n, math.nan)
    parts = ratio_values(of.cpu()[None], whole.cpu()[None])[0]
    values = parts.mean() + math.sqrt(1 + n / (n - 1)) * (parts - parts.mean())
    return mean_interval(values), values


def share_left(folds: Sequence[Moments]) -> Interval:
    """The share of y's variance that x does not predict. Each fold is predicted by the regression on all others, with
    the strength that is best for the other folds; at least two folds, of about equal size."""
    found = held_out_errors(folds)
    return share(_chosen(found)[0], torch.stack([errors.alone for errors in found]))[0]


def errors_beyond(folds: Sequence[Moments], k: int) -> tuple[Tensor, Tensor, Tensor]:
    """What the first k regressors leave over of y, and what is left if the others predict as well, by cross-fitting.

    What the first k leave over of y is regressed on what they leave over of the others. Both regressions have
    strengths of their own, so others that are of no use are shrunk away and do not worsen the prediction. Errors are
    means of those on the images that are predicted and on those that are fitted on: the former are too large by what
    the fit costs, and the latter, to first order, too small by as much.

    Returns:
        For each fold, the summed squared errors without regressors, with the first k, and with all: (folds,) each.
    """
    found = held_out_errors([fold.first(k) for fold in folds])
    with_all = [_errors(known, fold) for known, fold in _left_over(folds, k)]
    spread = torch.stack([errors.alone for errors in found])
    return spread, _chosen(found, both=True)[0], _chosen(with_all, both=True)[0]


def slope_beyond(folds: Sequence[Moments], k: int) -> tuple[Interval, NDArray[np.float64]]:
    """The slope of what the first k regressors leave over of y on what they leave over of the others, which are as many
    as y and in the same order, by cross-fitting; as :func:`share`. NaN where nothing of the others is left over."""
    left = [fold for _, fold in _left_over(folds, k)]
    products, squares = (torch.stack([of(m) for m in left]) for of in (lambda m: m.xy.trace(), lambda m: m.xx.trace()))
    others = reduce(add, folds).others(k)
    nothing = squares.sum() < 1e-6 * others.n * others.about(*others.means)[2]
    return share(products, torch.zeros_like(squares) if nothing else squares)


def _left_over(folds: Sequence[Moments], k: int) -> Iterator[tuple[Moments, Moments]]:
    """Of all others, and of each fold: what the first k regressors leave over, by regressions on all others."""
    _, of_y = _chosen(held_out_errors([fold.first(k) for fold in folds]))
    _, of_others = _chosen(held_out_errors([fold.others(k) for fold in folds]))
    for (known, fold), one, other in zip(_against_others(folds), of_y, of_others, strict=True):
        weights = known.first(k).ridge(RIDGES[one]), known.others(k).ridge(RIDGES[other])
        yield known.beyond(known, *weights), fold.beyond(known, *weights)


def _chosen(found: Sequence[Errors], both: bool = False) -> tuple[Tensor, list[int]]:
    """The errors of each fold (folds,) with the strength that is best for the other folds, and these, as places in
    ``RIDGES``; held-out errors, or ``both``, scaled so that their sum is the mean of that of held-out and fitted."""
    held_out, fitted = (torch.stack(errors) for errors in zip(*((e.held_out, e.fitted) for e in found), strict=True))
    best = (held_out.sum(0) - held_out).argmin(1)
    errors, others = (of.gather(1, best[:, None])[:, 0] for of in (held_out, fitted))
    if both and errors.sum() > 0:
        errors = errors * (1 + others.sum() / errors.sum()) / 2
    return errors, best.tolist()
