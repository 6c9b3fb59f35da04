from types import SimpleNamespace

import pytest
import torch
from torch import nn

import kdx
from kdx.data.cues import Scene
from kdx.planted.doses import Dosed, plant_doses, taken

SMALL = Scene(size=24, cue_size=8)


class Places(nn.Module):
    """Answers with weighted sums of the pixels of an image."""

    def __init__(self, weights):
        super().__init__()
        self.head = nn.Linear(3 * 24 * 24, weights.shape[0], bias=False)
        self.head.weight.data = weights

    def forward(self, x):
        return self.head(x.flatten(1))


def test_what_was_taken_is_the_slope_of_the_change_on_the_teachers():
    weights, other = torch.randn(2, 27, 3 * 24 * 24, generator=torch.Generator().manual_seed(0)) / 100
    for student, slope in ((0.38 * weights, 0.38), (weights, 1), (0 * weights, 0), (0.5 * weights + 0 * other, 0.5)):
        networks = {
            "student": SimpleNamespace(model=Places(student)),
            "teacher": SimpleNamespace(model=Places(weights)),
        }
        assert taken(Dosed(0.5, 0, 1, networks), SMALL, 60) == pytest.approx(slope, abs=1e-4)


def test_doses_share_a_base_and_a_teacher():
    found = plant_doses(SMALL, (0, 1), (0.0, 1.0), images=64, recipe=kdx.Recipe(epochs=1, batch_size=32), device="cpu")
    assert [(one.dose, one.seed, one.cue) for one in found] == [(0.0, 0, 1), (1.0, 0, 1), (0.0, 1, 2), (1.0, 1, 2)]
    assert len({one.networks["teacher"].key for one in found}) == 2
    assert len({run.key for one in found for run in one.networks.values()}) == 8  # no student is a base
    settings = [one.networks["student"].manifest["spec"]["technique"]["alpha"] for one in found[:2]]
    assert settings == [0.0, 1.0]
