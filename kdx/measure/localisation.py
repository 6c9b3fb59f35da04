"""Does a saliency map lie where it should? Scores of maps against masks.

Every score takes raw maps (n, h, w) >= 0 of any resolution and a bool truth (n, H, W), and gives one number per image.
Cells of a coarser map stand for all the pixels that they cover.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor

from kdx.data.folders import UNKNOWN
from kdx.explain.grad_cam import agreement

BANDS = (0.3, 0.7)  # of a map's maximum: below the first nothing, above the second the essence
DEFINITIONS = ("own", "original")
STEPS = 11  # of the soft scores: both thresholds move towards 0 by 0.02
THRESHOLDS = tuple(i / 10 for i in range(1, 10))  # of a map's maximum, for precision, recall and F1


def pointing_game(maps: Tensor, truth: Tensor) -> Tensor:
    """The share of a map's highest pixels that lie on the truth (Zhang et al. 2018): (n,) in [0, 1].

    A constant map is at chance, the share of the image that the truth covers.
    """
    fine = _on_pixels(maps, truth)
    highest = fine == fine.amax(1, keepdim=True)
    return (highest & truth.flatten(1)).sum(1).double() / highest.sum(1)


def auroc(maps: Tensor, truth: Tensor) -> Tensor:
    """Area under the ROC curve of the pixels: (n,) in [0, 1], 0.5 is chance; ties count one half.

    NaN where the truth is empty or everything.
    """
    fine, hit = _on_pixels(maps, truth), truth.flatten(1)
    ranks = _ranks(fine)
    positive, negative = hit.sum(1).double(), (~hit).sum(1).double()
    wins = (ranks * hit).sum(1) - positive * (positive + 1) / 2
    return torch.where(positive * negative > 0, wins / (positive * negative), math.nan)


def auprc(maps: Tensor, truth: Tensor) -> Tensor:
    """Average precision of the pixels: (n,) in [0, 1]; chance is the share that the truth covers.

    NaN where the truth is empty.
    """
    fine, hit = _on_pixels(maps, truth), truth.flatten(1)
    values, order = fine.sort(1, descending=True)
    found = hit.gather(1, order).cumsum(1)
    # equal values are found at once: precision and recall are those after the last of them
    last = torch.searchsorted(-values, -values, side="right") - 1
    found = found.gather(1, last).double()
    steps = found.diff(dim=1, prepend=torch.zeros_like(found[:, :1]))
    positive = hit.sum(1).double()
    return torch.where(positive > 0, (steps * found / (last + 1)).sum(1) / positive, math.nan)


def five_band(
    maps: Tensor, truth: Tensor, definition: str = "own", bands: tuple[float, float] = BANDS
) -> dict[str, Tensor]:
    """Five-band scores (Tjoa & Guan 2020) of maps against a ternary truth.

    A map is scaled by its largest absolute value and cut at ``bands`` into 0, 1 and 2, and below 0 likewise into -1
    and -2. Two definitions differ in what they count:

    - ``"own"``: recall and precision are shares of the pixels that are not background, in the truth or in the map, and
      have the right band; the false positive rate is the share of the background that has a band. Maps are not
      negative. A value of exactly 0.3 is in band 1.
    - ``"original"``, of the authors' code: a pixel in the wrong band is a false positive, whatever it should be. With
      TP the pixels of a right band other than 0, FP those of a wrong one, TN those that are rightly 0 and FN those that
      should not be 0, recall is TP / (TP + FN), precision TP / (TP + FP) and the false positive rate FP / (FP + TN); a
      quotient of nothing is 0. Maps may have a sign. A value of exactly 0.3 is in band 0, one of -0.3 in band -1.

    Args:
        maps: Raw maps (n, h, w).
        truth: Integers (n, H, W): 0 background, 1 other objects, 2 the target.
        definition: ``"own"`` or ``"original"``.
        bands: Both thresholds, as shares of the maximum.

    Returns:
        pixel accuracy, recall, precision, false positive rate; each (n,) in [0, 1]. By our own definition, precision is
        NaN where a map is 0 everywhere, and recall where the truth is.

    Raises:
        ValueError: An unknown definition, or maps and truth that do not fit.
    """
    if definition not in DEFINITIONS:
        raise ValueError(f"unknown definition {definition!r}; choose from: {', '.join(DEFINITIONS)}")
    original = definition == "original"
    fine, truth = _on_pixels(maps, truth, signed=original), truth.flatten(1)
    scaled = fine / fine.abs().amax(1, keepdim=True).clamp(min=torch.finfo(fine.dtype).tiny)
    edges = fine.new_tensor([-bands[1], -bands[0], *bands])
    band = torch.bucketize(scaled, edges, right=not original) - 2
    right, shown, wanted = band == truth, band != 0, truth != 0
    hit, wrong = (right & wanted).sum(1).double(), (shown & ~right).sum(1)
    found = {"pixel accuracy": right.double().mean(1)}
    if original:
        missed, empty = (~shown & wanted).sum(1), (~shown & ~wanted).sum(1)
        counts = {"recall": (hit, missed), "precision": (hit, wrong), "false positive rate": (wrong.double(), empty)}
        return found | {name: part / (part + rest).clamp(min=1) for name, (part, rest) in counts.items()}
    return found | {
        "recall": hit / wanted.sum(1),
        "precision": torch.where(shown.any(1), hit / shown.sum(1), math.nan),
        "false positive rate": (shown & ~wanted).sum(1).double() / (~wanted).sum(1),
    }


def soft_five_band(maps: Tensor, truth: Tensor, definition: str = "original") -> dict[str, Tensor]:
    """:func:`five_band` at ``STEPS`` pairs of thresholds, from 0.3 and 0.7 down to 0.1 and 0.5.

    Returns:
        Each score, the mean over the thresholds, and ``"<score>, maximum"``, the largest of them; (n,) each. The
        maximum of the false positive rate is the worst, not the best.
    """
    steps = [tuple(edge - 0.02 * i for edge in BANDS) for i in range(STEPS)]
    found = [five_band(maps, truth, definition, (low, high)) for low, high in steps]
    stacked = {name: torch.stack([of[name] for of in found]) for name in found[0]}
    maxima = {f"{name}, maximum": of.amax(0) for name, of in stacked.items()}
    return {name: of.mean(0) for name, of in stacked.items()} | maxima


def binary_scores(maps: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """Scores of maps against one region: areas under curves, and precision, recall and F1 over ``THRESHOLDS``.

    A pixel is shown at a threshold t if its value is at least t times the map's maximum. A map that is 0 everywhere is
    scored like one that is 1 everywhere.

    Args:
        maps: Raw maps (n, h, w) >= 0.
        truth: bool (n, H, W).

    Returns:
        AUROC, AUPRC; precision, recall and F1, means over the thresholds; ``"<score>, maximum"`` of these three, the
        largest over the thresholds; (n,) in [0, 1] each. NaN where the truth is empty; AUROC also where it is
        everything.
    """
    fine, hit = _on_pixels(maps, truth), truth.flatten(1)
    shares = torch.where(fine.amax(1, keepdim=True) > 0, fine / fine.amax(1, keepdim=True), 1.0)
    positive = torch.where(hit.any(1), hit.sum(1).double(), math.nan)
    rows: dict[str, list[Tensor]] = {"precision": [], "recall": [], "F1": []}
    for threshold in THRESHOLDS:
        shown = shares >= threshold
        found, count = (shown & hit).sum(1), shown.sum(1)
        rows["precision"].append(found / count + 0 * positive)
        rows["recall"].append(found / positive)
        rows["F1"].append(2 * found / (count + positive))
    stacked = {name: torch.stack(of) for name, of in rows.items()}
    maxima = {f"{name}, maximum": of.amax(0) for name, of in stacked.items()}
    areas = {"AUROC": auroc(maps, truth), "AUPRC": auprc(maps, truth)}
    return areas | {name: of.mean(0) for name, of in stacked.items()} | maxima


def rank_agreement(first: Tensor, second: Tensor) -> Tensor:
    """Spearman's rank correlation over the pixels of two maps of each image, ties at their mean rank.

    Args:
        first: (n, h, w).
        second: Likewise.

    Returns:
        float64 (n,) in [-1, 1]; NaN where a map is constant.
    """
    if first.shape != second.shape or first.ndim != 3:
        raise ValueError(f"expected two (n, h, w) of one shape, got {tuple(first.shape)} and {tuple(second.shape)}")
    return agreement(*(_ranks(maps.double().flatten(1)).view(maps.shape) for maps in (first, second)))


def localisation(maps: Tensor, masks: Tensor, target: int, others: int) -> dict[str, Tensor]:
    """All scores of maps that should lie on some cues of :mod:`kdx.data.cues` and not on others.

    A map that is 0 everywhere is scored like one that is 1 everywhere: at chance.

    Args:
        maps: Raw maps (n, h, w) >= 0.
        masks: uint8 (n, H, W), in which bit i is set where cue i lies.
        target: Bits of the cues on which maps should lie.
        others: Bits of the other cues.

    Returns:
        Score -> float64 (n,): mass on target, mass on each of the others, pointing game, AUROC, AUPRC, and those of
        :func:`five_band`.
    """
    empty = maps.flatten(1).amax(1) == 0
    maps = torch.where(empty[:, None, None], torch.ones_like(maps), maps)
    truth = (masks & target) > 0
    ternary = (masks > 0).long() + truth
    mass = {"mass on target": mass_on(maps, truth.byte())}
    for bit in range(8):
        if others >> bit & 1:
            mass[f"mass on cue {bit}"] = mass_on(maps, masks & (1 << bit))
    return mass | {
        "pointing game": pointing_game(maps, truth),
        "AUROC": auroc(maps, truth),
        "AUPRC": auprc(maps, truth),
        **five_band(maps, ternary),
    }


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 1 within each row of (n, m), float64; equal values have their mean rank."""
    return torch.from_numpy(stats.rankdata(values.detach().cpu().numpy(), axis=1)).to(values.device)


def _on_pixels(maps: Tensor, truth: Tensor, signed: bool = False) -> Tensor:
    """Maps (n, h, w) as float64 (n, H * W) on the pixels of the truth."""
    if maps.ndim != 3 or truth.ndim != 3 or len(maps) != len(truth):
        shapes = f"{tuple(maps.shape)} and {tuple(truth.shape)}"
        raise ValueError(f"expected maps (n, h, w) and truth (n, H, W), got {shapes}")
    if not (((maps >= 0) | signed) & maps.isfinite()).all():
        raise ValueError(f"expected finite maps{'' if signed else ' without negative values'}")
    return F.interpolate(maps[:, None].double(), truth.shape[1:], mode="nearest-exact").flatten(1)


def mass_on(maps: Tensor, masks: Tensor) -> Tensor:
    """The share of each map's mass that lies on the object: (n,) in [0, 1].

    Every cell of a map counts by the share of its area that the object covers. A map of ones gives the share of the
    image that the object covers, for comparison.

    Args:
        maps: Raw maps (n, h, w) >= 0.
        masks: uint8 (n, H, W), 0 where there is no object; 255 throughout for an unknown mask.

    Returns:
        float64 (n,); NaN where a map is 0 everywhere, and for images without an object or a mask.
    """
    if maps.ndim != 3 or masks.ndim != 3 or len(maps) != len(masks) or masks.dtype != torch.uint8:
        raise ValueError(
            f"expected maps (n, h, w) and uint8 masks (n, H, W), got {tuple(maps.shape)} and {masks.dtype} "
            f"{tuple(masks.shape)}"
        )
    object_ = ((masks > 0) & (masks < UNKNOWN)).double()
    down, across = (_cells(fine, coarse) for fine, coarse in zip(masks.shape[1:], maps.shape[1:], strict=True))
    covered = (down @ object_ @ across.T).flatten(1)
    mass = maps.double().flatten(1)
    known = (mass.sum(1) > 0) & (covered.sum(1) > 0)
    return torch.where(known, (mass * covered).sum(1) / mass.sum(1), math.nan)


def _cells(fine: int, coarse: int) -> Tensor:
    """(coarse, fine): the share of each cell of a coarse grid that each cell of a fine one covers."""
    edges = torch.arange(coarse + 1, dtype=torch.float64)[:, None] * fine / coarse
    left = torch.arange(fine, dtype=torch.float64)
    overlap = torch.minimum(edges[1:], left + 1) - torch.maximum(edges[:-1], left)
    return overlap.clamp(min=0) * coarse / fine
