from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from kdx.pages import yardstick_plots

pytestmark = pytest.mark.usefixtures("closed_figures")


def test_radars_close_their_polygons():
    table = pd.DataFrame({"AUROC": [0.5, 0.8], "F1": [0.2, 0.4], "recall": [1.0, 0.1]}, index=["base", "response"])
    axes = yardstick_plots.radars({"object": table, "part": table / 2}).axes
    assert [a.get_title() for a in axes] == ["object", "part"]
    assert [list(line.get_ydata()) for line in axes[1].lines] == [[0.25, 0.1, 0.5, 0.25], [0.4, 0.2, 0.05, 0.4]]
    assert axes[0].get_ylim() == (0, 1)


def test_maps_stand_beside_image_and_truth(tiny_shapes):
    some = tiny_shapes["test"][torch.arange(2)]
    maps = {"base": torch.rand(2, 32, 32), "response": torch.rand(2, 8, 8)}
    axes = yardstick_plots.truth_and_maps(some, maps).axes
    assert [a.get_title() for a in axes[:4]] == ["image", "truth", "base", "response"]
    assert np.array_equal(axes[5].images[0].get_array(), some.masks[1])
    assert np.allclose(axes[6].images[0].get_array(), maps["base"][1])
    with pytest.raises(ValueError, match="at least one image, with masks"):
        yardstick_plots.truth_and_maps(replace(some, masks=None), maps)


def test_gradients_are_drawn_in_colour_and_those_of_grey_images_in_grey(tiny_shapes):
    some = tiny_shapes["test"][torch.arange(2)]
    gradients = {"base": torch.randn(2, 3, 32, 32)}
    assert yardstick_plots.loss_gradients(some, gradients).axes[1].images[0].get_array().shape == (32, 32, 3)
    grey = replace(some, images=some.images[:, :1].repeat(1, 3, 1, 1))
    drawn = yardstick_plots.loss_gradients(grey, gradients).axes[1].images[0].get_array()
    assert drawn.squeeze().shape == (32, 32)
    assert drawn.min() >= 0
    assert drawn.max() <= 1


def test_unmasking_curves_are_means_over_seeds():
    rows = [("mnist", "base", f, s, f / 2, f + s / 10) for f in (0.1, 0.5) for s in (0, 1)]
    table = pd.DataFrame(rows, columns=["data", "network", "fraction", "seed", "highest", "lowest"])
    (axes,) = yardstick_plots.unmasking(table, {"highest": "-", "lowest": ":"}).axes
    assert [list(line.get_ydata()) for line in axes.lines] == [[0.05, 0.25], pytest.approx([0.15, 0.55])]
    other = table.assign(network="edges", highest=0.5)
    _, second = yardstick_plots.unmasking(pd.concat([table, other]), {"highest": "-", "lowest": ":"}).axes
    assert (second.get_title(), list(second.lines[0].get_ydata())) == ("edges", [0.5, 0.5])


def test_correlations_have_a_row_for_each_yardstick():
    rows = [("F1", "cues", 0.5, 0.2, 0.8), ("F1", "networks", -0.5, -0.8, -0.2), ("DiffROAR", "cues", 0.1, -0.4, 0.6)]
    table = pd.DataFrame(rows, columns=["yardstick", "group", "value", "low", "high"])
    (axes,) = yardstick_plots.correlations(table, ["cues", "networks"]).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["F1", "DiffROAR"]
    assert list(axes.lines[0].get_xdata()) == [0.5, 0.1]


def test_agreements_show_every_pair():
    table = pd.DataFrame(np.eye(3), index=list("abc"), columns=list("abc"))
    (axes,) = yardstick_plots.agreements(table).axes
    assert len(axes.texts) == 9
