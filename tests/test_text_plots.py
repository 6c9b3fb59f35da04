import numpy as np
import pandas as pd
import pytest

from kdx.pages import text_plots
from kdx.pages.text_plots import Coloured

pytestmark = pytest.mark.usefixtures("closed_figures")


def test_every_word_is_written_and_coloured_by_its_value():
    words = ["a", "lovely", "film"]
    values = {"scratch": np.array([0.0, -0.5, np.nan]), "response": np.array([0.1, 1.0, 0.2])}
    axes = text_plots.coloured_words([Coloured("positive", words, values)], "share").axes[0]
    written = [text.get_text() for text in axes.texts]
    assert written == ["positive", "scratch", *words, "response", *words]
    faces = {round(p.get_y(), 2): [] for p in axes.patches}
    for patch in axes.patches:
        faces[round(patch.get_y(), 2)].append((patch.get_width(), patch.get_facecolor()))
    bars = [p.get_width() for p in axes.patches if p.get_height() < 0.5]
    assert bars == pytest.approx([0, 0.5 * 6, 0.1, 6, 0.2 * 4])  # of the largest value, which is as long as its word
    hollow = [p.get_facecolor()[:3] == (1, 1, 1) for p in axes.patches if p.get_height() < 0.5]
    assert hollow == [True, True, False, False, False]


def test_figures_share_one_scale():
    one = Coloured("a", ["x"], {"n": np.array([0.5])})
    two = Coloured("b", ["x"], {"n": np.array([-2.0])})
    figure = text_plots.coloured_words([one, two], "share")
    assert figure.axes[1].get_xlim() == (-2, 2)


def test_words_are_wrapped_without_loss():
    lines = text_plots.wrap(["word"] * 40)
    assert [number for line in lines for _, number in line] == list(range(40))
    assert max(place + 4 for line in lines for place, _ in line) <= text_plots.LINE
    assert all(line[0][0] == 0 for line in lines)
    assert text_plots.wrap([]) == [[]]


def test_values_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="at least one, got none"):
        text_plots.coloured_words([], "")
    with pytest.raises(ValueError, match="expected 2 of n"):
        text_plots.coloured_words([Coloured("", ["a", "b"], {"n": np.zeros(1)})], "")


def test_scores_have_a_panel_each_and_marks():
    rows = [("scratch", "AUROC", 0.6, 0.5, 0.7), ("scratch", "AUPRC", 0.7, 0.6, 0.8), ("x", "AUROC", 0.8, 0.7, 0.9)]
    table = pd.DataFrame(rows, columns=["network", "score", "value", "low", "high"])
    figure = text_plots.word_scores(table, ["scratch", "x"], {"AUROC": {"always positive": 0.5}})
    one, two = figure.axes
    assert [axes.get_title() for axes in figure.axes] == ["AUROC", "AUPRC"]
    assert [label.get_text() for label in one.get_yticklabels()] == ["scratch", "x"]
    assert [text.get_text() for text in figure.legends[0].texts] == ["always positive"]
    assert len(two.containers) == 2
