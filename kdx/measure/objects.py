"""Which objects detectors find, one by one, and what they find where there is none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdx.data.detection import Detection
from kdx.distil.average_precision import judge
from kdx.measure.ledger import BASE, STUDENT, Ledger


class Found(NamedTuple):
    """What a detector found.

    Attributes:
        objects: bool (objects,), whether it found an object, in the order of images and of their boxes.
        alarms: int64 (n,), of each image how many detections found neither an object nor an ignored box.
    """

    objects: NDArray[np.bool_]
    alarms: NDArray[np.int64]


def found_objects(truth: Detection, detections: Sequence[Mapping[str, Tensor]], score: float) -> Found:
    """The objects that detections of a score match, as COCO matches them: of the same class, with an intersection over
    union of 0.5 or more, the highest scores first, and each object once. What is detected of an ignored box, see
    :class:`kdx.data.detection.Detection`, is no false alarm.

    Args:
        truth: Images with their boxes.
        detections: Of each image boxes, labels and scores, as :func:`kdx.detect` returns.
        score: The least that counts.

    Raises:
        ValueError: Not one set of detections for each image.
        ModuleNotFoundError: pycocotools is not installed (``pip install kdx[detection]``).
    """
    if len(detections) != len(truth):
        raise ValueError(f"expected detections of {len(truth)} images, got {len(detections)}")
    objects, alarms = np.zeros(sum(map(len, truth.boxes)), bool), np.zeros(len(truth), np.int64)
    kept = [{name: values[one["scores"] >= score] for name, values in one.items()} for one in detections]
    if not any(len(one["scores"]) for one in kept):
        return Found(objects, alarms)
    for of in judge(truth, kept, "AP50").evalImgs:  # of an image and a class
        if of is not None:
            matched = (of["gtMatches"][0] > 0) & (of["gtIgnore"] == 0)
            objects[np.array(of["gtIds"], int)[matched] - 1] = True
            alarms[of["image_id"]] += int((of["dtMatches"][0] == 0).sum())
    return Found(objects, alarms)


def image_of(truth: Detection) -> NDArray[np.int64]:
    """The image of each object, int64 (objects,)."""
    return np.repeat(np.arange(len(truth)), [len(boxes) for boxes in truth.boxes])


def object_ledger(truth: Detection, found: Mapping[str, Found]) -> Ledger:
    """The ledger of objects in place of images: *right* is an object that was found, and all that were not have one
    answer, so that *inherited* errors are objects that the teacher misses as well.

    Args:
        truth: Images with their boxes.
        found: Role -> what it found; see :class:`kdx.Ledger` for the roles.
    """
    labels, missed = torch.cat(truth.labels), len(truth.classes)
    answers = {role: torch.where(torch.from_numpy(of.objects), labels, missed) for role, of in found.items()}
    return Ledger(labels, answers, truth.classes)


def telling_images(truth: Detection, ledger: Ledger, count: int) -> list[int]:
    """Images in which the student gained most objects, and lost most, in turns; then others with objects."""
    changed = ledger.quantities(STUDENT)
    of = {name: np.bincount(image_of(truth), changed[name], len(truth)) for name in ("gained", "lost")}
    orders = [[int(i) for i in np.argsort(-of[name], kind="stable") if of[name][i]] for name in of]
    rest = [i for i, boxes in enumerate(truth.boxes) if len(boxes)]
    turns = [order[i] for i in range(count) for order in orders if i < len(order)]
    return list(dict.fromkeys([*turns, *rest]))[:count]


def changes(ledger: Ledger) -> list[str]:
    """Of each object: gained, lost, or empty where student and base agree."""
    student, base = ledger.right(STUDENT), ledger.right(BASE)
    return ["gained" if s and not b else "lost" if b and not s else "" for s, b in zip(student, base, strict=True)]
