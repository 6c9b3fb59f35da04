"""Gates judge at the interval's safe end."""

import subprocess
import sys

import pytest

from kdx.pages.gates import OF_DETECTORS, Gate


def test_gates_count_the_interval():
    measured = {"negative_flips": {"value": 0.015, "low": 0.01, "high": 0.025, "n": 900}}
    measured["accuracy"] = {"value": 0.91, "low": 0.89, "high": 0.93, "n": 900}
    fail = lambda text: Gate.parse(text).failure(measured)  # noqa: E731
    assert fail("negative_flips > 3%") is None
    assert "1.50% [1.00%, 2.50%]; the interval does not rule it out" in fail("negative_flips > 2%")
    assert fail("negative_flips>0.01").endswith("[1.00%, 2.50%]")
    assert fail("accuracy < 0.88") is None
    assert "does not rule it out" in fail("accuracy < 90%")
    assert fail("accuracy <= 89 %") is not None
    assert "could not be measured" in fail("handed_over < 10%")
    for text, message in (
        ("flips > 2%", "unknown metric 'flips' in 'flips > 2%'; choose from: accuracy"),
        ("accuracy = 2", "expected a condition such as 'negative_flips > 2%', got 'accuracy = 2'"),
        ("accuracy > 1.2.3", "expected a condition"),
        ("", "expected a condition"),
    ):
        with pytest.raises(ValueError, match=message):
            Gate.parse(text)


@pytest.mark.parametrize("compare", ["<", "<=", ">", ">="])
def test_a_gate_fails_whenever_the_value_itself_does(compare):
    for value in (0.1, 0.5, 0.9):
        found = {"accuracy": {"value": value, "low": value - 0.05, "high": value + 0.05, "n": 9}}
        gate = Gate.parse(f"accuracy {compare} 0.5")
        if {"<": value < 0.5, "<=": value <= 0.5, ">": value > 0.5, ">=": value >= 0.5}[compare]:
            assert gate.failure(found)


def test_a_forgotten_percent_sign_is_named():
    with pytest.raises(ValueError, match="negative_flips is a share, at most 1 or 100%; did you mean 2%"):
        Gate.parse("negative_flips > 2")
    with pytest.raises(ValueError, match=r"unknown metric 'accuracy' in .*; choose from: ap50, base_ap50"):
        Gate.parse("accuracy < 50%", OF_DETECTORS)
    for senseless, why in {
        "negative_flips > 1": "can never fail: negative_flips is between 0 and 1",
        "accuracy_gain < -100%": "can never fail: accuracy_gain is between -1 and 1",
        "accuracy < 0": "can never fail",
        "objects_gained >= 0": "always fails: objects_gained is between 0",
        "accuracy <= 100%": "always fails",
    }.items():
        with pytest.raises(ValueError, match=why):
            Gate.parse(senseless)
    for text in ("accuracy < 1", "handed_over > 0", "accuracy_gain < 0", "ap50_gain_over_second_base <= -0.1"):
        assert Gate.parse(text).text == text
    assert Gate.parse("nll_change > 2").failure({"nll_change": {"value": 1, "low": 0.5, "high": 3, "n": 9}}) == (
        "nll_change > 2: nll_change is 1.000 [0.500, 3.000]; the interval does not rule it out"
    )


def test_gates_are_read_at_once():
    code = "import sys, kdx.pages.gates; print(sorted({'torch', 'pandas', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
