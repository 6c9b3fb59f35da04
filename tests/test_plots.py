from dataclasses import replace

import pytest
import torch

from kdx.data.dataset import Dataset
from kdx.data.folders import UNKNOWN
from kdx.data.registry import DATASETS
from kdx.pages import plots

pytestmark = pytest.mark.usefixtures("closed_figures")


def dataset(n=3, side=12, classes=("one", "two", "three"), masks=None):
    images = torch.arange(n * 3 * side * side).view(n, 3, side, side).to(torch.uint8)
    return Dataset(images, torch.arange(n) % len(classes), replace(DATASETS["shapes"], classes=tuple(classes)), masks)


def test_overlays_lie_on_the_image_pixel_by_pixel():
    """A map of one bright cell colours the part of the image that the cell stands for."""
    maps = torch.zeros(1, 4, 4)
    maps[0, 1, 2] = 1.0  # rows 3 to 5, columns 6 to 8 of 12
    figure = plots.overlays(dataset(1), {"distilled": {"L1": maps}}, ["one"])
    image, overlay = figure.axes[1].get_images()
    assert image.get_extent() == overlay.get_extent()
    alpha = torch.as_tensor(overlay.get_alpha())
    assert alpha.shape == (12, 12)
    strongest = (alpha == alpha.max()).nonzero().tolist()
    assert strongest == [[4, 7]]  # the centre of the cell
    assert alpha[:1].max() == alpha[:, :4].max() == 0


def test_overlays_share_a_scale_between_kinds_but_not_between_stages():
    strong, weak = torch.full((2, 3, 3), 8.0), torch.full((2, 3, 3), 2.0)
    maps = {"distilled": {"L1": strong, "L2": weak}, "residual": {"L1": weak, "L2": weak}}
    figure = plots.overlays(dataset(2), maps, ["a", "b"])
    shown = [float(axes.get_images()[1].get_array().max()) for axes in figure.axes[1:5]]
    assert shown == pytest.approx([1, 1, 0.25, 1], abs=1e-6)


def test_overlays_outline_known_objects_only():
    masks = torch.full((2, 12, 12), UNKNOWN, dtype=torch.uint8)
    masks[0] = 0
    masks[0, 3:9, 3:9] = 1
    figure = plots.overlays(dataset(2, masks=masks), {"distilled": {"L1": torch.rand(2, 3, 3)}}, ["a", "b"])
    outlines = [axes.collections for axes in figure.axes]
    assert [len(lines) for lines in outlines] == [0, 1, 0, 0]
    box = outlines[1][0].get_paths()[0].get_extents()
    assert (box.x0, box.y0, box.x1, box.y1) == pytest.approx((2.5, 2.5, 8.5, 8.5))


@pytest.mark.parametrize(("classes", "columns"), [(2, 10), (7, 7), (10, 10), (38, 10)])
def test_samples_fill_at_most_ten_columns(classes, columns):
    names = [f"class number {i}" for i in range(classes)]
    figure = plots.samples(dataset(classes * 10, classes=names), per_class=2)
    grid = figure.axes[0].get_gridspec()
    assert grid.ncols == columns
    drawn = [axes for axes in figure.axes if axes.get_images()]
    assert len(drawn) == 2 * classes * (5 if classes == 2 else 1)
    titles = [axes.get_title().replace("\n", " ") for axes in figure.axes if axes.get_title()]
    assert titles == names


def test_samples_prefer_images_with_masks():
    masks = torch.full((30, 12, 12), UNKNOWN, dtype=torch.uint8)
    masks[12:18] = 1
    figure = plots.samples(dataset(30, masks=masks), per_class=2)
    assert sum(len(axes.get_images()) for axes in figure.axes) == 2 * 6
