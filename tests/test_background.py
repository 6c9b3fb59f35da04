import math

import pytest
import torch

from kdx.data.dataset import Dataset
from kdx.data.registry import DATASETS
from kdx.measure.background import _border, background_control, explained_share


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
        assert chance.double().mean() == pytest.approx(1 / 3, abs=0.01)
        assert correct.double().mean() == pytest.approx(expected, abs=0.09)


def test_chance_is_the_commonest_class_of_the_training_images():
    train, test = torch.tensor([0] * 30 + [1] * 20), torch.tensor([0] * 5 + [1] * 15)
    assert background_control(images_of(train, True), images_of(test, True))[0].tolist() == [True] * 5 + [False] * 15


def test_explained_share_by_hand():
    n = 4000
    right, half, quarter = torch.ones(n, dtype=torch.bool), torch.arange(n) % 2 == 0, torch.arange(n) % 4 == 1
    share = explained_share(half, right, quarter)
    assert share.mean == pytest.approx((1 / 2 - 1 / 4) / (1 - 1 / 4))
    # (h - q) / (1 - q) by the delta method, with cov(h, q) = -1/8 per image
    gradient = [1 / 0.75, (0.5 - 1) / 0.75**2]
    variance = gradient[0] ** 2 / 4 + gradient[1] ** 2 * 3 / 16 - 2 * gradient[0] * gradient[1] / 8
    spread = 1.96 * math.sqrt(variance / n)
    assert share.low == pytest.approx(share.mean - spread, rel=0.03)
    assert share.high == pytest.approx(share.mean + spread, rel=0.03)
    assert explained_share(right, right, half)[:3] == (1, 1, 1)


def test_explained_share_of_a_network_at_chance_is_not_a_number():
    half = torch.arange(100) % 2 == 0
    assert math.isnan(explained_share(half, half, half).mean)
    with pytest.raises(ValueError, match=r"expected three vectors \(n,\), got \(100,\), \(50,\), \(100,\)"):
        explained_share(half, half[:50], half)
