import math

import pytest
import torch
from torch import nn

from kdx.data.cues import Scene
from kdx.planted import behaviour
from kdx.planted.behaviour import answers_to_cues, order
from kdx.planted.plantings import images_of

SMALL = Scene(size=24, cue_size=8)


class Knows(nn.Module):
    """Is sure of some cues of images whose first pixel is the class, and guesses the others."""

    def __init__(self, known):
        super().__init__()
        self.known = known

    def forward(self, x):
        values = SMALL.values_of((x[:, 0, 0, 0] * 0.2 * 255 + 127.5).round().long())
        same = SMALL.values_of(torch.arange(27))[None] == values[:, None]
        return 50.0 * same[:, :, self.known].sum(2)


def coded(*arguments):
    data = images_of(*arguments)
    data.images[:, 0, 0, 0] = data.labels.byte()
    return data


def test_an_answer_changes_with_the_cues_that_a_network_knows_and_with_no_other(monkeypatch):
    monkeypatch.setattr(behaviour, "images_of", coded)
    found = answers_to_cues({"one": Knows([1]), "two": Knows([0, 2]), "none": Knows([])}, SMALL, 30, 0)
    assert found["one"].shape == (30, 3)
    for name, expected in (("one", [0, 1, 0]), ("two", [1, 0, 1]), ("none", [0, 0, 0])):
        assert found[name].mean(0).tolist() == pytest.approx(expected, abs=1e-6)


def test_pairs_in_order_by_hand():
    truth = torch.tensor([[0.0, 0.5, 1.0]])
    assert order(torch.tensor([[1.0, 2.0, 3.0]]), truth) == 1
    assert order(torch.tensor([[3.0, 2.0, 1.0]]), truth) == 0
    assert order(torch.tensor([[1.0, 1.0, 1.0]]), truth) == 0.5
    assert order(torch.tensor([[2.0, 1.0, 3.0]]), truth) == pytest.approx(2 / 3)
    assert order(torch.tensor([[2.0, 1.0, 3.0]]), truth, clear=0.6) == 1  # the last pair alone is clear
    assert math.isnan(order(torch.ones(2, 3), torch.zeros(2, 3)))
