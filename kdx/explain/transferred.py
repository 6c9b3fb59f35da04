r"""What a student has from its teacher: the part of its answers and features that its base cannot express and its
teacher can.

Two networks that differ in their seed alone differ in much, so what the base leaves unexplained
(:mod:`kdx.explain.unexplained`) is not yet *from the teacher*. It is therefore divided again, by a third network.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from kdx.explain.reference import ANSWER, Reference, centre_logits, inputs_of, parts_of, warn_if_few_answered
from kdx.explain.regression import Moments, errors_beyond, share, slope_beyond
from kdx.explain.unexplained import WINDOW, fuse, smooth
from kdx.intervals import Interval
from kdx.networks.capture import gradients

MISFIT = 0.025  # standard deviation of the error of `transferred_strength`, on plantings
PER_ANSWER = 15  # images for each answer of base and teacher: with fewer, shares come out too low by over 0.005
PARTS = {  # of the variance of the student, and of its teacher
    "student": ("base", "handed over", "own", "handed over, of unexplained"),
    "teacher": ("base", "taken", "not taken", "taken, of unexplained"),
}


@dataclass(frozen=True)
class Transferred:
    """Maps of the unexplained features that make the handed-over answer of a student.

    Values are in the unit of :class:`kdx.Unexplained`, the mean energy of the student's answers.

    Attributes:
        distilled: Stage -> float32 map (n, h, w) >= 0, at the student's resolution.
    """

    distilled: dict[str, Tensor]

    @property
    def fused(self) -> Tensor:
        """One map (n, h, w) >= 0 from those of all stages, see :func:`kdx.explain.unexplained.fuse`."""
        return fuse(self.distilled)


def transferred_share(
    reference: Reference | Mapping[str, Reference],
    images: Tensor | tuple[Tensor, ...] | None = None,
    *,
    folds: int = 10,
    seed: int = 0,
    of: Collection[str] = tuple(PARTS),
) -> pd.DataFrame:
    r"""The parts of the variance of a student's answers, and of its features at each stage: what the base can express,
    what beyond that the teacher can (*handed over*), and what neither can (*own*).

    With student S, base B and teacher T, each is regressed on B, and what is left over of S on what is left over of T
    (Frisch & Waugh 1933). With :math:`R^2_b` the share of the variance that B predicts, and :math:`R^2_{bt}` that B
    and T predict,

    .. math:: \text{handed over} = R^2_{bt} - R^2_b, \qquad
              \tau = \frac{R^2_{bt} - R^2_b}{1 - R^2_b},

    where :math:`\tau` is *handed over, of unexplained*. The same with S and T exchanged tells what the student has
    *taken* of what the teacher knows beyond the base, and what not.

    Everything is cross-fitted: the images are divided into folds, and each is predicted by regressions on all others.
    A teacher that has nothing to do with the student, such as one that was shown other images, thus gets about 0 (less
    than 0.01 in simulations with 300 images and 10 to 40 answers; up to 0.02 if the base's answers are nearly
    collinear). With fewer than 15 images for each answer of base and teacher, the ridge shrinks away some of what was
    handed over: 0.02 of the variance with 7 or 8 images, 0.06 with 4, which the interval does not hold.
    Features also tell where in the image they are, which any network knows from its padding. And no share says by
    itself that something was handed over: networks trained on the same images have more in common than their base
    tells. Compare a second base in the student's place.

    Args:
        reference: Made with a teacher; or several by name, with as many images, of which a network that several have,
            such as their base or teacher, runs once on images that are the same tensor.
        images: (n, c, h, w), or a tuple of three; None takes the reference's. All the more images, the better.
        folds: At least 3.
        seed: Draws the folds.
        of: ``student``, ``teacher`` or both.

    Returns:
        network (of several references), of (student or teacher), stage (those that all three have, and ``answer``),
        part, value, low, high, n (images), folds, and parts, (folds,) values of which this is the mean with its t
        interval. Shares of a variance, in [0, 1] but for the error of the estimate; NaN where nothing varies. The 95 %
        interval is over the images, as for :func:`kdx.unexplained_share`.

    Raises:
        ValueError: A reference without a teacher, fewer than 3 folds or more than images, or networks whose weights
            changed.

    Warns:
        FitWarning: Fewer images to fit on than 15 for each answer of base and teacher.

    Examples:
        >>> import kdx, torch
        >>> networks = [kdx.build("resnet10", 3, "small", 0.125, seed=i) for i in range(3)]
        >>> images = torch.rand(150, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        >>> reference = kdx.Reference(*networks[:2], images, teacher=networks[2])
        >>> table = kdx.transferred_share(reference, folds=3)
        >>> table["part"].unique()[:4].tolist()
        ['base', 'handed over', 'own', 'handed over, of unexplained']
    """
    several = reference if isinstance(reference, Mapping) else {"": reference}
    inputs = [_checked(one, images, folds) for one in several.values()]
    if len(lengths := {len(x[0]) for x in inputs}) != 1:
        raise ValueError(f"reference: expected one or more with as many images each, got images {sorted(lengths)}")
    (n,) = lengths
    tables = {}
    for name, parts in zip(several, parts_of([*several.values()], inputs, folds, seed), strict=True):
        warn_if_few_answered(n - n // folds, len(parts[0]["student"][ANSWER].x), 3, PER_ANSWER)
        tables[name] = _table(parts, of, n)
    if not isinstance(reference, Mapping):
        return tables[""]
    return pd.concat(tables, names=["network"]).reset_index("network").reset_index(drop=True)


def _table(folds: list[dict[str, dict[str, Moments]]], of: Collection[str], n: int) -> pd.DataFrame:
    """What :func:`transferred_share` returns, from the moments of each fold of n images."""
    table = []
    for whose in of:
        for stage in folds[0][whose]:
            k = len(folds[0]["student"][stage].x) - len(folds[0]["teacher"][stage].y)
            found = _shares([part[whose][stage] for part in folds], k)
            for name, (interval, values) in zip(PARTS[whose], found, strict=True):
                table.append((whose, stage, name, *interval[:3], n, len(folds), values))
    return pd.DataFrame(table, columns=["of", "stage", "part", "value", "low", "high", "n", "folds", "parts"])


def _shares(folds: list[Moments], k: int) -> list[Any]:
    """The four of ``PARTS``, each as :func:`kdx.explain.regression.share` gives it."""
    spread, left, last = errors_beyond(folds, k)
    ratios = ((spread - left, spread), (left - last, spread), (last, spread), (left - last, left))
    return [share(of, whole) for of, whole in ratios]


def transferred_strength(
    reference: Reference, images: Tensor | tuple[Tensor, ...] | None = None, *, folds: int = 10, seed: int = 0
) -> Interval:
    r"""How strongly a student answers as its teacher does, beyond its base: 1 for as strongly.

    With :math:`r_s` and :math:`r_t` what the base leaves unexplained of the two answers,

    .. math:: \sum \langle r_s, r_t \rangle \,/\, \sum \lVert r_t \rVert^2,

    a slope, where :func:`transferred_share` gives shares of a variance, which tell how exactly the student follows but
    not how far. The base explains by its logits and its probabilities, cross-fitted as there.

    On plantings, a repainted cue changes the answer of student and teacher, and the slope of one change on the other
    is the truth. This estimate is off by 0.025, one standard deviation, mostly too low where much was taken, since the
    teacher also has peculiarities that a student does not take. The interval allows for an error of that size. On
    photographs, good networks err alike, so a network without this teacher is well above 0: compare a second base in
    the student's place.

    Args:
        reference: Made with a teacher that has the student's classes in the same order.
        images: As for :func:`transferred_share`; likewise folds and seed.

    Returns:
        The slope with its 95 % interval and the number of folds; NaN where the teacher answers nothing beyond the base.

    Raises:
        ValueError: A teacher with other classes, and as for :func:`transferred_share`.

    Warns:
        FitWarning: Fewer images to fit on than six per class.

    Examples:
        >>> import kdx, torch
        >>> networks = [kdx.build("resnet10", 3, "small", 0.125, seed=i) for i in range(3)]
        >>> images = torch.rand(60, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        >>> reference = kdx.Reference(*networks[:2], images, teacher=networks[2])
        >>> strength = kdx.transferred_strength(reference)
        >>> strength.low < strength.mean < strength.high
        True
    """
    return answered_strength(*reference.answers_of(*_checked(reference, images, folds)), folds=folds, seed=seed)


def answered_strength(student: Tensor, base: Tensor, teacher: Tensor, *, folds: int = 10, seed: int = 0) -> Interval:
    """:func:`transferred_strength` from logits (n, classes) of the three networks for the same images."""
    if student.shape != teacher.shape:
        raise ValueError(f"teacher: expected the {student.shape[1]} classes of the student, got {teacher.shape[1]}")
    if len(base) != len(student):
        raise ValueError(
            f"base: expected answers to the student's {len(student)} images, got {len(base)}; ask it again"
        )
    _check_folds(folds, len(student))
    of, base, teacher = (centre_logits(z.double()) for z in (student, base, teacher))
    both = torch.cat([base, -base], 1) / 2 if base.shape[1] == 1 else base  # one output stands for two classes
    probabilities = both.softmax(1)[:, : base.shape[1]]
    varies = probabilities.std()
    given = torch.cat([base, probabilities * (base.std() / varies if varies > 0 else 0.0), teacher], 1)
    warn_if_few_answered(len(of) - len(of) // folds, given.shape[1], 3)
    order = torch.randperm(len(of), generator=torch.Generator().manual_seed(seed)).to(of.device)
    parts = [Moments.of(of[rows], given[rows]) for rows in order.tensor_split(folds)]
    slope, _ = slope_beyond(parts, 2 * base.shape[1])
    half = math.hypot(slope.high - slope.mean, 1.96 * MISFIT)
    return Interval(slope.mean, slope.mean - half, slope.mean + half, folds)


def _checked(reference: Reference, images: Tensor | tuple[Tensor, ...] | None, folds: int) -> tuple[Tensor, ...]:
    """The images of all three networks."""
    check_teacher(reference)
    reference.check_weights()
    all_three = reference.inputs if images is None else inputs_of(images, 3)
    _check_folds(folds, len(all_three[0]))
    return all_three


def _check_folds(folds: int, n: int) -> None:
    if not 3 <= folds <= n:
        raise ValueError(f"folds: expected 3 to {n}, the number of images, got {folds}")


def transferred(
    reference: Reference, images: Tensor | tuple[Tensor, ...], *, window: float = WINDOW, batch_size: int = 64
) -> Transferred:
    r"""Maps of the unexplained features that make the handed-over answer of a student. No labels are used.

    Over the reference set, ridge regressions with intercept predict the student's and the teacher's logits from the
    base's, and what is left over of the student's from what is left over of the teacher's. This prediction,
    :math:`r`, is the handed-over answer. With E as in :func:`kdx.unexplained`,

    .. math:: c_{hw} = \frac{1}{S} \sum_k \frac{\partial}{\partial A_{khw}} \langle z, r \rangle\, E_{khw},
              \qquad \mathrm{map} = \mathrm{ReLU}(\bar c):

    which features that the base cannot express make that part of the answer. The teacher's features are not needed.

    Args:
        reference: Made with a teacher.
        images: (n, c, h, w), normalised as the networks expect; or a tuple, the student's, the base's, the teacher's.
        window: As for :func:`kdx.unexplained`.
        batch_size: Images explained at a time.

    Returns:
        Raw maps per stage.

    Raises:
        ValueError: A reference without a teacher, and as for :func:`kdx.unexplained`.

    Warns:
        FitWarning: Fewer reference images than two per answer of base and teacher.

    Examples:
        >>> import kdx, torch
        >>> networks = [kdx.build("resnet10", 3, "small", 0.125, seed=i) for i in range(3)]
        >>> images = torch.rand(12, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        >>> reference = kdx.Reference(*networks[:2], images, teacher=networks[2])
        >>> tuple(kdx.transferred(reference, images[:2]).fused.shape)
        (2, 32, 32)
    """
    check_teacher(reference)
    if not 0 <= window <= 1:
        raise ValueError(f"window: expected a share of the map's side, 0 to 1, got {window}")
    found: dict[str, list[Tensor]] = {stage: [] for stage in reference.stages}
    with torch.inference_mode(False):
        plain = (x.clone() if x.is_inference() else x for x in inputs_of(images, 3))
        for x in zip(*(part.split(batch_size) for part in plain), strict=True):
            for stage, contribution in handed_over(reference, x).items():
                found[stage].append(smooth(contribution, window).relu())
    return Transferred({stage: torch.cat(maps) for stage, maps in found.items()})


def handed_over(reference: Reference, x: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Signed contributions to the handed-over answer: stage -> (n, h, w).

    Args:
        reference: Made with a teacher.
        x: Images for student, base and teacher.
    """
    reference.check_weights()
    fitted = reference.regressions["distilled"]
    if not fitted[ANSWER].spread > 0:
        raise ValueError("the student gives the same answer to every image of the reference")
    answer = reference.beyond(*reference.answers_of(*x)[1:])
    slopes = gradients(
        reference.networks[0], x[0], lambda z: (centre_logits(z.float()) * answer).sum(), reference.layers[0]
    )
    others = reference.features_of(*x[:2])
    return {
        stage: (gradient * fitted[stage].left_over(activation, others[stage][1])).sum(1) / fitted[ANSWER].spread
        for stage, (activation, gradient) in slopes.items()
    }


def check_teacher(reference: Reference) -> None:
    """Raise ValueError if a reference has no teacher."""
    if len(reference.networks) < 3:
        raise ValueError("reference: expected one with a teacher; make it with kdx.Reference(..., teacher=...)")
