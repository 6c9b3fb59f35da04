"""Probe sets: images with concept masks, for network dissection (:func:`kdx.dissect`).

:func:`load_probe` reads a folder in the layout of Broden (Bau et al. 2017), image by image as they are needed, or
generates a probe whose masks are exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor

from kdx.data import shapes
from kdx.data.cues import FAMILIES, Scene
from kdx.data.dataset import load_dataset
from kdx.data.folders import WORKERS
from kdx.paths import DataError, places

GENERATED = ("planted", "shapes")
COLUMNS = {  # of the tables in Broden's layout
    "index": ("image", "split", "sh", "sw"),
    "label": ("number", "name"),
    "category": ("name",),
}
COUNTED = ("number", "frequency", "coverage")  # columns of the table of a category
COLOURS = {
    "black": (0, 0, 0), "blue": (0, 0, 1), "green": (0, 1, 0), "cyan": (0, 1, 1), "red": (1, 0, 0),
    "magenta": (1, 0, 1), "yellow": (1, 1, 0), "white": (1, 1, 1), "grey": (0.5, 0.5, 0.5),
}  # fmt: skip


@dataclass(frozen=True)
class Probe:
    """Images with concept masks, which are read when they are needed.

    Attributes:
        name: The name for readers.
        concepts: Names of the concepts. In masks, i + 1 stands for concept i, and 0 for no concept.
        categories: Names of the categories.
        category_of: int64 (concepts,), the place of each concept's category in ``categories``.
        annotated: bool (n, categories): whether an image is annotated in a category. If it is, and none of its pixels
            carries a concept, then it shows none of them.
        read_images: Returns the images at the rows (m,), uint8 (m, 3, h, w).
        read_masks: Returns their masks, integers (m, layers, H, W). A pixel carries the concepts of all layers, each
            in its own category, and only where the image is annotated in it.

    Raises:
        ValueError: ``category_of`` or ``annotated`` does not fit the concepts and categories.
    """

    name: str
    concepts: tuple[str, ...] = field(repr=False)
    categories: tuple[str, ...]
    category_of: Tensor = field(repr=False)
    annotated: Tensor = field(repr=False)
    read_images: Callable[[Tensor], Tensor] = field(repr=False)
    read_masks: Callable[[Tensor], Tensor] = field(repr=False)

    def __post_init__(self) -> None:
        concepts, categories = len(self.concepts), len(self.categories)
        places = self.category_of.tolist()
        if len(places) != concepts or not set(places) <= set(range(categories)):
            raise ValueError(
                f"category_of: expected the place of a category, 0 to {categories - 1}, for each of {concepts} "
                f"concepts, got {len(places)}: {places}"
            )
        if self.annotated.ndim != 2 or self.annotated.shape[1] != categories or self.annotated.dtype != torch.bool:
            raise ValueError(
                f"annotated: expected bool (n, {categories}), a column for each category, got {self.annotated.dtype} "
                f"{tuple(self.annotated.shape)}"
            )

    def __len__(self) -> int:
        return len(self.annotated)

    def __getitem__(self, rows: Tensor) -> Probe:
        """The images at the index tensor ``rows`` (m,)."""
        return replace(
            self,
            annotated=self.annotated[rows],
            read_images=lambda of: self.read_images(rows[of]),
            read_masks=lambda of: self.read_masks(rows[of]),
        )

    def only(self, categories: Sequence[str]) -> Probe:
        """The probe with some of its categories, and all of its images.

        Raises:
            ValueError: A category is unknown or repeated, or there is none.
        """
        if not categories or len(set(categories) & set(self.categories)) < len(categories):
            raise ValueError(f"categories: expected some of {', '.join(self.categories)}, got {list(categories)}")
        keep = torch.tensor([self.categories.index(name) for name in categories])
        place = torch.full((len(self.categories),), -1)
        place[keep] = torch.arange(len(keep))
        kept = (place[self.category_of] >= 0).nonzero()[:, 0]
        number = torch.zeros(len(self.concepts) + 1, dtype=torch.int16)
        number[kept + 1] = torch.arange(1, len(kept) + 1, dtype=torch.int16)
        return replace(
            self,
            concepts=tuple(self.concepts[i] for i in kept.tolist()),
            categories=tuple(categories),
            category_of=place[self.category_of[kept]],
            annotated=self.annotated[:, keep],
            read_masks=lambda of: number[self.read_masks(of).long()],
        )

    def in_memory(self) -> Probe:
        """The same probe with its images and masks in memory, for the dissection of several networks."""
        rows = torch.arange(len(self))
        images, masks = self.read_images(rows), self.read_masks(rows)
        return replace(self, read_images=images.__getitem__, read_masks=masks.__getitem__)


def load_probe(
    name: Path | str,
    split: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    size: int | None = None,
    least: int = 1,
) -> Probe:
    """A probe set: generated, or read from a folder in Broden's layout.

    The generated ones are exact. In ``"planted"``, the concepts are the values of the cues of
    :mod:`kdx.data.cues`; in ``"shapes"``, the families of objects and the parts that distinguish its classes. Both
    also have the colours of single pixels: the nearest of ``COLOURS``.

    A folder has ``category.csv``, ``label.csv``, ``c_<category>.csv``, ``index.csv`` and ``images/``, as the original
    of Bau et al. (2017), see :mod:`kdx.data.broden_copy`. Masks are PNG files with
    label = red + 256 green, in several layers if need be; a number instead of a file is the label of all pixels. A
    label that occurs in several categories belongs to that of its largest coverage, and its masks in the others are
    left out.

    Args:
        name: ``"planted"``, ``"shapes"``, the path of a folder, or the name of a folder in a place of raw data, see
            :func:`kdx.paths.places`.
        split: Of a generated probe, ``"train"`` or ``"test"`` (None: test); of a folder, a value in the column split of
            its index (None: all images).
        limit: Number of random images; None: all.
        seed: Draws these, and the images of a generated probe.
        size: Pixels per side, to which the images are resized; None leaves them as they are. The masks of a folder
            keep their size, those of generated images follow.
        least: Concepts that occur in fewer images, by the tables of the whole folder, are left out.

    Returns:
        The probe. The files of a folder are read when they are needed.

    Raises:
        ValueError: The probe, split or limit is not possible; and when files are read, a mask of another size than the
            index states, or a label that is not in the folder's tables.
        DataError: The folder lacks files.

    Examples:
        >>> import kdx, torch
        >>> probe = kdx.load_probe("planted", limit=30)
        >>> probe.categories, probe.concepts[:3]
        (('gratings', 'shapes', 'dots', 'colour'), ('upright grating', 'tilted grating', 'slanted grating'))
        >>> rows = torch.arange(5)
        >>> tuple(probe.read_images(rows).shape), tuple(probe.read_masks(rows).shape)
        ((5, 3, 32, 32), (5, 4, 32, 32))
    """
    if name in GENERATED:
        data = load_dataset(str(name), split or "test", limit, seed, size)
        assert data.masks is not None
        if name == "shapes":
            return shape_probe(data.images, data.labels, data.masks)
        return cue_probe(data.images, data.labels, data.masks, Scene())
    folders = [folder for place in (Path(), *places()) if (folder := place / Path(name).expanduser()).is_dir()]
    folders.sort(key=lambda folder: not (folder / "index.csv").is_file())  # stable: those with tables first
    if not folders:
        raise ValueError(
            f"unknown probe {str(name)!r}; choose from: {', '.join(GENERATED)}; or give the path of a folder in "
            f"Broden's layout (there is none at {Path(name).absolute()}; `kdx data get broden` says where the "
            "original is)"
        )
    probe, splits = _open(folders[0], size, least)
    rows = torch.arange(len(probe))
    if split is not None:
        rows = torch.tensor((splits == split).tolist()).nonzero()[:, 0]
        if not len(rows):
            raise ValueError(f"unknown split {split!r} of {name}; choose from: {', '.join(splits.unique())}")
    if limit is not None:
        if not 2 <= limit <= len(rows):
            raise ValueError(f"limit: expected 2 to {len(rows)} images, got {limit}")
        rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:limit].sort().values]
    return probe if len(rows) == len(probe) else probe[rows]


# --- generated probes ----------------------------------------------------------------------------


def cue_probe(images: Tensor, labels: Tensor, masks: Tensor, scene: Scene) -> Probe:
    """The probe of images drawn by :func:`kdx.data.cues.draw`: the values of their cues, and the colours of pixels."""
    parts = {cue: FAMILIES[cue].names[: scene.values] for cue in scene.cues}
    values = scene.values_of(labels)
    layers = {cue: torch.where(masks >> i & 1 > 0, values[:, i, None, None] + 1, 0) for i, cue in enumerate(scene.cues)}
    return _exact("planted", images, parts, layers)


def shape_probe(images: Tensor, labels: Tensor, masks: Tensor) -> Probe:
    """The probe of images drawn by :mod:`kdx.data.shapes`: families of objects, distinguishing parts, and the colours
    of pixels."""
    families = [name for name in shapes.FAMILIES if name != "none"]
    of_class = [name.partition("-") for name in shapes.CLASSES]
    part_names = [part if family != "tails" else "tail" for family, _, part in of_class]
    part_kinds = [*dict.fromkeys(part for part in part_names if part)]
    family_of = [families.index(f) + 1 if f != "none" else 0 for f, classes in shapes.FAMILIES.items() for _ in classes]
    part_of = [part_kinds.index(part) + 1 if part else 0 for part in part_names]
    layers = {
        name: torch.where(masks >= least, torch.tensor(of)[labels][:, None, None], 0)
        for name, of, least in (("family", family_of, 1), ("part", part_of, 2))
    }
    return _exact("shapes", images, {"family": tuple(families), "part": tuple(part_kinds)}, layers)


def _exact(name: str, images: Tensor, parts: dict[str, tuple[str, ...]], layers: dict[str, Tensor]) -> Probe:
    """A probe from category -> concepts and category -> (n, h, w) places in them from 1; colours are added."""
    parts, layers = parts | {"colour": tuple(COLOURS)}, layers | {"colour": _nearest_colour(images)}
    category_of = torch.tensor([i for i, names in enumerate(parts.values()) for _ in names])
    starts = [sum(map(len, list(parts.values())[:i])) for i in range(len(parts))]
    masks = torch.stack(
        [torch.where(layer > 0, layer + start, 0) for layer, start in zip(layers.values(), starts, strict=True)], 1
    ).to(torch.int16)
    return Probe(
        name,
        tuple(concept for names in parts.values() for concept in names),
        tuple(parts),
        category_of,
        torch.ones(len(images), len(parts), dtype=torch.bool),
        images.__getitem__,
        masks.__getitem__,
    )


def _nearest_colour(images: Tensor) -> Tensor:
    """int64 (n, h, w): of each pixel, the place of the nearest of ``COLOURS``, from 1."""
    centres = torch.tensor(list(COLOURS.values()))
    pixels = images.movedim(1, 3).float() / 255
    return torch.cdist(pixels.flatten(1, 2), centres.expand(len(images), -1, -1)).argmin(2).view(pixels.shape[:3]) + 1


# --- Broden's layout ------------------------------------------------------------------------------


class _Files(NamedTuple):
    """Where the images and masks of a folder are.

    Attributes:
        folder: Of the images and masks.
        images: Names of the images (n,).
        fields: Category -> the fields of the index (n,): layers joined by semicolons.
        number: Category -> int16 (labels + 1,), the concept from 1 for a label; 0 if it is none of this category.
        shape: Height and width of the masks.
        size: Pixels per side of the images; None: as they are.
    """

    folder: Path
    images: list[str]
    fields: dict[str, list[str]]
    number: dict[str, np.ndarray]
    shape: tuple[int, int]
    size: int | None


def _open(folder: Path, size: int | None, least: int) -> tuple[Probe, pd.Series]:
    """The probe of a folder, and the split of each of its images."""
    index, labels, kinds = (_table(folder, name, columns) for name, columns in COLUMNS.items())
    categories = tuple(kinds["name"])
    if missing := [name for name in categories if name not in index]:
        raise DataError(f"{folder / 'index.csv'}: expected a column for each category, found none for {missing}")
    parts = [_table(folder, f"c_{name}", COUNTED).assign(category=name) for name in categories]
    found = pd.concat(parts).astype({"number": int, "frequency": int, "coverage": float})
    found = found.sort_values("coverage", ascending=False, kind="stable").drop_duplicates("number")
    found = found[found["frequency"] >= least].sort_values("number")
    names = dict(zip(labels["number"].astype(int), labels["name"], strict=True))
    if strange := sorted(set(found["number"]) - set(names)):
        raise DataError(f"{folder}: expected every label of the categories in label.csv, found none of {strange}")
    number = {name: np.full(max(names) + 1, -1, dtype=np.int16) for name in categories}
    for known in number.values():
        known[[0, *names]] = 0
    for place, (label, category) in enumerate(zip(found["number"], found["category"], strict=True), 1):
        number[category][label] = place
    sizes = index[["sh", "sw"]].drop_duplicates().astype(int)
    if len(sizes) > 1:
        raise ValueError(f"{folder / 'index.csv'}: expected masks of one size (sh, sw), got {sizes.values.tolist()}")
    fields = {name: index[name].tolist() for name in categories}
    files = _Files(folder / "images", index["image"].tolist(), fields, number, tuple(sizes.values[0].tolist()), size)
    probe = Probe(
        folder.name,
        tuple(names[label] for label in found["number"]),
        categories,
        torch.tensor([categories.index(name) for name in found["category"]], dtype=torch.long),
        torch.tensor((index[list(categories)] != "").values.tolist()),
        partial(_in_parallel, partial(_image, files)),
        partial(_masks, files),
    )
    return probe, index["split"]


def _table(folder: Path, name: str, columns: Sequence[str]) -> pd.DataFrame:
    path = folder / f"{name}.csv"
    if not path.is_file():
        raise DataError(f"{folder}: expected a folder in Broden's layout, found no {path.name}")
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    if missing := [column for column in columns if column not in table]:
        raise DataError(f"{path}: expected the columns {', '.join(columns)}, found no {', '.join(missing)}")
    return table


def _in_parallel(read: Callable[[int], np.ndarray], rows: Tensor) -> Tensor:
    """What ``read`` returns for each of ``rows`` (m,), stacked."""
    with ThreadPoolExecutor(WORKERS) as pool:
        found = list(pool.map(read, rows.tolist()))
    if len({one.shape for one in found}) > 1:
        raise ValueError(f"expected images of one size, got {sorted({one.shape[1:] for one in found})}; give a size")
    return torch.from_numpy(np.stack(found))


def _image(files: _Files, row: int) -> np.ndarray:
    """uint8 (3, h, w)."""
    with Image.open(files.folder / files.images[row]) as image:
        picture = image.convert("RGB")
    if files.size is not None:
        picture = picture.resize((files.size, files.size), Image.Resampling.BILINEAR)
    return np.asarray(picture).transpose(2, 0, 1)


def _masks(files: _Files, rows: Tensor) -> Tensor:
    """int16 (m, layers, h, w), with as many layers as the image with most of them has."""

    def layers(row: int) -> list[np.ndarray]:
        return [_layer(files, name, part) for name, of in files.fields.items() for part in of[row].split(";") if part]

    with ThreadPoolExecutor(WORKERS) as pool:
        found = list(pool.map(layers, rows.tolist()))
    masks = np.zeros((len(found), max(map(len, found), default=0), *files.shape), dtype=np.int16)
    for mask, of in zip(masks, found, strict=True):
        for layer, values in zip(mask, of, strict=False):
            layer[:] = values
    return torch.from_numpy(masks)


def _layer(files: _Files, category: str, part: str) -> np.ndarray:
    """Concepts from 1, int16 (h, w), or () for the whole image."""
    if part.isdecimal():
        labels = np.asarray(int(part))
    else:
        with Image.open(files.folder / part) as image:
            pixels = np.asarray(image.convert("RGB"), dtype=np.int32)
        labels = pixels[:, :, 0] + 256 * pixels[:, :, 1]
        if labels.shape != files.shape:
            raise ValueError(f"{files.folder / part}: expected a mask of {files.shape} pixels, got {labels.shape}")
    number = files.number[category]
    known = number[np.minimum(labels, len(number) - 1)]
    wrong = np.unique(labels[(labels >= len(number)) | (known < 0)])
    if len(wrong):
        raise ValueError(
            f"{files.folder / part}: expected labels of label.csv, got {wrong.tolist()}; correct the mask or add them"
        )
    return known
