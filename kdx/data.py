"""Datasets: cards, verified downloads, uint8 tensors in memory, augmentation and folds.

``DATASETS`` maps a name to its :class:`Card`. Files live under :func:`data_home`; a download
is decoded in a scratch folder, checked against the card's checksum of pixels and labels, and
only then moved into place, so an interrupted or corrupt one is never taken for the data.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock
from sklearn.model_selection import StratifiedKFold
from torch import Tensor

from kdx import cifar, shapes

log = logging.getLogger(__name__)


class DataError(RuntimeError):
    """The data could not be had, or are not what their card says."""


def data_home() -> Path:
    """Folder of ``raw/`` (downloads) and ``runs/`` (trained models).

    ``$KDX_DATA`` if set, else ``data/`` of the checkout kdx runs from, else ``~/.cache/kdx``.
    """
    if home := os.environ.get("KDX_DATA"):
        return Path(home).expanduser().absolute()
    checkout = Path(__file__).resolve().parent.parent
    if (checkout / "pyproject.toml").is_file():
        return checkout / "data"
    return Path.home() / ".cache" / "kdx"


@dataclass(frozen=True)
class Card:
    """What is known of a dataset before it is opened.

    Attributes
    ----------
    size : (channels, height, width) of every image.
    counts : images per split.
    mean, std : per-channel statistics of the training pixels, on the scale 0..1.
    checksums : SHA-256 of pixels and labels per split (:func:`fingerprint`); ``None`` for
        generated data, which are recomputed instead of stored.
    sources : name -> ``fetch(folder)``, tried in order; empty for generated data.
    read : ``read(folder, split, seed)`` -> (images, labels, masks or None).
    """

    name: str
    title: str
    description: str
    classes: tuple[str, ...]
    size: tuple[int, int, int]
    counts: dict[str, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    licence: str
    citation: str
    homepage: str
    read: Callable[[Path, str, int], tuple[Tensor, Tensor, Tensor | None]] = field(repr=False)
    checksums: dict[str, str] | None = field(default=None, repr=False)
    sources: dict[str, Callable[[Path], None]] = field(default_factory=dict, repr=False)
    download_bytes: int = 0

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 images (n, c, h, w) -> float32 with zero mean and unit variance per channel."""
        if images.dtype != torch.uint8:
            raise TypeError(f"expected uint8 images, got {images.dtype}")
        mean = torch.tensor(self.mean, device=images.device).view(-1, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(-1, 1, 1)
        return (images / 255 - mean) / std

    def _repr_markdown_(self) -> str:
        c, h, w = self.size
        rows = {
            "classes": f"{len(self.classes)}: {', '.join(self.classes)}",
            "images": ", ".join(f"{n:,} {split}" for split, n in self.counts.items()),
            "size": f"{h} × {w}, {c} channels, 8 bit",
            "channel mean": ", ".join(f"{m:.4f}" for m in self.mean),
            "channel standard deviation": ", ".join(f"{s:.4f}" for s in self.std),
            "sources, in order": ", ".join(["data/raw", *self.sources]) if self.sources else "generated",
            "licence": self.licence,
            "citation": self.citation,
        }
        for split, digest in (self.checksums or {}).items():
            rows[f"SHA-256 of {split} pixels and labels"] = f"`{digest[:16]}…`"
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
        tells its class from its siblings.
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
    if name not in DATASETS:
        raise ValueError(f"unknown dataset {name!r}; choose from: {', '.join(DATASETS)}")
    return DATASETS[name]


def load_dataset(name: str, split: str = "test", limit: int | None = None, seed: int = 0) -> Dataset:
    """Load a split into memory, fetching and verifying it first where that is needed.

    Parameters
    ----------
    limit : keep this many images, with the class proportions of the whole.
    seed : draws the subset of ``limit``, and the images of a generated dataset.

    Raises
    ------
    ValueError : unknown dataset or split, or an impossible ``limit``.
    DataError : no source gave the data that the card describes.
    """
    card = find_card(name)
    if split not in card.counts:
        raise ValueError(f"unknown split {split!r} of {name}; choose from: {', '.join(card.counts)}")
    folder = fetch(name) if card.sources else data_home()
    images, labels, masks = card.read(folder, split, seed)
    return Dataset(images, labels, card, masks).limit(limit, seed)


def fetch(name: str) -> Path:
    """Make sure that dataset ``name`` lies verified under ``raw/``; return its folder.

    Sources are tried in the card's order; each failure is logged in one line.
    """
    card = find_card(name)
    raw = data_home() / "raw"
    folder = raw / name
    if not card.sources:
        return folder
    if folder.exists() and _refusal(card, folder) is None:
        return folder
    raw.mkdir(parents=True, exist_ok=True)
    with FileLock(raw / f".{name}.lock"):
        return _fetch(card, raw, folder)


def _fetch(card: Card, raw: Path, folder: Path) -> Path:
    name = card.name
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
            f"found {free / 1e6:.0f} MB; free some space or point KDX_DATA at another disk"
        )
    failures = []
    for source, get in card.sources.items():
        with tempfile.TemporaryDirectory(prefix=f".partial-{name}-", dir=raw) as scratch:
            unpacked = Path(scratch) / name
            unpacked.mkdir()
            try:
                get(unpacked)
                _verify(card, unpacked)
            except Exception as error:
                if getattr(error, "errno", None) == errno.ENOSPC:
                    raise DataError(f"{name}: the disk of {raw} is full; nothing was kept") from error
                failures.append(f"{source}: {_one_line(error)}")
                log.warning("%s: %s", name, failures[-1])
                continue
            os.replace(unpacked, folder)
            log.info("%s: verified, from %s", name, source)
            return folder
    raise DataError(
        f"{name}: no source could be reached or trusted.\n  "
        + "\n  ".join(failures)
        + f"\nCheck the connection, or put the original files into {folder}."
    )


def _refusal(card: Card, folder: Path) -> DataError | None:
    try:
        _verify(card, folder)
    except DataError as error:
        return error
    return None


def _verify(card: Card, folder: Path) -> None:
    assert card.checksums is not None
    for split, expected in card.checksums.items():
        try:
            images, labels, _ = card.read(folder, split, 0)
        except (OSError, ValueError) as error:
            raise DataError(f"{split} split unreadable: {_one_line(error)}") from error
        if (got := fingerprint(images, labels)) != expected:
            raise DataError(f"{split} split: expected SHA-256 {expected[:12]}…, got {got[:12]}…")


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


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


def augment(images: Tensor, generator: torch.Generator, shift: int = 2) -> Tensor:
    """Random mirror and shift by up to ``shift`` pixels of (n, c, h, w), all at once.

    Borders are filled by reflection. Values and dtype are kept.
    """
    n, c, h, w = images.shape
    device = images.device
    flip = torch.rand(n, generator=generator) < 0.5
    images = torch.where(flip.to(device)[:, None, None, None], images.flip(-1), images)
    if shift == 0:
        return images
    dy, dx = torch.randint(0, 2 * shift + 1, (2, n), generator=generator).to(device)
    rows = dy[:, None] + torch.arange(h, device=device)  # (n, h), into the padded image
    cols = dx[:, None] + torch.arange(w, device=device)  # (n, w)
    padded = F.pad(images.float(), (shift,) * 4, mode="reflect").to(images.dtype)
    sample = torch.arange(n, device=device)[:, None, None, None]
    channel = torch.arange(c, device=device)[None, :, None, None]
    return padded[sample, channel, rows[:, None, :, None], cols[:, None, None, :]]


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
    )
}
