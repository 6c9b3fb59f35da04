"""Average precision of detectors, by pycocotools."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from functools import cached_property, partial
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdx.data.detection import Detection
from kdx.inference import jackknife

MOST_AREA = 1e10  # pixels of an object; what is larger is ignored
THRESHOLDS = {"AP50": (0.5,), "AP": tuple(np.linspace(0.5, 0.95, 10).tolist())}


@dataclass(frozen=True, eq=False)
class Precision:
    """An average precision.

    Attributes:
        value: In 0..1, the mean over classes.
        blocks: Number of blocks of images, by default as many as images.
    """

    value: float
    blocks: int
    _without: Callable[[int], float] = field(repr=False)

    @cached_property
    def pseudo(self) -> Tensor:
        """The part of each block of images by the jackknife, float64 (blocks,); their mean is the value.

        It has the interval of a mean, and the mean of the differences of two detectors' parts on the same images that
        of their difference.
        """
        return torch.from_numpy(jackknife(self.value, [self._without(i) for i in range(self.blocks)]))


def average_precision(
    truth: Detection, found: Sequence[Mapping[str, Tensor]], which: str = "AP50", blocks: int | None = None
) -> Precision:
    """Average precision as in COCO, with pseudo-values of images.

    Args:
        truth: Images with their boxes.
        found: Of each image boxes, labels and scores, as :func:`kdx.detect` returns.
        which: ``"AP50"``, at an intersection over union of 0.5, or ``"AP"``, the mean over 0.5 to 0.95.
        blocks: Into which the images are divided for pseudo-values, which take a while for each; at most as many as
            images, and None for just as many.

    Returns:
        The mean over classes that occur, with the pseudo-value of each block. What is detected of an ignored box counts
        neither way; of a crowd, any number of detections that lie in it.

    Raises:
        ValueError: Another measure, or not one set of detections for each image.
        ModuleNotFoundError: pycocotools is not installed (``pip install kdx[detection]``).
    """
    _pycocotools()
    if which not in THRESHOLDS:
        raise ValueError(f"unknown measure {which!r}; choose from: {', '.join(THRESHOLDS)}")
    if len(found) != len(truth):
        raise ValueError(f"expected detections of {len(truth)} images, got {len(found)}")
    n = min(blocks or len(truth), len(truth))
    if not any(len(one["scores"]) for one in found):
        return Precision(0.0, n, lambda i: 0.0)
    judged = judge(truth, found, which)
    return Precision(_accumulated(judged, n), n, partial(_accumulated, judged, n))


def _pycocotools() -> tuple[ModuleType, ModuleType]:
    try:
        from pycocotools import coco, cocoeval
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "average precision needs pycocotools: install it with `pip install kdx[detection]`", name=error.name
        ) from error
    return coco, cocoeval


def judge(truth: Detection, found: Sequence[Mapping[str, Tensor]], which: str) -> Any:
    """COCO's evaluation of each image and class, as pycocotools has it. Of no detections at all there is none.

    The ids of objects count from 1, in the order of images and of their boxes; those that are ignored follow. Crowds
    are ignored as COCO does; difficult objects have an area beyond its range, for which each is ignored once.
    """
    coco, cocoeval = _pycocotools()
    objects = [
        {"boxes": boxes, "labels": labels, "crowds": torch.zeros_like(labels)}
        for boxes, labels in zip(truth.boxes, truth.labels, strict=True)
    ]
    boxes = [
        {"image_id": i, "category_id": label, "bbox": box, "area": box[2] * box[3] + beyond, "iscrowd": int(crowd)}
        for beyond, kind in ((0, objects), (2 * MOST_AREA, truth.ignored))
        for i, one in enumerate(kind)
        for box, label, crowd in zip(
            _left_top_width_height(one["boxes"]), one["labels"].tolist(), one["crowds"].tolist(), strict=True
        )
    ]
    detections = [
        [i, *box, score, label]
        for i, one in enumerate(found)
        for box, score, label in zip(
            _left_top_width_height(one["boxes"]), one["scores"].tolist(), one["labels"].tolist(), strict=True
        )
    ]
    with redirect_stdout(io.StringIO()):
        right = coco.COCO()
        right.dataset = {
            "images": [{"id": i} for i in range(len(truth))],
            "categories": [{"id": c} for c in range(len(truth.classes))],
            "annotations": [box | {"id": number} for number, box in enumerate(boxes, 1)],
            "info": {},
        }
        right.createIndex()
        judged = cocoeval.COCOeval(right, right.loadRes(np.array(detections).reshape(-1, 7)), "bbox")
        judged.params.iouThrs = np.array(THRESHOLDS[which])
        judged.params.areaRng, judged.params.areaRngLbl = [[0, MOST_AREA]], ["all"]
        judged.params.maxDets = [100]
        judged.evaluate()
    return judged


def _left_top_width_height(boxes: Tensor) -> list[list[float]]:
    return torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).double().tolist()


def _accumulated(judged: Any, blocks: int, without: int | None = None) -> float:
    """The mean over thresholds and classes that occur, perhaps without a block of images; 0 if there is no box."""
    every, images = judged.evalImgs, len(judged.params.imgIds)
    judged.evalImgs = [None if i % images * blocks // images == without else one for i, one in enumerate(every)]
    with redirect_stdout(io.StringIO()):
        judged.accumulate()
    judged.evalImgs = every
    precision = judged.eval["precision"]
    return float(precision[precision > -1].mean()) if (precision > -1).any() else 0.0
