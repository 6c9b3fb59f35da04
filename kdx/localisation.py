"""Does a saliency map lie where it should? Scores of maps against masks.

Every score takes raw maps (n, h, w) >= 0 of any resolution and a bool truth (n, H, W), and gives one
number an image. Cells of a coarser map stand for all the pixels they cover.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kdx.saliency import mass_on

BANDS = (0.3, 0.7)  # of a map's maximum: below the first nothing, above the second the essence


def pointing_game(maps: Tensor, truth: Tensor) -> Tensor:
    """The share of the maps' highest pixels that lie on the truth (Zhang et al. 2018): (n,) in [0, 1].

    A constant map points everywhere: chance, the share that the truth covers.
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

    A map is scaled by its maximum and cut at ``BANDS`` into 0, 1 and 2; the two negative bands stay
    empty, since maps are not negative.

    Parameters
    ----------
    truth : integers (n, H, W): 0 background, 1 other objects, 2 what the map should show.

    Returns
    -------
    dict : pixel accuracy; recall and precision, of the pixels that are not background and have the right
        band; false positive rate, of the background that has a band; each (n,) in [0, 1]. Precision is NaN
        where a map is 0 everywhere.
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
    """All scores of maps that should lie on some cues of :mod:`kdx.planted` and not on others.

    A map that is 0 everywhere tells no place from another, and is scored as one that is 1 everywhere: at chance.

    Parameters
    ----------
    masks : uint8 (n, H, W), of which each bit is set where a cue lies.
    target, others : bits of the cues.

    Returns
    -------
    dict : score -> float64 (n,): mass on target, mass on each of the others,
        pointing game, AUROC, AUPRC, and those of :func:`five_band`.
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
