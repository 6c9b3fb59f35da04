from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr

import kdx
from kdx.data.folders import UNKNOWN
from kdx.explain.input_gradients import edges
from kdx.measure.localisation import auroc, five_band
from kdx.measure.yardsticks import (
    baselines,
    gradient_scores,
    map_scores,
    means,
    network_scores,
    rank_correlations,
)


@pytest.fixture(scope="module")
def few(tiny_shapes):
    return tiny_shapes["test"].limit(20)


def test_scores_of_a_network_are_those_of_its_gradients(few):
    network = kdx.build("resnet10", 10, "small", 0.125, seed=0).eval()
    found = network_scores(network, few)
    assert all(values.shape == (20,) for values in found.values())
    x = few.card.normalize(few.images)
    maps, loss = (of(network, x, few.labels).abs().sum(1) for of in (kdx.saliency, kdx.loss_gradients))
    torch.testing.assert_close(found["recall"], five_band(maps, few.masks, "original")["recall"])
    torch.testing.assert_close(found["own recall"], five_band(maps, few.masks)["recall"], equal_nan=True)
    torch.testing.assert_close(found["part: AUROC"], auroc(maps, few.masks == 2), equal_nan=True)
    torch.testing.assert_close(found["loss gradient, AUROC on object"], auroc(loss, few.masks >= 1), equal_nan=True)
    assert {"soft precision, maximum", "object: F1, maximum", "loss gradient, mass on part"} <= set(found)
    without = network_scores(network, replace(few, masks=None))
    assert list(without) == ["loss gradient, on edges"]


def test_baselines_stand_where_they_must(few):
    found = {name: means(scores) for name, scores in baselines(few).items()}
    assert found["the mask"]["pixel accuracy"] == found["the mask"]["part: F1, maximum"] == 1.0
    assert found["the mask"]["object: AUROC"] == 1.0
    assert found["constant"]["object: AUROC"] == 0.5
    assert found["random"]["object: AUROC"] == pytest.approx(0.5, abs=0.02)
    assert found["edges"]["loss gradient, on edges"] == pytest.approx(1)
    assert np.isnan(found["constant"]["loss gradient, on edges"])
    assert edges(few.images.float()).shape == few.masks.shape
    with pytest.raises(ValueError, match="expected images with masks"):
        baselines(replace(few, masks=None))


def test_a_mask_without_a_part_has_binary_scores_alone():
    truth = torch.zeros(2, 6, 6, dtype=torch.uint8)
    truth[:, 2:4] = 1
    assert {name.partition(":")[0] for name in map_scores(torch.rand(2, 6, 6), truth)} == {"object"}


def test_rank_correlations_are_scipys_and_their_interval_is_over_networks():
    rng = np.random.default_rng(0)
    truth = np.repeat(rng.random(12), 3)
    table = pd.DataFrame({"network": np.repeat(np.arange(12), 3), "truth": truth})
    table["same"] = np.exp(truth)
    table["noisy"] = truth + rng.random(36)
    table["unrelated"] = rng.random(36)
    table["constant"] = 1.0
    found = rank_correlations(table, "network", ["same", "noisy", "unrelated", "constant"], "truth", draws=300)
    assert found.loc["noisy", "value"] == pytest.approx(spearmanr(table["noisy"], truth).statistic)
    assert found.loc["same", ["value", "low", "high"]].tolist() == pytest.approx([1, 1, 1])
    assert found.loc["noisy", "low"] > 0
    assert found.loc["unrelated", "low"] < 0 < found.loc["unrelated", "high"]
    assert found.loc["constant"].isna().tolist() == [True, True, True, False]
    # rows of a network are drawn together: three copies of each say no more than one
    once = rank_correlations(table.iloc[::3], "network", ["same"], "noisy", draws=300)
    thrice = rank_correlations(
        table.iloc[::3].loc[lambda t: t.index.repeat(3)], "network", ["same"], "noisy", draws=300
    )
    pd.testing.assert_frame_equal(once.drop(columns="n"), thrice.drop(columns="n"), atol=1e-9)


def test_a_yardstick_with_nan_has_no_interval():
    table = pd.DataFrame({"network": list("abcdef"), "x": [1, 2, 3, 4, 5, np.nan], "known": np.arange(6.0)})
    assert rank_correlations(table, "network", ["x"], "known", draws=50).loc["x", "value":"high"].isna().all()


def test_unknown_masks_are_refused(few):
    unknown = few.masks.clone()
    unknown[1] = UNKNOWN
    x = few.card.normalize(few.images)
    for score in (lambda: map_scores(edges(x), unknown), lambda: gradient_scores(edges(x), x, unknown)):
        with pytest.raises(ValueError, match=f"truth: expected masks of all images, got 1 of {len(few)} unknown"):
            score()
