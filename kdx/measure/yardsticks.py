"""Yardsticks of interpretability: what each of them says of a network, and whether they agree.

After Han et al. (2023, section 5): scores of saliency maps against masks, and where the gradients of the loss lie. A
score is one number for each image, so networks can be compared image by image.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor, nn

from kdx.data.dataset import Dataset
from kdx.data.folders import UNKNOWN
from kdx.explain.input_gradients import edges, loss_gradients, saliency
from kdx.measure.localisation import auroc, binary_scores, five_band, mass_on, rank_agreement, soft_five_band

REGIONS = {"object": 1, "part": 2}  # the smallest label of a mask that belongs to the region


def map_scores(maps: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """All scores of saliency maps against a mask.

    Args:
        maps: Raw maps (n, h, w) >= 0.
        truth: uint8 (n, H, W): 0 background, 1 object, 2 its distinguishing part. A region that occurs in no mask has
            no scores; without a part there are no five-band scores.

    Returns:
        Score -> float64 (n,): those of :func:`kdx.measure.localisation.five_band` by the original definition, its soft
        version (``"soft recall"``) and our own (``"own recall"``), and those of
        :func:`kdx.measure.localisation.binary_scores` for each region (``"part: F1"``).
    """
    _check_known(truth)
    bands = truth.long()
    found: dict[str, Tensor] = {}
    if (truth == max(REGIONS.values())).any():
        found |= five_band(maps, bands, "original")
        found |= {f"soft {name}": values for name, values in soft_five_band(maps, bands).items()}
        found |= {f"own {name}": values for name, values in five_band(maps, bands).items()}
    return found | {
        f"{region}: {name}": values
        for region, lowest in REGIONS.items()
        if (truth >= lowest).any()
        for name, values in binary_scores(maps, truth >= lowest).items()
    }


def gradient_scores(maps: Tensor, images: Tensor, truth: Tensor | None) -> dict[str, Tensor]:
    """Where the gradients of the loss lie: on the masks, and on edges.

    Args:
        maps: Sizes of gradients (n, h, w) >= 0.
        images: (n, c, h, w).
        truth: As for :func:`map_scores`; None: no masks.

    Returns:
        Score -> float64 (n,): mass and AUROC on each region (``"loss gradient, mass on object"``), and
        ``"loss gradient, on edges"``, the rank correlation with Sobel's edges.
    """
    if truth is not None:
        _check_known(truth)
    found = {"on edges": rank_agreement(maps, edges(images))}
    for region, lowest in REGIONS.items():
        if truth is not None and (where := truth >= lowest).any():
            found |= {f"mass on {region}": mass_on(maps, where.byte()), f"AUROC on {region}": auroc(maps, where)}
    return {f"loss gradient, {name}": values for name, values in found.items()}


def network_scores(model: nn.Module, dataset: Dataset, truth: Tensor | None = None) -> dict[str, Tensor]:
    """What all yardsticks that need no training say of a network.

    Args:
        model: It runs in evaluation mode, and is left as it was found.
        dataset: Images with the true classes, whose logits are explained.
        truth: Masks (n, H, W) instead of the dataset's, as for :func:`map_scores`.

    Returns:
        Score -> float64 (n,): those of :func:`map_scores` for the saliency map, and those of :func:`gradient_scores`.
    """
    x, y = dataset.card.normalize(dataset.images), dataset.labels
    truth = dataset.masks if truth is None else truth
    scores = {} if truth is None else map_scores(saliency(model, x, y).sum(1), truth)
    return scores | gradient_scores(loss_gradients(model, x, y).abs().sum(1), x, truth)


def baselines(dataset: Dataset, seed: int = 0) -> dict[str, dict[str, Tensor]]:
    """The same scores of maps that ask no network: edges, a constant, random values, and the mask itself.

    Args:
        dataset: Images with masks.
        seed: Of the random maps.

    Returns:
        Map -> score -> float64 (n,). The mask is the best map there is: 0, 1/2 and 1 where the truth is 0, 1 and 2.
    """
    if dataset.masks is None:
        raise ValueError("dataset: expected images with masks, got none")
    x, truth = dataset.card.normalize(dataset.images), dataset.masks
    random = torch.rand(truth.shape, generator=torch.Generator().manual_seed(seed))
    maps = {"edges": edges(x), "constant": torch.ones_like(random), "random": random, "the mask": truth / 2}
    return {name: map_scores(of, truth) | gradient_scores(of, x, truth) for name, of in maps.items()}


def rank_correlations(
    table: pd.DataFrame, by: str, names: Sequence[str], against: str, draws: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """Do yardsticks order networks as something else does? Spearman's rank correlation, with bootstrap intervals.

    Args:
        table: One row for each network (or network and cue), with a column for each of ``names`` and for ``against``.
        by: The column of what is drawn, with all its rows: the networks.
        names: The yardsticks.
        against: The column to compare them with.
        draws: Of the bootstrap.
        seed: Of these draws.

    Returns:
        Index yardstick; value, low, high (percentiles, 95 %, over the groups of ``by``), n (rows). NaN where a column
        is constant or holds NaN; draws in which it is constant are left out.
    """
    groups = [group.index.to_numpy() for _, group in table.reset_index(drop=True).groupby(by, sort=False)]
    rng = np.random.default_rng(seed)
    chosen = [np.concatenate([groups[i] for i in rng.integers(len(groups), size=len(groups))]) for _ in range(draws)]
    columns = table[[*names, against]].to_numpy(dtype=float)
    whole, drawn = _spearman(columns), np.array([_spearman(columns[rows]) for rows in chosen])
    rows = {}
    for i, name in enumerate(names):
        found = drawn[~np.isnan(drawn[:, i]), i]
        known = len(found) and not np.isnan(whole[i])
        ends = np.quantile(found, [0.025, 0.975]) if known else [math.nan] * 2
        rows[name] = [whole[i], *ends, len(columns)]
    return pd.DataFrame.from_dict(rows, orient="index", columns=["value", "low", "high", "n"]).rename_axis("yardstick")


def _spearman(columns: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of each column (n, k + 1) but the last with the last: (k,); NaN where one is constant or has NaN."""
    ranks = stats.rankdata(columns, axis=0)
    ranks = ranks - ranks.mean(0)
    length = np.sqrt((ranks**2).sum(0))
    both = length[:-1] * length[-1]
    return np.divide(ranks[:, :-1].T @ ranks[:, -1], both, out=np.full_like(both, math.nan), where=both > 0)


def _check_known(truth: Tensor) -> None:
    if unknown := int((truth == UNKNOWN).flatten(1).any(1).sum()):
        raise ValueError(f"truth: expected masks of all images, got {unknown} of {len(truth)} unknown; leave these out")


def means(scores: Mapping[str, Tensor]) -> dict[str, float]:
    """The mean of each score over the images that have it."""
    return {name: float(values.nanmean()) for name, values in scores.items()}
