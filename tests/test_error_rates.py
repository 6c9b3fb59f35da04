"""The statistics of the book keep what they promise, in 200 draws (2,000: benchmarks/error_rates.py)."""

import math

import pytest

from tests.benchmarks.error_rates import rate

DRAWS = 200


@pytest.mark.parametrize(
    "name",
    [
        "95 % interval misses: 3 folds ",
        "95 % interval misses: 5 folds ",
        "95 % interval misses: 5 folds residual",
        "wrong verdict: 3 folds, one effect of 0",
        "wrong verdict: 3 folds, 12 effects of 0",
        "wrong verdict: 3 folds, one is δ",
        "wrong verdict: 5 folds, one is 0, one is δ",
        "7 equal networks not tied: 3 folds own images",
        "7 equal networks not tied: 5 folds ",
        "a control seems exceeded: 3 folds",
        "dependent given z: square",
        "dependent given z: classes",
    ],
)
def test_error_rates_are_as_promised(name):
    promised, found, _ = rate(name, DRAWS)
    assert found <= promised + 4 * math.sqrt(promised * (1 - promised) / DRAWS)
