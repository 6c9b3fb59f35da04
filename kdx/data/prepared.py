"""Folders of images, decoded once into a compact cache.

A prepared set is a folder with ``images.bin`` (uint8, n x 3 x size x size), ``masks.bin`` if there are masks,
``files.csv`` (every file that was found, with its class and split, or with the reason why it was refused) and
``card.json``.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from filelock import FileLock
from torch import Tensor

from kdx.data.decoding import prepare_image
from kdx.data.folders import UNKNOWN, WORKERS, Item, Layout, RefusedError, printable, scan, stat_of
from kdx.paths import DataError, check_space, one_line, written_whole
from kdx.progress import progress

FORMAT = 2  # of a prepared set; part of its digest
SIZES = (16, 1024)  # smallest and largest number of pixels per side of a prepared image
LEAST_IMAGES = 8  # per class
TEST_SHARE = 0.3  # of each class, where the folders do not name a test part
SPLIT_SEED = 0
BLOCK = 256  # images decoded at a time


@dataclass(frozen=True)
class Prepared:
    """A set of decoded images on disk.

    Attributes:
        folder: The folder of the set.
        card: Classes, counts per split, size, mean, std, number of masks, seed and share of the split, source, numbers
            of files refused and files with a note.
    """

    folder: Path
    card: dict[str, Any]

    @property
    def files(self) -> pd.DataFrame:
        """One row per file: file, class, split, mask (whether there is one), note.

        Refused files have no split, and the note is the reason; the others are in the order of ``images.bin``.
        """
        text = dict.fromkeys(("file", "class", "split", "note"), str)  # also for a class called 0 or True
        return pd.read_csv(self.folder / "files.csv", keep_default_na=False, dtype=text)

    def rows(self, split: str) -> pd.DataFrame:
        """The rows of ``files`` of a split, in the order of :meth:`read`, which is random but always the same.

        The index is the position in ``images.bin``.
        """
        files = self.files
        used = files[files["split"] != ""].reset_index(drop=True)
        return used[used["split"] == split].sample(frac=1, random_state=SPLIT_SEED)

    def read(self, split: str) -> tuple[Tensor, Tensor, Tensor | None]:
        """Read a split into memory.

        Args:
            split: ``"train"`` or ``"test"``.

        Returns:
            Images, uint8 (n, 3, size, size), labels, int64 (n,), and masks, uint8 (n, size, size), or None.

        Raises:
            DataError: The files of the set are damaged.
        """
        rows = self.rows(split)
        labels = torch.tensor(rows["class"].map(self.card["classes"].index).to_numpy())
        images = torch.from_numpy(self._array("images.bin", 3)[rows.index])
        masks = torch.from_numpy(self._array("masks.bin", 1)[rows.index, 0]) if self.card["masks"] else None
        return images, labels, masks

    def _array(self, name: str, channels: int) -> np.ndarray:
        shape = (sum(self.card["counts"].values()), channels, self.card["size"], self.card["size"])
        path = self.folder / name
        if not path.is_file() or path.stat().st_size != math.prod(shape):
            raise DataError(f"the prepared images {self.folder} are damaged; delete that folder to prepare them again")
        return np.memmap(path, np.uint8, "r", shape=shape)


def digest(source: Path, layout: Layout, size: int) -> str:
    """12 hex digits of the names, sizes and dates of all files of a source, and of the image size."""
    items, refused = scan(source, layout)
    facts = [(item.file, *stat_of(item.path)) for item in items]
    if layout.mask_of:
        facts += [("mask", *stat_of(layout.mask_of(item.path))) for item in items]
    return hashlib.sha256(json.dumps([FORMAT, TEST_SHARE, SPLIT_SEED, size, facts, refused]).encode()).hexdigest()[:12]


def prepare_folder(name: str, source: Path, layout: Layout, size: int, home: Path) -> Prepared:
    """Decode a folder of images into ``home / "<name>-<size>px-<digest>"``, or open this set if it exists.

    Images are cut to their middle square and resized. Where the folders do not name the splits, three tenths of each
    class are kept for testing, drawn by a fixed seed. Of files with the same pixels, only the first is used.

    Args:
        name: The start of the name of the set.
        source: The folder of images.
        layout: Where the files of each class are.
        size: Pixels per side of the prepared images, in ``SIZES``.
        home: The folder of all prepared sets.

    Returns:
        The prepared set.

    Raises:
        ValueError: The size is out of range.
        DataError: The folders are not laid out by class, there are fewer than two classes, or fewer than 8 readable
            images of some class; the disk is full; the set that exists is damaged.
    """
    if not SIZES[0] <= size <= SIZES[1]:
        raise ValueError(f"size: expected {SIZES[0]} to {SIZES[1]} pixels, got {size}")
    folder = home / f"{name}-{size}px-{digest(source, layout, size)}"
    home.mkdir(parents=True, exist_ok=True)
    with FileLock(home / f".{folder.name}.lock"):
        if not folder.exists():
            try:
                with written_whole(folder) as scratch:
                    _write(scratch, source, layout, size)
            except OSError as error:
                if error.errno == errno.ENOSPC:
                    raise DataError(f"{name}: the disk of {home} is full; nothing was kept") from error
                raise
    return open_prepared(folder)


def open_prepared(folder: Path) -> Prepared:
    """Open a prepared set.

    Raises:
        DataError: Its ``card.json`` is missing or damaged.
    """
    try:
        return Prepared(folder, json.loads((folder / "card.json").read_text()))
    except (OSError, ValueError) as error:
        raise DataError(
            f"the prepared images {folder} are damaged ({one_line(error)}); delete that folder to prepare them again"
        ) from error


def _write(folder: Path, source: Path, layout: Layout, size: int) -> None:
    """Write all files of a prepared set."""
    items, refused = scan(source, layout)
    classes = sorted({item.name for item in items})
    if len(classes) < 2:
        raise DataError(
            f"expected images of at least two classes, got {', '.join(classes) or 'none'} in {printable(source)}"
        )
    check_space(source.name, len(items) * (3 + bool(layout.mask_of)) * size**2, folder.parent)
    files = _decode_all(folder, items, refused, layout, size)
    _check_counts(files["class"], classes, refused, source)
    if not files["split"].all():
        files["split"] = _split(files)
    filled = set(zip(files["class"], files["split"], strict=True))
    if empty := [f"{name} ({split})" for name in classes for split in ("train", "test") if (name, split) not in filled]:
        raise DataError(
            f"expected images of each class for train and test, got none of {', '.join(empty)} in {printable(source)}"
        )
    masked = int(files["mask"].sum())
    if not masked:
        (folder / "masks.bin").unlink()
    bad = pd.DataFrame([(file, "", "", False, reason) for file, reason in refused.items()], columns=files.columns)
    pd.concat([files, bad]).to_csv(folder / "files.csv", index=False)
    images = np.memmap(folder / "images.bin", np.uint8, "r", shape=(len(files), 3, size, size))
    mean, std = _statistics(images, np.flatnonzero(files["split"] == "train"))
    if not min(std) > 0:
        raise DataError(f"a channel of the training images of {printable(source)} is constant: deviations {std}")
    card = {
        "classes": classes,
        "counts": {split: int((files["split"] == split).sum()) for split in ("train", "test")},
        "size": size,
        "mean": mean,
        "std": std,
        "masks": masked,
        "split": "as the folders say" if items[0].split else f"test share {TEST_SHARE}, seed {SPLIT_SEED}",
        "source": printable(source.resolve()),
        "refused": len(refused),
        "noted": int((files["note"] != "").sum()),
    }
    (folder / "card.json").write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n")


def _decode_all(folder: Path, items: list[Item], refused: dict[str, str], layout: Layout, size: int) -> pd.DataFrame:
    """Write ``images.bin`` and ``masks.bin``.

    Returns:
        A row for each image in them. Files that cannot be decoded, and repeated ones, are added to ``refused``.
    """
    rows: list[tuple[str, str, str, bool, str]] = []
    seen: dict[bytes, str] = {}
    with (
        (folder / "images.bin").open("wb") as images,
        (folder / "masks.bin").open("wb") as masks,
        progress(total=len(items), desc="decoding", unit="image") as bar,
        ThreadPoolExecutor(WORKERS) as pool,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # of Pillow on unusual files; unreadable ones are refused
        for start in range(0, len(items), BLOCK):
            block = items[start : start + BLOCK]
            decoded = pool.map(partial(prepare_image, layout=layout, size=size), block)
            for item, result in zip(block, decoded, strict=True):
                bar.update()
                if isinstance(result, RefusedError):
                    refused[item.file] = str(result)
                    continue
                image, mask, note = result
                pixels = image.tobytes()
                if (twin := seen.setdefault(hashlib.sha256(pixels).digest(), item.file)) != item.file:
                    refused[item.file] = f"the same pixels as {twin}"
                    continue
                images.write(pixels)
                masks.write(mask.tobytes())
                rows.append((item.file, item.name, item.split, bool(mask[0, 0, 0] != UNKNOWN), note))
    return pd.DataFrame(rows, columns=["file", "class", "split", "mask", "note"])


def _check_counts(names: pd.Series, classes: list[str], refused: dict[str, str], source: Path) -> None:
    """Raise DataError if a class has too few images; ``names`` are the classes of the images."""
    counts = names.value_counts().reindex(classes, fill_value=0)
    examples = "; ".join(f"{file}: {reason}" for file, reason in list(refused.items())[:3])
    because = f" ({len(refused)} refused, such as {examples})" if refused else ""
    if not len(names):
        raise DataError(f"no readable image in {printable(source)}{because}")
    if counts.min() < LEAST_IMAGES:
        few = ", ".join(f"{n} of {name}" for name, n in counts[counts < LEAST_IMAGES].items())
        raise DataError(
            f"expected at least {LEAST_IMAGES} readable images of each class, got {few} in {printable(source)}{because}"
        )


def _split(files: pd.DataFrame) -> np.ndarray:
    """Train or test for each file, with the same share of every class and of its images with a mask."""
    from sklearn.model_selection import train_test_split  # slow to import

    strata = files["class"] + files["mask"].map({True: "/masked", False: ""})
    if strata.value_counts().min() < 4:
        strata = files["class"]
    _, test = train_test_split(np.arange(len(files)), test_size=TEST_SHARE, random_state=SPLIT_SEED, stratify=strata)
    split = np.full(len(files), "train", dtype=object)
    split[test] = "test"
    return split


def _statistics(images: np.ndarray, rows: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel over the images at ``rows``, on the scale 0..1."""
    counts = np.zeros((3, 256))
    for block in np.array_split(rows, math.ceil(len(rows) / BLOCK)):
        for channel in range(3):
            counts[channel] += np.bincount(images[block, channel].ravel(), minlength=256)
    values = np.arange(256) / 255
    share = counts / counts.sum(1, keepdims=True)
    mean = share @ values
    std = np.sqrt((share * (values - mean[:, None]) ** 2).sum(1))
    return mean.round(4).tolist(), std.round(4).tolist()
