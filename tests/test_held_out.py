import numpy as np
import pytest

from kdx.data import held_out
from kdx.data.cues import Scene, draw

U, V = np.meshgrid(*[(np.arange(20) + 0.5) / 10 - 1] * 2)


@pytest.mark.parametrize("name", ["strokes", "blots", "waves"])
def test_patterns_are_fixed_by_the_seed_and_differ_between_values(name):
    family = getattr(held_out, name)
    value = np.arange(5)
    one, same = (family(U, V, value, 5, np.random.default_rng(0)) for _ in range(2))
    assert np.array_equal(one, same)
    assert np.abs(one).max() <= 1
    flat = np.abs(np.corrcoef(np.abs(one).reshape(5, -1))) - np.eye(5)
    assert flat.max() < 0.9


def test_the_distance_from_a_line():
    assert held_out.segment(np.array([0.0, 3.0]), np.array([2.0, 0.0]), -1, 0, 1, 0).tolist() == [2, 2]


def test_a_scene_may_show_them():
    scene = Scene(("strokes", "blots", "waves"))
    _, labels, masks = draw(scene, 27, 0)
    assert len(scene.classes) == 27 == len(labels.unique())
    assert all((masks >> bit & 1).flatten(1).sum(1).eq(100).all() for bit in range(3))
