"""Stored results: tables in ``data/results`` that take too long for a page, each with its provenance."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pandas as pd

from kdx.distil.run_store import versions
from kdx.distil.shipped import commit
from kdx.paths import CHECKOUT
from kdx.version import __version__


def store(name: str, table: pd.DataFrame, command: str, seconds: float) -> None:
    """Write ``data/results/NAME.csv`` and, beside it, where it comes from.

    Args:
        name: Without an ending.
        table: The results.
        command: The command that made them.
        seconds: How long it took.
    """
    path = _path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".json")
    facts = {"command": command, "date": time.strftime("%Y-%m-%d"), "seconds": round(seconds), "commit": commit()}
    text = json.dumps(facts | {"kdx": __version__} | versions(), indent=2) + "\n"
    for target, content in ((path, table.to_csv(index=False)), (beside, text)):
        scratch = target.with_suffix(".partial")
        scratch.write_text(content)
        os.replace(scratch, target)


def load(name: str) -> tuple[pd.DataFrame, dict[str, Any]]:
    """A stored table and its provenance: command, date, seconds, commit, versions.

    Raises:
        ValueError: There is no such table.
    """
    path = _path(name)
    if not path.is_file():
        known = ", ".join(sorted(found.stem for found in path.parent.glob("*.csv"))) or "none"
        raise ValueError(f"no stored results {name!r} in {path.parent}; choose from: {known}")
    return pd.read_csv(path), json.loads(path.with_suffix(".json").read_text())


def origin(name: str) -> str:
    """One sentence that says where a stored table comes from."""
    _, facts = load(name)
    return (
        f"Stored results of {facts['date']}, from `{facts['command']}` at commit {facts['commit']} "
        f"({facts['seconds'] / 60:.0f} minutes, torch {facts['torch']})."
    )


def _path(name: str) -> Path:
    return CHECKOUT / "data" / "results" / f"{name}.csv"
