import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from kdx.intervals import Interval, exact_interval, mean_interval, mean_of_known, over_folds, share_interval


def test_mean_interval_by_hand():
    assert mean_interval([1.0, 3.0]) == pytest.approx(Interval(2, 2 - 12.7062, 2 + 12.7062, 2), abs=1e-3)


def test_over_folds_by_hand():
    rows = [
        {"network": "a", "stage": "L1", "fold": fold, "value": value, "low": 0, "high": 9, "p": p, "floor": 0.1}
        for fold, (value, p) in enumerate([(1.0, 0.1), (2.0, 0.4), (3.0, 0.2)], 1)
    ]
    rows += [{"network": "b", "stage": "L1", "fold": 1, "value": 5.0, "low": 4.0, "high": 6.0, "p": 0.3, "floor": 0.2}]
    rows += [{**row, "network": "c", "value": value} for row, value in zip(rows[:2], (1.0, math.nan), strict=True)]
    table = over_folds(pd.DataFrame(rows)).set_index("network")
    half = stats.t.ppf(0.975, 2) / math.sqrt(3)
    assert table.loc["a", ["value", "low", "high", "p", "floor", "folds"]].tolist() == pytest.approx(
        [2, 2 - half, 2 + half, 0.4, 0.1, 3]
    )
    assert table.loc["b", ["value", "low", "high", "p", "floor", "folds"]].tolist() == [5, 4, 6, 0.3, 0.2, 1]
    assert table.loc["c", ["value", "low", "high"]].isna().all()
    with pytest.raises(ValueError, match="one row a fold and network, got 3 of"):
        over_folds(pd.DataFrame(rows).assign(fold=1), ["network"])


def test_mean_of_known_leaves_nan_out_and_says_how_many_are_left():
    assert mean_of_known([1.0, math.nan, 3.0, 5.0]) == mean_interval([1.0, 3.0, 5.0])
    assert math.isnan(mean_of_known([1.0, math.nan]).mean)
    assert mean_of_known([1.0, math.nan]).n == 1


def test_exact_share_interval_is_clopper_pearsons():
    found = share_interval([True] * 3 + [False] * 7, method="exact")
    assert (found.low, found.high) == pytest.approx((stats.beta.ppf(0.025, 3, 8), stats.beta.ppf(0.975, 4, 7)))
    assert share_interval([False] * 10, method="exact").low == 0
    for k in (0, 1, 50, 99, 100):
        oracle = stats.binomtest(k, 100).proportion_ci(0.9, method="exact")
        assert exact_interval(k, 100, 0.9) == pytest.approx((oracle.low, oracle.high), abs=1e-9)
    assert np.isnan(share_interval([], method="exact").mean)
