"""Images with boxes of objects, in memory, for detectors.

:func:`load_detection` takes a name from ``DETECTION_DATASETS``, or the path of a folder in the layout of Pascal VOC or
COCO, see :mod:`kdx.data.annotations`.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from PIL import Image
from torch import Tensor

from kdx.data.annotations import Annotated, Box, find_annotated, read_annotations
from kdx.data.decoding import decode
from kdx.data.download import download, unpack
from kdx.data.folders import WORKERS, RefusedError
from kdx.data.sources import fingerprint, place_copy
from kdx.paths import DataError, check_space, data_home, places, sha256_of

log = logging.getLogger(__name__)
MOST_SIDE = 640  # pixels of own images whose size is not given
TEST_SHARE = 0.3  # of a folder that does not say which images are for tests


@dataclass(frozen=True)
class DetectionCard:
    """What is known of a dataset of images with boxes.

    Attributes:
        name: In the registry; for a folder its own name.
        title: The name for readers.
        classes: Names of the classes, in the order of the labels.
        licence: The licence of the images.
        homepage: The address of the original.
        url: Of an archive.
        content: SHA-256 of the names and SHA-256s of the images, annotations and lists in the archive, see
            :func:`content_digest`.
        download_bytes: Size of the archive.
    """

    name: str
    title: str
    classes: tuple[str, ...]
    licence: str = "not known"
    homepage: str = ""
    url: str = ""
    content: str = field(default="", repr=False)
    download_bytes: int = 0


DETECTION_DATASETS = {
    card.name: card
    for card in (
        DetectionCard(
            "bccd",
            "BCCD",
            ("Platelets", "RBC", "WBC"),
            licence="MIT",
            homepage="https://github.com/Shenggan/BCCD_Dataset",
            url="https://github.com/Shenggan/BCCD_Dataset/archive/d272fb14cdff6e473fafeeeba32aba5f560e9e43.zip",
            content="59eb0d826c422ae58c4c46f2dac8de1af80c371950dbf0593d8aeb0c8f74f265",
            download_bytes=8_000_000,
        ),
    )
}


@dataclass(frozen=True)
class Detection:
    """Images of one size and the boxes in them.

    Attributes:
        images: uint8 (n, 3, h, w).
        boxes: Of each image, float32 (m, 4): left, top, right, bottom in pixels.
        labels: Of each image, int64 (m,).
        card: What is known of the dataset.
        refused: Annotation or image -> why it is not here.
        ignored: Of each image ``boxes`` and ``labels``, as above, where detections count neither as right nor as wrong,
            and ``crowds``, bool (m,): crowds of COCO, or else difficult objects of VOC. () if there are none.
    """

    images: Tensor = field(repr=False)
    boxes: tuple[Tensor, ...] = field(repr=False)
    labels: tuple[Tensor, ...] = field(repr=False)
    card: DetectionCard = field(repr=False)
    refused: dict[str, str] = field(default_factory=dict, repr=False)
    ignored: tuple[Mapping[str, Tensor], ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        if len(self.ignored) not in (0, len(self.images)):
            raise ValueError(f"ignored: expected those of {len(self.images)} images or (), got {len(self.ignored)}")
        if not any(len(one["labels"]) for one in self.ignored):
            object.__setattr__(self, "ignored", ())

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the labels."""
        return self.card.classes

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images."""
        return self.images.shape[2], self.images.shape[3]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of pixels, labels and boxes."""
        digest = hashlib.sha256(fingerprint(self.images, torch.cat(self.labels)).encode())
        for boxes in self.boxes:
            digest.update(boxes.numpy().tobytes() + b";")
        for one in self.ignored:
            digest.update(b"".join(one[part].numpy().tobytes() for part in ("boxes", "labels", "crowds")) + b";")
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: Tensor) -> Detection:
        """The images at the index tensor ``rows`` (m,)."""
        chosen = rows.tolist()
        return replace(
            self,
            images=self.images[rows],
            boxes=tuple(self.boxes[i] for i in chosen),
            labels=tuple(self.labels[i] for i in chosen),
            ignored=tuple(self.ignored[i] for i in chosen if self.ignored),
        )


def load_detection(name: str, split: str, size: tuple[int, int] = (192, 256), classes: Sequence[str] = ()) -> Detection:
    """Images with boxes, each scaled to fit into one size; what remains at its right or lower edge is black.

    Args:
        name: From ``DETECTION_DATASETS``, or the path of a folder in the layout of VOC or COCO.
        split: ``"train"`` or ``"test"``. A folder without lists is split by the SHA-256 of the files' names.
        size: Height and width in pixels.
        classes: Those of a folder; () takes all that are marked, in alphabetical order.

    Returns:
        The images. Those without any box are kept, since they show what is no object. Difficult objects of VOC are
        ignored in the test images, and objects like others in those for training; crowds of COCO are no objects.

    Raises:
        ValueError: No such dataset, folder or split.
        DataError: The dataset is not on this machine, or no image or no box of it can be used.

    Examples:
        >>> import kdx
        >>> kdx.load_detection("bccd", "test").images.shape  # doctest: +SKIP
        torch.Size([72, 3, 192, 256])
    """
    if split not in ("train", "test"):
        raise ValueError(f"split: expected train or test, got {split!r}")
    card, folder = _find(name)
    annotated, refused = read_annotations(folder, classes or card.classes)
    names = tuple(classes or card.classes) or _marked(annotated)
    chosen = [one for one in annotated if (one.split or _hashed_split(one.file)) == split]
    if split == "train":
        chosen = [replace(one, objects=(*one.objects, *one.difficult), difficult=()) for one in chosen]
    if not any(one.objects for one in chosen):
        raise _no_boxes(f"{name}: no box in the {split} images", chosen, refused)
    return _decoded(chosen, size, replace(card, classes=names), refused)[0]


def read_own_detection(
    folder: Path, size: Sequence[int] = (), limit: int | None = None, seed: int = 0
) -> tuple[Detection, list[str]]:
    """Images of an own folder that no detector was trained on, as far as the folder says: those for tests, or all.

    Args:
        folder: In the layout of VOC or COCO.
        size: Height and width, as for :func:`load_detection`; () takes that of the images if they share one, else a
            square, of at most ``MOST_SIDE`` pixels a side.
        limit: Largest number of images, drawn at random.
        seed: Draws them.

    Returns:
        The images, with all classes that are marked in the folder, in alphabetical order, and the name of each file.

    Raises:
        DataError: No annotations, or no image or no box that can be used.
    """
    annotated, refused = read_annotations(folder)
    names = _marked(annotated)
    chosen = [one for one in annotated if one.split == "test"] or annotated
    if limit is not None and len(chosen) > limit:
        drawn = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(seed))[:limit]
        chosen = [chosen[i] for i in drawn.sort().values.tolist()]
    if not any(one.objects for one in chosen):
        raise _no_boxes(f"{folder}: no box", chosen, refused)
    if not size:
        width, height = chosen[0].size if len({one.size for one in chosen}) == 1 else (MOST_SIDE, MOST_SIDE)
        scale = min(1, MOST_SIDE / max(width, height))
        size = (round(height * scale), round(width * scale))
    card = DetectionCard(folder.resolve().name, folder.resolve().name, names)
    return _decoded(chosen, size, card, refused)


def _marked(annotated: Sequence[Annotated]) -> tuple[str, ...]:
    """The classes that occur, in alphabetical order."""
    return tuple(sorted({thing for one in annotated for thing, _ in (*one.objects, *one.difficult, *one.crowds)}))


def _no_boxes(what: str, chosen: Sequence[Annotated], refused: dict[str, str]) -> DataError:
    ignored = sum(len(one.difficult) + len(one.crowds) for one in chosen)
    return DataError(
        f"{what} can be used; difficult objects and crowds: {ignored}, refused: {dict(list(refused.items())[:3])}"
    )


def _decoded(
    chosen: Sequence[Annotated], size: Sequence[int], card: DetectionCard, refused: dict[str, str]
) -> tuple[Detection, list[str]]:
    """Images in memory, and the name of each file; those that cannot be decoded are added to ``refused``."""
    with ThreadPoolExecutor(WORKERS) as pool:
        decoded = list(pool.map(lambda one: _fitted(one, size), chosen))
    images, objects, ignored, files = [], [], [], []
    for one, found in zip(chosen, decoded, strict=True):
        if isinstance(found, RefusedError):
            refused[one.file] = str(found)
            continue
        pixels, scale = found
        images.append(pixels)
        objects.append(_scaled(one.objects, scale, card.classes))
        crowds = torch.tensor([False] * len(one.difficult) + [True] * len(one.crowds), dtype=torch.bool)
        ignored.append(_scaled((*one.difficult, *one.crowds), scale, card.classes) | {"crowds": crowds})
        files.append(one.file)
    if not any(len(one["labels"]) for one in objects):
        raise _no_boxes(f"{card.name}: no box in {len(chosen)} images", chosen, refused)
    boxes, labels = (tuple(one[part] for one in objects) for part in ("boxes", "labels"))
    return Detection(torch.from_numpy(np.stack(images)), boxes, labels, card, refused, tuple(ignored)), files


def _scaled(marked: Sequence[tuple[str, Box]], scale: float, classes: Sequence[str]) -> dict[str, Tensor]:
    boxes = torch.tensor([box for _, box in marked]).float().reshape(-1, 4) * scale
    return {"boxes": boxes, "labels": torch.tensor([classes.index(thing) for thing, _ in marked], dtype=torch.int64)}


def _fitted(one: Annotated, size: Sequence[int]) -> tuple[np.ndarray, float] | RefusedError:
    """Pixels uint8 (3, h, w) and the factor of the scale, or why the image cannot be used."""
    try:
        picture, _ = decode(one.path)
        if picture.size != one.size:
            raise RefusedError(f"{picture.size} pixels, where its annotation says {one.size}")
    except RefusedError as reason:
        return reason
    scale = min(size[0] / picture.height, size[1] / picture.width)
    sides = [max(1, round(side * scale)) for side in picture.size]  # a narrow strip keeps one pixel
    scaled = picture.resize((sides[0], sides[1]), Image.Resampling.BILINEAR)
    canvas = np.zeros((3, *size), np.uint8)
    canvas[:, : scaled.height, : scaled.width] = np.asarray(scaled).transpose(2, 0, 1)
    return canvas, scale


def _hashed_split(file: str) -> str:
    number = int(hashlib.sha256(file.encode()).hexdigest()[:8], 16)
    return "test" if number < TEST_SHARE * 2**32 else "train"


def _find(name: str) -> tuple[DetectionCard, Path]:
    """The card and folder of a dataset."""
    if name in DETECTION_DATASETS:
        card = DETECTION_DATASETS[name]
        if folder := find_detection(name):
            return card, folder
        raise DataError(
            f"{name} is not on this machine; get it with `kdx data get {name}`, use a folder or an archive that you "
            f"have with `kdx data prepare {name} --from PATH`, or name the folder above it in KDX_DATA"
        )
    if (folder := Path(name).expanduser()).is_dir():
        return DetectionCard(folder.resolve().name, folder.resolve().name, ()), folder
    raise ValueError(
        f"unknown dataset {name!r}; choose from: {', '.join(DETECTION_DATASETS)}; or give the path of a folder in the "
        "layout of VOC or COCO"
    )


def find_detection(name: str) -> Path | None:
    """The folder of a dataset of ``DETECTION_DATASETS`` on this machine, or None."""
    return next((place / name for place in places() if (place / name).is_dir()), None)


def adopt_detection(name: str, origin: Path) -> Path:
    """Use an own folder (through a link) or archive (unpacked) as a dataset of ``DETECTION_DATASETS``.

    Raises:
        DataError: As for :func:`kdx.data.sources.place_copy`.
    """
    return place_copy(name, origin, find_annotated)


def prepare_detection(name: str, origin: Path | None = None) -> Iterator[str]:
    """Use an own folder or archive as a dataset, if one is given, and read all of it.

    Yields:
        What was found, and each annotation or image that was refused, with the reason.

    Raises:
        DataError: As for :func:`load_detection` and :func:`adopt_detection`.
    """
    if origin is not None:
        adopt_detection(name, origin)
    parts = {split: load_detection(name, split) for split in ("train", "test")}
    counts = ", ".join(f"{len(part):,} {split} images" for split, part in parts.items())
    boxes = sum(len(of) for part in parts.values() for of in part.boxes)
    yield f"{name}: {counts} with {boxes:,} boxes of {len(parts['train'].classes)} classes, in {find_detection(name)}"
    if ignored := sum(len(one["labels"]) for part in parts.values() for one in part.ignored):
        yield f"ignored: {ignored:,} crowds, and difficult objects of test images"
    for what, reason in sorted((parts["train"].refused | parts["test"].refused).items()):
        yield f"refused: {what}: {reason}"


def fetch_detection(name: str) -> Path:
    """Make sure that a dataset of ``DETECTION_DATASETS`` is on this machine: found, or downloaded and verified.

    Raises:
        DataError: No connection, a full disk, or other files than the card describes.
    """
    if folder := find_detection(name):
        return folder
    card = DETECTION_DATASETS[name]
    raw = data_home() / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    check_space(name, 4 * card.download_bytes, raw)
    with FileLock(raw / f".{name}.lock"), tempfile.TemporaryDirectory(prefix=f".partial-{name}-", dir=raw) as scratch:
        if folder := find_detection(name):  # by another process, for which this one waited
            return folder
        log.info("%s: %.0f MB from %s", name, card.download_bytes / 1e6, card.url)
        archive = download(card.url, Path(scratch) / "archive.zip")
        unpack(archive, Path(scratch) / name)
        found = find_annotated(Path(scratch) / name)
        if (got := content_digest(found)) != card.content:
            raise DataError(f"{card.url}: expected files of SHA-256 {card.content[:12]}…, got {got[:12]}…")
        os.replace(found, raw / name)
    return raw / name


def content_digest(folder: Path) -> str:
    """SHA-256 (hex) of the names and contents of a folder's annotations, images and lists, in the layout of VOC.

    That of an archive would not do: the server may pack the same files anew.
    """
    kept = ("Annotations/*.xml", "JPEGImages/*", "ImageSets/Main/*.txt")
    files = sorted(path for pattern in kept for path in folder.glob(pattern) if path.is_file())
    lines = [f"{path.relative_to(folder).as_posix()} {sha256_of(path)}\n" for path in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
