"""Figures of planted knowledge: maps beside framed cues, scores of explainers, sanity checks."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from kdx.data.dataset import Dataset
from kdx.pages.plots import MAPS, ROLES, bare, colours, show_image

CUES = ("#1b9e77", "#e6ab02", "#4c8ed9", "#d95f9f", "#a6761d", "#66a61e", "#7570b3", "#666666")


def cue_maps(dataset: Dataset, maps: Mapping[str, Tensor], wanted: Sequence[int]) -> Figure:
    """Images of :mod:`kdx.data.cues` beside raw maps of several explainers, with the outlines of the cues.

    Args:
        dataset: The n images with masks.
        maps: Explainer -> raw map (n, h, w), each on its own scale.
        wanted: Cues that the maps should show, whose outlines are bold.
    """
    assert dataset.masks is not None
    across = min(8, 1 + len(maps))
    names = ["image", *maps]
    bands = -(-len(names) // across)
    n = len(dataset)
    figure, grid = plt.subplots(bands * n, across, figsize=(1.35 * across, 1.35 * bands * n + 0.5 * bands))
    for axes in grid.flat:
        bare(axes)
    others = [cue for cue in range(len(CUES)) if cue not in wanted]
    for j, name in enumerate(names):
        for i in range(n):
            axes = grid[j // across * n + i, j % across]
            if name == "image":
                show_image(axes, dataset.images[i])
            else:
                side = dataset.images.shape[-1] - 0.5
                whole = (-0.5, side, side, -0.5)
                axes.imshow(maps[name][i], cmap=MAPS, vmin=0, interpolation="nearest", extent=whole)
            _outline(axes, dataset.masks[i], wanted)
            _outline(axes, dataset.masks[i], others, width=0.5)
            if i == 0:
                axes.set_title(textwrap.fill(name, 16), fontsize=9)
    return figure


def _outline(axes: Axes, mask: Tensor, wanted: Iterable[int], width: float = 1.6) -> None:
    for cue in wanted:
        if (inside := (mask >> cue) & 1).any():
            rows, columns = inside.any(1).nonzero()[:, 0], inside.any(0).nonzero()[:, 0]
            corner = (int(columns[0]) - 0.5, int(rows[0]) - 0.5)
            sides = (int(columns[-1] - columns[0]) + 1, int(rows[-1] - rows[0]) + 1)
            axes.add_patch(Rectangle(corner, *sides, fill=False, ec=CUES[cue], lw=width))


def contest(table: pd.DataFrame, xlabel: str, logarithmic: bool = False, line: float | None = None) -> Figure:
    """One score of many explainers: one row per explainer, one column per stage, one colour per direction.

    Args:
        table: explainer, stage, direction, value, low, high.
        xlabel: Name of the score.
        logarithmic: Whether the axis is.
        line: A value to compare with.
    """
    levels, names = list(table["stage"].unique()), list(table["explainer"].unique())
    figure, grid = plt.subplots(1, len(levels), figsize=(9.2, 0.26 * len(names) + 1), sharex=True, sharey=True)
    palette = colours(table["direction"].unique())
    for axes, stage in zip(np.atleast_1d(grid), levels, strict=True):
        for i, (direction, rows) in enumerate(table[table["stage"] == stage].groupby("direction", sort=False)):
            rows = rows.set_index("explainer").reindex(names)
            y = [j + 0.22 * (i - 0.5 * (table["direction"].nunique() - 1)) for j in range(len(names))]
            spread = [(rows["value"] - rows["low"]).fillna(0), (rows["high"] - rows["value"]).fillna(0)]
            axes.errorbar(rows["value"], y, xerr=spread, fmt="o", ms=4, capsize=2, color=palette[direction])
        if line is not None:
            axes.axvline(line, color="#999999", lw=0.8, zorder=0)
        axes.set(title=stage, yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.5))
        axes.grid(axis="y", alpha=0.3)
        if logarithmic:
            axes.set_xscale("log")
            axes.set_xlim(max(0.02, table["value"].min() / 1.5), min(150, table["value"].max() * 1.5))
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.minorticks_off()
    handles = [plt.Line2D([], [], color=palette[d], marker="o", label=d) for d in table["direction"].unique()]
    if len(handles) > 1:
        figure.legend(handles=handles, loc="outside upper right", ncols=len(handles), frameon=False)
    figure.supxlabel(xlabel, fontsize="medium")
    sns.despine(figure)
    return figure


def cascades(table: pd.DataFrame) -> Figure:
    """Similarity of maps over the share of a network that is random, one panel per explainer.

    Lines are means over stages, bars span the least to the most similar stage.

    Args:
        table: From :func:`kdx.planted.sanity.sanity`.
    """
    names = list(table["explainer"].unique())
    depths = list(table["randomised"].unique())
    across = 4
    figure, grid = plt.subplots(
        -(-len(names) // across), across, figsize=(9.2, 1.75 * -(-len(names) // across) + 0.4), sharex=True, sharey=True
    )
    palette = dict(zip(table["measure"].unique(), (ROLES["student"], ROLES["base"]), strict=True))
    for axes in grid.flat[len(names) :]:
        axes.set_visible(False)
    for axes, name in zip(grid.flat, names, strict=False):
        for measure, rows in table[table["explainer"] == name].groupby("measure", sort=False):
            by_depth = rows.groupby("randomised", sort=False)["value"].agg(["mean", "min", "max"]).loc[depths]
            spread = [by_depth["mean"] - by_depth["min"], by_depth["max"] - by_depth["mean"]]
            axes.errorbar(
                range(len(depths)), by_depth["mean"], yerr=spread, fmt="o-", ms=3, lw=1, color=palette[measure]
            )
        axes.set_title(name, fontsize=10)
        axes.set_xticks(range(len(depths)), depths, rotation=60, ha="right", rotation_mode="anchor")
        axes.axhline(0, color="#999999", lw=0.8, zorder=0)
    handles = [plt.Line2D([], [], color=colour, marker="o", label=name) for name, colour in palette.items()]
    figure.legend(handles=handles, loc="outside upper right", ncols=2, frameon=False)
    figure.supylabel("similarity with the original map", fontsize="medium")
    sns.despine(figure)
    return figure
