from dataclasses import replace

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch

from kdx.pages import plots
from kdx.data.registry import DATASETS
from kdx.data.dataset import Dataset
from kdx.data.folders import UNKNOWN
from kdx.data.cues import Scene
from kdx.planted.plantings import images_of


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


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


def test_cues_are_outlined_where_they_lie():
    scene = Scene(size=24, cue_size=8)
    images = images_of(scene, 2, 0)
    frames = plots.cues(images, scene.cues, per_row=2).axes[1].patches
    for cue, frame in enumerate(frames):
        rows, columns = (images.masks[1] >> cue & 1).nonzero().T
        found = (frame.get_x() + 0.5, frame.get_y() + 0.5, frame.get_width(), frame.get_height())
        assert found == (columns.min(), rows.min(), 8, 8)
    assert len(frames) == 3
    maps = {"one": torch.rand(2, 6, 6), "other": torch.rand(2, 24, 24)}
    drawn = plots.cue_maps(images, maps, [1])
    assert [patch.get_linewidth() for patch in drawn.axes[0].patches] == [1.6, 0.5, 0.5]
    assert all(axes.images[0].get_extent() == [-0.5, 23.5, 23.5, -0.5] for axes in drawn.axes[1:3])


@pytest.mark.parametrize("stages", [1, 4])
def test_a_contest_has_a_panel_a_stage_and_a_row_an_explainer(stages):
    levels = [f"L{s}" for s in range(1, stages + 1)]
    rows = [(name, s, kind, 2.0, 1.0, 4.0) for name in "abc" for s in levels for kind in ("distilled", "residual")]
    table = pd.DataFrame(rows, columns=["explainer", "stage", "direction", "value", "low", "high"])
    figure = plots.contest(table, "score", logarithmic=True, line=1)
    assert [axes.get_title() for axes in figure.axes] == levels
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == list("abc")


def test_samples_prefer_images_with_masks():
    masks = torch.full((30, 12, 12), UNKNOWN, dtype=torch.uint8)
    masks[12:18] = 1
    figure = plots.samples(dataset(30, masks=masks), per_class=2)
    assert sum(len(axes.get_images()) for axes in figure.axes) == 2 * 6


def test_capacity_sweep_draws_every_measure_beside_what_the_student_has_alone():
    rows = [
        {"measure": m, "way": way, "size": size, "value": 0.5, "low": 0.4, "high": 0.7}
        for m in ("accuracy", "distilled, L1")
        for way, sizes in {"direct": (1, 4, 16), "assisted": (16,)}.items()
        for size in sizes
    ]
    floor = pd.DataFrame({"value": [0.45, 0.1], "name": ["base", "second base"]}, ["accuracy", "distilled, L1"])
    figure = plots.capacity_sweep(pd.DataFrame(rows), floor, "times")
    assert [axes.get_title() for axes in figure.axes] == ["accuracy", "distilled, L1"]
    for axes, alone in zip(figure.axes, (0.45, 0.1), strict=True):
        direct, assisted = (container.lines[0].get_xdata().tolist() for container in axes.containers)
        assert direct == [1, 4, 16]
        assert assisted == pytest.approx([16], rel=0.1)
        assert [line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == "--"] == [alone]
    assert [text.get_text() for text in figure.legends[0].texts] == ["base", "direct", "assisted", "second base"]
