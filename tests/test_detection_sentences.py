import pandas as pd
import pytest
import torch

from kdx.measure.ledger import Ledger
from kdx.pages.detection_sentences import DetectionEvidence, metrics, sentences
from kdx.pages.gates import METRICS

NAMES = ("cup", "jug")


def evidence(found, gaps, second=False, **more):
    """Objects 0..59 are cups, the others jugs; ``found``: role -> which are found; ``gaps``: of AP50 and alarms."""
    labels = (torch.arange(100) >= 60).long()
    answers = {role: torch.where(torch.isin(torch.arange(100), torch.tensor(list(of))), labels, 2)
               for role, of in found.items()}  # fmt: skip
    columns = ["value", "low", "high", "difference", "difference low", "difference high"]
    gap = lambda role: (float("nan"),) * 3 if role == "student" else gaps[role]  # noqa: E731
    rows = [(role, measure, 0.5, 0.4, 0.6, *gap(role)) for measure in ("AP50", "AP") for role in found]
    alarms = [(role, 2.0, 1.0, 3.0, *gap(role)) for role in found]
    return DetectionEvidence(
        30, 0.5, Ledger(labels, answers, NAMES), pd.DataFrame(rows, columns=["network", "measure", *columns]),
        pd.DataFrame(alarms, columns=["network", *columns]), **more,
    )  # fmt: skip


UP, DOWN, OPEN = (0.1, 0.05, 0.15), (-0.1, -0.15, -0.05), (0.1, -0.05, 0.25)
WIDE = set(range(100))


def test_a_student_that_lost_a_class_is_said_to_be_worse_on_it():
    said = sentences(evidence({"student": WIDE - set(range(20)), "base": WIDE}, {"base": DOWN}))
    assert said[0] == (
        "In short: a lower AP50 and a lower AP; 20 found objects of the base lost and 0 gained; clearly worse on cup."
    )
    assert "30 images with 100 objects of 2 classes" in said[1]
    assert "AP50: lower than its base's, by -0.100 [-0.150, -0.050]; without a second base" in said[2]
    assert "of 100 that the base finds it loses 20 (20.0% [12.7%, 29.2%] of all)" in said[3]
    assert "fewer of cup (against its base; whether by the seed" in said[4]
    assert "clearly fewer than its base" in said[5]
    assert "want of a second base" in said[-1]


@pytest.mark.parametrize(
    ("second", "word"),
    [(UP, "a higher AP50"), (OPEN, "no clear change of AP50"), (DOWN, "no clear change of AP50")],
)
def test_a_change_counts_if_it_holds_against_both_bases(second, word):
    found = {"student": WIDE, "base": WIDE - {1}, "second base": WIDE - {1, 2}}
    said = sentences(evidence(found, {"base": UP, "second base": second}))
    assert said[0].startswith(f"In short: {word}")
    assert "where another seed lost 1 and gained 0; no class clearly worse" in said[0]
    assert ("this may be the seed" in said[2]) == (second != UP)


def test_a_class_that_the_second_base_lost_as_well_is_not_the_students():
    found = {"student": WIDE - set(range(20)), "base": WIDE, "second base": WIDE - set(range(20))}
    assert "no class clearly worse" in sentences(evidence(found, {"base": DOWN, "second base": OPEN}))[0]


def test_what_the_teacher_adds():
    rows = [(role, level, "CKA", 0.5, 0.4, 0.6, *gap)
            for role, gap in (("student", (float("nan"),) * 3), ("base", UP)) for level in ("P3", "P4")]  # fmt: skip
    columns = ["network", "level", "measure", "value", "low", "high", "difference", "difference low"]
    like = pd.DataFrame(rows, columns=[*columns, "difference high"])
    shares = pd.DataFrame([("student", "P3", 0.2, 0.1, 0.3)], columns=["network", "level", "value", "low", "high"])
    given = evidence({r: WIDE for r in ("student", "base", "teacher")}, {"base": OPEN, "teacher": OPEN},
                     likeness=like, handed_over=shares)  # fmt: skip
    text = " ".join(sentences(given))
    assert "Is the student more like its teacher than its base is? CKA: more at P3, P4." in text
    assert "the teacher expresses and the base does not: 20% [10%, 30%] at P3; without a second base" in text
    assert "want of the teacher" not in text


def test_metrics_are_known_and_those_of_objects_count_objects():
    found = {"student": WIDE - {0, 1}, "base": WIDE - {2}, "second base": WIDE, "teacher": WIDE}
    measured = metrics(evidence(found, dict.fromkeys(("base", "second base", "teacher"), OPEN)))
    assert set(measured) <= set(METRICS)
    assert measured["objects_lost"].value == 0.02
    assert measured["objects_gained"].value == 0.01
    assert measured["objects_lost"].n == 100
    assert measured["ap50_gain"][:4] == (*OPEN, 30)
    assert measured["teacher_ap50"].value == 0.5
