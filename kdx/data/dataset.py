"""Datasets in memory: loading, subsets and folds of uint8 images.

:func:`load_dataset` takes a name from ``DATASETS``, or the path of a folder with a subfolder of images for each class.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2

from kdx.data import prepared
from kdx.data.batches import class_indices, rank_in_class
from kdx.data.folders import UNKNOWN
from kdx.data.prepared import SIZES, Prepared
from kdx.data.registry import Card, find_card
from kdx.data.sources import fetch, find_source, fingerprint, how_to_get
from kdx.paths import DataError, data_home


@dataclass(frozen=True)
class Dataset:
    """Images in memory.

    Attributes:
        images: uint8 (n, c, h, w).
        labels: int64 (n,); other integers are converted.
        card: What is known of the dataset.
        masks: uint8 (n, h, w) or None: 0 background, 1 object, 2 the part of the object that distinguishes its class
            from its siblings; 255 throughout for an image without a mask.
    """

    images: Tensor = field(repr=False)
    labels: Tensor = field(repr=False)
    card: Card = field(repr=False)
    masks: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", class_indices(self.labels))

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the labels."""
        return self.card.classes

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of pixels and labels, see :func:`kdx.data.sources.fingerprint`."""
        return fingerprint(self.images, self.labels)

    @property
    def masked(self) -> Tensor:
        """The images that have a mask: bool (n,)."""
        if self.masks is None:
            return torch.zeros(len(self), dtype=torch.bool)
        return self.masks[:, 0, 0] != UNKNOWN

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: Tensor) -> Dataset:
        """The subset at the index tensor ``rows`` (m,)."""
        if not isinstance(rows, Tensor) or rows.ndim != 1:
            raise TypeError(f"rows: expected an index tensor (m,), got {rows!r}")
        masks = None if self.masks is None else self.masks[rows]
        return Dataset(self.images[rows], self.labels[rows], self.card, masks)

    def limit(self, n: int | None, seed: int = 0) -> Dataset:
        """A random subset with the class proportions of the whole.

        Args:
            n: Number of images, at least one per class; None: all.
            seed: Draws the images.

        Raises:
            ValueError: There are fewer images than ``n``, or more classes.
        """
        if n is None or n == len(self):
            return self
        if not len(self.classes) <= n <= len(self):
            raise ValueError(f"limit: expected {len(self.classes)} (one per class) to {len(self)} images, got {n}")
        return self[self._proportional(seed)[:n].sort().values]

    def only(self, classes: Sequence[str]) -> Dataset:
        """The images of some of the classes.

        Args:
            classes: Names of at least two classes; labels of the subset follow their order.

        Raises:
            ValueError: A name is unknown or repeated, or there are fewer than two.
        """
        if unknown := [name for name in classes if name not in self.classes]:
            raise ValueError(f"unknown classes {', '.join(unknown)}; choose from: {', '.join(self.classes)}")
        if len(set(classes)) < max(len(classes), 2):
            raise ValueError(f"classes: expected at least two different names, got {list(classes)}")
        place = torch.full((len(self.classes),), -1)
        place[[self.classes.index(name) for name in classes]] = torch.arange(len(classes))
        part = self[(place[self.labels] >= 0).nonzero()[:, 0]]
        return replace(part, labels=place[part.labels], card=replace(self.card, classes=tuple(classes)))

    def split(self, *sizes: int, seed: int = 0) -> list[Dataset]:
        """Disjoint random parts, each with the class proportions of the whole.

        Args:
            *sizes: Images in each part.
            seed: Draws the images.

        Returns:
            The parts, and last the remaining images.

        Raises:
            ValueError: A size is smaller than 1, or no image remains.
        """
        if min(sizes) < 1 or sum(sizes) >= len(self):
            raise ValueError(f"split: expected sizes of 1 or more that leave some of {len(self)} images, got {sizes}")
        parts = self._proportional(seed).split([*sizes, len(self) - sum(sizes)])
        return [self[rows.sort().values] for rows in parts]

    def _proportional(self, seed: int) -> Tensor:
        """All rows in a random order in which every stretch has the class proportions of the whole."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        labels = self.labels[order]
        share = (rank_in_class(labels) - 0.5) / labels.bincount()[labels]
        return order[share.argsort(stable=True)]


def load_dataset(
    name: str,
    split: str = "test",
    limit: int | None = None,
    seed: int = 0,
    size: int | None = None,
    normalisation: Sequence[Sequence[float]] | None = None,
) -> Dataset:
    """Load a split into memory; fetch, verify or prepare it first if needed.

    Args:
        name: A name from ``DATASETS``, or the path of a folder with a subfolder of images for each class, or with such
            folders for training and testing (``train/``, and ``test/`` or ``val/``).
        split: ``"train"`` or ``"test"``.
        limit: Number of images to keep, with the class proportions of the whole; None: all.
        seed: Draws the subset of ``limit``, and the images of a generated dataset.
        size: Pixels per side; None: the size on the card. For another size, photographs are decoded again and have
            statistics of their own; images of a fixed size are resized and keep the statistics on the card.
        normalisation: (means, standard deviations) of the channels on the scale 0..1; None: those on the card.

    Returns:
        The split.

    Raises:
        ValueError: The dataset or split is unknown, or ``limit``, ``size`` or ``normalisation`` is not possible.
        DataError: No source has the data that the card describes.

    Examples:
        >>> import kdx
        >>> data = kdx.load_dataset("shapes", "test", limit=20)
        >>> tuple(data.images.shape), len(data.classes)
        ((20, 3, 64, 64), 10)
    """
    card = find_card(name)
    if split not in (known := card.counts or ("train", "test")):
        raise ValueError(f"unknown split {split!r} of {name}; choose from: {', '.join(known)}")
    if card.layout:
        whole = _open(card, prepare(name, size), split)
    else:
        assert card.read is not None
        folder = fetch(name) if card.sources else data_home()
        images, labels, masks = card.read(folder, split, seed)
        whole = Dataset(images, labels, card, masks)
    kept = _resize(whole.limit(limit, seed), size)
    if normalisation is not None:
        mean, std = check_normalisation(normalisation, kept.card.size[0])
        kept = replace(kept, card=replace(kept.card, mean=mean, std=std))
    return kept


def prepare(name: str, size: int | None = None) -> Prepared:
    """Open the decoded images of a dataset that comes as folders; decode them first if needed.

    Args:
        name: A name from ``DATASETS``, or the path of a folder.
        size: Pixels per side; None: the size on the card.

    Returns:
        The prepared set.

    Raises:
        ValueError: The dataset does not come as folders, or the size is out of range.
        DataError: The files are not on this machine, or are not what they should be.
    """
    card = find_card(name)
    if card.layout is None:
        raise ValueError(f"{name} needs no preparation; only datasets that come as folders of images do")
    size = card.size[1] if size is None else size
    home = data_home() / "prepared"
    if source := find_source(card):
        return prepared.prepare_folder(
            f"folder-{card.name}" if card.source else card.name, source, card.layout, size, home
        )
    found = _prepared_sets(card, size)
    if len(found) == 1:
        return prepared.open_prepared(found[0])
    if found:
        raise DataError(
            f"{name}: several prepared sets in {home} ({', '.join(f.name for f in found)}), and their files are gone; "
            "delete all but one, or name the folder above the files in KDX_DATA"
        )
    raise DataError(f"{name} is not on this machine at {size} px: {how_to_get(card)}")


def available(name: str, size: int | None = None) -> str | None:
    """A text that identifies the present files of a dataset.

    Args:
        name: A name from ``DATASETS``, or the path of a folder.
        size: Pixels per side; None: the size on the card.

    Returns:
        The text, or None if the dataset comes as folders and is not on this machine.
    """
    card = find_card(name)
    if card.layout is None:
        return name
    size = size or card.size[1]
    if source := find_source(card):
        return prepared.digest(source, card.layout, size)
    found = _prepared_sets(card, size)
    return found[0].name if len(found) == 1 else None


def _prepared_sets(card: Card, size: int) -> list[Path]:
    return sorted((data_home() / "prepared").glob(f"{card.name}-{size}px-*"))


def _open(card: Card, decoded: Prepared, split: str) -> Dataset:
    facts = decoded.card
    with_masks = f"; {facts['masks']:,} images have a mask" if facts["masks"] else ""
    preparation = {
        "prepared": f"middle square cut out and resized{with_masks}",
        "split": facts["split"],
        "files refused": f"{facts['refused']:,}",
        "files with a note": f"{facts['noted']:,}",
    }
    if missing := [name for name in card.classes if name not in facts["classes"]]:
        preparation["classes without files"] = f"{len(missing)} of {len(card.classes)}"
    size = facts["size"]
    found = replace(
        card,
        classes=tuple(facts["classes"]),
        counts=facts["counts"],
        size=(3, size, size),
        mean=tuple(facts["mean"]),
        std=tuple(facts["std"]),
        preparation=preparation,
    )
    images, labels, masks = decoded.read(split)
    return Dataset(images, labels, found, masks)


def _resize(whole: Dataset, size: int | None) -> Dataset:
    if size is None or whole.card.size[1:] == (size, size):
        return whole
    if not SIZES[0] <= size <= SIZES[1]:
        raise ValueError(f"size: expected {SIZES[0]} to {SIZES[1]} pixels, got {size}")
    images = v2.functional.resize(whole.images, [size, size], antialias=True)
    nearest = v2.InterpolationMode.NEAREST
    masks = None if whole.masks is None else v2.functional.resize(whole.masks, [size, size], nearest)
    card = replace(whole.card, size=(whole.card.size[0], size, size), checksums=None)
    return Dataset(images, whole.labels, card, masks)


def check_normalisation(
    normalisation: Sequence[Sequence[float]], channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Means and standard deviations as tuples of floats.

    Args:
        normalisation: (means, standard deviations) on the scale 0..1.
        channels: Channels of the images.

    Raises:
        ValueError: There is not one finite mean and one standard deviation > 0 for each channel.
    """
    try:
        mean, std = (tuple(float(value) for value in values) for values in normalisation)
    except (TypeError, ValueError):
        mean, std = (), ()
    if len(mean) != channels or len(std) != channels or not all(map(math.isfinite, mean)) or not min(std) > 0:
        raise ValueError(
            f"normalisation: expected {channels} means and {channels} standard deviations > 0, got {normalisation!r}"
        )
    return mean, std


def folds(labels: Tensor, k: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Split rows into stratified folds.

    Args:
        labels: int64 (n,).
        k: Number of folds, from 2 to the size of the smallest class.
        seed: Draws the folds.

    Returns:
        (training rows, validation rows) of each fold.

    Raises:
        ValueError: ``k`` is out of range.
    """
    from sklearn.model_selection import StratifiedKFold  # slow to import

    smallest = int(labels.unique(return_counts=True)[1].min())
    if not 2 <= k <= smallest:
        raise ValueError(f"folds: expected 2 to {smallest} (the smallest class), got {k}")
    splitter = StratifiedKFold(k, shuffle=True, random_state=seed)
    return [
        (torch.from_numpy(train), torch.from_numpy(held_out))
        for train, held_out in splitter.split(np.zeros(len(labels)), labels.numpy())
    ]
