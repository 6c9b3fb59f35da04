import math

import pytest
import torch

from kdx.distil.technique import Technique, check_temperature, check_weight
from kdx.networks import models
from tests.techniques import seen


def test_a_technique_that_says_nothing_looks_at_answers_and_weighs_labels_fully():
    plain, one = Technique(), seen()
    assert plain.needs_teacher
    assert (plain.label_weight, plain.label_smoothing) == (1, 0)
    assert plain.taps(models.build("resnet10", 10, "small", 0.125), torch.zeros(1, 3, 32, 32)) == {}
    assert plain.adapter(one, one, {}) is None
    with pytest.raises(NotImplementedError):
        plain.guidance(one, one, None)


def test_weights_and_temperatures_are_finite():
    for value in (0.0, 3.0):
        check_weight(value, "w")
    check_temperature(0.5, "t")
    for value in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"w: expected a finite weight of at least 0, got {value}"):
            check_weight(value, "w")
    for value in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"t: expected a finite temperature above 0, got {value}"):
            check_temperature(value, "t")
