"""Figures of a report."""

import pytest
import torch

import kdx
from kdx.measure.calibration import reliability
from kdx.pages import report_plots
from tests.test_report_tables import ANSWERS, LABELS, LEDGER

pytestmark = pytest.mark.usefixtures("closed_figures")


def test_stars_mark_the_classes_that_hold():
    table = LEDGER.by_class()
    figure = report_plots.flips(table)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    held = table.sort_values("difference")["against both"] <= 0.05
    assert [label.endswith("*") for label in labels] == held.tolist()


def test_figures_draw_every_row():
    p = torch.eye(3)[ANSWERS["student"]] * 0.8 + 0.2 / 3
    figure = report_plots.reliability({"student": reliability(p, LABELS)})
    assert figure.axes[0].get_legend_handles_labels()[1] == ["student"]
    images = torch.randint(256, (12, 3, 16, 16), dtype=torch.uint8)
    answer = lambda x: (x.float().mean((1, 2, 3)) > 127).long()  # noqa: E731
    table, _ = kdx.robustness({"student": answer, "base": answer}, images, answer(images))
    figure = report_plots.robustness(table, {"student": 1.0, "base": 1.0})
    assert [axes.get_title() for axes in figure.axes] == ["noise", "blur", "JPEG", "contrast", "rotation"]
    student, base = (kdx.build("resnet10", 3, "small", 0.125, seed=i) for i in range(2))
    x = torch.rand(20, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    reference = kdx.Reference(student, base, x[:12])
    figure = report_plots.replacement({"student": kdx.replacement(reference, x[12:])})
    assert len(figure.axes) == 2
    curves, _ = kdx.deletion(reference, x[12:], {"mine": torch.rand(8, 4, 4)})
    figure = report_plots.deletion(curves)
    assert figure.axes[0].get_legend_handles_labels()[1] == ["mine", "random"]
