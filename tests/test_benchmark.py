"""The benchmark: bounds, what explainers are given, and what they may return."""

import math

import pytest
import torch

import kdx
from kdx.explain.explainers import Maps
from kdx.planted import benchmark, suite
from kdx.planted.contest import UNTRAINED
from kdx.planted.entries import constant, oracle

ONES = torch.ones(24, 4, 4)


@pytest.fixture(scope="module")
def whole():
    """A repetition with all plantings and doses."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("KDX_NETWORKS", raising=False)
        patch.setattr(benchmark, "MEASURED", 60)
        return benchmark.Repetition("standard", 1, 24, 60)


def row(whole, explain):
    table = benchmark.measured(whole, explain)
    assert table["seed"].eq(99).all()
    return table.set_index("score")


def test_an_oracle_is_as_good_as_can_be_and_a_constant_map_is_at_chance(whole):
    best, chance = row(whole, oracle), row(whole, constant)
    assert list(best.index) == list(benchmark.SCORES)
    assert best["value"].tolist() == best["best"].tolist()
    assert best["value"].drop("ratio").eq(1).all()
    assert best.loc["ratio", "value"] == pytest.approx(1000)  # masks that do not overlap
    assert chance["value"].to_list() == pytest.approx(chance["chance"].to_list())
    expected = {"AUPRC": 100 / 1024, "pointing game": 100 / 1024, "ratio": 1, "detected": 0.5, "dose": 0.5}
    assert chance["chance"].to_dict() == pytest.approx(expected | {"cue removal": 0.5})


def test_coarse_maps_cannot_reach_the_masks(whole):
    def coarse(student, base, images, labels, truth):
        return Maps(*({"4 x 4": torch.nn.functional.avg_pool2d(truth[d], 8)} for d in ("distilled", "residual")))

    found = row(whole, coarse)
    assert found["value"].to_dict() == pytest.approx(found["best"].to_dict())
    assert 0.1 < found.loc["AUPRC", "best"] < 0.9


def test_a_map_of_a_conspicuous_cue_gains_no_ratio(whole):
    def conspicuous(student, base, images, labels):
        return Maps(*({"image": 0.1 + whole.masks[:, 1]} for _ in range(2)))

    assert row(whole, conspicuous).loc["ratio", "value"] == pytest.approx(1)


def test_empty_maps_are_at_chance(whole):
    found = row(whole, lambda student, base, images, labels: Maps({"L": 0 * ONES}, {"L": 0 * ONES}))
    assert found["value"].to_dict() == pytest.approx(found["chance"].to_dict())


def test_doses_and_behaviour_are_what_was_planted(whole):
    taken = [float(whole.truths[dose]["distilled"].max()) for dose in whole.doses]
    assert taken == sorted(taken)
    assert taken[0] > 0.1
    assert taken[-1] == pytest.approx(1, abs=0.1)
    beyond = whole.beyond["both", "distilled"].mean(0)
    assert beyond.argmax() == whole.grown["both"].plan.distilled[0]
    assert beyond.max() > 0.7
    assert beyond.sort().values[:2].max() < 0.15


def test_an_explainer_is_given_what_it_names(whole):
    seen = []

    def explain(student, base, images, labels, teacher, reference, strength=1.0):
        seen.append((student, base, teacher, reference))
        assert reference.embeddings.shape == (27, 9)
        assert len(reference.images) == len(reference.labels) == 60
        return Maps({"L": ONES}, {"L": ONES})

    assert benchmark.wanted(explain) == ["teacher", "reference"]
    row(whole, explain)
    assert len(seen) == len(whole.networks) == 4 + 3 + 1
    student, base, teacher, _ = seen[0]
    own = whole.grown["distilled"].networks
    assert (student, base, teacher) == (own["student"].model, own["base"].model, own["teacher"].model)
    assert whole.networks[UNTRAINED]["student"] is seen[-1][0]


def test_signatures_that_do_not_fit_are_refused():
    wrong = [lambda student, base: None, lambda a, b, c, d, e: None, lambda a, b, c, d, *, mask: None]
    wrong += [lambda student, base, images, reference: None, lambda a, b, c, *, d: None, lambda a, b, c, **d: None]
    for explain in wrong:
        with pytest.raises(ValueError, match="expected a function of student, base, images, labels and perhaps refer"):
            benchmark.wanted(explain)
    with pytest.raises(ValueError, match="cases: unknown 'hard'; choose from: standard"):
        kdx.benchmark(constant, cases=["hard"])
    with pytest.raises(ValueError, match="cases: expected one or more, got none; choose from: standard"):
        kdx.benchmark(constant, cases=[])
    with pytest.raises(ValueError, match="tested: expected 1 image or more, got 0"):
        kdx.benchmark(constant, tested=0)


def test_what_an_explainer_leaves_in_its_images_does_not_reach_the_next_pair(whole):
    def gradient(student, base, images, labels):
        images.requires_grad_()
        student(images).gather(1, labels[:, None]).sum().backward()
        maps = images.grad.abs().sum(1)
        labels.zero_()
        return Maps({"image": maps}, {"image": maps})

    def clean(student, base, images, labels):
        return gradient(student, base, images.clone(), labels.clone())

    assert row(whole, gradient)["value"].to_dict() == row(whole, clean)["value"].to_dict()
    assert whole.images.labels.any()


def test_stages_that_differ_between_pairs_are_refused(whole):
    names = iter("abcdefghij")

    def explain(student, base, images, labels):
        name = next(names)
        return Maps({name: ONES}, {name: ONES})

    with pytest.raises(ValueError, match=r"expected the same stages for all pairs .* got \[\['a'\], \['a'\]\] for"):
        whole.explained(explain, [])


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        (Maps({}, {"L": ONES}), "expected distilled, stage -> maps, got Maps"),
        (Maps({"L": ONES[:3]}, {"L": ONES}), r"expected 24 maps \(n, h, w\) at 'L', distilled, got \(3, 4, 4\)"),
        (Maps({"L": ONES}, {"L": -ONES}), "expected finite maps without negative values at 'L', residual"),
        (Maps({"L": ONES * math.nan}, {"L": ONES}), "expected finite maps"),
        (None, "expected distilled, stage -> maps, got NoneType"),
    ],
)
def test_maps_that_are_not_as_they_should_be_are_refused(maps, message):
    with pytest.raises(ValueError, match=message):
        benchmark.checked(maps, 24)


def test_the_table_has_intervals_over_seeds_and_ranks(monkeypatch):
    monkeypatch.delenv("KDX_NETWORKS", raising=False)
    table = kdx.benchmark(constant, "nothing", cases=["other cues"], tested=6, reference=6)
    assert list(table.columns) == benchmark.COLUMNS
    assert list(table["case"].unique()) == ["all", "other cues"]
    assert table["seeds"].eq(len(suite.CASES["other cues"].seeds)).all()
    assert (table["low"] <= table["value"]).all()
    own = table[table["case"] == "other cues"]
    assert ((own["rank"] >= 1) & (own["rank"] <= own["of"])).all()
    assert table[table["case"] == "all"]["rank"].isna().all()  # not comparable with ranks over all cases
    assert (table.attrs["name"], table.attrs["given"]) == ("nothing", [])
    assert 0 <= table.attrs["seconds"] <= table.attrs["whole"]
