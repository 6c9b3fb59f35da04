import pytest
import torch

import kdx
from kdx.measure.corruptions import CORRUPTIONS, STRENGTHS, corrupt


def images(n=12, size=32, channels=3):
    generator = torch.Generator().manual_seed(0)
    smooth = torch.rand(n, channels, 4, 4, generator=generator) * 255
    return torch.nn.functional.interpolate(smooth, (size, size), mode="bilinear").byte()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_each_corruption_changes_more_with_its_strength_and_always_in_the_same_way(corruption, channels):
    x = images(channels=channels)
    found = [corrupt(x, corruption, strength) for strength in STRENGTHS]
    away = [(y.float() - x.float()).square().mean() for y in found]
    assert all(y.dtype == torch.uint8 and y.shape == x.shape for y in found)
    assert 0 < away[0] < away[1] < away[2]
    assert torch.equal(found[1], corrupt(x, corruption, 2))
    assert torch.equal(found[1][:5], corrupt(x[:5], corruption, 2)) or corruption == "noise"


def test_robustness_is_paired_and_the_better_network_wins():
    x = images(60)
    labels = (x[:, 0].float().mean((1, 2)) > 127).long()
    sure = lambda batch: (batch[:, 0].float().mean((1, 2)) > 127).long()  # noqa: E731
    dark = lambda batch: torch.zeros(len(batch), dtype=torch.long)  # noqa: E731
    table, differences = kdx.robustness({"student": sure, "base": dark}, x, labels)
    of = table.set_index(["network", "corruption", "strength"])
    assert of.loc[("student", "blur", 1), "value"] > 0.9
    assert len(of) == 2 * 15
    row = differences[(differences["corruption"] == "blur") & (differences["strength"] == 1)].iloc[0]
    expected = of.loc[("student", "blur", 1), "value"] - of.loc[("base", "blur", 1), "value"]
    assert row["difference"] == pytest.approx(expected)
    whole = differences[differences["corruption"] == ""].iloc[0]
    assert whole["difference"] == pytest.approx(differences[differences["corruption"] != ""]["difference"].mean())
    assert whole["low"] < whole["difference"] < whole["high"]
    _, same = kdx.robustness({"student": sure, "base": sure}, x, labels)
    assert (same["difference"] == 0).all()
    assert (same["p"] == 1).all()
    bright = lambda batch: torch.ones(len(batch), dtype=torch.long)  # noqa: E731
    for n, known in ((4, False), (12, True)):
        right, wrong = {"student": dark, "base": bright}, {"student": bright, "base": dark}
        for networks, sign in ((right, 1), (wrong, -1)):  # no image differs from another
            rows = kdx.robustness(networks, x[:n], torch.zeros(n, dtype=torch.long))[1].set_index("corruption")
            whole, single = rows.loc[""], rows.loc["blur"].iloc[0]
            assert whole["difference"] == sign
            assert whole["p"] == pytest.approx(single["p"])
            assert -1 <= whole["low"] <= whole["difference"] <= whole["high"] <= 1
            assert (whole["p"] <= 0.05) == known == (whole["low"] > 0 or whole["high"] < 0)


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match="expected one of noise, blur, JPEG, contrast, rotation and a strength"):
        corrupt(images(), "fog", 1)
    with pytest.raises(ValueError, match=r"strength of 1, 2 or 3, got 'blur' and 4"):
        corrupt(images(), "blur", 4)
    with pytest.raises(ValueError, match="expected uint8"):
        corrupt(images().float(), "blur", 1)
