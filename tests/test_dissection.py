import math
import re

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

import kdx
from kdx.data.broden import cue_probe
from kdx.data.cues import Scene, draw
from kdx.measure import dissection
from kdx.measure.overlaps import Maps
from kdx.networks.vision_transformers import to_grid

from .probes import CATEGORIES, Given, as_given, dissect_literally, draw_probe, make_probe

pytestmark = pytest.mark.usefixtures("one_thread")


def check(table, probe, q, union="dataset", iou=0.05, **settings):
    """Compare a dissection of given activations with the literal one."""
    network = Given(table)
    found = kdx.dissect(
        network, probe, "L1", q, iou, union, normalize=as_given, layers=network.layers, permutations=2, **settings
    )
    thresholds, expected = dissect_literally(table, probe, q, union)
    best = [max(row) for row in expected]
    units = found.units
    np.testing.assert_allclose(units["threshold"], thresholds, rtol=1e-6)
    np.testing.assert_allclose(units["iou"].fillna(0), best, rtol=1e-12)
    assert units["detector"].tolist() == [value >= iou for value in best]
    names = [probe.concepts[row.index(value)] if value else None for row, value in zip(expected, best, strict=True)]
    assert [name if isinstance(name, str) else None for name in units["concept"]] == names
    of = dict(zip(probe.concepts, probe.category_of.tolist(), strict=True))
    categories = [None if name is None else probe.categories[of[name]] for name in names]
    assert [name if isinstance(name, str) else None for name in units["category"]] == categories
    check_totals(found, units, [name if value >= iou else None for name, value in zip(names, best, strict=True)], of)
    return found


def check_totals(found, units, detected, of):
    totals = found.totals(resamples=10).set_index("category")
    for i, category in enumerate(["all", *CATEGORIES]):
        concepts = [name for name in detected if name and (category == "all" or of[name] == i - 1)]
        row = totals.loc[category]
        assert (row["total"], row["unique"], row["units"]) == (len(concepts), len(set(concepts)), len(units))
        assert row["share"] == len(concepts) / len(units)
        assert row["dead"] == units["iou"].isna().sum()
        for name in ("total", "unique", "share"):
            assert row[f"{name}_low"] <= row[name] <= row[f"{name}_high"]


@pytest.mark.parametrize("union", dissection.UNIONS)
@pytest.mark.parametrize("shape", [(2, 3), (4, 4), (3, 5), (8, 12), (16, 9), (1, 1)])
def test_dissect_is_the_literal_one(shape, union):
    """At stages that are coarser than the masks, as fine, and finer, also by odd factors."""
    probe = draw_probe()
    table = torch.randn(len(probe), 5, *shape, generator=torch.Generator().manual_seed(1))
    check(table, probe, 0.25 if shape == (1, 1) else 0.1, union)


@pytest.mark.parametrize("union", dissection.UNIONS)
def test_dissect_is_the_literal_one_on_degenerate_activations(union):
    probe = draw_probe(10)
    g = torch.Generator().manual_seed(2)
    table = torch.zeros(10, 8, 4, 3)
    table[:, 1] = 7.0  # constant
    table[:, 2] = torch.randint(0, 3, (10, 4, 3), generator=g).float()  # many ties
    table[3, 3, 1, 1] = 5.0  # silent but for one place: its threshold is 0
    table[:, 4] = (torch.rand(10, 4, 3, generator=g) < 0.3).float()  # its largest value at too many places
    table[:, 5] = -torch.rand(10, 4, 3, generator=g).round(decimals=1)
    table[:, 6] = probe.annotated[:, 0, None, None].logical_not()  # only where no object is annotated
    table[:, 7] = 1e30 * torch.rand(10, 4, 3, generator=g)
    found = check(table, probe, 0.05, union)
    dead = found.units["unit"][found.units["iou"].isna()].tolist()
    assert dead[:2] == [0, 1]
    assert 4 in dead
    assert found.units.loc[[0, 1], ["p", "null"]].isna().all(axis=None)
    assert found.units.loc[3, ["threshold", "detector"]].tolist()[0] == 0


# --- units wired by hand ----------------------------------------------------------------------


def one_layer(weight):
    network = nn.Sequential(nn.Conv2d(3, len(weight), weight.shape[-1], padding=weight.shape[-1] // 2, bias=False))
    network[0].weight.data = weight
    return network


def test_a_unit_that_sees_a_colour_is_found():
    images = torch.zeros(10, 3, 10, 10, dtype=torch.uint8)
    masks = torch.zeros(10, 1, 10, 10, dtype=torch.int16)
    for i in range(10):  # 4 red pixels and 4 green ones in 100; red gets weaker
        images[i, 0, 2:4, i % 8 : i % 8 + 2], masks[i, 0, 2:4, i % 8 : i % 8 + 2] = 255 - i, 1
        images[i, 1, 7:9, 4:6], masks[i, 0, 7:9, 4:6] = 255, 2
    probe = make_probe(masks, {"colour": ("red", "green")}, images=images)
    network = one_layer(torch.tensor([[1.0, -1.0, -1.0], [0.0, 0.0, 1.0]])[:, :, None, None])
    for q, iou in ((0.04, 1.0), (0.02, 0.5), (0.1, 1.0)):  # beyond its own share, a unit that is 0 elsewhere stays
        found = kdx.dissect(network, probe, "L1", q, normalize=as_given, layers={"L1": "0"}, permutations=19)
        red, blue = found.units.to_dict("records")
        assert (red["concept"], red["category"], red["detector"]) == ("red", "colour", True)
        assert red["iou"] == iou
        assert red["p"] == 0.05
        assert math.isnan(blue["iou"])
    assert found.concepts[["annotated", "images", "coverage"]].values.tolist() == [[10, 10, 0.04], [10, 10, 0.04]]


def test_areas_and_annotated_images_by_hand():
    table = torch.zeros(3, 1, 2, 2)
    table[0, 0, 0, 0], table[1], table[2, 0, 0, 0] = 8, 2, 3  # on 4 x 4 pixels, a corner falls as 1, 3/4, 1/4, 0
    masks = torch.zeros(3, 2, 4, 4, dtype=torch.int16)
    masks[0, 0, :2, :3], masks[2, 1, :2, :2] = 1, 2
    annotated = [[True, True], [True, False], [False, True]]
    network, probe = Given(table), make_probe(masks, {"object": ("cat",), "part": ("head",)}, annotated)
    found = kdx.dissect(network, probe, "L1", 2 / 12, normalize=as_given, layers=network.layers, permutations=0)
    unit = found.units.iloc[0]
    assert (unit["threshold"], unit["area"]) == (2, 7 / 48)  # 4 pixels of 8 and 3 of 3, less than the share q
    assert (unit["concept"], unit["iou"]) == ("cat", 4 / 6)
    assert found.concepts[["annotated", "images", "coverage"]].values.tolist() == [[2, 1, 6 / 32], [2, 1, 4 / 32]]


def test_a_unit_that_sees_a_shape_is_found():
    plus = torch.tensor([[0.0, 1.0, 0.0], [1.0, 1.0, 1.0], [0.0, 1.0, 0.0]])
    images = torch.zeros(12, 3, 12, 12, dtype=torch.uint8)
    masks = torch.zeros(12, 1, 12, 12, dtype=torch.int16)
    for i in range(12):
        y, x = i % 5, i % 7
        images[i, :, y : y + 3, x : x + 3] = (100 * plus).byte()
        masks[i, 0, y : y + 3, x : x + 3] = plus.short()
        images[i, :, 9:12, 9:12], masks[i, 0, 9:12, 9:12] = 100, 2  # a square
    probe = make_probe(masks, {"shape": ("plus", "square")}, images=images)
    kernel = torch.where(plus > 0, 1.0, -1.0).expand(1, 3, 3, 3)  # 5 at the middle of a plus, 1 at that of a square
    found = kdx.dissect(one_layer(kernel), probe, "L1", 1 / 144, normalize=as_given, layers={"L1": "0"})
    unit = found.units.iloc[0]
    assert (unit["concept"], unit["iou"], unit["p"]) == ("plus", 1 / 5, 0.05)


def test_a_unit_that_sees_a_hue_of_the_generated_images_is_found():
    scene = Scene(cues=("colours",), cue_size=12)
    probe = cue_probe(*draw(scene, 90, 0), scene)
    opponent = torch.tensor([[1.0, -0.5, -0.5], [-0.5, 1.0, -0.5], [-0.5, -0.5, 1.0]])
    network = one_layer(opponent[:, :, None, None].expand(-1, -1, 5, 5).contiguous())  # smoothes the noise
    found = kdx.dissect(network, probe, quantile=0.024, normalize=as_given, layers={"L1": "0"}).units
    # the tint of value i of 3 is strongest in channel -i; backgrounds have colours too
    assert found["concept"].tolist() == ["first hue", "third hue", "second hue"]
    assert found["detector"].all()
    assert (found["p"] == 0.05).all()


# --- chance and controls ------------------------------------------------------------------------


def detectors(seed, exchanged):
    """A table of 200 units that see one of three objects, and its probe."""
    g = torch.Generator().manual_seed(seed)
    probe = draw_probe(40, (8, 12), seed)
    shown = probe.read_masks(torch.arange(40))[:, 0]
    which = torch.arange(200) % 3 + 1
    table = 9 * (shown[:, None] == which[:, None, None]) + torch.randn(40, 200, 8, 12, generator=g).square()
    strength = torch.rand(40, 200, 1, 1, generator=g)  # so that few images matter
    table = table * strength
    if exchanged:
        order = torch.rand(40, 200, generator=g).argsort(0)
        table = table.gather(0, order[:, :, None, None].expand_as(table))
    return table, probe


@pytest.mark.parametrize("union", dissection.UNIONS)
def test_exchanged_activations_give_few_detectors(union):
    shares = []
    for seed in range(3):
        table, probe = detectors(seed, exchanged=True)
        network = Given(table)
        found = kdx.dissect(
            network, probe, quantile=0.02, union=union, normalize=as_given, layers=network.layers, seed=seed
        )
        shares.append((found.units["p"] <= 0.05).mean())
        assert found.units["p"].min() >= 0.05 - 1e-12
    assert np.mean(shares) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 600)


def test_actual_detectors_are_beyond_chance():
    table, probe = detectors(0, exchanged=False)
    network = Given(table)
    found = kdx.dissect(network, probe, quantile=0.02, normalize=as_given, layers=network.layers)
    assert (found.units["p"] <= 0.05).mean() > 0.8
    assert (found.units["iou"] > found.units["null"]).mean() > 0.8
    totals = found.totals(resamples=20).iloc[0]
    assert totals["total"] > totals["by_chance"]


@pytest.mark.parametrize("union", dissection.UNIONS)
def test_exchanged_masks_are_counted_as_the_actual_ones(union, monkeypatch):
    monkeypatch.setattr(dissection, "_exchanges", lambda *_: orders)
    probe, table = draw_probe(12), torch.randn(12, 5, 4, 3)
    orders = torch.stack([torch.arange(12), *(torch.randperm(12) for _ in range(2))])
    network = Given(table)
    settings = dict(union=union, normalize=as_given, layers=network.layers, permutations=2)
    found = kdx.dissect(network, probe, None, 0.1, **settings)
    rows = torch.randperm(12, generator=torch.Generator().manual_seed(0))  # the order of the images
    concepts, best = found.chance["L1", 0.1]
    for i, order in enumerate(orders[1:]):
        source = torch.empty(12, dtype=torch.long)
        source[rows] = rows[order]
        exchanged = make_probe(probe.read_masks(source), CATEGORIES, probe.annotated[source])
        _, expected = dissect_literally(table, exchanged, 0.1, union)
        np.testing.assert_allclose(best[i], [max(row) for row in expected], rtol=1e-12)
        assert concepts[i].tolist() == [row.index(max(row)) for row in expected]
    actual = found.units["iou"].values
    np.testing.assert_allclose(found.units["p"], (1 + (best >= actual).sum(0)) / 3)
    np.testing.assert_allclose(found.units["null"], np.quantile(best, 0.95, axis=0))


def test_masks_are_exchanged_among_images_annotated_alike():
    annotated = torch.rand(60, 3) < 0.5
    orders = dissection._exchanges(annotated, 5, np.random.default_rng(0))
    assert orders[0].tolist() == list(range(60))
    for order in orders:
        assert order.sort().values.tolist() == list(range(60))
        assert torch.equal(annotated[order], annotated)
    assert (orders[1:] != orders[0]).any(1).all()


def test_rotated_units_span_the_same_space():
    probe, table = draw_probe(), torch.randn(8, 6, 4, 3)
    network = Given(table)
    settings = dict(quantile=0.1, normalize=as_given, layers=network.layers, permutations=0)
    one, same, other = (kdx.dissect(network, probe, rotation_seed=seed, **settings).units for seed in (0, 0, 1))
    assert one.equals(same)
    assert not one.equals(other)
    rotated = Maps(network, probe, "L1", as_given, network.layers, 0).of(torch.arange(8))["L1"]
    torch.testing.assert_close(rotated.norm(dim=1), table.norm(dim=1))
    assert not torch.allclose(rotated, table, atol=0.1)


# --- passes, stages, settings ---------------------------------------------------------------------


def test_one_pass_two_passes_and_several_batches_give_the_same(monkeypatch):
    probe, table = draw_probe(10), torch.randn(10, 6, 4, 3)
    network = Given(table)
    settings = dict(quantile=(0.05, 0.1), normalize=as_given, layers=network.layers, permutations=0)
    once = kdx.dissect(network, probe, **settings)
    assert kdx.dissect(network, probe, memory=0, **settings).units.equals(once.units)
    monkeypatch.setattr(dissection, "BATCH", 4)
    monkeypatch.setattr(dissection, "STEP", 3)
    for memory in (0, 2**30):
        again = kdx.dissect(network, probe, memory=memory, seed=1, **settings)
        assert again.units.equals(once.units)
        assert again.totals(resamples=9).equals(once.totals(resamples=9))


def test_several_stages_and_quantiles_at_once_are_as_one_by_one():
    probe = draw_probe()
    network = Given(torch.randn(8, 3, 4, 6), torch.randn(8, 5, 2, 3))
    settings = dict(normalize=as_given, layers=network.layers)
    both = kdx.dissect(network, probe, ["L2", "L1"], (0.2, 0.1), **settings)
    totals = both.totals(resamples=9)
    assert both.units["stage"].unique().tolist() == ["L2", "L1"]
    for (stage, q), rows in both.units.groupby(["stage", "quantile"]):
        alone = kdx.dissect(network, probe, stage, q, **settings)
        assert alone.units.equals(rows.reset_index(drop=True))
        part = totals[(totals["stage"] == stage) & (totals["quantile"] == q)]
        assert alone.totals(resamples=9).equals(part.reset_index(drop=True))


def test_tokens_are_dissected_as_grids():
    torch.manual_seed(0)
    network = torchvision.models.VisionTransformer(32, 8, 4, 2, 16, 32, num_classes=3).eval()
    probe = kdx.load_probe("planted", limit=30)
    card = kdx.DATASETS["planted"]
    found = kdx.dissect(network, probe, "L4", 0.05, normalize=card.normalize)
    images = card.normalize(probe.read_images(torch.arange(30)))
    layers = kdx.stages(network, images)
    grid = to_grid("L4", layers["L4"], kdx.activations(network, images, layers)["L4"], images)
    numbered = make_probe(
        probe.read_masks(torch.arange(30)),
        {name: [c for c, of in zip(probe.concepts, probe.category_of, strict=True) if of == i]
         for i, name in enumerate(probe.categories)},
    )  # fmt: skip
    given = Given(grid)
    expected = kdx.dissect(given, numbered, "L1", 0.05, normalize=as_given, layers=given.layers).units
    assert found.units.drop(columns="stage").equals(expected.drop(columns="stage"))


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantile", [0, 1, -0.1, 1.5, (), (0.1, 0.1), math.nan])
def test_a_quantile_lies_between_0_and_1(quantile):
    with pytest.raises(ValueError, match=r"quantile: expected different values in \(0, 1\)"):
        kdx.dissect(Given(torch.rand(8, 2, 2, 2)), draw_probe(), quantile=quantile, normalize=as_given)


def broken(**changes):
    probe = draw_probe()
    masks = probe.read_masks(torch.arange(8)).clone()
    annotated = probe.annotated.clone()
    if changes.get("annotated") is not None:
        annotated[:, 1] = False
        annotated[: changes["annotated"], 1] = True
    if changes.get("not annotated"):
        annotated[[3, 6], 2] = False
        masks[[3, 6], 2] = 6
    if "masks" in changes:
        masks = changes["masks"](masks)
    if "label" in changes:
        masks[5, 0, 0, 0] = changes["label"]
    if changes.get("unmarked"):
        masks[:, 2] = 0
    return make_probe(masks, CATEGORIES, annotated)


@pytest.mark.parametrize(
    ("message", "changes", "settings"),
    [
        ("unknown union 'both'; choose from: dataset, lite", {}, {"union": "both"}),
        ("permutations: expected 0 (no p) or more, got -1", {}, {"permutations": -1}),
        ("stage: expected some of L1, got L9", {}, {"stage": "L9"}),
        ("stage: expected some of L1, got []", {}, {"stage": []}),
        ("iou: expected different values in (0, 1], got 0", {}, {"iou": 0}),
        ("quantile 0.01 at L1: expected at least 100 activations of a unit, got 32 (8 images of 2 x 2", {}, {}),
        ("masks of each category in at least 2 images, got 1 in part", {"annotated": 1}, {}),
        ("masks of each category in at least 2 images, got 0 in part", {"annotated": 0}, {}),
        ("masks: expected 0 (no concept) to 6 (the last concept), got 0 to 7", {"label": 7}, {"quantile": 0.1}),
        ("masks: expected 0 (no concept) to 6 (the last concept), got -1 to 6", {"label": -1}, {"quantile": 0.1}),
        ("got colour in images [3, 6] of probe own, which are not", {"not annotated": True}, {"quantile": 0.1}),
        ("masks: expected integers (n, layers, h, w) of 1 images", {"masks": lambda of: of[:, 0]}, {"quantile": 0.1}),
        ("got torch.float32 (1, 4, 8, 12); correct", {"masks": lambda of: of.float()}, {"quantile": 0.1}),
        ("got torch.bool (1, 4, 8, 12); correct read_masks", {"masks": lambda of: of > 0}, {"quantile": 0.1}),
        ("pixels with a concept in each category, got none in part", {"unmarked": True}, {"quantile": 0.1}),
    ],
)
def test_bad_input_is_named(message, changes, settings):
    network = Given(torch.rand(8, 2, 2, 2))
    with pytest.raises(ValueError, match=re.escape(message)):
        kdx.dissect(
            network, broken(**changes), **{"quantile": 0.01, "normalize": as_given, "layers": network.layers} | settings
        )


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_activations_must_be_finite(value):
    table = torch.rand(8, 2, 2, 2)
    table[4, 1, 0, 0] = value
    network = Given(table)
    with pytest.raises(ValueError, match="L1: expected finite activations, got NaN or infinity"):
        kdx.dissect(network, draw_probe(), quantile=0.1, normalize=as_given, layers=network.layers)


def test_masks_of_a_probe_have_one_size(monkeypatch):
    monkeypatch.setattr(dissection, "BATCH", 1)
    probe, network = draw_probe(), Given(torch.rand(8, 2, 2, 2))
    masks = probe.read_masks
    object.__setattr__(probe, "read_masks", lambda rows: masks(rows)[..., : 12 if 4 not in rows else 6])
    with pytest.raises(
        ValueError, match=r"masks: expected \(n, layers, 8, \d+\) as those of the first image, got \(1, 4, 8"
    ):
        kdx.dissect(network, probe, quantile=0.1, normalize=as_given, layers=network.layers)
