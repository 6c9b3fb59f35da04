"""Tables of a report, as text with intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd
from IPython.display import Markdown
from pandas.io.formats.style import Styler

from kdx.measure.ledger import BASE, STUDENT
from kdx.pages.notebook import multiline, score_cell
from kdx.pages.own_pair import OwnPair

SHOWN = 10  # rows of slices and confusions
QUANTITIES = {
    "gained": "gained: the base is wrong, it is right",
    "lost": "lost: the base is right, it is wrong",
    "changed": "another answer than the base's",
    "inherited": "errors that are the teacher's",
    "own errors": "errors of its own",
}


def not_said(reason: str = "") -> Markdown:
    """A line for a place where something could not be measured."""
    return Markdown(reason or "Not said here, because it is not known which answers are right.")


def interval(row: Mapping[str, Any], names: tuple[str, str, str] = ("value", "low", "high"), form: str = ".1%") -> str:
    """A value with its interval, in one line; empty where it is not known."""
    value, low, high = (row[name] for name in names)
    return "" if math.isnan(value) else f"{value:{form}} [{low:{form}}, {high:{form}}]"


def p_of(p: float) -> str:
    return "" if math.isnan(p) else "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def accuracies(pair: OwnPair, changed: Mapping[str, Any]) -> Styler:
    """Right answers, and other answers than the base's, of each network."""
    table = pd.DataFrame(
        {"another answer than the base's": {role: "" if role == BASE else f"{of:.1%}" for role, of in changed.items()}}
    )
    if pair.ledger:
        of = pair.ledger.accuracy().set_index("network")
        table.insert(0, "right answers", of.apply(interval, axis=1))
    return multiline(table)


def rates(table: pd.DataFrame) -> Styler:
    """:meth:`kdx.Ledger.rates` by network, with what sets the student apart."""
    cells: dict[str, dict[str, str]] = {}
    for row in table.to_dict("records"):
        text = f"{row['images']:,} images\n{interval(row)}"
        if row["network"] != STUDENT:
            names = ("difference", "difference low", "difference high")
            text += f"\nstudent minus this: {100 * row['difference']:+.1f} points\n"
            text += f"[{100 * row[names[1]]:+.1f}, {100 * row[names[2]]:+.1f}], {p_of(row['p'])}"
        cells.setdefault(row["network"], {})[QUANTITIES[row["quantity"]]] = text
    return multiline(pd.DataFrame(cells).fillna(""))


def groups(slices: pd.DataFrame | None, confusions: pd.DataFrame) -> Styler:
    """Slices, if given, and the confusions that changed most."""
    rows = []
    for what, table in (("slice", slices), ("confusion", confusions)):
        if table is None:
            continue
        for row in table.sort_values("p", kind="stable").head(SHOWN).to_dict("records"):
            name = row.get("group") or f"{row['class']} taken for {row['answer']}"
            held = row.get("beyond seed", row["p adjusted"])
            change = "student minus base", interval(row, ("difference", "low", "high"), "+.1%")
            rows.append({"": f"{what}: {name}", "images": row["n"], change[0]: change[1], "p": p_of(row["p"])[2:]})
            rows[-1]["holds (Holm)"] = "yes" if held <= 0.05 else "no"
    if not rows:
        rows = [{"": "no confusion changed for six images or more"}]
    return multiline(pd.DataFrame(rows).set_index(""))


def calibration(table: pd.DataFrame) -> Styler:
    """:func:`kdx.calibration` by network and score."""
    cells: dict[str, dict[str, str]] = {}
    change = ("difference", "difference low", "difference high")
    for row in table.to_dict("records"):
        minus = interval(row, change, "+.3f")
        cells.setdefault(row["network"], {})[row["score"]] = interval(row, form=".3f") + (
            f"\nminus the base: {minus}" if minus else ""
        )
    return multiline(pd.DataFrame(cells).T)


def robustness(table: pd.DataFrame, n: int) -> Styler:
    """Differences of the student from each network, over all strengths of a corruption's rows, and over all."""
    cells: dict[str, dict[str, str]] = {}
    for row in table.to_dict("records"):
        name = f"{row['corruption']}, strength {row['strength']}" if row["corruption"] else "over all"
        text = f"{interval(row, ('difference', 'low', 'high'), '+.1%')}, {p_of(row['p'])}"
        cells.setdefault(f"student minus {row['network']}", {})[name] = text
    return multiline(pd.DataFrame(cells)).set_caption(f"{n} images, of all in random order")


def areas(table: pd.DataFrame) -> Styler:
    """:func:`kdx.deletion`'s areas."""
    rows = {row["map"]: interval(row, form="+.3f") for row in table.to_dict("records")}
    name = "left by random maps minus left by these, mean over the fractions"
    return multiline(pd.Series(rows, name=name).to_frame()).set_caption(f"{table['n'].iloc[0]} images")


def scores(table: pd.DataFrame) -> Styler:
    """FSS, CKA, RS and unique relevance, by stage."""
    named = table["score"] + ", " + table["network"]
    cells = {name: of.set_index("stage").apply(score_cell, axis=1) for name, of in table.groupby(named, sort=False)}
    first = table.iloc[0]
    return multiline(pd.DataFrame(cells).T).set_caption(f"{first['batches']} batches of {first['n']} images")


def shares(table: pd.DataFrame) -> Styler:
    """Shares of the variance by stage."""
    names = {"unexplained": "not expressed by the base", "handed over": "of that, explained by the teacher"}
    rows = table["network"] + ", " + table["quantity"].map(names)
    cells = {
        name: {row["stage"]: interval(row, form=".2f").replace(" ", "\n", 1) for row in of.to_dict("records")}
        for name, of in table.groupby(rows, sort=False)
    }
    return multiline(pd.DataFrame(cells).T.fillna(""))
