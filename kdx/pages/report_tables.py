"""Tables of a report, as text with intervals."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from IPython.display import Markdown
from pandas.io.formats.style import Styler

from kdx.measure.ledger import BASE, STUDENT
from kdx.pages.notebook import multiline, score_cell
from kdx.pages.own_pair import OwnPair
from kdx.pages.sentences import LEVEL

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
    """As ``p = 0.012`` or ``p < 0.001``; empty where there is none."""
    return "" if math.isnan(p) else "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def listed(lines: Sequence[str], kind: str = "ul") -> str:
    """Lines as a list in HTML, as they are, markup included; ``kind`` is ``ul`` or ``ol``."""
    return f"<{kind}>{''.join(f'<li>{html.escape(line)}</li>' for line in lines)}</{kind}>" if lines else ""


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


def groups(classes: pd.DataFrame, slices: pd.DataFrame | None, confusions: pd.DataFrame) -> Styler:
    """Classes and, if given, slices; and the confusions that changed most, all that hold among them."""
    rows = {}
    for what, table in (("class", classes), ("slice", slices), ("confusion", confusions)):
        if table is None:
            continue
        held = table["against both"] if "against both" in table else table["p adjusted"]
        most = table.assign(held=held).sort_values(["held", "p"], kind="stable")
        most = most if what == "class" else most.head(max(SHOWN, int((held <= LEVEL).sum())))
        for row in most.to_dict("records"):
            name = row.get("group") or f"{row['class']} called {row['answer']}"
            change = interval(row, ("difference", "low", "high"), "+.1%")
            holds = "yes" if row["held"] <= LEVEL else "no"
            rows[f"{what}: {name}"] = {
                "images": row["n"],
                "student minus base": change,
                "p": p_of(row["p"]).removeprefix("p ").removeprefix("= "),
            }
            rows[f"{what}: {name}"]["holds over all"] = holds
    return multiline(pd.DataFrame(rows).T)


def calibration(table: pd.DataFrame) -> Styler:
    """:func:`kdx.calibration` by network and score."""
    cells: dict[str, dict[str, str]] = {}
    change = ("difference", "difference low", "difference high")
    for row in table.to_dict("records"):
        minus = interval(row, change, "+.3f")
        cells.setdefault(row["network"], {})[row["score"]] = interval(row, form=".3f") + (
            f"\nstudent minus this:\n{minus}" if minus else ""
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


def detectors(table: pd.DataFrame) -> Styler:
    """:func:`kdx.pages.own_detectors.new_detectors` by stage."""
    names = {"total": "detectors", "beyond": "detectors of a concept that no unit of the base detects"}
    cells: dict[str, dict[str, str]] = {}
    for row in table.to_dict("records"):
        chance = row["by chance"]
        text = interval(row).replace(" ", "\n", 1) + ("" if math.isnan(chance) else f"\nby chance {chance:.1%}")
        cells.setdefault(f"{row['network']}, {names[row['count']]}", {})[row["stage"]] = text
    return multiline(pd.DataFrame(cells).T.fillna("")).set_caption(
        f"Shares of the units of each stage, on {table['n'].iloc[0]} images of the probe"
    )


def concepts(table: pd.DataFrame) -> Styler:
    """:func:`kdx.pages.own_detectors.new_concepts`: those with most units."""
    fixed = ["stage", "concept", "category", "images", "unit", "iou"]
    roles = [name for name in table.columns if name not in fixed]
    named = {"images": "images that show it", "unit": "the student's best unit", "iou": "its IoU"}
    named |= {role: f"units, {role}" for role in roles}
    rows = table.head(SHOWN).assign(iou=table["iou"].map("{:.2f}".format)).astype(str)
    rest = f"; {len(table) - SHOWN} more in concepts.csv" if len(table) > SHOWN else ""
    return multiline(rows.rename(columns=named).set_index("stage")).set_caption(
        f"Concepts that the student detects and its base does not at the same stage{rest}"
    )
