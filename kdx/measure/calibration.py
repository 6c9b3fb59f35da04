"""How far the probabilities of a classifier can be trusted."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdx.data.batches import class_indices
from kdx.intervals import share_interval

BINS = 15
SCORES = ("ECE", "Brier", "NLL")


def calibration(
    probabilities: Mapping[str, Tensor], labels: Tensor, *, bins: int = BINS, draws: int = 999, seed: int = 0
) -> pd.DataFrame:
    r"""Scores of the probabilities of several networks over the same images; less is better.

    ``ECE``, the expected calibration error :math:`\sum_b \frac{n_b}{n} \lvert \mathrm{acc}_b - \mathrm{conf}_b \rvert`
    over bins of equally many images by confidence (Nixon et al. 2019), in [0, 1]; it is above 0 even for a calibrated
    network, the more so the fewer images. ``Brier``, :math:`\sum_c (p_c - y_c)^2`, in [0, 2]. ``NLL``, the negative
    log-likelihood, in nats.

    Args:
        probabilities: Network -> (n, classes).
        labels: (n,) class indices.
        bins: Of the ECE; fewer where there are fewer than ten images for each.
        draws: Of the bootstrap over images, the same for all networks.
        seed: Of the draws.

    Returns:
        network, score, value, low, high, and difference, difference low, difference high: the value of the first
        network minus this one's. 95 % percentile intervals of the bootstrap, widened to hold the value: as the ECE is
        too large in a sample, it is larger still in a sample of the sample, so its interval errs to the high side.

    Raises:
        ValueError: Probabilities that do not fit the labels.

    Examples:
        >>> import torch
        >>> labels = torch.arange(40) % 2
        >>> sure = torch.eye(2)[labels]
        >>> table = calibration({"sure": sure, "unsure": 0 * sure + 0.5}, labels)
        >>> table.query("score == 'Brier'")["value"].tolist()
        [0.0, 0.5]
    """
    y = class_indices(labels).numpy()
    n = len(y)
    drawn_images = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / max(n, 1)), draws)
    weights = np.concatenate([np.ones((1, n)), drawn_images.astype(float)])
    found = {}
    for role, given in probabilities.items():
        p = given.double().numpy()
        if p.ndim != 2 or len(p) != n or not n or y.max() >= p.shape[1]:
            raise ValueError(f"probabilities: expected (n, classes) for {n} labels of the {role}, got {p.shape}")
        hits = np.eye(p.shape[1])[y]
        per_image = {"Brier": ((p - hits) ** 2).sum(1), "NLL": -np.log(np.clip(p[np.arange(n), y], 1e-300, None))}
        drawn = {name: weights @ values / n for name, values in per_image.items()}
        found[role] = drawn | {"ECE": _errors(p.max(1), p.argmax(1) == y, weights, _bins(n, bins))}
    rows = []
    first = next(iter(found))
    for role, drawn in found.items():
        for score in SCORES:
            difference = (np.nan,) * 3 if role == first else _interval(found[first][score] - drawn[score])
            rows.append([role, score, *_interval(drawn[score]), *difference])
    columns = ["network", "score", "value", "low", "high", "difference", "difference low", "difference high"]
    return pd.DataFrame(rows, columns=columns)


def reliability(probabilities: Tensor, labels: Tensor, bins: int = BINS) -> pd.DataFrame:
    """Confidence and accuracy in bins of equally many images: confidence (mean probability of the answer), value
    (share of right answers), low, high (exact 95 % interval), n."""
    confidence, answers = probabilities.detach().cpu().double().max(1)
    order = torch.from_numpy(_by_confidence(confidence.numpy()))
    rows = []
    for part in order.tensor_split(_bins(len(order), bins)):
        right = share_interval(answers[part] == labels[part], method="exact")
        rows.append((float(confidence[part].mean()), *right))
    return pd.DataFrame(rows, columns=["confidence", "value", "low", "high", "n"])


def _by_confidence(confidence: NDArray[np.float64]) -> NDArray[np.int64]:
    """The images by confidence; those of equal confidence in random order, since bins may part them."""
    return np.lexsort((np.random.default_rng(0).permutation(len(confidence)), confidence))


def _bins(n: int, bins: int) -> int:
    return max(1, min(bins, n // 10))


def _errors(
    confidence: NDArray[np.float64], right: NDArray[np.bool_], weights: NDArray[np.float64], bins: int
) -> NDArray[np.float64]:
    """ECE (draws,) for images weighted by ``weights`` (draws, n)."""
    order = _by_confidence(confidence)
    w, gap = weights[:, order], (right - confidence)[order]
    n = w.sum(1, keepdims=True)
    bin_of = np.minimum(((w.cumsum(1) - w / 2) / n * bins).astype(int), bins - 1)
    flat = (bin_of + bins * np.arange(len(w))[:, None]).ravel()
    sums = np.bincount(flat, (w * gap).ravel(), len(w) * bins).reshape(len(w), bins)
    return np.abs(sums).sum(1) / n[:, 0]


def _interval(drawn: NDArray[np.float64]) -> tuple[float, float, float]:
    """The first value, which is the estimate, with the percentile interval of the others."""
    low, high = np.quantile(drawn[1:], [0.025, 0.975])
    return float(drawn[0]), float(min(low, drawn[0])), float(max(high, drawn[0]))
