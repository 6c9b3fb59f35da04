import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from kdx.inference import two_factor
from kdx.pages.claims import ACCURACY_MARGIN, ALPHA, SCORE_MARGIN, Verdict, beyond_controls, effects, judge, margins


def fold_means(mean, spread=0.1):
    """Three folds, each with its own images: the interval is that of t with 2 degrees of freedom."""
    return [mean - spread, mean, mean + spread]


def table(*columns, margin=0.5):
    return effects({f"effect {i}": values for i, values in enumerate(columns)}, margin)


POSITIVE, OPEN, NEGATIVE, SMALL = fold_means(2), fold_means(0.3, 0.4), fold_means(-2), fold_means(0.02, 0.02)


def test_effects_by_hand():
    found = table([1.0, 2.0, 3.0], [-1.0, 0.0, 1.0], margin=9.0)
    error = math.sqrt(1 / 3 + 1 / 2)  # the deviation of 1, 2, 3 is 1; half as many images are held out as trained on
    first = found.loc["effect 0"]
    assert first["value"] == 2
    half = stats.t.ppf(0.975, 2) * error
    assert first[["low", "high"]].tolist() == pytest.approx([2 - half, 2 + half])
    assert first["positive"] == pytest.approx(stats.t.sf(2 / error, 2))
    assert first["within"] == pytest.approx(stats.t.sf(7 / error, 2))
    assert first["detectable"] == pytest.approx(error * (stats.t.ppf(0.975, 2) + stats.t.ppf(0.8, 2)))
    assert found.loc["effect 1", "negative"] == pytest.approx(1)  # the smaller of 0.5 and 1 - p, twice
    assert found["folds"].tolist() == [3, 3]
    apart = effects({"seeds": [1.0, 2.0, 3.0], "folds": [1.0, 2.0, 3.0]}, 9.0, {"seeds": 0.0})
    half = stats.t.ppf(0.975, 2) * math.sqrt(1 / 3)  # repetitions that share no training images
    assert apart.loc["seeds", ["low", "high"]].tolist() == pytest.approx([2 - half, 2 + half])
    assert apart.loc["folds", "low"] == first["low"]
    assert effects({("a", "L1"): np.ones((3, 4)) * [1, 2, 3, 4]}, 1.0).index.tolist() == ["a, L1"]


@pytest.mark.parametrize(
    ("columns", "verdict"),
    [
        ([POSITIVE], "supported"),
        ([POSITIVE, POSITIVE], "supported"),
        ([POSITIVE, OPEN], "undecided"),
        ([POSITIVE, NEGATIVE], "not supported"),
        ([NEGATIVE], "not supported"),
        ([SMALL], "no effect larger than δ"),
        ([SMALL, [-v for v in SMALL]], "no effect larger than δ"),
        ([SMALL, POSITIVE], "undecided"),
        ([fold_means(0.1, 0.001)], "supported"),  # positive, though small
        ([POSITIVE, [1.0, math.nan, 1.2]], "undecided"),
        ([POSITIVE, [1.0, 1.0, 1.0]], "undecided"),  # nothing varies, so nothing is certain
        ([np.random.default_rng(0).normal(9, 1, (1, 50))], "undecided"),  # one fold
    ],
)
def test_judge(columns, verdict):
    assert judge(table(*columns)) == verdict


def test_all_effects_of_a_supported_claim_pass_the_uncorrected_test():
    barely = fold_means(two_factor(fold_means(0)).half(ALPHA) * 1.01)
    assert judge(table(*[barely] * 12)) == "supported"
    below = [-v for v in barely]
    assert judge(table(below)) == "not supported"
    assert judge(table(below, *[POSITIVE] * 11)) == "undecided"  # one of twelve has to be clearer


def test_each_effect_is_judged_in_its_own_unit():
    assert margins([("base", "accuracy"), "detectors"]) == {
        ("base", "accuracy"): ACCURACY_MARGIN,
        "detectors": SCORE_MARGIN,
    }
    small = {"accuracy": [0.001, -0.001, 0.0005], "detectors": [0.011, 0.012, -0.009]}
    table = effects(small, margins(small))
    assert table["margin"].tolist() == [ACCURACY_MARGIN, SCORE_MARGIN]
    alone = {name: effects({name: v}, margins([name])[name]).loc[name, "within"] for name, v in small.items()}
    assert table["within"].to_dict() == alone
    shown = Verdict("H1", "both", small, margins(small)).show()
    assert "(δ = 0.010 or 0.020)" in shown.caption
    assert "δ" in shown.columns
    assert "δ" not in Verdict("H1", "both", small, 0.02).show().columns  # the caption has it


def test_judge_wants_an_effect():
    with pytest.raises(ValueError, match="expected at least one"):
        judge(effects({}, 1.0))


def summary(*columns, form="{:+.2f}"):
    return Verdict(3, "student minus base", {f"effect {i}": v for i, v in enumerate(columns)}, 0.5, form).summary


def test_summary_names_the_effect_that_decides_and_what_can_be_seen():
    wide = "[-1.27, +1.87]; detectable with 80 % power: 1.96"  # t with 2 degrees of freedom
    assert summary(POSITIVE, OPEN) == f"1 of 2 effects shown to be positive; least certain: effect 1, +0.30 {wide}"
    assert summary(POSITIVE, NEGATIVE) == (
        "1 of 2 effects shown to be negative; clearest: effect 1, -2.00 [-2.39, -1.61]; "
        "detectable with 80 % power: 0.49"
    )
    assert summary(SMALL) == "shown to be within ±0.50; +0.02 [-0.06, +0.10]; detectable with 80 % power: 0.10"
    assert summary(POSITIVE, POSITIVE).startswith("2 of 2 effects shown to be positive; least certain: effect 0, +2.00")
    assert summary(OPEN).startswith("not shown to be positive; +0.30")
    assert summary([1.0, math.nan, 2.0]) == "an effect could not be measured"
    assert summary(POSITIVE, [1.0] * 3) == "no test, since effect 1 is the same in all folds and images"
    assert summary(np.arange(6.0)[None]) == "no test, with a single fold"


def test_the_table_of_a_verdict_has_its_words():
    html = Verdict(3, "student minus base", {"a": SMALL}, 0.5).show().to_html()
    assert "Claim 3, student minus base: no effect larger than δ (δ = 0.500)" in html


def scores(**networks):
    """Rows of scores at one stage: network -> (folds, batches)."""
    return pd.DataFrame(
        {"network": name, "stage": "L1", "fold": fold, "parts": np.asarray(parts)}
        for name, of in networks.items()
        for fold, parts in enumerate(of, 1)
    )


def test_beyond_controls_is_paired_and_joint():
    rng = np.random.default_rng(0)
    batches = rng.normal(size=(3, 8))  # shared by all networks
    noise = lambda: 0.01 * rng.normal(size=(3, 8))  # noqa: E731
    found = beyond_controls(
        scores(student=batches + 1 + noise(), low=batches + noise(), high=batches + 1 + noise(), once=batches[:1]),
        ["student"],
        ["low", "high", "once"],
    ).set_index("control")
    assert found["value"].tolist() == pytest.approx([1, 0, 1], abs=0.02)
    assert (found["p"] <= 0.05).tolist() == [True, False, True]
    assert found["folds"].tolist() == [3, 3, 1]
    one = two_factor(batches + 1 + noise() - batches)
    assert found.loc["low", "p"] >= 2 * one.p_above() / 3  # Holm: not smaller than its own p
    with pytest.raises(ValueError, match="expected rows of second base, got none"):
        beyond_controls(scores(student=batches), ["student"], ["second base"])
