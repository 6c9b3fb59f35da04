"""The detectors and images of a report: read, checked against each other, and with what each of them finds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import nan
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torchvision.models.detection.backbone_utils import BackboneWithFPN

from kdx.data.detection import Detection, read_own_detection
from kdx.data.own_images import read_labels
from kdx.distil.average_precision import THRESHOLDS, average_precision
from kdx.distil.detector_fit import detect
from kdx.intervals import Interval, mean_interval
from kdx.measure.ledger import STUDENT, Ledger
from kdx.measure.objects import Found, changes, found_objects, image_of, object_ledger
from kdx.networks.fpn_detectors import watch_levels
from kdx.networks.stages import evaluating
from kdx.pages.own_pair import FEWEST, OwnNetworks, networks_given, read_networks
from kdx.paths import one_line, sha256_of
from kdx.version import __version__

BLOCKS = 100  # of images, for intervals of average precision
BACKGROUND = "__background__"


@dataclass(frozen=True)
class DetectorPair:
    """Detectors with images, and what they find in these.

    Attributes:
        own: The networks.
        folder: Of the images.
        images: With their boxes.
        files: The name of each image.
        detections: Role -> what :func:`kdx.detect` returns.
        score: The least score that counts where objects are counted.
        caveats: What is doubtful, in sentences.
    """

    own: OwnNetworks
    folder: Path
    images: Detection
    files: Sequence[str]
    detections: Mapping[str, list[dict[str, Tensor]]]
    score: float
    caveats: list[str] = field(default_factory=list)

    @cached_property
    def found(self) -> dict[str, Found]:
        """Role -> the objects that it finds."""
        return {role: found_objects(self.images, of, self.score) for role, of in self.detections.items()}

    @cached_property
    def ledger(self) -> Ledger:
        """The ledger of objects."""
        return object_ledger(self.images, self.found)

    @cached_property
    def precision(self) -> pd.DataFrame:
        """network, measure, value, low, high (95 %, over images) and difference, difference low, difference high (of
        the student minus this network, NaN of the student itself)."""
        rows = []
        for measure in THRESHOLDS:
            parts = {
                role: average_precision(self.images, of, measure, BLOCKS).pseudo for role, of in self.detections.items()
            }
            rows += [(role, measure, *_compared(parts, role)) for role in parts]
        return pd.DataFrame(rows, columns=["network", "measure", *COLUMNS])

    @cached_property
    def alarms(self) -> pd.DataFrame:
        """False alarms an image, in the columns of :attr:`precision` without measure."""
        parts = {role: torch.from_numpy(of.alarms).double() for role, of in self.found.items()}
        return pd.DataFrame([(role, *_compared(parts, role)) for role in parts], columns=["network", *COLUMNS])

    def per_object(self) -> pd.DataFrame:
        """file, class, left, top, right, bottom (pixels of the images that the networks got), whether each network
        finds it, and change."""
        boxes = torch.cat(self.images.boxes)
        table = pd.DataFrame({"file": [self.files[i] for i in image_of(self.images)]})
        table["class"] = [self.images.classes[i] for i in torch.cat(self.images.labels).tolist()]
        table[["left", "top", "right", "bottom"]] = boxes.double().round(decimals=1).numpy()
        for role, of in self.found.items():
            table[role] = of.objects
        return table.assign(change=changes(self.ledger))


COLUMNS = ["value", "low", "high", "difference", "difference low", "difference high"]


def _compared(parts: Mapping[str, Tensor], role: str) -> tuple[float, ...]:
    """A mean over parts with its interval, and the student's minus it with its own."""
    gap = Interval(nan, nan, nan, 0) if role == STUDENT else mean_interval(parts[STUDENT] - parts[role])
    return (*mean_interval(parts[role])[:3], *gap[:3])


def read_detectors(
    parameters: Mapping[str, Any], folder: Path, score: float = 0.5, limit: int | None = None, seed: int = 0
) -> DetectorPair:
    """Read detectors and images, check that they fit each other, and let each detector find what it finds.

    Args:
        parameters: Checkpoints and what builds them, as for :func:`kdx.pages.own_pair.networks_given`; perhaps
            ``labels``, a file with the names of the outputs in order, and ``size``, pixels a side of a square.
        folder: Images with boxes, in the layout of VOC or COCO.
        score: The least score that counts where objects are counted.
        limit: Largest number of images.
        seed: Draws them.

    Raises:
        ValueError: As for :func:`kdx.pages.own_pair.read_networks`; a network that is no detector, or detectors and
            images of different classes; fewer than ``FEWEST`` images.
        DataError: As for :func:`kdx.data.detection.read_own_detection`.
    """
    if not 0 < score < 1:
        raise ValueError(f"score: expected a number between 0 and 1, got {score}")
    own = read_networks(*networks_given(parameters))
    outputs = {role: outputs_of(network, role) for role, network in own.networks.items()}
    if len(set(outputs.values())) > 1:
        raise ValueError(f"expected detectors of the same classes, got outputs for classes: {outputs}")
    header = own.headers[STUDENT]
    side, caveats = int(parameters.get("size") or 0), []
    size = (side, side) if side else header.get("architecture", {}).get("size", ())
    images, files = read_own_detection(folder, size, limit, seed)
    if len(images) < FEWEST:
        raise ValueError(f"detection: expected {FEWEST} images or more, got {len(images)} that can be used in {folder}")
    if images.refused:
        what, why = next(iter(images.refused.items()))
        caveats.append(
            f"{len(images.refused):,} annotations or images were refused, such as {what}: {why}. "
            "What is detected of a refused object counts as a false alarm."
        )
    if count := sum(len(one["labels"]) for one in images.ignored):
        marked = "1 object is marked as a crowd" if count == 1 else f"{count:,} objects are marked as crowds"
        caveats.append(
            f"{marked} or as difficult: what is detected there, of a difficult object once, is neither found nor a "
            "false alarm."
        )
    if not size:
        height, width = images.size
        caveats.append(f"The detectors were given images of {width} x {height} pixels (--size).")
    names = read_labels(parameters["labels"]) if parameters.get("labels") else list(header.get("classes", ()))
    if not names:
        names = list(images.classes)
        caveats.append("The outputs were taken for the classes of the folder in alphabetical order (--labels).")
    images = _renamed(images, names, outputs[STUDENT])
    detections = {role: _found(network, images.images, role) for role, network in own.networks.items()}
    return DetectorPair(own, folder, images, files, detections, score, caveats)


def outputs_of(network: nn.Module, role: str) -> int:
    """For how many classes a detector has outputs; background counts where the detector counts it.

    Raises:
        ValueError: Not a detector of torchvision with a feature pyramid.
    """
    model: Any = network
    if isinstance(getattr(model, "backbone", None), BackboneWithFPN):
        if hasattr(model, "head"):
            return int(model.head.classification_head.num_classes)
        if hasattr(model, "roi_heads"):
            return int(model.roi_heads.box_predictor.cls_score.out_features)
    raise ValueError(
        f"{role}: expected a detector of torchvision with a feature pyramid (FCOS, RetinaNet, Faster R-CNN), got "
        f"{type(network).__name__}"
    )


def _renamed(images: Detection, names: Sequence[str], outputs: int) -> Detection:
    """Images whose labels count as the outputs of the detectors do."""
    if len(names) != outputs or len(set(names)) < outputs:
        raise ValueError(
            f"labels: expected different names of the {outputs} outputs of the student in order (--labels, with "
            f"{BACKGROUND} where it counts background), got {len(names)}: {', '.join(names[:10])}"
        )
    if strange := [name for name in images.classes if name not in names]:
        raise ValueError(
            f"detection: expected objects of the classes of the student ({', '.join(names[:10])}), got also "
            f"{', '.join(strange[:10])}"
        )
    place = torch.tensor([names.index(name) for name in images.classes])
    labels = tuple(place[of] for of in images.labels)
    ignored = tuple({**one, "labels": place[one["labels"]]} for one in images.ignored)
    return replace(images, labels=labels, ignored=ignored, card=replace(images.card, classes=tuple(names)))


def _found(network: nn.Module, images: Tensor, role: str) -> list[dict[str, Tensor]]:
    try:
        found = detect(network, images)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"the {role} does not take images of {tuple(images.shape[1:])}: {one_line(error)}") from error
    found = [{name: one[name] for name in ("boxes", "labels", "scores")} for one in found]
    if not all(one["boxes"].isfinite().all() and one["scores"].isfinite().all() for one in found):
        raise ValueError(f"the {role} finds boxes or scores that are NaN or infinite; check its weights")
    return found


def common_levels(pair: DetectorPair) -> list[str]:
    """The levels P3 to P5 that all detectors have, of one size for all; [] where they differ."""
    shapes = []
    for network in pair.own.networks.values():
        device = next(network.parameters()).device
        with torch.no_grad(), evaluating(network), watch_levels(network) as levels:
            network([pair.images.images[0].to(device) / 255])
            shapes.append({name: level.shape[2:] for name, level in levels.items()})
    return list(shapes[0]) if all(shape == shapes[0] for shape in shapes) else []


def facts(pair: DetectorPair, command: str) -> dict[str, Any]:
    """What a statement says about its origin."""
    images = pair.images
    return {
        "command": command,
        "version": __version__,
        "networks": {role: {"file": path.name, "sha256": sha256_of(path)} for role, path in pair.own.paths.items()},
        "data": {
            "folder": pair.folder.name, "sha256": images.fingerprint, "size": list(images.size), "normalisation": [],
            "labels": "boxes",
        },
        "detection": {"score": pair.score, "iou": 0.5, "objects": sum(map(len, images.boxes))},
    }  # fmt: skip
