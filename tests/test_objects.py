from dataclasses import replace

import numpy as np
import pytest
import torch

from kdx.measure.objects import changes, found_objects, image_of, object_ledger, telling_images
from tests.boxes import squares

TRUTH = squares(6)  # one box in each image but the last; red, green in turns


def found(rows, score=0.9, move=0.0, label=None):
    """Detections of the objects of some images."""
    result = []
    for i in range(6):
        here = i in rows and len(TRUTH.boxes[i])
        boxes = TRUTH.boxes[i] + move if here else torch.zeros(0, 4)
        labels = TRUTH.labels[i] if here else torch.zeros(0, dtype=torch.int64)
        labels = labels if label is None else torch.full_like(labels, label)
        result.append({"boxes": boxes, "labels": labels, "scores": torch.full((len(boxes),), score)})
    return result


def test_an_object_is_found_by_a_detection_of_its_class_place_and_score():
    of = found_objects(TRUTH, found({0, 2}), 0.5)
    assert of.objects.tolist() == [True, False, True, False, False]
    assert of.alarms.tolist() == [0] * 6
    assert not found_objects(TRUTH, found({0, 2}), 0.95).objects.any()
    moved = found_objects(TRUTH, found({0, 2}, move=12.0), 0.5)  # overlaps by a quarter, of seven
    assert not moved.objects.any()
    assert moved.alarms.tolist() == [1, 0, 1, 0, 0, 0]
    green = found_objects(TRUTH, found({0, 1}, label=1), 0.5)
    assert green.objects.tolist() == [False, True, False, False, False]
    assert green.alarms.tolist() == [1, 0, 0, 0, 0, 0]


def test_an_object_is_found_once_and_an_image_without_objects_has_alarms():
    detections = found({0})
    detections[0] = {name: torch.cat([values, values]) for name, values in detections[0].items()}
    detections[5] = found({0})[0]
    of = found_objects(TRUTH, detections, 0.5)
    assert of.objects.sum() == 1
    assert of.alarms.tolist() == [1, 0, 0, 0, 0, 1]
    with pytest.raises(ValueError, match="detections of 6 images, got 5"):
        found_objects(TRUTH, detections[1:], 0.5)


def test_what_is_found_of_an_ignored_box_is_neither_found_nor_an_alarm():
    """Image 0 has a red object and an ignored box, and all that is found there is red but for one."""
    box = {"boxes": torch.tensor([[0.0, 0, 20, 20]]), "labels": torch.tensor([0])}
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "crowds": torch.zeros(0).bool()}
    alone = replace(TRUTH, boxes=(torch.tensor([[30.0, 30, 50, 50]]), *TRUTH.boxes[1:]))
    crowd, hard = (replace(alone, ignored=(box | {"crowds": torch.tensor([of])}, *[empty] * 5)) for of in (True, False))
    inside, half, less, other = [0.0, 0, 8, 8], [10.0, 0, 30, 20], [11.0, 0, 31, 20], [1.0, 1, 9, 9]
    detections = found({1, 2})
    detections[0] = {
        "boxes": torch.tensor(
            [[30.0, 30, 50, 50], inside, inside, half, less, other, [0.0, 0, 20, 15], [0.0, 0, 20, 16]]
        ),
        "labels": torch.tensor([0, 0, 0, 0, 0, 1, 0, 0]),
        "scores": torch.full((8,), 0.9),
    }
    for truth, alarms in ((crowd, 2), (hard, 6), (alone, 7)):  # in a crowd: less than half of it; of another class
        of = found_objects(truth, detections, 0.5)
        assert of.objects.tolist() == [True, True, True, False, False]
        assert of.alarms.tolist() == [alarms, 0, 0, 0, 0, 0]
    assert found_objects(crowd[torch.tensor([1, 0])], detections[1::-1], 0.5).alarms.tolist() == [0, 2]
    assert crowd[torch.tensor([1])].ignored == ()


def test_the_ledger_of_objects_counts_gained_lost_and_missed_by_both():
    roles = {"student": {0, 1, 2}, "base": {2, 3}, "teacher": {0, 1, 2, 3}}
    ledger = object_ledger(TRUTH, {role: found_objects(TRUTH, found(rows), 0.5) for role, rows in roles.items()})
    counts = {name: values.tolist() for name, values in ledger.quantities("student").items()}
    assert counts["gained"] == [True, True, False, False, False]
    assert counts["lost"] == [False, False, False, True, False]
    assert counts["inherited"] == [False, False, False, False, True]  # all of them miss it
    assert counts["own errors"] == [False, False, False, True, False]
    assert changes(ledger) == ["gained", "gained", "", "lost", ""]
    assert ledger.by_class().set_index("group").loc["red", ["n", "gained", "lost"]].tolist() == [3, 1, 0]
    assert telling_images(TRUTH, ledger, 3) == [0, 3, 1]
    assert telling_images(TRUTH, ledger, 9) == [0, 3, 1, 2, 4]
    assert np.array_equal(image_of(TRUTH), [0, 1, 2, 3, 4])
