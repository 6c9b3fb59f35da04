import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss

import kdx
from kdx.measure.calibration import reliability


def drawn(n=4000, temperature=1.0, seed=0):
    """Probabilities that are calibrated at temperature 1, and labels drawn from them."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, 5, generator=generator, dtype=torch.float64)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    return (logits / temperature).softmax(1), labels


def test_scores_by_hand_and_by_scikit_learn():
    p = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.3, 0.7]])
    y = torch.tensor([0, 1, 1, 1])
    found = kdx.calibration({"one": p}, y, bins=1).set_index("score")["value"]
    assert found["ECE"] == pytest.approx(abs(0.75 - (0.9 + 0.6 + 0.8 + 0.7) / 4))
    assert found["Brier"] == pytest.approx(2 * (0.01 + 0.36 + 0.04 + 0.09) / 4)
    assert found["NLL"] == pytest.approx(log_loss(y, p))


def test_equal_mass_bins_written_out():
    p, y = drawn(300, temperature=0.5)
    confidence, answer = p.max(1)
    order = confidence.argsort(stable=True).numpy()
    right, sure = (answer == y).numpy()[order], confidence.numpy()[order]
    parts = zip(np.array_split(right, 15), np.array_split(sure, 15), strict=True)
    expected = sum(len(a) / 300 * abs(a.mean() - b.mean()) for a, b in parts)
    assert kdx.calibration({"one": p}, y, bins=15)["value"][0] == pytest.approx(expected)
    table = reliability(p, y, bins=15)
    assert ((table["value"] - table["confidence"]).abs() * table["n"]).sum() / 300 == pytest.approx(expected)


def test_a_calibrated_network_beats_an_overconfident_one_and_itself_it_does_not():
    p, y = drawn()
    sure, _ = drawn(temperature=0.4)
    table = kdx.calibration({"student": sure, "base": p, "twin": sure}, y).set_index(["network", "score"])
    for score in ("ECE", "Brier", "NLL"):
        assert table.loc[("base", score), "difference low"] > 0
        assert table.loc[("twin", score), "difference":].tolist() == [0, 0, 0]
        assert np.isnan(table.loc[("student", score), "difference"])
    inside = []
    for seed in range(20):
        p, y = drawn(500, seed=seed)
        row = kdx.calibration({"one": p}, y, draws=199).set_index("score").loc["NLL"]
        entropy = -(p * p.log()).sum(1).mean()  # the expected NLL of these images
        inside.append(row["low"] <= float(entropy) <= row["high"])
    assert np.mean(inside) >= 0.8


def test_the_order_of_images_of_equal_confidence_plays_no_part():
    p, labels = torch.full((400, 2), 0.5), torch.arange(400) % 2
    for y in (labels, labels.sort().values):
        assert kdx.calibration({"one": p}, y, bins=4, draws=9)["value"][0] < 0.1  # 0.5 if half of the bins are right
        assert (reliability(p, y, bins=4)["value"] - 0.5).abs().max() < 0.2


def test_degenerate_and_wrong_input():
    p, y = drawn(25)
    one = kdx.calibration({"one": torch.eye(5)[y]}, y)
    assert one["value"].tolist() == [0, 0, 0]
    assert reliability(p, y)["n"].tolist() == [13, 12]  # ten or more in a bin
    impossible = kdx.calibration({"one": torch.eye(5)[(y + 1) % 5]}, y).set_index("score")
    assert np.isfinite(impossible.loc["NLL", "value"])
    with pytest.raises(ValueError, match=r"expected .n, classes. for 25 labels of the one, got .24, 5."):
        kdx.calibration({"one": p[1:]}, y)
    with pytest.raises(ValueError, match="of the one"):
        kdx.calibration({"one": p[:, :2]}, y + 3)


def test_intervals_hold_the_value_and_the_ece_errs_to_the_high_side():
    above = []
    for seed in range(30):
        p, y = drawn(200, seed=seed)
        table = kdx.calibration({"one": p}, y, draws=199)
        assert (table["low"] <= table["value"]).all()
        assert (table["value"] <= table["high"]).all()
        above.append(table.set_index("score").loc["ECE", "high"])
    assert min(above) > 0.02  # calibrated: the true error is 0
