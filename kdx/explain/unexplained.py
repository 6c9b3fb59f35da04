r"""The answers and features of a student that its base cannot express.

UniCAM looks for features whose relation to the labels differs from the base's. On students whose knowledge was
planted (:mod:`kdx.planted.plantings`) its maps miss it, and regression finds it: the part of the student's answers and
of its features at each place that is no linear function of the base's is unexplained. Where unexplained features make
the unexplained answer, something was distilled.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from kdx.explain.reference import (
    ANSWER,
    DIRECTIONS,
    NETWORKS,
    Reference,
    centre_logits,
    inputs_of,
    warn_if_few,
)
from kdx.explain.regression import share_left
from kdx.networks.capture import gradients

WINDOW = 1 / 6  # of a map's side
FLOOR = 1e-3  # of a stage's mean, see `fuse`


@dataclass(frozen=True)
class Unexplained:
    """Maps of the unexplained features that make the unexplained answer of one network given another.

    Values are in one unit at all stages, the mean energy of the explained network's answers. A value holds for a
    change at few places (:func:`kdx.patch_agreement`). The sum of a map is no share of anything, since networks are not
    linear.

    Attributes:
        distilled: Stage -> float32 map (n, h, w) >= 0 of the student given the base, at the student's resolution.
        residual: Stage -> map of the base given the student, at the base's resolution.
    """

    distilled: dict[str, Tensor]
    residual: dict[str, Tensor]

    @property
    def fused(self) -> dict[str, Tensor]:
        """Direction -> one map (n, h, w) >= 0 from those of all stages, see :func:`fuse`. Of planted
        knowledge it shows more than the maps of single stages."""
        return {"distilled": fuse(self.distilled), "residual": fuse(self.residual)}


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
        ValueError: A network gives the same answer to every image of the reference, its weights changed since, or a
            window outside [0, 1].

    Warns:
        FitWarning: Fewer than two reference images per class, or no ridge strength that suffices.

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
    pair = tuple(x.clone() if x.is_inference() else x for x in inputs_of(images))
    found: dict[str, dict[str, list[Tensor]]] = {d: {s: [] for s in reference.stages} for d in DIRECTIONS}
    with torch.inference_mode(False):
        for x in zip(*(part.split(batch_size) for part in pair), strict=True):
            for direction, maps in contributions(reference, x).items():
                for stage, contribution in maps.items():
                    found[direction][stage].append(smooth(contribution, window).relu())
    return Unexplained(**{d: {s: torch.cat(maps) for s, maps in of.items()} for d, of in found.items()})


def unexplained_share(
    reference: Reference,
    images: Tensor | tuple[Tensor, Tensor] | None = None,
    *,
    folds: int = 10,
    seed: int = 0,
    directions: Collection[str] = tuple(DIRECTIONS),
) -> pd.DataFrame:
    r"""The share of the variance of one network's answers, and of each stage's features, that the other cannot
    express: :math:`\lVert r \rVert^2 / \lVert z - \bar z \rVert^2` and :math:`\lVert E \rVert^2 / \lVert A -
    \bar A \rVert^2`, with r and E as in :func:`unexplained`.

    By cross-fitting: the images are divided into folds, and each is read by regressions fitted on all others. A second
    base in the student's place tells how much of it the seed alone explains. With few images per channel or class the
    share is too large, and more images lower it.

    Args:
        reference: The two networks.
        images: (n, c, h, w), or a pair; None takes the reference's. All the more images, the better.
        folds: At least 3. While they are fitted, they take about 16 bytes per pair of channels each: 1.8 GB in all for
            ten folds of two ResNet-50.
        seed: Draws the folds.
        directions: Of the student given the base (``distilled``), of the base given the student (``residual``).

    Returns:
        direction, stage (those of the networks, and ``answer``), value in [0, about 1], low, high, n (images), folds.
        NaN where features do not vary. The 95 % interval is over the images, for the same two networks: those that are
        read and, by the factor of Nadeau & Bengio (2003), those that are fitted on.

    Raises:
        ValueError: Fewer than 3 folds or more than images, or networks whose weights changed.

    Warns:
        FitWarning: Fewer than two images per class to fit on.

    Examples:
        >>> import kdx, torch
        >>> student = kdx.build("resnet10", 3, "small", 0.125, seed=0)
        >>> base = kdx.build("resnet10", 3, "small", 0.25, seed=1)
        >>> images = torch.rand(24, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        >>> reference = kdx.Reference(student, base, images)
        >>> kdx.unexplained_share(reference, folds=4).shape
        (10, 7)
    """
    reference.check_weights()
    pair = reference.inputs[:2] if images is None else inputs_of(images)
    n = len(pair[0])
    if not 3 <= folds <= n:
        raise ValueError(f"folds: expected 3 to {n}, the number of images, got {folds}")
    parts = reference.parts(pair, folds, seed)
    warn_if_few(n - n // folds, max(len(of[ANSWER].y) for of in parts[0].values()), 3)
    table = []
    for direction in directions:
        for stage in parts[0][direction]:
            share = share_left([part[direction][stage] for part in parts])
            table.append((direction, stage, share.mean, share.low, share.high, n, folds))
    return pd.DataFrame(table, columns=["direction", "stage", "value", "low", "high", "n", "folds"])


def contributions(reference: Reference, x: tuple[Tensor, ...], whole: bool = False) -> dict[str, dict[str, Tensor]]:
    """Signed contributions to the unexplained answer: direction -> stage -> (n, h, w).

    Args:
        reference: As for :func:`unexplained`.
        x: Images for student and base.
        whole: Contributions of all features instead of the unexplained ones.
    """
    reference.check_weights()
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
    reference.check_weights()
    fitted, features = reference.regressions, reference.features_of(*inputs_of(images))
    return {
        direction: {s: fitted[direction][s].left_over(both[explained], both[given]) for s, both in features.items()}
        for direction, (explained, given) in DIRECTIONS.items()
    }


def fuse(maps: Mapping[str, Tensor]) -> Tensor:
    r"""One map from those of several stages: large where all of them are.

    Maps of early stages are fine, and those of late stages certain. With :math:`m_s` the maps on the finest grid,

    .. math:: \mathrm{fused} \propto \Big(\prod_s (m_s + \varepsilon \bar m_s)\Big)^{1/S},

    the geometric mean over the stages, in which :math:`\varepsilon = 0.001` of its own mean keeps a stage from
    forbidding a place. Its mean over an image is that of all the maps. Stages whose map of an image is empty are left
    out.

    Args:
        maps: Stage -> raw maps (n, h, w) >= 0, of any resolution.

    Returns:
        (n, h, w) at the finest resolution.
    """
    finest = max((m.shape[1:] for m in maps.values()), key=lambda shape: shape.numel())
    fine = torch.stack([F.interpolate(m[:, None], finest, mode="bilinear")[:, 0] for m in maps.values()])
    means = fine.mean((2, 3), keepdim=True)
    seen = means > 0  # (stages, n, 1, 1)
    tiny = torch.finfo(fine.dtype).tiny
    logs = torch.where(seen, (fine + FLOOR * means).clamp_min(tiny).log(), 0)
    pattern = torch.where(seen.any(0), (logs.sum(0) / seen.sum(0).clamp_min(1)).exp(), 0)
    return pattern * means.mean(0) / pattern.mean((1, 2), keepdim=True).clamp_min(tiny)


def smooth(maps: Tensor, window: float) -> Tensor:
    """Means of maps (n, h, w) over windows of an odd number of cells, cut at the borders."""
    cells = sides(maps, window)
    return F.avg_pool2d(maps[:, None], cells, 1, [side // 2 for side in cells], count_include_pad=False)[:, 0]


def sides(maps: Tensor, window: float) -> list[int]:
    """Height and width of a window in cells of maps (n, h, w)."""
    return [2 * int(window * side / 2) + 1 for side in maps.shape[1:]]
