"""The paper's claims, judged by the numbers of a run.

A claim states that effects are positive. ``book/claims.md`` lists the claims and collects the verdicts of all pages.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
from pandas.io.formats.style import Styler

from kdx.intervals import mean_interval

COLOURS = {"supported": "#2e7d4f", "not supported": "#b3372f", "undecided": "#77736a"}


def effects(differences: pd.DataFrame) -> pd.DataFrame:
    """The effects that a claim states to be positive: means over folds, with intervals.

    Args:
        differences: One row per fold, one column per effect.

    Returns:
        Index effect; value, low and high (95 % t interval over folds), ceiling (upper end of the interval that holds
        for all effects at once, by Bonferroni's correction), folds. NaN where a fold has no value.
    """
    rows = {}
    for name, values in differences.items():
        mean = mean_interval(values)
        at_once = mean_interval(values, level=1 - 0.05 / differences.shape[1])
        rows[name] = [mean.mean, mean.low, mean.high, at_once.high, len(values)]
    return pd.DataFrame.from_dict(rows, orient="index", columns=["value", "low", "high", "ceiling", "folds"])


def judge(table: pd.DataFrame) -> str:
    """The verdict on a claim from its :func:`effects`.

    *Supported*: the 95 % interval of every effect lies above zero (low > 0). *Not supported*: the interval of some
    effect lies below zero (ceiling < 0; corrected, since one of many may be negative by chance). Else *undecided*, at
    the precision of the run.
    """
    if not len(table):
        raise ValueError("expected at least one effect to judge, got none")
    if (table["low"] > 0).all():
        return "supported"
    return "not supported" if (table["ceiling"] < 0).any() else "undecided"


@dataclass(frozen=True)
class Verdict:
    """A claim's number, a description of its effects, and their table."""

    number: int
    effect: str
    table: pd.DataFrame
    form: str = "{:+.3f}"

    @property
    def word(self) -> str:
        return judge(self.table)

    @property
    def summary(self) -> str:
        """How many effects have an interval above zero, and the effect that decides, with its interval."""
        if self.table["value"].isna().any():
            return "an effect could not be measured"
        bound, upper = ("ceiling", "ceiling") if self.word == "not supported" else ("low", "high")
        last = self.table.loc[self.table[bound].idxmin()]
        value, low, high = (self.form.format(last[column]) for column in ("value", "low", upper))
        certain = int((self.table["low"] > 0).sum())
        which = "" if len(self.table) == 1 else f"{last.name}: "
        corrected = ", upper end corrected" if upper == "ceiling" and len(self.table) > 1 else ""
        count = f"{certain} of {len(self.table)} with a 95 % interval above zero"
        return f"{count}; least {which}{value} [{low}, {high}]{corrected}"

    def show(self) -> Styler:
        """The effects as a table, captioned with the claim and its verdict."""
        named = self.table.rename(columns={"low": "95 % from", "high": "to", "ceiling": "to, corrected"})
        style = named.style.format({c: self.form.format for c in named if c != "folds"})
        return style.set_caption(f"Claim {self.number}, {self.effect}: {self.word}")


def badge(word: str) -> str:
    """A verdict as HTML."""
    return f'<b style="color: {COLOURS[word]}">{word}</b>'
