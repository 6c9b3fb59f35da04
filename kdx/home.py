"""Where files are: the home of all that kdx writes, and further places that hold raw data."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


class DataError(RuntimeError):
    """The data could not be had, or are not what they should be."""


def data_home() -> Path:
    """Folder of ``raw/`` (downloads), ``prepared/`` (decoded images) and ``runs/`` (trained models).

    ``$KDX_HOME`` if set, else ``data/`` of the checkout kdx runs from, else ``~/.cache/kdx``.
    """
    if home := os.environ.get("KDX_HOME"):
        return Path(home).expanduser().absolute()
    checkout = Path(__file__).resolve().parent.parent
    if (checkout / "pyproject.toml").is_file():
        return checkout / "data"
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
