"""Stored results: tables in ``data/results`` that take too long for a page, each with its provenance."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pandas as pd

from kdx.distil.run_store import shipped_table, versions
from kdx.distil.shipped import commit
from kdx.paths import CHECKOUT
from kdx.version import __version__


def store(name: str, table: pd.DataFrame, command: str, seconds: float, networks: pd.DataFrame | None = None) -> None:
    """Write ``data/results/NAME.csv`` and, beside it, where it comes from.

    Args:
        name: Without an ending.
        table: The results.
        command: The command that made them.
        seconds: How long it took.
        networks: Rows of ``shipped_table`` that the results hold for. :func:`load` refuses the results once the table
            has another one of these networks; one that is no longer in the table is not checked.
    """
    path = _path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".json")
    facts = {"command": command, "date": time.strftime("%Y-%m-%d"), "seconds": round(seconds), "commit": commit()}
    if networks is not None:
        facts["networks"] = dict(zip(networks["file"], networks["sha256"], strict=True))
    text = json.dumps(facts | {"kdx": __version__} | versions(), indent=2) + "\n"
    for target, content in ((path, table.to_csv(index=False)), (beside, text)):
        scratch = target.with_suffix(".partial")
        scratch.write_text(content)
        os.replace(scratch, target)


def load(name: str) -> tuple[pd.DataFrame, dict[str, Any]]:
    """A stored table and its provenance: command, date, seconds, commit, versions.

    Raises:
        ValueError: There is no such table, or a network that it holds for was trained anew.
    """
    path = _path(name)
    if not path.is_file():
        known = ", ".join(sorted(found.stem for found in path.parent.glob("*.csv"))) or "none"
        raise ValueError(f"no stored results {name!r} in {path.parent}; choose from: {known}")
    facts = json.loads(path.with_suffix(".json").read_text())
    now = shipped_table().set_index("file")["sha256"].to_dict()
    if changed := [file for file, sha256 in facts.get("networks", {}).items() if now.get(file, sha256) != sha256]:
        raise ValueError(
            f"the stored results {name!r} are of other networks than those that are shipped: {', '.join(changed)}; "
            f"run `{facts['command']}` again"
        )
    return pd.read_csv(path), facts


def origin(name: str) -> str:
    """One sentence that says where a stored table comes from."""
    _, facts = load(name)
    at, changed = facts["commit"].removesuffix("+"), facts["commit"].endswith("+")
    took = f"{facts['seconds']} seconds" if facts["seconds"] < 90 else f"{facts['seconds'] / 60:.0f} minutes"
    return (
        f"Stored results of {facts['date']}, from `{facts['command']}` at commit {at}{' with changes' * changed} "
        f"({took}, torch {facts['torch']})."
    )


def _path(name: str) -> Path:
    return CHECKOUT / "data" / "results" / f"{name}.csv"
