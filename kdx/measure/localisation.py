"""Does a saliency map lie where it should? Scores of maps against masks.

Every score takes raw maps (n, h, w) >= 0 of any resolution and a bool truth (n, H, W), and gives one number per image.
Cells of a coarser map stand for all the pixels that they cover.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kdx.data.folders import UNKNOWN

BANDS = (0.3, 0.7)  # of a map's maximum: below the first nothing, above the second the essence


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
    order = fine.sort(1).values
    below, upto = (torch.searchsorted(order, fine, side=side) for side in ("left", "right"))
    ranks = (below + upto + 1) / 2  # the mean rank of equal values, from 1
    positive, negative = hit.sum(1).double(), (~hit).sum(1).double()
    wins = (ranks.double() * hit).sum(1) - positive * (positive + 1) / 2
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


def five_band(maps: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """Five-band scores (Tjoa & Guan 2020) of maps against a ternary truth.

    A map is scaled by its maximum and cut at ``BANDS`` into 0, 1 and 2; the two negative bands stay empty, since maps
    are not negative.

    Args:
        maps: Raw maps (n, h, w) >= 0.
        truth: Integers (n, H, W): 0 background, 1 other objects, 2 the target.

    Returns:
        pixel accuracy; recall and precision, of the pixels that are not background and have the right band; false
        positive rate, of the background that has a band; each (n,) in [0, 1]. Precision is NaN where a map is 0
        everywhere.
    """
    fine, truth = _on_pixels(maps, truth), truth.flatten(1)
    scaled = fine / fine.amax(1, keepdim=True).clamp(min=torch.finfo(fine.dtype).tiny)
    band = torch.bucketize(scaled, fine.new_tensor(BANDS), right=True)
    right = band == truth
    hit, shown, empty = (right & (truth > 0)).sum(1).double(), (band > 0).sum(1), truth == 0
    return {
        "pixel accuracy": right.double().mean(1),
        "recall": hit / (truth > 0).sum(1),
        "precision": torch.where(shown > 0, hit / shown, math.nan),
        "false positive rate": (empty & (band > 0)).sum(1).double() / empty.sum(1),
    }


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


def _on_pixels(maps: Tensor, truth: Tensor) -> Tensor:
    """Maps (n, h, w) as float64 (n, H * W) on the pixels of the truth."""
    if maps.ndim != 3 or truth.ndim != 3 or len(maps) != len(truth):
        shapes = f"{tuple(maps.shape)} and {tuple(truth.shape)}"
        raise ValueError(f"expected maps (n, h, w) and truth (n, H, W), got {shapes}")
    if not ((maps >= 0) & maps.isfinite()).all():
        raise ValueError("expected finite maps without negative values")
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
