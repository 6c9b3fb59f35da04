"""Finding the files in folders of images, one per class; some are refused by their name or place."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from kdx.paths import DataError

WORKERS = min(8, os.cpu_count() or 1)
SPLITS = {  # names of folders above the class folders
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing"), "test"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
}
UNKNOWN = 255  # value of all pixels in the mask of an image without a mask


def _unchanged(folder: str) -> str | None:
    """The name of a folder, or None if it is hidden."""
    return None if folder.startswith((".", "__")) else folder


@dataclass(frozen=True)
class Layout:
    """Where the files of a dataset are.

    Attributes:
        roots: Folders inside the dataset's folder that may hold the class folders; the first that holds one is used.
        class_name: Returns the name of the class for the name of a folder, or None if the folder is not a class.
        mask_of: Returns the path of a picture of the object on a black background for the path of an image; None: the
            dataset has no masks.
    """

    roots: tuple[str, ...] = (".",)
    class_name: Callable[[str], str | None] = _unchanged
    mask_of: Callable[[Path], Path] | None = None


PLAIN = Layout()  # a subfolder of images for each class


class Item(NamedTuple):
    """A file that may be an image.

    Attributes:
        path: The path of the file.
        file: The path inside the source, as printable text.
        name: The name of the class; empty for a flat folder.
        split: ``"train"`` or ``"test"``; empty if the folders do not say.
    """

    path: Path
    file: str
    name: str
    split: str


class RefusedError(ValueError):
    """A file is not used; the message is the reason."""


def scan(source: Path, layout: Layout) -> tuple[list[Item], dict[str, str]]:
    """Find the files of every class.

    Args:
        source: The folder of the dataset.
        layout: Where its files are.

    Returns:
        The files that may be images, sorted, and a dict from each refused file or folder to the reason.

    Raises:
        DataError: There are no class folders where the layout expects them.
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
                _collect(entry, source, printable(name), split, items, refused)
    return items, refused


def list_files(source: Path) -> tuple[list[Item], dict[str, str]]:
    """As :func:`scan`, and for a folder without subfolders its files, with the class ``""``."""
    if not source.is_dir() or any(f.is_dir() and _unchanged(f.name) for f in source.iterdir()):
        return scan(source, PLAIN)
    items: list[Item] = []
    refused: dict[str, str] = {}
    _collect(source.resolve(), source.resolve(), "", "", items, refused)
    return items, refused


def _collect(folder: Path, source: Path, name: str, split: str, items: list[Item], refused: dict[str, str]) -> None:
    """Add the files below a folder to ``items``, or to ``refused`` with the reason."""
    for path in _walk(folder):
        file = printable(path.relative_to(source))
        try:
            _check_place(path, source)
            items.append(Item(path, file, name, split))
        except RefusedError as reason:
            refused[file] = str(reason)


def find_roots(source: Path, layout: Layout) -> list[tuple[Path, str]]:
    """Find the folders that hold the class folders.

    Args:
        source: The folder of the dataset.
        layout: Where its files are.

    Returns:
        Each of these folders with its split; ``""`` if the folders do not say.

    Raises:
        DataError: There is no such folder, or it is a link out of ``source``.
    """
    if not source.is_dir():
        raise DataError(f"expected a folder of images, found no folder {printable(source)}")
    roots = _split_roots(source) if layout == PLAIN else []
    for root in layout.roots:
        folder = source / root
        if not roots and folder.is_dir() and any(layout.class_name(f.name) for f in folder.iterdir() if f.is_dir()):
            roots = [(folder, "")]
    if not roots:
        expected = " or ".join((Path(root) / "<class>" / "<image>").as_posix() for root in layout.roots)
        entries = sorted(printable(entry.name) + ("/" if entry.is_dir() else "") for entry in source.iterdir())
        found = ", ".join(entries[:5]) + (f" and {len(entries) - 5} more" if len(entries) > 5 else "")
        raise DataError(f"expected images as {expected}, found {found or 'nothing'} in {printable(source)}")
    for folder, _ in roots:
        if not _inside(folder, source.resolve()):
            raise DataError(
                f"{printable(folder)} is a link out of the folder of images; give the folder that it leads to"
            )
    return roots


def _split_roots(source: Path) -> list[tuple[Path, str]]:
    """Folders that are named as the parts of a dataset; none if these names are classes."""
    names = sorted(folder.name for folder in source.iterdir() if folder.is_dir() and _unchanged(folder.name))
    parts = {name: SPLITS[name.lower()] for name in names if name.lower() in SPLITS}
    kinds = set(parts.values())
    if kinds == {"train"} and len(names) == 1:
        return [(source / names[0], "")]
    if "train" not in kinds or len(kinds) == 1:
        return []
    if others := [printable(name) for name in names if name not in parts]:
        raise DataError(
            f"expected class folders, or parts such as train and test, found both ({', '.join(parts)}; "
            f"{', '.join(others[:5])}) in {printable(source)}"
        )
    held_out = "test" if "test" in kinds else "val"
    return [(source / name, "test" if kind == held_out else "train") for name, kind in parts.items()]


def _walk(folder: Path) -> Iterator[Path]:
    """The files below a folder, and links to folders, in a fixed order."""

    def stop(error: OSError) -> None:
        raise error

    for where, folders, files in os.walk(folder, onerror=stop):
        folders.sort()
        for name in sorted([*files, *(f for f in folders if os.path.islink(os.path.join(where, f)))]):
            yield Path(where, name)


def printable(path: Path | str) -> str:
    """A path or name, of any bytes, as text that can be shown and stored."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _inside(path: Path, source: Path) -> bool:
    return path.resolve().is_relative_to(source)


def _check_place(path: Path, source: Path) -> None:
    """Raise RefusedError for links out of the source and for what is not a file with content."""
    if path.is_symlink() and not _inside(path, source):
        raise RefusedError("a link out of the folder")
    if path.is_symlink() and path.is_dir():
        raise RefusedError("a link to a folder")
    if not path.is_file():
        raise RefusedError("no regular file")
    if not path.stat().st_size:
        raise RefusedError("empty file")


def stat_of(path: Path) -> tuple[int, ...]:
    """Size in bytes and date of change in nanoseconds of a file; () if there is no file."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_size, found.st_mtime_ns
