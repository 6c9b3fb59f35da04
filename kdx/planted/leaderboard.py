"""The leaderboard: results of the benchmark as JSON files in ``data/leaderboard``, and ranks among them."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kdx.distil.run_store import shipped_table, versions
from kdx.paths import CHECKOUT, check_new
from kdx.planted import suite
from kdx.version import __version__

SCHEMA = 1
DIGITS = 4  # of a score; ranks do not depend on smaller differences, which machines have


def schema() -> dict[str, Any]:
    """The JSON schema of a result."""
    return json.loads((files("kdx.planted") / "benchmark.schema.json").read_text())


def result(table: pd.DataFrame, call: str) -> dict[str, Any]:
    """A result as JSON, as ``kdx/planted/benchmark.schema.json`` describes it.

    Args:
        table: From :func:`kdx.benchmark`.
        call: ``module:function``, or the name of an explainer that kdx has.
    """
    rows = table.drop(columns=["rank", "of"]).to_dict("records")
    return {
        "schema": SCHEMA,
        "name": table.attrs["name"],
        "call": call,
        "given": table.attrs["given"],
        "seconds": table.attrs["seconds"],
        "networks": networks_digest(),
        "date": time.strftime("%Y-%m-%d"),
        "versions": {"kdx": __version__} | versions(),
        "scores": [{name: None if value != value else value for name, value in row.items()} for row in rows],
    }


def networks_digest(case: str = "", fold: int = 0) -> str:
    """Identifies the planted networks, all or those of one repetition: results with other ones cannot be compared."""
    table = shipped_table()
    table = table[table["dataset"] == "planted"]
    if case:
        table = table[table["role"].isin(suite.roles(case, fold)) & (table["fold"] == fold)]
    return hashlib.sha256("".join(sorted(table["sha256"])).encode()).hexdigest()[:16]


def write(found: dict[str, Any], path: Path) -> None:
    """Write a result; an existing file is an error."""
    check_new(path)
    scratch = path.with_suffix(".partial")
    scratch.write_text(json.dumps(found, indent=1) + "\n")
    os.replace(scratch, path)


def home() -> Path:
    """The folder of the results that come with the checkout."""
    return CHECKOUT / "data" / "leaderboard"


def slug(name: str) -> str:
    """The name of a result's file."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def load(folder: Path | None = None) -> pd.DataFrame:
    """The results in a folder, each with its rank.

    Returns:
        name, call, given, seconds (of the explainer), date, networks, and the columns of :func:`kdx.benchmark`.

    Raises:
        ValueError: A file that is not a result, or two of one name.
    """
    rows: list[dict[str, Any]] = []
    names: dict[str, Path] = {}
    for path in sorted((folder or home()).glob("*.json")):
        try:
            found = json.loads(path.read_text())
            facts = {key: found[key] for key in ("name", "call", "networks", "date")}
            facts |= {"given": ", ".join(found["given"]), "seconds": found["seconds"]}
            if found["schema"] != SCHEMA or not found["scores"]:
                raise ValueError(f"schema {found['schema']} and {len(found['scores'])} scores")
            for row in found["scores"]:
                rows.append(facts | row | {name: float(row[name]) for name in ("chance", "best", "value")})
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: expected a result of `kdx benchmark`, got {error!r}") from error
        if (other := names.setdefault(found["name"], path)) != path:
            raise ValueError(f"{path}: expected a name of its own, got {found['name']!r}, which {other.name} has")
    table = pd.DataFrame(rows)
    if len(table):
        numbers = ["chance", "best", "value", "low", "high"]
        table[numbers] = table[numbers].astype(float)
        table["rank"] = _ranks(table)
    return table


def ranked(table: pd.DataFrame, name: str) -> pd.DataFrame:
    """A table of :func:`kdx.benchmark` with ``rank`` and ``of``, among the results of the same networks; an earlier one
    of this name does not count."""
    known = load()
    if len(known):
        known = known[(known["name"] != name) & (known["networks"] == networks_digest())]
    both = pd.concat([known.drop(columns="networks", errors="ignore"), table.assign(name=None)], ignore_index=True)
    keys = ["case", "score"]
    both["rank"], both["of"] = _ranks(both), both.groupby(keys)["value"].transform("size")
    return both[both["name"].isna()].reset_index(drop=True)


def _ranks(table: pd.DataFrame) -> pd.Series:
    """1 for the largest value of a case and score, on the same networks; equal values share the better rank."""
    rounded = table.assign(value=table["value"].round(DIGITS))
    alike = [name for name in ("networks", "case", "score") if name in table]
    return rounded.groupby(alike)["value"].rank(method="min", ascending=False).astype("Int64")


def overall(table: pd.DataFrame) -> pd.DataFrame:
    """One row for each explainer, the best first.

    Args:
        table: From :func:`load`.

    Returns:
        name, place, mean rank (over the scores of case ``all``), each score, call, given, seconds. Explainers of one
        mean rank share a place.

    Raises:
        ValueError: Results on different networks, which cannot be compared.
    """
    if len(sets := table.groupby("networks")["name"].unique()) > 1:
        rare = min(sets, key=len)
        raise ValueError(f"expected results on the same networks, got others of {', '.join(rare)}; run these again")
    of_all = table[table["case"] == "all"]
    scores = of_all.pivot(index="name", columns="score", values="value")[list(dict.fromkeys(of_all["score"]))]
    ranks = of_all.groupby("name")["rank"].mean()
    facts = of_all.groupby("name")[["call", "given", "seconds"]].first()
    found = scores.join(facts).assign(**{"mean rank": ranks, "place": ranks.rank(method="min").astype(int)})
    columns = ["place", "mean rank", *scores, "call", "given", "seconds"]
    return found.sort_values(["mean rank", "name"])[columns].reset_index()


def attained(table: pd.DataFrame) -> pd.Series:
    """How far a value lies on the way from chance (0) to the best that is possible at the map's resolution (1)."""
    value, chance, best = (
        np.where(table["score"] == "ratio", np.log(table[name]), table[name]) for name in ("value", "chance", "best")
    )
    return pd.Series((value - chance) / (best - chance), index=table.index)
