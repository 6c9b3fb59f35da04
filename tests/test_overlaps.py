import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kdx.measure import overlaps
from kdx.measure.overlaps import Largest, exceeding, segment

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("share", [0.01, 0.5, 1.0])
@pytest.mark.parametrize("shape", [((5, 7), (20, 21)), ((4, 4), (4, 4)), ((8, 9), (3, 2)), ((1, 1), (6, 6))])
def test_exceeding_is_a_threshold_on_torchs_interpolation(shape, share, monkeypatch):
    monkeypatch.setattr(overlaps, "AT_ONCE", 100)  # several parts
    (h, w), fine = shape
    maps = torch.randn(6, 3, h, w, generator=torch.Generator().manual_seed(0))
    thresholds = maps.movedim(1, 0).flatten(1).quantile(1 - share, dim=1) + 1e-3
    hits = exceeding(maps, thresholds, fine)
    dense = F.interpolate(maps, fine, mode="bilinear", align_corners=False)
    expected = dense > thresholds[:, None, None]
    found = torch.zeros_like(dense).flatten(2)
    found[hits.image, hits.unit, hits.pixel] = hits.value
    assert torch.equal(found.view_as(dense) != 0, expected)
    assert len(hits.image) == expected.sum()
    torch.testing.assert_close(found.view_as(dense)[expected], dense[expected])
    higher = hits.beyond(thresholds + 0.2)
    assert len(higher.image) == (dense > thresholds[:, None, None] + 0.2).sum()


def test_interpolation_between_equal_values_does_not_exceed_them():
    maps = torch.full((1, 1, 3, 3), 0.1)
    assert not len(exceeding(maps, torch.tensor([0.1]), (17, 23)).image)
    maps[0, 0, 1, 1] = 0.1 + 1e-6
    hits = exceeding(maps, torch.tensor([0.1]), (3, 3))
    assert (hits.pixel.tolist(), hits.unit.tolist()) == ([4], [0])


def test_largest_finds_exact_quantiles_in_any_batches():
    maps = torch.randn(10, 4, 3, 5)
    values = np.sort(maps.movedim(1, 0).flatten(1).numpy(), axis=1)
    for sizes in ([10], [1] * 10, [7, 3]):
        largest = Largest(31)
        for part in maps.split(sizes):
            largest.add(part)
        assert np.array_equal(largest.thresholds([1, 30]).numpy(), [values[:, -2], values[:, -31]])


def test_segment_keeps_every_layer_of_every_pixel():
    masks = torch.randint(0, 6, (5, 3, 4, 7), dtype=torch.int16)
    masks[2] = 0
    segments = segment(masks, torch.ones(5, 2, dtype=torch.bool), 5, (4, 7))
    for i in range(5):
        for concept in range(1, 6):
            carried = (masks[i] == concept).any(0).flatten()
            place = (segments.concepts[i] == concept).nonzero()
            assert len(place) == carried.any()
            if len(place):
                members = segments.members[i, place[0, 0]]
                assert torch.equal(members[segments.of_pixel[i]] > 0, carried)
                assert segments.areas[i, place[0, 0]] == carried.sum()
    assert not segments.members[2].any()


def test_segment_of_masks_without_layers():
    segments = segment(torch.zeros(2, 0, 3, 3, dtype=torch.int16), torch.zeros(2, 1, dtype=torch.bool), 4, (3, 3))
    assert not segments.concepts.any()
    assert segments.of_pixel.shape == (2, 9)
