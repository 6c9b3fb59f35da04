import pandas as pd
import pytest
import torch

from kdx.data.cues import Scene
from kdx.pages import planted_plots
from kdx.planted.plantings import images_of

pytestmark = pytest.mark.usefixtures("closed_figures")


def test_cues_are_outlined_where_they_lie():
    images = images_of(Scene(size=24, cue_size=8), 2, 0)
    maps = {"one": torch.rand(2, 6, 6), "other": torch.rand(2, 24, 24)}
    drawn = planted_plots.cue_maps(images, maps, [1])
    frames = drawn.axes[3].patches  # of the second image: the wanted cue, then the others
    assert [frame.get_linewidth() for frame in frames] == [1.6, 0.5, 0.5]
    for cue, frame in zip((1, 0, 2), frames, strict=True):
        rows, columns = (images.masks[1] >> cue & 1).nonzero().T
        found = (frame.get_x() + 0.5, frame.get_y() + 0.5, frame.get_width(), frame.get_height())
        assert found == (columns.min(), rows.min(), 8, 8)
    assert all(axes.images[0].get_extent() == [-0.5, 23.5, 23.5, -0.5] for axes in drawn.axes[1:3])


@pytest.mark.parametrize("stages", [1, 4])
def test_a_contest_has_a_panel_a_stage_and_a_row_an_explainer(stages):
    levels = [f"L{s}" for s in range(1, stages + 1)]
    rows = [(name, s, kind, 2.0, 1.0, 4.0) for name in "abc" for s in levels for kind in ("distilled", "residual")]
    table = pd.DataFrame(rows, columns=["explainer", "stage", "direction", "value", "low", "high"])
    figure = planted_plots.contest(table, "score", logarithmic=True, line=1)
    assert [axes.get_title() for axes in figure.axes] == levels
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == list("abc")
