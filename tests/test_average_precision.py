import sys
from dataclasses import replace

import pytest
import torch

import kdx
from tests.boxes import squares

TRUTH = squares(6)  # five boxes in six images: three red, two green


def found(boxes=TRUTH.boxes, labels=TRUTH.labels, scores=None):
    scores = [torch.ones(len(b)) for b in boxes] if scores is None else scores
    return [
        {"boxes": b, "labels": of, "scores": s} for b, of, s in zip(boxes, labels, scores, strict=True)
    ]  # fmt: skip


def ap(detections, which="AP50", truth=TRUTH):
    return kdx.average_precision(truth, detections, which)


def nothing():
    return [torch.zeros(0, 4)] * 6, [torch.zeros(0, dtype=torch.int64)] * 6


def test_perfect_and_empty():
    assert ap(found()).value == 1
    assert ap(found(), "AP").value == 1
    assert ap(found(*nothing())).value == 0


def test_half_of_a_class_is_half_of_its_recall():
    """Of the two green boxes one is found: precision 1 up to recall 0.5, at 51 of 101 points; red is perfect."""
    boxes, labels = list(TRUTH.boxes), list(TRUTH.labels)
    boxes[1], labels[1] = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    assert ap(found(boxes, labels)).value == pytest.approx((1 + 51 / 101) / 2)


def test_a_confident_false_alarm_halves_the_precision_of_all_that_follow():
    boxes, labels, scores = list(TRUTH.boxes), list(TRUTH.labels), [torch.ones(len(b)) for b in TRUTH.boxes]
    boxes[5], labels[5], scores[5] = torch.tensor([[0.0, 0, 9, 9]]), torch.tensor([1]), torch.tensor([2.0])
    assert ap(found(boxes, labels, scores)).value == pytest.approx((1 + 2 / 3) / 2)  # green: 0, 1/2, 2/3


def test_overlap_decides_by_the_threshold():
    """Boxes of 24 x 24 moved by 6 overlap with 18 of 30 columns: 0.6."""
    moved = [box + torch.tensor([6.0, 0, 6, 0]) for box in TRUTH.boxes]
    assert ap(found(moved)).value == 1
    assert ap(found(moved), "AP").value == pytest.approx(0.3)  # at 0.5, 0.55 and 0.6 of ten


def test_pseudo_values_are_those_of_the_jackknife():
    boxes, labels = list(TRUTH.boxes), list(TRUTH.labels)
    boxes[1], labels[1] = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    detections = found(boxes, labels)
    whole = ap(detections)
    without = []
    for i in range(6):
        rows = torch.tensor([j for j in range(6) if j != i])
        without.append(ap([detections[j] for j in rows.tolist()], truth=TRUTH[rows]).value)
    expected = [whole.value + 5 * (sum(without) / 6 - one) for one in without]
    assert whole.pseudo.tolist() == pytest.approx(expected)
    assert whole.pseudo.mean().item() == pytest.approx(whole.value)
    assert ap(found()).pseudo.tolist() == [1.0] * 6
    halves = kdx.average_precision(TRUTH, detections, blocks=2)
    rows = [torch.arange(3), torch.arange(3, 6)]
    one, other = (ap([detections[j] for j in of.tolist()], truth=TRUTH[of]).value for of in rows)
    assert halves.pseudo.tolist() == pytest.approx([whole.value + (one - other) / 2, whole.value + (other - one) / 2])
    assert kdx.average_precision(TRUTH, detections, blocks=9).blocks == 6


def test_crowds_are_ignored_as_in_coco():
    """A red false alarm comes first, of which precision is 1/2, 2/3, 3/4; in a crowd it does not count."""
    alarm = {"boxes": torch.tensor([[0.0, 0, 9, 9]]), "labels": torch.tensor([0]), "scores": torch.tensor([2.0])}
    detections = [*found()[:5], alarm]
    assert ap(detections).value == pytest.approx((1 + 3 / 4) / 2)
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "crowds": torch.zeros(0).bool()}
    one = {"boxes": torch.tensor([[0.0, 0, 20, 20]]), "labels": torch.tensor([0]), "crowds": torch.tensor([True])}
    truth = replace(TRUTH, ignored=(*[empty] * 5, one))
    assert ap(detections, truth=truth).value == 1
    hard = replace(truth, ignored=(*[empty] * 5, one | {"crowds": torch.tensor([False])}))
    assert ap(detections, truth=hard).value == pytest.approx((1 + 3 / 4) / 2)  # overlaps by a fifth
    assert ap([*found()[:5], alarm | {"boxes": one["boxes"]}], truth=hard).value == 1
    with pytest.raises(ValueError, match=r"ignored: expected those of 6 images or \(\), got 1"):
        replace(TRUTH, ignored=(one,))
    assert ap(found(), truth=truth).value == 1  # a crowd need not be found
    assert truth.fingerprint != TRUTH.fingerprint


def test_classes_without_boxes_play_no_part():
    truth = replace(TRUTH, card=replace(TRUTH.card, classes=("red", "green", "blue")))
    assert ap(found(), truth=truth).value == 1


def test_wrong_input_and_a_missing_library(monkeypatch):
    with pytest.raises(ValueError, match="choose from: AP50, AP"):
        ap(found(), "AP75")
    with pytest.raises(ValueError, match="detections of 6 images, got 5"):
        ap(found()[1:])
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install kdx\[detection\]"):
        ap(found())
