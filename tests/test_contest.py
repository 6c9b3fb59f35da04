"""Explainers through the protocol: oracles, constants, and comparisons."""

import math
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

import kdx
from kdx.explain.explainers import Maps, fused_explainers
from kdx.pages import results
from kdx.planted.contest import (
    CLAIMED,
    DETECTED,
    compare,
    duels,
    is_best,
    oracles,
    over_seeds,
    over_stages,
    with_teachers,
)
from tests.planted import SCENE, constant, make_networks, make_plantings


@pytest.fixture(scope="module")
def grown():
    return make_plantings(make_networks())


def test_an_oracle_scores_best_and_a_constant_map_is_at_chance(grown):
    def entries(images, labels, embeddings):
        masks = grown[0].images.masks

        def oracle(student, base, x, y):  # of the planting `both`; knows the truth, asks no network
            names = kdx.stages(student, x[:1])
            return Maps(*(dict.fromkeys(names, (masks >> cue & 1).float()) for cue in (1, 2)))

        return {"oracle": oracle, "constant": constant}

    table = compare(grown, entries)
    scored = table[table["planting"] == "both"].set_index(["explainer", "direction", "stage", "score"])["value"]
    share = 64 / 24**2
    for direction in ("distilled", "residual"):
        for stage in ("L1", "L4"):
            best, chance = (scored[name, direction, stage] for name in ("oracle", "constant"))
            assert best[["mass on target", "pointing game", "AUROC", "AUPRC"]].tolist() == [1, 1, 1, 1]
            assert math.isnan(best["ratio"])  # this oracle is as sure of untrained networks
            assert best["false positive rate"] == 0
            assert chance[["mass on target", "AUPRC"]].tolist() == pytest.approx([share, share])
            assert chance[["AUROC", "ratio"]].tolist() == pytest.approx([0.5, 1])
            assert chance["pointing game"] == pytest.approx(share)
    nothing = table[(table["planting"] == "nothing") & (table["direction"] == "distilled")]
    assert set(nothing["score"]) == {"magnitude", "magnitude, second base", DETECTED}
    assert nothing[nothing["score"] == DETECTED]["value"].eq(0.5).all()  # neither looks at the networks
    claims = over_seeds(table).set_index(["score", "explainer", "stage"])["value"]
    assert claims[CLAIMED, "constant", "L2"] == claims[f"{CLAIMED}, second base", "constant", "L2"] == pytest.approx(1)


def test_the_mask_at_the_resolution_of_a_stage(grown):
    table = compare(grown, oracles(grown))
    both = table[(table["planting"] == "both") & (table["direction"] == "distilled")]
    found = both.set_index(["stage", "score"])["value"]
    assert found["L1", "mass on target"] == found["L1", "AUROC"] == 1
    assert 0.2 < found["L4", "mass on target"] < 0.9
    nothing = table[(table["planting"] == "nothing") & (table["score"] == "magnitude")]
    assert nothing["value"].eq(0).all()


def test_an_explainer_that_abstains_is_at_chance_and_an_oracle_tells_nothing_from_something(grown):
    def entries(images, labels, embeddings):
        def empty(student, base, x, y):
            names = kdx.stages(student, x[:1])
            return Maps(*(dict.fromkeys(names, torch.zeros(len(x), 4, 4)) for _ in range(2)))

        return {"empty": empty} | oracles(grown)(images, labels, embeddings)

    table = compare(grown, entries)
    found = table[table["explainer"] == "empty"]
    assert found[found["score"].isin(["ratio", "AUROC"])]["value"].to_numpy() == pytest.approx(
        [{"ratio": 1, "AUROC": 0.5}[s] for s in found["score"] if s in ("ratio", "AUROC")]
    )
    told = table[table["score"] == DETECTED].groupby("explainer")["value"].unique()
    assert (list(told["the mask itself"]), list(told["empty"])) == ([1.0], [0.5])


def row(seed, explainer, score, value, planting="both"):
    return (planting, seed, explainer, "distilled", "L1", score, value)


COLUMNS = ["planting", "seed", "explainer", "direction", "stage", "score", "value"]


def test_seeds_are_averaged_and_ratios_on_the_logarithmic_scale():
    rows = [row(s, "a", "ratio", v) for s, v in enumerate((1.0, 4.0, 16.0))]
    rows += [row(s, "a", "AUROC", v) for s, v in enumerate((0.5, 0.6, 0.7))]
    found = over_seeds(pd.DataFrame(rows, columns=COLUMNS)).set_index("score")
    half = 4.302653 * math.log(4) / math.sqrt(3)
    assert found.loc["ratio", "value"] == pytest.approx(4)
    assert found.loc["ratio", "low"] == pytest.approx(4 * math.exp(-half), rel=1e-4)
    assert found.loc["AUROC", ["value", "high"]].tolist() == pytest.approx([0.6, 0.6 + 4.302653 * 0.1 / 3**0.5])
    single = over_seeds(pd.DataFrame(rows[:1], columns=COLUMNS)).iloc[0]
    assert (single["value"], single["seeds"]) == (1, 1)
    assert math.isnan(single["low"])


def test_stages_are_averaged_ratios_and_magnitudes_by_their_geometric_mean():
    rows = [row(0, "a", score, 1.0) for score in ("ratio", "magnitude", "AUPRC")]
    rows += [(*r[:4], "L2", r[5], 4.0) for r in rows]
    found = over_stages(pd.DataFrame(rows, columns=COLUMNS)).set_index("score")
    assert found["value"].to_dict() == pytest.approx({"ratio": 2, "magnitude": 2, "AUPRC": 2.5})
    assert found["stage"].eq("all").all()


def stored(explainer, ratios, auprc, detected=()):
    rows = [("x", "both", seed, "distilled", explainer, ratio, value, math.nan)
            for seed, (ratio, value) in enumerate(zip(ratios, auprc, strict=True))]  # fmt: skip
    rows += [("x", "nothing", seed, "distilled", explainer, math.nan, math.nan, v) for seed, v in enumerate(detected)]
    return rows


def test_duels_are_paired_by_seed():
    a = stored("a", (2, 4, 8, 16), (0.5, 0.6, 0.7, 0.8), (0.5, 0.6, 0.7, 0.8))
    b = stored("b", (1, 2, 4, 8.5), (0.501, 0.6, 0.701, 0.8), (0.7, 0.81, 0.9, 1.0))
    columns = ["case", "planting", "seed", "direction", "explainer", "ratio", "AUPRC", DETECTED]
    table = pd.DataFrame(a + b + stored("c", (1, 9, 1, 9), (0.1, 0.2, 0.3, 0.4), (0.5, 0.5, 0.5, 0.6)), columns=columns)
    found = duels(table, "a", ["b", "c"]).set_index(["rival", "score"])
    assert found["verdict"].to_dict() == {
        ("b", "ratio"): "better", ("b", "AUPRC"): "open", ("b", DETECTED): "worse",
        ("c", "ratio"): "open", ("c", "AUPRC"): "better", ("c", DETECTED): "open",
    }  # fmt: skip
    factors = [math.log(2)] * 3 + [math.log(16 / 8.5)]
    assert found.loc[("b", "ratio"), "value"] == pytest.approx(math.exp(sum(factors) / 4))
    assert found.loc[("b", "AUPRC"), "value"] == pytest.approx(-0.0005)
    assert found["seeds"].eq(4).all()
    alone = duels(table, "a", ["b"]).set_index("score")["p"]
    assert found.loc[("b", "AUPRC"), "p"] >= alone["AUPRC"]  # Holm's
    with pytest.raises(ValueError, match="unknown explainer 'd'; choose from: a, b, c"):
        duels(table, "a", ["d"])


def test_one_seed_decides_no_duel():
    columns = ["case", "planting", "seed", "direction", "explainer", "ratio", "AUPRC", DETECTED]
    found = duels(pd.DataFrame(stored("a", (2,), (0.5,)) + stored("b", (1,), (0.4,)), columns=columns), "a", ["b"])
    assert found["verdict"].eq("open").all()
    assert found["value"].tolist() == pytest.approx([2, 0.1])
    assert found[["low", "high", "p"]].isna().all(axis=None)


def test_the_stored_contest_supports_what_the_book_recommends():
    """README, method and own-models name the fused maps; the page would say if the scores did not."""
    table, _ = results.load("planted_contest")
    rivals = [name for name in table["explainer"].unique() if not name.startswith("unexplained")]
    assert is_best(*(duels(t, "unexplained, fused", rivals) for t in (table, table.assign(case="all cases"))))
    assert not is_best(*(duels(t, "unexplained", rivals) for t in (table, table.assign(case="all cases"))))
    assert set(fused_explainers(*[torch.rand(6, 3, 16, 16), torch.zeros(6, dtype=torch.long), torch.eye(2)])) == set(
        results.load("planted_fused")[0]["explainer"]
    )


def test_a_ratio_is_relative_to_untrained_networks_so_a_conspicuous_cue_gains_nothing(grown):
    def entries(images, labels, embeddings):
        def conspicuous(student, base, x, y):
            names = kdx.stages(student, x[:1])
            maps = 0.1 + (grown[0].images.masks >> 1 & 1).float()  # the cue that is distilled, whatever the networks
            return Maps(dict.fromkeys(names, maps), dict.fromkeys(names, maps))

        return {"conspicuous": conspicuous}

    table = compare(grown, entries).set_index(["planting", "direction", "score"])
    assert table.loc[("both", "distilled", "ratio"), "value"].to_numpy() == pytest.approx(1)
    assert table.loc[("both", "distilled", "mass on target"), "value"].min() > 0.5


def test_a_claim_is_made_of_seeds_in_which_both_plantings_took():
    rows = [row(s, "a", kind, v, p) for s in (0, 1) for kind in ("magnitude", "magnitude, second base")
            for p, v in (("distilled", 10.0), ("nothing", 1.0)) if (s, p) != (1, "distilled")]  # fmt: skip
    found = over_seeds(pd.DataFrame(rows, columns=COLUMNS)).set_index("score").loc[CLAIMED]
    assert (found["value"], found["seeds"]) == (pytest.approx(0.1), 1)


def test_maps_that_see_the_teacher_are_compared_with_the_teacher_of_their_planting():
    networks = make_networks()
    teacher = SimpleNamespace(key="teacher", model=kdx.build("resnet10", 27, "small", 0.125, seed=7).eval())
    grown = make_plantings(networks | {"teacher": teacher})[:1]
    one = grown[0]
    known = one.reference.card.normalize(one.reference.images), one.reference.labels, SCENE.embeddings
    x, y = one.images.card.normalize(one.images.images), one.images.labels
    explain = with_teachers(grown)(*known)["transferred"]
    student, base, second = (one.networks[role].model for role in ("student", "base", "second base"))
    for network in (student, second):
        reference = kdx.Reference(network, base, known[0], teacher=teacher.model)
        found = explain(network, base, x, y).distilled
        assert all(torch.equal(found[s], m) for s, m in kdx.transferred(reference, x).distilled.items())
    untrained = kdx.build("resnet10", 27, "small", 0.125, seed=8).eval()
    assert all(m.isfinite().all() for m in explain(untrained, base, x, y).distilled.values())
    table = compare(grown, with_teachers(grown))
    assert {"transferred", "transferred, fused", "unexplained, fused"} <= set(table["explainer"])
