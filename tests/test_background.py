import math

import pytest
import torch

from kdx.background import _border, background_control, explained_share
from kdx.data import DATASETS, Dataset


def images_of(labels, border, seed=0):
    """Noise images; where ``border``, one border pixel tells the class, else only the middle does."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (len(labels), 3, 9, 9), dtype=torch.uint8, generator=generator)
    y, x = (0, 4) if border else (4, 4)
    images[:, 0, y, x] = (labels * 120).to(torch.uint8)
    return Dataset(images, labels, DATASETS["shapes"])


def test_border_is_the_corners_and_the_middles_of_the_sides():
    image = torch.arange(5 * 7, dtype=torch.uint8).view(1, 1, 5, 7)
    assert _border(image).tolist() == [[0, 3, 6, 14, 20, 28, 31, 34]]


def test_background_control_knows_what_the_border_knows_and_no_more():
    train, test = torch.arange(400) % 3, torch.arange(300) % 3
    for border, expected in ((True, 1.0), (False, 1 / 3)):
        chance, correct = background_control(images_of(train, border), images_of(test, border, seed=1))
        assert chance == pytest.approx(1 / 3, abs=0.01)
        assert correct.double().mean() == pytest.approx(expected, abs=0.09)


def test_chance_is_the_commonest_class_of_the_training_images():
    train, test = torch.tensor([0] * 30 + [1] * 20), torch.tensor([0] * 5 + [1] * 15)
    assert background_control(images_of(train, True), images_of(test, True))[0] == 0.25


def test_explained_share_by_hand():
    right = torch.ones(1000, dtype=torch.bool)
    half = torch.arange(1000) % 2 == 0
    share = explained_share(half, right, chance=0.25)
    assert share.mean == pytest.approx((0.5 - 0.25) / (1 - 0.25))
    spread = 0.5 / math.sqrt(1000) / 0.75  # of a mean of n coin flips, on that scale
    assert share.low == pytest.approx(share.mean - 1.96 * spread, abs=0.01)
    assert share.high == pytest.approx(share.mean + 1.96 * spread, abs=0.01)
    assert explained_share(right, right, 0.5)[:3] == (1, 1, 1)


def test_explained_share_of_a_network_at_chance_is_not_a_number():
    half = torch.arange(100) % 2 == 0
    assert math.isnan(explained_share(half, half, chance=0.5).mean)
    with pytest.raises(ValueError, match=r"expected two vectors \(n,\), got \(100,\) and \(50,\)"):
        explained_share(half, half[:50], 0.5)
