r"""The answers and features of a student that its base cannot express.

UniCAM looks for features whose relation to the labels differs from the base's. On students whose knowledge was
planted (:mod:`kdx.planted.plantings`) its maps miss it, and regression finds it: the part of the student's answers and
of its features at each place that is no linear function of the base's is unexplained. Where unexplained features make
the unexplained answer, something was distilled.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from kdx.data.batches import balanced_batches
from kdx.explain.reference import ANSWER, DIRECTIONS, NETWORKS, Reference, both_inputs, centre_logits
from kdx.intervals import mean_interval
from kdx.networks.capture import gradients

WINDOW = 1 / 6  # of a map's side


@dataclass(frozen=True)
class Unexplained:
    """Maps of the unexplained features that make the unexplained answer of one network given another.

    Before negative values are cut off, the sum of a map is about the share of the answers' mean energy that the
    unexplained features of the stage make, so maps are comparable between stages, directions and pairs.

    Attributes:
        distilled: Stage -> float32 map (n, h, w) >= 0 of the student given the base, at the student's resolution.
        residual: Stage -> map of the base given the student, at the base's resolution.
    """

    distilled: dict[str, Tensor]
    residual: dict[str, Tensor]


def unexplained(
    reference: Reference, images: Tensor | tuple[Tensor, Tensor], *, window: float = WINDOW, batch_size: int = 64
) -> Unexplained:
    r"""Maps of the unexplained features that make the unexplained answer: of the student given its base
    (*distilled*), and the reverse (*residual*). No labels are used.

    Over the reference set, ridge regressions with intercept predict the student's logits z (centred over classes)
    from the base's, and at each stage the student's features A from the base's at the same place. The residuals
    :math:`r = z - \hat z` and :math:`E = A - \hat A` are unexplained. Then

    .. math:: c_{hw} = \frac{1}{S} \sum_k \frac{\partial}{\partial A_{khw}} \tfrac12 \lVert r \rVert^2\, E_{khw},
              \qquad \mathrm{map} = \mathrm{ReLU}(\bar c),

    with S the mean of :math:`\lVert z - \bar z \rVert^2` and :math:`\bar c` the mean of c over a window: to
    first order, how much smaller the unexplained answer would be if the features here were those that the base
    can express. A stage whose places do not enter the answer, such as the last block of a vision transformer that
    answers from its class token, has empty maps.

    Args:
        reference: The two networks, and images on which the regressions are fitted once. It should hold other images
            than those explained, and several times as many as there are classes.
        images: (n, c, h, w), normalised as the networks expect; or a pair, the student's and the base's.
        window: Side of the window as a share of the map's side, in [0, 1]; 0 for none. Contributions have signs, and
            neighbours of opposite sign should cancel.
        batch_size: Images explained at a time.

    Returns:
        Raw maps per stage and direction.

    Raises:
        ValueError: A network gives the same answer to every image of the reference, or a window outside [0, 1].
            Fewer than two reference images per class are a warning.

    Examples:
        >>> import kdx, torch
        >>> student = kdx.build("resnet10", 3, "small", 0.125, seed=0)
        >>> base = kdx.build("resnet10", 3, "small", 0.25, seed=1)
        >>> images = torch.rand(12, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        >>> maps = kdx.unexplained(kdx.Reference(student, base, images), images[:2])
        >>> tuple(maps.distilled["L3"].shape), bool((maps.residual["L4"] >= 0).all())
        ((2, 8, 8), True)
    """
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
    \bar A \rVert^2`, with r and E as in :func:`unexplained`.

    A second base in the student's place tells how much of it the seed alone explains.

    Args:
        reference: As for :func:`unexplained`.
        images: (n, c, h, w), or a pair; it should hold other images than the reference.
        labels: (n,) class indices, which balance the batches.
        batches: Class-balanced batches.
        batch_size: Images per batch.
        seed: Draws the batches.

    Returns:
        direction, stage (those of the networks, and ``answer``), value in [0, about 1], low, high (95 % t interval
        over the batches), n (images per batch), batches. NaN where features do not vary.

    Examples:
        >>> import kdx, torch
        >>> student = kdx.build("resnet10", 3, "small", 0.125, seed=0)
        >>> base = kdx.build("resnet10", 3, "small", 0.25, seed=1)
        >>> images = torch.rand(24, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        >>> reference = kdx.Reference(student, base, images)
        >>> kdx.unexplained_share(reference, images, torch.arange(24) % 3, batches=2, batch_size=12).shape
        (10, 7)
    """
    pair = both_inputs(images)
    shares: dict[tuple[str, str], list[float]] = {}
    for rows in balanced_batches(labels, batches, batch_size, seed):
        x = [images[rows] for images in pair]
        features: dict[str, Any] = {**reference.features_of(*x), ANSWER: reference.answers_of(*x)}
        for direction, (explained, given) in DIRECTIONS.items():
            for stage, both in features.items():
                of = both[explained]
                left = reference.regressions[direction][stage].left_over(of, both[given])
                spread = (of - of.mean((0, *range(2, of.ndim)), keepdim=True)).square().sum()
                share = float(left.square().sum() / spread) if spread > 0 else math.nan
                shares.setdefault((direction, stage), []).append(share)
    table = []
    for (direction, stage), values in shares.items():
        mean = mean_interval(values)
        table.append((direction, stage, mean.mean, mean.low, mean.high, batch_size, batches))
    return pd.DataFrame(table, columns=["direction", "stage", "value", "low", "high", "n", "batches"])


def contributions(reference: Reference, x: tuple[Tensor, ...], whole: bool = False) -> dict[str, dict[str, Tensor]]:
    """Signed contributions to the unexplained answer: direction -> stage -> (n, h, w).

    Args:
        reference: As for :func:`unexplained`.
        x: Images for student and base.
        whole: Contributions of all features instead of the unexplained ones.
    """
    fitted = reference.regressions
    answers = reference.answers_of(*x)
    slopes: dict[int, dict[str, tuple[Tensor, Tensor]]] = {}  # activations and gradients of each network
    for direction, (explained, given) in DIRECTIONS.items():
        if not fitted[direction][ANSWER].spread > 0:
            raise ValueError(f"the {NETWORKS[explained]} gives the same answer to every image of the reference")
        left = fitted[direction][ANSWER].left_over(answers[explained], answers[given])

        def objective(logits: Tensor, left: Tensor = left) -> Tensor:
            return (centre_logits(logits.float()) * left).sum()

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
    """E of :func:`unexplained`: direction -> stage -> (n, k, h, w)."""
    fitted, features = reference.regressions, reference.features_of(*both_inputs(images))
    return {
        direction: {s: fitted[direction][s].left_over(both[explained], both[given]) for s, both in features.items()}
        for direction, (explained, given) in DIRECTIONS.items()
    }


def smooth(maps: Tensor, window: float) -> Tensor:
    """Means of maps (n, h, w) over windows of an odd number of cells, cut at the borders."""
    sides = [2 * int(window * side / 2) + 1 for side in maps.shape[1:]]
    pads = [side // 2 for side in sides]
    return F.avg_pool2d(maps[:, None], sides, 1, pads, count_include_pad=False)[:, 0]
