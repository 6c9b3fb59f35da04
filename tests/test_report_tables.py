"""Tables of a report, from a ledger that is known."""

import numpy as np
import pandas as pd
import torch

import kdx
from kdx.intervals import share_interval
from kdx.pages import report_tables

LABELS = torch.arange(60) % 3
ANSWERS = {
    "student": torch.where(torch.arange(60) < 50, LABELS, (LABELS + 1) % 3),
    "base": torch.where(torch.arange(60) >= 20, LABELS, (LABELS + 1) % 3),
    "second base": torch.where(torch.arange(60) >= 10, LABELS, (LABELS + 1) % 3),
    "teacher": LABELS,
}
LEDGER = kdx.Ledger(LABELS, ANSWERS, ("ant", "bee", "a very long name of a class of insects"))


def text(styler):
    return styler.data.to_string()


def test_tables_tell_counts_intervals_and_p():
    class Pair:
        ledger = LEDGER

    changed = {role: share_interval(a != ANSWERS["base"], method="exact") for role, a in ANSWERS.items()}
    shown = report_tables.accuracies(Pair, changed).data
    assert shown.loc["student", "right answers"].startswith("83.3% [")
    assert shown.loc["base", "another answer than the base's"] == ""
    rates = text(report_tables.rates(LEDGER.rates()))
    assert "20 images" in rates
    assert "student minus this: +16.7 points" in rates
    groups = report_tables.groups(LEDGER.by_class(), LEDGER.by_class(), LEDGER.confusions()).data
    assert "confusion: ant called bee" in groups.index
    assert {"class: ant", "slice: bee"} <= set(groups.index)
    assert set(groups["holds over all"]) <= {"yes", "no"}
    assert "<i>" in report_tables.multiline(pd.DataFrame({"<i>": ["<i>"]})).data.columns
    assert "<i>" not in report_tables.multiline(pd.DataFrame({"<i>": ["<i>"]}, index=["<i>"])).to_html()
    assert report_tables.listed(["<b>"], "ol") == "<ol><li>&lt;b&gt;</li></ol>"
    scores = {role: torch.eye(3)[a] * 0.9 + 0.1 / 3 for role, a in ANSWERS.items() if role != "teacher"}
    calibration = text(report_tables.calibration(kdx.calibration(scores, LABELS)))
    assert "student minus this" in calibration
    assert report_tables.interval({"value": np.nan, "low": 0, "high": 0}) == ""
    assert report_tables.p_of(0.0001) == "p < 0.001"


def test_areas_shares_and_differences_have_intervals():
    areas = pd.DataFrame([("mine", 0.2, 0.1, 0.3, 9)], columns=["map", "value", "low", "high", "n"])
    assert "+0.200 [+0.100, +0.300]" in text(report_tables.areas(areas))
    shares = pd.DataFrame(
        [("student", "unexplained", "answer", 0.2, 0.1, 0.3), ("student", "handed over", "answer", 0.5, 0.4, 0.6)],
        columns=["network", "quantity", "stage", "value", "low", "high"],
    )
    assert report_tables.shares(shares).data.loc["student, of that, explained by the teacher", "answer"] == (
        "0.50\n[0.40, 0.60]"
    )
    differences = pd.DataFrame(
        [("base", "blur", 1, 0.1, 0.0, 0.2, 0.04), ("base", "", 0, 0.1, 0.05, 0.15, 0.0001)],
        columns=["network", "corruption", "strength", "difference", "low", "high", "p"],
    )
    shown = report_tables.robustness(differences, 12).data["student minus base"]
    assert shown.to_dict() == {
        "blur, strength 1": "+10.0% [+0.0%, +20.0%], p = 0.040",
        "over all": "+10.0% [+5.0%, +15.0%], p < 0.001",
    }


def test_new_detectors_and_their_concepts_are_told_by_stage():
    rows = [
        ("student", "L4", "total", 0.5, 0.4, 0.6, 8, 0.1, 40),
        ("student", "L4", "beyond", 0.25, 0.1, 0.4, 8, np.nan, 40),
    ]
    columns = ["network", "stage", "count", "value", "low", "high", "units", "by chance", "n"]
    shown = report_tables.detectors(pd.DataFrame(rows, columns=columns)).data["L4"]
    assert shown["student, detectors"] == "50.0%\n[40.0%, 60.0%]\nby chance 10.0%"
    assert shown["student, detectors of a concept that no unit of the base detects"] == "25.0%\n[10.0%, 40.0%]"
    fixed = {"stage": "L4", "concept": "cat", "category": "object", "images": 3, "unit": 1, "iou": 0.123}
    style = report_tables.concepts(pd.DataFrame([fixed | {"student": 2, "second base": 1}] * 12))
    assert len(style.data) == report_tables.SHOWN
    assert "2 more in concepts.csv" in style.caption
    assert style.data.iloc[0][["its IoU", "units, student", "units, second base"]].tolist() == ["0.12", "2", "1"]
