import numpy as np
import pandas as pd
import pytest
import torch

import kdx
from kdx.data.broden import cue_probe
from kdx.data.cues import Scene, draw
from kdx.intervals import over_folds
from kdx.measure.detectors import detector_scores, dissect_all

from .probes import Given, as_given, make_probe

pytestmark = pytest.mark.usefixtures("one_thread")

CATEGORIES = {"object": ("cat", "dog"), "part": ("head",)}


def dissect_units(concepts, n=12):
    """Dissect a network with one unit for each of ``concepts``, which is the concept's own mask."""
    masks = torch.zeros(n, 2, 4, 4, dtype=torch.int16)
    masks[:, 0, 0, 0], masks[:, 0, 3, 3], masks[:, 1, 1, 2] = 1, 2, 3
    places = {"cat": (0, 0), "dog": (3, 3), "head": (1, 2)}
    table = torch.zeros(n, len(concepts), 4, 4)
    for unit, name in enumerate(concepts):
        table[(slice(None), unit, *places[name])] = 1
    network = Given(table)
    return kdx.dissect(
        network, make_probe(masks, CATEGORIES), "L1", 0.1, normalize=as_given, layers=network.layers, permutations=0
    )


def value(table, category, count):
    return table.set_index(["category", "count"]).loc[(category, count), "value"]


def test_detectors_are_counted_by_hand():
    table = detector_scores(dissect_units(["cat", "cat", "head"]), blocks=3, base=dissect_units(["cat", "dog"]))
    assert value(table, "all", "total") == 1
    assert value(table, "all", "unique") == value(table, "object", "total") == pytest.approx(2 / 3)
    assert value(table, "object", "unique") == value(table, "part", "total") == pytest.approx(1 / 3)
    assert value(table, "all", "beyond") == value(table, "part", "beyond") == pytest.approx(1 / 3)
    assert value(table, "object", "beyond") == 0
    assert (table["units"] == 3).all()
    assert all(np.ptp(parts) < 1e-12 for parts in table["parts"])  # every image shows the same


@pytest.fixture(scope="module")
def found():
    images, labels, masks = draw(Scene(), 120, 0)
    network = kdx.build("resnet10", 27, "small", 0.125, seed=0).eval()
    probe = cue_probe(images, labels, masks, Scene())
    return kdx.dissect(network, probe, "L2", [0.02, 0.05], 0.03, normalize=kdx.DATASETS["planted"].normalize)


def test_means_of_parts_are_the_totals(found):
    table = detector_scores(found, [0.03, 0.05]).set_index(["quantile", "threshold", "category", "count"])
    totals = found.totals([0.03, 0.05], resamples=2)
    assert totals["total"].sum() > 0
    for row in totals.to_dict("records"):
        for count in ("total", "unique"):
            of = table.loc[(row["quantile"], row["threshold"], row["category"], count)]
            assert of["value"] * of["units"] == pytest.approx(row[count])
            assert of["low"] <= of["value"] <= of["high"]


def test_parts_give_the_variance_of_the_jackknife(found):
    iou = found.units["iou"].median()
    row = detector_scores(found, [iou], blocks=8).iloc[0]
    weights = np.ones((8, 120))
    for b, out in enumerate(np.array_split(np.random.default_rng(0).permutation(120), 8)):
        weights[b, out] = 0
    without = (found.best(("L2", 0.02), weights)[1] >= iou).mean(1)
    assert without.std() > 0
    assert row["parts"].var(ddof=1) / 8 == pytest.approx(7 / 8 * ((without - without.mean()) ** 2).sum())


def test_tables_of_folds_are_averaged(found):
    table = detector_scores(found)
    both = over_folds(
        pd.concat([table.assign(fold=1), table.assign(fold=2)]),
        ["stage", "quantile", "category", "count"],
    )
    assert both["value"].tolist() == pytest.approx(table["value"].tolist())
    assert (both["folds"] == 2).all()


def test_wrong_arguments_are_named(found):
    with pytest.raises(ValueError, match="expected 2 to 120"):
        detector_scores(found, blocks=1)
    with pytest.raises(ValueError, match="the same images, 12 of"):
        detector_scores(dissect_units(["cat"]), base=found)


def test_networks_are_dissected_at_the_same_time_as_one_by_one():
    probe = kdx.load_probe("planted", limit=40)
    models = {seed: kdx.build("resnet10", 27, "small", 0.125, seed=seed).eval() for seed in range(3)}
    settings = {"stage": "L2", "quantile": 0.05, "normalize": kdx.DATASETS["planted"].normalize, "permutations": 2}
    threads = torch.get_num_threads()
    found = dissect_all(models, probe, workers=3, **settings)
    assert torch.get_num_threads() == threads
    assert list(found) == [0, 1, 2]
    for seed, of in found.items():
        pd.testing.assert_frame_equal(of.units, kdx.dissect(models[seed], probe, **settings).units)
    with pytest.raises(ValueError, match="expected 0"):
        dissect_all(models, probe, workers=-1, **settings)
