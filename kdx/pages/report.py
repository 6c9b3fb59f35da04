"""``kdx explain``: the page on own models for a pair of networks, as a folder with one self-contained report."""

from __future__ import annotations

import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat
from nbconvert import HTMLExporter
from papermill.exceptions import PapermillExecutionError

from kdx.pages import build
from kdx.paths import CHECKOUT, written_whole

NOTEBOOK = CHECKOUT / "notebooks" / "04_own_models.ipynb"
EXPECTED = ("ValueError", "DataError", "TypeError")  # raised by the notebook where its input is at fault
STYLE = """
body {max-width: 62rem; margin: 2rem auto; padding: 0 1rem; font: 16px/1.5 system-ui, sans-serif; color: #222}
h1, h2, h3 {line-height: 1.2; margin-top: 2.2rem}
img {max-width: 100%; height: auto}
div.output_html, div.output_subarea {overflow-x: auto}
table {border-collapse: collapse; margin: 1rem 0; font-size: 0.85rem}
th, td {padding: 2px 10px; text-align: left; vertical-align: top; border-bottom: 1px solid #ddd}
a.anchor-link, div.prompt {display: none}
code {background: #f3f3f3; padding: 0 3px}
"""


class InputError(ValueError):
    """The input does not fit."""


def explain(parameters: Mapping[str, Any], out: Path) -> Path:
    """Execute the page on own models and write everything into the folder ``out``.

    It holds report.html, report.ipynb, a PNG of every figure, and the files that the page writes (see its parameter
    ``out``).

    Args:
        parameters: Of the notebook ``04_own_models``.
        out: A folder that does not exist yet or is empty.

    Returns:
        Path of report.html.

    Raises:
        InputError: Parameters that do not fit each other or the files; ``out`` is then not written.
    """
    if not NOTEBOOK.is_file():
        raise ValueError(f"no {NOTEBOOK}: kdx explain needs a checkout; install kdx from one, with pip install -e")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is there already; give another folder with --out, or delete it")
    try:
        with written_whole(out.absolute()) as scratch:
            executed = scratch / "report.ipynb"
            build.execute(NOTEBOOK, executed, {**parameters, "out": str(scratch)}, Path.cwd())
            build.publish_pictures(executed)
            executed.write_text(executed.read_text().replace(str(scratch), str(out.absolute())))
            write_html(executed)
    except build.BookError as error:
        cause = error.__cause__
        if not isinstance(cause, PapermillExecutionError):
            raise
        raise InputError(cause.evalue if cause.ename in EXPECTED else f"{cause.ename}: {cause.evalue}") from error
    return out / "report.html"


def write_html(executed: Path) -> Path:
    """Write an executed notebook as one HTML file without code, which loads no other file; return its path."""
    notebook = nbformat.read(executed, as_version=4)
    for cell in notebook.cells:
        if "remove-cell" in cell.metadata.get("tags", []):
            cell.outputs = []
        if alt := cell.metadata.get("mystnb", {}).get("image", {}).get("alt"):
            cell.metadata["alt"] = alt
    exporter = HTMLExporter(template_name="basic", exclude_input=True, exclude_output_prompt=True)
    body, _ = exporter.from_notebook_node(notebook)
    title = html.escape(notebook.cells[0].source.splitlines()[0].lstrip("# "))
    path = executed.with_suffix(".html")
    path.write_text(
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<link rel="icon" href="data:,"><style>{STYLE}</style></head>\n<body>{body}</body></html>\n'
    )
    return path
