"""One notebook over a grid of parameters, and a tidy table of what it glued."""

from __future__ import annotations

import hashlib
import html
import itertools
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import yaml

from kdx.pages.build import GLUE_PREFIX, Page, execute_pages, needs_kernel, parse_parameter

MOST = 10_000  # cells of a grid


def parse_grid(notebook: Path, items: Sequence[str]) -> dict[str, list[Any]]:
    """``name=values`` of each parameter -> name and values, as the notebook's parameters cell declares them.

    Args:
        notebook: The notebook.
        items: Values are separated by commas outside of brackets and quotes; ``0:10`` are the whole numbers from 0 up
            to 10, without it.

    Raises:
        ValueError: A parameter that the notebook does not declare, or that is given twice; no value or a wrong one.
    """
    grid: dict[str, list[Any]] = {}
    for item in items:
        name, _, text = item.partition("=")
        if name in grid:
            raise ValueError(f"-p {name}: expected once, with its values separated by commas")
        values = [value for piece in _divide(item, text) for value in _expand(item, piece)]
        found = [parse_parameter(notebook, f"{name}={value}")[1] for value in values]
        grid[name] = [value for i, value in enumerate(found) if value not in found[:i]]
        if not grid[name]:
            raise ValueError(f"-p {item}: expected values such as 0:10 or one,two")
    if not grid or (cells := math.prod(map(len, grid.values()))) > MOST:
        raise ValueError(f"expected a grid of 1 to {MOST:,} cells, from -p name=values, got {cells if grid else 0:,}")
    return grid


def _divide(item: str, text: str) -> list[str]:
    """The members of a list in YAML without its brackets, as they are written."""
    whole = f"[{text}]"
    try:
        node = yaml.compose(whole)
    except yaml.YAMLError as error:
        raise ValueError(f"-p {item}: expected values such as 0:10 or one,two, got {text}") from error
    return [whole[one.start_mark.index : one.end_mark.index] for one in node.value]


def _expand(item: str, piece: str) -> Sequence[int | str]:
    """The whole numbers of ``0:10``; any other piece as it is."""
    if not (span := re.fullmatch(r"(-?\d+):(-?\d+)", piece)):
        return [piece]
    if len(numbers := range(int(span[1]), int(span[2]))) > MOST:
        raise ValueError(f"-p {item}: expected at most {MOST:,} values, got {len(numbers):,}")
    return numbers


def plan_sweep(
    notebook: Path, grid: Mapping[str, Sequence[Any]], out: Path, common: Mapping[str, Any] | None = None
) -> list[Page]:
    """The cells of a grid as pages, in ``out/cells``.

    Args:
        notebook: The notebook.
        grid: Name -> values.
        out: The folder of the sweep.
        common: Parameters of all cells.
    """
    pages = []
    for values in itertools.product(*grid.values()):
        given = dict(zip(grid, values, strict=True))
        text = ",".join(f"{name}={value}" for name, value in sorted(given.items()))
        digest = hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()[:8]
        name = f"{re.sub(r'[^A-Za-z0-9=.,_-]+', '-', text)[:100]}-{digest}"
        page = Page(name, notebook, {**(common or {}), **given}, out / "cells" / f"{name}.ipynb")
        pages.append(page)
    return pages


def sweep(pages: Sequence[Page], names: Sequence[str], out: Path, workers: int = 1) -> Iterator[tuple[Page, str]]:
    """Execute the cells that are not up to date, and write the table anew after each.

    Args:
        pages: From :func:`plan_sweep`.
        names: Of the parameters of the grid.
        out: The folder of the sweep.
        workers: Cells executed side by side.

    Yields:
        A cell and what was done: executed, or unchanged.
    """
    finished = [page for page in pages if page.executed.is_file() and not needs_kernel(page)]
    for page, done, _ in execute_pages(pages, workers):
        if page not in finished:
            finished.append(page)
        write_table(finished, names, out)
        yield page, done


def write_table(pages: Sequence[Page], names: Sequence[str], out: Path) -> Path:
    """Write ``table.csv``: the parameters of the grid, then name and value of what a cell glued, a row for each."""
    rows = [
        [page.parameters[name] for name in names] + [glued, value]
        for page in sorted(pages, key=lambda page: page.name)
        for glued, value in read_glued(page.executed).items()
    ]
    path = out / "table.csv"
    scratch = path.with_suffix(f".{os.getpid()}.partial")
    pd.DataFrame(rows, columns=[*names, "name", "value"]).to_csv(scratch, index=False)
    os.replace(scratch, path)
    return path


def read_glued(executed: Path) -> dict[str, str]:
    """Name -> text of everything that an executed notebook glued, without markup; pictures are passed over."""
    found = {}
    for cell in nbformat.read(executed, as_version=4).cells:
        for output in cell.get("outputs", []):
            if name := output.get("metadata", {}).get("scrapbook", {}).get("name"):
                data = output.data
                if markup := data.get(f"{GLUE_PREFIX}text/html"):
                    found[name] = html.unescape(re.sub(r"<[^>]+>", "", markup)).strip()
                elif not any(kind.startswith(f"{GLUE_PREFIX}image/") for kind in data):
                    text = re.sub(r"^np\.\w+\((.*)\)$", r"\1", data[f"{GLUE_PREFIX}text/plain"])
                    found[name] = text.strip("'\"")
    return found
