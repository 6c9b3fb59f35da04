"""Datasets: cards, verified downloads, uint8 tensors in memory, augmentation and folds.

``DATASETS`` maps a name to its :class:`Card`; the path of a folder of images by class is a name,
too. Files live under :func:`kdx.home.data_home`; a download is unpacked in a scratch folder,
checked, and only then moved into place, so an interrupted or corrupt one is never taken for the
data.
"""

from __future__ import annotations

import errno
import hashlib
import inspect
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock
from sklearn.model_selection import StratifiedKFold
from torch import Tensor
from torchvision.transforms import v2

from kdx import cifar, folders, plantvillage, shapes
from kdx.download import archive_source, unpack
from kdx.folders import Layout, Prepared
from kdx.home import DataError, data_home, one_line, places

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Card:
    """What is known of a dataset. For images in folders, classes, counts, mean and std are those of
    the files that were prepared; before, the card lists the classes that the original has.

    Attributes
    ----------
    size : (channels, height, width) of every image.
    counts : images per split.
    mean, std : per-channel statistics of the training pixels, on the scale 0..1.
    augmentation : transforms of training images, in order: name in ``torchvision.transforms.v2`` ->
        its arguments, see :func:`augment`.
    checksums : SHA-256 of pixels and labels per split (:func:`fingerprint`); ``None`` for
        generated data, which are recomputed instead of stored, and for images in folders.
    sources : name -> ``get(folder, downloads)``, tried in order: fills ``folder``, and keeps in
        ``downloads`` what an interrupted attempt has brought; empty for generated data.
    read : ``read(folder, split, seed)`` -> (images, labels, masks or None).
    layout : where the images of each class lie; instead of ``read``.
    source : the folder of a dataset that is not in the registry.
    preparation : how the images came from their files.
    """

    name: str
    title: str
    description: str
    classes: tuple[str, ...]
    size: tuple[int, int, int]
    counts: dict[str, int] = field(default_factory=dict)
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    licence: str = "not known"
    citation: str = "not known"
    homepage: str = ""
    augmentation: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"RandomHorizontalFlip": {}})
    read: Callable[[Path, str, int], tuple[Tensor, Tensor, Tensor | None]] | None = field(default=None, repr=False)
    layout: Layout | None = field(default=None, repr=False)
    source: Path | None = None
    checksums: dict[str, str] | None = field(default=None, repr=False)
    sources: dict[str, Callable[[Path, Path], None]] = field(default_factory=dict, repr=False)
    download_bytes: int = 0
    preparation: dict[str, str] = field(default_factory=dict, repr=False)

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 images (n, c, h, w) -> float32 with zero mean and unit variance per channel."""
        if images.dtype != torch.uint8:
            raise TypeError(f"expected uint8 images, got {images.dtype}")
        return v2.functional.normalize(v2.functional.to_dtype(images, scale=True), list(self.mean), list(self.std))

    def _repr_markdown_(self) -> str:
        c, h, w = self.size
        rows = {
            "classes": f"{len(self.classes)}: {', '.join(self.classes)}",
            "images": ", ".join(f"{n:,} {split}" for split, n in self.counts.items()) or "not prepared here",
            "size": f"{h} × {w}, {c} channels, 8 bit",
        }
        if self.mean:
            rows["channel mean"] = ", ".join(f"{m:.4f}" for m in self.mean)
            rows["channel standard deviation"] = ", ".join(f"{s:.4f}" for s in self.std)
        transforms = ", ".join(
            f"{name}({', '.join(f'{k}={v}' for k, v in a.items())})" for name, a in self.augmentation.items()
        )
        rows |= {
            "augmentation": transforms or "none",
            "sources, in order": ", ".join(["data/raw", *self.sources]) if self.sources else "generated",
            "licence": self.licence,
            "citation": self.citation,
        }
        if self.source:
            rows["sources, in order"] = "a folder"
        for split, digest in (self.checksums or {}).items():
            rows[f"SHA-256 of {split} pixels and labels"] = f"`{digest[:16]}…`"
        rows |= self.preparation
        table = "\n".join(f"| {k} | {v} |" for k, v in rows.items())
        return f"**{self.title}** (`{self.name}`). {self.description}\n\n| | |\n|---|---|\n{table}\n"


def fingerprint(images: Tensor, labels: Tensor) -> str:
    """SHA-256 (hex) of the pixels, channels first, followed by the labels as one byte each."""
    digest = hashlib.sha256(np.ascontiguousarray(images.numpy()).data)
    digest.update(labels.to(torch.uint8).numpy().data)
    return digest.hexdigest()


@dataclass(frozen=True)
class Dataset:
    """Images in memory.

    Attributes
    ----------
    images : uint8 (n, c, h, w).
    labels : int64 (n,).
    masks : uint8 (n, h, w) or None: 0 background, 1 object, 2 the part of the object that
        tells its class from its siblings; 255 throughout for an image without a mask.
    """

    images: Tensor = field(repr=False)
    labels: Tensor = field(repr=False)
    card: Card = field(repr=False)
    masks: Tensor | None = field(default=None, repr=False)

    @property
    def classes(self) -> tuple[str, ...]:
        return self.card.classes

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.images, self.labels)

    @property
    def masked(self) -> Tensor:
        """bool (n,): the images that have a mask."""
        if self.masks is None:
            return torch.zeros(len(self), dtype=torch.bool)
        return self.masks[:, 0, 0] != folders.UNKNOWN

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: Tensor) -> Dataset:
        """The subset at index tensor ``rows`` (m,)."""
        if not isinstance(rows, Tensor) or rows.ndim != 1:
            raise TypeError(f"expected an index tensor (m,), got {rows!r}")
        masks = None if self.masks is None else self.masks[rows]
        return Dataset(self.images[rows], self.labels[rows], self.card, masks)

    def limit(self, n: int | None, seed: int = 0) -> Dataset:
        """``n`` images with the class proportions of the whole, drawn by ``seed``; None: all."""
        if n is None or n == len(self):
            return self
        if not len(self.classes) <= n <= len(self):
            raise ValueError(f"limit: expected {len(self.classes)} (one per class) to {len(self)} images, got {n}")
        return self[self._proportional(seed)[:n].sort().values]

    def only(self, classes: Sequence[str]) -> Dataset:
        """The images of some of the classes, in the order of these names."""
        if unknown := [name for name in classes if name not in self.classes]:
            raise ValueError(f"no classes {', '.join(unknown)}; choose from: {', '.join(self.classes)}")
        if len(set(classes)) < max(len(classes), 2):
            raise ValueError(f"expected at least two different classes, got {list(classes)}")
        place = torch.full((len(self.classes),), -1)
        place[[self.classes.index(name) for name in classes]] = torch.arange(len(classes))
        part = self[(place[self.labels] >= 0).nonzero()[:, 0]]
        return replace(part, labels=place[part.labels], card=replace(self.card, classes=tuple(classes)))

    def split(self, *sizes: int, seed: int = 0) -> list[Dataset]:
        """Disjoint random parts of these sizes, and what is left, each with the class proportions
        of the whole."""
        if min(sizes) < 1 or sum(sizes) >= len(self):
            raise ValueError(f"split: expected sizes of 1 or more that leave some of {len(self)} images, got {sizes}")
        parts = self._proportional(seed).split([*sizes, len(self) - sum(sizes)])
        return [self[rows.sort().values] for rows in parts]

    def _proportional(self, seed: int) -> Tensor:
        """All rows in a random order, of which every stretch has the class proportions of the whole."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        members = F.one_hot(self.labels[order], len(self.classes))  # (n, classes)
        rank = (members.cumsum(0) * members).sum(1) - 0.5  # of an image within its class
        share = rank / (members.sum(0) * members).sum(1)
        return order[share.argsort(stable=True)]


def find_card(name: str) -> Card:
    """The card of a registered name, or of the path of a folder with one subfolder a class."""
    if name in DATASETS:
        return DATASETS[name]
    if (folder := Path(name).expanduser()).is_dir():
        return Card(
            name=folders.printable(folder.resolve().name),
            title=folders.printable(folder.resolve().name),
            description="Images in folders, one a class.",
            classes=(),
            size=(3, 96, 96),
            layout=Layout(),
            source=folder.resolve(),
        )
    raise ValueError(
        f"unknown dataset {name!r}; choose from: {', '.join(DATASETS)}; or give the path of a folder with a "
        f"subfolder of images for each class (there is none at {folder.absolute()})"
    )


def load_dataset(
    name: str,
    split: str = "test",
    limit: int | None = None,
    seed: int = 0,
    size: int | None = None,
    normalisation: Sequence[Sequence[float]] | None = None,
) -> Dataset:
    """Load a split into memory, fetching, verifying or preparing it first where that is needed.

    Parameters
    ----------
    name : from ``DATASETS``, or the path of a folder with a subfolder of images for each class, or
        with such folders for training and testing (``train/``, and ``test/`` or ``val/``).
    limit : keep this many images, with the class proportions of the whole.
    seed : draws the subset of ``limit``, and the images of a generated dataset.
    size : pixels a side; None: the card's. Photographs are decoded anew for it, and have statistics of
        their own; images of a fixed size are resized, and keep the card's.
    normalisation : (means, standard deviations) of the channels on the scale 0..1; None: the card's.

    Raises
    ------
    ValueError : unknown dataset or split, an impossible ``limit``, ``size`` or ``normalisation``.
    DataError : no source gave the data that the card describes.
    """
    card = find_card(name)
    if split not in (known := card.counts or ("train", "test")):
        raise ValueError(f"unknown split {split!r} of {name}; choose from: {', '.join(known)}")
    if card.layout:
        prepared = prepare(name, size)
        whole = _open(card, prepared, split)
    else:
        assert card.read is not None
        folder = fetch(name) if card.sources else data_home()
        images, labels, masks = card.read(folder, split, seed)
        whole = _resize(Dataset(images, labels, card, masks), size)
    if normalisation is not None:
        mean, std = _check_normalisation(normalisation, whole.card.size[0])
        whole = replace(whole, card=replace(whole.card, mean=mean, std=std))
    return whole.limit(limit, seed)


def prepare(name: str, size: int | None = None) -> Prepared:
    """The decoded images of a dataset that comes as folders, decoding them if that was not done.

    Raises
    ------
    DataError : the files are not on this machine, or not as they should be.
    """
    card = find_card(name)
    if card.layout is None:
        raise ValueError(f"{name} needs no preparation; only datasets that come as folders of images do")
    size = card.size[1] if size is None else size
    home = data_home() / "prepared"
    if source := find_source(card):
        return folders.prepare(f"folder-{card.name}" if card.source else card.name, source, card.layout, size, home)
    found = sorted(home.glob(f"{card.name}-{size}px-*")) if not card.source else []
    if len(found) == 1:
        return folders.open_prepared(found[0])
    if found:
        raise DataError(
            f"{name}: several prepared sets in {home} ({', '.join(f.name for f in found)}), and their files are gone; "
            "delete all but one, or name the place of the files in KDX_DATA"
        )
    raise DataError(f"{name} is not on this machine at {size} px: {how_to_get(card)}")


def how_to_get(card: Card) -> str:
    """What to type for data that are not here."""
    return (
        f"get it with `kdx data get {card.name}` ({card.download_bytes / 1e6:.0f} MB), prepare a folder or an archive "
        f"that you have with `kdx data prepare {card.name} --from PATH`, or name its place in KDX_DATA"
    )


def available(name: str, size: int | None = None) -> str | None:
    """What stands for the present files of a dataset; None if it comes as folders and is not on this machine."""
    card = find_card(name)
    if card.layout is None:
        return name
    size = size or card.size[1]
    if source := find_source(card):
        return folders.digest(source, card.layout, size)
    found = [path.name for path in (data_home() / "prepared").glob(f"{card.name}-{size}px-*")]
    return found[0] if len(found) == 1 else None


def find_source(card: Card) -> Path | None:
    """The folder with the files of a dataset that comes as folders: the first of ``places()`` that has one."""
    if card.source or card.layout is None:
        return card.source
    for folder in (place / card.name for place in places()):
        if folder.is_dir():
            try:
                folders.find_roots(folder, card.layout)
                return folder
            except DataError as error:
                log.warning("%s: passed over: %s", card.name, error)
    return None


def adopt(name: str, origin: Path) -> Path:
    """Make a folder (by a link) or an archive (unpacked) the source of a registered dataset.

    Returns
    -------
    Path : the dataset's place in ``raw/``.
    """
    card = find_card(name)
    if card.layout is None or card.source:
        raise ValueError(f"{name}: only registered datasets of images in folders can be taken from elsewhere")
    folder = data_home() / "raw" / name
    if folder.is_dir() and not folder.is_symlink():
        raise DataError(
            f"{folder} is there already; leave out --from to use it, or delete it before another source takes its place"
        )
    origin = origin.expanduser().absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".partial-{name}-", dir=folder.parent) as scratch:
        place = Path(scratch) / name
        if origin.is_dir():
            place.symlink_to(origin.resolve(), target_is_directory=True)
        elif origin.is_file():
            unpack(origin, place)
        else:
            raise DataError(f"expected a folder or an archive, found nothing at {origin}")
        folders.scan(place, card.layout)  # is it laid out as the dataset?
        if folder.is_symlink():
            folder.unlink()
        os.replace(place, folder)
    return folder


def _open(card: Card, prepared: Prepared, split: str) -> Dataset:
    facts = prepared.card
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
    images, labels, masks = prepared.read(split)
    return Dataset(images, labels, found, masks)


def _resize(whole: Dataset, size: int | None) -> Dataset:
    if size is None or whole.card.size[1:] == (size, size):
        return whole
    if not folders.SIZES[0] <= size <= folders.SIZES[1]:
        raise ValueError(f"size: expected {folders.SIZES[0]} to {folders.SIZES[1]} pixels, got {size}")
    images = v2.functional.resize(whole.images, [size, size], antialias=True)
    nearest = v2.InterpolationMode.NEAREST
    masks = None if whole.masks is None else v2.functional.resize(whole.masks, [size, size], nearest)
    card = replace(whole.card, size=(whole.card.size[0], size, size), checksums=None)
    return Dataset(images, whole.labels, card, masks)


def _check_normalisation(
    normalisation: Sequence[Sequence[float]], channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    try:
        mean, std = (tuple(float(value) for value in values) for values in normalisation)
    except (TypeError, ValueError):
        mean, std = (), ()
    if len(mean) != channels or len(std) != channels or not all(map(math.isfinite, mean)) or not min(std) > 0:
        raise ValueError(
            f"normalisation: expected {channels} means and {channels} standard deviations > 0, got {normalisation!r}"
        )
    return mean, std


def fetch(name: str) -> Path:
    """Make sure that the files of dataset ``name`` are on this machine, verified; return their folder.

    They are looked for in ``places()``; then the card's sources are tried in order, and each failure
    is logged in one line.
    """
    card = find_card(name)
    if card.source:
        return card.source
    folder = data_home() / "raw" / name
    if not card.sources:
        return folder
    for place in places():
        if (place / name).exists():
            if (refusal := _refusal(card, place / name)) is None:
                return place / name
            if place != folder.parent:
                log.warning("%s: passed over %s: %s", name, place / name, refusal)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{name}.lock"):
        return _fetch(card, folder.parent, folder)


def _fetch(card: Card, raw: Path, folder: Path) -> Path:
    name = card.name
    if folder.is_symlink() and _refusal(card, folder):
        log.warning("%s: its link to %s leads to no such data; fetching them", name, os.readlink(folder))
        folder.unlink()
    if folder.exists():
        refusal = _refusal(card, folder)
        if refusal is None:  # another process has fetched it meanwhile
            return folder
        aside = Path(tempfile.mkdtemp(prefix=f"{name}.refused-", dir=raw))
        os.replace(folder, aside)
        log.warning("%s: %s; moved to %s, fetching it anew", name, refusal, aside.name)
    if (free := shutil.disk_usage(raw).free) < 3 * card.download_bytes:
        raise DataError(
            f"{name}: needs {3 * card.download_bytes / 1e6:.0f} MB free in {raw} while it unpacks, "
            f"found {free / 1e6:.0f} MB; free some space or point KDX_HOME at another disk"
        )
    failures = []
    downloads = raw / ".downloads"
    for source, get in card.sources.items():
        log.info("%s: %.0f MB from %s", name, card.download_bytes / 1e6, source)
        with tempfile.TemporaryDirectory(prefix=f".partial-{name}-", dir=raw) as scratch:
            unpacked = Path(scratch) / name
            unpacked.mkdir()
            try:
                get(unpacked, downloads)
                _verify(card, unpacked)
            except Exception as error:
                if getattr(error, "errno", None) == errno.ENOSPC:
                    raise DataError(f"{name}: the disk of {raw} is full; what was downloaded is kept") from error
                failures.append(f"{source}: {one_line(error)}")
                log.warning("%s: %s", name, failures[-1])
                continue
            os.replace(unpacked, folder)
            log.info("%s: verified, from %s", name, source)
            return folder
    raise DataError(
        f"{name}: no source could be reached or trusted.\n  "
        + "\n  ".join(failures)
        + "\nCheck the connection; "
        + (how_to_get(card) if card.layout else f"or put the original files into {folder}.")
    )


def _refusal(card: Card, folder: Path) -> DataError | None:
    try:
        _verify(card, folder)
    except DataError as error:
        return error
    return None


def _verify(card: Card, folder: Path) -> None:
    if card.layout:
        folders.scan(folder, card.layout)
        return
    assert card.checksums is not None
    assert card.read is not None
    for split, expected in card.checksums.items():
        try:
            images, labels, _ = card.read(folder, split, 0)
        except (OSError, ValueError) as error:
            raise DataError(f"{split} split unreadable: {one_line(error)}") from error
        if (got := fingerprint(images, labels)) != expected:
            raise DataError(f"{split} split: expected SHA-256 {expected[:12]}…, got {got[:12]}…")


def folds(labels: Tensor, k: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Stratified ``k`` folds: a list of (training rows, validation rows)."""
    smallest = int(labels.unique(return_counts=True)[1].min())
    if not 2 <= k <= smallest:
        raise ValueError(f"folds: expected 2 to {smallest} (the smallest class), got {k}")
    splitter = StratifiedKFold(k, shuffle=True, random_state=seed)
    return [
        (torch.from_numpy(train), torch.from_numpy(held_out))
        for train, held_out in splitter.split(np.zeros(len(labels)), labels.numpy())
    ]


def augment(images: Tensor, augmentation: Mapping[str, Mapping[str, Any]]) -> Tensor:
    """Transform each image of (n, c, h, w) at random, by torch's global generator.

    Parameters
    ----------
    augmentation : name of a transform of ``torchvision.transforms.v2`` -> its arguments, in order;
        an argument ``size`` that is not given is the images' own.
        ``{"RandomHorizontalFlip": {}, "RandomCrop": {"padding": 4}}``, for example; ``{}``: none.
    """
    transform = compose(augmentation, (images.shape[-2], images.shape[-1]))
    return images if transform is None else torch.stack([transform(image) for image in images])


def compose(augmentation: Mapping[str, Mapping[str, Any]], size: tuple[int, int]) -> v2.Transform | None:
    """The transform that an augmentation describes, for images of ``size``; None: no change."""
    parts = []
    for name, arguments in augmentation.items():
        kind = getattr(v2, name, None)
        if not (inspect.isclass(kind) and issubclass(kind, v2.Transform)):
            raise ValueError(f"augmentation: expected names from torchvision.transforms.v2, got {name!r}")
        own_size = {"size": size} if "size" in inspect.signature(kind).parameters else {}
        try:
            parts.append(kind(**own_size | dict(arguments)))
        except (TypeError, ValueError) as error:
            raise ValueError(f"augmentation: {name} does not take {arguments!r}: {one_line(error)}") from error
    return v2.Compose(parts) if parts else None


DATASETS: dict[str, Card] = {
    card.name: card
    for card in (
        Card(
            name="cifar10",
            title="CIFAR-10",
            description="Colour photographs of ten kinds of animals and vehicles, whole and lossless.",
            classes=cifar.CLASSES,
            size=(3, 32, 32),
            counts={"train": 50_000, "test": 10_000},
            mean=(0.4914, 0.4822, 0.4465),
            std=(0.2470, 0.2435, 0.2616),
            licence="none stated by the authors; free for research with citation",
            citation="Krizhevsky 2009, Learning Multiple Layers of Features from Tiny Images",
            homepage="https://www.cs.toronto.edu/~kriz/cifar.html",
            read=cifar.read,
            checksums={
                "train": "1e91790dbaf241617ca1f29a9aba08eb9a62df84cc90676b47edd05ad2ab3c94",
                "test": "9a4c74f5c8b6f2c4e13d3a1dfb43a5a8cda8a9da515e99fd620d2013a1a6287a",
            },
            sources=cifar.SOURCES,
            download_bytes=185_000_000,
        ),
        Card(
            name="shapes",
            title="Shapes",
            description=(
                "Generated: three discs, three boxes and three tailed discs that differ in one part, "
                "and empty images, over dark, blurred or noisy backgrounds. Each image carries a mask "
                "of where the object is and which part tells its class from its siblings."
            ),
            classes=shapes.CLASSES,
            size=(3, shapes.SIZE, shapes.SIZE),
            counts=shapes.COUNTS,
            mean=(0.2762, 0.2764, 0.2763),
            std=(0.2127, 0.2126, 0.2123),
            licence="MIT, as kdx",
            citation="after Tjoa & Guan 2020 and Han et al. 2023, appendices B.6 and D",
            homepage="",
            read=shapes.read,
        ),
        Card(
            name="petimages",
            title="PetImages (ASIRRA)",
            description=(
                "Some 25,000 photographs of cats and dogs that shelters had put up for adoption; the paper's ASIRRA. "
                "The original holds empty and damaged files, which are refused when it is prepared."
            ),
            classes=("cat", "dog"),
            size=(3, 96, 96),
            augmentation={"RandomHorizontalFlip": {}, "RandomResizedCrop": {"scale": [0.5, 1.0]}},
            licence="Microsoft Research; research and education",
            citation="Elson, Douceur, Howell & Saul 2007, Asirra",
            homepage="https://www.microsoft.com/en-us/download/details.aspx?id=54765",
            layout=Layout(("PetImages", "."), {"Cat": "cat", "Dog": "dog"}.get),
            sources={
                "Microsoft's download centre": archive_source(
                    "https://download.microsoft.com/download/3/E/1/3E1C3F21-ECDB-4869-8368-6DEBA77B919F/"
                    "kagglecatsanddogs_5340.zip",
                    "b7974bd00a84a99921f36ee4403f089853777b5ae8d151c76a86e64900334af9",
                )
            },
            download_bytes=824_887_076,
        ),
        Card(
            name="plantvillage",
            title="PlantVillage",
            description=(
                "Some 54,300 photographs of single leaves on a plain ground, healthy or with one of 26 diseases. Where "
                "the folder `segmented` of the original repository is there, its pictures give masks of the leaves; "
                "the download below has none. The split is by photograph, and several may show one leaf."
            ),
            classes=plantvillage.CLASSES,
            size=(3, 96, 96),
            augmentation={
                "RandomHorizontalFlip": {},
                "RandomVerticalFlip": {},
                "RandomResizedCrop": {"scale": [0.7, 1.0]},
            },
            licence="CC BY-SA 3.0",
            citation="Hughes & Salathé 2015, arXiv:1511.08060",
            homepage="https://github.com/spMohanty/PlantVillage-Dataset",
            layout=Layout(
                ("color", "raw/color", "Plant_leave_diseases_dataset_without_augmentation", "."),
                plantvillage.class_name,
                plantvillage.mask_of,
            ),
            sources={
                "Mendeley Data": archive_source(
                    "https://data.mendeley.com/public-files/datasets/tywbtsjrjv/files/"
                    "d5652a28-c1d8-4b76-97f3-72fb80f94efc/file_downloaded",
                    "ac3432453984d02a86197987e775a5429d0d59e7cc7c35bcf5a8f50349b90ff0",
                    "plantvillage.zip",
                )
            },
            download_bytes=868_032_562,
        ),
    )
}
