import numpy as np
import pytest
import torch

from kdx.data import shapes


@pytest.fixture(autouse=True)
def fewer(monkeypatch):
    """Splits that take less time to draw, the larger one in several blocks."""
    for split, count in {"train": 800, "test": 400}.items():
        monkeypatch.setitem(shapes.COUNTS, split, count)


def test_shapes_are_the_same_for_the_same_seed():
    first = shapes.read(None, "test", 3)
    shapes._drawn.cache_clear()
    again = shapes.read(None, "test", 3)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for part in again:
        part.zero_()
    kept = shapes.read(None, "test", 3)
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))
    assert not torch.equal(first[0], shapes.read(None, "test", 4)[0])
    train = shapes.read(None, "train", 3)[0]
    assert train.shape == (800, 3, 64, 64)
    assert not torch.equal(first[0], train[:400])


def test_shapes_masks_show_object_and_part():
    images, labels, masks = shapes.read(None, "test", 0)
    empty = labels == shapes.CLASSES.index("none")
    assert not masks[empty].any()
    for region in (1, 2):  # every object is there in full, and has its part
        assert ((masks[~empty] == region).flatten(1).sum(1) >= 20).all()
    assert not masks[:, [0, -1], :].any()  # nothing is cut off by the border
    assert not masks[:, :, [0, -1]].any()
    body, around = (masks == 1)[:, None], (masks == 0)[:, None]
    brightness = images.double()
    inside = (brightness * body).sum((1, 2, 3)) / body.sum((1, 2, 3))
    outside = (brightness * around).sum((1, 2, 3)) / around.sum((1, 2, 3))
    assert (inside > outside)[~empty].double().mean() > 0.95  # objects are brighter than backgrounds


def test_shapes_tails_are_counted_by_their_class():
    from scipy.ndimage import label

    _, labels, masks = shapes.read(None, "test", 0)
    for tails in (1, 2, 4):
        of = labels == shapes.CLASSES.index(f"tails-{tails}")
        pieces = [label(mask == 2, np.ones((3, 3)))[1] for mask in masks[of].numpy()]
        assert np.mean(np.array(pieces) == tails) > 0.97
