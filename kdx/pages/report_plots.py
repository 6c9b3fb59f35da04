"""Figures of a report: answers gained and lost, calibration, robustness, and interventions."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from kdx.pages.plots import ROLES, colours

GAINED, LOST = ROLES["student"], ROLES["base"]
MOST = 30  # groups drawn
STYLES = {"unexplained": "student", "handed over": "teacher", "exchanged": "random teacher"}


def flips(table: pd.DataFrame) -> Figure:
    """Images gained to the right and lost to the left, for each group, with the groups that changed most on top.

    Args:
        table: From :meth:`kdx.Ledger.by_class` or ``by_slice``.
    """
    table = table.assign(size=(table["gained"] - table["lost"]).abs())
    table = table.nlargest(MOST, "size").sort_values("difference", ignore_index=True)
    figure, axes = plt.subplots(figsize=(6.2, 0.26 * len(table) + 1.0))
    places = range(len(table))
    axes.barh(places, table["gained"], color=GAINED, height=0.72, label="gained")
    axes.barh(places, -table["lost"], color=LOST, height=0.72, label="lost")
    p = table["against both"] if "against both" in table else table["p adjusted"]
    labels = [f"{name[:28]}{' *' if held <= 0.05 else ''}" for name, held in zip(table["group"], p, strict=True)]
    axes.set(yticks=list(places), yticklabels=labels, xlabel="images lost and gained")
    axes.xaxis.set_major_formatter(lambda x, _: f"{abs(x):g}")
    axes.axvline(0, color="#555555", lw=0.8)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    sns.despine(figure)
    return figure


def reliability(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Accuracy over confidence of each network, in bins of equally many images.

    Args:
        tables: Role -> table of :func:`kdx.measure.calibration.reliability`.
    """
    figure, axes = plt.subplots(figsize=(4.6, 3.2))
    palette = colours(tables)
    axes.plot([0, 1], [0, 1], color="#999999", lw=0.8)
    for role, table in tables.items():
        spread = [table["value"] - table["low"], table["high"] - table["value"]]
        axes.errorbar(
            table["confidence"], table["value"], spread, fmt="o-", ms=3, lw=1.2, color=palette[role], label=role
        )
    least = min(float(table["confidence"].min()) for table in tables.values())
    axes.set(xlabel="mean probability of the answer", ylabel="right answers", xlim=(max(0, least - 0.05), 1.02))
    _percent(axes.xaxis, axes.yaxis)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    sns.despine(figure)
    return figure


def robustness(table: pd.DataFrame, clean: Mapping[str, float]) -> Figure:
    """Accuracy over the strength of each corruption.

    Args:
        table: The first of :func:`kdx.robustness`.
        clean: Role -> accuracy on the same images as they are, strength 0.
    """
    names = list(table["corruption"].unique())
    figure, grid = plt.subplots(1, len(names), figsize=(9.2, 2.5), sharey=True)
    roles = list(table["network"].unique())
    palette = colours(roles)
    for axes, name in zip(grid, names, strict=True):
        for i, role in enumerate(roles):
            rows = table[(table["corruption"] == name) & (table["network"] == role)]
            values = [clean[role], *rows["value"]]
            spread = [[0, *(rows["value"] - rows["low"])], [0, *(rows["high"] - rows["value"])]]
            x = np.arange(4) + 0.09 * (i - (len(roles) - 1) / 2)
            axes.errorbar(x, values, spread, fmt="o-", ms=3, lw=1.2, color=palette[role], label=role)
        axes.set(title=name, xticks=range(4), xlabel="strength")
        axes.grid(axis="y", alpha=0.4)
    grid[0].set_ylabel("right answers")
    _percent(grid[0].yaxis)
    grid[-1].legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    sns.despine(figure)
    return figure


def replacement(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """What replaced features do at each stage: disagreements that turn, agreements that are kept.

    Args:
        tables: Role -> table of :func:`kdx.replacement`.
    """
    quantities = ["disagreements turned", "agreements kept"]
    figure, grid = plt.subplots(len(tables), 2, figsize=(8.4, 2.3 * len(tables) + 0.2), sharey=True, squeeze=False)
    for row, (role, table) in zip(grid, tables.items(), strict=True):
        for axes, quantity in zip(row, quantities, strict=True):
            _points(axes, table[table["quantity"] == quantity])
            axes.set_title(f"{role}: {quantity}")
        row[0].set_ylabel("share of images")
        row[1].legend(title="replaced", frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    _percent(grid[0, 0].yaxis)
    sns.despine(figure)
    return figure


def _points(axes: Axes, table: pd.DataFrame) -> None:
    levels, kinds = list(table["stage"].unique()), list(table["replaced"].unique())
    for i, kind in enumerate(kinds):
        rows = table[table["replaced"] == kind].set_index("stage").reindex(levels)
        x = np.arange(len(levels)) + 0.16 * (i - (len(kinds) - 1) / 2)
        spread = [rows["value"] - rows["low"], rows["high"] - rows["value"]]
        axes.errorbar(x, rows["value"], spread, fmt="o", ms=4, capsize=2, color=ROLES[STYLES[kind]], label=kind)
    axes.set(xticks=range(len(levels)), xticklabels=levels, ylim=(-0.02, 1.02))
    axes.grid(axis="y", alpha=0.4)


def deletion(curves: pd.DataFrame) -> Figure:
    """What is left of the unexplained answer as the most salient pixels are deleted.

    Args:
        curves: The first table of :func:`kdx.deletion`.
    """
    figure, axes = plt.subplots(figsize=(6.2, 3))
    names = list(curves["map"].unique())
    palette = dict(zip(names, sns.color_palette("colorblind", len(names)), strict=True)) | {"random": "#999999"}
    for name in names:
        rows = curves[curves["map"] == name]
        axes.plot([0, *rows["fraction"]], [1, *rows["value"]], "o-", ms=4, color=palette[name], label=name)
        axes.fill_between(rows["fraction"], rows["low"], rows["high"], color=palette[name], alpha=0.15, lw=0)
    axes.set(xlabel="pixels deleted", ylabel="unexplained answer left")
    _percent(axes.xaxis, axes.yaxis)
    axes.grid(axis="y", alpha=0.4)
    axes.legend(title="by the map of", frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    sns.despine(figure)
    return figure


def _percent(*of: object) -> None:
    for axis in of:
        axis.set_major_formatter(PercentFormatter(1, 0))  # type: ignore[attr-defined]
