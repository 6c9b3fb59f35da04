"""Tables of a page that a reader can sort, without a server and without a library."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

import pandas as pd
from IPython.display import HTML

STYLE = """
.kdx-sortable { overflow-x: auto; }
.kdx-sortable table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; }
.kdx-sortable th, .kdx-sortable td { padding: 0.25rem 0.6rem; text-align: left; vertical-align: top;
  border-bottom: 1px solid color-mix(in srgb, currentColor 20%, transparent); }
.kdx-sortable th button { font: inherit; font-weight: 600; color: inherit; background: none; border: 0; padding: 0;
  cursor: pointer; text-align: left; }
.kdx-sortable th[aria-sort=ascending] button::after { content: " \\25B2"; }
.kdx-sortable th[aria-sort=descending] button::after { content: " \\25BC"; }
.kdx-sortable tbody th { font-weight: 600; }
.kdx-sortable caption { caption-side: top; text-align: left; white-space: normal !important; }
.kdx-sortable td { white-space: nowrap; }
"""
SCRIPT = """
for (const table of document.querySelectorAll(".kdx-sortable table:not([data-ready])")) {
  table.dataset.ready = "yes";
  const [body, heads] = [table.tBodies[0], [...table.tHead.rows[0].cells]];
  const value = (row, i) => row.cells[i].dataset.value;
  const compare = (a, b) => (isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b);
  heads.forEach((head, i) => head.querySelector("button").addEventListener("click", () => {
    const way = head.ariaSort === "descending" || (head.ariaSort !== "ascending" && head.dataset.first === "ascending")
      ? "ascending" : "descending";
    heads.forEach((other) => (other.ariaSort = "none"));
    head.ariaSort = way;
    const sign = way === "ascending" ? 1 : -1;
    const empty = (row) => value(row, i) === "";
    const rows = [...body.rows].sort((a, b) => empty(a) || empty(b) ? empty(a) - empty(b)
      : sign * compare(value(a, i), value(b, i)));
    body.append(...rows);
  }));
}
"""


def sortable(
    table: pd.DataFrame,
    shown: Mapping[str, Sequence[str]] | None = None,
    *,
    caption: str,
    ascending: Sequence[str] = (),
    code: Sequence[str] = (),
) -> HTML:
    """A table whose rows are sorted by a click on the name of a column.

    Args:
        table: Numbers and texts. The first column names the rows. Rows are shown in their order.
        shown: Column -> what its cells show instead of their values, by which they are sorted all the same.
        caption: Says what the table holds.
        ascending: Columns whose first click sorts the smallest value to the top; others begin with the largest.
        code: Columns that hold commands.

    Returns:
        The table as HTML, with its own script. Cells that are NaN stay at the end.
    """
    heads = "".join(
        f'<th scope="col" aria-sort="none" data-first="{"ascending" if name in ascending else "descending"}">'
        f'<button type="button">{html.escape(str(name))}</button></th>'
        for name in table
    )
    rows = []
    for i, row in enumerate(table.itertuples(index=False)):
        cells = []
        for place, (name, value) in enumerate(zip(table, row, strict=True)):
            missing = isinstance(value, float) and math.isnan(value)
            text = html.escape(str(shown[name][i] if shown and name in shown else "" if missing else value))
            text = f"<code>{text}</code>" if name in code and text else text
            tag = 'th scope="row"' if place == 0 else "td"
            key = "" if missing else html.escape(str(value), quote=True)
            cells.append(f'<{tag} data-value="{key}">{text}</{tag[:2]}>')
        rows.append(f"<tr>{''.join(cells)}</tr>")
    title = html.escape(caption)
    return HTML(
        f'<style>{STYLE}</style><div class="kdx-sortable" tabindex="0" role="region" aria-label="{title}">'
        f"<table><caption>{title}</caption><thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody>"
        f"</table></div><script>{SCRIPT}</script>"
    )
