"""The share of an accuracy that the background alone could explain."""

from __future__ import annotations

import math
import warnings

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from kdx.data.dataset import Dataset
from kdx.intervals import Interval

MOST_IMAGES = 10_000  # that the forest is trained on
RESAMPLES = 1000


def background_control(train: Dataset, test: Dataset, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Test images that a random forest classifies correctly from eight pixels of their border.

    The four corners and the middles of the four sides, as in Noyan (2022, arXiv:2206.04374). The forest
    sees at most 10,000 training images.

    Args:
        train: Training images.
        test: Test images.
        seed: Of the forest.

    Returns:
        chance, correct: bool (n,) over the test images. Whether naming the commonest class of the training images is
        right, and whether the forest is.
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

    Args:
        control: bool (n,), whether the control is right on each test image.
        correct: Likewise, of the network.
        chance: Likewise, of an answer without any knowledge.

    Returns:
        The share with a 95 % bootstrap interval over the images; NaN where the network is not above chance, and ends
        of NaN where that happens in a resample.
    """
    if not control.shape == correct.shape == chance.shape or control.ndim != 1:
        shapes = ", ".join(str(tuple(one.shape)) for one in (control, correct, chance))
        raise ValueError(f"expected three vectors (n,), got {shapes}")
    three = tuple(one.double().numpy() for one in (control, correct, chance))
    share = float(_share(*three))
    if math.isnan(share):
        return Interval(share, share, share, len(control))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # the ends are NaN then
        drawn = stats.bootstrap(
            three, _share, n_resamples=RESAMPLES, paired=True, vectorized=True, method="percentile",
            random_state=seed,
        )  # fmt: skip
    ends = drawn.confidence_interval
    return Interval(share, float(ends.low), float(ends.high), len(control))


def _share(control: np.ndarray, network: np.ndarray, chance: np.ndarray, *, axis: int = -1) -> np.ndarray:
    above = network.mean(axis) - chance.mean(axis)
    return (control.mean(axis) - chance.mean(axis)) / np.where(above > 0, above, np.nan)
