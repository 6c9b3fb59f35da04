import pytest
import torch

from kdx.data import shapes
from kdx.data.dataset import load_dataset


def test_normalize_gives_zero_mean_unit_variance(monkeypatch):
    monkeypatch.setitem(shapes.COUNTS, "train", 1500)  # takes less time to draw
    train = load_dataset("shapes", "train")
    x = train.card.normalize(train.images)
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3), atol=0.02, rtol=0)
    torch.testing.assert_close(x.std((0, 2, 3)), torch.ones(3), atol=0.02, rtol=0)
    with pytest.raises(TypeError, match=r"expected uint8 images, got torch.float32"):
        train.card.normalize(x)
