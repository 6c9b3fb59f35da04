import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch

import kdx
from kdx.data.broden import cue_probe
from kdx.data.cues import Scene, draw
from kdx.inference import jackknife
from kdx.intervals import over_folds
from kdx.measure.detectors import at_equal_accuracy, detector_scores, dissect_all

from .probes import Given, as_given, make_probe

pytestmark = pytest.mark.usefixtures("one_thread")

CATEGORIES = {"object": ("cat", "dog"), "part": ("head",)}


def dissect_units(concepts, n=12, stage="L1", quantile=0.1):
    """Dissect a network with one unit for each of ``concepts``, which is the concept's own mask."""
    masks = torch.zeros(n, 2, 4, 4, dtype=torch.int16)
    masks[:, 0, 0, 0], masks[:, 0, 3, 3], masks[:, 1, 1, 2] = 1, 2, 3
    places = {"cat": (0, 0), "dog": (3, 3), "head": (1, 2)}
    table = torch.zeros(n, len(concepts), 4, 4)
    for unit, name in enumerate(concepts):
        table[(slice(None), unit, *places[name])] = 1
    network = Given(table)
    return kdx.dissect(
        network,
        make_probe(masks, CATEGORIES),
        quantile=quantile,
        normalize=as_given,
        layers={stage: "stages.0"},
        permutations=0,
    )


def value(table, category, count):
    return table.set_index(["category", "count"]).loc[(category, count), "value"]


def test_detectors_are_counted_by_hand():
    table = detector_scores(dissect_units(["cat", "cat", "head"]), resamples=3, base=dissect_units(["cat", "dog"]))
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


def drawn(n, resamples):
    return np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), resamples)


def test_parts_give_the_variance_of_the_bootstrap(found):
    iou = found.units["iou"].median()
    row = detector_scores(found, [iou], resamples=8).iloc[0]
    shares = (found.best(("L2", 0.02), drawn(120, 8))[1] >= iou).mean(1)
    assert shares.std() > 0
    half = 2.364624 * shares.std(ddof=1)  # Student's t, 7 degrees of freedom
    assert (row["low"], row["high"]) == (pytest.approx(row["value"] - half), pytest.approx(row["value"] + half))
    assert row["parts"] == pytest.approx(row["value"] + np.sqrt(8) * (shares - shares.mean()))


def test_standard_errors_are_those_of_images_drawn_anew():
    """400 sets of 100 images, each of which is told its standard error; the block jackknife's is far too large."""
    g, sets = torch.Generator().manual_seed(0), 400
    n = 100 * sets
    masks, activations = torch.zeros(n, 1, 2, 2, dtype=torch.int16), torch.randn(n, 40, 2, 2, generator=g)
    masks[:, 0, 0, 0] = torch.rand(n, generator=g) < 0.5
    activations[:, :, 0, 0] += torch.linspace(0, 4, 40) * masks[:, :, 0, 0]  # units of rising IoU
    network, images = Given(activations), torch.arange(n).view(n, 1, 1, 1).expand(n, 3, 2, 2)
    probe, settings = make_probe(masks, {"object": ("cat",)}, images=images), {"normalize": as_given}
    found = kdx.dissect(network, probe, None, 0.05, 0.3, layers=network.layers, permutations=0, **settings)
    values, bootstrap, blocks = [], [], []
    for some in np.arange(n).reshape(sets, -1):
        counts = {at: tuple(of[some] for of in both) for at, both in found._counts.items()}
        part = dataclasses.replace(found, _counts=counts, _shown=found._shown[some])
        row = detector_scores(part).iloc[0]
        without = (part.best(("L1", 0.05), 1 - np.repeat(np.eye(10), 10, axis=1))[1] >= 0.3).mean(1)
        values.append(row["value"])
        bootstrap.append(row["parts"].var(ddof=1) / 100)
        blocks.append(jackknife(row["value"], without).var(ddof=1) / 10)
    truth = np.std(values, ddof=1)
    assert np.sqrt(np.mean(bootstrap)) == pytest.approx(truth, rel=0.12)
    assert np.sqrt(np.mean(blocks)) > 1.2 * truth


def test_sets_of_images_are_the_same_whatever_the_memory(found, monkeypatch):
    once = detector_scores(found)
    monkeypatch.setattr("kdx.measure.dissection.AT_ONCE", 1000)
    pd.testing.assert_frame_equal(detector_scores(found), once)


def test_there_are_no_more_sets_than_images():
    assert {len(parts) for parts in detector_scores(dissect_units(["cat"], n=12), resamples=50)["parts"]} == {12}


def test_beyond_looks_at_the_base_on_each_set_of_images_too():
    """A base that detects the concept in all images, but not in sets where most images are not among its hits."""
    masks = torch.zeros(12, 1, 4, 4, dtype=torch.int16)
    masks[:, 0, 0, 0] = 1
    everywhere, seldom = torch.zeros(2, 12, 1, 4, 4)
    everywhere[:, 0, 0, 0] = 1
    seldom[:6, 0, 0, 0] = 1  # IoU: the share of a set that is among the first six images
    probe = make_probe(masks, {"object": ("cat",)})
    student, base = (
        kdx.dissect(network, probe, None, 0.1, 0.5, normalize=as_given, layers=network.layers, permutations=0)
        for network in (Given(everywhere), Given(seldom))
    )
    table = detector_scores(student, resamples=9, base=base).set_index(["category", "count"])
    beyond = drawn(12, 9)[:, :6].sum(1) < 6
    assert 0 < beyond.sum() < 9
    assert table.loc[("all", "beyond"), "value"] == 0
    assert table.loc[("all", "beyond"), "parts"] == pytest.approx(3 * (beyond - beyond.mean()))
    assert table.loc[("all", "total"), "parts"] == pytest.approx(np.ones(9))


def test_tables_of_folds_are_averaged(found):
    table = detector_scores(found)
    both = over_folds(
        pd.concat([table.assign(fold=1), table.assign(fold=2)]),
        ["stage", "quantile", "category", "count"],
    )
    assert both["value"].tolist() == pytest.approx(table["value"].tolist())
    assert (both["folds"] == 2).all()


def test_wrong_arguments_are_named(found):
    with pytest.raises(ValueError, match="resamples: expected at least 2, got 1"):
        detector_scores(found, resamples=1)
    with pytest.raises(ValueError, match="the same images, 12 of"):
        detector_scores(dissect_units(["cat"]), base=found)
    for iou in (0, 1.5, [0.1, 0.1], ()):
        with pytest.raises(ValueError, match=r"iou: expected different values in \(0, 1\]"):
            detector_scores(found, iou)
    for other, missing in (({"stage": "L2"}, "L1, 0.1"), ({"quantile": (0.2, 0.3)}, "L1, 0.1")):
        with pytest.raises(ValueError, match=f"stages and quantiles of the network, got none at {missing}; dissect"):
            detector_scores(dissect_units(["cat"]), base=dissect_units(["dog"], **other))


def test_one_iou_is_as_a_list_of_it(found):
    pd.testing.assert_frame_equal(detector_scores(found, 0.05), detector_scores(found, [0.05]))


def linear(accuracies, offset=0.0, noise=None, slope=2.0):
    """Detectors that follow accuracy, fold x part, and the accuracies by fold."""
    of = pd.Series(accuracies, index=pd.Index(range(1, len(accuracies) + 1), name="fold"))
    parts = pd.DataFrame({b: slope * of + 0.1 + offset for b in range(4)})
    return (parts if noise is None else parts + noise), of


def test_detectors_at_equal_accuracy_are_those_above_the_line():
    given = {
        "base": linear([0.5, 0.6, 0.7]),
        "second base": linear([0.6, 0.5, 0.9]),
        "one": linear([0.8, 0.9, 0.7], 0.3),
    }
    given["none"] = linear([0.95, 0.9, 0.8])
    detectors, accuracy = ({name: pair[i] for name, pair in given.items()} for i in (0, 1))
    of = {name: at_equal_accuracy(detectors, accuracy, name, ["base", "second base"]) for name in ("one", "none")}
    assert of["one"].shape == (3, 4)
    assert of["one"] == pytest.approx(np.full((3, 4), 0.3))
    assert of["none"] == pytest.approx(np.zeros((3, 4)))  # more detectors by its accuracy alone


def test_the_uncertainty_of_the_line_is_in_the_parts():
    rng = np.random.default_rng(0)
    found, spread = [], []
    for _ in range(60):
        noise = [rng.normal(0, 0.02, (10, 1)) for _ in range(3)]
        levels = rng.uniform(0.5, 0.6, (2, 10))
        given = {
            name: linear(level, noise=n) for name, level, n in zip(("base", "second base"), levels, noise, strict=False)
        }
        given["far"] = linear(np.full(10, 0.7), noise=noise[2])  # beyond the others, so the slope matters
        detectors, accuracy = ({name: pair[i] for name, pair in given.items()} for i in (0, 1))
        parts = at_equal_accuracy(detectors, accuracy, "far", ["base", "second base"]).mean(1)
        found.append(parts.mean())
        spread.append(parts.std(ddof=1) / np.sqrt(10))
    assert np.mean(spread) == pytest.approx(np.std(found), rel=0.35)
    assert np.mean(spread) > 2 * 0.02 / np.sqrt(10)  # more than the network's own


def test_no_line_without_folds_or_spread():
    same = {"base": linear([0.5, 0.5]), "one": linear([0.6, 0.7])}
    detectors, accuracy = ({name: pair[i] for name, pair in same.items()} for i in (0, 1))
    with pytest.raises(ValueError, match="expected reference networks that differ"):
        at_equal_accuracy(detectors, accuracy, "one", ["base"])
    with pytest.raises(ValueError, match="expected two folds or more of one, base, got 1"):
        at_equal_accuracy(detectors, accuracy | {"base": accuracy["base"].loc[[1]]}, "one", ["base"])


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
