"""Ridge regression of one network's features on another's at the same place."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)  # of the mean variance of the regressors


@dataclass(frozen=True)
class Regression:
    """A fitted ridge regression.

    Attributes:
        weights: (k given, k explained).
        intercept: (k explained,).
        spread: Mean squared distance of the explained features from their mean, summed over channels, per place.
    """

    weights: Tensor
    intercept: Tensor
    spread: float

    @classmethod
    def fit(cls, of: Tensor, given: Tensor) -> Regression:
        """Regress ``of`` on ``given``, both (n, k, ...), with the ridge that best predicts one half of the rows from
        the other."""
        order = torch.randperm(len(of), generator=torch.Generator().manual_seed(0)).to(of.device)
        halves = [_moments(of[rows], given[rows]) for rows in order.tensor_split(2)]
        errors = [0.0] * len(RIDGES)
        for here, there in (halves, halves[::-1]):
            for i, ridge in enumerate(RIDGES):
                errors[i] += _error(there, *_solve(here, ridge))
        both = [a + b for a, b in zip(*halves, strict=True)]
        weights, intercept = _solve(both, RIDGES[errors.index(min(errors))])
        n, y, yy = both[0], both[2], both[5]
        spread = float((yy - (y**2).sum() / n) / n)
        return cls(weights.float(), intercept.float(), spread)

    def left_over(self, of: Tensor, given: Tensor) -> Tensor:
        """The part of ``of`` that ``given`` does not predict, both (n, k, ...)."""
        predicted = torch.einsum("nk...,kj->nj...", resample(given, of), self.weights)
        return of - predicted - self.intercept.view(-1, *[1] * (of.ndim - 2))


def resample(given: Tensor, of: Tensor) -> Tensor:
    """Features (n, k, h, w) on the grid of others; logits (n, k) are left as they are."""
    if given.shape[2:] == of.shape[2:]:
        return given
    return F.interpolate(given, of.shape[2:], mode="bilinear", antialias=True, align_corners=False)


def _moments(of: Tensor, given: Tensor) -> list[Any]:
    """Sums and products over rows and places: n, x, y, xx, xy, and the sum of y squared."""
    total: list[Any] = []
    for y, x in _chunks(of, given):
        part = [len(x), x.sum(0), y.sum(0), x.T @ x, x.T @ y, (y**2).sum()]
        total = [a + b for a, b in zip(total, part, strict=True)] if total else part
    return total


def _chunks(of: Tensor, given: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    for y, x in zip(of.split(32), given.split(32), strict=True):
        x = resample(x, y)
        yield y.transpose(1, -1).flatten(0, -2).double(), x.transpose(1, -1).flatten(0, -2).double()


def _solve(moments: list[Any], ridge: float) -> tuple[Tensor, Tensor]:
    n, x, y, xx, xy, _ = moments
    covariance = xx / n - torch.outer(x / n, x / n)
    cross = xy / n - torch.outer(x / n, y / n)
    strength = ridge * covariance.diagonal().mean()
    if not strength > 0:  # nothing varies, so nothing can be predicted from it
        return torch.zeros_like(cross), y / n
    weights = torch.linalg.solve(covariance + strength * torch.eye(len(x), dtype=x.dtype, device=x.device), cross)
    return weights, y / n - x / n @ weights


def _error(moments: list[Any], weights: Tensor, intercept: Tensor) -> float:
    """Summed squared error of a prediction, from the moments of the rows that it is made for."""
    n, x, y, xx, xy, yy = moments
    explained = (weights * (xx @ weights)).sum() + n * (intercept**2).sum() + 2 * (x @ weights * intercept).sum()
    return float(yy - 2 * ((weights * xy).sum() + (intercept * y).sum()) + explained)
