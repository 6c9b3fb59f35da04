import itertools

import pandas as pd
import pytest
import torch

import kdx
from kdx.pages import handed_over_plots

pytestmark = pytest.mark.usefixtures("closed_figures")


def test_bars_reach_the_whole_variance():
    rows = [
        (network, stage, part, value, value - 0.05, value + 0.05)
        for network, stage in itertools.product(("response", "second base"), ("L1", "answer"))
        for part, value in (("base", 0.5), ("handed over", 0.3), ("own", 0.2), ("handed over, of unexplained", 0.6))
    ]
    table = pd.DataFrame(rows, columns=["network", "stage", "part", "value", "low", "high"])
    axes = handed_over_plots.parts(table).axes
    assert [a.get_title() for a in axes] == ["L1", "answer"]
    ends = [bar.get_x() + bar.get_width() for bar in axes[1].patches]
    assert ends == pytest.approx([0.5, 0.5, 0.8, 0.8, 1, 1])
    assert [label.get_text() for label in axes[0].get_yticklabels()] == ["response", "second base"]


def test_the_teacher_is_framed():
    table = pd.DataFrame(
        [("a", "x", 0.5, True), ("a", "y", 0.2, False), ("b", "y", 0.4, True)],
        columns=["student", "candidate", "value", "taught"],
    )
    (axes,) = handed_over_plots.who_taught(table, ["a", "b", "c"]).axes
    assert [patch.get_xy() for patch in axes.patches] == [(0, 0), (1, 1)]
    assert [text.get_text() for text in axes.texts] == ["0.50", "0.20", "0.40"]  # one was not asked


def test_techniques_are_rows_and_hollow_where_one_fold_is_known():
    rows = [("a", "L4", 0.3, 0.2, 0.5, 3), ("c", "L4", 0.1, 0.0, 0.2, 1), ("a", "answer", 0.4, 0.3, 0.5, 3)]
    table = pd.DataFrame(rows, columns=["network", "stage", "value", "low", "high", "folds"])
    kinds = {"a": "answers", "b": "features", "c": "features"}
    last, answer = handed_over_plots.by_technique(table, kinds, "minus the control").axes
    assert [label.get_text() for label in last.get_yticklabels()] == ["a", "b", "c"]
    points = [line for line in last.lines if line.get_marker() == "o"]
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in points] == [(0.3, 0), (0.1, 2)]
    assert [line.get_markerfacecolor() == "white" for line in points] == [False, True]
    assert points[0].get_color() != points[1].get_color()
    assert [list(line.get_xdata()) for line in last.lines if list(line.get_ydata()) == [2, 2]] == [[0.0, 0.2]]
    assert len([line for line in answer.lines if line.get_marker() == "o"]) == 1


def test_doses_have_a_colour_each():
    rows = [(0.0, 0.0, 0.02, -0.03, 0.07), (0.5, 0.6, 0.58, 0.5, 0.66), (1.0, 0.97, 0.95, 0.9, 1.0)]
    (axes,) = handed_over_plots.doses(pd.DataFrame(rows, columns=["dose", "truth", "value", "low", "high"])).axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["0%", "50%", "100%"]


def test_maps_of_student_and_control_share_a_scale():
    images = kdx.load_dataset("shapes", "test", limit=10, size=16)[torch.arange(2)]
    maps = {
        "unexplained": torch.full((2, 8, 8), 9.0),
        "handed over": torch.ones(2, 8, 8),
        "second base": torch.zeros(2, 8, 8),
    }
    axes = handed_over_plots.maps(images, maps, ["one", "two"], ["a / b / c"] * 2).axes
    tops = [a.images[0].get_clim()[1] for a in axes[1:4]]
    assert tops == [9, 1, 1]
    assert axes[4].get_ylabel() == "two"
