"""``kdx explain``: the page on own models for a pair of networks, as a folder with one self-contained report."""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nbformat
from nbconvert import HTMLExporter
from papermill.exceptions import PapermillExecutionError

from kdx.pages import build, html_pages
from kdx.pages.gates import Gate
from kdx.paths import CHECKOUT, check_new, written_whole

NOTEBOOK = CHECKOUT / "notebooks" / "04_own_models.ipynb"
EXPECTED = ("ValueError", "DataError", "TypeError")  # raised by the notebook where its input is at fault
FIRST = "first-page"  # tag of the cells that come first in a report


class InputError(ValueError):
    """The input does not fit."""


def explain(
    parameters: Mapping[str, Any], out: Path, command: str = "", gates: Sequence[Gate] = (), json_only: bool = False
) -> list[str]:
    """Execute the page on own models and write everything into the folder ``out``.

    It holds report.html, report.ipynb, the maps as PNG, and the files that the page writes (see its parameter ``out``);
    or, with ``json_only``, statement.json alone.

    Args:
        parameters: Of the notebook ``04_own_models``.
        out: A folder that does not exist yet or is empty.
        command: What is said to have made the report.
        gates: Conditions under which a release fails.
        json_only: Keep the statement alone.

    Returns:
        Why a release fails, for each gate that does.

    Raises:
        ValueError: Parameters that do not fit each other or the files (:class:`InputError`), or a folder ``out`` that
            is there; nothing is then written.
    """
    if not NOTEBOOK.is_file():
        raise ValueError(f"no {NOTEBOOK}: kdx explain needs a checkout; install kdx from one, with pip install -e")
    check_new(out)
    try:
        with written_whole(out.absolute(), new=True) as scratch:
            executed = scratch / "report.ipynb"
            given = {**parameters, "out": str(scratch), "command": command}
            build.execute(NOTEBOOK, executed, given, Path.cwd())
            found = json.loads((scratch / "statement.json").read_text())
            failures = {gate.text: gate.failure(found["metrics"]) for gate in gates}
            (scratch / "statement.json").write_text(json.dumps(found | {"gates": failures}, indent=2) + "\n")
            if json_only:
                for path in scratch.iterdir():
                    if path.name != "statement.json":
                        path.unlink()
            else:
                build.publish_pictures(executed, optional=True)
                executed.write_text(executed.read_text().replace(str(scratch), str(out.absolute())))
                write_html(executed, command, failures)
    except build.BookError as error:
        cause = error.__cause__
        if not isinstance(cause, PapermillExecutionError):
            raise
        raise InputError(cause.evalue if cause.ename in EXPECTED else f"{cause.ename}: {cause.evalue}") from error
    return [failure for failure in failures.values() if failure]


def write_html(executed: Path, command: str = "", failures: Mapping[str, str | None] | None = None) -> Path:
    """Write an executed notebook as one HTML file without code, which loads no other file; return its path.

    Cells tagged ``first-page``, with the heading above them, come right after the first cell. Of a figure that is there
    as PNG and as SVG, the smaller is kept.

    Args:
        executed: The notebook.
        command: What is said to have made it.
        failures: Condition of a gate -> why it failed, or None.
    """
    notebook = nbformat.read(executed, as_version=4)
    for cell in notebook.cells:
        if "remove-cell" in cell.metadata.get("tags", []):
            cell.outputs = []
        if alt := cell.metadata.get("mystnb", {}).get("image", {}).get("alt", ""):
            cell.metadata["alt"] = alt
        for output in cell.get("outputs", []):
            _keep_smaller(output.get("data", {}), alt)
    cells = notebook.cells
    if first := [i for i, cell in enumerate(cells) if FIRST in cell.metadata.get("tags", [])]:
        moved = cells[first[0] - 1 : first[-1] + 1]
        notebook.cells = [cells[0], *moved, *cells[1 : first[0] - 1], *cells[first[-1] + 1 :]]
    exporter = HTMLExporter(template_name="basic", exclude_input=True, exclude_output_prompt=True)
    body, _ = exporter.from_notebook_node(notebook)
    title = notebook.cells[0].source.splitlines()[0].lstrip("# ")
    headings = re.findall(r'<h2 id="([^"]+)">(.*?)<a ', body)
    contents = "".join(f'<li><a href="#{html.escape(name)}">{text}</a></li>' for name, text in headings)
    lines = [f"{text}: {'failed, ' + why if why else 'passed'}" for text, why in (failures or {}).items()]
    gates = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    gates = f"<section><h2>Gates</h2><ul>{gates}</ul></section>" if gates else ""
    path = executed.with_suffix(".html")
    nav = f'<nav aria-label="Contents"><ul>{contents}</ul></nav>'
    path.write_text(html_pages.page(title, f"{nav}<main>{body}{gates}</main>", command))
    return path


def _keep_smaller(data: dict[str, Any], alt: str) -> None:
    """Keep the smaller of a PNG and an SVG, in place; nbconvert gives an SVG no description, so it is written here."""
    if not {"image/png", "image/svg+xml"} <= data.keys():
        return
    svg = base64.b64encode(data.pop("image/svg+xml").encode()).decode()
    if len(svg) < len(data["image/png"]):
        del data["image/png"]
        data["text/html"] = f'<img alt="{html.escape(alt)}" src="data:image/svg+xml;base64,{svg}">'
