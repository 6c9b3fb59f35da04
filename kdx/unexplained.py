r"""What a student answers, and with which features, that its base cannot express.

UniCAM looks for features that *relate* to the labels otherwise than the base's. On students of which
it is known what they learned (:mod:`kdx.plantings`) its maps miss it. Regression finds it: what the
base cannot express linearly, of the student's answers and of its features at each place, is unexplained;
where unexplained features make the unexplained answer, there is what was distilled.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdx.intervals import mean_interval
from kdx.saliency import gradients, logits_of
from kdx.scores import balanced_batches
from kdx.tracing import evaluating
from kdx.unique import DIRECTIONS, NETWORKS, Reference, both_inputs

RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)  # of the mean variance of what is regressed on
ANSWER = "answer"
WINDOW = 1 / 6  # of a map's side


@dataclass(frozen=True)
class Unexplained:
    """Maps of what one network answers, and with which features, that the other cannot express.

    Attributes
    ----------
    distilled, residual : stage -> float32 map (n, h, w) >= 0 of the student given the base, at the
        student's resolution; and of the base given the student, at the base's. Before what is negative is
        cut off, a map's sum is about the share of the answers' mean energy that the stage's unexplained
        features make, so maps are comparable between stages, directions and pairs.
    """

    distilled: dict[str, Tensor]
    residual: dict[str, Tensor]


def unexplained(
    student: nn.Module,
    base: nn.Module,
    images: Tensor | tuple[Tensor, Tensor],
    *,
    reference: Reference,
    window: float = WINDOW,
    batch_size: int = 64,
) -> Unexplained:
    r"""Where unexplained features make the unexplained answer: of the student given its base (*distilled*),
    and the reverse (*residual*). No labels are used.

    Over the reference set, ridge regressions with intercept predict the student's logits z (centred over
    classes) from the base's, and at each stage the student's features A from the base's at the same place.
    What is left over, :math:`r = z - \hat z` and :math:`E = A - \hat A`, is unexplained. Then

    .. math:: c_{hw} = \frac{1}{S} \sum_k \frac{\partial}{\partial A_{khw}} \tfrac12 \lVert r \rVert^2\, E_{khw},
              \qquad \mathrm{map} = \mathrm{ReLU}(\bar c),

    with S the mean of :math:`\lVert z - \bar z \rVert^2` and :math:`\bar c` the mean of c over a window: to
    first order, how much less the unexplained answer would be if the features here were those that the base
    can express. A stage on whose places the answer does not depend, such as the last block of a vision
    transformer that answers from its class token, has empty maps.

    Parameters
    ----------
    student, base : the networks of the reference.
    images : (n, c, h, w), normalised as the networks expect; or a pair, student's and base's.
    reference : images on which the regressions are fitted, once (the networks must not change afterwards);
        best others than those explained, and several times as many as there are classes.
    window : side of the window, as a share of the map's; 0: none. Contributions have signs, and what pushes
        and pulls side by side is to cancel.
    batch_size : images explained at a time.

    Raises
    ------
    ValueError : a reference of other networks, or one on which a network always answers the same; a window
        outside [0, 1]. A reference of fewer than two images a class is a warning.

    Examples
    --------
    >>> import kdx, torch
    >>> student = kdx.build("resnet10", 3, "small", 0.125, seed=0)
    >>> base = kdx.build("resnet10", 3, "small", 0.25, seed=1)
    >>> images = torch.rand(12, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    >>> reference = kdx.Reference(student, base, images, torch.eye(3)[torch.arange(12) % 3])
    >>> maps = kdx.unexplained(student, base, images[:2], reference=reference)
    >>> tuple(maps.distilled["L3"].shape), bool((maps.residual["L4"] >= 0).all())
    ((2, 8, 8), True)
    """
    if (student, base) != reference.networks:
        raise ValueError("the reference was made with other networks; make one for these")
    if not 0 <= window <= 1:
        raise ValueError(f"window: expected a share of the map's side, 0 to 1, got {window}")
    pair = tuple(x.clone() if x.is_inference() else x for x in both_inputs(images))
    found: dict[str, dict[str, list[Tensor]]] = {d: {s: [] for s in reference.stages} for d in DIRECTIONS}
    with torch.inference_mode(False):
        for x in zip(*(part.split(batch_size) for part in pair), strict=True):
            for direction, maps in contributions(reference, x).items():
                for stage, contribution in maps.items():
                    found[direction][stage].append(smooth(contribution, window).relu())
    return Unexplained(**{d: {s: torch.cat(maps) for s, maps in of.items()} for d, of in found.items()})


def unexplained_share(
    reference: Reference,
    images: Tensor | tuple[Tensor, Tensor],
    labels: Tensor,
    *,
    batches: int = 16,
    batch_size: int = 128,
    seed: int = 0,
) -> pd.DataFrame:
    r"""The share of the variance of one network's answers, and of each stage's features, that the other cannot
    express: :math:`\lVert r \rVert^2 / \lVert z - \bar z \rVert^2` and :math:`\lVert E \rVert^2 / \lVert A -
    \bar A \rVert^2`, with r and E of :func:`unexplained`.

    A second base in the student's place says how much of it the seed alone explains.

    Parameters
    ----------
    images, labels : as for :func:`kdx.rs`, best others than those of the reference.

    Returns
    -------
    DataFrame : direction, stage (those of the networks, and ``answer``), value in [0, about 1], low, high
        (95 % t interval over the batches), n (images a batch), batches. NaN where features do not vary.

    Examples
    --------
    >>> import kdx, torch
    >>> student = kdx.build("resnet10", 3, "small", 0.125, seed=0)
    >>> base = kdx.build("resnet10", 3, "small", 0.25, seed=1)
    >>> images = torch.rand(24, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    >>> labels = torch.arange(24) % 3
    >>> reference = kdx.Reference(student, base, images, torch.eye(3)[labels])
    >>> kdx.unexplained_share(reference, images, labels, batches=2, batch_size=12).shape
    (10, 7)
    """
    fitted = fit(reference)
    pair = both_inputs(images)
    shares: dict[tuple[str, str], list[float]] = {}
    for rows in balanced_batches(labels, batches, batch_size, seed):
        features: dict[str, Any] = dict(reference.features(*(x[rows] for x in pair)))
        features[ANSWER] = tuple(_answers(net, x[rows]) for net, x in zip(reference.networks, pair, strict=True))
        for direction, (explained, given) in DIRECTIONS.items():
            for stage, both in features.items():
                of, left = both[explained], fitted[direction][stage].left_over(both[explained], both[given])
                spread = (of - of.mean((0, *range(2, of.ndim)), keepdim=True)).square().sum()
                share = float(left.square().sum() / spread) if spread > 0 else math.nan
                shares.setdefault((direction, stage), []).append(share)
    table = []
    for (direction, stage), values in shares.items():
        mean = mean_interval(values)
        table.append((direction, stage, mean.mean, mean.low, mean.high, batch_size, batches))
    return pd.DataFrame(table, columns=["direction", "stage", "value", "low", "high", "n", "batches"])


@dataclass(frozen=True)
class _Regression:
    """Ridge regression of features on others at the same place."""

    weights: Tensor  # (k given, k explained)
    intercept: Tensor  # (k explained,)
    spread: float  # mean squared distance of what is explained from its mean, summed over channels, a place

    @classmethod
    def fit(cls, of: Tensor, given: Tensor) -> _Regression:
        """``given`` -> ``of``, (n, k, ...) both; the ridge of ``RIDGES`` that predicts one half of the rows
        best from the other."""
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
        predicted = torch.einsum("nk...,kj->nj...", resample(given, of), self.weights)
        return of - predicted - self.intercept.view(-1, *[1] * (of.ndim - 2))


def _moments(of: Tensor, given: Tensor) -> list[Any]:
    """Rows, sums and products over rows and places: n, x, y, xx, xy, and the sum of y squared."""
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
    """Summed squared error of a prediction, from the moments of the rows it is made for."""
    n, x, y, xx, xy, yy = moments
    explained = (weights * (xx @ weights)).sum() + n * (intercept**2).sum() + 2 * (x @ weights * intercept).sum()
    return float(yy - 2 * ((weights * xy).sum() + (intercept * y).sum()) + explained)


_FITS: WeakKeyDictionary[Reference, dict[str, dict[str, _Regression]]] = WeakKeyDictionary()


def fit(reference: Reference) -> dict[str, dict[str, _Regression]]:
    """Direction -> stage, or ``ANSWER`` -> regression; fitted once a reference."""
    if reference not in _FITS:
        features: dict[str, Any] = {name: stage.features for name, stage in reference.stages.items()}
        pairs = zip(reference.networks, reference.inputs, strict=True)
        answers = features[ANSWER] = tuple(_answers(network, images) for network, images in pairs)
        if len(reference) < 2 * max(z.shape[1] for z in answers):
            warnings.warn(
                f"{len(reference)} reference images for {answers[0].shape[1]} classes: too few for regressions that "
                "hold for other images, so too much counts as unexplained; use two a class or more",
                stacklevel=3,
            )
        _FITS[reference] = {
            direction: {s: _Regression.fit(both[explained], both[given]) for s, both in features.items()}
            for direction, (explained, given) in DIRECTIONS.items()
        }
    return _FITS[reference]


@torch.no_grad()
def _answers(network: nn.Module, images: Tensor) -> Tensor:
    """Logits (n, classes) with mean 0 over the classes, which softmax does not see."""
    with evaluating(network):
        return torch.cat([_centred(logits_of(network(x)).float()) for x in images.split(64)])


def _centred(logits: Tensor) -> Tensor:
    if logits.shape[1] == 1:  # one output tells two classes
        return logits
    return logits - logits.mean(1, keepdim=True)


def contributions(reference: Reference, x: tuple[Tensor, ...], whole: bool = False) -> dict[str, dict[str, Tensor]]:
    """Direction -> stage -> signed contributions (n, h, w) of unexplained features (``whole``: of all features) to
    the unexplained answer."""
    fitted = fit(reference)
    answers = [_answers(network, images) for network, images in zip(reference.networks, x, strict=True)]
    slopes: dict[int, dict[str, tuple[Tensor, Tensor]]] = {}  # activations and gradients of each network
    for direction, (explained, given) in DIRECTIONS.items():
        if not fitted[direction][ANSWER].spread > 0:
            raise ValueError(f"the {NETWORKS[explained]} gives the same answer to every image of the reference")
        left = fitted[direction][ANSWER].left_over(answers[explained], answers[given])

        def objective(logits: Tensor, left: Tensor = left) -> Tensor:
            return (_centred(logits.float()) * left).sum()

        slopes[explained] = gradients(
            reference.networks[explained], x[explained], objective, reference.layers[explained]
        )
    found: dict[str, dict[str, Tensor]] = {}
    for direction, (explained, given) in DIRECTIONS.items():
        found[direction] = {}
        for stage, (activation, gradient) in slopes[explained].items():
            other = slopes[given][stage][0]
            features = activation if whole else fitted[direction][stage].left_over(activation, other)
            found[direction][stage] = (gradient * features).sum(1) / fitted[direction][ANSWER].spread
    return found


def unexplained_features(reference: Reference, images: Tensor | tuple[Tensor, ...]) -> dict[str, dict[str, Tensor]]:
    """E of :func:`unexplained`: direction -> stage -> what the other network cannot express of the features,
    (n, k, h, w)."""
    fitted, features = fit(reference), reference.features(*both_inputs(images))
    return {
        direction: {s: fitted[direction][s].left_over(both[explained], both[given]) for s, both in features.items()}
        for direction, (explained, given) in DIRECTIONS.items()
    }


def resample(given: Tensor, of: Tensor) -> Tensor:
    """Features (n, k, h, w) on the grid of others; logits (n, k) are left as they are."""
    if given.shape[2:] == of.shape[2:]:
        return given
    return F.interpolate(given, of.shape[2:], mode="bilinear", antialias=True, align_corners=False)


def smooth(maps: Tensor, window: float) -> Tensor:
    """Means over windows of an odd number of cells, cut at the borders."""
    sides = [2 * int(window * side / 2) + 1 for side in maps.shape[1:]]
    pads = [side // 2 for side in sides]
    return F.avg_pool2d(maps[:, None], sides, 1, pads, count_include_pad=False)[:, 0]
