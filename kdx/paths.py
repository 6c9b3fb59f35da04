"""Where files are: the folder of everything that kdx writes, and further folders with raw data."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

CHECKOUT = Path(__file__).resolve().parents[1]  # where kdx runs from, if it was not installed without one
PARTIAL = ".partial-"  # begins the names of scratch folders
OLD = 24 * 3600  # seconds after which a scratch folder without an owner is swept away


class DataError(RuntimeError):
    """The data are not available, or are not what they should be."""


def data_home() -> Path:
    """The folder of ``raw/`` (downloads), ``prepared/`` (decoded images) and ``runs/`` (trained models).

    Returns:
        ``$KDX_HOME`` if it is set, else ``data/`` of the checkout that kdx runs from, else ``~/.cache/kdx``.
    """
    if home := os.environ.get("KDX_HOME"):
        return Path(home).expanduser().absolute()
    if (CHECKOUT / "pyproject.toml").is_file():
        return CHECKOUT / "data"
    return Path.home() / ".cache" / "kdx"


def networks_home() -> Path:
    """The folder of the shipped networks.

    Returns:
        ``$KDX_NETWORKS`` if it is set, else ``data/networks`` of the checkout.
    """
    if home := os.environ.get("KDX_NETWORKS"):
        return Path(home).expanduser().absolute()
    return CHECKOUT / "data" / "networks"


def places() -> list[Path]:
    """Folders that may hold raw data, with a subfolder for each dataset.

    Returns:
        ``raw/``, then the folders that ``$KDX_DATA`` lists (separated as in ``$PATH``), which are only read.
    """
    further = [part for part in os.environ.get("KDX_DATA", "").split(os.pathsep) if part]
    return [data_home() / "raw", *(Path(part).expanduser().absolute() for part in further)]


def check_space(what: str, needed: int, folder: Path) -> None:
    """Check that a disk has enough free space.

    Args:
        what: The start of the error message, such as the name of a dataset.
        needed: The space needed, in bytes.
        folder: A folder on the disk.

    Raises:
        DataError: The disk has less free space than needed.
    """
    if (free := shutil.disk_usage(folder).free) < needed:
        raise DataError(
            f"{what}: needs {needed / 1e6:,.0f} MB free in {folder}, found {free / 1e6:,.0f} MB; free some space or "
            "point KDX_HOME at another disk"
        )


def one_line(error: Exception) -> str:
    """The message of an error in one line of at most 200 characters; its type if it has no message."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


@contextmanager
def written_whole(path: Path, new: bool = False) -> Iterator[Path]:
    """A scratch folder that becomes the folder ``path`` when the block ends without an error.

    A folder under its final name is therefore always complete. After an error nothing is left. If another process has
    written ``path`` in the meantime, that folder stays and the scratch folder is deleted. What killed processes have
    left beside ``path`` is swept away.

    Args:
        path: The folder to write. Its parents are created; it must not exist as a file.
        new: What another process has written in the meantime is an error instead, as for :func:`check_new`.

    Yields:
        The scratch folder, empty, beside ``path``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent)
    scratch = path.with_name(f"{PARTIAL}{path.name}-{uuid.uuid4().hex[:8]}")
    owned = FileLock(_owner(scratch))
    with owned:
        scratch.mkdir()
        try:
            yield scratch
            try:
                os.replace(scratch, path)
            except OSError:
                if new:
                    check_new(path)
                if not path.is_dir():
                    raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
            _owner(scratch).unlink(missing_ok=True)


def sweep(folder: Path) -> list[Path]:
    """Delete the scratch folders in a folder that are older than a day and owned by no living process; return them."""
    swept = []
    for scratch in folder.glob(f"{PARTIAL}*"):
        with suppress(FileNotFoundError, Timeout):  # its owner lives, or has just finished it
            if scratch.is_dir() and time.time() - scratch.stat().st_mtime > OLD:
                with FileLock(_owner(scratch), timeout=0):
                    shutil.rmtree(scratch, ignore_errors=True)
                    _owner(scratch).unlink(missing_ok=True)
                swept.append(scratch)
    return swept


def _owner(scratch: Path) -> Path:
    """The file that the process that fills a scratch folder has locked; the lock ends with the process."""
    return scratch.with_name(f"{scratch.name}.lock")


def alone(what: str) -> FileLock:
    """A lock that one process at a time holds, so that two that need the same thing do not both make it.

    Args:
        what: A key of a run, or of answers.
    """
    folder = data_home() / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / f"{what}.lock")


def check_new(folder: Path) -> None:
    """Raise ValueError if a folder to write is there already and not empty, or is a file."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there already; expected a new folder, so give another one or delete it")


def sha256_of(path: Path) -> str:
    """SHA-256 (hex) of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
