"""How much of an accuracy the background alone could explain."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.ensemble import RandomForestClassifier
from torch import Tensor

from kdx.data import Dataset
from kdx.intervals import Interval

MOST_IMAGES = 10_000  # that the forest is trained on
RESAMPLES = 1000


def background_control(train: Dataset, test: Dataset, seed: int = 0) -> tuple[float, Tensor]:
    """Which test images a random forest classifies rightly from eight pixels of their border.

    The four corners and the middles of the four sides, as in Noyan (2022, arXiv:2206.04374).

    Returns
    -------
    chance, correct : the accuracy of naming the commonest class of the training images each time, and
        bool (n,) over the test images.
    """
    train = train.limit(min(MOST_IMAGES, len(train)), seed)
    forest = RandomForestClassifier(n_estimators=200, random_state=seed, n_jobs=-1)
    forest.fit(_border(train.images), train.labels.numpy())
    answers = torch.from_numpy(forest.predict(_border(test.images)))
    commonest = train.labels.bincount().argmax()
    return float((test.labels == commonest).double().mean()), answers == test.labels


def _border(images: Tensor) -> np.ndarray:
    """The eight pixels of (n, c, h, w) as (n, 8 c)."""
    h, w = images.shape[-2:]
    rows = torch.tensor([0, 0, 0, h // 2, h // 2, h - 1, h - 1, h - 1])
    columns = torch.tensor([0, w // 2, w - 1, 0, w - 1, 0, w // 2, w - 1])
    return images[:, :, rows, columns].flatten(1).numpy()


def explained_share(control: Tensor, correct: Tensor, chance: float, seed: int = 0) -> Interval:
    r"""The share of a network's accuracy above chance that a control reaches as well.

    .. math:: (a_\text{control} - a_\text{chance}) / (a - a_\text{chance})

    Parameters
    ----------
    control, correct : bool (n,), whether the control and the network are right on each test image.
    chance : accuracy of no knowledge at all.

    Returns
    -------
    Interval : with a 95 % bootstrap interval over the images; all NaN where the network is not above
        chance, and ends of NaN where that happens in a resample.
    """
    if control.shape != correct.shape or control.ndim != 1:
        raise ValueError(f"expected two vectors (n,), got {tuple(control.shape)} and {tuple(correct.shape)}")

    pair = torch.stack([control, correct]).double().numpy()
    drawn = np.random.default_rng(seed).integers(len(control), size=(RESAMPLES, len(control)))
    share, resampled = (_share(a, chance) for a in (pair.mean(1), np.stack([a[drawn].mean(1) for a in pair])))
    low, high = np.quantile(resampled, (0.025, 0.975))
    return Interval(float(share), float(low), float(high), len(control))


def _share(accuracies: np.ndarray, chance: float) -> np.ndarray:
    """Of (control, network) along the first axis."""
    above = accuracies - chance
    return above[0] / np.where(above[1] > 0, above[1], np.nan)
