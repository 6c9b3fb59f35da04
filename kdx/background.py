"""How much of an accuracy the background alone could explain."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kdx.data import Dataset
from kdx.intervals import Interval

MOST_IMAGES = 10_000  # that the forest is trained on
RESAMPLES = 1000


def background_control(train: Dataset, test: Dataset, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Which test images a random forest classifies rightly from eight pixels of their border.

    The four corners and the middles of the four sides, as in Noyan (2022, arXiv:2206.04374). The forest
    sees at most 10,000 training images.

    Returns
    -------
    chance, correct : bool (n,) over the test images: whether naming the commonest class of the training
        images each time is right, and whether the forest is.
    """
    from sklearn.ensemble import RandomForestClassifier  # slow to import

    train = train.limit(min(MOST_IMAGES, len(train)), seed)
    forest = RandomForestClassifier(n_estimators=200, random_state=seed, n_jobs=-1)
    forest.fit(_border(train.images), train.labels.numpy())
    answers = torch.from_numpy(forest.predict(_border(test.images)))
    commonest = train.labels.bincount().argmax()
    return test.labels == commonest, answers == test.labels


def _border(images: Tensor) -> np.ndarray:
    """The eight pixels of (n, c, h, w) as (n, 8 c)."""
    h, w = images.shape[-2:]
    rows = torch.tensor([0, 0, 0, h // 2, h // 2, h - 1, h - 1, h - 1])
    columns = torch.tensor([0, w // 2, w - 1, 0, w - 1, 0, w // 2, w - 1])
    return images[:, :, rows, columns].flatten(1).numpy()


def explained_share(control: Tensor, correct: Tensor, chance: Tensor, seed: int = 0) -> Interval:
    r"""The share of a network's accuracy above chance that a control reaches as well.

    .. math:: (a_\text{control} - a_\text{chance}) / (a - a_\text{chance})

    Parameters
    ----------
    control, correct, chance : bool (n,), whether the control, the network and an answer without any
        knowledge are right on each test image.

    Returns
    -------
    Interval : with a 95 % bootstrap interval over the images; NaN where the network is not above
        chance, and ends of NaN where that happens in a resample.
    """
    if not control.shape == correct.shape == chance.shape or control.ndim != 1:
        shapes = ", ".join(str(tuple(one.shape)) for one in (control, correct, chance))
        raise ValueError(f"expected three vectors (n,), got {shapes}")
    three = torch.stack([control, correct, chance]).double().numpy()
    drawn = np.random.default_rng(seed).integers(len(control), size=(RESAMPLES, len(control)))
    share, resampled = (_share(a) for a in (three.mean(1), np.stack([a[drawn].mean(1) for a in three])))
    low, high = np.quantile(resampled, (0.025, 0.975))
    return Interval(float(share), float(low), float(high), len(control))


def _share(accuracies: np.ndarray) -> np.ndarray:
    """Of (control, network, chance) along the first axis."""
    above = accuracies[:2] - accuracies[2]
    return above[0] / np.where(above[1] > 0, above[1], np.nan)
