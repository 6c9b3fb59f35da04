"""A folder of images as it is: read, and labelled by its subfolders or by what a network predicts."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from kdx.data.batches import in_turns
from kdx.data.dataset import Dataset
from kdx.data.decoding import prepare_image
from kdx.data.folders import WORKERS, Item, RefusedError, list_files, printable
from kdx.data.registry import Card
from kdx.paths import DataError

SHOWN = 3  # names in a message


@dataclass(frozen=True)
class Pictures:
    """The images of a folder.

    Attributes:
        images: uint8 (n, 3, size, size), the middle squares.
        files: Their paths inside the folder.
        labels: int64 (n,) by the folders of classes; None for a flat folder.
        classes: Names of those folders; () for a flat one.
        refused: File -> why it was skipped.
        there: Files in the folder that may be images, of those for testing where it says so.
        testing: Whether the folder has a part for testing, which alone is read.
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

    Args:
        size: Pixels a side, to which the middle square of every image is resized.
        limit: Most images, drawn by ``seed``: as many of each class, as far as there are; None: all. Where folders are
            named train and test, those for testing are read.

    Raises:
        DataError: No such folder, or no image in it that can be read.
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


def _in_turns(items: Sequence[Item]) -> list[Item]:
    names = sorted({item.name for item in items})
    places = torch.tensor([names.index(item.name) for item in items], dtype=torch.long)
    return [items[row] for row in in_turns(places).tolist()]


def as_dataset(pictures: Pictures, labels: Tensor, classes: Sequence[str]) -> Dataset:
    """Pictures with labels, as what figures and splits take."""
    size = pictures.images.shape[-1]
    return Dataset(
        pictures.images, labels, Card("own", "Own images", "Images of a folder.", tuple(classes), (3, size, size))
    )


@dataclass(frozen=True)
class Labels:
    """What stands for the truth about pictures.

    Attributes:
        labels: int64 (n,) into ``names``.
        names: Of the classes that there are.
        outputs: int64 (names,): the networks' output for each of them; None if that is not known.
        given: Whether they come from folders, and not from the student's answers.
        origin: The same in words.
    """

    labels: Tensor
    names: tuple[str, ...]
    outputs: Tensor | None
    given: bool
    origin: str


def label(pictures: Pictures, probabilities: Tensor, classes: Sequence[str] = ()) -> Labels:
    """Labels of pictures: of their folders, or, of a flat folder, the classes that a network predicts.

    Args:
        probabilities: (n, outputs) of the student.
        classes: Names of the outputs in order; (): folders stand for the outputs in alphabetical order if there are as
            many of them.

    Raises:
        ValueError: Names that do not fit, or fewer than two classes.
    """
    n_outputs, classes = probabilities.shape[1], tuple(classes)
    if not all(isinstance(name, str) for name in classes):
        raise ValueError(f"classes: expected names, got {list(classes)}; put them in quotes")
    if classes and (len(classes) != n_outputs or len(set(classes)) < n_outputs):
        raise ValueError(f"classes: expected a name for each of {n_outputs} outputs, got {len(set(classes))} names")
    if pictures.labels is None:
        present, labels = probabilities.argmax(1).unique(return_inverse=True)
        names = tuple(classes[i] if classes else f"output {i}" for i in present.tolist())
        if len(names) < 2:
            raise ValueError(
                f"the student predicts {names[0]} for all {len(labels)} images of the flat folder, and features can "
                "relate to classes only where there are two; give other images, or put them into folders by class"
            )
        return Labels(labels, names, present, False, "the classes that the student predicts: the folder has none")
    names = pictures.classes
    if len(names) < 2:
        raise ValueError(f"expected images of at least two classes, got {names[0]} alone; or give a flat folder")
    if unknown := [name for name in names if classes and name not in classes]:
        raise ValueError(f"folders {', '.join(unknown[:SHOWN])} are not among classes: {', '.join(classes)}")
    if classes:
        outputs, origin = torch.tensor([classes.index(name) for name in names]), "the folders, by name"
    elif len(names) == n_outputs:
        outputs, origin = torch.arange(n_outputs), "the folders, in alphabetical order"
    else:
        outputs = None
        origin = f"the folders; which of the {n_outputs} outputs they stand for is not known (parameter classes)"
    assert pictures.labels is not None
    return Labels(pictures.labels, names, outputs, True, origin)
