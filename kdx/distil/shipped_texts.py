"""Text networks that come with the checkout: one file each in ``data/networks/text``, with weights in float16.

They are found by the digest of their specification, as those of images are (:mod:`kdx.distil.shipped`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from kdx.distil.run_store import Run
from kdx.networks.models import read_header
from kdx.networks.text_networks import TextNetwork, load_text, save_text
from kdx.paths import networks_home, sha256_of

TOLERANCE = 0.002  # of an accuracy: three of the test sentences, whose answers rounding the weights may turn
COLUMNS = ["role", "seed", "layers", "technique", "accuracy", "two", "file", "sha256", "digest", "seconds"]


def table() -> pd.DataFrame:
    """One row for each shipped text network; ``accuracy`` of four classes, ``two`` of two polarities, on the test
    sentences."""
    path = _home() / "networks.csv"
    return pd.read_csv(path, dtype={"digest": str}) if path.is_file() else pd.DataFrame(columns=COLUMNS)


def find_shipped(digest: str) -> Run | None:
    """The shipped network of this digest, or None.

    Raises:
        ValueError: Its file is damaged.
    """
    known = table()
    rows = known[known["digest"] == digest]
    if not len(rows) or not (path := _home() / rows["file"].iloc[0]).is_file():
        return None
    if (got := sha256_of(path)) != (expected := rows["sha256"].iloc[0]):
        raise ValueError(
            f"the shipped network {path} is damaged (expected SHA-256 {expected[:12]}…, got {got[:12]}…); take it from "
            "the repository again"
        )
    header = read_header(path)
    return Run(expected[:32], path, header["run"], pd.DataFrame(header["history"]))


def verify(accuracy: Callable[[TextNetwork], float] | None) -> Iterator[dict[str, Any]]:
    """Open every shipped text network, and measure it.

    Args:
        accuracy: Measures a network on the test sentences, of four classes; None where these are not on this machine.

    Yields:
        A row of :func:`table` with ``measured``, ``skipped`` and ``problem``, as of :func:`kdx.distil.shipped.verify`.
    """
    for row in table().to_dict("records"):
        measured, problem, skipped = math.nan, "", ""
        try:
            if (run := find_shipped(row["digest"])) is None:
                problem = "the file is missing"
            elif accuracy is None:
                skipped = "the treebank is not on this machine"
            else:
                measured = accuracy(load_text(run.path)[0])
                if not abs(measured - row["accuracy"]) <= TOLERANCE:
                    problem = f"expected an accuracy of {row['accuracy']:.4f}, got {measured:.4f}"
        except ValueError as error:
            problem = str(error)
        yield row | {"file": f"text/{row['file']}", "measured": measured, "problem": problem, "skipped": skipped}


def ship(run: Run, role: str, accuracy: float, two: float) -> Path:
    """Write a network into ``data/networks/text`` and its row into the table, unless it is there.

    Args:
        run: Of a text network.
        role: Such as ``response``.
        accuracy: Of four classes, as a fraction.
        two: Of two polarities.
    """
    if there := find_shipped(run.digest):
        return there.path
    spec = run.manifest["spec"]
    path = _home() / f"{role.replace(' ', '_').replace(',', '')}-{spec['seed']}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    network, header = load_text(run.file)
    kept = {name: header[name] for name in ("classes", "run", "history")}
    scratch = path.with_suffix(".partial")
    save_text(scratch, network, kept, torch.float16)
    row = {
        "role": role, "seed": spec["seed"], "layers": spec["model"]["layers"], "technique": spec["technique"]["name"],
        "accuracy": round(accuracy, 4), "two": round(two, 4), "file": path.name, "sha256": sha256_of(scratch),
        "digest": run.digest, "seconds": run.manifest["seconds"],
    }  # fmt: skip
    known = table()
    rows = pd.concat([known[known["file"] != path.name], pd.DataFrame([row])]).sort_values(["role", "seed"])
    listed = path.parent / "networks.csv.partial"
    rows[COLUMNS].to_csv(listed, index=False)
    os.replace(scratch, path)
    os.replace(listed, path.parent / "networks.csv")
    return path


def _home() -> Path:
    return networks_home() / "text"
