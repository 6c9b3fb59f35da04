"""Own images, read without preparation and labelled by their folders or by the predictions of a network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath

import pandas as pd
import torch
from PIL import Image
from torch import Tensor

from kdx.data.batches import in_turns
from kdx.data.dataset import Dataset
from kdx.data.decoding import prepare_image
from kdx.data.folders import WORKERS, Item, RefusedError, list_files, printable
from kdx.data.registry import Card
from kdx.paths import DataError, one_line

SHOWN = 3  # most names in a message
LARGEST = 512  # pixels a side
MOST_GROUPS = 50  # of a column of slices


@dataclass(frozen=True)
class Pictures:
    """The images of a folder.

    Attributes:
        images: uint8 (n, 3, size, size), the middle squares.
        files: Paths of the images inside the folder.
        labels: int64 (n,), by class folder; None for a flat folder.
        classes: Names of the class folders; () for a flat folder.
        refused: The reason for each file that was skipped.
        there: Number of files in the folder, or in its test part, that may be images.
        testing: Whether the folder has a test part; only this part is read then.
    """

    images: Tensor
    files: list[str]
    labels: Tensor | None
    classes: tuple[str, ...]
    refused: dict[str, str]
    there: int
    testing: bool


def read_pictures(folder: Path | str, size: int, limit: int | None = None, seed: int = 0) -> Pictures:
    """Read a folder of images, with a subfolder for each class or flat, and skip what cannot be read.

    Where folders are named train and test, only the test images are read.

    Args:
        folder: The folder of images.
        size: Pixels per side, to which the middle square of every image is resized.
        limit: Largest number of images, with the same number of each class where there are enough; None: all.
        seed: Draws the images.

    Returns:
        The images that can be read, with their labels and the reasons for skipped files.

    Raises:
        ValueError: The limit is smaller than 1.
        DataError: The folder does not exist, or has no image that can be read.
    """
    items, refused = list_files(Path(folder).expanduser())
    if testing := any(item.split == "test" for item in items):
        items = [item for item in items if item.split == "test"]
    classes = tuple(sorted({item.name for item in items if item.name}))
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed)).tolist()
    wanted = len(items) if limit is None else limit
    if wanted < 1 and items:
        raise ValueError(f"limit: expected at least 1, got {limit}")
    images: list[Tensor] = []
    used: list[Item] = []
    with ThreadPoolExecutor(WORKERS) as pool:
        turns = iter(_in_turns([items[row] for row in order]))
        while len(images) < wanted and (block := list(islice(turns, wanted - len(images)))):
            for item, result in zip(block, pool.map(partial(prepare_image, size=size), block), strict=True):
                if isinstance(result, RefusedError):
                    refused[item.file] = str(result)
                else:
                    images.append(torch.from_numpy(result[0]))
                    used.append(item)
    if not images:
        because = "; ".join(f"{file}: {reason}" for file, reason in list(refused.items())[:SHOWN])
        raise DataError(f"no image that can be read in {printable(folder)}{f' ({because})' if because else ''}")
    labels = torch.tensor([classes.index(item.name) for item in used]) if classes else None
    return Pictures(torch.stack(images), [item.file for item in used], labels, classes, refused, len(items), testing)


def common_size(folder: Path | str) -> int | None:
    """The shorter side of the images of a folder, if all that can be opened are of one size of up to ``LARGEST``
    pixels, as those of networks' inputs are; else None."""
    items, _ = list_files(Path(folder).expanduser())
    sizes = set()
    for item in items:
        with suppress(OSError, Image.DecompressionBombError), Image.open(item.path) as picture:
            sizes.add(picture.size)
        if len(sizes) > 1:
            return None
    side = min(next(iter(sizes))) if sizes else LARGEST + 1
    return side if side <= LARGEST else None


def _in_turns(items: Sequence[Item]) -> list[Item]:
    names = sorted({item.name for item in items})
    places = torch.tensor([names.index(item.name) for item in items], dtype=torch.long)
    return [items[row] for row in in_turns(places).tolist()]


def as_dataset(pictures: Pictures, labels: Tensor, classes: Sequence[str]) -> Dataset:
    """Pictures and labels as a dataset, for figures and splits.

    Args:
        pictures: The images.
        labels: int64 (n,) into ``classes``.
        classes: Names of the classes.
    """
    size = pictures.images.shape[-1]
    return Dataset(
        pictures.images, labels, Card("own", "Own images", "Images of a folder.", tuple(classes), (3, size, size))
    )


@dataclass(frozen=True)
class Labels:
    """Labels that are used as the ground truth of pictures.

    Attributes:
        labels: int64 (n,) into ``names``.
        names: Names of the classes that occur.
        outputs: int64 (names,), the output of the networks for each class; None if it is not known.
        given: Whether the labels come from folders; otherwise the student predicts them.
        origin: Where the labels come from, in words.
    """

    labels: Tensor
    names: tuple[str, ...]
    outputs: Tensor | None
    given: bool
    origin: str


def label(pictures: Pictures, probabilities: Tensor, classes: Sequence[str] = ()) -> Labels:
    """Labels of pictures, by their folders, or for a flat folder by the predictions of a network.

    Args:
        pictures: The images.
        probabilities: float (n, outputs) of the student.
        classes: Names of the outputs in order. (): the folders in alphabetical order are the outputs, if their numbers
            agree.

    Returns:
        The labels, with the names of the classes and the output of the networks for each.

    Raises:
        ValueError: The names do not fit the outputs or the folders, or there are fewer than two classes.
    """
    n_outputs, classes = probabilities.shape[1], tuple(classes)
    if not all(isinstance(name, str) for name in classes):
        raise ValueError(f"labels: expected names as text, got {list(classes)}; put them in quotes")
    if classes and (len(classes) != n_outputs or len(set(classes)) < n_outputs):
        raise ValueError(f"labels: expected a name for each of {n_outputs} outputs, got {len(set(classes))} names")
    if pictures.labels is None:
        present, labels = probabilities.argmax(1).unique(return_inverse=True)
        names = tuple(classes[i] if classes else f"output {i}" for i in present.tolist())
        if len(names) < 2:
            raise ValueError(
                f"the student predicts {names[0]} for all {len(labels)} images of the flat folder, but at least two "
                "classes are needed; give other images, or put them into folders by class"
            )
        return Labels(labels, names, present, False, "the classes that the student predicts: the folder has none")
    names = pictures.classes
    if len(names) < 2:
        raise ValueError(
            f"expected images of at least two classes, got only {names[0]!r}; add a class, or give a flat folder"
        )
    if unknown := [name for name in names if classes and name not in classes]:
        raise ValueError(f"labels: no name for the folders {', '.join(unknown[:SHOWN])} among {', '.join(classes)}")
    if classes:
        outputs, origin = torch.tensor([classes.index(name) for name in names]), "the folders, by name"
    elif len(names) == n_outputs:
        outputs, origin = torch.arange(n_outputs), "the folders, in alphabetical order"
    else:
        outputs = None
        origin = f"the folders; the matching ones of the {n_outputs} outputs are not known (labels)"
    assert pictures.labels is not None
    return Labels(pictures.labels, names, outputs, True, origin)


def read_slices(path: str | Path, files: Sequence[str]) -> pd.DataFrame:
    """Columns of a CSV file for images, one row per image; empty where the file does not list an image.

    Args:
        path: With a column ``file`` (as in the folder of images, or the name alone) and others.
        files: Of the images.

    Raises:
        ValueError: No such file, no column ``file`` or no other, an image listed twice or by a name that several have,
            no image listed, or a column of more than ``MOST_GROUPS`` values.
    """
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, na_values=[""], encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise ValueError(f"slices: expected a CSV file with a column file, got {path} ({one_line(error)})") from error
    if "file" not in table or len(table.columns) < 2:
        raise ValueError(f"slices: expected a column file and others in {path}, got {', '.join(table.columns)}")
    table = table.dropna(subset="file")
    table.index = pd.Index([PurePosixPath(name.replace("\\", "/")).as_posix() for name in table.pop("file")])
    if twice := table.index[table.index.duplicated()].tolist():
        raise ValueError(f"slices: {twice[0]} is listed twice in {path}")
    names = [file if file in table.index else PurePosixPath(file).name for file in files]
    if several := [name for name, count in Counter(names).items() if count > 1 and name in table.index]:
        raise ValueError(f"slices: {several[0]} in {path} is the name of several images; give it with its folder")
    found = table.reindex(names).reset_index(drop=True)
    if not any(name in table.index for name in names):
        raise ValueError(f"slices: {path} lists none of the images, such as {files[0]}")
    if many := [column for column in found if found[column].nunique() > MOST_GROUPS]:
        raise ValueError(
            f"slices: {many[0]} has {found[many[0]].nunique()} values, but groups of images are expected, at most "
            f"{MOST_GROUPS}; bin its values"
        )
    return found


def read_labels(path: str | Path) -> list[str]:
    """Names of the outputs in order, from the lines of a text file.

    Raises:
        ValueError: No such file, or no lines.
    """
    try:
        names = [line.strip() for line in Path(path).read_text("utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"labels: expected a text file with a name in each line, got {path} ({one_line(error)})"
        ) from error
    if not names:
        raise ValueError(f"labels: {path} is empty; expected a name in each line")
    return names
