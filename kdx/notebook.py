"""What the notebooks share: checking their parameters and saying what they ran on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
from pandas.io.formats.style import Styler

from kdx.data import Dataset
from kdx.distill import autocast_dtype, device_name, pick_device
from kdx.runs import versions

LITERALS = (bool, int, float, str, list, tuple, dict, type(None))
IPYTHON = {"In", "Out"}


def check_parameters(namespace: Mapping[str, Any], **least: float) -> dict[str, Any]:
    """The notebook's parameters, from its ``globals()`` right after the parameters cell.

    The annotated literals of that cell declare names and types; whatever papermill has set
    besides, or with another type, is an error that names the choices. ``least`` gives the
    smallest value of a parameter.
    """
    declared = namespace.get("__annotations__", {})
    given: dict[str, Any] = {
        name: value
        for name, value in namespace.items()
        if not name.startswith("_") and name not in IPYTHON and isinstance(value, LITERALS)
    }
    if unknown := sorted(set(given) - set(declared)):
        raise ValueError(f"unknown parameters: {', '.join(unknown)}; choose from: {', '.join(declared)}")
    for name, kind in declared.items():
        value = given[name]
        accepted = int | float if kind is float else kind
        if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
            expected = getattr(kind, "__name__", str(kind))
            raise ValueError(f"parameter {name}: expected {expected}, got {value!r}")
    for name, smallest in least.items():
        if (value := given[name]) < smallest:
            raise ValueError(f"parameter {name}: expected at least {smallest}, got {value}")
    return given


def environment(parameters: Mapping[str, Any], device: str, **datasets: Dataset) -> Styler:
    """A table of the parameters, the versions, the device and the fingerprints of the data."""
    chosen = pick_device(device)
    rows = {("parameter", name): repr(value) for name, value in parameters.items()}
    rows |= {("version", name): version for name, version in versions().items()}
    rows["device", "name"] = device_name(chosen)
    rows["device", "precision"] = str(autocast_dtype(chosen)).removeprefix("torch.")
    rows |= {("data (SHA-256)", f"{k}, {len(d):,} images"): d.fingerprint[:16] for k, d in datasets.items()}
    table = pd.Series(rows, name="value").to_frame()
    return table.style.set_table_styles([{"selector": "td", "props": "text-align: left"}])


def score_cell(row: Mapping[str, Any]) -> str:
    """One score of a table as text: value, 95 % interval and, where there is one, p."""
    p = "" if pd.isna(row["p"]) else f", p {'≤' if row['p'] <= row['floor'] else '='} {row['p']:.3f}"
    return f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]{p}"
