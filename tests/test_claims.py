import math

import pandas as pd
import pytest
from scipy import stats

from kdx.pages.claims import Verdict, effects, judge


def table(*columns):
    return effects(pd.DataFrame({f"effect {i}": values for i, values in enumerate(columns)}))


def test_effects_by_hand():
    found = table([1.0, 2.0, 3.0], [-1.0, 0.0, 1.0]).loc["effect 0"]
    error = 1 / math.sqrt(3)  # of the mean: the deviation of 1, 2, 3 is 1
    assert found["value"] == 2
    assert found["low"] == pytest.approx(2 - stats.t.ppf(0.975, 2) * error)
    assert found["high"] == pytest.approx(2 + stats.t.ppf(0.975, 2) * error)
    assert found["ceiling"] == pytest.approx(2 + stats.t.ppf(1 - 0.05 / 2 / 2, 2) * error)  # two effects
    assert found["folds"] == 3


CERTAIN, UNCERTAIN, NEGATIVE = [1.0, 1.1, 1.2], [-1.0, 0.2, 1.2], [-1.2, -1.1, -1.0]


@pytest.mark.parametrize(
    ("columns", "verdict"),
    [
        ([CERTAIN], "supported"),
        ([CERTAIN, CERTAIN], "supported"),
        ([CERTAIN, UNCERTAIN], "undecided"),
        ([CERTAIN, NEGATIVE], "not supported"),
        ([NEGATIVE], "not supported"),
        ([CERTAIN, [1.0, math.nan, 1.2]], "undecided"),
    ],
)
def test_judge(columns, verdict):
    assert judge(table(*columns)) == verdict


def test_one_negative_effect_of_many_has_to_be_clearer():
    slightly = [-1.0, -0.5, -0.9]  # its 95 % interval ends below zero
    alone = table(slightly)
    assert alone["high"].item() < 0
    assert judge(alone) == "not supported"
    assert judge(table(slightly, *[CERTAIN] * 19)) == "undecided"


def test_verdict_of_a_failed_claim_names_the_effect_that_decides():
    verdict = Verdict(3, "", table([-5.0, 1.0, 2.0], [-0.10, -0.11, -0.12]), "{:+.2f}")
    assert verdict.word == "not supported"  # by the second: the first is smaller, but may be positive
    assert (
        verdict.summary
        == "0 of 2 with a 95 % interval above zero; least effect 1: -0.11 [-0.13, -0.07], upper end corrected"
    )


def test_judge_wants_an_effect():
    with pytest.raises(ValueError, match="at least one effect"):
        judge(effects(pd.DataFrame()))


def test_verdict_summary_names_the_effect_that_decides():
    verdict = Verdict(3, "student minus base", table(CERTAIN, UNCERTAIN), "{:+.1f}")
    assert verdict.word == "undecided"
    assert verdict.summary == "1 of 2 with a 95 % interval above zero; least effect 1: +0.1 [-2.6, +2.9]"
    assert "claim 3, student minus base: undecided" in verdict.show().to_html().lower()
    assert Verdict(3, "", table([1.0, math.nan])).summary == "an effect could not be measured"
