import pytest
import torch

import kdx
from kdx.distance import u_center
from kdx.inference import known_images, two_factor
from kdx.measure.likeness import box_masks, cka_values, compare_detectors, handed_over, precision_table, shares_table
from kdx.pages.claims import Verdict
from tests.boxes import squares


def features(seed, n=24, k=5):
    return torch.randn(n, k, 3, 4, generator=torch.Generator().manual_seed(seed))


def test_cka_is_1_of_the_same_and_0_of_unrelated_features():
    one = features(0)
    assert cka_values(one, 3 * one + 1).mean().item() == pytest.approx(1, abs=1e-6)
    rotation = torch.linalg.qr(torch.randn(60, 60, generator=torch.Generator().manual_seed(1)))[0]
    assert cka_values(one, (one.flatten(1) @ rotation)).mean().item() == pytest.approx(1, abs=1e-5)
    others = torch.stack([cka_values(one, features(seed)).mean() for seed in range(1, 30)])
    assert abs(others.mean().item()) < 3 * others.std().item() / 29**0.5


def test_pseudo_values_are_those_of_the_jackknife():
    one, other = features(0, 6), features(0, 6) + features(1, 6)

    def cka(rows):
        p, q = (
            u_center((of[rows].flatten(1).double() @ of[rows].flatten(1).double().T).fill_diagonal_(0))
            for of in (one, other)
        )
        return ((p * q).sum() / (p.norm() * q.norm())).item()

    every = list(range(6))
    without = [cka(every[:i] + every[i + 1 :]) for i in every]
    expected = [cka(every) + 5 * (sum(without) / 6 - one) for one in without]
    assert cka_values(one, other).tolist() == pytest.approx(expected)
    with pytest.raises(ValueError, match="the same 5 images or more, got 4 and 4"):
        cka_values(one[:4], other[:4])


def test_what_the_base_cannot_express_and_the_teacher_can_is_handed_over():
    base, teacher, own = (features(seed, 90, 2) for seed in range(3))
    student = torch.cat([base[:, :1], teacher[:, :1], own[:, :1], own[:, 1:]], 1)
    found = handed_over(student, base, teacher)
    assert found.mean == pytest.approx(0.25, abs=0.02)  # one of four channels
    assert found.low < 0.25 < found.high
    assert handed_over(base, base, teacher).mean == pytest.approx(0, abs=0.01)
    with pytest.raises(ValueError, match="3 folds or more"):
        handed_over(student, base, teacher, 2)


def test_a_detector_that_finds_nothing_has_no_grad_cam_and_no_estimate():
    blind, teacher = (kdx.build_detector("fcos", "resnet10@0.0625", 2, (64, 96), seed=s) for s in (0, 1))
    blind.score_thresh = 1.0
    table = compare_detectors({"blind": blind}, teacher, squares(6))
    of = table[(table["network"] == "blind") & (table["level"] == "P3")].pivot(
        index="measure", columns="image", values="value"
    )
    assert of.loc[["agreement of Grad-CAMs", "Grad-CAM in boxes"]].isna().all(axis=None)
    assert not of.loc[["agreement of feature maps", "CKA"]].isna().any(axis=None)
    estimate = two_factor(known_images(of.loc[["agreement of Grad-CAMs"] * 2]))  # two seeds, as on the page
    assert Verdict("S2", "distilled minus base", {"Grad-CAM": [[estimate.mean] * 3] * 2}, 0.1).word == "undecided"


def test_masks_of_boxes_cover_every_pixel_they_touch():
    data = squares(3)
    data.boxes[0][0] = torch.tensor([2.5, 1.0, 4.0, 2.2])
    masks = box_masks(data)
    assert masks[0].nonzero().tolist() == [[1, 2], [1, 3], [2, 2], [2, 3]]
    assert masks[1].sum() == 24 * 24
    assert masks[2].sum() == 0


def test_a_detector_is_most_like_itself():
    data = squares(8)
    detectors = [kdx.build_detector("fcos", "resnet10@0.0625", 2, (64, 96), seed=seed).eval() for seed in (0, 1)]
    for detector in detectors:
        detector.score_thresh = 0.0
    table = compare_detectors({"same": detectors[0], "other": detectors[1]}, detectors[0], data)
    assert set(table["network"]) == {"same", "other", "teacher"}
    assert table.groupby(["network", "level", "measure"])["image"].count().eq(8).all()
    means = table.groupby(["network", "measure"])["value"].mean()
    for measure in ("CKA", "agreement of feature maps", "agreement of Grad-CAMs"):
        assert means["same", measure] == pytest.approx(1, abs=1e-4)
        assert means["other", measure] < 0.99
    assert ("teacher", "CKA") not in means
    inside = table[table["measure"] == "feature map in boxes"].groupby("image")["value"].mean()
    assert inside[:7].between(0, 1).all()
    assert inside.isna()[7]  # the empty image
    empty = precision_table({"other": detectors[1]}, data)
    assert empty.groupby("measure")["value"].count().to_dict() == {"AP": 8, "AP50": 8}


def test_shares_of_levels():
    data = squares(9)
    base, teacher = (kdx.build_detector("fcos", "resnet10@0.0625", 2, (64, 96), seed=seed) for seed in (0, 1))
    table = shares_table({"copy of the teacher": teacher, "copy of the base": base}, base, teacher, data)
    values = table.set_index(["network", "level"])["value"]
    assert (values["copy of the teacher"] > 0.05).all()
    assert values["copy of the base"].abs().max() < 0.01
    assert list(table["level"].unique()) == ["P3", "P4", "P5"]
