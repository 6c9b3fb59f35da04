import math

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score, roc_auc_score

from kdx import mass_on
from kdx.measure.localisation import auprc, auroc, five_band, localisation, pointing_game


@pytest.fixture
def truth():
    return torch.rand(6, 12, 12, generator=torch.Generator().manual_seed(1)) < 0.2


def maps_of(side, levels):
    """Maps with many equal values."""
    generator = torch.Generator().manual_seed(side)
    return torch.randint(levels, (6, side, side), generator=generator) / levels


@pytest.mark.parametrize(("side", "levels"), [(12, 1000), (12, 4), (4, 1000), (3, 2), (5, 7)])
def test_areas_under_curves_are_those_of_scikit_learn(truth, side, levels):
    maps = maps_of(side, levels)
    fine = F.interpolate(maps[:, None], (12, 12), mode="nearest-exact").flatten(1)
    for ours, theirs in ((auroc, roc_auc_score), (auprc, average_precision_score)):
        expected = [theirs(t, m) for t, m in zip(truth.flatten(1).numpy(), fine.numpy(), strict=True)]
        assert ours(maps, truth).tolist() == pytest.approx(expected, abs=1e-9)


def test_a_constant_map_is_at_chance(truth):
    ones = torch.ones(6, 4, 4)
    assert auroc(ones, truth).tolist() == [0.5] * 6
    assert auprc(ones, truth).tolist() == pytest.approx(truth.flatten(1).double().mean(1).tolist())
    assert pointing_game(ones, truth).tolist() == pytest.approx(auprc(ones, truth).tolist())


def test_the_mask_itself_is_perfect(truth):
    best = truth.float()
    assert (
        auroc(best, truth).tolist() == auprc(best, truth).tolist() == pointing_game(best, truth).tolist() == [1.0] * 6
    )


def test_a_map_points_with_the_share_of_its_highest_cell_that_is_right():
    maps = torch.tensor([[[0.0, 2.0], [1.0, 1.0]]])
    truth = torch.zeros(1, 4, 4, dtype=torch.bool)
    truth[0, :2, 3] = True
    assert pointing_game(maps, truth).item() == 0.5


def test_without_a_truth_there_is_no_score():
    nothing = torch.zeros(1, 4, 4, dtype=torch.bool)
    maps = torch.rand(1, 4, 4)
    assert auroc(maps, nothing).isnan().all()
    assert auroc(maps, ~nothing).isnan().all()
    assert auprc(maps, nothing).isnan().all()


def test_five_band_scores_by_hand():
    maps = torch.tensor([[[1.0, 0.8, 0.5, 0.4], [0.1, 0.0, 0.9, 0.2]]])
    truth = torch.tensor([[[2, 1, 1, 0], [0, 0, 2, 2]]])
    found = {name: values.item() for name, values in five_band(maps, truth).items()}
    # bands 2 2 1 1 / 0 0 2 0: right are the 1st, 3rd, 5th, 6th and 7th
    assert found == pytest.approx(
        {"pixel accuracy": 5 / 8, "recall": 3 / 5, "precision": 3 / 5, "false positive rate": 1 / 3}
    )
    empty = five_band(torch.zeros(1, 2, 4), truth)
    assert math.isnan(empty["precision"].item())
    assert empty["recall"].item() == 0


def test_scores_of_a_map_on_one_of_three_cues():
    masks = torch.zeros(1, 6, 6, dtype=torch.uint8)
    masks[0, :2, :2], masks[0, :2, 4:], masks[0, 4:, :2] = 1, 2, 4
    maps = torch.zeros(1, 6, 6)
    maps[0, :2, 4:], maps[0, 4:, :2], maps[0, 3, 3] = 3.0, 1.0, 4.0
    found = localisation(maps, masks, target=2, others=5)
    assert found["mass on target"].item() == pytest.approx(12 / 20)
    assert [found[f"mass on cue {i}"].item() for i in (0, 2)] == pytest.approx([0, 4 / 20])
    assert found["pointing game"].item() == 0


def test_a_map_that_abstains_is_at_chance():
    masks = torch.tensor([[[1, 2], [4, 0]]], dtype=torch.uint8)
    found = localisation(torch.zeros(1, 2, 2), masks, target=2, others=5)
    assert found["mass on target"].item() == found["pointing game"].item() == found["mass on cue 0"].item() == 0.25
    assert found["AUROC"].item() == 0.5


def test_maps_that_are_none_are_refused(truth):
    with pytest.raises(ValueError, match=r"expected maps \(n, h, w\) and truth"):
        auroc(torch.rand(5, 3, 3), truth)
    for wrong in (math.nan, -1.0, math.inf):
        with pytest.raises(ValueError, match="expected finite maps without negative values"):
            auprc(torch.full((6, 3, 3), wrong), truth)


def test_mass_on_by_hand():
    maps = torch.tensor([[[1.0, 3.0], [0.0, 4.0]]]).repeat(4, 1, 1)
    maps[2] = 0
    masks = torch.zeros(4, 4, 4, dtype=torch.uint8)
    masks[0, :, 2:] = 1  # the right half: both cells in full
    masks[0, 3, 3] = 2  # a part of the object is the object
    masks[1, 0, 0] = 1  # a quarter of the first cell
    masks[2] = 1
    masks[3] = 255
    assert mass_on(maps, masks)[:2].tolist() == [7 / 8, 0.25 / 8]
    assert mass_on(maps, masks)[2:].isnan().all()  # an empty map, an unknown mask
    assert mass_on(maps[:1], torch.zeros(1, 4, 4, dtype=torch.uint8)).isnan().all()  # no object
    uniform = mass_on(torch.ones(4, 3, 3), masks)
    assert uniform[:3].tolist() == pytest.approx([0.5, 1 / 16, 1])
    with pytest.raises(ValueError, match=r"expected maps \(n, h, w\) and uint8 masks"):
        mass_on(maps, masks[:3])
    with pytest.raises(ValueError, match=r"got .* torch.float32"):
        mass_on(maps, masks.float())
