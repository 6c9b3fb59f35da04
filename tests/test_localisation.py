import math

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from sklearn.metrics import average_precision_score, precision_recall_fscore_support, roc_auc_score

from kdx import mass_on
from kdx.measure.localisation import (
    auprc,
    auroc,
    binary_scores,
    five_band,
    localisation,
    pointing_game,
    rank_agreement,
    soft_five_band,
)


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


# --- the original five-band scores, soft scores, one region, edges -------------------------------


def literal_five_band(h, truth, low=0.3, high=0.7):
    """Pixel by pixel, as the authors of the scores describe them."""
    top = max(abs(v) for row in h for v in row)
    counts = dict.fromkeys(("right", "tp", "fp", "tn", "fn"), 0)
    for row, wanted in zip(h, truth, strict=True):
        for v, t in zip(row, wanted, strict=True):
            x = v / top if top else 0.0
            b = -2 if x <= -high else -1 if x <= -low else 0 if x <= low else 1 if x <= high else 2
            counts["right"] += b == t
            counts["tp"] += b == t != 0
            counts["fp"] += b not in (0, t)
            counts["tn"] += b == t == 0
            counts["fn"] += b == 0 != t
    share = lambda part, rest: counts[part] / max(counts[part] + counts[rest], 1)  # noqa: E731
    accuracy = counts["right"] / sum(map(len, truth))
    recall, precision, false = share("tp", "fn"), share("tp", "fp"), share("fp", "tn")
    return {"pixel accuracy": accuracy, "recall": recall, "precision": precision, "false positive rate": false}


def signed_maps():
    maps = maps_of(12, 50) - 0.3
    return torch.cat([maps, maps_of(12, 10)]), torch.randint(
        3, (12, 12, 12), generator=torch.Generator().manual_seed(4)
    )


def test_original_five_band_scores_are_those_of_a_literal_count():
    maps, truth = signed_maps()
    found = five_band(maps, truth, "original")
    for i, (h, t) in enumerate(zip(maps.double().tolist(), truth.tolist(), strict=True)):
        assert {name: values[i].item() for name, values in found.items()} == pytest.approx(literal_five_band(h, t))


def test_soft_scores_are_the_mean_and_largest_of_eleven_literal_counts():
    maps, truth = signed_maps()
    found = soft_five_band(maps[:3], truth[:3])
    for i, (h, t) in enumerate(zip(maps[:3].double().tolist(), truth[:3].tolist(), strict=True)):
        steps = [literal_five_band(h, t, 0.3 - 0.02 * j, 0.7 - 0.02 * j) for j in range(11)]
        for name in steps[0]:
            values = [step[name] for step in steps]
            assert found[name][i].item() == pytest.approx(sum(values) / 11)
            assert found[f"{name}, maximum"][i].item() == pytest.approx(max(values))


def test_definitions_differ_in_wrong_bands_by_hand():
    maps = torch.tensor([[[1.0, 0.8, 0.5, 0.4], [0.1, 0.0, 0.9, 0.2]]])
    truth = torch.tensor([[[2, 1, 1, 0], [0, 0, 2, 2]]])
    found = {name: values.item() for name, values in five_band(maps, truth, "original").items()}
    # bands 2 2 1 1 / 0 0 2 0: true positives 1, 3, 7; false 2 (a wrong band) and 4; missed 8; rightly empty 5, 6
    expected = {"pixel accuracy": 5 / 8, "recall": 3 / 4, "precision": 3 / 5, "false positive rate": 2 / 4}
    assert found == pytest.approx(expected)


def test_edges_of_the_bands():
    maps = torch.tensor([[[0.3, 0.7, 1.0, -0.3, -0.7]]], dtype=torch.float64)
    bands = torch.tensor([[[0, 1, 2, -1, -2]]])
    assert five_band(maps, bands, "original")["pixel accuracy"].item() == 1.0
    own = torch.tensor([[[1, 2, 2]]])
    assert five_band(maps[:, :, :3], own)["pixel accuracy"].item() == 1.0
    single = maps.float()[:, :, [0, 2]]  # 0.3 in float32 is a little more than 0.3
    assert five_band(single, own[:, :, [0, 2]], "original")["pixel accuracy"].item() == 1.0


def test_five_band_scores_where_there_is_nothing():
    nothing = torch.zeros(1, 2, 2, dtype=torch.long)
    for maps in (torch.zeros(1, 2, 2), torch.ones(1, 2, 2)):
        found = {name: values.item() for name, values in five_band(maps, nothing, "original").items()}
        wrong = float(maps.max())
        assert found == {"pixel accuracy": 1 - wrong, "recall": 0, "precision": 0, "false positive rate": wrong}
    assert math.isnan(five_band(torch.ones(1, 2, 2), nothing)["recall"].item())


def test_a_sign_is_for_the_original_definition_alone():
    truth = torch.ones(1, 2, 2, dtype=torch.long)
    with pytest.raises(ValueError, match="without negative values"):
        five_band(-torch.ones(1, 2, 2), truth)
    with pytest.raises(ValueError, match=r"unknown definition 'new'; choose from: own, original"):
        five_band(torch.ones(1, 2, 2), truth, "new")
    assert five_band(-torch.ones(1, 2, 2), truth, "original")["precision"].item() == 0


def test_binary_scores_are_those_of_scikit_learn(truth):
    maps = maps_of(12, 10)
    found = binary_scores(maps, truth)
    for i in range(len(maps)):
        y, h = truth[i].flatten().numpy(), (maps[i].double() / maps[i].double().max()).flatten().numpy()
        rows = [precision_recall_fscore_support(y, h >= j / 10, average="binary") for j in range(1, 10)]
        for name, values in zip(("precision", "recall", "F1"), list(zip(*rows, strict=True))[:3], strict=True):
            assert found[name][i].item() == pytest.approx(sum(values) / 9)
            assert found[f"{name}, maximum"][i].item() == pytest.approx(max(values))
        assert found["AUROC"][i].item() == pytest.approx(roc_auc_score(y, h))
        assert found["AUPRC"][i].item() == pytest.approx(average_precision_score(y, h))


def test_binary_scores_of_maps_without_contrast_and_of_the_mask(truth):
    share = truth.flatten(1).double().mean(1)
    for maps in (torch.ones(6, 12, 12), torch.zeros(6, 4, 4)):
        found = binary_scores(maps, truth)
        assert found["precision"].tolist() == pytest.approx(share.tolist())
        assert found["recall"].tolist() == [1.0] * 6
        assert found["F1, maximum"].tolist() == pytest.approx((2 * share / (1 + share)).tolist())
        assert found["AUROC"].tolist() == [0.5] * 6
    assert all(values.tolist() == [1.0] * 6 for values in binary_scores(truth.float(), truth).values())
    assert all(of.isnan().all() for of in binary_scores(torch.rand(6, 4, 4), torch.zeros_like(truth)).values())


def test_rank_agreement_is_that_of_scipy_with_ties(truth):
    first, second = maps_of(12, 7), maps_of(12, 300).square()
    expected = [spearmanr(a.flatten(), b.flatten()).statistic for a, b in zip(first, second, strict=True)]
    assert rank_agreement(first, second).tolist() == pytest.approx(expected, abs=1e-6)
    assert rank_agreement(second, second.exp()).tolist() == pytest.approx([1.0] * 6)
    assert rank_agreement(torch.ones(6, 12, 12), second).isnan().all()
    with pytest.raises(ValueError, match="expected two"):
        rank_agreement(first, second[:3])
