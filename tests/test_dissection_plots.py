import itertools

import pandas as pd
import pytest
import torch

from kdx.measure.similarity import Plane
from kdx.pages import dissection_plots

pytestmark = pytest.mark.usefixtures("closed_figures")


def test_bars_have_a_panel_for_each_number_and_marks_of_chance():
    rows = [
        (network, panel, value, value - 0.1, value + 0.1)
        for (network, panel), value in zip(
            itertools.product(("base", "response"), ("total", "unique")), (0.4, 0.2, 0.5, 0.3), strict=True
        )
    ]
    table = pd.DataFrame(rows, columns=["network", "panel", "value", "low", "high"])
    axes = dissection_plots.detectors(table, ["total", "unique"], {("base", "total"): 0.05}).axes
    assert [a.get_title() for a in axes] == ["total", "unique"]
    assert [bar.get_width() for bar in axes[0].patches] == [0.4, 0.5]
    assert [label.get_text() for label in axes[0].get_yticklabels()] == ["base", "response"]
    assert [list(line.get_xdata()) for line in axes[0].lines] == [[0.05, 0.05]]
    assert not axes[1].lines


def test_sweeps_have_equal_steps():
    rows = [("base", x, 0.3, 0.2, 0.4) for x in (0.01, 0.005, 0.02)]
    table = pd.DataFrame(rows, columns=["network", "x", "value", "low", "high"])
    axes, other = dissection_plots.sweeps({"quantile": table, "IoU": table}, {"quantile": 0.01, "IoU": 0.02}).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0.005", "0.01", "0.02"]
    assert [line.get_xdata()[0] for line in (axes.lines[0], other.lines[0])] == [1, 2]  # the marks


def test_the_line_over_accuracy_is_that_of_the_reference():
    rows = [("base", 0.5, 0.2), ("base", 0.6, 0.3), ("response", 0.7, 0.9)]
    table = pd.DataFrame(rows, columns=["network", "accuracy", "value"])
    axes = dissection_plots.against_accuracy(table, ["base"]).axes[0]
    dashed, solid = axes.lines
    assert list(solid.get_ydata()) == pytest.approx([0.2, 0.3])
    assert list(dashed.get_ydata()) == pytest.approx([0.2, 0.4])
    assert dashed.get_linestyle() == "--"


def test_planes_show_points_and_templates_of_each_network():
    points = torch.tensor([[0.0, 1], [2, 3], [4, 5]], dtype=torch.float64)
    plane = Plane(points, torch.tensor([0, 2, 2]), torch.tensor([[0.0, 0], [1, 0], [0, 1]], dtype=torch.float64))
    figure = dissection_plots.planes({"base": plane, "response": plane}, ["cat", "dog", "truck"])
    axes = figure.axes[0]
    assert [len(dots.get_offsets()) for dots in axes.collections] == [1, 1, 0, 1, 2, 1]
    assert [a.get_title() for a in figure.axes] == ["base", "response"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["cat", "dog", "truck"]


def test_each_network_has_a_scale_of_its_own():
    maps = {"base": torch.ones(2, 4, 4), "response": torch.full((2, 4, 4), 5.0)}
    masks = torch.zeros(2, 8, 8, dtype=torch.bool)
    masks[:, 2:4, 2:4] = True
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    axes = dissection_plots.concept_maps(images, masks, maps, {"base": "unit 1", "response": "unit 2"}).axes
    assert [a.images[0].get_clim()[1] for a in axes[1:3]] == [1, 5]
    assert [a.get_xlabel() for a in axes[4:6]] == ["unit 1", "unit 2"]
    assert all(a.images[0].get_extent() == [-0.5, 7.5, 7.5, -0.5] for a in axes)


def test_gallery_outlines_unit_and_concept():
    images, masks = torch.zeros(3, 3, 16, 16, dtype=torch.uint8), torch.zeros(3, 8, 8, dtype=torch.bool)
    masks[0, 2:5, 2:5] = True
    axes = dissection_plots.gallery([("unit 1", images, masks, ~masks)]).axes
    assert [len(a.collections) for a in axes] == [2, 0, 0]  # nothing where a mask is empty or full
    edge = axes[0].collections[0].get_paths()[0].vertices
    assert edge.min() == pytest.approx(3.5, abs=1.1)
    assert edge.max() == pytest.approx(9.5, abs=1.1)
