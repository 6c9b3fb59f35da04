"""Folders of images, one a class: found, checked, and decoded once into a compact cache.

A prepared set is a folder of ``images.bin`` (uint8, n x 3 x size x size), ``masks.bin`` where
there are masks, ``files.csv`` (every file that was found, with its class and split, or with the
reason why it was refused) and ``card.json``.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from filelock import FileLock
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms import v2

from kdx.paths import DataError, check_space, one_line
from kdx.progress import progress

FORMAT = 2  # of a prepared set; part of its digest
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM")  # others may run programs of their own
SIZES = (16, 1024)  # pixels a side of a prepared image, least and most
LEAST_SIDE = 8  # pixels of an original
MOST_PIXELS = 50_000_000  # of an original; several are held decoded at a time
WORKERS = min(8, os.cpu_count() or 1)
LEAST_IMAGES = 8  # of a class
TEST_SHARE = 0.3  # of each class, where the folders do not say what is for testing
SPLIT_SEED = 0
SPLITS = {  # names of folders above those of the classes
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing"), "test"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
}
BACKGROUND = 10  # of 255: darker is no leaf in a segmented picture, but for JPEG noise
UNKNOWN = 255  # in a mask
BLOCK = 256  # images decoded at a time


def _as_it_is(folder: str) -> str | None:
    return None if folder.startswith((".", "__")) else folder


@dataclass(frozen=True)
class Layout:
    """How the files of a dataset lie.

    Attributes
    ----------
    roots : where, inside the dataset's folder, the folders of its classes may be; the first that
        holds one is taken.
    class_name : the name of a folder -> the name of its class, or None if it is no class.
    mask_of : path of an image -> path of a picture of its object on a black background.
    """

    roots: tuple[str, ...] = (".",)
    class_name: Callable[[str], str | None] = _as_it_is
    mask_of: Callable[[Path], Path] | None = None


class Item(NamedTuple):
    """A file that may be an image: its path, that inside the source, its class, its split if known."""

    path: Path
    file: str
    name: str
    split: str


class RefusedError(ValueError):
    """Why a file is not used."""


@dataclass(frozen=True)
class Prepared:
    """A set of decoded images on disk.

    Attributes
    ----------
    card : classes, counts per split, size, mean, std, number of masks, seed and share of the split, source,
        numbers of files refused and noted.
    files : one row a file: file, class, split, mask (whether there is one), note. Refused files
        have no split, and the note says why; the others come in the order of ``images.bin``.
    """

    folder: Path
    card: dict[str, Any]

    @property
    def files(self) -> pd.DataFrame:
        text = dict.fromkeys(("file", "class", "split", "note"), str)  # also for a class called 0 or True
        return pd.read_csv(self.folder / "files.csv", keep_default_na=False, dtype=text)

    def rows(self, split: str) -> pd.DataFrame:
        """The rows of ``files`` of a split, in the order of :meth:`read`: random, but always the same. The index
        is the place in ``images.bin``."""
        files = self.files
        used = files[files["split"] != ""].reset_index(drop=True)
        return used[used["split"] == split].sample(frac=1, random_state=SPLIT_SEED)

    def read(self, split: str) -> tuple[Tensor, Tensor, Tensor | None]:
        """Images uint8 (n, 3, size, size), labels int64 (n,) and masks uint8 (n, size, size) or None."""
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


# --- what is there ---------------------------------------------------------------------------------


def scan(source: Path, layout: Layout) -> tuple[list[Item], dict[str, str]]:
    """The files of every class, sorted, and those refused by their name or place with the reason.

    Raises
    ------
    DataError : no folders of classes where the layout expects them.
    """
    source = source.resolve()
    items: list[Item] = []
    refused: dict[str, str] = {}
    for root, split in find_roots(source, layout):
        for entry in sorted(root.iterdir()):
            inside = printable(entry.relative_to(source))
            if not entry.is_dir():
                refused[inside] = "not in the folder of a class"
            elif (name := layout.class_name(entry.name)) is None:
                refused[f"{inside}/"] = "no class of this dataset"
            elif not _inside(entry, source):
                refused[f"{inside}/"] = "a link out of the folder"
            else:
                for path in _walk(entry):
                    file = printable(path.relative_to(source))
                    try:
                        _check_place(path, source)
                        items.append(Item(path, file, printable(name), split))
                    except RefusedError as reason:
                        refused[file] = str(reason)
    return items, refused


def list_files(source: Path) -> tuple[list[Item], dict[str, str]]:
    """What :func:`scan` finds by class; of a folder without subfolders, its files, of class ``""``."""
    if not source.is_dir() or any(f.is_dir() and _as_it_is(f.name) for f in source.iterdir()):
        return scan(source, Layout())
    items, refused = [], {}
    for path in _walk(source := source.resolve()):
        file = printable(path.relative_to(source))
        try:
            _check_place(path, source)
            items.append(Item(path, file, "", ""))
        except RefusedError as reason:
            refused[file] = str(reason)
    return items, refused


def find_roots(source: Path, layout: Layout) -> list[tuple[Path, str]]:
    """Folders that hold those of the classes, each with the split it is for (empty: not said)."""
    if not source.is_dir():
        raise DataError(f"expected a folder of images, found no folder {printable(source)}")
    roots = _split_roots(source) if layout == Layout() else []
    for root in layout.roots:
        folder = source / root
        if not roots and folder.is_dir() and any(layout.class_name(f.name) for f in folder.iterdir() if f.is_dir()):
            roots = [(folder, "")]
    if not roots:
        expected = " or ".join((Path(root) / "<class>" / "<image>").as_posix() for root in layout.roots)
        entries = sorted(printable(entry.name) + "/" * entry.is_dir() for entry in source.iterdir())
        found = ", ".join(entries[:5]) + (f" and {len(entries) - 5} more" if len(entries) > 5 else "")
        raise DataError(f"expected images as {expected}, found {found or 'nothing'} in {printable(source)}")
    for folder, _ in roots:
        if not _inside(folder, source.resolve()):
            raise DataError(
                f"{printable(folder)} is a link out of the folder of the images; give the folder it leads to"
            )
    return roots


def _split_roots(source: Path) -> list[tuple[Path, str]]:
    """Folders named as the parts of a data set, if that is what they are, and not classes."""
    names = sorted(folder.name for folder in source.iterdir() if folder.is_dir() and _as_it_is(folder.name))
    parts = {name: SPLITS[name.lower()] for name in names if name.lower() in SPLITS}
    kinds = set(parts.values())
    if kinds == {"train"} and len(names) == 1:
        return [(source / names[0], "")]
    if "train" not in kinds or len(kinds) == 1:
        return []
    if others := [printable(name) for name in names if name not in parts]:
        raise DataError(
            f"expected folders of classes, or of parts such as train and test, found both ({', '.join(parts)}; "
            f"{', '.join(others[:5])}) in {printable(source)}"
        )
    held_out = "test" if "test" in kinds else "val"
    return [(source / name, "test" if kind == held_out else "train") for name, kind in parts.items()]


def _walk(folder: Path) -> Iterator[Path]:
    def stop(error: OSError) -> None:
        raise error

    for where, folders, files in os.walk(folder, onerror=stop):
        folders.sort()
        for name in sorted([*files, *(f for f in folders if os.path.islink(os.path.join(where, f)))]):
            yield Path(where, name)


def printable(path: Path | str) -> str:
    """A path or name as text that can be shown and stored, whatever bytes it is made of."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _inside(path: Path, source: Path) -> bool:
    return path.resolve().is_relative_to(source)


def _check_place(path: Path, source: Path) -> None:
    if path.is_symlink() and not _inside(path, source):
        raise RefusedError("a link out of the folder")
    if path.is_symlink() and path.is_dir():
        raise RefusedError("a link to a folder")
    if not path.is_file():
        raise RefusedError("no regular file")
    if not path.stat().st_size:
        raise RefusedError("empty file")


def digest(source: Path, layout: Layout, size: int) -> str:
    """12 hex digits of the names, sizes and dates of all files of a source, and of the image size."""
    items, refused = scan(source, layout)
    facts = [(item.file, *_stat(item.path)) for item in items]
    if layout.mask_of:
        facts += [("mask", *_stat(layout.mask_of(item.path))) for item in items]
    return hashlib.sha256(json.dumps([FORMAT, TEST_SHARE, SPLIT_SEED, size, facts, refused]).encode()).hexdigest()[:12]


def _stat(path: Path) -> tuple[int, ...]:
    """Size and date of a file; nothing where there is none."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_size, found.st_mtime_ns


# --- one image ---------------------------------------------------------------------------------------


def decode(path: Path | IO[bytes]) -> tuple[Image.Image, str]:
    """A file as an upright RGB picture, and what had to be done for it (empty: nothing).

    Raises
    ------
    RefusedError : not an image that can be read whole, with 8 bits a channel, and of a sensible size.
    """
    try:
        with Image.open(path, formats=FORMATS) as picture:
            if min(picture.size) < LEAST_SIDE:
                raise RefusedError(f"smaller than {LEAST_SIDE} pixels: {picture.width} x {picture.height}")
            if math.prod(picture.size) > MOST_PIXELS:
                raise RefusedError(f"more than {MOST_PIXELS:,} pixels: {picture.width} x {picture.height}")
            if picture.mode in ("I", "F") or picture.mode.startswith("I;"):
                raise RefusedError(f"more than 8 bits a channel (mode {picture.mode})")
            picture.load()
            note = "" if picture.mode == "RGB" else f"converted from {picture.mode}"
            upright = ImageOps.exif_transpose(picture)
            if picture.has_transparency_data:
                layer = upright.convert("RGBA")
                upright = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
                note = f"{note or 'transparent'}, laid on white"
            return upright.convert("RGB"), note
    except (RefusedError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise RefusedError("not an image") from error
    except Image.DecompressionBombError as error:
        raise RefusedError(f"far more than {MOST_PIXELS:,} pixels") from error
    except Exception as error:  # a decoder may fail in any way on what it did not expect
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the machine's fault, not the file's
        raise RefusedError(f"unreadable: {one_line(error)}") from error


def prepare_image(
    item: Item, layout: Layout = Layout(), *, size: int
) -> tuple[np.ndarray, np.ndarray, str] | RefusedError:
    """The image (3, size, size) and mask (1, size, size) in its middle, and a note."""
    try:
        picture, note = decode(item.path)
    except RefusedError as reason:
        return reason
    mask = np.full((1, size, size), UNKNOWN, np.uint8)
    if layout.mask_of and _stat(path := layout.mask_of(item.path)):
        try:
            if path.resolve() != path or not path.is_file():
                raise RefusedError("not a regular file of its own")
            segmented, _ = decode(path)
            if segmented.size != picture.size:
                raise RefusedError(
                    f"{segmented.width} x {segmented.height} pixels, the image {picture.width} x {picture.height}"
                )
            object_ = Image.fromarray((np.asarray(segmented).max(2) > BACKGROUND).astype(np.uint8))
            mask = resize_square(object_, size, v2.InterpolationMode.NEAREST)
        except RefusedError as reason:
            note = f"{note}; " * bool(note) + f"mask refused: {reason}"
    return resize_square(picture, size), mask, note


def resize_square(
    picture: Image.Image, size: int, interpolation: v2.InterpolationMode = v2.InterpolationMode.BILINEAR
) -> np.ndarray:
    """The middle square, resized to ``size`` pixels a side, as (channels, size, size)."""
    square = v2.CenterCrop(min(picture.size))
    transform = v2.Compose([square, v2.Resize((size, size), interpolation), v2.PILToTensor()])
    return transform(picture).numpy()


# --- all of them -------------------------------------------------------------------------------------


def prepare(name: str, source: Path, layout: Layout, size: int, home: Path) -> Prepared:
    """Decode a source into ``home / "<name>-<size>px-<digest>"``, or open what is there already.

    Images are cut to their middle square and resized to ``size`` pixels a side.
    Where the folders do not name the splits, three tenths of each class are kept for testing, drawn by
    a fixed seed. Of files with the same pixels, only the first is used.

    Raises
    ------
    DataError : the folders are not laid out by class, there are fewer than two classes, or fewer
        than 8 readable images of some class; the disk is full.
    """
    if not SIZES[0] <= size <= SIZES[1]:
        raise ValueError(f"size: expected {SIZES[0]} to {SIZES[1]} pixels, got {size}")
    folder = home / f"{name}-{size}px-{digest(source, layout, size)}"
    home.mkdir(parents=True, exist_ok=True)
    with FileLock(home / f".{folder.name}.lock"):
        if not folder.exists():
            scratch = Path(tempfile.mkdtemp(prefix=f".partial-{name}-", dir=home))
            try:
                _write(scratch, source, layout, size)
                scratch.chmod(0o755)
                os.replace(scratch, folder)
            except OSError as error:
                if error.errno == errno.ENOSPC:
                    raise DataError(f"{name}: the disk of {home} is full; nothing was kept") from error
                raise
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    return open_prepared(folder)


def open_prepared(folder: Path) -> Prepared:
    try:
        return Prepared(folder, json.loads((folder / "card.json").read_text()))
    except (OSError, ValueError) as error:
        raise DataError(
            f"the prepared images {folder} are damaged ({one_line(error)}); delete that folder to prepare them again"
        ) from error


def _write(folder: Path, source: Path, layout: Layout, size: int) -> None:
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
    """Write ``images.bin`` and ``masks.bin``; return a row for each image in them, and add to ``refused``."""
    rows: list[tuple[str, str, str, bool, str]] = []
    seen: dict[bytes, str] = {}
    with (
        (folder / "images.bin").open("wb") as images,
        (folder / "masks.bin").open("wb") as masks,
        progress(total=len(items), desc="decoding", unit="image") as bar,
        ThreadPoolExecutor(WORKERS) as pool,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # Pillow's remarks on odd files: what cannot be read is refused
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
    """Train or test for each file: the same share of every class, and of its images with a mask."""
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
