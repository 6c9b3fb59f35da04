"""How like its teacher a student is: maps, features, and what was handed over, with a value for each image.

The mean of an image's values is the measure, so that intervals of it, and of differences between two students, are
those of a mean over images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
import torch
from torch import Tensor, nn

from kdx.data.detection import Detection
from kdx.distance import u_center
from kdx.distil.average_precision import THRESHOLDS, average_precision
from kdx.distil.detector_fit import detect
from kdx.explain.detection_cam import score_gradients
from kdx.explain.feature_maps import magnitude
from kdx.explain.grad_cam import agreement, to_map
from kdx.explain.regression import Moments, errors_beyond, share
from kdx.inference import jackknife
from kdx.intervals import Interval
from kdx.measure.localisation import mass_on
from kdx.networks.fpn_detectors import watch_levels
from kdx.networks.stages import evaluating

COLUMNS = ["network", "level", "measure", "image", "value"]
TEACHER = "teacher"
FEATURES, CAM = "feature map", "Grad-CAM"
AT_ONCE = 24  # images


def cka_values(first: Tensor, second: Tensor) -> Tensor:
    """Linear CKA of the features of two networks, by the unbiased estimator, in parts by a jackknife over images.

    Args:
        first: (n, ...), n > 4.
        second: (n, ...), the same images in another network.

    Returns:
        float64 (n,). Their mean is the CKA of all images; their spread gives its interval.
    """
    if len(first) != len(second) or len(first) < 5:
        raise ValueError(f"expected features of the same 5 images or more, got {len(first)} and {len(second)}")
    products = [(x := features.flatten(1).double()) @ x.T for features in (first, second)]
    every = torch.arange(len(first))
    without = [_cka(products, every[every != i]) for i in every]
    return torch.from_numpy(jackknife(_cka(products, every), without))


def _cka(products: Sequence[Tensor], rows: Tensor) -> float:
    p, q = (u_center(of[rows][:, rows].fill_diagonal_(0.0)) for of in products)
    return ((p * q).sum() / (p.square().sum() * q.square().sum()).sqrt()).item()


def handed_over(student: Tensor, base: Tensor, teacher: Tensor, folds: int = 9) -> Interval:
    """The share of the variance of a student's features that its base cannot express and its teacher can.

    It is *handed over* of :func:`kdx.transferred_share`, for features at hand, such as a level of a pyramid.

    Args:
        student: (n, k, h, w).
        base: (n, k, h, w), a network that had no teacher; brought to the student's grid.
        teacher: Likewise.
        folds: Of images; each is predicted by regressions on all others.

    Returns:
        The share with its 95 % interval; compare that of a second base, which had no teacher either.
    """
    if folds < 3 or len(student) < folds:
        raise ValueError(f"expected 3 folds or more, and as many images, got {folds} and {len(student)}")
    parts = [
        Moments.among([features[i::folds] for features in (student, base, teacher)], {"": (0, 1, 2)})[""]
        for i in range(folds)
    ]
    spread, left, last = errors_beyond(parts, base.shape[1])
    return share(left - last, spread)[0]


def box_masks(images: Detection) -> Tensor:
    """uint8 (n, h, w): 1 in the pixels that a box covers at least partly."""
    height, width = images.size
    found = torch.zeros(len(images), height, width, dtype=torch.uint8)
    for mask, boxes in zip(found, images.boxes, strict=True):
        for left, top, right, bottom in boxes.tolist():
            mask[int(top) : -int(-bottom // 1), int(left) : -int(-right // 1)] = 1
    return found


def compare_detectors(students: Mapping[str, nn.Module], teacher: nn.Module, images: Detection) -> pd.DataFrame:
    """How like their teacher detectors see images, at each level of their pyramids.

    Args:
        students: Name -> detector with as many and as large levels as the teacher.
        teacher: The detector that they are compared with.
        images: With their boxes.

    Returns:
        network (also ``teacher``, where it is not compared with itself), level, measure, image, value. Measures:
        ``agreement of feature maps`` and ``agreement of Grad-CAMs`` (Pearson correlation over pixels with the teacher's
        map; NaN where a map is constant, as where nothing was found), ``CKA`` (pseudo-values, see :func:`cka_values`),
        ``feature map in boxes`` and ``Grad-CAM in boxes`` (share of a map's mass that lies in boxes).
    """
    masks = box_masks(images)
    theirs = seen_levels(teacher, images.images)
    rows = []
    for name, detector in {**students, TEACHER: teacher}.items():
        ours = theirs if name == TEACHER else seen_levels(detector, images.images)
        for level, (features, maps) in ours.items():
            values = {f"{kind} in boxes": mass_on(of, masks) for kind, of in maps.items()}
            if name != TEACHER:
                values["CKA"] = cka_values(features, theirs[level][0])
                for kind, of in maps.items():
                    values[f"agreement of {kind}s"] = agreement(of, theirs[level][1][kind])
            for measure, of_images in values.items():
                rows += [(name, level, measure, i, value) for i, value in enumerate(of_images.tolist())]
    return pd.DataFrame(rows, columns=COLUMNS)


def seen_levels(detector: nn.Module, images: Tensor) -> dict[str, tuple[Tensor, dict[str, Tensor]]]:
    """Level -> features (n, k, h, w) for uint8 images (n, 3, h, w), and maps (n, h, w) of both kinds by their name."""
    parts = [score_gradients(detector, chunk) for chunk in images.split(AT_ONCE)]
    found = {}
    for level in parts[0]:
        features, gradient = (torch.cat([part[level][i].cpu() for part in parts]) for i in (0, 1))
        found[level] = features, {FEATURES: magnitude(features), CAM: to_map(features, gradient)}
    return found


def precision_table(detectors: Mapping[str, nn.Module], images: Detection) -> pd.DataFrame:
    """AP50 and AP of detectors, in the columns of :func:`compare_detectors`; level is empty, values are pseudo-values.

    Raises:
        ModuleNotFoundError: pycocotools is not installed (``pip install kdx[detection]``).
    """
    rows = []
    for name, detector in detectors.items():
        found = detect(detector, images.images)
        for measure in THRESHOLDS:
            values = average_precision(images, found, measure).pseudo.tolist()
            rows += [(name, "", measure, i, value) for i, value in enumerate(values)]
    return pd.DataFrame(rows, columns=COLUMNS)


def shares_table(
    detectors: Mapping[str, nn.Module], base: nn.Module, teacher: nn.Module, images: Detection
) -> pd.DataFrame:
    """What was handed over to detectors at each level: network, level, value, low, high, see :func:`handed_over`."""
    of_base, of_teacher = (_features(detector, images) for detector in (base, teacher))
    rows = []
    for name, detector in detectors.items():
        for level, features in _features(detector, images).items():
            rows.append((name, level, *handed_over(features, of_base[level], of_teacher[level])[:3]))
    return pd.DataFrame(rows, columns=["network", "level", "value", "low", "high"])


def _features(detector: nn.Module, images: Detection) -> dict[str, Tensor]:
    """Level -> features (n, k, h, w) in evaluation mode, float32."""
    device = next(detector.parameters()).device
    with torch.no_grad(), evaluating(detector):
        parts = []
        for chunk in images.images.split(AT_ONCE):
            with watch_levels(detector) as levels:
                detector(list(chunk.to(device) / 255))
            parts.append(dict(levels))
    return {level: torch.cat([part[level].cpu() for part in parts]) for level in parts[0]}
