import numpy as np
import pytest
import torch

from kdx.data.cues import FAMILIES, Scene, draw

SMALL = Scene(size=24, cue_size=8)


def test_images_are_the_same_for_a_seed_and_differ_between_seeds():
    one, two, other = draw(SMALL, 30, 3), draw(SMALL, 30, 3), draw(SMALL, 30, 4)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not torch.equal(one[0], other[0])
    assert one[0].shape == (30, 3, 24, 24)
    assert one[0].dtype == one[2].dtype == torch.uint8


def test_classes_have_equal_shares_and_cues_are_independent():
    labels = draw(Scene(), 540, 0)[1]
    assert labels.bincount().tolist() == [20] * 27
    values = Scene().values_of(labels)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert (values[:, i] * 3 + values[:, j]).bincount().tolist() == [60] * 9


def test_every_cue_has_its_square_and_no_other_covers_it():
    masks = draw(SMALL, 200, 0)[2]
    assert masks.unique().tolist() == [0, 1, 2, 4]
    for bit in range(3):
        assert ((masks >> bit & 1).flatten(1).sum(1) == 64).all()


def test_cues_may_overlap_by_the_share_that_is_allowed_and_no_more():
    masks = draw(Scene(size=24, cue_size=8, overlap=0.5), 400, 0)[2]
    both = torch.stack([((masks & bits) == bits).flatten(1).sum(1) for bits in (3, 5, 6)])
    assert both.any()
    assert both.max() <= 4 * 8


def test_cues_may_differ_in_size():
    scene = Scene(size=32, cue_size=(6, 9, 12), overlap=0.5)
    masks = draw(scene, 200, 0)[2]
    areas = [(masks >> bit & 1).flatten(1).sum(1).unique().tolist() for bit in range(3)]
    assert areas == [[36], [81], [144]]
    shared = ((masks & 3) == 3).flatten(1).sum(1)
    assert shared.any()
    assert shared.max() <= 3 * 6  # half of the smaller side


def test_values_of_cues_may_be_correlated():
    values = Scene().values_of(draw(Scene(correlation=0.5), 2700, 0)[1])
    alike = (values == values[:, :1]).all(1).double().mean()
    assert abs(alike - (0.5 + 0.5 / 9)) < 0.03
    assert values[:, 0].bincount().tolist() == [900] * 3


def test_a_cue_is_repainted_and_all_else_stays():
    images, labels, masks = draw(Scene(), 60, 0)
    repainted, others, same = draw(Scene(), 60, 0, (0, 1, 0))
    assert torch.equal(masks, same)
    assert torch.equal(Scene().values_of(others), (Scene().values_of(labels) + torch.tensor([0, 1, 0])) % 3)
    changed = (images != repainted).any(1)
    assert changed.flatten(1).any(1).all()
    assert not (changed & (masks != 2)).any()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_value_decides_the_picture_of_a_cue(name):
    at = (np.arange(10) + 0.5) / 5 - 1
    v, u = np.meshgrid(at, at, indexing="ij")
    drawn = [FAMILIES[name].draw(u, v, np.array([value]), 5, np.random.default_rng(0)) for value in range(5)]
    assert all(picture.shape == (1, 10, 10) and np.abs(picture).max() <= 1 for picture in drawn)
    if name == "colours":  # the hue is the value, the ink is the same
        images, _, masks = draw(Scene(("colours", "shapes", "dots")), 270, 0)
        hues = torch.stack([image[:, mask & 1 > 0].float().mean(1) for image, mask in zip(images, masks, strict=True)])
        values = Scene().values_of(draw(Scene(("colours", "shapes", "dots")), 270, 0)[1])[:, 0]
        assert [int(hues[values == value].mean(0).argmax()) for value in range(3)] == [0, 2, 1]
        return
    assert all(np.abs(a - b).max() > 0.5 for i, a in enumerate(drawn) for b in drawn[:i])


def test_values_labels_and_embeddings_belong_together():
    scene = Scene(values=4)
    labels = torch.arange(64)
    values = scene.values_of(labels)
    assert values[27].tolist() == [1, 2, 3]
    assert torch.equal(scene.labels_of(values), labels)
    assert scene.embeddings[27].nonzero()[:, 0].tolist() == [1, 6, 11]
    assert scene.classes[27] == "tilted grating, triangle, four dots"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"cues": ("gratings", "smells")}, "unknown cues smells; choose from: gratings"),
        ({"cues": ("dots", "dots")}, "1 to 8 different ones"),
        ({"values": 6}, "values: expected 2 to 5"),
        ({"contrast": 0}, "0 < contrast <= 1"),
        ({"overlap": 1}, "0 <= overlap < 1"),
        ({"cue_size": (8, 8)}, "one or 3 of them"),
        ({"correlation": 1.0}, "expected 0 <= correlation < 1, got 1.0"),
        ({"cue_size": 20}, r"3 cues that cover at most 35% of an image of 32 pixels per side, got 20 \(117%\)"),
    ],
)
def test_scenes_that_cannot_be_drawn_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Scene(**wrong)
