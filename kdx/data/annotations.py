"""Boxes of objects in images: annotations in the layouts of Pascal VOC and of COCO, read and checked one by one."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from kdx.data.folders import SPLITS, printable
from kdx.paths import DataError, one_line

MOST_BYTES = 500_000_000  # of an annotation file
DIGITS = 19  # a longer whole number counts as infinite
SIDES = ("xmin", "ymin", "xmax", "ymax")
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp")
Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels


@dataclass(frozen=True)
class Annotated:
    """An image file and what is marked in it.

    Attributes:
        path: Of the image.
        file: Its name inside of the folder, as printable text.
        split: ``"train"`` or ``"test"``; empty if the folder does not say.
        size: Width and height in pixels, of which the boxes tell.
        objects: Class and box of each.
        difficult: The same, of objects that VOC calls so.
        crowds: The same, of areas of COCO with many objects that are not marked one by one.
    """

    path: Path
    file: str
    split: str
    size: tuple[int, int]
    objects: tuple[tuple[str, Box], ...]
    difficult: tuple[tuple[str, Box], ...] = ()
    crowds: tuple[tuple[str, Box], ...] = ()


def read_annotations(folder: Path, classes: Sequence[str] = ()) -> tuple[list[Annotated], dict[str, str]]:
    """Images with their boxes, from a folder in the layout of VOC or COCO.

    VOC: ``Annotations/*.xml`` and ``JPEGImages/``, perhaps ``ImageSets/Main/{train,valid,trainval,test}.txt``.
    COCO: ``annotations/instances_<split>*.json`` and ``<split>*/``, or ``<split>/_annotations.coco.json`` beside the
    images. Where there is no test split, that of validation takes its place.

    Args:
        folder: The folder, or one that holds it alone.
        classes: Names that are known; () takes all that occur.

    Returns:
        The images, sorted, and a dict from each refused annotation (file and object) to the reason.

    Raises:
        DataError: The folder is in neither layout, or a file of annotations cannot be read at all.
    """
    folder = find_annotated(folder)
    read = _voc if (folder / "Annotations").is_dir() else _coco
    refused: dict[str, str] = {}
    found: dict[Path, Annotated] = {}
    for one in read(folder, classes, refused):
        if (place := one.path.resolve()) in found:
            refused[f"{one.file}, again"] = "an earlier entry is of the same file; that one is kept"
        else:
            found[place] = one
    return sorted(found.values(), key=lambda one: one.file), refused


def find_annotated(folder: Path) -> Path:
    """The folder itself, or the one inside that is laid out as VOC or COCO.

    Raises:
        DataError: There is none.
    """
    if folder.is_dir():
        for place in (folder, *sorted(f for f in folder.glob("*") if f.is_dir()), *sorted(folder.glob("*/*/"))):
            if (place / "Annotations").is_dir() or _coco_files(place):
                return place
    raise DataError(
        f"expected annotations of VOC (Annotations/*.xml, JPEGImages/) or COCO (annotations/instances_train.json, "
        f"train/), found neither in {printable(folder)}"
    )


# --- VOC -----------------------------------------------------------------------------------------------


def _voc(folder: Path, classes: Sequence[str], refused: dict[str, str]) -> Iterator[Annotated]:
    split_of = _image_sets(folder / "ImageSets" / "Main")
    for path in sorted((folder / "Annotations").glob("*.xml")):
        file = f"Annotations/{printable(path.name)}"
        try:
            root = _xml(path)
            size = (_number(root.findtext("size/width")), _number(root.findtext("size/height")))
            if not all(side >= 1 and side.is_integer() for side in size):
                raise ValueError(f"expected a size in whole pixels, got {size}")
            image = _image(folder / "JPEGImages", root.findtext("filename") or "", path.stem)
        except ValueError as reason:
            refused[file] = one_line(reason)
            continue
        width, height = map(int, size)
        objects: list[tuple[str, Box]] = []
        difficult: list[tuple[str, Box]] = []
        for i, thing in enumerate(root.iter("object"), 1):
            try:
                corners = [_number(thing.findtext(f"bndbox/{side}")) for side in SIDES]
                kind = difficult if _flag(thing.findtext("difficult"), "difficult") else objects
                kind.append(_checked((thing.findtext("name") or "").strip(), corners, (width, height), classes))
            except ValueError as reason:
                refused[f"{file}, object {i}"] = one_line(reason)
        if split_of and path.stem not in split_of:
            refused[file] = "in no list of ImageSets/Main"
            continue
        split = split_of.get(path.stem, "")
        file = printable(image.relative_to(folder))
        yield Annotated(image, file, split, (width, height), tuple(objects), tuple(difficult))
    for stem in sorted(split_of.keys() - {path.stem for path in (folder / "Annotations").glob("*.xml")}):
        refused[f"ImageSets/Main, {printable(stem)}"] = "in a list, without a file in Annotations"


def _xml(path: Path) -> ElementTree.Element:
    if not path.is_file() or path.stat().st_size > MOST_BYTES:
        raise ValueError(f"expected a file of at most {MOST_BYTES:,} bytes")
    text = path.read_bytes()
    if b"<!DOCTYPE" in text or b"<!ENTITY" in text or b"\0" in text:  # UTF-16 would hide both
        raise ValueError("declares a document type or entities, which annotations have no need of, or is not UTF-8")
    try:
        return ElementTree.fromstring(text)
    except (ElementTree.ParseError, LookupError, ValueError) as error:  # the last two: an unknown encoding
        raise ValueError(f"not XML: {error}") from error


def _image(folder: Path, name: str, stem: str) -> Path:
    """The image that an annotation names, or else the one of the annotation's own name."""
    for candidate in (name, *(stem + suffix for suffix in SUFFIXES)):
        path = folder / candidate
        try:
            if candidate and _within(path, folder) and path.is_file():
                return path
        except OSError as error:  # such as a name that is too long
            raise ValueError(f"no image {printable(name or stem):.40}: {error.strerror}") from error
    raise ValueError(f"no image {printable(name or stem)} in {folder.name}")


def _within(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def _image_sets(folder: Path) -> dict[str, str]:
    """File stem -> train or test; {} where there are no lists."""
    stems: dict[str, list[str]] = {}
    for path in sorted(folder.glob("*.txt")):
        if part := (SPLITS | {"trainval": "trainval"}).get(path.stem.lower()):
            stems.setdefault(part, []).extend(line.split()[0] for line in _text(path).split("\n") if line.strip())
    held_out = next((name for name in ("test", "val") if stems.get(name)), "")
    learnt = [name for name in ("train", "trainval", "val") if name in stems and name != held_out]
    if held_out == "val":
        learnt = [name for name in learnt if name != "trainval"]
    found = {stem: "train" for name in learnt for stem in stems[name]}
    return found | dict.fromkeys(stems.get(held_out, []), "test")


def _text(path: Path) -> str:
    """The text of a file; what is not UTF-8 in it cannot spoil the rest."""
    return path.read_bytes().decode("utf-8-sig", errors="replace")


# --- COCO ----------------------------------------------------------------------------------------------


def _coco_files(folder: Path) -> dict[Path, tuple[Path, str]]:
    """Annotation file -> folder of its images, and its split."""
    found: dict[Path, tuple[Path, str]] = {}
    for path in sorted(folder.glob("annotations/instances_*.json")):
        part = path.stem.removeprefix("instances_")
        if split := SPLITS.get(re.sub(r"\d+$", "", part).lower()):
            places = [folder / part, folder / "images" / part, folder / "images", folder]
            found[path] = next(place for place in places if place.is_dir()), split
    for path in sorted(folder.glob("*/_annotations.coco.json")):
        if split := SPLITS.get(path.parent.name.lower()):
            found[path] = path.parent, split
    held_out = "test" if any(split == "test" for _, split in found.values()) else "val"
    return {path: (place, "test" if split == held_out else "train") for path, (place, split) in found.items()}


def _coco(folder: Path, classes: Sequence[str], refused: dict[str, str]) -> Iterator[Annotated]:
    for path, (place, split) in _coco_files(folder).items():
        content, file = _json(path), printable(path.relative_to(folder))
        names: dict[int | str, str] = {}
        objects: dict[int | str, list[tuple[str, Box]]] = {}
        crowds: dict[int | str, list[tuple[str, Box]]] = {}
        sizes: dict[int | str, tuple[int, int]] = {}
        images: dict[int | str, Path] = {}
        for entry in content["categories"]:
            with _refusing(refused, f"{file}, category", entry):
                if not isinstance(name := entry.get("name"), str):
                    raise ValueError(f"expected a name, got {name!r}")
                names[_new_id(entry, names)] = printable(name)
        for entry in content["images"]:
            with _refusing(refused, f"{file}, image", entry):
                key, size = _new_id(entry, images), (_number(entry.get("width")), _number(entry.get("height")))
                if not all(side >= 1 and side.is_integer() for side in size):
                    raise ValueError(f"expected a size in whole pixels, got {size}")
                images[key] = _image(place, str(entry.get("file_name")), "")
                sizes[key], objects[key], crowds[key] = (int(size[0]), int(size[1])), [], []
        for entry in content["annotations"]:
            with _refusing(refused, f"{file}, annotation", entry):
                if (key := _id(entry.get("image_id"))) not in images:
                    raise ValueError(f"of an image that is not there ({key!r})")
                box = entry.get("bbox")
                if not isinstance(box, list) or len(box) != 4:
                    raise ValueError(f"expected a bbox of left, top, width, height, got {box!r}")
                left, top, width, height = map(_number, box)
                name = names.get(_id(entry.get("category_id")), "")
                of = (crowds if _flag(entry.get("iscrowd"), "iscrowd") else objects)[key]
                of.append(_checked(name, [left, top, left + width, top + height], sizes[key], classes))
        for key, image in images.items():
            name = printable(image.relative_to(folder))
            yield Annotated(image, name, split, sizes[key], tuple(objects[key]), crowds=tuple(crowds[key]))


@contextmanager
def _refusing(refused: dict[str, str], what: str, entry: Mapping[str, Any]) -> Iterator[None]:
    """Write down why an entry is refused, so that the others can be read."""
    try:
        yield
    except ValueError as reason:
        refused[f"{what} {repr(entry.get('id'))[:40]}"] = one_line(reason)


def _id(value: Any) -> int | str:
    if not isinstance(value, int | str) or isinstance(value, bool):
        raise ValueError(f"expected an id that is a whole number or text, got {value!r}")
    return value


def _new_id(entry: Mapping[str, Any], known: Collection[int | str]) -> int | str:
    if (found := _id(entry.get("id"))) in known:
        raise ValueError(f"expected an id of its own, got {found!r} once more")
    return found


def _json(path: Path) -> Mapping[str, list[Mapping[str, Any]]]:
    if path.stat().st_size > MOST_BYTES:
        raise DataError(f"{path}: expected annotations of at most {MOST_BYTES:,} bytes")
    try:
        content = json.loads(_text(path), parse_int=lambda digits: int(digits) if len(digits) < DIGITS else math.inf)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({one_line(error)})") from error
    for part in ("images", "annotations", "categories"):
        entries = content.get(part) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise DataError(f"{path}: expected COCO's lists images, annotations and categories, found no {part}")
    return content


# --- one object ----------------------------------------------------------------------------------------


def _number(value: Any) -> float:
    try:
        number = math.nan if value is None or isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"expected a finite number, got {value!r}")
    return number


def _flag(value: Any, what: str) -> bool:
    """A mark that an object may have: 0, 1 or nothing, as numbers or text."""
    text = str(value).strip().lower()
    if value is None or text in ("", "0", "0.0", "false", "unspecified"):
        return False
    if text not in ("1", "1.0", "true"):
        raise ValueError(f"expected {what} to be 0 or 1, got {value!r:.40}")
    return True


def _checked(name: str, corners: Sequence[float], size: tuple[int, int], classes: Sequence[str]) -> tuple[str, Box]:
    """Class and box, if the class is known and the box lies in the image and has an area."""
    left, top, right, bottom = corners
    if not name or (classes and name not in classes):
        raise ValueError(f"unknown class {name!r}; expected one of {', '.join(classes) or 'the categories'}")
    if right < left or bottom < top:
        raise ValueError(f"a box with swapped corners: {[*corners]}")
    if right == left or bottom == top:
        raise ValueError(f"a box without area: {[*corners]}")
    if left < 0 or top < 0 or right > size[0] or bottom > size[1]:
        raise ValueError(f"a box that is not inside of {size[0]} x {size[1]} pixels: {[*corners]}")
    return name, (left, top, right, bottom)
