"""Where files are: the home of all that kdx writes, and further places that hold raw data."""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]  # where kdx runs from, if it was not installed without one


class DataError(RuntimeError):
    """The data could not be had, or are not what they should be."""


def data_home() -> Path:
    """Folder of ``raw/`` (downloads), ``prepared/`` (decoded images) and ``runs/`` (trained models).

    ``$KDX_HOME`` if set, else ``data/`` of the checkout kdx runs from, else ``~/.cache/kdx``.
    """
    if home := os.environ.get("KDX_HOME"):
        return Path(home).expanduser().absolute()
    if (CHECKOUT / "pyproject.toml").is_file():
        return CHECKOUT / "data"
    return Path.home() / ".cache" / "kdx"


def places() -> list[Path]:
    """Where raw data may lie, one folder a dataset: ``raw/``, then the folders that ``$KDX_DATA``
    lists (separated as in ``$PATH``), which are only read."""
    further = [part for part in os.environ.get("KDX_DATA", "").split(os.pathsep) if part]
    return [data_home() / "raw", *(Path(part).expanduser().absolute() for part in further)]


def check_space(what: str, needed: int, folder: Path) -> None:
    """Raise DataError if the disk of ``folder`` has fewer than ``needed`` bytes free."""
    if (free := shutil.disk_usage(folder).free) < needed:
        raise DataError(
            f"{what}: needs {needed / 1e6:,.0f} MB free in {folder}, found {free / 1e6:,.0f} MB; free some space or "
            "point KDX_HOME at another disk"
        )


def one_line(error: Exception) -> str:
    """An error's message in one line of up to 200 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A scratch folder that takes the place of the folder ``path`` when the block ends without an error.

    So a folder that is found under its name is complete. After an error nothing is left. If another process has
    written ``path`` meanwhile, its folder stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".partial-{path.name}-{uuid.uuid4().hex[:8]}")
    scratch.mkdir()
    try:
        yield scratch
        try:
            os.replace(scratch, path)
        except OSError:
            if not path.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def sha256_of(path: Path) -> str:
    """SHA-256 (hex) of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
