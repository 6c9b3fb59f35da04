import math
from itertools import permutations as orders

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from torch import nn

import kdx
from kdx import Recipe, cross_chains, rank_teachers
from kdx.measure.teachers import (
    complexity,
    evaluate_chains,
    fidelity,
    gains,
    measure_students,
    name_chain,
    rank,
    rank_agreement,
)

QUICK = {"recipe": Recipe(epochs=1, batch_size=16, lr=0.05), "k": 2, "device": "cpu"}
STUDENT, MIDDLE, LARGE = "resnet10@0.125", "resnet18@0.125", "resnet10@0.25"


def table(values, measure="accuracy"):
    """Rows of network -> values by fold."""
    return pd.DataFrame(
        [
            {"network": name, "fold": fold, "measure": measure, "value": value}
            for name, row in values.items()
            for fold, value in enumerate(row, 1)
        ]
    )


def test_complexity_by_hand():
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 5 * 6, 7)).train()
    found = complexity(network, (3, 5, 6))
    assert found.parameters == 4 * 3 * 9 + 4 + 7 * 120 + 7
    assert found.flops == 2 * (5 * 6 * 4 * 3 * 9 + 7 * 120)
    assert network.training
    assert complexity(kdx.build("resnet18", 1000), (3, 224, 224)).flops == pytest.approx(2 * 1.814e9, rel=1e-3)


def test_fidelity_by_hand():
    teacher = torch.tensor([[0.5, 0.5], [0.9, 0.1], [0.2, 0.8]], dtype=torch.float64).log() + 3
    student = torch.tensor([[0.25, 0.75], [0.9, 0.1], [0.5, 0.5]], dtype=torch.float64).log()
    found = fidelity(student[1:], teacher[1:])
    by_hand = 0.2 * math.log(0.2 / 0.5) + 0.8 * math.log(0.8 / 0.5)
    assert found.agreement == 0.5  # argmax takes the first of equals
    assert found.kl == pytest.approx(by_hand / 2)
    assert fidelity(teacher, teacher) == (1.0, 0.0)
    both = fidelity(student, teacher).kl, fidelity(teacher, student).kl
    assert both[0] == pytest.approx(stats.entropy([[0.5, 0.9, 0.2], [0.5, 0.1, 0.8]],
                                                  [[0.25, 0.9, 0.5], [0.75, 0.1, 0.5]]).mean())  # fmt: skip
    assert both[0] != pytest.approx(both[1])
    with pytest.raises(ValueError, match=r"expected logits .* got \(3, 2\) and \(2, 2\)"):
        fidelity(student, teacher[1:])


def test_rank_ties_what_cannot_be_told_apart():
    noise = np.array([[0.01, -0.01, 0.0], [0.0, 0.01, -0.01], [-0.01, 0.0, 0.01]])
    folds = np.array([0.0, 0.3, -0.3])  # all networks move with the fold, so their differences do not
    means = {"worst": 0.1, "best": 0.5, "second": 0.48}
    values = {name: mean + folds + e for (name, mean), e in zip(means.items(), noise, strict=True)}
    found = rank(table(values)).set_index("network")
    assert list(found.index) == ["best", "second", "worst"]
    assert found[["best", "worst"]].to_numpy().tolist() == [[1, 2], [1, 2], [3, 3]]
    half = stats.t.ppf(0.975, 2) * math.sqrt(1 / 3 + 1 / 2) * np.std(values["best"], ddof=1)
    assert found.loc["best", ["low", "high"]].tolist() == pytest.approx([0.5 - half, 0.5 + half])
    with pytest.raises(ValueError, match="by: expected one of accuracy, got 'speed'"):
        rank(table(values), "speed")


def test_rank_pairs_by_image_where_folds_share_the_images():
    rng = np.random.default_rng(0)
    images = rng.normal(size=40)  # as large as all differences, but the same for all networks
    own = rng.normal(scale=0.05, size=(3, 40))  # what an image means to one network, in every fold
    values = table({name: [mean] * 3 for name, mean in {"a": 0.0, "b": 0.1, "c": 0.9}.items()})
    hits = [images + own["abc".index(name)] + rng.normal(scale=0.01, size=40) for name in values["network"]]
    values["parts"] = [v - h.mean() + h for v, h in zip(values["value"], hits, strict=True)]
    assert rank(values).set_index("network")[["best", "worst"]].loc[["c", "b", "a"]].to_numpy().tolist() == [
        [1, 1], [2, 2], [3, 3],
    ]  # fmt: skip
    values["parts"] = [p + rng.normal(size=40) for p in values["parts"]]  # of fold and image
    assert rank(values).set_index("network").loc[["a", "b"], ["best", "worst"]].drop_duplicates().shape == (1, 2)


def test_rank_knows_what_should_be_small():
    values = pd.concat([table({"a": [1.0, 1.0], "b": [2.0, 2.0]}, m) for m in ("accuracy", "KL", "cost")])
    found = rank(values, "cost").set_index(["measure", "network"])["best"]
    assert found.unstack().loc[["accuracy", "KL", "cost"]].to_numpy().tolist() == [[2, 1], [1, 2], [1, 2]]
    assert rank(values, "KL")["network"].iloc[0] == "a"
    assert rank(values, "accuracy")["network"].iloc[0] == "b"


def test_gains_are_within_the_fold_and_of_accuracy_and_rs_alone():
    values = pd.concat(
        [table({"base": [0.5, 0.6], "a": [0.7, 0.9]}, m) for m in ("accuracy", "RS L1")]
        + [table({"base": [5.0, 5.0], "a": [7.0, 9.0]}, "cost"), table({"a": [0.8, 0.7]}, "agreement")]
    )
    found = gains(values).set_index(["measure", "fold"])["value"]
    assert found.loc["accuracy"].tolist() == pytest.approx([0.2, 0.3])
    assert found.loc["RS L1"].tolist() == pytest.approx([0.2, 0.3])
    assert found.loc["cost"].tolist() == [7, 9]
    assert found.loc["agreement"].tolist() == [0.8, 0.7]


def test_rank_agreement_against_all_orders():
    full = table({name: [value, value + 0.1] for name, value in zip("abcd", (4, 3, 2, 1), strict=True)})
    found = rank_agreement(full, full).loc["accuracy"]
    assert found[["spearman", "value", "low", "high", "between_folds"]].tolist() == pytest.approx([1] * 5)
    assert found["p"] == pytest.approx(1 / 24)
    short = table({"a": [2, 4, 1], "b": [3, 1, 3], "c": [3, 2, 2], "d": [9, 3, 4]})
    full = table({"a": [4, 4, 1], "b": [3, 3, 3], "c": [2, 1, 2], "d": [1, 2, 4]})
    found = rank_agreement(short, full).loc["accuracy"]
    one, two = (v.pivot(index="fold", columns="network", values="value") for v in (short, full))
    x, y = one.mean(), two.mean()
    at_least = [stats.spearmanr(x[list(order)], y).statistic >= found["spearman"] - 1e-9 for order in orders("abcd")]
    assert found["spearman"] == pytest.approx(stats.spearmanr(x, y).statistic)
    assert found["p"] == pytest.approx(np.mean(at_least))
    within = [stats.spearmanr(one.loc[f], two.loc[f]).statistic for f in (1, 2, 3)]
    assert found["value"] == pytest.approx(np.mean(within))
    assert found["high"] <= 1
    between = [stats.spearmanr(two.loc[f], two.loc[g]).statistic for f, g in ((1, 2), (1, 3), (2, 3))]
    assert found["between_folds"] == pytest.approx(np.mean(between))
    with pytest.raises(ValueError, match="expected the same folds and three or more networks in both"):
        rank_agreement(full, full[full["network"] != "a"])


def test_rank_agreement_draws_permutations_of_many_networks():
    values = np.random.default_rng(0).permuted(np.tile(np.arange(9.0), (2, 1)), axis=1)
    short, full = (table({name: [v, v] for name, v in zip("abcdefghi", row, strict=True)}) for row in values)
    found = rank_agreement(short, full).loc["accuracy"]
    assert found["p"] == pytest.approx(stats.spearmanr(*values, alternative="greater").pvalue, abs=0.02)
    assert rank_agreement(full, full).loc["accuracy", "p"] == pytest.approx(1e-4)


def test_what_is_not_known_is_not_ranked():
    full = table({"a": [1.0, 1.1], "b": [2.0, 2.1], "c": [3.0, np.nan]})
    ranks = rank(full).set_index("network")[["best", "worst"]]
    assert ranks.loc[["a", "b"]].to_numpy().tolist() == [[2, 2], [1, 1]]
    assert ranks.loc["c"].isna().all()
    assert rank_agreement(full, full).loc["accuracy", ["spearman", "p", "value"]].isna().all()
    level = table({"a": [1.0, 1.0], "b": [1.0, 1.0], "c": [1.0, 1.0]})
    assert rank_agreement(level, full.fillna(4)).loc["accuracy", ["spearman", "p", "value"]].isna().all()
    with pytest.raises(ValueError, match=r"every network in every fold, got {'a': 2, 'b': 2, 'c': 1} folds"):
        rank(full.dropna())


def test_measures_of_chains(shapes16, shared_home):
    runs = cross_chains(shapes16["train"], {"direct": [LARGE, STUDENT]}, **QUICK)
    embeddings = kdx.label_embeddings(shapes16["train"].classes, "one-hot")
    images = shapes16["test"]
    scoring = {"batches": 2, "batch_size": 20, "permutations": 0}
    answers = evaluate_chains(runs, images, "cpu")
    assert len(answers) == 2 * 3  # base, teacher and student of each fold
    whole = measure_students(runs, answers, images, embeddings, **scoring)
    found = measure_students(runs, answers, lambda fold: images, embeddings, **scoring)
    assert found["parts"].isna().all()  # folds may have images of their own
    assert whole["value"].equals(found["value"])
    shared = whole[whole["measure"] != "cost"]
    assert [part.mean() for part in shared["parts"]] == shared["value"].tolist()
    gained = gains(whole).set_index(["measure", "fold"])["parts"]
    hits = [kdx.evaluate(runs[n, 1][-1].model, images, "cpu").predictions == images.labels for n in ("direct", "base")]
    assert gained["accuracy", 1].tolist() == (hits[0].double() - hits[1].double()).tolist()
    found = found.set_index(["network", "fold", "measure"])["value"]
    teacher, student = runs["direct", 2]
    answers = [kdx.evaluate(run.model, images, "cpu") for run in (student, teacher)]
    assert found["direct", 2, "accuracy"] == answers[0].accuracy
    assert found["direct", 2, "teacher's accuracy"] == answers[1].accuracy
    assert found["direct", 2, "agreement"] == fidelity(*(a.logits for a in answers)).agreement
    x = images.card.normalize(images.images)
    scores = kdx.rs(student.model, x, images.labels, embeddings, **scoring).set_index("stage")["value"]
    assert found["direct", 2, "RS L4"] == scores["L4"]
    small, large = (complexity(run.model, images.card.size).flops / 1e9 for run in (student, teacher))
    assert found["base", 1, "cost"] == pytest.approx(3 * small)
    assert found["direct", 1, "cost"] == pytest.approx(3 * large + 3 * small + large)  # an epoch of each
    assert ("base", 1, "agreement") not in found.index


def test_rank_teachers_spends_the_budget_on_the_student_alone(shapes16, shared_home):
    settings = QUICK | {"recipe": Recipe(epochs=2, batch_size=16, lr=0.05)}
    found = rank_teachers(
        STUDENT, [LARGE, [LARGE, MIDDLE]], shapes16["train"], budget=1, batches=2, batch_size=20, **settings
    )
    assert set(found.table["network"]) == {LARGE, f"{LARGE} via {MIDDLE}"}
    measures = {"accuracy", "teacher's accuracy", "agreement", "KL", "cost", "RS L1", "RS L2", "RS L3", "RS L4"}
    assert set(found.table["measure"]) == measures
    assert (found.table["low"] <= found.table["value"]).all()
    assert (found.table["folds"] == 2).all()
    cost = found.values[found.values["measure"] == "cost"].groupby("network")["value"].mean()
    small, middle, large = (
        complexity(kdx.build(name, 10, "small"), (3, 32, 32)).flops / 1e9 for name in (STUDENT, MIDDLE, LARGE)
    )
    assert cost[LARGE] == pytest.approx(2 * 3 * large + 3 * small + large)
    assert cost[f"{LARGE} via {MIDDLE}"] == pytest.approx(2 * 3 * large + 2 * (3 * middle + large) + 3 * small + middle)


def test_rank_teachers_names_what_is_wrong_before_it_trains(tiny_shapes, home):
    def check(message, candidates=(LARGE, MIDDLE), error=ValueError, **settings):
        settings = {"batches": 2, "batch_size": 20} | QUICK | settings
        with pytest.raises(error, match=message):
            rank_teachers(STUDENT, candidates, tiny_shapes["train"], **settings)

    check("at least two teachers to compare, got 'resnet18'", candidates="resnet18")
    check("at least two teachers to compare", candidates=[LARGE])
    check("candidates: expected different ones", candidates=[LARGE, [LARGE]])
    check("chains: expected different ones", candidates=["resnet10", "resnet10@0.250"])
    check("candidates: expected names of models, got \\[3", candidates=[3, LARGE])
    check("unknown model 'resnet11'", candidates=["resnet11", LARGE])
    check("budget: expected 1 to 1 epochs, as many as the recipe's, got 0", budget=0)
    check("budget: expected 1 to 1 epochs, as many as the recipe's, got 2", budget=2)
    check("by: expected one of accuracy, .*, RS L4, got 'RS L9'", by="RS L9")
    check("embeddings", embeddings=torch.rand(3, 4))
    check("permutation", permutation=9, error=TypeError)
    check("more images than", batch_size=64)
    assert not (home / "runs").exists()
    assert name_chain(["a", "b", "c"]) == "a via b"
