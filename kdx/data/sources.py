"""Sources of the files of a dataset: folders on this machine, an own archive or folder, verified downloads.

A download is unpacked in a scratch folder, checked, and only then moved to its final place, so an interrupted or
corrupt download is never used as the data.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from kdx.data import folders
from kdx.data.download import unpack
from kdx.data.registry import Card, find_card
from kdx.paths import DataError, check_space, data_home, one_line, places

log = logging.getLogger(__name__)


def fingerprint(images: Tensor, labels: Tensor) -> str:
    """Checksum of a split.

    Args:
        images: uint8 (n, c, h, w).
        labels: int64 (n,).

    Returns:
        SHA-256 (hex) of the pixels in this order, followed by the labels: as one byte each where all are 0 to 255, else
        as eight.
    """
    digest = hashlib.sha256(np.ascontiguousarray(images.numpy()).data)
    small = not len(labels) or (labels.min() >= 0 and labels.max() < 256)
    digest.update(labels.to(torch.uint8 if small else torch.int64).numpy().data)
    return digest.hexdigest()


def find_source(card: Card) -> Path | None:
    """The folder with the files of a dataset that comes as folders, from the first of ``places()`` that has it."""
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


def how_to_get(card: Card) -> str:
    """What to do about a dataset that is not on this machine."""
    return (
        f"get it with `kdx data get {card.name}` ({card.download_bytes / 1e6:.0f} MB), prepare a folder or an archive "
        f"that you have with `kdx data prepare {card.name} --from PATH`, or name the folder above it in KDX_DATA"
    )


def adopt(name: str, origin: Path) -> Path:
    """Use an own folder (through a link) or archive (unpacked) as the source of a registered dataset.

    Args:
        name: A name from ``DATASETS``.
        origin: The path of the folder or archive.

    Returns:
        The folder or link of the dataset in ``raw/``.

    Raises:
        ValueError: The dataset is not registered, or does not come as folders.
        DataError: There is nothing at ``origin``, it is not laid out as the dataset, or ``raw/`` holds the dataset
            already.
    """
    card = find_card(name)
    if card.layout is None or card.source:
        raise ValueError(f"{name}: only registered datasets of images in folders can use an own folder or archive")
    layout = card.layout

    def checked(place: Path) -> Path:
        folders.scan(place, layout)  # is it laid out as the dataset?
        return place

    return place_copy(name, origin, checked)


def place_copy(name: str, origin: Path, find: Callable[[Path], Path]) -> Path:
    """Put an own folder (through a link) or archive (unpacked) into ``raw/`` under a name.

    Args:
        name: Of the folder or link.
        origin: The path of the folder or archive.
        find: Checks a folder, and returns the one to use, itself or one inside.

    Returns:
        The folder or link.

    Raises:
        DataError: There is nothing at ``origin``, ``find`` refuses it, or ``raw/`` has the name already.
    """
    folder = data_home() / "raw" / name
    if folder.is_dir() and not folder.is_symlink():
        raise DataError(f"{folder} is there already; leave out --from to use it, or delete it to use another source")
    origin = origin.expanduser().absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".partial-{name}-", dir=folder.parent) as scratch:
        place = Path(scratch) / name
        if origin.is_dir():
            place.symlink_to(find(origin.resolve()), target_is_directory=True)
        elif origin.is_file():
            unpack(origin, place)
            place = find(place)
        else:
            raise DataError(f"expected a folder or an archive, found nothing at {origin}")
        if folder.is_symlink():
            folder.unlink()
        os.replace(place, folder)
    return folder


def fetch(name: str) -> Path:
    """Make sure that the verified files of a dataset are on this machine.

    They are searched in ``places()``; then the sources on the card are tried in order, and each failure is logged in
    one line.

    Args:
        name: A name from ``DATASETS``, or the path of a folder.

    Returns:
        The folder of the files.

    Raises:
        DataError: No source has the files that the card describes, or the disk is full.
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
    if folder.is_symlink() or folder.exists():
        refusal = _refusal(card, folder)
        if refusal is None:  # another process has fetched it in the meantime
            return folder
        aside = Path(tempfile.mkdtemp(prefix=f"{name}.refused-", dir=raw))
        os.replace(folder, aside / name)
        log.warning("%s: %s; moved to %s, fetching it again", name, refusal, aside.name)
    check_space(name, 3 * card.download_bytes, raw)  # archive, files, and room to move
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
