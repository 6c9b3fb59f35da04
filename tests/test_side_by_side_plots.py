import numpy as np
import pytest
import torch

from kdx.pages.side_by_side_plots import Row, side_by_side

pytestmark = pytest.mark.usefixtures("closed_figures")
IMAGE = torch.full((3, 8, 12), 100, dtype=torch.uint8)


def test_a_row_has_one_scale_and_every_row_its_own():
    weak, strong = torch.ones(2, 3), torch.full((2, 3), 5.0)
    rows = [Row("one", IMAGE, {"base": weak, "fgd": strong}), Row("two", IMAGE, {"base": weak, "fgd": weak})]
    axes = side_by_side(rows).axes
    assert [a.get_title() for a in axes[:3]] == ["image", "base", "fgd"]
    assert [axes[i].images[0].get_clim() for i in (1, 2, 4, 5)] == [(0, 5), (0, 5), (0, 1), (0, 1)]
    assert [axes[i].get_ylabel() for i in (0, 3)] == ["one", "two"]


def test_gradients_are_drawn_in_colour_around_grey():
    gradients = torch.zeros(3, 8, 12)
    gradients[0] = 2.0
    gradients[1] = -1.0
    drawn = side_by_side([Row("", IMAGE, {"base": gradients})]).axes[1].images[0].get_array()
    assert np.allclose(drawn[0, 0], [1, 0.25, 0.5])


def test_boxes_are_outlined_on_the_image():
    axes = side_by_side([Row("", IMAGE, {"base": torch.ones(2, 3)}, torch.tensor([[1.0, 2, 5, 8]]))]).axes
    (box,) = axes[0].patches
    assert (box.get_x(), box.get_y(), box.get_width(), box.get_height()) == (1, 2, 4, 6)
    assert not axes[1].patches
    boxes = torch.tensor([[1.0, 2, 5, 8], [0, 0, 2, 2]])
    drawn = side_by_side([Row("", IMAGE, {"base": torch.ones(2, 3)}, boxes, ["lost", "gained"])]).axes[0].patches
    assert len({(patch.get_edgecolor(), patch.get_linestyle()) for patch in drawn}) == 2
    with pytest.raises(ValueError, match="zip"):
        side_by_side([Row("", IMAGE, {"base": torch.ones(2, 3)}, boxes, ["lost"])])


def test_a_constant_row_and_no_rows():
    side_by_side([Row("", IMAGE, {"base": torch.zeros(2, 3)})])
    with pytest.raises(ValueError, match="at least one row"):
        side_by_side([])
