"""Reports as single HTML files: the frame of the page, pictures and tables in it."""

from __future__ import annotations

import base64
import html
import io
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

STYLE = """
:root {color-scheme: light}
body {max-width: 62rem; margin: 2rem auto; padding: 0 1rem; font: 16px/1.5 system-ui, sans-serif; color: #222}
h1, h2, h3 {line-height: 1.2; margin-top: 2.2rem}
img, svg {max-width: 100%; height: auto}
div.wide, div.output_html, div.output_subarea, div.jp-OutputArea-output {overflow-x: auto}
table {border-collapse: collapse; margin: 1rem 0; font-size: 0.85rem}
div.wide td {white-space: pre}
caption {text-align: left; padding-bottom: 4px}
th, td {padding: 2px 10px; text-align: left; vertical-align: top; border-bottom: 1px solid #ddd}
a.anchor-link, div.prompt {display: none}
code {background: #f3f3f3; padding: 0 3px; overflow-wrap: anywhere}
nav ul {columns: 16rem; padding-left: 1.2rem}
@media (max-width: 40rem) {
  body {margin: 1rem auto; padding: 0 0.7rem}
  h1 {font-size: 1.5rem}
  div.wide img {max-width: none; width: 44rem}
}
@media print {
  body {max-width: none; font-size: 11pt}
  nav {display: none}
  h2, h3 {break-after: avoid}
  img, svg, tr {break-inside: avoid}
  div.output_html, div.output_subarea {overflow: visible}
}
"""


def page(title: str, body: str, command: str = "") -> str:
    """A whole page, which loads no other file.

    Args:
        title: As text.
        body: As HTML.
        command: What is said to have made it.
    """
    made_by = f"<footer><p>Made by <code>{html.escape(command)}</code></p></footer>" if command else ""
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><style>{STYLE}</style></head>\n<body>{body}{made_by}</body></html>\n'
    )


def picture(figure: Figure, alt: str) -> str:
    """A figure as an image, which scrolls on narrow screens; the figure is closed."""
    found = io.BytesIO()
    figure.savefig(found, format="png", dpi=180, bbox_inches="tight")
    plt.close(figure)
    data = base64.b64encode(found.getvalue()).decode()
    return f'<div class="wide" tabindex="0"><img alt="{html.escape(alt)}" src="data:image/png;base64,{data}"></div>'


def table(rows: pd.DataFrame, **options: Any) -> str:
    """A table that scrolls on narrow screens, whose cells may have several lines; ``options`` are those of
    :meth:`pandas.DataFrame.to_html`."""
    text = rows.to_html(**{"index": False, "border": 0, "na_rep": "", "float_format": "{:.3f}".format} | options)
    lines = text.replace("\\n", "\n")  # pandas writes the end of a line as a backslash and an n
    return f'<div class="wide" tabindex="0">{lines}</div>'


def listed(lines: list[str]) -> str:
    """Lines of text as a list."""
    return f"<ul>{''.join(f'<li>{html.escape(line)}</li>' for line in lines)}</ul>"
