"""Totals of a dissection; the rest of its tests are in test_dissection."""

import numpy as np
import pytest
import torch

import kdx
from kdx.measure import dissection

from .probes import Given, as_given, dissect_literally, draw_probe, make_probe

pytestmark = pytest.mark.usefixtures("one_thread")


def test_totals_count_resampled_images_as_often_as_they_are_drawn():
    probe = draw_probe(6)
    table = torch.randn(6, 4, 4, 3)
    network = Given(table)
    found = kdx.dissect(network, probe, "L1", 0.1, normalize=as_given, layers=network.layers, permutations=0)
    counts = [2, 0, 1, 3, 0, 0]
    _, expected = dissect_literally(table, probe, 0.1, counts=counts)
    concept, iou = found.best(("L1", 0.1), np.array([counts], dtype=float))
    np.testing.assert_allclose(iou[0], [max(row) for row in expected], rtol=1e-12)
    assert concept[0].tolist() == [row.index(max(row)) for row in expected]
    assert found.units["p"].isna().all()
    assert found.totals(resamples=5)["by_chance"].isna().all()


def test_totals_count_an_iou_that_is_exactly_the_threshold():
    masks = torch.zeros(4, 1, 2, 5, dtype=torch.int16)
    masks[:, 0, :, :] = 1
    masks[0, 0, 0, 0] = 0
    table = torch.arange(40.0).view(4, 1, 2, 5)
    network = Given(table)
    probe = make_probe(masks, {"object": ("cat",)})
    found = kdx.dissect(network, probe, None, 0.7, 28 / 39, normalize=as_given, layers=network.layers)
    assert found.units["iou"].tolist() == [28 / 39]
    assert found.totals(resamples=2)["total"].tolist() == [1, 1]


def test_totals_at_several_thresholds():
    probe, table = draw_probe(6), torch.randn(6, 20, 4, 3)
    network = Given(table)
    found = kdx.dissect(network, probe, "L1", 0.1, (0.05, 0.1), normalize=as_given, layers=network.layers)
    both = found.totals(resamples=20)
    assert both["threshold"].unique().tolist() == [0.05, 0.1]
    alone = found.totals(0.1, resamples=20)
    assert alone.equals(both[both["threshold"] == 0.1].reset_index(drop=True))
    assert not found.totals(1.0, resamples=20)["total"].any()
    with pytest.raises(ValueError, match=r"iou: expected different values in \(0, 1\], got 1.5"):
        found.totals(1.5)
    with pytest.raises(ValueError, match="resamples: expected at least 2, got 1"):
        found.totals(resamples=1)


def test_intervals_are_the_quantiles_of_resamples_moved_to_the_numbers_found():
    drawn = np.stack([np.arange(201.0), 2 * np.arange(201.0)])[:, None]  # quantiles 5, 100, 195, and twice these
    chance = np.array([[[3.0, 5, 10]], [[1, 2, 2]]])
    (row,) = dissection._rows({}, ["all"], 400, 7, np.array([[[120]], [[300]]]), drawn, chance)
    assert (row["total"], row["total_low"], row["total_high"]) == (120, 25, 215)
    assert (row["unique"], row["unique_low"], row["unique_high"]) == (300, 110, 400)  # no more than there are units
    assert (row["share"], row["share_low"], row["share_high"]) == (120 / 400, 25 / 400, 215 / 400)
    assert (row["by_chance"], row["units"], row["dead"]) == (6, 400, 7)
    (row,) = dissection._rows({}, ["all"], 400, 7, np.array([[[50]], [[50]]]), drawn, chance[:, :, :0])
    assert (row["total_low"], row["unique_low"]) == (0, 0)
    assert np.isnan(row["by_chance"])


def test_totals_are_quantiles_of_the_resamples_that_the_seed_draws():
    probe, table = draw_probe(12), torch.randn(12, 40, 4, 3, generator=torch.Generator().manual_seed(0))
    network = Given(table)
    found = kdx.dissect(network, probe, "L1", 0.1, normalize=as_given, layers=network.layers, permutations=9)
    iou = found.units["iou"].median()
    row = found.totals(iou, resamples=60, seed=3).iloc[0]
    weights = np.random.default_rng(3).multinomial(12, np.full(12, 1 / 12), 60).astype(float)
    drawn = (found.best(("L1", 0.1), weights)[1] >= iou).sum(1)
    low, middle, high = np.quantile(drawn, (0.025, 0.5, 0.975))
    assert low < middle < high
    assert (row["total_low"], row["total_high"]) == (row["total"] + low - middle, row["total"] + high - middle)
    by_chance = (found.chance["L1", 0.1][1] >= iou).sum(1)
    assert by_chance.min() < by_chance.max()
    assert row["by_chance"] == by_chance.mean()
