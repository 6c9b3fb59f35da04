"""The paper's claims, judged by the numbers of a run.

A claim states that effects are positive. ``book/claims.md`` lists the claims, states the rule, and collects the
verdicts of all pages.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from pandas.io.formats.style import Styler

from kdx.inference import holm, two_factor
from kdx.intervals import by_fold

ALPHA = 0.025  # of each of the three statements; at most two of them can be untrue at once
ACCURACY_MARGIN = 0.01  # effects up to this are too small to matter; fixed before any result
SCORE_MARGIN = 0.02  # likewise, of a score or of a share, such as that of units that are detectors
SUPPORTED, REFUTED, UNDECIDED = "supported", "not supported", "undecided"
NONE_LARGER = "no effect larger than δ"
COLOURS = {SUPPORTED: "#2e7d4f", REFUTED: "#b3372f", NONE_LARGER: "#2d6a9f", UNDECIDED: "#6b675f"}


Margin = float | Mapping[Any, float]


def margins(names: Iterable[Any]) -> dict[Any, float]:
    """δ of effects in different units, by name: that of accuracy where a name says *accuracy*, else that of scores."""
    return {name: ACCURACY_MARGIN if "accuracy" in name else SCORE_MARGIN for name in names}


def effects(values: Mapping[Any, ArrayLike], margin: Margin, ratios: Mapping[Any, float] | None = None) -> pd.DataFrame:
    """The effects that a claim states to be positive, with the tests that decide it.

    Args:
        values: Name -> (folds, images) or (folds, batches), as for :func:`kdx.inference.two_factor`.
        margin: The size from which on an effect matters, δ; name -> size where effects have different units.
        ratios: Name -> ratio of :func:`kdx.inference.two_factor`, where the rows are no folds of a cross-validation.

    Returns:
        Index effect; value, low, high (95 %, over folds and images), positive (one-sided p against 0 or less), negative
        (against 0 or more, adjusted by Holm for the number of effects), margin (δ), within (against -δ or less and δ or
        more, the larger p), detectable (roughly the least effect found to be positive with 80 % power), folds, images
        (or batches). NaN where a value is missing; where values do not vary at all, only the tests are.
    """
    rows = {}
    for name, of in values.items():
        x = np.asarray(of, dtype=float)
        estimate = two_factor(x, (ratios or {}).get(name))
        positive = estimate.p_above()
        delta = margin[name] if isinstance(margin, Mapping) else margin
        rows[name] = [
            estimate.mean,
            *estimate.interval(),
            positive,
            1 - positive,
            delta,
            np.maximum(estimate.p_above(-delta), estimate.p_below(delta)),
            estimate.detectable(ALPHA),
            len(x),
            x.shape[-1] if x.ndim == 2 else 0,
        ]
    columns = ["value", "low", "high", "positive", "negative", "margin", "within", "detectable", "folds", "images"]
    table = pd.DataFrame.from_dict(rows, orient="index", columns=columns)
    table.index = pd.Index([", ".join(map(str, n)) if isinstance(n, tuple) else n for n in rows], name="effect")
    return table.assign(negative=holm(table["negative"]))


def judge(table: pd.DataFrame) -> str:
    """The verdict on a claim from its :func:`effects`.

    *Supported*: every effect is positive, each by its own test, since all of them must agree. *Not supported*: some
    effect is negative, by Holm's test. *No effect larger than δ*: every effect lies within ±δ, each by its own test.
    Else, and always for a single fold, *undecided*.
    """
    if not len(table):
        raise ValueError("effects: expected at least one to judge, got none")
    if table["folds"].min() < 2:
        return UNDECIDED
    if (table["positive"] <= ALPHA).all():
        return SUPPORTED
    if (table["negative"] <= ALPHA).any():
        return REFUTED
    return NONE_LARGER if (table["within"] <= ALPHA).all() else UNDECIDED


@dataclass(frozen=True)
class Verdict:
    """A claim and the values that decide it.

    Attributes:
        number: Of the claim; a text such as H1 for those of another paper.
        effect: What its effects are.
        values: As for :func:`effects`.
        margin: δ, in the unit of the values, as for :func:`effects`.
        form: How numbers are written.
        ratios: As for :func:`effects`.
    """

    number: int | str
    effect: str
    values: Mapping[Any, ArrayLike]
    margin: Margin
    form: str = "{:+.3f}"
    ratios: Mapping[Any, float] | None = None

    @cached_property
    def table(self) -> pd.DataFrame:
        return effects(self.values, self.margin, self.ratios)

    @property
    def word(self) -> str:
        return judge(self.table)

    @property
    def summary(self) -> str:
        """The effect that decides, with its interval, and the least effect that the design can see."""
        table, word = self.table, self.word
        if table["value"].isna().any():
            return "an effect could not be measured"
        if (still := table["positive"].isna()).any():
            return f"no test, since {table.index[still][0]} is the same in all folds and images"
        if table["folds"].min() < 2:
            return "no test, with a single fold"
        uncertain = {REFUTED: -table["negative"], NONE_LARGER: table["within"]}.get(word, table["positive"])
        column = {REFUTED: "negative", NONE_LARGER: "within"}.get(word, "positive")
        shown = f"shown to be {column}" + f" ±{self._delta}" * (word == NONE_LARGER)
        found, several = (table[column] <= ALPHA).sum(), len(table) > 1
        count = f"{found} of {len(table)} effects {shown}" if several else f"{'' if found else 'not '}{shown}"
        last = table.loc[uncertain.idxmax()]
        name = f"{'clearest' if word == REFUTED else 'least certain'}: {last.name}, " if several else ""
        value, low, high = (self.form.format(last[column]) for column in ("value", "low", "high"))
        visible = self._size(table["detectable"].max())
        return f"{count}; {name}{value} [{low}, {high}]; detectable with 80 % power: {visible}"

    def show(self) -> Styler:
        """The effects as a table, captioned with the claim and its verdict."""
        headings = {"low": "95 % from", "high": "to", "detectable": "detectable with 80 % power", "margin": "δ"}
        headings["images"] = "images or parts"
        tests = {"positive": "p, positive", "negative": "p, negative (Holm)", "within": "p, within ±δ"}
        forms: dict[str, Any] = dict.fromkeys(["value", "95 % from", "to"], self.form.format)
        forms |= {headings["detectable"]: self._size, "δ": self._size} | dict.fromkeys(tests.values(), "{:.3f}")
        table = self.table if self.table["margin"].nunique() > 1 else self.table.drop(columns="margin")
        style = table.rename(columns=headings | tests).style.format(forms)
        return style.set_caption(f"Claim {self.number}, {self.effect}: {self.word} (δ = {self._delta})")

    @property
    def _delta(self) -> str:
        return " or ".join(map(self._size, sorted(self.table["margin"].unique())))

    def _size(self, value: float) -> str:
        """A size, which needs no sign."""
        return self.form.replace("+", "").format(value)


def beyond_controls(scores: pd.DataFrame, networks: Sequence[str], controls: Sequence[str]) -> pd.DataFrame:
    """Whether the scores of networks exceed those of every control, which they must before a teacher explains them.

    Args:
        scores: Rows of :class:`kdx.Scorer`, one for each network, stage and fold, with the columns network and fold.
        networks: Those of which something is claimed.
        controls: Those that never had the teacher.

    Returns:
        network, stage, control; value, low, high (the difference, paired by fold and image or batch, with its own 95 %
        interval), p (that it is 0 or less; adjusted by Holm for all rows, so those with p <= 0.05 hold jointly), folds.
        Where network and control share one fold, the statement is about the networks of this fold alone.

    Raises:
        ValueError: Networks or controls without scores, or without a common fold.
    """
    of = by_fold(scores)
    if unknown := {*networks, *controls} - {network for network, _ in of}:
        raise ValueError(f"scores: expected rows of {', '.join(sorted(unknown))}, got none")
    rows = []
    for network, stage in [key for key in of if key[0] in networks]:
        for control in controls:
            one, other = of[network, stage], of[control, stage]
            if not len(common := one.index.intersection(other.index)):
                raise ValueError(f"scores: expected a common fold of {network} and {control}, got none")
            estimate = two_factor(one.loc[common] - other.loc[common])
            low, high = estimate.interval()
            rows.append([network, stage, control, estimate.mean, low, high, estimate.p_above(), len(common)])
    table = pd.DataFrame(rows, columns=["network", "stage", "control", "value", "low", "high", "p", "folds"])
    return table.assign(p=holm(table["p"]))


def badge(word: str) -> str:
    """A verdict as HTML."""
    return f'<b style="color: {COLOURS[word]}">{word}</b>'
